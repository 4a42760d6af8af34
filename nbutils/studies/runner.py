"""Make the runs of a study, each a notebook that papermill executes, then sum them up.

The kernel of each notebook is a process of its own, so that a fault stays with its run. One
command at a time works in the folder of a study, and it alone puts records there.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from nbutils.errors import InputError
from nbutils.machine import processors
from nbutils.paths import CHECKPOINT, PROGRESS, write_json
from nbutils.studies import notebook, status
from nbutils.studies.study import PlannedRun, Study, merge_with_folder

SIGHT = 90  # seconds after which a network disk surely shows what another machine wrote


def run_study(
    study: Study,
    out: str | Path,
    jobs: int | None = None,
    executor: Executor | None = None,
    *,
    time_limit: float | None = None,
    on_oom: str = "stop",
) -> dict[str, str]:
    """Make the runs of `study` that `out` does not hold yet, then execute its summary.

    Interrupted at any instant and called again, it goes on after the last whole epochs. When a run
    fails, the others go on. The summary is executed when none failed, unless it is newer than all.

    Args:
        study: From `load_study`.
        out: Folder of the study's runs.
        jobs: Runs side by side; by default one per processor, or one where there is a GPU.
        executor: What makes the runs, instead of threads here. It must see the folder.
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
    fingerprints = _check_runnable(study, status.missing(study, out), on_oom, executor is None)
    with _locked(out):
        plan = merge_with_folder(study, out)  # now that no other command changes it
        _prepare(plan, out, fingerprints)
        failures = {}
        if runs := status.missing(study, out):
            import torch

            # From the whole study, so that a run has as many threads when the rest goes on.
            jobs = jobs or (1 if torch.cuda.is_available() else processors())
            jobs = min(jobs, len(study.runs))
            threads = None if executor else max(1, processors() // jobs)
            task = partial(make_run, out=str(out), on_oom=on_oom, threads=threads, limit=time_limit)
            check = partial(status.check_record, fingerprints=fingerprints)
            print(f"{study.title}: {len(runs)} runs to make in {out}", flush=True)
            failures = _make_runs(runs, out, executor or ThreadPoolExecutor(jobs), task, check)
        if not failures and (runs or not _is_summed_up(study, out)):
            failures = _sum_up(study, out)
        if not failures and not status.missing(plan, out):
            shutil.rmtree(out / ".work", ignore_errors=True)
    return failures


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process; InputError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {folder}; wait for it to end, or choose another --out"
        ) from error
    with lock:
        yield


def _check_runnable(
    study: Study, runs: list[PlannedRun], on_oom: str, here: bool
) -> dict[str, str]:
    """Refuse what cannot run; the fingerprint of each dataset by its name."""
    if study.runs and not runs:
        return {}  # without the import of torch
    from nbutils.data.sources import load_dataset
    from nbutils.training.setup import check, resolve_device

    datasets = {name: load_dataset(name) for name in study.datasets}
    for run in runs:
        check(run.config, datasets[run.config.dataset], on_oom)
        if here:
            resolve_device(run.config.device)
        if on_oom != "stop":
            notebook.check_parameters(run.notebook, ["on_oom"])
    return {name: data.fingerprint for name, data in datasets.items()}


def _prepare(plan: Study, out: Path, fingerprints: Mapping[str, str]) -> None:
    """Check the records, write the plan, put in order what a killed command left."""
    planned = {run.run_id: run for run in plan.runs}
    done = {path.name: path for path in out.iterdir() if path.is_dir() and path.name[0] != "."}
    for name, folder in sorted(done.items()):
        if name not in planned:
            raise InputError(f"{folder} is not a run of this study; move it elsewhere")
        status.check_record(folder, planned[name], fingerprints)
    status.note(out, dict.fromkeys(done))
    for aside in out.glob(".*.json.*"):  # what it was writing
        aside.unlink(missing_ok=True)
    write_json(out / "study.json", asdict(plan))
    (out / ".work").mkdir(exist_ok=True)
    (out / ".work" / status.SPARE).write_bytes(bytes(2**16))


def make_run(
    run: PlannedRun, out: str, on_oom: str, threads: int | None, limit: float | None
) -> str:
    """Execute the notebook of a run, an executor's task; the record's folder in `.work/`."""
    if not Path(out, "study.json").exists():
        raise InputError(f"{platform.node()} does not see the folder {out}")
    folder = status.take_over(Path(out), run)
    for path in folder.iterdir():  # what an earlier attempt left half done
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (PROGRESS, CHECKPOINT):
            path.unlink()
    settings = run.config.to_dict() | {"on_oom": on_oom, "out": str(folder)}
    names = notebook.declared_parameters(run.notebook)
    given = {name: value for name, value in settings.items() if name in names}
    executed, record = folder / "notebook.ipynb", folder / run.run_id
    notebook.execute_notebook(run.notebook, executed, given, threads=threads, time_limit=limit)
    if not record.is_dir():
        raise InputError(f"the notebook {run.notebook} ran but saved no record of {run.run_id}")
    os.rename(executed, record / "notebook.ipynb")
    return str(record)


def _make_runs(
    runs: list[PlannedRun],
    out: Path,
    executor: Executor,
    task: Callable[[PlannedRun], str],
    check: Callable[[Path, PlannedRun], None],
) -> dict[str, str]:
    """Have the runs made, showing how far they are; the cause of each failure by run id."""
    failures: dict[str, str] = {}
    futures: dict[Future[str], PlannedRun] = {}
    done, total = 0, sum(run.config.epochs for run in runs)
    with _stopping(futures, out), tqdm(total=total, unit="epoch", smoothing=0.05) as bar:
        for run in runs:
            futures[executor.submit(task, run)] = run
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                run_id = futures[future].run_id
                error = _publish(future, futures[future], out, check)
                status.note(out, {run_id: error})
                if error:
                    failures[run_id] = status.cause(error)
                    bar.write(f"{run_id} failed: {failures[run_id]}")
                else:
                    done += 1
            epochs = sum(status.epochs_done(out, run) for run in runs)
            if finished or epochs > bar.n:
                bar.n = epochs
                bar.set_description(f"{done}/{len(runs)} runs done")
    return failures


def _publish(
    future: Future[str], run: PlannedRun, out: Path, check: Callable[[Path, PlannedRun], None]
) -> Exception | None:
    """Move the record of a finished run to where it belongs; what went wrong, if anything did."""
    try:
        record, end = Path(future.result()), time.monotonic() + SIGHT
        while not record.exists() and time.monotonic() < end:
            time.sleep(0.5)
        check(record, run)
        os.rename(record, out / run.run_id)
    except Exception as error:
        return error
    shutil.rmtree(out / ".work" / run.run_id, ignore_errors=True)
    return None


@contextmanager
def _stopping(futures: Mapping[Future[Any], PlannedRun | None], out: Path) -> Iterator[None]:
    """When the block is interrupted, drop the tasks that wait and end those that run."""
    try:
        yield
        return
    except BaseException as error:
        interruption = error
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # a second Ctrl-C
    for future, run in futures.items():
        future.cancel()
        if run and status.attempts(out, run):
            status.take_over(out, run)  # elsewhere a run ends when it finds its folder gone
    end = time.monotonic() + 10
    while not all(future.done() for future in futures) and time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "ipykernel_launcher" in process.cmdline():
                    process.kill()
        time.sleep(0.1)  # a kernel may just be starting
    if main:
        signal.signal(signal.SIGINT, handler)
    raise interruption


def _is_summed_up(study: Study, out: Path) -> bool:
    """Whether `summary.ipynb` is there and newer than all that it sums up."""
    summary = out / "summary.ipynb"
    sources = [notebook.notebook_path(study.summary), *out.glob("*/run.json")]
    newest = max(path.stat().st_mtime_ns for path in sources)
    return bool(study.runs) and summary.exists() and newest <= summary.stat().st_mtime_ns


def _sum_up(study: Study, out: Path) -> dict[str, str]:
    """Execute the summary; the cause of its failure by its name."""
    print(f"Summing up in {out / 'summary.ipynb'}", flush=True)
    aside, folder = out / ".work" / "summary.ipynb", "runs" if study.runs else "out"
    given = study.parameters | {folder: str(out), "figures": str(out)}
    future = ThreadPoolExecutor(1).submit(notebook.execute_notebook, study.summary, aside, given)
    with _stopping({future: None}, out):
        error = future.exception()
    status.note(out, {study.summary: error})
    if error:
        return {study.summary: status.cause(error)}
    os.replace(aside, out / "summary.ipynb")
    return {}
