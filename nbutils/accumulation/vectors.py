"""A model's gradient as one vector, and how far two vectors are apart."""

import torch
from torch import Tensor, nn


def flat_gradient(model: nn.Module) -> Tensor:
    """A copy of the gradient of all parameters, shape (parameters,); zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def relative_difference(vector: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the norm of `other`."""
    return ((vector - other).norm() / other.norm()).item()


def constant(values: Tensor) -> bool:
    """Whether all values are equal up to rounding."""
    return close(values, values.mean().expand_as(values))


def close(vector: Tensor, other: Tensor) -> bool:
    """Whether two vectors are equal up to the rounding of their type."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(vector.dtype, 3e-2)
    vector, other = vector.double(), other.double()
    return bool((vector - other).norm() <= tolerance * other.norm())
