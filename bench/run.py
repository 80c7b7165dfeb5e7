"""What the library's parts cost, as ratios measured side by side in one run; written to bench/results.json and, as a table, to bench/README.md.

Each pair is timed in turns (a, b, a, b, ...), and the ratio is that of the medians, so that a busy machine slows both alike.
"""
import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import tensorflow as tf
from document_targets import document_targets
from fcos_lite.backbone import GroupNorm
from fcos_lite.batches import Batches
from fcos_lite.config import SCRATCH_RECIPE, SOURCE, SOURCE_CAMERA
from fcos_lite.model import FCOS
from fcos_lite.scenes import Scenes, World
from fcos_lite.targets import assign
from fcos_lite.training import compile_for_training

HERE = Path(__file__).parent

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def side_by_side(a, b, rounds):
    "Median seconds of two functions, run in turns after a first call of each."
    a(); b()
    pairs = [(timed(a), timed(b)) for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*pairs))
    return {"seconds": round(first, 4), "bare_seconds": round(second, 4), "ratio": round(first / second, 3)}

def bare_step(model):
    "Forward and backward of the same network on a scalar made of all its outputs, compiled: no targets, no losses, no optimizer, no input."
    @tf.function
    def step(image):
        with tf.GradientTape() as tape:
            outputs = model.heads(model.fpn(tf.cast(image, "float32") / 255))
            scalar = tf.add_n([tf.reduce_mean(value) for value in outputs.values()])
        gradients = tape.gradient(scalar, model.trainable_variables)
        return [tf.reduce_sum(g) for g in gradients]
    return step

def training_step(size, batch_size, rounds):
    "Our whole training step, from NumPy arrays to updated weights, against the bare forward and backward pass."
    model = FCOS(replace(SOURCE, image_size=size), replace(SCRATCH_RECIPE, batch_size=batch_size))
    compile_for_training(model, 1000)
    batch = Batches(Scenes(batch_size, 0, World(size=size)), batch_size, size)[0]
    step = bare_step(model)
    return side_by_side(lambda: model.train_on_batch(batch), lambda: [g.numpy() for g in step(batch["image"])], rounds)

def detection(size, rounds):
    "`model.detect` of one picture of 640 x 480, letterbox, decoding and NMS included, against the bare compiled forward pass."
    model = FCOS(replace(SOURCE, image_size=size))
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype="uint8")
    square = tf.constant(np.zeros((1, size, size, 3), "uint8"))
    forward = tf.function(lambda image: model(image))
    return side_by_side(lambda: model.detect(picture, SOURCE_CAMERA), lambda: {k: v.numpy() for k, v in forward(square).items()}, rounds)

def random_boxes(rng, batch_size, count, size):
    "Boxes of people's shapes, (B, M, 4) xyxy pixels."
    height = np.exp(rng.uniform(np.log(10), np.log(400), (batch_size, count))).clip(max=size * 0.9)
    width = height * rng.uniform(0.3, 0.7, height.shape)
    left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
    return np.stack([left, top, left + width, top + height], axis=-1).astype("float32")

def targets_against_document(count, step_seconds, rounds, size=512, batch_size=4):
    "Vectorised assignment, compiled, against the document's loop over boxes, eager; and its share of the training step."
    boxes = random_boxes(np.random.default_rng(1), batch_size, count, size)
    labels = np.zeros(boxes.shape[:2], "int32")
    ours = tf.function(lambda boxes, labels: assign(boxes, labels, size, SOURCE.strides, 1))
    theirs = lambda: [document_targets(b, l) for b, l in zip(boxes, labels)]
    row = side_by_side(theirs, lambda: {k: v.numpy() for k, v in ours(tf.constant(boxes), tf.constant(labels)).items()}, rounds)
    return {"document_seconds": row["seconds"], "seconds": row["bare_seconds"], "document_over_ours": row["ratio"],
            "share_of_step": round(row["bare_seconds"] / step_seconds, 4)}

def group_norm(rounds, size=256, batch_size=8):
    "A training pass through Keras' GroupNormalization against ours, on one map of the source's pyramid at 256."
    x = tf.constant(np.random.default_rng(2).normal(size=(batch_size, size // 4, size // 4, 128)).astype("float32"))
    def passes(layer):
        layer.build(x.shape)
        @tf.function
        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(layer(x) ** 2)
            return tape.gradient(y, [x, *layer.trainable_variables])
        return lambda: both(x)[0].numpy()
    row = side_by_side(passes(keras.layers.GroupNormalization(32)), passes(GroupNorm(32)), rounds)
    return {"keras_seconds": row["seconds"], "seconds": row["bare_seconds"], "keras_over_ours": row["ratio"]}

def machine():
    info = Path("/proc/cpuinfo")
    name = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), "") if info.exists() else platform.processor()
    return {"processor": name, "cores": os.cpu_count(), "python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__,
            "gpu": [d.name for d in tf.config.list_physical_devices("GPU")]}

def table(results):
    "The results as Markdown."
    lines = ["| measured side by side in one run | ratio | mark |", "|---|---|---|"]
    for size, row in results["training_step"].items(): lines.append(f"| training step / bare forward and backward, {size}² | {row['ratio']:.2f} × | ≤ 1.10 × |")
    for size, row in results["detect"].items(): lines.append(f"| `detect` end to end / bare forward, {size}² | {row['ratio']:.2f} × | ≤ 1.10 × |")
    for count, row in results["targets"].items():
        lines.append(f"| target assignment, share of the step, batch 4, 512², {count} boxes a picture | {row['share_of_step']:.1%} | ≤ 3 % |")
        lines.append(f"| the document's loop over boxes, eager / ours, {count} boxes | {row['document_over_ours']:.1f} × | |")
    lines.append(f"| Keras' GroupNormalization / ours, forward and backward | {results['group_norm']['keras_over_ours']:.2f} × | |")
    return "\n".join(lines)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times that each pair is measured (default: %(default)s)")
    rounds = parser.parse_args().rounds
    results = {"machine": machine(), "training_step": {}, "detect": {}, "targets": {}}
    for size, batch_size in ((256, 8), (512, 4)):
        results["training_step"][size] = training_step(size, batch_size, rounds)
        results["detect"][size] = detection(size, 2 * rounds)
        print(size, results["training_step"][size], results["detect"][size], flush=True)
    for count in (5, 20, 100):
        results["targets"][count] = targets_against_document(count, results["training_step"][512]["seconds"], max(3, rounds // 3))
        print(count, results["targets"][count], flush=True)
    results["group_norm"] = group_norm(rounds)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    m = results["machine"]
    (HERE / "README.md").write_text(f"# Benchmarks\n\n`make bench` measures these again. Machine: {m['processor']}, {m['cores']} cores, no GPU; TensorFlow {m['tensorflow']}, Keras {m['keras']}.\n\n"
                                    f"{table(results)}\n", encoding="utf-8")
    print(table(results))

if __name__ == "__main__": main()
