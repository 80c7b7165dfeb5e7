import shutil
from dataclasses import replace
import numpy as np
import pytest
from fcos_lite.data.coco import write_coco
from fcos_lite.data.example import Examples
from fcos_lite.scenes.scenes import Scenes, World
from .folders import NAMES, WRITERS

WORLD = World(size=64, min_height=16, max_height=50, max_people=4, empty_share=0)

@pytest.fixture(scope="session")
def world(): return WORLD

@pytest.fixture(scope="session")
def layouts_scenes():
    "Twelve scenes with people and dogs, one of them with a crowd."
    scenes = list(Scenes(12, seed=5, world=replace(WORLD, class_names=NAMES, empty_share=0.3)))
    first = np.arange(len(scenes[2].labels)) == 0
    scenes[2] = replace(scenes[2], labels=np.where(first, -2, scenes[2].labels).astype(np.int32))
    return Examples(scenes, NAMES)

@pytest.fixture(scope="session")
def intact(layouts_scenes, tmp_path_factory):
    "The same examples in three layouts with nothing wrong in them."
    root = tmp_path_factory.mktemp("intact")
    for layout, write in WRITERS.items(): write(root / layout, "train", layouts_scenes, NAMES)
    return root

@pytest.fixture
def layouts(intact, tmp_path):
    "Copies of them, to be broken."
    shutil.copytree(intact, tmp_path / "layouts")
    return tmp_path / "layouts"

@pytest.fixture(scope="session")
def intact_coco(tmp_path_factory):
    "A COCO folder with nothing wrong in it: 8 images to train on, 4 to validate on."
    folder = tmp_path_factory.mktemp("intact_coco") / "coco"
    scenes = list(Scenes(12, seed=0, world=WORLD))
    write_coco(folder, "train2017", scenes[:8], WORLD.class_names)
    write_coco(folder, "val2017", scenes[8:], WORLD.class_names)
    return folder

@pytest.fixture
def coco(intact_coco, tmp_path):
    "A copy of it, to be broken."
    shutil.copytree(intact_coco, tmp_path / "coco")
    return tmp_path / "coco"
