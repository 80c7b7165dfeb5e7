"""A run killed at any moment and resumed is the run that was never killed, bit for bit."""
import errno
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = {"short": 2, "long": 20}
BATCHES, EVERY = 4, 2 # micro-batches of an epoch, and between two checkpoints; an update takes 3
PAUSE = 0.02 # seconds after a line, so that a kill can meet what is going on

def tell(what):
    print(what, flush=True)
    time.sleep(PAUSE)

class Slow:
    "A file that says when a checkpoint is half written."
    def __init__(self, path, mode):
        self.file, self.tells = open(path, mode), "checkpoint" in str(path)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def flush(self): self.file.flush()
    def fileno(self): return self.file.fileno()
    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        if self.tells: tell("writing")
        self.file.write(data[len(data) // 2:])

class Renames:
    "The module os, whose `replace` says when a checkpoint has its name."
    def __getattr__(self, name): return getattr(os, name)
    def replace(self, *paths):
        os.replace(*paths)
        if "checkpoint" in str(paths[1]): tell("renamed")

def train(folder, epochs, compiled):
    """A run in a process of its own: says what it does, line by line, and pauses, also while it writes.

    A long one is compiled, with an EMA and loss scaling; a short one is eager, which saves more time than it costs."""
    import keras
    from fcos_lite import files
    from fcos_lite.config import SCRATCH_RECIPE, ModelConfig
    from fcos_lite.data.batches import Batches
    from fcos_lite.scenes.scenes import Scenes, World
    from fcos_lite.train import checkpoint as checkpoints
    from fcos_lite.train.run import Run
    from fcos_lite.train.schedule import WarmupCosine
    from fcos_lite.train.trainer import build_model, set_deterministic

    class Rows(keras.callbacks.Callback):
        "A row an epoch, and counters."
        counters = "best", "waited", "steps"
        def __init__(self):
            super().__init__()
            self.best, self.waited, self.steps = -np.inf, 0, 0
        def on_train_batch_begin(self, batch, logs=None): tell("step")
        def on_train_batch_end(self, batch, logs=None): self.steps += 1
        def on_epoch_end(self, epoch, logs=None):
            self.best, self.waited = max(self.best, -logs["loss"]), self.waited + 1
            losses = {name: float(logs[name]) for name in ("loss", "cls", "ltrb", "centerness")}
            run.write_row({"epoch": epoch + 1, "step": self.steps, "val_loss": self.waited, "AP": self.best, **losses})
            tell("row")

    files.open, files.os, checkpoints.os = Slow, Renames(), Renames()
    set_deterministic(0)
    config = ModelConfig(
        image_size=32, strides=(16, 32), stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8),
        backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1,
        tower_channels=16, tower_groups=4)
    recipe = SCRATCH_RECIPE.change(level_areas=(256,), batch_size=2, gradient_accumulation_steps=3, epochs=epochs)
    scenes = list(Scenes(2 * BATCHES + 1, 1, World(size=32, min_height=10, max_height=30, max_people=2)))
    batches = Batches(scenes, recipe.batch_size, config.image_size, shuffle_seed=0, drop_last=True)
    model = build_model(config, recipe, seed=0)
    ema = {"use_ema": True, "ema_momentum": 0.9} if compiled else {}
    schedule = WarmupCosine(1e-3, 1e-5, epochs * BATCHES, 2)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.05, global_clipnorm=10.0,
                                       gradient_accumulation_steps=3, **ema)
    if compiled: optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0, dynamic_growth_steps=4)
    model.compile(optimizer=optimizer, run_eagerly=not compiled, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    run = Run(folder)
    run.path.mkdir(exist_ok=True)
    identity = checkpoints.run_identity(config, recipe, scenes, seed=0)
    checkpoint = checkpoints.Checkpoint(folder, model, batches, identity, every_steps=EVERY, log=tell)
    try: checkpoint.fit(epochs, [Rows()], verbose=0)
    except checkpoints.Stopped as stopped: sys.exit(stopped.code)
    np.savez(run.path / "end.npz", **checkpoints.model_state(model))

def life(folder, kind, death=None):
    """Run to the end, or until the output has had `death[0]` for the `death[1]`th time, and a moment more.

    Returns the exit code, the lines of the output, and the log."""
    environment, log = {**os.environ, "PYTHONPATH": str(ROOT)}, folder.with_suffix(".log")
    command = [sys.executable, __file__, str(folder), kind]
    with open(log, "w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                                    env=environment) as process:
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if not death or said[-1] != death[0] or said.count(death[0]) != death[1]: continue
            time.sleep(death[2])
            process.send_signal(death[3])
            if death[3] == signal.SIGKILL: break
    return process.returncode, said, log.read_text()

def complete(folder, kind, deaths=()):
    "A run that dies these deaths, one after the other, and comes to its end; what each life said."
    lives = []
    for death in [*deaths, None]:
        code, said, log = life(folder, kind, death)
        expected = 0 if death is None else -signal.SIGKILL if death[3] == signal.SIGKILL else 130
        assert code == expected, f"{death}: exit code {code}\n{said}\n{log[-3000:]}"
        lives.append(said)
    return lives

def assert_same(folder, other, kind):
    "Every array of two finished runs, and every number that they wrote down."
    from fcos_lite.train.checkpoint import LAST, read_checkpoint
    with np.load(folder / "end.npz") as ours, np.load(other / "end.npz") as theirs:
        assert ours.files == theirs.files and len(ours.files) > 300
        kinds = {"kernel", "state", "momentum", "velocity", "accumulator", "iteration", "total"}
        if kind == "long": kinds |= {"average", "scale"}
        assert {name.split("/")[2] for name in ours.files} >= kinds
        different = [name for name in ours.files if not np.array_equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} arrays differ: {different[:5]}"
    (about, arrays), (their_about, their_arrays) = read_checkpoint(folder / LAST), read_checkpoint(other / LAST)
    assert about == their_about and all(np.array_equal(arrays[name], their_arrays[name]) for name in their_arrays)
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert about["counters"]["Rows"]["steps"] == EPOCHS[kind] * BATCHES
    assert (folder / "metrics.csv").read_text().count("\n") == EPOCHS[kind] + 1

@pytest.fixture(scope="module")
def in_peace(tmp_path_factory):
    "The same run, never killed: the short or the long one, made when it is first asked for."
    made = {}
    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("peace") / "run"
            complete(made[kind], kind)
        return made[kind]
    return run

def moments(count, seed):
    "Random moments: while a checkpoint is written, after an epoch's row, in a step, between two renames."
    rng = random.Random(seed)
    kinds = ["writing", "row", "step", *rng.choices(("step", "writing", "renamed", "row"), k=count - 3)]
    counts = [1 if kind == "row" else rng.randint(1, 3) for kind in kinds]
    delays = [rng.uniform(0, 0.1) if kind == "step" else 0 for kind in kinds]
    return [(*moment, signal.SIGKILL) for moment in zip(kinds, counts, delays)]

def test_three_kills_change_nothing(tmp_path, in_peace):
    deaths = moments(3, seed=0)
    lives = complete(tmp_path / "run", "short", deaths)
    assert [life[-1] for life in lives[:3]] == [death[0] for death in deaths]     # each died where it was meant to
    assert_same(tmp_path / "run", in_peace("short"), "short")

def test_ctrl_c_ends_after_the_step_with_all_saved(tmp_path, in_peace):
    run, steps = tmp_path / "run", EPOCHS["short"] * BATCHES
    stopped, finished = complete(run, "short", [("step", 7, 0, signal.SIGINT)])
    assert stopped.count("step") == 7
    assert stopped[-1] == f"stopped after step 7, all saved; to go on: fcos-lite train --resume {run}"
    assert "going on after step 7: epoch 2, batch 4 of 4" in finished and finished.count("step") == steps - 7
    assert_same(run, in_peace("short"), "short")

@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path, in_peace):
    lives = complete(tmp_path / "run", "long", moments(20, seed=2))
    assert len(lives) == 21 and sum(life.count("step") for life in lives) > EPOCHS["long"] * BATCHES
    assert_same(tmp_path / "run", in_peace("long"), "long")

@pytest.mark.slow
def test_sigterm_is_heard_too(tmp_path, in_peace):
    complete(tmp_path / "run", "long", [("step", 6, 0, signal.SIGTERM)])
    assert_same(tmp_path / "run", in_peace("long"), "long")

def test_signals_are_given_back_and_the_second_interrupts():
    from fcos_lite.train.checkpoint import _StopRequest
    before, wishes = signal.getsignal(signal.SIGINT), _StopRequest()
    with wishes:
        os.kill(os.getpid(), signal.SIGINT)
        assert wishes.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before

def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from fcos_lite import files
    from fcos_lite.config import InputError
    from fcos_lite.train.checkpoint import PREVIOUS, latest_checkpoint, read_checkpoint, serialize, write_checkpoint
    def full(number): raise OSError(errno.ENOSPC, "No space left on device")
    write_checkpoint(tmp_path, serialize({"number": 1}, {}))
    monkeypatch.setattr(files.os, "fsync", full)
    for number in (2, 3):
        with pytest.raises(InputError, match="No space left on device.*make room.*--resume"):
            write_checkpoint(tmp_path, serialize({"number": number}, {"zeros": np.zeros(10 ** 5)}))
        assert [path.name for path in tmp_path.iterdir()] == [PREVIOUS]
        assert read_checkpoint(latest_checkpoint(tmp_path))[0]["number"] == 1

def on_jax(folder):
    "Under JAX, whose `fit` keeps its state outside the variables: a model stopped in an epoch and resumed, or not."
    import keras
    from keras import layers
    from fcos_lite.train import checkpoint as checkpoints
    assert keras.backend.backend() == "jax"

    class Numbers(keras.utils.PyDataset):
        "Five batches; the order is no matter here."
        epoch, begun = 0, False
        def __len__(self): return 5
        def __getitem__(self, index): return np.float32([[index, 1], [2, index]]), np.float32([[1, 0], [0, index]])

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if checkpoint.step == 7: os.kill(os.getpid(), signal.SIGINT)

    class Look(keras.callbacks.Callback):
        "Looks at the model itself, not at `self.model`, which Keras brings up to date."
        def on_train_batch_end(self, batch, logs=None):
            assert checkpoints.model_state(model)["metrics/1/count"] == 2 * (batch + 1)

    def fresh():
        keras.utils.set_random_seed(0)
        hidden = [layers.GaussianNoise(0.5, seed=1), layers.Dense(4, activation="relu")]
        model = keras.Sequential([keras.Input((2,)), *hidden, layers.Dense(2)])
        adam = keras.optimizers.AdamW(0.01, gradient_accumulation_steps=3, use_ema=True, ema_momentum=0.9)
        model.compile(optimizer=keras.optimizers.LossScaleOptimizer(adam, dynamic_growth_steps=4), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    ends = {}
    for name, calls in (("alone", [Look()]), ("stopped", [Stop()]), ("stopped", [])):
        model = fresh()
        (folder / name).mkdir(exist_ok=True)
        checkpoint = checkpoints.Checkpoint(folder / name, model, Numbers(), {"run": {}}, every_steps=2)
        try: checkpoint.fit(3, calls, verbose=0)
        except checkpoints.Stopped: assert checkpoint.step == 8
        ends[name] = checkpoints.model_state(model), checkpoint.step
    (alone, steps), (resumed, resumed_steps) = ends.values()
    assert steps == resumed_steps == 15
    assert any(array.any() for name, array in alone.items() if name.endswith("velocity"))
    for name in alone: np.testing.assert_array_equal(alone[name], resumed[name], err_msg=name)

@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_on_jax_too(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(tmp_path), "jax"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

if __name__ == "__main__":
    if sys.argv[2] == "jax": on_jax(Path(sys.argv[1]))
    else: train(Path(sys.argv[1]), EPOCHS[sys.argv[2]], compiled=sys.argv[2] == "long")
