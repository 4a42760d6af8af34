"""Watches a training loop on a probe: its backward passes, its updates, and its schedule's steps.

Every `torch.optim.Optimizer` that holds the table's weight is watched. For other optimizers call
`run.record_update(gradient)` just before each update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nbutils.accumulation.check.probe import Batches, Probe
from nbutils.accumulation.vectors import close

StepFunction = Callable[..., Any]
"""`step_function(model, optimizer, scheduler, batches, accumulation_steps)`; trains one epoch."""


@dataclass
class Backward:
    """One backward pass that reached the weight; gradients have shape (3, 24)."""

    epoch: int  # from 0
    weight: Tensor
    before: Tensor  # the gradient that was there already
    added: Tensor
    through: Tensor  # the part of `added` that came through the model's output
    after: Tensor | None = None  # None where `torch.autograd.grad` was called

    @property
    def images(self) -> Tensor:
        """Numbers of the images whose loss had a gradient."""
        return self.through.any(0).nonzero().flatten()


@dataclass
class Update:
    """One step of an optimizer, and the backward passes since the last one."""

    backwards: list[Backward]
    gradient: Tensor  # what the optimizer used, shape (3, 24)
    given: bool  # whether it was the optimizer that the loop was given
    touched: bool  # whether the gradient was changed before `GradScaler.unscale_`

    @property
    def own(self) -> list[Backward]:
        """The backward passes of its own epoch."""
        return [one for one in self.backwards if one.epoch == self.backwards[-1].epoch]

    @property
    def carried(self) -> list[Backward]:
        """The backward passes of an earlier epoch that are still in the gradient."""
        old = self.backwards[: len(self.backwards) - len(self.own)]
        return [one for one in old if self.gradient[:, one.images].any()]

    @property
    def images(self) -> Tensor:
        """Numbers of the images in its own backward passes, sorted."""
        return torch.cat([one.images for one in self.own]).unique()

    @property
    def total(self) -> Tensor:
        """What its own backward passes brought."""
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
        return any(
            bool(later.before.any()) and not close(later.before, earlier.before + earlier.added)
            for earlier, later in pairwise(self.own)
        )

    @property
    def factors(self) -> Tensor | None:
        """By how much each of `images` was multiplied after its backward pass; 0: it was lost.

        None where the loop changed the direction of the gradient, as clipping by value does.
        """
        brought = self.own[-1].after if self.holds_old_gradient else self.total
        if brought is None:
            return None
        used, brought = self.gradient[:, self.images], brought[:, self.images].double()
        each = (used * brought).sum(0) / (brought * brought).sum(0)
        return each if close(used, each * brought) and bool((each >= 0).all()) else None


@dataclass
class Run:
    """What was seen of a loop on one probe. `watch` fills it.

    Attributes:
        optimizer: The one that the loop is given; None if every optimizer may be it.
        updates: One per step of an optimizer.
        schedule: For each step of the schedule, the number of updates made before it. A step that
            is given a metric or a position is not counted.
        returned: What the loop returned, one value per epoch.
    """

    probe: Probe
    optimizer: Optimizer | None = None
    updates: list[Update] = field(default_factory=list)
    schedule: list[int] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.probe.weight.detach().clone()
        self._open: list[Backward] = []  # backward passes since the last update
        self._touched = self._given = False  # of the next update
        self._depth = 0  # an optimizer that wraps another calls the other's `step`

    def micro_batches(self, passes: Sequence[Backward]) -> list[int]:
        """The numbers of the micro-batches in some backward passes, from 0."""
        places = self.probe.places
        return sorted({place for one in passes for place in places[one.images].tolist()})

    def end_epoch(self, returned: Any = None) -> None:
        """Tell that an epoch has ended, and the loss that was logged for it, if any."""
        self.returned.append(returned)

    def record_update(self, gradient: Tensor | None = None, given: bool = True) -> None:
        """Record an update from a gradient, by default the weight's `.grad`.

        A step after no backward pass and without a gradient does nothing and is no update.
        """
        if gradient is not None or self.probe.weight.grad is not None or self._open:
            used = self.gradient() if gradient is None else gradient.detach().clone()
            self.updates.append(Update(self._open, used, given, self._touched))
            self._open, self._touched = [], False

    def gradient(self) -> Tensor:
        """A copy of the gradient as it is now; zero where there is none."""
        gradient = self.probe.weight.grad
        return torch.zeros_like(self.start) if gradient is None else gradient.detach().clone()

    def before_adding(self, added: Tensor) -> None:
        """A backward pass is about to add to the gradient."""
        model, epoch = self.probe.model, len(self.returned)
        now = model.weight.detach().clone(), self.gradient(), added.detach().clone()
        self._open.append(Backward(epoch, *now, model.through.clone()))
        model.through.zero_()

    def after_adding(self, _: Tensor) -> None:
        """It has added."""
        self._open[-1].after = self.gradient()

    def before_unscaling(self) -> None:
        """A `GradScaler` is about to divide the gradient."""
        last = self._open[-1].after if self._open else None
        self._touched |= last is not None and not torch.equal(self.gradient(), last)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A closure does its backward passes inside; else the gradient is taken now."""
        if not self._is_watched(optimizer):
            return
        if self._depth == 0:
            closure = any(map(callable, (*args[1:], *kwargs.values())))
            has_gradient = self.probe.weight.grad is not None and not closure
            self._used = self.gradient() if has_gradient else None
            self._given = False
        self._depth += 1
        self._given |= self.optimizer is None or optimizer is self.optimizer

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """An update is recorded when the outermost `step` is over."""
        if self._is_watched(optimizer):
            self._depth -= 1
            if self._depth == 0:
                self.record_update(self._used, self._given)

    def _is_watched(self, optimizer: Optimizer) -> bool:
        weight = self.probe.weight
        return any(p is weight for group in optimizer.param_groups for p in group["params"])


@contextmanager
def watch(probe: Probe, optimizer: Optimizer | None = None) -> Iterator[Run]:
    """Record what happens to the probe's model inside the `with` block."""
    run = Run(probe, optimizer)
    unscale = torch.amp.GradScaler.unscale_

    def watched_unscale(scaler: Any, of: Optimizer) -> None:
        run.before_unscaling()
        unscale(scaler, of)

    hooks = [
        probe.weight.register_hook(run.before_adding),
        probe.weight.register_post_accumulate_grad_hook(run.after_adding),
        register_optimizer_step_pre_hook(run.before_step),
        register_optimizer_step_post_hook(run.after_step),
    ]
    try:
        with patch.object(torch.amp.GradScaler, "unscale_", watched_unscale):
            yield run
    finally:
        for hook in hooks:
            hook.remove()


def watch_schedule(run: Run, schedule: Any) -> None:
    """Record the steps of a torch schedule."""
    step = schedule.step

    def recorded_step(*args: Any, **kwargs: Any) -> None:
        if not args and not kwargs:  # a step with a metric is a plateau schedule's
            run.schedule.append(len(run.updates))
        step(*args, **kwargs)

    schedule.step = recorded_step


class AnySchedule(LambdaLR):
    """A constant rate; its `step` takes the arguments of any other schedule's."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda _: 1.0)

    def step(self, *_: Any, **__: Any) -> None:
        """Count."""
        super().step()


def run_loop(step_function: StepFunction, probe: Probe) -> Run:
    """Run a loop on a probe and watch it; the state of torch's random numbers is kept."""
    optimizer = torch.optim.SGD(probe.model.parameters(), lr=probe.learning_rate)
    schedule = AnySchedule(optimizer)
    with watch(probe, optimizer) as run, undisturbed():
        watch_schedule(run, schedule)
        for _ in range(probe.epochs):
            given = probe.model, optimizer, schedule, Batches(probe.batches)
            run.end_epoch(step_function(*given, probe.accumulation_steps))
    return run


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep torch's random numbers; no warning of an early schedule, which the report names."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield
