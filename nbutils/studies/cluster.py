"""A study's runs on a Dask cluster: `ClusterExecutor`, for `run_study(..., executor=)`.

One run a task. On its worker it is a process of its own, which ends with the worker, and when
nobody waits for the run any more. A worker that sees the study's folder publishes the record
there. Any other makes it in a scratch folder of its own and sends the files, which are verified
here before they are published.

A scheduler tells its workers and clients what to execute, so connect only to one you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nbutils.errors import InputError
from nbutils.machine import processors
from nbutils.paths import NOTEBOOKS
from nbutils.studies.record import publish, read_record
from nbutils.studies.study import PlannedRun, _work_folder
from nbutils.studies.workers import (
    Failure,
    cause,
    death,
    end_with_children,
    task_environment,
    use_scratch,
)

RECORD_FILES = ("run.json", "history.csv", "predictions.npz", "notebook.ipynb")

SIGHT = 90
"""Seconds after which a network disk shows what another machine wrote: they remember for up to a
minute that a name was not there."""

Task = Callable[[PlannedRun, str], None]


class ClusterExecutor(Executor):
    """Makes runs on the workers of a Dask cluster.

    Where workers declare the resource `GPU`, each run on "cuda" or "auto" takes one of them.

    Args:
        address: The scheduler's, such as "tcp://10.0.0.7:8786".
        timeout: Seconds to wait for the scheduler's answer.

    Raises:
        InputError: Dask is not installed, no scheduler answers, or a worker has other code than
            this machine; the message names each such worker.
    """

    def __init__(self, address: str, timeout: float = 10) -> None:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            raise InputError(
                f"a scheduler needs the extra cluster: pip install -e '.[cluster]' ({error})"
            ) from error
        self.address = address
        self.mark = f"cluster-{uuid.uuid4().hex}"
        self.marked: set[Path] = set()
        self.code = code_version()
        try:
            self.client = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"scheduler {address}: no Dask scheduler answers there within {timeout:g} s; "
                "`dask scheduler` starts one and tells its address"
            ) from error
        try:
            self._wait_for_a_worker()
            self.gpu = self._check_workers()
        except BaseException:
            self.client.close()
            raise

    def _wait_for_a_worker(self) -> None:
        if not self.client.nthreads():
            print(f"Waiting for a worker; `dask worker {self.address}` starts one", flush=True)
            self.client.wait_for_workers(1)

    def _check_workers(self) -> bool:
        """Refuse workers with other code, warn of another torch; whether any declares a GPU."""
        torch = version("torch")
        gpu, other = False, []
        for worker, found in sorted(self.client.run(_describe, on_error="return").items()):
            if isinstance(found, BaseException):
                other.append(f"{worker} has none that works ({cause(found)})")
                continue
            gpu = gpu or found["gpu"]
            if found["nbutils"] != self.code:
                other.append(f"{worker} has {found['nbutils']}")
            elif found["torch"] != torch:
                warnings.warn(f"{worker} has torch {found['torch']}, not {torch}", stacklevel=3)
        if other:
            raise InputError(
                f"this machine has the nbutils of digest {self.code}, but {'; '.join(other)}; "
                "install the same on each worker"
            )
        return gpu

    def submit(self, task: Task, run: PlannedRun, out: str) -> Future[None]:  # type: ignore[override]
        """Have `task(run, folder)` done by a worker; its record ends up in `out`.

        The future's exception is what made the run fail for good. A run whose worker dies under
        it is tried again on another, as often as the cluster allows (`allowed-failures` of Dask).
        """
        mark = Path(out, ".work", self.mark)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        self.marked.add(mark)
        future: Future[None] = Future()
        try:
            self._send(future, task, run, mark)
        except Exception as error:  # the scheduler is gone
            _end(future, error)
        return future

    def _send(self, future: Future[None], task: Task, run: PlannedRun, mark: Path) -> None:
        """Give the run to the cluster, and see to it that `future` ends with it."""
        gpu = self.gpu and run.config.device.startswith(("auto", "cuda"))
        remote = self.client.submit(
            _run_on_worker,
            task,
            run,
            str(mark),
            self.code,
            resources={"GPU": 1} if gpu else None,
            pure=False,
        )
        again = partial(self._send, future, task, run, mark)
        future.add_done_callback(lambda future: remote.cancel() if future.cancelled() else None)
        remote.add_done_callback(partial(self._finish, future, run, mark, again))

    def _finish(
        self,
        future: Future[None],
        run: PlannedRun,
        mark: Path,
        again: Callable[[], None],
        remote: Any,
    ) -> None:
        try:
            if self._gave_up_too_early(run, mark, remote) and not future.cancelled():
                again()
                return
            self._receive(run, mark, remote)
        except BaseException as error:
            _end(future, error)
        else:
            _end(future)
        finally:
            remote.release()  # else the cluster makes it again when its worker leaves

    def _gave_up_too_early(self, run: PlannedRun, mark: Path, remote: Any) -> bool:
        """Whether some of the dead workers had the run on their list but had not begun it."""
        from distributed import KilledWorker

        error = remote.exception() if remote.status == "error" else None
        if not isinstance(error, KilledWorker):
            return False
        return len(self.client.get_events(_topic(run, mark))) <= error.allowed_failures

    def _receive(self, run: PlannedRun, mark: Path, remote: Any) -> None:
        """Publish the record, if it comes from a worker that could not.

        Raises:
            BaseException: What made the run fail.
        """
        from distributed import KilledWorker

        if remote.cancelled():
            raise Failure(f"the scheduler {self.address} was lost")
        try:
            files = remote.result()
        except KilledWorker as error:
            dead = error.allowed_failures + 1
            workers = f"{dead} worker{'s' if dead > 1 else ''}"
            reason = f"{workers} died making this run, the last at {error.last_worker.address}"
            raise Failure(reason) from error
        if files is None:
            wait_until_seen(_study_folder(mark) / run.config.run_id / "run.json")
        else:
            receive_record(run, _study_folder(mark), files)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; its workers drop what is not done yet."""
        self.client.close()
        for mark in self.marked:
            mark.unlink(missing_ok=True)


def wait_until_seen(path: Path, patience: float = SIGHT) -> None:
    """Wait for a file that another machine has written on a shared disk, `patience` seconds."""
    end = time.monotonic() + patience
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)


def _study_folder(mark: Path) -> Path:
    """The folder in which `submit` put the mark."""
    return mark.parents[1]


def _topic(run: PlannedRun, mark: Path) -> str:
    """Under which workers tell the scheduler that they begin the run."""
    return f"{mark.name}-{run.config.run_id}"


def _end(future: Future[None], error: BaseException | None = None) -> None:
    """End a future with or without an error, if it was not cancelled."""
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def code_version() -> str:
    """The start of a digest over the code of nbutils and of the notebooks."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        digest.update(json.dumps([cell["source"] for cell in cells]).encode())
    return digest.hexdigest()[:8]


def _describe(dask_worker: Any) -> dict[str, Any]:
    """What a worker has: its code of nbutils, its torch, and whether it declares a GPU."""
    gpu = "GPU" in dask_worker.state.total_resources
    return {"nbutils": code_version(), "torch": version("torch"), "gpu": gpu}


def receive_record(run: PlannedRun, out: Path, files: dict[str, bytes]) -> None:
    """Publish a record in `out` that came as the bytes of its files.

    Raises:
        InputError: It is damaged or another run's.
    """
    partial = _work_folder(out, run) / run.config.run_id
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in RECORD_FILES:
        (partial / name).write_bytes(files[name])
    read_record(partial)
    publish(partial, out / run.config.run_id)


def _run_on_worker(task: Task, run: PlannedRun, mark: str, code: str) -> dict[str, bytes] | None:
    """A worker's task: the files of the record, or None where it is in the study's folder."""
    from distributed import get_worker

    worker = get_worker()
    if code_version() != code:  # a worker that came after the client had checked
        raise Failure(
            f"needs the nbutils of digest {code}, not {code_version()} (on {worker.address})"
        )
    worker.log_event(_topic(run, Path(mark)), "begun")
    if os.access(mark, os.W_OK):
        _run_in_process(task, run, str(_study_folder(Path(mark))))
        return None
    with tempfile.TemporaryDirectory(prefix="nbutils-", dir=worker.local_directory) as scratch:
        _run_in_process(task, run, scratch)
        record = Path(scratch, run.config.run_id)
        return {name: (record / name).read_bytes() for name in RECORD_FILES}


def _run_in_process(task: Task, run: PlannedRun, out: str) -> None:
    """Have `_main` do `task(run, out)`; kill it when the task is cancelled."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    threads = max(1, processors() // worker.state.nthreads)
    with subprocess.Popen(
        [sys.executable, "-m", "nbutils.studies.cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | task_environment(threads),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps((task, run, out)))
        process.stdin.flush()
        while process.poll() is None:
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if worker.state.tasks[key].state == "cancelled":
                    process.stdin.close()  # which ends it
        reason = process.stdout.read().decode()
    if process.returncode:
        raise Failure(f"{reason or death(process.returncode)} (on {worker.address})")


def _main() -> int:
    """The process of one run: it makes the run, tells why it failed, and ends with its worker."""
    # What the notebook's kernel prints goes to the worker's log, not into the answer.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        try:
            task, run, out = pickle.load(sys.stdin.buffer)
            with tempfile.TemporaryDirectory(prefix="nbutils-") as scratch:
                use_scratch(scratch)
                threading.Thread(target=_end_with_worker, args=[scratch], daemon=True).start()
                task(run, out)
        except Exception as error:  # whatever a cell raises
            answer.write(cause(error))
            return 1
    return 0


def _end_with_worker(scratch: str) -> None:
    os.read(0, 1)  # returns when the worker's end of the pipe is closed, by its death too
    end_with_children(scratch)


if __name__ == "__main__":
    sys.exit(_main())
