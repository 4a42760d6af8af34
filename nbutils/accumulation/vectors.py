"""A model's weights and gradient as one vector each, and how far two vectors are apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of all weights, shape (parameters,)."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def flat_gradient(model: nn.Module) -> Tensor:
    """A copy of the gradient of all parameters, shape (parameters,); zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.detach().flatten().clone() for part in parts])


def relative_difference(vector: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the norm of `other`."""
    return ((vector - other).norm() / other.norm()).item()


def close(vector: Tensor, other: Tensor) -> bool:
    """Whether two vectors are equal up to the rounding of their type."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(vector.dtype, 3e-2)
    vector, other = vector.double(), other.double()
    return bool((vector - other).norm() <= tolerance * other.norm())


def ratio(vector: Tensor, other: Tensor) -> float | None:
    """How many times `other` the vector is; None where their directions differ."""
    flat, reference = vector.double().flatten(), other.double().flatten()
    if not reference.any():
        return None
    times = (flat @ reference / (reference @ reference)).item()
    return times if times > 0 and close(vector, other * times) else None
