"""Runs as `load_runs` gives them, made up, for tests of what is computed or drawn from runs."""

import numpy as np
import pandas as pd

from nbutils import RunConfig
from nbutils.analysis.effects import Answers


def runs_of(*settings):
    """A table of runs, each of (config, validation accuracies by epoch, seconds of training)."""
    parts = []
    for config, accuracies, seconds in settings:
        epoch, accuracy = np.arange(1, len(accuracies) + 1), np.array(accuracies, float)
        columns = {
            "run_id": config.run_id,
            **config.to_dict(),
            "effective_batch_size": config.effective_batch_size,
            "images_per_epoch": 54_000,
            "validation_images": 6_000,
            "test_images": 10_000,
            "images_per_second": 54_000 * len(epoch) / seconds,
            "epoch": epoch,
            "train_loss": 1 - accuracy,
            "train_accuracy": accuracy,
            "validation_accuracy": accuracy,
            "test_loss": 1 - accuracy,
            "test_accuracy": accuracy - 0.001,
            "updates": 10 * epoch,
            "seconds": seconds * epoch / len(epoch),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def runs_by_rate(accuracies, rates):
    """One epoch each: `accuracies[size]` are those of `rates`."""
    return runs_of(
        *[
            (RunConfig(batch_size=size, learning_rate=rate), [accuracy], 1)
            for size, row in accuracies.items()
            for rate, accuracy in zip(rates, row, strict=True)
        ]
    )


SIZES = ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (128, 8))
NOISE = (-0.0002, 0.0001, 0.0003, -0.0001, -0.0001)
"""Of five seeds; their mean is 0."""

EPOCHS, IMAGES = 20, 10_000


def answers_of(
    accuracy, late_from=lambda size: 2, seeds=range(5), noise=1, kept=1, sizes=SIZES, **settings
):
    """A study whose test accuracy is `accuracy(batch_size, steps)`, give or take the seed.

    Args:
        accuracy: The outcome of a setting, of its batch size and accumulation steps.
        late_from: The epoch in which a batch size gets from 98 % to 99.25 % validation accuracy.
        seeds: Of every setting.
        noise: How far seeds differ, in units of `NOISE`.
        kept: Of how many last epochs the predictions are kept.
        sizes: Batch sizes and accumulation steps.
        settings: Other fields of `RunConfig`.
    """
    runs, late, epoch = [], {}, np.arange(1, EPOCHS + 1)
    for size, steps in sizes:
        # The noise of the seeds is dealt anew to each setting.
        dealt = np.random.default_rng(size + steps).permutation(NOISE)
        for seed in seeds:
            config = RunConfig(batch_size=size, accumulation_steps=steps, seed=seed, **settings)
            end = round((accuracy(size, steps) + noise * dealt[seed % len(NOISE)]) * IMAGES)
            run = runs_of((config, np.where(epoch >= late_from(size), 0.9925, 0.98), 60))
            updates = epoch * (54_000 // (size * steps))
            runs.append(run.assign(updates=updates, test_accuracy=end / IMAGES))
            # The last images are wrong, so that two runs differ in no more than they must.
            late[config.run_id] = np.tile((np.arange(IMAGES) >= end).astype(np.uint8), (kept, 1))
    return Answers(pd.concat(runs, ignore_index=True), np.zeros(IMAGES, np.uint8), late)
