"""Two processes learn what one learns, from the same batches; if one is lost the others end; any number goes on."""
import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
EPOCHS, STEPS = 25, 50
# groups of at least 16 values: a norm over two of them is a sign, and turns rounding into another gradient
RUN = f"""--scenes 8 --batch-size 4 --epochs {EPOCHS} --evaluate-every 0 --checkpoint-seconds 0 --learning-rate 0.0005
 --image-size 64 --min-height 20 --max-height 56 --max-people 4 --empty-share 0 --strides 16 32 --level-areas 1024
 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 2
 --pyramid-channels 16 --pyramid-groups 2 --tower-depth 1 --tower-channels 16 --tower-groups 2
 --gradient-accumulation-steps 2 --noise 0.1 --brightness 0.3 --assign-nearest-if-empty""".split()
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" # for the compiler's time
CACHE = tempfile.TemporaryDirectory()
ENVIRONMENT = {
    **os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]),
    "JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", # compiled once for all
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]

class Command:
    "A training command in a process of its own, with its output in a file."
    def __init__(self, log, *flags, devices=1):
        self.log = open(log, "w+")
        environment = {**ENVIRONMENT, "XLA_FLAGS": f"{CHEAP} --xla_force_host_platform_device_count={devices}"}
        self.process = subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *flags], stdout=self.log,
                                        stderr=self.log, env=environment)

    def output(self): return Path(self.log.name).read_text()
    def end(self, code=0, seconds=600):
        assert self.process.wait(seconds) == code, self.output()[-3000:]
        return self.output()

def several(folder, name, *flags, count=2):
    "Start so many commands that train together."
    coordinator = f"localhost:{free_port()}"
    return [Command(folder / f"{name}-{i}.log", *flags, "--processes", str(count), "--process-id", str(i),
                    "--coordinator", coordinator) for i in range(count)]

def rows(run):
    path = run / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

def wait_for_rows(run, count, commands):
    while len(rows(run)) < count:
        for command in commands: assert command.process.poll() is None, command.output()[-3000:]
        time.sleep(0.02)

def assert_same_losses(run, other):
    "Every loss of every epoch, to a ten-thousandth; and they are worth comparing."
    names = "loss", "cls", "ltrb", "centerness"
    ours, theirs = ([[float(row[name]) for name in names] for row in rows(folder)] for folder in (run, other))
    assert len(ours) == len(theirs) == EPOCHS and rows(run)[-1]["step"] == str(STEPS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    losses = np.array(theirs)[:, 0]
    assert np.ptp(losses) > 0.02 and len(set(losses)) > EPOCHS // 2

@pytest.fixture(scope="module")
def single(tmp_path_factory):
    "The run of one process."
    folder = tmp_path_factory.mktemp("single")
    Command(folder / "log", *RUN, "--out", str(folder / "run")).end()
    return folder / "run"

def kill_one(folder, victim):
    "Kill one of two processes in the middle of the run; return what the other says."
    commands = several(folder, "killed", *RUN, "--out", str(folder / "run"))
    wait_for_rows(folder / "run", 3, commands)
    commands[victim].process.send_signal(signal.SIGKILL)
    assert commands[1 - victim].process.wait(150) != 0
    assert 3 <= len(rows(folder / "run")) < EPOCHS
    return commands[1 - victim].output()

def test_two_processes_one_killed_and_resumed_have_the_losses_of_one(tmp_path, single):
    output = kill_one(tmp_path, victim=1)
    assert "error: process 0 of 2 lost another process" in output and "--resume" in output, output[-2000:]
    first, second = several(tmp_path, "resumed", "--resume", str(tmp_path / "run"))
    assert "going on after step" in first.end()
    line = f"process 1 of 2: process 0 writes the run in {tmp_path / 'run'} on its machine"
    assert line in second.end() and "epoch" not in second.output()
    assert_same_losses(tmp_path / "run", single)

@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, single):
    for command in several(tmp_path, "whole", *RUN, "--out", str(tmp_path / "run")): command.end()
    assert_same_losses(tmp_path / "run", single)

@pytest.mark.slow
def test_process_0_killed_and_one_alone_goes_on(tmp_path, single):
    kill_one(tmp_path, victim=0)
    Command(tmp_path / "alone.log", "--resume", str(tmp_path / "run")).end()
    assert_same_losses(tmp_path / "run", single)

@pytest.mark.slow
def test_several_devices_of_one_process(tmp_path, single):
    Command(tmp_path / "log", *RUN, "--out", str(tmp_path / "run"), devices=2).end()
    assert_same_losses(tmp_path / "run", single)
    odd = Command(tmp_path / "odd", *RUN, "--batch-size", "3", "--out", str(tmp_path / "odd-run"), devices=2).end(2)
    assert "--batch-size 3: 2 devices share it equally" in odd

@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_any_process_stops_all_with_all_saved(tmp_path, single, number):
    commands = several(tmp_path, "stopped", *RUN, "--out", str(tmp_path / "run"))
    wait_for_rows(tmp_path / "run", 3, commands)
    commands[1].process.send_signal(number)
    assert "all saved" in commands[0].end(130)
    commands[1].end(130)
    assert 3 <= len(rows(tmp_path / "run")) < EPOCHS
    for command in several(tmp_path, "resumed", "--resume", str(tmp_path / "run")): command.end()
    assert_same_losses(tmp_path / "run", single)

@pytest.mark.slow
def test_another_run_is_refused(tmp_path):
    coordinator = f"localhost:{free_port()}"
    flags = [*RUN, "--processes", "2", "--coordinator", coordinator, "--out", str(tmp_path / "run")]
    commands = [Command(tmp_path / f"{i}.log", *flags, "--process-id", str(i), "--seed", str(i)) for i in range(2)]
    commands[1].process.wait(300)
    output = commands[1].output()
    assert "was asked for another run than process 0" in output and "run.seed is 0 there" in output
    assert commands[0].process.wait(300) != 0

@pytest.mark.slow
def test_evaluation(tmp_path):
    flags = [flag if flag != str(EPOCHS) else "2" for flag in RUN]
    flags[flags.index("--evaluate-every") + 1] = "1"
    for command in several(tmp_path, "evaluated", *flags, "--out", str(tmp_path / "run")): command.end()
    assert [row["AP"] != "" for row in rows(tmp_path / "run")] == [True, True]
    assert "AP50" in json.loads((tmp_path / "run" / "evaluation.json").read_text())

def test_a_missing_process_ends_the_others(tmp_path):
    code = ("from fcos_lite.train.distributed import ProcessGroup\n"
            f"with ProcessGroup(2, 1, 'localhost:{free_port()}', seconds=3): pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode != 0 and ("could not meet" in done.stderr or "DEADLINE" in done.stderr), done.stderr
