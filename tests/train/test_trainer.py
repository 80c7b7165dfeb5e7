"""Training a detector: augmentation only while it learns, seeds, accumulation, and what only a run can show."""
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
import h5py
import keras
import numpy as np
import pytest
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE, ModelConfig
from fcos_lite.data.batches import Batches, epoch_order
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.trainer import build_model, compile_for_training, set_deterministic

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(level_areas=(65536,), center_radius=None, batch_size=4, mosaic=0.3, color_jitter=0.3)
STILL = RECIPE.change(flip=0.0, brightness=0.0, noise=0.0, zoom=(1, 1), mosaic=0.0, color_jitter=0.0)
WORLD = World(size=32, min_height=10, max_height=28, max_people=3)

def batches(seed=0): return Batches(list(Scenes(16, 5, WORLD)), 4, 32, shuffle_seed=seed, drop_last=True)

def equal(a, b): return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

# The model that trains

def test_a_step_sees_the_augmented_batch_with_its_boxes():
    "With every image mirrored, training loses what evaluation loses on images and boxes mirrored by hand."
    images, y = batches()[0]
    model = build_model(TINY, STILL.change(flip=1.0), precision="float32")
    model.compile(optimizer=keras.optimizers.SGD(0.0), run_eagerly=True)
    seen = model.train_on_batch(images, y, return_dict=True)
    boxes = (np.float32([32, 0, 32, 0]) - y["boxes"] * np.float32([1, -1, 1, -1]))[..., [2, 1, 0, 3]]
    mirrored = images[:, :, ::-1], {"boxes": boxes, "labels": y["labels"]}
    by_hand = model.test_on_batch(*mirrored, return_dict=True)
    as_it_is = model.test_on_batch(images, y, return_dict=True)
    for name, value in by_hand.items(): assert seen[name] == pytest.approx(value, rel=1e-4), name
    assert abs(seen["loss"] - as_it_is["loss"]) > 1e-4   # evaluation augments nothing

def test_the_same_seed_gives_the_same_curve_bit_for_bit():
    def run(seed):
        set_deterministic(seed)
        model = build_model(TINY, RECIPE, seed, precision="float32")
        compile_for_training(model, RECIPE, 8)
        history = model.fit(batches(seed), epochs=2, shuffle=False, verbose=0).history
        return model.get_weights(), history["loss"]
    (first, losses), (second, same_losses), (other, other_losses) = run(3), run(3), run(4)
    assert equal(first, second) and losses == same_losses
    assert not equal(first, other) and losses != other_losses

def test_another_seed_is_another_network_with_other_images_in_another_order():
    weights = []
    for seed in (3, 3, 4):
        set_deterministic(seed)
        weights.append([np.array(w) for w in build_model(TINY, RECIPE, seed=seed).fpn.trainable_variables])
    changed = [[not np.array_equal(a, b) for a, b in zip(weights[0], other)] for other in weights[1:]]
    assert not any(changed[0]) and sum(changed[1]) >= 10   # gains and biases begin alike
    assert epoch_order(16, 3, 0).tolist() == epoch_order(16, 3, 0).tolist() != epoch_order(16, 4, 0).tolist()
    assert not np.array_equal(Scenes(1, 3)[0].image, Scenes(1, 4)[0].image)

# Eight micro-batches and one batch of 32

def test_the_loss_of_a_large_batch_is_a_mean_of_the_small_ones_weighted_by_their_divisors():
    scenes = list(Scenes(32, 3, World(size=32, min_height=10, max_height=30, max_people=4)))
    recipe = STILL.change(level_areas=(65536,), ltrb_weighting="none", centerness_normalizer="targets")
    model = build_model(TINY, recipe, precision="float32")
    small, whole = Batches(scenes, 8, 32, max_boxes=6), Batches(scenes, 32, 32, max_boxes=6)
    def losses(batch):
        return {name: float(value) for name, value in model.compute_losses(model(batch[0]), **batch[1]).items()}
    rows, large = [losses(small[i]) for i in range(4)], losses(whole[0])
    assert min(row["centerness_sum"] for row in rows) > 1   # else `max(1, ...)` would be the divisor
    for name, divisor in (("cls", "positives"), ("ltrb", "positives"), ("centerness", "centerness_sum")):
        values, weights = [row[name] for row in rows], [row[divisor] for row in rows]
        assert np.average(values, weights=weights) == pytest.approx(large[name], rel=1e-4), name
        assert abs(np.mean(values) - large[name]) > 1e-5 * large[name], name   # the plain mean is something else

# What only a run can show

def learn_by_heart(examples, class_names, image_size, steps, seed=0):
    "Return the metrics of the reference network on the examples that it has learned from."
    from fcos_lite.evaluate.evaluator import predict
    from fcos_lite.evaluate.metrics import coco_evaluation
    keras.utils.set_random_seed(seed)
    recipe = SCRATCH_RECIPE.change(batch_size=len(examples), flip=0.0, brightness=0.0, noise=0.0, zoom=(1, 1),
                                   weight_decay=0.0, warmup_steps=20)
    model = build_model(replace(REFERENCE, image_size=image_size, class_names=class_names), recipe)
    compile_for_training(model, recipe, steps)
    batch = Batches(examples, len(examples), image_size)[0]
    for _ in range(steps): model.train_on_batch(*batch)
    (detections, _), _ = predict(model, examples)
    return coco_evaluation(examples, detections, class_names)

@pytest.mark.slow
def test_eight_scenes_can_be_learned_by_heart():
    scenes = list(Scenes(8, seed=11, world=World(size=128, min_height=24, max_height=110, max_people=3)))
    metrics, _ = learn_by_heart(scenes, ("person",), 128, 300)
    assert metrics["AP75"] >= 0.95, metrics

@pytest.mark.slow
def test_three_classes_can_be_learned_by_heart():
    names = ("person", "dog", "ball")
    world = World(size=128, min_height=32, max_height=110, max_people=2, class_names=names)
    scenes = list(Scenes(8, seed=12, world=world))
    assert {label for scene in scenes for label in scene.labels.tolist()} == {0, 1, 2}
    metrics, results = learn_by_heart(scenes, names, 128, 300)
    assert metrics["AP75"] >= 0.9, metrics
    per_class = np.mean(results["precision"][0, :, :, 0, 2], axis=0)
    assert per_class.min() >= 0.9, per_class

FLAGS = """--image-size 64 --strides 16 32 --level-areas 1024 --stem-filters 8 --stem-groups 2
--backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4 --pyramid-channels 16 --pyramid-groups 4
--tower-depth 1 --tower-channels 16 --tower-groups 4 --min-height 16 --max-height 60""".split()

def arrays(path):
    "Return every array of a weights file, by name."
    found = {}
    def keep(name, item):
        if isinstance(item, h5py.Dataset): found[name] = item[()]
    with h5py.File(path) as file: file.visititems(keep)
    return found

def table(run):
    "Return the rows of a run's metrics.csv, without the columns that may differ between two equal runs."
    import csv
    with open(run / "metrics.csv", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in ("images_per_second", "memory_mb")} for row in rows]

@pytest.mark.slow
def test_the_command_killed_at_random_moments_is_the_command_never_killed(tmp_path):
    "Six lives of `python -m fcos_lite.train`, each killed between two rows: weights, EMA and rows bit for bit."
    program = [sys.executable, "-m", "fcos_lite.train"]
    flags = [*FLAGS, *"--scenes 16 --epochs 14 --batch-size 4 --gradient-accumulation-steps 3 --ema-momentum 0.9 "
             "--checkpoint-seconds 0".split()]
    subprocess.run([*program, *flags, "--out", tmp_path / "peace"], check=True, capture_output=True)
    chance, lives, rows = random.Random(0), 0, tmp_path / "killed" / "metrics.csv"
    argv = [*flags, "--out", tmp_path / "killed"]
    def count(): return len(rows.read_text().splitlines()) if rows.exists() else 0
    for _ in range(6):
        with subprocess.Popen([*program, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as life:
            before = count()
            while count() <= before and life.poll() is None: time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            life.kill()
        lives += life.returncode == -signal.SIGKILL
        argv = ["--resume", tmp_path / "killed"]
    assert lives >= 4, "most of them must not come too late"
    subprocess.run([*program, "--resume", tmp_path / "killed"], check=True, capture_output=True)
    assert table(tmp_path / "killed") == table(tmp_path / "peace") and len(table(tmp_path / "peace")) == 14
    for path in (tmp_path / "peace").glob("*.weights.h5"):
        ours, theirs = arrays(tmp_path / "killed" / path.name), arrays(path)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in theirs), path.name

@pytest.mark.slow
def test_a_coco_folder_end_to_end(tmp_path, capsys):
    "A COCO folder goes in; weights, metrics and drawn images come out, by all three commands."
    import json
    from fcos_lite.data.coco import write_coco
    from fcos_lite.detect import __main__ as detect
    from fcos_lite.evaluate import __main__ as evaluate
    from fcos_lite.train import __main__ as train
    world = World(size=96, min_height=24, max_height=90, empty_share=0.2)
    for split, count, seed in (("train2017", 12, 1), ("val2017", 6, 2)):
        write_coco(tmp_path / "coco", split, Scenes(count, seed, world), ("person",))
    data, run = ["--data", str(tmp_path / "coco")], tmp_path / "run"
    train.main([*data, *FLAGS, "--epochs", "1", "--batch-size", "4", "--out", str(run)])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["images"] == 6 and 0 <= evaluation["AP"] <= 1
    assert len(list((run / "pictures").iterdir())) == 6
    evaluate.main([*data, "--weights", str(run), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["AP"] == pytest.approx(evaluation["AP"], abs=1e-6) and again["boxes"] == evaluation["boxes"]
    detect.main([str(tmp_path / "coco" / "val2017"), "--weights", str(run), "--out", str(tmp_path / "detected")])
    assert len(json.loads((tmp_path / "detected" / "detections.json").read_text())) == 6
