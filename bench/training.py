"""The whole training loop, input to metrics, against the bare forward and backward pass, on the backend of KERAS_BACKEND; with TensorFlow also against the document's loop. Prints one line of JSON."""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import cv2
import keras
import numpy as np
from fcos_lite.data.batches import Batches
from fcos_lite.config import SCRATCH_RECIPE, REFERENCE, ModelConfig
from fcos_lite.scenes.scenes import Scenes, World
from fcos_lite.train.trainer import build_model, compile_for_training

TINY = ModelConfig(stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
               tower_depth=1, tower_channels=16, tower_groups=4)

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def in_turns(functions, rounds):
    "The median seconds of each of some functions, called in turns."
    return [statistics.median(column) for column in zip(*rows_in_turns(functions, rounds))]

def rows_in_turns(functions, rounds): return [[timed(function) for function in functions] for _ in range(rounds)]

def photographs(folder, count, size):
    "Scenes as JPEG files, and the same as Examples that read them."
    found = []
    for i, scene in enumerate(Scenes(count, 0, World(size=size))):
        path = folder / f"{i}.jpg"
        cv2.imwrite(str(path), scene.read()[:, :, ::-1])
        found.append(replace(scene, image=path))
    return found

def bare_pass(model, image):
    "A function that runs so many compiled forward and backward passes of the network alone, on a scalar made of all its outputs."
    if keras.backend.backend() == "jax":
        import jax
        import jax.numpy as jnp
        frozen = [v.value for v in model.non_trainable_variables]
        def scalar(weights): return sum(jnp.mean(value) for value in model.stateless_call(weights, frozen, image)[0].values())
        step = jax.jit(jax.grad(scalar))
        def run(count):
            for _ in range(count): gradients = step([v.value for v in model.trainable_variables])
            jax.block_until_ready(gradients)
    else:
        import tensorflow as tf
        @tf.function(autograph=False)
        def step(image):
            with tf.GradientTape() as tape: scalar = tf.add_n([tf.reduce_mean(value) for value in model(image).values()])
            return [tf.reduce_sum(gradient) for gradient in tape.gradient(scalar, model.trainable_variables)]
        def run(count):
            for _ in range(count): [gradient.numpy() for gradient in step(image)]
    return run

def whole_loop(network, batch_size, steps, rounds, against_document):
    "Images per second of `fit` with input, augmentation and metrics, of the bare pass, and of the document's loop."
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        folder, recipe = Path(folder), SCRATCH_RECIPE.change(batch_size=batch_size)
        examples = photographs(folder, batch_size * steps, network.image_size)
        batches = Batches(examples, batch_size, network.image_size, shuffle_seed=0)
        model = build_model(network, recipe, precision="float32")
        compile_for_training(model, steps * (rounds + 3))
        image = batches[0]["image"]
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf
            image = tf.constant(image)
        bare = bare_pass(model, image)
        functions = [lambda: model.fit(batches, epochs=1, shuffle=False, verbose=0), lambda: bare(steps)]
        functions[0]()                                      # the first call compiles
        bare(1)
        rows = rows_in_turns(functions, rounds)
        if against_document:
            from document_loop import DocumentLoop, write_records
            write_records(folder / "records", examples)
            loop = DocumentLoop(build_model(network, recipe, precision="float32"), folder / "records", batch_size, nowhere)
            loop.run(1)
            document = timed(lambda: loop.run(9)) / 9       # nine micro-batches are a turn of its counter
            rows.append([timed(function) for function in functions])
    fit, bare_seconds = (min(column) / steps for column in zip(*rows))        # of a step; the best of each, for what else a machine does only adds
    speed = lambda seconds: round(batch_size / seconds, 3)
    row = {"batch_size": batch_size, "steps": steps, "rounds": len(rows), "images_per_second": speed(fit), "bare_images_per_second": speed(bare_seconds), "ratio": round(fit / bare_seconds, 3),
           "ratio_of_medians": round(float(np.divide(*np.median(rows, axis=0))), 3)}
    if against_document:
        used = 8 / 9                                        # of its micro-batches; the ninth is thrown away
        row |= {"document_images_per_second": speed(document), "document_used_images_per_second": round(speed(document) * used, 3),
                "document_over_ours": round(document / fit, 3), "document_over_ours_used": round(document / fit / used, 3)}
    return row

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=9, help="micro-batches in one measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements (default: %(default)s)")
    parser.add_argument("--document", action="store_true", help="the document's loop too (TensorFlow)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    a = parser.parse_args()
    print(json.dumps(whole_loop(replace(TINY if a.tiny else REFERENCE, image_size=a.image_size), a.batch_size, a.steps, a.rounds, a.document)))

if __name__ == "__main__": main()
