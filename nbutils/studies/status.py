"""What the folder of a study tells: how far its runs are, and why some failed.

It holds `study.json` (what is planned), the record of each finished run, `failures.json` (the
cause of each failure, until the run is made), `summary.ipynb` and its figures. An unfinished run
is in `.work/<run_id>/<N>/`, where N counts the attempts.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

from nbutils.errors import InputError
from nbutils.paths import PROGRESS, write_json
from nbutils.studies.record import read_record
from nbutils.studies.study import PlannedRun, Study, read_plan

SPARE = "spare"  # a file in `.work/`, given up to note a failure when the disk is full


def run_status(out: str | Path) -> dict[str, str]:
    """How far each planned run of a study's folder is, by run id; and a summary that failed."""
    out = Path(out).absolute()
    plan, failures = read_plan(out), read_failures(out)
    statuses = {}
    for run in plan.runs:
        if (out / run.run_id).exists():
            try:
                accuracy = read_record(out / run.run_id)["final"]["test_accuracy"]
                told = "unknown" if math.isnan(accuracy) else f"{accuracy:.2%}"
                statuses[run.run_id] = f"done: test accuracy {told}"
            except InputError as error:
                statuses[run.run_id] = f"damaged: {error}"
        elif run.run_id in failures:
            statuses[run.run_id] = f"failed: {failures[run.run_id]}"
        elif epochs := epochs_done(out, run):
            statuses[run.run_id] = f"started: epoch {epochs}/{run.config.epochs}"
        else:
            statuses[run.run_id] = "waiting"
    if plan.summary in failures:
        statuses[plan.summary] = f"failed: {failures[plan.summary]}"
    return statuses


def missing(study: Study, out: Path) -> list[PlannedRun]:
    """The runs of a study of which `out` holds no record."""
    return [run for run in study.runs if not (out / run.run_id).exists()]


def epochs_done(out: Path, run: PlannedRun) -> int:
    """Epochs that a run has made so far."""
    if (out / run.run_id).exists():
        return run.config.epochs
    for folder in reversed(attempts(out, run)):
        with suppress(OSError):
            return max(0, (folder / PROGRESS).read_bytes().count(b"\n") - 1)
    return 0


def attempts(out: Path, run: PlannedRun) -> list[Path]:
    """The folders of an unfinished run's attempts, the last one last."""
    folders = Path(out, ".work", run.run_id).glob("*")
    return sorted((f for f in folders if f.name.isdecimal()), key=lambda f: int(f.name))


def take_over(out: Path, run: PlannedRun) -> Path:
    """A folder for a new attempt: empty, or that of the attempt before under the next number.

    So what a kernel that outlives its attempt still writes cannot reach the work that goes on.
    """
    *stale, last = attempts(out, run) or [Path(out, ".work", run.run_id, "0")]
    for folder in stale:  # made anew by such a kernel
        shutil.rmtree(folder, ignore_errors=True)
    mine = last.with_name(str(int(last.name) + 1))
    if last.exists():
        return last.rename(mine)
    mine.mkdir(parents=True)
    return mine


def check_record(folder: Path, run: PlannedRun, fingerprints: Mapping[str, str]) -> None:
    """Refuse a record that is damaged, or made on other images than its dataset has here."""
    name, made_on = run.config.dataset, read_record(folder)["dataset"]["fingerprint"]
    if fingerprints.get(name, made_on) != made_on:
        raise InputError(
            f"the record {folder} was made on other images than {name!r} has now; move it "
            f"elsewhere, or choose another --out"
        )


def cause(error: BaseException) -> str:
    """One line that says why a task failed."""
    if isinstance(error, CancelledError):
        return "cancelled: the scheduler was lost"
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    hint = "; the system kills it when memory runs out" if name == "DeadKernelError" else ""
    text = str(value).partition("\n")[0] if name == "CellTimeoutError" else str(value)
    return " ".join(f"{name}: {text}".split()) + hint


def read_failures(out: Path) -> dict[str, str]:
    """The cause of each failure noted in `out`, by the name of what failed."""
    path = out / "failures.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged, remove it: {error}") from error


def note(out: Path, outcomes: Mapping[str, BaseException | None]) -> None:
    """Keep the causes of failures in `failures.json`, or remove them after a success."""
    noted, path = read_failures(out), out / "failures.json"
    failures = {name: reason for name, reason in noted.items() if name not in outcomes}
    failures |= {name: cause(error) for name, error in outcomes.items() if error}
    if not failures:
        path.unlink(missing_ok=True)
        return
    try:
        write_json(path, failures)
    except OSError:  # the disk may be full
        (out / ".work" / SPARE).unlink(missing_ok=True)
        try:
            write_json(path, failures)
        except OSError as error:
            print(f"not noted that {', '.join(outcomes)} failed: {error}", file=sys.stderr)
