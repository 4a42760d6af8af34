"""95 % intervals around measured values, and how large a difference they could have shown.

scipy does the mathematics; it is imported only where it is used, since that takes half a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

POWER = 0.8
"""Probability with which an effect of the minimum detectable size is found."""

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
    """Interval of a mean over seeds and images: for other seeds *and* other images.

    In the analysis of variance of two crossed random effects, the mean has variance
    `MS_seed / (S I)` from the S seeds, which already contains the residual, plus
    `(MS_image - MS_residual) / (S I)` from the I images. Student's half-width of the first and the
    normal one of the second are added in quadrature, so the residual counts once. Source: Searle,
    Casella, McCulloch (1992), "Variance Components", chapter 4.

    Args:
        values: Shape (seeds, images); for a comparison, a difference in each place.
        outcomes: Shape (seeds,), where they are known more precisely than as means of `values`.
            The mean and the part of the seeds then come from these.

    Returns:
        Its ends, and the minimum detectable effect: the true mean at which such an interval leaves
        out zero with probability `POWER` (noncentral t for the seeds). All NaN for one seed.
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
    """Probability that a network leads another by `lead` images or more of `part` random ones.

    They are drawn without replacement from all `images`, of which only this network gets `won`
    right and only the other `lost`.
    """
    from scipy import stats

    if won + lost == 0:
        return float(lead <= 0)
    disagreements = np.arange(won + lost + 1)
    drawn = stats.hypergeom.pmf(disagreements, images, won + lost, part)
    # Of k drawn disagreements w are won: the lead is 2 w - k.
    fewest = np.ceil((lead + disagreements) / 2)
    return float(drawn @ stats.hypergeom.sf(fewest - 1, won + lost, won, disagreements))
