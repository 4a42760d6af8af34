"""A training of a task by one setting."""

import itertools
import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.window import accumulate_gradient, windows
from nbutils.advise.own_data import CPU, Examples, told
from nbutils.advise.task import ClassLosses, Task, seeded, weighted
from nbutils.training.setup import generator_for

CAUSE = "the model cannot be trained: "


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
        self._optimizer = task.recipe.optimizer(self.model.parameters(), lr=setting.learning_rate)
        number, generator = task.data.train.number, generator_for(CPU, start, "order of a trial")
        orders = (torch.randperm(number, generator=generator) for _ in itertools.count())
        epochs = (windows(order, *setting[:2], "drop") for order in orders)
        self._windows = itertools.chain.from_iterable(epochs)

    def _weighted(self, chosen: Tensor, examples: Examples | None = None) -> Any:
        batch = (examples or self.task.data.train).batch(chosen, self.task.device)
        return weighted(self.task.losses(self.model, batch), len(chosen))

    def losses(self, *parts: Tensor, examples: Examples | None = None) -> Tensor:
        """Losses of the training or other examples, each times its weight over the mean weight."""
        found = [torch.stack(self._weighted(part, examples)) for part in parts]
        each, weights = torch.cat(found, dim=1)
        return each * weights / weights.mean().detach()

    def update(self, window: Sequence[Tensor]) -> Tensor:
        """Make an update from a window of indices, each example by its weight; the mean loss.

        The weights are known only after the passes, so the gradient is divided by them at the end.
        """
        totals: list[Tensor] = []

        def weighed(chosen: Tensor) -> Tensor:
            each, weights = self._weighted(chosen)
            if not self.task.weighted:
                return each
            totals.append(weights.detach().sum())
            return each * weights

        self._optimizer.zero_grad()
        loss = accumulate_gradient(self.model, window, weighed, weight=len, check_finite=False)
        if totals:
            scale = sum(map(len, window)) / torch.stack(totals).sum()
            loss *= scale
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self._optimizer.step()
        return loss

    def train(self, updates: int) -> bool:
        """Make some updates; whether all losses that were looked at, the last ones, are finite."""
        if updates < 1:
            return self.finite
        started = perf_counter()
        with told(CAUSE), seeded(self.task.device, "updates of a trial", self.updates):
            for _ in range(updates):
                loss = self.update(next(self._windows))
            self.finite &= bool(loss.isfinite())  # waits for a GPU
        self.seconds += perf_counter() - started
        self.updates += updates
        return self.finite

    def judge(self, most: int) -> tuple[Tensor, float]:
        """The `losses` of at most `most` validation examples, float64, shape (n,).

        And the share that a classifier gets right, NaN of another training.
        """
        task, examples = self.task, self.task.data.validation
        number = min(most, examples.number)
        chosen = torch.arange(number) * examples.number // number
        parts, right = chosen.split(min(250, self.setting.batch_size)), math.nan
        self.model.eval()
        with told(CAUSE), torch.no_grad(), seeded(task.device, "judging"):
            if isinstance(task.losses, ClassLosses):
                batches = [examples.batch(part, task.device) for part in parts]
                logits = torch.cat([task.losses.logits(self.model, x)[1] for x, _ in batches])
                labels = torch.cat([labels for _, labels in batches])
                losses = F.cross_entropy(logits, labels, reduction="none")
                right = (logits.argmax(1) == labels).double().mean().item()
            else:
                losses = self.losses(*parts, examples=examples)
        self.model.train()
        return losses.double().cpu(), right

    def look(self, most: int) -> None:
        """Note the mean loss of at most `most` validation examples."""
        losses, accuracy = self.judge(most)
        loss = losses.mean().item()
        self.finite &= math.isfinite(loss)
        point = {"setting": str(self.setting), "start": self.start, "seconds": self.seconds}
        point |= {"updates": self.updates, "validation_loss": loss}
        self.points.append(point | {"validation_accuracy": accuracy})

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
