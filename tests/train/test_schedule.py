"""The learning rate of a recipe, step by step; chapter 11 has the laws of the schedule itself."""
import math
import numpy as np
import pytest
from fcos_lite.config import REFERENCE_CURRICULUM, REFERENCE_RECIPE
from fcos_lite.train.trainer import schedule_for

def reference_rate(t, total, start):
    if t <= 5000: return start + (5e-5 - start) / 5000 * t
    return 2.5e-7 + 0.5 * (5e-5 - 2.5e-7) * (1 + math.cos((t - 5000) / (total - 5000) * math.pi))

@pytest.mark.parametrize("warmup_from, start", [("min_learning_rate", 2.5e-7), ("learning_rate", 5e-5)])
@pytest.mark.parametrize("images, epochs", [(40_000, 30), (38_800, 30)])
def test_the_recipe_follows_the_references_formula(images, epochs, warmup_from, start):
    total = epochs * (images // 4)
    random_steps = np.random.default_rng(0).integers(0, total, 50)
    steps = np.r_[0, 1, 2500, 4999, 5000, 5001, total // 2, total - 1, total, random_steps]
    rates = np.array(schedule_for(REFERENCE_RECIPE.change(warmup_from=warmup_from), total)(steps))
    np.testing.assert_allclose(rates, [reference_rate(t, total, start) for t in steps], atol=5e-7 * 5e-5)

@pytest.mark.parametrize("images", [10_000, 8_800])
def test_each_chunk_has_its_own_warmup_and_end(images):
    total = REFERENCE_CURRICULUM["chunk_epochs"] * (images // REFERENCE_RECIPE.batch_size)
    schedule = schedule_for(REFERENCE_RECIPE, total)
    assert schedule.warmup_steps == total // 20
    assert total % REFERENCE_RECIPE.optimizer.gradient_accumulation_steps == 0   # no chunk ends amid an update
    rates = [float(schedule(t)) for t in (0, total // 20, total)]
    np.testing.assert_allclose(rates, [2.5e-7, 5e-5, 2.5e-7], rtol=1e-5)
