"""Examples of any kind in memory, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")


class Examples(NamedTuple):
    """Examples in memory: a list of items with `collate`, or without it one batch of them all."""

    items: Any
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.items if self.collate else tensors(self.items)[0])

    def batch(self, chosen: Tensor, device: torch.device = CPU) -> Any:
        """The batch of the examples with these indices, on `device`."""
        if self.collate:
            made = self.collate(self.take(chosen).items)
            return mapped(made, lambda part: part.to(device))
        return mapped(self.items, lambda part: part[chosen].to(device))

    def take(self, chosen: Tensor) -> Examples:
        """Those with these indices; tensors are copied, so that no others are pickled with them."""
        if self.collate:
            return Examples([self.items[index] for index in chosen.tolist()], self.collate)
        return Examples(self.batch(chosen))

    def first(self, number: int) -> Examples:
        """The first ones, at most as many as there are."""
        return self.take(torch.arange(min(number, self.number)))


def mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A batch, any nesting of tuples, lists and mappings, with each of its tensors changed."""
    return tree_map_only(Tensor, change, _plain(batch))


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def leaves(batch: Any) -> list[Any]:
    """Everything in a batch that is not a tuple, list or mapping."""
    return tree_leaves(_plain(batch))


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch  # also what is like a mapping
