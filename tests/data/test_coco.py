"""A COCO folder from outside: each mistake stops with a sentence that names file, field and remedy, or is skipped and counted."""
import shutil
import numpy as np
import pytest
from PIL import Image
from fcos_lite.data.batches import Batches
from fcos_lite.data.datasets import read_dataset
from .folders import (
    content, cut, entry, header_only, instances, link, refuses, replaced_by_fifo, replaced_by_folder,
    resized, rewrite, same, skips, turned)

def bbox(*numbers): return entry("annotations", bbox=list(numbers))
def twice(key): return lambda folder: rewrite(folder, lambda document: document[key].append(document[key][0]))
def text(value): return lambda folder: instances(folder).write_text(value)
def without_images(folder):
    for file in (folder / "train2017").iterdir(): file.unlink()
def train_image(folder): return folder / "train2017/000000000001.jpg"

# how the folder is broken: words that the message must hold
REFUSALS = {
    "folder missing": (lambda f: f.rename(f.with_name("gone")), ["coco: no such folder", "COCO, YOLO or Pascal VOC"]),
    "no annotations": (lambda f: instances(f).unlink(), ["instances_train2017.json: no such file", "instances_SPLIT.json"]),
    "no folder of images": (lambda f: shutil.rmtree(f / "train2017"), ["train2017: no such folder", "belong there"]),
    "no images in it": (without_images, ["none of its images could be read", "8 skipped: image that is missing"]),
    "not JSON": (text('{"images": ['), ["instances_train2017.json: not JSON", "again"]),
    "not text": (lambda f: instances(f).write_bytes(bytes(range(256))), ["instances_train2017.json: not JSON"]),
    "nested too deep": (text("[" * 200_000), ["instances_train2017.json: not JSON"]),
    "a number too long": (text('{"images": ' + "9" * 10_000 + "}"), ["instances_train2017.json: not JSON"]),
    "a list outermost": (text("[]"), ["instances_train2017.json", "outermost", "COCO instances file"]),
    "no categories": (lambda f: rewrite(f, lambda d: d.pop("categories")), ["'categories' is missing"]),
    "images is an object": (lambda f: rewrite(f, lambda d: d.update(images={})), ["'images' is missing"]),
    "an image is a number": (lambda f: rewrite(f, lambda d: d.update(images=[3])), ["images[0] lacks id, file_name, width, height"]),
    "no file_name": (entry("images", file_name=None), ["instances_train2017.json", "images[0] lacks file_name"]),
    "no bbox": (entry("annotations", bbox=None), ["annotations[0] lacks bbox"]),
    "no category_id": (entry("annotations", category_id=None), ["annotations[0] lacks category_id"]),
    "width is a string": (entry("images", width="64"), ["images[0].width is '64'", "must be a number above 0"]),
    "width is NaN": (entry("images", width=float("nan")), ["images[0].width is nan", "above 0"]),
    "height is 0": (entry("images", height=0), ["images[0].height is 0", "above 0"]),
    "width is huge": (entry("images", width=10 ** 400), ["images[0].width is 1000", "above 0"]),
    "id is huge": (entry("images", id=2 ** 63), ["images[0].id is 9223372036854775808", "whole number"]),
    "id is nested": (entry("images", id=[[1]]), ["images[0].id is [[1]]", "whole number"]),
    "image_id is a string": (entry("annotations", image_id="1"), ["annotations[0].image_id is '1'", "whole number"]),
    "category_id is nested": (entry("annotations", category_id={"a": []}), ["annotations[0].category_id is {'a': []}"]),
    "name is a number": (entry("categories", name=7), ["categories[0].name is 7", "must be a text"]),
    "category id twice": (twice("categories"), ["categories has the id [1] more than once"]),
    "category not there": (entry("categories", name="horse"), ["no category 'person'", "choose from horse"]),
    "image leads out": (link(train_image), ["000000000001.jpg: a link that leads out of"]),
    "image leads nowhere": (link(train_image, dangling=True), ["000000000001.jpg: a link that leads out of"]),
    "images lead out": (link(lambda f: f / "train2017"), ["a link that leads out of"]),
    "annotations lead out": (link(instances), ["instances_train2017.json: a link that leads out of"]),
}
# how the folder is broken: the reason it is counted under, what the first case says
SKIPS = {
    "image missing": (lambda f: train_image(f).unlink(), "image that is missing", "000000000001.jpg"),
    "image is a folder": (replaced_by_folder(train_image), "image that is missing", "000000000001.jpg"),
    "image is a FIFO": (replaced_by_fifo(train_image), "image that is missing", "000000000001.jpg"),
    "name too long": (entry("images", file_name="a" * 5000), "image that is missing", "aaa"),
    "image truncated": (cut, "image that cannot be read", "000000000001.jpg: "),
    "image of no bytes": (content(b""), "image that cannot be read", "000000000001.jpg: the file is empty"),
    "image is a web page": (content(b"<html>"), "image that cannot be read", "000000000001.jpg: not an image"),
    "image is a header": (content(b"\xff\xd8\xff\xe0"), "image that cannot be read", "000000000001.jpg: "),
    "99 megapixels, none there": (content(header_only(9_000, 11_000)), "image of another size than the file says", "000000000001.jpg: "),
    "120 megapixels": (content(header_only(12_000, 10_000)), "image that cannot be read", "more than 100 megapixels"),
    "400 megapixels": (content(header_only(20_000, 20_000)), "image that cannot be read", "more than 100 megapixels"),
    "another image": (resized(64, 48), "image of another size than the file says", "64 x 64 by the annotation"),
    "name leads upwards": (entry("images", file_name="../../secret.jpg"), "image whose name leads out of its folder", "'../../secret.jpg' leads out of"),
    "name is absolute": (entry("images", file_name="/etc/passwd"), "image whose name leads out of its folder", "image 1: file name '/etc/passwd'"),
    "name has a drive": (entry("images", file_name="C:\\x.jpg"), "image whose name leads out of its folder", "leads out of"),
    "name leads up on Windows": (entry("images", file_name="a\\..\\..\\x.jpg"), "image whose name leads out of its folder", "leads out of"),
    "name with a zero byte": (entry("images", file_name="a\0.jpg"), "image whose name leads out of its folder", "leads out of"),
    "box of no area": (bbox(8, 8, 0, 24), "box of no area", "annotations[0]"),
    "box turned inside out": (bbox(30, 30, -8, 9), "box of no area", "[30, 30, -8, 9]"),
    "box outside": (bbox(64, 8, 9, 9), "box outside its image", "[64, 8, 9, 9]"),
    "box far outside": (bbox(-1e30, 8, 9, 9), "box outside its image", "annotations[0]"),
    "box with NaN": (bbox(float("nan"), 8, 9, 9), "box with NaN or infinity", "nan"),
    "box with infinity": (bbox(8, 8, float("inf"), 9), "box with NaN or infinity", "inf"),
    "box of three": (bbox(8, 8, 9), "box that is not four numbers", "[8, 8, 9]"),
    "box of strings": (bbox("8", "8", "9", "9"), "box that is not four numbers", "'8'"),
    "box of lists": (bbox([8], [[8]], 9, 9), "box that is not four numbers", "annotations[0]"),
    "box of truths": (bbox(True, True, 9, 9), "box that is not four numbers", "annotations[0]"),
    "box with a huge number": (bbox(8, 8, 10 ** 400, 9), "box that is not four numbers", "annotations[0]"),
    "box is a word": (entry("annotations", bbox="everywhere"), "box that is not four numbers", "everywhere"),
    "unknown category": (entry("annotations", category_id=99), "box of a category that is not listed", "category 99"),
    "unknown image": (entry("annotations", image_id=404), "box of an image that is not listed", "image_id 404"),
}

@pytest.mark.parametrize("case", REFUSALS)
def test_a_broken_folder_is_refused(case, coco): refuses(coco, *REFUSALS[case], "train2017")

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", SKIPS)
def test_one_bad_image_or_box_is_skipped_and_counted(case, coco): skips(coco, *SKIPS[case], "train2017")

def test_of_images_that_share_an_id_neither_is_used(coco):
    "Whose are the boxes? Nobody can tell; the others are what they were."
    before = read_dataset(coco, "train2017")
    rewrite(coco, lambda document: document["images"].append({**document["images"][1], "id": 1}))
    after = read_dataset(coco, "train2017", max_bad_share=0.5)
    assert dict(after.report.skipped) == {"image whose id another one has": 2}
    same(before[1:], after)
    assert "images has the id [1] more than once; give each its own" in str(after.report)

def first_image(folder, size, box):
    "State the size of the first image, and one box for each of its boxes."
    def change(document):
        document["images"][0].update(width=size[0], height=size[1])
        for annotation in document["annotations"]:
            if annotation["image_id"] == 1: annotation.update(bbox=box)
    rewrite(folder, change)

def test_images_in_cmyk_and_with_16_bits_keep_their_colours(coco):
    Image.new("RGB", (64, 64), (220, 40, 30)).convert("CMYK").save(train_image(coco), "JPEG", quality=95)
    assert np.abs(read_dataset(coco, "train2017")[0].read().astype(int) - (220, 40, 30)).max() < 12
    Image.fromarray(np.full((64, 64), 200 * 257, np.uint16)).save(train_image(coco), "PNG")
    assert np.abs(read_dataset(coco, "train2017")[0].read().astype(int) - 200).max() <= 1

def test_an_image_one_pixel_wide_is_an_image(coco):
    Image.new("RGB", (1, 64), "white").save(train_image(coco), "JPEG")
    first_image(coco, (1, 64), [0, 8, 1, 30])
    examples = read_dataset(coco, "train2017")
    image, truth = Batches(examples, 1, 64)[0]
    assert not examples.report.skipped and image.shape == (1, 64, 64, 3)
    left, top, right, bottom = truth["boxes"][0, 0]
    np.testing.assert_allclose([top, bottom], [8, 38])
    assert 0 <= left < right <= 64

@pytest.mark.parametrize("size, box", [((40, 64), [0, 0, 40, 32]), ((64, 40), [0, 0, 32, 40])], ids=["as seen", "as stored"])
def test_an_image_turned_by_exif_keeps_its_boxes(size, box, coco):
    turned(train_image(coco))
    first_image(coco, size, box)
    example = read_dataset(coco, "train2017")[0]
    assert (example.width, example.height) == (40, 64)
    np.testing.assert_allclose(example.boxes, [[0, 0, 40, 32]] * len(example.boxes))
    assert example.read()[:30].mean() > 250 and example.read()[34:].mean() < 5, "the box is where the white is"

def test_an_image_that_was_scaled_takes_its_boxes_along(coco):
    before = read_dataset(coco, "train2017")[0]
    resized(128, 128)(coco)
    after = read_dataset(coco, "train2017")[0]
    np.testing.assert_allclose(after.boxes, 2 * before.boxes)
    np.testing.assert_allclose(after.areas, 4 * before.areas)
    in_squares = [Batches([example], 1, 64)[0][1]["boxes"] for example in (before, after)]
    np.testing.assert_allclose(*in_squares, atol=1e-4)

def test_categories_go_by_name_whatever_their_numbers(coco):
    "Ids from 1, with gaps, in no order: the mistake that gives an AP of 0.002."
    def renumber(document):
        names = {1: "bicycle", 90: "person", 17: "cat"}
        document["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        for number, annotation in enumerate(document["annotations"]): annotation["category_id"] = (90, 17, 1)[number % 3]
    before = [len(example.boxes) for example in read_dataset(coco, "train2017")]
    rewrite(coco, renumber)
    examples = read_dataset(coco, "train2017", ("cat", "person", "bicycle"))
    labels = np.concatenate([example.labels for example in examples])
    np.testing.assert_array_equal(labels, np.resize([1, 0, 2], len(labels)))
    assert [len(example.boxes) for example in examples] == before
    people = read_dataset(coco, "train2017", ("person",))
    np.testing.assert_array_equal(np.concatenate([example.labels for example in people]), np.zeros((labels == 1).sum()))
    assert len(people) == 8, "images without people stay"

def test_crowd_regions_are_not_boxes(coco):
    entry("annotations", iscrowd=1, area=123.5)(coco)
    examples = read_dataset(coco, "train2017")
    assert examples[0].labels[0] == -2 and examples[0].areas[0] == 123.5
    assert examples.report.crowds == 1
    assert examples.report.boxes == sum(len(example.boxes) for example in examples) - 1
    assert Batches(examples, 8, 64)[0][1]["labels"][0, 0] == -2

@pytest.mark.parametrize("name", ["two people.jpg", "Zwei Leute – 二人.jpg", "a/b c/d.jpg", "..x.jpg", "%s\\ud800.jpg", "-rf.jpg", "'; drop.jpg"])
def test_odd_names_are_names(name, coco):
    before = read_dataset(coco, "train2017")
    path = coco / "train2017" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    train_image(coco).rename(path)
    entry("images", file_name=name)(coco)
    same(before, read_dataset(coco, "train2017"))

def test_a_link_within_the_folder_does_no_harm(coco):
    before = read_dataset(coco, "train2017")
    shutil.move(train_image(coco), coco / "elsewhere.jpg")
    train_image(coco).symlink_to("../elsewhere.jpg")
    same(before, read_dataset(coco, "train2017"))

def test_key_points_roboflow_and_names_without_a_year(coco):
    "The annotations may have other names; outlines and key points are not kept in memory."
    before = read_dataset(coco, "train2017")
    rewrite(coco, lambda document: document["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6]], keypoints=[1, 2, 2]))
    file = instances(coco)
    for name in ("annotations/person_keypoints_train2017.json", "train2017/_annotations.coco.json"):
        file = file.rename(coco / name)
        same(before, read_dataset(coco, "train2017"))
    (coco / "train2017").rename(coco / "train")
    same(before, read_dataset(coco, "train2017"))
