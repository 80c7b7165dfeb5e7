"""A network that never learned, exported once per format for all tests of this folder."""
from dataclasses import replace

import numpy as np
import pytest

from fcos_lite.config import CAMERA_NMS, ModelConfig
from fcos_lite.export.runtime import _RUNTIMES
from fcos_lite.export.writer import export_detector, reduce_precision
from fcos_lite.scenes.scenes import Scenes, World

SIZE = 64
CONFIG = ModelConfig(
    image_size=SIZE, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1),
    backbone_groups=4, pyramid_channels=16, pyramid_groups=4, strides=(4, 8), tower_depth=1, tower_channels=16,
    tower_groups=4, class_names=("person", "dog"), ltrb_bias=0.0, scale_init=1.0)
NMS = replace(CAMERA_NMS, score=0.25, candidates=100)

@pytest.fixture(scope="session")
def model():
    "Its last layers are scaled up, so that scores lie far apart and an order and a threshold mean something."
    from fcos_lite.detector.layers import reinitialize_kernels
    from fcos_lite.detector.model import FCOS
    model = FCOS(CONFIG)
    h = model.heads
    last = h.classes, h.distances, h.centers
    reinitialize_kernels([*model.fpn.layers, *h.cls_tower.layers, *h.reg_tower.layers, *last], 0)   # always the same
    for layer in last: layer.kernel.assign(20 * layer.kernel)
    for layer in (h.classes, h.centers): layer.bias.assign(np.full(layer.bias.shape, -0.5))
    return model

@pytest.fixture(scope="session")
def images(): return np.stack([scene.read() for scene in Scenes(16, 0, World(size=SIZE))])

@pytest.fixture(scope="session")
def exports(model, images, tmp_path_factory):
    "A function (format, precision) -> ExportedDetector, ExportModule, folder."
    done, root = {}, tmp_path_factory.mktemp("exports")

    def export(format, precision="float32"):
        pytest.importorskip(_RUNTIMES[format])
        key, folder = (format, precision), root / f"{format}-{precision}"
        if key in done: return done[key]
        if precision == "float32":
            done[key] = *export_detector(model, folder, format=format, nms=NMS, rows=30), folder
        else:
            _, module, exact = export(format)
            done[key] = reduce_precision(exact, folder, precision, images), module, folder
        return done[key]
    return export
