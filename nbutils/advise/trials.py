"""A training of a task by one setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.window import accumulate_gradient, windows
from nbutils.advise.examples import Examples
from nbutils.advise.task import ClassLosses, Losses, Task, readers_errors, seeded, weighted
from nbutils.training.setup import generator_for


class Setting(NamedTuple):
    """What trains, written everywhere as in "8 x 128 at 0.001"."""

    batch_size: int  # examples in a micro-batch
    accumulation_steps: int
    learning_rate: float

    @property
    def effective_batch_size(self) -> int:
        """Examples per update."""
        return self.batch_size * self.accumulation_steps

    def __str__(self) -> str:
        steps = f"{self.accumulation_steps} x " if self.accumulation_steps > 1 else ""
        return f"{steps}{self.batch_size} at {self.learning_rate:g}"


class Trial:
    """A training from one start, which can be continued."""

    def __init__(self, task: Task, setting: Setting, start: int = 0) -> None:
        self.model = task.make(task.device, start)
        self.task, self.setting, self.start = task, setting, start
        self.updates, self.seconds = 0, 0.0  # that were made, and that they took
        self.finite = True  # the losses, where they were looked at
        self.points: list[dict[str, Any]] = []  # a row for each look at the validation loss
        self._windows = self._endless()
        self._optimizer = task.recipe.optimizer(self.model.parameters(), lr=setting.learning_rate)

    def _endless(self) -> Iterator[tuple[Tensor, ...]]:
        generator = generator_for(torch.device("cpu"), self.start, "order of a trial")
        sizes = self.setting.batch_size, self.setting.accumulation_steps
        while True:
            order = torch.randperm(self.task.data.train.number, generator=generator)
            yield from windows(order, *sizes, "drop")

    def train(self, updates: int) -> bool:
        """Make some updates; whether all losses that were looked at, the last ones, are finite."""
        if updates < 1:
            return self.finite
        task, started = self.task, perf_counter()
        with readers_errors(), seeded(task.device, "updates of a trial", self.updates):
            for _ in range(updates):
                self._optimizer.zero_grad()
                given = task.losses, task.data.train, next(self._windows), task.device
                loss = window_gradient(self.model, *given)
                self._optimizer.step()
            self.finite &= bool(loss.isfinite())  # waits for a GPU
        self.seconds += perf_counter() - started
        self.updates += updates
        return self.finite

    def judge(self, most: int) -> tuple[Tensor, float]:
        """Losses of at most `most` validation examples, and the share of right answers or NaN.

        The losses are float64, shape (n,), each times its weight over the mean weight.
        """
        task, examples = self.task, self.task.data.validation
        number = min(most, examples.number)
        chosen = torch.arange(number) * examples.number // number
        losses, right = [], 0
        self.model.eval()
        with readers_errors(), torch.no_grad(), seeded(task.device, "judging"):
            for part in chosen.split(min(250, self.setting.batch_size)):
                batch = examples.batch(part, task.device)
                if isinstance(task.losses, ClassLosses):
                    logits = task.losses.logits(self.model, batch[0])
                    right += int((logits.argmax(1) == batch[1]).sum())
                    each, weights = F.cross_entropy(logits, batch[1], reduction="none"), None
                else:
                    each, weights = weighted(task.losses(self.model, batch))
                weights = torch.ones_like(each) if weights is None else weights
                losses.append(torch.stack([each, weights]).double().cpu())
        self.model.train()
        each, weights = torch.cat(losses, dim=1)
        return each * weights / weights.mean(), right / number if task.data.classes else math.nan

    def look(self, most: int) -> None:
        """Note the loss of at most `most` validation examples."""
        losses, accuracy = self.judge(most)
        loss = losses.mean().item()
        self.finite &= math.isfinite(loss)
        point = {"setting": str(self.setting), "start": self.start, "seconds": self.seconds}
        point |= {"updates": self.updates, "validation_loss": loss, "validation_accuracy": accuracy}
        self.points.append(point)

    def go(self, until: float, most: int) -> None:
        """Train until so many seconds of training in all, at least one update, and look."""
        if self.finite and self.seconds < until:
            while self.finite and self.seconds < until:
                speed = self.updates / self.seconds if self.updates else 0.0
                self.train(max(1, round((until - self.seconds) * speed * 0.9)))
            self.look(most)

    @property
    def lowest(self) -> float:
        """The lowest validation loss so far, infinite if none is finite."""
        lowest = smooth(pd.DataFrame(self.points))["validation_loss"].min()
        return math.inf if math.isnan(lowest) else lowest


def smooth(points: pd.DataFrame) -> pd.DataFrame:
    """With the mean loss of each look and the two before, so that no lucky look decides."""
    losses = points["validation_loss"].astype(float).replace(math.inf, math.nan)
    return points.assign(validation_loss=losses.rolling(3, min_periods=1).mean())


def window_gradient(
    model: nn.Module, losses: Losses, data: Examples, window: Sequence[Tensor], device: torch.device
) -> Tensor:
    """Set the gradient of the window's mean loss, each example by its weight; the mean loss.

    The weights are known only after the passes, so the gradient is divided by them at the end.
    """
    totals: list[Tensor] = []

    def weighed(chosen: Tensor) -> Tensor:
        each, weights = weighted(losses(model, data.batch(chosen, device)))
        if weights is None:
            return each
        totals.append(weights.detach().sum())
        return each * weights

    loss = accumulate_gradient(model, window, weighed, weight=len, check_finite=False)
    if not totals:
        return loss
    scale = sum(map(len, window)) / torch.stack(totals).sum()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    return loss * scale
