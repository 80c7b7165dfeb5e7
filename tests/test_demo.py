"""The demo, from its command to its pictures: with a tiny network on a few scenes; and, slow, as a user runs it."""
import json
import sys
import cv2
import pytest
from fcos_lite import demo
from fcos_lite.train import __main__ as train

SMALL = ("--stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4 --pyramid-channels 16 --pyramid-groups 4 "
         "--tower-depth 1 --tower-channels 16 --tower-groups 4 --scenes 16 --epochs 2 --evaluate-every 2").split()
LEFT = ["evaluation.json", "metrics.csv", "log.txt", "config.json", "best.weights.h5", "detected.png", "worst.png", "precision_recall.png", "detected/detections.json", "detected/grace_hopper.jpg", "detected/scene9.jpg"]

def check_what_is_left(out, said, images):
    for name in LEFT: assert (out / name).is_file(), name
    assert json.loads((out / "evaluation.json").read_text())["images"] == images
    assert cv2.imread(str(out / "detected.png")) is not None and any((out / "pictures").iterdir())
    assert f"on {images} unseen scenes" in said and str(out / "detected.png") in said

def test_the_demo_leaves_its_numbers_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "FLAGS", [*demo.FLAGS, *SMALL])
    demo.main(["--out", str(tmp_path / "demo")])
    check_what_is_left(tmp_path / "demo", capsys.readouterr().out, 16)

@pytest.mark.slow
def test_the_demo_learns_its_scenes(tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "demo")])
    check_what_is_left(tmp_path / "demo", capsys.readouterr().out, 100)
    assert json.loads((tmp_path / "demo" / "evaluation.json").read_text())["AP50"] >= 0.80

@pytest.mark.parametrize("module, begin", [(train, "run_with"), (demo, "train.main")], ids=["train", "demo"])
def test_only_a_process_of_its_own_is_set_up(module, begin, monkeypatch, tmp_path):
    "What concerns the whole process is for the command, not for somebody who calls `main` with flags."
    class Begun(Exception): pass
    def begun(*_): raise Begun
    done, flags = [], ["--out", str(tmp_path / "run")]
    for name in ("keep_freed_memory", "run_as_traced"): monkeypatch.setattr(module, name, lambda name=name: done.append(name))
    monkeypatch.setattr(f"{module.__name__}.{begin}", begun)
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(Begun): module.main(flags)
    assert done == []
    with pytest.raises(Begun): module.main()
    assert done == ["keep_freed_memory", "run_as_traced"]
