"""A YOLO folder from outside: what is wrong is named, or skipped and counted."""
import os
import shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from fcos_lite.data.datasets import read_dataset
from .folders import (
    NAMES, image, link, refuses, replaced_by_fifo, replaced_by_folder, same, skips, turned)

@pytest.fixture
def yolo(layouts): return layouts / "YOLO"

def label(folder, number=0): return sorted((folder / "labels/train").iterdir())[number]
def line(text): return lambda folder: label(folder).write_text(label(folder).read_text() + text + "\n")
def yaml(text): return lambda folder: (folder / "data.yaml").write_text(text)
def data_yaml(folder): return folder / "data.yaml"
def share_a_label(folder): shutil.copy(image(folder), image(folder).with_suffix(".png"))

# how the folder is broken: words that the message must hold
REFUSALS = {
    "no data.yaml": (lambda f: data_yaml(f).unlink(), ["no layout that is known", "*.yaml"]),
    "several, none data.yaml": (lambda f: (data_yaml(f).rename(f / "a.yaml"), (f / "b.yml").touch()), ["2 YAML files"]),
    "not YAML": (yaml("names: ["), ["data.yaml: not YAML", "again"]),
    "nested too deep": (yaml("[" * 100_000), ["data.yaml: not YAML"]),
    "a list": (yaml("- person"), ["data.yaml: the outermost"]),
    "no names": (yaml("train: images/train"), ["data.yaml: 'names' must list"]),
    "names is a number": (yaml("train: images/train\nnames: 7"), ["data.yaml: 'names' must list"]),
    "a name is a list": (yaml("train: images/train\nnames: [[a]]"), ["data.yaml: names[0] is ['a']"]),
    "no such split": (yaml("val: images/train\nnames: [a]"), ["data.yaml: 'train' names no folder"]),
    "split leads upwards": (yaml("train: ../../..\nnames: [a]"), ["data.yaml: train '../../..' is no folder inside"]),
    "split is absolute": (yaml("train: /etc\nnames: [a]"), ["data.yaml: train '/etc' is no folder inside"]),
    "path leads upwards": (yaml("path: ../COCO\ntrain: train\nnames: [a]"), ["train 'train' is no folder inside"]),
    "no such class": (yaml("train: images/train\nnames: [cat, dog]"), ["no category 'person'", "choose from cat, dog"]),
    "labels elsewhere": (lambda f: (f / "labels").rename(f / "annotations"),
                         ["none of the 12 images has a label file", "labels/train/000000000001.txt"]),
    "two with one name": (share_a_label, ["share a label file"]),
    "image leads out": (link(image), ["000000000001.jpg: a link that leads out of"]),
    "labels lead out": (link(label), ["000000000001.txt: a link that leads out of"]),
    "labels lead nowhere": (link(label, dangling=True), ["000000000001.txt: a link that leads out of"]),
    "folder leads out": (link(lambda f: f / "images/train"), ["train 'images/train' is no folder inside"]),
    "labels' folder leads out": (link(lambda f: f / "labels/train"), ["a link that leads out of"]),
    "data.yaml leads out": (link(data_yaml), ["data.yaml: a link that leads out of"]),
    "data.yaml is a FIFO": (replaced_by_fifo(data_yaml), ["data.yaml"]),
}
FOUR, OUTSIDE = "box that is not four numbers", "box outside its image"
NAN, LISTED = "box with NaN or infinity", "box of a category that is not listed"
# how the folder is broken: the reason it is counted under, what the first case says
SKIPS = {
    "image missing": (lambda f: image(f).unlink(), "image that is missing", "000000000001.jpg"),
    "labels are no text": (lambda f: label(f).write_bytes(b"\xff\xfe0 "), "image whose annotation is no text", "001.txt"),
    "labels of megabytes": (lambda f: label(f).write_bytes(b"0 .5 .5 .1 .1\n" * 80_000),
                            "image whose annotation is longer than 1 MB", "001.txt"),
    "labels are a folder": (replaced_by_folder(label), "image whose annotation is missing", "001.txt"),
    "labels are a FIFO": (replaced_by_fifo(label), "image whose annotation is missing", "001.txt"),
    "box of three": (line("0 .5 .5 .1"), FOUR, "000000000001.txt, line "),
    "box with a score": (line("0 .5 .5 .1 .1 .9"), FOUR, "0 .5 .5 .1 .1 .9"),
    "box of words": (line("0 left top far low"), FOUR, "left top"),
    "class is a word": (line("person .5 .5 .1 .1"), FOUR, "person"),
    "class not listed": (line("2 .5 .5 .1 .1"), LISTED, "2 .5"),
    "class negative": (line("-1 .5 .5 .1 .1"), LISTED, "-1"),
    "class infinite": (line("inf .5 .5 .1 .1"), LISTED, "inf"),
    "box in pixels": (line("0 32 32 10 10"), "box in pixels, where fractions of the image belong", "0 32 32"),
    "box of no area": (line("0 .5 .5 0 .1"), "box of no area", "category 0, bbox [0.5, 0.45, 0.0, 0.1]"),
    "box inside out": (line("0 .5 .5 -.1 .1"), "box of no area", "-0.1"),
    "box outside": (line("0 1.5 .5 .1 .1"), OUTSIDE, "000000000001.txt, line "),
    "outline outside": (line("0 1.1 1.1 1.2 1.1 1.2 1.3"), OUTSIDE, "1.1"),
    "box with NaN": (line("0 nan .5 .1 .1"), NAN, "nan"),
    "box with infinity": (line("0 .5 .5 inf .1"), NAN, "inf"),
    "box beyond numbers": (line("0 .5 .5 1e999 .1"), NAN, "inf"),
}

@pytest.mark.parametrize("case", REFUSALS)
def test_a_broken_folder_is_refused(case, yolo): refuses(yolo, *REFUSALS[case], "train")

@pytest.mark.parametrize("case", SKIPS)
def test_one_bad_image_or_box_is_skipped_and_counted(case, yolo): skips(yolo, *SKIPS[case], "train")

def test_labels_whose_image_is_gone_are_counted(yolo):
    "Not all names are numbers then: images are counted, and each keeps its place."
    before = [replace(example, image_id=number) for number, example in enumerate(read_dataset(yolo, "train"), 1)]
    (yolo / "labels/train/lost.txt").write_text("0 .5 .5 .1 .1")
    after = read_dataset(yolo, "train", max_bad_share=0.5)
    same(before, after)
    assert "1 skipped: image that is missing" in str(after.report) and "lost.jpg" in str(after.report)

def test_an_outline_becomes_the_box_around_it(yolo):
    line("0 0.25 0.25 0.75 0.5 0.5 0.75")(yolo)
    examples = read_dataset(yolo, "train")
    np.testing.assert_allclose(examples[0].boxes[-1], [16, 16, 48, 48])
    assert "1 outline; the box around each was taken" in str(examples.report)

def test_key_points_behind_a_box_are_cut_off(yolo, layouts_scenes):
    yaml("train: images/train\nkpt_shape: [4, 2]\nnames: [person, dog]\n")(yolo)
    for number in range(12):
        file = label(yolo, number)
        file.write_text(file.read_text().replace("\n", " .1 .1 .9 .9 .1 .9 .5 .5\n"))
    same(layouts_scenes, read_dataset(yolo, "train", NAMES), crowds=False)

def test_an_image_without_labels_is_empty(yolo):
    label(yolo, 3).write_text("\n  \n")
    label(yolo, 1).unlink()
    examples = read_dataset(yolo, "train")
    assert [len(examples[1].boxes), len(examples[3].boxes)] == [0, 0]
    assert len(examples) == 12 and not examples.report.skipped

def test_files_of_the_system_are_no_labels(yolo, layouts_scenes):
    for name in ("images/train/Thumbs.db", "images/train/._1.jpg", "labels/train/._1.txt", "labels/train/classes.txt"):
        (yolo / name).write_bytes(b"\x00\x05\x16\x07")
    examples = read_dataset(yolo, "train", NAMES)
    same(layouts_scenes, examples, crowds=False)
    assert not examples.report.skipped

def test_a_name_that_is_no_text_can_be_printed(yolo):
    "As archives from other systems have them: bytes that are no UTF-8."
    with open(os.fsencode(yolo / "images/train") + b"/caf\xe9.jpg", "wb") as file: file.write(b"")
    examples = read_dataset(yolo, "train", max_bad_share=0.5)
    assert "caf\\udce9.jpg" in str(examples.report).encode().decode()

def test_a_link_within_the_folder_does_no_harm(yolo, layouts, layouts_scenes):
    shutil.move(image(yolo), yolo / "moved.jpg")
    (yolo / "images/train/000000000001.jpg").symlink_to(yolo / "moved.jpg")
    (layouts / "linked").symlink_to(yolo)
    same(layouts_scenes, read_dataset(layouts / "linked", "train", NAMES), crowds=False)

def test_a_turned_image_keeps_its_boxes(yolo):
    "Fractions are of the image as it is seen."
    turned(image(yolo))
    label(yolo).write_text("0 0.5 0.25 1 0.5\n")
    example = read_dataset(yolo, "train")[0]
    assert (example.width, example.height) == (40, 64)
    np.testing.assert_allclose(example.boxes, [[0, 0, 40, 32]], atol=1e-4)

@pytest.mark.parametrize("key", ["val", "valid", "val2017"])
def test_validation_is_found_under_its_usual_names(key, yolo):
    "Roboflow writes valid."
    yaml(f"train: images/train\n{key}: images/train\nnames: [person, dog]")(yolo)
    assert len(read_dataset(yolo, "val2017")) == 12

def test_a_split_in_two_folders(yolo):
    for name in ("images", "labels"): (yolo / name / "more").mkdir()
    for file, name in ((image(yolo), "images"), (label(yolo), "labels")): shutil.move(file, yolo / name / "more")
    yaml("train: [images/train, ./images/more]\nnames: [person, dog]")(yolo)
    assert sorted(Path(example.image).parent.name for example in read_dataset(yolo, "train")) == ["more"] + ["train"] * 11
