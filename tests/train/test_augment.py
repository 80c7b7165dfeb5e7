"""Chances, strengths and seeds of the augmentation, measured on many grey images; the geometry is in chapter 13."""
import keras
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.config import AugmentConfig
from fcos_lite.errors import InputError
from fcos_lite.train.augment import Augment, jitter_color

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 16, 16, 3), "float32")
CORNERS = RNG.integers(0, 8, (3, 5, 2))
BOXES = np.concatenate([CORNERS, CORNERS + RNG.integers(1, 8, (3, 5, 2))], -1).astype("float32")
LABELS = np.zeros((3, 5), "int32")
NOTHING = AugmentConfig(brightness=0.0, noise=0.0)

def measure(config, count=1000):
    "Return which of many grey images were mirrored, their shifts, and the spread of their pixels."
    grey, box = np.full((count, 16, 16, 3), 0.5, "float32"), np.float32([[[1, 2, 4, 8]]])
    image, boxes, labels = Augment(config)(grey, np.tile(box, (count, 1, 1)), np.zeros((count, 1), "int32"))
    image, boxes = np.array(image), np.array(boxes)
    assert np.isin(boxes[:, 0, 0], (1, 12)).all() and (np.array(labels) == 0).all()
    return boxes[:, 0, 0] == 12, image.mean((1, 2, 3)) - 0.5, image.std((1, 2, 3))

def test_each_image_draws_three_chances_of_its_own():
    mirrored, shift, spread = measure(AugmentConfig(flip=0.5))
    shifted, noisy = np.abs(shift) > 0.004, spread > 0.005   # the mean of 768 noise values stays within 0.004
    for chance in (mirrored, shifted, noisy): assert 0.43 < chance.mean() < 0.57
    assert abs(np.corrcoef([mirrored, shifted, noisy]) - np.eye(3)).max() < 0.12
    assert np.abs(shift).max() < 0.1 + 0.002 and shift.max() > 0.095 and shift.min() < -0.095
    assert spread[noisy].mean() == pytest.approx(0.01, abs=2e-4) and spread[~noisy].max() < 1e-6

def test_probability_one_changes_every_image():
    mirrored, shift, spread = measure(AugmentConfig(flip=1.0, augment_probability=1.0))
    assert mirrored.all() and (spread > 0.005).all() and (np.abs(shift) > 0.004).mean() > 0.9

@pytest.mark.parametrize("config", [NOTHING, AugmentConfig(augment_probability=0.0, color_jitter=0.5)])
def test_probability_or_strength_zero_changes_nothing(config):
    for after, before in zip(Augment(config)(IMAGES, BOXES, LABELS), (IMAGES, BOXES, LABELS)):
        np.testing.assert_array_equal(after, before)

@pytest.mark.parametrize("name, value", [
    ("flip", 1.5), ("noise", -1), ("zoom", (2, 1)), ("color_jitter", 2), ("mosaic", -1), ("min_visibility", 1.1)])
def test_impossible_values_are_refused(name, value):
    with pytest.raises(InputError, match=name): AugmentConfig(**{name: value})

def test_contrast_saturation_and_tint():
    one, white = np.ones(3, "float32"), np.ones((3, 3), "float32")
    np.testing.assert_allclose(jitter_color(IMAGES, one, one, white), IMAGES, atol=1e-6)
    colourless = np.array(jitter_color(IMAGES, one, 0 * one, white))
    np.testing.assert_allclose(colourless, IMAGES.mean(-1, keepdims=True).repeat(3, -1), atol=1e-6)
    assert np.array(jitter_color(IMAGES, 0 * one, one, white)).std((1, 2, 3)).max() < 1e-6
    np.testing.assert_allclose(jitter_color(IMAGES, one, one, 0.5 * white), 0.5 * IMAGES, atol=1e-6)

EVERYTHING = AugmentConfig(flip=0.5, zoom=(0.5, 2), mosaic=0.5, color_jitter=0.3)

def test_compiled_it_draws_the_same():
    eager, compiled = Augment(EVERYTHING, seed=1), Augment(EVERYTHING, seed=1)
    step = tf.function(lambda image, boxes, labels: compiled(image, boxes, labels))
    for _ in range(2):
        for ours, theirs in zip(step(IMAGES, BOXES, LABELS), eager(IMAGES, BOXES, LABELS)):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)

def test_boxes_stay_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try: layer = Augment(NOTHING)
    finally: keras.config.set_dtype_policy("float32")
    boxes = BOXES + np.float32(0.3)   # float16 has 8.297 and 8.305, no 8.3
    np.testing.assert_array_equal(layer(IMAGES, boxes, LABELS)[1], boxes)

def test_a_mosaic_has_four_times_the_boxes_and_keeps_them_inside():
    image, boxes, labels = (np.array(value) for value in Augment(EVERYTHING, seed=2)(IMAGES, BOXES, LABELS))
    assert image.shape == IMAGES.shape and boxes.shape == (3, 20, 4) and labels.shape == (3, 20)
    kept = boxes[labels >= 0]
    assert len(kept) and kept.min() >= 0 and kept.max() <= 16 and np.isfinite(image).all()
    assert image.min() >= 0 and image.max() <= 1
