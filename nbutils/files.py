"""Files that stay whole when the process that writes them is killed."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbutils.config import InputError

LOCK = ".lock"

PROGRESS, CHECKPOINT = "progress.csv", "checkpoint.pt"
"""What a run that is not finished keeps in its folder: its history, and where it can go on."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, wait for the disk, rename: at every instant `path` is the old file or the new.

    A process that is killed meanwhile leaves a hidden file beside it, `.NAME.*`.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process; the system frees it when the process ends, however it ends.

    Args:
        folder: Made where there is none. The lock is the file `.lock` in it, which stays.

    Raises:
        InputError: Another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115 - network disks lock only what can be written
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another command is at work in {folder}; wait for it to end, or choose another "
                f"--out"
            ) from error
        except OSError as error:
            raise InputError(
                f"{folder} is on a disk without locks ({error.strerror}); choose another --out"
            ) from error
        yield
