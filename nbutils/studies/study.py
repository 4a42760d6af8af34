"""A study: a YAML file's grid of runs, and the notebook that sums them up.

The keys of a study file:

- `title`: one line.
- `fixed`: settings of every run, fields of `RunConfig`.
- `runs`: a list of blocks. Each has a `notebook` (its name in `notebooks/`), a `grid` (a list of
  values for each field; one run for every combination), and may have a `fixed` of its own.
- `summary`: the notebook that sums the runs up. It has the parameters `runs` (their folder) and
  `figures` (where to save its figures).

A study without `runs` measures in its summary, which then has the parameter `out` (where to save
its tables) in place of `runs`; the key `parameters` of the study sets others.

A training notebook has a parameter for each setting that it takes, named as in `RunConfig`, and
`out`: the folder in which it saves its record.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nbutils.errors import InputError, suggest
from nbutils.paths import STUDIES
from nbutils.studies.notebook import check_parameters
from nbutils.training.config import RunConfig

STUDY_KEYS = ("title", "fixed", "runs", "summary")
MEASURING_STUDY_KEYS = ("title", "parameters", "summary")
BLOCK_KEYS = ("notebook", "grid", "fixed")

Overrides = Mapping[str, list[Any]]
"""Values that take the place of a study file's, by setting; several make a grid."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: the notebook that makes it, and its settings."""

    notebook: str
    config: RunConfig

    @property
    def run_id(self) -> str:
        """The name of its record."""
        return self.config.run_id


@dataclass(frozen=True)
class Study:
    """A named set of runs and the notebook that sums them up.

    Attributes:
        name: That of its file.
        title: One line.
        runs: Empty where the summary does the measuring.
        summary: Name of that notebook.
        parameters: What the summary gets besides folders.
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
        """Where its runs go by default: `runs/<study>-<dataset>`."""
        names = [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") for name in self.datasets]
        return Path("runs") / "-".join([self.name, *names])

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Study:
        """The study whose `dataclasses.asdict` is `content`."""
        runs = (PlannedRun(r["notebook"], RunConfig(**r["config"])) for r in content["runs"])
        return cls(**{**content, "runs": tuple(runs)})


def load_study(name: str, overrides: Overrides | None = None) -> Study:
    """Read and check a study; nothing is run.

    Args:
        name: A study in `notebooks/studies/`, or the path of a YAML file.
        overrides: Values in place of the file's.

    Raises:
        InputError: The study, a key, a notebook, a parameter or a value is unknown or not allowed.
    """
    path = _study_path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"study {path}: cannot be read: {reason}") from error
    try:
        measuring = isinstance(content, dict) and not {"runs", "fixed"} & content.keys()
        parse = _parse_measuring if measuring else _parse
        study = parse(path.stem, content, overrides or {})
        needed = {run.notebook: {"out": None} for run in study.runs}
        for run in study.runs:
            needed[run.notebook] |= dict.fromkeys(_changed_settings(run.config))
        for notebook, names in needed.items():
            check_parameters(notebook, names)
        folder = "runs" if study.runs else "out"
        check_parameters(study.summary, [folder, "figures", *study.parameters])
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


def _changed_settings(config: RunConfig) -> list[str]:
    """The settings that differ from the defaults, so that the notebook must take them."""
    defaults = asdict(RunConfig())
    return [name for name, value in asdict(config).items() if value != defaults[name]]


def _parse(name: str, content: Any, overrides: Overrides) -> Study:
    _check_mapping("a study", content, STUDY_KEYS, required=("runs", "summary"))
    if not isinstance(content["runs"], list) or not content["runs"]:
        raise InputError("runs must be a list of blocks, each with a notebook and a grid")
    _check_mapping("--set", overrides, RunConfig.field_names())
    fixed = _settings("fixed", content)
    runs = []
    for block in content["runs"]:
        _check_mapping("a block of runs", block, BLOCK_KEYS, required=("notebook",))
        grid = _settings("grid", block)
        for setting, values in grid.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"grid: {setting} = {values!r}, but it must be a list of values")
        settings = fixed | _settings("fixed", block)
        table = {key: [value] for key, value in settings.items()} | grid | dict(overrides)
        for values in itertools.product(*table.values()):
            config = RunConfig.from_dict(dict(zip(table, values, strict=True)))
            runs.append(PlannedRun(str(block["notebook"]), config))
    ids = [run.run_id for run in runs]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise InputError(f"the same settings are planned twice: {', '.join(twice)}")
    return Study(name, str(content.get("title", name)), tuple(runs), str(content["summary"]))


def _parse_measuring(name: str, content: Any, overrides: Overrides) -> Study:
    """A study without runs."""
    _check_mapping("a study without runs", content, MEASURING_STUDY_KEYS, required=("summary",))
    parameters = content.get("parameters") or {}
    _check_mapping("parameters", parameters, list(parameters))
    _check_mapping("--set", overrides, list(parameters))
    for parameter, values in overrides.items():
        given = parameters[parameter]
        several = isinstance(given, list)
        if not several and len(values) > 1:
            raise InputError(f"{parameter} = {values}, but it must be one value")
        for value in values:
            _check_kind(parameter, value, given[0] if several and given else given)
        parameters[parameter] = values if several else values[0]
    return Study(name, str(content.get("title", name)), (), str(content["summary"]), parameters)


def _check_kind(name: str, value: Any, like: Any) -> None:
    """Refuse a value of another kind than the study file's."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    wanted = type(like)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if wanted in kinds and not fits:
        raise InputError(f"{name} = {value!r}, but it must be {kinds[wanted]}")


def _settings(key: str, content: Mapping[str, Any]) -> dict[str, Any]:
    settings = content.get(key) or {}
    _check_mapping(key, settings, RunConfig.field_names())
    return settings


def _check_mapping(
    what: str, content: Any, allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    if not isinstance(content, Mapping):
        raise InputError(f"{what} must be a mapping of names to values")
    for key in content:
        if key not in allowed:
            raise InputError(f"{what} has no {key!r}; {suggest(key, allowed)}")
    for key in required:
        if key not in content:
            raise InputError(f"{what} lacks {key!r}")


def read_plan(out: Path) -> Study:
    """The study whose runs `out` holds.

    Raises:
        InputError: There is none.
    """
    try:
        return Study.from_dict(json.loads((out / "study.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(f"{out} holds no study: it has no study.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out / 'study.json'} is damaged: {error}") from error


def merge_with_folder(study: Study, out: Path) -> Study:
    """What `out` holds and `study` adds: the same study with more values in its grid.

    Raises:
        InputError: `out` holds something else, or runs that no summary could compare.
    """
    held = _held_study(study, out)
    added = [run for run in study.runs if run not in held.runs]
    plan = replace(study, runs=(*held.runs, *added))
    datasets = list(dict.fromkeys(run.config.dataset for run in plan.runs))
    if len(datasets) > 1:
        raise InputError(
            f"dataset = {', '.join(map(repr, datasets))}, but the runs in {out} must share one; "
            f"choose another --out for each"
        )
    return plan


def _held_study(study: Study, out: Path) -> Study:
    """The study in `out`, which must be `study` as well; without runs where there is none."""
    nothing = replace(study, runs=())
    if not out.exists():
        return nothing
    if not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another --out")
    if not (out / "study.json").exists():
        if all(path.name.startswith(".") for path in out.iterdir()):  # a lock, at most
            return nothing
        raise InputError(f"{out} is not empty and holds no study; choose another --out")
    held = read_plan(out)
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
    return held
