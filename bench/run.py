"""What the library's parts cost, as ratios measured side by side in one run; written to bench/results.json and, as a table, to bench/README.md.

Each pair is timed in turns (a, b, a, b, ...), and the ratio is that of the medians, so that a busy machine slows both alike.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import cv2
import keras
import numpy as np
import tensorflow as tf
from document_targets import document_targets
from fcos_lite.detector.backbone import GroupNorm
from fcos_lite.data.batches import Batches
from fcos_lite.config import SCRATCH_RECIPE, REFERENCE, CAMERA_NMS
from fcos_lite.export.__main__ import load_at_size
from fcos_lite.detector.model import FCOS
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.detector.targets import assign_targets
from fcos_lite.train.trainer import compile_for_training

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
    return {"seconds": round(first, 4), "bare_seconds": round(second, 4), "ratio": round(first / second, 3) if second > 1e-4 else None}

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
    model = FCOS(replace(REFERENCE, image_size=size), SCRATCH_RECIPE.change(batch_size=batch_size))
    compile_for_training(model, 1000)
    batch = Batches(Scenes(batch_size, 0, World(size=size)), batch_size, size)[0]
    step = bare_step(model)
    return side_by_side(lambda: model.train_on_batch(batch), lambda: [g.numpy() for g in step(batch["image"])], rounds)

def detection(size, rounds):
    "`model.detect` of a JPEG file of 640 x 480 with people in it, by the shipped weights: decoding, letterbox, NMS included, against the bare compiled forward pass."
    model = load_at_size("person", size)
    square = tf.constant(np.zeros((1, size, size, 3), "uint8"))
    forward = tf.function(lambda image: model(image))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "scene.jpg")
        cv2.imwrite(file, Scenes(1, 3, World(size=640, min_height=100))[0].read()[160:, :, ::-1])
        row = side_by_side(lambda: model.detect(file, CAMERA_NMS), lambda: {k: v.numpy() for k, v in forward(square).items()}, rounds)
        return {**row, "boxes": len(model.detect(file, CAMERA_NMS))}

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
    ours = tf.function(lambda boxes, labels: assign_targets(boxes, labels, size, REFERENCE.strides, 1))
    theirs = lambda: [document_targets(b, l) for b, l in zip(boxes, labels)]
    row = side_by_side(theirs, lambda: {k: v.numpy() for k, v in ours(tf.constant(boxes), tf.constant(labels)).items()}, rounds)
    model = FCOS(replace(REFERENCE, image_size=size), SCRATCH_RECIPE)      # the rules of the recipe whose step is timed
    learned = tf.function(lambda boxes, labels: model.targets(boxes, labels))
    inside = side_by_side(lambda: {k: v.numpy() for k, v in learned(tf.constant(boxes), tf.constant(labels)).items()}, lambda: None, max(5, rounds))["seconds"]
    return {"document_seconds": row["seconds"], "seconds": row["bare_seconds"], "document_over_ours": row["ratio"],
            "seconds_in_step": inside, "share_of_step": round(inside / step_seconds, 4)}

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

def in_a_process(script, backend, *words, **environment):
    "The line of JSON that another script prints."
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, words)], env={**os.environ, "KERAS_BACKEND": backend, **environment}, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

def whole_loop(rounds, rehearse):
    "The whole training loop against the bare pass on each backend, and against the document's loop: see training.py. Each backend in a process of its own."
    results = {}
    for backend in ("tensorflow", "jax"):
        for size, batch_size in ((64, 2),) if rehearse else ((256, 8), (512, 4)):
            row = in_a_process("training.py", backend, "--image-size", size, "--batch-size", batch_size, "--rounds", 1 if rehearse else max(3, rounds // 2 + 2), *(["--steps", 6] if size == 512 else []),
                               *(["--document"] if backend == "tensorflow" else []), *(["--tiny"] if rehearse else []))
            results.setdefault(backend, {})[str(size)] = row
            print(backend, size, row, flush=True)
    return results

def data(rounds, rehearse):
    "Input against the document's, against JPEG files, and against the step: see data.py."
    results = {}
    for size in (64,) if rehearse else (256, 512):
        results[str(size)] = in_a_process("data.py", "tensorflow", "--image-size", size, "--batch-size", 4, "--rounds", 1 if rehearse else max(3, rounds // 3), *(["--tiny", "--steps", 4, "--passes", 1] if rehearse else []))
        print("data", size, results[str(size)], flush=True)
    return results

def camera(rounds, rehearse):
    "From camera to screen, in a process of its own: see detect.py."
    row = in_a_process("detect.py", "tensorflow", "--images", 3 if rehearse else 2 * rounds, *(["--tiny"] if rehearse else []))
    print("camera", row, flush=True)
    return row

def exports(rounds, rehearse):
    "Every exported format against `detect`: see export.py. Each size and batch in a process of its own."
    results = {}
    for size in (64,) if rehearse else (256, 320, 512):
        for batch_size in (1,) if rehearse else (1, 8):
            row = in_a_process("export.py", "tensorflow", "--image-size", size, "--batch-size", batch_size, "--rounds", 1 if rehearse else rounds if batch_size == 1 else max(3, rounds // 3), *(["--tiny"] if rehearse else []))
            results.setdefault(str(size), {})[str(batch_size)] = row
            print("export", size, batch_size, row, flush=True)
    return results

def cold(rounds, rehearse):
    "From the start of a process to its first box, and its memory: see export.py."
    results = {}
    for size in (64,) if rehearse else (256, 320, 512):
        results[str(size)] = in_a_process("export.py", "tensorflow", "--image-size", size, "--cold", "--rounds", 1 if rehearse else rounds, *(["--tiny"] if rehearse else []))
        print("cold", size, results[str(size)], flush=True)
    return results

def allocator(rounds, rehearse):
    "A step of the command as it is, and with memory that goes back to the system as glibc has it by itself, in processes that take turns: see allocator.py."
    results = {}
    for size in (64,) if rehearse else (96, 256):
        words = "allocator.py", "tensorflow", "--image-size", size, "--steps", 5 if rehearse else 20
        pairs = [(in_a_process(*words), in_a_process(*words, MALLOC_MMAP_MAX_="65536")) for _ in range(1 if rehearse else min(3, rounds))]
        kept, habit = ({name: statistics.median(row[name] for row in column) for name in column[0]} for column in zip(*pairs))
        results[str(size)] = {"kept": kept, "given_back": habit, "ratio": round(habit["seconds"] / kept["seconds"], 3)}
        print("allocator", size, results[str(size)], flush=True)
    return results

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"} # what decides most of a convolution's speed

def machine():
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "") or platform.processor()
    return {"processor": name, "vectors": next((words for flag, words in VECTORS.items() if f" {flag}" in text), ""), "cores": os.cpu_count(), "python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__,
            "gpu": [d.name for d in tf.config.list_physical_devices("GPU")]}

def table(results):
    "The results as Markdown."
    lines = ["| measured side by side in one run | ratio | mark |", "|---|---|---|"]
    for backend, rows in results.get("training", {}).items():
        for size, row in rows.items(): lines.append(f"| the whole of `fit` (input, augmentation, metrics) / bare forward and backward, {NAMES[backend]}, {size}² | {row['ratio']:.2f} × | ≤ 1.10 × |")
    for size, row in results.get("training", {}).get("tensorflow", {}).items():
        lines.append(f"| the document's loop, eager / the whole of `fit`, {size}² | {row['document_over_ours']:.2f} × | |")
        lines.append(f"| the same, of the pictures that it does not throw away, {size}² | {row['document_over_ours_used']:.2f} × | |")
    for size, row in results.get("allocator", {}).items():
        shares = " and ".join(f"{row[name]['system']:.0%}" for name in ("given_back", "kept"))
        lines.append(f"| step of `python -m fcos_lite.train`: what it frees is given back to the system / kept, batch 8, {size}²; the system's share of the processor's time {shares} | {row['ratio']:.2f} × | |")
    for size, row in results.get("training_step", {}).items(): lines.append(f"| training step / bare forward and backward, {size}² | {row['ratio']:.2f} × | ≤ 1.10 × |")
    for size, row in results.get("detect", {}).items(): lines.append(f"| `detect` end to end / bare forward, {size}² | {row['ratio']:.2f} × | ≤ 1.10 × |")
    for count, row in results.get("targets", {}).items():
        lines.append(f"| target assignment, share of the step, batch 4, 512², {count} boxes a picture | {row['share_of_step']:.1%} | ≤ 3 % |")
        lines.append(f"| the document's loop over boxes, eager / ours, {count} boxes | {row['document_over_ours']:.1f} × | |")
    for size, row in results.get("data", {}).items():
        lines.append(f"| pictures a second, ready for the step: our records (JPEG, `tf.data`) / the document's (PNG, two maps, prefetch 1), {size}² | {row['stream_over_document']:.2f} × | |")
        lines.append(f"| the same: our records by `tf.data` / the JPEG files themselves by `tf.data`, {size}² | {row['stream_over_files']:.2f} × | |")
        lines.append(f"| the same: our records without TensorFlow, one thread / the document's, {size}² | {row['plain_over_document']:.2f} × | |")
        for name, words in (("stream", "by `tf.data`"), ("plain", "without TensorFlow, one thread")):
            lines.append(f"| time to make a batch of 4 out of our records, {words} / time of the training step, {size}² | {row['share_of_step'][name]:.1%} | ≤ 10 % |")
        lines.append(f"| records written a second, one process: ours (JPEG) / the document's (PNG), {size}² | {row['write_over_document']:.2f} × | |")
    if row := results.get("camera"):
        lines.append(f"| from camera to screen, {row['image_size']}²: {row['frames_per_second']:.1f} frames a second, {row['latency_ms']:.0f} ms late; latency / the steps one by one | {row['latency_over_work']:.2f} × | |")
        lines.append(f"| latency of a plain loop, which has the driver's queue of four / ours | {row['plain_latency_ms'] / row['latency_ms']:.1f} × | |")
        lines.append(f"| of it the network's share; milliseconds: {', '.join(f'{step} {value:.1f}' for step, value in row['milliseconds'].items())} | {row['milliseconds']['network'] / sum(row['milliseconds'].values()):.0%} | |")
    if "group_norm" in results: lines.append(f"| Keras' GroupNormalization / ours, forward and backward | {results['group_norm']['keras_over_ours']:.2f} × | |")
    for size, batches in results.get("export", {}).items():
        for batch_size, row in batches.items():
            for threads, kinds in row["threads"].items():
                lines += [f"| `detect` / {kind}, {size}², batch {batch_size}, {threads} thread{'s' * (threads != '1')} | {value['faster']:.2f} × | |" for kind, value in kinds.items() if kind != "keras"]
    for size, row in results.get("cold", {}).items():
        for kind, value in row.items():
            if kind == "keras" and size != min(results["cold"], key=int): continue       # it runs at the size of its weights, whatever the row's
            at = "at the size of its weights" if kind == "keras" else f"{size}²"
            lines.append(f"| start to first box, {kind}, {at}; peak memory {value['peak_mb']:.0f} MB | {value['seconds']:.1f} s | {'≤ 4 s' if kind.startswith('litert') else ''} |")
    for kind, row in results.get("precision", {}).get("rows", {}).items():
        lost = row["AP"] - results["precision"]["rows"]["Keras float32"]["AP"]
        lines.append(f"| AP on {results['precision']['photographs']} photographs, {results['precision']['image_size']}², {kind}: {row['AP']:.4f}; against Keras' | {lost:+.4f} | |")
    return "\n".join(lines)

def measured_with(results):
    "Which parts a processor with which instructions has measured."
    by_vectors = {}
    for part, vectors in results.get("vectors", {}).items(): by_vectors.setdefault(vectors, []).append(f"`{part}`")
    return "".join(f" Measured with {vectors}: {', '.join(parts)}." for vectors, parts in by_vectors.items())

def steps_and_detection(results, rounds):
    results |= {"training_step": {}, "detect": {}}
    for size, batch_size in ((256, 8), (512, 4)):
        results["training_step"][str(size)] = training_step(size, batch_size, rounds)
        results["detect"][str(size)] = detection(size, 2 * rounds)
        print(size, results["training_step"][str(size)], results["detect"][str(size)], flush=True)

def targets(results, rounds):
    step = training_step(512, 4, max(3, rounds // 3))      # anew, for the machine may be another one today
    results["targets"] = {}
    for count in (5, 20, 100):
        results["targets"][str(count)] = targets_against_document(count, step["seconds"], max(3, rounds // 3))
        print(count, results["targets"][str(count)], flush=True)

NAMES = {"tensorflow": "TensorFlow", "jax": "JAX"}
APART = {"training": ("training", whole_loop), "data": ("data", data), "detect": ("camera", camera), "export": ("export", exports), "cold": ("cold", cold), "allocator": ("allocator", allocator)}   # flag: its key in results.json, and what measures it
PARTS = ("step", "targets", "norm", *APART)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times that each pair is measured (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these, and keep what results.json has of the others (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="those that have a process of their own, on a tiny network, once, to see that they run; nothing is written")
    a = parser.parse_args()
    if a.rehearse: return print(table({APART[name][0]: APART[name][1](1, True) for name in APART if name in a.only}))
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8")) if set(a.only) < set(PARTS) and (HERE / "results.json").exists() else {}
    results["machine"] = machine()
    results["vectors"] = {**results.get("vectors", {}), **{part: results["machine"]["vectors"] for part in a.only}}     # of the processor that measured it
    for name, (key, measured) in APART.items():
        if name in a.only: results[key] = measured(a.rounds, False)
    if "step" in a.only: steps_and_detection(results, a.rounds)
    if "targets" in a.only: targets(results, a.rounds)
    if "norm" in a.only: results["group_norm"] = group_norm(a.rounds)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    m = results["machine"]
    (HERE / "README.md").write_text(f"# Benchmarks\n\n`make bench` measures these again; `python bench/run.py --only training` a part of them. Machine: {m['processor']}, {m['cores']} cores, no GPU; TensorFlow {m['tensorflow']}, Keras {m['keras']}.{measured_with(results)}\n\n"
                                    f"{table(results)}\n\n{LEGEND}\n", encoding="utf-8")
    print(table(results))

LEGEND = """Each part is a run of its own, and not all were made on the same day; only the two things of one row are comparable. Pairs are measured in turns; a ratio is that of medians, but for *the whole of `fit`*, where few rounds are possible: there it is that of the best of each. *The whole of `fit`* reads JPEG files, letterboxes, augments, assigns targets, steps and keeps its metrics, with the `scratch` recipe and batches of 8 at 256², its own, and of 4 at 512²; *bare* is
the network's forward and backward pass on one batch that is there already. *The document's loop* (document_loop.py) is eager, reads its PNG records, loops over the boxes of each picture, prints each step,
clips each tensor and has two optimizers; its network is ours. It throws every ninth micro-batch away: per picture that it learns from, it is slower by nine eighths.
*What it frees* (allocator.py): glibc's allocator gives large tensors back to the system and gets them again, page by page, in the next step; the command tells it to keep them. The bare pass and `fit` above are measured with glibc's habits, as in a notebook.
*Input* (data.py) is measured alone, through whole epochs, from closed files to batches of 4 with pictures, boxes and labels. The photographs are grainy scenes of 640 x 480; the records hold squares of the size that is trained, of JPEG
quality 90 or of PNG; the step is that of the `source` network with the `scratch` recipe.
*Exports* (export.py) are the shipped detector: from pictures of 640 x 480 to boxes in their pixels, with the runtime's own threads set to what is said; `detect` is Keras' on TensorFlow with as many. Each round begins with another format, and each call after a pause, for a runtime's threads go on turning for a moment. Values above 1 are faster than `detect`. *`detect` end to end* is from a JPEG file of 640 x 480 to its boxes, by the shipped weights.
*Start to first box* is a process of its own, import included, of the script in examples/ for that format (for Keras: of `FCOS.from_preset("person").detect`; *by `Exported`*: of the library's class, which imports OpenCV and its readers too); the peak is what the kernel saw of that process (VmHWM), one picture at a time, with the runtime's own number of threads.
*The camera* is a pretended one of 640 x 480 pixels and 30 frames a second; its pictures are drawn for a screen of 1280 x 720, and no window is opened.

Two more are not of time: `python bench/precision.py --coco DIR --keep` puts the AP of every exported format beside Keras' into this table, and `python bench/ablations.py`, with `--crowds` for that switch, measures what each difference of the recipe `scratch` is worth ([the chapter](../nbs/17f_ablations.ipynb))."""

if __name__ == "__main__": main()
