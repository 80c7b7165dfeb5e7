"""FCOS as a Keras model: a pure call, its losses, and the three ways to fit it."""
import sys
from dataclasses import replace
from pathlib import Path
import keras
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.config import REFERENCE_RECIPE, SCRATCH_RECIPE, ModelConfig
from fcos_lite.detector.model import FCOS
from fcos_lite.errors import InputError

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
TARGETS = replace(SCRATCH_RECIPE.targets, level_areas=(65536,), center_radius=None)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("uint8")
BOXES = np.float32([[[3, 4, 20, 28], [0, 0, 0, 0]], [[2, 2, 30, 31], [10, 12, 20, 24]]] * 2)
LABELS = np.int32([[0, -1], [0, 0]] * 2)
EMPTY = np.full_like(LABELS, -1)

@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return FCOS(TINY, TARGETS)

def losses(model, images, boxes, labels, valid=None):
    return {name: float(value) for name, value in model.compute_losses(model(images), boxes, labels, valid).items()}

def step(model, images, boxes, labels):
    "Take one step of plain descent on a copy; return the copy and what the step reports."
    copy = FCOS(model.config, model.target_config, model.loss_config)
    copy.set_weights(model.get_weights())
    copy.compile(optimizer=keras.optimizers.SGD(1e-3), run_eagerly=True)
    return copy, copy.train_on_batch(images, {"boxes": boxes, "labels": labels}, return_dict=True)

# The call

def test_bytes_and_floats_mean_the_same_and_a_batch_is_its_images(model):
    outputs = model(IMAGES)
    alone = model(IMAGES[1:2])
    for name, value in model(IMAGES.astype("float32"), training=True).items():
        np.testing.assert_allclose(value, outputs[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone[name], outputs[name][1:2], rtol=1e-3, atol=1e-5)

def test_nothing_is_left_to_be_built():
    "Else `fit` on JAX looks at a batch before the first epoch, and a resumed run is another run."
    assert not [layer.name for layer in FCOS(TINY)._flatten_layers() if not layer.built]

# The losses

def test_images_that_only_fill_a_batch_take_no_part(model):
    valid = np.array([True, True, False, False])
    ours, theirs = losses(model, IMAGES, BOXES, LABELS, valid), losses(model, IMAGES[:2], BOXES[:2], LABELS[:2])
    for name, value in theirs.items(): assert ours[name] == pytest.approx(value, rel=1e-4), name

def test_the_weight_of_centerness(model):
    doubled = FCOS(TINY, TARGETS, replace(SCRATCH_RECIPE.losses, centerness_weight=2.0))
    doubled.set_weights(model.get_weights())
    ours, theirs = losses(model, IMAGES, BOXES, LABELS), losses(doubled, IMAGES, BOXES, LABELS)
    assert theirs["loss"] - ours["loss"] == pytest.approx(ours["centerness"], rel=1e-4)
    assert ours["loss"] == pytest.approx(ours["cls"] + ours["ltrb"] + ours["centerness"], rel=1e-5)

def test_labels_counted_from_one_have_no_positive_location(model):
    assert losses(model, IMAGES, BOXES, LABELS)["positives"] >= len(IMAGES)
    assert losses(model, IMAGES, BOXES, np.where(LABELS >= 0, LABELS + 1, -1))["positives"] == 0

def test_images_without_objects_teach_and_stay_finite(model):
    copy, report = step(model, IMAGES, BOXES, EMPTY)
    assert all(np.isfinite(value) for value in report.values()), report
    assert all(np.isfinite(array).all() for array in copy.get_weights())
    assert report["ltrb"] == report["centerness"] == report["positives"] == 0
    assert any((a != b).any() for a, b in zip(copy.get_weights(), model.get_weights()))

def test_a_step_downhill_lowers_the_loss(model):
    before = losses(model, IMAGES, BOXES, LABELS)
    copy, report = step(model, IMAGES, BOXES, LABELS)
    for name in ("loss", "cls", "ltrb", "centerness", "positives"):
        assert report[name] == pytest.approx(before[name], rel=1e-4), name
    assert losses(copy, IMAGES, BOXES, LABELS)["loss"] < before["loss"]

def test_sample_weights_are_refused(model):
    outputs = model(IMAGES)
    with pytest.raises(InputError, match="sample_weight"):
        model.compute_loss(None, {"boxes": BOXES, "labels": LABELS}, outputs, sample_weight=np.ones(4))

@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_boxes_reach_the_loss_unrounded(policy, monkeypatch):
    seen = []
    def watch(self, outputs, boxes, labels, valid=None, compute_losses=FCOS.compute_losses):
        kinds = {name: keras.backend.standardize_dtype(value.dtype) for name, value in outputs.items()}
        seen.append((np.array(boxes), np.array(labels), set(kinds.values())))
        return compute_losses(self, outputs, boxes, labels, valid)
    monkeypatch.setattr(FCOS, "compute_losses", watch)
    keras.config.set_dtype_policy(policy)
    try: model = FCOS(TINY, TARGETS)
    finally: keras.config.set_dtype_policy("float32")
    half = policy.removeprefix("mixed_")
    assert model.fpn.layers[-1].compute_dtype == model.heads.cls_tower.layers[0].compute_dtype == half
    assert all(variable.dtype == "float32" for variable in model.weights)
    boxes = BOXES + np.float32(0.3)   # 20.3 is no number of 16 bits
    model.compile(optimizer=keras.optimizers.SGD(1e-3), run_eagerly=True)
    for labels in (LABELS, EMPTY):
        report = model.train_on_batch(IMAGES, {"boxes": boxes, "labels": labels}, return_dict=True)
        assert all(np.isfinite(value) for value in report.values()), report
        np.testing.assert_array_equal(seen[-1][0], boxes)
        np.testing.assert_array_equal(seen[-1][1], labels)
        assert seen[-1][2] == {"float32"}
    assert all(np.isfinite(array).all() for array in model.get_weights())

def test_the_reference_loop_computes_the_same_losses():
    "Level by level, in a Python loop over the boxes of each image."
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from reference_loop import reference_losses
    levels = replace(TINY, image_size=64, strides=(4, 8, 16, 32))
    model = FCOS(levels, REFERENCE_RECIPE.targets, REFERENCE_RECIPE.losses)
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype("uint8")
    boxes = np.float32([[[3, 4, 20, 28], [0, 0, 60, 64], [8, 8, 24, 40]], [[2, 2, 30, 31], [0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = np.int32([[0, 0, 0], [0, -1, -1]])
    rows = [[[float(label), *box] for label, box in zip(*pair) if label >= 0]
            for pair in zip(labels.tolist(), boxes.tolist())]
    theirs = reference_losses(model(images), tf.ragged.constant(rows, ragged_rank=1), 64)
    ours = losses(model, images, boxes, labels)
    for name, value in zip(("cls", "ltrb", "centerness"), theirs):
        assert ours[name] == pytest.approx(float(value), rel=1e-4), name

# The three ways to fit

class Pairs(keras.utils.PyDataset):
    def __len__(self): return 2
    def __getitem__(self, i):
        rows = slice(2 * i, 2 * i + 2)
        return IMAGES[rows], {"boxes": BOXES[rows], "labels": LABELS[rows]}

def test_fit_takes_arrays_a_dataset_or_a_pydataset():
    keras.utils.set_random_seed(0)
    model, y = FCOS(TINY, TARGETS), {"boxes": BOXES, "labels": LABELS}
    model.compile(optimizer=keras.optimizers.Adam(1e-3), run_eagerly=True)   # three graphs would take a minute
    history = [model.fit(IMAGES, y, batch_size=2, epochs=2, verbose=0, shuffle=False).history["loss"],
               model.fit(tf.data.Dataset.from_tensor_slices((IMAGES, y)).batch(2), epochs=2, verbose=0).history["loss"],
               model.fit(Pairs(), epochs=2, verbose=0, shuffle=False).history["loss"]]
    assert np.diff(np.ravel(history)).max() < 0        # each epoch is better than the one before
    report = model.evaluate(IMAGES, y, batch_size=4, verbose=0, return_dict=True)
    expected = losses(model, IMAGES, BOXES, LABELS)
    for name, value in report.items(): assert value == pytest.approx(expected[name], rel=1e-4), name
