"""Metrics against second opinions: the source's figure written out, COCO from files, F1 by brute force; and the command."""
import json
import subprocess
import sys
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos_lite.config import REFERENCE
from fcos_lite.data.images import Example, Letterbox
from fcos_lite.evaluate.metrics import best_f1_threshold, coco_evaluation, outcomes, perturbed_ground_truth, ranked_matches, source_map75
from fcos_lite.detector.nms import Detections
from fcos_lite.scenes.scenes import Scenes, World

def some(rng, count, low=5, high=80):
    "Random boxes, xyxy."
    corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(low, high, (count, 2))
    return np.concatenate([corner, corner + size], 1).astype(np.float32)

def random_set(seed, pictures=6, classes=1):
    "Pictures with people, crowds and neither; detections near people and far from them, none in some."
    rng, examples, found = np.random.default_rng(seed), [], []
    for i in range(pictures):
        boxes = some(rng, rng.integers(0, 6))
        kinds = rng.integers(0, classes, len(boxes)) if classes > 1 else np.zeros(len(boxes), int)
        labels = np.where(rng.random(len(boxes)) < 0.1, -2 - kinds, kinds).astype(np.int32)
        near = boxes[rng.random(len(boxes)) < 0.8] if len(boxes) else boxes
        near = np.repeat(near, rng.integers(1, 3, len(near)), axis=0)
        near = near + rng.normal(0, 3, near.shape).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        xyxy = np.concatenate([near, some(rng, rng.integers(0, 3))]) if rng.random() > 0.15 else np.zeros((0, 4), np.float32)
        score = rng.permutation(len(xyxy)).astype(np.float32) / 20 + rng.integers(1, 4) / 97     # no two equal in a picture
        examples.append(Example(i, None, boxes, labels, 160, 160))
        found.append(Detections(xyxy.astype(np.float32), score.astype(np.float32), (rng.integers(0, classes, len(xyxy)) if classes > 1 else np.zeros(len(xyxy))).astype(np.int32)))
    return examples, found

def iou_of(a, b):
    "Of two boxes, written out."
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    if width <= 0 or height <= 0: return 0.0
    area = lambda box: (float(box[2]) - float(box[0])) * (float(box[3]) - float(box[1]))
    return width * height / (area(a) + area(b) - width * height)

def literal_source_map75(examples, detections):
    "The source's figure as `READING.md` words it, in loops."
    aps = []
    for example, found in zip(examples, detections):
        people = [box for box, label in zip(example.boxes, example.labels) if label >= 0]
        if not people or not len(found):
            aps.append(0.0)
            continue
        precisions, recalls, taken, right = [1.0], [0.0], set(), 0
        for seen, i in enumerate(sorted(range(len(found)), key=lambda i: -found.score[i]), start=1):
            best, best_iou = None, 0.75
            for g, box in enumerate(people):
                if g not in taken and iou_of(found.xyxy[i], box) >= best_iou: best, best_iou = g, iou_of(found.xyxy[i], box)
            if best is not None:
                taken.add(best)
                right += 1
            precisions.append(right / seen)
            recalls.append(right / len(people))
        aps.append(sum((recalls[k] - recalls[k - 1]) * (precisions[k] + precisions[k - 1]) / 2 for k in range(1, len(recalls))))
    return sum(aps) / len(aps)

def test_source_map75_is_what_the_text_says():
    values = []
    for seed in range(150):
        examples, found = random_set(seed)
        values.append(source_map75(examples, found))
        assert values[-1] == pytest.approx(literal_source_map75(examples, found), abs=1e-9), seed
    assert min(values) < 0.1 and max(values) > 0.4     # the sets are neither all empty nor all perfect

def test_source_map75_and_coco_part_in_both_directions():
    above = below = 0
    for seed in range(40):
        examples, found = random_set(seed)
        coco, source = coco_evaluation(examples, found, ["person"])[0]["AP75"], source_map75(examples, found)
        above, below = above + (source > coco + 0.02), below + (source < coco - 0.02)
    assert above > 3 and below > 3

def brute_force(examples, found, iou=0.5):
    "The best F1 of any threshold, each matched anew, in loops; crowds as COCO has them."
    scores = sorted({float(s) for d in found for s in d.score})
    best = 0.0
    for threshold in [-1.0, *scores]:
        right = wrong = people = 0
        for example, detections in zip(examples, found):
            taken = set()
            persons = [box for box, label in zip(example.boxes, example.labels) if label == 0]
            crowds = [box for box, label in zip(example.boxes, example.labels) if label == -2]
            people += len(persons)
            for i in np.argsort(-detections.score, kind="stable"):
                if not detections.score[i] > threshold: continue
                free = [(iou_of(detections.xyxy[i], box), g) for g, box in enumerate(persons) if g not in taken]
                if free and max(free)[0] >= iou:
                    taken.add(max(free)[1])
                    right += 1
                    continue
                one = detections.xyxy[i].astype(float)
                inside = [max(0, min(one[2], c[2]) - max(one[0], c[0])) * max(0, min(one[3], c[3]) - max(one[1], c[1])) / ((one[2] - one[0]) * (one[3] - one[1])) for c in crowds]
                wrong += not any(share >= iou for share in inside)
        if right: best = max(best, 2 * right / (right + wrong + people))
    return best

def test_the_best_cut_is_the_best():
    for seed in range(25):
        examples, found = random_set(seed)
        score, right, people = ranked_matches(coco_evaluation(examples, found, ["person"])[1], 0)
        threshold, f1 = best_f1_threshold(score, right, people)
        assert f1 == pytest.approx(brute_force(examples, found)), seed
        if f1:
            kept = score > threshold
            assert 2 * right[kept].sum() / (kept.sum() + people) == pytest.approx(f1), seed

def coco_document(examples, names):
    "A COCO file of examples, written without the library."
    annotations = []
    for example in examples:
        for (left, top, right, bottom), label in zip(example.boxes.tolist(), example.labels):
            annotations.append({"id": len(annotations) + 1, "image_id": example.image_id, "category_id": (-2 - int(label) if label < 0 else int(label)) + 1, "iscrowd": int(label < 0),
                                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)})
    return {"images": [{"id": e.image_id, "file_name": f"{e.image_id}.png", "width": e.width, "height": e.height} for e in examples],
            "annotations": annotations, "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)]}

@pytest.mark.parametrize("names", [("person",), ("person", "dog", "ball")])
def test_figures_equal_those_of_files_given_to_pycocotools(tmp_path, names):
    for seed in range(8):
        examples, found = random_set(seed, pictures=12, classes=len(names))
        (tmp_path / "truth.json").write_text(json.dumps(coco_document(examples, names)))
        rows = [{"image_id": e.image_id, "category_id": int(k) + 1, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "score": float(s)}
                for e, d in zip(examples, found) for box, s, k in zip(d.xyxy.tolist(), d.score, d.label)]
        (tmp_path / "found.json").write_text(json.dumps(rows))
        truth = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        np.testing.assert_allclose(list(coco_evaluation(examples, found, names)[0].values()), evaluation.stats, atol=1e-12)

def test_a_crowd_excuses_its_own_class_alone():
    example = Example(1, None, np.float32([[10, 10, 40, 60], [50, 10, 150, 110]]), np.int32([1, -2]), 160, 160)
    inside = lambda k: [Detections(np.float32([[10, 10, 40, 60], [60, 30, 90, 90]]), np.float32([0.5, 0.9]), np.int32([1, k]))]
    assert coco_evaluation([example], inside(0), ("person", "dog"))[0]["AP"] == pytest.approx(1)         # in a crowd of people: neither right nor wrong
    assert coco_evaluation([example], inside(1), ("person", "dog"))[0]["AP50"] == pytest.approx(0.5)     # a dog there is a false alarm
    assert [row.kind for row in outcomes([example], inside(0), 0.1)] == ["found"]
    assert [row.kind for row in outcomes([example], inside(1), 0.1)] == ["found", "false"]

@pytest.mark.parametrize("names", [("person",), ("person", "dog", "ball")])
@pytest.mark.parametrize("size", [64, 96, 512])
def test_truth_as_prediction_is_perfect_through_any_square(names, size):
    scenes = list(Scenes(30, seed=5, world=World(size=160, class_names=names)))
    crowd = lambda e: replace(e, boxes=np.concatenate([e.boxes, [[10, 10, 60, 60]]]).astype(np.float32), labels=np.append(e.labels, -2).astype(np.int32), areas=None)
    scenes = [crowd(e) if i % 3 == 0 else e for i, e in enumerate(scenes)]
    found = []
    for e in scenes:
        fit, real = Letterbox.fit(e.width, e.height, size), e.labels >= 0
        found.append(Detections(fit.boxes_out(fit.boxes_in(e.boxes[real])), np.full(real.sum(), 0.5, np.float32), e.labels[real]))
    assert coco_evaluation(scenes, found, names)[0]["AP"] == 1.0
    assert source_map75(scenes, found) == pytest.approx(np.mean([(e.labels >= 0).any() for e in scenes]))

def test_image_ids_need_not_differ():
    scenes = list(Scenes(20, seed=5, world=World(size=96)))
    found = perturbed_ground_truth(scenes)
    same = [replace(e, image_id=1) for e in scenes]
    assert coco_evaluation(scenes, found, ["person"])[0] == coco_evaluation(same, found, ["person"])[0]

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The folder of a run: an untrained, shallow network."
    from fcos_lite.detector.model import FCOS
    from fcos_lite.detector.weights import save_weights
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    network = replace(REFERENCE, image_size=64, backbone_blocks=(1, 1, 1, 1), tower_depth=1)
    save_weights(FCOS(network), folder / "best.weights.h5")
    (folder / "config.json").write_text(json.dumps({"network": asdict(network)}))
    return folder

@pytest.fixture
def photographs(tmp_path):
    "A folder with val2017 and its annotations alone."
    examples = list(Scenes(5, seed=1, world=World(size=80, min_height=20)))
    folder = tmp_path / "coco"
    (folder / "val2017").mkdir(parents=True), (folder / "annotations").mkdir()
    for e in examples: cv2.imwrite(str(folder / "val2017" / f"{e.image_id}.png"), e.image[..., ::-1])
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_document(examples, ["person"])))
    return folder

def test_the_command_on_photographs(run, photographs, tmp_path, capsys):
    from fcos_lite.evaluate.evaluator import main
    out = tmp_path / "measured"
    arguments = ["--coco", str(photographs), "--weights", str(run), "--out", str(out), "--batch-size", "2", "--pictures", "3"]
    main(arguments)
    report = json.loads((out / "evaluation.json").read_text())
    assert report["images"] == 5 and report["boxes"] > 0
    assert all(report[name] == -1 or 0 <= report[name] <= 1 for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "source_map75"))
    assert sorted(f.name for f in out.iterdir()) == ["evaluation.json", "pictures", "precision_recall.png", "worst.png"]
    assert len(list((out / "pictures").iterdir())) == 3
    assert "AP75" in capsys.readouterr().out
    before = (out / "evaluation.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="add --force"): main(arguments)
    assert (out / "evaluation.json").stat().st_mtime_ns == before
    main([*arguments, "--force"])
    assert (out / "evaluation.json").stat().st_mtime_ns > before
    assert not [f for f in tmp_path.iterdir() if "partial" in f.name]

def test_force_spares_what_is_no_evaluation(run, tmp_path):
    from fcos_lite.evaluate.evaluator import main
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"): main(["--weights", str(run), "--out", str(precious), "--force"])
    with pytest.raises(ValueError, match="holds something else"): main(["--weights", str(run), "--out", str(run), "--force"])
    assert (precious / "thesis.txt").exists() and (run / "best.weights.h5").exists()

def test_a_mistake_is_a_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fcos_lite.evaluate", "--weights", "persn", "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and "persn: no such weights" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("weighting, normalizer", [("none", "targets"), ("centerness", "positives")])   # as the source divides, and as `scratch` does
def test_validation_losses_do_not_depend_on_the_batches(weighting, normalizer):
    "Empty pictures that stand together weigh no more than empty pictures that stand among others; nor does a picture with one person weigh as much as one with many."
    from fcos_lite.config import SCRATCH_RECIPE
    from fcos_lite.evaluate.evaluator import predict
    from fcos_lite.detector.model import FCOS
    model = FCOS(replace(REFERENCE, image_size=64, strides=(16, 32), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16,
                         pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4), SCRATCH_RECIPE.change(level_areas=(1024,), ltrb_weighting=weighting, centerness_normalizer=normalizer, centerness_weight=0.5))
    people = list(Scenes(4, 0, World(size=64, min_height=30, max_height=60, empty_share=0.0)))
    empty = [replace(scene, boxes=scene.boxes[:0], labels=scene.labels[:0], areas=None) for scene in people]
    pictures = [*empty, *people]
    at_once = predict(model, pictures, 8)[1]
    assert at_once["positives"] > 4 and len({float(predict(model, [picture], 1)[1]["reg"]) for picture in people}) > 1
    assert at_once["loss"] == pytest.approx(at_once["cls"] + at_once["reg"] + 0.5 * at_once["ctr"])
    for size in (1, 3, 4):
        found = predict(model, pictures, size)[1]
        assert found.keys() == {"cls", "reg", "ctr", "loss", "positives"}
        for name in found: assert found[name] == pytest.approx(at_once[name], rel=1e-4), (size, name)
