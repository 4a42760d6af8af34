"""The checker: which rule of accumulation a training loop breaks, found by running and watching it.

`probe` holds the tiny problems, `watch` records what a loop does to them. `judge` compares the
record with the rules in `report`, with the help of `image_weights` (how much each image weighed)
and `logged_loss`.
"""

from nbutils.accumulation.check.judge import check_accumulation

__all__ = ["check_accumulation"]
