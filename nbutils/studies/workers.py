"""A process for each task on this machine: `Workers`, an executor.

A pool of processes breaks as a whole when one of them is killed. Here every task has a process of
its own, so that one which dies takes nothing with it; and such a process ends, with the kernel
that it started, when the one that waits for it is gone. Its temporary files end with it too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from nbutils.studies.kernels import fork_kernels, processes


class Failure(Exception):
    """Says in one line why a task failed."""


def cause(error: BaseException) -> str:
    """One line that says why a task failed."""
    if isinstance(error, Failure):
        return str(error)
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    hint = "; the system kills it when memory runs out" if name == "DeadKernelError" else ""
    return " ".join(f"{name}: {value}".split()) + hint


def task_environment(threads: int) -> dict[str, str]:
    """Variables for the process of a task: its threads; its progress shows in the terminal."""
    return {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}


class Workers(Executor):
    """Runs each task in a new process; a context manager.

    An error of a task arrives as a `Failure`. When the block is left by an exception, tasks that
    run are killed and others dropped.

    Args:
        jobs: Tasks side by side, >= 1.
        threads: Processor threads of each.
        log: File to which the tasks' own output is added, and that of their kernels.
        time_limit: Seconds after which a task is killed.
    """

    def __init__(self, jobs: int, threads: int, log: Path, time_limit: float | None = None) -> None:
        self._context = processes()
        self._prepare = partial(_prepare, threads, log)
        self._time_limit = time_limit
        self._pool = ThreadPoolExecutor(jobs, initializer=_hold_back_interrupts)
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._ended = False

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `task` with the arguments in a process of its own, when it is its turn."""
        return self._pool.submit(self._run, pickle.dumps(partial(task, *args, **kwargs)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._ended = True
            with self._lock:
                for pid in self._running:
                    _kill_with_children(pid)
        self.shutdown(cancel_futures=error[0] is not None)

    def _run(self, task: bytes) -> Any:
        if self._ended:
            raise Failure("interrupted before it began")
        with tempfile.TemporaryDirectory(prefix="nbutils-", ignore_cleanup_errors=True) as scratch:
            return self._run_in(scratch, task)

    def _run_in(self, scratch: str, task: bytes) -> Any:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(theirs, self._prepare, scratch, task))
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise Failure(f"no process could be started for it: {error}") from error
        assert process.pid
        with self._lock:
            self._running.add(process.pid)
            if self._ended:
                _kill_with_children(process.pid)
        theirs.close()
        try:
            end = time.monotonic() + (self._time_limit or math.inf)
            while not ours.poll(max(0, min(1, end - time.monotonic()))):
                if time.monotonic() >= end:
                    raise Failure(f"stopped at the time limit of {self._time_limit:g} s")
                if self._ended:  # a second Ctrl-C may have stopped `__exit__` in its work
                    raise Failure("interrupted")
            result, failure = ours.recv()
        except EOFError:
            process.join()
            raise Failure(death(process.exitcode)) from None
        finally:
            with self._lock:
                self._running.discard(process.pid)
            _kill_with_children(process.pid)
            process.join()
            ours.close()
        if failure:
            raise Failure(failure)
        return result


def _hold_back_interrupts() -> None:
    """Keep Ctrl-C, which is for the command alone, from the processes that this thread starts."""
    resource_tracker.ensure_running()  # it would let Ctrl-C through again when it is started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _work(pipe: Connection, prepare: Callable[[str], None], scratch: str, task: bytes) -> None:
    """What a process does: one task."""
    result, failure = None, ""
    try:
        prepare(scratch)
        result = pickle.loads(task)()
    except Exception as error:
        failure = cause(error)
    pipe.send((result, failure))


def _prepare(threads: int, log: Path, scratch: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # forgets one that was held back
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, args=[scratch], daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    use_scratch(scratch)
    os.environ.update(task_environment(threads))
    fork_kernels()


def use_scratch(folder: str) -> None:
    """Make `folder` the place of temporary files, for this process and those that it starts."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def _end_with_parent(scratch: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    end_with_children(scratch)


def end_with_children(scratch: str) -> None:
    """End this process at once, with all that it started and its temporary files."""
    _kill(psutil.Process().children(recursive=True))
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _kill_with_children(pid: int) -> None:
    """Kill a process and all that it started: a kernel has a session of its own."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        _kill([*process.children(recursive=True), process])


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def death(status: int | None) -> str:
    """What the exit status of a task's process says."""
    if status is None or status >= 0:
        return f"its process ended with exit status {status}"
    name = signal.Signals(-status).name
    hint = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"
