"""How well BatchNorm's running averages describe the training images, by size of micro-batch."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nbutils.data.dataset import Dataset
from nbutils.training.model import DigitCNN

SETTLE, MEASURE = 30, 20
"""Micro-batches before the averages are compared, and while they are. The start then weighs
0.9**30 = 4 % or less."""


def running_statistics_error(
    data: Dataset, batch_sizes: list[int], seed: int = 0
) -> dict[int, float]:
    """Error of the running variances of `DigitCNN(norm="batch")` at fixed, initial weights.

    The averages start at the statistics of all training images, then see micro-batches.

    Args:
        data: The micro-batches are drawn at random from its training images.
        batch_sizes: Images in a micro-batch.
        seed: Decides the weights and the draws.

    Returns:
        For each batch size, the mean relative difference between the running variance and the
        variance over all training images, over all channels and `MEASURE` micro-batches.
    """
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        settled = DigitCNN("batch").train()
        _set_momentum(settled, 1.0)
        settled.features(images)
        truth = _running_variances(settled)
        errors = {}
        for size in batch_sizes:
            model = copy.deepcopy(settled)
            _set_momentum(model, 0.1)  # BatchNorm's default
            seen = []
            for _ in range(SETTLE + MEASURE):
                model.features(images[torch.randperm(len(images))[:size]])
                seen.append(((_running_variances(model) - truth) / truth).abs().mean())
            errors[size] = torch.stack(seen[SETTLE:]).mean().item()
    return errors


def _set_momentum(model: nn.Module, momentum: float) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum


def _running_variances(model: nn.Module) -> Tensor:
    named = model.named_buffers()
    return torch.cat([value.clone() for name, value in named if name.endswith("running_var")])
