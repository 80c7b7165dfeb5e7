"""NMS gives the boxes of tf.image.non_max_suppression, class by class, on 1,000 sets of difficult boxes."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from fcos_lite.config import NMSConfig
from fcos_lite.detector import nms as module
from fcos_lite.detector.nms import nms
from fcos_lite.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 50 # sets of one shape, judged in one call
COMPILED = (4, 16) # kinds for which a compiled graph is made

def scattered(rng, count):
    "Any boxes, any scores."
    corner = rng.uniform(0, 60, (IMAGES, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 50, (IMAGES, count, 2))], -1)
    return boxes, rng.random((IMAGES, count, 3))

def on_a_grid(rng, count):
    "Integer corners: overlaps of exactly 1/2, 3/5, 3/4 are common, some boxes have no area; sixteen scores."
    corner = rng.integers(0, 6, (IMAGES, count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 6, (IMAGES, count, 2))], -1)
    return boxes, rng.integers(0, 17, (IMAGES, count, 2)) / 16

def copies(rng, count):
    "Few boxes, each many times, with few scores."
    boxes, scores = on_a_grid(rng, count)
    chosen = rng.integers(0, 5, (IMAGES, count))
    return np.take_along_axis(boxes, chosen[..., None], 1), rng.integers(0, 4, scores.shape) / 4

def chains(rng, count):
    "A row in which each box overlaps its neighbours, in or out of the order of scores, or with all scores equal."
    left = np.tile(np.arange(count), (IMAGES, 1))
    boxes = np.stack([left, 0 * left, left + rng.integers(2, 5, (IMAGES, 1)), 0 * left + 4], -1)
    falling = 1 - np.arange(count) / (2 * count)
    orders = rng.permutation, np.array, lambda scores: np.full(count, 0.75)
    scores = np.stack([orders[kind](falling) for kind in rng.integers(0, 3, IMAGES)])
    return boxes, scores[..., None]

def flat(rng, count):
    "Boxes without width or height, or without both, among a few that have them."
    boxes, scores = on_a_grid(rng, count)
    squeezed = rng.random((IMAGES, count, 2)) < 0.4
    return np.concatenate([boxes[..., :2], np.where(squeezed, boxes[..., :2], boxes[..., 2:])], -1), scores

def crowd(rng, count):
    "Some people, each with many near copies: what a network gives."
    people = rng.uniform(0, 60, (IMAGES, 6, 2))
    boxes = np.concatenate([people, people + rng.uniform(20, 50, (IMAGES, 6, 2))], -1)
    near = np.take_along_axis(boxes, rng.integers(0, 6, (IMAGES, count))[..., None], 1)
    return near + rng.normal(0, 2, near.shape), rng.random((IMAGES, count, 2))

# sets, boxes in each, IoU threshold, score threshold, boxes kept of each class
KINDS = [(scattered, 60, 0.5, 0.05, 100), (scattered, 90, 0.3, 0.2, 100), (scattered, 60, 0.1, 0.0, 3),
         (scattered, 1, 0.5, 0.5, 100), (on_a_grid, 60, 0.5, 0.25, 100), (on_a_grid, 60, 0.6, 0.5, 100),
         (on_a_grid, 60, 0.75, 0.0, 100), (on_a_grid, 60, 0.5, 0.25, 4), (on_a_grid, 90, 1.0, 0.0, 10),
         (on_a_grid, 60, 0.0, 0.25, 100), (copies, 60, 0.5, 0.25, 100), (copies, 60, 0.5, 0.0, 2),
         (chains, 60, 0.5, 0.0, 100), (chains, 100, 0.3, 0.05, 100), (chains, 60, 0.25, 0.75, 100),
         (chains, 60, 0.5, 0.0, 7), (flat, 60, 0.5, 0.25, 100), (flat, 60, 0.0, 0.0, 100),
         (crowd, 120, 0.75, 0.05, 100), (crowd, 120, 0.3, 0.2, 100)]

def drawn(which):
    "The sets of one kind: (P, N, 4) boxes, (P, N, C) scores, thresholds for all candidates."
    make, count, iou, score, most = KINDS[which]
    boxes, scores = make(np.random.default_rng(which), count)
    config = NMSConfig(iou=iou, score=score, max_per_class=most, candidates=count * scores.shape[2])
    return boxes.astype("float32"), scores.astype("float32"), config

def ours(boxes, scores, config):
    return {name: np.array(value) for name, value in nms(boxes, scores, config).items()}

def kept_by_tensorflow(boxes, scores, config):
    "Rows that TensorFlow keeps, for each image and class."
    tf = pytest.importorskip("tensorflow")
    limits = config.max_per_class, config.iou, config.score
    return {(image, label): tf.image.non_max_suppression(boxes[image], scores[image, :, label], *limits).numpy()
            for image in range(len(boxes)) for label in range(scores.shape[-1])}

def test_there_are_a_thousand_sets():
    assert len(KINDS) * IMAGES == 1000

@pytest.mark.parametrize("which", range(len(KINDS)))
def test_same_boxes_as_tensorflow(which):
    boxes, scores, config = drawn(which)
    result, theirs = ours(boxes, scores, config), kept_by_tensorflow(boxes, scores, config)
    for (image, label), rows in theirs.items():
        kept = result["kept"][image] & (result["label"][image] == label)
        np.testing.assert_array_equal(result["xyxy"][image, kept], boxes[image, rows])
        np.testing.assert_array_equal(result["score"][image, kept], scores[image, rows, label])
    counts = list(map(len, theirs.values()))
    assert sum(counts) > 0
    if config.max_per_class < 20: assert max(counts) == config.max_per_class, "this kind is meant to reach the limit"

def test_the_sets_hold_what_they_are_meant_to_hold():
    "Ties in scores, equal boxes, overlaps and scores of exactly the threshold, boxes without area."
    equal_scores = equal_boxes = exact_overlaps = exact_scores = no_area = 0
    for which in range(len(KINDS)):
        boxes, scores, config = drawn(which)
        pairs = np.tril(np.ones((boxes.shape[1],) * 2, bool), -1)
        equal_scores += ((scores[:, :, None, 0] == scores[:, None, :, 0]) & pairs).any((1, 2)).sum()
        equal_boxes += ((boxes[:, :, None] == boxes[:, None]).all(-1) & pairs).any((1, 2)).sum()
        right_bottom = np.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
        sides = right_bottom - np.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
        overlap, area = np.maximum(sides, 0).prod(-1), (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        union = area[:, :, None] + area[:, None] - overlap
        exact = overlap / np.where(union > 0, union, 1) == np.float32(config.iou)
        exact_overlaps += (exact & (overlap > 0) & pairs).any((1, 2)).sum()
        exact_scores += (scores == np.float32(config.score)).any((1, 2)).sum()
        no_area += (area == 0).any(1).sum()
    assert min(equal_scores, equal_boxes, exact_overlaps, exact_scores, no_area) >= 150

def test_fewer_candidates_give_the_beginning_of_the_answer():
    for which in (0, 4, 12, 18):
        boxes, scores, config = drawn(which)
        every = ours(boxes, scores, config)
        for candidates in (1, 20, 50):
            part = nms(boxes, scores, replace(config, candidates=candidates))
            for name, value in part.items(): np.testing.assert_array_equal(np.array(value), every[name][:, :candidates])

def test_the_order_of_classes_and_images_changes_nothing():
    boxes, scores, config = drawn(0) # no ties: their order is the order of the classes
    result, turned = ours(boxes, scores, config), ours(boxes[::-1], scores[::-1, :, ::-1], config)
    for name in ("xyxy", "score", "kept"): np.testing.assert_array_equal(result[name], turned[name][::-1])
    np.testing.assert_array_equal(result["label"], 2 - turned["label"][::-1])

def test_boxes_and_scores_of_different_networks_are_refused():
    with pytest.raises(InputError, match="boxes for 2 locations, scores for 3: give as many of each"):
        nms(np.zeros((1, 2, 4)), np.zeros((1, 3, 1)), NMSConfig())

def test_a_compiled_graph_gives_the_same():
    tf = pytest.importorskip("tensorflow")
    for jit in (False, True):
        compiled = tf.function(nms, jit_compile=jit)
        for which in COMPILED:
            boxes, scores, config = drawn(which)
            result = compiled(tf.constant(boxes), tf.constant(scores), config)
            for name, value in ours(boxes, scores, config).items():
                np.testing.assert_array_equal(result[name].numpy(), value)

ON_JAX = """
import sys
sys.path.insert(0, "tests/detector")
import jax, keras, numpy as np
from test_nms import COMPILED, drawn, nms
assert keras.backend.backend() == "jax"
answer, compiled = {}, jax.jit(nms, static_argnums=2)
for which in COMPILED:
    answer.update({f"{name}{which}": np.array(value) for name, value in compiled(*drawn(which)).items()})
np.savez(sys.argv[1], **answer)
"""

def test_jax_gives_the_same(tmp_path):
    pytest.importorskip("jax")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ON_JAX, str(tmp_path / "answer.npz")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = np.load(tmp_path / "answer.npz")
    for which in COMPILED:
        for name, value in ours(*drawn(which)).items():
            np.testing.assert_array_equal(answer[f"{name}{which}"], value, err_msg=f"{name} of kind {which}")

@pytest.mark.parametrize("above", [0, 1, 30, 199, 200, 201, 202, 500, 1000])
def test_the_fast_path_gives_the_same(above, monkeypatch):
    "None above the threshold, few, as many as fit, one more, all: the same boxes, whatever is compared."
    assert module.FAST_PATH == 200
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 2000, (2, 900, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, corner.shape)], -1).astype("float32")
    scores = rng.uniform(0.1, 1, (2, 900, 2)).astype("float32")
    scores[1] /= 20 # of the second image nothing is above any threshold but the last
    threshold = np.float32(0) if above == 1000 else np.sort(scores[0].ravel())[::-1][above]
    config, results = NMSConfig(iou=0.5, score=float(threshold), max_per_class=2000), {}
    for few in (200, 10_000):
        monkeypatch.setattr(module, "FAST_PATH", few)
        results[few] = ours(boxes, scores, config)
    for name, value in results[200].items(): np.testing.assert_array_equal(value, results[10_000][name])
    kept = results[200]["kept"].sum(1)
    assert 0.9 * above <= kept[0] <= above and (kept[1] > 0) == (above == 1000)
