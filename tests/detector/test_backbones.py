"""A pretrained backbone: its statistics never change, its weights arrive, what cannot be used is refused."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from fcos_lite.config import ModelConfig
from fcos_lite.detector import pretrained
from fcos_lite.detector.fpn import build_fpn
from fcos_lite.detector.model import FCOS
from fcos_lite.detector.weights import save_weights
from fcos_lite.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(image_size=64, backbone="halving", pyramid_channels=16, pyramid_groups=4,
                     tower_depth=1, tower_channels=16, tower_groups=4)


def halving(size): # pixels -> keras.Model
    "Halves the image five times, with batch normalisation and dropout, as most networks do."
    image = x = keras.Input((size, size, 3))
    for filters in (8, 8, 16, 16, 24):
        x = keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        x = keras.layers.Dropout(0.3)(x)
    return keras.Model(image, x)


pretrained.BACKBONES["halving"] = halving


def randomized(model, seed=0):
    "The model, with statistics that normalise."
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, array.shape) for array in model.get_weights()])
    return model


def one_step(frozen):
    "One step of training on the sum of the outputs: the largest change of kernels, statistics and pyramid."
    fpn = build_fpn(CONFIG)
    body = fpn.get_layer("c_body")
    body.trainable = not frozen
    statistics = [array for layer in body.layers for array in layer.non_trainable_weights if "moving" in array.name]
    kernels = [layer.kernel for layer in body.layers if hasattr(layer, "kernel")]
    pyramid = [array for layer in fpn.layers if layer.name[0] == "p" for array in layer.weights]
    before = [[np.array(array) for array in arrays] for arrays in (kernels, statistics, pyramid)]
    fpn.compile(optimizer=keras.optimizers.SGD(0.1), loss=["mae"] * 4, jit_compile=False)
    images = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype("float32")
    fpn.train_on_batch(images, [np.ones((2, *level.shape[1:]), "float32") for level in fpn.outputs])
    return [max(float(np.abs(np.array(a) - b).max()) for a, b in zip(arrays, old, strict=True))
            for arrays, old in zip((kernels, statistics, pyramid), before)]


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_never_change_and_kernels_when_they_may(frozen):
    kernels, statistics, pyramid = one_step(frozen)
    assert statistics == 0 and pyramid > 0 and (kernels > 0) == (not frozen)


def test_on_jax():
    pytest.importorskip("jax")
    program = ("import sys; sys.path.insert(0, 'tests/detector'); import keras, test_backbones as t; "
               "t.test_statistics_never_change_and_kernels_when_they_may(False); print(keras.backend.backend())")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "jax"


def test_it_is_stored_and_found_again(tmp_path):
    model = FCOS(CONFIG)
    randomized(model.fpn.get_layer("c_body"))
    save_weights(model, tmp_path / "best.weights.h5")
    config = {"model": dataclasses.asdict(CONFIG), "recipe": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = FCOS.from_preset(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype="uint8")
    for name, value in model(images).items(): np.testing.assert_array_equal(value, again(images)[name])
    config["model"]["backbone"] = "forgotten"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="backbone 'forgotten': no such network"): FCOS.from_preset(tmp_path)


def test_published_weights_arrive_where_they_belong(tmp_path):
    published, path = randomized(halving(64)), tmp_path / "published.weights.h5"
    published.save_weights(path)
    model = FCOS(CONFIG)
    before = model.heads.get_weights()
    pretrained.load_pretrained_backbone(model, str(path))
    body = model.fpn.get_layer("c_body").get_weights()
    for ours, theirs in zip(body, published.get_weights(), strict=True): np.testing.assert_array_equal(ours, theirs)
    for ours, old in zip(model.heads.get_weights(), before): np.testing.assert_array_equal(ours, old)


SLOW = "MobileNetV3Small", "EfficientNetB0", "ResNet50", "DenseNet121", "ConvNeXtTiny", "EfficientNetV2B0"

@pytest.mark.parametrize("name", ["MobileNetV2", "VGG16", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_the_networks_of_keras_have_what_is_needed(name):
    "Maps of the four strides, and their own preprocessing."
    body, preprocessing = pretrained.build_application(name, 64)
    sides = [(stride, level.shape[1]) for stride, level in pretrained.feature_outputs(body).items()]
    assert sides[-4:] == [(4, 16), (8, 8), (16, 4), (32, 2)]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3)).astype("float32")
    scaled = pretrained.InputScaling(*preprocessing)(pixels / 255)
    np.testing.assert_allclose(scaled, pretrained.application(name)[1](pixels.copy()), atol=1e-3)


@pytest.mark.parametrize("changes, weights, words", [
    (dict(backbone="MobileNetV9"), None, "no such network; choose reference"),
    (dict(backbone="InceptionV3", image_size=128), None, "no map of stride"),
    (dict(backbone="reference"), "imagenet", "the backbone `reference` has none"),
    (dict(), "nowhere.weights.h5", "nowhere.weights.h5: no such file"),
    (dict(), __file__, "no weights of this backbone")])
def test_what_cannot_be_used_is_refused(changes, weights, words):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match=words):
        pretrained.validate_pretrained(config, weights)
        pretrained.load_pretrained_backbone(FCOS(config), weights)
