"""The document's training schema, from the recipe to the step: what 00_config, 15_schedule and 15a_optimizer show for their parts holds for the whole."""
import math
import sys
from dataclasses import replace
from pathlib import Path
import keras
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.data.batches import Batches
from fcos_lite.config import REFERENCE_CURRICULUM, REFERENCE_RECIPE, ModelConfig
from fcos_lite.detector.model import FCOS
from fcos_lite.train.optimizer import make_optimizer, overflow_count
from fcos_lite.train.callbacks import EpochLogger
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.trainer import build_model, optimizer_for, schedule_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from document_loop import document_losses   # noqa: E402

LEVELS = ModelConfig(image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=8, pyramid_groups=4,
                 tower_depth=1, tower_channels=8, tower_groups=4)        # the source's four levels, in small
PEOPLE = World(size=64, min_height=16, max_height=60, max_people=4)

@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return FCOS(LEVELS, REFERENCE_RECIPE)

@pytest.fixture(scope="module")
def batches(): return Batches(Scenes(32, 3, PEOPLE), REFERENCE_RECIPE.batch_size, 64)

def losses(model, batch): return {name: float(value) for name, value in model.compute_losses(model(batch["image"]), batch["boxes"], batch["labels"]).items()}

# The schedule, by the recipe's own numbers

def document_rate(t, total, start):
    if t <= 5000: return start + (5e-5 - start) / 5000 * t
    return 2.5e-7 + 0.5 * (5e-5 - 2.5e-7) * (1 + math.cos((t - 5000) / (total - 5000) * math.pi))

@pytest.mark.parametrize("warmup_from, start", [("min_learning_rate", 2.5e-7), ("learning_rate", 5e-5)])
@pytest.mark.parametrize("pictures, epochs", [(40_000, 30), (38_800, 30)])
def test_the_recipe_follows_the_documents_formula(pictures, epochs, warmup_from, start):
    total = epochs * (pictures // 4)
    steps = np.r_[0, 1, 2500, 4999, 5000, 5001, total // 2, total - 1, total, np.random.default_rng(0).integers(0, total, 50)]
    rates = np.array(schedule_for(REFERENCE_RECIPE.change(warmup_from=warmup_from), total)(steps))
    np.testing.assert_allclose(rates, [document_rate(t, total, start) for t in steps], atol=5e-7 * 5e-5)

@pytest.mark.parametrize("pictures", [10_000, 8_800])
def test_each_chunk_has_its_own_warmup_and_end(pictures):
    total = REFERENCE_CURRICULUM["chunk_epochs"] * (pictures // REFERENCE_RECIPE.batch_size)
    schedule = schedule_for(REFERENCE_RECIPE, total)
    assert schedule.warmup_steps == total // 20 and total % REFERENCE_RECIPE.optimizer.gradient_accumulation_steps == 0
    np.testing.assert_allclose([float(schedule(t)) for t in (0, total // 20, total)], [2.5e-7, 5e-5, 2.5e-7], rtol=1e-5)

# The optimizer that a recipe makes

@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_source_run_has_the_documents_optimizer(precision):
    model = build_model(LEVELS, REFERENCE_RECIPE, precision=precision)
    optimizer = optimizer_for(model, 300_000)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer) == (precision == "mixed_float16")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert (optimizer.weight_decay, optimizer.global_clipnorm, optimizer.clipnorm, optimizer.gradient_accumulation_steps, optimizer.decay) == (5e-3, 10.0, None, 8, "all")
    assert set(optimizer.paces) == {1.0}
    assert {value.dtype.name for value in model(np.zeros((1, 64, 64, 3), "uint8")).values()} == {"float32"}     # exp, GIoU and losses follow in float32

def test_fine_tuning_moves_the_fpn_model_at_1e_6_and_the_heads_at_1e_5(model):
    slow, quick = REFERENCE_CURRICULUM["finetune_rate_fpn"], REFERENCE_CURRICULUM["finetune_rate_heads"]
    assert (slow, quick) == (1e-6, 1e-5)
    tuned = FCOS(LEVELS, REFERENCE_RECIPE.change(learning_rate=quick, min_learning_rate=quick, fpn_lr_multiplier=slow / quick, weight_decay=0.0, gradient_accumulation_steps=1))
    for v in tuned.trainable_variables: v.assign(0 * v)
    optimizer = optimizer_for(tuned, 97_000)
    optimizer.build(tuned.trainable_variables)
    optimizer.apply([np.ones(v.shape, "float32") for v in tuned.trainable_variables])
    for part, rate in ((tuned.fpn, slow), (tuned.heads, quick)):
        for v in part.trainable_variables: np.testing.assert_allclose(-v.numpy(), rate, rtol=1e-3)

@pytest.mark.parametrize("decay", ["all", "kernels"])
def test_which_variables_decay_is_a_field(decay):
    model = FCOS(LEVELS, REFERENCE_RECIPE.change(decay_variables=decay, learning_rate=0.1, min_learning_rate=0.1, gradient_accumulation_steps=1))
    for v in model.trainable_variables: v.assign(0 * v + 1)
    optimizer = optimizer_for(model, 100)
    optimizer.build(model.trainable_variables)
    optimizer.apply([np.zeros(v.shape, "float32") for v in model.trainable_variables])
    for v in model.trainable_variables:
        left = 1 - 0.1 * 5e-3 if decay == "all" or v.path.split("/")[-1].startswith("kernel") else 1.0
        np.testing.assert_allclose(v.numpy(), left, rtol=1e-6, err_msg=v.path)

# Two rates, one clip, one scale

@pytest.fixture(scope="module")
def recorded(model, batches):
    "Some variables of both parts, how many are the FPN model's, and their gradients of eight micro-batches, with the loss scaled by 2**15."
    fpn, heads = model.fpn.trainable_variables[::12], model.heads.trainable_variables[::4]
    micro_batches = []
    for i in range(8):
        with tf.GradientTape() as tape: loss = 2.0**15 * model.compute_losses(model(batches[i]["image"]), batches[i]["boxes"], batches[i]["labels"])["loss"]
        micro_batches.append([g.numpy() for g in tape.gradient(loss, fpn + heads)])
    return [v.numpy() for v in fpn + heads], len(fpn), micro_batches

@pytest.mark.parametrize("clip_norm, equal", [(1e6, True), (0.05, False)])
def test_two_paces_are_the_documents_two_optimizers_where_the_clip_does_not_bite(recorded, clip_norm, equal):
    "Each of the two with a loss scale of its own, as the document has them; ours with one for both."
    start, cut, micro_batches = recorded
    def moved(optimizers, parts):
        variables = [keras.Variable(value) for value in start]
        for optimizer, part in zip(optimizers, parts): optimizer.build(variables[part])
        for gradients in micro_batches:
            for optimizer, part in zip(optimizers, parts): optimizer.apply(gradients[part])
        return np.concatenate([np.ravel(v.numpy() - value) for v, value in zip(variables, start)])
    ours = make_optimizer(1e-2, 5e-3, clip_norm, 4, paces=[0.1] * cut + [1.0] * (len(start) - cut), scale_loss=True)
    theirs = [keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(rate, weight_decay=5e-3, global_clipnorm=clip_norm, gradient_accumulation_steps=4)) for rate in (1e-3, 1e-2)]
    one, two = moved([ours], [slice(None)]), moved(theirs, [slice(cut), slice(cut, None)])
    assert (float(ours.dynamic_scale), overflow_count(ours), int(ours.iterations)) == (2.0**15, 0, 2)
    assert (np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)) == equal

# Eight micro-batches and one batch of 32

def test_eight_micro_batches_are_one_of_32_but_for_the_divisors(model, batches):
    "Every part of the large loss is a mean of the small ones, each weighted by what it was divided by."
    join = lambda name: np.concatenate([batches[i][name] for i in range(8)])
    whole = losses(model, {name: join(name) for name in ("image", "boxes", "labels")})
    small, divisors = [losses(model, batches[i]) for i in range(8)], {"cls": [], "ctr": []}
    for i in range(8):
        targets = model.targets(batches[i]["boxes"], batches[i]["labels"])
        divisors["cls"].append(float(np.sum(targets["positive"])))
        divisors["ctr"].append(float(np.sum(np.asarray(targets["centerness"])[np.asarray(targets["positive"])])))
    divisors["reg"] = divisors["cls"]
    assert min(divisors["ctr"]) > 1                            # else `max(1, ...)` would be the divisor
    for part, weights in divisors.items():
        np.testing.assert_allclose(np.average([row[part] for row in small], weights=weights), whole[part], rtol=1e-4, err_msg=part)
        assert abs(np.mean([row[part] for row in small]) - whole[part]) > 1e-5 * whole[part]    # the plain mean is something else
    for row in small: np.testing.assert_allclose(row["cls"] + row["reg"] + REFERENCE_RECIPE.losses.centerness_weight * row["ctr"], row["loss"], rtol=1e-5)

def test_no_micro_batch_is_dropped_at_the_end_of_an_epoch():
    "Two epochs of twelve micro-batches are three updates, with the weights of one epoch of 24."
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 2, 3)).astype("float32"), rng.normal(size=(24, 2, 1)).astype("float32")
    def weights(epochs):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(make_optimizer(0.1, 0.05, 10.0, REFERENCE_RECIPE.optimizer.gradient_accumulation_steps), "mse", run_eagerly=True)
        for part in np.split(np.arange(24), epochs): model.fit(x[part].reshape(-1, 3), y[part].reshape(-1, 1), batch_size=2, shuffle=False, verbose=0)
        assert int(model.optimizer.iterations) == 3
        return model.get_weights()
    for a, b in zip(weights(1), weights(2)): np.testing.assert_array_equal(a, b)

# The loss that the document's loop computes is ours

def test_the_documents_losses_level_by_level_are_those_of_the_source_recipe(model, batches):
    for index in (0, 5):
        batch = batches[index]
        rows = tf.ragged.constant([[[float(label), *box] for label, box in zip(labels, boxes) if label >= 0] for labels, boxes in zip(batch["labels"].tolist(), batch["boxes"].tolist())], ragged_rank=1)
        theirs, ours = document_losses(model(batch["image"]), rows, 64), losses(model, batch)
        for name, value in zip(("cls", "reg", "ctr"), theirs): np.testing.assert_allclose(float(value), ours[name], rtol=1e-4, err_msg=name)

# When it stops

class Recorder:
    columns = ()
    def __init__(self): self.saved = []
    def log(self, line): pass
    def save_weights(self, model, name): self.saved.append(name)

def test_the_source_stops_after_seven_evaluations_without_a_better_one():
    "And has kept the best. The document watches the mean of the three validation losses, a third of our sum of them: it chooses the same."
    report, recorder = EpochLogger(recorder := Recorder(), [], REFERENCE_RECIPE, [100]), recorder
    report.set_model(type("Model", (), {"stop_training": False})())
    parts = np.array([[3, 2, 1], [2, 2, 1], *[[2, 2, 1.5]] * 7])
    for epoch, values in enumerate(parts, 1):
        assert not report.enough, epoch
        report.judge({"val_loss": values.sum()})
    assert report.enough and recorder.saved == ["best", "best"]
