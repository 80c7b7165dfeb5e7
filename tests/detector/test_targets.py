"""Targets equal a slow, literal reading of the rules, on 1,000 random pictures and with each switch.

The reading below is written from the rules, location by location and box by box, in NumPy's float32. It shares no code with the library.
"""
import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fcos_lite.config import InputError
from fcos_lite.detector.targets import assign_targets, count_unassigned, unassigned_boxes

ROOT = Path(__file__).parents[1]
STRIDES = (4, 8, 16, 32)
CLASSES = 3
one = np.float32(1)


# The rules, read literally

def level_of(area, image_size, rule):
    "0 for P2 .. 3 for P5, by area."
    scale = (image_size / 512) ** 2 if rule == "relative_area" else 1
    if area <= 4096 * scale: return 0
    if area <= 16384 * scale: return 1
    if area <= 65536 * scale: return 2
    return 3


def near(i, low, high, stride, center_radius):
    "The centre rule along one axis: the source's in grid cells, or a radius in strides around the middle."
    middle = (low + high) / np.float32(2)
    if center_radius is None:
        return abs(np.float32(i) - middle / stride) <= max(one, (high - low) / stride)
    point = np.float32(i * stride + stride / 2)
    return abs(point - middle) < center_radius * stride


def cells(low, high, side, stride, center_radius):
    "Along one axis: the cells whose centres are strictly inside and near the middle."
    return [i for i in range(side) if low < i * stride + stride / 2 < high and near(i, low, high, stride, center_radius)]


def nearest(low, high, side, stride):
    "Along one axis: the cell whose centre is nearest to the middle; of two equally near ones the later."
    middle, best = float((low + high) / np.float32(2)), 0
    for i in range(side):
        if abs(i * stride + stride / 2 - middle) <= abs(best * stride + stride / 2 - middle): best = i
    return best


def held(box, image_size, rule, center_radius, rescue):
    "All (level, row, column) that may learn a box, when nobody else is there."
    left, top, right, bottom = box
    found = []
    levels = range(4) if rule == "max_distance" else [level_of((right - left) * (bottom - top), image_size, rule)]
    for level in levels:
        stride = STRIDES[level]
        side = image_size // stride
        for row in cells(top, bottom, side, stride, center_radius):
            for column in cells(left, right, side, stride, center_radius):
                x, y = column * stride + stride / 2, row * stride + stride / 2
                reach = max(x - left, y - top, right - x, bottom - y)
                limits = (0, 64, 128, 256, np.inf)
                if rule != "max_distance" or limits[level] < reach <= limits[level + 1]: found.append((level, row, column))
    if rescue and not found:
        side = image_size // STRIDES[levels[0]]
        found = [(levels[0], nearest(top, bottom, side, STRIDES[levels[0]]), nearest(left, right, side, STRIDES[levels[0]]))]
    return found


def literal(boxes, labels, image_size, rule="area", center_radius=None, rescue=False, crowd="negative"):
    "One picture's targets, a dict of flat arrays over all locations, and the locations each person would have alone and got."
    sides = [image_size // stride for stride in STRIDES]
    starts = np.cumsum([0] + [side * side for side in sides])
    count = starts[-1]
    out = {"cls": np.zeros((count, CLASSES)), "ltrb": np.ones((count, 4)), "centerness": np.zeros(count),
           "positive": np.zeros(count, bool), "counted": np.ones(count, bool), "box": np.full(count, -1)}
    smallest = np.full(count, np.inf)
    alone = {}
    for index, (box, label) in enumerate(zip(boxes, labels)):
        left, top, right, bottom = box
        if label < 0 or right <= left or bottom <= top: continue
        area = (right - left) * (bottom - top)
        alone[index] = held(box, image_size, rule, center_radius, rescue)
        for level, row, column in alone[index]:
            place = starts[level] + row * sides[level] + column
            if not area < smallest[place]: continue
            smallest[place] = area
            stride = np.float32(STRIDES[level])
            x, y = np.float32((column + 0.5) * stride), np.float32((row + 0.5) * stride)
            l, t, r, b = (x - left) / stride, (y - top) / stride, (right - x) / stride, (bottom - y) / stride
            central = 1.0
            if min(l, t, r, b) > 0:
                central = np.sqrt(min(l, r) / (max(l, r) + 1e-6) * min(t, b) / (max(t, b) + 1e-6))
            out["ltrb"][place] = [max(v, 0) for v in (l, t, r, b)]
            out["centerness"][place], out["positive"][place], out["box"][place] = central, True, index
            out["cls"][place] = np.arange(CLASSES) == label
    if crowd == "ignore":
        for (left, top, right, bottom), label in zip(boxes, labels):
            if label >= -1: continue
            for level, stride in enumerate(STRIDES):
                for row in range(sides[level]):
                    for column in range(sides[level]):
                        place = starts[level] + row * sides[level] + column
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        if left < x < right and top < y < bottom and not out["positive"][place]: out["counted"][place] = False
    return out, alone


# Random pictures

def random_boxes(rng, image_size, count=8):
    "Boxes (count, 4) and labels (count,) of one picture: of all kinds, or none at all."
    if rng.random() < 0.05: return np.zeros((count, 4), np.float32), np.full(count, -1, np.int32)
    boxes = []
    while len(boxes) < count:
        kind = rng.integers(9)
        wide, high = image_size * np.exp(rng.uniform(-4, 0.2, 2))
        if kind == 0: wide, high = rng.uniform(0.1, 6, 2)                                  # tiny
        if kind == 1: wide, high = image_size * rng.uniform(0.9, 2, 2)                     # huge
        if kind == 2: wide, high = rng.choice([4, 8, 16, 32, 64, 128, 256], 2)             # on the limits of levels
        x, y = rng.uniform(-0.2, 1.1, 2) * image_size - (wide / 2, high / 2)
        if kind == 3: x, y = rng.choice([-2, 1.5], 2) * image_size                         # out of the frame
        box = np.array([x, y, x + wide, y + high])
        if kind == 4 and boxes:                                                            # nested
            l, t, r, b = boxes[-1]
            a, c = np.sort(rng.uniform(0, 1, (2, 2)), axis=1)
            box = np.array([l + (r - l) * a[0], t + (b - t) * c[0], l + (r - l) * a[1], t + (b - t) * c[1]])
        if kind == 5 and boxes: box = np.array([boxes[-1][2], boxes[-1][1], boxes[-1][2] + wide, boxes[-1][3]])   # touching
        if kind == 6 and boxes: box = boxes[rng.integers(len(boxes))]                      # the same again
        if kind == 7 and rng.random() < 0.3: box = np.array([x, y, x, y + high])           # without area
        boxes.append(box)
    boxes = np.array(boxes)
    if rng.random() < 0.6: boxes = np.round(boxes * 8) / 8                                 # on an eighth: equalities do happen
    return boxes.astype(np.float32), rng.choice([-4, -2, -1, 0, 1, 2], count, p=[0.03, 0.03, 0.1, 0.5, 0.17, 0.17]).astype(np.int32)


RULES = [dict(level_rule=rule, center_radius=radius, assign_nearest_if_empty=rescue, crowd_policy=crowd)
         for rule, radius, rescue, crowd in product(("area", "relative_area", "max_distance"), (None, 1.5), (False, True), ("negative", "ignore"))
         if not (rescue and rule == "max_distance")]
SIZES = {64: 600, 128: 320, 256: 60, 512: 20}    # pixels: pictures, 1,000 in all


def pictures(image_size, seed=0):
    rng = np.random.default_rng((seed, image_size))
    boxes, labels = zip(*(random_boxes(rng, image_size) for _ in range(SIZES[image_size])))
    return np.array(boxes), np.array(labels)


def literal_rules(rules):
    return dict(rule=rules["level_rule"], center_radius=rules["center_radius"], rescue=rules["assign_nearest_if_empty"], crowd=rules["crowd_policy"])


def assert_same(ours, boxes, labels, image_size, rules):
    "All pictures of a batch, masks exactly and numbers to 1e-6."
    for row in range(len(boxes)):
        expected, _ = literal(boxes[row], labels[row], image_size, **literal_rules(rules))
        for name in ("positive", "counted", "box", "cls"):
            np.testing.assert_array_equal(np.asarray(ours[name])[row], expected[name], err_msg=f"{name}, {rules}, picture {row}")
        for name in ("ltrb", "centerness"):
            np.testing.assert_allclose(np.asarray(ours[name])[row], expected[name], rtol=1e-6, atol=1e-6, err_msg=f"{name}, {rules}, picture {row}")


# The laws

def test_there_are_a_thousand_pictures():
    assert sum(SIZES.values()) == 1000 and len(RULES) == 20


@pytest.mark.parametrize("image_size", SIZES)
def test_targets_equal_the_rules_read_literally(image_size):
    boxes, labels = pictures(image_size)
    for part, rules in enumerate(RULES):      # each switch sees its share of the pictures
        rows = slice(part, None, len(RULES))
        ours = assign_targets(boxes[rows], labels[rows], image_size, STRIDES, CLASSES, **rules)
        assert_same(ours, boxes[rows], labels[rows], image_size, rules)


def test_the_random_pictures_hold_what_they_promise():
    "Equal areas, touching points, empty pictures, lost boxes, contested and ignored locations do occur."
    boxes, labels = pictures(64)
    person = labels >= 0
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    assert sum(len(set(a[p])) < p.sum() for a, p in zip(areas, person)) > 100
    assert (boxes[person][:, 0] % 4 == 2).sum() > 30            # a side on the centre of a cell of P2
    assert (~(labels != -1).any(1)).sum() > 10
    assert (areas[person] <= 0).sum() > 20 and (areas[person] == 4096).sum() > 0
    lost = unassigned_boxes(boxes, labels, 64, STRIDES)
    assert np.sum(lost["empty"]) > 100 and np.sum(lost["beaten"]) > 30
    targets = assign_targets(boxes, labels, 64, STRIDES, CLASSES, crowd_policy="ignore")
    assert 0 < np.sum(~np.asarray(targets["counted"])) and 0 < np.sum(targets["positive"])


@pytest.mark.parametrize("rules", RULES[::2] + RULES[-1:], ids=str)
def test_lost_boxes_equal_the_rules_read_literally(rules):
    boxes, labels = (part[:30] for part in pictures(64, seed=1))
    rules = {name: value for name, value in rules.items() if name != "crowd_policy"}
    ours = unassigned_boxes(boxes, labels, 64, STRIDES, **rules)
    people = {"empty": 0, "beaten": 0}
    for row in range(len(boxes)):
        expected, alone = literal(boxes[row], labels[row], 64, **literal_rules({**rules, "crowd_policy": "negative"}))
        for index in range(boxes.shape[1]):
            holds, wins = bool(alone.get(index)), index in expected["box"]
            empty, beaten = labels[row, index] >= 0 and not holds, holds and not wins
            assert (bool(ours["empty"][row, index]), bool(ours["beaten"][row, index])) == (empty, beaten), (row, index)
            people["empty"] += empty
            people["beaten"] += beaten
    assert count_unassigned([{"boxes": boxes, "labels": labels}], 64, STRIDES, **rules) == {"people": int((labels >= 0).sum()), **people}


def test_the_centre_rule_of_the_document_excludes_nothing():
    "Also where width and stride are equal, and the two sides of the inequality as close as they come."
    rng = np.random.default_rng(3)
    for stride in STRIDES:
        width = np.float32(stride) * rng.choice(np.float32([0.01, 0.5, 0.999, 1, 1.001, 2, 37.3]), 3000)
        low = (rng.integers(-64, 512 * 8, 3000) / 8).astype(np.float32)
        for a, w in zip(low, width):
            first = max(0, int((a - stride / 2) // stride))
            for i in range(first, min(512 // stride, first + 4)):
                if a < i * stride + stride / 2 < a + w: assert near(i, a, a + w, stride, None)


def test_more_boxes_than_a_byte_can_number():
    rng = np.random.default_rng(4)
    boxes, labels = random_boxes(rng, 64, 300)
    assert len(boxes) == 300 and (labels >= 0).sum() > 200
    assert_same(assign_targets(boxes[None], labels[None], 64, STRIDES, CLASSES), boxes[None], labels[None], 64, RULES[0])


def test_no_room_for_boxes_is_the_empty_picture():
    padded = assign_targets(np.zeros((2, 5, 4)), np.full((2, 5), -1), 64, STRIDES, CLASSES, crowd_policy="ignore", center_radius=1.5)
    none = assign_targets(np.zeros((2, 0, 4)), np.zeros((2, 0), int), 64, STRIDES, CLASSES, crowd_policy="ignore", center_radius=1.5)
    for name in none: np.testing.assert_array_equal(none[name], padded[name])
    assert not np.any(none["positive"]) and np.all(none["counted"])


def test_the_order_of_the_boxes_matters_to_equals_only():
    rng = np.random.default_rng(5)
    boxes = rng.uniform(0, 64, (1, 12, 2, 2)).astype(np.float32)
    boxes = np.concatenate([boxes.min(2), boxes.max(2)], -1)
    order = rng.permutation(12)
    labels = np.arange(12)[None] % CLASSES
    once, again = (assign_targets(boxes[:, o], labels[:, o], 64, STRIDES, CLASSES) for o in (np.arange(12), order))
    for name in ("cls", "ltrb", "centerness", "positive"): np.testing.assert_array_equal(once[name], again[name])


def test_bad_rules_are_refused_by_name():
    for wrong, words in ((dict(level_rule="size"), "level_rule 'size'"), (dict(crowd_policy="keep"), "crowd_policy 'keep'"),
                         (dict(level_rule="max_distance", assign_nearest_if_empty=True), "assign_nearest_if_empty")):
        with pytest.raises(InputError, match=words):
            assign_targets(np.zeros((1, 1, 4)), np.zeros((1, 1), int), 64, STRIDES, CLASSES, **wrong)


def test_it_compiles_and_compiled_is_the_same():
    "Under tf.function, with and without XLA (in a process of its own, the one backend or the other, see below)."
    tf = pytest.importorskip("tensorflow")
    import keras
    if keras.backend.backend() != "tensorflow": pytest.skip("this process runs on another backend")
    boxes, labels = (part[:16] for part in pictures(128))
    for rules in (RULES[0], dict(level_rule="relative_area", center_radius=1.5, assign_nearest_if_empty=True, crowd_policy="ignore")):
        plain = assign_targets(boxes, labels, 128, STRIDES, CLASSES, **rules)
        for xla in (False, True):
            compiled = tf.function(lambda b, l: assign_targets(b, l, 128, STRIDES, CLASSES, **rules), jit_compile=xla)(boxes, labels)
            for name in plain: np.testing.assert_allclose(compiled[name], plain[name], rtol=1e-6, atol=1e-6, err_msg=name)


# The document's own program, and the other backend

def test_the_loop_of_the_document_gives_the_same():
    pytest.importorskip("tensorflow")
    spec = importlib.util.spec_from_file_location("document_targets", ROOT / "bench" / "document_targets.py")
    document = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(document)
    positives = 0
    for image_size in (64, 512):
        boxes, labels = (part[:6] for part in pictures(image_size, seed=2))
        ours = assign_targets(boxes, labels, image_size, STRIDES, CLASSES)
        for row in range(6):
            real = labels[row] >= 0
            cls, reg, ctr = (np.concatenate([np.asarray(level).reshape(-1, level.shape[-1]) for level in levels])
                             for levels in document.document_targets(boxes[row][real], labels[row][real], image_size, CLASSES))
            positive = np.asarray(ours["positive"])[row]
            np.testing.assert_array_equal(np.asarray(ours["cls"])[row], cls)
            np.testing.assert_array_equal(positive, cls.any(-1))
            np.testing.assert_allclose(np.asarray(ours["ltrb"])[row][positive], reg[positive], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(np.asarray(ours["centerness"])[row], ctr[:, 0], rtol=1e-6, atol=1e-6)
            positives += positive.sum()
    assert positives > 500


JAX = """
import json, sys
import jax, keras, numpy as np
from fcos_lite.detector.targets import assign_targets, unassigned_boxes
assert keras.backend.backend() == "jax"
given = np.load(sys.argv[1])
rules = json.loads(sys.argv[3])
run = lambda boxes, labels, rule: assign_targets(boxes, labels, 128, (4, 8, 16, 32), 3, **rule)
out = {}
for i, rule in enumerate(rules):
    for name, value in jax.jit(lambda b, l: run(b, l, rule))(given["boxes"], given["labels"]).items(): out[f"{i} {name}"] = value
for name, value in unassigned_boxes(given["boxes"], given["labels"], 128, (4, 8, 16, 32)).items(): out[name] = value
for name, value in run(np.zeros((1, 0, 4)), np.zeros((1, 0), int), rules[0]).items(): out[f"none {name}"] = value
np.savez(sys.argv[2], **out)
"""


def test_jax_gives_the_same(tmp_path):
    pytest.importorskip("jax")
    boxes, labels = (part[:24] for part in pictures(128))
    rules = [RULES[0], dict(level_rule="relative_area", center_radius=1.5, assign_nearest_if_empty=True, crowd_policy="ignore"), RULES[-1]]
    np.savez(tmp_path / "in.npz", boxes=boxes, labels=labels)
    subprocess.run([sys.executable, "-c", JAX, tmp_path / "in.npz", tmp_path / "out.npz", json.dumps(rules)], check=True, cwd=ROOT,
                   env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"})
    out = np.load(tmp_path / "out.npz")
    for i, rule in enumerate(rules):
        assert_same({name: out[f"{i} {name}"] for name in ("cls", "ltrb", "centerness", "positive", "counted", "box")}, boxes, labels, 128, rule)
    for name, value in unassigned_boxes(boxes, labels, 128, STRIDES).items(): np.testing.assert_array_equal(out[name], value)
    assert not out["none positive"].any() and out["none counted"].all()
