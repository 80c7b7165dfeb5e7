"""The graph from letterboxed images to boxes, and what is kept of it."""
from dataclasses import replace
import keras
import numpy as np
import pytest
from fcos_lite.config import CAMERA_NMS, ModelConfig
from fcos_lite.detector import predictor as module
from fcos_lite.detector.model import FCOS
from fcos_lite.errors import InputError

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
EVERYTHING = replace(CAMERA_NMS, score=0.0, candidates=10)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("uint8")

@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return FCOS(TINY)

def test_a_batch_gives_what_each_image_gives_alone(model):
    together = model.predictor(EVERYTHING).predict_on_batch(IMAGES)
    assert together["kept"].any(axis=1).all()
    for i in range(3):
        alone = model.predictor(EVERYTHING).predict_on_batch(module.pad_batch(IMAGES[i:i + 1], 3))
        for name, value in alone.items(): np.testing.assert_allclose(value[0], together[name][i], rtol=1e-3, atol=1e-3)

def test_a_graph_is_kept_until_the_cache_is_cleared(model, monkeypatch):
    "A function that was replaced after tracing takes effect then."
    before = model.predictor(replace(EVERYTHING)).predict_on_batch(IMAGES)
    assert model.predictor(EVERYTHING) is model.predictor(replace(EVERYTHING))
    assert model.predictor("camera") is model.predictor(CAMERA_NMS)
    nms = module.nms
    def keep_none(boxes, scores, config):
        result = nms(boxes, scores, config)
        return {**result, "kept": result["kept"] & (result["score"] > 2)}
    monkeypatch.setattr(module, "nms", keep_none)
    assert model.predictor(EVERYTHING).predict_on_batch(IMAGES)["kept"].sum() == before["kept"].sum() > 0
    model.clear_cache()
    assert model.predictor(EVERYTHING).predict_on_batch(IMAGES)["kept"].sum() == 0
    model.clear_cache()

def test_an_unknown_preset_is_refused(model):
    with pytest.raises(InputError, match="camera, reference, coco"): model.predictor("best")
