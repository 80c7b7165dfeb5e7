"""Datasets as other tools export them, and ways to break one."""
import json
import os
import shutil
import struct
import zlib
from xml.etree.ElementTree import Element, SubElement, tostring
import numpy as np
import pytest
from PIL import Image
from fcos_lite.data.coco import write_coco
from fcos_lite.data.datasets import read_dataset
from fcos_lite.data.images import find_images
from fcos_lite.errors import InputError

NAMES = ("person", "dog")

# --- writing

def to_yolo(example):
    "Return a label file; YOLO has no word for crowd regions."
    near, far = example.boxes[:, :2], example.boxes[:, 2:]
    rows = np.concatenate([(near + far) / 2, far - near], 1) / np.array([example.width, example.height] * 2)
    return "".join(f"{label} " + " ".join(f"{value:.6f}" for value in row) + "\n"
                   for label, row in zip(example.labels, rows) if label >= 0)

def write_yolo(folder, split, examples, class_names):
    for name in (f"images/{split}", f"labels/{split}"): (folder / name).mkdir(parents=True)
    for example in examples:
        name = f"{example.image_id:012d}"
        Image.fromarray(example.read()).save(folder / f"images/{split}/{name}.jpg", quality=95)
        (folder / f"labels/{split}/{name}.txt").write_text(to_yolo(example))
    names = ", ".join(class_names)
    (folder / "data.yaml").write_text(f"path: .\n{split}: images/{split}\nnames: [{names}]\n")

SIDES = ("xmin", "ymin", "xmax", "ymax")

def to_voc(example, class_names, file_name):
    "Return an annotation; crowd regions become `difficult` objects."
    annotation = Element("annotation")
    SubElement(annotation, "filename").text = file_name
    size = SubElement(annotation, "size")
    for side in ("width", "height"): SubElement(size, side).text = str(getattr(example, side))
    for (left, top, right, bottom), label in zip(example.boxes, example.labels):
        element = SubElement(annotation, "object")
        SubElement(element, "name").text = class_names[max(label, -2 - label)]
        SubElement(element, "difficult").text = str(int(label < -1))
        bndbox = SubElement(element, "bndbox")
        for side, value in zip(SIDES, (left + 1, top + 1, right, bottom)): SubElement(bndbox, side).text = f"{value:g}"
    return tostring(annotation, encoding="unicode")

def write_voc(folder, split, examples, class_names):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"): (folder / name).mkdir(parents=True)
    names = [f"{example.image_id:012d}" for example in examples]
    for name, example in zip(names, examples):
        Image.fromarray(example.read()).save(folder / f"JPEGImages/{name}.jpg", quality=95)
        (folder / f"Annotations/{name}.xml").write_text(to_voc(example, class_names, f"{name}.jpg"))
    (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))

WRITERS = {"COCO": write_coco, "YOLO": write_yolo, "VOC": write_voc}

# --- breaking: each of these, or what it returns, changes a folder

def image(folder, number=0): return find_images(folder)[number]
def content(data): return lambda folder: image(folder).write_bytes(data)
def cut(folder): image(folder).write_bytes(image(folder).read_bytes()[:-200])
def resized(width, height):
    return lambda folder: Image.open(image(folder)).resize((width, height)).save(image(folder), "JPEG")

def replaced_by_fifo(find):
    def change(folder):
        path = find(folder)
        path.unlink()
        os.mkfifo(path)
    return change

def replaced_by_folder(find):
    def change(folder):
        path = find(folder)
        path.unlink()
        path.mkdir()
    return change

def link(find, dangling=False):
    "Put a link to something outside into the place of a file or folder."
    def change(folder):
        outside, inner = folder.parent / "outside", find(folder)
        shutil.move(inner, outside)
        if dangling: outside.unlink()
        inner.symlink_to(outside)
    return change

def header_only(width, height):
    "Return a PNG that says how large it is, and brings none of its pixels."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))

def broken_inside(path):
    "Write an image whose both ends are in order, and whose middle is not."
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[3000:9000] = bytes(6000)
    path.write_bytes(data)

def turned(path, size=(40, 64)):
    "Write an image stored lying on its side, to be viewed upright; its upper half is white."
    upright = np.zeros((*size[::-1], 3), np.uint8)
    upright[:size[1] // 2] = 255
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(upright).copy()).save(path, "JPEG", quality=95, exif=exif)

# --- COCO

def instances(folder, split="train2017"): return folder / "annotations" / f"instances_{split}.json"

def rewrite(folder, change, split="train2017"):
    document = json.loads(instances(folder, split).read_text())
    change(document)
    instances(folder, split).write_text(json.dumps(document))

def entry(key, **fields):
    "Change the first entry of a list; a field of None goes."
    def change(document):
        document[key][0].update(fields)
        for name in [name for name, value in fields.items() if value is None]: del document[key][0][name]
    return lambda folder: rewrite(folder, change)

# --- looking

def message(call):
    with pytest.raises(InputError) as stopped: call()
    return str(stopped.value)

def same(before, after, atol=1e-3, crowds=True):
    assert [example.image_id for example in before] == [example.image_id for example in after]
    for one, other in zip(before, after):
        kept = np.ones(len(one.labels), bool) if crowds else one.labels >= 0
        assert (one.width, one.height) == (other.width, other.height)
        np.testing.assert_array_equal(one.labels[kept], other.labels)
        np.testing.assert_allclose(one.boxes[kept], other.boxes, atol=atol)

def refuses(folder, change, words, split):
    "A broken folder stops the reading, with a sentence that holds these words."
    change(folder)
    error = message(lambda: read_dataset(folder, split, ("person",), max_bad_share=1))
    for word in words: assert word in error
    assert len(error) < 1500, "a sentence, not a dump"

def skips(folder, change, reason, first, split):
    "One bad image or box is skipped, counted and reported; the others are what they were; past the limit reading stops."
    before = read_dataset(folder, split)
    change(folder)
    after = read_dataset(folder, split, max_bad_share=0.5)
    assert dict(after.report.skipped) == {reason: 1} and first in after.report.first[reason]
    an_image = reason.startswith("image")
    assert after.report.images == len(after)
    if len(after) == len(before): same(before[1:], after[1:], 1e-6)
    else: same(before[1:], after, 1e-6)
    assert an_image or len(after) == len(before) and len(after[0].boxes) >= len(before[0].boxes) - 1
    error = message(lambda: read_dataset(folder, split))
    for words in ("1 of ", "cannot be used", "limit 1 %", "--max-bad-share 0.", f"1 skipped: {reason}", first): assert words in error
