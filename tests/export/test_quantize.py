"""What is exported says what Keras says: every format, on fifty scenes, by its own runtime; and a folder that anyone can use."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import cv2
import numpy as np
import pytest
from fcos_lite.config import COCO_NMS, CAMERA_NMS, InputError, ModelConfig
from fcos_lite.export.__main__ import compare, export, load_at, main, representative, shrink
from fcos_lite.export.runtime import FORMATS, MANIFEST_NAME, ExportedDetector, difference, read_manifest
from fcos_lite.data.images import Letterbox
from fcos_lite.scenes.scenes import Scenes, World

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
TINY = ModelConfig(image_size=SIZE, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
               strides=(4, 8), tower_depth=1, tower_channels=16, tower_groups=4, class_names=("person", "dog"), ltrb_bias=0.0, scale_init=1.0)
LIMITS = replace(CAMERA_NMS, score=0.25, candidates=100)

@pytest.fixture(scope="module")
def model():
    "A network that never learned, but is opinionated: its scores lie far apart, so that an order and a threshold mean something."
    from fcos_lite.detector.backbone import reinitialize_kernels
    from fcos_lite.detector.model import FCOS
    model = FCOS(TINY)
    h = model.heads
    reinitialize_kernels([*model.fpn.layers, *h.cls_tower.layers, *h.reg_tower.layers, h.classes, h.distances, h.centers], 0)     # the same in every run
    for part in (h.classes, h.distances, h.centers): part.kernel.assign(20 * part.kernel)
    for part in (h.classes, h.centers): part.bias.assign(np.full(part.bias.shape, -0.5))
    return model

@pytest.fixture(scope="module")
def squares():
    return np.stack([scene.read() for scene in Scenes(50, 0, World(size=SIZE))])

@pytest.fixture(scope="module")
def written(model, squares, tmp_path_factory):
    "A function that exports the network once a format, and makes the smaller ones of it."
    done, root = {}, tmp_path_factory.mktemp("exports")
    def write(format, precision="float32"):
        if (format, precision) in done: return done[format, precision]
        folder = root / f"{format}-{precision}"
        if precision == "float32": done[format, precision] = *export(model, folder, format, thresholds=LIMITS, rows=30), folder
        else:
            _, boxes, exact = write(format)
            done[format, precision] = shrink(exact, folder, precision, squares[:16]), boxes, folder
        return done[format, precision]
    return write

def package(format): # without which a format cannot be written and read
    return {"litert": "ai_edge_litert", "onnx": "onnxruntime", "saved_model": "tensorflow"}[format]

@pytest.mark.parametrize("format", FORMATS)
def test_float32_says_what_keras_says(format, written, squares):
    pytest.importorskip(package(format))
    exported, boxes, _ = written(format)
    counts = [int(boxes.predict_on_batch(square[None])["count"][0]) for square in squares[:10]]
    assert sum(counts) > 20 and min(counts) < max(counts), "the pictures must hold boxes, and not all as many"
    apart = compare(exported, boxes, squares)
    assert apart["boxes"] < 0.5 and apart["scores"] < 1e-3 and apart["alone"] == 0, apart

def best_found_again(boxes, exported, squares, near=4.0):
    "The share of the pictures whose best box by Keras is also in the export's table."
    hits = []
    for square in squares:
        ours, theirs = boxes.predict_on_batch(square[None]), exported(square[None])
        if int(ours["count"][0]): hits.append(bool((np.abs(theirs["boxes"][0, :theirs["count"][0]] - np.array(ours["boxes"])[0, 0]).max(-1) < near).any()))
    return np.mean(hits)

@pytest.mark.parametrize("format, precision, near, scores, share", [("litert", "float16", 0.5, 0.005, 0.98), ("litert", "int8", 4.0, 0.15, 0.8), ("onnx", "int8", 4.0, 0.15, 0.6)])
def test_smaller_numbers_say_nearly_the_same(format, precision, near, scores, share, written, squares):
    "An untrained network is a hard case: nothing taught it to be sure. What AP a trained one loses is measured below."
    pytest.importorskip(package(format))
    (exported, boxes, folder), (*_, exact) = written(format, precision), written(format)
    apart, again = compare(exported, boxes, squares, near), best_found_again(boxes, exported, squares)
    assert 0 < apart["scores"] < scores and again >= share, (apart, again)
    if format == "litert": assert (folder / "model.tflite").stat().st_size < (exact / "model.tflite").stat().st_size

def test_int8_has_integer_convolutions_and_exact_answers(written):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    *_, folder = written("litert", "int8")
    tool = interpreter.Interpreter(model_path=str(folder / "model.tflite"))
    outputs = [tool._get_tensor_details(op["outputs"][0], 0) for op in tool._get_ops_details() if op["op_name"] == "CONV_2D"]
    kinds = {True: set(), False: set()}
    for output in outputs: kinds[any(name in output["name"] for name in ("Classification", "Regression", "Centerness"))].add(output["dtype"].__name__)
    assert kinds == {True: {"float32"}, False: {"int8"}}

def test_the_table_is_filled_from_the_top(written, squares):
    exported, *_ = written("litert")
    for square in squares[:10]:
        found, = ({name: value[0] for name, value in table.items()} for table in [exported(square[None])])
        count = found["count"]
        assert (np.diff(found["scores"]) <= 0).all() and (found["scores"][:count] > LIMITS.score).all()
        assert (found["scores"][count:] == 0).all() and (found["labels"][count:] == -1).all() and (found["boxes"][count:] == 0).all()
        assert set(found["labels"][:count]) <= {0, 1}

def test_more_boxes_than_rows_gives_the_best(model, squares):
    from fcos_lite.export.graph import ExportModule
    many, few = ExportModule(model, LIMITS, 100)(squares[:4]), ExportModule(model, LIMITS, 3)(squares[:4])
    assert (np.array(many["count"]) > 3).any()
    for name in ("boxes", "scores", "labels"): np.testing.assert_array_equal(np.array(few[name]), np.array(many[name])[:, :3])
    np.testing.assert_array_equal(np.array(few["count"]), np.minimum(many["count"], 3))

def test_difference_sees_what_it_should():
    table = {"boxes": np.float32([[[0, 0, 10, 10], [20, 20, 40, 40]]]), "scores": np.float32([[0.9, 0.5]]), "labels": np.int32([[0, 1]]), "count": np.int32([2])}
    swapped = {name: value[:, ::-1] if value.ndim > 1 else value for name, value in table.items()}
    assert difference(table, swapped) == {"boxes": 0, "scores": 0, "alone": 0}
    moved = {**table, "boxes": table["boxes"] + np.float32([0, 0, 0, 2])}
    assert difference(table, moved)["boxes"] == 2
    assert difference(table, {**table, "count": np.int32([1])})["alone"] == 0.5 == difference({**table, "count": np.int32([1])}, table)["alone"]
    assert difference(table, {**table, "labels": np.int32([[0, 0]])})["alone"] == 0.5
    assert difference({**table, "count": np.int32([0])}, {**table, "count": np.int32([0])})["alone"] == 0

def test_the_page_says_what_the_graph_takes_and_gives(written, squares):
    exported, _, folder = written("litert")
    page = json.loads((folder / MANIFEST_NAME).read_text())
    assert (page["image_size"], page["class_names"], page["thresholds"]["iou"]) == (SIZE, ["person", "dog"], 0.3)
    found = exported(squares[:1])
    assert {name: list(value.shape) for name, value in found.items()} == {name: output["shape"] for name, output in page["outputs"].items()}
    assert {name: value.dtype.name for name, value in found.items()} == {name: output["holds"].split()[0].rstrip(",") for name, output in page["outputs"].items()}

def copied(folder, target):
    target.mkdir()
    for file in folder.iterdir(): (target / file.name).write_bytes(file.read_bytes())
    return target

def test_a_damaged_folder_is_refused(written, tmp_path):
    *_, folder = written("litert")
    data = bytearray((folder / "model.tflite").read_bytes())
    data[len(data) // 2] ^= 1
    (copied(folder, tmp_path / "flipped") / "model.tflite").write_bytes(data)
    with pytest.raises(InputError, match="damaged or exchanged"): ExportedDetector(tmp_path / "flipped")
    (copied(folder, tmp_path / "gone") / "model.tflite").unlink()
    with pytest.raises(InputError, match="missing"): ExportedDetector(tmp_path / "gone")
    (copied(folder, tmp_path / "page") / MANIFEST_NAME).write_text("{")
    with pytest.raises(InputError, match="not readable"): ExportedDetector(tmp_path / "page")
    with pytest.raises(InputError, match="no model.json"): ExportedDetector(tmp_path)

def test_bad_wishes_are_refused_and_leave_nothing(model, squares, tmp_path):
    for wish, says in (({"format": "caffe"}, "choose one of"), ({"format": "onnx", "precision": "float16"}, "tensorrt.sh"), ({"format": "saved_model", "precision": "int8"}, "comes in float32"),
                       ({"precision": "int8"}, "representative pictures"), ({"rows": -1}, "negative"), ({"rows": 100_000, "thresholds": LIMITS}, "candidates enter NMS")):
        with pytest.raises(InputError, match=says): export(model, tmp_path / "new", **wish)
        assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="exists already"): export(model, tmp_path / "old")
    (tmp_path / "old" / "mine.txt").write_text("precious")
    for words, says in (([], "add --force"), (["--force"], "something else")):
        with pytest.raises(InputError, match=says): main(["--out", str(tmp_path / "old"), *words])
    assert (tmp_path / "old" / "mine.txt").read_text() == "precious"

def test_an_exported_detector_refuses_other_pictures(written):
    exported, *_ = written("litert")
    for squares in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)):
        with pytest.raises(InputError, match="this graph takes"): exported(squares)

WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {barred}: raise ImportError("barred: " + name)
sys.meta_path.insert(0, Refuse())
"""

@pytest.mark.parametrize("format, barred", [("litert", ("keras", "tensorflow", "fcos_lite")), ("onnx", ("keras", "tensorflow", "fcos_lite")), ("saved_model", ("fcos_lite",))])
def test_the_example_gives_the_same_boxes_without_keras(format, barred, written, tmp_path):
    pytest.importorskip(package(format))
    exported, _, folder = written(format)
    picture = Scenes(3, 7, World(size=SIZE))[1].read()[:48]        # 64 x 48: it lies in its square unscaled, so that no two ways of scaling can differ
    cv2.imwrite(str(tmp_path / "scene.png"), picture[..., ::-1])
    code = WITHOUT.replace("{barred}", repr(barred)) + f"sys.argv = ['example', {str(folder)!r}, {str(tmp_path / 'scene.png')!r}]\nrunpy.run_path({str(ROOT / 'examples' / f'detect_{format}.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    found = exported.detect(picture)
    assert len(lines) == len(found["score"]) > 0
    for (name, score, *box), xyxy, expected, label in zip(lines, found["xyxy"], found["score"], found["label"]):
        assert name == TINY.class_names[label] and abs(float(score) - expected) < 2e-3
        np.testing.assert_allclose(np.float32(box), xyxy, atol=0.1)

def test_importing_the_command_loads_no_tensorflow():
    code = "import sys, fcos_lite.export as e; e.parser().format_help(); print([name for name in ('tensorflow', 'keras', 'jax', 'onnxruntime', 'ai_edge_litert') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

def test_boxes_come_back_into_a_picture_that_is_not_square(written):
    exported, *_ = written("litert")
    picture = np.tile(Scenes(1, 3, World(size=SIZE))[0].read(), (1, 3, 1))
    found, fit = exported.detect(picture), Letterbox.fit(192, 64, SIZE)
    table = exported(fit.apply(picture, TINY.pad_value)[None])
    np.testing.assert_allclose(found["xyxy"], fit.boxes_out(table["boxes"][0, :table["count"][0]]), atol=1e-4)
    assert len(found["score"]) and found["xyxy"][:, 2].max() <= 192 and found["xyxy"][:, 3].max() <= 64

@pytest.mark.slow
def test_the_command_from_weights_to_checked_boxes(tmp_path, capsys):
    "The shipped detector, at a small size, by the command, then refused and replaced."
    command = ["--weights", "person", "--image-size", "64", "--precision", "int8", "--representative", "4", "--candidates", "100", "--out", str(tmp_path / "small")]
    main(command)
    assert "against Keras" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1
    assert read_manifest(tmp_path / "small")["weights"]["sha256"] in (ROOT / "weights/person.weights.h5.sha256").read_text()
    with pytest.raises(InputError, match="add --force"): main(command)
    main([*command, "--force", "--no-nms"])
    assert set(read_manifest(tmp_path / "small")["outputs"]) == {"boxes", "scores"}

@pytest.mark.slow
def test_the_shipped_detector_at_its_size_on_fifty_scenes(tmp_path):
    "Every format and precision: float32 to the mark, the AP of the others against float32's."
    from fcos_lite.evaluate.metrics import coco_evaluation
    from fcos_lite.detector.nms import Detections
    model, weights = load_at("person")
    size = model.config.image_size
    scenes = list(Scenes(50, 0, World(size=size)))
    squares, learned = np.stack([scene.read() for scene in scenes]), representative(None, model.config, 32, seed=1_000)
    average = {}
    for format, kinds in FORMATS.items():
        for precision in kinds:
            if precision != "float32": exported = shrink(tmp_path / f"{format}-float32", tmp_path / f"{format}-{precision}", precision, learned)
            else:
                exported, boxes = export(model, tmp_path / f"{format}-{precision}", format, thresholds=COCO_NMS, weights=weights)
                apart = compare(exported, boxes, squares)
                assert apart["boxes"] < 0.5 and apart["scores"] < 1e-3 and apart["alone"] < 2e-3, (format, apart)
            tables = [exported(square[None]) for square in squares]
            found = [Detections(t["boxes"][0, :t["count"][0]], t["scores"][0, :t["count"][0]], t["labels"][0, :t["count"][0]], model.config.class_names) for t in tables]
            average[format, precision] = coco_evaluation(scenes, found, model.config.class_names)[0]["AP"]
    print({" ".join(kind): round(float(value), 4) for kind, value in average.items()})
    for (format, precision), value in average.items():
        assert value > average["litert", "float32"] - {"float32": 1e-3, "float16": 3e-3, "int8": 0.03}[precision], (format, precision, average)
