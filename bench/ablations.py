"""What each difference between the recipes `scratch` and `reference` is worth: `scratch` with one of them put back.

python bench/ablations.py --jobs 2                           drawn scenes
python bench/ablations.py --jobs 2 --crowds                  drawn scenes with crowds: what that one switch is worth
python bench/ablations.py --data DIR --image-size 256        photographs

Every run is `python -m fcos_lite.train` in a process of its own, from random weights, and is measured on images that it
has not seen. A run that ablations.json has already is not made again, so the table may be interrupted, and grow.
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
# what a run is called: the fields that it has from the reference; all but early_stopping_patience and monitor,
# which only decide when to stop
DIFFERENCES = {
    "the reference's rates": ("learning_rate", "min_learning_rate", "warmup_steps"),
    "an update per 8 × 4 images": ("batch_size", "gradient_accumulation_steps"),
    "a tenth of the weight decay": ("weight_decay",),
    "level areas not scaled": ("level_rule",),
    "no centre sampling": ("center_radius",),
    "crowds as background": ("crowd_policy",),
    "distances not weighted": ("ltrb_weighting",),
    "centerness / sum of targets": ("centerness_normalizer",),
    "no mirror": ("flip",),
    "no zoom": ("zoom",),
}
INITIAL_VALUES = {"scale_init": 1.0, "ltrb_bias": 0.0} # of the model; in neither recipe
SCENES = {"min_height": 20, "max_people": 3} # a little easier than the book's, as so few epochs ask
UNSEEN_SEED = 100 # of the scenes that are measured on; training validates on seeds of its own
SEEDS = (0, 1, 2) # of `scratch` as it is: how much is chance; a seed draws other scenes to learn from, too

def flag(name, value): # words of the command line
    return [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]

def crowded(example):
    "Make the people of every other scene with two or more one crowd region, as COCO marks a throng."
    if len(example.boxes) < 2 or example.image_id % 2: return example
    hull = np.concatenate([example.boxes[:, :2].min(axis=0), example.boxes[:, 2:].max(axis=0)])[None]
    return dataclasses.replace(example, boxes=hull, labels=np.array([-2], np.int32), areas=None)

def write_crowds(folder, options):
    "Write scenes in COCO's layout: to learn from, some with crowds; and to measure on, with each person marked."
    world = World(size=options.image_size, **SCENES)
    train = [crowded(example) for example in Scenes(options.scenes, 1, world)]
    write_coco(folder, "train2017", train, world.class_names)
    write_coco(folder, "val2017", list(Scenes(options.unseen, UNSEEN_SEED, world)), world.class_names)

def plan(photographs, crowds): # [(name, changed fields, seed)]
    "Return all runs of a table; without crowds that switch changes nothing."
    values = REFERENCE_RECIPE.flat()
    if crowds:
        changed = {"crowd_policy": values["crowd_policy"]}
        return [run for seed in SEEDS for run in (("scratch", {}, seed), ("crowds as background", changed, seed))]
    runs = [("scratch", {}, seed) for seed in SEEDS]
    for name, fields in DIFFERENCES.items():
        changed = {field: values[field] for field in fields}
        if photographs or fields != ("crowd_policy",): runs.append((name, changed, SEEDS[0]))
    return [*runs, ("scratch, other initial values", INITIAL_VALUES, SEEDS[0])]

def command(module, words, core):
    "Run a command of the library, on a core of its own if there are several at a time."
    def pin(): os.sched_setaffinity(0, {core})
    done = subprocess.run([sys.executable, "-m", f"fcos_lite.{module}", *map(str, words)], stdin=subprocess.DEVNULL,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          preexec_fn=pin if core is not None else None)
    if done.returncode: sys.exit(f"python -m fcos_lite.{module} {' '.join(map(str, words))}\n{done.stdout[-3000:]}")

def measure(changed, seed, options, folder, core): # {metric: value}
    "Train and evaluate one run."
    size = ["--image-size", options.image_size]
    limit = ["--limit", options.limit] if options.limit else []
    if options.data: train_data = evaluate_data = ["--data", options.data, *limit]
    else:
        scenes = [word for name, value in SCENES.items() for word in flag(name, value)]
        train_data = [*scenes, "--scenes", options.scenes]
        evaluate_data = [*scenes, "--limit", options.unseen, "--seed", UNSEEN_SEED]
    recipe = [word for name, value in changed.items() for word in flag(name, value)]
    command("train", [*train_data, *size, "--epochs", options.epochs, "--seed", seed, "--evaluate-every", 0,
                      "--out", folder / "run", *recipe], core)
    command("evaluate", ["--weights", folder / "run", *evaluate_data, "--images", 1, "--out", folder / "report"], core)
    report = json.loads((folder / "report" / "evaluation.json").read_text(encoding="utf-8"))
    return {name: round(report[name], 4) for name in ("AP", "AP50", "AP75", "source_map75")}

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="photographs in COCO's layout; without it, scenes are drawn")
    parser.add_argument("--crowds", action="store_true", help="draw scenes with crowds, and compare the two policies")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 8; with --data 4")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="to learn from (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=400, metavar="N", help="to measure on (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N photographs of each split")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="begin no run after so many")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on a core (Linux)")
    options = parser.parse_args()
    if options.data and options.crowds: parser.error("--crowds draws its own images; leave out --data")
    options.epochs = options.epochs or (4 if options.data else 8)
    return options

def main():
    options = parse()
    tables = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    settings = {"image_size": options.image_size, "epochs": options.epochs}
    if options.data: settings["photographs"] = options.limit or "all"
    else: settings |= {"scenes": options.scenes, "unseen": options.unseen, **SCENES}
    kind = "photographs" if options.data else "scenes with crowds" if options.crowds else "scenes"
    table = tables.setdefault(f"{kind}, {options.image_size}²", {"settings": settings, "rows": []})
    if table["settings"] != settings:
        sys.exit(f"{FILE} has this table with other settings, {table['settings']}; use them, or remove it")
    begun, lock, cores, failed = time.time(), threading.Lock(), queue.SimpleQueue(), threading.Event()
    for core in sorted(os.sched_getaffinity(0))[:options.jobs] if options.jobs > 1 else [None]: cores.put(core)

    def make(run):
        name, changed, seed = run
        is_known = any(row["name"] == name and row["seed"] == seed for row in table["rows"])
        if failed.is_set() or is_known or time.time() - begun > 60 * options.minutes: return
        core = cores.get()
        try:
            with tempfile.TemporaryDirectory() as folder: metrics = measure(changed, seed, options, Path(folder), core)
        except BaseException:
            failed.set() # begin no other
            raise
        finally: cores.put(core)
        with lock:
            table["rows"].append({"name": name, "changed": changed, "seed": seed, **metrics})
            print(table["rows"][-1], flush=True)
            FILE.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")

    runs = plan(bool(options.data), options.crowds)
    with tempfile.TemporaryDirectory() as drawn, ThreadPoolExecutor(options.jobs) as pool:
        if options.crowds:
            write_crowds(Path(drawn), options)
            options.data = drawn
        list(pool.map(make, runs))

if __name__ == "__main__": main()
