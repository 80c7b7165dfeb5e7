"""An exported folder: its manifest, its refusals, and the examples that run it without this library."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from fcos_lite.config import NMSConfig
from fcos_lite.data.letterbox import Letterbox
from fcos_lite.errors import InputError
from fcos_lite.export.runtime import MANIFEST_NAME, ExportedDetector, difference
from fcos_lite.export.writer import export_detector, reduce_precision
from fcos_lite.scenes.scenes import Scenes, World

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64     # of the network in conftest.py

def test_difference_compares_nearest_boxes():
    table = {"boxes": np.float32([[[0, 0, 10, 10], [20, 20, 40, 40]]]), "scores": np.float32([[0.9, 0.5]]),
             "labels": np.int32([[0, 1]]), "count": np.int32([2])}
    swapped = {name: value[:, ::-1] if value.ndim > 1 else value for name, value in table.items()}
    assert difference(table, swapped) == {"boxes": 0, "scores": 0, "unmatched": 0}
    moved = {**table, "boxes": table["boxes"] + np.float32([0, 0, 0, 2])}
    assert difference(table, moved)["boxes"] == 2
    fewer, empty = ({**table, "count": np.int32([count])} for count in (1, 0))
    assert difference(table, fewer)["unmatched"] == 0.5 == difference(fewer, table)["unmatched"]
    assert difference(table, {**table, "labels": np.int32([[0, 0]])})["unmatched"] == 0.5   # another class: no match
    assert difference(empty, empty)["unmatched"] == 0

def test_the_manifest_describes_the_graph(exports, images):
    exported, _, folder = exports("litert")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert (manifest["image_size"], manifest["class_names"], manifest["nms"]["iou"]) == (SIZE, ["person", "dog"], 0.3)
    outputs = exported(images[:1])
    assert {name: list(value.shape) for name, value in outputs.items()} \
        == {name: output["shape"] for name, output in manifest["outputs"].items()}
    assert {name: value.dtype.name for name, value in outputs.items()} \
        == {name: output["holds"].split()[0].rstrip(",") for name, output in manifest["outputs"].items()}

def test_a_damaged_folder_is_refused(exports, tmp_path):
    *_, folder = exports("litert")
    def copy(name): return Path(shutil.copytree(folder, tmp_path / name))
    data = bytearray((folder / "model.tflite").read_bytes())
    data[len(data) // 2] ^= 1
    (copy("flipped") / "model.tflite").write_bytes(data)
    (copy("gone") / "model.tflite").unlink()
    (copy("torn") / MANIFEST_NAME).write_text("{")
    (copy("other") / MANIFEST_NAME).write_text("[]")
    for name, message in (("flipped", "does not match"), ("gone", "missing"), ("torn", "not readable"),
                          ("other", "not the manifest"), ("nowhere", "no model.json")):
        with pytest.raises(InputError, match=message): ExportedDetector(tmp_path / name)

def test_what_cannot_be_exported_is_refused_and_leaves_nothing(model, exports, images, tmp_path):
    out = tmp_path / "new"
    for options, message in (({"format": "caffe"}, "choose one of"), ({"rows": -1}, "negative"),
                             ({"format": "onnx", "precision": "float16"}, "tensorrt.sh"),
                             ({"format": "saved_model", "precision": "int8"}, "comes in float32"),
                             ({"precision": "int8"}, "calibration_images"),
                             ({"rows": 100_000}, "candidates enter NMS")):
        with pytest.raises(InputError, match=message): export_detector(model, out, **options)
        assert not out.exists()
    with pytest.raises(InputError, match="exists already"): export_detector(model, tmp_path)
    *_, half = exports("litert", "float16")
    with pytest.raises(InputError, match="only float32 can be reduced"): reduce_precision(half, out, "int8", images)
    assert not list(tmp_path.iterdir())

def test_other_images_are_refused(exports):
    exported, *_ = exports("litert")
    for images in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3), np.uint8),
                   np.zeros((1, SIZE, SIZE, 3), np.float32)):
        with pytest.raises(InputError, match="this graph takes"): exported(images)

def test_boxes_come_back_into_an_image_that_is_not_square(exports, model):
    exported, *_ = exports("litert")
    image = np.tile(Scenes(1, 3, World(size=SIZE))[0].read(), (1, 3, 1))
    found, letterbox = exported.detect(image), Letterbox.fit(192, 64, SIZE)
    table = exported(letterbox.apply(image, model.config.pad_value)[None])
    np.testing.assert_allclose(found.xyxy, letterbox.boxes_out(table["boxes"][0, :table["count"][0]]), atol=1e-4)
    assert len(found) and found.xyxy[:, 2].max() <= 192 and found.xyxy[:, 3].max() <= 64
    by_keras = model.detect(image, NMSConfig(**exported.manifest["nms"]))[:30]
    np.testing.assert_allclose(found.xyxy, by_keras.xyxy, atol=0.05)
    np.testing.assert_allclose(found.score, by_keras.score, atol=1e-4)
    assert found.names() == by_keras.names()

WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {barred}: raise ImportError("barred: " + name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["example", {folder}, {image}]
runpy.run_path({example})
"""

@pytest.mark.parametrize("format, barred", [
    ("litert", ("keras", "tensorflow", "fcos_lite")), ("onnx", ("keras", "tensorflow", "fcos_lite")),
    ("saved_model", ("fcos_lite",))])
def test_the_example_gives_the_same_boxes_without_the_library(format, barred, exports, tmp_path):
    exported, _, folder = exports(format)
    image = Scenes(3, 7, World(size=SIZE))[1].read()[:48]     # 64 x 48: not scaled, so no two ways of scaling differ
    cv2.imwrite(str(tmp_path / "scene.png"), image[..., ::-1])
    code = WITHOUT.format(barred=repr(barred), folder=repr(str(folder)), image=repr(str(tmp_path / "scene.png")),
                          example=repr(str(ROOT / "examples" / f"detect_{format}.py")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    lines, found = [line.split() for line in done.stdout.splitlines()], exported.detect(image)
    assert len(lines) == len(found) > 0
    for (name, score, *box), expected_name, expected, xyxy in zip(lines, found.names(), found.score, found.xyxy):
        assert name == expected_name and abs(float(score) - expected) < 2e-3
        np.testing.assert_allclose(np.float32(box), xyxy, atol=0.1)
