"""The state of a run after an epoch, on disk: `save` and `resume`.

A checkpoint is a line with the SHA-256 of the rest (`torch.load` does not notice a flipped bit),
then the state and the conditions under which it was made: all that decides a run to the last bit.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbutils.paths import CHECKPOINT, PROGRESS, write_atomically
from nbutils.training.result import KEPT_EPOCHS, history_of

UNREADABLE = (OSError, ValueError, pickle.UnpicklingError)  # of a damaged checkpoint


@dataclass
class Progress:
    """How far a run is: seconds without evaluation, and the predictions of the last epochs."""

    updates: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)

    def add(self, row: dict[str, float], predictions: Tensor) -> None:
        """Add an epoch."""
        self.rows.append(row)
        self.predictions = [*self.predictions, predictions][-KEPT_EPOCHS:]


class Parts(NamedTuple):
    """The objects of a run whose state changes while it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    generators: dict[str, torch.Generator]


def save(folder: Path, parts: Parts, progress: Progress, conditions: Mapping[str, Any]) -> None:
    """Write `progress.csv` and the checkpoint in `folder`, in place of earlier ones."""
    history = history_of(progress.rows)
    write_atomically(folder / PROGRESS, history.to_csv(index=False).encode())
    state = {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "scheduler": parts.scheduler.state_dict() if parts.scheduler else None,
        "generators": {name: each.get_state() for name, each in parts.generators.items()},
        "progress": vars(progress),
    }
    buffer = io.BytesIO()
    torch.save({"state": state, "conditions": dict(conditions)}, buffer)
    content = buffer.getvalue()
    write_atomically(folder / CHECKPOINT, _digest(content) + b"\n" + content)


def resume(folder: Path, parts: Parts, conditions: Mapping[str, Any]) -> Progress:
    """Put `parts` into the state of the checkpoint in `folder`, and return its progress.

    One that is damaged or was made under other conditions is not used; a warning says why.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Progress()
    try:
        held = _read(path)
        differences = [
            f"{name} was {held['conditions'].get(name)!r} and is {value!r}"
            for name, value in conditions.items()
            if held["conditions"].get(name) != value
        ]
        reason = "; ".join(differences)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it cannot be read"
    if reason:
        warnings.warn(f"{path} is not used, the run starts again: {reason}", stacklevel=2)
        return Progress()
    state = held["state"]
    parts.model.load_state_dict(state["model"])
    _load_in_place(parts.optimizer, state["optimizer"])
    if parts.scheduler:
        parts.scheduler.load_state_dict(state["scheduler"])
    for name, generator in parts.generators.items():
        generator.set_state(state["generators"][name])
    return Progress(**state["progress"])


def micro_batch(folder: Path) -> int | None:
    """The micro-batch size of the checkpoint in `folder`; None where there is no readable one."""
    try:
        return _read(folder / CHECKPOINT)["conditions"].get("micro_batch")
    except UNREADABLE:
        return None


def _load_in_place(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state into the tensors that the optimizer holds: graphs use their addresses."""
    held = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for parameter, tensors in held.items():
        for name, tensor in tensors.items():
            tensor.copy_(optimizer.state[parameter][name])
            optimizer.state[parameter][name] = tensor
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        rate = group["lr"]  # the only setting that changes
        group.update(before)
        if isinstance(before["lr"], Tensor):
            before["lr"].copy_(rate)
        else:
            group["lr"] = rate


def _read(path: Path) -> dict[str, Any]:
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != _digest(content):
        raise ValueError("it is damaged")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
