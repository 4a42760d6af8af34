"""Work in a process of its own, whose memory is free again when it ends, also after an error."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.forkserver
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import CodeType
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]

from nbutils.accumulation.out_of_memory import is_out_of_memory
from nbutils.errors import InputError
from nbutils.measure.factory import last_line, quote

Result = TypeVar("Result")


class OutOfMemory(RuntimeError):
    """The work needed more memory than there is."""


def in_own_process(work: Callable[[], Result]) -> Result:
    """Call `work` in a new process, and return its result.

    cloudpickle takes `work` there, so it may be a lambda, hold tensors, and call what a notebook
    or script defines.

    Raises:
        InputError: `work` raised an error, or holds something that cannot be taken there.
        OutOfMemory: Memory ran out, or Linux killed the process, most likely for its memory.
        RuntimeError: The process ended in another way.
    """
    content = io.BytesIO()
    try:
        _Pickler(content).dump(work)
    except Exception as error:  # pickling raises many kinds
        raise InputError(
            f"the model's factory, its optimizer or its data cannot be sent to the measuring "
            f"process: {error}"
        ) from error
    context: Any = multiprocessing.get_context("spawn")
    if sys.platform == "linux":  # where it is safe, forked from a server that has imported torch
        context = multiprocessing.get_context("forkserver")
        # Every optimizer imports torch._dynamo when it is made, which takes seconds.
        multiprocessing.forkserver.set_forkserver_preload(["nbutils.measure.cost", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, content.getvalue()), daemon=True)
    process.start()
    sender.close()
    try:
        outcome, told, line = receiver.recv()
    except EOFError:
        process.join()
        raise _ended(process.exitcode or 0) from None
    finally:
        receiver.close()
        process.kill()
        process.join()
    if outcome == "memory":
        raise OutOfMemory(told)
    if outcome == "error":
        raise InputError(f"the model cannot be trained: {told}{quote(line)}")
    return told


def _reduced(code: CodeType) -> tuple[Any, ...]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return _from_file, (code.co_filename, make, arguments)


def _from_file(path: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    return make(*arguments).replace(co_filename=path)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, but a function keeps the file that it comes from, for messages."""

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({CodeType: _reduced})


def _ended(code: int) -> RuntimeError:
    if code == -signal.SIGKILL:  # what Linux does when memory runs out
        return OutOfMemory("the measuring process was killed, probably because memory ran out")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    return RuntimeError(
        f"the measuring process ended {how} without a result; its own message is in the terminal. "
        f'A script must measure under `if __name__ == "__main__":`'
    )


def _report(sender: Connection, content: bytes) -> None:
    """Do the work, in the new process, and send how it went."""
    try:
        sender.send(("done", cloudpickle.loads(content)(), None))
    except Exception as error:  # whatever the reader's model raises
        outcome = "memory" if is_out_of_memory(error) else "error"
        sender.send((outcome, f"{type(error).__name__}: {error}", last_line(error)))
