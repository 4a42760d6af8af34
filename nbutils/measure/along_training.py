"""The noise scale at several moments of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.window import updates_per_epoch
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.measure.noise_scale import noise_scale
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN, logits_of
from nbutils.training.setup import generator_for, resolve_device
from nbutils.training.train import train


def noise_along_training(
    config: RunConfig,
    data: Dataset,
    updates: Sequence[int],
    batch_size: int = 64,
    micro_batches: int = 64,
) -> pd.DataFrame:
    """Train as `config` says, and measure the noise scale after some of the updates.

    The measurements leave no trace in the training. Their images are drawn from the training
    images with replacement, so that they are independent. At a constant learning rate the training
    ends with the epoch of the last measurement.

    Args:
        config: The settings of the run.
        data: Its images.
        updates: Numbers of updates, each >= 1, after which to measure.
        batch_size: Images in each micro-batch of a measurement.
        micro_batches: Micro-batches of a measurement.

    Returns:
        One row per measurement: `optimizer`, `learning_rate`, `seed`, `update`,
        `validation_accuracy`, and the fields of `NoiseScale`.

    Raises:
        InputError: As `train` and `noise_scale`, or the run has fewer updates.
    """
    images = len(data.train.labels)
    per_epoch = updates_per_epoch(images, config.effective_batch_size, config.last_window)
    if not updates or min(updates) < 1 or max(updates) > per_epoch * config.epochs:
        raise InputError(
            f"updates = {list(updates)}, but they must be in 1 to {per_epoch * config.epochs}, "
            f"the updates of the run"
        )
    if config.schedule == "constant":  # another schedule would follow from fewer epochs
        config = replace(config, epochs=math.ceil(max(updates) / per_epoch))
    settings = {name: getattr(config, name) for name in ("optimizer", "learning_rate", "seed")}
    rows = []

    def after_update(update: int, model: DigitCNN) -> None:
        if update in updates:
            measured = _measure(model, config, data, update, (micro_batches, batch_size))
            rows.append(settings | {"update": update} | measured)

    train(config, data, progress=False, cuda_graph=False, after_update=after_update)
    return pd.DataFrame(rows)


def _measure(
    model: DigitCNN, config: RunConfig, data: Dataset, update: int, shape: tuple[int, int]
) -> dict[str, float]:
    """Validation accuracy and noise scale of `shape` (micro-batches, images) at these weights."""
    device, dtype = resolve_device(config.device), next(model.parameters()).dtype
    purpose = config.seed, f"noise scale after {update}"
    generator = generator_for(torch.device("cpu"), *purpose)
    chosen = torch.randint(len(data.train.labels), (math.prod(shape),), generator=generator)
    images = data.normalised(data.train.images, device, dtype)
    labels = data.train.labels.to(device)

    def losses(micro_batch: Tensor) -> Tensor:
        return F.cross_entropy(model(images[micro_batch]), labels[micro_batch], reduction="none")

    validation = data.normalised(data.validation.images, device, dtype)
    predicted = logits_of(model.eval(), validation).argmax(1)
    model.train()
    of_the_run, model.dropout.generator = model.dropout.generator, generator_for(device, *purpose)
    measured = noise_scale(model, chosen.to(device).split(shape[1]), losses)
    model.dropout.generator = of_the_run
    accuracy = (predicted == data.validation.labels).double().mean().item()
    return {"validation_accuracy": accuracy, **asdict(measured)}
