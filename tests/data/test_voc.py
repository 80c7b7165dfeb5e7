"""A Pascal VOC folder from outside: what is wrong is named, or skipped and counted."""
import shutil
from pathlib import Path
import numpy as np
import pytest
from fcos_lite.data.datasets import read_dataset
from fcos_lite.data.example import Example
from .folders import NAMES, SIDES, image, link, message, refuses, same, skips, to_voc, turned

@pytest.fixture
def voc(layouts): return layouts / "VOC"

def page(folder, number=0): return sorted((folder / "Annotations").iterdir())[number]
def listing(text): return lambda folder: (folder / "ImageSets/Main/train.txt").write_text(text)
def train_list(folder): return folder / "ImageSets/Main/train.txt"
def xml(old, new): return lambda folder: page(folder).write_text(page(folder).read_text().replace(old, new, 1))
def an_object(text): return xml("</annotation>", f"<object><name>person</name>{text}</object></annotation>")
def corners(*numbers):
    sides = "".join(f"<{side}>{number}</{side}>" for side, number in zip(SIDES, numbers))
    return an_object(f"<bndbox>{sides}</bndbox>")
def differ_by_suffix(folder): shutil.copy(image(folder), image(folder).with_suffix(".png"))

BOMB = "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>"
# how the folder is broken: words that the message must hold
REFUSALS = {
    "no list of the split": (lambda f: train_list(f).rename(f / "ImageSets/Main/val.txt"), ["no train.txt"]),
    "listed twice": (listing("000000000001\n000000000001\n"), ["train.txt: lists ['000000000001'] more than once"]),
    "list leads upwards": (listing("../../secret\n"), ["'../../secret.jpg'", "leads out of"]),
    "list is absolute": (listing("/etc/passwd\n"), ["'/etc/passwd.jpg'", "leads out of"]),
    "list of nothing": (listing("\n"), ["no category 'person'"]),
    "filename leads upwards": (xml("<filename>", "<filename>../../"), ["'../../000000000001.jpg'", "leads out of", "JPEGImages"]),
    "filename has a drive": (xml("<filename>", "<filename>C:\\"), ["leads out of"]),
    "a document type": (xml("<annotation>", BOMB), ["000000000001.xml: declares a document type", "<!DOCTYPE"]),
    "an outer entity": (xml("<annotation>", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation>"), ["declares a document type"]),
    "two with one name": (differ_by_suffix, ["differ only in their suffix"]),
    "image leads out": (link(image), ["000000000001.jpg: a link that leads out of"]),
    "annotation leads out": (link(page), ["000000000001.xml: a link that leads out of"]),
    "annotations lead out": (link(lambda f: f / "Annotations"), ["a link that leads out of"]),
    "images lead out": (link(lambda f: f / "JPEGImages"), ["a link that leads out of"]),
    "list leads out": (link(train_list), ["train.txt: a link that leads out of"]),
}
XML, FOUR, NAN = "image whose annotation is not XML", "box that is not four numbers", "box with NaN or infinity"
# how the folder is broken: the reason it is counted under, what the first case says
SKIPS = {
    "image missing": (lambda f: image(f).unlink(), "image that is missing", "000000000001.jpg"),
    "no annotation": (lambda f: page(f).unlink(), "image whose annotation is missing", "000000000001.xml"),
    "cut off": (lambda f: page(f).write_text(page(f).read_text()[:-20]), XML, "000000000001.xml"),
    "of no bytes": (lambda f: page(f).write_bytes(b""), XML, "000000000001.xml"),
    "in no encoding": (xml("<annotation>", "<?xml version='1.0' encoding='zlib'?><annotation>"), XML, "000000000001.xml"),
    "of the web": (lambda f: page(f).write_text("<html></html>"), "image whose annotation is not VOC's", "000000000001.xml"),
    "of megabytes": (xml("</annotation>", " " * 1_000_000 + "</annotation>"), "image whose annotation is longer than 1 MB", "001.xml"),
    "of another image": (xml("<width>64</width>", "<width>32</width>"), "image of another size than the file says", "32.0 x 64.0 by the annotation"),
    "object without a name": (xml("</annotation>", "<object><bndbox/></object></annotation>"), "box without a class", "object "),
    "object without a box": (an_object(""), FOUR, "000000000001.xml, object "),
    "box of three": (corners(8, 8, 20), FOUR, "['8', '8', '20']"),
    "box of words": (corners("left", 8, 20, 20), FOUR, "left"),
    "box inside out": (corners(20, 8, 8, 20), "box of no area", "['20', '8', '8', '20']"),
    "box outside": (corners(100, 8, 120, 20), "box outside its image", "100"),
    "box with NaN": (corners("nan", 8, 20, 20), NAN, "nan"),
    "box with infinity": (corners(8, 8, "inf", 20), NAN, "inf"),
}

@pytest.mark.parametrize("case", REFUSALS)
def test_a_broken_folder_is_refused(case, voc): refuses(voc, *REFUSALS[case], "train")

@pytest.mark.parametrize("case", SKIPS)
def test_one_bad_image_or_box_is_skipped_and_counted(case, voc): skips(voc, *SKIPS[case], "train")

def test_there_is_no_list_of_classes(voc):
    "A wanted class may be absent from a split; a misspelt one alone is refused."
    examples = read_dataset(voc, "train", ("person", "zebra"))
    assert examples.class_names == ("person", "zebra") and "no box of zebra" in str(examples.report)
    assert {label for example in examples for label in example.labels} <= {0, -2}
    assert "no category 'peson'" in message(lambda: read_dataset(voc, "train", ("peson",)))

def test_without_any_list_all_annotations_are_the_split_train(voc, layouts_scenes):
    shutil.rmtree(voc / "ImageSets")
    same(layouts_scenes, read_dataset(voc, "train2017", NAMES))
    assert "all annotations are the split train" in message(lambda: read_dataset(voc, "val2017"))

def test_an_annotation_whose_image_was_renamed_is_found_by_its_field(voc):
    image(voc).rename(voc / "JPEGImages/a walk.jpg")
    xml("000000000001.jpg", "a walk.jpg")(voc)
    stale = page(voc, 1)   # its own name goes before its field
    stale.write_text(stale.read_text().replace("000000000002.jpg", "000000000003.jpg"))
    names = [Path(example.image).name for example in read_dataset(voc, "train")[:2]]
    assert names == ["a walk.jpg", "000000000002.jpg"]

@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height><depth>3</depth></size>", "<size><width/><height>many</height></size>"])
def test_an_annotation_without_a_size_gets_the_images_own(size, voc, layouts_scenes):
    for number in range(12):
        text = page(voc, number).read_text()
        page(voc, number).write_text(text[:text.index("<size>")] + size + text[text.index("</size>") + 7:])
    same(layouts_scenes, read_dataset(voc, "train", NAMES))

def test_an_annotation_that_counts_from_0_is_remarked(voc):
    corners(0, 8, 20, 20)(voc)
    assert "1 box from pixel 0 on" in str(read_dataset(voc, "train").report)

def test_files_of_the_system_are_no_annotations(voc, layouts_scenes):
    for name in ("JPEGImages/._000000000001.jpg", "Annotations/._1.xml", "JPEGImages/Thumbs.db"):
        (voc / name).write_bytes(b"\x00\x05\x16\x07")
    examples = read_dataset(voc, "train", NAMES)
    same(layouts_scenes, examples)
    assert not examples.report.skipped

@pytest.mark.parametrize("size", [(64, 40), (40, 64)], ids=["as stored", "as seen"])
def test_a_turned_image_keeps_its_boxes(size, voc):
    "The stated size tells which image was annotated."
    turned(image(voc))
    box = np.float32([[0, 0, 40, 32]] if size == (40, 64) else [[0, 0, 32, 40]])
    page(voc).write_text(to_voc(Example(1, None, box, np.int32([0]), *size), NAMES, "x.jpg"))
    example = read_dataset(voc, "train")[0]
    assert (example.width, example.height) == (40, 64)
    np.testing.assert_allclose(example.boxes, [[0, 0, 40, 32]], atol=1e-4)
