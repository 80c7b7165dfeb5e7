"""A non-finite loss or gradient stops training, is found again, and is explained; on JAX: tests/test_jax.py."""
import math
import keras
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.config import SCRATCH_RECIPE, ModelConfig, OptimizerConfig
from fcos_lite.data.batches import Batches
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.nan_guard import (
    NonFiniteGuard, NonFiniteLatch, NonFiniteLossError, diagnose, explain_no_positives, format_diagnosis, layer_outputs,
    replay)
from fcos_lite.train.optimizer import CountingLossScaleOptimizer, make_optimizer, overflow_count
from fcos_lite.train.trainer import build_model

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
RECIPE = SCRATCH_RECIPE.change(level_areas=(65536,), center_radius=None, batch_size=2, noise=0.1, zoom=(1, 1), epochs=1)
WORLD = World(size=32, min_height=10, max_height=28)
CONFIG = OptimizerConfig(weight_decay=0.05, gradient_accumulation_steps=2)

class Spoiled(Batches):
    "Batches of two scenes; in one of them a pixel is NaN, or a box is infinitely wide."
    bad, kind = None, "pixel"
    def whole(self, index):
        batch = super().whole(index)
        batch["image"] = batch["image"].astype("float32")
        if index == self.bad and self.kind == "pixel": batch["image"][1, 9, 9] = np.nan
        if index == self.bad and self.kind == "box":
            batch["boxes"][0, 0] = 0, 0, math.inf, 20
            batch["labels"][0, 0] = 0
        return batch
    def __getitem__(self, index):
        batch = self.whole(index)
        return batch["image"], {"boxes": batch["boxes"], "labels": batch["labels"]}

def spoiled(bad, kind="pixel", examples=16):
    batches = Spoiled(list(Scenes(examples, seed=5, world=WORLD)), 2, 32, shuffle_seed=0)
    batches.bad, batches.kind = bad, kind
    return batches

def new_model(precision="float32", recipe=RECIPE):
    keras.utils.set_random_seed(1)
    return build_model(TINY, recipe, precision=precision)

def equal(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y)

class Watch(keras.callbacks.Callback):
    "Remember weights and random state before each batch; die after so many steps."
    def __init__(self, dies=math.inf):
        super().__init__()
        self.before, self.states, self.dies = [], [], dies
    def on_train_batch_begin(self, batch, logs=None):
        self.before.append(self.model.get_weights())
        self.states.append(np.array(self.model.augment.generator.state))
    def on_train_batch_end(self, batch, logs=None):
        self.dies -= 1
        if self.dies == 0: raise OSError("the power is gone")

def guarded(model, batches, folder, every=100):
    "Train an epoch under the guard; return its error and what was before each batch."
    watch = Watch()
    with pytest.raises(NonFiniteLossError) as caught:
        guard = NonFiniteGuard(folder, batches, RECIPE, every)
        model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=[watch, guard])
    return caught.value, watch

# The latch

def test_the_latch_counts_and_stays_closed():
    latch, factors = NonFiniteLatch(), []
    for loss in (3.0, 2.0, math.inf, 1.0, 0.5):
        latch.update_state(loss)
        factors.append(float(latch.factor()))
    assert str(factors) == "[1.0, 1.0, nan, nan, nan]"
    assert (float(latch.good), float(latch.seen), latch.result()) == (2, 5, {})
    latch.reset_state()
    assert (float(latch.good), float(latch.seen)) == (0, 0)

def test_a_factor_reaches_the_gradient_where_a_choice_does_not():
    def gradient(close):
        w = tf.Variable(3e38)
        with tf.GradientTape() as tape:
            loss = w + w
            loss = close(loss, tf.math.is_finite(loss))
        return float(tape.gradient(loss, w))
    assert gradient(lambda loss, good: tf.where(good, loss, math.nan)) == 0
    assert math.isnan(gradient(lambda loss, good: loss * tf.where(good, 1.0, math.nan)))

def test_training_stands_still_and_evaluation_is_left_alone():
    model, batches = new_model(), spoiled(bad=1)
    model.compile(make_optimizer(CONFIG, 1e-3), run_eagerly=True)
    model.train_on_batch(*batches[0])
    before = model.get_weights() + [v.numpy() for v in model.optimizer.variables[:-1]]
    assert np.isnan(model.train_on_batch(*batches[1], return_dict=True)["loss"])
    assert np.isfinite(model.train_on_batch(*batches[2], return_dict=True)["loss"])   # Keras has counted anew
    equal(model.get_weights() + [v.numpy() for v in model.optimizer.variables[:-1]], before)   # accumulators too
    assert int(model.optimizer.skipped) == 2
    images, y = batches[2]
    expected = float(model.compute_losses(model(images), **y)["loss"])
    assert np.isnan(model.test_on_batch(*batches[1], return_dict=True)["loss"])
    assert model.test_on_batch(images, y, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
    assert [int(v) for v in (model.latch.good, model.latch.seen, model.optimizer.skipped)] == [0, 0, 2]

# The guard

def test_the_guard_finds_the_batch_and_its_replay_is_the_same(tmp_path):
    model, batches = new_model(), spoiled(bad=4)
    model.compile(make_optimizer(CONFIG, 1e-3), run_eagerly=True)
    error, watch = guarded(model, batches, tmp_path)
    assert error.folder == tmp_path / "broken-epoch-1-batch-5"
    assert str(error).startswith("epoch 1, batch 5 of 8: the loss is NaN or infinite; stopped with the weights")
    assert "first non-finite layer: the image" in str(error) and "fix these images" in str(error)
    batches.epoch = 0   # fit has gone on to the order of the next
    assert f"images: {', '.join(map(str, batches.whole(4)['image_id']))}\n" in str(error)
    equal(model.get_weights(), watch.before[4])
    with np.load(error.folder / "batch.npz") as file: state = file["random_state"]
    np.testing.assert_array_equal(state, watch.states[4])
    np.testing.assert_equal(replay(error.folder), error.findings)
    assert int(model.optimizer.skipped) == 0   # whoever goes on may
    batches.bad = None
    model.fit(batches, epochs=1, verbose=0, shuffle=False, callbacks=[NonFiniteGuard(tmp_path, batches, RECIPE)])
    assert any((a != b).any() for a, b in zip(model.get_weights(), watch.before[4]))

def test_a_bad_batch_is_found_after_a_resume(tmp_path):
    "A run dies between the bad batch and the guard's look; resumed, it is told of the same batch."
    from fcos_lite.train.checkpoint import Checkpoint
    watch = Watch(dies=7)
    def run():
        model, batches = new_model(), spoiled(bad=4)
        config = OptimizerConfig(gradient_accumulation_steps=3, ema_momentum=0.9)
        model.compile(make_optimizer(config, 1e-3), run_eagerly=True)
        model.optimizer.build(model.trainable_variables)
        how = dict(every_steps=2, log=lambda line: None)
        checkpoint = Checkpoint(tmp_path, model, batches, {"run": {"seed": 1}}, **how)
        checkpoint.fit(1, [NonFiniteGuard(tmp_path, batches, RECIPE), watch], verbose=0)
    with pytest.raises(OSError): run()
    assert len(watch.before) == 7
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 5 of 8: the loss") as caught: run()
    assert len(watch.before) == 7 + 2            # it went on after the sixth
    equal(watch.before[-1], watch.before[4])     # and nothing moved
    np.testing.assert_equal(replay(caught.value.folder), caught.value.findings)

def test_a_gradient_that_overflows_is_found_though_its_loss_is_finite(tmp_path):
    class Steep(keras.layers.Layer):
        "Passes its input on; its gradient is infinite."
        def call(self, x):
            @tf.custom_gradient
            def steep(x): return x, lambda upstream: upstream * math.inf
            return steep(x)
    model, batches = new_model(), spoiled(bad=None)
    model.compile(make_optimizer(CONFIG, 1e-3), run_eagerly=True)
    one_level, steep = model.heads.one_level, Steep()
    model.heads.one_level = lambda level, scale: one_level(steep(level), scale)
    error, watch = guarded(model, batches, tmp_path, every=3)
    assert "batch 1 of 8: the gradient of a finite loss is NaN or infinite" in str(error)
    equal(model.get_weights(), watch.before[0])

def test_in_float16_overflows_are_no_failure_but_a_bad_loss_is(tmp_path):
    model, batches = new_model("mixed_float16"), spoiled(bad=1, kind="box", examples=6)
    optimizer = make_optimizer(OptimizerConfig(gradient_accumulation_steps=1), 1e-3)
    model.compile(CountingLossScaleOptimizer(optimizer, initial_scale=2.0**12), run_eagerly=True)
    error, watch = guarded(model, batches, tmp_path, every=3)
    assert (error.folder.name, overflow_count(model.optimizer)) == ("broken-epoch-1-batch-2", 2)
    assert "look at the boxes" in str(error)
    equal(model.get_weights(), watch.before[1])
    batches.bad, batches.examples = None, batches.examples[:4]
    model.optimizer.dynamic_scale.assign(2.0**60)   # far too high: both batches overflow, with good losses
    guard = NonFiniteGuard(tmp_path, batches, RECIPE)
    model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=[guard])
    assert overflow_count(model.optimizer) == 4
    model.optimizer.dynamic_scale.assign(0.5)       # the unscaled gradient overflows too
    with pytest.raises(InputError, match="even unscaled; take --precision mixed_bfloat16"): guard.look()

# The diagnosis

def test_the_walk_through_the_layers_is_the_networks_own():
    model, batch = new_model(), spoiled(bad=None).whole(0)
    steps, outputs = dict(layer_outputs(model, batch["image"] / 255)), model(batch["image"])
    for name, layer in (("cls", "Classification"), ("ltrb", "Regression"), ("centerness", "Centerness")):
        ours = np.concatenate([np.reshape(steps[f"{layer} on P{level}"], (2, -1)) for level in (3, 4)], axis=1)
        np.testing.assert_allclose(ours, np.reshape(outputs[name], (2, -1)), rtol=1e-4)
    names = list(steps)
    assert names[0] == "the image" and names.index("c1_norm") == names.index("c1_conv") + 1

def test_the_first_non_finite_layer_and_what_helps():
    model, batches = new_model(), spoiled(bad=1)
    state = np.array(model.augment.generator.state)
    good, bad = (diagnose(model, batches.whole(index), state) for index in (0, 1))
    assert not [fraction for _, fraction in good["layers"] if fraction]
    assert format_diagnosis(good, "float32").count("none") == 2
    assert "fix these images" in format_diagnosis(bad, "float32")
    in_layer = {**bad, "layers": [("c1_conv", 0.1)]}
    assert "65,504" in format_diagnosis(in_layer, "mixed_float16")
    assert "--warmup-steps" in format_diagnosis(in_layer, "float32")
    assert "look at the boxes" in format_diagnosis({**bad, "layers": []}, "float32")

# No positive locations

@pytest.fixture(scope="module")
def clean(): return Batches(list(Scenes(4, seed=5, world=WORLD)), 4, 32).whole(0)

@pytest.mark.parametrize("boxes, labels, cause", [
    (None, lambda labels: np.where(labels >= 0, labels + 1, labels), "have a label above 0"),
    (lambda boxes: boxes / 32, None, "lie within 0 ... 1"),
    (lambda boxes: np.c_["2", boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], None, "end before they begin"),
    (lambda boxes: boxes + 64, None, "lie outside of the 32 pixels"),
    (lambda boxes: np.float32([1, 1, 2, 2]) + 0 * boxes, None, "hold no location"),
    (None, lambda labels: np.full_like(labels, -1), "no boxes: are the names"),
    (lambda boxes: np.float32([0, 0, 32, 32]) + 0 * boxes, None, "does the augmentation drop them all")])
def test_the_usual_mistakes_are_named(clean, boxes, labels, cause):
    batch = dict(clean)
    if boxes: batch["boxes"] = boxes(batch["boxes"]).astype("float32")
    if labels: batch["labels"] = labels(batch["labels"])
    assert cause in explain_no_positives(new_model(), batch)

def test_a_run_without_positive_locations_is_warned_of_once(tmp_path):
    class FromOne(Batches):
        def whole(self, index):
            batch = super().whole(index)
            return {**batch, "labels": np.where(batch["labels"] >= 0, batch["labels"] + 1, -1)}
        def __getitem__(self, index):
            batch = self.whole(index)
            return batch["image"], {"boxes": batch["boxes"], "labels": batch["labels"]}
    scenes, lines = list(Scenes(8, seed=5, world=WORLD)), []
    for kind in (FromOne, Batches):
        batches, model = kind(scenes, 2, 32), new_model()
        model.compile(make_optimizer(CONFIG, 1e-3), run_eagerly=True)
        guard = NonFiniteGuard(tmp_path, batches, RECIPE, every=2, log=lines.append)
        model.fit(batches, epochs=1, verbose=0, shuffle=False, callbacks=[guard])
    assert len(lines) == 1 and lines[0].startswith("warning: no location was positive in the last 2 steps")
    assert "labels are counted from 0" in lines[0]
