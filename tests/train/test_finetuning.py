"""What is frozen stays bit for bit, on both backends; classes are carried over by name; and the command does it."""
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
import keras
import numpy as np
import pytest
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE, ModelConfig
from fcos_lite.detector.model import FCOS
from fcos_lite.detector.weights import load_weights, save_weights
from fcos_lite.errors import InputError
from fcos_lite.train.finetuning import component_layers, freeze, transfer_weights
from fcos_lite.train.optimizer import unwrap_optimizer
from fcos_lite.train.trainer import build_model, compile_for_training

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(
    image_size=32, class_names=("person", "dog"), strides=(8, 16), stem_filters=8, stem_groups=2,
    backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16,
    pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(
    level_areas=(65536,), center_radius=None, batch_size=2, warmup_steps=1, learning_rate=1e-2,
    min_learning_rate=1e-2, weight_decay=0.5, decay_variables="all")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("uint8")
TRUTH = {"boxes": np.float32([[[4, 4, 20, 28], [16, 8, 30, 30]]] * 2), "labels": np.int32([[0, 1], [1, 0]])}
FROZEN = [("fpn",), ("backbone", "heads"), ()]

def shake(model, scale, seed=0):
    for array in model.weights: array.assign_add(np.random.default_rng(seed).normal(0, scale, array.shape))

def assert_frozen(components, accumulation=1, precision="float32"):
    "After four steps all arrays have moved but the frozen ones, which the optimizer does not know."
    keras.utils.set_random_seed(0)
    recipe = RECIPE.change(gradient_accumulation_steps=accumulation)
    model = build_model(TINY, recipe, precision=precision)
    shake(model, 0.05) # a zero cannot decay
    before, index_of = model.get_weights(), {id(array): i for i, array in enumerate(model.weights)}
    learning = freeze(model, components)
    compile_for_training(model, recipe, 4)
    for _ in range(4): model.train_on_batch(IMAGES, TRUTH)
    if keras.backend.backend() == "jax": model.jax_state_sync()
    layers = [layer for component in components for layer in component_layers(model, component)]
    frozen = {index_of[id(array)] for layer in layers for array in layer.weights}
    pairs = zip(before, model.get_weights(), strict=True)
    moved = {i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b)}
    assert moved == set(range(len(before))) - frozen
    assert learning == sum(before[i].size for i in moved)
    known = {id(variable) for variable in model.trainable_variables}
    assert len(known) == len(moved) and len(unwrap_optimizer(model.optimizer).variables) > len(moved)

@pytest.mark.parametrize("components", FROZEN, ids=lambda components: "+".join(components) or "none")
def test_what_is_frozen_stays_and_all_else_moves(components): assert_frozen(components)

def test_it_does_under_accumulation_and_loss_scaling():
    assert_frozen(("pyramid",), accumulation=2, precision="mixed_float16")

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_it_does_under_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                   "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{len(FROZEN)} held"

def test_thawing_undoes_everything_and_the_order_of_arrays_stays():
    model = FCOS(TINY)
    order, trained = [id(array) for array in model.weights], len(model.trainable_variables)
    for components in FROZEN: freeze(model, components)
    model.heads.reg_tower.trainable = False # by hand
    assert freeze(model, ()) == model.count_params()
    assert [id(array) for array in model.weights] == order and len(model.trainable_variables) == trained

def test_a_compiled_model_must_be_compiled_again():
    model = build_model(TINY, RECIPE, precision="float32")
    compile_for_training(model, RECIPE, 4)
    freeze(model, ("fpn",))
    with pytest.raises(ValueError, match="compile"): model.train_on_batch(IMAGES, TRUTH)

@pytest.mark.parametrize(("components", "words"), [
    (("fpn", "heads"), "nothing is left that could learn"),
    (("backbone", "pyramid", "heads"), "nothing is left that could learn"),
    (("neck",), "some of backbone, pyramid, fpn, heads"), ("heads", "give a tuple")])
def test_a_freeze_that_cannot_be_is_refused_and_changes_nothing(components, words):
    model = FCOS(TINY)
    freeze(model, ("pyramid",))
    trained = len(model.trainable_variables)
    with pytest.raises(InputError, match=words): freeze(model, components)
    assert len(model.trainable_variables) == trained

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A detector of person and dog, and the folder of its run."
    model, folder = FCOS(TINY), tmp_path_factory.mktemp("teacher")
    shake(model, 0.1, seed=1)
    save_weights(model, folder / "best.weights.h5")
    config = {"model": asdict(TINY), "recipe": asdict(RECIPE), "command": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder

NAMES = [("person", "dog"), ("dog", "person"), ("cat", "dog", "person"), ("dog",), ("cat",)]

@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_every_class_that_both_know_says_what_it_said(teacher, names):
    model = FCOS(replace(TINY, class_names=names, class_prior=0.02))
    for array in model.weights: array.assign(np.full(array.shape, 0.3)) # nothing of what was there may stay
    report = transfer_weights(model, teacher[1])
    known = {"person", "dog"}
    assert set(report.kept) == known & set(names) and set(report.initialized) == set(names) - known
    assert set(report.dropped) == known - set(names)
    before, after = teacher[0].predict_on_batch(IMAGES), model.predict_on_batch(IMAGES)
    for name in ("ltrb", "centerness"): np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    for k, name in enumerate(names):
        logits = after["cls"][..., k]
        if name not in known:
            assert np.abs(1 / (1 + np.exp(-logits)) - 0.02).max() < 0.01
            continue
        expected = before["cls"][..., TINY.class_names.index(name)]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

def test_equal_classes_are_a_plain_load(teacher):
    plain, started = FCOS(TINY), FCOS(TINY)
    load_weights(plain, teacher[1])
    transfer_weights(started, teacher[1])
    for a, b in zip(plain.get_weights(), started.get_weights(), strict=True): np.testing.assert_array_equal(a, b)

@pytest.mark.parametrize(("change", "words"), [
    ({"tower_depth": 2}, "tower_depth is 1 there and 2 here"),
    ({"centerness_tower": "reg"}, "centerness_tower is cls there and reg here"),
    ({"leaky_slope": 0.2}, "leaky_slope is 0.01 there and 0.2 here")])
def test_models_that_differ_in_more_than_classes_are_refused_untouched(teacher, change, words):
    model = FCOS(replace(TINY, class_names=("cat",), **change))
    before = model.get_weights()
    with pytest.raises(InputError, match=words) as error: transfer_weights(model, teacher[1])
    assert "best.weights.h5" in str(error.value) and "class_names" not in str(error.value)
    for a, b in zip(model.get_weights(), before, strict=True): np.testing.assert_array_equal(a, b)

def test_weights_without_a_configuration(teacher, tmp_path):
    alone = tmp_path / "best.weights.h5"
    alone.write_bytes((teacher[1] / "best.weights.h5").read_bytes())
    other = FCOS(replace(TINY, class_names=("cat",)))
    with pytest.raises(InputError, match="no config.json beside it"): transfer_weights(other, alone)
    transfer_weights(FCOS(TINY), alone) # of these shapes they can be
    alone.write_bytes(b"once upon a time")
    with pytest.raises(InputError, match="not a weights file"): transfer_weights(FCOS(TINY), alone)

def test_the_shipped_detector_becomes_one_of_three_classes():
    model = FCOS(replace(REFERENCE, image_size=64, class_names=("dog", "person", "ball")))
    report = transfer_weights(model, "person")
    assert (report.kept, report.initialized, report.dropped) == (("person",), ("dog", "ball"), ())
    assert report.arrays == len(model.weights) - 2 and "kept person; initialised anew dog, ball" in str(report)

def test_the_command_begins_with_other_classes(tiny_run, tmp_path):
    from fcos_lite.train.__main__ import main
    config = json.loads((tiny_run / "config.json").read_text())
    flags = []
    for name, value in config["model"].items():
        values = value if isinstance(value, list) else [value]
        if name != "class_names": flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    out = tmp_path / "run"
    main([*flags, "--weights", str(tiny_run), "--class-names", "person", "dog", "--scenes", "4", "--batch-size", "2",
          "--epochs", "1", "--level-areas", "256", "--min-height", "16", "--evaluate-every", "0", "--out", str(out)])
    assert "kept person; initialised anew dog" in (out / "log.txt").read_text()
    assert json.loads((out / "config.json").read_text())["model"]["class_names"] == ["person", "dog"]

def test_nbdev_finds_the_tutorials():
    from nbdev.doclinks import nbglob
    names = {path.name for path in (ROOT / "nbs" / "tutorials").glob("*.ipynb")}
    assert names <= {Path(path).name for path in nbglob(ROOT / "nbs")}

if __name__ == "__main__":
    assert keras.backend.backend() == "jax"
    for components in FROZEN: assert_frozen(components)
    print(f"{len(FROZEN)} held")
