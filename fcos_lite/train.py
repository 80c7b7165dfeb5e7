"""The command line for long runs."""
import argparse
import sys
import time
from pathlib import Path
import numpy as np
from fcos_lite.batches import Batches
from fcos_lite.config import NETWORKS, RECIPES, Network, Recipe, add_flags, check, run_command, with_flags
from fcos_lite.evaluate import evaluate
from fcos_lite.formats import Examples, read_coco
from fcos_lite.model import load_weights
from fcos_lite.runs import Run
from fcos_lite.scenes import Scenes, World
from fcos_lite.training import Report, be_deterministic, build, make_optimizer

EPILOG = """examples:
  python -m fcos_lite.train                                        learn from scenes that the library draws
  python -m fcos_lite.train --coco DIR --image-size 256 --epochs 3 --out runs/first
DIR is laid out as COCO is: train2017/, val2017/, annotations/instances_{train2017,val2017}.json"""

def parser():
    p = argparse.ArgumentParser("python -m fcos_lite.train", description="Train an FCOS detector.", epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--coco", metavar="DIR", help="photographs in COCO's layout; without it, scenes are drawn")
    p.add_argument("--scenes", type=int, default=2000, metavar="N", help="scenes to learn from (default: %(default)s)")
    p.add_argument("--out", default=None, metavar="DIR", help="where the run is written (default: runs/ and the time)")
    p.add_argument("--force", action="store_true", help="overwrite an earlier run in --out")
    p.add_argument("--network", choices=NETWORKS, default="source", help="what is trained (default: %(default)s)")
    p.add_argument("--recipe", choices=RECIPES, default="scratch", help="how it learns (default: %(default)s)")
    p.add_argument("--weights", metavar="PATH", help="start from these weights")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of each part")
    p.add_argument("--seed", type=int, default=0, help="the run repeats bit for bit on a CPU (default: %(default)s)")
    p.add_argument("--precision", choices=("float32", "mixed_float16", "mixed_bfloat16"), help="of computation (default: mixed_float16 on a GPU, else float32)")
    p.add_argument("--evaluate-every", type=int, default=1, metavar="N", help="epochs between evaluations (default: %(default)s)")
    add_flags(p.add_argument_group("the network, instead of its preset"), Network)
    add_flags(p.add_argument_group("the recipe, instead of its preset"), Recipe)
    add_flags(p.add_argument_group("the scenes"), World, skip=("size", "class_names"))
    return p

def read_data(arguments, network, recipe):
    "The examples to learn from and those to validate on."
    if arguments.coco is None:
        world = with_flags(World(size=network.image_size, class_names=network.class_names), arguments)
        return Scenes(arguments.limit or arguments.scenes, seed=arguments.seed, world=world), Scenes(min(arguments.limit or 100, 100), seed=arguments.seed + 1_000_000, world=world)
    folder = Path(arguments.coco)
    train = read_coco(folder, "train2017", network.class_names, arguments.limit)
    if (folder / "annotations" / "instances_val2017.json").exists():
        return train, read_coco(folder, "val2017", network.class_names, arguments.limit)
    held = max(1, round(recipe.validation_share * len(train)))
    check(held < len(train), f"{folder}: {len(train)} pictures are too few to keep some for validation")
    return Examples(train[held:], train.class_names, train.report), Examples(train[:held], train.class_names)

def main(argv=None):
    arguments = parser().parse_args(argv)
    network, recipe = with_flags(NETWORKS[arguments.network], arguments), with_flags(RECIPES[arguments.recipe], arguments)
    train, validation = read_data(arguments, network, recipe)
    run = Run.create(arguments.out or time.strftime("runs/%Y-%m-%d-%H%M%S"), arguments.force)
    run.write_config(network, recipe, vars(arguments))
    say = run.say
    for part in (train, validation):
        if getattr(part, "report", None): say(str(part.report))
    be_deterministic(arguments.seed)
    batches = Batches(train, recipe.batch_size, network.image_size, shuffle_seed=arguments.seed, drop_last=True, pad_value=network.pad_value)
    check(len(batches), f"{len(train)} pictures are fewer than one batch of {recipe.batch_size}: give more, or a smaller --batch-size")
    steps = len(batches) * recipe.epochs
    model = build(network, recipe, arguments.seed, arguments.precision)
    if arguments.weights: load_weights(model, arguments.weights)
    model.compile(optimizer=make_optimizer(recipe, steps), jit_compile="auto")
    say(f"{model.count_params():,} parameters, {len(train)} pictures, {steps} steps of {recipe.batch_size}: {estimate(model, steps, recipe.batch_size)}")
    report = Report(run, validation, recipe, steps, arguments.evaluate_every)
    model.fit(batches, epochs=recipe.epochs, shuffle=False, verbose=1 if sys.stdout.isatty() else 0, callbacks=[report])
    load_weights(model, run.path / "best.weights.h5")
    result = evaluate(model, validation, run.path)
    say(", ".join(f"{k} {result[k]:.3f}" for k in ("AP", "AP50", "AP75", "source_map75")) + f" on {result['images']} pictures; all of it in {run.path}")

def estimate(model, steps, batch_size):
    "How long and how much, from one forward pass."
    picture = np.zeros((batch_size, model.network.image_size, model.network.image_size, 3), "uint8")
    model.predict_on_batch(picture)
    started = time.time()
    model.predict_on_batch(picture)
    hours = 3 * (time.time() - started) * steps / 3600
    numbers = sum(np.prod(layer.output.shape[1:]) for layer in model.fpn.layers) * batch_size
    return f"about {hours:.1f} hours and {numbers * 4 * 2 / 2**30:.1f} GB for activations"

if __name__ == "__main__": run_command(main)
