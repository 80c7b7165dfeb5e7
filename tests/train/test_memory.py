"""A run may last for weeks, on any number of pictures: what it holds in memory grows neither with the steps nor with the pictures."""
import contextlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
import cv2
import keras
import numpy as np
import pytest
from fcos_lite.data.batches import Batches
from fcos_lite.data.images import Example
from fcos_lite.scenes.scenes import Scenes, World

STEPS, EPOCH = 2000, 100

class Keeper(keras.callbacks.Callback):
    "Keeps the weights of every step, as nobody should."
    kept = []
    def on_train_batch_end(self, batch, logs=None):
        self.kept.append(self.model.get_weights())      # 98 kB; the first hundred megabytes find room in what the compiler left

def train(folder, kind):
    "A run in a process of its own; says how much more it holds after all steps than after 200."
    from fcos_lite.config import SCRATCH_RECIPE, ModelConfig
    from fcos_lite.train.memory import Footprint
    from fcos_lite.train.callbacks import EpochLogger
    from fcos_lite.train.run import Run
    from fcos_lite.train.trainer import build_model, compile_for_training
    network = ModelConfig(image_size=32, strides=(16, 32), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4,
                      pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
    recipe, world = SCRATCH_RECIPE.change(level_areas=(256,), batch_size=2, gradient_accumulation_steps=2), World(size=32, min_height=10, max_height=30, max_people=2)
    batches = Batches(list(Scenes(2 * EPOCH, 1, world)), 2, 32, shuffle_seed=0, drop_last=True)
    model = build_model(network, recipe)
    compile_for_training(model, STEPS)
    report = EpochLogger(Run.create(Path(folder) / "run"), list(Scenes(8, 2, world)), recipe, [STEPS])     # validates after every epoch
    footprint = Footprint()
    with contextlib.redirect_stdout(io.StringIO()):
        model.fit(batches, epochs=STEPS // EPOCH, shuffle=False, verbose=0, callbacks=[*{"alone": [], "report": [report], "keeper": [Keeper()]}[kind], footprint])
    print(json.dumps({"steps": footprint.step, "growth": footprint.growth(since=2 * EPOCH)}))

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "report", "keeper"])
def test_two_thousand_steps_hold_no_more_than_two_hundred(tmp_path, kind):
    "Under one per cent more, validation, rows and weights included; where a callback keeps weights, the same measure sees it."
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, str(tmp_path), kind], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == STEPS
    assert (found["growth"] > 0.01) == (kind == "keeper"), found

WORLD = World(size=32, min_height=10, max_height=30, max_people=2)
MOST = 30                            # bytes a picture that an epoch's shuffled order may take

def most_allocated(examples, batches=25):
    "Bytes, at the worst moment of some batches."
    data = Batches(examples, 4, 32, max_boxes=2, shuffle_seed=0)
    tracemalloc.start()
    for index in range(batches): data[index]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def photographs(folder, count):
    "Lines about photographs; all on the same file, which nothing here can know."
    path = folder / "one.jpg"
    cv2.imwrite(str(path), Scenes(1, 0, WORLD)[0].image)
    return [Example(i, path, np.zeros((1, 4), np.float32), np.zeros(1, np.int32), 32, 32) for i in range(count)]

@pytest.mark.parametrize("kind", ["scenes", "photographs"])
def test_ten_thousand_pictures_take_no_more_than_a_hundred(tmp_path, kind):
    make = {"scenes": lambda count: Scenes(count, 0, WORLD), "photographs": lambda count: photographs(tmp_path, count)}[kind]
    most_allocated(make(100))        # fills caches
    few, many = (most_allocated(make(count)) for count in (100, 10_000))
    assert many - few < MOST * 9_900

def test_the_measure_sees_pictures_that_stay(tmp_path):
    class Kept(list):
        "Pictures that are read once and for all."
        def __getitem__(self, index):
            self[index] = replace(super().__getitem__(index), image=super().__getitem__(index).read())
            return super().__getitem__(index)
    assert most_allocated(Kept(photographs(tmp_path, 400)), 100) - most_allocated(photographs(tmp_path, 400), 100) > 0.9 * 400 * 3 * 32**2

if __name__ == "__main__": train(*sys.argv[1:])
