"""A reader's own factory of models: found by its name, and its errors told with its own lines."""

from __future__ import annotations

import importlib
import linecache
import sysconfig
import traceback
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from nbutils.errors import InputError

Factory = Callable[[], nn.Module]

NOT_THE_READERS = (
    str(Path(__file__).parents[1]),
    *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
    "<frozen",
)
"""How the paths of nbutils, Python and installed packages begin."""


def find_factory(factory: Factory | str) -> Factory:
    """Return the factory; one given as text, "package.module:name", is imported."""
    found: Any = factory
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        if not (module and name):
            raise InputError(f"factory = {factory!r}, but it must read package.module:name")
        try:
            found = attrgetter(name)(importlib.import_module(module))
        except Exception as error:  # whatever a reader's module raises
            raise InputError(f"factory = {factory!r}: {describe(error)}") from error
    if not callable(found):
        raise InputError(f"factory = {factory!r}, but it must be callable and return the model")
    return found


def describe(error: BaseException) -> str:
    """Kind and text of an error and, if it passed through the reader's code, the last line there.

    For example "ZeroDivisionError: division by zero (models.py, line 3: `return 1 / 0`)".
    """
    return f"{type(error).__name__}: {error}{quote(last_line(error))}"


def last_line(error: BaseException) -> tuple[str, int] | None:
    """File and number of the last line of the reader's that an error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(NOT_THE_READERS):
            return frame.filename, frame.lineno or 0
    return None


def quote(line: tuple[str, int] | None) -> str:
    """The end of a message about a line of a file or of a notebook's cell."""
    if line is None:
        return ""
    path, number = line
    # IPython keeps the text of its cells in linecache, under paths where there are no files.
    source = linecache.getline(path, number).strip()
    name = Path(path).name if Path(path).exists() else "a cell of the notebook"
    return f" ({name}, line {number}: `{source}`)"
