"""The heads: what the levels share, what they do not, and the initial predictions."""
from dataclasses import replace

import keras
import numpy as np
import pytest

from fcos_lite.config import REFERENCE
from fcos_lite.detector.heads import Heads, prior_bias
from fcos_lite.detector.layers import reinitialize_kernels


def make(**changes):
    "Heads with kernels that are the same on every call."
    heads = Heads(replace(REFERENCE, **changes))
    heads.build(None)
    predictions = heads.classes, heads.distances, heads.centers
    reinitialize_kernels([*heads.cls_tower.layers, *heads.reg_tower.layers, *predictions], seed=0)
    return heads


@pytest.fixture
def level(): return np.random.default_rng(1).normal(size=(1, 8, 8, 128)).astype("float32")


def by_level(outputs): return {name: np.split(np.asarray(value)[0], 4) for name, value in outputs.items()}


def test_shapes_and_parameters_of_the_reference():
    heads = Heads(REFERENCE)
    outputs = heads([keras.Input((side, side, 128)) for side in (128, 64, 32, 16)])
    shapes = {name: value.shape[1:] for name, value in outputs.items()}
    assert shapes == {"cls": (21_760, 1), "ltrb": (21_760, 4), "centerness": (21_760,)}
    layers = heads.cls_tower, heads.reg_tower, heads.classes, heads.distances, heads.centers
    assert [layer.count_params() for layer in layers] == [184_832, 184_832, 65, 260, 65]
    assert heads.count_params() == 2 * 184_832 + 65 + 260 + 65 + 4 # and four scales


def test_levels_share_all_weights_but_their_scale(level):
    heads = make()
    before = by_level(heads([level] * 4))
    for levels in before.values():
        for other in levels[1:]: np.testing.assert_allclose(other, levels[0], rtol=1e-5)
    heads.scales[2].assign(2 * REFERENCE.scale_init)
    after = by_level(heads([level] * 4))
    for name in ("cls", "centerness"): np.testing.assert_array_equal(before[name], after[name])
    for i in (0, 1, 3): np.testing.assert_array_equal(before["ltrb"][i], after["ltrb"][i])
    np.testing.assert_allclose(after["ltrb"][2], before["ltrb"][2] ** 2, rtol=1e-5) # exp of twice as much


@pytest.mark.parametrize("tower", ["cls", "reg"])
def test_centerness_depends_on_its_tower_alone(tower, level):
    heads = make(centerness_tower=tower)
    before = {name: np.asarray(value) for name, value in heads([level] * 4).items()}
    kernel = heads.reg_tower.layers[0].kernel
    kernel.assign(-kernel)
    after = heads([level] * 4)
    np.testing.assert_array_equal(before["cls"], after["cls"])
    assert np.abs(before["ltrb"] - after["ltrb"]).max() > 1e-3
    assert np.array_equal(before["centerness"], after["centerness"]) == (tower == "cls")


def test_the_initial_predictions_are_the_biases(level):
    outputs = make()([level] * 4)
    assert 1 / (1 + np.exp(-np.asarray(outputs["cls"]).mean())) == pytest.approx(REFERENCE.class_prior, rel=0.1)
    assert np.asarray(outputs["ltrb"]).mean() == pytest.approx(np.exp(0.1 * REFERENCE.ltrb_bias), rel=0.05)
    assert np.asarray(outputs["centerness"]).mean() == pytest.approx(REFERENCE.centerness_bias, abs=0.1)


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.5])
def test_prior_bias_is_the_logit_of_the_prior(probability):
    assert 1 / (1 + np.exp(-prior_bias(probability))) == pytest.approx(probability)


def test_predictions_stay_in_float32_under_half_precision(level):
    heads = Heads(REFERENCE, dtype="mixed_float16")
    for value in heads([level] * 4).values(): assert keras.backend.standardize_dtype(value.dtype) == "float32"
