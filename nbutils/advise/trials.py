"""A training of a task by one setting, the optimizers that advice is given for, and time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.window import accumulate_gradient, windows
from nbutils.advise.examples import Examples
from nbutils.advise.task import ClassLosses, Maker, Task, seeded, weighted
from nbutils.errors import InputError, suggest
from nbutils.measure.cost import OptimizerFactory


@dataclass(frozen=True)
class Recipe:
    """An optimizer and the rates to try with it.

    Attributes:
        optimizer: Makes it from the parameters, and takes `lr`.
        call: The call that makes it, as source code, with the rate as `{rate}`.
        usual_rate: What is commonly tried first.
        rates: The rates of the search, ascending. By the square root of the batch size they are
            scaled to other sizes.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    call: str
    usual_rate: float
    rates: tuple[float, ...]


RECIPES = {
    "adam": Recipe(
        torch.optim.Adam,
        "torch.optim.Adam(model.parameters(), lr={rate:g})",
        1e-3,
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "sgd": Recipe(
        partial(torch.optim.SGD, momentum=0.9),
        "torch.optim.SGD(model.parameters(), lr={rate:g}, momentum=0.9)",
        1e-2,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ),
}
"""The optimizers that advice is given for."""


def recipe_for(optimizer: str) -> Recipe:
    """The recipe called `optimizer`.

    Raises:
        InputError: There is none.
    """
    if optimizer not in RECIPES:
        raise InputError(f"optimizer = {optimizer!r}; {suggest(optimizer, RECIPES)}")
    return RECIPES[optimizer]


UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
"""Seconds in each unit that a time budget may be given in."""


def parse_time(text: str | float) -> float:
    """The seconds that a number, or a text like "90s", "10min" or "1.5 h", means.

    Raises:
        InputError: It is no such text, or not more than 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = match and (match[2] or "s")
    if not match or unit not in UNITS or float(match[1]) == 0:
        raise InputError(
            f"time budget {text!r}: it must be a number > 0 and a unit, such as 90s, 10min or 1h"
        )
    return float(match[1]) * UNITS[unit]


def format_seconds(seconds: float) -> str:
    """Seconds as people read them, to three digits: "1.25 min"."""
    unit = "h" if seconds >= 3600 else "min" if seconds >= 60 else "s"
    return f"{seconds / UNITS[unit]:.3g} {unit}"


class Clock:
    """A number of seconds, from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(0.0, self._end - time.perf_counter())


class Trial:
    """A training of the task by one setting, from one start, which can be continued.

    Attributes:
        model: As it is now.
        done: Updates made.
        seconds: Time that they took.
        finite: Whether the losses were finite where they were looked at.
        batch_size: Of a micro-batch.
    """

    def __init__(
        self,
        task: Task,
        optimizer: OptimizerFactory,
        device: torch.device,
        batch_size: int,
        accumulation_steps: int = 1,
        start: int = 0,
    ) -> None:
        self.model = task.make(device, start)
        self.done, self.seconds, self.finite = 0, 0.0, True
        self.batch_size = batch_size
        self._task, self._device = task, device
        self._optimizer = optimizer(self.model.parameters())
        self._windows = self._endless(batch_size, accumulation_steps, start)

    def _endless(self, batch_size: int, steps: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(start)
        while True:
            order = torch.randperm(self._task.train.number, generator=generator)
            yield from windows(order, batch_size, steps, "drop")

    def train(self, updates: int) -> bool:
        """Make some updates; whether all losses that were looked at, the last ones, are finite."""
        if updates < 1:
            return self.finite
        with seeded(self._device, self.done):
            started = time.perf_counter()
            for _ in range(updates):
                self._optimizer.zero_grad()
                task, window = self._task, next(self._windows)
                loss = window_gradient(self.model, task.make, task.train, window, self._device)
                self._optimizer.step()
            self.finite &= bool(loss.isfinite())  # waits for a GPU
            self.seconds += time.perf_counter() - started
        self.done += updates
        return self.finite


def judge(trial: Trial, task: Task, device: torch.device, most: int) -> tuple[Tensor, float]:
    """Losses of at most `most` validation examples, float64, whose mean is the validation loss.

    Returns:
        These, shape (n,), each times its weight over the mean weight; and the share of right
        answers, NaN where there are no classes.
    """
    number = min(most, task.validation.number)
    chosen = torch.arange(number) * task.validation.number // number
    losses, right = [], 0
    trial.model.eval()
    with torch.no_grad(), seeded(device, 0):
        for part in chosen.split(min(250, trial.batch_size)):
            batch = task.validation.batch(part, device)
            if isinstance(task.losses, ClassLosses):
                logits = task.losses.logits(trial.model, batch[0])
                right += int((logits.argmax(1) == batch[1]).sum())
                each, weights = F.cross_entropy(logits, batch[1], reduction="none"), None
            else:
                each, weights = weighted(task.losses(trial.model, batch))
            weights = torch.ones_like(each) if weights is None else weights
            losses.append(torch.stack([each, weights]).double().cpu())
    trial.model.train()
    each, weights = torch.cat(losses, dim=1)
    share = right / number if isinstance(task.losses, ClassLosses) else math.nan
    return each * weights / weights.mean(), share


def window_gradient(
    model: nn.Module, make: Maker, examples: Examples, window: Any, device: torch.device
) -> Tensor:
    """Set the gradient of the window's mean loss, each example by its weight; the mean loss.

    The weights are known only after the passes, so the gradient is divided by them at the end.
    """
    totals: list[Tensor] = []

    def losses(chosen: Tensor) -> Tensor:
        each, weights = weighted(make.losses(model, examples.batch(chosen, device)))
        if weights is None:
            return each
        totals.append(weights.detach().sum())
        return each * weights

    loss = accumulate_gradient(model, window, losses, weight=len, check_finite=False)
    if not totals:
        return loss
    scale = sum(map(len, window)) / torch.stack(totals).sum()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    return loss * scale
