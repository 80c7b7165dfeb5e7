"""The forms that detections take: an image, numbers, crops, a table, COCO's JSON, another library's object."""
import contextlib
import csv
import importlib.util
import io
from dataclasses import replace
from unittest import mock
import numpy as np
import pytest
from PIL import Image
from fcos_lite.data import detections as module
from fcos_lite.data.detections import Detections
from fcos_lite.errors import InputError

BOXES = np.float32([[10.4, 20, 60.6, 120], [50, 60, 90, 140], [100, 30, 150, 80]])
IMAGE = np.random.default_rng(0).integers(0, 256, (150, 160, 3), dtype=np.uint8)
FOUND = Detections(BOXES, np.float32([0.64, 0.36, 0.216]), np.zeros(3, np.int32), image=IMAGE,
                   name="holidays/scene.jpg")

def test_a_part_still_knows_where_it_came_from():
    assert (len(FOUND), len(FOUND.above(0.3)), FOUND[:1].name) == (3, 2, "holidays/scene.jpg")
    assert FOUND[-1].score == [np.float32(0.216)]
    assert repr(FOUND[0]) == "1 detection\nperson 0.64 at (10, 20, 61, 120)" and repr(FOUND[[]]) == "0 detections"

@pytest.mark.parametrize("display, power", [("score", 1), ("square_root", 1 / 2), ("cube_root", 1 / 3)])
def test_what_is_drawn_is_the_score_or_its_root(display, power, monkeypatch):
    "Words at the boxes; the detections themselves keep their scores."
    drawn = []
    monkeypatch.setattr(module, "draw_boxes", lambda image, xyxy, labels, texts: drawn.extend(texts) or image)
    FOUND.displayed(display).draw()
    assert drawn == [f"person {float(score) ** power:.2f}" for score in FOUND.score]

def test_without_an_image_there_is_nothing_to_draw():
    bare = replace(FOUND, image=None)
    for form in (bare.draw, bare.crops):
        with pytest.raises(InputError, match="holidays/scene.jpg: these detections come without their image"): form()

def test_the_saved_image_is_the_drawn_one(tmp_path):
    FOUND.save(tmp_path / "found.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "found.png")), FOUND.draw())

def test_crops_hold_their_boxes():
    for crop, (left, top, right, bottom) in zip(FOUND.crops(), BOXES):
        assert 0 <= crop.shape[0] - (bottom - top) < 2 and 0 <= crop.shape[1] - (right - left) < 2
    np.testing.assert_array_equal(FOUND.crops()[1], IMAGE[60:140, 50:90])
    np.testing.assert_array_equal(FOUND.crops(0.5)[1], IMAGE[20:150, 30:110])
    strange = replace(FOUND, xyxy=np.float32([[-50, -50, -10, -10], [300, 300, 400, 400], [10, 10, 10, 10]]))
    assert all(crop.size >= 3 for crop in strange.crops())
    FOUND.crops()[0][:] = 0
    assert IMAGE[20:120, 10:61].any()   # a crop is a copy

def test_a_table_survives_any_name():
    rows = list(csv.DictReader(io.StringIO(replace(FOUND, name='a, "b".jpg', index=7, time=0.28).to_csv())))
    assert rows[0] == {"name": 'a, "b".jpg', "frame": "7", "time": "0.280", "class": "person", "score": "0.6400",
                       "left": "10.4", "top": "20.0", "right": "60.6", "bottom": "120.0"}
    assert FOUND.to_csv(header=False).count("\n") == 3

def test_coco_results():
    rows = replace(FOUND, name="val2017/000000000139.jpg").to_coco()
    assert rows[1] == {"image_id": 139, "category_id": 1, "bbox": [50, 60, 40, 80], "score": 0.36}
    assert FOUND.to_coco(7, [18])[0]["category_id"] == 18
    with pytest.raises(InputError, match="holidays/scene.jpg: COCO results need a number"): FOUND.to_coco()
    with pytest.raises(InputError, match="2 for 1 classes"): FOUND.to_coco(7, [1, 2])

def test_coco_reads_them():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    def average_precision(rows):
        truth = COCO()
        boxes = [[float(l), float(t), float(r - l), float(b - t)] for l, t, r, b in BOXES]
        truth.dataset = {
            "images": [{"id": 7, "width": 160, "height": 150}], "categories": [{"id": 1, "name": "person"}],
            "annotations": [{"id": k + 1, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": box[2] * box[3],
                             "bbox": box} for k, box in enumerate(boxes)]}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats[0]
    rows = FOUND.to_coco(7)
    assert average_precision(rows) == pytest.approx(1.0)
    halved = [{**row, "bbox": [row["bbox"][0], row["bbox"][1], row["bbox"][2] / 2, row["bbox"][3]]} for row in rows]
    assert average_precision(halved) < 0.25   # xyxy written in place of xywh, and the like, would show

@pytest.mark.skipif(not importlib.util.find_spec("supervision"), reason="the library supervision is not installed")
def test_supervision_takes_what_we_give():
    import supervision
    theirs = FOUND.to_supervision()
    assert isinstance(theirs, supervision.Detections) and list(theirs["class_name"]) == ["person"] * 3
    np.testing.assert_allclose(theirs.xyxy, BOXES)
    assert supervision.BoxAnnotator().annotate(IMAGE.copy(), theirs).shape == IMAGE.shape
    assert len(FOUND[:0].to_supervision()) == 0

def test_without_supervision_the_remedy_is_named():
    with mock.patch.dict("sys.modules", {"supervision": None}):
        with pytest.raises(InputError, match="pip install supervision"): FOUND.to_supervision()
