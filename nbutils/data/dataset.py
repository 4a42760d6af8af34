"""A dataset as tensors: images to train on, to choose by and to report."""

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

VALIDATION_EVERY = 10  # of the images to train on, in file order, one goes to validation


class Split(NamedTuple):
    """Images, uint8, shape (n, 1, height, width), 0 is black; and their classes, int64, from 0.

    Labels have shape (n,), or (0,) where they are unknown, as for Kaggle's test images.
    """

    images: Tensor
    labels: Tensor

    def at(self, chosen: Tensor) -> "Split":
        """Those that a mask or indices choose."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """Images to train on, to make choices by (validation), and to report results of (test)."""

    name: str
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels, in 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(str(tuple(split.images.shape)).encode())
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def pixel_mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the training pixels, scaled to [0, 1]."""
        return mean_and_std(self.train.images)

    def subset(self, images: int) -> Self:
        """The same with at most this many training images, spread evenly over the file."""
        count = min(images, len(self.train.labels))
        chosen = torch.linspace(0, len(self.train.labels) - 1, count).long()
        return replace(self, train=self.train.at(chosen))

    def normalised(self, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`images` on `device`, scaled so that the training pixels have mean 0 and deviation 1.

        They are uint8, shape (n, channels, height, width); the result is channels-last in memory.
        """
        mean, std = self.pixel_mean_and_std
        scaled = images.to(device).to(dtype).div_(255).sub_(mean).div_(std)
        return scaled.contiguous(memory_format=torch.channels_last)


def mean_and_std(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the pixels of uint8 images, scaled to [0, 1]."""
    count = torch.bincount(images.flatten(), minlength=256).double()
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (count @ value / count.sum()).item()
    variance = (count @ (value - mean) ** 2 / count.sum()).item()
    return mean, math.sqrt(variance) or 1.0
