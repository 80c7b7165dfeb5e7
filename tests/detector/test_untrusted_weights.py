"""Weights from strangers: arrays are read, and nothing is ever unpickled or executed."""
import marshal
import pickle
import shutil
import zipfile
from pathlib import Path
import h5py
import keras
import numpy as np
import pytest
from fcos_lite.detector.model import FCOS
from fcos_lite.detector.weights import load_weights
from fcos_lite.errors import InputError

class Trap:
    "Whoever unpickles it makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (Path(self.path),)

@pytest.fixture
def weights(tiny_run, tmp_path):
    "A function that copies a run's weights to a name."
    shutil.copy(tiny_run / "config.json", tmp_path)
    def copy(name): return Path(shutil.copy(tiny_run / "best.weights.h5", tmp_path / name))
    return copy

def test_weights_are_never_unpickled(tiny_run, weights, tmp_path, monkeypatch):
    """A pickle, an archive with a Lambda, and a weights file with both beside its arrays:
    the first two are refused, of the third the arrays alone are read."""
    trap = tmp_path / "sprung"
    (tmp_path / "pickled.weights.h5").write_bytes(pickle.dumps(Trap(trap)))
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)]).save(tmp_path / "lambda.keras")
    shutil.copy(tmp_path / "lambda.keras", tmp_path / "lambda.weights.h5")
    with h5py.File(weights("both.weights.h5"), "r+") as file:
        file.attrs["model_config"] = zipfile.ZipFile(tmp_path / "lambda.keras").read("config.json").decode()
        file.create_dataset("pickle", data=np.frombuffer(pickle.dumps(Trap(trap)), np.uint8))
    expected = FCOS.from_preset(tiny_run)
    def forbidden(*_, **__): raise AssertionError("weights were unpickled")
    for module in (pickle, marshal):
        for name in ("load", "loads", "Unpickler"):
            if hasattr(module, name): monkeypatch.setattr(module, name, forbidden)
    for name in ("pickled.weights.h5", "lambda.weights.h5"):
        with pytest.raises(InputError, match=f"{name}: not a weights file"): FCOS.from_preset(tmp_path / name)
    with pytest.raises(InputError, match="they hold arrays and no code"):
        FCOS.from_preset(tmp_path / "lambda.keras")
    loaded = FCOS.from_preset(tmp_path / "both.weights.h5")
    assert not trap.exists()
    for ours, theirs in zip(loaded.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))

def test_an_array_of_python_objects_is_refused(tiny_run, weights):
    path, kernels = weights("objects.weights.h5"), []
    with h5py.File(path, "r+") as file:
        def note(name, item):
            if isinstance(item, h5py.Dataset) and name.startswith("fpn/") and item.ndim == 4: kernels.append(name)
        file.visititems(note)
        shape = file[kernels[0]].shape
        del file[kernels[0]]
        file.create_dataset(kernels[0], shape, h5py.string_dtype())
    with pytest.raises(InputError, match="objects.weights.h5"): load_weights(FCOS.from_preset(tiny_run), path)
