"""A run may last for weeks, on any number of images: its memory grows neither with the steps nor with the images."""
import contextlib
import io
import json
import math
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
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE, ModelConfig
from fcos_lite.data.batches import Batches
from fcos_lite.data.example import Example
from fcos_lite.detector.model import FCOS
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.memory import count_activations, explain_memory, limit_gpu_memory, most_resident

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(
    image_size=32, strides=(16, 32), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(level_areas=(256,), batch_size=2, gradient_accumulation_steps=2)
WORLD = World(size=32, min_height=10, max_height=30, max_people=2)

# The estimate

@pytest.mark.parametrize("config", [
    replace(REFERENCE, image_size=64),
    replace(REFERENCE, image_size=64, strides=(8, 16, 32, 64), backbone_blocks=(1, 2, 3, 1), tower_depth=2)])
def test_the_count_is_what_a_walk_through_the_network_finds(config):
    from fcos_lite.train.nan_guard import layer_outputs
    counts = {}
    for name, output in layer_outputs(FCOS(config), np.zeros((1, 64, 64, 3), "float32")):
        part = "heads on " + name[-2:] if " on P" in name else name.split("_")[0].upper()
        counts[part] = counts.get(part, 0) + math.prod(output.shape)
    counts.pop("THE IMAGE")
    assert count_activations(config) == counts
    assert sum(count_activations(replace(config, image_size=128)).values()) == 4 * sum(counts.values())

# Full memory

class Hungry(keras.callbacks.Callback):
    "Ask for 256 terabytes."
    def on_train_batch_begin(self, batch, logs=None): keras.ops.ones((2**20, 2**20, 64), "float32")

def test_what_the_backend_says_of_a_full_memory_becomes_three_settings():
    model = FCOS(TINY, RECIPE.targets)
    model.compile("sgd", run_eagerly=True)
    batches = Batches(list(Scenes(2, 1, WORLD)), 2, 32)
    with pytest.raises(InputError, match="out of memory: a training step needs about") as caught:
        with explain_memory(model, RECIPE): model.fit(batches, verbose=0, callbacks=[Hungry()])
    for flag in ("--batch-size 1 --gradient-accumulation-steps 4", "--precision mixed_bfloat16"):
        assert flag in str(caught.value)

def test_other_errors_pass():
    with pytest.raises(ValueError, match="something else"), explain_memory(FCOS(TINY), RECIPE):
        raise ValueError("something else")

@pytest.mark.parametrize("megabytes, message", [(0, "above 0"), (3600, "sees no GPU here")])
def test_a_limit_that_means_nothing_is_refused(megabytes, message):
    import tensorflow as tf
    if megabytes and tf.config.list_physical_devices("GPU"): pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message): limit_gpu_memory(megabytes)

# The allocator

FAULTS = """
import resource
import numpy as np
from fcos_lite.train.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): np.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before, listened = faults(), keep_freed_memory()
np.ones(8_000_000)   # the one time that the system has to be asked
print(before, int(listened), faults())
"""

@pytest.mark.parametrize("environment", [{}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "numpy", **environment}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    before, listened, after = (int(word) for word in done.stdout.split())
    if "MALLOC_MMAP_MAX_" in environment: assert not listened
    elif listened: assert after < before / 10

# Two thousand steps

STEPS, EPOCH = 2000, 100

def resident():
    "Return the megabytes that this process holds now; without /proc, the most that it has held."
    if not os.path.exists("/proc/self/statm"): return most_resident()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

class Footprint(keras.callbacks.Callback):
    "Note what the process holds, every 20 steps."
    def __init__(self):
        super().__init__()
        self.step, self.rows = 0, []
    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % 20 == 0: self.rows.append((self.step, resident()))

class Keeper(keras.callbacks.Callback):
    "Keep the weights of every step, as a run must not."
    kept = []
    def on_train_batch_end(self, batch, logs=None): self.kept.append(self.model.get_weights())   # 98 kB

def train(folder, kind):
    "Train in a process of its own; print how much more it holds after all steps than after 200."
    from fcos_lite.train.callbacks import EpochLogger
    from fcos_lite.train.run import Run
    from fcos_lite.train.stages import plan_stages
    from fcos_lite.train.trainer import build_model, compile_for_training
    recipe = RECIPE.change(epochs=STEPS // EPOCH)
    batches = Batches(list(Scenes(2 * EPOCH, 1, WORLD)), 2, 32, shuffle_seed=0, drop_last=True)
    model, footprint = build_model(TINY, recipe), Footprint()
    compile_for_training(model, recipe, STEPS)
    callbacks = [Keeper()] if kind == "keeper" else []
    if kind == "logger":   # evaluates after every epoch
        run, validation = Run.create(Path(folder) / "run"), list(Scenes(8, 2, WORLD))
        callbacks = [EpochLogger(run, validation, recipe, plan_stages(recipe, 2 * EPOCH))]
    with contextlib.redirect_stdout(io.StringIO()):
        model.fit(batches, epochs=STEPS // EPOCH, shuffle=False, verbose=0, callbacks=[*callbacks, footprint])
    first = next(held for step, held in footprint.rows if step >= 2 * EPOCH)
    print(json.dumps({"steps": footprint.step, "growth": footprint.rows[-1][1] / first - 1}))

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "logger", "keeper"])
def test_two_thousand_steps_hold_no_more_than_two_hundred(tmp_path, kind):
    "Under one per cent more, evaluation, rows and weights included; a callback that keeps weights is seen."
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, __file__, str(tmp_path), kind]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["steps"] == STEPS
    assert (report["growth"] > 0.01) == (kind == "keeper"), report

# Ten thousand images

MOST = 30   # bytes per image that an epoch's shuffled order may take

def most_allocated(examples, batches=25):
    "Return the bytes at the worst moment of some batches."
    data = Batches(examples, 4, 32, max_boxes=2, shuffle_seed=0)
    tracemalloc.start()
    for index in range(batches): data[index]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def photographs(folder, count):
    "Return examples that are all the same file."
    path = folder / "one.jpg"
    cv2.imwrite(str(path), Scenes(1, 0, WORLD)[0].image)
    return [Example(i, path, np.zeros((1, 4), np.float32), np.zeros(1, np.int32), 32, 32) for i in range(count)]

@pytest.mark.parametrize("kind", ["scenes", "photographs"])
def test_ten_thousand_images_take_no_more_than_a_hundred(tmp_path, kind):
    def make(count): return Scenes(count, 0, WORLD) if kind == "scenes" else photographs(tmp_path, count)
    most_allocated(make(100))   # fills caches
    few, many = (most_allocated(make(count)) for count in (100, 10_000))
    assert many - few < MOST * 9_900

def test_the_measure_sees_images_that_stay(tmp_path):
    class Kept(list):
        "Images that are read once and kept."
        def __getitem__(self, index):
            self[index] = replace(super().__getitem__(index), image=super().__getitem__(index).read())
            return super().__getitem__(index)
    kept = most_allocated(Kept(photographs(tmp_path, 400)), 100)
    assert kept - most_allocated(photographs(tmp_path, 400), 100) > 0.9 * 400 * 3 * 32**2

if __name__ == "__main__": train(*sys.argv[1:])
