"""Losses equal an independent reading of the document in float64, and no input that can happen breaks their gradients."""
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from fcos_lite.config import InputError
from fcos_lite.detector.losses import binary_cross_entropy, fcos_losses, focal_loss, giou_loss, total_loss

ROOT = Path(__file__).parents[1]
SIDES = ((4, 16), (8, 8), (16, 4), (32, 2))   # stride in pixels, cells in a row: a picture of 64 pixels
LOCATIONS = sum(side * side for _, side in SIDES)
SWITCHES = [dict(ltrb_weighting=a, centerness_normalizer=b) for a, b in product(("none", "centerness"), ("targets", "positives"))]


# The document in float64, in pixels, location by location where it matters

def cross_entropy(logit, target):
    "The definition, with the logarithms of both probabilities."
    return target * np.logaddexp(0, -logit) + (1 - target) * np.logaddexp(0, logit)


def document_focal(logit, target, alpha, gamma):
    p = 1 / (1 + np.exp(-logit))
    p_t = np.where(target == 1, p, 1 - p)
    alpha_factor = 1 if alpha is None else np.where(target == 1, alpha, 1 - alpha)
    return alpha_factor * (1 - p_t) ** gamma * cross_entropy(logit, target)


def document_giou(a, b):
    "Of two xyxy boxes in pixels."
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return np.clip(inter / (union + 1e-6) - (hull - union) / (hull + 1e-6), -1, 1)


def document_losses(outputs, targets, alpha=0.25, gamma=2.0, ltrb_weighting="none", centerness_normalizer="targets"):
    outputs = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    points = [((i % side + 0.5) * stride, (i // side + 0.5) * stride, stride) for stride, side in SIDES for i in range(side * side)]
    pictures, where = np.nonzero(targets["positive"])
    reg, weights = [], []
    for picture, place in zip(pictures, where):
        x, y, stride = points[place]
        box = lambda l, t, r, b: (x - l * stride, y - t * stride, x + r * stride, y + b * stride)
        giou = document_giou(box(*outputs["ltrb"][picture, place]), box(*targets["ltrb"][picture, place].astype(float)))
        reg.append(1 - giou)
        weights.append(float(targets["centerness"][picture, place]))
    positives, centers = len(reg), sum(weights)
    reg, weights = np.array(reg), np.array(weights)
    focal = document_focal(outputs["cls"], targets["cls"], alpha, gamma)[targets["counted"]].sum()
    ctr = cross_entropy(outputs["centerness"][pictures, where], weights).sum()
    if ltrb_weighting == "centerness": reg_loss = (reg * weights).sum() / centers if positives else 0
    else: reg_loss = reg.sum() / positives if positives else 0
    return {"cls": focal / max(1, positives), "reg": reg_loss,
            "ctr": ctr / max(1, centers + 1e-6) if centerness_normalizer == "targets" else ctr / max(1, positives)}


# Random batches

def random_batch(seed, classes=2, share=0.05, dtype="float32"):
    "Outputs and targets of two pictures; `share` of the locations are positive."
    rng = np.random.default_rng(seed)
    shape = 2, LOCATIONS
    positive = (rng.permutation(2 * LOCATIONS) < round(share * 2 * LOCATIONS)).reshape(shape)
    label = rng.integers(0, classes, shape)
    outputs = {"cls": rng.normal(-1, 3, (*shape, classes)), "ltrb": np.exp(rng.uniform(-0.7, 2.5, (*shape, 4))), "centerness": rng.normal(0, 2, shape)}
    targets = {"cls": ((label[..., None] == np.arange(classes)) & positive[..., None]).astype("float32"),
               "ltrb": np.where(positive[..., None], np.exp(rng.uniform(-0.7, 2.5, (*shape, 4))), 1).astype("float32"),
               "centerness": np.where(positive, rng.random(shape), 0).astype("float32"),
               "positive": positive, "counted": positive | (rng.random(shape) < 0.8)}
    return {name: value.astype(dtype) for name, value in outputs.items()}, targets


def gradients(outputs, targets, **switches):
    "The slopes of the total with respect to each output, on either backend."
    loss = lambda values: total_loss(fcos_losses(dict(zip(outputs, values)), targets, **switches))
    if keras.backend.backend() == "jax":
        import jax
        slopes = jax.grad(loss)([ops.convert_to_tensor(value) for value in outputs.values()])
    else:
        import tensorflow as tf
        values = [tf.convert_to_tensor(value) for value in outputs.values()]
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = loss(values)
        slopes = tape.gradient(total, values)
    return {name: np.asarray(slope) for name, slope in zip(outputs, slopes)}


# Equal to the document

@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_document(switches, seed):
    outputs, targets = random_batch(seed)
    ours, theirs = fcos_losses(outputs, targets, **switches), document_losses(outputs, targets, **switches)
    for name in theirs: np.testing.assert_allclose(float(ours[name]), theirs[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("share", [0, 0.5 / LOCATIONS])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_few_positives_or_none(switches, share):
    "With no positive, and with one whose centerness is below 1, where the normalisers stop at 1."
    outputs, targets = random_batch(7, share=share)
    assert targets["positive"].sum() == (0 if share == 0 else 1)
    ours, theirs = fcos_losses(outputs, targets, **switches), document_losses(outputs, targets, **switches)
    for name in theirs: np.testing.assert_allclose(float(ours[name]), theirs[name], rtol=1e-5, atol=1e-9, err_msg=name)
    assert share or (float(ours["reg"]), float(ours["ctr"])) == (0, 0)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (None, 2.0), (0.5, 0.0), (None, 0.0), (0.25, 0.5), (0.9, 5.0)])
def test_focal_loss_equals_the_document(alpha, gamma):
    logits = np.linspace(-12, 12, 97)
    for target in (0.0, 1.0):
        ours = focal_loss(logits.astype("float32"), np.full(97, target, "float32"), alpha, gamma)
        np.testing.assert_allclose(np.asarray(ours), document_focal(logits, np.full(97, target), alpha, gamma), rtol=1e-5, atol=1e-7)
        outputs, targets = random_batch(1)
        np.testing.assert_allclose(float(fcos_losses(outputs, targets, alpha, gamma)["cls"]), document_losses(outputs, targets, alpha, gamma)["cls"], rtol=1e-5)


def test_without_fading_and_weights_focal_loss_is_cross_entropy():
    logits = np.linspace(-40, 40, 161).astype("float32")
    for target in (0.0, 1.0):
        targets = np.full(161, target, "float32")
        np.testing.assert_allclose(np.asarray(focal_loss(logits, targets, None, 0.0)), np.asarray(binary_cross_entropy(logits, targets)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(binary_cross_entropy(logits, targets)), cross_entropy(logits.astype(float), target), rtol=1e-5, atol=1e-6)


def test_giou_of_equal_boxes_is_one_and_apart_it_is_bounded():
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.uniform(-1, 4, (2, 500, 4))).astype("float32")
    np.testing.assert_allclose(np.asarray(giou_loss(a, a)), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(giou_loss(a, b)), np.asarray(giou_loss(b, a)), atol=1e-6)
    assert (np.asarray(giou_loss(a, b)) >= 0).all() and (np.asarray(giou_loss(a, b)) <= 2).all()
    np.testing.assert_allclose(np.asarray(giou_loss(a, b)), [1 - document_giou((-p[0], -p[1], p[2], p[3]), (-q[0], -q[1], q[2], q[3])) for p, q in zip(a.astype(float), b.astype(float))], atol=1e-5)


def test_the_total_and_its_coefficient():
    losses = {"cls": 1.0, "reg": 10.0, "ctr": 100.0}
    assert total_loss(losses) == 111 and total_loss(losses, 0.5) == 61


def test_only_counted_and_positive_locations_matter():
    outputs, targets = random_batch(3)
    other, _ = random_batch(4)
    kept = targets["positive"]
    changed = {"cls": np.where(targets["counted"][..., None], outputs["cls"], other["cls"]),
               "ltrb": np.where(kept[..., None], outputs["ltrb"], other["ltrb"]), "centerness": np.where(kept, outputs["centerness"], other["centerness"])}
    for switches in SWITCHES:
        before, after = fcos_losses(outputs, targets, **switches), fcos_losses(changed, targets, **switches)
        for name in before: assert float(before[name]) == float(after[name])
    assert float(fcos_losses({**outputs, "cls": other["cls"]}, targets)["cls"]) != float(before["cls"])


# Gradients

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [0, 0.05])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_gradients_are_finite(dtype, share, switches):
    outputs, targets = random_batch(5, share=share, dtype=dtype)
    for value in fcos_losses(outputs, targets, **switches).values(): assert keras.backend.standardize_dtype(value.dtype) == "float32"
    for name, slope in gradients(outputs, targets, **switches).items():
        assert np.isfinite(slope).all() and slope.dtype == dtype, name
        assert slope.any() == (name == "cls" or share > 0), name
        if name != "cls": assert not slope[~targets["positive"]].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_gradients_are_finite_for_every_logit(gamma):
    "Also at 0, where |x| has a corner, and where a probability has rounded to 0 or 1."
    outputs, targets = random_batch(6, classes=1, share=0.5)
    extreme = np.resize(np.float32([-1e4, -200, -90, -20, 0, 20, 90, 200, 1e4]), (2, LOCATIONS))
    outputs["cls"], outputs["centerness"] = extreme[..., None], extreme
    slopes = gradients(outputs, targets, gamma=gamma)
    assert np.isfinite(slopes["cls"]).all() and np.isfinite(slopes["centerness"]).all()
    assert np.isfinite(float(total_loss(fcos_losses(outputs, targets, gamma=gamma))))


def test_the_slope_of_cross_entropy_is_p_minus_y():
    outputs, targets = random_batch(8, classes=1)
    outputs["cls"][0, :50], outputs["centerness"][0, :50] = 0, 0
    slopes = gradients(outputs, targets, alpha=None, gamma=0.0, centerness_normalizer="positives")
    positive, positives = targets["positive"], targets["positive"].sum()
    p = lambda logit: 1 / (1 + np.exp(-logit.astype(float)))
    np.testing.assert_allclose(slopes["cls"][..., 0], (p(outputs["cls"]) - targets["cls"])[..., 0] * targets["counted"] / positives, atol=1e-6)
    np.testing.assert_allclose(slopes["centerness"], (p(outputs["centerness"]) - targets["centerness"]) * positive / positives, atol=1e-6)


def test_infinite_distances_are_harmless_at_background_and_loud_at_a_person():
    outputs, targets = random_batch(9)
    outputs["ltrb"] = np.where(targets["positive"][..., None], outputs["ltrb"], np.inf).astype("float32")
    before = float(fcos_losses(outputs, targets)["reg"])
    assert np.isfinite(before) and all(np.isfinite(slope).all() for slope in gradients(outputs, targets).values())
    picture, place = np.argwhere(targets["positive"])[0]
    outputs["ltrb"][picture, place] = 1e6     # absurd but finite
    assert np.isfinite(float(fcos_losses(outputs, targets)["reg"])) and np.isfinite(gradients(outputs, targets)["ltrb"]).all()
    outputs["ltrb"][picture, place] = np.inf
    assert np.isnan(float(fcos_losses(outputs, targets)["reg"]))


# Refusals, and the other backend

def test_unknown_switches_are_refused_by_name():
    outputs, targets = random_batch(0)
    for wrong in (dict(ltrb_weighting="targets"), dict(centerness_normalizer="none")):
        with pytest.raises(InputError, match=next(iter(wrong))): fcos_losses(outputs, targets, **wrong)


JAX = """
import json, sys
import keras, numpy as np
sys.path.insert(0, "tests")
import test_losses as t
assert keras.backend.backend() == "jax"
outputs, targets = t.random_batch(0)
for switches, share in ((t.SWITCHES[0], 0), (t.SWITCHES[3], 0.05)):
    t.test_losses_equal_the_document(switches, 0)
    t.test_gradients_are_finite("float32", share, switches)
t.test_gradients_are_finite_for_every_logit(0.5)
t.test_infinite_distances_are_harmless_at_background_and_loud_at_a_person()
print(json.dumps({name: float(value) for name, value in t.fcos_losses(outputs, targets).items()}))
"""


def test_jax_gives_the_same():
    pytest.importorskip("jax")
    run = subprocess.run([sys.executable, "-c", JAX], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"})
    assert run.returncode == 0, run.stderr[-2000:]
    for name, value in json.loads(run.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(value, float(fcos_losses(*random_batch(0))[name]), rtol=1e-5)
