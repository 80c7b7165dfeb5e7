"""What JPEG costs a detector: the shipped one, measured on photographs that went through records of PNG and of JPEG of several qualities. Prints a table in Markdown.

python bench/jpeg.py --coco DIR --limit 200
"""
import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from fcos_lite.config import COCO_NMS
from fcos_lite.evaluate.evaluator import predict
from fcos_lite.data.coco import read_coco
from fcos_lite.evaluate.metrics import coco_evaluation
from fcos_lite.detector.model import FCOS
from fcos_lite.data.records import RecordConfig, decode_example, encode_example

WAYS = {"PNG": dict(format="png"), **{f"JPEG {quality}": dict(quality=quality) for quality in (95, 90, 75, 50, 20)}}

def measure(model, examples, storage):
    "kB of a record, milliseconds of a processor to decode it, COCO's figures and the validation loss."
    data = [encode_example(example, storage) for example in examples]
    kept = [decode_example(record, "here").photograph() for record in data]
    began = time.process_time()
    for example in kept: example.read()
    milliseconds = 1e3 * (time.process_time() - began) / len(kept)
    (found,), losses = predict(model, kept, thresholds=(COCO_NMS,))
    figures = coco_evaluation(kept, found, model.config.class_names)[0]
    return [sum(map(len, data)) / len(data) / 1e3, milliseconds, *(figures[name] for name in ("AP", "AP50", "AP75", "APs")), losses["loss"]]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, metavar="DIR", help="photographs in COCO's layout")
    parser.add_argument("--part", default="val2017", metavar="NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures")
    parser.add_argument("--weights", default="person", metavar="NAME|PATH")
    a = parser.parse_args()
    model = FCOS.from_preset(a.weights)
    examples = read_coco(a.coco, a.part, model.config.class_names, a.limit)
    print(f"{len(examples)} photographs, {sum((e.labels >= 0).sum() for e in examples)} people, squares of {model.config.image_size}\n\n| kept as | kB | ms to decode | AP | AP50 | AP75 | APs | loss |\n|---|---|---|---|---|---|---|---|")
    for name, how in WAYS.items():
        size, milliseconds, *figures = measure(model, examples, RecordConfig(image_size=model.config.image_size, **how))
        print(f"| {name} | {size:.1f} | {milliseconds:.2f} | " + " | ".join(f"{value:.4f}" for value in figures) + " |", flush=True)

if __name__ == "__main__": main()
