"""How well BatchNorm's running averages describe the training images, by size of micro-batch."""

import copy

import torch
from torch import Tensor, nn

from nbutils.data.dataset import Dataset
from nbutils.training.model import DigitCNN

SETTLE, MEASURE = 30, 20
"""Micro-batches before the averages are compared, and while they are: the start weighs 0.9**30."""


def running_statistics_error(data: Dataset, batch_sizes: list[int]) -> dict[int, float]:
    """Error of the running variances of `DigitCNN(norm="batch")` at its initial weights.

    The averages start at the statistics of all training images, then see micro-batches drawn from
    these. For each batch size: the mean relative difference between the running variance and that
    of all training images, over all channels and `MEASURE` micro-batches.
    """
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float32)
    errors = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        settled = DigitCNN("batch")
        truth = _see(settled, images, momentum=1.0)
        for size in batch_sizes:
            model, numbers = copy.deepcopy(settled), range(SETTLE + MEASURE)
            batches = (images[torch.randperm(len(images))[:size]] for _ in numbers)
            seen = torch.stack([_see(model, batch, momentum=0.1) for batch in batches])
            errors[size] = ((seen[SETTLE:] - truth) / truth).abs().mean().item()
    return errors


def _see(model: DigitCNN, images: Tensor, momentum: float) -> Tensor:
    """The running variances of all channels after a pass."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = momentum
    model.features(images)
    return torch.cat([torch.as_tensor(layer.running_var).clone() for layer in layers])
