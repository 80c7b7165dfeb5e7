"""Every frame with its time, whatever a file has suffered; and files that play as fast as their frames came."""
import tracemalloc
from types import SimpleNamespace
import cv2
import numpy as np
import pytest
from PIL import Image
from fcos_lite.detect import video as video_module
from fcos_lite.detect.video import Video, VideoWriter
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import World, draw_scene

SCENE = draw_scene(3, World(size=256, min_height=90, max_height=200, max_people=3, empty_share=0)).image

def walk(step): # (120, 160, 3) uint8 RGB
    return np.ascontiguousarray(SCENE[70:190, 2 * step % 96:][:, :160])

def write_plainly(path, count, codec="mp4v"):
    "A file as OpenCV writes it."
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, (160, 120))
    for step in range(count): writer.write(walk(step)[..., ::-1])
    writer.release()
    return path

@pytest.fixture(scope="module")
def whole(tmp_path_factory): return write_plainly(tmp_path_factory.mktemp("videos") / "walk.mp4", 50)

def copy(frames, path, fps):
    with VideoWriter(path, fps) as writer:
        for frame in frames: writer.write(frame.image, frame.time)
    return Video(path)

def test_every_frame_comes_with_its_time(whole):
    video = Video(whole)
    frames = list(video)
    assert [frame.index for frame in frames] == list(range(50)) and video.lost == 0
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(50) / 25, atol=1e-3)
    for step, frame in enumerate(frames): assert np.abs(frame.image.astype(float) - walk(step)).mean() < 6

def test_damaged_frames_are_left_out_and_counted(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    place = int(0.3 * len(data))
    data[place:place + 3000] = bytes(3000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    video = Video(tmp_path / "damaged.mp4")
    assert len(list(video)) + video.lost == 50 and 0 < video.lost < 20

def test_what_is_no_video_is_refused(whole, tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:2000])    # its index, at the end, is missing
    for name, why in (("text.mp4", "not a video"), ("empty.mp4", "0 bytes"), ("cut.mp4", "not a whole one"),
                      ("missing.mp4", "no such file"), ("", "this is a folder")):
        with pytest.raises(InputError, match=why): Video(tmp_path / name)

def test_a_video_without_a_frame_is_refused_for_that(tmp_path, monkeypatch):
    "It opens, knows its size and its rate, and has nothing to show."
    (tmp_path / "hollow.mp4").write_bytes(b"a head without a body")
    hollow = SimpleNamespace(isOpened=lambda: True, read=lambda: (False, None), get=lambda what: 25.0,
                             release=lambda: None)
    monkeypatch.setattr(video_module.cv2, "VideoCapture", lambda *_: hollow)
    with pytest.raises(InputError, match="hollow.mp4: a video without frames; record or convert it again"):
        Video(tmp_path / "hollow.mp4")

def test_a_video_of_uneven_pace_plays_as_fast_as_it_came(tmp_path):
    "Frames that are shown for 40 to 400 ms: each keeps its time, and the written file changes when it should."
    shown = [40, 40, 200, 40, 400, 40, 40, 40]
    images = [Image.fromarray(walk(4 * i)) for i in range(len(shown))]
    images[0].save(tmp_path / "uneven.gif", save_all=True, append_images=images[1:], duration=shown)
    uneven = list(Video(tmp_path / "uneven.gif"))
    np.testing.assert_allclose([frame.time for frame in uneven], np.cumsum([0, *shown[:-1]]) / 1000, atol=1e-3)
    frames = [frame.image.astype(int) for frame in copy(uneven, tmp_path / "even.avi", 25)]
    changes = [np.abs(a - b).mean() > 2 for a, b in zip(frames, frames[1:])]
    assert np.flatnonzero(changes).tolist() == (np.cumsum(shown)[:-1] // 40 - 1).tolist()

def test_a_faster_source_loses_frames_and_not_its_pace(tmp_path):
    with VideoWriter(tmp_path / "ten.avi", 10) as writer:
        for step in range(12): writer.write(np.full((48, 64, 3), 20 * step, np.uint8), step / 30)
    shown = [frame.image.mean() / 20 for frame in Video(tmp_path / "ten.avi")]
    np.testing.assert_allclose(shown, [0, 2, 5, 8, 11], atol=0.3)

def test_a_written_file_is_whole(whole, tmp_path):
    again = copy(Video(whole), tmp_path / "again.mp4", 25)
    assert (again.fps, again.count, again.width, again.height) == (25.0, 50, 160, 120)
    assert [file.name for file in tmp_path.iterdir()] == ["again.mp4"]

def test_frames_of_other_sizes_are_fitted_in(tmp_path):
    with VideoWriter(tmp_path / "sizes.avi") as writer:
        for frame in (walk(0), walk(1)[:60, :80], walk(2)[:, :100]): writer.write(frame)
    assert [frame.image.shape for frame in Video(tmp_path / "sizes.avi")] == [(120, 160, 3)] * 3
    with VideoWriter(tmp_path / "odd.mp4") as writer: writer.write(walk(0)[:119, :159])
    assert next(iter(Video(tmp_path / "odd.mp4"))).image.shape == (118, 158, 3)

def test_an_interrupt_leaves_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "kept.webm", 10) as writer:
        for step in range(13): writer.write(walk(step))
        raise KeyboardInterrupt
    assert Video(tmp_path / "kept.webm").count == 13

def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="videos are written as .mp4"): VideoWriter(tmp_path / "walk.gif")
    writer = VideoWriter(tmp_path / "full.mp4")
    writer.write(walk(0))
    real = writer.writer
    writer.writer = SimpleNamespace(release=lambda: real.release() or writer.partial.write_bytes(b""))
    with pytest.raises(InputError, match="is the disk full"): writer.close()
    assert not (tmp_path / "full.mp4").exists()

def test_a_long_video_holds_no_more_than_a_short_one(tmp_path):
    def peak(count):
        source = write_plainly(tmp_path / f"{count}.avi", count, "MJPG")
        tracemalloc.start()
        copy(Video(source), tmp_path / f"{count}-copy.avi", 25)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(5)   # the first time, caches are filled
    assert peak(200) < peak(20) + 60_000   # bytes; one frame has 58,000
