"""What each difference between the recipes `scratch` and `source` is worth: `scratch` with one number at a time as the source has it.

python bench/ablations.py --jobs 2                           drawn scenes
python bench/ablations.py --jobs 2 --crowds                  drawn scenes with crowds in them: what that one switch is worth
python bench/ablations.py --coco DIR --image-size 256        photographs

Every run is `python -m fcos_lite.train` in a process of its own, from random numbers; it is measured on pictures that it has not seen. A run that ablations.json has already is not made again, so that the table may be
interrupted, and grow.
"""
import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
from fcos_lite.config import REFERENCE_RECIPE
from fcos_lite.data.coco import write_coco
from fcos_lite.scenes.scenes import Scenes, World

HERE = Path(__file__).resolve().parent
FILE = HERE / "ablations.json"
DIFFERENCES = { # what a run without it is called: the fields of the recipe that it has from the source; all but `patience` and `monitor`, which only log when to stop
    "the source's rates": ("learning_rate", "min_learning_rate", "warmup_steps"),
    "an update per 8 × 4 pictures": ("batch_size", "accumulate"),
    "a tenth of the weight decay": ("weight_decay",),
    "level areas not scaled": ("level_rule",),
    "no centre sampling": ("center_radius",),
    "crowds as background": ("crowd",),
    "distances not weighted": ("ltrb_weighting",),
    "centerness / sum of targets": ("centerness_normalizer",),
    "no mirror": ("flip",),
    "no zoom": ("zoom",),
}
FIRST_VALUES = {"scale_init": 1.0, "ltrb_bias": 0.0} # of the network: ours, in neither recipe
SCENES = {"min_height": 20, "max_people": 3} # a little easier than the book's, as so few views ask
UNSEEN_SEED = 100 # of the scenes that are measured on; training validates on seeds of its own
SEEDS = (0, 1, 2) # of `scratch` as it is: how much is chance; a seed draws other scenes to learn from, too

def flag(name, value): # words of the command line
    words = value if isinstance(value, tuple) else ("none" if value is None else value,)
    return [f"--{name.replace('_', '-')}", *map(str, words)]

def crowded(example):
    "Every other scene with two people or more: theirs become one crowd region, as COCO marks a throng that nobody counted."
    if len(example.boxes) < 2 or example.image_id % 2: return example
    around = np.concatenate([example.boxes[:, :2].min(axis=0), example.boxes[:, 2:].max(axis=0)])[None]
    return dataclasses.replace(example, boxes=around, labels=np.array([-2], np.int32), areas=None)

def write_crowds(folder, a):
    "A folder in COCO's layout: scenes to learn from, some with crowds; and to measure on, with everyone marked."
    world = World(size=a.image_size, **SCENES)
    write_coco(folder, "train2017", [crowded(example) for example in Scenes(a.scenes, 1, world)], world.class_names)
    write_coco(folder, "val2017", list(Scenes(a.unseen, UNSEEN_SEED, world)), world.class_names)

def plan(photographs, crowds): # [(name, fields that are changed, seed)]
    "All runs of a table; most scenes have no crowds, so there that switch would change nothing."
    if crowds: return [run for seed in SEEDS for run in (("scratch", {}, seed), ("crowds as background", {"crowd": REFERENCE_RECIPE.targets.crowd_policy}, seed))]
    kept = {name: {field: getattr(REFERENCE_RECIPE, field) for field in fields} for name, fields in DIFFERENCES.items() if photographs or fields != ("crowd",)}
    return [*(("scratch", {}, seed) for seed in SEEDS), *((name, fields, SEEDS[0]) for name, fields in kept.items()), ("scratch, other first values", FIRST_VALUES, SEEDS[0])]

def command(module, words, core):
    "One of the library's commands, on a core of its own where there are several at a time."
    keep = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    done = subprocess.run([sys.executable, "-m", f"fcos_lite.{module}", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, preexec_fn=keep)
    if done.returncode: sys.exit(f"python -m fcos_lite.{module} {' '.join(map(str, words))}\n{done.stdout[-3000:]}")

def run(changed, seed, a, folder, core): # a row
    data = ["--coco", a.coco] if a.coco else [word for name, value in SCENES.items() for word in flag(name, value)]
    limit = ["--limit", a.limit] if a.coco and a.limit else []
    recipe = [word for name, value in changed.items() for word in flag(name, value)]
    command("train", [*data, *limit, *([] if a.coco else ["--scenes", a.scenes]), "--image-size", a.image_size, "--epochs", a.epochs, "--seed", seed, "--evaluate-every", 0, "--out", folder / "run", *recipe], core)
    command("evaluate", ["--weights", folder / "run", *data, *(limit if a.coco else ["--limit", a.unseen, "--seed", UNSEEN_SEED]), "--pictures", 1, "--out", folder / "report"], core)
    report = json.loads((folder / "report" / "evaluation.json").read_text(encoding="utf-8"))
    return {name: round(report[name], 4) for name in ("AP", "AP50", "AP75", "source_map75")}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", metavar="DIR", help="photographs in COCO's layout; without it, scenes are drawn")
    parser.add_argument("--crowds", action="store_true", help="draw scenes in which some people are marked as a crowd, and compare the two ways to take them")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 8; with --coco 4")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="to learn from (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=400, metavar="N", help="to measure on (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N photographs of each part")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="begin no run after so many")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on a core of its own (Linux; default: %(default)s, on all)")
    a = parser.parse_args()
    if a.coco and a.crowds: parser.error("--crowds draws its own pictures; leave out --coco, whose photographs have crowds already")
    a.epochs = a.epochs or (4 if a.coco else 8)
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    settings = {"image_size": a.image_size, "epochs": a.epochs, **({"photographs": a.limit or "all"} if a.coco else {"scenes": a.scenes, "unseen": a.unseen, **SCENES})}
    table = kept.setdefault(f"{'photographs' if a.coco else 'scenes with crowds' if a.crowds else 'scenes'}, {a.image_size}²", {"settings": settings, "rows": []})
    if table["settings"] != settings: sys.exit(f"{FILE} has this table with other settings, {table['settings']}; take those, or remove it")
    begun, lock, cores, failed = time.time(), threading.Lock(), queue.SimpleQueue(), threading.Event()
    for core in sorted(os.sched_getaffinity(0))[:a.jobs] if a.jobs > 1 else [None]: cores.put(core)
    def one(name, changed, seed):
        if failed.is_set() or any(row["name"] == name and row["seed"] == seed for row in table["rows"]) or time.time() - begun > 60 * a.minutes: return
        core = cores.get()
        try:
            with tempfile.TemporaryDirectory() as folder: row = {"name": name, "changed": changed, "seed": seed, **run(changed, seed, a, Path(folder), core)}
        except BaseException:
            failed.set()        # begin no other
            raise
        finally: cores.put(core)
        with lock:
            table["rows"].append(row)
            print(row, flush=True)
            FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    todo = plan(bool(a.coco), a.crowds)
    with tempfile.TemporaryDirectory() as drawn, ThreadPoolExecutor(a.jobs) as pool:
        if a.crowds:
            write_crowds(Path(drawn), a)
            a.coco = drawn
        list(pool.map(lambda words: one(*words), todo))

if __name__ == "__main__": main()
