"""Examples of any kind in memory, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from nbutils.advise.own_data import FEWEST_IMAGES, call, spread
from nbutils.errors import InputError
from nbutils.measure.factory import describe


class Examples(NamedTuple):
    """Examples in memory.

    Attributes:
        items: With `collate`, a list of items. Without, one batch of them all: tensors of equal
            length, in any nesting of tuples, lists and mappings.
        collate: Makes a batch of some items.
    """

    items: Any
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.items) if self.collate else len(next(_tensors(self.items)))

    def batch(self, chosen: Tensor, device: torch.device) -> Any:
        """The batch of the examples with these indices, on `device`."""
        if self.collate:
            made = self.collate([self.items[index] for index in chosen.tolist()])
            return mapped(made, lambda part: part.to(device))
        return mapped(self.items, lambda part: part[chosen].to(device))

    def first(self, number: int) -> Examples:
        """Copies of the first ones; a slice would be pickled with all that it is part of."""
        if self.collate:
            return Examples(self.items[:number], self.collate)
        return Examples(mapped(self.items, lambda part: part[:number].clone()))


def read_examples(
    dataset: Any, collate: Callable[[list[Any]], Any] | None
) -> tuple[Examples, Examples, str, int]:
    """Examples of any dataset to train on, a tenth to judge by, its name, and how many there are.

    Args:
        dataset: Map-style; a tuple of tensors; or "package.module:name" of what returns one.
        collate: Makes a batch of some items. Without it items are kept as one batch if they can be.

    Raises:
        InputError: It is none of these, is too small, or its items make no batch.
    """
    name = dataset if isinstance(dataset, str) else type(dataset).__name__
    if isinstance(dataset, str):
        dataset = call(f"dataset = {name!r}", dataset)
    if isinstance(dataset, tuple) and dataset and all(isinstance(t, Tensor) for t in dataset):
        dataset = TensorDataset(*dataset)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and items by index")
    total = len(dataset)
    if total < FEWEST_IMAGES:
        raise InputError(f"dataset = {name} has {total} examples; it must have {FEWEST_IMAGES}")
    try:
        size = sum(t.numel() * t.element_size() for t in _tensors(dataset[0]))
        items = [dataset[index] for index in spread(total, size).tolist()]
        if collate is None:
            together = default_collate(items)
            parts = list(_tensors(together))
            if parts and all(len(part) == len(items) for part in parts):
                order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
                cut = max(1, len(items) // 10)
                whole, cpu = Examples(together), torch.device("cpu")
                train, held_out = (whole.batch(part, cpu) for part in (order[cut:], order[:cut]))
                held = total * (len(items) - cut) // len(items)
                return Examples(train), Examples(held_out), name, held
    except Exception as error:  # whatever the reader's dataset raises
        raise InputError(
            f"dataset = {name}: {describe(error)}; items of unequal shapes need a collate function"
        ) from error
    random.Random(0).shuffle(items)
    cut, make = max(1, len(items) // 10), collate or default_collate
    held = total * (len(items) - cut) // len(items)
    return Examples(items[cut:], make), Examples(items[:cut], make), name, held


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(part, change) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(part, change) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(part, change) for part in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
