"""Intervals hold the truth as often as they say; scipy and worked examples are the judges."""

import math

import numpy as np
import pytest
from scipy import stats

from nbutils.analysis.intervals import (
    crossed_interval,
    mean_interval,
    probability_of_lead,
    proportion_interval,
)


def crossed_draws(seeds, of_seeds, of_images, of_both, times, images=60, truth=0.3):
    """Values of shape (times, seeds, images) whose seeds, images and pairs of both vary."""
    random = np.random.default_rng(0)
    return (
        truth
        + random.normal(0, of_seeds, (times, seeds, 1))
        + random.normal(0, of_images, (times, 1, images))
        + random.normal(0, of_both, (times, seeds, images))
    )


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("of_seeds", "of_images", "of_both"),
    [(0.1, 1.0, 0.5), (0.0, 0.0, 1.0), (0.1, 0.0, 0.5), (0.05, 1.0, 1.0)],
    ids=["all three", "the residual alone", "no images", "mostly images"],
)
def test_the_interval_over_seeds_and_images_covers_as_often_as_it_says(
    seeds, of_seeds, of_images, of_both
):
    draws = crossed_draws(seeds, of_seeds, of_images, of_both, times=1200)
    ends = np.array([crossed_interval(values) for values in draws])
    assert 0.93 <= np.mean((ends[:, 0] < 0.3) & (ends[:, 1] > 0.3)) <= 0.98


@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.1, 0.0), (0.1, 1.0)])
def test_the_minimum_detectable_effect_is_found_in_four_of_five_samples(of_seeds, of_images):
    draws = crossed_draws(5, of_seeds, of_images, 0.5, times=1200, truth=0.0)
    low, _, detectable = np.transpose([crossed_interval(values) for values in draws])
    # The spread of one sample is itself uncertain: take what samples say on average.
    truth = math.sqrt(np.mean(detectable**2))
    assert np.mean(low + truth > 0) == pytest.approx(0.8, abs=0.05)


def test_where_images_agree_the_interval_is_students():
    means = [0.1, 0.3, 0.2]
    low, high, _ = crossed_interval(np.tile(np.array(means)[:, None], 7))
    assert (low, high) == pytest.approx(mean_interval(means))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert mean_interval(means) == pytest.approx((0.2 - half, 0.2 + half))


def test_outcomes_give_the_mean_and_the_part_of_the_seeds_predictions_that_of_the_images():
    values = crossed_draws(4, 0.5, 1.0, 0.2, times=1)[0]
    outcomes = np.array([0.1, 0.2, 0.3, 0.4])
    low, high, _ = crossed_interval(values, outcomes)
    centred = crossed_interval(values - values.mean(axis=1, keepdims=True))  # no spread of seeds
    of_seeds = mean_interval(outcomes)
    assert (low + high) / 2 == pytest.approx(0.25)
    assert high - low == pytest.approx(
        math.hypot(centred[1] - centred[0], of_seeds[1] - of_seeds[0])
    )


def test_one_seed_has_no_interval():
    assert all(map(math.isnan, mean_interval([0.5])))
    assert all(map(math.isnan, crossed_interval(np.zeros((1, 5)))))


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (395, 400), (6948, 7000)])
def test_wilsons_interval_is_scipys(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert proportion_interval(correct / n, n) == pytest.approx((expected.low, expected.high))


def test_the_probability_of_a_lead_is_that_of_drawing_images():
    won, lost, images, part, lead = 60, 50, 1000, 250, 4
    urn = [won, lost, images - won - lost]
    drawn = np.random.default_rng(0).multivariate_hypergeometric(urn, part, size=100_000)
    share = np.mean(drawn[:, 0] - drawn[:, 1] >= lead)
    assert probability_of_lead(won, lost, images, part, lead) == pytest.approx(share, abs=0.005)
    assert probability_of_lead(won, lost, images, images, 10) == pytest.approx(1)
    assert probability_of_lead(won, lost, images, images, 11) == pytest.approx(0)
    assert probability_of_lead(0, 0, images, part, 1) == 0
