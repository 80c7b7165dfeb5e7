"""Smaller numbers give nearly the same boxes."""
import numpy as np
import pytest

from fcos_lite.config import COCO_NMS
from fcos_lite.export.runtime import FORMATS
from fcos_lite.export.writer import compare_with_keras, export_detector, reduce_precision
from fcos_lite.scenes.scenes import Scenes, World

def fraction_found_again(module, exported, images, tolerance=4.0):
    "The fraction of images whose best box by Keras is also in the export's table."
    hits = []
    for image in images:
        by_keras, table = module.predict_on_batch(image[None]), exported(image[None])
        if not int(by_keras["count"][0]): continue
        distance = np.abs(table["boxes"][0, :table["count"][0]] - np.array(by_keras["boxes"])[0, 0]).max(-1)
        hits.append(bool((distance < tolerance).any()))
    return np.mean(hits)

@pytest.mark.parametrize("format, precision, tolerance, scores, fraction", [
    ("litert", "float16", 0.5, 0.005, 0.98), ("litert", "int8", 4.0, 0.15, 0.8), ("onnx", "int8", 4.0, 0.15, 0.6)])
def test_smaller_numbers_give_nearly_the_same(format, precision, tolerance, scores, fraction, exports, images):
    "An untrained network is a hard case: nothing taught it to be sure. What AP a trained one loses is measured below."
    (exported, module, folder), (*_, exact) = exports(format, precision), exports(format)
    worst = compare_with_keras(exported, module, images, tolerance)
    again = fraction_found_again(module, exported, images)
    assert 0 < worst["scores"] < scores and again >= fraction, (worst, again)
    if format == "litert": assert (folder / "model.tflite").stat().st_size < (exact / "model.tflite").stat().st_size

def test_int8_has_integer_convolutions_and_exact_last_layers(exports):
    *_, folder = exports("litert", "int8")
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_path=str(folder / "model.tflite"))
    types = {True: set(), False: set()}
    for op in interpreter._get_ops_details():
        if op["op_name"] != "CONV_2D": continue
        output = interpreter._get_tensor_details(op["outputs"][0], 0)
        is_last = any(name in output["name"] for name in ("Classification", "Regression", "Centerness"))
        types[is_last].add(output["dtype"].__name__)
    assert types == {True: {"float32"}, False: {"int8"}}

@pytest.mark.slow
def test_the_shipped_detector_at_its_size_on_fifty_scenes(tmp_path):
    "Every format and precision: float32 as Keras, the AP of the others against float32's."
    from fcos_lite.detector.model import load_detector
    from fcos_lite.evaluate.metrics import coco_evaluation
    from fcos_lite.export.__main__ import calibration_batch
    model = load_detector("person")
    scenes, names = list(Scenes(50, 0, World(size=model.config.image_size))), model.config.class_names
    images = np.stack([scene.read() for scene in scenes])
    calibration = calibration_batch((), model.config, 32, seed=1_000)
    ap = {}
    for format, precisions in FORMATS.items():
        for precision in precisions:
            exact, folder = tmp_path / f"{format}-float32", tmp_path / f"{format}-{precision}"
            if precision == "float32":
                exported, module = export_detector(model, folder, format=format, nms=COCO_NMS)
                worst = compare_with_keras(exported, module, images)
                assert worst["boxes"] < 0.5 and worst["scores"] < 1e-3 and worst["unmatched"] < 2e-3, (format, worst)
            else: exported = reduce_precision(exact, folder, precision, calibration)
            detections = [exported.detect(image) for image in images]
            ap[format, precision] = coco_evaluation(scenes, detections, names)[0]["AP"]
    print({" ".join(kind): round(float(value), 4) for kind, value in ap.items()})
    loss = {"float32": 1e-3, "float16": 3e-3, "int8": 0.03}
    for (format, precision), value in ap.items():
        assert value > ap["litert", "float32"] - loss[precision], (format, precision, ap)
