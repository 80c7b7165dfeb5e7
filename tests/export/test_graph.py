"""The exported graph gives Keras' table, in every format."""
import numpy as np
import pytest

from fcos_lite.config import NMSConfig
from fcos_lite.export.runtime import FORMATS
from fcos_lite.export.writer import compare_with_keras

@pytest.mark.parametrize("format", FORMATS)
def test_float32_gives_the_boxes_of_keras(format, exports, images):
    exported, module, _ = exports(format)
    counts = [int(module.predict_on_batch(image[None])["count"][0]) for image in images[:8]]
    assert sum(counts) > 20 and min(counts) < max(counts), "the images must hold boxes, and not all as many"
    worst = compare_with_keras(exported, module, images)
    assert worst["boxes"] < 0.5 and worst["scores"] < 1e-3 and worst["unmatched"] == 0, worst

def test_the_table_is_filled_from_the_top(exports, images):
    exported, *_ = exports("litert")
    for image in images[:8]:
        table = {name: value[0] for name, value in exported(image[None]).items()}
        count, scores, threshold = table["count"], table["scores"], exported.manifest["nms"]["score"]
        assert (np.diff(scores) <= 0).all() and (scores[:count] > threshold).all() and (scores[count:] == 0).all()
        assert (table["labels"][count:] == -1).all() and (table["boxes"][count:] == 0).all()
        assert set(table["labels"][:count]) <= {0, 1}

def test_more_boxes_than_rows_gives_the_best(model, images):
    from fcos_lite.export.graph import ExportModule
    nms = NMSConfig(iou=0.3, score=0.25, candidates=100)
    many, few = (ExportModule(model, nms, rows)(images[:4]) for rows in (100, 3))
    assert (np.array(many["count"]) > 3).any()
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(np.array(few[name]), np.array(many[name])[:, :3])
    np.testing.assert_array_equal(np.array(few["count"]), np.minimum(many["count"], 3))
