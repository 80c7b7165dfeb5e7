"""What `make prepare` leaves as it is committed: digits and pixels that another processor would give, and nothing else."""
import base64
import importlib.util
from pathlib import Path
import cv2
import numpy as np

spec = importlib.util.spec_from_file_location("settle", Path(__file__).with_name("settle.py"))
settle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(settle)

def png(image): return base64.b64encode(cv2.imencode(".png", image)[1]).decode()

def printed(*lines): return {"name": "stdout", "output_type": "stream", "text": [f"{line}\n" for line in lines]}

def drawn(image, text="40 x 30 pixels, 1,234 bytes"): return {"data": {"image/png": png(image), "text/plain": [text]}, "metadata": {}, "output_type": "display_data"}

def test_digits_may_differ_and_words_may_not():
    assert settle.alike(printed("AP 0.24, loss 1.2e-05"), printed("AP 0.164, loss -3"))
    assert settle.alike(printed("12,345 of 99"), printed("9 of 100,000"))
    assert not settle.alike(printed("AP 0.24"), printed("AP50 0.24 of"))
    assert not settle.alike(printed("AP 0.24"), printed("AP nan"))
    assert not settle.alike(printed("a", "b"), printed("a"))
    assert settle.alike([], []) and not settle.alike([], [printed("a")]) and not settle.alike([printed("a")], [])
    assert not settle.alike([printed("a")], [printed("a"), printed("a")]) and not settle.alike(printed("a"), drawn(np.zeros((9, 9, 3), "uint8")))

def test_pictures_that_look_the_same():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype="uint8")
    a_little = np.clip(image.astype(int) + rng.integers(-3, 4, image.shape), 0, 255).astype("uint8")
    assert settle.alike(drawn(image), drawn(a_little, "40 x 30 pixels, 999 bytes"))
    assert not settle.alike(drawn(image), drawn(255 - image)) and not settle.alike(drawn(image), drawn(image[:, :-1]))

def test_a_cell_that_was_rewritten_keeps_what_it_says_now(tmp_path):
    import json
    def cell(source, value): return {"cell_type": "code", "id": source[:1], "source": [source], "outputs": [printed(value)], "metadata": {}, "execution_count": None}
    page = tmp_path / "page.ipynb"
    page.write_text(json.dumps({"cells": [cell("a = 1", "it is 2"), cell("b = 3", "it is 4"), cell("c = 5", "this is 6")]}))
    assert settle.settle(page, {"cells": [cell("a = 1", "it is 7"), cell("b = 4", "it is 8"), cell("c = 5", "that is 6")]}) == 1
    assert [found["outputs"][0]["text"][0] for found in json.loads(page.read_text())["cells"]] == ["it is 7\n", "it is 4\n", "this is 6\n"]
