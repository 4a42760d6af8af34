"""The command line: `python -m nbutils COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml

from nbutils.errors import InputError

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended: 128 and the number of the signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 when all went well, 1 when a run failed or is damaged, 2 when the input was
        bad, 130 when it was interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbutils", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    for name, (command, summary, arguments) in COMMANDS.items():
        described = commands.add_parser(name, help=summary)
        described.set_defaults(command=command)
        for flag, settings in arguments.items():
            described.add_argument(flag, **settings)
    return parser


def _run(options: argparse.Namespace) -> int:
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    if options.scheduler and options.jobs is not None:
        raise InputError("--jobs is for runs here, not for those of a --scheduler")
    overrides = _overrides(options.set)
    if options.dataset is not None:
        overrides["dataset"] = [options.dataset]
    study = load_study(options.study, overrides)
    out = options.out or study.default_folder
    with _cluster(options.scheduler, out) as executor:
        limits = {"time_limit": options.time_limit, "on_oom": options.on_oom}
        failures = run_study(study, out, options.jobs, executor, **limits)
    if failures:
        for run_id, cause in failures.items():
            print(f"failed: {run_id}: {cause}", file=sys.stderr)
        print("what is done is kept; the same command tries the rest again", file=sys.stderr)
        return 1
    if study.runs:
        _print_table(out.absolute())
    for pattern, kind in {"*.png": "figure", "*.svg": "figure", "summary.ipynb": "summary"}.items():
        for path in sorted(out.absolute().glob(pattern)):
            print(f"{kind}: {path}")
    return 0


def _cluster(scheduler: str | None, out: Path) -> Any:
    """What makes the runs: a Dask cluster, or None for this machine."""
    if scheduler is None:
        return nullcontext()
    from nbutils.studies.cluster import cluster

    return cluster(scheduler, out)


def _print_table(out: Path) -> None:
    from nbutils.analysis.effects import load_answers
    from nbutils.analysis.pick import pick
    from nbutils.analysis.summary import format_table, summary_table

    answers = load_answers(out)
    print(f"\n{format_table(summary_table(answers)).to_string()}\n\n{pick(answers.runs)}\n")


def _overrides(settings: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each field; `--set seed=0 --set seed=1` means both."""
    overrides: dict[str, list[Any]] = {}
    for text in settings:
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"--set {text}: it must read FIELD=VALUE or FIELD=VALUE,VALUE")
        overrides.setdefault(field, []).extend(_value(value) for value in values.split(","))
    return overrides


def _value(text: str) -> Any:
    """A YAML value; and 1e-3, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # 2020-13-45 is no date
        return text
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _status(options: argparse.Namespace) -> int:
    from nbutils.studies.status import run_status

    statuses = run_status(options.folder)
    width = max(map(len, statuses), default=0)
    for run_id, status in statuses.items():
        print(f"{run_id:{width}}  {status}")
    return int(any(status.startswith(("failed", "damaged")) for status in statuses.values()))


def _export(options: argparse.Namespace) -> None:
    from nbutils.studies.reference import export

    export(options.runs, options.reference)
    print(f"reference: {options.reference}")


def _advise(options: argparse.Namespace) -> None:
    from nbutils.advise.advice import advise, write_report

    given = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    advice = advise(**given)
    print(advice.answer)
    for warning in advice.warnings:
        print(f"  warning: {warning}")
    for path in write_report(advice, options.out):
        print(f"report: {path}")


def _figures(_: argparse.Namespace) -> None:
    from nbutils.report.readme import make_figures

    for path in make_figures():
        print(path)


def _bench(options: argparse.Namespace) -> None:
    from nbutils.data.sources import load_dataset
    from nbutils.report.bench import run_bench, save, table

    if options.out and options.out.suffix != ".json":
        raise InputError(f"--out {options.out}: it must end in .json")
    data = load_dataset(options.dataset)
    rows = list(run_bench(data, options.images, options.repeats, options.device))
    print(table(rows).to_string())
    if options.out:
        save(rows, options.out)
        print(f"rows: {options.out}")


def _gpu_check(options: argparse.Namespace) -> int:
    from nbutils.report.gpu_check import run_gpu_check

    return int(not run_gpu_check(options.out, options.device, options.quick))


def _libraries(_: argparse.Namespace) -> None:
    from nbutils.report.libraries import observe_all

    print(f"table: {observe_all()}")


RUN = {
    "study": {"help": "a name in notebooks/studies/, or the path of a YAML file"},
    "--dataset": {"help": "train on this instead of the study's dataset"},
    "--set": {
        **{"action": "append", "default": [], "metavar": "FIELD=VALUE[,VALUE...]"},
        "help": "one or several values in place of the study's (may be repeated)",
    },
    "--jobs": {"type": int, "help": "runs side by side (default: from the machine)"},
    "--scheduler": {
        "metavar": "ADDRESS",
        "help": "make the runs on that Dask cluster (extra: cluster)",
    },
    "--out": {"type": Path, "help": "folder of the runs (default: runs/STUDY-DATASET)"},
    "--time-limit": {"type": float, "metavar": "SECONDS", "help": "limit of a run's training"},
    "--on-oom": {
        **{"default": "stop", "metavar": "stop|split"},
        "help": "when a batch does not fit the memory: stop the run (default), or split the batch",
    },
}
ADVISE = {
    "--model": {"required": True, "help": "what makes it, as package.module:factory"},
    "--dataset": {
        "required": True,
        "help": "a dataset's name, a folder with a folder of images a class, or the "
        "package.module:factory of a dataset",
    },
    "--losses": {
        "help": "the loss of every example, as package.module:losses, for a training that is no "
        "classifier of images",
    },
    "--collate": {"help": "what makes a batch of items, as package.module:collate"},
    "--columns": {
        **{"type": lambda text: text.split(","), "metavar": "IMAGE,LABEL"},
        "help": "the keys of image and label, where items are mappings with unusual keys",
    },
    "--memory-budget": {"help": "such as 2GB (default: what is free)"},
    "--time-budget": {"default": "10min", "help": "such as 90s (default: 10min)"},
    "--optimizer": {"default": "adam", "help": "adam (default) or sgd"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N"},
    "--out": {
        **{"type": Path, "default": Path("runs/advice")},
        "help": "folder of the report (runs/advice)",
    },
}
BENCH = {
    "--out": {"type": Path, "help": "JSON file to write the rows to"},
    "--dataset": {"default": "mnist", "help": "whose images (default: mnist)"},
    "--images": {"type": int, "default": 13_500, "help": "images of a timed epoch"},
    "--repeats": {"type": int, "default": 5, "help": "timed epochs of each loop"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda, cuda:N or mps"},
}
GPU_CHECK = {
    "--out": {"type": Path, "required": True, "help": "folder of gpu.json and gpu.txt"},
    "--device": {"default": "cuda", "help": "cuda, or cpu to try the command itself"},
    "--quick": {"action": "store_true", "help": "shrink every stage"},
}
PATH = {"type": Path}

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str, dict[str, Any]]] = {
    "run": (_run, "make the runs of a study, then sum them up", RUN),
    "advise": (_advise, "advise on the batch size of a training of yours", ADVISE),
    "status": (_status, "tell how far the runs of a study are", {"folder": PATH}),
    "export": (
        _export,
        "write what a study left as a small reference",
        {"runs": PATH, "reference": PATH},
    ),
    "figures": (_figures, "make figures/ and the README's numbers", {}),
    "bench": (_bench, "time the training against the usual loop", BENCH),
    "libraries": (_libraries, "put other libraries' accumulation to the test (extra: peers)", {}),
    "gpu-check": (_gpu_check, "check and measure everything on a GPU", GPU_CHECK),
}


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # not all print all text
    status = main()
    if status == INTERRUPTED:
        sys.stdout.flush()
        os._exit(status)  # threads may still wait for a kernel, which ends with this process
    sys.exit(status)
