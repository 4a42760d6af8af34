"""The command line: `python -m nbutils COMMAND`."""

import argparse
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from nbutils.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 1 when a run failed or is damaged, 2 when the input was bad."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m nbutils", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)

    def command(name: str, run: Callable[[Namespace], int | None], summary: str) -> Any:
        added = commands.add_parser(name, help=summary)
        added.set_defaults(command=run)
        return added.add_argument

    add = command("run", _run, "make the runs of a study, then sum them up")
    add("study", help="a name in notebooks/studies/, or the path of a YAML file")
    add("--dataset", help="train on this instead of the study's dataset")
    values = {"action": "append", "default": [], "metavar": "FIELD=VALUE[,VALUE...]"}
    add("--set", **values, help="one or several values in place of the study's (may be repeated)")
    add("--jobs", type=int, help="runs side by side (default: from the machine)")
    add("--scheduler", help="make the runs on the Dask cluster of this address (extra: cluster)")
    add("--out", type=Path, help="folder of the runs (default: runs/STUDY-DATASET)")
    add("--time-limit", type=float, metavar="SECONDS", help="of a run's training")
    add("--on-oom", default="stop", help="when memory runs out: stop (default) or split the batch")

    add = command("advise", _advise, "advise on the batch size of a training of yours")
    add("--model", required=True, help="what makes it, as package.module:factory")
    add("--dataset", required=True, help="a name, a folder by class, or package.module:factory")
    add("--losses", help="the loss of each example, if it is no classifier: package.module:losses")
    add("--collate", help="what makes a batch of items, as package.module:collate")
    columns = "the keys of image and label, where items are mappings"
    add("--columns", type=lambda text: text.split(","), metavar="IMAGE,LABEL", help=columns)
    add("--memory-budget", help="such as 2GB (default: what is free)")
    add("--time-budget", default="10min", help="such as 90s (default: 10min)")
    add("--optimizer", default="adam", help="adam (default) or sgd")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("runs/advice"), help="folder of the report (runs/advice)")

    add = command("status", _status, "tell how far the runs of a study are")
    add("folder", type=Path, help="of the runs")
    add = command("export", _export, "write what a study left as a small reference")
    add("runs", type=Path, help="folder of the runs")
    add("reference", type=Path, help="folder of the reference")
    command("figures", _figures, "make figures/ and the README's numbers")
    add = command("bench", _bench, "time the training against the usual loop")
    add("--out", type=Path, help="JSON file to write the rows to")
    add("--dataset", default="mnist", help="whose images (default: mnist)")
    add("--images", type=int, default=13_500, help="images of a timed epoch")
    add("--repeats", type=int, default=5, help="timed epochs of each loop")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    command("libraries", _libraries, "put other libraries' accumulation to the test (extra: peers)")
    add = command("gpu-check", _gpu_check, "check and measure everything on a GPU")
    add("--out", type=Path, required=True, help="folder of gpu.json and gpu.txt")
    add("--device", default="cuda", help="cuda, or cpu to try the command itself")
    add("--quick", action="store_true", help="shrink every stage")
    return parser


def _run(options: Namespace) -> int:
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
    with cluster(options.scheduler, out) if options.scheduler else nullcontext() as executor:
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
    for path in [*sorted(out.glob("*.png")), *sorted(out.glob("*.svg"))]:
        print(f"figure: {path}")
    print(f"summary: {out / 'summary.ipynb'}")
    return 0


def _overrides(settings: Iterable[str]) -> dict[str, list[Any]]:
    """The values of each field; `--set seed=0 --set seed=1` means both."""
    overrides: dict[str, list[Any]] = {}
    for text in settings:
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"--set {text}: it must read FIELD=VALUE or FIELD=VALUE,VALUE")
        overrides.setdefault(field, []).extend(map(_value, values.split(",")))
    return overrides


def _value(text: str) -> Any:
    for read in (int, float, yaml.safe_load):  # YAML takes 1e-3 for text
        with suppress(ValueError, RecursionError, yaml.YAMLError):  # 2020-13-45 is no date
            return read(text)
    return text


def _advise(options: Namespace) -> None:
    from nbutils.advise.advice import advise, write_report

    given = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is not a folder")
    advice = advise(**given)
    print(advice.answer, *(f"  warning: {warning}" for warning in advice.warnings), sep="\n")
    for path in write_report(advice, options.out):
        print(f"report: {path}")


def _status(options: Namespace) -> int:
    from nbutils.studies.status import run_status

    statuses = run_status(options.folder)
    width = max(map(len, statuses), default=0)
    for run_id, status in statuses.items():
        print(f"{run_id:{width}}  {status}")
    return int(any(status.startswith(("failed", "damaged")) for status in statuses.values()))


def _export(options: Namespace) -> None:
    from nbutils.studies.reference import export

    export(options.runs, options.reference)
    print(f"reference: {options.reference}")


def _figures(_: Namespace) -> None:
    from nbutils.report.readme import make_figures

    print(*make_figures(), sep="\n")


def _bench(options: Namespace) -> None:
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


def _libraries(_: Namespace) -> None:
    from nbutils.report.libraries import observe_all

    print(f"table: {observe_all()}")


def _gpu_check(options: Namespace) -> int:
    from nbutils.report.gpu_check import run_gpu_check

    return int(not run_gpu_check(options.out, options.device, options.quick))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # not all print all text
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C
        sys.stdout.flush()
        print("interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        for process in psutil.Process().children(recursive=True):  # a kernel that just started
            with suppress(psutil.Error):
                process.kill()
        os._exit(130)  # 128 and the number of the signal; threads may still wait for a kernel
