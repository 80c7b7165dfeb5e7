"""What is frozen stays bit for bit, under weight decay, accumulation and both backends; what is carried over is carried over by name; and the command line does it."""
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
from fcos_lite.config import SCRATCH_RECIPE, REFERENCE, InputError, ModelConfig
from fcos_lite.train.finetuning import freeze, component_layers, transfer_weights
from fcos_lite.detector.model import FCOS
from fcos_lite.train.trainer import build_model, compile_for_training
from fcos_lite.detector.weights import load_weights, save_weights

TINY = ModelConfig(image_size=32, class_names=("person", "dog"), strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4,
               pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(level_areas=(65536,), center_radius=None, batch_size=2, warmup_steps=1, learning_rate=1e-2, min_learning_rate=1e-2, weight_decay=0.5, decay_variables="all")
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("uint8"), "boxes": np.float32([[[4, 4, 20, 28], [16, 8, 30, 30]]] * 2), "labels": np.int32([[0, 1], [1, 0]])}
FROZEN = [("fpn",), ("backbone", "heads"), ()]

def life(parts, accumulate=1, precision="float32"):
    "Arrays before and after four steps; those of the frozen parts by their places; how many the optimizer knows; the parameters that learned."
    keras.utils.set_random_seed(0)
    model = build_model(TINY, RECIPE.change(gradient_accumulation_steps=accumulate), precision=precision)
    for array in model.weights: array.assign_add(np.random.default_rng(len(array.shape)).normal(0, 0.05, array.shape))   # a zero cannot decay
    before, place = model.get_weights(), {id(array): i for i, array in enumerate(model.weights)}
    learning = freeze(model, parts)
    compile_for_training(model, 4)
    for _ in range(4): model.train_on_batch(BATCH)
    if keras.backend.backend() == "jax": model.jax_state_sync()
    frozen = sorted(place[id(array)] for part in parts for layer in component_layers(model, part) for array in layer.weights)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return before, model.get_weights(), frozen, len(optimizer._trainable_variables), learning

def assert_frozen(before, after, frozen, known, learning):
    moved = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not np.array_equal(a, b)]
    assert moved == [i for i in range(len(before)) if i not in frozen]
    assert known == len(before) - len(frozen)
    assert learning == sum(before[i].size for i in moved)

@pytest.mark.parametrize("parts", FROZEN, ids=lambda parts: "+".join(parts) or "none")
def test_what_is_frozen_stays_and_all_else_moves(parts): assert_frozen(*life(parts))

def test_it_does_under_accumulation_and_loss_scaling(): assert_frozen(*life(("pyramid",), accumulate=2, precision="mixed_float16"))

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_it_does_under_jax():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{len(FROZEN)} held"

def test_thawing_undoes_everything_and_the_order_of_arrays_stays():
    model = FCOS(TINY)
    order, trained = [id(array) for array in model.weights], len(model.trainable_variables)
    for parts in FROZEN: freeze(model, parts)
    model.heads.reg_tower.trainable = False        # by hand
    assert freeze(model, ()) == model.count_params()
    assert [id(array) for array in model.weights] == order and len(model.trainable_variables) == trained

def test_a_compiled_model_must_be_compiled_again():
    model = FCOS(TINY, RECIPE)
    compile_for_training(model, 4)
    freeze(model, ("fpn",))
    with pytest.raises(ValueError, match="compile"): model.train_on_batch(BATCH)

@pytest.mark.parametrize(("parts", "said"), [(("fpn", "heads"), "nothing is left that could learn"), (("backbone", "pyramid", "heads"), "nothing is left that could learn"),
                                             (("neck",), "some of backbone, pyramid, fpn, heads"), ("heads", "give a tuple")])
def test_a_freeze_that_means_nothing_is_refused_and_changes_nothing(parts, said):
    model = FCOS(TINY)
    freeze(model, ("pyramid",))
    trained = len(model.trainable_variables)
    with pytest.raises(InputError, match=said): freeze(model, parts)
    assert len(model.trainable_variables) == trained

def keep(model, folder):
    folder.mkdir()
    save_weights(model, folder / "best.weights.h5")
    (folder / "config.json").write_text(json.dumps({"network": asdict(model.config), "recipe": asdict(model.recipe)}))
    return folder

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = FCOS(TINY, RECIPE)
    for array in model.weights: array.assign_add(np.random.default_rng(1).normal(0, 0.1, array.shape))
    return model, keep(model, tmp_path_factory.mktemp("teachers") / "teacher")

@pytest.mark.parametrize("names", [("person", "dog"), ("dog", "person"), ("cat", "dog", "person"), ("dog",), ("cat",)], ids="-".join)
def test_every_class_that_both_know_says_what_it_said(teacher, names):
    theirs, run = teacher
    model = FCOS(replace(TINY, class_names=names, class_prior=0.02), seed=3)
    for array in model.weights: array.assign(np.full(array.shape, 0.3))    # nothing of what was there may stay
    start = transfer_weights(model, run)
    known = {"person", "dog"}
    assert (set(start.kept), set(start.anew), set(start.left)) == (known & set(names), set(names) - known, known - set(names))
    before, after = (m.predict_on_batch(BATCH["image"]) for m in (theirs, model))
    for name in ("ltrb", "centerness"): np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    for k, name in enumerate(names):
        if name in known: np.testing.assert_allclose(after["cls"][..., k], before["cls"][..., TINY.class_names.index(name)], rtol=1e-4, atol=1e-5)
        else: assert np.abs(1 / (1 + np.exp(-after["cls"][..., k])) - 0.02).max() < 0.01
    if names == TINY.class_names:
        for a, b in zip(model.get_weights(), theirs.get_weights(), strict=True): np.testing.assert_array_equal(a, b)

def test_equal_classes_are_a_plain_load(teacher):
    plain, started = FCOS(TINY, seed=1), FCOS(TINY, seed=2)
    load_weights(plain, teacher[1])
    transfer_weights(started, teacher[1])
    for a, b in zip(plain.get_weights(), started.get_weights(), strict=True): np.testing.assert_array_equal(a, b)

@pytest.mark.parametrize(("change", "said"), [({"tower_depth": 2}, "tower_depth is 1 there and 2 here"), ({"centerness_tower": "reg"}, "centerness_tower is cls there and reg here"),
                                              ({"leaky_slope": 0.2}, "leaky_slope is 0.01 there and 0.2 here")])
def test_networks_that_differ_in_more_than_classes_are_refused_untouched(teacher, change, said):
    model = FCOS(replace(TINY, class_names=("cat",), **change))
    before = model.get_weights()
    with pytest.raises(InputError, match=said) as error: transfer_weights(model, teacher[1])
    assert "best.weights.h5" in str(error.value) and "class_names" not in str(error.value)
    for a, b in zip(model.get_weights(), before, strict=True): np.testing.assert_array_equal(a, b)

def test_weights_that_nobody_can_explain_are_refused(teacher, tmp_path):
    lonely = tmp_path / "best.weights.h5"
    lonely.write_bytes((teacher[1] / "best.weights.h5").read_bytes())
    with pytest.raises(InputError, match="no config.json beside it"): transfer_weights(FCOS(replace(TINY, class_names=("cat",))), lonely)
    transfer_weights(FCOS(TINY), lonely)                  # of these shapes they can be
    lonely.write_bytes(b"once upon a time")
    with pytest.raises(InputError, match="not a weights file"): transfer_weights(FCOS(TINY), lonely)

def test_the_shipped_detector_becomes_one_of_three_classes():
    model = FCOS(replace(REFERENCE, image_size=64, class_names=("dog", "person", "ball")))
    start = transfer_weights(model, "person")
    assert (start.kept, start.anew, start.left, start.arrays) == (("person",), ("dog", "ball"), (), len(model.weights) - 2)
    assert "kept person; made anew dog, ball" in str(start)

def test_the_command_line_begins_with_other_classes(teacher, tmp_path):
    flags = [text for field, value in asdict(TINY).items() if field not in ("class_names", "image_size")
             for text in (f"--{field.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else (value,)))]
    program = ["--weights", str(teacher[1]), "--class-names", "person", "dog", "ball", "--image-size", "32", "--scenes", "4", "--batch-size", "2", "--epochs", "1", "--level-areas", "65536",
               "--min-height", "10", "--evaluate-every", "0", "--out", str(tmp_path / "run"), *flags]
    done = subprocess.run([sys.executable, "-m", "fcos_lite.train", *program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept person, dog; made anew ball" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["network"]["class_names"] == ["person", "dog", "ball"]

def test_nbdev_finds_the_tutorials():
    from nbdev.doclinks import nbglob
    nbs = Path(__file__).resolve().parents[1] / "nbs"
    assert {path.name for path in (nbs / "tutorials").glob("*.ipynb")} <= {Path(path).name for path in nbglob(nbs)}

if __name__ == "__main__":
    assert keras.backend.backend() == "jax"
    for parts in FROZEN: assert_frozen(*life(parts))
    print(f"{len(FROZEN)} held")
