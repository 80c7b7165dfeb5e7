"""What a window shows, what ends it, and what a stream leaves open: nothing."""
import time
from dataclasses import replace
from subprocess import CompletedProcess
import cv2
import numpy as np
import pytest
from fcos_lite.data.detections import Detections
from fcos_lite.detect import viewer
from fcos_lite.detect.viewer import Window, display_stream, draw_fps, find_screen
from fcos_lite.errors import InputError

FOUND = Detections(np.float32([[10, 20, 50, 90], [60, 20, 90, 90]]), np.float32([0.9, 0.5]), np.int32([0, 0]),
                   image=np.full((128, 128, 3), 120, np.uint8), seconds={"read": 0.01, "network and NMS": 0.2})

class Screen:
    "OpenCV's windows, pretended: keys are pressed one after the other, and the cross after so many images."
    def __init__(self, monkeypatch, keys=(), closed_after=1000):
        self.shown, self.destroyed, keys = [], [], list(keys)
        for name, function in {
            "namedWindow": lambda *_: None, "imshow": lambda title, image: self.shown.append(image),
            "waitKey": lambda _: keys.pop(0) if keys else -1, "destroyWindow": self.destroyed.append,
            "getWindowProperty": lambda *_: float(len(self.shown) <= closed_after),
        }.items(): monkeypatch.setattr(cv2, name, function)

def stream(count, ended):
    try:
        for index in range(count): yield replace(FOUND, index=index, time=index / 10, arrived=time.perf_counter())
    finally: ended.append(index)

@pytest.mark.parametrize("keys, closed_after, images", [
    ([-1, -1, ord("q")], 1000, 3), ([-1, ord("Q")], 1000, 2), ([27], 1000, 1), ([ord("x")] * 10, 1000, 10), ([], 4, 5)])
def test_a_key_or_the_cross_ends_it(monkeypatch, keys, closed_after, images):
    screen, ended = Screen(monkeypatch, keys, closed_after), []
    statistics = display_stream(stream(10, ended), Window(screen=(320, 240)))
    assert statistics.images == len(screen.shown) == images and ended == [images - 1]
    assert {image.shape for image in screen.shown} == {(240, 240, 3)}
    assert list(statistics.seconds) == ["read", "network and NMS", "draw", "show"] and statistics.boxes == 2 * images
    assert statistics.seconds["network and NMS"] == pytest.approx(0.2 * images)

def test_a_window_wants_blue_first(monkeypatch):
    screen, image = Screen(monkeypatch), np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert Window(screen=(8, 8)).show(image)
    np.testing.assert_array_equal(screen.shown[0], image[..., ::-1])

def test_a_time_limit_and_an_interrupt_end_it():
    ended = []
    assert display_stream(stream(100, ended), seconds=0).images == 1
    def interrupt(detections, drawn):
        if detections.index == 4: raise KeyboardInterrupt
    assert display_stream(stream(100, ended), record=interrupt).images == 4 and ended == [0, 4]

def test_what_is_recorded_is_the_drawn_image():
    recorded = []
    statistics = display_stream(stream(3, []), record=lambda detections, drawn: recorded.append(drawn), stamp=False)
    for drawn in recorded: np.testing.assert_array_equal(drawn, FOUND.draw())
    assert "write" in statistics.seconds and "3 images, 6 found" in repr(statistics)
    display_stream(stream(1, []), record=lambda detections, drawn: recorded.append(drawn))
    assert (recorded[-1] != FOUND.draw()).any()

def test_rate_and_latency_stand_on_the_image(monkeypatch):
    "In the left upper corner, in words; the image that was given stays as it was, and below nothing changes."
    texts, image, write = [], np.full((240, 320, 3), 200, np.uint8), viewer.text_patch
    monkeypatch.setattr(viewer, "text_patch", lambda text, *style: texts.append(text) or write(text, *style))
    shown = draw_fps(image, 12.345, 0.0678)
    assert texts == ["12.3 frames/s, 68 ms late"] and (image == 200).all()
    changed = np.argwhere((shown != 200).any(-1))
    assert len(changed) > 500 and changed.min(0).tolist() == [0, 0] and changed[:, 0].max() < 40

def test_the_screen_is_measured():
    assert find_screen("print('window'); print(1920, 1080)") == (1920, 1080)
    assert find_screen("print('window'); import no_such_module") == (1280, 720)
    with pytest.raises(InputError, match="there is no display"): find_screen("import os; os.abort()")   # what Qt does

def test_where_no_window_can_be_the_remedy_is_named(monkeypatch):
    for error, remedy in (
        ("qt.qpa.xcb: could not connect to display", "no display .* --headless writes a video file"),
        ("The function is not implemented. Rebuild", "pip install opencv-python. Without a window: --headless")):
        monkeypatch.setattr(viewer.subprocess, "run", lambda *_, **__: CompletedProcess([], 1, "", error))
        with pytest.raises(InputError, match=remedy): find_screen()
