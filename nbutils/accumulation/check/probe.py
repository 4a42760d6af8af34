"""The tiny problems on which a training loop is checked; in them the gradient shows every image.

The model is a `Table`: one column of logits per image, and each image carries its own number. So
column i of the gradient comes from image i alone, and its size is the weight of that image in the
update.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
"""Images and labels of a micro-batch."""

ACCUMULATION_STEPS, BATCH_SIZE, CLASSES, EPOCHS, PIXELS = 3, 4, 3, 2, 24
PROBES = {
    "full": (24, 2.0**-20),
    "unequal": (21, 2.0**-20),  # one image in the last micro-batch
    "short": (20, 2.0**-20),  # two micro-batches in the last window
    "large": (24, 2.0**20),
}
"""Each probe: images in an epoch, and the size of the gradient. No usual clipping acts on a small
gradient, any usual clipping acts on a large one."""


class Table(nn.Module):
    """One column of logits per image: `logits = weight[:, image] * scale`.

    The image's number is the position of its brightest pixel, which a cast, a normalisation or
    another memory format leaves in place. `reached` tells to which images a backward pass came.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(CLASSES, PIXELS, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(logits / scale)
        self.reached = torch.zeros(PIXELS, dtype=torch.bool)

    def forward(self, *images: Tensor, **named_images: Tensor) -> Tensor:
        """Logits, shape (n, 3), of images, shape (n, 1, 24, 1), under any argument's name."""
        found = [x for x in (*images, *named_images.values()) if isinstance(x, Tensor)]
        if not found or found[0].flatten(1).shape[1] % PIXELS:  # grey images may become coloured
            raise ValueError(
                f"the loop must call model(images) with images of {PIXELS} pixels, shape "
                f"(n, 1, 24, 1); it passed {[tuple(x.shape) for x in found] or 'no tensor'}"
            )
        numbers = found[0].detach().flatten(1).unflatten(1, (-1, PIXELS)).sum(1).argmax(1)
        logits = F.linear(F.one_hot(numbers, PIXELS).to(self.weight) * self.scale, self.weight)

        def on_logits(gradient: Tensor) -> None:
            self.reached[numbers[gradient.any(1)]] = True

        if logits.requires_grad:
            logits.register_hook(on_logits)
        if found[0].requires_grad:  # for a loop that looks at the gradient of the images
            logits = logits + 0 * found[0].flatten(1).sum(1, keepdim=True)
        return logits


class Batches(list[Batch]):
    """The micro-batches of an epoch, with what a loop may ask of a DataLoader."""

    batch_size = BATCH_SIZE
    drop_last = False
    sampler = None

    @property
    def dataset(self) -> TensorDataset:
        """All images and labels."""
        images, labels = zip(*self, strict=True)
        return TensorDataset(torch.cat(images), torch.cat(labels))


def cut(images: Tensor, labels: Tensor, size: int = BATCH_SIZE) -> Batches:
    """Micro-batches of `size` images."""
    return Batches(zip(images.split(size), labels.split(size), strict=True))


class Probe:
    """A tiny problem of `PROBES`: train `model` on `batches` for 2 epochs, with plain SGD.

    Images are float64 of shape (n, 1, 24, 1). An update hardly changes the logits.
    """

    def __init__(self, name: str) -> None:
        count, scale = PROBES[name]
        images = torch.eye(PIXELS, dtype=torch.float64)[:count].reshape(-1, 1, PIXELS, 1)
        self.batches = cut(images, torch.arange(count) % CLASSES)
        self.model = Table(scale)
        self.learning_rate = 1e-10 / scale**2

    def optimizer(self) -> torch.optim.SGD:
        """A new one."""
        return torch.optim.SGD(self.model.parameters(), self.learning_rate)

    @property
    def labels(self) -> Tensor:
        """Of all images, shape (images,)."""
        return self.batches.dataset.tensors[1]

    @property
    def places(self) -> Tensor:
        """The micro-batch of each column of the table, from 0, shape (24,); -1 without an image."""
        places = torch.arange(PIXELS) // BATCH_SIZE
        places[len(self.labels) :] = -1
        return places
