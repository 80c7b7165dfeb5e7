"""Losses equal an independent reading of the reference in float64; no possible input breaks their gradients."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from fcos_lite.config import LossConfig
from fcos_lite.detector.losses import (aggregate_batches, binary_cross_entropy, fcos_losses, focal_loss,
                                       giou_loss, total_loss)
from fcos_lite.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SIDES = ((4, 16), (8, 8), (16, 4), (32, 2)) # stride in pixels, cells in a row: an image of 64 pixels
LOCATIONS = sum(side * side for _, side in SIDES)
CONFIGS = [LossConfig(ltrb_weighting=a, centerness_normalizer=b)
           for a, b in product(("none", "centerness"), ("targets", "positives"))]


# The reference in float64, in pixels, location by location where it matters

def cross_entropy(logit, target):
    "The definition, with the logarithms of both probabilities."
    return target * np.logaddexp(0, -logit) + (1 - target) * np.logaddexp(0, logit)


def reference_focal(logit, target, alpha, gamma):
    p = 1 / (1 + np.exp(-logit))
    p_t = np.where(target == 1, p, 1 - p)
    alpha_factor = 1 if alpha is None else np.where(target == 1, alpha, 1 - alpha)
    return alpha_factor * (1 - p_t) ** gamma * cross_entropy(logit, target)


def reference_giou(a, b):
    "Of two xyxy boxes in pixels."
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return np.clip(inter / (union + 1e-6) - (hull - union) / (hull + 1e-6), -1, 1)


def reference_losses(outputs, targets, config):
    outputs = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    points = [((i % side + 0.5) * stride, (i // side + 0.5) * stride, stride)
              for stride, side in SIDES for i in range(side * side)]
    images, where = np.nonzero(targets["positive"])
    ltrb, weights = [], []
    for image, place in zip(images, where):
        x, y, stride = points[place]
        def box(l, t, r, b): return x - l * stride, y - t * stride, x + r * stride, y + b * stride
        true = targets["ltrb"][image, place].astype(float)
        ltrb.append(1 - reference_giou(box(*outputs["ltrb"][image, place]), box(*true)))
        weights.append(float(targets["centerness"][image, place]))
    count, centers = len(ltrb), sum(weights)
    ltrb, weights = np.array(ltrb), np.array(weights)
    focal = reference_focal(outputs["cls"], targets["cls"], config.focal_alpha, config.focal_gamma)
    centerness = cross_entropy(outputs["centerness"][images, where], weights).sum()
    weighted = config.ltrb_weighting == "centerness"
    ltrb_loss = (ltrb * weights).sum() / centers if weighted and count else ltrb.sum() / max(1, count)
    divisor = max(1, centers + 1e-6) if config.centerness_normalizer == "targets" else max(1, count)
    return {"cls": focal[targets["valid"]].sum() / max(1, count), "ltrb": ltrb_loss,
            "centerness": centerness / divisor}


# Random batches

def random_batch(seed, classes=2, fraction=0.05, dtype="float32"):
    "Outputs and targets of two images; `fraction` of the locations are positive."
    rng = np.random.default_rng(seed)
    shape = 2, LOCATIONS
    positive = (rng.permutation(2 * LOCATIONS) < round(fraction * 2 * LOCATIONS)).reshape(shape)
    label = rng.integers(0, classes, shape)
    outputs = {"cls": rng.normal(-1, 3, (*shape, classes)), "ltrb": np.exp(rng.uniform(-0.7, 2.5, (*shape, 4))),
               "centerness": rng.normal(0, 2, shape)}
    ltrb = np.exp(rng.uniform(-0.7, 2.5, (*shape, 4)))
    targets = {"cls": ((label[..., None] == np.arange(classes)) & positive[..., None]).astype("float32"),
               "ltrb": np.where(positive[..., None], ltrb, 1).astype("float32"),
               "centerness": np.where(positive, rng.random(shape), 0).astype("float32"),
               "positive": positive, "valid": positive | (rng.random(shape) < 0.8)}
    return {name: value.astype(dtype) for name, value in outputs.items()}, targets


def gradient(function, *values):
    "The gradients of a scalar function, on either backend."
    if keras.backend.backend() == "jax":
        import jax
        gradients = jax.grad(function, range(len(values)))(*map(ops.convert_to_tensor, values))
    else:
        import tensorflow as tf
        values = [tf.convert_to_tensor(value) for value in values]
        with tf.GradientTape() as tape:
            tape.watch(values)
            result = function(*values)
        gradients = tape.gradient(result, values)
    return [np.asarray(value) for value in gradients]


def gradients(outputs, targets, config):
    "The gradients of the total with respect to each output."
    def loss(*values): return total_loss(fcos_losses(dict(zip(outputs, values)), targets, config), config)
    return dict(zip(outputs, gradient(loss, *outputs.values())))


# Equal to the reference

def assert_equal_to_the_reference(outputs, targets, config):
    ours, theirs = fcos_losses(outputs, targets, config), reference_losses(outputs, targets, config)
    for name in theirs: np.testing.assert_allclose(float(ours[name]), theirs[name], rtol=1e-5, atol=1e-9, err_msg=name)
    return ours


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_reference(config, seed):
    assert_equal_to_the_reference(*random_batch(seed), config)


@pytest.mark.parametrize("fraction", [0, 0.5 / LOCATIONS])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_few_positives_or_none(config, fraction):
    "With no positive, and with one whose centerness is below 1, where the normalisers stop at 1."
    outputs, targets = random_batch(7, fraction=fraction)
    assert targets["positive"].sum() == (0 if fraction == 0 else 1)
    ours = assert_equal_to_the_reference(outputs, targets, config)
    assert fraction or (float(ours["ltrb"]), float(ours["centerness"])) == (0, 0)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (None, 2.0), (0.5, 0.0), (None, 0.0), (0.25, 0.5), (0.9, 5.0)])
def test_focal_loss_equals_the_reference(alpha, gamma):
    logits = np.linspace(-12, 12, 97)
    for target in (0.0, 1.0):
        ours = focal_loss(logits.astype("float32"), np.full(97, target, "float32"), alpha, gamma)
        theirs = reference_focal(logits, np.full(97, target), alpha, gamma)
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-7)
    if alpha is not None:
        assert_equal_to_the_reference(*random_batch(1), LossConfig(focal_alpha=alpha, focal_gamma=gamma))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_soft_targets_are_quality_focal_loss(gamma):
    "|target - p| to the power gamma, times cross-entropy; a soft target is neither positive nor background."
    logits, targets = (part.ravel() for part in np.meshgrid(np.linspace(-9, 9, 73), np.linspace(0.05, 0.95, 19)))
    p = 1 / (1 + np.exp(-logits))
    expected = np.abs(targets - p) ** gamma * cross_entropy(logits, targets)
    x, y = logits.astype("float32"), targets.astype("float32")
    np.testing.assert_allclose(np.asarray(focal_loss(x, y, None, gamma)), expected, rtol=2e-4, atol=1e-6)
    weight = 0.25 * targets + 0.75 * (1 - targets)
    np.testing.assert_allclose(np.asarray(focal_loss(x, y, 0.25, gamma)), weight * expected, rtol=2e-4, atol=1e-6)
    assert np.isfinite(gradient(lambda v: ops.sum(focal_loss(v, y, 0.25, gamma)), x)[0]).all()


def test_a_soft_target_is_learned():
    "The loss is 0 where the prediction is the target, and its gradient points there from both sides."
    quality = np.float32(0.7)
    at = np.float32(np.log(0.7 / 0.3))
    def loss(logit): return focal_loss(logit, quality, 0.25, 2.0)
    slope = [float(gradient(loss, at + shift)[0]) for shift in np.float32([-1, 0, 1])]
    assert slope[0] < -1e-3 and abs(slope[1]) < 1e-5 and slope[2] > 1e-3
    assert float(loss(at)) < 1e-6


def test_without_down_weighting_focal_loss_is_cross_entropy():
    logits = np.linspace(-40, 40, 161).astype("float32")
    for target in (0.0, 0.3, 1.0):
        targets = np.full(161, target, "float32")
        ours = np.asarray(binary_cross_entropy(logits, targets))
        np.testing.assert_allclose(np.asarray(focal_loss(logits, targets, None, 0.0)), ours, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours, cross_entropy(logits.astype(float), targets), rtol=1e-5, atol=1e-6)


def test_giou_of_equal_boxes_is_one_and_apart_it_is_bounded():
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.uniform(-1, 4, (2, 500, 4))).astype("float32")
    loss = np.asarray(giou_loss(a, b))
    np.testing.assert_allclose(np.asarray(giou_loss(a, a)), 0, atol=1e-5)
    np.testing.assert_allclose(loss, np.asarray(giou_loss(b, a)), atol=1e-6)
    assert (loss >= 0).all() and (loss <= 2).all()
    def box(ltrb): return -ltrb[0], -ltrb[1], ltrb[2], ltrb[3]
    expected = [1 - reference_giou(box(p), box(q)) for p, q in zip(a.astype(float), b.astype(float))]
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_the_total_and_its_coefficient():
    losses = {"cls": 1.0, "ltrb": 10.0, "centerness": 100.0}
    assert total_loss(losses, LossConfig()) == 111 and total_loss(losses, LossConfig(centerness_weight=0.5)) == 61


def test_only_valid_and_positive_locations_matter():
    outputs, targets = random_batch(3)
    other, _ = random_batch(4)
    positive, valid = targets["positive"], targets["valid"]
    changed = {"cls": np.where(valid[..., None], outputs["cls"], other["cls"]),
               "ltrb": np.where(positive[..., None], outputs["ltrb"], other["ltrb"]),
               "centerness": np.where(positive, outputs["centerness"], other["centerness"])}
    for config in CONFIGS:
        before, after = fcos_losses(outputs, targets, config), fcos_losses(changed, targets, config)
        for name in before: assert float(before[name]) == float(after[name])
    assert float(fcos_losses({**outputs, "cls": other["cls"]}, targets, config)["cls"]) != float(before["cls"])


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=str)
def test_batches_together_are_one_batch(config):
    "One of the batches has no positive; the mean of their losses is another number."
    outputs, targets = random_batch(10)
    targets = {**targets, "positive": targets["positive"] & np.array([[True], [False]])}
    for name in ("cls", "centerness"):
        mask = targets["positive"][..., None] if name == "cls" else targets["positive"]
        targets[name] = np.where(mask, targets[name], 0).astype("float32")
    def row(values, i): return {name: value[i:i + 1] for name, value in values.items()}
    batches = [fcos_losses(row(outputs, i), row(targets, i), config) for i in range(2)]
    losses = {name: np.float32([float(batch[name]) for batch in batches]) for name in batches[0]}
    sums = {"positives": targets["positive"].sum(1).astype("float32"), "centerness_sum": targets["centerness"].sum(1)}
    together = fcos_losses(outputs, targets, config)
    for name, value in aggregate_batches({**losses, **sums}, config).items():
        assert value == pytest.approx(float(together[name]), rel=1e-5)
        assert abs(losses[name].mean() - value) > 0.01


# Gradients

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fraction", [0, 0.05])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_are_finite(dtype, fraction, config):
    outputs, targets = random_batch(5, fraction=fraction, dtype=dtype)
    for value in fcos_losses(outputs, targets, config).values():
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
    for name, slope in gradients(outputs, targets, config).items():
        assert np.isfinite(slope).all() and slope.dtype == dtype, name
        assert slope.any() == (name == "cls" or fraction > 0), name
        if name != "cls": assert not slope[~targets["positive"]].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_gradients_are_finite_for_every_logit(gamma):
    "Also at 0, where |x| has a corner, and where a probability has rounded to 0 or 1."
    outputs, targets = random_batch(6, classes=1, fraction=0.5)
    extreme = np.resize(np.float32([-1e4, -200, -90, -20, 0, 20, 90, 200, 1e4]), (2, LOCATIONS))
    outputs["cls"], outputs["centerness"] = extreme[..., None], extreme
    config = LossConfig(focal_gamma=gamma)
    slopes = gradients(outputs, targets, config)
    assert np.isfinite(slopes["cls"]).all() and np.isfinite(slopes["centerness"]).all()
    assert np.isfinite(float(total_loss(fcos_losses(outputs, targets, config), config)))


def test_the_gradient_of_cross_entropy_is_p_minus_y():
    outputs, targets = random_batch(8, classes=1)
    outputs["cls"][0, :50], outputs["centerness"][0, :50] = 0, 0
    config = LossConfig(focal_alpha=0.5, focal_gamma=0.0, centerness_normalizer="positives")
    slopes = gradients(outputs, targets, config)
    positive, count = targets["positive"], targets["positive"].sum()
    def p(logit): return 1 / (1 + np.exp(-logit.astype(float)))
    cls = (p(outputs["cls"]) - targets["cls"])[..., 0] * targets["valid"] / count / 2
    np.testing.assert_allclose(slopes["cls"][..., 0], cls, atol=1e-6)
    centerness = (p(outputs["centerness"]) - targets["centerness"]) * positive / count
    np.testing.assert_allclose(slopes["centerness"], centerness, atol=1e-6)


def test_infinite_distances_are_harmless_at_background_and_loud_at_a_positive_location():
    outputs, targets = random_batch(9)
    config = LossConfig()
    def ltrb(): return float(fcos_losses(outputs, targets, config)["ltrb"])
    outputs["ltrb"] = np.where(targets["positive"][..., None], outputs["ltrb"], np.inf).astype("float32")
    assert np.isfinite(ltrb())
    assert all(np.isfinite(slope).all() for slope in gradients(outputs, targets, config).values())
    image, place = np.argwhere(targets["positive"])[0]
    outputs["ltrb"][image, place] = 1e6 # absurd but finite
    assert np.isfinite(ltrb()) and np.isfinite(gradients(outputs, targets, config)["ltrb"]).all()
    outputs["ltrb"][image, place] = np.inf
    assert np.isnan(ltrb())


# Refusals, and the other backend

def test_unknown_words_are_refused_where_they_are_given():
    for wrong in (dict(ltrb_weighting="targets"), dict(centerness_normalizer="none")):
        with pytest.raises(InputError, match=next(iter(wrong))): replace(LossConfig(), **wrong)


ON_JAX = """
import json, sys
sys.path.insert(0, "tests/detector")
import keras, numpy as np
import test_losses as t
assert keras.backend.backend() == "jax"
for config in (t.CONFIGS[0], t.CONFIGS[3]): t.test_losses_equal_the_reference(config, 0)
t.test_gradients_are_finite("float32", 0, t.CONFIGS[3])
t.test_gradients_are_finite_for_every_logit(0.5)
t.test_soft_targets_are_quality_focal_loss(2.0)
t.test_infinite_distances_are_harmless_at_background_and_loud_at_a_positive_location()
losses = t.fcos_losses(*t.random_batch(0), t.LossConfig())
print(json.dumps({name: float(value) for name, value in losses.items()}))
"""


def test_jax_gives_the_same():
    pytest.importorskip("jax")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", ON_JAX], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    losses = fcos_losses(*random_batch(0), LossConfig())
    for name, value in json.loads(run.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(value, float(losses[name]), rtol=1e-5)
