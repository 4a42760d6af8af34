"""A study: a YAML file's grid of runs, each a notebook executed by papermill, and their summary.

The keys of a study file:

- `title`: one line.
- `fixed`: settings of every run, fields of `RunConfig`.
- `runs`: a list of blocks. Each has a `notebook` (its name in `notebooks/`), a `grid` (a list of
  values for each field; one run for every combination), and may have a `fixed` of its own.
- `summary`: the notebook that sums the runs up. It has the parameters `runs` (their folder) and
  `figures` (where to save its figures).

A study without `runs` measures in its summary, which then has the parameter `out` (where to save
its tables) in place of `runs`; the study's key `parameters` sets others.

A training notebook has a parameter for each setting it takes, named as in `RunConfig`, and `out`:
the folder to which it saves its record.

The folder of a study holds `study.json` (what is planned), the record of each finished run,
`failures.json` (the cause of each failure, until the run is made), `summary.ipynb` and its
figures. Unfinished runs are in `.work-N/`, where N counts the commands that were interrupted.

One command at a time works in the folder, and it alone puts records there: a run is made in
`.work-N/` and moved, in one step, when it is whole.
"""

from __future__ import annotations

import ast
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from nbutils.errors import InputError, suggest
from nbutils.machine import processors
from nbutils.paths import NOTEBOOKS, STUDIES, write_atomically
from nbutils.studies.files import locked
from nbutils.studies.files import replace_folder as publish
from nbutils.studies.kernels import kernel_manager
from nbutils.studies.record import read_record
from nbutils.studies.workers import Workers, cause
from nbutils.training.checkpoint import CHECKPOINT, PROGRESS
from nbutils.training.config import RunConfig

STUDY_KEYS = ("title", "fixed", "runs", "summary")
MEASURING_STUDY_KEYS = ("title", "parameters", "summary")
BLOCK_KEYS = ("notebook", "grid", "fixed")

SPARE, SPARE_BYTES = "spare", 2**16
"""A file that is given up to note a failure when the disk is full."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: the notebook that makes it and its settings.

    `on_oom`, as in `train`, is not part of the plan: a run is the same with either.
    """

    notebook: str
    config: RunConfig
    on_oom: str = field(default="stop", compare=False)


@dataclass(frozen=True)
class Study:
    """A named set of runs and the notebook that sums them up.

    Attributes:
        name: Its file's.
        title: One line.
        runs: None, if the summary does the measuring.
        summary: Name of that notebook.
        parameters: What the summary is given beside the folder.
    """

    name: str
    title: str
    runs: tuple[PlannedRun, ...]
    summary: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets that it uses."""
        names = {run.config.dataset for run in self.runs} | {self.parameters.get("dataset")}
        return sorted(name for name in names if name)

    @property
    def default_folder(self) -> Path:
        """Where its runs go if nothing else is said: `runs/<study>-<dataset>`."""
        names = [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") for name in self.datasets]
        return Path("runs") / "-".join([self.name, *names])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `study.json` holds them."""
        runs = [{"notebook": run.notebook, "config": run.config.to_dict()} for run in self.runs]
        return {
            "name": self.name,
            "title": self.title,
            "runs": runs,
            "summary": self.summary,
            "parameters": self.parameters,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Study:
        """The study of a `study.json`."""
        runs = [
            PlannedRun(r["notebook"], RunConfig.from_dict(r["config"])) for r in content["runs"]
        ]
        parameters = content.get("parameters", {})
        return cls(content["name"], content["title"], tuple(runs), content["summary"], parameters)


def load_study(name: str, overrides: Mapping[str, list[Any]] | None = None) -> Study:
    """Read and check a study; nothing is run.

    Args:
        name: A study in `notebooks/studies/`, or the path of a YAML file.
        overrides: Values that take the place of the file's, by field; several make a grid.

    Raises:
        InputError: The study, a key, a notebook, a parameter or a value is not known or allowed.
    """
    path = _study_path(name)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"study {path}: cannot be read: {reason}") from error
    try:
        study = _parse(path.stem, content, overrides or {})
        for notebook in {run.notebook for run in study.runs}:
            _check_training_notebook(
                notebook, [r.config for r in study.runs if r.notebook == notebook]
            )
        folder = "runs" if study.runs else "out"
        _check_parameters(study.summary, [folder, "figures", *study.parameters])
    except InputError as error:
        raise InputError(f"study {path.name}: {error}") from error
    return study


def _study_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"no study file {name}")
        return Path(name)
    known = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    if name not in known:
        raise InputError(f"no study {name!r}; {suggest(name, known)}; or the path of a .yaml file")
    return STUDIES / f"{name}.yaml"


def _parse(name: str, content: Any, overrides: Mapping[str, list[Any]]) -> Study:
    if isinstance(content, dict) and "runs" not in content and "fixed" not in content:
        return _parse_measuring(name, content, overrides)
    _check_mapping("a study", content, STUDY_KEYS, required=("runs", "summary"))
    if not isinstance(content["runs"], list) or not content["runs"]:
        raise InputError("runs must be a list of blocks, each with a notebook and a grid")
    _settings("--set", dict(overrides))
    fixed = _settings("fixed", content.get("fixed") or {})
    runs = []
    for block in content["runs"]:
        _check_mapping("a block of runs", block, BLOCK_KEYS, required=("notebook",))
        grid = _settings("grid", block.get("grid") or {})
        for setting, values in grid.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"grid: {setting} = {values!r}, but it must be a list of values")
        settings = fixed | _settings("fixed", block.get("fixed") or {})
        table = {name: [value] for name, value in settings.items()} | grid | dict(overrides)
        for values in itertools.product(*table.values()):
            config = RunConfig.from_dict(dict(zip(table, values, strict=True)))
            runs.append(PlannedRun(str(block["notebook"]), config))
    ids = [run.config.run_id for run in runs]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise InputError(f"the same settings are planned twice: {', '.join(twice)}")
    return Study(name, str(content.get("title", name)), tuple(runs), str(content["summary"]))


def _parse_measuring(name: str, content: Any, overrides: Mapping[str, list[Any]]) -> Study:
    """A study without runs."""
    _check_mapping("a study without runs", content, MEASURING_STUDY_KEYS, required=("summary",))
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InputError("parameters must be a mapping of the summary's parameters to values")
    for parameter, values in overrides.items():
        if parameter not in parameters:
            raise InputError(f"no parameter {parameter!r}; {suggest(parameter, parameters)}")
        given = parameters[parameter]
        several = isinstance(given, list)
        if not several and len(values) > 1:
            raise InputError(f"{parameter} = {values}, but it must be one value")
        for value in values:
            _check_kind(parameter, value, given[0] if several and given else given)
        parameters[parameter] = values if several else values[0]
    return Study(name, str(content.get("title", name)), (), str(content["summary"]), parameters)


def _check_kind(name: str, value: Any, like: Any) -> None:
    """Refuse a value that is of another kind than the one whose place it takes."""
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("text", (str,)),
    }
    if type(like) not in kinds:
        return
    text, allowed = kinds[type(like)]
    if not isinstance(value, allowed) or isinstance(value, bool) != (allowed == (bool,)):
        raise InputError(f"{name} = {value!r}, but it must be {text}")


def _check_mapping(
    what: str, content: Any, allowed: tuple[str, ...], required: tuple[str, ...]
) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{what} must be a mapping with the keys {', '.join(allowed)}")
    for key in content:
        if key not in allowed:
            raise InputError(f"{what} has no key {key!r}; {suggest(key, allowed)}")
    for key in required:
        if key not in content:
            raise InputError(f"{what} lacks the key {key!r}")


def _settings(where: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{where} must be a mapping of settings to values")
    for name in content:
        if name not in RunConfig.field_names():
            raise InputError(
                f"{where}: no setting {name!r}; {suggest(name, RunConfig.field_names())}"
            )
    return content


def notebook_path(name: str) -> Path:
    """The file of the notebook called `name` in `notebooks/`.

    Raises:
        InputError: There is none.
    """
    known = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if name not in known:
        raise InputError(f"no notebook {name!r}; {suggest(name, known)}")
    return NOTEBOOKS / f"{name}.ipynb"


def _check_parameters(notebook: str, names: list[str]) -> set[str]:
    """Refuse parameters that the notebook does not declare: papermill would only log them."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    known = papermill.inspect_notebook(str(notebook_path(notebook)))
    for name in names:
        if name not in known:
            raise InputError(
                f"the notebook {notebook} has no parameter {name!r}; {suggest(name, known)}"
            )
    return set(known)


def check_injected_parameters() -> None:
    """In a notebook: refuse parameters that papermill injected but the notebook does not declare.

    papermill itself only logs them, so a misspelt one would train with the default.

    Raises:
        InputError: There is such a parameter.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    executed = shell.user_ns["In"] if shell else []
    for declared, injected in itertools.pairwise(executed):
        if injected.startswith("# Parameters\n"):
            known = _assigned_names(declared)
            for name in _assigned_names(injected):
                if name not in known:
                    raise InputError(
                        f"this notebook has no parameter {name!r}; {suggest(name, known)}"
                    )


def _assigned_names(source: str) -> list[str]:
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return [node.id for node in names if isinstance(node.ctx, ast.Store)]


def _check_training_notebook(notebook: str, configs: list[RunConfig]) -> None:
    parameters = _check_parameters(notebook, ["out"])
    defaults = RunConfig()
    for config in configs:
        for name, value in config.to_dict().items():
            if value != getattr(defaults, name):
                parameters |= _check_parameters(notebook, [name])


def execute_notebook(notebook: str, output: Path, parameters: Mapping[str, Any]) -> None:
    """Run a notebook of the project by papermill.

    Args:
        notebook: Its name in `notebooks/`.
        output: Where the executed notebook goes.
        parameters: Plain Python values for parameters that it declares.

    Raises:
        InputError: It does not declare a parameter.
        Exception: What papermill raises when a cell fails or the kernel dies.
    """
    import papermill
    from traitlets.config import Config

    _check_parameters(notebook, list(parameters))
    with tempfile.TemporaryDirectory(prefix="nbutils-") as folder:
        # Pipes in a folder of their own, in place of TCP ports, which kernels that start at the
        # same time may dispute, and which anyone on the machine can reach.
        pipes = {"transport": "ipc", "ip": str(Path(folder) / "kernel")}
        papermill.execute_notebook(
            str(notebook_path(notebook)),
            str(output),
            parameters=dict(parameters),
            progress_bar=False,
            config=Config({"KernelManager": pipes} if os.name == "posix" else {}),
            kernel_manager_class=kernel_manager(),
        )


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

    Interrupted at any instant, by whatever, and called again, it goes on: what is done is kept,
    and a run that was under way goes on after its last whole epoch.

    Args:
        study: From `load_study`.
        out: Folder of the study's runs; made where there is none.
        jobs: Runs side by side; by default one a processor, or one where there is a GPU.
        executor: What runs them, in place of processes of our own on this machine.
        time_limit: Seconds that a run may take in a process of our own.
        on_oom: As in `train`.

    Returns:
        The cause of each failure, by run id, or by the name of the summary notebook: empty when
        all is done. The other runs go on when one fails; the summary is executed only when none
        did.

    Raises:
        InputError: `out` holds another study or a damaged record, or another command is at work
            there, or a dataset is not there, or an update needs more images than there are, or,
            where there is no `executor`, this machine lacks a device. Nothing is run and no file
            has changed.
    """
    out = Path(out).absolute()
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs = {jobs}, but it must be a whole number >= 1")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise InputError(f"time_limit = {time_limit}, but it must be a number of seconds > 0")
    if time_limit is not None and executor:
        raise InputError("time_limit is for processes of our own, not for those of an executor")
    study = replace(study, runs=tuple(replace(run, on_oom=on_oom) for run in study.runs))
    _check_one_dataset(_merge_with_folder(study, out), out)
    fingerprints = _check_runnable(study)
    if executor is None:
        _check_devices(study)
    with locked(out):
        plan = _merge_with_folder(study, out)  # now that no other command changes it
        _check_records(plan, out, fingerprints)
        _read_failures(out)  # refused now rather than later
        _write_json(out / "study.json", plan.to_dict())
        work = _take_over(out)
        # What an interrupted command did but did not come to publish or to note:
        whole = [run for run in plan.runs if (work / run.config.run_id).exists()]
        outcomes = {run.config.run_id: _publish(run, work, out, fingerprints) for run in whole}
        done = [run for run in plan.runs if (out / run.config.run_id).exists()]
        outcomes |= {run.config.run_id: None for run in done}
        _note(out, work, outcomes)
        waiting = [run for run in study.runs if not (out / run.config.run_id).exists()]
        failures: dict[str, str] = {}
        if waiting:
            # From the whole study, so that a run has as many threads when the rest goes on.
            jobs = jobs or _default_jobs(len(study.runs))
            threads = max(1, processors() // min(jobs, len(study.runs)))
            pool: AbstractContextManager[Executor] = (
                nullcontext(executor)
                if executor
                else Workers(jobs, threads, work / "log.txt", time_limit)
            )
            with pool as workers:
                failures = _run_all(study, waiting, out, work, workers, fingerprints)
        if not failures:
            failures = _sum_up(study, out, work)
        if not failures and all((out / run.config.run_id).exists() for run in plan.runs):
            for folder in _numbered_folders(out):
                shutil.rmtree(folder, ignore_errors=True)
    return failures


def _sum_up(study: Study, out: Path, work: Path) -> dict[str, str]:
    """Execute the summary; the cause of its failure by its name."""
    print(f"Summing up in {out / 'summary.ipynb'}", flush=True)
    folder = "runs" if study.runs else "out"
    parameters = study.parameters | {folder: str(out), "figures": str(out)}
    with Workers(1, processors(), work / "log.txt") as workers:
        future = workers.submit(execute_notebook, study.summary, out / "summary.ipynb", parameters)
        error = future.exception()
    _note(out, work, {study.summary: error})
    return {study.summary: cause(error)} if error else {}


def run_status(out: str | Path) -> dict[str, str]:
    """How far each planned run of a study's folder is, by run id; and a summary that failed.

    Raises:
        InputError: `out` holds no study.
    """
    out = Path(out).absolute()
    plan, failures = _read_plan(out), _read_failures(out)
    statuses = {run.config.run_id: _status(out, run, failures) for run in plan.runs}
    if plan.summary in failures:
        statuses[plan.summary] = f"failed: {failures[plan.summary]}"
    return statuses


def _status(out: Path, run: PlannedRun, failures: Mapping[str, str]) -> str:
    run_id = run.config.run_id
    if (out / run_id).exists():
        try:
            record = read_record(out / run_id)
        except InputError as error:
            return f"damaged: {error}"
        accuracy = record.final["test_accuracy"]
        return f"done: test accuracy {'unknown' if math.isnan(accuracy) else f'{accuracy:.2%}'}"
    if run_id in failures:
        return f"failed: {failures[run_id]}"
    epochs = max((_epochs_done(work, run) for work in _numbered_folders(out)), default=0)
    return f"started: epoch {epochs}/{run.config.epochs}" if epochs else "waiting"


def _read_failures(out: Path) -> dict[str, str]:
    try:
        content = json.loads((out / "failures.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{out / 'failures.json'} is damaged, remove it: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{out / 'failures.json'} is damaged, remove it")
    return {str(name): str(reason) for name, reason in content.items()}


def _note(out: Path, work: Path, outcomes: Mapping[str, BaseException | None]) -> None:
    """Keep the causes of failures in `failures.json`, or remove them after a success."""
    noted = _read_failures(out)
    failures = {name: reason for name, reason in noted.items() if name not in outcomes}
    failures |= {name: cause(error) for name, error in outcomes.items() if error}
    if failures == noted:
        return
    if not failures:
        (out / "failures.json").unlink()
        return
    try:
        _write_json(out / "failures.json", failures)
    except OSError:  # the disk may be full
        (work / SPARE).unlink(missing_ok=True)
        try:
            _write_json(out / "failures.json", failures)
        except OSError as problem:
            names = ", ".join(outcomes)
            print(f"that {names} failed cannot be noted: {problem}", file=sys.stderr)


def _read_plan(out: Path) -> Study:
    try:
        return Study.from_dict(json.loads((out / "study.json").read_text()))
    except FileNotFoundError as error:
        raise InputError(f"{out} holds no study: it has no study.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out / 'study.json'} is damaged: {error}") from error


def _merge_with_folder(study: Study, out: Path) -> Study:
    """What `out` holds and `study` adds; the same study with more values in its grid."""
    if not out.exists():
        return study
    if not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another --out")
    if not (out / "study.json").exists():
        if all(path.name.startswith(".") for path in out.iterdir()):  # a lock, at most
            return study
        raise InputError(f"{out} is not empty and holds no study; choose another --out")
    held = _read_plan(out)
    if held.name != study.name:
        raise InputError(
            f"{out} holds the study {held.name!r}, not {study.name!r}; choose another --out"
        )
    for name in RunConfig.field_names():
        before = {getattr(run.config, name) for run in held.runs}
        now = {getattr(run.config, name) for run in study.runs}
        if name != "seed" and len(before) == len(now) == 1 and before != now:
            raise InputError(
                f"{out} holds the study {study.name!r} with {name} = {before.pop()!r}, "
                f"not {now.pop()!r}; choose another --out"
            )
    added = [run for run in study.runs if run not in held.runs]
    return replace(study, runs=(*held.runs, *added))


def _check_one_dataset(plan: Study, out: Path) -> None:
    """Refuse runs that no summary could put side by side."""
    names = {run.config.dataset: None for run in plan.runs}
    if len(names) > 1:
        raise InputError(
            f"dataset = {', '.join(map(repr, names))}, but the runs in {out} must share one; "
            f"choose another --out for each"
        )


def _check_runnable(study: Study) -> dict[str, str]:
    """Refuse what cannot run here; the fingerprint of each dataset by its name."""
    from nbutils.data.dataset import load_dataset
    from nbutils.training.train import check_fits, check_on_oom

    for run in study.runs:
        check_on_oom(run.on_oom, run.config)
    for notebook in {run.notebook for run in study.runs if run.on_oom != "stop"}:
        _check_parameters(notebook, ["on_oom"])
    datasets = {name: load_dataset(name) for name in study.datasets}
    for run in study.runs:
        check_fits(run.config, datasets[run.config.dataset])
    return {name: data.fingerprint for name, data in datasets.items()}


def _check_devices(study: Study) -> None:
    from nbutils.training.setup import resolve_device

    for device in {run.config.device for run in study.runs}:
        resolve_device(device)


def _check_records(plan: Study, out: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuse a folder with a record that is damaged or does not belong, so that none is lost."""
    planned = {run.config.run_id: run.config for run in plan.runs}
    for folder in sorted(out.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if folder.name not in planned:
            raise InputError(f"{folder} is not a run of this study; move it elsewhere")
        _check_record(folder, planned[folder.name].dataset, fingerprints)


def _check_record(folder: Path, dataset: str, fingerprints: Mapping[str, str]) -> None:
    """Refuse a record that is damaged or was made on other images than `dataset` has here."""
    made_on = read_record(folder).dataset["fingerprint"]
    if fingerprints.get(dataset, made_on) != made_on:
        raise InputError(
            f"the record {folder} was made on other images than {dataset!r} has now; move it "
            f"elsewhere, or choose another --out"
        )


def _numbered_folders(out: Path) -> list[Path]:
    """The `.work-N` in `out`, by N."""
    folders = [path for path in out.glob(".work-*") if _number(path).isdecimal()]
    return sorted(folders, key=lambda path: int(_number(path)))


def _number(work: Path) -> str:
    return work.name.removeprefix(".work-")


def _take_over(out: Path) -> Path:
    """A folder to work in: a new one, or that of an interrupted command under the next number.

    A process that outlived its command, as a kernel does for a moment, knows only the old name.
    What it still writes cannot reach the work that goes on.
    """
    for aside in out.glob(".*.json.*"):  # what a killed command was writing
        aside.unlink(missing_ok=True)
    earlier = _numbered_folders(out)
    if not earlier:
        work = out / ".work-1"
        work.mkdir()
    else:
        *stale, last = earlier
        work = out / f".work-{int(_number(last)) + 1}"
        os.rename(last, work)
        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
    (work / SPARE).write_bytes(bytes(SPARE_BYTES))
    return work


def _default_jobs(runs: int) -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(runs, processors())


def _run_all(
    study: Study,
    waiting: list[PlannedRun],
    out: Path,
    work: Path,
    executor: Executor,
    fingerprints: Mapping[str, str],
) -> dict[str, str]:
    """Make the `waiting` runs, showing how far they are; the cause of each failure by run id."""
    failures: dict[str, str] = {}
    done = len(study.runs) - len(waiting)
    epochs = {run.config.run_id: run.config.epochs for run in waiting}
    print(f"{study.title}: {len(waiting)} runs to make, {done} done before, in {out}", flush=True)
    futures: dict[Future[None], PlannedRun] = {
        executor.submit(make_run, run, str(work)): run for run in waiting
    }
    pending, shown = set(futures), {"": -1}
    with (
        tqdm(total=sum(epochs.values()), unit="epoch", smoothing=0.05) as bar,
        _cancelling(futures),
    ):
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                run_id, error = futures[future].config.run_id, future.exception()
                if error is None:
                    error = _publish(futures[future], work, out, fingerprints)
                _note(out, work, {run_id: error})
                if error is None:
                    done += 1
                else:
                    failures[run_id] = cause(error)
                    bar.write(f"{run_id} failed: {failures[run_id]}")
            at = {
                run.config.run_id: max(_epochs_done(out, run), _epochs_done(work, run))
                for run in waiting
            }
            if at != shown or finished:
                shown = at
                active = [run for run in waiting if 0 < at[run.config.run_id] < run.config.epochs]
                bar.set_description(f"{done}/{len(study.runs)} runs done", refresh=False)
                texts = [_progress(run, at[run.config.run_id]) for run in active]
                bar.set_postfix_str("; ".join(texts), refresh=False)
                bar.n = sum(at.values())
                bar.refresh()
    return failures


def _publish(
    run: PlannedRun, work: Path, out: Path, fingerprints: Mapping[str, str]
) -> Exception | None:
    """Move a finished run's record to where it belongs; what went wrong, if anything did."""
    run_id = run.config.run_id
    try:
        _check_record(work / run_id, run.config.dataset, fingerprints)
        os.rename(work / run_id, out / run_id)
    except (InputError, OSError) as error:
        return error
    shutil.rmtree(_work_folder(work, run), ignore_errors=True)
    return None


@contextmanager
def _cancelling(futures: Iterable[Future[None]]) -> Iterator[None]:
    """Drop the tasks that have not begun when the block is interrupted."""
    try:
        yield
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def make_run(run: PlannedRun, out: str) -> None:
    """Execute one run's notebook, so that `out` holds its whole record; an executor's task.

    Until then it works in `out/.work/<run_id>/`, where a later call goes on.
    """
    folder, run_id = _work_folder(Path(out), run), run.config.run_id
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # what an earlier attempt left half done
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (PROGRESS, CHECKPOINT):
            path.unlink()
    settings = run.config.to_dict() | {"on_oom": run.on_oom}
    known = _check_parameters(run.notebook, [])
    parameters = {name: value for name, value in settings.items() if name in known}
    notebook = folder / "notebook.ipynb"
    execute_notebook(run.notebook, notebook, parameters | {"out": str(folder)})
    if not (folder / run_id).is_dir():
        raise InputError(f"the notebook {run.notebook} ran but saved no record of {run_id}")
    os.rename(notebook, folder / run_id / "notebook.ipynb")
    publish(folder / run_id, Path(out) / run_id)


def _progress(run: PlannedRun, epochs: int) -> str:
    config = run.config
    return (
        f"{config.batch_size}x{config.accumulation_steps} seed {config.seed}: "
        f"epoch {epochs}/{config.epochs}"
    )


def _work_folder(out: Path, run: PlannedRun) -> Path:
    """Where `make_run` works."""
    return out / ".work" / run.config.run_id


def _epochs_done(out: Path, run: PlannedRun) -> int:
    if (out / run.config.run_id).exists():
        return run.config.epochs
    with suppress(OSError):
        return max(0, (_work_folder(out, run) / PROGRESS).read_bytes().count(b"\n") - 1)
    return 0


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())
