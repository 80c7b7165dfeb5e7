"""What smaller numbers cost a detector on photographs: AP of every exported format, run by its own runtime, beside Keras'. Prints a table in Markdown; with --keep, it goes into results.json.

python bench/precision.py --coco DIR --limit 400
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
from fcos_lite.evaluate.evaluator import predict
from fcos_lite.export.__main__ import export, load_at, representative, shrink
from fcos_lite.export.runtime import FORMATS
from fcos_lite.evaluate.metrics import coco_evaluation
from fcos_lite.detector.nms import Detections
from fcos_lite.data.datasets import read_dataset

RESULTS = Path(__file__).resolve().with_name("results.json")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

def found_by(exported, examples, class_names):
    "What an exported detector finds in photographs, in their own pixels."
    tables = [exported.detect(example.read()) for example in examples]
    return [Detections(t["xyxy"], t["score"], t["label"], class_names) for t in tables]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, metavar="DIR", help="photographs in the layout of COCO, YOLO or Pascal VOC")
    parser.add_argument("--part", default="val2017", metavar="NAME", help="measured on (default: %(default)s)")
    parser.add_argument("--learn", default="train2017", metavar="NAME", help="folder in it whose pictures show int8 its ranges (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures")
    parser.add_argument("--representative", type=int, default=64, metavar="N", help="pictures for int8 (default: %(default)s)")
    parser.add_argument("--weights", default="person", metavar="NAME|PATH")
    parser.add_argument("--keep", action="store_true", help="put the figures into results.json, which run.py makes its tables of")
    a = parser.parse_args()
    model, weights = load_at(a.weights)
    names, size = model.config.class_names, model.config.image_size
    examples = read_dataset(a.coco, a.part, names, a.limit)
    squares = representative([str(Path(a.coco) / a.learn)], model.config, a.representative)
    print(f"{len(examples)} photographs, {sum((e.labels >= 0).sum() for e in examples)} people, squares of {size}; int8 saw {len(squares)} others\n\n| run as | MB | {' | '.join(NAMES)} |\n|---|---|{'---|' * len(NAMES)}")
    rows = {}
    def row(name, found, megabytes=""):
        figures = coco_evaluation(examples, found, names)[0]
        rows[name] = {key: round(figures[key], 4) for key in NAMES}
        print(f"| {name} | {megabytes} | {' | '.join(f'{figures[key]:.4f}' for key in NAMES)} |", flush=True)
    (found,), _ = predict(model, examples, thresholds=(COCO_NMS,))
    row("Keras float32", found)
    with tempfile.TemporaryDirectory() as folder:
        for format, kinds in FORMATS.items():
            for precision in kinds:
                here = Path(folder) / f"{format}-{precision}"
                with contextlib.redirect_stdout(sys.stderr):
                    exported = export(model, here, format, thresholds=COCO_NMS, weights=weights)[0] if precision == "float32" else shrink(Path(folder) / f"{format}-float32", here, precision, squares)
                row(f"{format} {precision}", found_by(exported, examples, names), f"{sum(file.stat().st_size for file in here.rglob('*') if file.is_file()) / 1e6:.1f}")
    if not a.keep: return
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, "precision": {"photographs": len(examples), "image_size": size, "weights": a.weights, "representative": len(squares), "rows": rows}}, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
