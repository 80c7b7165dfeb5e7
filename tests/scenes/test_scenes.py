"""Scenes are the embedded default data: the same pixels for the same seed, and boxes exact to the pixel."""
import hashlib
import numpy as np
import pytest
from fcos_lite.errors import InputError
from fcos_lite.scenes.scenes import _MIN_ALPHA, Scenes, World, compose, draw_scene

DEMO = World(size=96, min_height=36, max_height=82, max_people=2, max_dogs=1, max_balls=1, max_things=3,
             min_visible=0.7)
THREE = World(size=128, class_names=("person", "dog", "ball"))

def checksum(scenes):
    digest = hashlib.sha256()
    for scene in scenes:
        for value in (scene.image, scene.boxes, scene.labels, scene.areas):
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]

@pytest.mark.parametrize("scenes, expected", [
    (Scenes(24), "dd1ea6faa786f363"),
    (Scenes(60, 0, DEMO), "1e9a23ac5c202e5d"),
    (Scenes(10, 2_000_000, DEMO), "95582b9a9daa52f6"),
    (Scenes(30, 7, World(size=200, class_names=("ball", "person", "dog"))), "272906251e17c222"),
    (Scenes(40, 3, World(size=64, min_height=16, max_height=50)), "98d4713d7fb3bc28"),
    ([draw_scene(seed) for seed in range(12)], "d351a93971693283"),
], ids=["default", "demo", "demo, unseen", "three classes", "tiny", "plain seeds"])
def test_the_same_seed_gives_the_same_scene_for_ever(scenes, expected):
    "Runs and their published numbers depend on these pixels: do not change them."
    assert checksum(scenes) == expected

def test_boxes_are_exact_to_the_pixel():
    for seed in range(60):
        example, (image, placed, owner) = draw_scene(seed, THREE), compose(seed, THREE)
        np.testing.assert_array_equal(example.image, image)
        indices = [index for index, figure in enumerate(placed) if figure.kind != "thing"]
        assert [THREE.class_names[label] for label in example.labels] == [placed[index].kind for index in indices]
        for index, box, area in zip(indices, example.boxes.astype(int), example.areas):
            left, top, right, bottom = box
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            mask = owner == index
            assert mask[top:bottom, left:right].sum() == mask.sum() == area
            assert mask[top:bottom, left].any() and mask[top:bottom, right - 1].any()
            assert mask[top, left:right].any() and mask[bottom - 1, left:right].any()
            assert area >= 0.25 * (placed[index].sprite.image[..., 3] >= _MIN_ALPHA).sum()

def test_scenes_are_a_sequence_whose_items_do_not_depend_on_its_length():
    few, many = (Scenes(count, seed=7, world=World(size=64)) for count in (3, 1000))
    for short, long in zip(few, many[:3], strict=True): assert checksum([short]) == checksum([long])
    assert [example.image_id for example in few] == [1, 2, 3] and few[-1].image_id == 3
    assert len(many[10:20:2]) == 5 and many[10:20:2][1].image_id == 13
    with pytest.raises(IndexError): few[3]

def test_classes_counts_and_empty_scenes():
    assert set(np.concatenate([example.labels for example in Scenes(40, world=THREE)])) == {0, 1, 2}
    counts = np.array([len(example.boxes) for example in Scenes(300, world=World(size=64))])
    assert 0.03 < (counts == 0).mean() < 0.15 and counts.max() <= Scenes(1).max_boxes == 6
    assert Scenes(1, world=THREE).max_boxes == 10
    empty = draw_scene(0, World(size=64, empty_share=1))
    assert empty.boxes.shape == (0, 4) and empty.areas.shape == (0,)
    assert (empty.boxes.dtype, empty.labels.dtype) == (np.float32, np.int32)

@pytest.mark.parametrize("wrong", [
    dict(size=16), dict(min_height=300), dict(class_names=("cat",)), dict(class_names=()), dict(empty_share=2),
    dict(max_people=0), dict(max_dogs=-1)], ids=lambda wrong: next(iter(wrong)))
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))): World(**wrong)

def test_scenes_are_not_negative():
    with pytest.raises(InputError, match="neither may be negative"): Scenes(-1)
