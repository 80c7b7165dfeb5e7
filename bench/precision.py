"""What smaller numbers cost a detector on photographs: AP of every exported format, run by its own runtime.

Beside Keras'. Prints a table in Markdown; with --keep, it goes into results.json.

python bench/precision.py --data DIR --limit 400
"""
import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from fcos_lite.config import COCO_NMS
from fcos_lite.data.datasets import read_dataset
from fcos_lite.detector.model import load_detector
from fcos_lite.detector.weights import find_weights
from fcos_lite.evaluate.evaluator import predict
from fcos_lite.evaluate.metrics import coco_evaluation
from fcos_lite.export.__main__ import calibration_batch
from fcos_lite.export.runtime import FORMATS
from fcos_lite.export.writer import export_detector, reduce_precision

RESULTS = Path(__file__).resolve().with_name("results.json")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="photographs in the layout of COCO, YOLO or Pascal VOC")
    add("--split", default="val2017", metavar="NAME", help="measured on (default: %(default)s)")
    add("--calibration-split", default="train2017", metavar="NAME",
        help="folder in it whose images set the ranges of int8 (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N images")
    add("--calibration-images", type=int, default=64, metavar="N", help="images for int8 (default: %(default)s)")
    add("--weights", default="person", metavar="NAME|PATH")
    add("--keep", action="store_true", help="put the figures into results.json, which run.py makes its tables of")
    return parser.parse_args(argv)

def size_of(folder): return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

def main():
    a = parse()
    model, weights = load_detector(a.weights), find_weights(a.weights)
    names, size = model.config.class_names, model.config.image_size
    examples = read_dataset(a.data, a.split, names, a.limit)
    calibration = calibration_batch([str(Path(a.data) / a.calibration_split)], model.config, a.calibration_images)
    boxes = sum((example.labels >= 0).sum() for example in examples)
    print(f"{len(examples)} photographs, {boxes} boxes, images of {size}; int8 saw {len(calibration)} others\n\n"
          f"| run as | MB | {' | '.join(NAMES)} |\n|---|---|{'---|' * len(NAMES)}")
    rows = {}
    def row(name, detections, megabytes=""):
        metrics = coco_evaluation(examples, detections, names)[0]
        rows[name] = {key: round(metrics[key], 4) for key in NAMES}
        print(f"| {name} | {megabytes} | {' | '.join(f'{metrics[key]:.4f}' for key in NAMES)} |", flush=True)
    (detections,), _ = predict(model, examples, nms=(COCO_NMS,))
    row("Keras float32", detections)
    with tempfile.TemporaryDirectory() as folder:
        for format, precisions in FORMATS.items():
            exact = Path(folder) / f"{format}-float32"
            for precision in precisions:
                out = Path(folder) / f"{format}-{precision}"
                with contextlib.redirect_stdout(sys.stderr):
                    if precision == "float32":
                        exported, _ = export_detector(model, out, format=format, nms=COCO_NMS, weights=weights)
                    else:
                        exported = reduce_precision(exact, out, precision, calibration)
                detections = [exported.detect(example.read()) for example in examples]
                row(f"{format} {precision}", detections, f"{size_of(out) / 1e6:.1f}")
    if not a.keep: return
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    kept["precision"] = {"photographs": len(examples), "image_size": size, "weights": a.weights,
                         "representative": len(calibration), "rows": rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
