"""What only a run can show: the same seed twice, scenes learned by heart, several classes, photographs' layout end to end."""
import csv
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
import h5py
import numpy as np
import pytest
from fcos_lite.data.coco import write_coco
from fcos_lite.scenes.scenes import Scenes, World

TINY = """--image-size 64 --strides 16 32 --level-areas 1024 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4
--pyramid-channels 16 --pyramid-groups 4 --tower-depth 1 --tower-channels 16 --tower-groups 4""".split()
SPEED = ("images_per_second", "memory_mb")   # the only columns that may differ between two equal runs

def command(module, *flags):
    "A command in a process of its own; its output where it succeeds."
    done = subprocess.run([sys.executable, "-m", f"fcos_lite.{module}", *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def arrays(path):
    "Every array of a weights file, by name."
    found = {}
    with h5py.File(path) as file: file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found

def rows(run):
    with open(run / "metrics.csv", encoding="utf-8") as file: return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(file)]

def test_the_same_seed_gives_the_same_curve_bit_for_bit(tmp_path):
    flags = [*TINY, "--scenes", 16, "--epochs", 2, "--batch-size", 4, "--min-height", 16, "--max-height", 60]
    for name in ("first", "second"): command("train", *flags, "--seed", 3, "--out", tmp_path / name)
    first, second = (arrays(tmp_path / name / "last.weights.h5") for name in ("first", "second"))
    assert len(first) > 50 and first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
    assert rows(tmp_path / "first") == rows(tmp_path / "second")

def test_another_seed_is_another_network_with_other_pictures_in_another_order():
    from fcos_lite.data.batches import epoch_order
    from fcos_lite.config import SCRATCH_RECIPE, REFERENCE
    from fcos_lite.train.trainer import set_deterministic, build_model
    network = replace(REFERENCE, image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8,) * 4, backbone_blocks=(1,) * 4, backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
    found = []
    for seed in (3, 3, 4):
        set_deterministic(seed)
        found.append([np.array(w) for w in build_model(network, SCRATCH_RECIPE, seed=seed).fpn.trainable_variables])
    moved = [[not np.array_equal(a, b) for a, b in zip(found[0], other)] for other in found[1:]]
    assert not any(moved[0]) and sum(moved[1]) >= 10        # gains and biases begin alike
    assert epoch_order(16, 3, 0).tolist() == epoch_order(16, 3, 0).tolist() != epoch_order(16, 4, 0).tolist()
    assert not np.array_equal(Scenes(1, 3)[0].image, Scenes(1, 4)[0].image)

@pytest.mark.slow
def test_the_command_killed_at_random_moments_is_the_command_never_killed(tmp_path):
    "Six lives of `python -m fcos_lite.train`, each killed by the system somewhere between two rows: weights, averages and rows bit for bit."
    flags = [*TINY, "--scenes", 16, "--epochs", 14, "--batch-size", 4, "--gradient-accumulation-steps", 3, "--ema-momentum", 0.9, "--min-height", 16, "--max-height", 60, "--checkpoint-seconds", 0]
    command("train", *flags, "--out", tmp_path / "peace")
    chance, lives = random.Random(0), 0
    argv = [*flags, "--out", tmp_path / "killed"]
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-m", "fcos_lite.train", *map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as life:
            table = tmp_path / "killed" / "metrics.csv"
            count = lambda: len(table.read_text().splitlines()) if table.exists() else 0
            before = count()
            while count() <= before and life.poll() is None: time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            life.kill()
        lives += life.returncode == -signal.SIGKILL
        argv = ["--resume", tmp_path / "killed"]
    assert lives >= 4, "most of them must not come too late"
    command("train", "--resume", tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "peace") and len(rows(tmp_path / "peace")) == 14
    for name in ("last", "last-average", "best"):
        ours, theirs = (arrays(tmp_path / run / f"{name}.weights.h5") for run in ("killed", "peace"))
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in theirs), name

def test_photographs_layout_end_to_end(tmp_path, capsys):
    "A COCO folder goes in; weights, figures and drawn pictures come out, by all three commands."
    from fcos_lite.detect import __main__ as detect
    from fcos_lite.evaluate import evaluator as evaluate
    world = World(size=96, min_height=24, max_height=90, empty_share=0.2)
    for part, count, seed in (("train2017", 12, 1), ("val2017", 6, 2)): write_coco(tmp_path / "coco", part, Scenes(count, seed, world), ("person",))
    run = tmp_path / "run"
    command("train", "--coco", tmp_path / "coco", *TINY, "--epochs", 1, "--batch-size", 4, "--out", run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["images"] == 6 and 0 <= evaluation["AP"] <= 1
    assert len(list((run / "pictures").iterdir())) == 6
    evaluate.main(["--coco", str(tmp_path / "coco"), "--weights", str(run), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["AP"] == pytest.approx(evaluation["AP"], abs=1e-6) and again["boxes"] == evaluation["boxes"]
    detect.main([str(tmp_path / "coco" / "val2017"), "--weights", str(run), "--out", str(tmp_path / "found")])
    assert "in 6 of 6 sources" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())) == 6

def learn_by_heart(examples, class_names, image_size, steps, seed=0):
    "The figures of the source network on the very examples that it has learned from."
    import keras
    from fcos_lite.data.batches import Batches
    from fcos_lite.config import SCRATCH_RECIPE, REFERENCE
    from fcos_lite.evaluate.evaluator import coco_evaluation, predict
    from fcos_lite.detector.model import FCOS
    from fcos_lite.train.trainer import compile_for_training
    keras.utils.set_random_seed(seed)
    recipe = SCRATCH_RECIPE.change(batch_size=len(examples), flip=0.0, brightness=0.0, noise=0.0, zoom=(1, 1), weight_decay=0.0, warmup_steps=20)
    model = FCOS(replace(REFERENCE, image_size=image_size, class_names=class_names), recipe)
    compile_for_training(model, steps)
    batch = Batches(examples, len(examples), image_size)[0]
    for _ in range(steps): model.train_on_batch(batch)
    (found, _), _ = predict(model, examples)
    return coco_evaluation(examples, found, class_names)

@pytest.mark.slow
def test_eight_scenes_can_be_learned_by_heart():
    scenes = list(Scenes(8, seed=11, world=World(size=128, min_height=24, max_height=110, max_people=3)))
    figures, _ = learn_by_heart(scenes, ("person",), 128, 300)
    assert figures["AP75"] >= 0.95, figures

@pytest.mark.slow
def test_three_classes_can_be_learned_by_heart():
    names = ("person", "dog", "ball")
    scenes = list(Scenes(8, seed=12, world=World(size=128, min_height=32, max_height=110, max_people=2, class_names=names)))
    assert {label for scene in scenes for label in scene.labels.tolist()} == {0, 1, 2}
    figures, results = learn_by_heart(scenes, names, 128, 300)
    assert figures["AP75"] >= 0.9, figures
    per_class = np.mean(results["precision"][0, :, :, 0, 2], axis=0)
    assert per_class.min() >= 0.9, per_class

@pytest.mark.slow
def test_a_plain_install_into_an_empty_environment(tmp_path):
    "`pip install` of the checkout works without nbdev, and the package imports and runs there."
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", root], check=True)
    assert subprocess.run([python, "-c", "import nbdev"], capture_output=True).returncode != 0
    check = "from fcos_lite import FCOS; from fcos_lite.config import REFERENCE; assert FCOS(REFERENCE).count_params() == 3255082"
    subprocess.run([python, "-c", check], check=True, cwd=tmp_path)
    shipped = "from fcos_lite import FCOS; import numpy as np; print(FCOS.from_preset('person').detect(np.zeros((40, 60, 3), 'uint8')))"
    subprocess.run([python, "-c", shipped], check=True, cwd=tmp_path)
    subprocess.run([tmp_path / "venv" / "bin" / "fcos-lite", "train", "--help"], check=True, capture_output=True, cwd=tmp_path)
