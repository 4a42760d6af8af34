"""A study: a YAML file's grid of runs, and the notebook that sums them up.

The keys of a study file:

- `title`: one line.
- `fixed`: settings of every run, fields of `RunConfig`.
- `runs`: a list of blocks. Each has a `notebook` (its name in `notebooks/`), a `grid` (a list of
  values for each field; one run for every combination), and may have a `fixed` of its own. The
  notebook has a parameter for each setting, and `out`: where it saves its record.
- `summary`: the notebook that sums the runs up. It has the parameters `runs` (their folder) and
  `figures` (where to save its figures).
- `parameters`: others of the summary.

A study without `runs` measures in its summary, which then has the parameter `out` (where to save
its tables) in place of `runs`.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nbutils.errors import InputError, suggest
from nbutils.paths import STUDIES
from nbutils.studies.notebook import check_parameters
from nbutils.training.config import RunConfig

STUDY_KEYS = ("title", "fixed", "runs", "summary", "parameters")
BLOCK_KEYS = ("notebook", "grid", "fixed")


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
    def dataset(self) -> str:
        """The name of the dataset that it uses, empty where it uses none."""
        named = self.runs[0].config.dataset if self.runs else self.parameters.get("dataset")
        return str(named or "")

    @property
    def default_folder(self) -> Path:
        """Where its runs go by default: `runs/<study>-<dataset>`."""
        dataset = re.sub(r"[^A-Za-z0-9]+", "-", self.dataset).strip("-")
        return Path("runs", f"{self.name}-{dataset}" if dataset else self.name)


def load_study(name: str, overrides: Mapping[str, list[Any]] | None = None) -> Study:
    """Read and check a study in `notebooks/studies/`, or a YAML file by its path.

    `overrides` are values in place of the file's, by setting; several make a grid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file() and path.parent != STUDIES:
        raise InputError(f"no study file {name}")
    if not path.is_file():
        known = sorted(path.stem for path in STUDIES.glob("*.yaml"))
        raise InputError(f"no study {name!r}; {suggest(name, known)}; or the path of a .yaml file")
    try:
        return _parse(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")), overrides or {})
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        found = reason if isinstance(error, InputError) else f"cannot be read: {reason}"
        raise InputError(f"study {path.name}: {found}") from error


def _parse(name: str, content: Any, overrides: Mapping[str, list[Any]]) -> Study:
    content = _mapping("a study", content, STUDY_KEYS, "summary")
    parameters, runs = content.get("parameters") or {}, []
    parameters = dict(_mapping("parameters", parameters, parameters))
    if {"runs", "fixed"} & content.keys():
        _mapping("a study with runs", content, STUDY_KEYS[:-1])
        runs = _runs(content, overrides)
    else:
        for key, values in _mapping("--set", overrides, parameters).items():
            parameters[key] = _like(key, values, parameters[key])
    title, summary = str(content.get("title", name)), str(content["summary"])
    defaults = RunConfig().to_dict().items()
    for run in runs:
        changed = dict(run.config.to_dict().items() - defaults)
        check_parameters(run.notebook, ["out", *sorted(changed)])
    check_parameters(summary, ["runs" if runs else "out", "figures", *parameters])
    return Study(name, title, tuple(runs), summary, parameters)


def _mapping(
    what: str, content: Any, allowed: Collection[str], required: str | None = None
) -> Mapping[str, Any]:
    """What a key holds, empty where it holds nothing, if it is a mapping with allowed keys."""
    content = {} if content is None and required is None else content
    if not isinstance(content, Mapping):
        raise InputError(f"{what} must be a mapping of names to values")
    for key in content:
        if key not in allowed:
            raise InputError(f"{what} has no {key!r}; {suggest(key, allowed)}")
    if required and required not in content:
        raise InputError(f"{what} lacks {required!r}")
    return content


def _runs(content: Mapping[str, Any], overrides: Mapping[str, list[Any]]) -> list[PlannedRun]:
    blocks, settings = content.get("runs"), RunConfig.field_names()
    if not isinstance(blocks, list) or not blocks:
        raise InputError("runs must be a list of blocks, each with a notebook and a grid")
    common = _mapping("fixed", content.get("fixed"), settings)
    runs: dict[str, PlannedRun] = {}
    for block in blocks:
        _mapping("a block of runs", block, BLOCK_KEYS, "notebook")
        fixed = {**common, **_mapping("fixed", block.get("fixed"), settings)}
        grid = _mapping("grid", block.get("grid"), settings)
        for setting, values in grid.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"grid: {setting} = {values!r}, but it must be a list of values")
        table = {**{key: [value] for key, value in fixed.items()}, **grid, **overrides}
        for values in itertools.product(*table.values()):
            config = RunConfig.from_dict(dict(zip(table, values, strict=True)))
            if config.run_id in runs:
                raise InputError(f"the same settings are planned twice: {config.run_id}")
            runs[config.run_id] = PlannedRun(str(block["notebook"]), config)
    datasets = sorted({run.config.dataset for run in runs.values()})
    if len(datasets) > 1:
        raise InputError(f"the runs must share a dataset, and not have {', '.join(datasets)}")
    return list(runs.values())


def _like(name: str, values: list[Any], before: Any) -> Any:
    """Values in place of a parameter's: a list where it was one, of the same kind."""
    several = isinstance(before, list)
    kind = type(before[0] if several and before else before)
    kinds = (int, float) if kind is float else (kind,)
    if not all(type(value) in kinds for value in values) or (len(values) > 1 and not several):
        raise InputError(f"{name} = {values}, but it must be of the kind of {before!r}")
    return values if several else values[0]


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
    held = replace(study, runs=())
    if (out / "study.json").exists():
        held = read_plan(out)
    elif out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
        raise InputError(f"{out} is not an empty folder and holds no study; choose another --out")
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
    return replace(study, runs=tuple(dict.fromkeys([*held.runs, *study.runs])))
