"""`make prepare` runs every chapter; this gives back what a page showed before where only another processor speaks.

Sums come out differently in their last digits on another processor, a short training magnifies that, and times are never the same. So where neither the library nor a chapter's code has changed since the last
commit, an output that differs in digits alone, or a picture that looks the same, stays as it is committed. Whatever else differs is new, and is shown by git. With a revision as argument: against that one, for the chapters whose own code is the same.
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
ALIKE = 8   # mean difference of two pictures' pixels, of 255

def git(*words): return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

def committed(path, revision): # a notebook, or None
    done = git("show", f"{revision}:{path.relative_to(ROOT).as_posix()}")
    return json.loads(done.stdout) if done.returncode == 0 else None

def code(notebook): return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]

def same_but_digits(one, other): # two texts, as strings or lists of lines
    bare = lambda text: re.sub(r"\s+", " ", re.sub(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "0", "".join(text)))
    return bare(one) == bare(other)

def same_to_the_eye(one, other): # two PNGs in base64
    a, b = (cv2.imdecode(np.frombuffer(base64.b64decode("".join(data)), np.uint8), cv2.IMREAD_COLOR) for data in (one, other))
    return a is not None and b is not None and a.shape == b.shape and np.abs(a.astype(int) - b).mean() < ALIKE

def is_text(value): return isinstance(value, str) or isinstance(value, list) and bool(value) and all(isinstance(line, str) for line in value)

def alike(one, other): # two outputs of a cell
    if isinstance(one, dict): return isinstance(other, dict) and one.keys() == other.keys() and all(same_to_the_eye(one[k], other[k]) if k == "image/png" else alike(one[k], other[k]) for k in one)
    if is_text(one): return is_text(other) and same_but_digits(one, other)
    if isinstance(one, list): return isinstance(other, list) and len(one) == len(other) and all(map(alike, one, other))
    return one == other

def settle(path, before):
    "Give a page its committed outputs back, where they are alike."
    now, kept = json.loads(path.read_text(encoding="utf-8")), 0
    earlier = {cell["id"]: cell for cell in before["cells"] if "id" in cell}
    for cell in now["cells"]:
        old = earlier.get(cell.get("id"))
        if cell["cell_type"] != "code" or not old or old.get("source") != cell["source"] or old["outputs"] == cell["outputs"]: continue
        if alike(old["outputs"], cell["outputs"]): cell["outputs"], kept = old["outputs"], kept + 1
    if kept:
        with open(path, "w", encoding="utf-8") as file: file.write(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
    return kept

def main():
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    pages = [(path, before) for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if (before := committed(path, revision))]
    changed = git("diff", "--quiet", "HEAD", "--", "fcos_lite", "weights", "settings.ini").returncode or any(code(json.loads(path.read_text(encoding="utf-8"))) != code(before) for path, before in pages)
    if changed and len(sys.argv) == 1: return
    for path, before in pages:
        if re.search(r"[\"/](results|ablations)\.json", str(code(before))) or code(json.loads(path.read_text(encoding="utf-8"))) != code(before): continue    # pages that show bench/results.json take its figures as they are
        if kept := settle(path, before): print(f"{path.name}: {kept} output{'s' * (kept > 1)} left as committed")

if __name__ == "__main__": main()
