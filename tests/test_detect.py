"""Whatever way a picture comes in, the same boxes come out, in its own pixels; and what is no picture, no film, no address and no weights is refused with its reason."""
import csv
import functools
import http.server
import importlib.util
import json
import marshal
import pickle
import shutil
import threading
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock
import h5py
import numpy as np
import pytest
from PIL import Image
from fcos_lite.detect import __main__ as detect
from fcos_lite.config import SCRATCH_RECIPE, CAMERA_NMS, NMS_PRESETS, InputError, ModelConfig
from fcos_lite.detector.model import FCOS
from fcos_lite.detect.results import CSV_COLUMNS, save_image
from fcos_lite.scenes.scenes import World, draw_scene
from fcos_lite.detect.video import Video, VideoWriter
from fcos_lite.detector.weights import load_weights, save_weights

TINY = ModelConfig(image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4,
               pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
ALL = replace(CAMERA_NMS, score=0.0, candidates=50)     # an untrained network half believes in everything

@pytest.fixture(scope="module")
def model(): return FCOS(TINY)

@pytest.fixture(scope="module")
def scene(): return draw_scene(2, World(size=64, min_height=20, max_height=56, empty_share=0)).image[:48].copy()     # wider than high: the letterbox has something to do

@pytest.fixture
def folder(tmp_path, scene):
    "Three pictures and a film of five frames."
    for name in ("b.png", "a.png", "c.PNG"): save_image(tmp_path / name, scene)
    with VideoWriter(tmp_path / "film.avi", 5) as film:
        for step in range(5): film.write(np.roll(scene, 4 * step, axis=1))
    return tmp_path

@pytest.fixture
def site(folder):
    "An address where the folder is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    "A folder of weights."
    path = tmp_path_factory.mktemp("run")
    save_weights(model, path / "best.weights.h5")
    (path / "config.json").write_text(json.dumps({"network": asdict(TINY), "recipe": asdict(SCRATCH_RECIPE)}))
    return path

def command(model, *words):
    "The command with a detector that is there already, or, by its folder, one that is loaded."
    if isinstance(model, Path): return detect.main([*map(str, words), "--weights", str(model)])
    with mock.patch.object(detect.FCOS, "from_preset", lambda name: model): return detect.main([str(word) for word in words])

def test_one_picture_has_one_answer_whichever_way_it_comes_in(model, scene, folder, site):
    expected = model.detect(scene, ALL)
    assert len(expected) > 3
    singles = [folder / "a.png", str(folder / "a.png"), Image.fromarray(scene), f"{site}/a.png", f"{site}/a.png?size=large", Image.open(folder / "a.png")]
    several = [[scene], (scene, scene), np.stack([scene, scene]), f"{folder}/*.png", [folder / "a.png", f"{site}/b.png", Image.fromarray(scene)]]
    for result in [model.detect(one, ALL) for one in singles] + [result for many in several for result in model.detect(many, ALL)]:
        np.testing.assert_allclose(result.xyxy, expected.xyxy, atol=1e-3)
        np.testing.assert_allclose(result.score, expected.score, atol=1e-5)
    assert [len(model.detect(many, ALL)) for many in several] == [1, 2, 2, 2, 3]

def test_boxes_are_in_the_pixels_of_the_picture_that_was_given(model, scene):
    "The same picture with every pixel four times is the same to the network, and its boxes are twice as large."
    twice = np.repeat(np.repeat(scene, 2, 0), 2, 1)
    np.testing.assert_allclose(model.detect(twice, ALL).xyxy, 2 * model.detect(scene, ALL).xyxy, atol=2e-2)

def test_a_picture_lying_on_its_side_is_turned_upright(model, scene, tmp_path):
    "A phone stores what its sensor saw, and a word about how it was held: boxes are those of the upright picture."
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(scene)).save(tmp_path / "phone.png", exif=exif)
    for given in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        result = model.detect(given, ALL)
        assert result.image.shape == scene.shape
        np.testing.assert_allclose(result.xyxy, model.detect(scene, ALL).xyxy, atol=1e-3)

@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_film_is_its_frames_one_by_one(model, folder, batch_size):
    frames = list(Video(folder / "film.avi"))
    results = list(model.stream(folder / "film.avi", ALL, batch_size))
    assert [(r.index, round(r.time, 3), r.fps) for r in results] == [(k, k / 5, 5.0) for k in range(5)]
    for frame, result in zip(frames, results): np.testing.assert_allclose(result.xyxy, model.detect(frame.image, ALL).xyxy, atol=1e-3)

def test_a_film_of_uneven_pace_keeps_its_times(model, scene, tmp_path):
    "Frames that are shown for 40, 200, 400 and 40 milliseconds: each result has the time of its own, and the film that the command writes is even, and as long. Nothing but a GIF can be written unevenly with what is here."
    shown = [40, 200, 400, 40]
    pictures = [Image.fromarray(np.roll(scene, 4 * step, axis=1)) for step in range(4)]
    pictures[0].save(tmp_path / "uneven.mp4", "GIF", save_all=True, append_images=pictures[1:], duration=shown)     # FFmpeg looks at what is in a file
    times = np.cumsum([0, *shown[:-1]]) / 1000
    np.testing.assert_allclose([result.time for result in model.stream(tmp_path / "uneven.mp4", ALL)], times, atol=1e-3)
    command(model, tmp_path / "uneven.mp4", "--out", tmp_path / "out", "--score", "0", "--candidates", "50")
    lines = [json.loads(line) for line in (tmp_path / "out" / "uneven.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["time"] for line in lines], times, atol=1e-3)
    film = Video(tmp_path / "out" / "uneven.mp4")
    assert film.count == round(times[-1] * film.fps) + 1 and len(lines) == 4

def test_a_list_is_refused_what_does_not_end(model, folder, site):
    for given, word in ((folder / "film.avi", "video"), ("camera:0", "camera"), (folder, "video"), (f"{site}/film.avi", "video"), ([f"{site}/film.avi", folder / "a.png"], "video")):
        with pytest.raises(InputError, match=f"a {word} has too many pictures for a list; write: for result in model.stream"): model.detect(given)

def test_thresholds_by_name_are_the_numbers_of_the_document(model, scene):
    assert (NMS_PRESETS["camera"].iou, NMS_PRESETS["camera"].score, NMS_PRESETS["evaluation"].iou, NMS_PRESETS["evaluation"].score) == (0.3, 0.2, 0.75, 0.05)
    for name, thresholds in NMS_PRESETS.items(): assert model.detect(scene, name).to_json() == model.detect(scene, thresholds).to_json()

def test_the_command_writes_what_the_stream_gives(model, run, folder, tmp_path, capsys):
    out = tmp_path / "out"
    command(run, folder, "--out", out, "--score", "0", "--candidates", "50", "--also", "csv", "coco", "crops", "--display", "cube_root")
    results = list(model.stream(folder, ALL))
    boxes = sum(map(len, results))
    written = json.loads((out / "detections.json").read_text())
    assert [len(written[str(folder / name)]) for name in ("a.png", "b.png", "c.PNG")] == [len(r) for r in results if r.time is None]
    np.testing.assert_allclose(written[str(folder / "a.png")][0]["xyxy"], results[0].xyxy[0], atol=0.06)
    lines = [json.loads(line) for line in (out / "film.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["time"], len(line["detections"])) for line in lines] == [(r.index, round(r.time, 4), len(r)) for r in results if r.time is not None]
    film = Video(out / "film.mp4")
    assert (film.count, film.fps, film.width, film.height) == (5, 5.0, 64, 48)
    rows = list(csv.DictReader((out / "detections.csv").open()))
    coco = json.loads((out / "coco_results.json").read_text())
    assert tuple(rows[0]) == CSV_COLUMNS and len(rows) == len(coco) == boxes == len(list((out / "crops").iterdir()))
    images = json.loads((out / "coco_images.json").read_text())
    assert len(images) == len(results) and {row["image_id"] for row in coco} <= {image["id"] for image in images}
    assert f"{boxes} found in 4 of 4 sources" in capsys.readouterr().out

def test_pictures_named_as_coco_names_them_keep_their_ids(model, scene, tmp_path):
    for number in (139, 285): save_image(tmp_path / f"{number:012d}.png", scene)
    command(model, tmp_path, "--out", tmp_path / "out", "--score", "0", "--also", "coco")
    assert [image["id"] for image in json.loads((tmp_path / "out" / "coco_images.json").read_text())] == [139, 285]

def test_what_cannot_be_read_is_said_and_the_rest_goes_on(model, folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"\x89PNG and nothing else")
    (folder / "film.avi").write_bytes(b"RIFF")
    (folder / "page.jpg").write_text("<html>no picture</html>")
    command(model, folder, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    for name in ("b.png: not a picture", "film.avi: not a video", "page.jpg: not a picture"): assert f"skipped: {folder}/{name}" in said
    assert "in 2 of 5 sources" in said

def test_a_film_with_damaged_frames_says_how_many(model, folder, tmp_path, capsys):
    data = bytearray((folder / "film.avi").read_bytes())
    pictures = [place for place in range(len(data)) if data[place:place + 3] == b"\xff\xd8\xff"]
    data[pictures[1]:pictures[2] - 20] = bytes(pictures[2] - 20 - pictures[1])
    (folder / "film.avi").write_bytes(data)
    command(model, folder / "film.avi", "--out", tmp_path / "out")
    assert "film.avi: 1 of 5 frames are damaged, and were left out" in capsys.readouterr().out
    assert Video(tmp_path / "out" / "film.mp4").count == 5            # the film keeps its pace: the picture before stands in

def test_nothing_to_go_on_with_is_refused(model, folder, site, tmp_path):
    (folder / "none.png").touch()
    for word, why in ((folder / "none.png", "none of the pictures"), ("http://127.0.0.1:1/a.png", "none of the pictures"), (f"{site}/", "none of the pictures"),
                      ("nothing://here", "cannot be read"), (folder / "x.png", "no such file or folder; check the spelling"), (f"{folder}/*.gif", "no picture and no video.*check the spelling"), ("http://[bad/a.png", "this is no address"), ("data:image/png;base64," + "A" * 400, "decode it")):
        with pytest.raises(InputError, match=why): command(model, word, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"): command(model, folder, "--out", tmp_path / "out")

def test_a_long_film_holds_no_more_than_a_short_one(model, scene, tmp_path):
    def most(count):
        with VideoWriter(tmp_path / f"{count}.avi") as film:
            for step in range(count): film.write(np.roll(scene, step, axis=1))
        tracemalloc.start()
        with detect.ResultWriter(tmp_path / f"out{count}", ("csv",)) as recorder:
            for result in model.stream(tmp_path / f"{count}.avi"): recorder.add(result, result.draw())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    most(3)
    short, long = most(10), most(150)
    assert long < short + 300_000, f"{short:,} bytes for 10 frames, {long:,} for 150"     # 140 frames more would be 1.3 MB of pictures

@pytest.mark.skipif(not importlib.util.find_spec("supervision"), reason="the library supervision is not installed: pip install supervision")
def test_supervision_takes_what_we_give(model, scene):
    import supervision
    result = model.detect(scene, ALL)
    theirs = result.to_supervision()
    assert isinstance(theirs, supervision.Detections) and len(theirs) == len(result)
    np.testing.assert_allclose(theirs.xyxy, result.xyxy)
    assert supervision.BoxAnnotator().annotate(scene.copy(), theirs).shape == scene.shape
    assert len(result[:0].to_supervision()) == 0

class Trap:
    "Whoever unpickles it makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (Path(self.path),)

def lambda_model(path):
    "A Keras archive with a Lambda layer in it, as an attacker would send it."
    import keras
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)]).save(path)

def test_weights_are_never_unpickled(model, run, tmp_path, monkeypatch):
    "A pickle, an archive with a Lambda, and a weights file with both beside its arrays: the first two are refused, of the third the arrays alone are read."
    trap, page = tmp_path / "sprung", (run / "config.json").read_text()
    (tmp_path / "config.json").write_text(page)
    (tmp_path / "pickled.weights.h5").write_bytes(pickle.dumps(Trap(trap)))
    lambda_model(tmp_path / "lambda.keras")
    shutil.copy(tmp_path / "lambda.keras", tmp_path / "lambda.weights.h5")
    shutil.copy(run / "best.weights.h5", tmp_path / "both.weights.h5")
    with h5py.File(tmp_path / "both.weights.h5", "r+") as file:
        file.attrs["model_config"] = zipfile.ZipFile(tmp_path / "lambda.keras").read("config.json").decode()
        file.create_dataset("pickle", data=np.frombuffer(pickle.dumps(Trap(trap)), np.uint8))
    def forbidden(*_, **__): raise AssertionError("weights were unpickled")
    for module in (pickle, marshal):
        for name in ("load", "loads", "Unpickler"):
            if hasattr(module, name): monkeypatch.setattr(module, name, forbidden)
    for name in ("pickled.weights.h5", "lambda.weights.h5"):
        with pytest.raises(InputError, match=f"{name}: not a weights file"): FCOS.from_preset(tmp_path / name)
    with pytest.raises(InputError, match="only arrays are opened: a whole model may carry code"): FCOS.from_preset(tmp_path / "lambda.keras")
    again = FCOS.from_preset(tmp_path / "both.weights.h5")
    assert not trap.exists()
    for ours, theirs in zip(again.weights, model.weights): np.testing.assert_array_equal(np.array(ours), np.array(theirs))

def test_an_array_of_python_objects_is_no_weights(model, run, tmp_path):
    shutil.copy(run / "best.weights.h5", tmp_path / "objects.weights.h5")
    with h5py.File(tmp_path / "objects.weights.h5", "r+") as file:
        found = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) and name.startswith("fpn/") and item.ndim == 4 else None)
        shape = file[found[0]].shape
        del file[found[0]]
        file.create_dataset(found[0], shape, h5py.string_dtype())
    with pytest.raises(InputError, match="objects.weights.h5"): load_weights(model, tmp_path / "objects.weights.h5")

@pytest.mark.parametrize("display, power", [("score", 1), ("square_root", 1 / 2), ("cube_root", 1 / 3)])
def test_what_is_drawn_is_the_score_or_its_root(display, power, monkeypatch):
    "Words at the boxes; the result itself keeps its scores."
    from fcos_lite.detect import results
    said, scores = [], np.float32([0.512, 0.064])
    monkeypatch.setattr(results, "draw_boxes", lambda image, xyxy, labels, texts: said.extend(texts) or image)
    found = results.Result(np.float32([[1, 2, 20, 30], [5, 5, 25, 25]]), scores, np.int32([0, 0]), ("person",), np.zeros((40, 40, 3), "uint8"), name="a").displayed(display)
    found.draw()
    assert said == [f"person {float(score) ** power:.2f}" for score in scores] and (found.score == scores).all()
