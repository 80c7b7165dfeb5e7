"""Records: what was written is what is read, by whichever reader, in an order that can be computed; and a damaged byte is never a different picture."""
import csv
import hashlib
import importlib.util
import json
import os
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
from fcos_lite.data import __main__ as data
from fcos_lite.data.batches import Batches, epoch_order
from fcos_lite.config import InputError
from fcos_lite.data.coco import Examples, write_coco
from fcos_lite.data.records import RecordConfig, crc32c, encode_record, decode_example, masked_crc, read_example, read_shard, encode_example, decode_record, write_example
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.data.tfrecord import load_index, shard_names, verify, write_records
from fcos_lite.data.streams import RecordBatches, Records, interleaved, stream, stream_order, shuffle_window

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(size=64, min_height=10, max_people=4, empty_share=0.2)
QUIET = dict(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

@pytest.fixture(scope="session")
def scenes():
    "Scenes of several shapes, one of them with a crowd region."
    found = []
    for i, scene in enumerate(Scenes(41, seed=5, world=WORLD)):
        height = (64, 48, 40)[i % 3]
        boxes = np.clip(scene.boxes - np.float32([0, 64 - height] * 2), 0, np.float32([64, height] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        found.append(replace(scene, image_id=10 * scene.image_id - 3, image=scene.image[64 - height:], height=height, boxes=boxes[kept], labels=scene.labels[kept], areas=None if i % 2 else scene.areas[kept]))
    crowd = next(i for i, scene in enumerate(found) if len(scene.labels) > 1)
    found[crowd] = replace(found[crowd], labels=np.where(np.arange(len(found[crowd].labels)) == 0, -2, 0).astype(np.int32))
    return Examples(found, ("person",))

@pytest.fixture(scope="session")
def kept(scenes, tmp_path_factory):
    "The same in JPEG and PNG, six in a shard: {format: folder}."
    root = tmp_path_factory.mktemp("kept")
    for kind in ("jpeg", "png"): write_records(scenes, "train2017", root / kind, RecordConfig(image_size=48, format=kind, shard_pictures=6), workers=1, progress=None)
    return {kind: root / kind for kind in ("jpeg", "png")}

def equal(one, other):
    assert set(one) == set(other)
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_array_equal(a, b, err_msg=name)

def print_of(batches):
    "A hash of batches, types and all."
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch): digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode() + np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()

# --- the bytes

@settings(**{**QUIET, "max_examples": 300})
@given(st.binary(max_size=3000))
def test_a_frame_gives_back_what_it_holds(data): assert decode_record(encode_record(data), "here") == data

@settings(**QUIET)
@given(st.binary(min_size=1, max_size=1500), st.binary(min_size=1, max_size=1500))
def test_the_check_sum_is_linear(a, b):
    n = min(len(a), len(b))
    a, b, zero = a[:n], b[:n], bytes(n)
    assert crc32c(bytes(x ^ y for x, y in zip(a, b))) == crc32c(a) ^ crc32c(b) ^ crc32c(zero)

def test_tensorflow_writes_the_same_frames_and_reads_ours(tmp_path):
    import tensorflow as tf
    rows = [os.urandom(n) for n in (0, 1, 255, 256, 257, 5000, 100_000)]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for row in rows: writer.write(row)
    assert (tmp_path / "theirs").read_bytes() == b"".join(map(encode_record, rows))
    assert [data for _, data in read_shard(tmp_path / "theirs")] == rows

features = st.dictionaries(st.text(min_size=1, max_size=8), st.binary(max_size=50) | st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(np.float32) | st.lists(st.integers(-2 ** 63, 2 ** 63 - 1), max_size=9).map(lambda v: np.array(v, np.int64)), max_size=6)

@settings(**QUIET)
@given(features)
def test_examples_are_those_of_tensorflow(written):
    import tensorflow as tf
    theirs = tf.train.Example.FromString(write_example(written))
    for found in (read_example(write_example(written), "here"), read_example(theirs.SerializeToString(deterministic=True), "here")):
        for name, value in written.items():
            if isinstance(value, bytes): assert found.get(name, b"") == value
            else: np.testing.assert_array_equal(found.get(name, np.zeros(0)), value.reshape(-1))
    kinds = {"bytes_list": bytes, "float_list": np.float32, "int64_list": np.int64}
    for name, feature in theirs.features.feature.items():
        kind = feature.WhichOneof("kind")
        assert isinstance(written[name], bytes) if kinds[kind] is bytes else written[name].dtype == kinds[kind]

@settings(**{**QUIET, "max_examples": 500})
@given(st.data())
def test_bytes_that_are_no_example_are_refused_or_read(data):
    whole = write_example({"image": b"abc" * 20, "boxes": np.float32([1, 2, 3, 4]), "labels": np.array([0, -2])})
    at = data.draw(st.integers(0, len(whole)))
    for change in (whole[:at] + data.draw(st.binary(max_size=9)) + whole[data.draw(st.integers(at, len(whole))):], data.draw(st.binary(max_size=60))):
        try: found = read_example(change, "people.tfrecord, record 3")
        except InputError as error: assert "people.tfrecord, record 3" in str(error)
        else: assert all(isinstance(value, (bytes, np.ndarray)) for value in found.values())
        try: decode_example(change, "people.tfrecord, record 3")
        except InputError as error: assert "people.tfrecord, record 3" in str(error)

# --- what is kept

def test_png_records_give_the_batches_of_the_pictures_themselves(scenes, kept):
    how = dict(batch_size=8, image_size=48, shuffle_seed=2)
    ours, theirs = Batches(Records(kept["png"], "train2017"), **how), Batches(scenes, **how)
    for i in range(len(theirs)): equal(ours[i], theirs[i])

@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_all_but_the_pixels_is_kept_and_finds_its_way_back(kind, scenes, kept):
    for one, example in zip(Records(kept[kind], "train2017"), scenes, strict=True):
        boxes, areas = one.in_photograph()
        assert one.image_id == example.image_id and (one.letterbox.width, one.letterbox.height) == (example.width, example.height)
        np.testing.assert_array_equal(one.labels, example.labels)
        np.testing.assert_allclose(boxes, example.boxes, atol=1e-3)
        np.testing.assert_allclose(areas, (example.boxes[:, 2:] - example.boxes[:, :2]).prod(1) if example.areas is None else example.areas, rtol=1e-5)
        assert one.read().shape == (48, 48, 3)

def test_plain_tf_data_reads_them(scenes, kept):
    import tensorflow as tf
    spec = {"boxes": tf.io.RaggedFeature(tf.float32, partitions=[tf.io.RaggedFeature.UniformRowLength(4)]), "labels": tf.io.RaggedFeature(tf.int64), "num_boxes": tf.io.FixedLenFeature([], tf.int64), "image_id": tf.io.FixedLenFeature([], tf.int64)}
    files = sorted(map(str, kept["jpeg"].glob("*.tfrecord")))
    batch = next(iter(tf.data.TFRecordDataset(files).batch(99).map(lambda data: tf.io.parse_example(data, spec))))
    assert batch["image_id"].numpy().tolist() == [e.image_id for e in scenes]
    assert batch["boxes"].row_lengths().numpy().tolist() == batch["num_boxes"].numpy().tolist() == [len(e.boxes) for e in scenes]
    assert batch["labels"].to_list() == [e.labels.tolist() for e in scenes]

# --- orders

@settings(**QUIET)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).map(tuple), st.integers(0, 3), st.integers(0, 3), st.integers(1, 40), st.integers(1, 9))
def test_an_epoch_reads_each_record_once_and_each_file_front_to_back(counts, seed, epoch, window, cycle):
    order = stream_order(counts, seed, epoch, window, cycle)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    opened = interleaved(counts, cycle)
    for shard, count in enumerate(counts): assert [place for s, place in opened if s == shard] == list(range(count))
    near = [len({s for s, _ in opened[i:i + 2 * cycle]}) for i in range(len(opened))]
    assert max(near, default=0) <= 2 * cycle + 1

def test_orders_differ_by_seed_and_epoch_and_span_shards():
    counts = (50,) * 20
    orders = {tuple(stream_order(counts, seed, epoch, 100, 4).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    for order in list(orders)[:4]: assert np.mean([len({i // 50 for i in order[b:b + 16]}) for b in range(0, 1000, 16)]) >= 3.5
    assert len({tuple(shuffle_window(30, seed, epoch, w)) for seed in range(5) for epoch in range(5) for w in range(5)}) == 125
    assert stream_order(counts, None, 3).tolist() == list(range(1000))

@settings(**{**QUIET, "max_examples": 15})
@given(st.integers(1, 9), st.none() | st.integers(0, 5), st.booleans(), st.integers(1, 20), st.integers(1, 5), st.data())
def test_both_readers_give_equal_batches_from_any_position(kept, batch_size, seed, drop_last, window, cycle, data):
    records = Records(kept[data.draw(st.sampled_from(["jpeg", "png"]))], "train2017")
    ours = RecordBatches(records, batch_size, window=window, cycle=cycle, shuffle_seed=seed, drop_last=drop_last)
    epoch, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, len(ours) - 1))
    theirs = stream(records, batch_size, seed, epoch, first, 2, drop_last=drop_last, window=window, cycle=cycle).as_numpy_iterator()
    for e, start in ((epoch, first), (epoch + 1, 0)):
        ours.epoch = e
        for i in range(start, len(ours)): equal(next(theirs), ours[i])
    assert next(theirs, None) is None

def test_the_stream_names_a_shard_that_is_another_one(kept, tmp_path):
    "One bit in the middle of a picture; TensorFlow would log that something is corrupt somewhere, and of a foreign shard nothing."
    shutil.copytree(kept["jpeg"], tmp_path / "records")
    records = Records(tmp_path / "records", "train2017")
    stream(records, 4)
    victim = sorted((tmp_path / "records").glob("*.tfrecord"))[2]
    whole = bytearray(victim.read_bytes())
    whole[len(whole) // 2] ^= 1
    victim.write_bytes(whole)
    with pytest.raises(InputError, match=victim.name): stream(records, 4)
    stream(records, 4, verified=False)
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name}: missing"): stream(records, 4, verified=False)

WITHOUT = """
import sys
sys.modules["tensorflow"] = None
sys.path.insert(0, "tests")
from test_records import print_of
from fcos_lite.data.streams import RecordBatches, Records
batches = RecordBatches(Records(sys.argv[1], "train2017"), 7, shuffle_seed=3, window=10, cycle=3)
batches.epoch = 2
print(print_of(batches[i] for i in range(len(batches))))
"""

@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_without_tensorflow_the_batches_are_the_same(kind, kept):
    ended = subprocess.run([sys.executable, "-c", WITHOUT, str(kept[kind])], cwd=ROOT, env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == print_of(stream(Records(kept[kind], "train2017"), 7, 3, epoch=2, window=10, cycle=3).as_numpy_iterator())

def test_an_epoch_by_fit_ends_and_the_next_order_begins(kept):
    batches = RecordBatches(Records(kept["png"], "train2017"), 8, shuffle_seed=1, window=9, cycle=2)
    batches.on_epoch_begin(); batches.on_epoch_end()
    assert batches.epoch == 1
    np.testing.assert_array_equal(batches.order(), stream_order(batches.examples.counts, 1, 1, 9, 2))

# --- damage

def facts(folder): return [(e.image_id, e.boxes.tolist(), e.labels.tolist(), e.image) for e in Records(folder, "train2017")]

@pytest.fixture
def copy(kept, tmp_path):
    "A copy to be broken, which gets its bytes back."
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in kept["jpeg"].iterdir(): (folder / file.name).write_bytes(file.read_bytes())
    return folder

def fuzz(copy, count):
    name = sorted(copy.glob("*.tfrecord"))[2].name
    whole, true = (copy / name).read_bytes(), facts(copy)
    refused = []
    @settings(**{**QUIET, "max_examples": count})
    @given(st.integers(0, len(whole) - 1), st.sampled_from(["cut", "flip", "put in", "take out", "swap"]), st.binary(min_size=1, max_size=20), st.integers(0, len(whole) - 1))
    def one(at, how, piece, other):
        changed = {"cut": whole[:at], "flip": whole[:at] + bytes([whole[at] ^ (piece[0] or 1)]) + whole[at + 1:], "put in": whole[:at] + piece + whole[at:], "take out": whole[:at] + whole[at + len(piece):],
                   "swap": whole[max(at, other):] + whole[min(at, other):max(at, other)] + whole[:min(at, other)]}[how]
        (copy / name).write_bytes(changed)
        try: assert facts(copy) == true
        except InputError as error:
            assert name in str(error) and len(str(error)) < 500
            assert any(name in trouble for trouble in verify(copy)[1])
            refused.append(how)
        else: assert changed == whole or not verify(copy)[1]
    one()
    (copy / name).write_bytes(whole)
    assert facts(copy) == true and len(refused) > 0.9 * count

def test_a_damaged_shard_is_refused_by_name_or_gives_the_same(copy): fuzz(copy, 100)

@pytest.mark.slow
def test_3000_damaged_shards(copy): fuzz(copy, 3000)

def test_a_foreign_shard_of_the_same_length_is_refused(copy):
    names = shard_names(load_index(copy, "train2017"))
    other = (copy / names[1]).read_bytes()
    rows = [data for _, data in read_shard(copy / names[0])]
    rows[2:4] = rows[3:1:-1]
    (copy / names[0]).write_bytes(b"".join(map(encode_record, rows)))
    assert "sound records, and not those" in verify(copy)[1][0] and names[0] in verify(copy)[1][0]
    with pytest.raises(InputError, match=names[0]): facts(copy)
    (copy / names[0]).write_bytes(other)
    with pytest.raises(InputError, match=names[0]): facts(copy)

def test_an_index_that_was_changed_is_refused_or_harmless(copy):
    path = copy / "train2017.json"
    whole, true = json.loads(path.read_text()), facts(copy)
    values = st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    @settings(**{**QUIET, "max_examples": 150})
    @given(st.data())
    def one(data):
        index = json.loads(json.dumps(whole))
        place = data.draw(st.sampled_from([index, index["storage"], index["shards"], *index["shards"].values()]))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
        path.write_text(json.dumps(index))
        try: found = facts(copy)
        except InputError as error: assert len(str(error)) < 800
        else: assert found == true
        try: verify(copy)
        except InputError: pass
    one()

# --- training

TRAIN = """--epochs 3 --evaluate-every 3 --batch-size 4 --checkpoint-seconds 0 --precision float32 --image-size 64 --strides 16 32 --level-areas 1024 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1
 --backbone-groups 2 --pyramid-channels 16 --pyramid-groups 2 --tower-depth 1 --tower-channels 16 --tower-groups 2 --gradient-accumulation-steps 2 --noise 0.1 --brightness 0.3 --assign-nearest-if-empty""".split()

@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    "A folder of photographs that are not square, and PNG records of it at the size that is trained."
    root = tmp_path_factory.mktemp("photographs")
    for part, count, seed in (("train2017", 22, 7), ("val2017", 6, 8)):
        found = []
        for i, scene in enumerate(Scenes(count, seed, World(size=96, min_height=20, max_people=3, empty_share=0.1))):
            boxes = np.clip(scene.boxes - np.float32([0, 24] * 2), 0, np.float32([96, 72] * 2))
            kept = (boxes[:, 2:] > boxes[:, :2] + 4).all(1)
            found.append(replace(scene, image=scene.image[24:], height=72, boxes=boxes[kept], labels=scene.labels[kept], areas=None) if i % 2 else scene)
        write_coco(root / "coco", part, found, ("person",))
    data.main(["write", "--coco", str(root / "coco"), "--out", str(root / "records"), "--format", "png", "--image-size", "64", "--shard-pictures", "5", "--workers", "1"])
    return root

def start(backend, *flags):
    "The command that trains."
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    return subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *map(str, flags)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(process, code=0):
    said = process.communicate()[0]
    assert process.returncode == code, said[-3000:]
    return said

def stored_arrays(path):
    "The arrays of a weights file."
    found = {}
    with h5py.File(path) as file: file.visititems(lambda name, item: found.update({name: np.array(item)}) if isinstance(item, h5py.Dataset) else None)
    return found

def rows(run): return list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) if (run / "metrics.csv").exists() else []

@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=[pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")])])
def test_trained_out_of_records_killed_and_resumed_it_is_the_network_of_the_photographs(backend, photographs, tmp_path):
    "Up to a window's 1,024 pictures, of PNG at the training's size: the weights are the same to the last bit, and what is measured is measured in the photographs."
    finish(start(backend, *TRAIN, "--coco", photographs / "coco", "--out", tmp_path / "coco"))
    run = start(backend, *TRAIN, "--records", photographs / "records", "--out", tmp_path / "records")
    while not rows(tmp_path / "records") and run.poll() is None: time.sleep(0.01)
    run.kill()
    finish(run, -signal.SIGKILL)
    assert len(rows(tmp_path / "records")) in (1, 2)
    assert "going on after step" in finish(start(backend, "--resume", tmp_path / "records"))
    arrays = [stored_arrays(tmp_path / name / "last.weights.h5") for name in ("coco", "records")]
    assert arrays[0].keys() == arrays[1].keys() and len(arrays[0]) > 50
    for name in arrays[0]: np.testing.assert_array_equal(arrays[0][name], arrays[1][name], err_msg=name)
    for one, other in zip(rows(tmp_path / "coco"), rows(tmp_path / "records"), strict=True):
        for name in ("loss", "cls", "reg", "ctr", "step"): assert one[name] == other[name]
        for name in ("val_loss", "AP", "AP50", "source_map75"): assert one[name] == other[name] or float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-4), name
    assert float(one["val_loss"]) > 0
    figures = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("coco", "records")]
    for name in ("AP", "APs", "APm", "APl", "images", "boxes"): assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-4), name

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_packs_are_trained_on_where_there_is_no_tensorflow(photographs, tmp_path):
    "Several pieces, on JAX, in a process that cannot import TensorFlow."
    data.main(["pack", "--coco", str(photographs / "coco"), "--out", str(tmp_path / "packs"), "--image-size", "64", "--max-mb", "0.02"])
    pieces = sorted((tmp_path / "packs").glob("*"))
    assert len([piece for piece in pieces if piece.name.startswith("train2017")]) > 1
    code = "import sys; sys.modules['tensorflow'] = None; from fcos_lite.train.__main__ import main; main(sys.argv[1:])"
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *TRAIN, "--coco", *map(str, pieces), "--out", str(tmp_path / "run")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(np.isfinite(float(row["loss"])) for row in rows(tmp_path / "run")) and json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 6

def test_a_record_that_broke_is_named_and_a_folder_without_a_shard_is_refused(photographs, tmp_path):
    folder = tmp_path / "records"
    shutil.copytree(photographs / "records", folder)
    first, second = sorted(folder.glob("train2017-*"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    batches = RecordBatches(Records(folder, "train2017"), 4, shuffle_seed=0)
    with pytest.warns(UserWarning, match=f"{first.name}, record 4 at byte .*: damaged"): found = [batches[i] for i in range(len(batches))]
    assert sorted(np.concatenate([batch["image_id"] for batch in found]).tolist()) == list(range(1, 23)) and list(batches.lost) == [5]
    grey = np.concatenate([batch["image"] for batch in found])[np.concatenate([batch["image_id"] for batch in found]) == 5]
    assert (grey == 114).all()
    with pytest.raises(InputError, match="1 of 22 pictures cannot be used"): batches.on_epoch_end()
    second.unlink()
    assert f"error: {second}: missing; run `write` again" in finish(start("tensorflow", *TRAIN, "--records", folder, "--out", tmp_path / "run"), 2)
    assert not (tmp_path / "run").exists()

def test_chunks_and_what_has_no_val_part(photographs, tmp_path):
    "Slices without gaps have an order of their own, each record once; what is kept aside is not learned."
    whole = Records(photographs / "records", "train2017")
    for first, last in ((0, 22), (3, 4), (4, 19), (10, 10)):
        chunk = whole[first:last]
        assert sum(chunk.here) == len(chunk) == last - first and sorted(stream_order(chunk.here, 1, 2, 4, 2).tolist()) == list(range(last - first))
    batches = RecordBatches(whole[4:19], 5, window=4, cycle=2, shuffle_seed=3)
    assert sorted(np.concatenate([batches[i]["image_id"] for i in range(3)]).tolist()) == list(range(5, 20))
    prints = {whole.fingerprint, whole[:9].fingerprint, whole[1:10].fingerprint, Records(photographs / "records", "val2017").fingerprint}
    assert len(prints) == 4 and Records(photographs / "records", "train2017").fingerprint == whole.fingerprint

# --- many

def soak(folder, count):
    "Writes and reads so many, in this process alone, and prints after each tenth what it took: what, pictures, CPU seconds, megabytes."
    begun = None
    def log(what, pictures): print(json.dumps([what, pictures, time.process_time() - begun, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20]), flush=True)
    import tensorflow as tf
    from fcos_lite.data.datasets import read_dataset
    examples = read_dataset(folder / "coco", "train2017")
    list(tf.data.Dataset.range(9))                              # TensorFlow's own memory is there before anything is counted
    storage, begun = RecordConfig(image_size=64, shard_pictures=count // 40), time.process_time()
    write_records(examples, "train2017", folder / "records", storage, workers=1, progress=lambda done, shards, pictures, _: log("written", pictures) if done % 4 == 0 else None)
    del examples
    for what in ("read", "streamed"):
        records = Records(folder / "records", "train2017")
        batches = RecordBatches(records, 40, shuffle_seed=1) if what == "read" else stream(records, 40, 1)
        seen, boxes, begun = [], 0, time.process_time()
        for number, batch in enumerate(map(batches.__getitem__, range(len(batches))) if what == "read" else batches.as_numpy_iterator(), 1):
            seen += batch["image_id"].tolist()
            boxes += int((batch["labels"] >= 0).sum())
            if number % (count // 400) == 0: log(what, len(seen))
        assert sorted(seen) == list(range(1, count + 1)) and seen != sorted(seen)
        print(json.dumps(["boxes", boxes]), flush=True)

def withstand(folder, count):
    "Scenes in so many files, a fortieth of them drawn; memory flat, time linear, counts exact."
    drawn = list(Scenes(count // 40, seed=2, world=World(size=64, min_height=16, max_people=4, empty_share=0.2)))
    write_coco(folder / "coco", "train2017", drawn, ("person",))
    page = folder / "coco/annotations/instances_train2017.json"
    document = json.loads(page.read_text())
    for copy in range(1, 40):
        for scene in drawn: os.link(folder / f"coco/train2017/{scene.image_id:012d}.jpg", folder / f"coco/train2017/{scene.image_id + copy * len(drawn):012d}.jpg")
    moved = lambda entry, name, copy: {**entry, name: entry[name] + copy * len(drawn)}
    images = [{**moved(entry, "id", copy), "file_name": f"{entry['id'] + copy * len(drawn):012d}.jpg"} for copy in range(40) for entry in document["images"]]
    annotations = [{**moved(entry, "image_id", copy), "id": entry["id"] + copy * len(document["annotations"])} for copy in range(40) for entry in document["annotations"]]
    page.write_text(json.dumps({**document, "images": images, "annotations": annotations}))
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests'); import test_records, pathlib; test_records.soak(pathlib.Path({str(folder)!r}), {count})"],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [boxes for what, boxes, *_ in lines if what == "boxes"] == [len(annotations)] * 2
    for what in ("written", "read", "streamed"):
        pictures, seconds, megabytes = np.array([numbers for name, *numbers in lines if name == what]).T
        print(f"{what}: {pictures[-1]:,.0f} pictures, {seconds[-1]:.1f} s of a processor, {1e3 * seconds[-1] / count:.2f} ms each; memory after each tenth {megabytes.round().astype(int).tolist()} MB")
        assert pictures.tolist() == [count // 10 * tenth for tenth in range(1, 11)]
        assert megabytes[4:].max() < megabytes[:4].max() + 25, "memory grows"
        assert seconds[-1] - seconds[4] < 1.5 * seconds[4] and seconds[4] < 1.5 * (seconds[-1] - seconds[4]) + 2, "time is not linear"

@pytest.mark.slow
def test_40_000_scenes_written_and_read(tmp_path): withstand(tmp_path, 40_000)
