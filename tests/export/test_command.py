"""`python -m fcos_lite.export`: from weights to a compared folder."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from fcos_lite.config import ModelConfig
from fcos_lite.errors import InputError
from fcos_lite.export.__main__ import calibration_batch, main
from fcos_lite.export.runtime import read_manifest

ROOT = Path(__file__).resolve().parents[2]

def test_a_run_is_exported_compared_and_replaced_by_force_alone(tiny_run, tmp_path, capsys):
    pytest.importorskip("ai_edge_litert")
    flags = ["--weights", str(tiny_run), "--candidates", "40", "--rows", "20", "--out", str(tmp_path / "small")]
    main([*flags, "--precision", "int8", "--calibration-images", "4"])
    assert "against Keras on 4 images" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    manifest = read_manifest(tmp_path / "small")
    assert (manifest["precision"], manifest["calibration_images"], manifest["rows"]) == ("int8", 4, 20)
    weights = (tiny_run / "best.weights.h5").read_bytes()
    assert manifest["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    with pytest.raises(InputError, match="add --force"): main(flags)
    main([*flags, "--force", "--no-nms", "--image-size", "96"])
    manifest = read_manifest(tmp_path / "small")
    assert set(manifest["outputs"]) == {"boxes", "scores"} and manifest["image_size"] == 96

def test_refusals_come_before_any_work(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("precious")
    for flags, message in (([], "add --force"), (["--force"], "something else")):
        with pytest.raises(InputError, match=message): main(["--out", str(tmp_path / "old"), *flags])
    for flags, message in ((["--format", "caffe"], "choose one of"), (["--rows", "0"], "give at least 1"),
                           (["--weights", "missing"], "no such weights")):
        with pytest.raises(InputError, match=message): main(["--out", str(tmp_path / "new"), *flags])
    assert (tmp_path / "old" / "mine.txt").read_text() == "precious" and not (tmp_path / "new").exists()

def test_another_backend_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(InputError, match="KERAS_BACKEND=tensorflow"): main(["--out", str(tmp_path / "new")])

def test_calibration_reads_files_and_folders(tmp_path):
    for i in range(5): cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((32, 64, 3), 40 * i, np.uint8))
    images = calibration_batch((str(tmp_path),), ModelConfig(image_size=64), 3)
    assert images.shape == (3, 64, 64, 3) and images[:, 32, 32, 0].tolist() == [0, 80, 160]     # evenly spaced
    with pytest.raises(InputError, match="nowhere"): calibration_batch(("nowhere",), ModelConfig(image_size=64), 3)
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="no image there"):
        calibration_batch((str(tmp_path / "film.mp4"),), ModelConfig(image_size=64), 3)

@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_importing_the_command_loads_no_network(command):
    code = (f"import json, sys, fcos_lite.{command}.__main__\n"
            "names = ('tensorflow', 'keras', 'jax', 'onnxruntime', 'ai_edge_litert')\n"
            "print(json.dumps([name for name in names if name in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout) == [], done.stdout + done.stderr
