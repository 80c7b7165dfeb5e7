"""Train a detector over EfficientNet-Lite0 with the library's own command, and five things more:

    python launch.py SETTINGS.json <flags of python -m fcos_lite.train, --in-memory among them>

- the backbone EfficientNetLite0 (lite0.py), of which SETTINGS says what stands still;
- views cut out of the pictures as they are on the disk (512 pixels), so that what is enlarged is
  sharp, and no view is mostly grey: crop, scale, stretch, mosaic, all in NumPy and OpenCV;
- a clock that moves the learning rate at every tenth step, with a warm-up in steps;
- validation at another size than that of training, of the averaged weights alone;
- oneDNN's kernels, which TensorFlow does not choose by itself on a processor without AVX-512.
"""
import os, sys, json
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
SETTINGS = {"still_rows": 2, "still_depthwise": True, "scale": [0.75, 2.0], "stretch": 0.08, "mosaic": 0.0,
            "eval_size": 384, "max_boxes": 40, "min_kept": 0.3, "warmup": 300, "plain": False,
            **json.load(open(sys.argv[1]))}
os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(SETTINGS.get("inter", 2)))
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(SETTINGS.get("intra", 2)))
import dataclasses
from concurrent.futures import ThreadPoolExecutor
import cv2
import numpy as np
import keras
import efficientnet_lite0 as lite0
from fcos_lite import backbones, reports, train
from fcos_lite.batches import Batches, pad_boxes
from fcos_lite.memory import keep_freed_memory
from fcos_lite.model import FCOS
from fcos_lite.optimizer import averaged
from fcos_lite.training import run_as_traced

cv2.setNumThreads(1)
S = SETTINGS
backbones.BACKBONES["EfficientNetLite0"] = lambda size: lite0.efficientnet_lite0(size, still_rows=S["still_rows"], still_depthwise=S["still_depthwise"])


class Pool:
    "Pictures as they are on the disk, decoded once."
    def __init__(self, examples, image_size=None, pad_value=114, workers=2):
        self.max_boxes = S["max_boxes"]
        with ThreadPoolExecutor(workers) as pool:
            self.examples = list(pool.map(lambda i: dataclasses.replace(examples[i], image=examples[i].read()), range(len(examples))))
    def __len__(self): return len(self.examples)
    def __getitem__(self, i): return self.examples[i]


def span(rng, length, factor, room): # pixels of the picture along an axis; enlargement; pixels to fill
    "Where an axis is cut, and where it lies then: first and last pixel of the picture, first and last of the view."
    if length * factor <= room:
        wide = max(1, round(length * factor))
        at = int(rng.integers(0, room - wide + 1))
        return 0, length, at, at + wide
    cut = min(length, max(1, round(room / factor)))
    at = int(rng.integers(0, length - cut + 1))
    return at, at + cut, 0, room


def cut(rng, example, width, height, factor): # -> view (height, width, 3), boxes, labels
    "A picture at a scale, somewhere in a view of this size."
    image = example.image
    stretch = np.exp(rng.uniform(-S["stretch"], S["stretch"]))
    x0, x1, u0, u1 = span(rng, image.shape[1], factor * stretch, width)
    y0, y1, v0, v1 = span(rng, image.shape[0], factor / stretch, height)
    view = np.full((height, width, 3), 114, np.uint8)
    view[v0:v1, u0:u1] = cv2.resize(image[y0:y1, x0:x1], (u1 - u0, v1 - v0), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    ratio = np.array([image.shape[1] / example.width, image.shape[0] / example.height] * 2, np.float32)
    moved = (example.boxes.reshape(-1, 4) * ratio - [x0, y0, x0, y0]) * ([(u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)] * 2) + [u0, v0, u0, v0]
    seen = np.clip(moved, [u0, v0, u0, v0], [u1, v1, u1, v1])
    area = lambda boxes: np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    share = area(seen) / np.maximum(area(moved), 1e-6)
    kept = np.where(example.labels < 0, share > 0, (share > S["min_kept"]) & (area(seen) > 9))
    return view, seen[kept].astype("float32"), example.labels[kept]


def drawn(rng, example, width, height, size, low, high): # as `cut`
    "A random view, and another one where nobody is on it though somebody is in the picture."
    for _ in range(3):
        factor = np.exp(rng.uniform(np.log(low), np.log(high))) * size / max(example.image.shape[:2])
        found = cut(rng, example, width, height, factor)
        if (found[2] >= 0).any() or not (example.labels >= 0).any(): break
    return found


def mosaic(rng, examples, size): # four of them
    "Four pictures around a joint."
    x, y = (int(value) for value in rng.uniform(0.35, 0.65, 2) * size)
    view, boxes, labels = np.empty((size, size, 3), np.uint8), [], []
    for k, (left, top, right, bottom) in enumerate([(0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)]):
        low, high = S["scale"]
        part, its_boxes, its_labels = drawn(rng, examples[k], right - left, bottom - top, size, low * 0.7, high * 0.7)
        view[top:bottom, left:right] = part
        boxes.append(its_boxes + np.float32([left, top, left, top])); labels.append(its_labels)
    return view, np.concatenate(boxes), np.concatenate(labels)


class Crops(Batches):
    "Batches of random views; which, depends on seed, epoch and the batch's index alone."
    def rows(self, index, i, n):
        rng = np.random.default_rng((self.shuffle_seed or 0, self.epoch, index, 77))
        parts = []
        for row in self.order()[index * self.batch_size:(index + 1) * self.batch_size]:
            found = None
            if rng.random() < S["mosaic"]:
                found = mosaic(rng, [self.examples[int(row)], *(self.examples[int(k)] for k in rng.integers(0, len(self.examples), 3))], self.image_size)
                if len(found[1]) > self.max_boxes: found = None
            image, boxes, labels = found or drawn(rng, self.examples[int(row)], self.image_size, self.image_size, self.image_size, *S["scale"])
            boxes, labels = pad_boxes(boxes, labels, self.max_boxes)
            parts.append({"image": image, "boxes": boxes, "labels": labels, "image_id": np.int64(self.examples[int(row)].image_id)})
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


class StepClock(reports.Clock):
    "The rate moves every tenth step, after a warm-up in steps."
    counters = "spent", "first", "steps"
    def __init__(self, *arguments, **kwargs):
        super().__init__(*arguments, **kwargs)
        self.steps = 0
        self.minutes = S.get("minutes", self.minutes)   # SETTINGS may make a run longer or shorter when it is resumed

    def on_train_batch_begin(self, batch, logs=None):
        if self.steps % 10 == 0 or self.steps < S["warmup"]:
            share = min(1.0, max(0.0, 1 - self.left / self.minutes))
            rate = float(keras.ops.convert_to_numpy(self.schedule(10_000 * share))) * min(1.0, (self.steps + 1) / max(1, S["warmup"]))
            getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer).learning_rate = rate
        self.steps += 1


twins = {}
def twin_of(model):
    "The same detector for pictures of the size at which it is measured."
    if "model" not in twins:
        size, ours = S["eval_size"], model.network.image_size
        areas = tuple(area * (ours / size) ** 2 for area in model.recipe.level_areas)
        twins["model"] = FCOS(dataclasses.replace(model.network, image_size=size), dataclasses.replace(model.recipe, level_areas=areas, stages=()))
    twin = twins["model"]
    for there, here in zip(twin.fpn.weights + twin.heads.weights, model.fpn.weights + model.heads.weights, strict=True): there.assign(here)
    return twin

validate, last = reports.validate, {}
def validate_average(model, examples):
    "As `reports.validate`, of the averaged weights, both times it is asked; the first time a hair less, so that they are the ones that are kept."
    if last: row = dict(last); last.clear(); return row
    with averaged(model): twin = twin_of(model)
    last.update(validate(twin, examples))
    print("measured:", {name: round(float(last[name]), 4) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "val_loss") if name in last}, flush=True)
    return {name: value - 1e-6 for name, value in last.items()}

if not S["plain"]: train.InMemory, train.batches_of = Pool, Crops
train.Clock = StepClock
reports.validate = validate_average

if __name__ == "__main__":
    keep_freed_memory()
    run_as_traced()
    if S.get("nodeterminism", True): train.be_deterministic = lambda seed: keras.utils.set_random_seed(seed)
    train.main(sys.argv[2:])
