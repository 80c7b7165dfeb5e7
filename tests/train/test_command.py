"""`fcos-lite train`: what it refuses before it makes a folder, what a resumed run may be asked for, its exit codes."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fcos_lite.config import SCRATCH_RECIPE, ModelConfig
from fcos_lite.data.coco import write_coco
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train import __main__ as train
from fcos_lite.train.run import Run

ROOT = Path(__file__).resolve().parents[2]
WORLD = World(size=64, min_height=16, max_height=50, max_people=4, empty_share=0)
SMALL = "--image-size 64 --min-height 16 --tower-depth 1 --tower-channels 16 --tower-groups 8".split()
ON_SCENES = [*SMALL, "--scenes", "9", "--batch-size", "2"]

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    "A COCO folder with 8 images to learn from and 4 to validate on."
    folder, scenes = tmp_path_factory.mktemp("coco"), list(Scenes(12, seed=0, world=WORLD))
    write_coco(folder, "train2017", scenes[:8], WORLD.class_names)
    write_coco(folder, "val2017", scenes[8:], WORLD.class_names)
    return folder

def message(*flags):
    with pytest.raises(InputError) as error: train.main([*map(str, flags)])
    return str(error.value)

@pytest.mark.parametrize("flags, words", [
    (["--class-names", "peson"], ["no category 'peson'", "choose from person"]),
    (["--limit", "0"], ["limit 0", "at least 1"]),
    (["--weights", "nowhere.weights.h5"], ["nowhere.weights.h5", "no such"]),
    (["--records", "r"], ["--data and --records: give one"]),
    (["--batch-size", "16"], ["8 images are fewer than one batch", "--batch-size 8"]),
    (["--backbone-weights", "imagenet"], ["backbone"]),
    (["--stage", "images=0:6", "--stage", "images=4:8"], ["overlap"]),
    (["--stage", "images=0:6 speed=3"], ["there is no field speed"]),
    (["--stage", "learning_rate=-1"], ["must not be negative"]),
    (["--stage", "images=many"], ["images cannot be many"]),
    (["--minutes", "1", "--stage", "epochs=1", "--stage", "epochs=2"], ["a time budget is for one stage"]),
    (["--minutes", "0"], ["minutes 0"]), (["--mlflow", "mlruns"], ["sqlite:///FILE.db"]),
    (["--gpu-memory-limit", "0"], ["--gpu-memory-limit 0", "above 0"]),
    (["--processes", "0"], ["--processes 0: give at least 1"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_used_is_refused_and_leaves_no_folder(flags, words, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = message("--data", dataset, "--out", tmp_path / "run", *SMALL, *flags)
    for word in words: assert word in text
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("flags, words", [
    ("--image-size 100", "multiple of 32"), ("--batch-size 0", "at least 1"), ("--image-size large", "large"),
    ("--no-such-flag", "no-such-flag"), ("--model huge", "huge"), ("--batch-size", "batch-size")])
def test_flags_that_cannot_be_parsed_exit_with_2(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped: train.main(flags.split())
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert words in output.err + output.out

def test_no_scenes_are_refused(tmp_path):
    assert "draw at least one scene" in message(*SMALL, "--scenes", "0", "--out", tmp_path / "run")
    assert "a seed of 0 or more" in message(*SMALL, "--seed", "-1", "--out", tmp_path / "run")

def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    for flags in ([], ["--force"]):
        text = message(*ON_SCENES, "--out", out, *flags)
        assert f"--out {out}" in text and "--force" in text
    assert (out / "diary.txt").read_text() == "mine"
    assert "choose a folder" in message(*ON_SCENES, "--out", out / "diary.txt")

@pytest.mark.parametrize("flags", [["--weights", "nowhere.weights.h5"], ["--minutes", "0"], ["--mlflow", "mlruns"]],
                         ids=lambda flags: flags[0])
def test_a_run_to_be_replaced_comes_back_if_the_new_one_is_refused(flags, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "best.weights.h5"): (out / name).write_text("weeks of work")
    message(*ON_SCENES, "--out", out, "--force", *flags)
    files = {file.name: file.read_text() for file in out.iterdir()}
    assert files == dict.fromkeys(("config.json", "best.weights.h5"), "weeks of work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

def test_a_resumed_run_that_is_asked_for_something_else_is_refused_untouched(tmp_path):
    run = Run.create(tmp_path / "run")
    run.write_config(ModelConfig(image_size=64), SCRATCH_RECIPE, {"scenes": 9, "run": {"seed": 5, "evaluate_every": 0}})
    before = (run.path / "config.json").read_bytes()
    # also what a new run has by default, as it was typed
    for flag in ("--tower-depth 2", "--data elsewhere", "--epochs 5", "--seed 0", "--evaluate-every 1"):
        text = message("--resume", run.path, *flag.split())
        assert f"{flag.split()[0]} says otherwise" in text and f"--weights {run.path}" in text
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    assert (run.path / "config.json").read_bytes() == before

def test_the_reference_recipe_follows_its_curriculum_and_epochs_mean_one_stage(tmp_path, monkeypatch):
    class Enough(Exception): pass
    recipes = []
    def stop(run, train, validation, **how):
        recipes.append((how["recipe"], Run(run.path).read_config()[1]))
        raise Enough
    monkeypatch.setattr(train, "_run_training", stop)
    cases = [], ["--epochs", "4"], ["--recipe", "scratch"], ["--stage", "epochs=2"]
    for number, flags in enumerate(cases):
        out = ["--out", str(tmp_path / str(number))]
        with pytest.raises(Enough): train.main([*ON_SCENES, "--recipe", "reference", *flags, *out])
    assert all(recipe == kept for recipe, kept in recipes) # config.json has the stages, so --resume has
    stages = [[(stage.images, stage.epochs) for stage in recipe.stages] for recipe, _ in recipes]
    assert stages == [[((0, 9), 30), ((), 10)], [], [], [((), 2)]]
    assert recipes[1][0].epochs == 4

def test_a_finished_run_that_is_resumed_is_evaluated_again(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    report = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").unlink()
    assert train.main(["--resume", str(folder)])["AP"] == pytest.approx(report["AP"])

def command(*arguments):
    words = [sys.executable, "-m", "fcos_lite.train", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)

def test_exit_codes_of_the_real_command(tmp_path):
    done = command("--data", tmp_path / "gone", "--out", tmp_path / "run")
    assert done.returncode == 2 and "gone" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1

def test_help_loads_neither_keras_nor_tensorflow():
    code = ("import sys\nfrom fcos_lite.train.__main__ import main\ntry: main(['--help'])\n"
            "finally: print([name for name in ('keras', 'tensorflow', 'jax') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--learning-rate" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr

@pytest.mark.slow
def test_training_goes_on_past_a_few_bad_images_and_reports_them(tmp_path):
    "Of 120 images one is cut off when they are read and one breaks later: each below 1 %, so the run ends well."
    folder, scenes = tmp_path / "coco", list(Scenes(124, seed=0, world=WORLD))
    write_coco(folder, "train2017", scenes[:120], WORLD.class_names)
    write_coco(folder, "val2017", scenes[120:], WORLD.class_names)
    cut, broken = sorted((folder / "train2017").iterdir())[:8:7]
    cut.write_bytes(cut.read_bytes()[:-200])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(broken, "PNG") # both ends in order, the middle not
    broken.write_bytes(broken.read_bytes()[:3000] + bytes(6000) + broken.read_bytes()[9000:])
    done = command("--data", folder, "--out", tmp_path / "run", *SMALL, "--epochs", "1", "--batch-size", "17")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "image that cannot be read" in done.stdout and cut.name in done.stdout
    assert f"{broken.name}: " in done.stderr and (tmp_path / "run" / "best.weights.h5").is_file()
