"""The demo, from its command to its images: with a tiny network on a few scenes; and, slow, as a user runs it."""
import json
import sys
import pytest
from PIL import Image
from fcos_lite import demo

SMALL = ("--stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4 "
         "--pyramid-channels 16 --pyramid-groups 4 --tower-depth 1 --tower-channels 16 --tower-groups 4 "
         "--scenes 16 --epochs 2 --evaluate-every 2").split()
LEFT = ("evaluation.json metrics.csv log.txt config.json best.weights.h5 detected.png worst.png precision_recall.png "
        "detected/detections.json detected/grace_hopper.jpg detected/scene9.jpg").split()

def check_what_is_left(out, printed, images):
    for name in LEFT: assert (out / name).is_file(), name
    assert json.loads((out / "evaluation.json").read_text())["images"] == images
    assert Image.open(out / "detected.png").size == (5 * 288 + 16, 2 * 288 + 4) and any((out / "pictures").iterdir())
    assert f"on {images} unseen scenes" in printed and str(out / "detected.png") in printed
    found = json.loads((out / "detected" / "detections.json").read_text())
    photo = found[next(name for name in found if "grace" in name)]
    assert len(found) == 11 and [box["class"] for box in photo] == ["person"]
    assert "1 detection\nperson 0.6" in printed

def test_the_demo_leaves_its_numbers_and_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "FLAGS", [*demo.FLAGS, *SMALL])
    demo.main(["--out", str(tmp_path / "demo")])
    check_what_is_left(tmp_path / "demo", capsys.readouterr().out, 16)

@pytest.mark.slow
def test_the_demo_learns_its_scenes(tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "demo")])
    check_what_is_left(tmp_path / "demo", capsys.readouterr().out, 100)
    assert json.loads((tmp_path / "demo" / "evaluation.json").read_text())["AP50"] >= 0.80

def test_only_a_process_of_its_own_is_set_up(monkeypatch, tmp_path):
    "What concerns the whole process is for the command, not for a caller of `main` with flags."
    class Started(Exception): pass
    def start(*_): raise Started
    done, flags = [], ["--out", str(tmp_path / "run")]
    for name in ("keep_freed_memory", "disable_grappler"):
        monkeypatch.setattr(demo, name, lambda name=name: done.append(name))
    monkeypatch.setattr(demo.train, "main", start)
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(Started): demo.main(flags)
    assert done == []
    with pytest.raises(Started): demo.main()
    assert done == ["keep_freed_memory", "disable_grappler"]
