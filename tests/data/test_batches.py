"""An image that breaks after the dataset was read costs a warning, and many of them the run."""
import numpy as np
import pytest
from fcos_lite.data.batches import Batches
from fcos_lite.data.datasets import read_dataset
from .folders import broken_inside, message

def test_an_image_that_breaks_after_reading_costs_a_warning_and_not_the_epoch(coco):
    examples = read_dataset(coco, "train2017")
    broken_inside(coco / "train2017/000000000003.jpg")
    (coco / "train2017/000000000006.jpg").unlink()
    batches = Batches(examples, 4, 64, max_bad_share=0.5)
    with pytest.warns(UserWarning, match="grey image takes its place") as warned:
        for _ in range(2):
            for index in range(2): batches[index]
    assert len(warned) == 2, "each file is named once"
    batch = batches.whole(0)
    assert (batch["labels"][2] == -1).all() and (batch["image"][2] == 114).all() and batch["image_id"][2] == 3
    assert set(batches.unreadable) == {3, 6} and batches.report.skipped == {"image that cannot be read": 2}
    batches.on_epoch_begin()
    batches.on_epoch_end()
    assert batches.epoch == 1

def test_past_the_limit_the_epoch_ends_with_the_report(coco):
    examples = read_dataset(coco, "train2017")
    (coco / "train2017/000000000003.jpg").unlink()
    batches = Batches(examples, 4, 64)
    with pytest.warns(UserWarning): batches[0]
    batches.on_epoch_begin()
    error = message(batches.on_epoch_end)
    assert "1 of 8 images cannot be used" in error and "000000000003.jpg" in error and "--max-bad-share" in error

def test_fit_gets_what_the_whole_batch_holds(coco):
    batches = Batches(read_dataset(coco, "train2017"), 4, 64, shuffle_seed=0)
    image, truth = batches[1]
    whole = batches.whole(1)
    assert set(truth) == {"boxes", "labels"} and image.shape == (4, 64, 64, 3)
    for name, values in (("image", image), *truth.items()): np.testing.assert_array_equal(values, whole[name])
