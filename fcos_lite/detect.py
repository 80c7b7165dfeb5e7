"""Pictures and folders to boxes."""
import argparse
import json
from pathlib import Path
import cv2
import numpy as np
from fcos_lite.config import SOURCE_CAMERA, InputError, Thresholds, add_flags, check, run_command, with_flags
from fcos_lite.model import FCOS

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

def find_pictures(paths):
    "The pictures that paths name: files, and the pictures straight inside folders, by name."
    files = []
    for path in map(Path, paths):
        check(path.exists(), f"{path}: no such file or folder")
        inside = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        check(inside, f"{path}: no picture in this folder (looked for {', '.join(SUFFIXES)})")
        files += inside
    return files

def detect_files(model, files, thresholds=SOURCE_CAMERA, say=print):
    "Detections in each file that can be read, by path; what cannot is said and left out."
    found = {}
    for file in files:
        try: found[file] = model.detect(file, thresholds)
        except InputError as error: say(f"skipped: {error}"); continue
        say(f"{file}: {len(found[file])} found")
    return found

def as_rows(found):
    "Detections as plain values for JSON: pixels of each picture."
    return {str(file): [{"class": d.class_names[label], "score": round(float(score), 4), "xyxy": [round(float(v), 1) for v in box]}
                        for box, score, label in zip(d.xyxy, d.score, d.label)] for file, d in found.items()}

def write_found(found, out):
    "The pictures with their boxes, and `detections.json`."
    out.mkdir(parents=True, exist_ok=True)
    for file, detections in found.items():
        cv2.imwrite(str(out / f"{file.stem}.jpg"), detections.draw()[..., ::-1])
    (out / "detections.json").write_text(json.dumps(as_rows(found), indent=1) + "\n", encoding="utf-8")

def parser():
    p = argparse.ArgumentParser("python -m fcos_lite.detect", description="Find people in pictures.")
    p.add_argument("pictures", nargs="+", help="picture files, or folders of them")
    p.add_argument("--weights", required=True, metavar="PATH", help="the folder of a run, or a .weights.h5 file with its config.json beside it")
    p.add_argument("--out", default="detected", metavar="DIR", help="where drawn pictures and detections.json go (default: %(default)s)")
    p.add_argument("--force", action="store_true", help="write into --out though it exists")
    add_flags(p, Thresholds)
    return p

def main(argv=None):
    arguments = parser().parse_args(argv)
    out = Path(arguments.out)
    check(arguments.force or not out.exists(), f"--out {out}: exists already; choose another name, or add --force to write into it")
    files = find_pictures(arguments.pictures)
    found = detect_files(FCOS.from_preset(arguments.weights), files, with_flags(SOURCE_CAMERA, arguments))
    check(found, "none of the pictures could be read")
    write_found(found, out)
    print(f"{sum(map(len, found.values()))} found in {len(found)} pictures; drawn in {out}")

if __name__ == "__main__": run_command(main)
