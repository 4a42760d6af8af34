"""What the folder of a study tells: how far its runs are, and why some failed.

It holds `study.json` (what is planned), the record of each finished run, `summary.ipynb` and its
figures. In `.work/`, until all is done, are the attempts at each unfinished run, as
`<run_id>/<N>/`, and the cause of each failure, as `<run_id>.failed`.
"""

import math
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

from nbutils.errors import InputError
from nbutils.paths import PROGRESS
from nbutils.studies.record import read_record
from nbutils.studies.study import PlannedRun, Study, read_plan

SPARE = "spare"  # a file in `.work/`, given up to note a failure when the disk is full


def run_status(out: str | Path) -> dict[str, str]:
    """How far each planned run of a study's folder is, by run id; and a summary that failed."""
    out = Path(out).absolute()
    plan = read_plan(out)
    statuses = {run.run_id: _status(out, run) for run in plan.runs}
    if failure := _failure(out, plan.summary):
        statuses[plan.summary] = failure
    return statuses


def _status(out: Path, run: PlannedRun) -> str:
    if (out / run.run_id).exists():
        try:
            accuracy = read_record(out / run.run_id)["final"]["test_accuracy"]
        except InputError as error:
            return f"damaged: {error}"
        return f"done: test accuracy {'unknown' if math.isnan(accuracy) else f'{accuracy:.2%}'}"
    epochs = epochs_done(out, run)
    started = f"started: epoch {epochs}/{run.config.epochs}" if epochs else "waiting"
    return _failure(out, run.run_id) or started


def _failure(out: Path, name: str) -> str:
    path = failure_file(out, name)
    return f"failed: {path.read_text('utf-8', 'replace')}" if path.exists() else ""


def failure_file(out: Path, name: str) -> Path:
    """The file with the cause for which a run or the summary failed, until it is made."""
    return out / ".work" / f"{name}.failed"


def missing(study: Study, out: Path) -> list[PlannedRun]:
    """The runs of a study of which `out` holds no record."""
    return [run for run in study.runs if not (out / run.run_id).exists()]


def epochs_done(out: Path, run: PlannedRun) -> int:
    """Epochs that a run has made so far."""
    if (out / run.run_id).exists():
        return run.config.epochs
    with suppress(OSError):
        return max(0, (attempt(out, run) / PROGRESS).read_bytes().count(b"\n") - 1)
    return 0


def attempt(out: Path, run: PlannedRun) -> Path:
    """The folder of the last attempt at a run; there is none where it does not exist."""
    folder = out / ".work" / run.run_id
    return max(folder.glob("[0-9]*"), key=lambda path: int(path.name), default=folder / "0")


def take_over(out: Path, run: PlannedRun) -> Path:
    """A folder for a new attempt: empty, or that of the attempt before under the next number.

    So what a kernel that outlives its attempt still writes cannot reach the work that goes on.
    """
    last = attempt(out, run)
    last.mkdir(parents=True, exist_ok=True)
    return last.rename(last.with_name(str(int(last.name) + 1)))


def note(out: Path, name: str, error: BaseException) -> str:
    """Keep the cause of a failure, one line, for `run_status`, and return it."""
    reason, path = _cause(error), failure_file(out, name)
    try:
        path.write_text(reason, encoding="utf-8")
    except OSError:  # the disk may be full
        with suppress(OSError):
            path.with_name(SPARE).unlink()
            path.write_text(reason, encoding="utf-8")
    return reason


def _cause(error: BaseException) -> str:
    if isinstance(error, CancelledError):
        return "cancelled: the scheduler was lost"
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    hint = "; the system kills it when memory runs out" if name == "DeadKernelError" else ""
    text = str(value).partition("\n")[0] if name == "CellTimeoutError" else str(value)
    return " ".join(f"{name}: {text}".split()) + hint
