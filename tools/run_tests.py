"""Run every notebook and every test; the last line counts them, and says why the skipped were skipped."""
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

def find_notebooks():
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                  if not path.name.startswith((".", "_")) and ".ipynb_checkpoints" not in path.parts)

def count_slow_cells(path): return len(re.findall(r'"#\| *slow', path.read_text(encoding="utf-8")))

def run_notebooks(slow):
    "Return how many notebooks passed, the names of those that failed, and of those with cells left out."
    command = [str(BIN / "nbdev-test"), "--n-workers", "2", "--timing", *(["--flags", "slow"] if slow else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL)
    print(done.stdout, flush=True)
    notebooks, failed = find_notebooks(), []
    if done.returncode:
        listed = done.stdout.split("Failed On The Following")[-1]
        failed = [path.name for path in notebooks if re.search(rf"\b{re.escape(path.stem)}\b", listed)]
        failed = failed or ["nbdev-test"]
    left_out = [] if slow else [(path.name, count) for path in notebooks if (count := count_slow_cells(path))]
    return len(notebooks) - len(failed), failed, left_out

def run_pytest(slow):
    "Return how many tests passed and failed, and (test, reason) of the skipped."
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-q", "--numprocesses=2", "--dist=loadfile",
                   "--no-loadscope-reorder", "--durations=25", f"--junitxml={xml}", *(["--slow"] if slow else [])]
        done = subprocess.run(command, cwd=ROOT)
        if not xml.exists(): return 0, 1, []
        cases = list(ElementTree.parse(xml).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [(f"{case.get('classname')}.{case.get('name')}", case.find("skipped").get("message"))
               for case in cases if case.find("skipped") is not None]
    incomplete = done.returncode not in (0, 1)
    if incomplete: print(f"pytest ended with {done.returncode}, before it had run everything")
    return len(cases) - len(bad) - len(skipped), len(bad) + incomplete, skipped

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="the slow ones too")
    slow = parser.parse_args().slow
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    notebooks_passed, notebooks_failed, left_out = run_notebooks(slow)
    passed, failed, skipped = run_pytest(slow)
    print("\nSkipped:" if skipped or left_out else "")
    for name, reason in skipped: print(f"  {name}: {reason}")
    for name, count in left_out: print(f"  {name}: {count} slow cell(s) (make test-slow runs them)")
    if notebooks_failed: print(f"Failed notebooks: {', '.join(notebooks_failed)}")
    failed += len(notebooks_failed)
    print(f"\n{notebooks_passed + passed} passed, {failed} failed, {len(skipped) + len(left_out)} skipped")
    sys.exit(bool(failed))

if __name__ == "__main__": main()
