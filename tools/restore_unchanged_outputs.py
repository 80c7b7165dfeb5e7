"""Give notebooks their committed outputs back where only another processor speaks; part of `make prepare`.

Sums differ in their last digits on another processor, a short training magnifies that, and times are never the
same. So where neither the library nor a notebook's code has changed since the last commit, an output that differs in
digits alone, or an image that looks the same, stays as it is committed. Whatever else differs is new, and git shows
it. With a revision as argument: against that one, for the notebooks whose own code is the same.
"""
import base64
import json
import re
import subprocess
import sys
from pathlib import Path
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 8   # mean difference of two images' pixels, of 255

def git(*words): return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

def read_committed(path, revision): # a notebook, or None
    done = git("show", f"{revision}:{path.relative_to(ROOT).as_posix()}")
    return json.loads(done.stdout) if done.returncode == 0 else None

def read(path): return json.loads(path.read_text(encoding="utf-8"))

def code(notebook): return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]

def same_but_digits(one, other): # two texts, as strings or lists of lines
    def without_digits(text):
        return re.sub(r"\s+", " ", re.sub(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "0", "".join(text)))
    return without_digits(one) == without_digits(other)

def decode_png(data): # base64, as a string or a list of lines
    return cv2.imdecode(np.frombuffer(base64.b64decode("".join(data)), np.uint8), cv2.IMREAD_COLOR)

def same_to_the_eye(one, other): # two PNGs in base64
    one, other = decode_png(one), decode_png(other)
    if one is None or other is None or one.shape != other.shape: return False
    return np.abs(one.astype(int) - other).mean() < TOLERANCE

def is_text(value):
    if isinstance(value, list): return bool(value) and all(isinstance(line, str) for line in value)
    return isinstance(value, str)

def alike(one, other, key=None): # two outputs of a cell, or parts of them
    if key == "image/png": return same_to_the_eye(one, other)
    if is_text(one): return is_text(other) and same_but_digits(one, other)
    if type(one) is not type(other): return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key], key) for key in one)
    if isinstance(one, list): return len(one) == len(other) and all(map(alike, one, other))
    return one == other

def restore(path, before): # of a notebook, the committed one -> int
    "Give a notebook its committed outputs back, where they are alike; return of how many cells."
    now, restored = read(path), 0
    committed = {cell["id"]: cell for cell in before["cells"] if "id" in cell}
    for cell in now["cells"]:
        old = committed.get(cell.get("id"))
        if cell["cell_type"] != "code" or not old or old.get("source") != cell["source"]: continue
        if old["outputs"] != cell["outputs"] and alike(old["outputs"], cell["outputs"]):
            cell["outputs"] = old["outputs"]
            restored += 1
    if restored: path.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return restored

def main():
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    notebooks = [(path, before) for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
                 if (before := read_committed(path, revision))]
    unchanged = [(path, before) for path, before in notebooks if code(read(path)) == code(before)]
    library = git("diff", "--quiet", "HEAD", "--", "fcos_lite", "weights", "settings.ini").returncode
    if len(sys.argv) == 1 and (library or len(unchanged) < len(notebooks)): return
    for path, before in unchanged:
        # a notebook that shows a benchmark's results takes its figures as they are
        if re.search(r"[\"/](results|ablations)\.json", str(code(before))): continue
        if restored := restore(path, before): print(f"{path.name}: {restored} output(s) left as committed")

if __name__ == "__main__": main()
