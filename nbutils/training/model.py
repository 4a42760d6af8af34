"""The classifier, `DigitCNN`, and the layers that may normalise its channels."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

GHOST_SIZE = 128
"""Images that ghost batch norm takes statistics over, however large the batch."""

GROUPS = 8
"""Groups of channels that group norm takes statistics over."""

Norm = Literal["batch", "ghost", "group", "none"]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that sees at most `GHOST_SIZE` images at a time while training.

    A batch is cut into consecutive ghost batches, each normalised by its own statistics, which
    update the running statistics in turn: what batch norm does with micro-batches of that size.

    Source: Hoffer, Hubara, Soudry (2017), "Train longer, generalize better", algorithm 1.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalise `images`, shape (n, channels, height, width)."""
        if not self.training:
            return super().forward(images)
        return torch.cat(
            [super(GhostBatchNorm2d, self).forward(g) for g in images.split(GHOST_SIZE)]
        )


class Dropout(nn.Dropout):
    """Dropout whose random numbers come from `generator`, image by image.

    Several runs on one device, or several pieces of one batch, then draw the same numbers as one
    run or one batch alone. `generator` is None (torch's own) or on the device of the features;
    `draw`, if it is not None, is used for the next batch instead of new numbers.
    """

    generator: torch.Generator | None = None
    draw: Tensor | None = None

    def drawn(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers in [0, 1), float32; features where they are below `1 - p` are kept."""
        return torch.rand(shape, generator=self.generator, device=device)

    def forward(self, features: Tensor) -> Tensor:
        """Drop some of `features`, shape (n, width), and scale up the rest, in training."""
        if not self.training or self.p == 0:
            return features
        draw = self.drawn(features.shape, features.device) if self.draw is None else self.draw
        kept = (draw < 1 - self.p).to(features.dtype)
        return features * kept.div_(1 - self.p)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The layer that normalises `channels` channels (a multiple of `GROUPS` for "group")."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "ghost":
            return GhostBatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(GROUPS, channels)
        case "none":
            return nn.Identity()


class DigitCNN(nn.Module):
    """A small convolutional network of the LeNet family for 28 x 28 grey images.

    Three times convolution, 2 x 2 max pooling, normalisation, ReLU, with 16, 32 and 64
    channels; then dropout and one linear layer. Pooling comes first so that the rest handles a
    quarter of the values.

    Args:
        norm: What normalises the channels: "batch", "ghost", "group" or "none".
        dropout: Chance that an input of the linear layer is dropped in training, in [0, 1).
        classes: Number of classes.
    """

    def __init__(self, norm: Norm = "group", dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__()
        channels = (1, 16, 32, 64)
        blocks = [
            nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=3, padding=1),
                nn.MaxPool2d(2),
                norm_layer(norm, outputs),
                nn.ReLU(),
            )
            for inputs, outputs in pairwise(channels)
        ]
        self.features = nn.Sequential(*blocks)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(channels[-1] * 3 * 3, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (n, classes), of `images`, shape (n, 1, 28, 28)."""
        return self.classifier(self.dropout(self.features(images).flatten(1)))
