"""What `make prepare` leaves as it is committed: digits and pixels that another processor would give, no more."""
import base64
import importlib.util
import json
from pathlib import Path
import cv2
import numpy as np

PATH = Path(__file__).resolve().parents[1] / "tools" / "restore_unchanged_outputs.py"
spec = importlib.util.spec_from_file_location("restore_unchanged_outputs", PATH)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

def printed(*lines): return {"name": "stdout", "output_type": "stream", "text": [f"{line}\n" for line in lines]}

def drawn(image, text="40 x 30 pixels, 1,234 bytes"):
    png = base64.b64encode(cv2.imencode(".png", image)[1]).decode()
    return {"data": {"image/png": png, "text/plain": [text]}, "metadata": {}, "output_type": "display_data"}

def test_digits_may_differ_and_words_may_not():
    assert tool.alike(printed("AP 0.24, loss 1.2e-05"), printed("AP 0.164, loss -3"))
    assert tool.alike(printed("12,345 of 99"), printed("9 of 100,000"))
    assert not tool.alike(printed("AP 0.24"), printed("AP50 0.24 of"))
    assert not tool.alike(printed("AP 0.24"), printed("AP nan"))
    assert not tool.alike(printed("a", "b"), printed("a"))

def test_the_number_of_outputs_and_their_kind_must_be_the_same():
    assert tool.alike([], [])
    assert not tool.alike([], [printed("a")]) and not tool.alike([printed("a")], [])
    assert not tool.alike([printed("a")], [printed("a"), printed("a")])
    assert not tool.alike(printed("a"), drawn(np.zeros((9, 9, 3), "uint8")))

def test_images_that_look_the_same():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype="uint8")
    similar = np.clip(image.astype(int) + rng.integers(-3, 4, image.shape), 0, 255).astype("uint8")
    assert tool.alike(drawn(image), drawn(similar, "40 x 30 pixels, 999 bytes"))
    assert not tool.alike(drawn(image), drawn(255 - image)) and not tool.alike(drawn(image), drawn(image[:, :-1]))

def test_a_cell_that_was_rewritten_keeps_its_new_output(tmp_path):
    def cell(source, value):
        return {"cell_type": "code", "id": source[:1], "source": [source], "outputs": [printed(value)], "metadata": {},
                "execution_count": None}
    path = tmp_path / "page.ipynb"
    now = [cell("a = 1", "it is 2"), cell("b = 3", "it is 4"), cell("c = 5", "this is 6")]
    path.write_text(json.dumps({"cells": now}))
    before = [cell("a = 1", "it is 7"), cell("b = 4", "it is 8"), cell("c = 5", "that is 6")]
    assert tool.restore(path, {"cells": before}) == 1
    outputs = [cell["outputs"][0]["text"][0] for cell in json.loads(path.read_text())["cells"]]
    assert outputs == ["it is 7\n", "it is 4\n", "this is 6\n"]
