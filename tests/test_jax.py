"""JAX and TensorFlow, on the same weights and pictures: equal outputs, targets, losses, boxes; and a step of `fit` under JAX."""
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fcos_lite.config import COCO_NMS, SCRATCH_RECIPE, REFERENCE, REFERENCE_RECIPE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
NETWORK = replace(REFERENCE, image_size=64)
RECIPES = {"source": REFERENCE_RECIPE, "scratch": SCRATCH_RECIPE, "farthest": SCRATCH_RECIPE.change(level_rule="max_distance")}
BATCH = {"boxes": np.float32([[[10, 8, 40, 60], [30, 20, 44, 50], [0, 40, 63, 63], [0, 0, 0, 0]], [[1, 2, 62, 63], [50, 50, 54, 58], [0, 0, 0, 0], [0, 0, 0, 0]]]),
         "labels": np.int32([[0, 0, -2, -1], [0, 0, -1, -1]])}

def compute(inputs, fit=False):
    "Everything that is compared, as one dictionary of arrays; runs under either backend."
    import keras
    def whole(function, *arrays): # JAX compiles what it is given: one graph, where operation by operation it would compile a thousand
        if keras.backend.backend() != "jax": return function(*arrays)
        import jax
        return jax.jit(function)(*map(keras.ops.convert_to_tensor, arrays))
    from fcos_lite.evaluate.evaluator import Evaluator
    from fcos_lite.detector.model import FCOS
    from fcos_lite.detector.nms import decode, nms
    model = FCOS(NETWORK)
    model.set_weights([inputs[f"weight_{i}"] for i in range(len(model.weights))])
    outputs = model.predict_on_batch(inputs["image"])
    values = {f"outputs_{name}": np.array(value) for name, value in outputs.items()}
    for recipe in RECIPES:
        model.recipe = RECIPES[recipe]
        values |= {f"{recipe}_targets_{name}": np.array(value) for name, value in whole(model.targets, BATCH["boxes"], BATCH["labels"]).items()}
        values |= {f"{recipe}_losses_{name}": np.array(value) for name, value in whole(lambda boxes, labels: model.compute_losses(outputs, boxes, labels), BATCH["boxes"], BATCH["labels"]).items()}
    boxes, scores = whole(lambda *maps: decode(dict(zip(outputs, maps)), NETWORK.image_size, NETWORK.strides), *outputs.values())
    values |= {"decoded_boxes": np.array(boxes), "decoded_scores": np.array(scores)}
    if "boxes" in inputs: boxes, scores = inputs["boxes"], inputs["scores"]    # NMS compares scores, and one bit can change an order: the same ones for both
    t = COCO_NMS
    found = whole(lambda boxes, scores: nms(boxes, scores, t.iou, t.score, t.max_per_class, 200), keras.ops.convert_to_tensor(boxes), keras.ops.convert_to_tensor(scores))
    values |= {f"found_{name}": np.array(value) for name, value in found.items()}
    if fit:
        model = FCOS(replace(NETWORK, backbone_blocks=(1, 1, 1, 1), tower_depth=1))
        model.compile(optimizer=keras.optimizers.AdamW(1e-3, global_clipnorm=10.0, gradient_accumulation_steps=2))
        before = model.get_weights()
        batch = {**BATCH, "image": inputs["image"]}
        class Twice(keras.utils.PyDataset):
            def __len__(self): return 2
            def __getitem__(self, index): return batch
        history = model.fit(Twice(), epochs=1, verbose=0).history
        values |= {f"fit_{name}": np.float32(value) for name, value in history.items()}
        values["fit_changed"] = np.mean([(a != b).any() for a, b in zip(before, model.get_weights())])
        report = Evaluator(model, (COCO_NMS,)).predict_on_batch({**batch, "real": np.array([True, True])})
        values["fit_evaluated"] = np.array(report["losses"]["loss"])
    return values

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "The same on TensorFlow, here, and on JAX, in a process of its own."
    from fcos_lite.detector.model import FCOS
    import keras
    if keras.backend.backend() != "tensorflow": pytest.skip("this process does not run on TensorFlow")
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("jax")
    inputs = {"image": rng.integers(0, 256, (2, 64, 64, 3)).astype("uint8")}
    for i, array in enumerate(FCOS(NETWORK).get_weights()): inputs[f"weight_{i}"] = (array + rng.normal(0, 0.05, array.shape)).astype("float32")    # as if it had learned: scores and distances differ
    ours = compute(inputs)
    np.savez(folder / "inputs.npz", **inputs, boxes=ours["decoded_boxes"], scores=ours["decoded_scores"])
    done = subprocess.run([sys.executable, __file__, str(folder / "inputs.npz"), str(folder / "outputs.npz")], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, dict(np.load(folder / "outputs.npz"))

@pytest.mark.parametrize("kind", ["outputs", *(f"{recipe}_{part}" for recipe in RECIPES for part in ("targets", "losses")), "decoded", "found"])
def test_jax_gives_the_same(both, kind):
    ours, theirs = both
    names = [name for name in ours if name.startswith(kind)]
    assert names
    for name in names: np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-5, err_msg=name)

def test_what_is_compared_says_something(both):
    ours, _ = both
    for recipe in RECIPES: assert ours[f"{recipe}_targets_positive"].sum() > 5 and ours[f"{recipe}_losses_loss"] > 0
    assert not ours["scratch_targets_counted"].all() and ours["source_targets_counted"].all()
    assert 1 < ours["found_kept"].sum() < ours["found_kept"].size
    assert ours["outputs_cls"].std() > 0.05 and ours["outputs_ltrb"].std() > 0.005

def test_a_step_of_fit_runs_under_jax(both):
    _, theirs = both
    for name in ("loss", "cls", "reg", "ctr"): assert np.isfinite(theirs[f"fit_{name}"]).all() and (theirs[f"fit_{name}"] > 0).all(), name
    assert theirs["fit_changed"] > 0.9 and np.isfinite(theirs["fit_evaluated"])

if __name__ == "__main__":
    import keras
    assert keras.backend.backend() == "jax"
    np.savez(sys.argv[2], **compute(dict(np.load(sys.argv[1])), fit=True))
