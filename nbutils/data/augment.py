"""Random small movements of training images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each image by up to 10 degrees, and zoom and shift it by up to 10 %, at random.

    Images are float, shape (n, channels, height, width), on the device of `generator`. Each takes
    four random numbers: rotation, zoom, shift to the right, shift down. The new images are
    channels-last in memory. Where one moves away from the border, the border's pixels are repeated.
    """
    moves = torch.rand(len(images), 4, generator=generator, device=generator.device) * 2 - 1
    angle, zoom, right, down = moves.to(images.dtype).unbind(1)
    angle, zoom = angle * math.radians(10), 1 + zoom * 0.1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # The coordinates of affine_grid run from -1 to 1, so 0.2 is 10 % of the width.
    rows = [cos, -sin, right * 0.2, sin, cos, down * 0.2]
    matrices = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)
