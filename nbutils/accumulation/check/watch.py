"""Watches a training loop on a probe, whose gradient shows the weight of every image.

Three things are recorded while the loop trains the probe's model: the backward passes, the
gradient that each update used, and the steps of the schedule. `nbutils.accumulation.check.judge`
compares the records with the rules.

A loop that is a function is run by `run_loop`. A loop inside a trainer is watched from outside:

    runs = {}
    for name in PROBES:
        probe = make_probe(name)
        with watch(probe) as run:
            for _ in range(probe.epochs):
                ...  # train probe.model on probe.batches in their order, as the trainer does it
                run.end_epoch(logged_loss)
        runs[name] = run
    print(judge(runs))

Every `torch.optim.Optimizer` that holds the table's weight is watched. For other optimizers call
`run.record_update(gradient)` just before each update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nbutils.accumulation.check.probe import Batches, Probe
from nbutils.accumulation.check.update import Backward, Update

StepFunction = Callable[..., Any]
"""`step_function(model, optimizer, scheduler, batches, accumulation_steps)`; trains one epoch."""


@dataclass
class Run:
    """What was seen of a loop on one probe. `watch` fills it.

    Attributes:
        updates: One per step of an optimizer.
        schedule: For each step of the schedule, the number of updates made before it. A step that
            is given a metric or a position is not counted.
        returned: What the loop returned, one value per epoch.
    """

    probe: Probe
    updates: list[Update] = field(default_factory=list)
    schedule: list[int] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    open: list[Backward] = field(default_factory=list)
    touched: bool = False

    def __post_init__(self) -> None:
        self.start = self._weight.detach().clone()

    @property
    def _weight(self) -> nn.Parameter:
        return self.probe.model.weight

    @property
    def moved(self) -> bool:
        """Whether the weight is not what it was at the start."""
        return not torch.equal(self._weight.detach(), self.start.to(self._weight))

    def gradient(self) -> Tensor:
        """A copy of the gradient as it is now; zero where there is none."""
        weight = self._weight
        return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()

    def end_epoch(self, returned: Any = None) -> None:
        """Tell that an epoch has ended, and the loss that was logged for it, if any."""
        self.returned.append(returned)

    def record_update(self, gradient: Tensor | None = None, given: bool = True) -> None:
        """Record that the weight is about to be updated, with its `.grad` or another gradient.

        A step after no backward pass and without a gradient does nothing and is no update.
        """
        if gradient is None and self._weight.grad is None and not self.open:
            return
        used = self.gradient() if gradient is None else gradient.detach().clone()
        weight = self._weight.detach().clone()
        self.updates.append(Update(self.open, used, weight, given, self.touched))
        self.open, self.touched = [], False

    def schedule_of(self, optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """A schedule with a constant rate that records its steps here."""
        return _Schedule(optimizer, self.schedule, self.updates)


class _Schedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: Optimizer, steps: list[int], updates: list[Update]) -> None:
        self.steps: list[int] | None = None  # LambdaLR steps once when it is made
        super().__init__(optimizer, lambda _: 1.0)
        self.steps, self.updates = steps, updates

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self.steps is not None and not args and not kwargs:
            self.steps.append(len(self.updates))
        super().step()


def _watch_backward(run: Run) -> list[Any]:
    """Hooks that record every backward pass through the table."""
    model, weight = run.probe.model, run.probe.model.weight
    through = torch.zeros_like(weight)

    def after_forward(module: nn.Module, _: Any, logits: Tensor) -> None:
        if module is not model or not logits.requires_grad:  # a copy of the model has this hook too
            return
        numbers = model.numbers

        def on_logits(gradient: Tensor) -> None:
            through.index_add_(1, numbers, gradient.detach().T.to(through) * model.scale)

        logits.register_hook(on_logits)

    def before_adding(added: Tensor) -> None:
        known = through.clone()
        through.zero_()
        now = weight.detach().clone()
        run.open.append(
            Backward(len(run.returned), added.detach().clone(), known, run.gradient(), now)
        )

    def after_adding(_: Tensor) -> None:
        run.open[-1].after = run.gradient()

    return [
        model.register_forward_hook(after_forward),
        weight.register_hook(before_adding),
        weight.register_post_accumulate_grad_hook(after_adding),
    ]


def _watch_updates(run: Run, given: Optimizer | None) -> list[Any]:
    """Hooks on all optimizers. With a closure, the update comes after it inside `step`."""
    weight = run.probe.model.weight
    inside: list[bool] = []  # one entry per `step` in progress: a wrapper's step calls another
    recorded = [False]

    def record() -> None:
        if not recorded[0]:
            recorded[0] = True
            run.record_update(given=any(inside))

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not any(p is weight for group in optimizer.param_groups for p in group["params"]):
            return None
        inside.append(given is None or optimizer is given)
        if len(inside) == 1:
            recorded[0] = False
        elif recorded[0] and run.updates:  # an optimizer that wraps the given one
            run.updates[-1].given |= inside[-1]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            record()
            return None

        def closure_then_record() -> Any:
            loss = closure()
            record()
            return loss

        if len(args) > 1:
            return (args[0], closure_then_record, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_record}

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        if any(p is weight for group in optimizer.param_groups for p in group["params"]):
            inside.pop()

    return [
        register_optimizer_step_pre_hook(before_step),
        register_optimizer_step_post_hook(after_step),
    ]


@contextmanager
def watch(probe: Probe, optimizer: Optimizer | None = None) -> Iterator[Run]:
    """Record what happens to the probe's model inside the `with` block.

    Args:
        probe: From `make_probe`.
        optimizer: The one that the loop is given; by default every optimizer may be it.

    Yields:
        The record; it fills up. Call its `end_epoch` after each epoch.
    """
    run = Run(probe)
    hooks = _watch_backward(run) + _watch_updates(run, optimizer)
    unscale = torch.amp.GradScaler.unscale_

    def watched_unscale(scaler: Any, of: Optimizer) -> None:
        last = run.open[-1].after if run.open else None
        run.touched |= last is not None and not torch.equal(run.gradient(), last)
        unscale(scaler, of)

    setattr(torch.amp.GradScaler, "unscale_", watched_unscale)  # noqa: B010
    try:
        yield run
    finally:
        setattr(torch.amp.GradScaler, "unscale_", unscale)  # noqa: B010
        for hook in hooks:
            hook.remove()


def run_loop(step_function: StepFunction, probe: Probe) -> Run:
    """Run a loop on a probe and watch it; the state of torch's random numbers is kept.

    A loop that is no function of one epoch has a method `watch_on(probe)`, which is called instead
    (see `nbutils.accumulation.trainers`).
    """
    if hasattr(step_function, "watch_on"):
        return step_function.watch_on(probe)
    optimizer = torch.optim.SGD(probe.model.parameters(), lr=probe.learning_rate)
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        watch(probe, optimizer) as run,
    ):
        # The report says so itself where a loop steps its schedule too early.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        schedule = run.schedule_of(optimizer)
        for _ in range(probe.epochs):
            batches = Batches(probe.batches)
            run.end_epoch(
                step_function(probe.model, optimizer, schedule, batches, probe.accumulation_steps)
            )
    return run
