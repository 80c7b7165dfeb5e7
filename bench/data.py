"""Images a second, ready for the training step: from our records, from the reference's, and from the JPEG files themselves.

Also against the time of the step, and records written. The images are scenes of 640 x 480 with grain in them, for a drawn
surface is too easy to compress. Prints one line of JSON.
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
import reference_loop as reference
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE
from fcos_lite.data.batches import count_max_boxes, letterboxed_example, pad_boxes
from fcos_lite.data.example import Examples
from fcos_lite.data.letterbox import Letterbox
from fcos_lite.data.tfrecord import RecordBatches, RecordConfig, Records, write_records
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.trainer import build_model, compile_for_training
from training import TINY, in_turns

def write_images(folder, count): # Examples
    "Write grainy scenes of 640 x 480 as JPEG files."
    folder.mkdir()
    rng, examples = np.random.default_rng(0), []
    for scene in Scenes(count, 0, World(size=640)):
        path, image = folder / f"{scene.image_id}.jpg", scene.read()[160:] + rng.normal(0, 4, (480, 640, 1))
        cv2.imwrite(str(path), np.clip(image, 0, 255).astype("uint8")[:, :, ::-1])
        boxes = np.clip(scene.boxes - np.float32([0, 160] * 2), 0, np.float32([640, 480] * 2))
        kept = (boxes[:, 2:] - boxes[:, :2] > 4).all(1)
        labels = scene.labels[kept]
        examples.append(replace(scene, image=path, height=480, boxes=boxes[kept], labels=labels, areas=None))
    return Examples(examples, ("person",))

def batches_of_files(examples, size, batch_size, passes):
    "Read the JPEG files by tf.data, as tutorials do: decoded and letterboxed in every epoch."
    max_boxes, rows = count_max_boxes(examples), []
    for example in examples:
        fit = Letterbox.fit(example.width, example.height, size)
        rows.append((str(example.image), *pad_boxes(fit.boxes_in(example.boxes), example.labels, max_boxes)))
    def load(path, boxes, labels):
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3)
        height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
        scale = size / tf.maximum(height, width)
        height, width = (tf.cast(tf.round(side * scale), tf.int32) for side in (height, width))
        image = tf.cast(tf.image.resize(image, (height, width)), tf.uint8) - 114   # bars are 0 until 114 comes back
        image = tf.image.pad_to_bounding_box(image, (size - height) // 2, (size - width) // 2, size, size) + 114
        return {"image": image, "boxes": boxes, "labels": labels}
    data = tf.data.Dataset.from_tensor_slices(tuple(map(np.stack, zip(*rows)))).shuffle(len(rows), seed=0)
    data = data.repeat(passes).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)

def drain(dataset):
    "Return a function that goes once through a tf.data.Dataset."
    def run():
        for batch in dataset: pass
    return run

def one_thread(batches, passes):
    "Return a function that goes so many times through Batches."
    def run():
        for i in range(passes * len(batches)): batches[i % len(batches)]
    return run

def measure(config, batch_size, steps, passes, rounds):
    "Images a second of each way, in turns, and the fraction of a training step that ours takes."
    size, count = config.image_size, batch_size * steps
    recipe = SCRATCH_RECIPE.change(batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        examples = write_images(folder / "files", count)
        write_records(examples, "train2017", folder / "records", RecordConfig(size, shard_images=max(1, count // 4)))
        reference.write_records(folder / "reference", [letterboxed_example(example, size) for example in examples])
        records = RecordBatches(Records(folder / "records", "train2017"), batch_size, shuffle_seed=0)
        model = build_model(config, recipe, precision="float32")
        compile_for_training(model, recipe, 1000)
        image, truth = records[0]
        few, written = examples[:max(2, count // 8)], iter(range(10 ** 6))
        def write_ours():
            write_records(few, "train2017", folder / f"again{next(written)}", RecordConfig(size), workers=1)
        def write_reference():
            squares = [letterboxed_example(example, size) for example in few]
            reference.write_records(folder / f"again{next(written)}", squares)
        ways = {
            "records": one_thread(records, passes),
            "reference": drain(reference.read_records(folder / "reference", batch_size).take(passes * steps)),
            "files": drain(batches_of_files(examples, size, batch_size, passes)),
            "step": lambda: model.train_on_batch(image, truth),
            "write": write_ours,
            "write_reference": write_reference}
        for way in ways.values(): way()                      # once, for what is compiled
        seconds = dict(zip(ways, in_turns(ways.values(), rounds)))
    images = dict.fromkeys(ways, passes * count) | {"step": batch_size, "write": len(few), "write_reference": len(few)}
    speed = {name: images[name] / seconds[name] for name in ways}
    return {"batch_size": batch_size, "images": count,
            "per_second": {name: round(value, 2) for name, value in speed.items()},
            "step_seconds": round(seconds["step"], 4),
            "records_over_reference": round(speed["records"] / speed["reference"], 3),
            "records_over_files": round(speed["records"] / speed["files"], 3),
            "share_of_step": round(speed["step"] / speed["records"], 4),
            "write_over_reference": round(speed["write"] / speed["write_reference"], 3)}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=24, help="batches in one measurement (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="epochs in one measurement, for tf.data takes a while to begin")
    parser.add_argument("--rounds", type=int, default=5, help="measurements (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    options = parser.parse_args()
    config = replace(TINY if options.tiny else REFERENCE, image_size=options.image_size)
    print(json.dumps(measure(config, options.batch_size, options.steps, options.passes, options.rounds)))

if __name__ == "__main__": main()
