"""Weights: stored whole, found, checked before they are loaded; and the detector that comes with the library."""
import json
import pathlib
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import matplotlib.cbook
import numpy as np
import pytest

from fcos_lite import FCOS
from fcos_lite.config import REFERENCE, REFERENCE_RECIPE, SCRATCH_RECIPE
from fcos_lite.detector.boxes import iou
from fcos_lite.detector.weights import (find_mismatches, find_weights, load_weights, publish_weights, read_config,
                                        save_weights, shipped_weights, stored_shapes)
from fcos_lite.errors import InputError
from fcos_lite.files import sha256_of, verify_checksum

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
SMALL = replace(REFERENCE, image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
                backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
                tower_depth=2, tower_channels=16, tower_groups=4)


@pytest.fixture(scope="module")
def person(): return FCOS.from_preset("person")


@pytest.fixture(scope="module")
def model(): return FCOS(SMALL)


def write_run(folder, model):
    "The two files of a run that its weights need."
    save_weights(model, folder / "best.weights.h5")
    config = {"model": asdict(model.config), "recipe": asdict(REFERENCE_RECIPE), "command": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path, model): return write_run(tmp_path, model)


def assert_same_weights(a, b):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True): np.testing.assert_array_equal(x, y)


# Files

def test_a_file_holds_the_arrays_and_nothing_else(run, model):
    with h5py.File(run / "best.weights.h5") as file: assert set(file) == {"fpn", "heads", "vars"}
    shapes = stored_shapes(run / "best.weights.h5")
    assert shapes == Counter(tuple(array.shape) for array in model.weights)
    assert [file.name for file in sorted(run.iterdir())] == ["best.weights.h5", "config.json"] # nothing temporary


def test_weights_come_back_bit_for_bit(run, model):
    "Into another model, one that is compiled, and one of another size; from a file with an optimizer in it too."
    compiled, larger = FCOS(SMALL), FCOS(replace(SMALL, image_size=96, class_names=("dog",)))
    compiled.compile(optimizer="adam")
    compiled.optimizer.build(compiled.trainable_variables)
    for other in (compiled, larger):
        load_weights(other, run)
        assert_same_weights(other, model)
    compiled.save_weights(run / "whole.weights.h5")
    assert stored_shapes(run / "whole.weights.h5") == stored_shapes(run / "best.weights.h5")
    again = FCOS(SMALL)
    load_weights(again, run / "whole.weights.h5")
    assert_same_weights(again, model)


def test_a_file_appears_whole_or_not_at_all(run, model, monkeypatch):
    before = sha256_of(run / "best.weights.h5")
    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail) # of the bytes that ask whether there is room
    with pytest.raises(InputError, match="best.weights.h5: cannot be written .No space left on device"):
        save_weights(model, run / "best.weights.h5")
    assert sha256_of(run / "best.weights.h5") == before and len(list(run.iterdir())) == 2


def test_only_files_that_cannot_hold_code_are_written_and_opened(tmp_path, run, model):
    (tmp_path / "model.keras").write_bytes(b"code")
    for call in (lambda: find_weights(tmp_path / "model.keras"), lambda: save_weights(model, tmp_path / "model.h5")):
        with pytest.raises(InputError, match="hold arrays and no code"): call()


@pytest.mark.parametrize("damage", [lambda data: data[:3000], lambda data: b"once upon a time"])
def test_a_damaged_file_is_refused(damage, run, model):
    path = run / "best.weights.h5"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="not a weights file, or incomplete"): load_weights(model, run)


def test_one_changed_bit_is_refused_where_there_is_a_checksum(run, model):
    path = run / "best.weights.h5"
    data = bytearray(path.read_bytes())
    (run / "best.weights.h5.sha256").write_text(f"{sha256_of(path)}  best.weights.h5\n")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256 does not match"): load_weights(model, run)


def test_names_that_mean_nothing_are_answered_with_those_that_do(tmp_path):
    for name in ("persn", tmp_path):
        with pytest.raises(InputError, match="no such weights; give .* the name of a detector .*person"):
            find_weights(name)


# What belongs to which network

def test_the_configuration_comes_back(run):
    assert read_config(run / "best.weights.h5") == (SMALL, REFERENCE_RECIPE)
    (run / "config.json").write_text(json.dumps({"model": asdict(SMALL)}))
    assert read_config(run / "best.weights.h5") == (SMALL, SCRATCH_RECIPE)
    (run / "config.json").unlink()
    assert read_config(run / "best.weights.h5") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"depth": 3}}', '{"model": {"image_size": 50}}',
                                  '{"model": {}, "recipe": {"level_rule": "area"}}'])
def test_an_unknown_configuration_is_refused(text, run):
    (run / "config.json").write_text(text)
    with pytest.raises(InputError, match="describes no network that this version knows"):
        read_config(run / "best.weights.h5")


@pytest.mark.parametrize("changes, words, without_config", [
    (dict(class_names=("a", "b")), "class_names is .'person',. there and .'a', 'b'. here", "1 of .1, 1, 16, 2."),
    (dict(tower_depth=1), "tower_depth is 2 there and 1 here", "2 of .3, 3, 16, 16."),
    (dict(centerness_tower="reg"), "centerness_tower is cls there and reg here", None),
    (dict(leaky_slope=0.1), "leaky_slope is 0.01 there and 0.1 here", None),
    (dict(tower_groups=8), "tower_groups is 4 there and 8 here", None)])
def test_another_network_is_refused(changes, words, without_config, run):
    "By its fields; by its shapes where no configuration lies beside it, which cannot tell all of them."
    other = FCOS(replace(SMALL, **changes))
    with pytest.raises(InputError, match=words): load_weights(other, run)
    (run / "config.json").unlink()
    if without_config is None: load_weights(other, run)
    else:
        with pytest.raises(InputError, match=f"arrays only .*{without_config}"): load_weights(other, run)


def test_fields_that_the_arrays_do_not_depend_on_may_differ(run, model):
    stored = stored_shapes(run / "best.weights.h5")
    for changes in (dict(image_size=96), dict(class_names=("dog",)), dict(class_prior=0.5), dict(scale_init=1.0)):
        assert find_mismatches(replace(SMALL, **changes), stored, model) == []


# To publish, and what is published

def test_published_weights_are_half_as_large_and_complete(run, model, tmp_path):
    target = tmp_path / "small.weights.h5"
    publish_weights(run, target, {"AP": 0.5})
    verify_checksum(target, required=True)
    assert json.loads((tmp_path / "small.json").read_text())["AP"] == 0.5
    assert read_config(target) == (SMALL, REFERENCE_RECIPE)
    arrays = 2 * model.count_params()
    assert target.stat().st_size < (run / "best.weights.h5").stat().st_size - 0.9 * arrays
    other = FCOS(SMALL)
    load_weights(other, target)
    for a, b in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b.astype("float16").astype("float32"))


def test_the_shipped_detector_is_found_and_small():
    path = shipped_weights()["person"]
    assert path == WEIGHTS / "person.weights.h5" == find_weights("person")
    assert path.stat().st_size < 15e6
    verify_checksum(path, required=True)


def test_shipped_weights_without_a_checksum_are_refused(tmp_path, monkeypatch):
    for name in ("person.weights.h5", "person.json"): (tmp_path / name).write_bytes((WEIGHTS / name).read_bytes())
    shipped = {"person": tmp_path / "person.weights.h5"}
    monkeypatch.setattr("fcos_lite.detector.weights.shipped_weights", lambda: shipped)
    with pytest.raises(InputError, match="person.weights.h5.sha256 is missing beside it; download both again"):
        FCOS.from_preset("person")


def test_the_card_agrees_with_the_stored_results():
    stored, card = json.loads((WEIGHTS / "person.json").read_text()), (WEIGHTS / "README.md").read_text()
    measured, trained = stored["measured"], stored["trained"]
    for name in ("AP", "AP50", "AP75"): assert f"**{measured[name]:.3f}**" in card, name
    row = re.search(r"\*\*384²\*\*.*\*\* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card)
    expected = [measured[name] for name in ("APs", "APm", "APl", "source_map75")]
    assert [float(value) for value in row.groups()] == pytest.approx(expected, abs=6e-4) # both are rounded
    assert f"{trained['views']:,} views in {trained['epochs']} passes" in card
    assert f"{trained['views'] / trained['minutes'] / 60:.0f} photographs a second with compiling" in card
    assert f"F1 ({measured['f1']:.2f})" in card and f"is {measured['threshold']:.2f};" in card
    config, recipe = read_config(WEIGHTS / "person.weights.h5")
    assert config.image_size == 384 and (recipe.augment.zoom, recipe.augment.mosaic) == ((0.5, 1.5), 0.2)


def test_it_finds_the_person_in_a_photograph_it_has_not_seen(person):
    detections = person.detect(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert len(detections) >= 1
    assert float(iou(detections.xyxy[0], np.float32([20, 30, 505, 604]))) > 0.8


@pytest.mark.parametrize("grey", [0, 60, 128, 200, 255])
def test_it_finds_nobody_in_an_empty_image(person, grey):
    assert len(person.detect(np.full((300, 400, 3), grey, np.uint8))) == 0
