"""Guards in a run: averages are lent and given back in the middle of `fit`, a bad batch is found again after a resume, evaluation is left alone. TensorFlow here, JAX in a process of its own."""
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest

def equal(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y)

def tiny():
    from fcos_lite.config import SCRATCH_RECIPE, ModelConfig
    network = ModelConfig(image_size=32, strides=(8, 16), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4,
                      pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
    return network, SCRATCH_RECIPE.change(level_areas=(65536,), center_radius=None, batch_size=2, noise=0.1, epochs=1)

def bad_batches(odd, examples=16):
    "Eight batches of two scenes; in one of them a pixel is no number."
    from fcos_lite.data.batches import Batches
    from fcos_lite.scenes.scenes import Scenes, World
    class Odd(Batches):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            batch["image"] = batch["image"].astype("float32")
            if index == odd: batch["image"][1, 9, 9] = np.nan
            return batch
    return Odd(list(Scenes(examples, seed=5, world=World(size=32, min_height=10, max_height=28, max_people=3))), 2, 32, shuffle_seed=0)

# --- averages of the weights, under either backend

LENGTH, WAITS, AVERAGE = 14, 3, 0.4           # micro-batches of an epoch, of which the fifth overflows; in one update; the share kept

def follow(interrupted):
    "A line learned in float16's way: the trained model, its weights at first and after each update, and what `ema_weights` lent."
    import keras
    from fcos_lite.train.optimizer import ema_weights, make_optimizer
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(make_optimizer(0.05, 0.1, 1.0, WAITS, scale_loss=True, average=AVERAGE), loss="mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2 * LENGTH, 4)).astype("float32"), rng.normal(size=(2 * LENGTH, 1)).astype("float32")
    y[9] = np.inf
    path, lent = [model.get_weights()], []
    def lend(evaluate):
        with ema_weights(model):
            lent.append((len(path), model.get_weights()))
            if evaluate: model.evaluate(x[:4], y[:4], verbose=0)
    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if keras.backend.backend() == "jax": model.jax_state_sync()
            if int(model.optimizer.iterations) == len(path): path.append(model.get_weights())
            if batch == 7: lend(evaluate=False)
        def on_epoch_end(self, epoch, logs=None):
            lend(evaluate=True)
            with pytest.raises(RuntimeError), ema_weights(model): raise RuntimeError("evaluation failed")
    model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=[Look()] if interrupted else [])
    return model, path, lent

def mean_by_hand(path):
    mean = [value.astype(np.float64) for value in path[0]]
    for t, weights in enumerate(path[1:]):
        kept = min(AVERAGE, (1 + t) / (10 + t))
        mean = [kept * old + (1 - kept) * new for old, new in zip(mean, weights)]
    return mean

def check_averages():
    import keras
    model, path, lent = follow(interrupted=True)
    plain, _, _ = follow(interrupted=False)
    assert len(path) - 1 == (2 * LENGTH - 2) // WAITS and int(plain.optimizer.dropped) == 2
    equal(model.get_weights(), plain.get_weights())
    equal(model.get_weights(), path[-1])       # `fit` ended with the raw weights
    equal(*([keras.ops.convert_to_numpy(v) for v in m.optimizer.variables] for m in (model, plain)))
    assert len(lent) == 4
    for count, weights in lent:
        for found, expected, raw in zip(weights, mean_by_hand(path[:count]), path[count - 1], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert (np.abs(found - raw) > 1e-4).any()

def check_memory():
    "What the backend says of a full memory becomes three settings."
    import keras
    from fcos_lite.config import InputError
    from fcos_lite.train.nan_guard import explain_memory
    from fcos_lite.train.trainer import build_model
    model = build_model(*tiny(), precision="float32")
    with pytest.raises(InputError, match="out of memory(?s:.)*--batch-size 1 --gradient-accumulation-steps") as caught:
        with explain_memory(model): keras.ops.ones((2**20, 2**20, 64), "float32")
    assert "--precision mixed_bfloat16" in str(caught.value)

@pytest.mark.parametrize("law", [check_averages, check_memory])
def test_on_tensorflow(law): law()

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["jax", "all laws hold"]

# --- a real detector, on TensorFlow

def test_evaluation_is_left_alone():
    "After a loss that is no number training stands still; a test step gives the loss as it is, and counts nothing."
    from fcos_lite.train.optimizer import make_optimizer
    from fcos_lite.train.trainer import build_model
    model, batches = build_model(*tiny(), precision="float32"), bad_batches(odd=1)
    model.compile(make_optimizer(1e-3, 0.05, 10.0, 2), run_eagerly=True)
    model.train_on_batch(batches[0])
    before = model.get_weights() + [v.numpy() for v in model.optimizer.variables[:-1]]
    assert np.isnan(model.train_on_batch(batches[1], return_dict=True)["loss"])
    assert np.isfinite(model.train_on_batch(batches[2], return_dict=True)["loss"])                # Keras has counted anew
    equal(model.get_weights() + [v.numpy() for v in model.optimizer.variables[:-1]], before)      # a half-filled window of accumulation too
    assert int(model.optimizer.refused) == 2
    outputs = model(batches[2])
    expected = float(model.compute_losses(outputs, outputs["boxes"], outputs["labels"])["loss"])
    assert np.isnan(model.test_on_batch(batches[1], return_dict=True)["loss"])
    np.testing.assert_allclose(model.test_on_batch(batches[2], return_dict=True)["loss"], expected, rtol=1e-5)
    assert [int(v) for v in (model.streak.good, model.streak.seen, model.optimizer.refused)] == [0, 0, 2]

def test_a_bad_batch_is_found_after_a_resume(tmp_path):
    "A run dies between the bad batch and the guard's look; whoever goes on is told of the same batch, with the weights before it."
    import keras
    from fcos_lite.train.checkpoint import Checkpoint
    from fcos_lite.train.nan_guard import NonFiniteLossError, NonFiniteGuard, replay
    from fcos_lite.train.optimizer import make_optimizer
    from fcos_lite.train.trainer import build_model
    before = []
    class Watch(keras.callbacks.Callback):
        def __init__(self, dies): super().__init__(); self.dies, self.seen = dies, 0
        def on_train_batch_begin(self, batch, logs=None): before.append(self.model.get_weights())
        def on_train_batch_end(self, batch, logs=None):
            self.seen += 1
            if self.dies and self.seen == 7: raise OSError("the power is gone")
    def run(dies):
        keras.utils.set_random_seed(1)
        model, batches = build_model(*tiny(), precision="float32"), bad_batches(odd=4)
        model.compile(make_optimizer(1e-3, 0.05, 10.0, 3, average=0.9), jit_compile=False, run_eagerly=True)   # nine steps are done before two graphs are made
        model.optimizer.build(model.trainable_variables)
        checkpoint = Checkpoint(tmp_path, model, batches, {"run": {"seed": 1}}, every_steps=2, log=lambda line: None)
        checkpoint.fit(1, [NonFiniteGuard(tmp_path, batches), Watch(dies)], verbose=0)
    with pytest.raises(OSError): run(dies=True)
    assert len(before) == 7
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 5 of 8: the loss is no number") as caught: run(dies=False)
    assert len(before) == 7 + 2                                                    # it went on after the sixth
    equal(before[-1], before[4])                                                   # and nothing moved
    with np.load(caught.value.folder / "batch.npz") as file: ids = file["image_id"]
    assert f"pictures: {', '.join(map(str, ids))}\n" in str(caught.value)
    np.testing.assert_equal(replay(caught.value.folder), caught.value.findings)

if __name__ == "__main__":
    import keras
    check_averages()
    check_memory()
    print(json.dumps([keras.backend.backend(), "all laws hold"]))
