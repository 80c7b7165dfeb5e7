"""Two processes learn what one learns, from the same batches; one that dies ends the others with a message; and from the folder go on as many as there are."""
import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from fcos_lite.train import team as team_module
from fcos_lite.config import InputError
from fcos_lite.train.meeting import asked, gather, report_to
from fcos_lite.train.team import Team, Watch

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
EPOCHS, STEPS = 25, 50
RUN = f"""--scenes 8 --batch-size 4 --epochs {EPOCHS} --evaluate-every 0 --checkpoint-seconds 0 --learning-rate 0.0005 --image-size 64 --min-height 20 --max-height 56 --max-people 4 --empty-share 0 --strides 16 32 --level-areas 1024
 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 2 --pyramid-channels 16 --pyramid-groups 2 --tower-depth 1 --tower-channels 16 --tower-groups 2
 --gradient-accumulation-steps 2 --noise 0.1 --brightness 0.3 --assign-nearest-if-empty""".split()
# Groups of at least 16 numbers: a norm over two of them is a sign, and turns what rounding leaves into another gradient
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"   # for the compiler's time
CACHE = tempfile.TemporaryDirectory()
COMPILED = {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}   # once for all lives

def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]

class Life:
    "A command of its own, which writes what it says into a file."
    def __init__(self, log, *flags, devices=1):
        self.log = open(log, "w+")
        environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1]), **COMPILED, "XLA_FLAGS": f"{CHEAP} --xla_force_host_platform_device_count={devices}"}
        self.process = subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *flags], stdout=self.log, stderr=self.log, env=environment)

    def said(self): return Path(self.log.name).read_text()
    def ends(self, code, seconds=600):
        assert self.process.wait(seconds) == code, self.said()[-3000:]
        return self.said()

def several(folder, name, *flags, count=2):
    "So many commands that meet."
    where = f"localhost:{free_port()}"
    return [Life(folder / f"{name}-{i}.log", *flags, "--processes", str(count), "--process-id", str(i), "--coordinator", where) for i in range(count)]

def rows(run):
    path = run / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

def wait_for_rows(run, count, lives):
    while len(rows(run)) < count:
        assert all(life.process.poll() is None for life in lives), "\n".join(life.said()[-2000:] for life in lives)
        time.sleep(0.02)

PARTS = ("loss", "cls", "reg", "ctr")

def assert_same_losses(run, other):
    "Every loss of every epoch, to a ten-thousandth; and they are worth comparing."
    ours, theirs = ([[float(row[name]) for name in PARTS] for row in rows(each)] for each in (run, other))
    assert len(ours) == len(theirs) == EPOCHS and rows(run)[-1]["step"] == str(STEPS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    losses = np.array(theirs)[:, 0]
    assert np.ptp(losses) > 0.02 and len(set(losses)) > EPOCHS // 2

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The run of one process."
    folder = tmp_path_factory.mktemp("one")
    Life(folder / "log", *RUN, "--out", str(folder / "run")).ends(0)
    return folder / "run"

def killed(folder, victim):
    "A run of two processes of which one is really killed; what the other says, and after how many seconds."
    lives = several(folder, "killed", *RUN, "--out", str(folder / "run"))
    wait_for_rows(folder / "run", 3, lives)
    lives[victim].process.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    lives[1 - victim].process.wait(120)
    assert lives[1 - victim].process.returncode != 0
    time.sleep(1)                                # who has no time to speak has a child that does
    assert 3 <= len(rows(folder / "run")) < EPOCHS
    return lives[1 - victim].said(), time.monotonic() - begun

@needs_jax
def test_two_processes_one_killed_and_resumed_have_the_losses_of_one(tmp_path, one):
    said, seconds = killed(tmp_path, victim=1)
    assert f"error: process 0 of 2 stops, for process 1 has given no sign of life" in said and f"--resume {tmp_path / 'run'}" in said, said[-2000:]
    assert seconds < 60
    first, second = several(tmp_path, "resumed", "--resume", str(tmp_path / "run"))
    assert "going on after step" in first.ends(0) and "process 1 of 2: the run is in" in second.ends(0)
    assert_same_losses(tmp_path / "run", one)

@needs_jax
@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, one):
    for life in several(tmp_path, "whole", *RUN, "--out", str(tmp_path / "run")): life.ends(0)
    assert_same_losses(tmp_path / "run", one)

@needs_jax
@pytest.mark.slow
def test_process_0_killed_and_one_alone_goes_on(tmp_path, one):
    said, seconds = killed(tmp_path, victim=0)
    assert "process 0" in said and f"--resume {tmp_path / 'run'}" in said and seconds < 60, said[-2000:]
    Life(tmp_path / "alone.log", "--resume", str(tmp_path / "run")).ends(0)
    assert_same_losses(tmp_path / "run", one)

@needs_jax
@pytest.mark.slow
def test_several_devices_of_one_process(tmp_path, one):
    Life(tmp_path / "log", *RUN, "--out", str(tmp_path / "run"), devices=2).ends(0)
    assert_same_losses(tmp_path / "run", one)
    said = Life(tmp_path / "odd", *RUN, "--batch-size", "3", "--out", str(tmp_path / "odd-run"), devices=2).ends(2)
    assert "--batch-size 3: 2 devices in 1 process(es)" in said

@needs_jax
@pytest.mark.slow
def test_ctrl_c_in_any_process_stops_all_with_all_saved(tmp_path, one):
    lives = several(tmp_path, "stopped", *RUN, "--out", str(tmp_path / "run"))
    wait_for_rows(tmp_path / "run", 3, lives)
    lives[1].process.send_signal(signal.SIGINT)
    assert "all saved" in lives[0].ends(130) and "process 0 has ended: it was asked to stop" in lives[1].ends(130)
    for life in several(tmp_path, "resumed", "--resume", str(tmp_path / "run")): life.ends(0)
    assert_same_losses(tmp_path / "run", one)

@needs_jax
@pytest.mark.slow
def test_evaluation_of_process_0_while_the_other_waits(tmp_path):
    flags = [flag if flag != str(EPOCHS) else "2" for flag in RUN]
    flags[flags.index("--evaluate-every") + 1] = "1"
    for life in several(tmp_path, "life", *flags, "--out", str(tmp_path / "run")): life.ends(0)
    assert [row["AP"] != "" for row in rows(tmp_path / "run")] == [True, True] and "AP50" in json.loads((tmp_path / "run" / "evaluation.json").read_text())

# What can be asked without a second process

@pytest.fixture
def on_jax(monkeypatch): monkeypatch.setattr(team_module.keras.backend, "backend", lambda: "jax")

@pytest.mark.parametrize("count, number, coordinator, says", [
    (0, None, None, "give at least 1"), (2, 2, "here:1", "from 0 to 1"), (2, -1, "here:1", "from 0 to 1"), (1, 1, None, "from 0 to 0"), (2, None, "here:1", "give --process-id|with --process-id"),
    (2, 0, None, "HOST:PORT"), (2, 0, "here", "HOST:PORT"), (2, 0, "here:port", "HOST:PORT"), (2, 0, ":7474", "HOST:PORT"), (2, 0, "here:70000", "HOST:PORT")])
def test_bad_flags(on_jax, count, number, coordinator, says):
    with pytest.raises(InputError, match=says): asked(count, number, coordinator)

def test_several_processes_need_jax(monkeypatch):
    monkeypatch.setattr(team_module.keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(InputError, match="on the JAX backend, and this is tensorflow; put KERAS_BACKEND=jax"): Team(2, 0, "localhost:7474")
    Team(1)

def test_a_batch_that_does_not_split():
    team = Team()
    team.count = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team_module.keras.backend, "backend", lambda: "tensorflow")
        with pytest.raises(InputError, match="--batch-size 5: 2 devices.*give 4"): team.share_of(5)
        assert team.share_of(6) == (0, 2)

def test_nobody_there():
    with pytest.raises(InputError, match="nobody has answered for 0.5 s.*is process 0 started there"): report_to("localhost", free_port(), 2, 1, seconds=0.5)
    with pytest.raises(InputError, match="nobody has answered"): report_to("no-such-host.invalid", 7474, 2, 1, seconds=0.5)

@needs_jax
def test_one_does_not_come():
    with pytest.raises(InputError, match="waited 0.5 s, and process 1, 2 did not come"): gather(3, free_port(), seconds=0.5)

def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="cannot be used here.*choose another"): gather(2, taken.getsockname()[1], seconds=0.5)

def meeting(count, *who):
    "What each of those who report says, and what process 0 says."
    port, said = free_port(), {}
    def run(name, task):
        try: said[name] = task()
        except InputError as error: said[name] = str(error)
    threads = [threading.Thread(target=run, args=(0, lambda: gather(count, port, 3)))]
    threads += [threading.Thread(target=run, args=(f"{i}-{n}", lambda i=i, n=n: report_to("localhost", port, n, i, 3))) for i, n in who]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads: thread.join()
    return said

@needs_jax
def test_a_meeting():
    assert meeting(3, (2, 3), (1, 3)) == {0: None, "2-3": None, "1-3": None}
    assert all("process 1 does not fit process 0: processes 3 there and 2 here" in words for words in meeting(2, (1, 3)).values())
    said = meeting(3, (1, 3), (1, 3))
    assert "--process-id 1: came twice" in said[0]

@needs_jax
def test_a_stranger_at_the_port_is_not_counted():
    port = free_port()
    def stranger():
        time.sleep(0.2)
        with socket.create_connection(("localhost", port)) as line: line.sendall(b"GET / HTTP/1.1\r\n")
    threading.Thread(target=stranger).start()
    with pytest.raises(InputError, match="process 1 did not come"): gather(2, port, seconds=1)

def test_the_watch_says_who_is_gone():
    store, said = {}, []
    def try_get(key):
        if key not in store: raise RuntimeError("NOT_FOUND")
        return store[key]
    watch = Watch(SimpleNamespace(key_value_try_get=try_get), 3, 0, lambda words, code: said.append((words, code)))
    store["alive/1"], store["alive/2"] = "1", "1"
    for now in (0, 15, 30):
        store["alive/1"] = str(now)                                          # 1 goes on, 2 has stopped
        for other in (1, 2): watch.look(other, now)
    assert len(said) == 1 and said[0][0].startswith("process 2 has given no sign of life") and said[0][1] == 2
    store["left/1"] = json.dumps({"words": "the disk is full", "code": 2})
    watch.look(1, 31)
    assert said[1] == ("process 1 has ended: the disk is full", 2) and not watch.wished
    store["wish/1"] = "stop"
    watch.look(1, 32)
    assert watch.wished
