"""Targets equal a slow, literal reading of the rules, on 1,000 random images and with each switch.

The reading below is written from the rules, location by location and box by box, in NumPy's float32.
It shares no code with the library.
"""
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import keras
import numpy as np
import pytest

from fcos_lite.config import REFERENCE, TargetConfig
from fcos_lite.detector.targets import assign_targets, levels_without_boxes, unassigned_boxes
from fcos_lite.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
STRIDES = (4, 8, 16, 32)
CLASSES = 3
one = np.float32(1)


def config(image_size, **changes):
    return replace(REFERENCE, image_size=image_size, class_names=("a", "b", "c"), **changes)


# The rules, read literally

def level_of(area, image_size, rule):
    "0 for P2 .. 3 for P5, by area."
    scale = (image_size / 512) ** 2 if rule == "relative_area" else 1
    if area <= 4096 * scale: return 0
    if area <= 16384 * scale: return 1
    if area <= 65536 * scale: return 2
    return 3


def near(i, low, high, stride, center_radius):
    "The centre rule along one axis: the reference's in cells, or a radius in strides around the middle."
    middle = (low + high) / np.float32(2)
    if center_radius is None:
        return abs(np.float32(i) - middle / stride) <= max(one, (high - low) / stride)
    point = np.float32(i * stride + stride / 2)
    return abs(point - middle) < center_radius * stride


def cells(low, high, side, stride, center_radius):
    "Along one axis: the cells whose centres are strictly inside and near the middle."
    inside = [i for i in range(side) if low < i * stride + stride / 2 < high]
    return [i for i in inside if near(i, low, high, stride, center_radius)]


def nearest(low, high, side, stride):
    "Along one axis: the cell whose centre is nearest to the middle; of two equally near ones the later."
    middle, best = float((low + high) / np.float32(2)), 0
    for i in range(side):
        if abs(i * stride + stride / 2 - middle) <= abs(best * stride + stride / 2 - middle): best = i
    return best


def candidates(box, image_size, rules):
    "All (level, row, column) that may learn a box, if it is alone."
    left, top, right, bottom = box
    by_distance, cells_of_box = rules.level_rule == "max_distance", []
    level = level_of((right - left) * (bottom - top), image_size, rules.level_rule)
    for level in range(4) if by_distance else [level]:
        stride = STRIDES[level]
        side = image_size // stride
        for row in cells(top, bottom, side, stride, rules.center_radius):
            for column in cells(left, right, side, stride, rules.center_radius):
                x, y = column * stride + stride / 2, row * stride + stride / 2
                distance = max(x - left, y - top, right - x, bottom - y)
                low, high = ((0, 64), (64, 128), (128, 256), (256, np.inf))[level]
                if not by_distance or low < distance <= high: cells_of_box.append((level, row, column))
    if rules.assign_nearest_if_empty and not cells_of_box:
        return [(level, nearest(top, bottom, side, stride), nearest(left, right, side, stride))]
    return cells_of_box


def literal(boxes, labels, image_size, rules):
    "One image's targets, a dict of flat arrays over all locations, and the candidates of each box."
    sides = [image_size // stride for stride in STRIDES]
    starts = np.cumsum([0] + [side * side for side in sides])
    count = starts[-1]
    out = {"cls": np.zeros((count, CLASSES)), "ltrb": np.ones((count, 4)), "centerness": np.zeros(count),
           "positive": np.zeros(count, bool), "valid": np.ones(count, bool), "box": np.full(count, -1)}
    smallest = np.full(count, np.inf)
    alone = {}
    for index, (box, label) in enumerate(zip(boxes, labels)):
        left, top, right, bottom = box
        if label < 0 or right <= left or bottom <= top: continue
        area = (right - left) * (bottom - top)
        alone[index] = candidates(box, image_size, rules)
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
    if rules.crowd_policy == "ignore":
        for (left, top, right, bottom), label in zip(boxes, labels):
            if label >= -1: continue
            for level, stride in enumerate(STRIDES):
                for row in range(sides[level]):
                    for column in range(sides[level]):
                        place = starts[level] + row * sides[level] + column
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        inside = left < x < right and top < y < bottom
                        if inside and not out["positive"][place]: out["valid"][place] = False
    return out, alone


# Random images

def random_boxes(rng, image_size, count=8):
    "Boxes (count, 4) and labels (count,) of one image: of all kinds, or none at all."
    if rng.random() < 0.05: return np.zeros((count, 4), np.float32), np.full(count, -1, np.int32)
    boxes = []
    while len(boxes) < count:
        kind = rng.integers(9)
        wide, high = image_size * np.exp(rng.uniform(-4, 0.2, 2))
        if kind == 0: wide, high = rng.uniform(0.1, 6, 2) # tiny
        if kind == 1: wide, high = image_size * rng.uniform(0.9, 2, 2) # huge
        if kind == 2: wide, high = rng.choice([4, 8, 16, 32, 64, 128, 256], 2) # on the limits of levels
        x, y = rng.uniform(-0.2, 1.1, 2) * image_size - (wide / 2, high / 2)
        if kind == 3: x, y = rng.choice([-2, 1.5], 2) * image_size # out of the frame
        box = np.array([x, y, x + wide, y + high])
        l, t, r, b = boxes[-1] if boxes else box
        if kind == 4: # nested
            u, v = np.sort(rng.uniform(0, 1, (2, 2)), axis=1)
            box = np.array([l + (r - l) * u[0], t + (b - t) * v[0], l + (r - l) * u[1], t + (b - t) * v[1]])
        if kind == 5: box = np.array([r, t, r + wide, b]) # touching
        if kind == 6 and boxes: box = boxes[rng.integers(len(boxes))] # the same again
        if kind == 7 and rng.random() < 0.3: box = np.array([x, y, x, y + high]) # without area
        boxes.append(box)
    boxes = np.array(boxes)
    if rng.random() < 0.6: boxes = np.round(boxes * 8) / 8 # on an eighth: equalities do happen
    labels = rng.choice([-4, -2, -1, 0, 1, 2], count, p=[0.03, 0.03, 0.1, 0.5, 0.17, 0.17])
    return boxes.astype(np.float32), labels.astype(np.int32)


RULES = [TargetConfig(level_rule=rule, center_radius=radius, assign_nearest_if_empty=near, crowd_policy=crowd)
         for rule, radius, near, crowd in product(("area", "relative_area", "max_distance"), (None, 1.5),
                                                  (False, True), ("negative", "ignore"))
         if not (near and rule == "max_distance")]
MANY_SWITCHES = TargetConfig(level_rule="relative_area", center_radius=1.5, assign_nearest_if_empty=True,
                             crowd_policy="ignore")
SIZES = {64: 600, 128: 320, 256: 60, 512: 20} # pixels: images, 1,000 in all


def images(image_size, seed=0):
    rng = np.random.default_rng((seed, image_size))
    boxes, labels = zip(*(random_boxes(rng, image_size) for _ in range(SIZES[image_size])))
    return np.array(boxes), np.array(labels)


def assert_same(ours, boxes, labels, image_size, rules):
    "All images of a batch, masks exactly and numbers to 1e-6."
    for row in range(len(boxes)):
        expected, _ = literal(boxes[row], labels[row], image_size, rules)
        for name in ("positive", "valid", "box", "cls"):
            value = np.asarray(ours[name])[row]
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{name}, {rules}, image {row}")
        for name in ("ltrb", "centerness"):
            value = np.asarray(ours[name])[row]
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6,
                                       err_msg=f"{name}, {rules}, image {row}")


# The laws

def test_there_are_a_thousand_images():
    assert sum(SIZES.values()) == 1000 and len(RULES) == 20


@pytest.mark.parametrize("image_size", SIZES)
def test_targets_equal_the_rules_read_literally(image_size):
    boxes, labels = images(image_size)
    for part, rules in enumerate(RULES): # each switch sees a part of the images
        rows = slice(part, None, len(RULES))
        ours = assign_targets(boxes[rows], labels[rows], config(image_size), rules)
        assert_same(ours, boxes[rows], labels[rows], image_size, rules)


def test_the_random_images_hold_what_they_promise():
    "Equal areas, touching points, empty images, unassigned boxes, contested and ignored locations do occur."
    boxes, labels = images(64)
    real = labels >= 0
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    assert sum(len(set(a[p])) < p.sum() for a, p in zip(areas, real)) > 100
    assert (boxes[real][:, 0] % 4 == 2).sum() > 30 # a side on the centre of a cell of P2
    assert (~(labels != -1).any(1)).sum() > 10
    assert (areas[real] <= 0).sum() > 20 and (areas[real] == 4096).sum() > 0
    unassigned = unassigned_boxes(boxes, labels, config(64), TargetConfig())
    assert np.sum(unassigned["no_location"]) > 100 and np.sum(unassigned["outranked"]) > 30
    targets = assign_targets(boxes, labels, config(64), TargetConfig(crowd_policy="ignore"))
    assert 0 < np.sum(~np.asarray(targets["valid"])) and 0 < np.sum(targets["positive"])


@pytest.mark.parametrize("rules", RULES[::2], ids=str)
def test_unassigned_boxes_equal_the_rules_read_literally(rules):
    "Whatever the crowd policy is: RULES[1::2] differ in nothing else."
    boxes, labels = (part[:30] for part in images(64, seed=1))
    ours = unassigned_boxes(boxes, labels, config(64), rules)
    with_crowds = unassigned_boxes(boxes, labels, config(64), replace(rules, crowd_policy="ignore"))
    for name in ours: np.testing.assert_array_equal(ours[name], with_crowds[name])
    for row in range(len(boxes)):
        expected, alone = literal(boxes[row], labels[row], 64, rules)
        for index in range(boxes.shape[1]):
            contains, assigned = bool(alone.get(index)), index in expected["box"]
            no_location, outranked = labels[row, index] >= 0 and not contains, contains and not assigned
            assert bool(ours["no_location"][row, index]) == no_location, (row, index)
            assert bool(ours["outranked"][row, index]) == outranked, (row, index)


def test_the_centre_rule_of_the_reference_excludes_nothing():
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
    ours = assign_targets(boxes[None], labels[None], config(64), RULES[0])
    assert_same(ours, boxes[None], labels[None], 64, RULES[0])


def test_no_room_for_boxes_is_the_empty_image():
    rules = TargetConfig(crowd_policy="ignore", center_radius=1.5)
    padded = assign_targets(np.zeros((2, 5, 4)), np.full((2, 5), -1), config(64), rules)
    without = assign_targets(np.zeros((2, 0, 4)), np.zeros((2, 0), int), config(64), rules)
    for name in without: np.testing.assert_array_equal(without[name], padded[name])
    assert not np.any(without["positive"]) and np.all(without["valid"])


def test_the_order_of_the_boxes_matters_to_equals_only():
    rng = np.random.default_rng(5)
    boxes = rng.uniform(0, 64, (1, 12, 2, 2)).astype(np.float32)
    boxes = np.concatenate([boxes.min(2), boxes.max(2)], -1)
    labels = np.arange(12)[None] % CLASSES
    orders = np.arange(12), rng.permutation(12)
    once, again = (assign_targets(boxes[:, o], labels[:, o], config(64), TargetConfig()) for o in orders)
    for name in ("cls", "ltrb", "centerness", "positive"): np.testing.assert_array_equal(once[name], again[name])


def test_twice_the_image_with_twice_the_strides_is_the_same_task():
    boxes, labels = images(128)
    once = assign_targets(boxes, labels, config(128), TargetConfig())
    larger = TargetConfig(level_areas=tuple(4 * area for area in TargetConfig().level_areas))
    twice = assign_targets(2 * boxes, labels, config(256, strides=(8, 16, 32, 64)), larger)
    for name in once: np.testing.assert_array_equal(once[name], twice[name])


def test_unknown_words_are_refused_where_they_are_given():
    for wrong in (dict(level_rule="size"), dict(crowd_policy="keep"),
                  dict(level_rule="max_distance", assign_nearest_if_empty=True)):
        with pytest.raises(InputError, match=list(wrong)[-1]): TargetConfig(**wrong)


def test_as_many_areas_as_the_levels_need():
    three = config(64, strides=(8, 16, 32))
    for call in (assign_targets, unassigned_boxes):
        with pytest.raises(InputError, match="3 strides need 2 areas"):
            call(np.zeros((1, 1, 4)), np.zeros((1, 1), int), three, TargetConfig())


@pytest.mark.parametrize("rule, areas, empty", [
    ("area", (4096, 16384, 65536), []),
    ("area", (4096, 16384, 512**2), ["P6"]), # more than the image
    ("area", (4096, 16384, 512**2 - 1), []),
    ("area", (16384, 4096, 65536), ["P4"]), # no area is above 16384 and at most 4096
    ("relative_area", (16384, 65536, 262144), ["P6"]), # 4 times the reference's
    ("max_distance", (4096, 16384, 480**2), ["P6"]), # from P6 no side is 480 away: its first location is at 32
    ("max_distance", (4096, 16384, 479**2), [])])
def test_levels_that_no_box_can_reach_are_named(rule, areas, empty):
    c, rules = config(512, strides=(8, 16, 32, 64)), TargetConfig(level_rule=rule, level_areas=areas)
    assert levels_without_boxes(c, rules) == empty
    largest = assign_targets(np.float32([[[0, 0, 512, 512]]]), [[0]], c, rules)
    on_last_level = np.asarray(largest["positive"])[0, -64:]
    assert on_last_level.any() == ("P6" not in empty)


def test_it_compiles_and_compiled_is_the_same():
    "Under tf.function, with and without XLA."
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow": pytest.skip("this process runs on another backend")
    boxes, labels = (part[:16] for part in images(128))
    for rules in (RULES[0], MANY_SWITCHES):
        plain = assign_targets(boxes, labels, config(128), rules)
        for xla in (False, True):
            compiled = tf.function(assign_targets, jit_compile=xla)(boxes, labels, config(128), rules)
            for name in plain:
                np.testing.assert_allclose(compiled[name], plain[name], rtol=1e-6, atol=1e-6, err_msg=name)


# The reference's own program, and the other backend

def test_the_loop_of_the_reference_gives_the_same():
    pytest.importorskip("tensorflow")
    spec = importlib.util.spec_from_file_location("reference_targets", ROOT / "bench" / "reference_targets.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    def flat(levels): return np.concatenate([np.asarray(level).reshape(-1, level.shape[-1]) for level in levels])
    positives = 0
    for image_size in (64, 512):
        boxes, labels = (part[:6] for part in images(image_size, seed=2))
        ours = assign_targets(boxes, labels, config(image_size), TargetConfig())
        for row in range(6):
            real = labels[row] >= 0
            levels = reference.reference_targets(boxes[row][real], labels[row][real], image_size, CLASSES)
            cls, ltrb, centerness = map(flat, levels)
            positive = np.asarray(ours["positive"])[row]
            np.testing.assert_array_equal(np.asarray(ours["cls"])[row], cls)
            np.testing.assert_array_equal(positive, cls.any(-1))
            np.testing.assert_allclose(np.asarray(ours["ltrb"])[row][positive], ltrb[positive], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(np.asarray(ours["centerness"])[row], centerness[:, 0], rtol=1e-6, atol=1e-6)
            positives += positive.sum()
    assert positives > 500


ON_JAX = """
import sys
sys.path.insert(0, "tests/detector")
import jax, keras, numpy as np
from test_targets import MANY_SWITCHES, RULES, TargetConfig, assign_targets, config, images, unassigned_boxes
assert keras.backend.backend() == "jax"
boxes, labels = (part[:24] for part in images(128))
out = {}
for i, rules in enumerate((MANY_SWITCHES, RULES[-1])):
    compiled = jax.jit(lambda b, l: assign_targets(b, l, config(128), rules))
    for name, value in compiled(boxes, labels).items(): out[f"{i} {name}"] = value
out.update(unassigned_boxes(boxes, labels, config(128), TargetConfig()))
without = assign_targets(np.zeros((1, 0, 4)), np.zeros((1, 0), int), config(128), RULES[0])
for name, value in without.items(): out[f"without {name}"] = value
np.savez(sys.argv[1], **out)
"""


def test_jax_gives_the_same(tmp_path):
    pytest.importorskip("jax")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ON_JAX, tmp_path / "out.npz"], check=True, cwd=ROOT, env=environment)
    out = np.load(tmp_path / "out.npz")
    boxes, labels = (part[:24] for part in images(128))
    for i, rules in enumerate((MANY_SWITCHES, RULES[-1])):
        ours = {name.split()[1]: out[name] for name in out if name.startswith(f"{i} ")}
        assert_same(ours, boxes, labels, 128, rules)
    for name, value in unassigned_boxes(boxes, labels, config(128), TargetConfig()).items():
        np.testing.assert_array_equal(out[name], value)
    assert not out["without positive"].any() and out["without valid"].all()
