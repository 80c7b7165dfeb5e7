"""Every chapter and every test; ends with one line that counts them, and says why the skipped were skipped."""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

def chapters():
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith((".", "_")) and ".ipynb_checkpoints" not in p.parts)

def slow_cells(path):
    return len(re.findall(r'"#\| *slow', path.read_text(encoding="utf-8")))

def run_chapters(slow):
    "How many chapters passed, the names of those that failed, and of those with cells left out."
    command = [str(BIN / "nbdev-test"), "--n-workers", "2", "--timing", *(["--flags", "slow"] if slow else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    print(done.stdout, flush=True)
    failed = [p.name for p in chapters() if done.returncode and re.search(rf"\b{re.escape(p.stem)}\b", done.stdout.split("Failed On The Following")[-1])]
    if done.returncode and not failed: failed = ["nbdev-test"]
    left_out = [] if slow else [(p.name, n) for p in chapters() if (n := slow_cells(p))]
    return len(chapters()) - len(failed), failed, left_out

def run_pytest(slow):
    "The counts of pytest, and (test, reason) of the skipped."
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "tests", "-q", "--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder", "--durations=25", f"--junitxml={xml}", *(["--slow"] if slow else [])], cwd=ROOT)
        if not xml.exists(): return 0, 1, []
        cases = list(ElementTree.parse(xml).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [(f"{c.get('classname')}.{c.get('name')}", c.find("skipped").get("message")) for c in cases if c.find("skipped") is not None]
    if done.returncode not in (0, 1): print(f"pytest ended with {done.returncode}, before it had run everything")
    return len(cases) - len(bad) - len(skipped), len(bad) + (done.returncode not in (0, 1)), skipped

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="the long ones too")
    slow = parser.parse_args().slow
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    chapters_passed, chapters_failed, left_out = run_chapters(slow)
    passed, failed, skipped = run_pytest(slow)
    print("\nSkipped:" if skipped or left_out else "")
    for name, reason in skipped: print(f"  {name}: {reason}")
    for name, count in left_out: print(f"  {name}: {count} slow cell(s) (make test-slow runs them)")
    if chapters_failed: print(f"Failed chapters: {', '.join(chapters_failed)}")
    failed += len(chapters_failed)
    print(f"\n{chapters_passed + passed} passed, {failed} failed, {len(skipped) + len(left_out)} skipped")
    sys.exit(bool(failed))

if __name__ == "__main__": main()
