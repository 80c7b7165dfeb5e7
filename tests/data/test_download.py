"""A transfer that breaks anywhere, from a server with any habit, ends with the right file or a sentence."""
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from fcos_lite.data import download
from fcos_lite.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

class Server(http.server.BaseHTTPRequestHandler):
    "Shows the habits in `plan`, one a request, and none when the plan is over."
    whole, plan, starts = b"", [], []

    def do_GET(self):
        habit = self.plan.pop(0) if self.plan else "right"
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.starts.append(start)
        whole = self.whole
        if habit == "busy": return self.send_error(503)
        if start >= len(whole): return self.send_error(416)
        first = start
        if habit == "no ranges": first = 0
        if habit == "another range" and start: first = min(start + 7, len(whole) - 1)
        body = bytes(len(whole) - first) if habit == "wrong" else whole[first:]
        self.send_response(200 if habit == "no ranges" else 206)
        if habit != "no ranges": self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        if habit != "no length": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if habit in ("drop", "no length", "no ranges", "slow"): body = body[:len(body) // 2]
        if habit == "mute": body = b""
        try: self.wfile.write(body)
        except OSError: pass
        if habit == "slow": time.sleep(100)

    def log_message(self, *_): pass

@pytest.fixture
def server():
    Server.whole, Server.plan, Server.starts = np.random.default_rng(0).bytes(300_000), [], []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/file"
    running.shutdown()
    running.server_close()

def archive(url): return download._Archive(url, hashlib.sha1(Server.whole).hexdigest(), 1)

def fetch(url, path): return download._fetch(archive(url), path, wait=0)

HABITS = ["right", "drop", "no ranges", "another range", "wrong", "busy", "mute", "no length"]

def test_any_row_of_bad_habits_ends_with_the_right_file_or_a_sentence(server, tmp_path):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(HABITS), max_size=7))
    def transfer(plan):
        for file in tmp_path.iterdir(): file.unlink()
        Server.plan = list(plan)
        try: fetch(server, tmp_path / "file")
        except InputError as error:
            assert not (tmp_path / "file").exists() and server in str(error)
            assert {"wrong", "no length", "busy", "mute", "another range"} & set(plan)
            Server.plan = []
            fetch(server, tmp_path / "file")                            # the next day
        assert (tmp_path / "file").read_bytes() == Server.whole and len(list(tmp_path.iterdir())) == 1

    transfer()

@pytest.mark.parametrize("there", [1, 150_000, 299_999, 300_000])
def test_it_resumes(there, server, tmp_path):
    (tmp_path / ".file.partial").write_bytes(Server.whole[:there])
    fetch(server, tmp_path / "file")
    assert Server.starts == [there] and (tmp_path / "file").read_bytes() == Server.whole

def test_the_rest_of_another_file_is_noticed(server, tmp_path):
    (tmp_path / ".file.partial").write_bytes(b"another file" * 100)
    fetch(server, tmp_path / "file")
    assert Server.starts == [1200, 0] and (tmp_path / "file").read_bytes() == Server.whole

def test_another_file_of_that_name_is_refused(server, tmp_path):
    (tmp_path / "file").write_bytes(b"another file")
    with pytest.raises(InputError, match="its SHA-1 is not .* another file; remove it"):
        fetch(server, tmp_path / "file")

def test_a_wrong_address_is_told_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(InputError, match="the server answers 404 .*; check the address"):
        fetch(server, tmp_path / "file")

def test_missing_room_is_told_before_a_byte_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 500_000))
    with pytest.raises(InputError, match="0.0 GB are free; make room"): fetch(server, tmp_path / "file")
    assert not list(tmp_path.iterdir())

def test_kill_and_again(server, tmp_path):
    "The process is killed while the server dawdles; the next one resumes; only a whole file has the file's name."
    Server.whole = np.random.default_rng(1).bytes(3_000_000)
    Server.plan = ["drop", "slow"]
    code = "import sys, pathlib; from fcos_lite.data.download import _Archive, _fetch; " \
           f"_fetch(_Archive({server!r}, 'x', 1), pathlib.Path(sys.argv[1]), wait=0)"
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    partial, deadline = tmp_path / ".file.partial", time.monotonic() + 60
    def ready(): return len(Server.starts) >= 2 and partial.exists() and partial.stat().st_size >= 1_000_000
    while not ready() and time.monotonic() < deadline: time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (tmp_path / "file").exists()
    there = partial.stat().st_size
    assert there >= 1_000_000
    fetch(server, tmp_path / "file")
    assert Server.starts[-1] == there and (tmp_path / "file").read_bytes() == Server.whole

def test_parts_of_coco_are_downloaded_once(server, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("instances_val2017.json", "captions_val2017.json"): file.writestr(f"annotations/{name}", "{}")
    Server.whole, Server.plan = (tmp_path / "x.zip").read_bytes(), ["drop", "busy"]
    monkeypatch.setitem(download.COCO_2017, "annotations", archive(server))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for _ in range(2): download.download(["annotations"], tmp_path / "coco")
    names = sorted(file.name for file in (tmp_path / "coco").rglob("*"))
    assert names == ["annotations", "captions_val2017.json", "instances_val2017.json"]
    assert "unpacked" in capsys.readouterr().out and len(Server.starts) == 3
