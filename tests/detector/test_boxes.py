"""Overlaps, locations, distances and centerness: laws on random boxes."""
import numpy as np
import pytest

from fcos_lite.detector.boxes import (area, centerness, decode_ltrb, encode_ltrb, giou, intersection, iou,
                                      location_strides, locations, pairwise_iou, split_levels)

STRIDES = (4, 8, 16, 32)


@pytest.fixture
def boxes():
    corners = np.random.default_rng(0).uniform(0, 512, (50, 2, 2))
    return np.sort(corners, axis=1).reshape(50, 4).astype("float32")


def by_hand(function, *boxes):
    return float(function(*(np.float32(box) for box in boxes)))


def test_area_and_intersection_by_hand():
    box = [0, 0, 4, 3]
    assert by_hand(area, box) == 12
    assert by_hand(area, [4, 0, 0, 3]) == 0 # inside out
    assert by_hand(intersection, box, [1, 1, 9, 9]) == 6
    assert by_hand(intersection, box, [4, 0, 8, 3]) == 0 # they touch, and share nothing
    assert by_hand(intersection, box, [5, 4, 9, 9]) == 0 # both sides negative: their product must not count


def test_iou_is_symmetric_and_does_not_depend_on_scale(boxes):
    a, b = boxes[:25], boxes[25:]
    np.testing.assert_array_equal(iou(a, a), np.ones(25))
    np.testing.assert_array_equal(iou(a, b), iou(b, a))
    np.testing.assert_allclose(iou(2 * a, 2 * b), iou(a, b), atol=1e-5)
    assert by_hand(iou, [0, 0, 0, 0], [0, 0, 0, 0]) == 0
    assert by_hand(iou, [0, 0, 2, 2], [1, 0, 3, 2]) == np.float32(1 / 3)


def test_pairwise_iou_is_iou_of_all_pairs(boxes):
    table = np.asarray(pairwise_iou(boxes[:5], boxes[5:12]))
    expected = [[by_hand(iou, a, b) for b in boxes[5:12]] for a in boxes[:5]]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert np.shape(pairwise_iou(boxes[:0], boxes)) == (0, 50)


def test_giou_lies_between_minus_one_and_iou(boxes):
    every, overlap = (np.asarray(f(boxes[:, None], boxes[None])) for f in (giou, iou))
    assert (every >= -1).all() and (every <= overlap + 1e-6).all()
    np.testing.assert_allclose(np.diag(every), 1, atol=1e-5)
    np.testing.assert_array_equal(every, every.T)
    np.testing.assert_allclose(giou(3 * boxes[:25], 3 * boxes[25:]), giou(boxes[:25], boxes[25:]), atol=1e-5)


@pytest.mark.parametrize("gap", [0, 1, 8, 998])
def test_giou_falls_with_the_gap(gap):
    "The hull of two unit squares is gap + 2 long, and gap of it is empty."
    value = by_hand(giou, [0, 0, 1, 1], [1 + gap, 0, 2 + gap, 1])
    assert value == pytest.approx(-gap / (gap + 2), abs=1e-5)


def test_giou_of_points_is_finite():
    assert np.isfinite(by_hand(giou, [0, 0, 0, 0], [0, 0, 0, 0]))


def test_locations_are_the_centres_of_all_cells():
    points, strides = locations(512, STRIDES), location_strides(512, STRIDES)
    assert points.shape == (21_760, 2) and len(np.unique(points, axis=0)) == 21_760
    assert [int((strides == stride).sum()) for stride in STRIDES] == [16_384, 4_096, 1_024, 256]
    np.testing.assert_array_equal(points[:3], [[2, 2], [6, 2], [10, 2]]) # the first row
    np.testing.assert_array_equal(points[-1], [496, 496])


def test_split_levels_loses_and_moves_nothing():
    numbers = np.arange(85, dtype="float32")[:, None]
    maps = [np.asarray(level) for level in split_levels(numbers, 32, STRIDES)]
    assert [level.shape for level in maps] == [(8, 8, 1), (4, 4, 1), (2, 2, 1), (1, 1, 1)]
    np.testing.assert_array_equal(np.concatenate([level.reshape(-1, 1) for level in maps]), numbers)
    batch = split_levels(np.tile(locations(512, STRIDES), (2, 1, 1)), 512, STRIDES)
    np.testing.assert_array_equal(batch[1][0, 5, 9], [9 * 8 + 4, 5 * 8 + 4]) # row 5, column 9: y first


def test_distances_give_the_box_back(boxes):
    points = locations(512, STRIDES)
    np.testing.assert_allclose(decode_ltrb(points[:50], encode_ltrb(points[:50], boxes)), boxes, atol=1e-3)
    np.testing.assert_array_equal(encode_ltrb(np.float32([3, 5]), np.float32([1, 1, 9, 9])), [2, 4, 6, 4])
    inside = np.asarray(encode_ltrb(points, np.float32([100, 40, 180, 200]))).min(-1) > 0
    x, y = points.T
    np.testing.assert_array_equal(inside, (x > 100) & (x < 180) & (y > 40) & (y < 200))


@pytest.mark.parametrize("ltrb, expected", [
    ((5, 8, 5, 8), 1), ((0, 8, 10, 8), 0), ((2.5, 8, 7.5, 8), (1 / 3) ** 0.5), ((2.5, 4, 7.5, 12), 1 / 3)])
def test_centerness_by_hand(ltrb, expected):
    assert by_hand(centerness, ltrb) == pytest.approx(expected, abs=1e-6)


def test_centerness_does_not_depend_on_scale_or_side():
    assert by_hand(centerness, [1, 2, 3, 4]) == pytest.approx(by_hand(centerness, [7, 14, 21, 28]), abs=1e-5)
    assert by_hand(centerness, [1, 2, 3, 4]) == by_hand(centerness, [3, 4, 1, 2])
