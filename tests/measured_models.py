"""Models whose memory is known, and broken ones, where a measuring process can import them."""

import torch
from torch import nn


class Wide(nn.Sequential):
    """Many weights, few activations: 8 MB of weights."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 62_500), nn.Linear(62_500, 3, bias=False))


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


class LazyPair(nn.Module):
    """Lazy layers, and an output that only losses of one's own understand."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyLinear(3))

    def forward(self, images):
        return self.layers(images), None
