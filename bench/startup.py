"""Reading and checking a COCO folder: seconds of the processor and peak memory, in a fresh process for each size. Prints rows.

The annotations have 7 boxes an image. The images are hard links to a few JPEG files of one pixel: their size, orientation and
last bytes are read as those of photographs are, only that the disk brings less.

python bench/startup.py            (writes its rows into results.json)
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOXES, SIDE = 7, 640
MARK = {"seconds": 60, "gigabytes": 1.5}   # at all 118,287 images of train2017
LINKS = 30_000                             # of one file; file systems allow about twice as many

def write_folder(folder, images):
    "Write a COCO folder with so many images."
    from PIL import Image
    rng = random.Random(0)
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(0, images, LINKS): Image.new("RGB", (1, 1)).save(folder / f"{number}.jpg")
    for number in range(images):
        os.link(folder / f"{number // LINKS * LINKS}.jpg", folder / f"train2017/{number:012d}.jpg")
    annotations = []
    for number in range(images * BOXES):
        x, y, w, h = (round(rng.uniform(1, SIDE / 2), 2) for _ in range(4))
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append({"segmentation": outline, "area": round(w * h, 4), "iscrowd": 0, "image_id": number // BOXES,
                            "bbox": [x, y, w, h], "category_id": 1 + number % 80, "id": number})
    document = {"images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": SIDE, "height": SIDE} for i in range(images)],
                "annotations": annotations, "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)]}
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(document))

def measure(folder):
    "Read a folder as a run does, and print what it took, as JSON."
    sys.path.insert(0, str(HERE.parent))
    from fcos_lite.data.datasets import read_datasets
    imported, began = time.process_time(), time.perf_counter()
    examples = read_datasets([folder], "train2017")
    row = {"images": len(examples), "boxes": examples.report.boxes, "seconds": round(time.process_time() - imported, 2),
           "wall_seconds": round(time.perf_counter() - began, 2), "import_seconds": round(imported, 2),
           "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)}
    print(json.dumps(row))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 40_000, 118_287])
    parser.add_argument("--rehearse", action="store_true", help="100 images, and nothing is written")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder: return measure(options.folder)
    rows = {}
    print("| images | boxes | processor, s | a 1,000 images, s | memory, GB |\n|---|---|---|---|---|")
    for images in [100] if options.rehearse else options.images:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), images)
            command = [sys.executable, __file__, "--folder", folder]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows[str(images)] = row
        each = 1000 * row["seconds"] / images
        print(f"| {images:,} | {row['boxes']:,} | {row['seconds']:.1f} | {each:.2f} | {row['gigabytes']:.2f} |", flush=True)
    if options.rehearse: return
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["startup"] = {"boxes_per_image": BOXES, "mark": MARK, "rows": rows}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
