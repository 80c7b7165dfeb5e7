"""What no change of names or places may change: parameters, what `person` finds, its AP, the demo's losses."""
import csv
import json
import os
from pathlib import Path
import matplotlib.cbook
import numpy as np
import pytest
from fcos_lite import demo
from fcos_lite.train import __main__ as train
from fcos_lite.config import REFERENCE
from fcos_lite.evaluate.evaluator import evaluate
from fcos_lite.detector.model import FCOS
from fcos_lite.data.datasets import read_dataset

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
PHOTOGRAPHS = os.environ.get("FCOS_LITE_PHOTOGRAPHS")   # folder of the photographs that README.md measures on

def test_parameter_counts():
    model = FCOS(REFERENCE)
    assert model.fpn.count_params() == GOLDEN["parameters"]["fpn"] == 2_885_024
    assert model.count_params() == GOLDEN["parameters"]["all"] == 3_255_082

def test_person_finds_what_it_found():
    photo = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    found = FCOS.from_preset("person").detect(photo)
    assert found.names() == ["person"]
    np.testing.assert_allclose(found.score, GOLDEN["grace_hopper"]["score"], atol=2e-3)
    np.testing.assert_allclose(found.xyxy, GOLDEN["grace_hopper"]["xyxy"], atol=0.5)

def test_the_demo_learns_the_same_seed_for_seed(tmp_path):
    "Its own network, world and rates on 48 of its scenes, two epochs; another processor differs in the last digits."
    out = tmp_path / "run"
    train.main([*demo.FLAGS, "--scenes", "48", "--epochs", "2", "--evaluate-every", "2", "--out", str(out)])
    with open(out / "metrics.csv", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    for row, golden in zip(rows, GOLDEN["demo"], strict=True):
        for name, value in golden.items():
            assert float(row[name]) == pytest.approx(value, rel=5e-3), (row["epoch"], name)

@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="FCOS_LITE_PHOTOGRAPHS names no folder with the photographs")
def test_person_is_as_good_as_it_was():
    examples = read_dataset(PHOTOGRAPHS, "val2017", ("person",))
    report = evaluate(FCOS.from_preset("person"), examples)
    for name, value in GOLDEN["val2017"].items(): assert report[name] == pytest.approx(value, abs=2e-3), name
