"""The whole training loop, input to metrics, against the bare forward and backward pass, on Keras' backend.

With TensorFlow also against the reference's loop. Prints one line of JSON."""
import argparse
import json
import os
import statistics
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

TINY = ModelConfig(stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1),
                   backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16,
                   tower_groups=4)

def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def in_turns(functions, rounds):
    "The median seconds of each of some functions, called in turns."
    return [statistics.median(column) for column in zip(*rows_in_turns(functions, rounds))]

def rows_in_turns(functions, rounds): return [[timed(function) for function in functions] for _ in range(rounds)]

def photographs(folder, count, size):
    "Write scenes as JPEG files, and return Examples that read them."
    examples = []
    for i, scene in enumerate(Scenes(count, 0, World(size=size))):
        path = folder / f"{i}.jpg"
        cv2.imwrite(str(path), scene.read()[:, :, ::-1])
        examples.append(replace(scene, image=path))
    return examples

def bare_pass(model, image):
    "Return a function that runs so many compiled forward and backward passes, on the mean of all outputs."
    if keras.backend.backend() == "jax":
        import jax
        import jax.numpy as jnp
        frozen = [v.value for v in model.non_trainable_variables]
        def scalar(weights):
            outputs, _ = model.stateless_call(weights, frozen, image)
            return sum(jnp.mean(value) for value in outputs.values())
        step = jax.jit(jax.grad(scalar))
        def run(count):
            for _ in range(count): gradients = step([v.value for v in model.trainable_variables])
            jax.block_until_ready(gradients)
    else:
        import tensorflow as tf
        @tf.function(autograph=False)
        def step(image):
            with tf.GradientTape() as tape:
                scalar = tf.add_n([tf.reduce_mean(value) for value in model(image).values()])
            return [tf.reduce_sum(gradient) for gradient in tape.gradient(scalar, model.trainable_variables)]
        def run(count):
            for _ in range(count): [gradient.numpy() for gradient in step(image)]
    return run

def whole_loop(config, batch_size, steps, rounds, against_reference):
    "Return images per second: of `fit` with all that belongs to it, of the bare pass, of the reference's loop."
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        folder, recipe = Path(folder), SCRATCH_RECIPE.change(batch_size=batch_size)
        examples = photographs(folder, batch_size * steps, config.image_size)
        batches = Batches(examples, batch_size, config.image_size, shuffle_seed=0)
        model = build_model(config, recipe, precision="float32")
        compile_for_training(model, recipe, steps * (rounds + 3))
        image, _ = batches[0]
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf
            image = tf.constant(image)
        bare = bare_pass(model, image)
        def fit(): model.fit(batches, epochs=1, shuffle=False, verbose=0)
        functions = [fit, lambda: bare(steps)]
        fit()                                               # the first call compiles
        bare(1)
        rows = rows_in_turns(functions, rounds)
        if against_reference:
            from reference_loop import ReferenceLoop, write_records
            write_records(folder / "records", examples)
            untrained = build_model(config, recipe, precision="float32")
            loop = ReferenceLoop(untrained, folder / "records", batch_size, nowhere)
            loop.run(1)
            reference = timed(lambda: loop.run(9)) / 9      # nine micro-batches are a turn of its counter
            rows.append([timed(function) for function in functions])
    # of a step; the best of each, because what else a machine does only adds
    fit_seconds, bare_seconds = (min(column) / steps for column in zip(*rows))
    def speed(seconds): return round(batch_size / seconds, 3)
    row = {"batch_size": batch_size, "steps": steps, "rounds": len(rows), "images_per_second": speed(fit_seconds),
           "bare_images_per_second": speed(bare_seconds), "ratio": round(fit_seconds / bare_seconds, 3),
           "ratio_of_medians": round(float(np.divide(*np.median(rows, axis=0))), 3)}
    if against_reference:
        used = 8 / 9                                        # of its micro-batches; the ninth is thrown away
        row |= {"document_images_per_second": speed(reference),
                "document_used_images_per_second": round(speed(reference) * used, 3),
                "document_over_ours": round(reference / fit_seconds, 3),
                "document_over_ours_used": round(reference / fit_seconds / used, 3)}
    return row

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=9, help="micro-batches in one measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements (default: %(default)s)")
    parser.add_argument("--document", action="store_true", help="the reference's loop too (TensorFlow)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    a = parser.parse_args()
    config = replace(TINY if a.tiny else REFERENCE, image_size=a.image_size)
    print(json.dumps(whole_loop(config, a.batch_size, a.steps, a.rounds, a.document)))

if __name__ == "__main__": main()
