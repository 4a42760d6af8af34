"""Files that stay whole when the process that writes them is killed."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbutils.errors import InputError

LOCK = ".lock"


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
