"""The report of an evaluation, from ground truth as detections: no network is needed."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_lite.data.detections import Detections
from fcos_lite.errors import InputError
from fcos_lite.evaluate.metrics import coco_evaluation, outcomes, precision_recall
from fcos_lite.evaluate.report import crop_around, plot_worst_mistakes, write_report
from fcos_lite.scenes.scenes import Scenes, World

@pytest.fixture
def scenes(): return list(Scenes(6, seed=2, world=World(size=96, min_height=12, empty_share=0)))

def moved(scene, dx):
    "The scene's people as detections, moved to the right."
    boxes = np.float32(scene.boxes + np.float32([dx, 0, dx, 0]))
    return Detections(boxes, np.full(len(boxes), 0.8, np.float32), scene.labels)

def report_of(scenes, detections):
    metrics, results = coco_evaluation(scenes, detections, ["person"])
    return {**metrics, "threshold": 0.5}, precision_recall(results, ["person"])

def test_a_report_is_a_folder_of_five_things(scenes, tmp_path):
    detections = [moved(scene, 0 if i % 2 else 300) for i, scene in enumerate(scenes)]
    report, curves = report_of(scenes, detections)
    write_report(tmp_path / "new" / "report", report, curves=curves, examples=scenes, detections=detections, images=3)
    files = sorted(file.name for file in (tmp_path / "new" / "report").iterdir())
    assert files == ["evaluation.json", "pictures", "precision_recall.png", "worst.png"]
    assert json.loads((tmp_path / "new" / "report" / "evaluation.json").read_text()) == report
    names = sorted(file.name for file in (tmp_path / "new" / "report" / "pictures").iterdir())
    assert names == [f"{scenes[i].image_id:012d}.jpg" for i in (0, 2, 5)]     # evenly spaced

def test_an_unreadable_image_is_drawn_grey(scenes, tmp_path):
    scenes[0] = replace(scenes[0], image=Path("missing.jpg"))
    detections = [moved(scene, 0) for scene in scenes]
    report, curves = report_of(scenes, detections)
    write_report(tmp_path / "report", report, curves=curves, examples=scenes, detections=detections, images=1)
    image = Image.open(tmp_path / "report" / "pictures" / f"{scenes[0].image_id:012d}.jpg")
    assert image.size == (96, 96) and abs(int(np.median(np.asarray(image))) - 114) < 5

def test_the_worst_page_has_a_row_of_each_kind(scenes, tmp_path):
    detections = [moved(scene, 300) for scene in scenes]                      # everybody missed, all detections false
    plot_worst_mistakes(scenes, outcomes(scenes, detections, 0.5), tmp_path / "worst.png", count=6, side=80)
    assert Image.open(tmp_path / "worst.png").size == (6 * 84 - 4, 2 * 84 - 4)
    perfect = outcomes(scenes, [moved(scene, 0) for scene in scenes], 0.5)    # no mistake: a blank page, and no error
    plot_worst_mistakes(scenes, perfect, tmp_path / "blank.png", side=80)
    assert np.asarray(Image.open(tmp_path / "blank.png")).min() == 255
    with pytest.raises(InputError): plot_worst_mistakes(scenes, perfect, tmp_path / "blank.unknown")

def test_a_crop_shows_the_box_in_its_middle():
    tile, box = crop_around(np.full((40, 60, 3), 255, np.uint8), np.float32([10, 10, 30, 20]), 80)
    assert tile.shape == (80, 80, 3) and box.tolist() == [20, 30, 60, 50]
    assert tile[0, 0].tolist() == [114] * 3     # beyond the image's edge
