"""The shipped detector: sealed, small, loadable, and one that learned something."""
import json
import re
from pathlib import Path
import matplotlib.cbook
import numpy as np
import pytest
from fcos_lite import FCOS
from fcos_lite.detector.boxes import iou
from fcos_lite.config import InputError
from fcos_lite.detector.weights import verify_checksum, find_weights, read_config, shipped_weights

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"

@pytest.fixture(scope="module")
def person(): return FCOS.from_preset("person")

def test_it_is_found_sealed_and_small():
    path = shipped_weights()["person"]
    assert path == WEIGHTS / "person.weights.h5" == find_weights("person")
    assert path.stat().st_size < 15e6 and path.with_name("person.weights.h5.sha256").is_file()
    verify_checksum(path)

def test_the_card_says_what_the_page_says():
    measured, card = json.loads((WEIGHTS / "person.json").read_text())["measured"], (WEIGHTS / "README.md").read_text()
    trained = json.loads((WEIGHTS / "person.json").read_text())["trained"]
    for name in ("AP", "AP50", "AP75"): assert f"**{measured[name]:.3f}**" in card, name
    sizes = [float(value) for value in re.search(r"\*\*384²\*\*.*\*\* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card).groups()]
    assert sizes == pytest.approx([measured[name] for name in ("APs", "APm", "APl", "source_map75")], abs=6e-4)     # both are rounded
    assert f"{trained['views']:,} views in {trained['epochs']} passes" in card and f"{trained['views'] / trained['minutes'] / 60:.0f} photographs a second with compiling" in card
    assert f"F1 ({measured['f1']:.2f})" in card and f"is {measured['threshold']:.2f};" in card
    network, recipe = read_config(WEIGHTS / "person.weights.h5")
    assert network.image_size == 384 and (recipe.augment.zoom, recipe.augment.mosaic) == ((0.5, 1.5), 0.2)

def test_one_changed_byte_is_refused(tmp_path):
    for name in ("person.weights.h5", "person.weights.h5.sha256", "person.json"): (tmp_path / name).write_bytes((WEIGHTS / name).read_bytes())
    data = bytearray((tmp_path / "person.weights.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "person.weights.h5").write_bytes(data)
    with pytest.raises(InputError, match="damaged or exchanged"): FCOS.from_preset(tmp_path / "person.weights.h5")

def test_it_finds_the_person_in_a_photograph_it_has_not_seen(person):
    found = person.detect(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert len(found) >= 1
    assert float(iou(found.xyxy[0], np.float32([20, 30, 505, 604]))) > 0.8

def test_shipped_weights_without_a_seal_are_refused(tmp_path, monkeypatch):
    for name in ("person.weights.h5", "person.json"): (tmp_path / name).write_bytes((WEIGHTS / name).read_bytes())
    monkeypatch.setattr("fcos_lite.detector.weights.shipped_weights", lambda: {"person": tmp_path / "person.weights.h5"})
    with pytest.raises(InputError, match=r"person.weights.h5.sha256 is missing beside it; fetch both again"): FCOS.from_preset("person")

@pytest.mark.parametrize("grey", [0, 60, 128, 200, 255])
def test_it_finds_nobody_in_an_empty_picture(person, grey):
    assert len(person.detect(np.full((300, 400, 3), grey, np.uint8))) == 0
