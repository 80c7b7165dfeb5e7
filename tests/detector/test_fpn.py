"""The feature pyramid: shapes, parameters and wiring."""
from dataclasses import replace

import keras
import numpy as np
import pytest

from fcos_lite.config import REFERENCE
from fcos_lite.detector.fpn import build_fpn, pyramid
from fcos_lite.detector.layers import reinitialize_kernels

BACKBONE_MAPS = (4, 64), (8, 128), (16, 256), (32, 256) # stride, channels


def pyramid_of(*strides):
    "The pyramid of an image of 256², without its backbone."
    maps = [keras.Input((256 // stride, 256 // stride, channels)) for stride, channels in BACKBONE_MAPS]
    return keras.Model(maps, pyramid(maps, replace(REFERENCE, strides=strides)))


@pytest.fixture(scope="module")
def reference(): return build_fpn(REFERENCE)


def test_the_reference_has_its_parameters_and_shapes(reference):
    assert reference.count_params() == 2_885_024
    assert [level.shape[1:] for level in reference.outputs] == [(side, side, 128) for side in (128, 64, 32, 16)]


def test_the_merged_map_goes_down_and_nothing_is_added_to_the_top(reference):
    for level, below in ((4, "p5_lateral_leaky"), (3, "p4_fuse_leaky"), (2, "p3_fuse_leaky")):
        assert reference.get_layer(f"p{level}_up").input is reference.get_layer(below).output
    assert "p5_add" not in [layer.name for layer in reference.layers]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32), (8, 16, 32, 64, 128), (4, 8), (16, 32, 64), (32,)])
def test_the_levels_follow_the_strides(strides):
    shapes = [level.shape[1:] for level in pyramid_of(*strides).outputs]
    assert shapes == [(256 // stride, 256 // stride, 128) for stride in strides]


def test_each_level_costs_its_own_parameters():
    p2 = 64 * 128 + 9 * 128 * 128 + 3 * 2 * 128 # lateral, smoothing and three norms
    down = 9 * 128 * 128 + 2 * 128
    full = pyramid_of(4, 8, 16, 32).count_params()
    assert pyramid_of(8, 16, 32).count_params() == full - p2
    assert pyramid_of(8, 16, 32, 64, 128).count_params() == full - p2 + 2 * down


@pytest.mark.parametrize("lit, cells", [(3, (10, 6, 4, 3)), (0, (3, 0, 0, 0))])
def test_coarse_maps_reach_fine_levels_and_never_the_other_way(lit, cells):
    "One cell of a backbone map differs; how many cells of a row change on P2, P3, P4, P5?"
    model = pyramid_of(4, 8, 16, 32)
    reinitialize_kernels(model.layers, seed=0)
    maps = [np.zeros((1, *x.shape[1:]), "float32") for x in model.inputs]
    middle = maps[lit].shape[1] // 2
    maps[lit][0, middle, middle] = np.random.default_rng(1).normal(size=maps[lit].shape[-1])
    for level, count in zip(model(maps), cells):
        level = np.asarray(level)[0, 1:-1, 1:-1] # the outermost cells see the padding
        changed = np.abs(level - level[0, 0]).max(-1) > 1e-4
        assert (changed.any(0).sum(), changed.any(1).sum(), changed.sum()) == (count, count, count ** 2)
