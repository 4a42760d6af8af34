"""Trains on whole batches and on the same batches in pieces, side by side, and measures how far
the two drift apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.vectors import flat_gradient, flat_weights, relative_difference
from nbutils.accumulation.window import accumulate_gradient, windows
from nbutils.training.model import Norm, norm_layer

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2),
}

Losses = Callable[[nn.Module, Tensor], Tensor]
"""`losses(model, indices)`: the loss of each of these images."""


def small_cnn(norm: Norm, dropout: float = 0.0) -> nn.Module:
    """A network for 28 x 28 images, small enough to train in float64 in a moment."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        norm_layer(norm, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        norm_layer(norm, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16 * 7 * 7, 10),
    )


def cross_entropies(images: Tensor, labels: Tensor) -> Losses:
    """The usual losses of a classifier on `images`."""
    return lambda model, indices: F.cross_entropy(
        model(images[indices]), labels[indices], reduction="none"
    )


@dataclass
class Racer:
    """One copy of the model, trained on windows cut into pieces of one size."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    piece: int

    def update(self, window: Tensor, losses: Losses) -> None:
        """One update by the images in `window`."""
        self.optimizer.zero_grad()
        accumulate_gradient(
            self.model, window.split(self.piece), lambda indices: losses(self.model, indices)
        )
        self.optimizer.step()


def drift(
    model: nn.Module,
    optimizer: str,
    losses: Losses,
    images: int,
    effective_batch_size: int,
    pieces: Sequence[int],
    epochs: int = 1,
    losses_in_pieces: Losses | None = None,
) -> pd.DataFrame:
    """Train one copy of `model` on whole batches and one on each size of pieces.

    Args:
        model: The common start; it is not changed.
        optimizer: A key of `OPTIMIZERS`.
        losses: The loss of each image.
        images: How many there are; all copies see them in one order, drawn anew each epoch.
        effective_batch_size: Images in an update; the last update of an epoch may have fewer.
        pieces: Sizes of micro-batches to compare with whole batches.
        epochs: Passes over the images.
        losses_in_pieces: For the copies in pieces, where they are to use other losses.

    Returns:
        A row an update and size of pieces: `pieces` ("128 x 8": images, steps), `update` and
        `epoch` (from 1), `images` in the window, and `gradient` and `weights`: the norm of the
        difference to the copy with whole batches, relative to that copy's. Gradients are
        compared at weights that differ already, but for the first update.
    """
    racers = []
    for piece in [effective_batch_size, *pieces]:
        mine = copy.deepcopy(model)
        racers.append(Racer(mine, OPTIMIZERS[optimizer](list(mine.parameters())), piece))
    whole, *others = racers
    rows, update = [], 0
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(images, generator=generator)
        for (window,) in windows(order, effective_batch_size, accumulation_steps=1):
            update += 1
            whole.update(window, losses)
            for other in others:
                other.update(window, losses_in_pieces or losses)
                steps = -(-effective_batch_size // other.piece)
                rows.append(
                    {
                        "pieces": f"{other.piece} x {steps}",
                        "update": update,
                        "epoch": epoch,
                        "images": len(window),
                        "gradient": relative_difference(
                            flat_gradient(other.model), flat_gradient(whole.model)
                        ),
                        "weights": relative_difference(
                            flat_weights(other.model), flat_weights(whole.model)
                        ),
                    }
                )
    return pd.DataFrame(rows)


def ladder(
    models: Mapping[str, nn.Module],
    losses: Losses,
    images: int,
    cuts: Mapping[int, Sequence[int]],
    epochs: int,
) -> pd.DataFrame:
    """`drift` at four rungs, for every model, optimizer and cut.

    Args:
        models: The common starts, by name.
        losses: The loss of each image.
        images: How many there are.
        cuts: Sizes of pieces to compare, by effective batch size.
        epochs: Of the last rung.

    Returns:
        A row a model, optimizer and size of pieces; the rungs "first gradient", "one update",
        "one epoch" and "{epochs} epochs" as columns.
    """
    rows = {}
    for name, model in models.items():
        for optimizer in OPTIMIZERS:
            for effective_batch_size, pieces in cuts.items():
                table = drift(
                    model, optimizer, losses, images, effective_batch_size, pieces, epochs
                )
                for cut, part in table.groupby("pieces", sort=False):
                    rows[name, optimizer, cut] = {
                        "first gradient": part["gradient"].iloc[0],
                        "one update": part["weights"].iloc[0],
                        "one epoch": part["weights"][part["epoch"] == 1].iloc[-1],
                        f"{epochs} epochs": part["weights"].iloc[-1],
                    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["norm", "optimizer", "pieces"])
    return table
