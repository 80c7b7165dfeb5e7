"""Exported detectors against Keras' `detect`: seconds from pictures to boxes in the pictures' pixels, side by side; and, each in a process of its own, the time from its start to the first box, and its memory. Prints one line of JSON."""
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
KINDS = (("saved_model", "float32"), ("litert", "float32"), ("litert", "float16"), ("litert", "int8"), ("onnx", "float32"), ("onnx", "int8"))
PEAK = "; import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"      # kilobytes (Linux); what the parent is told of a child counts the parent's own
KERAS = "import sys; from fcos_lite import FCOS; print(FCOS.from_preset(sys.argv[1]).detect(sys.argv[2]))" + PEAK   # at the size of the weights
EXPORTED = "import sys; from fcos_lite.export.runtime import ExportedDetector; print(ExportedDetector(sys.argv[1]).detect(sys.argv[2]))" + PEAK   # what the library itself needs: no Keras, no TensorFlow
EXAMPLE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')" + PEAK

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def in_turns(functions, rounds):
    "The median seconds of each of some functions, called in turns after a first call of each. Every round begins with another one, and each call after a pause: a runtime's threads go on turning for a moment when it is done."
    for function in functions: function()
    seconds = [[] for _ in functions]
    for first in range(rounds):
        for k in range(len(functions)):
            time.sleep(PAUSE)
            this = (first + k) % len(functions)
            seconds[this].append(timed(functions[this]))
    return [statistics.median(column) for column in seconds]

def detector(size, tiny):
    "The shipped detector, or a tiny one, at a size; and the file of its weights."
    from fcos_lite.export.__main__ import load_at
    if not tiny: return load_at("person", size)
    from fcos_lite.detector.model import FCOS
    from training import TINY
    return FCOS(replace(TINY, image_size=size)), None

def write_all(folder, size, batch_size, tiny):
    "Every kind of export, each in a folder of its own."
    from fcos_lite.export.__main__ import export, representative, shrink
    model, weights = detector(size, tiny)
    squares = representative(None, model.config, 8 if tiny else 32, seed=1)
    with contextlib.redirect_stdout(sys.stderr):
        for format, precision in KINDS:
            if precision == "float32": export(model, folder / f"{format}-float32", format, batch_size=batch_size, weights=weights)
            else: shrink(folder / f"{format}-float32", folder / f"{format}-{precision}", precision, squares)

def to_boxes(exported, pictures):
    "What `detect` does, with an exported graph in Keras' place."
    import numpy as np
    from fcos_lite.data.images import Letterbox
    fits = [Letterbox.fit(picture.shape[1], picture.shape[0], exported.page["image_size"]) for picture in pictures]
    found = exported(np.stack([fit.apply(picture, exported.page["pad_value"]) for fit, picture in zip(fits, pictures)]))
    return [fit.boxes_out(found["boxes"][row, :found["count"][row]]) for row, fit in enumerate(fits)]

def side_by_side(folder, size, batch_size, threads, rounds, tiny):
    "Seconds of Keras' `detect` and of every export on the same pictures, and how many times faster each export is."
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    from fcos_lite.export.runtime import ExportedDetector
    from fcos_lite.scenes.scenes import Scenes, World
    model, _ = detector(size, tiny)
    pictures = [scene.read()[80:560] for scene in Scenes(batch_size, 0, World(size=640))]      # 640 x 480
    exports = [ExportedDetector(folder / f"{format}-{precision}", threads) for format, precision in KINDS]
    seconds = in_turns([lambda: model.detect(pictures, batch_size=batch_size), *[lambda e=e: to_boxes(e, pictures) for e in exports]], rounds)
    return {"keras": {"seconds": round(seconds[0], 5)},
            **{f"{format} {precision}": {"seconds": round(value, 5), "faster": round(seconds[0] / value, 3)} for (format, precision), value in zip(KINDS, seconds[1:])}}

def started(command):
    "Seconds from start to end of a process that prints its boxes, and its peak memory in MB."
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode: sys.exit(done.stderr[-2000:])
    return time.perf_counter() - begin, int(done.stdout.split()[-1]) / 1024

def cold(folder, rounds):
    "Start to first box and peak memory of the examples, which import their runtime alone; of the library's `ExportedDetector`; and of Keras."
    import cv2
    from fcos_lite.scenes.scenes import Scenes, World
    picture = folder / "scene.png"
    cv2.imwrite(str(picture), Scenes(1, 0, World(size=640))[0].read()[80:560, :, ::-1])
    commands = {"keras": ["-c", KERAS, "person", picture],
                "litert float32 by `ExportedDetector`": ["-c", EXPORTED, folder / "litert-float32", picture],
                **{f"{format} {precision}": ["-c", EXAMPLE, HERE.parent / "examples" / f"detect_{format}.py", folder / f"{format}-{precision}", picture] for format, precision in KINDS}}
    rows = {}
    for name, command in commands.items():
        runs = [started(command) for _ in range(rounds + 1)][1:]      # the first fills the disk's cache
        rows[name] = {"seconds": round(statistics.median(run[0] for run in runs), 3), "peak_mb": round(max(run[1] for run in runs), 1)}
    return rows

def sizes(folder):
    "Megabytes of every export."
    return {f"{format} {precision}": round(sum(file.stat().st_size for file in (folder / f"{format}-{precision}").rglob("*") if file.is_file()) / 1e6, 2) for format, precision in KINDS}

def in_process(*words):
    "One of the measurements below in a process of its own, for threads are set once."
    done = subprocess.run([sys.executable, HERE / "export.py", *map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode: sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])

def measure(size, batch_size, threads, rounds, tiny):
    "Everything for one size and batch."
    with tempfile.TemporaryDirectory() as folder:
        small, folder = ["--tiny"] if tiny else [], Path(folder)
        write_all(folder, size, batch_size, tiny)
        return {"megabytes": sizes(folder), "threads": {str(n): in_process("--image-size", size, "--batch-size", batch_size, "--threads", n, "--rounds", rounds, "--folder", folder, *small) for n in threads}}

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
    parser.add_argument("--folder", type=Path, help="exports that are there already: only the turns, with the first of --threads")
    a = parser.parse_args()
    if a.folder: return print(json.dumps(side_by_side(a.folder, a.image_size, a.batch_size, a.threads[0], a.rounds, a.tiny)))
    if a.cold: return print(json.dumps(measure_cold(a.image_size, a.rounds, a.tiny)))
    print(json.dumps(measure(a.image_size, a.batch_size, a.threads, a.rounds, a.tiny)))

if __name__ == "__main__": main()
