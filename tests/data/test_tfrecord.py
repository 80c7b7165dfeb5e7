"""Records: what was written is what is read; a damaged byte never yields another image; a kill loses nothing."""
import csv
import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from fcos_lite.config import REFERENCE
from fcos_lite.data import tfrecord
from fcos_lite.data.batches import Batches
from fcos_lite.data.coco import write_coco
from fcos_lite.data.datasets import read_dataset
from fcos_lite.data.example import Example, Examples
from fcos_lite.data.tfrecord import (RecordBatches, RecordConfig, Records, ShardIndex, list_record_splits,
                                     read_train_val, verify_records, write_records)
from fcos_lite.errors import InputError
from fcos_lite.files import folder_lock
from fcos_lite.scenes.scenes import Scenes, World

ROOT = Path(__file__).resolve().parents[2]
WORLD = World(size=64, min_height=10, max_people=4, empty_share=0.2)
QUIET = dict(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
CONFIG = RecordConfig(image_size=64, shard_images=4)

def draw_scenes(count=41):
    "Return scenes of several shapes, one of them with a crowd region."
    scenes = []
    for i, scene in enumerate(Scenes(count, seed=5, world=WORLD)):
        height = (64, 48, 40)[i % 3]
        boxes = np.clip(scene.boxes - np.float32([0, 64 - height] * 2), 0, np.float32([64, height] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        scenes.append(replace(
            scene, image_id=10 * scene.image_id - 3, image=scene.image[64 - height:], height=height, boxes=boxes[kept],
            labels=scene.labels[kept], areas=None if i % 2 else scene.areas[kept]))
    crowd = next(i for i, scene in enumerate(scenes) if len(scene.labels) > 1)
    labels = np.where(np.arange(len(scenes[crowd].labels)) == 0, -2, 0).astype(np.int32)
    scenes[crowd] = replace(scenes[crowd], labels=labels)
    return Examples(scenes, ("person",))

@pytest.fixture(scope="session")
def scenes(): return draw_scenes()

@pytest.fixture(scope="session")
def folders(scenes, tmp_path_factory):
    "The scenes as JPEG and as PNG records, six in a shard: {format: folder}."
    root = tmp_path_factory.mktemp("records")
    for kind in ("jpeg", "png"):
        write_records(scenes, "train2017", root / kind, RecordConfig(image_size=48, format=kind, shard_images=6))
    return {kind: root / kind for kind in ("jpeg", "png")}

@pytest.fixture
def copy(folders, tmp_path):
    "A copy of the JPEG records, to be damaged."
    shutil.copytree(folders["jpeg"], tmp_path / "copy")
    return tmp_path / "copy"

def areas_of(example):
    return (example.boxes[:, 2:] - example.boxes[:, :2]).prod(1) if example.areas is None else example.areas

def contents(folder): return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

def facts(folder, split="train2017"):
    return [(e.image_id, e.boxes.tolist(), e.labels.tolist(), e.image) for e in Records(folder, split)]

def shard_files(folder): return sorted(folder.glob("train2017-*.tfrecord"))

def message(function):
    "Return the text of the InputError that a call must raise."
    with pytest.raises(InputError) as raised: function()
    return str(raised.value)

# --- the bytes

def test_tensorflow_writes_the_same_frames(tmp_path):
    import tensorflow as tf
    rows = [os.urandom(n) for n in (0, 1, 255, 256, 257, 5000, 100_000)]
    with tf.io.TFRecordWriter(str(tmp_path / "file")) as writer:
        for row in rows: writer.write(row)
    assert (tmp_path / "file").read_bytes() == b"".join(map(tfrecord._frame, rows))
    with open(tmp_path / "file", "rb") as file:
        assert [tfrecord._read_frame(file, "here") for _ in rows] == rows

def test_the_data_are_examples_of_tensorflow(scenes):
    import tensorflow as tf
    for scene in scenes:
        data = tfrecord._encode_example(scene, CONFIG)
        theirs = tf.train.Example.FromString(data)
        assert theirs.SerializeToString(deterministic=True) == data
        features = theirs.features.feature
        assert features["labels"].int64_list.value == scene.labels.tolist()
        np.testing.assert_array_equal(np.float32(features["areas"].float_list.value), areas_of(scene))

@settings(**{**QUIET, "max_examples": 300})
@given(st.data())
def test_bytes_that_are_no_record_are_refused_by_name(scenes, data):
    whole = tfrecord._encode_example(scenes[0], RecordConfig(image_size=8, quality=1))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    for changed in (whole[:start] + data.draw(st.binary(max_size=9)) + whole[end:], data.draw(st.binary(max_size=60))):
        try: example = tfrecord._decode_example(changed, "people.tfrecord, record 3")
        except InputError as error: assert "people.tfrecord, record 3" in str(error)
        else: assert len(example.boxes) == len(example.labels) == len(example.areas)

# --- what is stored

def test_png_records_give_the_batches_of_the_images_themselves(scenes, folders):
    how = dict(batch_size=8, image_size=48, shuffle_seed=2)
    ours, theirs = Batches(Records(folders["png"], "train2017"), **how), Batches(scenes, **how)
    for i in range(len(theirs)):
        one, other = ours.whole(i), theirs.whole(i)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)

@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_annotations_come_back_in_the_pixels_of_the_image(kind, scenes, folders):
    records = Records(folders[kind], "train2017")
    for square, original, scene in zip(records, records.in_original_pixels(), scenes, strict=True):
        assert square.image_id == original.image_id == scene.image_id
        assert (original.width, original.height) == (scene.width, scene.height)
        np.testing.assert_array_equal(square.labels, scene.labels)
        np.testing.assert_array_equal(original.areas, areas_of(scene))
        np.testing.assert_allclose(original.boxes, scene.boxes, atol=1e-3)
        assert square.read().shape == (48, 48, 3)
        assert original.read().shape == (round(scene.height * 0.75), 48, 3)

def test_small_images_keep_their_size_where_nothing_is_enlarged(scenes, tmp_path):
    write_records(scenes, "val2017", tmp_path, RecordConfig(image_size=96, format="png", enlarge=False))
    for record, scene in zip(Records(tmp_path, "val2017").in_original_pixels(), scenes, strict=True):
        np.testing.assert_array_equal(record.read(), scene.read())
        np.testing.assert_allclose(record.boxes, scene.boxes, atol=1e-4)

def test_plain_tf_data_reads_them(scenes, folders):
    import tensorflow as tf
    rows = tf.io.RaggedFeature.UniformRowLength(4)
    spec = {"image": tf.io.FixedLenFeature([], tf.string), "image_id": tf.io.FixedLenFeature([], tf.int64),
            "num_boxes": tf.io.FixedLenFeature([], tf.int64), "labels": tf.io.RaggedFeature(tf.int64),
            "boxes": tf.io.RaggedFeature(tf.float32, partitions=[rows])}
    for folder in folders.values():
        data = tf.data.TFRecordDataset([str(file) for file in shard_files(folder)]).batch(99)
        batch = next(iter(data.map(lambda data: tf.io.parse_example(data, spec))))
        assert batch["image_id"].numpy().tolist() == [e.image_id for e in scenes]
        assert batch["boxes"].row_lengths().numpy().tolist() == batch["num_boxes"].numpy().tolist()
        assert batch["labels"].to_list() == [e.labels.tolist() for e in scenes]
        decode = tf.io.decode_png if folder.name == "png" else tf.io.decode_jpeg
        how = {} if folder.name == "png" else {"dct_method": "INTEGER_ACCURATE"}
        for data, record in zip(batch["image"].numpy(), Records(folder, "train2017")):
            np.testing.assert_array_equal(decode(data, 3, **how), record.read())

def hash_batches(folder):
    "Return a hash of the batches of an epoch, types and all."
    checksum = hashlib.sha256()
    batches = RecordBatches(Records(folder, "train2017"), 7, shuffle_seed=3, window=10, cycle=3)
    batches.epoch = 2
    for batch in map(batches.whole, range(len(batches))):
        for name in sorted(batch):
            checksum.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode() + batch[name].tobytes())
    return checksum.hexdigest()

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_without_tensorflow_the_batches_are_the_same(folders):
    program = "import sys; sys.modules['tensorflow'] = None; sys.path.insert(0, 'tests/data'); " \
              "from test_tfrecord import hash_batches; print(*map(hash_batches, sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *map(str, folders.values())], cwd=ROOT, text=True,
                          env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hash_batches(folder) for folder in folders.values()]

# --- the order

counts = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(tuple)

@settings(**QUIET)
@given(counts, st.integers(0, 3), st.integers(0, 3), st.integers(1, 40), st.integers(1, 9))
def test_an_epoch_reads_each_record_once_and_each_file_front_to_back(counts, seed, epoch, window, cycle):
    order = tfrecord._records_order(counts, seed, epoch, window, cycle)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    opened = tfrecord._records_order(counts, seed, epoch, 1, cycle)     # a window of one record shuffles nothing
    shard = np.searchsorted(np.cumsum(counts), opened, side="right")
    for number in range(len(counts)): assert (np.diff(opened[shard == number]) == 1).all()
    for i in range(len(opened)): assert len(set(shard[i:i + cycle])) <= 2 * cycle

def test_orders_differ_by_seed_and_epoch_and_span_shards():
    counts = (50,) * 20
    orders = {tuple(tfrecord._records_order(counts, seed, epoch, 100, 4)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    for order in list(orders)[:4]:
        assert np.mean([len({i // 50 for i in order[first:first + 16]}) for first in range(0, 1000, 16)]) >= 3.5
    assert tfrecord._records_order(counts, None, 3, 100, 4).tolist() == list(range(1000))
    assert len({tuple(tfrecord._records_order((60,), 0, epoch, 64, 1)) for epoch in range(5)}) == 5

def test_the_next_epoch_has_the_next_order(folders):
    batches = RecordBatches(Records(folders["png"], "train2017"), 8, shuffle_seed=1, window=9, cycle=2)
    batches.on_epoch_begin()
    batches.on_epoch_end()
    assert batches.epoch == 1
    np.testing.assert_array_equal(batches.order(), tfrecord._records_order(batches.counts, 1, 1, 9, 2))

def test_a_slice_has_an_order_of_its_own_and_another_fingerprint(scenes, folders):
    records = Records(folders["jpeg"], "train2017")
    ids = [scene.image_id for scene in scenes]
    for part in (slice(0, 41), slice(3, 4), slice(4, 19), slice(10, 10), slice(1, 40, 2)):
        chunk = records[part]
        assert sum(chunk.shard_counts) == len(chunk) == len(ids[part])
        batches = RecordBatches(chunk, 5, window=4, cycle=2, shuffle_seed=3)
        found = [i for batch in map(batches.whole, range(len(batches))) for i in batch["image_id"].tolist()]
        assert sorted(found) == sorted(ids[part])
    parts = (records, records[:9], records[1:10], Records(folders["png"], "train2017"))
    assert len({part.fingerprint for part in parts}) == 4
    assert Records(folders["jpeg"], "train2017").fingerprint == records.fingerprint

# --- damage

def fuzz(copy, count):
    path = shard_files(copy)[2]
    whole, true, refused = path.read_bytes(), facts(copy), []
    place = st.integers(0, len(whole) - 1)
    kinds = st.sampled_from(["cut", "flip", "insert", "remove", "swap"])

    @settings(**{**QUIET, "max_examples": count})
    @given(place, place, kinds, st.binary(min_size=1, max_size=20))
    def damage(a, b, kind, piece):
        first, last = min(a, b), max(a, b)
        changed = {"cut": whole[:a], "flip": whole[:a] + bytes([whole[a] ^ (piece[0] or 1)]) + whole[a + 1:],
                   "insert": whole[:a] + piece + whole[a:], "remove": whole[:a] + whole[a + len(piece):],
                   "swap": whole[last:] + whole[first:last] + whole[:first]}[kind]
        path.write_bytes(changed)
        problems = verify_records(copy)[1]
        try: assert facts(copy) == true
        except InputError as error:
            assert path.name in str(error) and len(str(error)) < 500
            assert any(path.name in problem for problem in problems)
            refused.append(kind)
        else: assert changed == whole or not problems

    damage()
    path.write_bytes(whole)
    assert facts(copy) == true and len(refused) > 0.9 * count

def test_a_damaged_shard_is_refused_by_name_or_reads_the_same(copy): fuzz(copy, 100)

@pytest.mark.slow
def test_3000_damaged_shards(copy): fuzz(copy, 3000)

def test_a_foreign_shard_of_the_same_length_is_refused(copy):
    first, second = shard_files(copy)[:2]
    with open(first, "rb") as file: rows = [tfrecord._read_frame(file, "here") for _ in range(6)]
    foreign = second.read_bytes()
    rows[2:4] = rows[3:1:-1]
    first.write_bytes(b"".join(map(tfrecord._frame, rows)))             # sound records in another order
    assert "SHA-256" in verify_records(copy)[1][0] and first.name in verify_records(copy)[1][0]
    assert first.name in message(lambda: facts(copy))
    first.write_bytes(foreign)
    assert first.name in message(lambda: facts(copy))

def test_an_index_that_was_changed_is_refused(copy):
    path = copy / "train2017.json"
    whole = json.loads(path.read_text())
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())

    @settings(**{**QUIET, "max_examples": 100})
    @given(st.data())
    def change(data):
        stored = json.loads(json.dumps(whole))
        index = stored["index"]
        places = [stored, index, index["config"], index["shards"], *index["shards"].values()]
        entries = data.draw(st.sampled_from(places))
        entries[data.draw(st.sampled_from(sorted(entries)))] = data.draw(values)
        path.write_text(json.dumps(stored))
        if stored == whole: return
        assert "train2017.json: not an index of records" in message(lambda: Records(copy, "train2017"))
        message(lambda: verify_records(copy))

    change()
    for text in ("", "[]", "{}", "7", "[" * 10_000, "\ufeff"):
        path.write_text(text)
        assert "train2017.json: not an index of records" in message(lambda: Records(copy, "train2017"))

def test_a_damaged_record_is_named_and_a_grey_image_takes_its_place(copy, scenes):
    first, second = shard_files(copy)[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))              # the sixth record's checksum
    batches = RecordBatches(Records(copy, "train2017"), 8, shuffle_seed=0)
    with pytest.warns(UserWarning, match=f"{first.name}, record at byte .*: damaged"):
        rows = [batches.whole(i) for i in range(len(batches))]
    ids, images = (np.concatenate([row[name] for row in rows]) for name in ("image_id", "image"))
    assert sorted(ids) == [scene.image_id for scene in scenes]
    assert (images[ids == scenes[5].image_id] == 114).all()
    assert "1 of 41" in message(batches.on_epoch_end)
    second.unlink()
    assert f"{second}: missing" in message(lambda: Records(copy, "train2017"))

def test_all_damaged_shards_are_named_at_once(copy):
    files = shard_files(copy)
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[5].unlink()
    (copy / "train2017-00000-of-00099.tfrecord").touch()
    reports, problems = verify_records(copy)
    named = (files[3].name, files[5].name, "train2017-00000-of-00099.tfrecord")
    assert [name for problem in problems for name in named if name in problem] == list(named)
    assert "41 " in str(reports[0])
    assert "no records are here" in message(lambda: verify_records(copy / "nothing"))
    assert list_record_splits(copy) == ["train2017"]

# --- writing

class SlowExample(Example):
    def read(self):
        time.sleep(0.01)
        return super().read()

def slow_scenes(): # 160 of them, in 40 shards
    scenes = Scenes(160, seed=1, world=World(size=64, min_height=16))
    return Examples([SlowExample(**vars(scene)) for scene in scenes], ("person",))

def start_writing(out):
    program = """if True: # Keras takes seconds to import, and writes no record
        import sys, types
        sys.modules["keras"] = types.ModuleType("keras")
        sys.modules["keras"].utils = types.SimpleNamespace(PyDataset=object)
        sys.path.insert(0, "tests/data")
        from test_tfrecord import CONFIG, slow_scenes, write_records
        print(write_records(slow_scenes(), "train2017", sys.argv[1], CONFIG, workers=2))"""
    return subprocess.Popen([sys.executable, "-c", program, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "The records of the slow scenes, written without a kill."
    out = tmp_path_factory.mktemp("finished") / "records"
    write_records(slow_scenes(), "train2017", out, CONFIG, workers=4)
    return out

def survive(out, finished, kills):
    killed = []
    for seed in range(kills):
        before = {file: file.stat().st_mtime_ns for file in shard_files(out) if file.name in
                  ShardIndex.from_json(out, "train2017").shards} if (out / "train2017.json").exists() else {}
        rng, run = random.Random(seed), start_writing(out)
        wanted = min(40, len(shard_files(out)) + rng.randrange(12))
        while run.poll() is None and len(shard_files(out)) < wanted: time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        run.communicate()
        killed.append(run.returncode == -signal.SIGKILL)
        for file in shard_files(out): assert file.read_bytes() == (finished / file.name).read_bytes(), "half a shard"
        for file, stamp in before.items(): assert file.stat().st_mtime_ns == stamp, "a finished shard was written again"
        if (out / "train2017.json").exists() and len(shard_files(out)) >= 40 and seed < kills - 1: shutil.rmtree(out)
    assert sum(killed) > kills // 2, "most kills came too late"
    run = start_writing(out)
    assert "160 " in run.communicate()[0] and run.returncode == 0
    assert contents(out) == contents(finished)

def test_three_kills_lose_nothing_and_double_nothing(finished, tmp_path): survive(tmp_path / "out", finished, 3)

@pytest.mark.slow
def test_20_kills(finished, tmp_path): survive(tmp_path / "out", finished, 20)

def test_a_finished_folder_is_confirmed_and_a_missing_shard_written_again(folders, scenes, copy):
    stamps = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
    report = write_records(scenes, "train2017", copy, RecordConfig(image_size=48, shard_images=6))
    assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == stamps
    assert report.boxes == sum((scene.labels >= 0).sum() for scene in scenes) and report.crowds == 1
    shard_files(copy)[2].unlink()
    write_records(scenes, "train2017", copy, RecordConfig(image_size=48, shard_images=6), workers=1)
    assert contents(copy) == contents(folders["jpeg"])

def test_an_unfinished_folder_is_told_by_verify_and_refused_by_the_reader(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    index = ShardIndex.from_json(out, "train2017")
    index.shards = dict(list(index.shards.items())[:10])
    index.save(out)
    for file in shard_files(out)[10:]: file.unlink()
    problems = verify_records(out)[1]
    assert len(problems) == 30 and all("not written yet" in problem for problem in problems)
    assert "30 of 40 shards are not written yet" in message(lambda: Records(out, "train2017"))
    write_records(slow_scenes(), "train2017", out, CONFIG, workers=2)
    assert contents(out) == contents(finished)

def test_only_one_process_writes_into_a_folder(scenes, tmp_path):
    with folder_lock(tmp_path):
        assert "another process" in message(lambda: write_records(scenes, "train2017", tmp_path, CONFIG))

@pytest.mark.parametrize("moment", [1, 2, 6])
def test_a_full_disk_leaves_no_half_file(moment, scenes, tmp_path, monkeypatch):
    calls, sync = [], os.fsync
    def full(handle):
        calls.append(handle)
        if len(calls) == moment: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)
    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    assert "cannot be written (No space left on device); make room" in message(
        lambda: write_records(scenes, "train2017", out, CONFIG, workers=1))
    monkeypatch.undo()
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
    write_records(scenes, "train2017", out, CONFIG, workers=1)
    write_records(scenes, "train2017", tmp_path / "again", CONFIG, workers=2)
    assert contents(out) == contents(tmp_path / "again")

@pytest.mark.parametrize("change", [dict(format="png"), dict(quality=80), dict(image_size=32), dict(enlarge=False)])
def test_another_configuration_is_refused(change, scenes, copy):
    before = contents(copy)
    config = replace(RecordConfig(image_size=48, shard_images=6), **change)
    assert "config was" in message(lambda: write_records(scenes, "train2017", copy, config))
    assert contents(copy) == before

def test_other_examples_are_refused(scenes, copy, tmp_path):
    config = RecordConfig(image_size=48, shard_images=6)
    assert "images was 41 and is now 40" in message(lambda: write_records(scenes[:40], "train2017", copy, config))
    moved = Examples([replace(scene, boxes=scene.boxes + 1) for scene in scenes], scenes.class_names)
    assert "examples was" in message(lambda: write_records(moved, "train2017", copy, config))
    renamed = Examples(scenes, ("people",))
    assert "class_names was" in message(lambda: write_records(renamed, "train2017", copy, config))
    (copy / "train2017.json").unlink()
    assert "no train2017.json" in message(lambda: write_records(scenes, "train2017", copy, config))
    twice = Examples([*scenes, scenes[0]], scenes.class_names)
    assert "each image id once" in message(lambda: write_records(twice, "train2017", tmp_path / "out", config))
    assert "at least one" in message(lambda: write_records(scenes[:0], "train2017", tmp_path / "out", config))
    (tmp_path / "file").touch()
    assert "this is a file" in message(lambda: write_records(scenes, "train2017", tmp_path / "file", config))

def test_an_image_that_breaks_between_reading_and_writing(scenes, tmp_path):
    "Above the limit it stops and keeps what is finished; it goes on when it is told that it may."
    (tmp_path / "gone.jpg").touch()
    broken = Examples(scenes, scenes.class_names)
    broken[5] = replace(scenes[5], image=tmp_path / "gone.jpg")
    broken[6] = replace(scenes[6], height=scenes[6].height + 1)
    said = message(lambda: write_records(broken, "train2017", tmp_path / "out", CONFIG, workers=1))
    assert "gone.jpg" in said and "--max-bad-share" in said
    write_records(broken, "train2017", tmp_path / "out", CONFIG, max_bad_share=0.1)
    ids = [record.image_id for record in Records(tmp_path / "out", "train2017")]
    assert ids == [scene.image_id for i, scene in enumerate(scenes) if i not in (5, 6)]
    assert "gone.jpg" in str(verify_records(tmp_path / "out")[0][0]), "the index remembers"

# --- training

def test_records_must_fit_the_network(scenes, folders, tmp_path):
    config = replace(REFERENCE, image_size=32)
    train, val = read_train_val(folders["png"], config, None, 0.1)
    assert [e.image_id for e in val] + [e.image_id for e in train] == [e.image_id for e in scenes] and len(val) == 4
    assert (val[1].width, val[1].height) == (64, 48) and train[0].width == 48
    assert len(read_train_val(folders["png"], config, 10, 0.1)[0]) == 9
    for change, words in ((dict(class_names=("car",)), "--class-names person"),
                          (dict(image_size=64), "--image-size 48"), (dict(pad_value=0), "--pad-value 114")):
        assert words in message(lambda: read_train_val(folders["png"], replace(config, **change), None, 0.1))
    assert "--limit 0" in message(lambda: read_train_val(folders["png"], config, 0, 0.1))
    assert "too few" in message(lambda: read_train_val(folders["png"], config, 1, 0.1))
    shutil.copytree(folders["png"], tmp_path / "both")
    write_records(scenes[:5], "val2017", tmp_path / "both", RecordConfig(image_size=48))
    train, val = read_train_val(tmp_path / "both", config, None, 0.1)
    assert (len(train), len(val)) == (41, 5)
    write_records(scenes[:5], "val2014", tmp_path / "both", RecordConfig(image_size=48))
    assert "at most one with val" in message(lambda: read_train_val(tmp_path / "both", config, None, 0.1))

# --- many

def soak(folder, count):
    "Write and read many scenes in this process; print after each tenth: what, how many, CPU seconds, megabytes."
    import tensorflow as tf
    begun, tenth = time.process_time(), count // 10
    list(tf.data.Dataset.range(9))                      # TensorFlow's own memory is there before anything is counted

    def tell(what, done):
        if done % tenth: return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
        print(json.dumps([what, done, time.process_time() - begun, megabytes]), flush=True)

    class Told(Example):
        def read(self):
            tell("written", self.image_id)
            return super().read()

    drawn = list(Scenes(count // 40, seed=2, world=World(size=64, min_height=16, max_people=4, empty_share=0.2)))
    examples = [Told(**{**vars(drawn[i % len(drawn)]), "image_id": i + 1}) for i in range(count)]
    config = RecordConfig(image_size=64, shard_images=count // 40)
    begun = time.process_time()
    write_records(Examples(examples, ("person",)), "train2017", folder, config, workers=1)
    boxes = sum(len(example.boxes) for example in examples)
    del examples
    batches, seen = RecordBatches(Records(folder, "train2017"), 40, shuffle_seed=1), []
    begun = time.process_time()
    for i in range(len(batches)):
        batch = batches.whole(i)
        seen += batch["image_id"].tolist()
        boxes -= int((batch["labels"] >= 0).sum())
        tell("read", len(seen))
    assert sorted(seen) == list(range(1, count + 1)) and seen != sorted(seen) and boxes == 0

@pytest.mark.slow
def test_40_000_scenes_written_and_read(tmp_path):
    "Memory stays flat, time grows linearly, each record comes once."
    program = "import sys; sys.path.insert(0, 'tests/data'); from test_tfrecord import soak; soak(sys.argv[1], 40_000)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for what in ("written", "read"):
        images, seconds, megabytes = np.array([numbers for name, *numbers in rows if name == what]).T
        print(f"{what}: {1e3 * seconds[-1] / images[-1]:.2f} ms each; {megabytes.round().astype(int).tolist()} MB")
        assert images.tolist() == [4000 * tenth for tenth in range(1, 11)]
        assert megabytes[4:].max() < megabytes[:4].max() + 25, "memory grows"
        first, second = seconds[4], seconds[-1] - seconds[4]
        assert second < 1.5 * first and first < 1.5 * second + 2, "time is not linear"

# --- whole trainings

TRAIN = """--epochs 3 --evaluate-every 3 --batch-size 4 --checkpoint-seconds 0 --precision float32 --image-size 64
 --strides 16 32 --level-areas 1024 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8
 --backbone-blocks 1 1 1 1 --backbone-groups 2 --pyramid-channels 16 --pyramid-groups 2 --tower-depth 1
 --tower-channels 16 --tower-groups 2 --gradient-accumulation-steps 2 --noise 0.1 --brightness 0.3
 --assign-nearest-if-empty""".split()

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    "A COCO folder of images that are not all square, and PNG records of it at the size that is trained."
    root = tmp_path_factory.mktemp("dataset")
    for split, count, seed in (("train2017", 22, 7), ("val2017", 6, 8)):
        examples = []
        for i, scene in enumerate(Scenes(count, seed, World(size=96, min_height=20, max_people=3, empty_share=0.1))):
            boxes = np.clip(scene.boxes - np.float32([0, 24] * 2), 0, np.float32([96, 72] * 2))
            kept = (boxes[:, 2:] > boxes[:, :2] + 4).all(1)
            cut = replace(scene, image=scene.image[24:], height=72, boxes=boxes[kept], labels=scene.labels[kept],
                          areas=None)
            examples.append(cut if i % 2 else scene)
        write_coco(root / "coco", split, examples, ("person",))
        config = RecordConfig(image_size=64, format="png", shard_images=5)
        write_records(read_dataset(root / "coco", split), split, root / "records", config)
    return root

def start_training(backend, *flags):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *map(str, flags)], cwd=ROOT, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def finish(process, code=0):
    output = process.communicate()[0]
    assert process.returncode == code, output[-3000:]

def stored_arrays(path):
    arrays = {}
    def keep(name, item):
        if isinstance(item, h5py.Dataset): arrays[name] = np.array(item)
    with h5py.File(path) as file: file.visititems(keep)
    return arrays

def read_metrics(run):
    path = run / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_run_from_records_killed_and_resumed_is_the_run_from_the_images(backend, dataset, tmp_path):
    "PNG records at the size that is trained, in one window: the same weights to the last bit."
    finish(start_training(backend, *TRAIN, "--data", dataset / "coco", "--out", tmp_path / "images"))
    run = start_training(backend, *TRAIN, "--records", dataset / "records", "--out", tmp_path / "records")
    while not read_metrics(tmp_path / "records") and run.poll() is None: time.sleep(0.01)
    run.kill()
    finish(run, -signal.SIGKILL)
    assert len(read_metrics(tmp_path / "records")) in (1, 2)
    finish(start_training(backend, "--resume", tmp_path / "records"))
    one, other = (stored_arrays(tmp_path / name / "last.weights.h5") for name in ("images", "records"))
    assert one.keys() == other.keys() and len(one) > 50
    for name in one: np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    for row, same in zip(read_metrics(tmp_path / "images"), read_metrics(tmp_path / "records"), strict=True):
        for name in ("loss", "cls", "ltrb", "centerness", "step"): assert row[name] == same[name]
    figures = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("images", "records")]
    for name in ("AP", "APs", "APm", "APl", "images", "boxes"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-4), name
