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

INTERRUPTED = 130  # exit status after Ctrl-C: 128 and the number of the signal
Arguments = list[tuple[str, str, dict[str, Any]]]  # flag, meaning, other arguments of argparse
SEVERAL = {"action": "append", "default": [], "metavar": "FIELD=VALUE[,VALUE...]"}
COLUMNS = {"type": lambda text: text.split(","), "metavar": "IMAGE,LABEL"}
REQUIRED = {"required": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 1 when a run failed or is damaged, 2 when the input was bad."""
    parser = argparse.ArgumentParser(prog="python -m nbutils", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    for name, (command, summary, described) in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary)
        subparser.set_defaults(command=command)
        for flag, meaning, settings in described:
            subparser.add_argument(flag, help=meaning, **settings)
    options = parser.parse_args(arguments)
    try:
        return options.command(options) or 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    from nbutils.studies.cluster import cluster
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    if options.scheduler and options.jobs is not None:
        raise InputError("--jobs is for runs here, not for those of a --scheduler")
    overrides = _overrides(options.set)
    if options.dataset is not None:
        overrides["dataset"] = [options.dataset]
    study = load_study(options.study, overrides)
    out = (options.out or study.default_folder).absolute()
    limits = {"time_limit": options.time_limit, "on_oom": options.on_oom}
    place = cluster(options.scheduler, out) if options.scheduler else nullcontext()
    with place as executor:
        failures = run_study(study, out, options.jobs, executor, **limits)
    for run_id, cause in failures.items():
        print(f"failed: {run_id}: {cause}", file=sys.stderr)
    if failures:
        print("what is done is kept; the same command tries the rest again", file=sys.stderr)
        return 1
    if study.runs:
        from nbutils.analysis.effects import load_answers
        from nbutils.analysis.pick import pick
        from nbutils.analysis.summary import format_table, summary_table

        answers = load_answers(out)
        print(f"\n{format_table(summary_table(answers)).to_string()}\n\n{pick(answers.runs)}\n")
    for path in [*sorted(out.glob("*.png")), *sorted(out.glob("*.svg")), out / "summary.ipynb"]:
        print(f"{'summary' if path.suffix == '.ipynb' else 'figure'}: {path}")
    return 0


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
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is not a folder")
    advice = advise(**given)
    print(advice.answer, *(f"  warning: {warning}" for warning in advice.warnings), sep="\n")
    for path in write_report(advice, options.out):
        print(f"report: {path}")


def _figures(_: argparse.Namespace) -> None:
    from nbutils.report.readme import make_figures

    print(*make_figures(), sep="\n")


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


RUN: Arguments = [
    ("study", "a name in notebooks/studies/, or the path of a YAML file", {}),
    ("--dataset", "train on this instead of the study's dataset", {}),
    ("--set", "one or several values in place of the study's (may be repeated)", SEVERAL),
    ("--jobs", "runs side by side (default: from the machine)", {"type": int}),
    ("--scheduler", "make the runs on the Dask cluster of this address (extra: cluster)", {}),
    ("--out", "folder of the runs (default: runs/STUDY-DATASET)", {"type": Path}),
    ("--time-limit", "of a run's training", {"type": float, "metavar": "SECONDS"}),
    (
        "--on-oom",
        "a batch that exceeds the memory: stop (default) or split it",
        {"default": "stop"},
    ),
]
ADVISE: Arguments = [
    ("--model", "what makes it, as package.module:factory", REQUIRED),
    ("--dataset", "a name, a folder of images by class, or package.module:factory", REQUIRED),
    ("--losses", "the loss of every example, where it is no classifier: package.module:losses", {}),
    ("--collate", "what makes a batch of items, as package.module:collate", {}),
    ("--columns", "the keys of image and label, where items are mappings", COLUMNS),
    ("--memory-budget", "such as 2GB (default: what is free)", {}),
    ("--time-budget", "such as 90s (default: 10min)", {"default": "10min"}),
    ("--optimizer", "adam (default) or sgd", {"default": "adam"}),
    ("--device", "auto, cpu, cuda or cuda:N", {"default": "auto"}),
    ("--out", "folder of the report (runs/advice)", {"type": Path, "default": Path("runs/advice")}),
]
BENCH: Arguments = [
    ("--out", "JSON file to write the rows to", {"type": Path}),
    ("--dataset", "whose images (default: mnist)", {"default": "mnist"}),
    ("--images", "images of a timed epoch", {"type": int, "default": 13_500}),
    ("--repeats", "timed epochs of each loop", {"type": int, "default": 5}),
    ("--device", "auto, cpu, cuda, cuda:N or mps", {"default": "auto"}),
]
GPU_CHECK: Arguments = [
    ("--out", "folder of gpu.json and gpu.txt", {"type": Path, "required": True}),
    ("--device", "cuda, or cpu to try the command itself", {"default": "cuda"}),
    ("--quick", "shrink every stage", {"action": "store_true"}),
]
STATUS: Arguments = [("folder", "of the runs", {"type": Path})]
EXPORT: Arguments = [
    (name, f"folder of the {name}", {"type": Path}) for name in ("runs", "reference")
]

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str, Arguments]] = {
    "run": (_run, "make the runs of a study, then sum them up", RUN),
    "advise": (_advise, "advise on the batch size of a training of yours", ADVISE),
    "status": (_status, "tell how far the runs of a study are", STATUS),
    "export": (_export, "write what a study left as a small reference", EXPORT),
    "figures": (_figures, "make figures/ and the README's numbers", []),
    "bench": (_bench, "time the training against the usual loop", BENCH),
    "libraries": (_libraries, "put other libraries' accumulation to the test (extra: peers)", []),
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
