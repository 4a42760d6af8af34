"""Make the runs of a study, each a notebook that papermill executes, then sum them up.

The kernel of each notebook is a process of its own, so that a fault stays with its run. It ends
with this process. One command at a time works in the folder of a study, and it alone puts records
there.
"""

import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from nbutils.errors import InputError
from nbutils.machine import processors
from nbutils.paths import write_json
from nbutils.studies import notebook, status
from nbutils.studies.record import read_record
from nbutils.studies.study import PlannedRun, Study, merge_with_folder


def run_study(
    study: Study,
    out: str | Path,
    jobs: int | None = None,
    executor: Executor | None = None,
    *,
    time_limit: float | None = None,
    on_oom: str = "stop",
) -> dict[str, str]:
    """Make the runs of `study` that the folder `out` does not hold yet, then execute its summary.

    Interrupted at any instant and called again, it goes on after the last whole epochs. When a run
    fails, the others go on. The summary is executed when none failed, unless it is newer than all.

    Args:
        jobs: Runs side by side; by default one per processor, or one where there is a GPU.
        executor: What makes the runs, one at a time on a machine, instead of threads here.
        time_limit: Seconds that a cell of a run's notebook may take.
        on_oom: As in `train`.

    Returns:
        The cause of each failure, by run id, or by the name of the summary notebook.

    Raises:
        InputError: The study cannot run; nothing was run or changed.
    """
    out = Path(out).absolute()
    for name, value in {"jobs": jobs, "time_limit": time_limit}.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} = {value}, but it must be a number > 0")
    merge_with_folder(study, out)
    fingerprint = _check_runnable(study, status.missing(study, out), on_oom, executor is None)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {out}; wait for it to end, or choose another --out"
        ) from error
    with lock:
        plan = merge_with_folder(study, out)  # now that no other command changes it
        _prepare(plan, out, fingerprint)
        failures = {}
        if runs := status.missing(study, out):
            import torch

            print(f"{study.title}: {len(runs)} runs to make in {out}", flush=True)
            # From the whole study, so that a run has as many threads when the rest goes on.
            jobs = jobs or (1 if torch.cuda.is_available() else processors())
            jobs = 1 if executor else min(jobs, len(study.runs))
            given: Any = {"fingerprint": fingerprint, "on_oom": on_oom, "jobs": jobs}
            task = partial(make_run, out=out, limit=time_limit, **given)
            failures = _make_runs(runs, out, executor or ThreadPoolExecutor(jobs), task)
        failures = failures or _sum_up(study, out)
        if not failures and not status.missing(plan, out):
            shutil.rmtree(out / ".work", ignore_errors=True)
    return failures


def _check_runnable(study: Study, runs: list[PlannedRun], on_oom: str, here: bool) -> str | None:
    """Refuse what cannot run; the fingerprint of the dataset, None where it does not matter."""
    if not study.dataset or (study.runs and not runs):
        return None  # without the import of torch
    from nbutils.data.sources import load_dataset
    from nbutils.training.setup import check, resolve_device

    data = load_dataset(study.dataset)
    for run in runs:
        check(run.config, data, on_oom)
        if here:
            resolve_device(run.config.device)
        if on_oom != "stop":
            notebook.check_parameters(run.notebook, ["on_oom"])
    return data.fingerprint


def _prepare(plan: Study, out: Path, fingerprint: str | None) -> None:
    """Check the records and write the plan."""
    planned = {run.run_id for run in plan.runs}
    for folder in sorted(out.iterdir()):
        if folder.is_dir() and folder.name[0] != ".":
            if folder.name not in planned:
                raise InputError(f"{folder} is not a run of this study; move it elsewhere")
            read_record(folder, fingerprint)
    work = out / ".work"
    work.mkdir(exist_ok=True)
    (out / "failures.json").unlink(missing_ok=True)  # of an earlier version of this project
    write_json(work / "study.json", asdict(plan))
    os.replace(work / "study.json", out / "study.json")
    (work / status.SPARE).write_bytes(bytes(2**16))


def make_run(
    run: PlannedRun, out: Path, fingerprint: str | None, on_oom: str, jobs: int, limit: float | None
) -> Path:
    """Execute the notebook of a run, an executor's task; the record's folder in `.work/`."""
    if not (out / "study.json").exists():
        raise InputError(f"{platform.node()} does not see the folder {out}")
    folder = status.take_over(out, run)
    record, executed = folder / run.run_id, folder / "notebook.ipynb"
    settings = run.config.to_dict() | {"on_oom": on_oom, "out": str(folder)}
    names, threads = notebook.declared_parameters(run.notebook), max(1, processors() // jobs)
    given = {name: value for name, value in settings.items() if name in names}
    notebook.execute_notebook(run.notebook, executed, given, threads=threads, time_limit=limit)
    if not record.is_dir():
        raise InputError(f"the notebook {run.notebook} ran but saved no record of {run.run_id}")
    read_record(record, fingerprint)
    os.rename(executed, record / "notebook.ipynb")
    return record


def _make_runs(
    runs: list[PlannedRun], out: Path, executor: Executor, task: Callable[[PlannedRun], Path]
) -> dict[str, str]:
    """Have the runs made, showing how far they are; the cause of each failure by run id."""
    failures: dict[str, str] = {}
    futures: dict[Future[Path], PlannedRun] = {}
    total = sum(run.config.epochs for run in runs)
    try:
        with tqdm(total=total, unit="epoch", smoothing=0.05) as bar:
            for run in runs:
                futures[executor.submit(task, run)] = run
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    run_id = futures[future].run_id
                    try:
                        _publish(future.result(), out / run_id)
                    except Exception as error:
                        failures[run_id] = status.note(out, run_id, error)
                        bar.write(f"{run_id} failed: {failures[run_id]}")
                epochs = sum(status.epochs_done(out, run) for run in runs)
                if finished or epochs > bar.n:
                    bar.n, done = epochs, len(runs) - len(pending) - len(failures)
                    bar.set_description(f"{done}/{len(runs)} runs done")
    except BaseException:
        for run in futures.values():
            with suppress(OSError):
                status.take_over(out, run)  # elsewhere a run ends when it finds its folder gone
        _end(futures)
        raise
    return failures


def _end(futures: Iterable[Future[Any]]) -> None:
    """Drop the tasks that wait, and end the kernels of those that run in this process."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # a second Ctrl-C
    for future in futures:
        future.cancel()
    end = time.monotonic() + 3
    while not all(future.done() for future in futures) and time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "ipykernel_launcher" in process.cmdline():
                    process.kill()
        time.sleep(0.1)  # a kernel may just be starting
    if main:
        signal.signal(signal.SIGINT, handler)


def _publish(record: Path, folder: Path) -> None:
    """Move the record of a finished run to where it belongs."""
    end = time.monotonic() + 90  # until then a network disk shows what another machine wrote
    while not record.exists() and time.monotonic() < end:
        time.sleep(0.5)
    os.rename(record, folder)
    shutil.rmtree(record.parents[1], ignore_errors=True)
    status.failure_file(folder.parent, folder.name).unlink(missing_ok=True)


def _sum_up(study: Study, out: Path) -> dict[str, str]:
    """Execute the summary unless it is newer than all runs; its name and why it failed, if so."""
    summary, aside = out / "summary.ipynb", out / ".work" / "summary.ipynb"
    sources = [notebook.notebook_path(study.summary), *out.glob("*/run.json")]
    newest = max(path.stat().st_mtime_ns for path in sources)
    if study.runs and summary.exists() and newest <= summary.stat().st_mtime_ns:
        return {}
    print(f"Summing up in {summary}", flush=True)
    folder = "runs" if study.runs else "out"
    given = study.parameters | {folder: str(out), "figures": str(out)}
    execute = partial(notebook.execute_notebook, study.summary, aside, given)
    future = ThreadPoolExecutor(1).submit(execute)  # nbclient takes Ctrl-C from a main thread
    try:
        future.result()
    except Exception as error:
        return {study.summary: status.note(out, study.summary, error)}
    except BaseException:
        _end([future])
        raise
    os.replace(aside, summary)
    status.failure_file(out, study.summary).unlink(missing_ok=True)
    return {}
