"""JAX and TensorFlow on the same weights and images: equal outputs, targets, losses, boxes, steps. Training on JAX."""
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from fcos_lite.config import COCO_NMS, REFERENCE, REFERENCE_RECIPE, SCRATCH_RECIPE, ModelConfig, OptimizerConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
CONFIG = replace(REFERENCE, image_size=64, backbone_blocks=(1, 1, 1, 1), tower_depth=1)
RECIPES = {"reference": REFERENCE_RECIPE, "scratch": SCRATCH_RECIPE,
           "distance": SCRATCH_RECIPE.change(level_rule="max_distance")}
BOXES = np.float32([[[10, 8, 40, 60], [30, 20, 44, 50], [0, 40, 63, 63], [0, 0, 0, 0]],
                    [[1, 2, 62, 63], [50, 50, 54, 58], [0, 0, 0, 0], [0, 0, 0, 0]]])
LABELS = np.int32([[0, 0, -2, -1], [0, 0, -1, -1]])
RNG = np.random.default_rng(0)
START = [RNG.normal(size=shape).astype("float32") for shape in ((2, 3), (3,), (3, 2), ())]
GRADIENTS = [[RNG.normal(size=value.shape).astype("float32") for value in START] for _ in range(11)]
GRADIENTS.insert(3, [value + np.float32(np.inf) for value in START])

# What both compute

def compiled(function, *arrays):
    "Call a function; on JAX as one graph, because operation by operation it would compile a thousand."
    import keras
    if keras.backend.backend() != "jax": return function(*arrays)
    import jax
    return jax.jit(function)(*map(keras.ops.convert_to_tensor, arrays))

def detector_values(inputs):
    from fcos_lite.detector.losses import fcos_losses
    from fcos_lite.detector.model import FCOS
    from fcos_lite.detector.nms import decode, nms
    from fcos_lite.detector.targets import assign_targets
    model = FCOS(CONFIG)
    model.set_weights([inputs[f"weight_{i}"] for i in range(len(model.weights))])
    outputs = model.predict_on_batch(inputs["image"])
    values = {f"outputs_{name}": value for name, value in outputs.items()}
    for name, recipe in RECIPES.items():
        def targets(boxes, labels): return assign_targets(boxes, labels, CONFIG, recipe.targets)
        def losses(boxes, labels): return fcos_losses(outputs, targets(boxes, labels), recipe.losses)
        for kind, function in (("targets", targets), ("losses", losses)):
            values |= {f"{name}_{kind}_{key}": value for key, value in compiled(function, BOXES, LABELS).items()}
    def decoded(*maps): return decode(dict(zip(outputs, maps)), CONFIG.image_size, CONFIG.strides)
    boxes, scores = compiled(decoded, *outputs.values())
    values |= {"decoded_boxes": boxes, "decoded_scores": scores}
    # NMS compares scores, and one bit can change an order: the same ones for both
    boxes, scores = (np.array(inputs.get(name, own)) for name, own in (("boxes", boxes), ("scores", scores)))
    kept = compiled(lambda boxes, scores: nms(boxes, scores, replace(COCO_NMS, candidates=200)), boxes, scores)
    return values | {f"nms_{name}": value for name, value in kept.items()}

def optimizer_values():
    "Multipliers, kernels only, a schedule, a clip that bites, an infinite micro-batch, a rest of three, an EMA."
    import keras
    from fcos_lite.train.optimizer import flush_accumulation, make_optimizer, overflow_count
    from fcos_lite.train.schedule import WarmupCosine
    config = OptimizerConfig(weight_decay=0.1, clip_norm=0.5, gradient_accumulation_steps=4, decay_variables="kernels",
                             ema_momentum=0.4)
    optimizer = make_optimizer(config, WarmupCosine(0.1, 0.01, 12, 3), (1 / 8, 1 / 8, 1, 1), scale_loss=True)
    variables = [keras.Variable(value) for value in START]
    optimizer.build(variables)
    scales = [i for i, variable in enumerate(optimizer.variables) if variable is optimizer.dynamic_scale]
    if keras.backend.backend() == "jax":
        import jax
        step = jax.jit(lambda state, parts, values: optimizer.stateless_apply(state, parts, values))
        values, state = [v.value for v in variables], [v.value for v in optimizer.variables]
        for parts in GRADIENTS: values, state = step(state, [part * state[scales[0]] for part in parts], values)
        for variable, value in zip(variables + optimizer.variables, list(values) + list(state), strict=True):
            variable.assign(value)
    else:
        for parts in GRADIENTS: optimizer.apply([optimizer.scale_loss(part) for part in parts])
    values = {"optimizer_overflows": overflow_count(optimizer), "optimizer_waiting": flush_accumulation(optimizer)}
    weights = variables + optimizer.inner_optimizer.ema
    return values | {f"optimizer_{i}": variable.numpy() for i, variable in enumerate(weights)}

def schedule_values():
    from fcos_lite.train.schedule import WarmupCosine
    steps = np.arange(0, 300_001, 10_000)
    return {"schedule": compiled(WarmupCosine(5e-5, 2.5e-7, 300_000, 5000), steps)}

# What is asserted on JAX, in a process of its own

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(
    level_areas=(65536,), center_radius=None, batch_size=2, noise=0.1, mosaic=0.3, color_jitter=0.3,
    gradient_accumulation_steps=2, ema_momentum=0.9)

def pairs(bad=None):
    "Six batches of two scenes; in one of them a pixel is NaN."
    from fcos_lite.data.batches import Batches
    from fcos_lite.scenes.scenes import Scenes, World
    class Pairs(Batches):
        def whole(self, index):
            batch = super().whole(index)
            batch["image"] = batch["image"].astype("float32")
            if index == bad: batch["image"][1, 9, 9] = np.nan
            return batch
        def __getitem__(self, index):
            batch = self.whole(index)
            return batch["image"], {"boxes": batch["boxes"], "labels": batch["labels"]}
    scenes = Scenes(12, seed=5, world=World(size=32, min_height=10, max_height=28, max_people=3))
    return Pairs(list(scenes), 2, 32, max_boxes=8)

def state_of(model):
    "Return weights, optimizer without `skipped`, and random state, after the values that `fit` keeps elsewhere."
    model.jax_state_sync()
    arrays = [*model.weights, *model.optimizer.variables[:-1]]
    return [np.array(array) for array in arrays]

def train_on_jax():
    "Fit three epochs: the third has a NaN, from which on nothing moves."
    import keras
    from fcos_lite.train.optimizer import ema_weights
    from fcos_lite.train.trainer import build_model, compile_for_training
    keras.utils.set_random_seed(1)
    model = build_model(TINY, RECIPE, precision="float32")
    compile_for_training(model, RECIPE, 18)
    start, state, lent = model.get_weights(), np.array(model.augment.generator.state), []
    class Lend(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            model.jax_state_sync()
            raw = model.get_weights()
            with ema_weights(model): lent.append([np.abs(a - b).max() for a, b in zip(raw, model.get_weights())])
            for a, b in zip(raw, model.get_weights(), strict=True): np.testing.assert_array_equal(a, b)
    history = model.fit(pairs(), epochs=2, shuffle=False, verbose=0, callbacks=[Lend()]).history
    assert set(history) == {"loss", "cls", "ltrb", "centerness", "positives"} and np.isfinite(history["loss"]).all()
    assert np.mean([(a != b).any() for a, b in zip(start, model.get_weights())]) > 0.9
    assert (np.array(model.augment.generator.state) != state).any(), "the augmentation has drawn nothing"
    assert np.max(lent) > 0
    before = []
    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None): before.append(state_of(model))
    model.fit(pairs(bad=3), epochs=1, shuffle=False, verbose=0, callbacks=[Watch()])
    arrays = len(model.weights) + len(model.optimizer.variables) - 1
    assert len(before) == 6 and len(before[0]) == arrays
    trained = len(model.trainable_variables)
    assert any((a != b).any() for a, b in zip(before[0][:trained], before[3][:trained]))
    for a, b in zip(state_of(model), before[3], strict=True):
        if a.dtype.kind == "f": np.testing.assert_array_equal(a, b)   # the random state has moved on
    assert int(model.optimizer.skipped) == 3
    assert [int(value) for value in (model.latch.good, model.latch.seen)] == [3, 6]
    images, y = pairs()[0]
    assert np.isfinite(model.test_on_batch(images, y, return_dict=True)["loss"])

def stop_on_jax(folder):
    "The guard names the batch, and its replay on JAX is the same."
    import keras
    from fcos_lite.train.nan_guard import NonFiniteGuard, NonFiniteLossError, replay
    from fcos_lite.train.trainer import build_model, compile_for_training
    keras.utils.set_random_seed(1)
    model, batches, recipe = build_model(TINY, RECIPE, precision="float32"), pairs(bad=3), RECIPE
    compile_for_training(model, recipe, 6)
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 4 of 6: the loss") as caught:
        model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=[NonFiniteGuard(folder, batches, recipe)])
    assert "first non-finite layer: the image" in str(caught.value)
    np.testing.assert_equal(replay(caught.value.folder), caught.value.findings)

def memory_on_jax():
    import keras
    from fcos_lite.detector.model import FCOS
    from fcos_lite.errors import InputError
    from fcos_lite.train.memory import explain_memory, limit_gpu_memory
    with pytest.raises(InputError, match="(?s)out of memory.*--batch-size 1"), explain_memory(FCOS(TINY), RECIPE):
        keras.ops.ones((2**20, 2**20, 64), "float32")
    with pytest.raises(InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"): limit_gpu_memory(3600)

def run_on_jax(*words):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

# The tests

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "The same values from TensorFlow, here, and from JAX, which also trains there."
    import keras
    from fcos_lite.detector.model import FCOS
    if keras.backend.backend() != "tensorflow": pytest.skip("this process does not run on TensorFlow")
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("jax")
    inputs = {"image": rng.integers(0, 256, (2, 64, 64, 3)).astype("uint8")}
    for i, array in enumerate(FCOS(CONFIG).get_weights()):   # as if it had learned: scores and distances differ
        inputs[f"weight_{i}"] = (array + rng.normal(0, 0.05, array.shape)).astype("float32")
    ours = {**detector_values(inputs), **optimizer_values(), **schedule_values()}
    ours = {name: np.array(value) for name, value in ours.items()}
    np.savez(folder / "inputs.npz", **inputs, boxes=ours["decoded_boxes"], scores=ours["decoded_scores"])
    report = run_on_jax("values", folder / "inputs.npz", folder / "outputs.npz")
    return ours, dict(np.load(folder / "outputs.npz")), report

KINDS = [f"{recipe}_{kind}" for recipe in RECIPES for kind in ("targets", "losses")]

@pytest.mark.parametrize("kind", ["outputs", *KINDS, "decoded", "nms", "optimizer", "schedule"])
def test_jax_gives_the_same(both, kind):
    ours, theirs, _ = both
    names = [name for name in ours if name.startswith(kind)]
    assert names
    for name in names: np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-5, err_msg=name)

def test_what_is_compared_differs_from_nothing(both):
    ours, _, _ = both
    for recipe in RECIPES:
        assert ours[f"{recipe}_targets_positive"].sum() > 5 and ours[f"{recipe}_losses_cls"] > 0
    assert not ours["scratch_targets_valid"].all() and ours["reference_targets_valid"].all()
    assert 1 < ours["nms_kept"].sum() < ours["nms_kept"].size
    assert ours["outputs_cls"].std() > 0.05 and ours["outputs_ltrb"].std() > 0.005
    assert (ours["optimizer_overflows"], ours["optimizer_waiting"]) == (1, 3)

def test_training_on_jax(both): assert both[2] == ["jax", "all laws hold"]

@pytest.mark.slow
def test_the_guard_on_jax(tmp_path): assert run_on_jax("guard", tmp_path) == ["jax", "all laws hold"]

if __name__ == "__main__":
    import keras
    kind, path, *out = sys.argv[1:]
    if kind == "values":
        computed = {**detector_values(dict(np.load(path))), **optimizer_values(), **schedule_values()}
        np.savez(out[0], **{name: np.array(value) for name, value in computed.items()})
        train_on_jax()
        memory_on_jax()
    else: stop_on_jax(path)
    print(json.dumps([keras.backend.backend(), "all laws hold"]))
