"""Each image in one part, and each part a small copy of the whole."""
import shutil
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from fcos_lite.data.datasets import read_dataset
from fcos_lite.data.example import Example, Examples
from fcos_lite.data.splits import exclude_duplicates, hold_out, require_disjoint
from .folders import image, message

def stand_ins(counts):
    empty = [Example(i, None, np.zeros((n, 4), np.float32), np.zeros(n, np.int32), 1, 1) for i, n in enumerate(counts)]
    return Examples(empty, ("person",))

def ids(examples): return [example.image_id for example in examples]

@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 40), st.none() | st.integers(0, 5))
def test_each_image_is_in_one_part_and_the_order_stays(counts, count, seed):
    count = min(count, len(counts))
    held, rest = hold_out(stand_ins(counts), count, seed)
    assert len(held) == count and sorted(ids(held) + ids(rest)) == list(range(len(counts)))
    assert ids(held) == sorted(ids(held)) and ids(rest) == sorted(ids(rest))

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 13, 60, 199])
def test_what_is_held_out_is_a_small_copy_of_the_whole(count, seed):
    "Each number of boxes gets its due, up to one."
    counts = np.random.default_rng(seed).integers(0, 7, 200)
    held, _ = hold_out(stand_ins(counts), count, seed)
    drawn = np.bincount([len(example.boxes) for example in held], minlength=7)
    assert (np.abs(drawn - np.bincount(counts) * count / 200) < 1).all()

def test_no_image_is_in_two_parts_under_another_name(layouts):
    yolo = layouts / "YOLO"
    for copy, original in (("000000000099.jpg", 0), ("000000000098.jpg", 5)):
        shutil.copy(image(yolo, original), yolo / f"images/train/{copy}")
    examples = read_dataset(yolo, "train")
    held, rest = hold_out(examples, 6)
    assert "image 98 of train is image 6 of val" in message(lambda: require_disjoint({"val": held, "train": rest}))
    kept, copies = exclude_duplicates(rest, held)
    assert [(copy.image_id, other.image_id) for copy, other in copies] == [(98, 6), (99, 1)]
    require_disjoint({"train": kept, "val": held})
    assert ids(held) + ids(kept) == list(range(1, 13))
