"""The command: what it writes, what it names and leaves out, what it refuses."""
import csv
import functools
import json
import cv2
import numpy as np
import pytest
from PIL import Image
from fcos_lite.detect import __main__ as module
from fcos_lite.detect import camera as camera_module
from fcos_lite.detect import sources
from fcos_lite.detect.camera import Camera
from fcos_lite.detect.video import Video
from fcos_lite.errors import InputError
from .played import Played, Shelf

def test_it_writes_what_the_stream_gives(model, command, folder, tmp_path, capsys):
    out = tmp_path / "out"
    command(folder, "--out", out, "--save", "csv", "coco", "crops", "--display", "cube_root")
    results = list(model.stream(folder))
    boxes = sum(map(len, results))
    written = json.loads((out / "detections.json").read_text())
    names = [str(folder / name) for name in ("a.png", "b.png", "c.PNG")]
    assert [written[name] for name in names] == [r.to_json() for r in results if r.time is None]
    lines = [json.loads(line) for line in (out / "walk.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["time"], line["detections"]) for line in lines] == [
        (r.index, round(r.time, 4), r.to_json()) for r in results if r.time is not None]
    video = Video(out / "walk.mp4")
    assert (video.count, video.fps, video.width, video.height) == (5, 5.0, 64, 48)
    rows = list(csv.DictReader((out / "detections.csv").open()))
    coco = json.loads((out / "coco_results.json").read_text())
    assert len(rows) == len(coco) == boxes == len(list((out / "crops").iterdir()))
    images = json.loads((out / "coco_images.json").read_text())
    assert len(images) == len(results) and {row["image_id"] for row in coco} <= {image["id"] for image in images}
    assert f"{boxes} found in 4 of 4 sources" in capsys.readouterr().out
    drawn = np.asarray(Image.open(out / "a.jpg")).astype(int)
    displays = ("cube_root", "score", "square_root")
    errors = [np.abs(results[0].displayed(display).draw() - drawn).mean() for display in displays]
    assert errors[0] == min(errors) < 12   # JPEG, of a small image with sharp edges

def test_thresholds(command, folder, tmp_path):
    for number, (flags, found) in enumerate((
            ((), 2), (("--score", "0.05"), 3), (("--thresholds", "coco"), 3),
            (("--thresholds", "coco", "--score", "0.6"), 1))):
        assert command(folder / "a.png", "--out", tmp_path / str(number), *flags).boxes == found

def test_a_video_of_uneven_pace_keeps_its_times(command, scene, tmp_path):
    "Frames that are shown for 40, 200, 400 and 40 ms: each line has its time, and the drawn video is as long."
    shown = [40, 200, 400, 40]
    images = [Image.fromarray(np.roll(scene, 4 * step, axis=1)) for step in range(4)]
    images[0].save(tmp_path / "uneven.mp4", "GIF", save_all=True, append_images=images[1:], duration=shown)
    times = np.cumsum([0, *shown[:-1]]) / 1000
    command(tmp_path / "uneven.mp4", "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "uneven.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["time"] for line in lines], times, atol=1e-3)
    video = Video(tmp_path / "out" / "uneven.mp4")
    assert video.count == round(times[-1] * video.fps) + 1

def test_what_cannot_be_read_is_named_and_the_rest_goes_on(command, folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"\x89PNG and nothing else")
    (folder / "walk.avi").write_bytes(b"RIFF")
    (folder / "page.jpg").write_text("<html>no image</html>")
    command(folder, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    for name in ("b.png: not an image", "walk.avi: not a video", "page.jpg: not an image"):
        assert f"skipped: {folder}/{name}" in printed
    assert "in 2 of 5 sources" in printed

def test_damaged_frames_are_counted(command, folder, tmp_path, capsys):
    data = bytearray((folder / "walk.avi").read_bytes())
    images = [place for place in range(len(data)) if data[place:place + 3] == b"\xff\xd8\xff"]
    data[images[1]:images[2] - 20] = bytes(images[2] - 20 - images[1])
    (folder / "walk.avi").write_bytes(data)
    command(folder / "walk.avi", "--out", tmp_path / "out")
    assert "walk.avi: 1 of 5 frames are damaged, and were left out" in capsys.readouterr().out
    assert Video(tmp_path / "out" / "walk.mp4").count == 5   # it keeps its pace: the image before stands in

def test_nothing_to_go_on_with_is_refused(command, folder, site, tmp_path):
    (folder / "none.png").touch()
    for word, why in ((folder / "none.png", "none of the images"), ("http://127.0.0.1:1/a.png", "none of the images"),
                      (f"{site}/", "none of the images"), (folder / "x.png", "no such file or folder")):
        with pytest.raises(InputError, match=why): command(word, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"): command(folder, "--out", tmp_path / "out")

@pytest.fixture
def plug(monkeypatch):
    "Plugs played cameras in."
    def put(*cameras):
        monkeypatch.setattr(camera_module, "open_camera", Shelf(*cameras))
        monkeypatch.setattr(sources, "Camera", functools.partial(Camera, wait=1.0, tries=1, pause=0.001))
    return put

def test_without_a_window_a_lost_camera_leaves_a_whole_video_behind(command, plug, tmp_path):
    plug(Played([*range(10), "bad", *range(10, 20)], gap=0.1))
    with pytest.raises(InputError, match="camera:0: lost"): command("camera:0", "--headless", "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "camera-0.jsonl").read_text().splitlines()]
    video = Video(tmp_path / "out" / "camera-0.mp4")
    assert lines and video.count >= len(lines) - 1 and not list((tmp_path / "out").glob(".partial*"))
    assert (video.width, video.height, lines[-1]["frame"]) == (64, 48, 19)
    assert abs(video.count / video.fps - lines[-1]["time"]) < 0.2   # as long as it took, though frames were passed over

def test_a_camera_that_grows_is_written_into_one_video(command, plug, tmp_path):
    plug(Played([1, 2], gap=0.05), Played([203, 204], width=128, gap=0.05))
    with pytest.raises(InputError, match="lost"): command("camera:0", "--headless", "--out", tmp_path / "out")
    frames = list(Video(tmp_path / "out" / "camera-0.mp4"))
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    first, last = (frame.image[24, 40].mean() for frame in (frames[0], frames[-1]))
    assert abs(first - 100) < 20 and abs(last - 200) < 20   # the end is what the second one saw

def test_so_many_seconds_are_enough(command, plug, tmp_path):
    plug(Played(range(1000), gap=0.01))
    statistics = command("camera:0", "--headless", "--seconds", "0.3", "--out", tmp_path / "out")
    assert 1 <= statistics.images < 1000 and (tmp_path / "out" / "camera-0.mp4").exists()

@pytest.fixture
def screen(monkeypatch):
    "OpenCV's windows, pretended: its keys, what it showed, what it destroyed."
    shown, keys, destroyed = [], [], []
    for name, function in {
        "namedWindow": lambda *_: None, "imshow": lambda title, image: shown.append(image.shape),
        "waitKey": lambda _: keys.pop(0) if keys else -1, "getWindowProperty": lambda *_: 1.0,
        "destroyWindow": destroyed.append}.items(): monkeypatch.setattr(cv2, name, function)
    monkeypatch.setattr(module, "find_screen", lambda: (640, 480))
    return shown, keys, destroyed

def test_a_key_ends_it_and_everything_is_let_go(command, plug, screen, monkeypatch, tmp_path):
    played, (shown, keys, destroyed) = Played(range(1000), gap=0.01), screen
    keys += [-1, -1, ord("q")]
    plug(played)
    monkeypatch.chdir(tmp_path)
    assert command("camera:0").images == 3 and shown == [(480, 640, 3)] * 3 and destroyed
    assert played.released.wait(10)
    assert not list(tmp_path.iterdir())   # a camera in a window writes nothing, unless --out is given

def test_an_interrupt_is_an_end_like_others(command, plug, screen, monkeypatch, tmp_path):
    def interrupt(*_): raise KeyboardInterrupt
    played = Played(range(1000), gap=0.01)
    monkeypatch.setattr(cv2, "waitKey", interrupt)
    plug(played)
    command("camera:0", "--out", tmp_path / "out")
    assert Video(tmp_path / "out" / "camera-0.mp4").count >= 1 and played.released.wait(10)

def test_a_window_of_a_given_size(command, screen, folder, tmp_path):
    command(folder / "a.png", "--window", "--screen", "320x200", "--out", tmp_path / "out")
    assert screen[0] == [(200, 267, 3)]
    for size in ("320", "axb", "0x5"):
        with pytest.raises(InputError, match="give width and height in pixels"):
            command(folder / "a.png", "--window", "--screen", size, "--out", tmp_path / "new")

def test_a_camera_that_is_not_there_is_refused(command, plug, tmp_path):
    plug()
    with pytest.raises(InputError, match="camera:0: no such camera"):
        command("camera:0", "--headless", "--out", tmp_path / "out")

def test_mistakes_in_flags_end_it(command, folder, capsys):
    for words, why in (((), "name at least one image"), ((folder, "--batch-size", "0"), "give at least 1"),
                       ((folder, "--save", "xml"), "xml"), ((folder, "--sorce", "0.5"), "--sorce")):
        with pytest.raises(SystemExit) as end: command(*words)
        assert end.value.code == 2 and why in " ".join(capsys.readouterr().err.replace("│", " ").split())
