"""Exported detectors against Keras' `detect`: seconds from images to boxes in the images' pixels, side by side.

Also, each in a process of its own, the time from its start to the first box, and its memory. Prints one line of JSON.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = Path(__file__).resolve().parent
PAUSE = 0.05    # seconds
KINDS = (("saved_model", "float32"), ("litert", "float32"), ("litert", "float16"), ("litert", "int8"),
         ("onnx", "float32"), ("onnx", "int8"))
# kilobytes (Linux); what the parent is told of a child counts the parent's own
PEAK = "; import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
# at the size of the weights
KERAS = "import sys; from fcos_lite import FCOS; print(FCOS.from_preset(sys.argv[1]).detect(sys.argv[2]))" + PEAK
# what the library itself needs: no Keras, no TensorFlow
EXPORTED = ("import sys; from fcos_lite.export.runtime import ExportedDetector; "
            "print(ExportedDetector(sys.argv[1]).detect(sys.argv[2]))" + PEAK)
EXAMPLE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')" + PEAK

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def in_turns(functions, rounds):
    """The median seconds of each of some functions, called in turns after a first call of each.

    Every round begins with another one, and each call after a pause: a runtime's threads go on for a moment."""
    for function in functions: function()
    seconds = [[] for _ in functions]
    for first in range(rounds):
        for k in range(len(functions)):
            time.sleep(PAUSE)
            turn = (first + k) % len(functions)
            seconds[turn].append(timed(functions[turn]))
    return [statistics.median(column) for column in seconds]

def load(size, tiny):
    "The shipped detector, or a tiny one, at a size; and the file of its weights."
    if tiny:
        from fcos_lite.detector.model import FCOS
        from training import TINY
        return FCOS(replace(TINY, image_size=size)), None
    from fcos_lite.detector.weights import find_weights
    from fcos_lite.export.__main__ import load_at_size
    return load_at_size("person", size), find_weights("person")

def write_all(folder, size, batch_size, tiny):
    "Every kind of export, each in a folder of its own."
    from fcos_lite.export.__main__ import calibration_batch
    from fcos_lite.export.writer import export_detector, reduce_precision
    model, weights = load(size, tiny)
    images = calibration_batch((), model.config, 8 if tiny else 32, seed=1)
    with contextlib.redirect_stdout(sys.stderr):
        for format, precision in KINDS:
            exact, out = folder / f"{format}-float32", folder / f"{format}-{precision}"
            if precision == "float32":
                export_detector(model, out, format=format, batch_size=batch_size, weights=weights)
            else: reduce_precision(exact, out, precision, images)

def detect_batch(exported, images):
    "What `detect` does, with an exported graph in Keras' place."
    import numpy as np
    from fcos_lite.data.letterbox import Letterbox
    size, pad_value = exported.manifest["image_size"], exported.manifest["pad_value"]
    letterboxes = [Letterbox.fit(image.shape[1], image.shape[0], size) for image in images]
    batch = np.stack([letterbox.apply(image, pad_value) for letterbox, image in zip(letterboxes, images)])
    outputs = exported(batch)
    return [letterbox.boxes_out(boxes[:count])
            for letterbox, boxes, count in zip(letterboxes, outputs["boxes"], outputs["count"])]

def side_by_side(folder, size, batch_size, threads, rounds, tiny):
    "Seconds of Keras' `detect` and of every export on the same images, and how many times faster each export is."
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    from fcos_lite.export.runtime import ExportedDetector
    from fcos_lite.scenes.scenes import Scenes, World
    model, _ = load(size, tiny)
    images = [scene.read()[80:560] for scene in Scenes(batch_size, 0, World(size=640))]      # 640 x 480
    exports = [ExportedDetector(folder / f"{format}-{precision}", threads) for format, precision in KINDS]
    functions = [lambda exported=exported: detect_batch(exported, images) for exported in exports]
    keras, *seconds = in_turns([lambda: model.detect(images, batch_size=batch_size), *functions], rounds)
    rows = {f"{format} {precision}": {"seconds": round(value, 5), "faster": round(keras / value, 3)}
            for (format, precision), value in zip(KINDS, seconds)}
    return {"keras": {"seconds": round(keras, 5)}, **rows}

def run_python(command): # text on stdout
    "Run Python in a process of its own; where it fails, end with what it wrote on stderr."
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode: sys.exit(done.stderr[-3000:])
    return done.stdout

def started(command):
    "Seconds from start to end of a process that prints its boxes, and its peak memory in MB."
    begin = time.perf_counter()
    output = run_python(command)
    return time.perf_counter() - begin, int(output.split()[-1]) / 1024

def cold(folder, rounds):
    "Start to first box and peak memory of the examples, of the library's `ExportedDetector`, and of Keras."
    import cv2
    from fcos_lite.scenes.scenes import Scenes, World
    image = folder / "scene.png"
    cv2.imwrite(str(image), Scenes(1, 0, World(size=640))[0].read()[80:560, :, ::-1])
    commands = {"keras": ["-c", KERAS, "person", image],
                "litert float32 by `ExportedDetector`": ["-c", EXPORTED, folder / "litert-float32", image]}
    for format, precision in KINDS:
        script = HERE.parent / "examples" / f"detect_{format}.py"
        commands[f"{format} {precision}"] = ["-c", EXAMPLE, script, folder / f"{format}-{precision}", image]
    rows = {}
    for name, command in commands.items():
        runs = [started(command) for _ in range(rounds + 1)][1:]      # the first fills the disk's cache
        rows[name] = {"seconds": round(statistics.median(run[0] for run in runs), 3),
                      "peak_mb": round(max(run[1] for run in runs), 1)}
    return rows

def megabytes(folder):
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 2)

def measure(size, batch_size, threads, rounds, tiny):
    "Everything for one size and batch, each number of threads in a process of its own, for they are set once."
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), size, batch_size, tiny)
        words = ["--image-size", size, "--batch-size", batch_size, "--rounds", rounds, "--folder", folder]
        if tiny: words.append("--tiny")
        rows = {str(count): json.loads(run_python([HERE / "export.py", *words, "--threads", count]).splitlines()[-1])
                for count in threads}
        sizes = {f"{format} {precision}": megabytes(Path(folder) / f"{format}-{precision}")
                 for format, precision in KINDS}
        return {"megabytes": sizes, "threads": rows}

def measure_cold(size, rounds, tiny):
    "Starts and memory alone."
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), size, 1, tiny)
        return cold(Path(folder), min(rounds, 3))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="measured each by itself (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every measurement (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    parser.add_argument("--cold", action="store_true", help="only from a start to the first box")
    parser.add_argument("--folder", type=Path, help="exports that are there already: only the turns")
    a = parser.parse_args()
    if a.folder: row = side_by_side(a.folder, a.image_size, a.batch_size, a.threads[0], a.rounds, a.tiny)
    elif a.cold: row = measure_cold(a.image_size, a.rounds, a.tiny)
    else: row = measure(a.image_size, a.batch_size, a.threads, a.rounds, a.tiny)
    print(json.dumps(row))

if __name__ == "__main__": main()
