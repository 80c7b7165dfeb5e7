"""What the library's parts cost, as ratios measured side by side in one run.

Writes bench/results.json and, as a table, bench/README.md. Each pair is timed in turns (a, b, a, b, ...), and the
ratio is that of the medians, so that a busy machine slows both alike.
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
from reference_targets import reference_targets
from fcos_lite.config import CAMERA_NMS, REFERENCE, REFERENCE_RECIPE, SCRATCH_RECIPE
from fcos_lite.data.batches import Batches
from fcos_lite.detector.layers import GroupNorm
from fcos_lite.detector.targets import assign_targets
from fcos_lite.export.__main__ import load_at_size
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.trainer import build_model, compile_for_training

HERE = Path(__file__).parent

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def side_by_side(a, b, rounds):
    "Return the median seconds of two functions, run in turns after a first call of each."
    a()
    b()
    pairs = [(timed(a), timed(b)) for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*pairs))
    ratio = round(first / second, 3) if second > 1e-4 else None
    return {"seconds": round(first, 4), "bare_seconds": round(second, 4), "ratio": ratio}

def to_numpy(outputs): return {name: value.numpy() for name, value in outputs.items()}

def bare_step(model):
    "Forward and backward of the network on the mean of its outputs, compiled: no targets, losses, optimizer, input."
    @tf.function
    def step(image):
        with tf.GradientTape() as tape:
            scalar = tf.add_n([tf.reduce_mean(value) for value in model(image).values()])
        gradients = tape.gradient(scalar, model.trainable_variables)
        return [tf.reduce_sum(gradient) for gradient in gradients]
    return step

def training_step(size, batch_size, rounds):
    "Our whole training step, from NumPy arrays to updated weights, against the bare forward and backward pass."
    recipe = SCRATCH_RECIPE.change(batch_size=batch_size)
    model = build_model(replace(REFERENCE, image_size=size), recipe, precision="float32")
    compile_for_training(model, recipe, 1000)
    image, truth = Batches(Scenes(batch_size, 0, World(size=size)), batch_size, size)[0]
    step = bare_step(model)
    def bare(): return [gradient.numpy() for gradient in step(image)]
    return side_by_side(lambda: model.train_on_batch(image, truth), bare, rounds)

def detection(size, rounds):
    "`model.detect` of a JPEG file of 640 x 480 with people in it, against the bare compiled forward pass."
    model = load_at_size("person", size)
    square = tf.constant(np.zeros((1, size, size, 3), "uint8"))
    forward = tf.function(lambda image: model(image))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "scene.jpg")
        cv2.imwrite(file, Scenes(1, 3, World(size=640, min_height=100))[0].read()[160:, :, ::-1])
        def detect(): return model.detect(file, CAMERA_NMS)
        return {**side_by_side(detect, lambda: to_numpy(forward(square)), rounds), "boxes": len(detect())}

def random_boxes(rng, batch_size, count, size): # (B, M, 4) xyxy, pixels
    "Draw boxes of people's shapes."
    height = np.exp(rng.uniform(np.log(10), np.log(400), (batch_size, count))).clip(max=size * 0.9)
    width = height * rng.uniform(0.3, 0.7, height.shape)
    left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
    return np.stack([left, top, left + width, top + height], axis=-1).astype("float32")

def targets_against_reference(count, step_seconds, rounds, size=512, batch_size=4):
    "Vectorised assignment, compiled, against the reference's eager loop over boxes; and its part of the training step."
    boxes = random_boxes(np.random.default_rng(1), batch_size, count, size)
    labels = np.zeros(boxes.shape[:2], "int32")
    inputs = tf.constant(boxes), tf.constant(labels)
    config = replace(REFERENCE, image_size=size)
    def compiled(recipe):
        assign = tf.function(lambda boxes, labels: assign_targets(boxes, labels, config, recipe.targets))
        return lambda: to_numpy(assign(*inputs))
    def reference(): return [reference_targets(b, l) for b, l in zip(boxes, labels)]
    row = side_by_side(reference, compiled(REFERENCE_RECIPE), rounds)
    # the rules of the recipe whose step is timed
    inside = side_by_side(compiled(SCRATCH_RECIPE), lambda: None, max(5, rounds))["seconds"]
    return {"document_seconds": row["seconds"], "seconds": row["bare_seconds"], "document_over_ours": row["ratio"],
            "seconds_in_step": inside, "share_of_step": round(inside / step_seconds, 4)}

def group_norm(rounds, size=256, batch_size=8):
    "A training pass through Keras' GroupNormalization against ours, on one map of the reference's pyramid at 256."
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
    "Return what the last line of another script's output, JSON, holds."
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": backend, **environment})
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

def whole_loop(rounds, rehearse):
    "The whole training loop on each backend against the bare pass and the reference's loop: see training.py."
    results, rounds = {}, 1 if rehearse else max(3, rounds // 2 + 2)
    for backend in ("tensorflow", "jax"):
        for size, batch_size in ((64, 2),) if rehearse else ((256, 8), (512, 4)):
            words = ["--image-size", size, "--batch-size", batch_size, "--rounds", rounds]
            if size == 512: words += ["--steps", 6]
            if backend == "tensorflow": words.append("--document")
            if rehearse: words.append("--tiny")
            results.setdefault(backend, {})[str(size)] = row = in_a_process("training.py", backend, *words)
            print(backend, size, row, flush=True)
    return results

def data(rounds, rehearse):
    "Input against the reference's, against JPEG files, and against the step: see data.py."
    results = {}
    for size in (64,) if rehearse else (256, 512):
        words = ["--image-size", size, "--batch-size", 4, "--rounds", 1 if rehearse else max(3, rounds // 3)]
        if rehearse: words += ["--tiny", "--steps", 4, "--passes", 1]
        results[str(size)] = in_a_process("data.py", "tensorflow", *words)
        print("data", size, results[str(size)], flush=True)
    return results

def camera(rounds, rehearse):
    "From camera to screen: see detect.py."
    words = ["--images", 3, "--tiny"] if rehearse else ["--images", 2 * rounds]
    row = in_a_process("detect.py", "tensorflow", *words)
    print("camera", row, flush=True)
    return row

def exports(rounds, rehearse):
    "Every exported format against `detect`: see export.py."
    results = {}
    for size in (64,) if rehearse else (256, 320, 512):
        for batch_size in (1,) if rehearse else (1, 8):
            count = 1 if rehearse else rounds if batch_size == 1 else max(3, rounds // 3)
            words = ["--image-size", size, "--batch-size", batch_size, "--rounds", count]
            if rehearse: words.append("--tiny")
            results.setdefault(str(size), {})[str(batch_size)] = row = in_a_process("export.py", "tensorflow", *words)
            print("export", size, batch_size, row, flush=True)
    return results

def cold(rounds, rehearse):
    "From the start of a process to its first box, and its memory: see export.py."
    results = {}
    for size in (64,) if rehearse else (256, 320, 512):
        words = ["--image-size", size, "--cold", "--rounds", 1 if rehearse else rounds]
        if rehearse: words.append("--tiny")
        results[str(size)] = in_a_process("export.py", "tensorflow", *words)
        print("cold", size, results[str(size)], flush=True)
    return results

def allocator(rounds, rehearse):
    "A training step with freed memory kept, and given back to the system as glibc does: see allocator.py."
    results = {}
    for size in (64,) if rehearse else (96, 256):
        words = "allocator.py", "tensorflow", "--image-size", size, "--steps", 5 if rehearse else 20
        pairs = [(in_a_process(*words), in_a_process(*words, MALLOC_MMAP_MAX_="65536"))
                 for _ in range(1 if rehearse else min(3, rounds))]
        kept, given_back = ({name: statistics.median(row[name] for row in column) for name in column[0]}
                            for column in zip(*pairs))
        results[str(size)] = {"kept": kept, "given_back": given_back,
                              "ratio": round(given_back["seconds"] / kept["seconds"], 3)}
        print("allocator", size, results[str(size)], flush=True)
    return results

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"} # what decides most of a convolution's speed

def machine():
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    vectors = [words for flag, words in VECTORS.items() if f" {flag}" in text]
    return {"processor": names[0] if names else platform.processor(), "vectors": vectors[0] if vectors else "",
            "cores": os.cpu_count(), "python": platform.python_version(), "tensorflow": tf.__version__,
            "keras": keras.__version__, "gpu": [d.name for d in tf.config.list_physical_devices("GPU")]}

def training_rows(results): # [(what, ratio, mark)]
    for backend, rows in results.get("training", {}).items():
        for size, row in rows.items():
            yield (f"the whole of `fit` (input, augmentation, metrics) / bare forward and backward, {NAMES[backend]}, "
                   f"{size}²", f"{row['ratio']:.2f} ×", "≤ 1.10 ×")
    for size, row in results.get("training", {}).get("tensorflow", {}).items():
        yield f"the reference's loop, eager / the whole of `fit`, {size}²", f"{row['document_over_ours']:.2f} ×", ""
        yield ("the same, of the images that it does not throw away, "
               f"{size}²", f"{row['document_over_ours_used']:.2f} ×", "")
    for size, row in results.get("allocator", {}).items():
        given_back, kept = (f"{row[name]['system']:.0%}" for name in ("given_back", "kept"))
        yield ("step of `python -m fcos_lite.train`: what it frees is given back to the system / kept, batch 8, "
               f"{size}²; the system's part of the processor's time {given_back} and {kept}",
               f"{row['ratio']:.2f} ×", "")
    for name, words in (("training_step", "training step / bare forward and backward"),
                        ("detect", "`detect` end to end / bare forward")):
        for size, row in results.get(name, {}).items():
            yield f"{words}, {size}²", f"{row['ratio']:.2f} ×", "≤ 1.10 ×"
    for count, row in results.get("targets", {}).items():
        yield (f"target assignment, fraction of the step, batch 4, 512², {count} boxes an image",
               f"{row['share_of_step']:.1%}", "≤ 3 %")
        yield (f"the reference's loop over boxes, eager / ours, {count} boxes",
               f"{row['document_over_ours']:.1f} ×", "")

def data_rows(results):
    for size, row in results.get("data", {}).items():
        yield ("images a second, ready for the step: our records (JPEG, one thread) / the reference's (PNG, two maps, "
               f"prefetch 1), {size}²", f"{row['records_over_reference']:.2f} ×", "")
        yield (f"the same: our records / the JPEG files themselves by `tf.data`, {size}²",
               f"{row['records_over_files']:.2f} ×", "")
        yield (f"time to make a batch of 4 from our records, one thread / time of the training step, {size}²",
               f"{row['share_of_step']:.1%}", "≤ 10 %")
        yield (f"records written a second, one thread: ours (JPEG) / the reference's (PNG), {size}²",
               f"{row['write_over_reference']:.2f} ×", "")

def detection_rows(results):
    if row := results.get("camera"):
        steps = row["milliseconds"]
        yield (f"from camera to screen, {row['image_size']}²: {row['frames_per_second']:.1f} frames a second, "
               f"{row['latency_ms']:.0f} ms late; latency / the steps one by one",
               f"{row['latency_over_work']:.2f} ×", "")
        yield ("latency of a plain loop, which has the driver's queue of four / ours",
               f"{row['plain_latency_ms'] / row['latency_ms']:.1f} ×", "")
        listed = ", ".join(f"{step} {value:.1f}" for step, value in steps.items())
        yield f"of it the network; milliseconds: {listed}", f"{steps['network'] / sum(steps.values()):.0%}", ""
    if "group_norm" in results:
        yield ("Keras' GroupNormalization / ours, forward and backward",
               f"{results['group_norm']['keras_over_ours']:.2f} ×", "")

def export_rows(results):
    for size, batches in results.get("export", {}).items():
        for batch_size, row in batches.items():
            for threads, kinds in row["threads"].items():
                for kind, value in kinds.items():
                    if kind == "keras": continue
                    yield (f"`detect` / {kind}, {size}², batch {batch_size}, {threads} thread{'s' * (threads != '1')}",
                           f"{value['faster']:.2f} ×", "")
    for size, row in results.get("cold", {}).items():
        for kind, value in row.items():
            at = "at the size of its weights" if kind == "keras" else f"{size}²"
            if kind == "keras" and size != min(results["cold"], key=int): continue # the same at every size
            mark = "≤ 4 s" if kind.startswith("litert") else ""
            yield (f"start to first box, {kind}, {at}; peak memory {value['peak_mb']:.0f} MB",
                   f"{value['seconds']:.1f} s", mark)
    if "precision" in results:
        measured = results["precision"]
        for kind, row in measured["rows"].items():
            lost = row["AP"] - measured["rows"]["Keras float32"]["AP"]
            yield (f"AP on {measured['photographs']} photographs, {measured['image_size']}², {kind}: {row['AP']:.4f}; "
                   "against Keras'", f"{lost:+.4f}", "")

def table(results):
    "Return the results as Markdown."
    rows = [("measured side by side in one run", "ratio", "mark"), ("---", "---", "---")]
    for part in (training_rows, data_rows, detection_rows, export_rows): rows += part(results)
    return "\n".join(f"| {what} | {ratio} | {mark} |" for what, ratio, mark in rows)

def measured_with(results):
    "Say which parts a processor with which instructions has measured."
    parts = {}
    for part, vectors in results.get("vectors", {}).items(): parts.setdefault(vectors, []).append(f"`{part}`")
    return "".join(f" Measured with {vectors}: {', '.join(names)}." for vectors, names in parts.items())

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
        row = targets_against_reference(count, step["seconds"], max(3, rounds // 3))
        results["targets"][str(count)] = row
        print(count, row, flush=True)

NAMES = {"tensorflow": "TensorFlow", "jax": "JAX"}
# flag: its key in results.json, and what measures it in processes of its own
APART = {"training": ("training", whole_loop), "data": ("data", data), "detect": ("camera", camera),
         "export": ("export", exports), "cold": ("cold", cold), "allocator": ("allocator", allocator)}
PARTS = ("step", "targets", "norm", *APART)

def write_page(results):
    m = results["machine"]
    (HERE / "README.md").write_text(
        "# Benchmarks\n\n`make bench` measures these again; `python bench/run.py --only training` a part of them. "
        f"Machine: {m['processor']}, {m['cores']} cores, no GPU; TensorFlow {m['tensorflow']}, Keras {m['keras']}."
        f"{measured_with(results)}\n\n{table(results)}\n\n{LEGEND}\n", encoding="utf-8")

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15,
                        help="times that each pair is measured (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS,
                        help="measure these, and keep what results.json has of the others (default: all)")
    parser.add_argument("--rehearse", action="store_true",
                        help="run those that have processes of their own once, on a tiny network; nothing is written")
    options = parser.parse_args()
    if options.rehearse:
        return print(table({key: measure(1, True) for name, (key, measure) in APART.items() if name in options.only}))
    path, results = HERE / "results.json", {}
    if set(options.only) < set(PARTS) and path.exists(): results = json.loads(path.read_text(encoding="utf-8"))
    results["machine"] = machine()
    results.setdefault("vectors", {}).update(dict.fromkeys(options.only, results["machine"]["vectors"]))
    for name, (key, measure) in APART.items():
        if name in options.only: results[key] = measure(options.rounds, False)
    if "step" in options.only: steps_and_detection(results, options.rounds)
    if "targets" in options.only: targets(results, options.rounds)
    if "norm" in options.only: results["group_norm"] = group_norm(options.rounds)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results)
    print(table(results))

LEGEND = """Each part is a run of its own, and not all were made on the same day; only the two things of one row are
comparable. Pairs are measured in turns; a ratio is that of medians, but for *the whole of `fit`*, where few rounds are
possible: there it is that of the best of each.

*The whole of `fit`* reads JPEG files, letterboxes, augments, assigns targets, steps and keeps its metrics, with the
recipe `scratch` and batches of 8 at 256², and of 4 at 512²; *bare* is the network's forward and backward pass on one
batch that is there already. *The reference's loop* (reference_loop.py) is eager, reads its PNG records, loops over the
boxes of each image, prints each step, clips each tensor and has two optimizers; its network is ours. It throws every
ninth micro-batch away: per image that it learns from, it is slower by nine eighths.

*What it frees* (allocator.py): glibc's allocator gives large tensors back to the system and gets them again, page by
page, in the next step; the command tells it to keep them. The bare pass and `fit` above are measured with glibc's
habits, as in a notebook.

*Input* (data.py) is measured alone, through whole epochs, from closed files to batches of 4 with images, boxes and
labels. The photographs are grainy scenes of 640 x 480; the records hold squares of the size that is trained, of JPEG
quality 90 or of PNG; the step is that of the model `reference` with the recipe `scratch`.

*Exports* (export.py) are the shipped detector: from images of 640 x 480 to boxes in their pixels, with the runtime's
own threads set to what is said; `detect` is Keras' on TensorFlow with as many. Each round begins with another format,
and each call after a pause, for a runtime's threads go on turning for a moment. Values above 1 are faster than
`detect`. *`detect` end to end* is from a JPEG file of 640 x 480 to its boxes, by the shipped weights.

*Start to first box* is a process of its own, import included, of the script in examples/ for that format (for Keras:
of `FCOS.from_preset("person").detect`; *by `Exported`*: of the library's class, which imports OpenCV and its readers
too); the peak is what the kernel saw of that process (VmHWM), one image at a time, with the runtime's own number of
threads. *The camera* is a simulated one of 640 x 480 pixels and 30 frames a second; its images are drawn for a screen
of 1280 x 720, and no window is opened.

Two more are not of time: `python bench/precision.py --data DIR --keep` puts the AP of every exported format beside
Keras' into this table, and `python bench/ablations.py`, with `--crowds` for that switch, measures what each difference
of the recipe `scratch` is worth."""

if __name__ == "__main__": main()
