"""The noise scale at several moments of a training."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import torch

from nbutils.accumulation.equivalence import cross_entropies
from nbutils.accumulation.window import updates_per_epoch
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.measure.noise_scale import noise_scale
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN
from nbutils.training.result import evaluate
from nbutils.training.setup import generator_for, resolve_device
from nbutils.training.train import train


def noise_along_training(
    config: RunConfig,
    data: Dataset,
    updates: Sequence[int],
    batch_size: int = 64,
    micro_batches: int = 64,
) -> pd.DataFrame:
    """Train as `config` says, and measure the noise scale after the updates with these numbers.

    The measurements leave no trace in the training. Their images, `micro_batches` times
    `batch_size`, are drawn with replacement, so that they are independent. At a constant learning
    rate the training ends with the epoch of the last measurement.

    One row per measurement: `optimizer`, `learning_rate`, `seed`, `update`, `validation_accuracy`,
    and the fields of `NoiseScale`. Raises an `InputError` as `train` and `noise_scale`, or if the
    run has fewer updates.
    """
    count, device, rows = len(data.train.labels), resolve_device(config.device), []
    per_epoch = updates_per_epoch(count, config.effective_batch_size, config.last_window)
    if not updates or min(updates) < 1 or max(updates) > per_epoch * config.epochs:
        raise InputError(
            f"updates = {list(updates)}, but they must be in 1 to {per_epoch * config.epochs}, "
            f"the updates of the run"
        )
    autocast = torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16")
    if config.schedule == "constant":  # another schedule would follow from fewer epochs
        config = replace(config, epochs=math.ceil(max(updates) / per_epoch))

    def after_update(update: int, model: DigitCNN) -> None:
        if update not in updates:
            return
        scores, _ = evaluate(model, data, device, autocast)
        images = data.normalised(data.train.images, device, next(model.parameters()).dtype)
        losses = partial(cross_entropies(images, data.train.labels.to(device)), model.train())
        purpose, of_the_run = f"noise scale after {update}", model.dropout.generator
        generator = generator_for(torch.device("cpu"), config.seed, purpose)
        chosen = torch.randint(count, (micro_batches * batch_size,), generator=generator)
        model.dropout.generator = generator_for(device, config.seed, purpose)
        measured = noise_scale(model, chosen.to(device).split(batch_size), losses)
        model.dropout.generator = of_the_run
        row = {name: getattr(config, name) for name in ("optimizer", "learning_rate", "seed")}
        row |= {"update": update, "validation_accuracy": scores["validation_accuracy"]}
        rows.append(row | asdict(measured))

    train(config, data, progress=False, cuda_graph=False, after_update=after_update)
    return pd.DataFrame(rows)
