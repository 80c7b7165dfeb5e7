"""A run's folder: what was asked, what happened, what was learned."""
import csv
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from fcos_lite.config import InputError, Network, Recipe, check

def write_whole(path, write):
    "Let `write(temporary path)` make a file, and give it its name only when it is whole."
    path = Path(path)
    aside = path.with_name(f".{path.name.split('.')[0]}.partial.{path.name}")
    write(aside)
    os.replace(aside, path)

def write_json(path, value):
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))

COLUMNS = ("epoch", "step", "loss", "cls", "reg", "ctr", "val_loss", "val_cls", "val_reg", "val_ctr", "AP", "AP50", "AP75", "source_map75",
           "learning_rate", "images_per_second", "memory_mb")

class Run:
    "The folder of one training run."
    def __init__(self, path): self.path = Path(path)

    @classmethod
    def create(cls, path, force=False):
        path = Path(path)
        check(not path.is_file(), f"--out {path}: a file has this name; choose a folder")
        if path.exists() and any(path.iterdir()):
            check(force, f"--out {path}: the folder exists and is not empty; choose another name, or add --force to overwrite it")
            check((path / "config.json").exists(), f"--out {path}: --force overwrites earlier runs only, and this folder holds none (no config.json)")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def write_config(self, network, recipe, run):
        write_json(self.path / "config.json", {"network": dataclasses.asdict(network), "recipe": dataclasses.asdict(recipe), "run": run})

    def config(self):
        document = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return from_fields(Network, document["network"]), from_fields(Recipe, document["recipe"]), document["run"]

    def say(self, line):
        "Print a line, and keep it in `log.txt`."
        print(line, flush=True)
        with open(self.path / "log.txt", "a", encoding="utf-8") as file: file.write(line + "\n")

    def save_weights(self, model, name):
        write_whole(self.path / f"{name}.weights.h5", lambda p: model.save_weights(p))

    def write_row(self, row):
        path = self.path / "metrics.csv"
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new: writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def rows(self):
        "What `metrics.csv` holds, a dictionary of numbers an epoch."
        with open(self.path / "metrics.csv", encoding="utf-8") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

def from_fields(cls, values):
    "A configuration from what JSON kept of it."
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = set(values) - known
    check(not unknown, f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
