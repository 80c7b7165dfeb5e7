"""The command for data: what is wrong with a folder is named, and no image is learned from and measured on."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from fcos_lite.data import __main__ as data
from fcos_lite.data.coco import write_coco
from fcos_lite.data.tfrecord import Records
from fcos_lite.scenes.scenes import Scenes, World
from .folders import content, image, message

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

def command(*words): return [sys.executable, "-m", "fcos_lite.data", *map(str, words)]

def write(folder, out, *flags):
    data.main(["write", "--data", str(folder), "--out", str(out), "--workers", "1", "--image-size", "64", *flags])

def ids(out, split="train2017"): return [example.image_id for example in Records(out, split)]

@pytest.fixture(scope="session")
def forty(tmp_path_factory):
    "A folder of 40 images with different numbers of boxes."
    folder = tmp_path_factory.mktemp("forty")
    write_coco(folder, "train2017", list(Scenes(40, seed=1, world=World(size=64, min_height=16))), ("person",))
    return folder

def test_a_bad_image_stops_it_unless_that_is_allowed(coco, tmp_path, capsys):
    content(b"")(coco)
    out = tmp_path / "out"
    assert "1 of 8 images cannot be used (12.5 %, limit 1 %)" in message(lambda: write(coco, out))
    assert not out.exists()
    write(coco, out, "--max-bad-share", "0.2")
    printed = capsys.readouterr().out
    assert "1 skipped: image that cannot be read" in printed and "the file is empty (0 bytes)" in printed
    assert ids(out) == list(range(2, 9))
    data.main(["verify", str(out)])
    assert "1 skipped: image that cannot be read" in capsys.readouterr().out, "the index remembers"

def test_verify_and_wrong_flags_end_with_their_codes(coco, tmp_path):
    write(coco, tmp_path / "out", "--split", "train2017")
    next((tmp_path / "out").glob("*.tfrecord")).write_bytes(b"damaged")
    for words, code, said in ((["verify", tmp_path / "out"], 1, "train2017-00000"),
                              (["verify", tmp_path / "nothing"], 2, "error: "),
                              (["write", "--data", coco], 2, "--out")):
        ended = subprocess.run(command(*words), cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert ended.returncode == code and said in ended.stdout + ended.stderr and "Traceback" not in ended.stderr

@pytest.mark.parametrize("stratify", [False, True])
def test_held_out_from_the_command(stratify, forty, tmp_path):
    out = tmp_path / "out"
    write(forty, out, "--hold-out", "8", *(["--stratify", "--seed", "3"] if stratify else []))
    held, trained = ids(out, "val2017"), ids(out)
    assert sorted(held + trained) == list(range(1, 41)) and len(held) == 8
    assert (held == list(range(1, 9))) != stratify
    if stratify:
        boxes = {example.image_id: len(example.labels) for split in ("train2017", "val2017") for example in Records(out, split)}
        for count in set(boxes.values()):
            drawn, due = sum(boxes[i] == count for i in held), list(boxes.values()).count(count) / 5
            assert abs(drawn - due) < 1

def test_what_cannot_be_held_out_is_refused(forty, coco, tmp_path):
    out = tmp_path / "out"
    assert "at least 1, and less than the 40" in message(lambda: write(forty, out, "--hold-out", "40"))
    assert "the splits are train2017, val2017; name one" in message(lambda: write(coco, out, "--hold-out", "3"))
    assert "give at least 1" in message(lambda: data.main(f"write --data {coco} --out {out} --workers 0".split()))
    assert not out.exists()

def test_no_image_is_in_two_splits_under_whatever_name(coco, tmp_path, capsys):
    "Two files of val2017 are in train2017, too. They are left out there, told, and no reason to stop."
    for number in (0, 1): shutil.copy(image(coco / "val2017", number), image(coco / "train2017", number + 2))
    write(coco, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "2 images of train2017 left out: in val2017 too, the first is" in printed
    assert "2 skipped: copy of an image of val2017; first:" in printed
    assert ids(tmp_path / "out") == [1, 2, 5, 6, 7, 8] and len(ids(tmp_path / "out", "val2017")) == 4
    data.main(["verify", str(tmp_path / "out")])
    assert "2 skipped: copy of an image of val2017; first:" in capsys.readouterr().out

def test_only_some_classes_and_some_images_without_a_box(layouts, tmp_path, capsys):
    write(layouts / "COCO", tmp_path / "out", "--split", "train", "--only-class", "dog", "--negative-share", "0.2")
    assert "chosen: with dog, and 20 % without a box" in capsys.readouterr().out
    records = Records(tmp_path / "out", "train")
    assert records.class_names == ("dog",)
    assert sum(not len(example.boxes) for example in records) == round(len(records) * 0.2)

def test_inspect_names_what_would_stop_the_others(coco, tmp_path, capsys):
    content(b"")(coco)
    page = tmp_path / "page.html"
    words = ["inspect", "--data", str(coco), "--image-size", "64", "--out", str(page), "--split", "train2017"]
    data.main(words)
    printed = capsys.readouterr().out
    assert "1 skipped: image that cannot be read" in printed
    html = page.read_text()
    assert "1 skipped" in html and "data:image/png;base64," in html and "<script" not in html
    assert "add --force" in message(lambda: data.main(words))
    assert "must be a multiple of 32" in message(lambda: data.main(["inspect", "--data", str(coco), "--image-size", "60"]))

def test_pack_makes_datasets_of_each_split(coco, tmp_path, capsys):
    out = tmp_path / "out"
    data.main(["pack", "--data", str(coco), "--out", str(out), "--image-size", "32"])
    assert sorted(path.name for path in out.iterdir()) == ["train2017-000", "val2017-000"]
    assert "train2017-000: 0.0 MB, 8 images" in capsys.readouterr().out
