"""The checker runs and watches a training loop, and names the rules of accumulation it breaks."""

from nbutils.accumulation.check.judge import check_accumulation

__all__ = ["check_accumulation"]
