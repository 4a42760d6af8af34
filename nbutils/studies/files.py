"""Files that stay whole when a process is killed, and that tell when they were changed.

A manifest is a JSON file with the SHA-256 of other files of its folder (`files`), and one over all
that it says (`checksum`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from nbutils.errors import InputError
from nbutils.paths import write_atomically


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder`, made where there is none, for this process; InputError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {folder}; wait for it to end, or choose another --out"
        ) from error
    with lock:
        yield


def write_json(path: Path, content: Any) -> None:
    """Write plain values, so that at every instant the file is the old one or the new one."""
    write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())


def write_manifest(path: Path, content: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write a manifest of `files`, which lie beside it."""
    signed = {**content, "files": {name: _sha256(path.with_name(name)) for name in files}}
    write_json(path, signed | {"checksum": _checksum(signed)})


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says, its checksums verified; InputError says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        older = content.keys() == {"environments", "files"}  # a reference, before checksums
        if content.pop("checksum", None) != _checksum(content) and not older:
            raise InputError(f"{path.name} was changed")
        for name, expected in content["files"].items():
            if Path(name).name != name:
                raise InputError(f"{name!r} is not the name of a file in it")
            if _sha256(path.with_name(name)) != expected:
                raise InputError(f"{name} was changed")
    except FileNotFoundError as error:
        raise InputError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(error)) from error
    return content


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; killed between two renames, it leaves the earlier as `replaced`."""
    aside = replaced(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(new, folder)
    shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where `replace_folder` puts the earlier folder until the new one has its name."""
    return folder.with_name(f".{folder.name}.replaced")


def read_csv(path: Path) -> pd.DataFrame:
    """A table. Only an empty field is missing: "none" is a kind of normalisation."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name; ValueError for objects, which could run code."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
