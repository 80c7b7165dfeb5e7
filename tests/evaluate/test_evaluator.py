"""`predict` and `evaluate`: the same numbers in batches of any size."""
from dataclasses import replace

import numpy as np
import pytest

from fcos_lite.config import REFERENCE, REFERENCE_NMS, SCRATCH_RECIPE
from fcos_lite.scenes.scenes import Scenes, World

CONFIG = replace(
    REFERENCE, image_size=64, strides=(16, 32), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
    backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
    tower_depth=1, tower_channels=16, tower_groups=4)

# as the reference divides, and as `scratch` does
@pytest.mark.parametrize("weighting, normalizer", [("none", "targets"), ("centerness", "positives")])
def test_losses_do_not_depend_on_the_batches(weighting, normalizer):
    "Empty images that stand together weigh no more than among others, and padding weighs nothing."
    from fcos_lite.detector.model import FCOS
    from fcos_lite.evaluate.evaluator import predict
    recipe = SCRATCH_RECIPE.change(level_areas=(1024,), ltrb_weighting=weighting,
                                   centerness_normalizer=normalizer, centerness_weight=0.5)
    model = FCOS(CONFIG, recipe.targets, recipe.losses)
    people = list(Scenes(4, 0, World(size=64, min_height=30, max_height=60, empty_share=0.0)))
    empty = [replace(scene, boxes=scene.boxes[:0], labels=scene.labels[:0], areas=None) for scene in people]
    nms, examples = (replace(REFERENCE_NMS, candidates=10),), [*empty, *people]
    assert len({len(example.boxes) for example in people}) > 1
    (detections,), whole = predict(model, examples, batch_size=8, nms=nms)
    assert len(detections) == 8 and whole["positives"] > 4
    assert whole.keys() == {"cls", "ltrb", "centerness", "loss", "positives"}
    assert whole["loss"] == pytest.approx(whole["cls"] + whole["ltrb"] + 0.5 * whole["centerness"])
    _, losses = predict(model, examples, batch_size=3, nms=nms)     # three empty; one and two; two and one of padding
    for name in whole: assert losses[name] == pytest.approx(whole[name], rel=1e-4), name

def test_the_report_holds_what_was_measured(tiny_run):
    from fcos_lite.detector.model import load_detector
    from fcos_lite.evaluate.evaluator import evaluate
    examples = list(Scenes(5, seed=1, world=World(size=64, min_height=16)))
    done = []
    report = evaluate(load_detector(tiny_run), examples, batch_size=3, progress=lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    assert report["images"] == 5 and report["boxes"] == sum(len(example.boxes) for example in examples) > 0
    assert all(report[name] == -1 or 0 <= report[name] <= 1 for name in ("AP", "AP50", "APs", "APl", "source_map75"))
    assert set(report["losses"]) == {"cls", "ltrb", "centerness", "loss", "positives"}
    assert np.isfinite(list(report["losses"].values())).all() and set(report["classes"]) == {"person"}
