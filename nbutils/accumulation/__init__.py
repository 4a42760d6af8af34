"""The subject: windows, the exact gradient of a window, and a check of other people's loops."""

from nbutils.accumulation.check import check_accumulation
from nbutils.accumulation.window import (
    accumulate_gradient,
    updates_per_epoch,
    windows,
    windows_of_batches,
)

__all__ = [
    "accumulate_gradient",
    "check_accumulation",
    "updates_per_epoch",
    "windows",
    "windows_of_batches",
]
