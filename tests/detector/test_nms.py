"""NMS gives the boxes of tf.image.non_max_suppression, class by class, on 1,000 sets made to be unpleasant; TensorFlow here, JAX in another process."""
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.detector.nms import nms

PICTURES = 50   # sets of one shape, judged in one call
COMPILED = (4, 5, 6, 9, 10, 16, 17)   # kinds of one shape and 100 boxes a class, for which a compiled graph is made once

def scattered(rng, count):
    "Any boxes, any scores."
    corner = rng.uniform(0, 60, (PICTURES, count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 50, (PICTURES, count, 2))], -1), rng.random((PICTURES, count, 3))

def on_a_grid(rng, count):
    "Integer corners, so that overlaps of exactly 1/2, 3/5, 3/4 are common, some boxes without area; sixteen scores."
    corner = rng.integers(0, 6, (PICTURES, count, 2))
    return np.concatenate([corner, corner + rng.integers(0, 6, (PICTURES, count, 2))], -1), rng.integers(0, 17, (PICTURES, count, 2)) / 16

def copies(rng, count):
    "Few boxes, each many times, with few scores."
    boxes, scores = on_a_grid(rng, count)
    chosen = rng.integers(0, 5, (PICTURES, count))
    return np.take_along_axis(boxes, chosen[..., None], 1), rng.integers(0, 4, scores.shape) / 4

def chains(rng, count):
    "A row in which each box overlaps its neighbours, in or out of the order of scores, or with all scores equal."
    left = np.tile(np.arange(count), (PICTURES, 1))
    boxes = np.stack([left, 0 * left, left + rng.integers(2, 5, (PICTURES, 1)), 0 * left + 4], -1)
    falling = 1 - np.arange(count) / (2 * count)
    scores = np.stack([rng.permutation(falling) if kind == 0 else falling if kind == 1 else np.full(count, 0.75) for kind in rng.integers(0, 3, PICTURES)])
    return boxes, scores[..., None]

def flat(rng, count):
    "Boxes without width or height, or without both, among a few that have them."
    boxes, scores = on_a_grid(rng, count)
    squeezed = rng.random((PICTURES, count, 2)) < 0.4
    return np.concatenate([boxes[..., :2], np.where(squeezed, boxes[..., :2], boxes[..., 2:])], -1), scores

def crowd(rng, count):
    "Some people, each with many near copies: what a network gives."
    people = rng.uniform(0, 60, (PICTURES, 6, 2))
    boxes = np.concatenate([people, people + rng.uniform(20, 50, (PICTURES, 6, 2))], -1)
    near = np.take_along_axis(boxes, rng.integers(0, 6, (PICTURES, count))[..., None], 1)
    return near + rng.normal(0, 2, near.shape), rng.random((PICTURES, count, 2))

# sets, boxes in each, IoU threshold, score threshold, boxes kept of each class
KINDS = [(scattered, 60, 0.5, 0.05, 100), (scattered, 90, 0.3, 0.2, 100), (scattered, 60, 0.1, 0.0, 3), (scattered, 1, 0.5, 0.5, 100),
         (on_a_grid, 60, 0.5, 0.25, 100), (on_a_grid, 60, 0.6, 0.5, 100), (on_a_grid, 60, 0.75, 0.0, 100), (on_a_grid, 60, 0.5, 0.25, 4), (on_a_grid, 90, 1.0, 0.0, 10), (on_a_grid, 60, 0.0, 0.25, 100),
         (copies, 60, 0.5, 0.25, 100), (copies, 60, 0.5, 0.0, 2), (chains, 60, 0.5, 0.0, 100), (chains, 100, 0.3, 0.05, 100), (chains, 60, 0.25, 0.75, 100), (chains, 60, 0.5, 0.0, 7),
         (flat, 60, 0.5, 0.25, 100), (flat, 60, 0.0, 0.0, 100), (crowd, 120, 0.75, 0.05, 100), (crowd, 120, 0.3, 0.2, 100)]

def drawn(which):
    "The sets of one kind: (P, N, 4) boxes, (P, N, C) scores, thresholds."
    make, count, iou, score, most = KINDS[which]
    boxes, scores = make(np.random.default_rng(which), count)
    return boxes.astype("float32"), scores.astype("float32"), iou, score, most

def ours(boxes, scores, iou, score, most):
    candidates = scores.shape[1] * scores.shape[2]   # all
    return {name: np.array(value) for name, value in nms(boxes, scores, iou, score, most, candidates).items()}

def kept_by_tensorflow(boxes, scores, iou, score, most):
    "Rows that TensorFlow keeps, for each picture and class."
    return {(picture, label): tf.image.non_max_suppression(boxes[picture], scores[picture, :, label], most, iou, score).numpy()
            for picture in range(len(boxes)) for label in range(scores.shape[-1])}

def test_there_are_a_thousand_sets():
    assert len(KINDS) * PICTURES == 1000

@pytest.mark.parametrize("which", range(len(KINDS)))
def test_same_boxes_as_tensorflow(which):
    sets = drawn(which)
    boxes, scores, most = sets[0], sets[1], sets[4]
    result, theirs = ours(*sets), kept_by_tensorflow(*sets)
    for (picture, label), rows in theirs.items():
        mine = result["kept"][picture] & (result["label"][picture] == label)
        np.testing.assert_array_equal(result["xyxy"][picture, mine], boxes[picture, rows])
        np.testing.assert_array_equal(result["score"][picture, mine], scores[picture, rows, label])
    assert sum(map(len, theirs.values())) > 0
    if most < 20: assert max(map(len, theirs.values())) == most, "this kind is meant to reach max_per_class"

def test_the_sets_hold_what_they_are_meant_to_hold():
    "Ties in scores, equal boxes, overlaps and scores of exactly the threshold, boxes without area: else the law above says less than it seems to."
    equal_scores = equal_boxes = exact_overlaps = exact_scores = no_area = 0
    for which in range(len(KINDS)):
        boxes, scores, iou, score, _ = drawn(which)
        pairs = np.tril(np.ones((boxes.shape[1],) * 2, bool), -1)
        equal_scores += ((scores[:, :, None, 0] == scores[:, None, :, 0]) & pairs).any((1, 2)).sum()
        equal_boxes += ((boxes[:, :, None] == boxes[:, None]).all(-1) & pairs).any((1, 2)).sum()
        sides = np.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:]) - np.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
        overlap, area = np.maximum(sides, 0).prod(-1), (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        union = area[:, :, None] + area[:, None] - overlap
        exact_overlaps += ((overlap / np.where(union > 0, union, 1) == np.float32(iou)) & (overlap > 0) & pairs).any((1, 2)).sum()
        exact_scores += (scores == np.float32(score)).any((1, 2)).sum()
        no_area += (area == 0).any(1).sum()
    assert min(equal_scores, equal_boxes, exact_overlaps, exact_scores, no_area) >= 150

def test_fewer_candidates_give_the_beginning_of_the_answer():
    for which in (0, 4, 12, 18):
        boxes, scores, *limits = drawn(which)
        every = ours(boxes, scores, *limits)
        for candidates in (1, 20, 50):
            part = nms(boxes, scores, *limits, candidates)
            for name, value in part.items(): np.testing.assert_array_equal(np.array(value), every[name][:, :candidates])

def test_the_order_of_classes_and_pictures_changes_nothing():
    boxes, scores, *limits = drawn(0)      # no ties: their order is the order of the classes
    result, turned = ours(boxes, scores, *limits), ours(boxes[::-1], scores[::-1, :, ::-1], *limits)
    for name in ("xyxy", "score", "kept"): np.testing.assert_array_equal(result[name], turned[name][::-1])
    np.testing.assert_array_equal(result["label"], 2 - turned["label"][::-1])

def test_compiled_graph_gives_the_same():
    for jit in (False, True):
        compiled = tf.function(lambda boxes, scores, iou, score: nms(boxes, scores, iou, score, 100, 120), jit_compile=jit)
        for which in COMPILED:
            result = compiled(*(tf.constant(value, "float32") for value in drawn(which)[:4]))
            for name, value in ours(*drawn(which)).items(): np.testing.assert_array_equal(result[name].numpy(), value)

ON_JAX = """
import sys
import jax, keras, numpy as np
from fcos_lite.detector.nms import nms
assert keras.backend.backend() == "jax"
given, answer = np.load(sys.argv[1]), {}
compiled = jax.jit(lambda boxes, scores, iou, score: nms(boxes, scores, iou, score, 100, 120))
for which in given["kinds"]:
    result = compiled(given[f"boxes{which}"], given[f"scores{which}"], *given[f"limits{which}"])
    answer.update({f"{name}{which}": np.array(value) for name, value in result.items()})
np.savez(sys.argv[2], **answer)
"""

def test_jax_gives_the_same(tmp_path):
    pytest.importorskip("jax")
    given = {"kinds": COMPILED}
    for which in COMPILED:
        boxes, scores, *limits = drawn(which)
        given.update({f"boxes{which}": boxes, f"scores{which}": scores, f"limits{which}": np.array(limits[:2], "float32")})
    np.savez(tmp_path / "given.npz", **given)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", ON_JAX, str(tmp_path / "given.npz"), str(tmp_path / "answer.npz")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = np.load(tmp_path / "answer.npz")
    for which in COMPILED:
        for name, value in ours(*drawn(which)).items(): np.testing.assert_array_equal(answer[f"{name}{which}"], value, err_msg=f"{name} of kind {which}")

@pytest.mark.parametrize("alive", [0, 1, 30, 199, 200, 201, 202, 500, 1000])
def test_the_short_way_is_the_long_way(alive, monkeypatch):
    "None above the limit, few, as many as fit, one more, all: the same boxes, and nearly all of them, whether two hundred or a thousand candidates are judged."
    from fcos_lite.detector import nms as module
    assert module.FAST_PATH == 200
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 2000, (2, 900, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, corner.shape)], -1).astype("float32")
    scores = rng.uniform(0.1, 1, (2, 900, 2)).astype("float32")
    scores[1] /= 20                                                          # of the second picture nothing is above any limit but the last
    limit = np.float32(0) if alive == 1000 else np.sort(scores[0].ravel())[::-1][alive]
    found = {}
    for few in (200, 10_000):
        monkeypatch.setattr(module, "FAST_PATH", few)
        found[few] = {name: np.array(value) for name, value in module.nms(boxes, scores, 0.5, limit, 2000, 1000).items()}
    for name in found[200]: np.testing.assert_array_equal(found[200][name], found[10_000][name], err_msg=name)
    kept = found[200]["kept"].sum(1)
    assert 0.9 * alive <= kept[0] <= alive and (kept[1] > 0) == (alive == 1000)
