"""Files of detections: one name for one thing, numbers that agree, and memory that does not grow."""
import csv
import json
import tracemalloc
from dataclasses import replace
import numpy as np
from fcos_lite.data.detections import Detections
from fcos_lite.detect.video import Video
from fcos_lite.detect.writers import ResultWriter

IMAGE = np.full((48, 64, 3), 120, np.uint8)
FOUND = Detections(np.float32([[10, 10, 40, 40]]), np.float32([0.5]), np.int32([0]), image=IMAGE)

def write(out, results, save=("csv", "coco", "crops")):
    with ResultWriter(out, save) as writer:
        for detections in results: writer.add(detections, detections.draw())
    return sorted(file.name for file in out.iterdir())

def test_names_are_used_once(tmp_path):
    names = ["one/photo.jpg", "two/photo.jpg", "two/photo.jpg", "C:\\my\\photo.png", "camera:0", "https://host/"]
    write(tmp_path, [replace(FOUND, name=name) for name in names])
    files = ["camera-0.jpg", "image.jpg", "photo-2.jpg", "photo-3.jpg", "photo-4.jpg", "photo.jpg"]
    assert sorted(file.name for file in tmp_path.glob("*.jpg")) == files
    found = json.loads((tmp_path / "detections.json").read_text())
    assert list(found) == [*names[:2], "two/photo.jpg#2", *names[3:]] and len(list((tmp_path / "crops").iterdir())) == 6
    assert len(list(csv.DictReader((tmp_path / "detections.csv").open()))) == 6

def test_a_video_that_begins_again_is_another_video(tmp_path):
    frames = [replace(FOUND, name="walk.mp4", index=index, time=index / 25, fps=25.0) for index in (0, 1, 2, 0, 1)]
    assert write(tmp_path, frames, ()) == ["walk-2.jsonl", "walk-2.mp4", "walk.jsonl", "walk.mp4"]
    assert [Video(tmp_path / name).count for name in ("walk.mp4", "walk-2.mp4")] == [3, 2]
    lines = [json.loads(line) for line in (tmp_path / "walk.jsonl").read_text().splitlines()]
    written = [(line["frame"], line["time"], line["detections"]) for line in lines]
    assert written == [(i, i / 25, FOUND.to_json()) for i in range(3)]

def test_writing_again_appends_nothing(tmp_path):
    frames = [replace(FOUND, name="walk.mp4", index=index, time=index / 25) for index in range(2)]
    for _ in range(2): write(tmp_path, frames, ("csv",))
    assert len((tmp_path / "walk.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == 3

def test_images_named_as_coco_names_them_keep_their_ids(tmp_path):
    for names, ids in ((("000000000139.jpg", "000000000285.jpg"), [139, 285]), (("x/139.jpg", "y/139.jpg"), [1, 2])):
        write(tmp_path, [replace(FOUND, name=name) for name in names])
        assert [image["id"] for image in json.loads((tmp_path / "coco_images.json").read_text())] == ids
        assert [row["image_id"] for row in json.loads((tmp_path / "coco_results.json").read_text())] == ids

def test_nothing_is_made_of_nothing(tmp_path):
    with ResultWriter(tmp_path / "out", ("csv", "coco")): pass
    assert not (tmp_path / "out").exists()

def test_a_long_video_holds_no_more_than_a_short_one(tmp_path):
    def peak(count):
        frames = (replace(FOUND, name="walk.avi", image=IMAGE.copy(), index=index, time=index / 25)
                  for index in range(count))
        tracemalloc.start()
        write(tmp_path / str(count), frames, ("csv",))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(3)
    assert peak(150) < peak(10) + 300_000   # 140 frames more would be 1.3 MB of images
