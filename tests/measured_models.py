"""Models whose memory is known, and broken ones, where a measuring process can import them."""

import torch
from torch import nn

WEIGHTS = 2_000_000  # of `Wide`


class Wide(nn.Module):
    """Many weights, few activations: 8 MB of weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, WEIGHTS // 32)
        self.outer = nn.Linear(WEIGHTS // 32, 3, bias=False)

    def forward(self, images):
        return self.outer(self.inner(images.flatten(1)))


class Hungry(nn.Module):
    """Keeps 1 MiB of activations per image for its backward pass."""

    kept = 2**20

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return logits * logits[:, :1].expand(-1, self.kept // 4).exp().mean(1, keepdim=True)


class Broken(nn.Linear):
    """Its outputs are not numbers."""

    def __init__(self):
        super().__init__(16, 3)

    def forward(self, images):
        return super().forward(images.flatten(1)) * torch.nan


def not_a_model():
    return "model"


def no_width():
    return nn.Linear(16, 3 // 0)


def lazy_pair():
    """Lazy layers, and an output that only losses of one's own understand."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyLinear(3))

        def forward(self, images):
            return self.layers(images), None

    return Pair()


def out_of_cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")
