"""95 % intervals around measured values; scipy, which takes half a second, is imported on use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

POWER = 0.8  # the probability with which an effect of the minimum detectable size is found
NORMAL = NormalDist().inv_cdf(0.975)


def student_quantile(freedom: int) -> float:
    """Half of Student's interval of that many degrees of freedom, in standard errors."""
    from scipy import special

    return float(special.stdtrit(freedom, 0.975))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean of independent values, one per seed; NaN for fewer than 2."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * student_quantile(len(values) - 1)
    return mean - half, mean + half


def crossed_interval(
    values: np.ndarray, outcomes: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Ends of the interval of a mean for other seeds *and* other images; minimum detectable effect.

    `values`, shape (seeds, images), have two crossed random effects. The variance of their mean is
    `MS_seed / (S I)`, which contains the residual, plus `(MS_image - MS_residual) / (S I)`, each
    with its own half-width (Student's, normal), added in quadrature. Source: Searle, Casella,
    McCulloch (1992), "Variance Components", chapter 4. `outcomes`, shape (seeds,), give the mean
    and the part of the seeds, where they are known better than as means of `values`. The effect is
    the true mean at which such intervals exclude zero with probability `POWER`. One seed: NaN.
    """
    from scipy import special

    seeds, images = values.shape
    if seeds < 2:
        return math.nan, math.nan, math.nan
    means = values.mean(axis=1) if outcomes is None else outcomes
    of_images = values.mean(axis=0)
    residuals = values - values.mean(axis=1, keepdims=True) - of_images + values.mean()
    image_square = seeds * float(of_images.var(ddof=1))
    residual_square = float((residuals**2).sum()) / ((seeds - 1) * (images - 1))
    image_error = math.sqrt(max(image_square - residual_square, 0.0) / (seeds * images))
    seed_error = float(means.std(ddof=1)) / math.sqrt(seeds)
    threshold = student_quantile(seeds - 1)
    half = math.hypot(threshold * seed_error, NORMAL * image_error)
    of_seeds = float(special.nctdtrinc(seeds - 1, 1 - POWER, threshold)) * seed_error
    detectable = math.hypot(of_seeds, (NORMAL + NormalDist().inv_cdf(POWER)) * image_error)
    return float(means.mean()) - half, float(means.mean()) + half, detectable


def proportion_interval(fraction: float, n: int) -> tuple[float, float]:
    """Wilson's interval of the probability behind `fraction`, a share of `n` independent images."""
    share, spread = round(fraction * n) / n, NORMAL**2 / n
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def probability_of_lead(won: int, lost: int, images: int, part: int, lead: int) -> float:
    """Probability of a lead of `lead` images or more on `part` random ones of all `images`.

    Of these only the one network gets `won` right, and only the other `lost`.
    """
    from scipy import stats

    if won + lost == 0:
        return float(lead <= 0)
    disagreements = np.arange(won + lost + 1)
    drawn = stats.hypergeom.pmf(disagreements, images, won + lost, part)
    # Of k drawn disagreements w are won: the lead is 2 w - k.
    fewest = np.ceil((lead + disagreements) / 2)
    return float(drawn @ stats.hypergeom.sf(fewest - 1, won + lost, won, disagreements))
