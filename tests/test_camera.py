"""A camera that stalls, tears, grows, vanishes and comes back: what is shown is new, what is written is whole, and the end is a sentence."""
import json
import random
import threading
import time
from unittest import mock
import cv2
import numpy as np
import pytest
from fcos_lite.detect import camera as camera_module
from fcos_lite.detect import __main__ as detect
from fcos_lite.detect import viewer as watch
from fcos_lite.detect.camera import Camera
from fcos_lite.config import InputError, ModelConfig, check
from fcos_lite.detector.model import FCOS
from fcos_lite.detect.video import Video

TINY = ModelConfig(image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4,
               pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
HANG = object()

def picture(number, width=64): # (48, width, 3) uint8, its number in its first pixel; lighter from 200 on
    image = np.full((48, width, 3), 100 if number < 200 else 200, np.uint8)
    image[0, 0] = number % 200
    return image

class Played:
    "A camera that plays a list: numbers are frames, 'bad' and 'empty' are torn ones, 'error' is OpenCV's, HANG never returns. At its end it says no, for ever. A polite one waits until each frame is seen."
    def __init__(self, events, width=64, gap=0.0, polite=False):
        self.events, self.width, self.gap, self.polite = list(events), width, gap, polite
        self.released, self.free, self.reader, self.unseen, self.seen = threading.Event(), threading.Event(), None, False, threading.Semaphore(0)
    def read(self):
        if self.polite and self.unseen: self.seen.acquire(timeout=20)
        self.unseen = False
        self.reader = threading.current_thread()
        time.sleep(self.gap)
        event = self.events.pop(0) if self.events else "bad"
        if event is HANG: self.free.wait(60)
        if event == "error": raise cv2.error("cannot decode")
        if event == "empty": return True, np.zeros((0, 0, 3), np.uint8)
        if event in ("bad", HANG): return False, None
        self.unseen = True
        return True, picture(event, self.width)
    def release(self):
        assert self.reader is None or threading.current_thread() is self.reader, "released by a thread that does not read"
        self.released.set()

class Shelf:
    "What is found each time that somebody opens the camera; None: nothing."
    def __init__(self, *cameras): self.cameras, self.opened = list(cameras), 0
    def __call__(self, address):
        self.opened += 1
        found = self.cameras.pop(0) if self.cameras else None
        check(found, f"camera:{address}: no such camera")
        return found

def numbers(camera, polite=None): # of all frames, and the sentence at the end
    seen = []
    try:
        for frame in camera:
            seen.append((int(frame.image[0, 0, 0]), frame))
            if polite and polite.unseen: polite.seen.release()
    except InputError as error: return seen, str(error)
    return seen, None

def watch_slowly(shelf, **how):
    with Camera(0, wait=1.0, pause=0.001, opener=shelf, log=lambda line: None, **how) as camera: return numbers(camera)

def test_a_camera_that_stalls_ends_with_a_sentence_and_not_with_silence():
    stuck = Played([1, 2, HANG])
    started = time.monotonic()
    seen, sentence = watch_slowly(Shelf(stuck), tries=3)
    assert [number for number, _ in seen][-1] == 2
    assert "camera:0: lost" in sentence and "3 times more did not help" in sentence
    assert time.monotonic() - started < 30
    assert not stuck.released.is_set()                             # nobody releases what another thread is inside of
    stuck.free.set()
    assert stuck.released.wait(10)

def test_a_camera_that_comes_back_goes_on_and_may_have_grown():
    stuck, back = Played([1, HANG]), Played([3, 4], width=96, polite=True)
    lines = []
    with Camera(0, wait=1.0, pause=0.001, opener=Shelf(stuck, None, back), log=lines.append, tries=4) as camera: seen, sentence = numbers(camera, back)
    assert [number for number, _ in seen] == [1, 3, 4] and "lost" in sentence
    assert [frame.image.shape[1] for _, frame in seen] == [64, 96, 96]
    assert lines[:2] == ["camera:0: lost; trying to open it again", "camera:0: is back"]
    times, indices = [frame.time for _, frame in seen], [frame.index for _, frame in seen]
    assert times == sorted(times) and indices == sorted(set(indices))
    stuck.free.set()

def test_torn_frames_are_left_out():
    torn = Played([1, "bad", 2, "empty", "error", "bad", 3], polite=True)
    with Camera(0, wait=20, pause=0.001, opener=Shelf(torn), log=lambda line: None, tries=1) as camera: seen, _ = numbers(camera, torn)
    assert [number for number, _ in seen] == [1, 2, 3]

def test_a_slow_viewer_sees_new_frames_and_the_last():
    played = Played(range(60), gap=0.002)
    seen = []
    with Camera(0, wait=1, opener=Shelf(played), log=lambda line: None, tries=0) as camera:
        with pytest.raises(InputError, match="lost"):
            for frame in camera:
                seen.append(int(frame.image[0, 0, 0]))
                time.sleep(0.03)                                   # the detector
    assert seen == sorted(set(seen)) and seen[-1] == 59
    assert len(seen) < 50                                          # frames were skipped, which is the point
    assert camera.dropped == 60 - len(seen)

@pytest.mark.parametrize("seed", range(25))
def test_whatever_a_camera_does_frames_come_in_order_and_it_ends(seed):
    chance = random.Random(seed)
    count, cameras = 0, []
    for _ in range(chance.randint(1, 3)):
        events = []
        for _ in range(chance.randint(0, 12)):
            kind = chance.choice(["frame"] * 5 + ["bad", "empty", "error"])
            events.append(count if kind == "frame" else kind)
            count += kind == "frame"
        if chance.random() < 0.3: events.append(HANG)
        cameras.append(Played(events, width=chance.choice((32, 64)), gap=chance.choice((0, 0.002))))
    found = [camera if chance.random() < 0.8 else None for camera in cameras]
    shelf = Shelf(*found)
    try: seen, sentence = watch_slowly(shelf, tries=2)
    except InputError as error: seen, sentence = [], str(error)     # not there in the first place
    shown = [number for number, _ in seen]
    assert shown == sorted(set(shown)) and sentence and "camera:0" in sentence
    assert [frame.index for _, frame in seen] == sorted({frame.index for _, frame in seen})
    for camera in found:
        if camera: camera.free.set()

def test_closing_wakes_whoever_waits_and_lets_the_camera_go():
    stuck = Played([1, HANG])
    camera = Camera(0, wait=60, opener=Shelf(stuck))
    frames = iter(camera)
    next(frames)
    threading.Timer(0.05, camera.close).start()
    started = time.monotonic()
    assert list(frames) == [] and time.monotonic() - started < 30
    stuck.free.set()
    assert stuck.released.wait(10)

@pytest.fixture(scope="module")
def model(): return FCOS(TINY)

@pytest.fixture
def plug(monkeypatch):
    "Plugs a played camera in."
    def put(*cameras):
        monkeypatch.setattr(camera_module, "open_camera", Shelf(*cameras))
        monkeypatch.setattr(Camera.__init__, "__defaults__", (0, 1.0, 1, 0.001, None, print))       # nobody waits for long here
    return put

def command(model, *words):
    "The command with a detector that is there already."
    with mock.patch.object(detect.FCOS, "from_preset", lambda name: model): return detect.main([str(word) for word in words])

def test_without_a_window_a_lost_camera_leaves_a_whole_film_behind(model, plug, tmp_path):
    plug(Played([*range(10), "bad", *range(10, 20)], gap=0.1))
    with pytest.raises(InputError, match="camera:0: lost"): command(model, "camera:0", "--headless", "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "camera-0.jsonl").read_text().splitlines()]
    film = Video(tmp_path / "out" / "camera-0.mp4")
    assert len(lines) >= 1 and film.count >= len(lines) - 1 and not list((tmp_path / "out").glob(".partial*"))
    assert (film.width, film.height) == (64, 48)
    assert lines[-1]["frame"] == 19 and abs(film.count / film.fps - lines[-1]["time"]) < 0.2     # it lasts as long as it took, though most frames were passed over

def test_a_camera_that_grows_is_written_into_one_film(model, plug, tmp_path):
    plug(Played([1, 2], gap=0.05), Played([203, 204], width=128, gap=0.05))
    with pytest.raises(InputError, match="lost"): command(model, "camera:0", "--headless", "--out", tmp_path / "out")
    frames = list(Video(tmp_path / "out" / "camera-0.mp4"))
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    assert abs(frames[0].image[24, 32].mean() - 100) < 20 and abs(frames[-1].image[24, 32].mean() - 200) < 20     # the end is what the second one saw

def test_so_many_seconds_are_enough(model, plug, tmp_path):
    plug(Played(range(1000), gap=0.01))
    watched = command(model, "camera:0", "--headless", "--seconds", "0.3", "--out", tmp_path / "out")
    assert 1 <= watched.pictures < 1000 and (tmp_path / "out" / "camera-0.mp4").exists()

class Screen:
    "OpenCV's windows, pretended."
    def __init__(self, monkeypatch, keys):
        self.shown, self.keys, self.destroyed = [], list(keys), []
        for name, function in {"namedWindow": lambda *_: None, "imshow": lambda title, image: self.shown.append(image.shape), "waitKey": lambda _: self.keys.pop(0) if self.keys else -1,
                               "getWindowProperty": lambda *_: 1.0, "destroyWindow": self.destroyed.append}.items(): monkeypatch.setattr(cv2, name, function)
        monkeypatch.setattr(detect, "find_screen", lambda: (640, 480))

@pytest.mark.parametrize("key", [ord("q"), 27])
def test_a_key_ends_it_and_everything_is_let_go(model, plug, monkeypatch, tmp_path, key):
    played, screen = Played(range(1000), gap=0.01), Screen(monkeypatch, [-1, -1, key])
    plug(played)
    monkeypatch.chdir(tmp_path)
    watched = command(model, "camera:0")
    assert watched.pictures == 3 and screen.shown == [(480, 640, 3)] * 3 and screen.destroyed
    assert played.released.wait(10)
    assert not list(tmp_path.iterdir())                            # a camera in a window writes nothing, unless --out is given

def test_an_interrupt_is_an_end_like_others(model, plug, monkeypatch, tmp_path):
    def shown(*_): raise KeyboardInterrupt
    played, screen = Played(range(1000), gap=0.01), Screen(monkeypatch, [])
    monkeypatch.setattr(cv2, "waitKey", shown)
    plug(played)
    command(model, "camera:0", "--out", tmp_path / "out")
    assert Video(tmp_path / "out" / "camera-0.mp4").count >= 1 and played.released.wait(10)

def test_where_no_window_can_be_the_remedy_is_named(model, monkeypatch, tmp_path):
    monkeypatch.setattr(watch.subprocess, "run", lambda *_, **__: watch.subprocess.CompletedProcess([], -6, "", "qt.qpa.xcb: could not connect to display"))
    with pytest.raises(InputError, match="no display .* --headless writes a video file"): command(model, "camera:0")
    monkeypatch.setattr(watch.subprocess, "run", lambda *_, **__: watch.subprocess.CompletedProcess([], 1, "", "error: (-2:Unspecified error) The function is not implemented. Rebuild the library"))
    with pytest.raises(InputError, match="pip install opencv-python. Without a window: --headless"): command(model, "camera:0")

def test_a_camera_that_is_not_there_says_so(model, plug, tmp_path):
    plug()
    with pytest.raises(InputError, match="camera:0: no such camera"): command(model, "camera:0", "--headless", "--out", tmp_path / "out")

def test_a_video_without_a_frame_is_refused_for_that(tmp_path, monkeypatch):
    "It opens, knows its size and its rate, and has nothing to show."
    from types import SimpleNamespace
    from fcos_lite.detect import video
    (tmp_path / "hollow.mp4").write_bytes(b"a head without a body")
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda *_: SimpleNamespace(isOpened=lambda: True, read=lambda: (False, None), get=lambda what: 25.0, release=lambda: None))
    with pytest.raises(InputError, match="hollow.mp4: a video without frames; record or convert it again"): Video(tmp_path / "hollow.mp4")

def test_rate_and_latency_stand_on_the_picture(monkeypatch):
    "In the left upper corner, in words; the picture that was given stays as it was, and below nothing changes."
    said, image = [], np.full((240, 320, 3), 200, np.uint8)
    monkeypatch.setattr(watch, "text_patch", lambda text, size, color, drawn=watch.text_patch: said.append(text) or drawn(text, size, color))
    shown = watch.draw_fps(image, 12.345, 0.0678)
    assert said == ["12.3 frames/s, 68 ms late"] and (image == 200).all()
    changed = np.argwhere((shown != 200).any(-1))
    assert len(changed) > 500 and changed.min(0).tolist() == [0, 0] and changed[:, 0].max() < 40
