"""A camera that stalls, tears, grows, vanishes and comes back: what is shown is new, and the end is a sentence."""
import random
import threading
import time
import pytest
from fcos_lite.detect.camera import Camera, LatestFrameReader, camera_address, camera_name, open_camera
from fcos_lite.errors import InputError
from .played import HANG, Played, Shelf

def numbers(camera, polite=None): # of all frames, and the sentence at the end
    seen = []
    try:
        for frame in camera:
            seen.append((int(frame.image[0, 0, 0]), frame))
            if polite and polite.unseen: polite.seen.release()
    except InputError as error: return seen, str(error)
    return seen, None

def watch(shelf, tries, wait=1.0, polite=None):
    with Camera(0, wait=wait, tries=tries, pause=0.001, opener=shelf, log=lambda line: None) as camera:
        return numbers(camera, polite)

def test_a_camera_that_stalls_ends_with_a_sentence_and_not_with_silence():
    stuck = Played([1, 2, HANG])
    started = time.monotonic()
    seen, sentence = watch(Shelf(stuck), tries=3)
    assert [number for number, _ in seen][-1] == 2
    assert "camera:0: lost" in sentence and "3 times more did not help" in sentence
    assert time.monotonic() - started < 30
    assert not stuck.released.is_set()   # nobody releases what another thread is inside of
    stuck.free.set()
    assert stuck.released.wait(10)

def test_a_camera_that_comes_back_goes_on_and_may_have_grown():
    stuck, back = Played([1, HANG]), Played([3, 4], width=96, polite=True)
    lines = []
    shelf = Shelf(stuck, None, back)
    with Camera(0, wait=1.0, pause=0.001, opener=shelf, log=lines.append, tries=4) as camera:
        seen, sentence = numbers(camera, back)
    assert [number for number, _ in seen] == [1, 3, 4] and "lost" in sentence
    assert [frame.image.shape[1] for _, frame in seen] == [64, 96, 96]
    assert lines[:2] == ["camera:0: lost; trying to open it again", "camera:0: is back"]
    times, indices = [frame.time for _, frame in seen], [frame.index for _, frame in seen]
    assert times == sorted(times) and indices == sorted(set(indices))
    stuck.free.set()

def test_torn_frames_are_left_out():
    torn = Played([1, "bad", 2, "empty", "error", "bad", 3], polite=True)
    seen, _ = watch(Shelf(torn), tries=1, wait=20, polite=torn)
    assert [number for number, _ in seen] == [1, 2, 3]

def test_a_slow_viewer_sees_new_frames_and_the_last():
    played = Played(range(60), gap=0.002)
    seen = []
    with Camera(0, wait=1, opener=Shelf(played), log=lambda line: None, tries=0) as camera:
        with pytest.raises(InputError, match="lost"):
            for frame in camera:
                seen.append(int(frame.image[0, 0, 0]))
                time.sleep(0.03)   # the detector
    assert seen == sorted(set(seen)) and seen[-1] == 59
    assert len(seen) < 50   # frames were skipped, which is the point
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
    try: seen, sentence = watch(shelf, tries=2)
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

def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)

def test_only_the_newest_frame_is_kept_and_given_once():
    played = Played([1, 2, 3, HANG])
    reader = LatestFrameReader(played)
    until(lambda: reader.count == 3)
    image, index, _, _ = reader.take(1)
    assert (image[0, 0, 0], index) == (3, 2) and reader.take(0.01) is None
    reader.stop()
    played.free.set()
    assert played.released.wait(10)

def test_what_an_address_means():
    words = (0, "camera", "camera:", "camera:2", "camera:/dev/video1", "camera:http://host/live", "rtsp://host/1")
    assert [camera_address(word) for word in words] == [0, 0, 0, 2, "/dev/video1", "http://host/live", "rtsp://host/1"]
    assert camera_name("rtsp://anna:se@cret@host:554/1") == "rtsp://host:554/1" and camera_name(1) == "camera:1"
    with pytest.raises(InputError, match="/dev/no-such-camera: no such camera"): open_camera("/dev/no-such-camera")
