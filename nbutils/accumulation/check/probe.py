"""The tiny problems on which a training loop is checked; in them the gradient shows every image.

The model is a `Table`: one column of logits per image, and each image carries its own number. So
column i of the gradient comes from image i and from no other, and its size is the weight of that
image in the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
"""Images and labels of a micro-batch."""

ACCUMULATION_STEPS, BATCH_SIZE, CLASSES, PIXELS = 3, 4, 3, (1, 24, 1)
SMALL, LARGE = 2.0**-20, 2.0**20
PROBES = {
    "full": ((4, 4, 4, 4, 4, 4), SMALL),
    "unequal": ((4, 4, 4, 4, 4, 1), SMALL),
    "short": ((4, 4, 4, 4, 4), SMALL),
    "large": ((4, 4, 4, 4, 4, 4), LARGE),
}
"""Each probe: images in the micro-batches of an epoch, and the size of the gradient. No usual
clipping acts on a small gradient, any usual clipping acts on a large one."""


class Table(nn.Module):
    """One column of logits per image: `logits = weight[:, image] * scale`.

    The image's number is the position of its brightest pixel, which a cast, a normalisation or
    another memory format leaves in place.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        generator = torch.Generator().manual_seed(0)
        shape = (CLASSES, torch.Size(PIXELS).numel())
        logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(logits / scale)
        self.numbers = torch.empty(0, dtype=torch.int64)

    def forward(self, *images: Tensor, **named_images: Tensor) -> Tensor:
        """Logits, shape (n, 3), of images, shape (n, 1, 24, 1), under any argument's name."""
        found = [x for x in (*images, *named_images.values()) if isinstance(x, Tensor)]
        columns = self.weight.shape[1]
        if not found or found[0].flatten(1).shape[1] != columns:
            raise ValueError(
                f"the loop must call model(images) with images of {columns} pixels, shape "
                f"(n, {', '.join(map(str, PIXELS))}); it passed "
                f"{[tuple(x.shape) for x in found] or 'no tensor'}"
            )
        self.numbers = found[0].detach().flatten(1).argmax(1)
        return F.linear(F.one_hot(self.numbers, columns).to(self.weight) * self.scale, self.weight)


class Batches(list[Batch]):
    """The micro-batches of an epoch, with what a loop may ask of a DataLoader."""

    batch_size = BATCH_SIZE
    drop_last = False

    @property
    def dataset(self) -> TensorDataset:
        """All images and labels."""
        images, labels = zip(*self, strict=True)
        return TensorDataset(torch.cat(images), torch.cat(labels))


@dataclass
class Probe:
    """A tiny problem: train `model` on `batches` for `epochs` epochs, with plain SGD.

    Attributes:
        model: Its weight, shape (3, 24), float64, is the only parameter.
        batches: Micro-batches of images, shape (n, 1, 24, 1), float64, and labels from 0 to 2.
        learning_rate: So small that an update hardly changes the logits.
    """

    model: Table
    batches: Batches
    learning_rate: float
    epochs: int = 2
    accumulation_steps: int = ACCUMULATION_STEPS

    @property
    def labels(self) -> Tensor:
        """Of all images, shape (images,)."""
        return torch.cat([labels for _, labels in self.batches])

    @property
    def places(self) -> Tensor:
        """The micro-batch of each column of the table, from 0, shape (24,); -1 without an image."""
        sizes = torch.tensor([len(labels) for _, labels in self.batches])
        places = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return torch.cat([places, places.new_full((torch.Size(PIXELS).numel() - len(places),), -1)])


def make_probe(name: str) -> Probe:
    """The probe of that name in `PROBES`, untrained."""
    sizes, scale = PROBES[name]
    count = sum(sizes)
    images = torch.eye(torch.Size(PIXELS).numel(), dtype=torch.float64)[:count]
    images = images.reshape(count, *PIXELS)
    labels = torch.arange(count) % CLASSES
    batches = Batches(zip(images.split(sizes), labels.split(sizes), strict=True))
    return Probe(Table(scale), batches, learning_rate=1e-10 / scale**2)
