"""Files that stay whole when a process is killed, and that tell when they were changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from nbutils.errors import InputError
from nbutils.paths import write_atomically

DESCRIPTION = "environment.json"
"""File of a folder that tells where the other files were made, and their checksums."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process; the system frees it however the process ends.

    Args:
        folder: Made where there is none. The lock is the file `.lock` in it, which stays.

    Raises:
        InputError: Another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {folder}; wait for it to end, or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: Any) -> None:
    """Write plain values, so that at every instant the file is the old one or the new one."""
    write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, in place of an earlier one.

    Where there is an earlier one this takes two renames. A process that is killed between them
    leaves the earlier one as `.NAME.replaced`.
    """
    aside = replaced(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(new, folder)
    shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where `replace_folder` puts the earlier folder until the new one has its name."""
    return folder.with_name(f".{folder.name}.replaced")


def sha256(path: Path) -> str:
    """The digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(content: Mapping[str, Any]) -> str:
    """The digest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(environments: Sequence[dict[str, Any]], files: Mapping[str, str]) -> dict[str, Any]:
    """What the `environment.json` of a folder holds.

    Args:
        environments: Where the content was made.
        files: The SHA-256 of each other file, by name.
    """
    content = {"environments": list(environments), "files": dict(files)}
    return content | {"checksum": checksum(content)}


def read_description(folder: Path) -> dict[str, Any]:
    """What `environment.json` in `folder` holds; its checksum and those of the files are verified.

    Raises:
        InputError: Says what is wrong.
    """
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if content.keys() - {"checksum"} != {"environments", "files"}:
            raise InputError(f"{DESCRIPTION} has the keys {', '.join(content)}")
        digest = content.pop("checksum", None)  # older ones have none
        if digest and digest != checksum(content):
            raise InputError(f"{DESCRIPTION} was changed")
        files = content["files"]
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{name!r} is not the name of a file in it")
        changed = [name for name in files if sha256(folder / name) != files[name]]
    except FileNotFoundError as error:
        raise InputError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(str(error)) from error
    if changed:
        raise InputError(f"{', '.join(changed)} was changed")
    return content


def read_csv(path: Path) -> pd.DataFrame:
    """A table. Only an empty field is missing: "none" is a kind of normalisation."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name.

    Raises:
        InputError: It holds objects, which could run code when they are read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:
        raise InputError(f"{path} holds more than arrays of numbers: {error}") from error
