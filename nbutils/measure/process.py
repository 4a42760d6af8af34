"""A reader's own code in a process of its own, and its errors told with its own lines.

The memory of the process is free again when it ends, also after an error.
"""

import io
import linecache
import marshal
import multiprocessing
import multiprocessing.forkserver
import pkgutil
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]
from torch import nn

from nbutils.accumulation.out_of_memory import is_out_of_memory
from nbutils.errors import InputError

Factory = Callable[[], nn.Module]
Result = TypeVar("Result")

FORKED = sys.platform == "linux"  # where a server that has imported torch can be forked safely
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
NOT_THE_READERS = (str(Path(__file__).parents[1]), *INSTALLED, "<frozen")  # how their paths begin


class OutOfMemory(RuntimeError):
    """The work needed more memory than there is."""


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, but code keeps the name of its file, for messages."""

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child(
        {CodeType: lambda code: (marshal.loads, (marshal.dumps(code),))}
    )


def start_server() -> None:
    """On Linux, begin to load what processes are forked from; it takes seconds, but returns now."""
    if FORKED:
        # Every optimizer imports torch._dynamo when it is made, which takes seconds.
        multiprocessing.forkserver.set_forkserver_preload(["nbutils.measure.cost", "torch._dynamo"])
        multiprocessing.forkserver.ensure_running()


def in_own_process(work: Callable[[], Result]) -> Result:
    """Call `work`, which may be a notebook's lambda, in a new process, and return its result.

    Raises:
        InputError: `work` raised an error, cannot be taken there, or ended the process.
        OutOfMemory: Memory ran out, or Linux killed the process, most likely for its memory.
    """
    content = io.BytesIO()
    try:
        _Pickler(content).dump(work)
    except Exception as error:  # pickling raises many kinds
        what = "the model's factory, its optimizer or its data"
        raise InputError(f"{what} cannot be sent to the measuring process: {error}") from error
    start_server()
    context: Any = multiprocessing.get_context("forkserver" if FORKED else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, content.getvalue()), daemon=True)
    process.start()
    sender.close()
    try:
        kind, told, line = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        if code == -signal.SIGKILL:  # what Linux does when memory runs out
            reason = "the measuring process was killed, probably because memory ran out"
            raise OutOfMemory(reason) from None
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        raise InputError(
            f"the measuring process ended {how} without a result; its own message is in the "
            f'terminal. A script must measure under `if __name__ == "__main__":`'
        ) from None
    finally:
        receiver.close()
        process.kill()
        process.join()
    if kind:
        raise kind(told + quote(line))
    return told


def _report(sender: Connection, content: bytes) -> None:
    """Do the work, in the new process, and send its result, or the error to raise."""
    try:
        sender.send((None, cloudpickle.loads(content)(), None))
    except Exception as error:  # whatever the reader's model raises
        told = f"{type(error).__name__}: {error}"
        failed = InputError, f"the model cannot be trained: {told}", last_line(error)
        sender.send((OutOfMemory, told, None) if is_out_of_memory(error) else failed)


def find_factory(factory: Factory | str) -> Factory:
    """Return the factory; one given as text, "package.module:name", is imported."""
    found: Any = factory
    if isinstance(factory, str):
        if not all(factory.partition(":")):
            raise InputError(f"factory = {factory!r}, but it must read package.module:name")
        try:
            found = pkgutil.resolve_name(factory)
        except (Exception, SystemExit) as error:  # whatever a reader's module raises
            raise InputError(f"factory = {factory!r}: {describe(error)}") from error
    if not callable(found):
        raise InputError(f"factory = {factory!r}, but it must be a function, or a class")
    return found


def find_model(factory: Factory | str) -> Factory:
    """Return what makes a model, as `find_factory`; a model itself is refused."""
    found = find_factory(factory)
    if isinstance(found, nn.Module):
        name = type(found).__name__
        how = f"give a function that makes a new one, such as lambda: {name}(...)"
        raise InputError(f"{name} is given as a model; {how}")
    return found


def describe(error: BaseException) -> str:
    """Such as "ZeroDivisionError: division by zero (models.py, line 3: `return 1 / 0`)"."""
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
