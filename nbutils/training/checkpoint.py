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
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nbutils.paths import CHECKPOINT, PROGRESS, write_atomically

Row = dict[str, float]  # of a history
UNREADABLE = (OSError, ValueError, pickle.UnpicklingError)  # of a damaged checkpoint


def save(
    folder: Path,
    parts: Mapping[str, Any],
    rows: list[Row],
    predictions: list[Tensor],
    conditions: Mapping[str, Any],
) -> None:
    """Write `progress.csv` and the checkpoint in `folder`, in place of earlier ones.

    `parts` are the objects of a run whose state changes, `rows` and `predictions` are its results.
    """
    write_atomically(folder / PROGRESS, pd.DataFrame(rows).to_csv(index=False).encode())
    states = {
        name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        for name, part in parts.items()
    }
    held = {"states": states, "results": (rows, predictions), "conditions": dict(conditions)}
    buffer = io.BytesIO()
    torch.save(held, buffer)
    content = buffer.getvalue()
    write_atomically(folder / CHECKPOINT, _digest(content) + b"\n" + content)


def resume(
    folder: Path, parts: Mapping[str, Any], conditions: Mapping[str, Any]
) -> tuple[list[Row], list[Tensor]]:
    """Put `parts` into the state of the checkpoint in `folder`; returns the results so far.

    One that is damaged or was made under other conditions is not used; a warning says why.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return [], []
    try:
        held = _read(folder)
        before = held["conditions"]
        differences = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in conditions.items()
            if before.get(name) != value
        ]
        reason = "; ".join(differences)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it cannot be read"
    if reason:
        warnings.warn(f"{path} is not used, the run starts again: {reason}", stacklevel=2)
        return [], []
    for name, part in parts.items():
        load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        load(held["states"][name])
    for group in parts["optimizer"].param_groups:
        if isinstance(group["lr"], Tensor):  # which loading leaves on the CPU
            group["lr"] = group["lr"].to(group["params"][0].device)
    return held["results"]


def micro_batch(folder: Path) -> int | None:
    """The micro-batch size of the checkpoint in `folder`; None where there is no readable one."""
    try:
        return _read(folder)["conditions"].get("micro_batch")
    except UNREADABLE:
        return None


def _read(folder: Path) -> dict[str, Any]:
    digest, _, content = (folder / CHECKPOINT).read_bytes().partition(b"\n")
    if digest != _digest(content):
        raise ValueError("it is damaged")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
