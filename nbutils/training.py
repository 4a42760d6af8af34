"""One run: `train(config, data) -> RunResult`."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbutils.accumulation import accumulate_gradient, updates_per_epoch, windows
from nbutils.config import InputError, RunConfig
from nbutils.data import Dataset, augment
from nbutils.model import DigitCNN

EVALUATION_BATCH = 500
"""Images at a time in evaluation. It changes memory and speed only."""

HISTORY_COLUMNS = {
    "epoch": "int64",
    "train_loss": "float64",
    "train_accuracy": "float64",
    "validation_accuracy": "float64",
    "test_loss": "float64",
    "test_accuracy": "float64",
    "updates": "int64",
    "seconds": "float64",
}
"""Columns of a history, a row an epoch.

`train_loss` (mean cross-entropy, nats) and `train_accuracy` are as seen during the epoch, with
dropout and while the weights change; validation and test are evaluated after it. Accuracies are
fractions in [0, 1]. `updates` and `seconds` count from the start of the run; seconds are of
training alone, without evaluation.
"""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        config: The settings it ran with.
        history: A row an epoch, with the columns `HISTORY_COLUMNS`.
        model: The trained network, in evaluation mode, on `device`.
        predictions: uint8, shape (test images,), predicted class of every test image.
        data: The dataset it was trained on.
        images_per_epoch: Training images that take part in an epoch's updates.
        device: Where it ran.
        peak_memory: Bytes: CUDA's peak of allocated memory during the run; elsewhere the peak
            resident memory of the process so far.
    """

    config: RunConfig
    history: pd.DataFrame = field(repr=False)
    model: nn.Module = field(repr=False)
    predictions: Tensor = field(repr=False)
    data: Dataset = field(repr=False)
    images_per_epoch: int
    device: torch.device
    peak_memory: int


def train(
    config: RunConfig,
    data: Dataset,
    *,
    log_folder: str | Path | None = None,
    progress: bool = True,
) -> RunResult:
    """Train `DigitCNN` as `config` says.

    The seed decides everything random: on one machine, with one number of CPU threads, the same
    config gives bitwise the same history (all but `seconds`). Initial weights and the order of
    the images depend on the seed alone, not on batch size or accumulation steps.

    Args:
        config: The settings.
        data: The images, from `load_dataset(config.dataset)`.
        log_folder: A folder that gets `progress.csv`, the history so far, after every epoch.
        progress: Whether to show a progress bar.

    Raises:
        InputError: The device is not there, or an update needs more images than there are.
    """
    device = resolve_device(config.device)
    check_fits(config, data)
    with _repeatable(config.seed, device):
        run = _Run(config, data, device)
        rows: list[dict[str, float]] = []
        # tqdm's bar for notebooks overlooks its own switch, $TQDM_DISABLE.
        hidden = not progress or bool(os.environ.get("TQDM_DISABLE"))
        with tqdm(total=run.total_updates, unit="update", disable=hidden) as bar:
            for epoch in range(1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                rows.append({"epoch": epoch} | run.train_one_epoch(bar) | run.evaluate())
                bar.set_postfix(validation_accuracy=f"{rows[-1]['validation_accuracy']:.4f}")
                if log_folder:
                    _history(rows).to_csv(Path(log_folder) / "progress.csv", index=False)
        run.model.eval()
        return RunResult(
            config=config,
            history=_history(rows),
            model=run.model,
            predictions=run.logits(run.test_images).argmax(1).to("cpu", torch.uint8),
            data=data,
            images_per_epoch=run.images_per_epoch,
            device=device,
            peak_memory=_peak_memory(device),
        )


def resolve_device(name: str) -> torch.device:
    """The device that `RunConfig.device` means on this machine.

    Raises:
        InputError: It is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    cuda_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= cuda_devices:
        found = f"{cuda_devices} CUDA devices" if cuda_devices else "no CUDA device"
        raise InputError(f"device = {name!r}, but this machine has {found}; use 'auto' or 'cpu'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device = {name!r}, but this machine has none; use 'auto' or 'cpu'")
    return device


def check_fits(config: RunConfig, data: Dataset) -> None:
    """Refuse a config whose update needs more images than `data` has to train on.

    Raises:
        InputError: As said.
    """
    images = len(data.train.labels)
    for name, wanted in (
        ("batch_size", config.batch_size),
        ("effective_batch_size (batch_size * accumulation_steps)", config.effective_batch_size),
    ):
        if wanted > images:
            raise InputError(
                f"{name} = {wanted}, but {data.name!r} has only {images} images to train on"
            )


class _Run:
    """The moving parts of one run, on their device."""

    def __init__(self, config: RunConfig, data: Dataset, device: torch.device) -> None:
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.config = config
        self.device = device
        self.train_images = data.normalised(data.train.images, device, dtype)
        self.train_labels = data.train.labels.to(device)
        self.validation_images = data.normalised(data.validation.images, device, dtype)
        self.validation_labels = data.validation.labels.to(device)
        self.test_images = data.normalised(data.test.images, device, dtype)
        self.test_labels = data.test.labels.to(device)

        # Weights are drawn on the CPU so that a seed means the same start on every device.
        model = DigitCNN(config.norm, config.dropout, classes=len(data.class_names))
        self.model = model.to(device, dtype).to(memory_format=torch.channels_last)
        self.order_generator = torch.Generator().manual_seed(config.seed)
        self.augment_generator = torch.Generator(device).manual_seed(config.seed)

        images = len(self.train_labels)
        updates = updates_per_epoch(images, config.effective_batch_size, config.last_window)
        self.total_updates = updates * config.epochs
        self.images_per_epoch = min(images, updates * config.effective_batch_size)
        self.optimizer = _optimizer(config, self.model)
        self.scheduler = _scheduler(config, self.optimizer, self.total_updates)
        self.updates = 0
        self.seconds = 0.0

    def train_one_epoch(self, bar: tqdm) -> dict[str, float]:
        """Every image once, in a new order; the training part of the history's row."""
        config = self.config
        loss_sums: list[Tensor] = []  # summed once at the end: no wait for the device before
        correct: list[Tensor] = []

        def losses(micro_batch: Tensor) -> Tensor:
            images, labels = self.train_images[micro_batch], self.train_labels[micro_batch]
            if config.augment:
                images = augment(images, self.augment_generator)
            with self._autocast():
                logits = self.model(images)
            image_losses = F.cross_entropy(logits.to(images.dtype), labels, reduction="none")
            loss_sums.append(image_losses.detach().sum())
            correct.append((logits.detach().argmax(1) == labels).sum())
            return image_losses

        self.model.train()
        start = time.perf_counter()
        order = torch.randperm(len(self.train_labels), generator=self.order_generator)
        for window in windows(
            order.to(self.device),
            config.batch_size,
            config.accumulation_steps,
            config.last_window,
        ):
            self.optimizer.zero_grad()
            # A diverged run goes on: its history is to show that it diverged.
            accumulate_gradient(self.model, window, losses, check_finite=False)
            self.optimizer.step()
            self.scheduler.step()
            self.updates += 1
            bar.update()
        train_loss = torch.stack(loss_sums).cpu().double().sum().item() / self.images_per_epoch
        train_accuracy = torch.stack(correct).sum().item() / self.images_per_epoch
        self.seconds += time.perf_counter() - start
        return {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "updates": self.updates,
            "seconds": self.seconds,
        }

    def evaluate(self) -> dict[str, float]:
        """The evaluated part of the history's row, with the weights as they are now."""
        self.model.eval()
        validation_logits = self.logits(self.validation_images)
        test_logits = self.logits(self.test_images)
        return {
            "validation_accuracy": _accuracy(validation_logits, self.validation_labels),
            "test_loss": F.cross_entropy(test_logits.double(), self.test_labels).item(),
            "test_accuracy": _accuracy(test_logits, self.test_labels),
        }

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits, shape (n, classes), of all `images`."""
        with self._autocast():
            return torch.cat([self.model(batch) for batch in images.split(EVALUATION_BATCH)])

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def _scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, total_updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_updates, cycle_momentum=False
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def _history(rows: list[dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(HISTORY_COLUMNS)).astype(HISTORY_COLUMNS)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _repeatable(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators and choose deterministic kernels; put all back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            settings.fill_uninitialized_memory = fill
