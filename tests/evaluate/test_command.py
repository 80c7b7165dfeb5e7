"""`python -m fcos_lite.evaluate`: a report appears whole, and nothing else is touched."""
import json
import subprocess
import sys

import cv2
import pytest

from fcos_lite.errors import InputError
from fcos_lite.evaluate.__main__ import main
from fcos_lite.scenes.scenes import Scenes, World

@pytest.fixture
def photographs(tmp_path):
    "A folder with val2017 and its annotations alone."
    folder, images, annotations = tmp_path / "coco", [], []
    for name in ("val2017", "annotations"): (folder / name).mkdir(parents=True)
    for i, scene in enumerate(Scenes(5, seed=1, world=World(size=80, min_height=20, empty_share=0)), start=1):
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 80})
        cv2.imwrite(str(folder / "val2017" / f"{i}.png"), scene.image[..., ::-1])
        for left, top, right, bottom in scene.boxes.tolist():
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                                "bbox": [left, top, right - left, bottom - top]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder

def test_a_run_is_measured_on_photographs(tiny_run, photographs, tmp_path, capsys):
    out = tmp_path / "measured"
    flags = ["--data", str(photographs), "--weights", str(tiny_run), "--out", str(out)]
    flags += ["--batch-size", "2", "--images", "3"]
    main(flags)
    report = json.loads((out / "evaluation.json").read_text())
    assert report["images"] == 5 and report["boxes"] > 0
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "source_map75"} <= set(report)
    files = sorted(file.name for file in out.iterdir())
    assert files == ["evaluation.json", "pictures", "precision_recall.png", "worst.png"]
    assert len(list((out / "pictures").iterdir())) == 3
    assert "AP75" in capsys.readouterr().out
    before = (out / "evaluation.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="add --force"): main(flags)
    assert (out / "evaluation.json").stat().st_mtime_ns == before
    main([*flags, "--force", "--limit", "2"])
    assert json.loads((out / "evaluation.json").read_text())["images"] == 2
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]

def test_without_data_scenes_are_drawn(tiny_run, tmp_path):
    flags = ["--limit", "3", "--min-height", "16", "--images", "0"]
    main(["--weights", str(tiny_run), "--out", str(tmp_path / "out"), *flags])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["images"] == 3

def test_force_spares_what_is_no_evaluation(tiny_run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for folder in (precious, tiny_run):
        with pytest.raises(InputError, match="holds something else"):
            main(["--weights", str(tiny_run), "--out", str(folder), "--force"])
    assert (precious / "thesis.txt").exists() and (tiny_run / "best.weights.h5").exists()

def test_a_missing_dataset_leaves_nothing(tiny_run, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        main(["--weights", str(tiny_run), "--out", str(tmp_path / "new"), "--data", str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())

def test_a_mistake_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "fcos_lite.evaluate", "--weights", "persn", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "persn: no such weights" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
