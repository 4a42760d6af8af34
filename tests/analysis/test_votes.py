"""The vote of several networks, against hand-made answers."""

import numpy as np
import pytest

from nbutils.analysis.votes import networks_wrong, votes_of


def test_the_vote_of_fewer_networks_counts_each_alike():
    labels = np.zeros(10, np.uint8)
    predictions = [np.where(np.arange(10) < wrong, 1, 0).astype(np.uint8) for wrong in (0, 2, 4)]
    # Of two networks that disagree the smaller class wins, here the right one.
    assert votes_of(1, labels, predictions) == pytest.approx((1.0 + 0.8 + 0.6) / 3)
    assert votes_of(2, labels, predictions) == pytest.approx((1.0 + 0.8 + 1.0) / 3)
    assert votes_of(3, labels, predictions) == pytest.approx(0.8)


def test_networks_that_miss_what_the_vote_misses_are_counted():
    labels = np.array([5, 5, 5, 5], np.uint8)
    predictions = [np.array(p, np.uint8) for p in ([5, 5, 4, 7], [5, 3, 4, 8], [5, 5, 5, 5])]
    # The last image gets a vote for each of 5, 7 and 8, of which the smallest is right.
    assert networks_wrong(labels, predictions).tolist() == [2]
