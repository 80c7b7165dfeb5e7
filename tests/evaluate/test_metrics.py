"""Metrics against second opinions: the reference's mAP written out, COCO's program on files, F1 by brute force."""
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos_lite.data.detections import Detections
from fcos_lite.data.example import Example
from fcos_lite.data.letterbox import Letterbox
from fcos_lite.evaluate.metrics import best_f1_threshold, coco_evaluation, outcomes, ranked_matches, source_map75
from fcos_lite.scenes.scenes import Scenes, World

def random_boxes(rng, count, low=5, high=80):
    corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(low, high, (count, 2))
    return np.concatenate([corner, corner + size], 1).astype(np.float32)

def random_labels(rng, count, classes):
    return rng.integers(0, classes, count) if classes > 1 else np.zeros(count, int)

def random_set(seed, images=6, classes=1):
    "Images with people, crowds and neither; detections near people and far from them, none in some."
    rng, examples, detections = np.random.default_rng(seed), [], []
    for i in range(images):
        boxes = random_boxes(rng, rng.integers(0, 6))
        labels = random_labels(rng, len(boxes), classes)
        labels = np.where(rng.random(len(boxes)) < 0.1, -2 - labels, labels).astype(np.int32)
        near = boxes[rng.random(len(boxes)) < 0.8] if len(boxes) else boxes
        near = np.repeat(near, rng.integers(1, 3, len(near)), axis=0)
        near = near + rng.normal(0, 3, near.shape).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        xyxy = np.concatenate([near, random_boxes(rng, rng.integers(0, 3))])
        if rng.random() < 0.15: xyxy = xyxy[:0]
        score = rng.permutation(len(xyxy)) / 20 + rng.integers(1, 4) / 97     # no two equal in an image
        label = random_labels(rng, len(xyxy), classes)
        examples.append(Example(i, None, boxes, labels, 160, 160))
        detections.append(Detections(np.float32(xyxy), np.float32(score), np.int32(label)))
    return examples, detections

def area(box): return (float(box[2]) - float(box[0])) * (float(box[3]) - float(box[1]))

def intersection(a, b):
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    return max(width, 0) * max(height, 0)

def literal_iou(a, b): return intersection(a, b) / (area(a) + area(b) - intersection(a, b))

def literal_reference_ap(example, found):
    people = [box for box, label in zip(example.boxes, example.labels) if label >= 0]
    if not people or not len(found): return 0.0
    precisions, recalls, taken, right = [1.0], [0.0], set(), 0
    for seen, i in enumerate(sorted(range(len(found)), key=lambda i: -found.score[i]), start=1):
        best, best_iou = None, 0.75
        for g, box in enumerate(people):
            iou = literal_iou(found.xyxy[i], box)
            if g not in taken and iou >= best_iou: best, best_iou = g, iou
        if best is not None:
            taken.add(best)
            right += 1
        precisions.append(right / seen)
        recalls.append(right / len(people))
    return sum((recalls[k] - recalls[k - 1]) * (precisions[k] + precisions[k - 1]) / 2 for k in range(1, len(recalls)))

def test_source_map75_is_what_the_reference_describes():
    values = []
    for seed in range(150):
        examples, detections = random_set(seed)
        values.append(source_map75(examples, detections))
        literal = np.mean([literal_reference_ap(*pair) for pair in zip(examples, detections)])
        assert values[-1] == pytest.approx(literal, abs=1e-9), seed
    assert min(values) < 0.1 and max(values) > 0.4     # the sets are neither all empty nor all perfect

def test_source_map75_and_coco_differ_in_both_directions():
    above = below = 0
    for seed in range(40):
        examples, detections = random_set(seed)
        coco = coco_evaluation(examples, detections, ["person"])[0]["AP75"]
        source = source_map75(examples, detections)
        above, below = above + (source > coco + 0.02), below + (source < coco - 0.02)
    assert above > 3 and below > 3

def count_matches(example, detections, threshold, iou): # true positives, false positives; crowds as COCO has them
    people = [box for box, label in zip(example.boxes, example.labels) if label == 0]
    crowds = [box for box, label in zip(example.boxes, example.labels) if label == -2]
    taken, false = set(), 0
    for i in np.argsort(-detections.score, kind="stable"):
        if not detections.score[i] > threshold: continue
        box = detections.xyxy[i]
        free = [(literal_iou(box, person), g) for g, person in enumerate(people) if g not in taken]
        if free and max(free)[0] >= iou: taken.add(max(free)[1])
        else: false += not any(intersection(box, crowd) / area(box) >= iou for crowd in crowds)
    return len(taken), false

def brute_force_f1(examples, detections, iou=0.5):
    "The best F1 of any threshold, each matched anew, in loops."
    people, best = sum(int((example.labels == 0).sum()) for example in examples), 0.0
    for threshold in [-1.0, *sorted({float(score) for found in detections for score in found.score})]:
        counts = [count_matches(*pair, threshold, iou) for pair in zip(examples, detections)]
        true, false = np.sum(counts, axis=0)
        if true: best = max(best, 2 * true / (true + false + people))
    return best

def test_the_best_threshold_is_the_best():
    for seed in range(25):
        examples, detections = random_set(seed)
        score, right, people = ranked_matches(coco_evaluation(examples, detections, ["person"])[1], 0)
        threshold, f1 = best_f1_threshold(score, right, people)
        assert f1 == pytest.approx(brute_force_f1(examples, detections)), seed
        if f1:
            kept = score > threshold
            assert 2 * right[kept].sum() / (kept.sum() + people) == pytest.approx(f1), seed

def coco_json(examples, names):
    "A COCO file of examples, written without the library."
    annotations = []
    for example in examples:
        for (left, top, right, bottom), label in zip(example.boxes.tolist(), example.labels.tolist()):
            annotations.append({
                "id": len(annotations) + 1, "image_id": example.image_id, "iscrowd": int(label < 0),
                "category_id": (-2 - label if label < 0 else label) + 1,
                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)})
    images = [{"id": e.image_id, "file_name": f"{e.image_id}.png", "width": e.width, "height": e.height}
              for e in examples]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}

@pytest.mark.parametrize("names", [("person",), ("person", "dog", "ball")])
def test_metrics_equal_those_of_files_given_to_pycocotools(tmp_path, names):
    for seed in range(8):
        examples, detections = random_set(seed, images=12, classes=len(names))
        (tmp_path / "truth.json").write_text(json.dumps(coco_json(examples, names)))
        results = [{"image_id": e.image_id, "category_id": int(k) + 1, "score": float(s),
                    "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
                   for e, d in zip(examples, detections) for box, s, k in zip(d.xyxy.tolist(), d.score, d.label)]
        (tmp_path / "found.json").write_text(json.dumps(results))
        truth = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ours = list(coco_evaluation(examples, detections, names)[0].values())
        np.testing.assert_allclose(ours, evaluation.stats, atol=1e-12)

def test_a_crowd_excuses_its_own_class_alone():
    example = Example(1, None, np.float32([[10, 10, 40, 60], [50, 10, 150, 110]]), np.int32([1, -2]), 160, 160)
    xyxy, names = np.float32([[10, 10, 40, 60], [60, 30, 90, 90]]), ("person", "dog")
    person, dog = ([Detections(xyxy, np.float32([0.5, 0.9]), np.int32([1, label]))] for label in (0, 1))
    assert coco_evaluation([example], person, names)[0]["AP"] == pytest.approx(1)     # in a crowd of people: neither
    assert coco_evaluation([example], dog, names)[0]["AP50"] == pytest.approx(0.5)    # a dog there is a false positive
    assert [outcome.kind for outcome in outcomes([example], person, 0.1)] == ["true positive"]
    assert [outcome.kind for outcome in outcomes([example], dog, 0.1)] == ["true positive", "false positive"]

def test_outcomes_tell_score_area_and_crowding():
    boxes, areas = np.float32([[0, 0, 10, 10], [5, 0, 15, 10], [50, 50, 60, 60]]), np.float32([70, 80, 90])
    example = Example(1, None, boxes, np.zeros(3, np.int32), 100, 100, areas)
    found = Detections(np.float32([[0, 0, 10, 10], [80, 80, 90, 90]]), np.float32([0.9, 0.6]), np.zeros(2, np.int32))
    first, second, third, false = outcomes([example], [found], 0.5)
    assert [outcome.kind for outcome in (first, second, third)] == ["true positive"] + 2 * ["false negative"]
    assert (first.score, first.area, first.crowding) == (pytest.approx(0.9), 70, pytest.approx(1 / 3))
    assert (third.score, third.area, third.crowding) == (0, 90, 0)
    assert (false.kind, false.score, false.box.tolist()) == ("false positive", pytest.approx(0.6), [80, 80, 90, 90])

def with_crowd(example):
    boxes = np.concatenate([example.boxes, [[10, 10, 60, 60]]]).astype(np.float32)
    return replace(example, boxes=boxes, labels=np.append(example.labels, -2).astype(np.int32), areas=None)

@pytest.mark.parametrize("names", [("person",), ("person", "dog", "ball")])
@pytest.mark.parametrize("size", [64, 96, 512])
def test_ground_truth_as_prediction_is_perfect_through_any_letterbox(names, size):
    scenes = list(Scenes(30, seed=5, world=World(size=160, class_names=names)))
    scenes = [scene if i % 3 else with_crowd(scene) for i, scene in enumerate(scenes)]
    detections = []
    for scene in scenes:
        letterbox, real = Letterbox.fit(scene.width, scene.height, size), scene.labels >= 0
        xyxy = letterbox.boxes_out(letterbox.boxes_in(scene.boxes[real]))
        detections.append(Detections(xyxy, np.full(real.sum(), 0.5, np.float32), scene.labels[real]))
    assert coco_evaluation(scenes, detections, names)[0]["AP"] == 1.0
    not_empty = np.mean([(scene.labels >= 0).any() for scene in scenes])
    assert source_map75(scenes, detections) == pytest.approx(not_empty)

def test_image_ids_need_not_differ():
    examples, detections = random_set(5, images=20)
    same = [replace(example, image_id=1) for example in examples]
    first, second = (coco_evaluation(e, detections, ["person"])[0] for e in (examples, same))
    assert first == second and first["AP"] > 0
