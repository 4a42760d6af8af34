"""A study: a YAML file's grid of runs, and the notebook that sums them up.

The keys of a study file:

- `title`: one line.
- `fixed`: settings of every run, fields of `RunConfig`.
- `runs`: a list of blocks. Each has a `notebook` (its name in `notebooks/`), a `grid` (a list of
  values for each field; one run for every combination), and may have a `fixed` of its own. The
  notebook has a parameter for each setting, and `out`: where it saves its record.
- `summary`: the notebook that sums the runs up. It has the parameters `runs` (their folder) and
  `figures` (where to save its figures).

A study without `runs` measures in its summary, which then has the parameter `out` (where to save
its tables) in place of `runs`; the key `parameters` of the study sets others.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nbutils.errors import InputError, suggest
from nbutils.paths import STUDIES
from nbutils.studies.notebook import check_parameters
from nbutils.training.config import RunConfig

STUDY_KEYS = ("title", "fixed", "runs", "summary")
MEASURING_KEYS = ("title", "parameters", "summary")
BLOCK_KEYS = ("notebook", "grid", "fixed")

Overrides = Mapping[str, list[Any]]


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: the notebook that makes it, and its settings."""

    notebook: str
    config: RunConfig

    @property
    def run_id(self) -> str:
        """The name of its record."""
        return self.config.run_id


@dataclass(frozen=True)
class Study:
    """A named set of runs, none where the summary measures; `parameters` are the summary's."""

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


def load_study(name: str, overrides: Overrides | None = None) -> Study:
    """Read and check a study in `notebooks/studies/`, or a YAML file by its path.

    `overrides` are values in place of the file's, by setting; several make a grid.
    """
    known = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise InputError(f"no study {name!r}; {suggest(name, known)}; or the path of a .yaml file")
    if not path.is_file():
        raise InputError(f"no study file {name}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        study = _parse(path.stem, content, overrides or {})
        _check_notebooks(study)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        found = reason if isinstance(error, InputError) else f"cannot be read: {reason}"
        raise InputError(f"study {path.name}: {found}") from error
    return study


def _parse(name: str, content: Any, overrides: Overrides) -> Study:
    makes_runs = isinstance(content, dict) and bool({"runs", "fixed"} & content.keys())
    keys = STUDY_KEYS if makes_runs else MEASURING_KEYS
    _check_mapping("a study", content, keys, required=["summary"])
    title, summary = str(content.get("title", name)), str(content["summary"])
    if makes_runs:
        return Study(name, title, tuple(_runs(content, overrides)), summary)
    parameters = dict(content.get("parameters") or {})
    _check_mapping("--set", overrides, parameters)
    for key, values in overrides.items():
        parameters[key] = _like(key, values, parameters[key])
    return Study(name, title, (), summary, parameters)


def _runs(content: Mapping[str, Any], overrides: Overrides) -> list[PlannedRun]:
    blocks = content.get("runs")
    if not isinstance(blocks, list) or not blocks:
        raise InputError("runs must be a list of blocks, each with a notebook and a grid")
    runs: dict[str, PlannedRun] = {}
    for block in blocks:
        _check_mapping("a block of runs", block, BLOCK_KEYS, required=["notebook"])
        grid, ours, common = block.get("grid"), block.get("fixed"), content.get("fixed")
        for what, settings in (("grid", grid), ("fixed", ours), ("fixed", common)):
            _check_mapping(what, settings or {}, RunConfig.field_names())
        for setting, values in (grid or {}).items():
            if not isinstance(values, list) or not values:
                raise InputError(f"grid: {setting} = {values!r}, but it must be a list of values")
        fixed = {key: [value] for key, value in {**(common or {}), **(ours or {})}.items()}
        table = {**fixed, **(grid or {}), **overrides}
        for values in itertools.product(*table.values()):
            config = RunConfig.from_dict(dict(zip(table, values, strict=True)))
            if config.run_id in runs:
                raise InputError(f"the same settings are planned twice: {config.run_id}")
            runs[config.run_id] = PlannedRun(str(block["notebook"]), config)
    return list(runs.values())


def _like(name: str, values: list[Any], before: Any) -> Any:
    """Values in place of a parameter's: a list where it was one, of the same kind."""
    several = isinstance(before, list)
    kind = type(before[0] if several and before else before)
    kinds = (int, float) if kind is float else (kind,)
    if not all(type(value) in kinds for value in values) or (len(values) > 1 and not several):
        raise InputError(f"{name} = {values}, but it must be of the kind of {before!r}")
    return values if several else values[0]


def _check_notebooks(study: Study) -> None:
    """Refuse notebooks that lack a parameter for what they get."""
    defaults = RunConfig().to_dict().items()
    for run in study.runs:
        changed = dict(run.config.to_dict().items() - defaults)
        check_parameters(run.notebook, ["out", *sorted(changed)])
    folder = "runs" if study.runs else "out"
    check_parameters(study.summary, [folder, "figures", *study.parameters])


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
    """The study whose runs `out` holds, from its `study.json`."""
    try:
        content = json.loads((out / "study.json").read_text(encoding="utf-8"))
        runs = (PlannedRun(r["notebook"], RunConfig(**r["config"])) for r in content["runs"])
        return Study(**{**content, "runs": tuple(runs)})
    except FileNotFoundError as error:
        raise InputError(f"{out} holds no study: it has no study.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out / 'study.json'} is damaged: {error}") from error


def merge_with_folder(study: Study, out: Path) -> Study:
    """What `out` holds and `study` adds: the same study with more values in its grid.

    Raises:
        InputError: `out` holds something else, or runs that no summary could compare.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another --out")
    held = replace(study, runs=())
    if (out / "study.json").exists():
        held = read_plan(out)
    elif out.exists() and any(path.name[0] != "." for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no study; choose another --out")
    if held.name != study.name:
        raise InputError(
            f"{out} holds the study {held.name!r}, not {study.name!r}; choose another --out"
        )
    for name in RunConfig.field_names():
        before, now = ({getattr(run.config, name) for run in s.runs} for s in (held, study))
        if name != "seed" and len(before) == len(now) == 1 and before != now:
            raise InputError(
                f"{out} holds the study {study.name!r} with {name} = {before.pop()!r}, "
                f"not {now.pop()!r}; choose another --out"
            )
    plan = replace(study, runs=tuple(dict.fromkeys([*held.runs, *study.runs])))
    if len({run.config.dataset for run in plan.runs}) > 1:
        raise InputError(
            f"the runs in {out} must share a dataset, and not have {', '.join(plan.datasets)}; "
            f"choose another --out for each"
        )
    return plan
