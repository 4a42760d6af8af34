"""What a run reports: its scores after an epoch, and its `RunResult`."""

import math
from dataclasses import dataclass, field

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.data.dataset import Dataset
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN, logits_of

KEPT_EPOCHS = 5  # whose predictions are kept, the last ones: single late epochs jitter


@dataclass(frozen=True)
class RunResult:
    """What a run returns.

    `history` has one row per epoch: `epoch`, from 1; `train_loss` (mean cross-entropy, nats) and
    `train_accuracy`, seen during the epoch, with dropout and while the weights change;
    `validation_accuracy`, `test_loss` and `test_accuracy` after it, the last two NaN where the
    classes of the test images are unknown; `updates` and `seconds` (without evaluation) since the
    start of the run. Accuracies are fractions in [0, 1].

    `late_predictions` are the predicted classes after each of the last k = min(`KEPT_EPOCHS`,
    epochs) epochs: uint8, shape (k, test images).
    """

    config: RunConfig
    history: pd.DataFrame = field(repr=False)
    model: nn.Module = field(repr=False)  # trained, in evaluation mode, on `device`
    late_predictions: Tensor = field(repr=False)
    data: Dataset = field(repr=False)
    images_per_epoch: int  # training images that take part in the updates of an epoch
    device: torch.device
    micro_batch: int  # images in one pass: `config.batch_size`, or less with `on_oom="split"`
    cuda_graph: bool  # whether updates were replays of CUDA graphs
    peak_memory: int  # bytes: allocated on CUDA, elsewhere resident of the whole process

    @property
    def predictions(self) -> Tensor:
        """The predicted class of every test image at the end: uint8, shape (test images,)."""
        return self.late_predictions[-1]


def evaluate(
    model: DigitCNN, data: Dataset, device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, float], Tensor]:
    """The scores of an epoch, and the predicted classes of the test images, uint8.

    The model is in evaluation mode afterwards.
    """
    model.eval()
    dtype, labels = next(model.parameters()).dtype, data.test.labels
    with autocast:
        validation, test = (
            logits_of(model, data.normalised(split.images, device, dtype))
            for split in (data.validation, data.test)
        )

    def accuracy(logits: Tensor, labels: Tensor) -> float:
        return (logits.argmax(1) == labels).sum().item() / len(labels)

    known = len(labels) > 0
    scores = {
        "validation_accuracy": accuracy(validation, data.validation.labels),
        "test_loss": F.cross_entropy(test.double(), labels).item() if known else math.nan,
        "test_accuracy": accuracy(test, labels) if known else math.nan,
    }
    return scores, test.argmax(1).to(torch.uint8)
