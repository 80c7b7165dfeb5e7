"""One step at several rates under one clip: multipliers, decay, accumulation, overflows, skipped steps, the EMA."""
import json
import math
import keras
import numpy as np
import pytest
import tensorflow as tf
from fcos_lite.config import REFERENCE_CURRICULUM, REFERENCE_RECIPE, ModelConfig, OptimizerConfig
from fcos_lite.errors import InputError
from fcos_lite.train.optimizer import (
    CountingLossScaleOptimizer, MultiRateAdamW, _is_finite, ema_weights, flush_accumulation, make_optimizer,
    overflow_count, unwrap_optimizer)
from fcos_lite.train.schedule import WarmupCosine
from fcos_lite.train.trainer import build_model, optimizer_for

TINY = ModelConfig(
    image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
    tower_channels=16, tower_groups=4)
RNG = np.random.default_rng(0)
START = [RNG.normal(size=shape) for shape in ((2, 3), (3,), (3, 2), ())]   # two are a part, the last two another
GRADIENTS = [[RNG.normal(size=value.shape) for value in START] for _ in range(16)]
MULTIPLIERS = (1 / 8, 1 / 8, 1, 1)   # exact in floating point
SETTINGS = dict(weight_decay=0.1, global_clipnorm=0.5)
INFINITE = [value + np.inf for value in START]

def eager(function): return function
def graph(function): return tf.function(function, autograph=False)
def xla(function): return tf.function(function, autograph=False, jit_compile=True)

def train(optimizer, start, gradients, compile=eager):
    "Return the variables after these micro-batches: `gradients` has a list for each, one array a variable."
    variables = [keras.Variable(np.float32(value)) for value in start]
    optimizer.build(variables)
    step = compile(lambda parts: optimizer.apply([optimizer.scale_loss(part) for part in parts]))
    for parts in gradients: step([tf.constant(part, "float32") for part in parts])
    return [variable.numpy() for variable in variables]

def equal(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y)

def close(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

# AdamW with multipliers

@pytest.mark.parametrize("compile", [eager, graph, xla])
def test_without_multipliers_it_is_adamw_bit_for_bit(compile):
    schedule, settings = WarmupCosine(0.1, 0.01, 16, 4), {**SETTINGS, "gradient_accumulation_steps": 4}
    ours = train(MultiRateAdamW(schedule, **settings), START, GRADIENTS, compile)
    same = close if compile is xla else equal   # XLA rounds elsewhere
    same(ours, train(keras.optimizers.AdamW(schedule, **settings), START, GRADIENTS, compile))
    assert all((a != np.float32(b)).all() for a, b in zip(ours, START))

def test_a_multiplier_holds_for_the_step_and_for_decay():
    step = train(MultiRateAdamW(1e-5, (0.1, 1.0), weight_decay=0.0), [0.0, 0.0], [[3.0, 3.0]])
    np.testing.assert_allclose(step, [-1e-6, -1e-5], rtol=1e-5)
    decay = train(MultiRateAdamW(0.5, (0.1, 1.0), weight_decay=0.2), [1.0, 1.0], [[0.0, 0.0]])
    np.testing.assert_allclose(decay, [0.99, 0.9], rtol=1e-6)

def test_two_parts_are_two_optimizers_if_the_clip_does_not_bite():
    settings = {**SETTINGS, "gradient_accumulation_steps": 4}
    def apart(clip):
        parts = (0.1 / 8, slice(2)), (0.1, slice(2, None))
        settings["global_clipnorm"] = clip
        return sum((train(keras.optimizers.AdamW(rate, **settings), START[part], [g[part] for g in GRADIENTS])
                    for rate, part in parts), [])
    def together(clip):
        return train(MultiRateAdamW(0.1, MULTIPLIERS, **{**settings, "global_clipnorm": clip}), START, GRADIENTS)
    equal(together(1e6), apart(1e6))
    assert any((a != b).any() for a, b in zip(together(0.5), apart(0.5)))

def test_refusals():
    with pytest.raises(InputError, match="below 0"): MultiRateAdamW(1e-5, (-1.0, 1.0))
    with pytest.raises(InputError, match="lr_multipliers: 1 for 2 variables"):
        train(MultiRateAdamW(1e-5, (1.0,)), [0.0, 0.0], [])
    with pytest.raises(InputError, match="never move"): MultiRateAdamW(1e-5, ema_momentum=1.0)
    with pytest.raises(InputError, match="choose all or kernels"): MultiRateAdamW(1e-5, decay_variables="some")

def test_it_is_serialized_as_json():
    two_rates = MultiRateAdamW(WarmupCosine(0.1, 0.01, 16, 4), MULTIPLIERS, "kernels", 0.9, **SETTINGS)
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(two_rates))))
    assert again.get_config() == two_rates.get_config() and again.ema_momentum == 0.9
    equal(train(again, START, GRADIENTS), train(two_rates, START, GRADIENTS))
    scaled = CountingLossScaleOptimizer.from_config(CountingLossScaleOptimizer(two_rates).get_config())
    assert type(unwrap_optimizer(scaled)) is MultiRateAdamW

def test_keras_way_to_spare_variables_from_decay_still_works():
    spared = MultiRateAdamW(0.5, weight_decay=0.2)
    spared.exclude_from_weight_decay(var_names=["."])
    assert train(spared, [1.0], [[0.0]])[0] == 1.0

# Steps that are skipped

ORDINARY = [np.float32([1, -2]), np.float32(3)]
NAN = [np.float32([1, math.nan]), np.float32(3)]
HUGE = [np.float32([1, 2]), np.float32(3e19)]   # its square is infinite

def state_after(gradients, compile=eager, freed=False):
    "Return every variable of an optimizer and of what it moves, but `skipped`; and `skipped`."
    optimizer = MultiRateAdamW(0.1, ema_momentum=0.9, gradient_accumulation_steps=2, **SETTINGS)
    variables = [keras.Variable(np.float32([1, 2])), keras.Variable(3.0)]
    optimizer.build(variables)
    step = compile(lambda parts: optimizer.apply(parts))
    for parts in gradients:
        if freed: optimizer.skipped.assign(0)
        step([tf.constant(part, "float32") for part in parts])
    return [v.numpy() for v in variables + optimizer.variables[:-1]], int(optimizer.skipped)

@pytest.mark.parametrize("odd, before, compile", [
    (NAN, 1, eager), (NAN, 2, eager), (HUGE, 1, eager), (NAN, 1, graph), (NAN, 1, xla)])
def test_a_non_finite_gradient_leaves_no_trace_and_stops_all_after_it(odd, before, compile):
    expected, _ = state_after(before * [ORDINARY], compile)   # in the middle of a window of accumulation, and after one
    state, skipped = state_after(before * [ORDINARY] + [odd, ORDINARY], compile)
    equal(state, expected)
    assert skipped == 2

def test_training_goes_on_when_the_count_is_set_back():
    equal(state_after(3 * [ORDINARY])[0], state_after([ORDINARY, NAN, ORDINARY, ORDINARY], freed=True)[0])

def test_what_is_finite():
    found = [bool(_is_finite(parts)) for parts in (ORDINARY, NAN, HUGE, [*ORDINARY, None])]
    assert found == [True, False, False, True]   # None: of a variable without a gradient

def test_apply_builds_what_is_not_built():
    weight = keras.Variable(1.0)
    MultiRateAdamW(0.1, weight_decay=0.0).apply([tf.constant(3.0)], [weight])
    assert weight.numpy() == pytest.approx(0.9, abs=1e-6)

# Accumulation and loss scaling

EIGHT = GRADIENTS[:8]

def scaled(**settings):
    optimizer = MultiRateAdamW(0.1, MULTIPLIERS, gradient_accumulation_steps=8, **SETTINGS)
    return CountingLossScaleOptimizer(optimizer, **settings)

@pytest.fixture(scope="module")
def gathered(): return train(MultiRateAdamW(0.1, MULTIPLIERS, gradient_accumulation_steps=8, **SETTINGS), START, EIGHT)

def test_eight_micro_batches_take_the_step_of_their_mean(gathered):
    mean = [np.mean(parts, axis=0) for parts in zip(*EIGHT)]
    close(gathered, train(MultiRateAdamW(0.1, MULTIPLIERS, **SETTINGS), START, [mean]))
    equal(train(scaled(), START, EIGHT), gathered)   # a power of two changes no bit

@pytest.mark.parametrize("place", [0, 3, 7])
def test_an_overflow_costs_its_own_micro_batch_and_nothing_else(gathered, place):
    optimizer = scaled()
    equal(train(optimizer, START, EIGHT[:place] + [INFINITE] + EIGHT[place:]), gathered)
    assert overflow_count(optimizer) == 1 and float(optimizer.dynamic_scale) == 2.0**14
    assert int(optimizer.iterations) == 1 and int(unwrap_optimizer(optimizer).skipped) == 0
    copy = scaled()
    train(copy, START, [])
    for ours, theirs in zip(copy.variables, optimizer.variables, strict=True): ours.assign(theirs)
    assert [overflow_count(other) for other in (copy, scaled(), MultiRateAdamW(0.1))] == [1, 0, 0]

def test_the_last_micro_batches_of_a_run_are_used():
    optimizer, variables = scaled(), [keras.Variable(np.float32(value)) for value in START]
    optimizer.build(variables)
    for parts in GRADIENTS[:11]: optimizer.apply([optimizer.scale_loss(np.float32(part)) for part in parts])
    assert [flush_accumulation(optimizer), flush_accumulation(optimizer)] == [3, 0]
    assert int(optimizer.iterations) == 2
    means = [[np.mean(parts, axis=0) for parts in zip(*group)] for group in (GRADIENTS[:8], GRADIENTS[8:11])]
    close([v.numpy() for v in variables], train(MultiRateAdamW(0.1, MULTIPLIERS, **SETTINGS), START, means))

def test_no_micro_batch_is_dropped_at_the_end_of_an_epoch():
    "Two epochs of twelve micro-batches are three updates, with the weights of one epoch of 24."
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 3)).astype("float32"), rng.normal(size=(48, 1)).astype("float32")
    def weights(epochs):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(make_optimizer(REFERENCE_RECIPE.optimizer, 0.1), "mse", run_eagerly=True)
        for rows in np.split(np.arange(48), epochs):
            model.fit(x[rows], y[rows], batch_size=2, shuffle=False, verbose=0)
        assert int(model.optimizer.iterations) == 3
        return model.get_weights()
    equal(weights(1), weights(2))

# The EMA of the weights

def ema_by_hand(path, momentum):
    "Return the EMA at the end of a path: the weights at first and after each update."
    ema = [np.float64(value) for value in path[0]]
    for t, weights in enumerate(path[1:]):
        kept = min(momentum, (1 + t) / (10 + t))
        ema = [kept * old + (1 - kept) * new for old, new in zip(ema, weights)]
    return ema

@pytest.mark.parametrize("kind, compile", [("plain", eager), ("accumulating", graph), ("scaled", xla)])
def test_the_ema_moves_with_updates_alone(kind, compile):
    settings = {**SETTINGS, "gradient_accumulation_steps": None if kind == "plain" else 3}
    optimizer = MultiRateAdamW(0.1, MULTIPLIERS, ema_momentum=0.3, **settings)
    gradients = list(GRADIENTS)
    if kind == "scaled":
        optimizer = CountingLossScaleOptimizer(optimizer)
        gradients.insert(5, INFINITE)
    optimizer.build(variables := [keras.Variable(np.float32(value)) for value in START])
    step = compile(lambda parts: optimizer.apply([optimizer.scale_loss(part) for part in parts]))
    path = [[v.numpy() for v in variables]]
    for parts in gradients:
        before = int(optimizer.iterations)
        step([tf.constant(part, "float32") for part in parts])
        if int(optimizer.iterations) > before: path.append([v.numpy() for v in variables])
    if flush_accumulation(optimizer): path.append([v.numpy() for v in variables])
    ema = [v.numpy() for v in unwrap_optimizer(optimizer).ema]
    close(ema, ema_by_hand(path, 0.3))
    assert not np.allclose(ema[0], path[-1][0])

def test_the_ema_is_lent_and_the_weights_come_back():
    keras.utils.set_random_seed(0)
    layer, x = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)]), RNG.normal(size=(40, 8)).astype("float32")
    layer.compile(MultiRateAdamW(0.01, ema_momentum=0.9), loss="mse")
    layer.fit(x, 10 * x[:, :1], batch_size=4, epochs=1, shuffle=False, verbose=0)
    raw, ema = layer.get_weights(), [v.numpy() for v in layer.optimizer.ema]
    assert all((a != b).any() for a, b in zip(raw, ema))
    with ema_weights(layer): equal(layer.get_weights(), ema)
    equal(layer.get_weights(), raw)
    with pytest.raises(KeyError), ema_weights(layer): raise KeyError("evaluation failed")
    equal(layer.get_weights(), raw)

def test_without_an_ema_there_is_none_to_lend_and_none_to_keep():
    layer = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    layer.compile(MultiRateAdamW(0.01), loss="mse")
    layer.optimizer.build(layer.trainable_variables)
    with pytest.raises(InputError, match="no EMA of the weights"), ema_weights(layer): pass
    plain = keras.optimizers.AdamW(0.01)
    plain.build(layer.trainable_variables)
    assert len(layer.optimizer.variables) == len(plain.variables) + 1   # `skipped`

# The optimizer of a recipe

@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_the_references_optimizer(precision):
    optimizer = optimizer_for(build_model(TINY, REFERENCE_RECIPE, precision=precision), REFERENCE_RECIPE, 300_000)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer) == (precision == "mixed_float16")
    optimizer = unwrap_optimizer(optimizer)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert (optimizer.weight_decay, optimizer.global_clipnorm, optimizer.clipnorm) == (5e-3, 10.0, None)
    assert (optimizer.gradient_accumulation_steps, optimizer.decay_variables) == (8, "all")
    assert set(optimizer.lr_multipliers) == {1.0} and not optimizer.ema_momentum

def moved(recipe, value, gradient):
    "Return by how much each variable of a tiny detector, all of one value, moves with one gradient."
    model = build_model(TINY, recipe, precision="float32")
    for v in model.trainable_variables: v.assign(0 * v + value)
    optimizer = optimizer_for(model, recipe, None)
    optimizer.build(model.trainable_variables)
    optimizer.apply([np.full(v.shape, gradient, "float32") for v in model.trainable_variables])
    return model, {v.path: v.numpy() - value for v in model.trainable_variables}

def test_fine_tuning_moves_backbone_and_pyramid_at_1e_6_and_the_heads_at_1e_5():
    slow, quick = REFERENCE_CURRICULUM["finetune_rate_fpn"], REFERENCE_CURRICULUM["finetune_rate_heads"]
    assert (slow, quick) == (1e-6, 1e-5)
    recipe = REFERENCE_RECIPE.change(min_learning_rate=quick, fpn_lr_multiplier=slow / quick, weight_decay=0.0,
                                     gradient_accumulation_steps=1)
    model, steps = moved(recipe, 0.0, 1.0)
    for part, rate in ((model.fpn, slow), (model.heads, quick)):
        for v in part.trainable_variables: np.testing.assert_allclose(-steps[v.path], rate, rtol=1e-3)

@pytest.mark.parametrize("which", ["all", "kernels"])
def test_which_variables_decay_is_a_field(which):
    recipe = REFERENCE_RECIPE.change(decay_variables=which, min_learning_rate=0.1, gradient_accumulation_steps=1)
    _, steps = moved(recipe, 1.0, 0.0)
    for path, step in steps.items():
        decays = which == "all" or path.split("/")[-1].startswith("kernel")
        np.testing.assert_allclose(step, -0.1 * 5e-3 if decays else 0.0, rtol=1e-3, err_msg=path)

def test_a_rate_that_is_changed_later_keeps_the_multipliers():
    optimizer = make_optimizer(OptimizerConfig(gradient_accumulation_steps=1, weight_decay=0.0), 1e-5, [0.1, 1.0])
    optimizer.learning_rate = 4e-5
    np.testing.assert_allclose(train(optimizer, [0.0, 0.0], [[3.0, 3.0]]), [-4e-6, -4e-5], rtol=1e-5)
