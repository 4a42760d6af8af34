"""What a library is given to train, and the loop of this project beside which it is put."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from nbutils.accumulation import accumulate_gradient, windows_of_batches
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, Table
from nbutils.accumulation.check.watch import Run
from nbutils.accumulation.trainers import loader_of, watch_schedule

STEPS, EPOCHS, WINDOW = ACCUMULATION_STEPS, 2, ACCUMULATION_STEPS * BATCH_SIZE
IGNORED = -100


class Task:
    """A model to train with plain SGD, and its run, which is watched.

    Attributes:
        model: Its `weight` is the only parameter.
        clip: What to clip the gradient's norm to, where it is to be clipped.
    """

    def __init__(self, run: Run, clip: float | None = None) -> None:
        self.run, self.clip = run, clip
        self.model: Table = run.probe.model
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
