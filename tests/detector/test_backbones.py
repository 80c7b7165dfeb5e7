"""Somebody else's network as backbone: its statistics never move, it stands still and thaws by stage, it is kept and found again, under TensorFlow and JAX."""
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
from fcos_lite.detector import pretrained as backbones
from fcos_lite.config import SCRATCH_RECIPE, InputError, ModelConfig

NETWORK = ModelConfig(image_size=64, backbone="stranger", pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(batch_size=2, gradient_accumulation_steps=1, learning_rate=0.01, weight_decay=0.0)

def stranger(size): # pixels -> keras.Model
    "Halves the picture five times, with batch normalisation and dropout, as strangers do."
    import keras
    image = x = keras.Input((size, size, 3))
    for filters in (8, 8, 16, 16, 24):
        x = keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.Dropout(0.3)(keras.layers.ReLU()(keras.layers.BatchNormalization()(x)))
    return keras.Model(image, x)

backbones.BACKBONES["stranger"] = stranger

def learn(frozen):
    "Two steps of training: what moved of body, statistics and the rest; 0 or the largest change."
    import keras
    from fcos_lite.data.batches import Batches
    from fcos_lite.train.finetuning import freeze
    from fcos_lite.scenes.scenes import Scenes, World
    from fcos_lite.train.trainer import build_model, compile_for_training
    keras.utils.set_random_seed(0)
    model = build_model(NETWORK, RECIPE, precision="float32")
    freeze(model, frozen)
    compile_for_training(model, 2)
    body = model.fpn.get_layer("c_body")
    statistics = [w for layer in body.layers for w in layer.non_trainable_weights if "moving" in w.name]
    kernels = [layer.kernel for layer in body.layers if hasattr(layer, "kernel")]
    rest = [w for layer in model.fpn.layers if layer.name[0] == "p" for w in layer.weights]
    before = [[np.array(w) for w in part] for part in (kernels, statistics, rest)]
    model.fit(Batches(Scenes(4, 0, World(size=64, min_height=20, max_height=60, empty_share=0.0)), 2, 64), verbose=0)
    return [max(float(np.abs(np.array(w) - b).max()) for w, b in zip(part, old, strict=True)) for part, old in zip((kernels, statistics, rest), before)]

def check_stages():
    for frozen in (("backbone",), ()):
        kernels, statistics, rest = learn(frozen)
        assert statistics == 0 and rest > 0 and (kernels > 0) == (not frozen), (frozen, kernels, statistics, rest)

def test_it_stands_still_and_thaws_and_its_statistics_never_move(): check_stages()

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "jax"

def test_it_is_kept_and_found_again(tmp_path):
    from fcos_lite.detector.model import FCOS
    from fcos_lite.train.run import Run
    model = FCOS(NETWORK, RECIPE)
    body = model.fpn.get_layer("c_body")
    body.set_weights([np.random.default_rng(i).uniform(0.5, 1.5, w.shape) for i, w in enumerate(body.get_weights())])
    run = Run.create(tmp_path / "run")
    run.write_config(NETWORK, RECIPE, {})
    run.save_weights(model, "best")
    again = FCOS.from_preset(tmp_path / "run")
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype="uint8")
    for name, value in model(picture).items(): np.testing.assert_array_equal(value, again(picture)[name])
    page = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(page | {"network": page["network"] | {"backbone": "forgotten"}}))
    with pytest.raises(InputError, match="backbone 'forgotten': no such network"): FCOS.from_preset(tmp_path / "run")

def test_published_weights_arrive_where_they_belong(tmp_path):
    from fcos_lite.detector.model import FCOS
    published = stranger(64)
    published.set_weights([np.random.default_rng(i).uniform(0.5, 1.5, w.shape) for i, w in enumerate(published.get_weights())])
    published.save_weights(tmp_path / "published.weights.h5")
    model = FCOS(NETWORK, RECIPE)
    rest = [np.array(w) for w in model.heads.weights]
    backbones.load_pretrained_backbone(model, str(tmp_path / "published.weights.h5"))
    for ours, theirs in zip(model.fpn.get_layer("c_body").get_weights(), published.get_weights(), strict=True): np.testing.assert_array_equal(ours, theirs)
    for ours, before in zip(model.heads.weights, rest): np.testing.assert_array_equal(np.array(ours), before)

@pytest.mark.parametrize("name", ["MobileNetV2", "VGG16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MobileNetV3Small", "EfficientNetB0", "ResNet50", "DenseNet121", "ConvNeXtTiny", "EfficientNetV2B0"))])
def test_the_networks_that_keras_knows_have_what_is_needed(name):
    "Maps of the four strides, and units that are those of their own preparation."
    body, units = backbones.build_application(name, 64)
    assert [(stride, found.shape[1]) for stride, found in backbones.feature_outputs(body).items()][-4:] == [(4, 16), (8, 8), (16, 4), (32, 2)]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3)).astype("float32")
    np.testing.assert_allclose(backbones.InputScaling(*units)(pixels / 255), backbones.application(name)[1](pixels.copy()), atol=1e-3)

@pytest.mark.parametrize("flags, words", [
    (["--backbone", "MobileNetV9"], "no such network; choose source"),
    (["--backbone", "InceptionV3", "--image-size", "128"], "no map of stride"),
    (["--backbone-weights", "imagenet"], "source is our own"),
    (["--backbone", "stranger", "--image-size", "64", "--backbone-weights", "nowhere.weights.h5"], "nowhere.weights.h5: no such file")])
def test_what_cannot_be_used_is_refused(flags, words, tmp_path):
    from fcos_lite.train import __main__ as train
    with pytest.raises(InputError, match=words): train.main([*flags, "--scenes", "4", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

if __name__ == "__main__":
    import keras
    check_stages()
    print(keras.backend.backend())
