"""Statistics of records are those of the images that they were written from."""
from dataclasses import replace
import numpy as np
from fcos_lite.config import REFERENCE, SCRATCH_RECIPE
from fcos_lite.data.example import Examples
from fcos_lite.data.tfrecord import RecordConfig, Records, write_records
from fcos_lite.evaluate.statistics import assignment_coverage, compute_statistics, dataset_report
from fcos_lite.scenes.scenes import Scenes, World

def draw_scenes():
    scenes = Scenes(24, seed=5, world=World(size=160, min_height=6, max_height=150, max_people=8, empty_share=0.1))
    cut = [replace(scene, image=scene.image[:120], height=120, boxes=scene.boxes.clip(0, (160, 120, 160, 120)))
           for scene in scenes]
    kept = [(scene.boxes[:, 3] - scene.boxes[:, 1] > 1) for scene in cut]
    return Examples([replace(scene, boxes=scene.boxes[keep], labels=scene.labels[keep], areas=scene.areas[keep])
                     for scene, keep in zip(cut, kept)], ("person",))

def test_records_give_the_statistics_of_their_images(tmp_path):
    scenes = draw_scenes()
    write_records(scenes, "train2017", tmp_path, RecordConfig(image_size=64))
    records = Records(tmp_path, "train2017").in_original_pixels()
    one, other = (compute_statistics(examples, 256) for examples in (scenes, records))
    np.testing.assert_array_equal(one.sizes, other.sizes)
    np.testing.assert_array_equal(one.areas, other.areas)
    np.testing.assert_array_equal(one.image_index, other.image_index)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    assert str(one) == str(other)
    config = replace(REFERENCE, image_size=256)
    text, figures = dataset_report(records, "records", config, SCRATCH_RECIPE.targets)[1:]
    assert str(one) in text and len(figures) == 2

def test_a_sample_is_spread_evenly_over_the_images():
    scenes, config = draw_scenes(), replace(REFERENCE, image_size=256)
    few = assignment_coverage(scenes, config, SCRATCH_RECIPE.targets, sample=3)
    same = assignment_coverage(scenes[0:1] + scenes[11:12] + scenes[23:24], config, SCRATCH_RECIPE.targets)
    for name in few: np.testing.assert_array_equal(few[name], same[name], err_msg=name)
    assert few["images"] == 3
