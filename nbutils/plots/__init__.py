"""Figures from tidy tables."""

from nbutils.plots.plots import *  # noqa: F403
