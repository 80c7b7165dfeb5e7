"""What JPEG costs a detector: the shipped one, measured on images that went through records of PNG and of JPEG.

Prints a table in Markdown.

python bench/jpeg.py --data DIR --limit 200
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from fcos_lite.config import COCO_NMS
from fcos_lite.data.datasets import read_dataset
from fcos_lite.data.tfrecord import RecordConfig, Records, write_records
from fcos_lite.detector.model import FCOS
from fcos_lite.evaluate.evaluator import predict
from fcos_lite.evaluate.metrics import coco_evaluation

KINDS = {"PNG": {"format": "png"}, **{f"JPEG {quality}": {"quality": quality} for quality in (95, 90, 75, 50, 20)}}
METRICS = ("AP", "AP50", "AP75", "APs")

def measure(model, examples, config): # kB a record, ms of the processor to decode one, metrics, validation loss
    "Write examples as records and evaluate on what comes back."
    with tempfile.TemporaryDirectory() as folder:
        write_records(examples, "val2017", folder, config)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.tfrecord"))
        records = Records(folder, "val2017").in_original_pixels()
        started = time.process_time()
        for example in records: example.read()
        milliseconds = 1e3 * (time.process_time() - started) / len(records)
        (detections,), losses = predict(model, records, nms=(COCO_NMS,))
        metrics = coco_evaluation(records, detections, model.config.class_names)[0]
    return [size / len(records) / 1e3, milliseconds, *(metrics[name] for name in METRICS), losses["loss"]]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="images in the layout of COCO, YOLO or Pascal VOC")
    parser.add_argument("--split", default="val2017", metavar="NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images")
    parser.add_argument("--weights", default="person", metavar="NAME|PATH")
    options = parser.parse_args()
    model = FCOS.from_preset(options.weights)
    examples = read_dataset(options.data, options.split, model.config.class_names, options.limit)
    print(f"{len(examples)} images, {examples.report.boxes} boxes, squares of {model.config.image_size} pixels\n")
    print("| stored as | kB | ms to decode | AP | AP50 | AP75 | APs | loss |\n|---|---|---|---|---|---|---|---|")
    for name, fields in KINDS.items():
        config = RecordConfig(image_size=model.config.image_size, **fields)
        size, milliseconds, *metrics = measure(model, examples, config)
        cells = " | ".join(f"{value:.4f}" for value in metrics)
        print(f"| {name} | {size:.1f} | {milliseconds:.2f} | {cells} |", flush=True)

if __name__ == "__main__": main()
