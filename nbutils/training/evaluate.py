"""What a run reports of an epoch: sums during it, scores after it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.data.dataset import Dataset
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN, logits_of
from nbutils.training.setup import autocast


class EpochSums:
    """Sum of the losses and number of right answers in an epoch so far.

    They stay on the device, so that nothing waits for it before the epoch's end.
    """

    def __init__(self, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Begin an epoch."""
        self.loss.zero_()
        self.correct.zero_()

    def add(self, image_losses: Tensor, correct: Tensor) -> None:
        """Add a micro-batch: its losses and which answers are right, shape (images,) each."""
        self.loss += image_losses.sum()
        self.correct += correct.sum()

    def means(self, images: int) -> dict[str, float]:
        """Training loss and accuracy of an epoch of this many images; waits for the device."""
        return {
            "train_loss": self.loss.item() / images,
            "train_accuracy": self.correct.item() / images,
        }


def evaluate(
    config: RunConfig, data: Dataset, model: DigitCNN, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Score a model on the validation and test images; it is in evaluation mode afterwards.

    Returns:
        `validation_accuracy`, `test_loss` and `test_accuracy` (the last two NaN where the test
        classes are unknown), and the predicted classes of the test images, uint8, shape (n,).
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    with autocast(config, device):
        validation, test = (
            logits_of(model, data.normalised(split.images, device, dtype))
            for split in (data.validation, data.test)
        )
    scores = {
        "validation_accuracy": _accuracy(validation, data.validation.labels),
        "test_loss": math.nan,
        "test_accuracy": math.nan,
    }
    labels = data.test.labels
    if len(labels):
        scores["test_loss"] = F.cross_entropy(test.double(), labels).item()
        scores["test_accuracy"] = _accuracy(test, labels)
    return scores, test.argmax(1).to(torch.uint8)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)
