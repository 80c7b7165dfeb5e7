"""How good is it?"""
import contextlib
import dataclasses
import io
import json
from pathlib import Path
import cv2
import numpy as np
import keras
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from fcos_lite.batches import Batches
from fcos_lite.boxes import pairwise_iou
from fcos_lite.config import COCO_EVALUATION, SOURCE_EVALUATION
from fcos_lite.images import Letterbox
from fcos_lite.model import collect
from fcos_lite.nms import decode, nms
from fcos_lite.visualize import PALETTE, draw_boxes, grid

class Evaluator(keras.Model):
    "One pass over a batch: losses, and detections after NMS with each of several thresholds."
    def __init__(self, model, thresholds):
        super().__init__(dtype="float32")
        self.model, self.thresholds = model, thresholds
    def call(self, batch):
        model, n = self.model, self.model.network
        outputs = model(batch["image"])
        boxes, scores = decode(outputs, n.image_size, n.strides)
        found = [nms(boxes, scores, t.iou, t.score, t.max_per_class, t.candidates) for t in self.thresholds]
        return {"losses": model.losses_of(outputs, batch["boxes"], batch["labels"]), "found": found}

def predict(model, examples, batch_size=8, thresholds=(COCO_EVALUATION, SOURCE_EVALUATION), progress=None):
    "Detections in every example, a list for each of the thresholds, and the mean losses."
    batches = Batches(examples, batch_size, model.network.image_size, pad_value=model.network.pad_value)
    evaluator = Evaluator(model, thresholds)
    found, losses = [[] for _ in thresholds], []
    for i in range(len(batches)):
        results = evaluator.predict_on_batch(batches[i])
        losses.append({k: float(v) for k, v in results["losses"].items()})
        for row, example in enumerate(examples[i * batch_size:(i + 1) * batch_size]):
            fit = Letterbox.fit(example.width, example.height, model.network.image_size)
            for which, result in enumerate(results["found"]):
                found[which].append(collect(result, row, model.network.class_names, fit))
        if progress: progress(i + 1, len(batches))
    return found, {k: float(np.mean([l[k] for l in losses])) for k in losses[0]}

def ground_truth(examples, class_names):
    "Examples as an in-memory COCO data set."
    annotations = []
    for example in examples:
        for box, label, area in zip(example.boxes, example.labels, example_areas(example)):
            left, top, right, bottom = map(float, box)
            annotations.append({"id": len(annotations) + 1, "image_id": example.image_id, "category_id": max(0, int(label)) + 1, "iscrowd": int(label == -2),
                                "bbox": [left, top, right - left, bottom - top], "area": float(area)})
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": e.image_id, "width": e.width, "height": e.height} for e in examples], "annotations": annotations,
                    "categories": [{"id": i + 1, "name": n} for i, n in enumerate(class_names)]}
    with contextlib.redirect_stdout(io.StringIO()): coco.createIndex()
    return coco

def example_areas(example):
    boxes = example.boxes
    return example.areas if example.areas is not None else (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

def as_coco(examples, detections):
    "Detections as rows (image, x, y, w, h, score, category) of COCO's results."
    rows = [np.column_stack([np.full(len(d), e.image_id), d.xyxy[:, :2], d.xyxy[:, 2:] - d.xyxy[:, :2], d.score, d.label + 1]) for e, d in zip(examples, detections) if len(d)]
    return np.concatenate(rows) if rows else np.zeros((0, 7))

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

def coco_evaluation(examples, detections, class_names):
    truth, rows = ground_truth(examples, class_names), as_coco(examples, detections)
    if not len(rows): return {name: 0.0 for name in METRICS}, None
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate(); evaluation.accumulate(); evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats)}, evaluation.eval

def match(found, boxes, threshold):
    "For each detection of a picture, the best first, the free box of highest IoU if that reaches the threshold, else -1."
    matched = np.full(len(found), -1)
    if not len(boxes) or not len(found): return matched
    overlaps = np.array(pairwise_iou(found, boxes))
    for i in range(len(found)):
        best = int(overlaps[i].argmax())
        if overlaps[i, best] >= threshold and overlaps[i, best] > -1:
            matched[i] = best
            overlaps[:, best] = -2
    return matched

def source_map75(examples, detections, threshold=0.75):
    "The source's mean of per-picture APs; not COCO's AP75."
    values = []
    for example, found in zip(examples, detections):
        boxes = example.boxes[example.labels >= 0]
        if not len(boxes) or not len(found): values.append(0.0); continue
        order = np.argsort(-found.score, kind="stable")
        hits = np.cumsum(match(found.xyxy[order], boxes, threshold) >= 0)
        precision = np.concatenate([[1.0], hits / np.arange(1, len(hits) + 1)])
        recall = np.concatenate([[0.0], hits / len(boxes)])
        values.append(float(np.trapezoid(precision, recall)))
    return float(np.mean(values))


RECALLS = np.linspace(0, 1, 101)

def precision_recall(results, class_names, iou=0.5):
    "COCO's precision at 101 recalls, the scores there, and the score threshold of the highest F1, class by class."
    row = int(round((iou - 0.5) / 0.05))
    curves = {}
    for k, name in enumerate(class_names):
        precision, scores = results["precision"][row, :, k, 0, 2], results["scores"][row, :, k, 0, 2]
        f1 = 2 * precision * RECALLS / np.maximum(precision + RECALLS, 1e-9)
        best = int(f1.argmax())
        curves[name] = {"precision": precision, "scores": scores, "f1": float(f1[best]), "threshold": float(scores[best]),
                        "AP": float(np.mean(results["precision"][:, :, k, 0, 2])), "AP50": float(np.mean(results["precision"][0, :, k, 0, 2]))}
    return curves

def plot_precision_recall(curves, path):
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for color, (name, curve) in zip(PALETTE, curves.items()):
        axes.plot(RECALLS, curve["precision"], color=color, label=f"{name}, AP50 {curve['AP50']:.3f}")
        at = np.abs(curve["scores"] - curve["threshold"]).argmin()
        axes.plot(RECALLS[at], curve["precision"][at], "o", color=color, label=f"best F1 {curve['f1']:.2f} at score {curve['threshold']:.2f}")
    axes.set(xlabel="recall at IoU 0.5", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)

def worst(examples, detections, score, count=12):
    "The largest people that were missed and the surest false alarms: (example, box, what) each."
    misses, alarms = [], []
    for example, found in zip(examples, detections):
        found = found.above(score)
        real = example.labels >= 0
        matched = match(found.xyxy, example.boxes[real], 0.5)
        areas = example_areas(example)[real]
        for i in sorted(set(range(int(real.sum()))) - set(matched.tolist())):
            misses.append((areas[i], example, example.boxes[real][i], "missed"))
        crowd = example.boxes[~real]
        for i in np.flatnonzero(matched < 0):
            if len(crowd) and float(np.max(np.array(pairwise_iou(found.xyxy[i:i + 1], crowd)))) > 0.3: continue
            alarms.append((found.score[i], example, found.xyxy[i], f"false {found.score[i]:.2f}"))
    first = lambda rows: [row[1:] for row in sorted(rows, key=lambda row: -row[0])[:count]]
    return first(misses), first(alarms)

def worst_page(examples, detections, score, path, count=12, side=192):
    "A page of the worst misses and false alarms, each cut out with some of what is around it."
    misses, alarms = worst(examples, detections, score, count)
    tiles = []
    for rows in (misses, alarms):
        for example, box, text in rows:
            fit = Letterbox.fit(example.width, example.height, side)
            tiles.append(draw_boxes(fit.apply(example.read()), fit.boxes_in(box[None]), [3 if text == "missed" else 1], [text]))
        tiles += [np.full((side, side, 3), 255, np.uint8)] * (count - len(rows))
    cv2.imwrite(str(path), grid(tiles, columns=6)[..., ::-1])

def evaluate(model, examples, out=None, pictures=8, progress=None):
    "Everything that is reported of a model on a set of examples; with `out`, written there with its pictures."
    (found, found_source), losses = predict(model, examples, progress=progress)
    names = model.network.class_names
    metrics, results = coco_evaluation(examples, found, names)
    report = metrics | {"source_map75": source_map75(examples, found_source), "images": len(examples),
                        "boxes": int(sum((e.labels >= 0).sum() for e in examples)), "losses": losses}
    if results is not None:
        curves = precision_recall(results, names)
        report["classes"] = {n: {k: c[k] for k in ("AP", "AP50", "f1", "threshold")} for n, c in curves.items()}
        report["threshold"] = float(np.mean([c["threshold"] for c in curves.values()]))
    if out is not None: write_evaluation(Path(out), report, curves if results is not None else None, examples, found, pictures)
    return report

def write_evaluation(out, report, curves, examples, found, pictures):
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if curves is None: return
    plot_precision_recall(curves, out / "precision_recall.png")
    worst_page(examples, found, report["threshold"], out / "worst.png")
    for i in np.linspace(0, len(examples) - 1, min(pictures, len(examples))).astype(int):
        shown = dataclasses.replace(found[i], image=examples[i].read()).above(report["threshold"])
        cv2.imwrite(str(out / "pictures" / f"{examples[i].image_id:012d}.jpg"), shown.draw()[..., ::-1])
