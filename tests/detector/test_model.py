"""What 16-bit policies may touch, each in a process of its own because a policy is global."""
import os
import subprocess
import sys
import pytest

PROGRAM = """
import sys
import keras, numpy as np
from dataclasses import replace
from fcos_lite.config import SCRATCH_RECIPE, REFERENCE
keras.config.set_dtype_policy(sys.argv[1])
from fcos_lite.evaluate.evaluator import Evaluator
from fcos_lite.config import COCO_NMS
from fcos_lite.detector.model import FCOS

boxes = np.float32([[[301.7, 77.3, 417.2, 509.4], [0, 0, 0, 0]], [[11.3, 20.9, 350.1, 401.6], [260.3, 300.1, 290.7, 399.9]]])
batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3)).astype("uint8"), "boxes": boxes, "labels": np.int32([[0, -1], [0, 0]])}
network = replace(REFERENCE, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
                  tower_depth=1, tower_channels=16, tower_groups=4)   # at the full 512 pixels: 301.7 is no number of 16 bits
model = FCOS(network, SCRATCH_RECIPE.change(flip=0.0, zoom=(1, 1)))
assert model.fpn.layers[-1].compute_dtype == sys.argv[1].removeprefix("mixed_"), "the policy does not reach the pyramid"
assert model.heads.cls_tower.layers[0].compute_dtype == sys.argv[1].removeprefix("mixed_"), "the policy does not reach the towers"
assert all(v.dtype == "float32" for v in model.weights)

arrived, losses_of = [], FCOS.compute_losses
def watch(self, outputs, boxes, labels, *rest):
    arrived.append((np.array(boxes), {name: keras.backend.standardize_dtype(value.dtype) for name, value in outputs.items()}))
    return compute_losses(self, outputs, boxes, labels, *rest)
FCOS.compute_losses = watch
model.compile(optimizer=keras.optimizers.SGD(1e-3), run_eagerly=True)
report = model.train_on_batch(batch, return_dict=True)
nobody = model.train_on_batch({**batch, "labels": np.full((2, 2), -1, "int32")}, return_dict=True)
assert all(np.isfinite(value) for value in nobody.values()), nobody
Evaluator(model, (COCO_NMS,))({**batch, "real": np.array([True, True])})
assert all(np.isfinite(value) for value in report.values()), report
assert all(np.isfinite(a).all() for a in model.get_weights())
assert len(arrived) == 3
for seen, dtypes in arrived:
    np.testing.assert_array_equal(seen, boxes)
    assert {kind for name, kind in dtypes.items() if name != "labels"} == {"float32"} and dtypes.get("labels", "int32") == "int32", dtypes
print("unrounded, finite")
"""

@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_boxes_reach_the_loss_unrounded(policy):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, policy], capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    assert done.returncode == 0 and "unrounded, finite" in done.stdout, done.stderr[-3000:]

def test_nothing_is_left_to_be_built():
    "Else `fit` on JAX looks at a batch before the first epoch, `Batches` counts an epoch too many, and a resumed run is another run."
    from fcos_lite.config import ModelConfig
    from fcos_lite.detector.model import FCOS
    assert not [layer.name for layer in FCOS(ModelConfig(image_size=64))._flatten_layers() if not layer.built]
