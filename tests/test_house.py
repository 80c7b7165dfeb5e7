"""The rules of the house: floors, one version, metadata that agrees, an install without nbdev."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fcos_lite"
FLOORS = [
    {"config"},
    {"flags", "boxes", "schedule", "optimizer", "backbone", "visualize", "memory", "download", "video", "meeting"},
    {"backbones"},
    {"heatmaps", "images", "fpn", "heads", "targets", "losses", "augment", "figures", "nms", "camera"},
    {"checks", "backdrops", "weights", "results", "sources", "watch"},
    {"scenes", "formats", "dialects", "batches", "model", "records"},
    {"metrics", "runs", "readers", "splits", "finetuning", "shards", "census", "graphs", "exported"},
    {"detect", "evaluate", "packs", "checkpoints", "tracking", "streams"},
    {"training", "team", "data", "export", "datasets"},
    {"reports", "guards", "curriculum", "processes"},
    {"train"},
    {"demo"},
    {"cli"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))

def imported(path):
    "Modules of the package that a file imports, deferred imports included."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            if name in ("fcos_lite", "."): yield from (alias.name for alias in node.names)
            elif name.startswith(("fcos_lite.", ".")): yield name.removeprefix("fcos_lite").lstrip(".").split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fcos_lite."))

@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module):
    assert module in FLOOR, f"{module} has no floor: give it one in tests/test_house.py"
    above = [other for other in imported(PACKAGE / f"{module}.py") if FLOOR[other] >= FLOOR[module]]
    assert not above, f"{module} (floor {FLOOR[module]}) imports {above}"

@pytest.mark.parametrize("module", ["boxes", "backbone", "backbones", "fpn", "heads", "targets", "losses", "nms", "model", "augment", "schedule"])
def test_what_computes_imports_no_tensorflow(module):
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) tensorflow", text, re.MULTILINE)

def test_every_module_has_a_chapter_and_every_floor_a_module():
    exported = {match for path in (ROOT / "nbs").glob("*.ipynb") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                for match in re.findall(r"^#\| default_exp (\w+)", "".join(cell["source"]), re.MULTILINE)}
    assert exported == set(MODULES) == set(FLOOR)

def test_one_version_and_settings_that_agree():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]
    init = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())[1]
    assert settings["version"] == init
    assert f"## {init}" in (ROOT / "CHANGELOG.md").read_text()
    for key in set(nbdev) & set(settings): assert str(nbdev[key]) == settings[key], key

def test_no_saved_errors_no_heavy_pictures_and_outputs_everywhere():
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [o for c in cells for o in c.get("outputs", [])]
        assert outputs, f"{path.name} is saved without outputs"
        assert not [o for o in outputs if o["output_type"] == "error"], f"{path.name} is saved with an error"
        assert not [o for o in outputs if o.get("name") == "stderr" and "Warning" in "".join(o["text"])], f"{path.name} is saved with a warning; mend what it warns of"
        sizes = [len("".join(v)) * 3 // 4 for o in outputs for k, v in o.get("data", {}).items() if k.startswith("image/")]
        assert max(sizes, default=0) <= 60_000, f"{path.name} holds a picture of {max(sizes)} bytes"
    heavy = [file.name for file in (ROOT / "nbs" / "images").iterdir() if file.stat().st_size > 60_000]
    assert not heavy, f"nbs/images: {heavy} are over 60 kB; scale or compress them"

def test_no_chapter_is_too_long():
    "80 cells, 200 exported lines: past that, one chapter answers two questions."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        exported = [text for c in cells if c["cell_type"] == "code" and (text := "".join(c["source"])).startswith("#| export")]
        lines = [line for text in exported for line in text.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(cells) <= 80 and len(lines) <= 200, f"{path.name}: {len(cells)} cells, {len(lines)} exported lines; split it"

def test_export_is_up_to_date(tmp_path):
    "The package says what the notebooks log: exporting again changes nothing."
    for folder in ("nbs", "fcos_lite"): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / file, tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=tmp_path, check=True, capture_output=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "fcos_lite").glob("*.py")} == {p.name: p.read_bytes() for p in PACKAGE.glob("*.py")}
