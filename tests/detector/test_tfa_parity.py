"""Our network is the reference's: equal weights and images give equal outputs.

The reference builds its network on TensorFlow Addons, which ended with TensorFlow 2.15 and Python 3.11.
So tfa_parity/reference_network.py runs in an environment of its own, `.venv-tfa`, made on the first run
(1.3 GB; half a minute on a fast line) and kept until tfa_parity/requirements.txt changes.
"""
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from fcos_lite.config import REFERENCE
from fcos_lite.detector.model import FCOS

HERE = Path(__file__).parent / "tfa_parity"
REQUIREMENTS, SCRIPT = HERE / "requirements.txt", HERE / "reference_network.py"
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-tfa"
TOLERANCE = 1e-4
KINDS = {"cls": "cls", "reg": "ltrb", "ctr": "centerness"}  # the reference's names of the outputs, and ours

REFERENCE_TABLE = """
 FPN (Functional)            [(None, 128, 128, 128),   2885024
                              (None, 64, 64, 128),
                              (None, 32, 32, 128),
                              (None, 16, 16, 128)]

 sequential (Sequential)     (None, None, None, 64)    184832

 sequential_1 (Sequential)   (None, None, None, 64)    184832

 Classification (Conv2D)     multiple                  65

 Regression (Conv2D)         multiple                  260

 Centerness (Conv2D)         multiple                  65
"""


# The environment

def python311():
    "A Python 3.11 that can make environments, or a skip."
    candidates = [sys.executable] if sys.version_info[:2] == (3, 11) else []
    candidates += filter(None, [shutil.which("python3.11")])
    for python in candidates:
        if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return python
    pytest.skip("TensorFlow Addons needs Python 3.11; there is no python3.11 with venv on the PATH")


def install(python):
    "Makes the environment; skips where no package index answers, fails where one does and the install does not work."
    made = subprocess.run([python, "-m", "venv", "--clear", ENVIRONMENT], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    command = [environment_python(), "-m", "pip", "install", "--retries", "2", "-r", REQUIREMENTS]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode == 0:
        return
    output = pip.stdout + pip.stderr
    shutil.rmtree(ENVIRONMENT)
    if any(sign in output for sign in ("Retrying (Retry(", "ConnectionError", "(from versions: none)")):
        pytest.skip(f"no package index offers what {REQUIREMENTS.name} asks for: {output.strip().splitlines()[-1]}")
    pytest.fail(f"the install of {REQUIREMENTS} failed:\n{output[-3000:]}")


def environment_python():
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="module")
def tfa_python():
    "The environment's Python; the environment is made where it is missing or its requirements have changed."
    stamp, wanted = ENVIRONMENT / "requirements.sha256", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == wanted and environment_python().exists()):
        install(python311())
        stamp.write_text(wanted)
    return environment_python()


# Ours

def our_network(network):
    "Our model, and its weights in the order in which the reference's text comes to them."
    created, add_weight = [], keras.layers.Layer.add_weight
    def recorded(layer, *args, **kwargs):
        created.append(add_weight(layer, *args, **kwargs))
        return created[-1]
    with pytest.MonkeyPatch.context() as patch, keras.device("cpu"):  # a GPU may round float32 to TF32
        patch.setattr(keras.layers.Layer, "add_weight", recorded)
        model = FCOS(network)
    fpn = {id(weight) for weight in model.fpn.weights}
    scales = [weight for weight in model.heads.weights if weight.shape == ()]
    towers_and_predictions = [weight for weight in model.heads.weights if weight.shape != ()]
    return model, [weight for weight in created if id(weight) in fpn] + towers_and_predictions + scales


def random_values(weights, seed=0):
    "Values with which every weight matters: no gain is 1, no shift 0, no two scales alike."
    rng, values = np.random.default_rng(seed), []
    for weight in weights:
        shape = tuple(weight.shape)
        if len(shape) == 4: value = rng.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape)
        elif "gamma" in weight.path: value = rng.uniform(0.5, 1.5, shape)
        elif shape == (): value = rng.uniform(0.2, 0.6)
        else: value = rng.normal(0, 0.5, shape)
        values.append(np.asarray(value, "float32"))
    return values


def assign(weights, values):
    for weight, value in zip(weights, values, strict=True): weight.assign(value)


def our_outputs(model, images):
    with keras.device("cpu"):
        return model.predict_on_batch(images)


# The reference's

@pytest.fixture(scope="module")
def ask_reference(tfa_python, tmp_path_factory):
    "Runs the reference's network in its own environment: `(values, images) -> (what it printed, its outputs)`."
    def ask(values, images):
        folder = tmp_path_factory.mktemp("tfa")
        np.savez(folder / "weights.npz", **{f"{place:03}": value for place, value in enumerate(values)})
        np.save(folder / "images.npy", images)
        command = [tfa_python, SCRIPT, "--weights", folder / "weights.npz", "--input", folder / "images.npy",
                   "--output", folder / "outputs.npz"]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": ""}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        with np.load(folder / "outputs.npz") as outputs:
            return run.stdout, dict(outputs)
    return ask


class Parity:
    "One network, twice: ours and the reference's answer to the same weights and images."
    def __init__(self, ask_reference, size, batch):
        self.config = replace(REFERENCE, image_size=size)
        self.model, self.weights = our_network(self.config)
        self.values = random_values(self.weights)
        assign(self.weights, self.values)
        self.images = np.random.default_rng(1).integers(0, 256, (batch, size, size, 3), dtype="uint8")
        self.printed, self.reference = ask_reference(self.values, self.images)

    def differences(self, model=None):
        "Largest difference of each output at each level: absolute up to a magnitude of 1, relative above."
        ours, differences = our_outputs(model or self.model, self.images), {}
        for theirs, name in KINDS.items():
            maps = [self.reference[f"{theirs}_P{level}"] for level in (2, 3, 4, 5)]
            flat = ours[name].reshape(len(self.images), -1, maps[0].shape[-1])
            ends = np.cumsum([m.shape[1] * m.shape[2] for m in maps])
            assert ends[-1] == flat.shape[1]
            for level, m, part in zip((2, 3, 4, 5), maps, np.split(flat, ends[:-1], axis=1)):
                m = m.reshape(part.shape)
                error = np.abs(part - m) / np.maximum(1, np.abs(m))
                differences[f"{name} P{level}"] = float(error.max())
        return differences


@pytest.fixture(scope="module")
def small(ask_reference):
    "Small enough to ask many questions, and two images that must not see each other."
    return Parity(ask_reference, size=64, batch=2)


@pytest.fixture(scope="module")
def large(ask_reference):
    "A second size. Not 512: there float32 itself errs by up to 1e-4 on such weights, TensorFlow 2.15 more than ours."
    return Parity(ask_reference, size=128, batch=1)


# The laws

def test_the_reference_ran_on_what_it_names(small):
    assert small.printed.splitlines()[:2] == ["tensorflow 2.15.1", "tensorflow-addons 0.23.0"]


def test_the_table_of_the_reference_is_reproduced(small):
    "Its rows line for line, and its total, which counts the four scales."
    lines = [line.rstrip() for line in small.printed.splitlines()]
    rules = [place for place, line in enumerate(lines) if line.startswith("===")]
    rows = [line for line in lines[rules[0] + 1:rules[1]] if line]
    assert rows == [line for line in REFERENCE_TABLE.splitlines() if line]
    assert lines[rules[1] + 1].split()[:3] == ["Total", "params:", "3255082"]


def test_ours_has_as_many_parameters(small):
    "FPN, two towers, three predictions, scales: the table's numbers, in its order."
    heads = small.weights[len(small.model.fpn.weights):]
    parts = np.split([int(np.prod(weight.shape)) for weight in heads], [12, 24, 26, 28, 30])
    counts = [small.model.fpn.count_params(), *(int(part.sum()) for part in parts)]
    assert counts == [2885024, 184832, 184832, 65, 260, 65, 4]
    assert sum(counts) == 3255082


@pytest.mark.parametrize("size", ["small", "large"])
def test_equal_outputs(size, request):
    parity = request.getfixturevalue(size)
    differences = parity.differences()
    assert max(differences.values()) < TOLERANCE, differences


def test_the_outputs_are_worth_comparing(small):
    "Outputs that hardly vary would agree by accident."
    for name, m in small.reference.items(): assert m.std() > 0.1, (name, m.std())


def test_every_weight_is_compared(small):
    "Numbers of about 0.01 added to any one weight are seen, and without them all is equal again."
    rng, unseen = np.random.default_rng(2), []
    for weight, value in zip(small.weights, small.values):
        weight.assign(value + rng.normal(0, 0.01, value.shape).astype("float32"))
        if max(small.differences().values()) < TOLERANCE: unseen.append(weight.path)
        weight.assign(value)
    assert not unseen
    assert max(small.differences().values()) < TOLERANCE


OTHERS = [("group_epsilon", 1e-5), ("leaky_slope", 0.2)]
MORE = [("stem_groups", 32), ("backbone_groups", 16), ("pyramid_groups", 16), ("tower_groups", 32),
        ("centerness_tower", "reg")]

@pytest.mark.parametrize("field, value", OTHERS + [pytest.param(*more, marks=pytest.mark.slow) for more in MORE])
def test_another_network_with_these_weights_differs(small, field, value):
    model, weights = our_network(replace(small.config, **{field: value}))
    assign(weights, small.values)
    assert max(small.differences(model).values()) > 10 * TOLERANCE
