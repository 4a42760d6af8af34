"""Where a run stands after an epoch, on disk: `save_checkpoint`, `load_checkpoint`.

A checkpoint is one file: a line with the SHA-256 of the rest, then what `torch.save` makes of the
run's state and of the conditions under which it was made. It is read with `weights_only=True`:
that builds tensors and plain values, and runs nothing that the file says.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbutils.paths import write_atomically

PROGRESS, CHECKPOINT = "progress.csv", "checkpoint.pt"
"""Files of an unfinished run: its history so far, and where it can resume."""


def save_checkpoint(path: Path, state: Mapping[str, Any], conditions: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of an earlier one.

    Args:
        path: The file.
        state: Tensors and plain values.
        conditions: Plain values: all that must be the same where the run goes on.
    """
    buffer = io.BytesIO()
    torch.save({"state": dict(state), "conditions": dict(conditions)}, buffer)
    content = buffer.getvalue()
    write_atomically(path, _digest(content) + b"\n" + content)


def load_checkpoint(path: Path, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a checkpoint, on the CPU; None where there is none that can be used.

    One that is damaged, or was made under other conditions, is not used; a warning says why.
    """
    if not path.exists():
        return None
    try:
        held = _read(path)
        differences = [
            f"{name} was {held['conditions'].get(name)!r} and is {value!r}"
            for name, value in conditions.items()
            if held["conditions"].get(name) != value
        ]
        if differences:
            raise ValueError("; ".join(differences))
        return held["state"]
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{path} is not used, the run begins anew: {reason}", stacklevel=2)
        return None


def held_condition(path: Path, name: str) -> Any:
    """A condition under which the checkpoint was made; None where there is no whole one."""
    try:
        return _read(path)["conditions"].get(name)
    except (OSError, ValueError, pickle.UnpicklingError):
        return None


def _read(path: Path) -> dict[str, Any]:
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != _digest(content):
        raise ValueError("it is damaged")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
