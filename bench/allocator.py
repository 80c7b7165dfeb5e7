"""A step of `python -m fcos_lite.train`, with the C library's allocator as the environment sets it.

run.py sets it to its habits in every other process. Prints one line of JSON."""
import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
from fcos_lite.train import __main__ as train
from fcos_lite.train.memory import keep_freed_memory

class Watch(keras.callbacks.Callback):
    "Notes after each step: the clock, the processor's seconds for us and for the system, page faults."
    def __init__(self):
        super().__init__()
        self.rows = []
    def on_train_batch_end(self, batch, logs=None):
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.rows.append((time.perf_counter(), used.ru_utime, used.ru_stime, used.ru_minflt))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    a = parser.parse_args()
    watch, fit = Watch(), keras.Model.fit
    def watched(self, *arguments, callbacks=(), **named):
        return fit(self, *arguments, callbacks=[*callbacks, watch], **named)
    keras.Model.fit = watched
    keep_freed_memory()     # what the command does first; it does nothing if the environment says otherwise
    flags = f"--image-size {a.image_size} --scenes {8 * a.steps} --batch-size 8 --epochs 1 --evaluate-every 0".split()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train.main([*flags, "--out", f"{folder}/run"])
    pairs = zip(watch.rows[1:], watch.rows[2:])
    seconds, user, system, faults = zip(*([y - x for x, y in zip(before, after)] for before, after in pairs))
    print(json.dumps({"seconds": statistics.median(seconds), "system": sum(system) / (sum(user) + sum(system)),
                      "faults": statistics.median(faults),
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))

if __name__ == "__main__": main()
