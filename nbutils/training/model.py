"""The classifier, `DigitCNN`, the layers that may normalise its channels, and what it predicts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nbutils.errors import InputError
from nbutils.training.config import ModelName, Norm

GHOST_SIZE = 128  # images over which ghost batch norm takes its statistics
GROUPS = 8  # into which group norm divides the channels
EVALUATION_BATCH = 500  # images in one pass; it affects memory and speed only

# Output channels of the convolutions of each model, block by block.
CHANNELS: dict[ModelName, tuple[tuple[int, ...], ...]] = {
    "small": ((16,), (32,), (64,)),
    "deep": ((16,), (32, 32), (64, 64)),
}


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over at most `GHOST_SIZE` consecutive images at a time while training.

    Each such ghost batch updates the running statistics in turn. Source: Hoffer, Hubara, Soudry
    (2017), "Train longer, generalize better", algorithm 1.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalise `images`, shape (n, channels, height, width)."""
        if not self.training:
            return super().forward(images)
        normalise = super().forward
        return torch.cat([normalise(ghost) for ghost in images.split(GHOST_SIZE)])


class Dropout(nn.Dropout):
    """Dropout with random numbers of its own, so that runs that take turns do not share them."""

    generator: torch.Generator | None = None  # None is torch's own

    def forward(self, features: Tensor) -> Tensor:
        """Drop some of `features`, shape (n, width), and scale up the rest, in training."""
        if not self.training or self.p == 0:
            return features
        draw = torch.rand(features.shape, generator=self.generator, device=features.device)
        kept = (draw < 1 - self.p).to(features.dtype)
        return features * kept.div_(1 - self.p)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The layer that normalises `channels` channels (a multiple of `GROUPS` for "group")."""
    if norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    return {"batch": nn.BatchNorm2d, "ghost": GhostBatchNorm2d, "none": nn.Identity}[norm](channels)


class DigitCNN(nn.Module):
    """A convolutional network of the LeNet family for 28 x 28 grey images.

    Three blocks of 3 x 3 convolutions, each followed by normalisation and ReLU; then dropout and
    one linear layer. The last convolution of a block is followed by 2 x 2 max pooling, before
    normalisation and ReLU, so that these handle a quarter of the values. "small" has three
    convolutions and about 29,000 parameters, "deep" five and 75,000.
    """

    def __init__(
        self,
        norm: Norm = "group",
        dropout: float = 0,
        classes: int = 10,
        model: ModelName = "small",
    ) -> None:
        super().__init__()
        layers, inputs = [], 1
        for block in CHANNELS[model]:
            for number, outputs in enumerate(block, start=1):
                pool = [nn.MaxPool2d(2)] if number == len(block) else []
                convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
                after = *pool, norm_layer(norm, outputs), nn.ReLU()
                layers.append(nn.Sequential(convolution, *after))
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(inputs * 3 * 3, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (n, classes), of `images`, shape (n, 1, 28, 28)."""
        return self.classifier(self.dropout(self.features(images).flatten(1)))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all `images`, shape (n, classes), on the CPU; the model is in evaluation mode."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(EVALUATION_BATCH)]).cpu()


def mean_probabilities(models: Sequence[nn.Module], images: Tensor) -> Tensor:
    """The mean of the probabilities that one or more networks in evaluation mode give each class.

    They are float64, shape (n, classes), on the CPU, of images as `Dataset.normalised` gives them.
    """
    if not models or any(model.training for model in models):
        raise InputError("models must be at least one network, each in evaluation mode")
    return torch.stack([logits_of(model, images).double().softmax(1) for model in models]).mean(0)
