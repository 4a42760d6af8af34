"""What was seen of one update: the backward passes before it, and the gradient that was used."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nbutils.accumulation.vectors import close, ratio


@dataclass
class Backward:
    """One backward pass that reached the weight.

    Attributes:
        epoch: From 0.
        added: The gradient that it brought, shape (3, 24).
        through_logits: The part of it that came through the model's output.
        before: The gradient that was there already.
        after: The gradient afterwards; None where `torch.autograd.grad` was called.
        weight: The weight during the pass.
    """

    epoch: int
    added: Tensor
    through_logits: Tensor
    before: Tensor
    weight: Tensor
    after: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Numbers of the images whose loss had a gradient."""
        return self.through_logits.abs().sum(0).nonzero().flatten()


@dataclass
class Update:
    """One step of an optimizer: the backward passes since the last one, and what it used.

    Attributes:
        backwards: In their order.
        gradient: What the optimizer used, shape (3, 24).
        weight: The weight just before.
        given: Whether it was the optimizer that the loop was given.
        touched_before_unscaling: Whether the gradient changed between the last backward pass and
            `GradScaler.unscale_`.
    """

    backwards: list[Backward]
    gradient: Tensor
    weight: Tensor
    given: bool
    touched_before_unscaling: bool

    @property
    def own(self) -> list[Backward]:
        """The backward passes of its own epoch, without those left over from an earlier one."""
        last = max((one.epoch for one in self.backwards), default=0)
        return [one for one in self.backwards if one.epoch == last]

    @property
    def carried(self) -> list[Backward]:
        """The backward passes of an earlier epoch that are still in the gradient."""
        old = self.backwards[: len(self.backwards) - len(self.own)]
        return [one for one in old if self.gradient[:, one.images].any()]

    @property
    def images(self) -> Tensor:
        """Numbers of the images in its own backward passes, in their order."""
        return torch.cat([one.images for one in self.own]).unique()

    @property
    def total(self) -> Tensor:
        """What its own backward passes brought, shape (3, 24)."""
        return torch.stack([one.added for one in self.own]).sum(0)

    @property
    def holds_old_gradient(self) -> bool:
        """Whether the gradient of the window before was not cleared."""
        first = self.own[0]
        old = first.after is not None and bool(first.before.any())
        return old and not close(self.gradient, self.total)

    @property
    def changed_inside(self) -> bool:
        """Whether anything but a backward pass changed the gradient within the window."""
        tracked = [(one, one.after) for one in self.own if one.after is not None]
        between = any(
            bool(later.before.any()) and not close(later.before, after)
            for (_, after), (later, _) in pairwise(tracked)
        )
        return between or any(not close(after, one.before + one.added) for one, after in tracked)

    @property
    def factors(self) -> Tensor | None:
        """By how much each image's gradient was multiplied after its backward pass, shape (n,).

        One number per entry of `images`: 1 where the loop left the gradient as it was, 0 where it
        lost it. None where the loop changed the direction of the gradient, as clipping by value.
        """
        if self.holds_old_gradient:
            last = self.own[-1].after
            times = None if last is None else ratio(self.gradient, last)
            return None if times is None else torch.full((len(self.images),), times)
        used, brought = (x[:, self.images].double() for x in (self.gradient, self.total))
        each = (used * brought).sum(0) / (brought * brought).sum(0)
        is_multiple = close(self.gradient[:, self.images], each * brought) and bool(
            (each >= 0).all()
        )
        return each if is_multiple else None
