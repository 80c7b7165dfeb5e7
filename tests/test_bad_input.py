"""What the commands train, detect and evaluate refuse, and how; what is wrong with a dataset is tested in tests/data."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fcos_lite.detect import __main__ as detect
from fcos_lite.evaluate import evaluator as evaluate
from fcos_lite.train import __main__ as train
from fcos_lite.config import SCRATCH_RECIPE, ModelConfig
from fcos_lite.errors import InputError
from fcos_lite.data.coco import write_coco
from fcos_lite.detector.model import FCOS
from fcos_lite.scenes.scenes import Scenes, World

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(size=64, min_height=16, max_height=50, max_people=4, empty_share=0)
SMALL = dict(backbone_filters=(16, 16, 16, 16), backbone_groups=8, stem_filters=16, stem_groups=8, pyramid_channels=16, pyramid_groups=8, tower_depth=1, tower_channels=16, tower_groups=8, image_size=64)
FLAGS = [part for name, value in SMALL.items() for part in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))]

@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    "A COCO folder with nothing wrong in it: 8 pictures to learn from, 4 to validate on."
    folder = tmp_path_factory.mktemp("clean")
    scenes = list(Scenes(12, seed=0, world=WORLD))
    write_coco(folder, "train2017", scenes[:8], WORLD.class_names)
    write_coco(folder, "val2017", scenes[8:], WORLD.class_names)
    return folder

@pytest.fixture
def coco(clean, tmp_path):
    "A copy of it, to be broken."
    folder = tmp_path / "coco"
    for file in clean.rglob("*.*"):
        copy = folder / file.relative_to(clean)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder

def page(folder): return folder / "annotations" / "instances_train2017.json"
def pictures(folder): return sorted((folder / "train2017").iterdir())

def rewrite(folder, change):
    "Let `change` alter the document."
    document = json.loads(page(folder).read_text())
    change(document)
    page(folder).write_text(json.dumps(document))

def cut(folder): pictures(folder)[0].write_bytes(pictures(folder)[0].read_bytes()[:-200])

def train_on(folder, *flags): train.main(["--coco", str(folder), "--out", str(folder.parent / "run"), *FLAGS, "--epochs", "1", *flags])

def message(call):
    with pytest.raises(InputError) as stopped: call()
    return str(stopped.value)

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "The folder of a run, with a small network that has learned nothing."
    folder = tmp_path_factory.mktemp("weights")
    network = ModelConfig(**SMALL)
    FCOS(network).save_weights(folder / "best.weights.h5")
    (folder / "config.json").write_text(json.dumps({"network": {**SMALL, "class_names": ["person"]}, "recipe": {}, "run": {}}))
    return folder

def test_detecting_skips_what_is_no_picture_and_says_so(weights, coco, capsys):
    cut(coco)
    pictures(coco)[1].write_text("<html>")
    out = coco.parent / "detected"
    detect.main([str(coco / "train2017"), "--weights", str(weights), "--out", str(out)])
    said = capsys.readouterr().out
    assert "000000000001.jpg: the image is truncated" in said and "000000000002.jpg: not an image" in said and said.count("skipped") >= 2
    assert len(json.loads((out / "detections.json").read_text())) == 6
    assert "exists" in message(lambda: detect.main([str(coco / "train2017"), "--weights", str(weights), "--out", str(out)]))

@pytest.mark.parametrize("what, needles", [("gone.jpg", ["gone.jpg", "no such file", "check the spelling"]), ("hollow", ["hollow", "no picture"]), ("torn.jpg", ["could be read", "torn.jpg"])])
def test_detecting_on_nothing_stops(what, needles, weights, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    said = message(lambda: detect.main([str(tmp_path / what), "--weights", str(weights), "--out", str(tmp_path / "out")]))
    for needle in needles: assert needle in said
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("what, needles", [
    ("folder", ["coco", "no such folder"]), ("weights", ["nowhere", "no such"]), ("truncated", ["instances_val2017.json: 1 of 4 images", "truncated"]), ("out", ["exists"])])
def test_evaluating_stops_with_a_sentence(what, needles, weights, coco):
    out = coco.parent / "evaluation"
    if what == "folder": coco.rename(coco.with_name("gone"))
    if what == "truncated": file = sorted((coco / "val2017").iterdir())[0]; file.write_bytes(file.read_bytes()[:-200])
    if what == "out": out.mkdir(); (out / "diary.txt").write_text("mine")
    said = message(lambda: evaluate.main(["--coco", str(coco), "--weights", "nowhere" if what == "weights" else str(weights), "--out", str(out)]))
    for needle in needles: assert needle in said

def broken_inside(path):
    "A picture whose both ends are in order, and whose middle is not."
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[3000:9000] = bytes(6000)
    path.write_bytes(data)

def command(module, *arguments, **how):
    return subprocess.run([sys.executable, "-m", f"fcos_lite.{module}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, **how)

