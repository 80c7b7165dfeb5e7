"""What the commands train, detect and evaluate refuse, and how; what is wrong with a dataset is tested in tests/data."""
import json
import os
import shutil
import subprocess
import sys
import warnings
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

@pytest.mark.parametrize("flags, needles", [
    (["--image-size", "100"], ["image_size 100", "multiple of 32", "nearest is 96"]),
    (["--class-names", "peson"], ["no category 'peson'", "choose from person"]),
    (["--limit", "0"], ["limit 0", "at least 1"]),
    (["--batch-size", "0"], ["batch_size 0", "at least 1"]),
    (["--weights", "nowhere.weights.h5"], ["nowhere.weights.h5", "no such"]),
], ids=lambda value: value[0] if isinstance(value, list) else value)
def test_flags_that_cannot_be_used(flags, needles, coco, monkeypatch):
    monkeypatch.chdir(coco.parent)
    said = message(lambda: train_on(coco, *flags))
    for needle in needles: assert needle in said

@pytest.mark.parametrize("flags", [["--image-size", "large"], ["--no-such-flag"], ["--model", "huge"], ["--batch-size"]], ids=" ".join)
def test_flags_that_are_none_exit_with_2(flags, coco, capsys):
    with pytest.raises(SystemExit) as stopped: train_on(coco, *flags)
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err

def test_an_output_folder_that_exists_is_not_touched(coco):
    out = coco.parent / "run"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    for flags in ([], ["--force"]):
        said = message(lambda: train_on(coco, *flags))
        assert f"--out {out}" in said and ("--force" in said)
    assert (out / "diary.txt").read_text() == "mine"
    (coco.parent / "file").write_text("")
    assert "choose a folder" in message(lambda: train.main(["--coco", str(coco), "--out", str(coco.parent / "file"), *FLAGS]))

@pytest.mark.parametrize("flags", [["--weights", "nowhere.weights.h5"], ["--minutes", "0"], ["--mlflow", "mlruns"]], ids=lambda flags: flags[0])
def test_a_run_that_is_to_be_replaced_is_back_where_the_new_one_is_refused(flags, coco):
    out = coco.parent / "run"
    out.mkdir()
    for name in ("config.json", "best.weights.h5"): (out / name).write_text("weeks of work")
    message(lambda: train_on(coco, "--force", *flags))
    assert {file.name: file.read_text() for file in out.iterdir()} == dict.fromkeys(("config.json", "best.weights.h5"), "weeks of work")
    assert sorted(path.name for path in coco.parent.iterdir() if "run" in path.name) == ["run"]

@pytest.mark.parametrize("flags, name", [(["--tower-depth", "2"], "tower-depth"), (["--coco", "elsewhere"], "coco"), (["--scenes", "10"], "scenes"), (["--epochs", "5"], "epochs"),
                                         (["--seed", "0"], "seed"), (["--recipe", "scratch"], "recipe"), (["--evaluate-every", "1"], "evaluate-every")], ids=lambda value: value if isinstance(value, str) else "")   # what a fresh run has by default is asked for, too
def test_a_resume_that_asks_for_something_else_is_refused_and_nothing_is_touched(flags, name, tmp_path):
    run = train.Run.create(tmp_path / "run")
    run.write_config(ModelConfig(**SMALL), SCRATCH_RECIPE, {"scenes": 9, "epochs": 3, "seed": 5, "recipe": "source", "evaluate_every": 0})
    before = (run.path / "config.json").read_bytes()
    said = message(lambda: train.main(["--resume", str(run.path), *flags]))
    assert f"--{name} says otherwise" in said and f"--weights {run.path}" in said
    assert [path.name for path in run.path.iterdir()] == ["config.json"] and (run.path / "config.json").read_bytes() == before

def test_a_resume_may_say_what_the_run_was_asked_for():
    wishes = train.typed(["--resume", "run", "--scenes", "9", "--epochs", "3", "--processes", "2", "--seed", "0"])
    assert wishes == {"resume": "run", "scenes": 9, "epochs": 3, "processes": 2, "seed": 0}
    train.check_wishes("run", wishes, {"scenes": 9, "epochs": 3})

def test_a_run_that_is_refused_leaves_no_folder(coco):
    message(lambda: train_on(coco, "--weights", "nowhere.weights.h5"))
    assert not (coco.parent / "run").exists()

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "The folder of a run, with a small network that has learned nothing."
    folder = tmp_path_factory.mktemp("weights")
    network = ModelConfig(**SMALL)
    FCOS(network).save_weights(folder / "best.weights.h5")
    (folder / "config.json").write_text(json.dumps({"network": {**SMALL, "class_names": ["person"]}, "recipe": {}, "run": {}}))
    return folder

def test_weights_of_another_shape_say_what_differs(weights, coco):
    said = message(lambda: train_on(coco, "--tower-channels", "32", "--weights", str(weights)))
    assert "best.weights.h5" in said and "network" in said and "tower_channels" in said and "begin without weights" in said
    torn = coco.parent / "torn.weights.h5"
    torn.write_bytes((weights / "best.weights.h5").read_bytes()[:5000])
    said = message(lambda: train_on(coco, "--weights", str(torn), "--out", str(coco.parent / "other")))
    assert "torn.weights.h5" in said and "fetch or make it again" in said

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

def test_exit_codes_of_real_commands(weights, coco):
    cut(coco)
    stopped = [command("train", "--coco", coco, "--out", coco.parent / "run", *FLAGS), command("train", "--image-size", "100"),
               command("detect", coco.parent / "gone.jpg", "--weights", weights, "--out", coco.parent / "out")]
    for done, needle in zip(stopped, ("1 of 8 images", "image_size 100", "gone.jpg")):
        assert done.returncode == 2 and needle in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1

def test_training_goes_on_past_a_few_bad_ones_and_reports_them(tmp_path):
    "Of 120 pictures one is cut off and one is broken inside, one box is NaN: each below 1 %, so the run ends well, and says what it left out."
    folder, scenes = tmp_path / "coco", list(Scenes(124, seed=0, world=replace(WORLD, empty_share=0.1)))
    write_coco(folder, "train2017", scenes[:120], WORLD.class_names)
    write_coco(folder, "val2017", scenes[120:], WORLD.class_names)
    rewrite(folder, lambda d: d["annotations"][-1].update(bbox=[float("nan"), 1, 2, 3]))   # not of the first picture, whose boxes go with it
    cut(folder)
    broken_inside(pictures(folder)[7])
    done = command("train", "--coco", folder, "--out", tmp_path / "run", *FLAGS, "--epochs", "1", "--batch-size", "17")   # 7 batches hold all 119
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "1 skipped: image that cannot be read; first: " in done.stdout and "1 skipped: box with NaN" in done.stdout
    assert "000000000008.jpg: " in done.stderr and "grey image takes its place" in done.stderr
    assert (tmp_path / "run" / "best.weights.h5").is_file()
