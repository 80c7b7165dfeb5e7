"""What a user hands over is checked where it enters: each case stops with a sentence that names the file, the field and the remedy, or is skipped, counted and reported."""
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fcos_lite.train import datasets
from fcos_lite.detect import __main__ as detect
from fcos_lite.evaluate import evaluator as evaluate
from fcos_lite.data import shards as packs
from fcos_lite.train import __main__ as train
from fcos_lite.data.batches import Batches
from fcos_lite.config import SCRATCH_RECIPE, InputError, ModelConfig
from fcos_lite.data.coco import read_coco, write_coco
from fcos_lite.detector.model import FCOS
from fcos_lite.scenes.scenes import Scenes, World

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(size=64, min_height=16, max_height=50, max_people=4, empty_share=0)
SMALL = dict(backbone_filters=(16, 16, 16, 16), backbone_groups=8, stem_filters=16, stem_groups=8, pyramid_channels=16, pyramid_groups=8, tower_depth=1, tower_channels=16, tower_groups=8, image_size=64)
FLAGS = [part for name, value in SMALL.items() for part in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))]

@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    "A COCO folder with nothing wrong in it: 8 pictures to learn from, 4 to validate on."
    folder = tmp_path_factory.mktemp("clean")
    scenes = list(Scenes(12, seed=0, world=WORLD))
    write_coco(folder, "train2017", scenes[:8], WORLD.class_names)
    write_coco(folder, "val2017", scenes[8:], WORLD.class_names)
    return folder

@pytest.fixture
def coco(clean, tmp_path):
    "A copy of it, to be broken."
    folder = tmp_path / "coco"
    for file in clean.rglob("*.*"):
        copy = folder / file.relative_to(clean)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder

def page(folder): return folder / "annotations" / "instances_train2017.json"
def pictures(folder): return sorted((folder / "train2017").iterdir())

def rewrite(folder, change):
    "Let `change` alter the document."
    document = json.loads(page(folder).read_text())
    change(document)
    page(folder).write_text(json.dumps(document))

def entry(key, **fields):
    "A change of the first entry of a list; a field of None goes."
    def change(document):
        document[key][0].update(fields)
        for name in [name for name, value in fields.items() if value is None]: del document[key][0][name]
    return lambda folder: rewrite(folder, change)

def bbox(*numbers): return entry("annotations", bbox=list(numbers))
def content(data): return lambda folder: pictures(folder)[0].write_bytes(data)
def cut(folder): pictures(folder)[0].write_bytes(pictures(folder)[0].read_bytes()[:-200])
def resized(width, height): return lambda folder: Image.open(pictures(folder)[0]).resize((width, height)).save(pictures(folder)[0], "JPEG")
def empty(folder):
    for file in pictures(folder): file.unlink()
def bare(folder):
    for file in sorted(folder.rglob("*"), reverse=True): file.rmdir() if file.is_dir() else file.unlink()

# name: (how the folder is broken, what the message must log)
STOPS = {
    "folder missing":          (lambda f: f.rename(f.with_name("gone")), ["coco: no such folder", "in the layout of COCO, YOLO or Pascal VOC"]),
    "folder empty":            (bare, ["coco: no layout that is known", "annotations/*.json", "this folder has nothing"]),
    "no pictures in it":       (empty, ["instances_train2017.json", "not one of its pictures", "train2017; put them there", "8 skipped: picture that is missing"]),
    "no annotations":          (lambda f: page(f).unlink(), ["instances_train2017.json: no such file", "annotations/instances_PART.json"]),
    "not JSON":                (lambda f: page(f).write_text('{"images": ['), ["instances_train2017.json: not JSON", "again"]),
    "not text":                (lambda f: page(f).write_bytes(bytes(range(256))), ["instances_train2017.json: not JSON"]),
    "nested too deep":         (lambda f: page(f).write_text("[" * 200_000), ["instances_train2017.json: not JSON"]),
    "a number too long":       (lambda f: page(f).write_text('{"images": ' + "9" * 10_000 + "}"), ["instances_train2017.json: not JSON"]),
    "a list outermost":        (lambda f: page(f).write_text("[]"), ["instances_train2017.json", "outermost", "COCO instances file"]),
    "no list of categories":   (lambda f: rewrite(f, lambda d: d.pop("categories")), ["instances_train2017.json", "'categories' is missing"]),
    "images is an object":     (lambda f: rewrite(f, lambda d: d.update(images={})), ["instances_train2017.json", "'images' is missing"]),
    "an image is a number":    (lambda f: rewrite(f, lambda d: d.update(images=[3])), ["images[0] lacks id, file_name, width, height"]),
    "no file_name":            (entry("images", file_name=None), ["instances_train2017.json", "images[0] lacks file_name"]),
    "no bbox":                 (entry("annotations", bbox=None), ["annotations[0] lacks bbox"]),
    "no category_id":          (entry("annotations", category_id=None), ["annotations[0] lacks category_id"]),
    "width is a string":       (entry("images", width="64"), ["images[0].width is '64'", "must be a number above 0"]),
    "width is NaN":            (entry("images", width=float("nan")), ["images[0].width is nan", "above 0"]),
    "height is 0":             (entry("images", height=0), ["images[0].height is 0", "above 0"]),
    "width is huge":           (entry("images", width=10 ** 400), ["images[0].width is 1000", "above 0"]),
    "id is huge":              (entry("images", id=2 ** 63), ["images[0].id is 9223372036854775808", "whole number"]),
    "id is nested":            (entry("images", id=[[1]]), ["images[0].id is [[1]]", "whole number"]),
    "image_id is a string":    (entry("annotations", image_id="1"), ["annotations[0].image_id is '1'", "whole number"]),
    "category_id is nested":   (entry("annotations", category_id={"a": []}), ["annotations[0].category_id is {'a': []}"]),
    "name is a number":        (entry("categories", name=7), ["categories[0].name is 7", "must be a text"]),
    "image id twice":          (lambda f: rewrite(f, lambda d: d["images"].append(d["images"][0])), ["images has the id [1] more than once", "its own"]),
    "category id twice":       (lambda f: rewrite(f, lambda d: d["categories"].append(d["categories"][0])), ["categories has the id [1] more than once"]),
    "name leads upwards":      (entry("images", file_name="../../secret.jpg"), ["file_name '../../secret.jpg' of image 1", "leads out of", "inside this folder"]),
    "name is absolute":        (entry("images", file_name="/etc/passwd"), ["file_name '/etc/passwd' of image 1", "leads out of"]),
    "name has a drive":        (entry("images", file_name="C:\\x.jpg"), ["leads out of"]),
    "category not there":      (entry("categories", name="horse"), ["no category 'person' in 'categories'", "choose from horse"]),
}

# name: (how the folder is broken, the reason it is counted under, what the first case says)
SKIPS = {
    "picture missing":         (lambda f: pictures(f)[0].unlink(), "picture that is missing", "000000000001.jpg"),
    "picture truncated":       (cut, "picture that cannot be read", "000000000001.jpg: "),
    "picture of no bytes":     (content(b""), "picture that cannot be read", "000000000001.jpg: the file is empty"),
    "picture is a web page":   (content(b"<html>"), "picture that cannot be read", "000000000001.jpg: not a picture"),
    "picture is a header":     (content(b"\xff\xd8\xff\xe0"), "picture that cannot be read", "000000000001.jpg: "),
    "picture is a folder":     (lambda f: (pictures(f)[0].unlink(), (f / "train2017/000000000001.jpg").mkdir()), "picture that is missing", "000000000001.jpg"),
    "name too long":           (entry("images", file_name="a" * 5000), "picture that is missing", "aaa"),
    "another picture":         (resized(64, 48), "picture of another size than the file says", "64 x 64 by the annotation"),
    "box of no area":          (bbox(8, 8, 0, 24), "box of no area", "annotations[0]"),
    "box turned inside out":   (bbox(30, 30, -8, 9), "box of no area", "[30, 30, -8, 9]"),
    "box outside":             (bbox(64, 8, 9, 9), "box outside its picture", "[64, 8, 9, 9]"),
    "box far outside":         (bbox(-1e30, 8, 9, 9), "box outside its picture", "annotations[0]"),
    "box with NaN":            (bbox(float("nan"), 8, 9, 9), "box with NaN or infinity", "nan"),
    "box with infinity":       (bbox(8, 8, float("inf"), 9), "box with NaN or infinity", "inf"),
    "box of three":            (bbox(8, 8, 9), "box that is not four numbers", "[8, 8, 9]"),
    "box of strings":          (bbox("8", "8", "9", "9"), "box that is not four numbers", "'8'"),
    "box of lists":            (bbox([8], [[8]], 9, 9), "box that is not four numbers", "annotations[0]"),
    "box with a huge number":  (bbox(8, 8, 10 ** 400, 9), "box that is not four numbers", "annotations[0]"),
    "box is a word":           (entry("annotations", bbox="everywhere"), "box that is not four numbers", "everywhere"),
    "unknown category":        (entry("annotations", category_id=99), "box of a category that is not listed", "category 99"),
    "name leads upwards":      (entry("images", file_name="../../secret.jpg"), "picture whose name leads out of its folder", "'../../secret.jpg' of image 1 leads out of"),
    "unknown picture":         (entry("annotations", image_id=404), "box of a picture that is not listed", "image_id 404"),
}

def train_on(folder, *flags): train.main(["--coco", str(folder), "--out", str(folder.parent / "run"), *FLAGS, "--epochs", "1", *flags])

def message(call):
    with pytest.raises(InputError) as stopped: call()
    return str(stopped.value)

@pytest.mark.parametrize("case", STOPS)
def test_a_broken_folder_stops_training_with_a_sentence(case, coco):
    change, needles = STOPS[case]
    change(coco)
    said = message(lambda: train_on(coco))
    for needle in needles: assert needle in said
    assert len(said) < 1500, "a sentence, not a dump"
    assert not (coco.parent / "run").exists(), "nothing is begun that cannot be done"

@pytest.mark.parametrize("case", SKIPS)
def test_one_bad_line_is_skipped_counted_and_reported(case, coco):
    change, reason, first = SKIPS[case]
    whole = read_coco(coco, "train2017")
    change(coco)
    found = read_coco(coco, "train2017", max_bad_share=0.5)
    assert dict(found.report.skipped) == {reason: 1} and first in found.report.first[reason]
    assert f"1 skipped: {reason}; first: " in str(found.report)
    a_picture = reason.startswith("picture")
    assert len(found) == 8 - a_picture and found.report.pictures == len(found)
    for before, after in list(zip(whole[1:], found[0 if a_picture else 1:])):     # the others are what they were
        assert before.image_id == after.image_id
        np.testing.assert_array_equal(before.boxes, after.boxes)
    if not a_picture: assert len(found[0].boxes) == len(whole[0].boxes) - 1

@pytest.mark.parametrize("case", SKIPS)
def test_past_one_percent_the_command_stops_with_the_report(case, coco):
    change, reason, first = SKIPS[case]
    change(coco)
    said = message(lambda: train_on(coco))
    for needle in ("instances_train2017.json: 1 of ", "more than 1 %", "mend", f"1 skipped: {reason}", first): assert needle in said
    assert not (coco.parent / "run").exists()

def test_of_pictures_that_share_an_id_neither_is_used(coco):
    "Whose are the boxes? Nobody can tell; the others are what they were."
    whole = read_coco(coco, "train2017")
    rewrite(coco, lambda d: d["images"].append({**d["images"][1], "id": 1}))
    found = read_coco(coco, "train2017", max_bad_share=0.5)
    assert dict(found.report.skipped) == {"picture whose id another one has": 2} and [e.image_id for e in found] == [e.image_id for e in whole][1:]

def store(folder, picture, **how):
    "A picture in the place of the first."
    picture.save(pictures(folder)[0], **how)

def rotated(folder):
    "The first picture stored lying on its side, to be viewed upright; its upper half is white, and so is its box."
    upright = np.zeros((64, 40, 3), np.uint8)
    upright[:32] = 255
    exif = Image.Exif()
    exif[274] = 6
    store(folder, Image.fromarray(np.rot90(upright).copy()), format="JPEG", quality=95, exif=exif)

def test_pictures_in_cmyk_and_with_16_bits_keep_their_colours(coco):
    store(coco, Image.new("RGB", (64, 64), (220, 40, 30)).convert("CMYK"), format="JPEG", quality=95)
    red = Batches(read_coco(coco, "train2017"), 1, 64)[0]["image"][0]
    assert np.abs(red.astype(int) - (220, 40, 30)).max() < 12
    store(coco, Image.fromarray(np.full((64, 64), 200 * 257, np.uint16)), format="PNG")
    grey = Batches(read_coco(coco, "train2017"), 1, 64)[0]["image"][0]
    assert np.abs(grey.astype(int) - 200).max() <= 1

def test_a_picture_one_pixel_wide_is_a_picture(coco):
    store(coco, Image.new("RGB", (1, 64), "white"), format="JPEG")
    rewrite(coco, lambda d: (d["images"][0].update(width=1), [a.update(bbox=[0, 8, 1, 30]) for a in d["annotations"] if a["image_id"] == 1]))
    found = read_coco(coco, "train2017")
    batch = Batches(found, 1, 64)[0]
    assert not found.report.skipped and batch["image"].shape == (1, 64, 64, 3)
    np.testing.assert_allclose(batch["boxes"][0, 0, [1, 3]], [8, 38])
    assert 0 <= batch["boxes"][0, 0, 0] < batch["boxes"][0, 0, 2] <= 64

@pytest.mark.parametrize("size, box", [((40, 64), [0, 0, 40, 32]), ((64, 40), [0, 0, 32, 40])], ids=["annotated as seen", "annotated as stored"])
def test_a_picture_turned_by_exif_keeps_its_boxes(size, box, coco):
    rotated(coco)
    rewrite(coco, lambda d: (d["images"][0].update(width=size[0], height=size[1]), [a.update(bbox=box) for a in d["annotations"] if a["image_id"] == 1]))
    example = read_coco(coco, "train2017")[0]
    assert (example.width, example.height) == (40, 64)
    np.testing.assert_allclose(example.boxes, [[0, 0, 40, 32]] * len(example.boxes))
    image = example.read()
    assert image[:30].mean() > 250 and image[34:].mean() < 5, "the box is where the white is"

def test_a_picture_that_was_scaled_takes_its_boxes_along(coco):
    before = read_coco(coco, "train2017")[0]
    resized(128, 128)(coco)
    after = read_coco(coco, "train2017")[0]
    np.testing.assert_allclose(after.boxes, 2 * before.boxes)
    np.testing.assert_allclose(after.areas, 4 * before.areas)
    both = [Batches([e], 1, 64)[0]["boxes"] for e in (before, after)]
    np.testing.assert_allclose(both[0], both[1], atol=1e-4)

def test_categories_go_by_name_whatever_their_numbers(coco):
    "Ids from 1, with gaps, in no order: the mistake that gives an AP of 0.002."
    names = {1: "bicycle", 90: "person", 17: "cat"}
    def renumber(document):
        document["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        for number, a in enumerate(document["annotations"]): a["category_id"] = (90, 17, 1)[number % 3]
    before = [len(e.boxes) for e in read_coco(coco, "train2017")]
    rewrite(coco, renumber)
    every = read_coco(coco, "train2017", ("cat", "person", "bicycle"))
    labels = np.concatenate([e.labels for e in every])
    np.testing.assert_array_equal(labels, np.resize([1, 0, 2], len(labels)))
    assert [len(e.boxes) for e in every] == before
    people = read_coco(coco, "train2017", ("person",))
    np.testing.assert_array_equal(np.concatenate([e.labels for e in people]), np.zeros((labels == 1).sum()))
    assert len(people) == 8, "pictures without people stay"

def test_crowd_regions_are_not_people(coco):
    entry("annotations", iscrowd=1, area=123.5)(coco)
    found = read_coco(coco, "train2017")
    assert found[0].labels[0] == -2 and found[0].areas[0] == 123.5
    assert found.report.crowds == 1 and found.report.boxes == sum(len(e.boxes) for e in found) - 1
    assert Batches(found, 8, 64)[0]["labels"][0, 0] == -2

def test_learned_and_measured_pictures_are_apart_whatever_their_names(coco):
    "One photograph of val2017 is in train2017 too, under another name."
    shutil.copy(sorted((coco / "val2017").iterdir())[0], pictures(coco)[0])
    with_it, validation = datasets.read_data([coco], ("person",), None, 0.1)
    assert len(with_it) == 7 and len(validation) == 4 and with_it.report.skipped["copy of a picture of val2017"] == 1

def test_a_pack_is_whole_or_not_there(coco, tmp_path, monkeypatch):
    "A picture that breaks on the way, and a disk that is full after two pieces; what else is in the folder stays."
    out, shrink, write_piece, written = tmp_path / "out", packs.downscale_example, packs.write_coco_shard, []
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    def torn(example, size):
        if example.image_id == 3: raise InputError("3.jpg: the picture breaks off")
        return shrink(example, size)
    def full(folder, *arguments):
        if len(written) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        written.append(folder)
        write_piece(folder, *arguments)
    def command(*flags): packs.main(["--coco", str(coco), "--out", str(out), "--parts", "train2017", "--image-size", "32", "--max-mb", "0.002", *flags])
    monkeypatch.setattr(packs, "downscale_example", torn)
    said = message(command)
    assert "1 of 8 pictures cannot be used" in said and "picture that cannot be decoded; first: 3.jpg" in said and os.listdir(out) == ["diary.txt"]
    monkeypatch.setattr(packs, "write_coco_shard", full)
    assert f"{out}: cannot be written (No space left on device); make room" in message(lambda: command("--max-bad-share", "0.2"))
    assert len(written) == 2 and os.listdir(out) == ["diary.txt"]
    monkeypatch.setattr(packs, "write_coco_shard", write_piece)
    command("--max-bad-share", "0.2")
    assert [e.image_id for e in packs.read_datasets(sorted(out.glob("train2017-*")), "train2017")] == [1, 2, 4, 5, 6, 7, 8]

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "The folder of a run, with a small network that has learned nothing."
    folder = tmp_path_factory.mktemp("weights")
    network = ModelConfig(**SMALL)
    FCOS(network).save_weights(folder / "best.weights.h5")
    (folder / "config.json").write_text(json.dumps({"network": {**SMALL, "class_names": ["person"]}, "recipe": {}, "run": {}}))
    return folder

def test_detecting_skips_what_is_no_picture_and_says_so(weights, coco, capsys):
    cut(coco)
    pictures(coco)[1].write_text("<html>")
    out = coco.parent / "detected"
    detect.main([str(coco / "train2017"), "--weights", str(weights), "--out", str(out)])
    said = capsys.readouterr().out
    assert "000000000001.jpg: the picture breaks off" in said and "000000000002.jpg: not a picture" in said and said.count("skipped") >= 2
    assert len(json.loads((out / "detections.json").read_text())) == 6
    assert "exists" in message(lambda: detect.main([str(coco / "train2017"), "--weights", str(weights), "--out", str(out)]))

@pytest.mark.parametrize("what, needles", [("gone.jpg", ["gone.jpg", "no such file", "check the spelling"]), ("hollow", ["hollow", "no picture"]), ("torn.jpg", ["could be read", "torn.jpg"])])
def test_detecting_on_nothing_stops(what, needles, weights, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    said = message(lambda: detect.main([str(tmp_path / what), "--weights", str(weights), "--out", str(tmp_path / "out")]))
    for needle in needles: assert needle in said
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("what, needles", [
    ("folder", ["coco", "no such folder"]), ("weights", ["nowhere", "no such"]), ("truncated", ["instances_val2017.json: 1 of 4 pictures", "breaks off"]), ("out", ["exists"])])
def test_evaluating_stops_with_a_sentence(what, needles, weights, coco):
    out = coco.parent / "evaluation"
    if what == "folder": coco.rename(coco.with_name("gone"))
    if what == "truncated": file = sorted((coco / "val2017").iterdir())[0]; file.write_bytes(file.read_bytes()[:-200])
    if what == "out": out.mkdir(); (out / "diary.txt").write_text("mine")
    said = message(lambda: evaluate.main(["--coco", str(coco), "--weights", "nowhere" if what == "weights" else str(weights), "--out", str(out)]))
    for needle in needles: assert needle in said

def broken_inside(path):
    "A picture whose both ends are in order, and whose middle is not."
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[3000:9000] = bytes(6000)
    path.write_bytes(data)

def test_a_picture_that_breaks_after_reading_costs_a_warning_and_not_the_epoch(coco):
    found = read_coco(coco, "train2017")
    broken_inside(pictures(coco)[2])
    pictures(coco)[5].unlink()
    batches = Batches(found, 4, 64, max_bad_share=0.5)
    with pytest.warns(UserWarning, match="grey picture takes its place") as told:
        for _ in range(2):
            for index in range(2): batches[index]
    assert len(told) == 2, "each file is named once"
    batch = batches[0]
    assert (batch["labels"][2] == -1).all() and (batch["image"][2] == 114).all() and batch["image_id"][2] == 3
    assert batches.report.skipped == {"picture that cannot be read": 2} and "2 skipped" in str(batches.report)
    batches.on_epoch_begin(); batches.on_epoch_end()
    strict = Batches(found, 4, 64)
    with pytest.warns(UserWarning): strict[0]
    strict.on_epoch_begin()
    assert "1 of 8 pictures cannot be used" in message(strict.on_epoch_end)

def command(module, *arguments, **how):
    return subprocess.run([sys.executable, "-m", f"fcos_lite.{module}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, **how)

