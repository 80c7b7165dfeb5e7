"""Shards of a limited size: all of them or none."""
import errno
import os
import pytest
from fcos_lite.data import shards
from fcos_lite.data.datasets import read_dataset, read_datasets
from fcos_lite.errors import InputError
from .folders import message, same

@pytest.fixture
def out(tmp_path):
    "A folder with something else in it."
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("mine")
    return tmp_path / "out"

def pack(coco, out, **options):
    examples = read_dataset(coco, "train2017")
    return shards.pack_dataset(examples, "train2017", out, image_size=32, max_mb=0.002, **options)

def test_the_shards_together_are_the_dataset(layouts, layouts_scenes, tmp_path):
    for layout in ("YOLO", "VOC"):
        examples = read_dataset(layouts / layout, "train", layouts_scenes.class_names)
        paths = shards.pack_dataset(examples, "train", tmp_path / layout, image_size=2000, max_mb=0.02)
        assert len(paths) > 1
        same(layouts_scenes, read_datasets(paths, "train", layouts_scenes.class_names), crowds=layout != "YOLO")

def test_an_image_that_breaks_on_the_way_is_counted(coco, out, monkeypatch):
    downscale = shards._downscale
    def torn(example, size):
        if example.image_id == 3: raise InputError("3.jpg: the image is truncated")
        return downscale(example, size)
    monkeypatch.setattr(shards, "_downscale", torn)
    error = message(lambda: pack(coco, out))
    assert "1 of 8 images cannot be used" in error and "image that cannot be decoded; first: 3.jpg" in error
    assert os.listdir(out) == ["diary.txt"]
    paths = pack(coco, out, max_bad_share=0.2)
    assert [example.image_id for example in read_datasets(paths, "train2017")] == [1, 2, 4, 5, 6, 7, 8]

def test_a_full_disk_after_two_shards_leaves_none(coco, out, monkeypatch):
    write_coco, written = shards.write_coco, []
    def full(folder, *arguments):
        if len(written) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        written.append(folder)
        write_coco(folder, *arguments)
    monkeypatch.setattr(shards, "write_coco", full)
    error = message(lambda: pack(coco, out))
    assert f"{out}" in error and "cannot be written (No space left on device); make room" in error
    assert len(written) == 2 and os.listdir(out) == ["diary.txt"]
