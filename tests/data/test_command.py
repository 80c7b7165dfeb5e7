"""The command for data: a kill at any moment loses nothing and doubles nothing, a full disk leaves no half file, and what is wrong with a folder is named."""
import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
import pytest
from fcos_lite.data import __main__ as data
from fcos_lite.data import tfrecord as shards
from fcos_lite.data.report import folder_lock
from fcos_lite.config import InputError
from fcos_lite.data.coco import Examples, write_coco
from fcos_lite.data.records import RecordConfig, decode_example, read_shard
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.data.tfrecord import ASIDE, load_index, shard_names, verify, write_records
from fcos_lite.data.streams import Records
from test_bad_input import clean, coco, content, entry, message, page, pictures, rewrite   # a COCO folder, and ways to break it

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FLAGS = ["--image-size", "64", "--shard-pictures", "4"]

def write(folder, out, *flags): data.main(["write", "--coco", str(folder), "--out", str(out), "--workers", "1", "--parts", "train2017", *FLAGS, *flags])
def ids(out, part="train2017"): return [decode_example(row, "").image_id for file in sorted(out.glob(f"{part}-*.tfrecord")) for _, row in read_shard(file)]
def contents(out): return {file.name: file.read_bytes() for file in sorted(out.iterdir())}

# --- killed

@pytest.fixture(scope="session")
def many(tmp_path_factory):
    "A folder of 160 pictures, and its records as a run that nobody killed writes them."
    root = tmp_path_factory.mktemp("many")
    write_coco(root / "coco", "train2017", list(Scenes(160, seed=1, world=World(size=64, min_height=16))), ("person",))
    write(root / "coco", root / "records")
    return root

def start(many, out): return subprocess.Popen([sys.executable, "-m", "fcos_lite.data", "write", "--coco", str(many / "coco"), "--out", str(out), "--workers", "2", *FLAGS], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def children(pid): return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]

def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False

def wait(condition, seconds=120):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)

def kill_while_writing(many, out, seed, landed):
    "Kill a run at a random moment, between its beginning and its end; then look."
    rng = random.Random(seed)
    done = lambda: len(list(out.glob("train2017-*.tfrecord"))) if out.exists() else 0
    run, wanted = start(many, out), min(40, done() + rng.randrange(12))
    wait(lambda: run.poll() is not None or done() >= wanted)
    time.sleep(rng.uniform(0, 0.1))
    workers = children(run.pid) if run.poll() is None else []
    run.kill()
    run.communicate()
    landed.append(run.returncode == -signal.SIGKILL)
    wait(lambda: not any(map(alive, workers)), 20)          # nobody goes on writing
    if not (out / "train2017.json").exists(): return
    finished = load_index(out, "train2017")["shards"]
    for name, entry in finished.items(): shards.check_shard(out / name, entry)
    for file in out.glob("train2017-*.tfrecord"): assert file.read_bytes() == (many / "records" / file.name).read_bytes(), "half a file passes for a whole one"

def survive(many, out, kills):
    landed = []
    for seed in range(kills):
        before = {file.name: file.stat().st_mtime_ns for file in out.glob("train2017-*.tfrecord") if file.name in load_index(out, "train2017")["shards"]} if (out / "train2017.json").exists() else {}
        kill_while_writing(many, out, seed, landed)
        assert before.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("train2017-*.tfrecord")}.items(), "what was finished is written again"
        if len(list(out.glob("train2017-*.tfrecord"))) >= 40 and seed < kills - 1: shutil.rmtree(out)
    assert sum(landed) > kills // 2, "most of them came too late"
    run = start(many, out)
    said = run.communicate()[0].decode()
    assert run.returncode == 0, said
    assert contents(out) == contents(many / "records")
    assert ids(out) == list(range(1, 161)), "lost, or twice"

def test_three_kills_lose_nothing_and_double_nothing(many, tmp_path): survive(many, tmp_path / "out", 3)

@pytest.mark.slow
def test_20_kills(many, tmp_path): survive(many, tmp_path / "out", 20)

def test_a_finished_folder_is_confirmed(many, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(many / "records", out)
    stamps = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    run = start(many, out)
    said = run.communicate()[0].decode()
    assert run.returncode == 0 and "160 pictures" in said
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == stamps

def test_two_runs_in_one_folder(many, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out): assert "another process is at work" in message(lambda: write(many / "coco", out))
    write(many / "coco", out)
    assert contents(out) == contents(many / "records")

def test_the_command_starts_without_keras():
    "Each process that writes shards imports it."
    assert subprocess.run([sys.executable, "-c", "import sys, fcos_lite.data; sys.exit('keras' in sys.modules or 'tensorflow' in sys.modules)"], cwd=ROOT, env=ENV).returncode == 0

# --- the disk

@pytest.mark.parametrize("moment", range(1, 4))
def test_a_full_disk_leaves_no_half_file(moment, many, tmp_path, monkeypatch):
    out, calls, sync = tmp_path / "out", [], os.fsync
    def full(handle):
        calls.append(handle)
        if len(calls) == moment: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)
    monkeypatch.setattr(shards.os, "fsync", full)
    said = message(lambda: write(many / "coco", out))
    assert f"train2017-{moment - 1:05d}-of-00040.tfrecord: cannot be written (No space left on device); make room" in said
    assert len(list(out.glob("*.tfrecord"))) == moment - 1 and not list(out.glob(f"{ASIDE}*"))
    write(many / "coco", out)
    assert contents(out) == contents(many / "records")

def test_a_full_disk_at_the_index(many, tmp_path, monkeypatch):
    out, replace, names = tmp_path / "out", os.replace, []
    def full(aside, path):
        names.append(Path(path).name)
        if names.count("train2017.json") == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(aside, path)
    monkeypatch.setattr(shards.os, "replace", full)
    assert "train2017.json: cannot be written" in message(lambda: write(many / "coco", out))
    monkeypatch.undo()
    assert len(load_index(out, "train2017")["shards"]) == 1 and not list(out.glob(f"{ASIDE}*"))
    write(many / "coco", out)
    assert contents(out) == contents(many / "records")

def test_a_folder_that_cannot_be_written(many, tmp_path):
    (tmp_path / "file").touch()
    assert "this is a file" in message(lambda: write(many / "coco", tmp_path / "file"))

# --- pictures

def header_only(width, height):
    "A PNG of so many pixels, of which there is only the header."
    part = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + part(b"IDAT", b"") + part(b"IEND", b"")

BAD = {
    "no bytes": (content(b""), "picture that cannot be read", "the file is empty (0 bytes)"),
    "a web page": (content(b"<html>"), "picture that cannot be read", "not a picture"),
    "cut off": (lambda f: pictures(f)[0].write_bytes(pictures(f)[0].read_bytes()[:-300]), "picture that cannot be read", "000000000001.jpg"),
    "100 megapixels": (content(header_only(20_000, 20_000)), "picture that cannot be read", "more than 100 megapixels"),
    "99 megapixels, and none there": (content(header_only(9_000, 11_000)), "picture", "000000000001.jpg"),
    "missing": (lambda f: pictures(f)[0].unlink(), "picture that is missing", "000000000001.jpg"),
}

@pytest.mark.parametrize("case", BAD)
def test_a_bad_picture_is_skipped_counted_and_reported(case, coco, tmp_path, capsys):
    change, reason, first = BAD[case]
    change(coco)
    out = tmp_path / "out"
    assert "than 1 % is no accident" in message(lambda: write(coco, out))
    write(coco, out, "--max-bad-share", "0.2")
    said = capsys.readouterr().out
    assert f"1 skipped: {reason}" in said and first in said
    assert ids(out) == list(range(2, 9))
    data.main(["verify", str(out)])
    assert f"1 skipped: {reason}" in capsys.readouterr().out, "the index remembers"

@pytest.mark.parametrize("name", ["two people.jpg", "Zwei Leute – 二人.jpg", "a/b c/d.jpg", "..x.jpg", "%s\\ud800.jpg", "-rf.jpg", "'; drop.jpg"])
def test_odd_names_are_names(name, coco, tmp_path):
    target = coco / "train2017" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures(coco)[0].rename(target)
    rewrite(coco, lambda document: document["images"][0].update(file_name=name))
    write(coco, tmp_path / "out")
    assert ids(tmp_path / "out") == list(range(1, 9))

@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "C:\\x.jpg", "..\\secret.jpg", "a\0.jpg"])
def test_names_that_lead_out_are_refused(name, coco, tmp_path):
    shutil.copy(pictures(coco)[0], coco / "secret.jpg")
    entry("images", file_name=name)(coco)
    assert "leads out of" in message(lambda: write(coco, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

def test_a_link_that_leads_out_is_refused_and_one_inside_is_not(coco, tmp_path):
    outside = tmp_path / "secret.jpg"
    shutil.move(pictures(coco)[0], outside)
    (coco / "train2017/000000000001.jpg").symlink_to(outside)
    said = message(lambda: write(coco, tmp_path / "out"))
    assert "000000000001.jpg" in said and not (tmp_path / "out").exists()
    pictures(coco)[0].unlink()
    shutil.move(outside, coco / "elsewhere.jpg")
    (coco / "train2017/000000000001.jpg").symlink_to("../elsewhere.jpg")
    write(coco, tmp_path / "out")
    assert ids(tmp_path / "out") == list(range(1, 9))

def test_duplicate_ids_and_absent_images(coco, tmp_path):
    rewrite(coco, lambda document: document["annotations"][0].update(image_id=404))
    write(coco, tmp_path / "out", "--max-bad-share", "0.2")
    assert load_index(tmp_path / "out", "train2017")["not_read"]["box of a picture that is not listed"][0] == 1
    rewrite(coco, lambda document: document["images"].append(document["images"][0]))
    assert "more than once" in message(lambda: write(coco, tmp_path / "twice"))
    scenes = Examples(list(Scenes(2, seed=0, world=World(size=64))) * 2, ("person",))
    assert "each image id once" in message(lambda: write_records(scenes, "train2017", tmp_path / "three", RecordConfig(image_size=32), workers=1))

def test_a_picture_that_breaks_between_reading_and_writing(coco, tmp_path, monkeypatch):
    "More than the share: it stops, keeps what is finished, and goes on when told that it may."
    read = data.read_dataset
    def breaking(*arguments):
        examples = read(*arguments)
        pictures(coco)[5].write_bytes(b"gone")
        return examples
    intact = pictures(coco)[5].read_bytes()
    monkeypatch.setattr(data, "read_dataset", breaking)
    assert "1 of 8 pictures cannot be used so far" in message(lambda: write(coco, tmp_path / "out"))
    assert ids(tmp_path / "out") == [1, 2, 3, 4, 5, 7, 8]
    pictures(coco)[5].write_bytes(intact)
    write(coco, tmp_path / "out", "--max-bad-share", "0.2")
    assert len(load_index(tmp_path / "out", "train2017")["shards"]) == 2

# --- the words

def test_another_configuration_is_refused(many, tmp_path):
    for flags in (["--format", "png"], ["--quality", "80"], ["--limit", "150"], ["--image-size", "32"], ["--no-enlarge"], ["--only-class", "person"]):
        before = contents(many / "records")
        assert "records of another kind are here" in message(lambda: write(many / "coco", many / "records", *flags))
        assert contents(many / "records") == before

def test_verify_ends_with_1_and_the_names_of_all_damaged_shards(many, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(many / "records", out)
    names = shard_names(load_index(out, "train2017"))
    (out / names[3]).write_bytes((out / names[3]).read_bytes()[:-1])
    (out / names[7]).unlink()
    ended = subprocess.run([sys.executable, "-m", "fcos_lite.data", "verify", str(out)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert ended.returncode == 1 and "160 pictures" in ended.stdout
    assert [name for name in names if name in ended.stdout] == [names[3], names[7]]
    assert subprocess.run([sys.executable, "-m", "fcos_lite.data", "verify", str(many / "records")], cwd=ROOT, env=ENV, capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-m", "fcos_lite.data", "verify", str(tmp_path / "nothing")], cwd=ROOT, env=ENV, capture_output=True).returncode == 2

def test_an_unfinished_folder_is_told_by_verify_and_refused_by_the_reader(many, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(many / "records", out)
    index = json.loads((out / "train2017.json").read_text())
    for name in list(index["shards"])[10:]:
        del index["shards"][name]
        (out / name).unlink()
    (out / "train2017.json").write_text(json.dumps(index))
    assert "30 of 40 shards not written yet" in verify(out)[1][0]
    assert "30 of 40 shards are not written yet" in message(lambda: Records(out, "train2017"))
    write(many / "coco", out)
    assert contents(out) == contents(many / "records")

def test_inspect_names_what_would_stop_the_others(coco, tmp_path, capsys):
    content(b"")(coco)
    data.main(["inspect", str(coco), "--image-size", "64", "--out", str(tmp_path / "page.html"), "--parts", "train2017"])
    said = capsys.readouterr().out
    assert "1 skipped: picture that cannot be read" in said and "boxes never learned" in said
    page = (tmp_path / "page.html").read_text()
    assert "1 skipped" in page and page.count("data:image/png;base64,") == 2 and "<script" not in page

# --- who learns, and who judges

@pytest.mark.parametrize("stratify", [False, True])
def test_held_out_from_the_command(stratify, many, tmp_path):
    out = tmp_path / "out"
    write(many / "coco", out, "--hold-out", "16", *(["--stratify", "--seed", "3"] if stratify else []))
    held, learned = ids(out, "val2017"), ids(out)
    assert sorted(held + learned) == list(range(1, 161)) and len(held) == 16
    assert (held == list(range(1, 17))) != stratify
    people = {picture.image_id: len(picture.labels) for part in ("train2017", "val2017") for picture in Records(out, part)}
    for count in set(people.values()):
        if stratify: assert abs(sum(people[i] == count for i in held) - 0.1 * list(people.values()).count(count)) < 1
    assert "at least 1, and less than the 160" in message(lambda: write(many / "coco", tmp_path / "none", "--hold-out", "160"))
    shutil.copytree(many / "coco", tmp_path / "coco")
    shutil.copytree(tmp_path / "coco/train2017", tmp_path / "coco/val2017")
    shutil.copy(tmp_path / "coco/annotations/instances_train2017.json", tmp_path / "coco/annotations/instances_val2017.json")
    assert "the parts are train2017, val2017; name one" in message(lambda: data.main(["write", "--coco", str(tmp_path / "coco"), "--out", str(tmp_path / "none"), "--hold-out", "9"]))
    assert not (tmp_path / "none").exists()

def test_no_picture_is_in_two_parts_under_whatever_name(coco, tmp_path, capsys):
    "Two files of val2017 lie in train2017, too: one under its own id and name, one under others. They are left out there, told, and no reason to stop."
    before = len(pictures(coco))
    for number, (judge, file) in enumerate(zip(sorted((coco / "val2017").iterdir()), pictures(coco)[2:])):
        if number < 2: shutil.copy(judge, file)
    data.main(["write", "--coco", str(coco), "--out", str(tmp_path / "out"), "--workers", "1", *FLAGS])
    said = capsys.readouterr().out
    assert "2 pictures of train2017 left out: in val2017 too, the first is" in said and "2 skipped: copy of a picture of val2017; first:" in said
    assert ids(tmp_path / "out") == [1, 2, *range(5, before + 1)] and len(ids(tmp_path / "out", "val2017")) == 4
    data.main(["verify", str(tmp_path / "out")])
    assert "2 skipped: copy of a picture of val2017; first:" in capsys.readouterr().out
