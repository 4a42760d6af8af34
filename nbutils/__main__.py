"""The command line: `python -m nbutils COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext, suppress
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
        return options.command(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbutils", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    _add_run(commands)
    _add_advise(commands)

    status = commands.add_parser("status", help="tell how far the runs of a study are")
    status.add_argument("folder", type=Path)
    status.set_defaults(command=_status)

    export = commands.add_parser("export", help="write what a study left as a small reference")
    export.add_argument("runs", type=Path)
    export.add_argument("reference", type=Path)
    export.set_defaults(command=_export)

    figures = commands.add_parser("figures", help="make figures/ and the README's numbers")
    figures.set_defaults(command=_figures)

    bench = commands.add_parser("bench", help="time the training against the usual loop")
    bench.add_argument("--out", type=Path, help="JSON file to write the rows to")
    bench.add_argument("--dataset", default="mnist", help="whose images (default: mnist)")
    bench.add_argument("--images", type=int, default=13_500, help="images of a timed epoch")
    bench.add_argument("--repeats", type=int, default=5, help="timed epochs of each loop")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    bench.set_defaults(command=_bench)

    libraries = commands.add_parser(
        "libraries", help="put the accumulation of other libraries to the test (extra: peers)"
    )
    libraries.set_defaults(command=_libraries)

    gpu = commands.add_parser("gpu-check", help="check and measure everything on a GPU")
    gpu.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.txt")
    gpu.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    gpu.add_argument("--quick", action="store_true", help="shrink every stage")
    gpu.set_defaults(command=_gpu_check)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="make the runs of a study, then sum them up")
    run.add_argument("study", help="a name in notebooks/studies/, or the path of a YAML file")
    run.add_argument("--dataset", help="train on this instead of the study's dataset")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,VALUE...]",
        help="one or several values in place of the study's (may be repeated)",
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="runs side by side (default: from the machine)")
    where.add_argument(
        "--scheduler", metavar="ADDRESS", help="make the runs on that Dask cluster (extra: cluster)"
    )
    run.add_argument("--out", type=Path, help="folder of the runs (default: runs/STUDY-DATASET)")
    run.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="limit of a run's training"
    )
    run.add_argument(
        "--on-oom",
        default="stop",
        metavar="stop|split",
        help="when a batch does not fit the memory: stop the run (default), or split the batch",
    )
    run.set_defaults(command=_run)


def _add_advise(commands: Any) -> None:
    advise = commands.add_parser("advise", help="advise on the batch size of a training of yours")
    advise.add_argument("--model", required=True, help="what makes it, as package.module:factory")
    advise.add_argument(
        "--dataset",
        required=True,
        help="a dataset's name, a folder with a folder of images a class, or the "
        "package.module:factory of a dataset",
    )
    advise.add_argument(
        "--losses",
        help="the loss of every example, as package.module:losses, for a training that is no "
        "classifier of images",
    )
    advise.add_argument("--collate", help="what makes a batch of items, as package.module:collate")
    advise.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        metavar="IMAGE,LABEL",
        help="the keys of image and label, where items are mappings with unusual keys",
    )
    advise.add_argument("--memory-budget", help="such as 2GB (default: what is free)")
    advise.add_argument("--time-budget", default="10min", help="such as 90s (default: 10min)")
    advise.add_argument("--optimizer", default="adam", help="adam (default) or sgd")
    advise.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    out = Path("runs/advice")
    advise.add_argument("--out", type=Path, default=out, help=f"folder of the report ({out})")
    advise.set_defaults(command=_advise)


def _run(options: argparse.Namespace) -> int:
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    overrides = _overrides(options.set)
    if options.dataset is not None:
        overrides["dataset"] = [options.dataset]
    study = load_study(options.study, overrides)
    out = options.out or study.default_folder
    with _executor(options.scheduler, out) as executor:
        limits = {"time_limit": options.time_limit, "on_oom": options.on_oom}
        failures = run_study(study, out, options.jobs, executor, **limits)
    if failures:
        for run_id, cause in failures.items():
            print(f"failed: {run_id}: {cause}", file=sys.stderr)
        print("what is done is kept; the same command tries the rest again", file=sys.stderr)
        return 1
    if study.runs:
        _print_table(out.absolute())
    _print_files(out.absolute())
    return 0


def _executor(scheduler: str | None, out: Path) -> AbstractContextManager[Executor | None]:
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


def _print_files(out: Path) -> None:
    for kind, pattern in (("figure", "*.png"), ("figure", "*.svg"), ("summary", "summary.ipynb")):
        for path in sorted(out.glob(pattern)):
            print(f"{kind}: {path}")


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


def _export(options: argparse.Namespace) -> int:
    from nbutils.studies.reference import export_runs, export_tables, holds_tables

    export = export_tables if holds_tables(options.runs) else export_runs
    export(options.runs, options.reference)
    print(f"reference: {options.reference}")
    return 0


def _advise(options: argparse.Namespace) -> int:
    from nbutils.advise.advice import advise, write_report

    advice = advise(
        options.model,
        options.dataset,
        options.losses,
        options.collate,
        columns=options.columns,
        memory_budget=options.memory_budget,
        time_budget=options.time_budget,
        optimizer=options.optimizer,
        device=options.device,
    )
    print(advice.answer)
    for warning in advice.warnings:
        print(f"  warning: {warning}")
    for path in write_report(advice, options.out):
        print(f"report: {path}")
    return 0


def _figures(options: argparse.Namespace) -> int:
    from nbutils.report.readme import make_figures

    for path in make_figures():
        print(path)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from nbutils.data.sources import load_dataset
    from nbutils.report.bench import run_bench, save, table

    if options.out and options.out.suffix != ".json":
        raise InputError(f"--out {options.out}: it must end in .json")
    data = load_dataset(options.dataset)
    rows = run_bench(data, options.images, options.repeats, options.device)
    print(table(rows).to_string())
    if options.out:
        save(rows, options.out)
        print(f"rows: {options.out}")
    return 0


def _gpu_check(options: argparse.Namespace) -> int:
    from nbutils.report.gpu_check import run_gpu_check

    return int(not run_gpu_check(options.out, options.device, options.quick))


def _libraries(_: argparse.Namespace) -> int:
    from nbutils.report.libraries import observe_all

    try:
        path = observe_all()
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; install the extra: pip install -e '.[peers]'") from error
    print(f"table: {path}")
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # not all print all text
    status = main()
    if status == INTERRUPTED:
        sys.stdout.flush()
        os._exit(status)  # threads may still wait for a kernel, which ends with this process
    sys.exit(status)
