"""Watches a training loop on a probe: its backward passes, its updates, and its schedule's steps.

Every `torch.optim.Optimizer` that holds the table's weight is watched. For other optimizers call
`run.record_update(gradient)` just before each update.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, EPOCHS, Batches, Probe
from nbutils.accumulation.vectors import close, relative_difference

StepFunction = Callable[..., Any]
"""`step_function(model, optimizer, scheduler, batches, accumulation_steps)`; trains one epoch."""


@dataclass(eq=False)
class Backward:
    """One backward pass that reached the weight; gradients have shape (3, 24)."""

    epoch: int  # from 0
    images: Tensor  # numbers of the images to which it came, sorted
    weight: Tensor
    before: Tensor  # the gradient that was there already
    added: Tensor
    after: Tensor | None = None  # None where `torch.autograd.grad` was called


def images_in(passes: Sequence[Backward]) -> Tensor:
    """The numbers of their images, sorted, each once."""
    return torch.cat([torch.tensor([]).long(), *(one.images for one in passes)]).unique()


def _that_count(passes: list[Backward]) -> list[Backward]:
    """Without gradients that were only looked at, or computed anew, as in SAM, after a clearing."""
    passes = [one for one in passes if one.after is not None] or passes
    cleared = max((n for n, one in enumerate(passes) if not one.before.any()), default=0)
    first = [one for one in passes[:cleared] if one.epoch == passes[-1].epoch]
    anew = torch.isin(images_in(first), images_in(passes[cleared:])).all()
    return [one for one in passes if one not in first] if anew else passes


def _holds(gradient: Tensor, one: Backward) -> bool:
    """Whether a pass is in it; what a loop adds by itself reaches its images in other amounts."""
    found, added = gradient[:, one.images], one.added[:, one.images]
    share = (found * added).sum() / (added * added).sum()
    return bool(share != 0) and relative_difference(found, share * added) < 0.1


class Update:
    """One step of an optimizer, and the backward passes since the last one.

    `gradient` is what the optimizer used, shape (3, 24). `given`: whether it was the optimizer that
    the loop was given. `kept`: the share of the gradient that the loop left before it was unscaled.
    """

    def __init__(
        self, backwards: list[Backward], gradient: Tensor, given: bool = True, kept: float = 1.0
    ) -> None:
        self.gradient, self.given, self.kept = gradient, given, kept
        self.backwards = passes = _that_count(backwards)
        # Those of its own epoch, and those of an earlier one that are still in the gradient.
        self.own = own = [one for one in passes if one.epoch == passes[-1].epoch]
        before = own[0].before if own else torch.zeros_like(gradient)
        in_place = any(one.before.any() for one in own[1:])  # in `.grad`, from pass to pass
        self.carried = [
            one
            for one in passes[: len(passes) - len(own)]
            if _holds(gradient, one) and (not in_place or before[:, one.images].any())
        ]
        # What its own epoch brought, and whether the gradient of the window before was there too.
        self.images = images_in(own)
        self.total = brought = sum((one.added for one in own), torch.zeros_like(gradient))
        self.has_old = False
        if own and own[-1].after is not None and before.any() and not close(gradient, brought):
            self.has_old, brought = True, own[-1].after
        # Whether anything but a backward pass changed the gradient in the window.
        self.changed_inside = any(
            bool(later.before.any()) and not close(later.before, earlier.before + earlier.added)
            for earlier, later in pairwise(own)
        )
        # By how much each image's part was multiplied after its pass; 0 where it was lost. None
        # where the direction of the gradient changed, as clipping by value does.
        used, brought = gradient[:, self.images], brought[:, self.images].double()
        each = (used * brought).sum(0) / (brought * brought).sum(0)
        same_direction = close(used, each * brought) and bool((each >= 0).all())
        self.factors = each if same_direction else None


class Run:
    """What was seen of a loop on one probe. `watch` fills it."""

    def __init__(self, probe: Probe, optimizer: Optimizer | None = None) -> None:
        self.probe, self.weight = probe, probe.model.weight
        self.optimizer = optimizer  # that the loop is given; None if every one may be it
        self.start = self.weight.detach().clone()
        self.updates: list[Update] = []
        self.schedule: list[int] = []  # updates made before each of its steps
        self.returned: list[Any] = []  # by the loop, one value per epoch
        self._open: list[Backward] = []  # backward passes since the last update
        self._kept, self._given = 1.0, False  # of the next update
        self._depth = 0  # an optimizer that wraps another calls the other's `step`

    def micro_batches(self, passes: Sequence[Backward]) -> list[int]:
        """The numbers of the micro-batches in some backward passes, from 0."""
        return self.probe.places[images_in(passes)].unique().tolist()

    def end_epoch(self, returned: Any = None) -> None:
        """Tell that an epoch has ended, and the loss that was logged for it, if any."""
        self.returned.append(returned)

    def record_update(self, gradient: Tensor | None = None, given: bool = True) -> None:
        """Record an update from a gradient, by default the weight's `.grad`.

        A step after no backward pass and without a gradient does nothing and is no update.
        """
        if gradient is not None or self.weight.grad is not None or self._open:
            used = self._gradient() if gradient is None else gradient.detach().clone()
            self.updates.append(Update(self._open, used, given, self._kept))
            self._open, self._kept = [], 1.0

    def _gradient(self) -> Tensor:
        """A copy; zero where there is none."""
        gradient = self.weight.grad
        return torch.zeros_like(self.start) if gradient is None else gradient.detach().clone()

    def before_adding(self, added: Tensor) -> None:
        """A backward pass is about to add to the gradient."""
        reached = self.probe.model.reached
        place = len(self.returned), reached.nonzero().flatten(), self.weight.detach().clone()
        self._open.append(Backward(*place, self._gradient(), added.detach().clone()))
        reached.zero_()

    def after_adding(self, _: Tensor) -> None:
        """It has added."""
        self._open[-1].after = self._gradient()

    def before_unscaling(self) -> None:
        """A `GradScaler` is about to divide the gradient."""
        after = self._open[-1].after if self._open else None
        if after is not None and after.any():
            self._kept *= float((self._gradient() * after).sum() / (after * after).sum())

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A closure does its backward passes inside; else the gradient is taken now."""
        if not self._is_watched(optimizer):
            return
        closure = any(map(callable, (*args[1:], *kwargs.values())))
        self._used = None if closure or self.weight.grad is None else self._gradient()
        given_before = self._given and self._depth > 0
        self._given = given_before or self.optimizer in (None, optimizer)
        self._depth += 1

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """An update is recorded when the outermost `step` is over."""
        if self._is_watched(optimizer):
            self._depth -= 1
            if self._depth == 0:
                self.record_update(self._used, self._given)

    def _is_watched(self, optimizer: Optimizer) -> bool:
        return any(p is self.weight for group in optimizer.param_groups for p in group["params"])


@contextmanager
def watch(probe: Probe, optimizer: Optimizer | None = None) -> Iterator[Run]:
    """Record what happens to the probe's model inside the `with` block."""
    run = Run(probe, optimizer)
    unscale = torch.amp.GradScaler.unscale_

    def watched_unscale(scaler: Any, of: Optimizer) -> None:
        run.before_unscaling()
        unscale(scaler, of)

    hooks = [
        probe.model.weight.register_hook(run.before_adding),
        probe.model.weight.register_post_accumulate_grad_hook(run.after_adding),
        register_optimizer_step_pre_hook(run.before_step),
        register_optimizer_step_post_hook(run.after_step),
    ]
    try:
        with patch.object(torch.amp.GradScaler, "unscale_", watched_unscale):
            yield run
    finally:
        for hook in hooks:
            hook.remove()


def watch_schedule(run: Run, schedule: Any) -> Any:
    """Record the steps of a torch schedule, which is returned."""
    kind: Any = type(schedule)

    class Recorded(kind):
        def step(self, *args: Any, **kwargs: Any) -> None:
            if not args and not kwargs:  # a step with a metric is a plateau schedule's
                run.schedule.append(len(run.updates))
            kind.step(self, *args, **kwargs)

    schedule.__class__ = Recorded  # not in `__dict__`, which is the schedule's saved state
    return schedule


class AnySchedule(LambdaLR):
    """A constant rate; its `step` takes the arguments of any other schedule's."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda _: 1.0)

    def step(self, *_: Any, **__: Any) -> None:
        """Count."""
        super().step()


def run_loop(step_function: StepFunction, probe: Probe) -> Run:
    """Run a loop on a probe and watch it; the state of torch's random numbers is kept."""
    optimizer = probe.optimizer()
    with watch(probe, optimizer) as run, undisturbed():
        schedule = watch_schedule(run, AnySchedule(optimizer))
        for _ in range(EPOCHS):
            given = probe.model, optimizer, schedule, Batches(probe.batches)
            found = step_function(*given, ACCUMULATION_STEPS)
            run.end_epoch(list(found) if isinstance(found, Iterator) else found)  # may `yield`
    return run


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep torch's random numbers; no warning of an early schedule, which the report names."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield
