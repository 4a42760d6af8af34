"""What a library is given to train, and this project's own loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from nbutils.accumulation import accumulate_gradient, windows_of_batches
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE
from nbutils.accumulation.check.watch import Run
from nbutils.accumulation.trainers import loader_of, watch_schedule


class Task:
    """A model to train with plain SGD in a run that is watched, clipped to the norm `clip`."""

    batch_size, steps, epochs, ignored = BATCH_SIZE, ACCUMULATION_STEPS, 2, -100
    window = batch_size * steps

    def __init__(self, run: Run, clip: float | None = None) -> None:
        self.run, self.clip = run, clip
        self.model = run.probe.model
        self.dataset = run.probe.batches.dataset
        self.rate = run.probe.learning_rate
        self._loss_sum, self._images = 0.0, 0

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

    def add_loss(self, mean: float, images: int) -> None:
        """Note the mean loss of some images, where the library does not log that of an epoch."""
        self._loss_sum += mean * images
        self._images += images

    def end_epoch(self, loss: Any = None) -> None:
        """Note that an epoch ended, and its logged loss."""
        if self._images:
            loss = self._loss_sum / self._images
            self._loss_sum, self._images = 0.0, 0
        self.run.end_epoch(loss)


def constant_rate(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """A schedule that keeps the rate."""
    return LambdaLR(optimizer, lambda _: 1.0)


def this_project(task: Task) -> None:
    """`accumulate_gradient` over `windows_of_batches`."""

    def losses(batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.model(batch[0]), batch[1], reduction="none")

    def count(batch: list[Tensor]) -> int:
        return int((batch[1] != task.ignored).sum())

    optimizer = task.optimizer()
    schedule = task.schedule(optimizer)
    for _ in range(task.epochs):
        for window in windows_of_batches(task.loader, task.steps):
            optimizer.zero_grad()
            loss = accumulate_gradient(task.model, window, losses, weight=count)
            if task.clip:
                nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
            optimizer.step()
            schedule.step()
            task.add_loss(loss.item(), sum(map(count, window)))
        task.end_epoch()
