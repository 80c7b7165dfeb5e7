"""Pictures ready for the training step: out of our records, out of the document's, and out of the JPEG files themselves; against the time of the step. And records written. Prints one line of JSON.

The photographs are scenes of 640 x 480 with grain in them, for a drawn surface is too easy to compress.
"""
import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import cv2
import numpy as np
import tensorflow as tf
from document_loop import read_records as read_documents_records, write_records as write_documents_records
from fcos_lite.data.batches import count_max_boxes, pad_boxes, letterboxed_example
from fcos_lite.config import SCRATCH_RECIPE, REFERENCE
from fcos_lite.data.coco import Examples
from fcos_lite.data.images import Letterbox
from fcos_lite.data.records import RecordConfig
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.data.tfrecord import write_records, write_shard
from fcos_lite.data.streams import RecordBatches, Records, stream
from fcos_lite.train.trainer import build_model, compile_for_training
from training import TINY, in_turns

def photographs(folder, count):
    "Grainy scenes of 640 x 480 as JPEG files, and Examples that read them."
    folder.mkdir()
    rng, found = np.random.default_rng(0), []
    for scene in Scenes(count, 0, World(size=640)):
        path, image = folder / f"{scene.image_id}.jpg", scene.read()[160:] + rng.normal(0, 4, (480, 640, 1))
        cv2.imwrite(str(path), np.clip(image, 0, 255).astype("uint8")[:, :, ::-1])
        boxes = np.clip(scene.boxes - np.float32([0, 160] * 2), 0, np.float32([640, 480] * 2))
        kept = (boxes[:, 2:] - boxes[:, :2] > 4).all(1)
        found.append(replace(scene, image=path, height=480, boxes=boxes[kept], labels=scene.labels[kept], areas=None))
    return Examples(found, ("person",))

def out_of_files(examples, size, batch_size, passes):
    "The JPEG files themselves, as tutorials read them: decoded and letterboxed in every epoch."
    most, rows = count_max_boxes(examples), []
    for example in examples:
        fit = Letterbox.fit(example.width, example.height, size)
        rows.append((str(example.image), *pad_boxes(fit.boxes_in(example.boxes), example.labels, most)))
    def load(path, boxes, labels):
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3)
        height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
        scale = size / tf.maximum(height, width)
        height, width = (tf.cast(tf.round(side * scale), tf.int32) for side in (height, width))
        image = tf.cast(tf.image.resize(image, (height, width)), tf.uint8) - 114   # the bars are zeros until 114 comes back
        return {"image": tf.image.pad_to_bounding_box(image, (size - height) // 2, (size - width) // 2, size, size) + 114, "boxes": boxes, "labels": labels}
    data = tf.data.Dataset.from_tensor_slices(tuple(map(np.stack, zip(*rows)))).shuffle(len(rows), seed=0).repeat(passes)
    return data.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size).prefetch(tf.data.AUTOTUNE)

def through(batches):
    "A function that goes once through batches, which must be whole."
    def run():
        for batch in batches: image = batch["image"] if isinstance(batch, dict) else batch[0]
        assert image.shape[1] == image.shape[2] and image.shape[3] == 3
    return run

def one_thread(batches, passes):
    "The same, without keeping them."
    def run():
        for i in range(passes * len(batches)): batches[i % len(batches)]
    return run

def measure(network, batch_size, steps, passes, rounds):
    "Pictures a second of each way, in turns, and the shares of a training step that ours take."
    size, count = network.image_size, batch_size * steps
    storage, recipe = RecordConfig(image_size=size), SCRATCH_RECIPE.change(batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        examples = photographs(folder / "files", count)
        write_records(examples, "train2017", folder / "records", replace(storage, shard_pictures=max(1, count // 4)), workers=1, progress=None)
        squares = [letterboxed_example(example, size) for example in examples]
        write_documents_records(folder / "document", squares)
        records = Records(folder / "records", "train2017")
        plain = RecordBatches(records, batch_size, shuffle_seed=0)
        model = build_model(network, recipe, precision="float32")
        compile_for_training(model, 1000)
        batch = plain[0]
        few = examples[:max(2, count // 8)]
        ways = {"stream": through(stream(records, batch_size, 0, epochs=passes)), "document": through(read_documents_records(folder / "document", batch_size).take(passes * steps)),
                "files": through(out_of_files(examples, size, batch_size, passes)), "plain": one_thread(plain, passes), "step": lambda: model.train_on_batch(batch),
                "write": lambda: write_shard(folder / "again.tfrecord", few, storage),
                "write_document": lambda: write_documents_records(folder / "again", [letterboxed_example(example, size) for example in few])}
        for way in ways.values(): way()                      # once, for what is compiled
        seconds = dict(zip(ways, in_turns(ways.values(), rounds)))
    speed = {name: (len(few) if name.startswith("write") else batch_size if name == "step" else passes * count) / seconds[name] for name in ways}
    share = {name: speed["step"] / speed[name] for name in ("stream", "plain")}
    return {"batch_size": batch_size, "pictures": count, "per_second": {name: round(value, 2) for name, value in speed.items()}, "step_seconds": round(seconds["step"], 4),
            "stream_over_document": round(speed["stream"] / speed["document"], 3), "stream_over_files": round(speed["stream"] / speed["files"], 3), "plain_over_document": round(speed["plain"] / speed["document"], 3),
            "share_of_step": {name: round(value, 4) for name, value in share.items()}, "write_over_document": round(speed["write"] / speed["write_document"], 3)}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=24, help="batches in one measurement (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="epochs in one measurement, for tf.data takes a while to begin (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    a = parser.parse_args()
    print(json.dumps(measure(replace(TINY if a.tiny else REFERENCE, image_size=a.image_size), a.batch_size, a.steps, a.passes, a.rounds)))

if __name__ == "__main__": main()
