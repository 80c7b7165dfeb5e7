"""`pip install` of the checkout into an empty environment."""
import subprocess
import sys
from pathlib import Path
import pytest

@pytest.mark.slow
def test_a_plain_install_into_an_empty_environment(tmp_path):
    "It works without nbdev, and the package imports, detects and has its command there."
    root, bin = Path(__file__).resolve().parents[1], tmp_path / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([bin / "python", "-m", "pip", "install", "--quiet", root], check=True)
    assert subprocess.run([bin / "python", "-c", "import nbdev"], capture_output=True).returncode != 0
    for program in (
        "from fcos_lite import FCOS; from fcos_lite.config import REFERENCE; "
        "assert FCOS(REFERENCE).count_params() == 3255082",
        "from fcos_lite import FCOS; import numpy as np; "
        "print(FCOS.from_preset('person').detect(np.zeros((40, 60, 3), 'uint8')))"):
        subprocess.run([bin / "python", "-c", program], check=True, cwd=tmp_path)
    subprocess.run([bin / "fcos-lite", "train", "--help"], check=True, capture_output=True, cwd=tmp_path)
