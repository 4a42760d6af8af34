"""What a library is given to train, the list of libraries, and this project's own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from nbutils.accumulation import accumulate_gradient, windows_of_batches
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE
from nbutils.accumulation.check.watch import Run
from nbutils.accumulation.trainers import loader_of, watch_schedule

STEPS, EPOCHS, WINDOW = ACCUMULATION_STEPS, 2, ACCUMULATION_STEPS * BATCH_SIZE
IGNORED = -100
NO_TOKENS = {"unequal tokens": "not its job"}


class Task:
    """A model to train with plain SGD in a run that is watched, clipped to the norm `clip`."""

    batch_size, steps, epochs, window, ignored = BATCH_SIZE, STEPS, EPOCHS, WINDOW, IGNORED

    def __init__(self, run: Run, clip: float | None = None) -> None:
        self.run, self.clip = run, clip
        self.model = run.probe.model
        self.dataset = run.probe.batches.dataset
        self.rate = run.probe.learning_rate
        self.end_epoch = run.end_epoch

    @property
    def loader(self) -> DataLoader[Any]:
        """The micro-batches, in order."""
        return loader_of(self.run)

    def optimizer(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.model.parameters(), lr=self.rate)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """A constant rate whose steps are counted."""
        schedule = constant_rate(optimizer)
        watch_schedule(self.run, schedule)
        return schedule


def constant_rate(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """A schedule that keeps the rate."""
    return LambdaLR(optimizer, lambda _: 1.0)


Loop = TypeVar("Loop", bound=Callable[..., None])


class Library(NamedTuple):
    """How to run a library, and the verdicts that a probe of it has instead of those measured."""

    loop: Callable[[Task], None]
    package: str  # on PyPI; "" for this project
    answers: Mapping[str, str]  # probes that cannot be run with it, and why
    words: Mapping[str, str]  # where the verdict is not "right"


LIBRARIES: dict[str, Library] = {}
"""By their names in the table, in its order: a package, or "package, variant"."""


def library(
    name: str,
    answers: Mapping[str, str] = {},
    words: Mapping[str, str] = {},
    package: str | None = None,
) -> Callable[[Loop], Loop]:
    """Add the decorated loop to `LIBRARIES`."""

    def add(loop: Loop) -> Loop:
        found = name.partition(",")[0] if package is None else package
        LIBRARIES[name] = Library(loop, found, answers, words)
        return loop

    return add


@library("this project", package="")
def this_project(task: Task) -> None:
    """`accumulate_gradient` over `windows_of_batches`."""

    def losses(batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.model(batch[0]), batch[1], reduction="none")

    def count(batch: list[Tensor]) -> int:
        return int((batch[1] != IGNORED).sum())

    optimizer = task.optimizer()
    schedule = task.schedule(optimizer)
    for _ in range(EPOCHS):
        loss_sum, images = 0.0, 0
        for window in windows_of_batches(task.loader, STEPS):
            optimizer.zero_grad()
            loss = accumulate_gradient(task.model, window, losses, weight=count)
            if task.clip:
                nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
            optimizer.step()
            schedule.step()
            size = sum(map(count, window))
            loss_sum, images = loss_sum + loss.item() * size, images + size
        task.end_epoch(loss_sum / images)
