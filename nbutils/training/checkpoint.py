"""The state of a run after an epoch, on disk: `save` and `resume`.

A checkpoint is the SHA-256 of the rest (`torch.load` does not notice a flipped bit), then the state
and the conditions under which it was made: all that decides a run to the last bit.
"""

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nbutils.paths import CHECKPOINT, PROGRESS, write_atomically

Results = tuple[list[dict[str, float]], list[Tensor]]
"""Of a run so far: the rows of its history, and its late predictions."""

UNREADABLE = (OSError, ValueError, pickle.UnpicklingError)  # of a damaged checkpoint


def save(folder: Path, parts: dict[str, Any], results: Results, conditions: dict[str, Any]) -> None:
    """Write `progress.csv` and the checkpoint in `folder`, in place of earlier ones.

    `parts` are the objects of the run whose state changes.
    """
    write_atomically(folder / PROGRESS, pd.DataFrame(results[0]).to_csv(index=False).encode())
    states = {
        name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        for name, part in parts.items()
    }
    buffer = io.BytesIO()
    torch.save({"states": states, "results": results, "conditions": conditions}, buffer)
    content = buffer.getvalue()
    write_atomically(folder / CHECKPOINT, hashlib.sha256(content).digest() + content)


def resume(folder: Path, parts: dict[str, Any], conditions: dict[str, Any]) -> Results:
    """Put `parts` into the state of the checkpoint in `folder`; returns the results so far.

    One that is damaged or was made under other conditions is not used; a warning says why.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return [], []
    try:
        held = read(folder)
        before = held["conditions"]
        changed = [name for name, value in conditions.items() if before.get(name) != value]
        reason = "; ".join(
            f"{name} was {before.get(name)!r} and is {conditions[name]!r}" for name in changed
        )
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it cannot be read"
    if reason:
        warnings.warn(f"{path} is not used, the run starts again: {reason}", stacklevel=2)
        return [], []
    for name, part in parts.items():
        load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        load(held["states"][name])
    for group in parts["optimizer"].param_groups:
        if isinstance(group["lr"], Tensor):  # loading leaves it on the CPU
            group["lr"] = group["lr"].to(group["params"][0].device)
    return held["results"]


def read(folder: Path) -> dict[str, Any]:
    """The content of the checkpoint in `folder`; raises one of `UNREADABLE`."""
    content = (folder / CHECKPOINT).read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged, or of an earlier version")
    return torch.load(io.BytesIO(content[32:]), weights_only=True, map_location="cpu")
