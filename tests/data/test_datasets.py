"""Three layouts, one form: journeys there and back change nothing, what is wrong is named or counted, and no file, however broken, does more than be wrong."""
import contextlib
import json
import os
import shutil
import signal
import struct
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from fcos_lite.data.report import find_images
from fcos_lite.config import InputError
from fcos_lite.data.yolo import LEAN, to_voc, to_yolo, detect_half_box_shift, overshoot_bias, parse_xml, voc_row, yolo_row
from fcos_lite.data.coco import Examples, read_coco, write_coco
from fcos_lite.data.images import Example
from fcos_lite.data.datasets import LAYOUTS, read_dataset
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.data.splits import require_disjoint, chunks, count_people, deduplicate, hold_out
from test_bad_input import SKIPS, STOPS, WORLD, clean, coco, message   # the cases of COCO, and their folder

NAMES = ("person", "dog")

def write_yolo(folder, part, examples, class_names):
    for name in (f"images/{part}", f"labels/{part}"): (folder / name).mkdir(parents=True)
    for example in examples:
        Image.fromarray(example.read()).save(folder / f"images/{part}/{example.image_id:012d}.jpg", quality=95)
        (folder / f"labels/{part}/{example.image_id:012d}.txt").write_text(to_yolo(example))
    (folder / "data.yaml").write_text(f"path: .\n{part}: images/{part}\nnames: [{', '.join(class_names)}]\n")

def write_voc(folder, part, examples, class_names):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"): (folder / name).mkdir(parents=True)
    for example in examples:
        Image.fromarray(example.read()).save(folder / f"JPEGImages/{example.image_id:012d}.jpg", quality=95)
        (folder / f"Annotations/{example.image_id:012d}.xml").write_text(to_voc(example, class_names, f"{example.image_id:012d}.jpg"))
    (folder / f"ImageSets/Main/{part}.txt").write_text("".join(f"{example.image_id:012d}\n" for example in examples))

WRITERS = {"COCO": write_coco, "YOLO": write_yolo, "VOC": write_voc}

@pytest.fixture(scope="session")
def scenes():
    "Twelve scenes with people and dogs, one of them with a crowd."
    found = list(Scenes(12, seed=5, world=replace(WORLD, class_names=NAMES, empty_share=0.3)))
    found[2] = replace(found[2], labels=np.where(np.arange(len(found[2].labels)) == 0, -2, found[2].labels).astype(np.int32))
    return Examples(found, NAMES)

@pytest.fixture(scope="session")
def whole(scenes, tmp_path_factory):
    "The same examples in three folders with nothing wrong in them."
    root = tmp_path_factory.mktemp("whole")
    for layout, write in WRITERS.items(): write(root / layout, "train", scenes, NAMES)
    return root

@pytest.fixture
def three(whole, tmp_path):
    "Copies of them, to be broken."
    shutil.copytree(whole, tmp_path / "three")
    return tmp_path / "three"

# --- journeys

def same(before, after, atol, crowds=True):
    assert [e.image_id for e in before] == [e.image_id for e in after]
    for one, other in zip(before, after):
        kept = np.ones(len(one.labels), bool) if crowds else one.labels >= 0
        assert (one.width, one.height) == (other.width, other.height)
        np.testing.assert_array_equal(one.labels[kept], other.labels)
        np.testing.assert_allclose(one.boxes[kept], other.boxes, atol=atol)

@pytest.mark.parametrize("journey", ["COCO YOLO COCO", "COCO VOC COCO", "VOC YOLO VOC", "YOLO COCO VOC YOLO"])
def test_a_journey_through_other_layouts_changes_nothing(journey, scenes, tmp_path):
    examples = scenes
    for step, layout in enumerate(journey.split()):
        WRITERS[layout](tmp_path / str(step), "train", examples, NAMES)
        examples = read_dataset(tmp_path / str(step), "train", NAMES)
        assert not examples.report.skipped and examples.class_names == NAMES
    same(scenes, examples, 1e-3, crowds="YOLO" not in journey)

@pytest.mark.parametrize("layout", ["YOLO", "VOC"])
def test_training_and_packs_take_it_as_it_is(layout, three, scenes, tmp_path, capsys):
    from fcos_lite.train import datasets
    from fcos_lite.data import shards as packs
    learned, kept_aside = datasets.read_data([three / layout], NAMES, None, 0.25)      # there is no part val
    assert 0 < len(kept_aside) < len(learned)
    same(scenes, [*kept_aside, *learned], 1e-3, crowds=layout != "YOLO")
    packs.main(["--coco", str(three / layout), "--parts", "train", "--class-names", *NAMES, "--out", str(tmp_path / "packs"), "--image-size", "2000"])
    same(scenes, packs.read_datasets([tmp_path / "packs/train-000"], "train", NAMES), 1e-3, crowds=layout != "YOLO")

sides = st.integers(16, 5000)
corner = st.floats(0, 0.9)

@settings(max_examples=300, deadline=None, derandomize=True)
@given(sides, sides, st.lists(st.tuples(corner, corner, st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=5))
def test_rows_of_both_dialects_come_back(width, height, shares):
    "To half a pixel and a ten-thousandth of the picture; in fact far nearer."
    x, y, w, h = np.array(shares).T
    boxes = np.stack([x * width, y * height, np.minimum(x + w, 1) * width, np.minimum(y + h, 1) * height], 1).astype(np.float32)
    example = Example(1, None, boxes, np.zeros(len(boxes), np.int32), width, height)
    lines = to_yolo(example).splitlines()
    page = parse_xml(to_voc(example, ("person",), "1.jpg").encode(), "1.xml")
    for rows in ([yolo_row(line, width, height, {0: "person"})[1] for line in lines], [voc_row(found)[1] for found in page.findall("object")]):
        found = np.array(rows)
        found[:, 2:] += found[:, :2]
        np.testing.assert_allclose(found, boxes, atol=min(0.02, 1e-4 * max(width, height)))

@pytest.mark.parametrize("numbers", [(1, 2), (0, 1), (2, 1), (18, 90), (0, 7), (90, 0)], ids=str)
@pytest.mark.parametrize("wanted", [NAMES, NAMES[::-1], ("dog",)], ids=str)
def test_classes_go_by_name_whatever_their_numbers(numbers, wanted, scenes, three):
    "From 0, from 1, with gaps, in the wrong order; asked for by name and by number."
    page = three / "COCO/annotations/instances_train.json"
    document = json.loads(page.read_text())
    for entry in document["categories"]: entry["id"] = numbers[entry["id"] - 1]
    for entry in document["annotations"]: entry["category_id"] = numbers[entry["category_id"] - 1]
    page.write_text(json.dumps(document))
    (three / "YOLO/data.yaml").write_text(f"train: images/train\nnames:\n  {numbers[0]}: person\n  {numbers[1]}: dog\n")
    for scene in scenes: (three / f"YOLO/labels/train/{scene.image_id:012d}.txt").write_text(to_yolo(replace(scene, labels=np.where(scene.labels < 0, -2, np.array(numbers)[scene.labels]))))
    expected = [[wanted.index(NAMES[label]) for label in scene.labels if label >= 0 and NAMES[label] in wanted] for scene in scenes]
    by_number = tuple(numbers[NAMES.index(name)] for name in wanted)
    for layout in LAYOUTS:
        for asked in (wanted, by_number) if layout != "VOC" else (wanted,):
            found = read_dataset(three / layout, "train", asked)
            assert found.class_names == wanted
            assert [[label for label in example.labels if label >= 0] for example in found] == expected, (layout, asked)

def test_a_number_that_no_class_has_is_refused(three):
    for layout in ("COCO", "YOLO"): assert "no category 7" in message(lambda: read_dataset(three / layout, "train", (7,)))

def test_voc_has_no_list_of_classes(three, scenes):
    "A wanted class may be absent from a part; a misspelt one alone is refused."
    found = read_dataset(three / "VOC", "train", ("person", "zebra"))
    assert found.class_names == ("person", "zebra") and {label for e in found for label in e.labels} <= {0, -2} and "no box of zebra" in str(found.report)
    assert "no category 'peson'" in message(lambda: read_dataset(three / "VOC", "train", ("peson",)))

# --- COCO: all that holds of read_coco

def test_coco_is_read_as_read_coco_reads_it(whole):
    for limit in (None, 5):
        ours, theirs = read_dataset(whole / "COCO", "train", NAMES, limit), read_coco(whole / "COCO", "train", NAMES, limit)
        assert len(ours) == len(theirs) and ours.max_boxes == theirs.max_boxes
        for one, other in zip(ours, theirs):
            for name in ("image_id", "image", "boxes", "labels", "width", "height", "areas"): np.testing.assert_array_equal(getattr(one, name), getattr(other, name))

@pytest.mark.parametrize("case", STOPS)
def test_a_broken_coco_folder_stops_with_the_same_sentence(case, coco):
    change, needles = STOPS[case]
    change(coco)
    said = message(lambda: read_dataset(coco, "train2017", ("person",)))
    for needle in needles: assert needle in said
    assert len(said) < 1500

@pytest.mark.parametrize("case", SKIPS)
def test_one_bad_line_of_coco_is_counted_under_the_same_reason(case, coco):
    change, reason, first = SKIPS[case]
    change(coco)
    found = read_dataset(coco, "train2017", max_bad_share=0.5)
    assert dict(found.report.skipped) == {reason: 1} and first in found.report.first[reason]

def test_key_points_and_a_page_among_the_pictures(three, scenes):
    page = three / "COCO/annotations/instances_train.json"
    page.rename(page.with_name("person_keypoints_train.json"))
    same(scenes, read_dataset(three / "COCO", "train", NAMES), 1e-3)
    page.with_name("person_keypoints_train.json").rename(three / "COCO/train/_annotations.coco.json")
    same(scenes, read_dataset(three / "COCO", "train", NAMES), 1e-3)

# --- what is wrong with YOLO and VOC folders

def label(folder, number=0): return sorted((folder / "labels/train").iterdir())[number]
def page(folder, number=0): return sorted((folder / "Annotations").iterdir())[number]
def picture(folder, number=0): return find_images(folder)[number]
def line(text): return lambda folder: label(folder).write_text(label(folder).read_text() + text + "\n")
def yaml(text): return lambda folder: (folder / "data.yaml").write_text(text)
def listing(text): return lambda folder: (folder / "ImageSets/Main/train.txt").write_text(text)
def xml(old, new): return lambda folder: page(folder).write_text(page(folder).read_text().replace(old, new, 1))
def an_object(text): return xml("</annotation>", f"<object><name>person</name>{text}</object></annotation>")
def corners(*numbers): return an_object("<bndbox>" + "".join(f"<{side}>{number}</{side}>" for side, number in zip(("xmin", "ymin", "xmax", "ymax"), numbers)) + "</bndbox>")
def twin(folder): shutil.copy(picture(folder), picture(folder).with_suffix(".png"))
def link(find, target):
    "In the place of a file or folder a link to one outside."
    def change(folder):
        outside, inner = folder.parent / "outside", find(folder)
        shutil.move(inner, outside)
        if target == "dangling": (shutil.rmtree if outside.is_dir() else os.remove)(outside)
        inner.symlink_to(outside)
    return change

# layout: {name: (how the folder is broken, what the message must log)}
STOPS_OF = {
    "YOLO": {
        "no page":              (lambda f: (f / "data.yaml").unlink(), ["YOLO: ", "data.yaml"]),
        "not YAML":             (yaml("names: ["), ["data.yaml: not YAML", "again"]),
        "nested too deep":      (yaml("[" * 100_000), ["data.yaml: not YAML"]),
        "a list":               (yaml("- person"), ["data.yaml: the outermost"]),
        "no names":             (yaml("train: images/train"), ["data.yaml: 'names' must list"]),
        "names is a number":    (yaml("train: images/train\nnames: 7"), ["data.yaml: 'names' must list"]),
        "a name is a list":     (yaml("train: images/train\nnames: [[a]]"), ["data.yaml: names[0] is ['a']"]),
        "no such part":         (yaml("val: images/train\nnames: [a]"), ["data.yaml: 'train' names no folder"]),
        "part leads upwards":   (yaml("train: ../../..\nnames: [a]"), ["data.yaml: train '../../..' is no folder inside"]),
        "part is absolute":     (yaml("train: /etc\nnames: [a]"), ["data.yaml: train '/etc' is no folder inside"]),
        "path leads upwards":   (yaml("path: ../COCO\ntrain: train\nnames: [a]"), ["data.yaml: train 'train' is no folder inside"]),
        "labels elsewhere":     (lambda f: (f / "labels").rename(f / "annotations"), ["none of the 12 pictures has a label file", "labels/train/000000000001.txt"]),
        "two with one name":    (twin, ["share a label file"]),
        "picture leads out":    (link(picture, "there"), ["000000000001.jpg: a link that leads out of"]),
        "picture leads nowhere": (link(picture, "dangling"), ["000000000001.jpg: a link that leads out of"]),
        "labels lead out":      (link(label, "there"), ["000000000001.txt: a link that leads out of"]),
        "labels lead nowhere":  (link(label, "dangling"), ["000000000001.txt: a link that leads out of"]),
        "folder leads out":     (link(lambda f: f / "images/train", "there"), ["data.yaml: train 'images/train' is no folder inside"]),
        "labels' folder leads out": (link(lambda f: f / "labels/train", "there"), ["a link that leads out of"]),
        "page leads out":       (link(lambda f: f / "data.yaml", "there"), ["data.yaml: a link that leads out of"]),
        "a FIFO for a page":    (lambda f: ((f / "data.yaml").unlink(), os.mkfifo(f / "data.yaml")), ["data.yaml"]),
    },
    "VOC": {
        "no list of the part":  (lambda f: (f / "ImageSets/Main/train.txt").rename(f / "ImageSets/Main/val.txt"), ["no train.txt"]),
        "listed twice":         (listing("000000000001\n000000000001\n"), ["train.txt: lists ['000000000001'] more than once"]),
        "list leads upwards":   (listing("../../secret\n"), ["'../../secret.jpg'", "leads out of"]),
        "list is absolute":     (listing("/etc/passwd\n"), ["'/etc/passwd.jpg'", "leads out of"]),
        "list of nothing":      (listing("\n"), ["not one of its pictures"]),
        "filename leads upwards": (xml("<filename>", "<filename>../../"), ["'../../000000000001.jpg'", "leads out of", "JPEGImages"]),
        "filename has a drive": (xml("<filename>", "<filename>C:\\"), ["leads out of"]),
        "a document type":      (xml("<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>"), ["000000000001.xml: declares a document type", "<!DOCTYPE"]),
        "an outer entity":      (xml("<annotation>", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation>"), ["declares a document type"]),
        "two with one name":    (twin, ["differ only in their endings"]),
        "picture leads out":    (link(picture, "there"), ["000000000001.jpg: a link that leads out of"]),
        "page leads out":       (link(page, "there"), ["000000000001.xml: a link that leads out of"]),
        "pages lead out":       (link(lambda f: f / "Annotations", "there"), ["a link that leads out of"]),
        "pictures lead out":    (link(lambda f: f / "JPEGImages", "there"), ["a link that leads out of"]),
        "list leads out":       (link(lambda f: f / "ImageSets/Main/train.txt", "there"), ["train.txt: a link that leads out of"]),
    },
    "COCO": {
        "picture leads out":    (link(picture, "there"), ["000000000001.jpg: a link that leads out of"]),
        "picture leads nowhere": (link(picture, "dangling"), ["000000000001.jpg: a link that leads out of"]),
        "pictures lead out":    (link(lambda f: f / "train", "there"), ["a link that leads out of"]),
        "page leads out":       (link(lambda f: f / "annotations/instances_train.json", "there"), ["instances_train.json: a link that leads out of"]),
    },
}

def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
def giant(width, height):
    "A PNG that says how large it is, and brings none of its pixels."
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
def content(data): return lambda folder: picture(folder).write_bytes(data)

PICTURES = {
    "picture of no bytes":      (content(b""), "picture that cannot be read", "000000000001.jpg: the file is empty"),
    "picture of 120 megapixels": (content(giant(12_000, 10_000)), "picture that cannot be read", "more than 100 megapixels"),
    "picture of 400 megapixels": (content(giant(20_000, 20_000)), "picture that cannot be read", "more than 100 megapixels"),
    "picture truncated":        (lambda f: picture(f).write_bytes(picture(f).read_bytes()[:-200]), "picture that cannot be read", "000000000001.jpg: "),
    "picture is a web page":    (content(b"<html>"), "picture that cannot be read", "not a picture"),
    "picture missing":          (lambda f: picture(f).unlink(), "picture that is missing", "000000000001.jpg"),
    "a FIFO for a picture":     (lambda f: (path := picture(f), path.unlink(), os.mkfifo(path)), "picture that is missing", "000000000001.jpg"),
}
# layout: {name: (how the folder is broken, the reason it is counted under, what the first case says)}
SKIPS_OF = {
    "YOLO": PICTURES | {
        "labels without a picture": (lambda f: (f / "labels/train/lost.txt").write_text("0 .5 .5 .1 .1"), "picture that is missing", "lost.jpg"),
        "labels are no text":   (lambda f: label(f).write_bytes(b"\xff\xfe0 "), "picture whose annotation is no text", "000000000001.txt"),
        "labels of megabytes":  (lambda f: label(f).write_bytes(b"0 .5 .5 .1 .1\n" * 80_000), "picture whose annotation is longer than 1 MB", "000000000001.txt"),
        "labels are a folder":  (lambda f: (path := label(f), path.unlink(), path.mkdir()), "picture whose annotation is missing", "000000000001.txt"),
        "labels are a FIFO":    (lambda f: (path := label(f), path.unlink(), os.mkfifo(path)), "picture whose annotation is missing", "000000000001.txt"),
        "box of three":         (line("0 .5 .5 .1"), "box that is not four numbers", "000000000001.txt, line "),
        "box with a score":     (line("0 .5 .5 .1 .1 .9"), "box that is not four numbers", "0 .5 .5 .1 .1 .9"),
        "box of words":         (line("0 left top far low"), "box that is not four numbers", "left top"),
        "class is a word":      (line("person .5 .5 .1 .1"), "box that is not four numbers", "person"),
        "class not listed":     (line("2 .5 .5 .1 .1"), "box of a category that is not listed", "2 .5"),
        "class negative":       (line("-1 .5 .5 .1 .1"), "box of a category that is not listed", "-1"),
        "class infinite":       (line("inf .5 .5 .1 .1"), "box of a category that is not listed", "inf"),
        "box of no area":       (line("0 .5 .5 0 .1"), "box of no area", "0 .5 .5 0"),
        "box inside out":       (line("0 .5 .5 -.1 .1"), "box of no area", "-.1"),
        "box outside":          (line("0 1.5 .5 .1 .1"), "box outside its picture", "1.5"),
        "box with NaN":         (line("0 nan .5 .1 .1"), "box with NaN or infinity", "nan"),
        "box with infinity":    (line("0 .5 .5 inf .1"), "box with NaN or infinity", "inf"),
        "box beyond numbers":   (line("0 .5 .5 1e999 .1"), "box with NaN or infinity", "1e999"),
        "box in pixels":        (line("0 32 32 10 10"), "box in pixels, where shares of the picture belong", "0 32 32"),
        "outline outside":      (line("0 1.1 1.1 1.2 1.1 1.2 1.3"), "box outside its picture", "1.1"),
    },
    "VOC": PICTURES | {
        "no page":              (lambda f: page(f).unlink(), "picture whose annotation is missing", "000000000001.xml"),
        "page cut off":         (lambda f: page(f).write_text(page(f).read_text()[:-20]), "picture whose annotation is not XML", "000000000001.xml"),
        "page of no bytes":     (lambda f: page(f).write_bytes(b""), "picture whose annotation is not XML", "000000000001.xml"),
        "page in no encoding":  (xml("<annotation>", "<?xml version='1.0' encoding='zlib'?><annotation>"), "picture whose annotation is not XML", "000000000001.xml"),
        "page of the web":      (lambda f: page(f).write_text("<html></html>"), "picture whose annotation is not VOC's", "000000000001.xml"),
        "page of megabytes":    (xml("</annotation>", " " * 1_000_000 + "</annotation>"), "picture whose annotation is longer than 1 MB", "000000000001.xml"),
        "page of another picture": (xml("<width>64</width>", "<width>32</width>"), "picture of another size than the file says", "32.0 x 64.0 by the annotation"),
        "object without a name": (xml("</annotation>", "<object><bndbox/></object></annotation>"), "box without a class", "object "),
        "object without a box": (an_object(""), "box that is not four numbers", "000000000001.xml, object "),
        "box of three":         (corners(8, 8, 20), "box that is not four numbers", "['8', '8', '20']"),
        "box of words":         (corners("left", 8, 20, 20), "box that is not four numbers", "left"),
        "box inside out":       (corners(20, 8, 8, 20), "box of no area", "['20', '8', '8', '20']"),
        "box outside":          (corners(100, 8, 120, 20), "box outside its picture", "100"),
        "box with NaN":         (corners("nan", 8, 20, 20), "box with NaN or infinity", "nan"),
        "box with infinity":    (corners(8, 8, "inf", 20), "box with NaN or infinity", "inf"),
    },
    "COCO": {name: PICTURES[name] for name in ("picture of 120 megapixels", "picture of 400 megapixels", "a FIFO for a picture")},
}

@pytest.mark.parametrize("layout, case", [(layout, case) for layout in STOPS_OF for case in STOPS_OF[layout]])
def test_a_broken_folder_stops_with_a_sentence(layout, case, three):
    change, needles = STOPS_OF[layout][case]
    change(three / layout)
    said = message(lambda: read_dataset(three / layout, "train", max_bad_share=1, layout=layout))
    for needle in needles: assert needle in said
    assert len(said) < 1500

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("layout, case", [(layout, case) for layout in SKIPS_OF for case in SKIPS_OF[layout]])
def test_one_bad_line_is_counted_and_the_rest_is_read(layout, case, three):
    change, reason, first = SKIPS_OF[layout][case]
    before = read_dataset(three / layout, "train", NAMES)
    change(three / layout)
    after = read_dataset(three / layout, "train", NAMES, max_bad_share=0.5)
    assert dict(after.report.skipped) == {reason: 1} and first in after.report.first[reason]
    lost = reason.startswith("picture") and case != "labels without a picture"
    expected = list(before[1:] if lost else before)
    if case == "labels without a picture":      # not all names are numbers now: pictures are counted, and each keeps its place
        expected = [replace(e, image_id=number) for number, e in enumerate(before, 1)]
    same(expected, after, 1e-6)
    said = message(lambda: read_dataset(three / layout, "train", NAMES, max_bad_share=0))
    assert "cannot be used" in said and f"1 skipped: {reason}" in said

def test_an_outline_becomes_the_box_around_it(three):
    line("0 0.25 0.25 0.75 0.5 0.5 0.75")(three / "YOLO")
    found = read_dataset(three / "YOLO", "train")
    np.testing.assert_allclose(found[0].boxes[-1], [16, 16, 48, 48])
    assert "1 outline; the box around each was taken" in str(found.report)

def test_key_points_behind_a_box_are_cut_off(three, scenes):
    (three / "YOLO/data.yaml").write_text("train: images/train\nkpt_shape: [4, 2]\nnames: [person, dog]\n")
    for number in range(12): label(three / "YOLO", number).write_text(label(three / "YOLO", number).read_text().replace("\n", " .1 .1 .9 .9 .1 .9 .5 .5\n"))
    same(scenes, read_dataset(three / "YOLO", "train", NAMES), 1e-3, crowds=False)

def test_a_picture_without_labels_is_empty(three):
    label(three / "YOLO", 3).write_text("\n  \n")
    label(three / "YOLO", 1).unlink()
    found = read_dataset(three / "YOLO", "train")
    assert [len(found[1].boxes), len(found[3].boxes)] == [0, 0] and len(found) == 12 and not found.report.skipped

@pytest.mark.parametrize("text", ["path: /content/data\ntrain: ../images/train\nnames: [person, dog]", "train: [images/train]\nnames: {0: person, 1: dog}", "path: images\ntrain: ./train/\nnames: [person, dog]",
                                  "\ufefftrain: images/train\nnames:\n- person\n- dog\n", "train: images\nnames: [person, dog]"])
def test_pages_that_have_travelled(text, three, scenes):
    (three / "YOLO/data.yaml").write_text(text, encoding="utf-8")
    same(scenes, read_dataset(three / "YOLO", "train2017", NAMES), 1e-3, crowds=False)

def test_labels_of_another_system(three, scenes):
    for number in range(12):
        path = label(three / "YOLO", number)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b" \r\n").replace(b" ", b"\t"))
    same(scenes, read_dataset(three / "YOLO", "train", NAMES), 1e-3, crowds=False)

def test_voc_without_lists_has_one_part(three, scenes):
    shutil.rmtree(three / "VOC/ImageSets")
    same(scenes, read_dataset(three / "VOC", "train2017", NAMES), 1e-3)
    assert "no val.txt" in message(lambda: read_dataset(three / "VOC", "val", NAMES))

def test_the_litter_of_file_systems_is_no_data(three, scenes):
    shutil.rmtree(three / "VOC/ImageSets")
    for name in ("YOLO/images/train/._1.jpg", "YOLO/labels/train/._1.txt", "YOLO/labels/train/classes.txt", "VOC/JPEGImages/._000000000001.jpg", "VOC/Annotations/._1.xml", "VOC/JPEGImages/Thumbs.db"): (three / name).write_bytes(b"\x00\x05\x16\x07")
    for layout in ("YOLO", "VOC"):
        found = read_dataset(three / layout, "train", NAMES)
        same(scenes, found, 1e-3, crowds=layout != "YOLO")
        assert not found.report.skipped

def test_a_page_whose_picture_was_renamed_is_found_by_its_field(three):
    picture(three / "VOC").rename(three / "VOC/JPEGImages/a walk.jpg")
    xml("000000000001.jpg", "a walk.jpg")(three / "VOC")
    page(three / "VOC", 1).write_text(page(three / "VOC", 1).read_text().replace("000000000002.jpg", "000000000003.jpg"))   # stale: the page's own name goes before
    assert [Path(e.image).name for e in read_dataset(three / "VOC", "train")[:2]] == ["a walk.jpg", "000000000002.jpg"]

@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height><depth>3</depth></size>", "<size><width/><height>many</height></size>"])
def test_a_page_without_a_size_gets_the_pictures_own(size, three, scenes):
    for number in range(12):
        path, text = page(three / "VOC", number), page(three / "VOC", number).read_text()
        path.write_text(text[:text.index("<size>")] + size + text[text.index("</size>") + 7:])
    same(scenes, read_dataset(three / "VOC", "train", NAMES), 1e-3)

def test_a_page_that_counts_from_0_is_remarked(three):
    corners(0, 8, 20, 20)(three / "VOC")
    assert "1 box from pixel 0 on" in str(read_dataset(three / "VOC", "train").report)

@pytest.mark.parametrize("name", ["a b  c", "straße", "人 群", "🙂", "e\u0301", "-rf", "%20", "a.b.c", "'\"", "$(x)"])
def test_names_with_anything_in_them(name, three, scenes):
    picture(three / "COCO").rename(three / f"COCO/train/{name}.jpg")
    rewritten = (three / "COCO/annotations/instances_train.json").read_text().replace("000000000001.jpg", json.dumps(f"{name}.jpg")[1:-1])
    (three / "COCO/annotations/instances_train.json").write_text(rewritten)
    picture(three / "YOLO").rename(three / f"YOLO/images/train/{name}.jpg")
    label(three / "YOLO").rename(three / f"YOLO/labels/train/{name}.txt")
    picture(three / "VOC").rename(three / f"VOC/JPEGImages/{name}.jpg")
    page(three / "VOC").rename(three / f"VOC/Annotations/{name}.xml")
    listing("\n".join(f"{e.image_id:012d}" for e in scenes[1:]) + f"\r\n{name}\r\n")(three / "VOC")
    for layout in LAYOUTS:
        found = read_dataset(three / layout, "train", NAMES)
        renamed = next(e for e in found if Path(e.image).stem == name)
        kept = scenes[0].labels >= 0 if layout == "YOLO" else slice(None)
        np.testing.assert_allclose(renamed.boxes, scenes[0].boxes[kept], atol=1e-3)
        assert len(found) == 12 and not found.report.skipped and renamed.read().shape == (64, 64, 3)

def test_a_name_that_is_no_text_can_be_printed(three):
    "As archives from other systems have them: bytes that are no UTF-8."
    folder = os.fsencode(three / "YOLO/images/train")
    with open(folder + b"/caf\xe9.jpg", "wb") as file: file.write(b"")
    found = read_dataset(three / "YOLO", "train", max_bad_share=0.5)
    assert "caf\\udce9.jpg" in str(found.report).encode().decode()

def test_a_link_within_the_folder_is_no_harm(three, scenes):
    shutil.move(picture(three / "YOLO"), three / "YOLO/moved.jpg")
    (three / "YOLO/images/train/000000000001.jpg").symlink_to(three / "YOLO/moved.jpg")
    (three / "linked").symlink_to(three / "YOLO")
    same(scenes, read_dataset(three / "linked", "train", NAMES), 1e-3, crowds=False)

@pytest.mark.parametrize("size", [(64, 40), (40, 64)], ids=["stored", "seen"])
def test_a_turned_picture_keeps_its_boxes(size, three):
    "YOLO's shares are of the picture as it is seen; a VOC page says by its size which one it means."
    upright = np.zeros((64, 40, 3), np.uint8)
    upright[:32] = 255
    exif = Image.Exif()
    exif[274] = 6
    for layout in ("YOLO", "VOC"): Image.fromarray(np.rot90(upright).copy()).save(picture(three / layout), "JPEG", quality=95, exif=exif)
    label(three / "YOLO").write_text("0 0.5 0.25 1 0.5\n")
    box = np.float32([[0, 0, 40, 32]] if size == (40, 64) else [[0, 0, 32, 40]])
    page(three / "VOC").write_text(to_voc(Example(1, None, box, np.int32([0]), *size), NAMES, "x.jpg"))
    for layout in ("YOLO", "VOC"):
        example = read_dataset(three / layout, "train", NAMES)[0]
        assert (example.width, example.height) == (40, 64)
        np.testing.assert_allclose(example.boxes, [[0, 0, 40, 32]], atol=1e-4)

def test_what_is_no_data_set_says_what_was_seen(tmp_path, whole):
    assert "no such folder" in message(lambda: read_dataset(tmp_path / "gone", "train"))
    said = message(lambda: read_dataset(tmp_path, "train"))
    assert "this folder has nothing" in said and all(layout in said for layout in LAYOUTS)
    (tmp_path / "beach.jpg").touch()
    assert "'beach.jpg'" in message(lambda: read_dataset(tmp_path, "train"))
    for layout in ("YOLO", "VOC"): shutil.copytree(whole / layout, tmp_path / "both", dirs_exist_ok=True)
    assert "looks like YOLO and VOC" in message(lambda: read_dataset(tmp_path / "both", "train"))
    assert len(read_dataset(tmp_path / "both", "train", layout="VOC")) == 12
    for wrong in (dict(limit=0), dict(layout="voc")): message(lambda: read_dataset(whole / "VOC", "train", **wrong))

@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_limit_takes_the_first_pictures_and_blames_nobody(layout, whole, scenes):
    found = read_dataset(whole / layout, "train", NAMES, limit=5)
    same(scenes[:5], found, 1e-3, crowds=layout != "YOLO")
    assert not found.report.skipped

# --- the half-box shift

@pytest.fixture(scope="session")
def many(): return Examples(Scenes(80, seed=9, world=replace(WORLD, max_height=60)), ("person",))

def moved(example, halves):
    "An example whose boxes lie so many half sizes away."
    return replace(example, boxes=example.boxes + halves / 2 * np.tile(example.boxes[:, 2:] - example.boxes[:, :2], 2))

@pytest.mark.parametrize("halves, taken", [(1, "centres were read as corners"), (-1, "corners were read as centres"), (0, None)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_half_box_shift_is_named_in_every_layout(layout, halves, taken, many, tmp_path):
    WRITERS[layout](tmp_path / "d", "train", [moved(e, halves) for e in many], ("person",))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = read_dataset(tmp_path / "d", "train", max_bad_share=0.1)
    assert [taken in str(one.message) for one in told] == ([True] if taken else [])
    assert found.report.notes == [] if taken is None else taken in str(found.report)

def test_boxes_that_only_look_shifted_are_not_named(many):
    boxes = np.concatenate([e.boxes for e in many]) / 64
    sides = boxes[:, 2:] - boxes[:, :2]
    assert detect_half_box_shift(boxes) is None and detect_half_box_shift(boxes[:0]) is None
    rng = np.random.default_rng(0)
    assert detect_half_box_shift(boxes + rng.normal(0, 0.1, boxes.shape) * np.tile(sides, 2)) is None, "careless, in all directions"
    bodies = boxes.copy()
    bodies[:, 3] += np.where(boxes[:, 3] > 0.98, sides[:, 1], 0)
    bodies[:, 2] += np.where(boxes[:, 2] > 0.98, sides[:, 0], 0)
    bodies[:, 0] -= np.where(boxes[:, 0] < 0.02, sides[:, 0], 0)
    assert (bodies[:, 3] > 1.05).mean() > LEAN and detect_half_box_shift(bodies) is None, "whole bodies, beyond the picture"
    shifted = boxes + np.tile(sides, 2) / 2
    assert overshoot_bias(shifted) > 2 * LEAN and detect_half_box_shift(shifted) and detect_half_box_shift(shifted[:4]) is None, "too few to tell"

# --- fuzzing

TOKENS = [b"", b"0", b"-1", b"1e999", b"nan", b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"'", b",", b":", b"\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"..", b"../", b"/", b"\\", b"\\ud800", b"9" * 400, b" " * 50,
          b"<", b">", b"&b;", b"</", b"/>", b"<object>", b"</object>", b"<bndbox/>", b"<!--", b"]]>", b"<![CDATA[", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"<?xml version='1.0' encoding='utf-16'?>", b"&a ", b"*a", b"!!int ", b"- ", b"? ", b"<<: ", b"%YAML 1.1\n---\n", b"|", b"[" * 2000, b"<a>" * 2000]

@st.composite
def broken(draw, text):
    "A text after a few accidents: something cut out, put in, doubled or changed."
    data = text
    for _ in range(draw(st.integers(1, 5))):
        i = draw(st.integers(0, len(data)))
        j = min(len(data), i + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.sampled_from(TOKENS), st.just(data[i:j] * 2), st.binary(max_size=6), st.integers(-10 ** 20, 10 ** 20).map(lambda n: str(n).encode()), st.floats().map(lambda v: repr(v).encode())))
        data = data[:i] + piece + data[j:]
    return data

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["1.jpg", "../1.jpg", "person"]), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)

@st.composite
def documents(draw, text):
    "A COCO document with some values replaced by others of any kind."
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(sorted(document)))
        if not (isinstance(document[key], list) and document[key]) or draw(st.integers(0, 9)) == 0:
            document[key] = draw(values)
            continue
        place = draw(st.integers(0, len(document[key]) - 1))
        entry = document[key][place]
        if isinstance(entry, dict) and entry and draw(st.integers(0, 9)): entry[draw(st.sampled_from(sorted(entry)))] = draw(values | st.lists(st.floats() | st.integers(), min_size=4, max_size=4))
        else: document[key][place] = draw(values)
    return json.dumps(document).encode()

FUZZED = {"COCO": ["annotations/instances_train.json"], "YOLO": ["data.yaml", "labels/train/000000000001.txt"], "VOC": ["Annotations/000000000001.xml", "ImageSets/Main/train.txt"]}

@contextlib.contextmanager
def within(seconds):
    "Raises where something takes longer (an endless loop; by the clock of the processor, for a machine may be busy, or asleep) or more than 50 MB of memory."
    def stop(*_): raise TimeoutError(f"more than {seconds} s")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

def sound(examples):
    "What the rest of the library believes of examples, whoever read them."
    for example in examples:
        assert example.boxes.shape == (len(example.labels), 4) and example.boxes.dtype == np.float32 and np.isfinite(example.boxes).all()
        assert (example.boxes[:, :2] >= 0).all() and (example.boxes[:, 2:] <= (example.width, example.height)).all() and (example.boxes[:, 2:] >= example.boxes[:, :2]).all()
        classes = range(len(examples.class_names))
        assert set(example.labels.tolist()) <= {*classes, *(-2 - c for c in classes)} and isinstance(example.image_id, int)    # from -2 down: a crowd of class 0, 1, ...
        assert example.read().shape == (example.height, example.width, 3)

def fuzz(layout, count, root):
    folder = root / layout
    originals = {name: (folder / name).read_bytes() for name in FUZZED[layout]}
    strategies = [st.tuples(st.just(name), broken(data)) for name, data in originals.items()]
    if layout == "COCO": strategies.append(st.tuples(st.just(FUZZED["COCO"][0]), documents(originals[FUZZED["COCO"][0]])))
    read, refused = [], []
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(strategies))
    def one(change):
        name, data = change
        (folder / name).write_bytes(data)
        try:
            with within(20): found = read_dataset(folder, "train", max_bad_share=1, layout=layout)
        except InputError as error:
            assert 20 < len(str(error)) < 3000
            refused.append(1)
        else:
            sound(found)
            assert len(str(found.report).encode()) < 10_000
            read.append(1)
        finally: (folder / name).write_bytes(originals[name])
    one()
    assert min(len(read), len(refused)) > count / 50, "both ways are gone, else the documents are too tame or too wild"

@pytest.fixture
def small(scenes, tmp_path):
    for layout, write in WRITERS.items(): write(tmp_path / layout, "train", scenes[:2], NAMES)
    return tmp_path

@pytest.mark.parametrize("layout", LAYOUTS)
def test_200_malformed_documents(layout, small): fuzz(layout, 200, small)

@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_10_000_malformed_documents(layout, small): fuzz(layout, 10_000, small)

# --- parts

def stand_ins(people): return Examples([Example(i, None, np.zeros((n, 4), np.float32), np.zeros(n, np.int32), 1, 1) for i, n in enumerate(people)], ("person",))

@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 40), st.none() | st.integers(0, 5))
def test_each_picture_is_in_one_part_and_the_order_stays(people, count, seed):
    every, count = stand_ins(people), min(count, len(people))
    held, rest = hold_out(every, count, seed)
    assert len(held) == count and sorted(e.image_id for e in [*held, *rest]) == list(range(len(every)))
    assert all([e.image_id for e in part] == sorted(e.image_id for e in part) for part in (held, rest))
    assert sorted(e.image_id for part in chunks(every, count, seed) for e in part) == list(range(len(every)))

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 13, 60, 199])
def test_a_part_that_is_held_out_is_a_small_copy_of_the_whole(count, seed):
    "Each count of people gets its due, up to one."
    people = np.random.default_rng(seed).integers(0, 7, 200)
    held, _ = hold_out(stand_ins(people), count, seed)
    assert (np.abs(np.bincount([count_people(e) for e in held], minlength=7) - np.bincount(people) * count / 200) < 1).all()

def test_no_picture_is_in_two_parts_under_another_name(three):
    for copy, original in (("000000000099.jpg", 0), ("000000000098.jpg", 5)): shutil.copy(find_images(three / "YOLO")[original], three / f"YOLO/images/train/{copy}")
    found = read_dataset(three / "YOLO", "train")
    for seed in range(5):
        kept, copies = deduplicate(found)
        assert sorted((copy.image_id, twin.image_id) for copy, twin in copies) == [(98, 6), (99, 1)] and len(kept) == 12
        held, rest = hold_out(kept, 4, seed)
        require_disjoint({"train": rest, "val": held})
    held, rest = hold_out(found, 1)
    assert "image 99 of train is image 1 of val" in message(lambda: require_disjoint({"val": held, "train": rest}))
