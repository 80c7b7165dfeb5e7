"""A full disk keeps what a run has, and a run's folder is for one process."""
import errno
import json
import pytest
from fcos_lite import files
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE
from fcos_lite.errors import InputError
from fcos_lite.train import run as runs
from fcos_lite.train.__main__ import main
from fcos_lite.train.run import Run, read_metrics

def full(*arguments): raise OSError(errno.ENOSPC, "No space left on device")

def test_a_full_disk_keeps_the_rows_and_the_weights_and_says_so(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_row({"epoch": 1, "loss": 2.0})
    (tmp_path / "last.weights.h5").write_bytes(b"those of before")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="metrics.csv: cannot be written .No space left.*make room.*--resume"):
        run.write_row({"epoch": 2, "loss": 1.0})
    class Model:
        weights = []
        def count_params(self): return 0
    monkeypatch.setattr(runs, "save_weights", full)
    with pytest.raises(InputError, match="last.weights.h5: cannot be written .No space left on device.*--resume"):
        run.save_weights(Model(), "last")
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1]
    assert (tmp_path / "last.weights.h5").read_bytes() == b"those of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.weights.h5", "metrics.csv"]

def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(InputError, match="log.txt: cannot be written"): Run(tmp_path).log("hello")

def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = Run.create(tmp_path / "run")
    run.write_config(REFERENCE, SCRATCH_RECIPE, {"scenes": 9})
    with files.folder_lock(run.path):
        with pytest.raises(InputError, match="another process is at work"): main(["--resume", str(run.path)])
        with pytest.raises(InputError, match="another process is at work"): Run.create(run.path, force=True)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]

@pytest.mark.parametrize("change, words", [
    ({"learning_rate": 1.0}, "learning_rate"), ({"epochs": -1}, "epochs -1"),
    ({"stages": [{"images": [0, 6]}, {"images": [4, 8]}]}, "0:6 and 4:8 overlap"),
    ({"stages": [{"speed": 3}]}, "there is no field speed"),
    ({"stages": [{"learning_rate": -1.0}]}, "learning_rate -1.0: must not be negative")])
def test_a_configuration_that_cannot_be_is_refused(tmp_path, change, words):
    run = Run.create(tmp_path / "run")
    run.write_config(REFERENCE, SCRATCH_RECIPE, {"scenes": 9})
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(config | {"recipe": config["recipe"] | change}))
    with pytest.raises(InputError) as error: run.read_config()
    assert words in str(error.value) and "config.json" in str(error.value)
