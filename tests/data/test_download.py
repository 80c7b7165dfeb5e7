"""A transfer that breaks off anywhere, from a server with any habit, ends with the right file or a sentence; never with a wrong one."""
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
from fcos_lite.data import __main__ as data
from fcos_lite.data import download
from fcos_lite.config import InputError
from fcos_lite.data.download import Archive, fetch

ROOT = Path(__file__).resolve().parents[1]

class Server(http.server.BaseHTTPRequestHandler):
    "Does what `plan` says, a habit a request, and what is right when the plan is over."
    whole, plan, asked = b"", [], []
    def do_GET(self):
        habit, start = (self.plan.pop(0) if self.plan else "right"), int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.asked.append(start)
        whole = self.whole
        if habit == "busy": return self.send_error(503)
        if start >= len(whole) and start: return self.send_error(416)
        given = 0 if habit == "no ranges" else min(start + 7, len(whole) - 1) if habit == "another range" and start else start
        body = whole[given:]
        if habit == "wrong": body = bytes(len(body))
        self.send_response(206 if given else 200)
        if given: self.send_header("Content-Range", f"bytes {given}-{len(whole) - 1}/{len(whole)}")
        if habit != "no length": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try: self.wfile.write(body[:len(body) // 2] if habit in ("drop", "no length", "no ranges", "slow") else body if habit != "mute" else b"")
        except OSError: pass
        if habit == "slow": time.sleep(100)
    def log_message(self, *_): pass

@pytest.fixture
def server():
    Server.whole, Server.plan, Server.asked = np.random.default_rng(0).bytes(300_000), [], []
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/file"
    found.shutdown()
    found.server_close()

def right(url): return Archive(url, hashlib.sha1(Server.whole).hexdigest(), 1)

HABITS = ["right", "drop", "no ranges", "another range", "wrong", "busy", "mute", "no length"]

def test_any_row_of_bad_habits_ends_with_the_right_file_or_a_sentence(server, tmp_path):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(HABITS), max_size=7))
    def one(plan):
        for file in tmp_path.iterdir(): file.unlink()
        Server.plan = list(plan)
        try: fetch(right(server), tmp_path / "file", wait=0, progress=None)
        except InputError as error:
            assert not (tmp_path / "file").exists() and server in str(error)
            assert {"wrong", "no length", "busy", "mute", "another range"} & set(plan)
            Server.plan = []
            fetch(right(server), tmp_path / "file", wait=0, progress=None)      # the next day
        assert (tmp_path / "file").read_bytes() == Server.whole and len(list(tmp_path.iterdir())) == 1
    one()

@pytest.mark.parametrize("there", [1, 150_000, 299_999, 300_000])
def test_it_goes_on_where_it_stopped(there, server, tmp_path):
    (tmp_path / "partial-file").write_bytes(Server.whole[:there])
    fetch(right(server), tmp_path / "file", wait=0, progress=None)
    assert Server.asked == [there] and (tmp_path / "file").read_bytes() == Server.whole

def test_what_is_there_is_not_what_belongs_there(server, tmp_path):
    "Yesterday's part is of another file: the sum notices, and all of it is fetched anew."
    (tmp_path / "partial-file").write_bytes(b"another file" * 100)
    fetch(right(server), tmp_path / "file", wait=0, progress=None)
    assert Server.asked == [1200, 0] and (tmp_path / "file").read_bytes() == Server.whole

def test_no_room_is_told_before_a_byte_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 500_000))
    with pytest.raises(InputError, match="0.0 GB are free; make room"): fetch(right(server), tmp_path / "file", progress=None)
    assert not list(tmp_path.iterdir())

def test_kill_and_again(server, tmp_path):
    "The process is killed while a server dawdles; the next goes on, and nothing has the file's name before it is whole."
    Server.whole = np.random.default_rng(1).bytes(3_000_000)
    Server.plan = ["drop", "slow"]
    code = f"import sys; from fcos_lite.data.download import *; fetch(Archive({server!r}, 'x', 1), sys.argv[1], wait=0)"
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    partial, begun = tmp_path / "partial-file", time.monotonic()
    while not (len(Server.asked) >= 2 and partial.exists() and partial.stat().st_size >= 1_000_000) and time.monotonic() - begun < 60: time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (tmp_path / "file").exists()
    there = partial.stat().st_size
    assert there >= 1_000_000
    fetch(right(server), tmp_path / "file", wait=0, progress=None)
    assert Server.asked[-1] == there and (tmp_path / "file").read_bytes() == Server.whole

def test_the_command(server, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("instances_val2017.json", "captions_val2017.json"): archive.writestr(f"annotations/{name}", "{}")
    Server.whole, Server.plan = (tmp_path / "x.zip").read_bytes(), ["drop", "busy"]
    monkeypatch.setitem(download.COCO_2017, "annotations", right(server))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for _ in range(2): data.main(["download", "--out", str(tmp_path / "coco"), "--parts", "annotations"])
    assert sorted(file.name for file in (tmp_path / "coco").rglob("*")) == ["annotations", "captions_val2017.json", "instances_val2017.json"]
    assert "unpacked" in capsys.readouterr().out and len(Server.asked) == 3
