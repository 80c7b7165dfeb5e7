"""Three layouts, one form: there and back changes nothing, and no file, however broken, does more than be wrong."""
import contextlib
import json
import shutil
import signal
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from fcos_lite.data.coco import write_coco
from fcos_lite.data.datasets import list_splits, load_dataset, read_dataset, read_datasets
from fcos_lite.data.example import Example, Examples, ReadReport, check_error_rate, detect_half_box_shift, overshoot_bias
from fcos_lite.data.voc import parse_voc_object, parse_xml
from fcos_lite.data.yolo import parse_yolo_line
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import Scenes
from .folders import NAMES, WRITERS, image, instances, message, same, to_voc, to_yolo

# --- there and back

@pytest.mark.parametrize("journey", ["COCO YOLO COCO", "COCO VOC COCO", "VOC YOLO VOC", "YOLO COCO VOC YOLO"])
def test_a_journey_through_other_layouts_changes_nothing(journey, layouts_scenes, tmp_path):
    examples = layouts_scenes
    for step, layout in enumerate(journey.split()):
        WRITERS[layout](tmp_path / str(step), "train", examples, NAMES)
        examples = read_dataset(tmp_path / str(step), "train", NAMES)
        assert not examples.report.skipped and examples.class_names == NAMES
    same(layouts_scenes, examples, crowds="YOLO" not in journey)

sides = st.integers(16, 5000)
corner = st.floats(0, 0.9)

@settings(max_examples=300, deadline=None, derandomize=True)
@given(sides, sides, st.lists(st.tuples(corner, corner, st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=5))
def test_boxes_come_back_to_a_fiftieth_of_a_pixel(width, height, fractions):
    x, y, w, h = np.array(fractions).T
    boxes = np.stack([x * width, y * height, np.minimum(x + w, 1) * width, np.minimum(y + h, 1) * height], 1)
    example = Example(1, None, boxes.astype(np.float32), np.zeros(len(boxes), np.int32), width, height)
    yolo = [parse_yolo_line(line, {0: "person"})[1] for line in to_yolo(example).splitlines()]
    xml = parse_xml(to_voc(example, ("person",), "1.jpg").encode(), "1.xml")
    voc = [parse_voc_object(element)[1] for element in xml.findall("object")]
    for read in (np.array(yolo) * np.tile([width, height], 2), np.array(voc)):
        read[:, 2:] += read[:, :2]
        np.testing.assert_allclose(read, example.boxes, atol=min(0.02, 1e-4 * max(width, height)))

@pytest.mark.parametrize("numbers", [(1, 2), (0, 1), (2, 1), (18, 90), (0, 7), (90, 0)], ids=str)
@pytest.mark.parametrize("wanted", [NAMES, NAMES[::-1], ("dog",)], ids=str)
def test_classes_go_by_name_whatever_their_numbers(numbers, wanted, layouts_scenes, layouts):
    "From 0, from 1, with gaps, in the wrong order; asked for by name and by number."
    document = json.loads(instances(layouts / "COCO", "train").read_text())
    for category in document["categories"]: category["id"] = numbers[category["id"] - 1]
    for annotation in document["annotations"]: annotation["category_id"] = numbers[annotation["category_id"] - 1]
    instances(layouts / "COCO", "train").write_text(json.dumps(document))
    yaml = f"train: images/train\nnames:\n  {numbers[0]}: person\n  {numbers[1]}: dog\n"
    (layouts / "YOLO/data.yaml").write_text(yaml)
    for scene in layouts_scenes:
        labels = np.where(scene.labels < 0, -2, np.array(numbers)[scene.labels])
        (layouts / f"YOLO/labels/train/{scene.image_id:012d}.txt").write_text(to_yolo(replace(scene, labels=labels)))
    expected = [[wanted.index(NAMES[label]) for label in scene.labels if label >= 0 and NAMES[label] in wanted]
                for scene in layouts_scenes]
    by_number = tuple(numbers[NAMES.index(name)] for name in wanted)
    for layout in WRITERS:
        for asked in (wanted, by_number) if layout != "VOC" else (wanted,):
            examples = read_dataset(layouts / layout, "train", asked)
            assert examples.class_names == wanted
            labels = [[label for label in example.labels if label >= 0] for example in examples]
            assert labels == expected, (layout, asked)

def test_a_number_that_no_class_has_is_refused(layouts):
    for layout in ("COCO", "YOLO"):
        assert "no category 7" in message(lambda: read_dataset(layouts / layout, "train", (7,)))

@pytest.mark.parametrize("name", ["a b  c", "straße", "人 群", "🙂", "e\u0301", "-rf", "%20", "a.b.c", "'\"", "$(x)"])
def test_names_with_anything_in_them(name, layouts, layouts_scenes):
    coco, yolo, voc = (layouts / layout for layout in WRITERS)
    image(coco).rename(coco / f"train/{name}.jpg")
    file = instances(coco, "train")
    file.write_text(file.read_text().replace("000000000001.jpg", json.dumps(f"{name}.jpg")[1:-1]))
    image(yolo).rename(yolo / f"images/train/{name}.jpg")
    (yolo / "labels/train/000000000001.txt").rename(yolo / f"labels/train/{name}.txt")
    image(voc).rename(voc / f"JPEGImages/{name}.jpg")
    (voc / "Annotations/000000000001.xml").rename(voc / f"Annotations/{name}.xml")
    others = "\n".join(f"{example.image_id:012d}" for example in layouts_scenes[1:])
    (voc / "ImageSets/Main/train.txt").write_text(f"{others}\r\n{name}\r\n")
    for layout in WRITERS:
        examples = read_dataset(layouts / layout, "train", NAMES)
        renamed = next(example for example in examples if Path(example.image).stem == name)
        kept = layouts_scenes[0].labels >= 0 if layout == "YOLO" else slice(None)
        np.testing.assert_allclose(renamed.boxes, layouts_scenes[0].boxes[kept], atol=1e-3)
        assert len(examples) == 12 and not examples.report.skipped and renamed.read().shape == (64, 64, 3)

# --- a folder

def test_what_is_no_dataset_says_what_was_seen(tmp_path, intact):
    assert "no such folder" in message(lambda: read_dataset(tmp_path / "gone", "train"))
    error = message(lambda: read_dataset(tmp_path, "train"))
    assert "this folder has nothing" in error and all(layout in error for layout in WRITERS)
    (tmp_path / "beach.jpg").touch()
    assert "'beach.jpg'" in message(lambda: read_dataset(tmp_path, "train"))
    for layout in ("YOLO", "VOC"): shutil.copytree(intact / layout, tmp_path / "both", dirs_exist_ok=True)
    assert "looks like YOLO and VOC" in message(lambda: read_dataset(tmp_path / "both", "train"))
    assert len(read_dataset(tmp_path / "both", "train", layout="VOC")) == 12
    assert "limit 0: give at least 1" in message(lambda: read_dataset(intact / "VOC", "train", limit=0))
    assert "choose from COCO, YOLO, VOC" in message(lambda: read_dataset(intact / "VOC", "train", layout="voc"))

@pytest.mark.parametrize("layout", WRITERS)
def test_a_limit_takes_the_first_images_and_skips_none(layout, intact, layouts_scenes):
    examples = read_dataset(intact / layout, "train", NAMES, limit=5)
    same(layouts_scenes[:5], examples, crowds=layout != "YOLO")
    assert not examples.report.skipped

@pytest.mark.parametrize("bad, of, limit", [(3, 20, "0.2"), (1, 50, "0.02"), (1, 8, "0.2"), (7, 10, "0.7"), (29, 100, "0.3"), (5, 5, "1")])
def test_the_limit_that_the_message_names_is_enough(bad, of, limit):
    report = ReadReport("here", images=of - bad, skipped={"image that is missing": bad}, first={"image that is missing": "1.jpg"})
    error = message(lambda: check_error_rate(report, 0.01))
    assert f"here: {bad} of {of} images cannot be used" in error and "limit 1 %" in error
    assert f"--max-bad-share {limit}. First: 1.jpg" in error
    check_error_rate(report, float(limit))

# --- several folders, and what to validate on

def test_several_folders_are_read_as_one(layouts_scenes, tmp_path):
    for name, part in (("a", layouts_scenes[:5]), ("b", layouts_scenes[5:]), ("c", layouts_scenes[4:6])):
        write_coco(tmp_path / name, "train2017", part, NAMES)
    write_coco(tmp_path / "b", "val2017", layouts_scenes[:2], NAMES)
    a, b, c = (tmp_path / name for name in "abc")
    both = read_datasets([a, b], "train2017", NAMES)
    same(layouts_scenes, both)
    assert both.report.images == 12 and both.report.crowds == 1
    assert len(read_datasets([a, b], "train2017", limit=6)) == 6
    assert len(read_datasets([a, b], "val2017")) == 2, "from the folder that has it"
    assert "image id 5 is in more than one folder" in message(lambda: read_datasets([a, c], "train2017"))
    assert "none of these folders has the split val2017" in message(lambda: read_datasets([a, c], "val2017"))
    assert (list_splits(a), list_splits(b)) == (["train2017"], ["train2017", "val2017"])

def test_images_to_train_on_and_to_validate_on_are_apart_whatever_their_names(coco):
    "One image of val2017 is in train2017 too, under another name."
    shutil.copy(sorted((coco / "val2017").iterdir())[0], sorted((coco / "train2017").iterdir())[0])
    train, val = load_dataset(coco, ("person",))
    assert len(train) == 7 and len(val) == 4 and train.report.skipped["copy of an image of val2017"] == 1

@pytest.mark.parametrize("layout", WRITERS)
def test_without_a_split_for_it_the_first_images_validate(layout, intact, layouts_scenes):
    train, val = load_dataset(intact / layout, NAMES, validation_fraction=0.25)
    assert len(val) == 3
    same(layouts_scenes, [*val, *train], crowds=layout != "YOLO")
    assert "too few to hold some out" in message(lambda: load_dataset(intact / layout, limit=1))

# --- the half-box shift

@pytest.fixture(scope="session")
def many(world): return Examples(Scenes(80, seed=9, world=replace(world, max_height=60)), ("person",))

def moved(example, halves):
    "Move boxes by so many half sizes."
    sides = example.boxes[:, 2:] - example.boxes[:, :2]
    return replace(example, boxes=example.boxes + halves / 2 * np.tile(sides, 2))

@pytest.mark.parametrize("halves, cause", [(1, "centres were read as corners"), (-1, "corners were read as centres"), (0, None)])
@pytest.mark.parametrize("layout", WRITERS)
def test_the_half_box_shift_is_named_in_every_layout(layout, halves, cause, many, tmp_path):
    WRITERS[layout](tmp_path / "d", "train", [moved(example, halves) for example in many], ("person",))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = read_dataset(tmp_path / "d", "train", max_bad_share=0.1).report
    assert [cause in str(warning.message) for warning in warned] == ([True] if cause else [])
    assert report.notes == [] if cause is None else cause in str(report)

def test_boxes_that_only_look_shifted_are_not_named(many):
    boxes = np.concatenate([example.boxes for example in many]) / 64
    sides = boxes[:, 2:] - boxes[:, :2]
    assert detect_half_box_shift(boxes) is None and detect_half_box_shift(boxes[:0]) is None
    noise = np.random.default_rng(0).normal(0, 0.1, boxes.shape) * np.tile(sides, 2)
    assert detect_half_box_shift(boxes + noise) is None, "careless, in all directions"
    bodies = boxes.copy()
    bodies[:, 3] += np.where(boxes[:, 3] > 0.98, sides[:, 1], 0)
    bodies[:, 2] += np.where(boxes[:, 2] > 0.98, sides[:, 0], 0)
    bodies[:, 0] -= np.where(boxes[:, 0] < 0.02, sides[:, 0], 0)
    assert (bodies[:, 3] > 1.05).mean() > 0.03 and detect_half_box_shift(bodies) is None, "whole bodies, beyond the image"
    shifted = boxes + np.tile(sides, 2) / 2
    assert overshoot_bias(shifted) > 0.06 and detect_half_box_shift(shifted)
    assert detect_half_box_shift(shifted[:4]) is None, "too few to tell"

# --- fuzzing

TOKENS = [
    b"", b"0", b"-1", b"1e999", b"nan", b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"'", b",", b":", b"\n",
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"..", b"../", b"/", b"\\", b"\\ud800", b"9" * 400, b" " * 50, b"<", b">", b"&b;",
    b"</", b"/>", b"<object>", b"</object>", b"<bndbox/>", b"<!--", b"]]>", b"<![CDATA[", b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"<?xml version='1.0' encoding='utf-16'?>", b"&a ", b"*a", b"!!int ", b"- ", b"? ", b"<<: ", b"%YAML 1.1\n---\n", b"|",
    b"[" * 2000, b"<a>" * 2000]

@st.composite
def broken(draw, text):
    "A text after a few accidents: something cut out, put in, doubled or changed."
    data = text
    for _ in range(draw(st.integers(1, 5))):
        i = draw(st.integers(0, len(data)))
        j = min(len(data), i + draw(st.integers(0, 40)))
        number = st.integers(-10 ** 20, 10 ** 20).map(lambda n: str(n).encode()) | st.floats().map(lambda v: repr(v).encode())
        piece = draw(st.one_of(st.sampled_from(TOKENS), st.just(data[i:j] * 2), st.binary(max_size=6), number))
        data = data[:i] + piece + data[j:]
    return data

words = st.text(max_size=6) | st.sampled_from(["1.jpg", "../1.jpg", "person"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
boxes = st.lists(st.floats() | st.integers(), min_size=4, max_size=4)

@st.composite
def documents(draw, text):
    "A COCO document with some values replaced by others of any kind."
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(sorted(document)))
        if not (isinstance(document[key], list) and document[key]) or draw(st.integers(0, 9)) == 0:
            document[key] = draw(values)
            continue
        place = draw(st.integers(0, len(document[key]) - 1))
        entry = document[key][place]
        if isinstance(entry, dict) and entry and draw(st.integers(0, 9)):
            entry[draw(st.sampled_from(sorted(entry)))] = draw(values | boxes)
        else: document[key][place] = draw(values)
    return json.dumps(document).encode()

FUZZED = {"COCO": ["annotations/instances_train.json"], "YOLO": ["data.yaml", "labels/train/000000000001.txt"],
          "VOC": ["Annotations/000000000001.xml", "ImageSets/Main/train.txt"]}

@contextlib.contextmanager
def within(seconds):
    "Raise if something takes longer, by the clock of the processor, or more than 50 MB of memory."
    def stop(*_): raise TimeoutError(f"more than {seconds} s")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

def assert_sound(examples):
    "Assert what the rest of the library believes of examples, whoever read them."
    classes = range(len(examples.class_names))
    for example in examples:
        near, far = example.boxes[:, :2], example.boxes[:, 2:]
        assert example.boxes.shape == (len(example.labels), 4) and example.boxes.dtype == np.float32
        assert np.isfinite(example.boxes).all() and (near >= 0).all() and (near <= far).all()
        assert (far <= (example.width, example.height)).all() and isinstance(example.image_id, int)
        assert set(example.labels.tolist()) <= {*classes, *(-2 - label for label in classes)}
        assert example.read().shape == (example.height, example.width, 3)

def fuzz(layout, count, root):
    folder = root / layout
    originals = {name: (folder / name).read_bytes() for name in FUZZED[layout]}
    changes = [st.tuples(st.just(name), broken(data)) for name, data in originals.items()]
    if layout == "COCO": changes += [st.tuples(st.just(name), documents(data)) for name, data in originals.items()]
    read, refused = [], []
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(changes))
    def one(change):
        name, data = change
        (folder / name).write_bytes(data)
        try:
            with within(20): examples = read_dataset(folder, "train", max_bad_share=1, layout=layout)
        except InputError as error:
            assert 20 < len(str(error)) < 3000
            refused.append(1)
        else:
            assert_sound(examples)
            assert len(str(examples.report).encode()) < 10_000
            read.append(1)
        finally: (folder / name).write_bytes(originals[name])
    one()
    assert min(len(read), len(refused)) > count / 50, "both ways are gone, else the documents are too tame or too wild"

@pytest.fixture
def small(layouts_scenes, tmp_path):
    for layout, write in WRITERS.items(): write(tmp_path / layout, "train", layouts_scenes[:2], NAMES)
    return tmp_path

@pytest.mark.parametrize("layout", WRITERS)
def test_100_malformed_documents(layout, small): fuzz(layout, 100, small)

@pytest.mark.slow
@pytest.mark.parametrize("layout", WRITERS)
def test_10_000_malformed_documents(layout, small): fuzz(layout, 10_000, small)
