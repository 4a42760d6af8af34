"""The majority vote of several networks, and what it still gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbutils.errors import InputError


def majority_vote(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """The class that most networks give each image; the smallest of those with equal votes.

    Args:
        predictions: Classes by each network, uint8, shape (n,) each.

    Returns:
        uint8, shape (n,).
    """
    from scipy import stats

    return stats.mode(np.stack(predictions)).mode


@dataclass(frozen=True)
class VoteScore:
    """Accuracies of several networks on the same images.

    Attributes:
        alone: Of each network.
        together: Of their majority vote.
        images: How many there are.
    """

    alone: list[float]
    together: float
    images: int


def score_vote(labels: np.ndarray, predictions: Sequence[np.ndarray]) -> VoteScore:
    """The accuracy of the majority beside that of each network alone.

    Args:
        labels: Of the images, uint8, shape (n,).
        predictions: Classes by each network, uint8, shape (n,) each.

    Raises:
        InputError: There is no network.
    """
    if not predictions:
        raise InputError("predictions must be of at least one network")
    alone = [float((each == labels).mean()) for each in predictions]
    together = float((majority_vote(predictions) == labels).mean())
    return VoteScore(alone, together, len(labels))


def votes_of(size: int, labels: np.ndarray, predictions: Sequence[np.ndarray]) -> float:
    """The accuracy to expect of the majority of `size` networks, from a larger set of them.

    The mean over the votes of each network with the `size - 1` that follow it, the first after
    the last: so all networks count alike.

    Args:
        size: Networks that vote, from 1 to the number of `predictions`.
        labels: Of the images, uint8, shape (n,).
        predictions: Classes by each network, uint8, shape (n,) each.

    Raises:
        InputError: `size` is out of range.
    """
    if not 1 <= size <= len(predictions):
        raise InputError(f"size must be in 1 to {len(predictions)}, got {size}")
    around = [*predictions, *predictions]
    votes = [majority_vote(around[start : start + size]) for start in range(len(predictions))]
    return float(np.mean([vote == labels for vote in votes]))


def networks_wrong(labels: np.ndarray, predictions: Sequence[np.ndarray]) -> np.ndarray:
    """How many of the networks are wrong on each image that their majority gets wrong.

    Args:
        labels: Of the images, uint8, shape (n,).
        predictions: Classes by each network, uint8, shape (n,) each.

    Returns:
        int64, one number for each of these images, in their order.
    """
    wrong = np.sum([each != labels for each in predictions], axis=0)
    return wrong[majority_vote(predictions) != labels]
