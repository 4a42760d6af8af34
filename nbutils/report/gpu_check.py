"""`python -m nbutils gpu-check`: everything that has to be seen on a GPU, in one command.

A stage is a generator, called with the device and whether to be quick. It yields rows: a name, a
number or a few words, and whether that is right, None where nothing is judged. A stage that fails
or is cut keeps its rows and leaves the others.
"""

import gc
import io
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nbutils.accumulation.vectors import relative_difference
from nbutils.analysis.outcomes import setting_name
from nbutils.data.dataset import Dataset
from nbutils.data.sources import load_dataset
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.paths import ROOT, write_atomically, write_json
from nbutils.report.bench import FIGURES, run_bench, second_epoch
from nbutils.training.config import RunConfig
from nbutils.training.setup import deterministic, resolve_device
from nbutils.training.train import train, train_many

Row = tuple[str, Any, bool | None]
Stage = Callable[[str, bool], Iterator[Row]]

TIMED = [(32, 1), (128, 1), (1024, 1), (128, 8)]
"""Batch size and accumulation steps; a quick check times the first."""

# float32 holds this rate exactly, and a graph reads the rate in float32.
_config = partial(RunConfig, epochs=2, learning_rate=2**-10)


def _digits(quick: bool) -> Dataset:
    """Full MNIST where its files are, else the embedded digits; few of them for a quick check."""
    if quick:
        return load_dataset("mnist-5k").subset(250)
    with suppress(InputError):
        return load_dataset("mnist")
    return load_dataset("mnist-5k")


def probes(device: str, quick: bool) -> Iterator[Row]:
    """What a review of torch's sources found to go wrong on a GPU."""
    data = _digits(quick=True)
    indexed = "cuda:0" if device == "cuda" else device
    # The first use of CUDA in this process, by its index: that used to fail.
    train(_config(device=indexed), data, progress=False)
    yield f"device = {indexed!r} as the first use of it", "works", True
    if device != "cuda":
        return
    gc.collect()
    gc.disable()
    before = torch.cuda.memory_allocated()
    train(_config(device=device), data, progress=False)
    left = torch.cuda.memory_allocated() - before
    gc.enable()
    # cuBLAS keeps a workspace for the stream; nothing else may stay.
    yield "bytes left after a run, collector off", left, left < 2**26
    images = torch.randn(64, 32, 28, 28, device=device)
    weights = torch.randn(32, 32, 3, 3, device=device) / 17
    with deterministic(images.device):  # without TF32
        found, truth = F.conv2d(images, weights), F.conv2d(images.double(), weights.double())
    error = relative_difference(found, truth)
    yield "error of a float32 convolution", f"{error:.1e}", error < 1e-5


def graphs(device: str, quick: bool) -> Iterator[Row]:
    """Histories by replayed graphs and by the plain loop, bitwise, for every kind of setting."""
    data = _digits(quick=True)
    choices = {
        "optimizer": ("adam", "sgd"),
        "schedule": ("constant", "one-cycle"),
        "augment": (False, True),
        "precision": ("float32", "float64", "bfloat16"),
    }
    tried = list(itertools.product(*choices.values()))[-1 if quick else 0 :]
    for norm in ("batch", "ghost", "group", "none"):
        different = 0
        for values in tried:
            settings: dict[str, Any] = dict(zip(choices, values, strict=True)) | {"norm": norm}
            config = _config(device=device, batch_size=64, accumulation_steps=2, **settings)
            results = [train(config, data, progress=False, cuda_graph=g) for g in (True, False)]
            graphed, plain = (result.history.drop(columns="seconds") for result in results)
            if not graphed.equals(plain):
                different += 1
                yield "differs", str(settings), False
        found = f"{len(tried) - different} of {len(tried)} bitwise equal"
        yield f"graph against plain loop, norm {norm}", found, not different


def epochs(device: str, quick: bool) -> Iterator[Row]:
    """Seconds of a second epoch, by plain loop and by graph."""
    data = _digits(quick)
    for batch_size, steps in TIMED[: 1 if quick else None]:
        config = _config(device=device, batch_size=batch_size, accumulation_steps=steps)
        for name, graph in {"graph": True, "plain loop": False}.items():
            seconds = round(second_epoch(config, data, cuda_graph=graph), 4)
            yield f"{setting_name(batch_size, steps)}, {name}: s/epoch", seconds, None


def bench(device: str, quick: bool) -> Iterator[Row]:
    """`python -m nbutils bench`, with fewer settings."""
    repeats, settings = (1, TIMED[:1]) if quick else (3, TIMED)
    for row in run_bench(_digits(quick), repeats=repeats, device=device, settings=settings):
        for figure, heading in FIGURES.items():
            yield f"{row['setting']}: {heading}", round(row[figure], 3), None


def tests(device: str, quick: bool) -> Iterator[Row]:
    """The tests marked `cuda`."""
    import hypothesis  # noqa: F401 # the tests need it
    import pytest

    selected = ROOT / ("tests/training/test_cuda_graph.py" if quick else "tests")
    with redirect_stdout(io.StringIO()) as text:
        status = pytest.main(["-q", "-m", "cuda", str(selected)])
    yield "tests marked cuda", text.getvalue().strip().splitlines()[-1], status == 0


def side_by_side(device: str, quick: bool) -> Iterator[Row]:
    """Seconds of several seeds that share the device."""
    for runs in (2,) if quick else (1, 4, 8, 16):
        configs = [_config(device=device, seed=seed) for seed in range(runs)]
        results = train_many(configs, _digits(quick), progress=False)
        seconds = max(result.history["seconds"].diff().iloc[-1] for result in results)
        yield f"{runs} seeds of 128 side by side: s/epoch", round(seconds, 4), None


def largest_batch(device: str, quick: bool) -> Iterator[Row]:
    """The largest batch within 2 GB against what one update of it really takes."""
    from nbutils import largest_batch_size
    from nbutils.measure.cost import measure

    data, budget = load_dataset("mnist-5k"), 2 * 10**9
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float32)
    trained = "nbutils.training.model:DigitCNN", images, data.train.labels
    largest = 2 if quick else None
    found = largest_batch_size(*trained, memory_budget=budget, largest=largest, device=device)
    yield "largest batch within the budget", found.batch_size, None
    peak = measure(*trained, found.batch_size, 2, device=device).peak_memory
    yield "bytes that it takes, of the budget", f"{peak} of {budget}", peak <= budget


def study(device: str, quick: bool) -> Iterator[Row]:
    """The study of batch sizes on the embedded digits, end to end; when quick, one run of it."""
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    plan = load_study("batch-size", {"device": [device]} | ({"epochs": [1]} if quick else {}))
    plan = replace(plan, runs=plan.runs[-1:] if quick else plan.runs)
    with tempfile.TemporaryDirectory() as folder:
        failures = run_study(plan, folder)
    yield "runs of the study batch-size that failed", len(failures), not failures
    yield from ((name, cause, False) for name, cause in failures.items())


STAGES: dict[str, tuple[Stage, int]] = {
    "probes": (probes, 30),
    "graphs": (graphs, 100),
    "epochs": (epochs, 60),
    "bench": (bench, 100),
    "tests": (tests, 60),
    "side by side": (side_by_side, 40),
    "largest batch": (largest_batch, 30),
    "study": (study, 60),
}
"""The most valuable first, and the seconds that each may take: 8 minutes in all."""

PROCESSES: Any = multiprocessing.get_context("spawn")  # CUDA starts anew in each
MARKS = {True: "ok  ", False: "BAD ", None: "    "}


def run_gpu_check(out: Path, device: str = "cuda", quick: bool = False) -> bool:
    """Run each stage in a process of its own; whether nothing was wrong.

    "cpu" and `quick` are only to try them: a quick check runs in this process and without limits,
    which saves eight imports of torch.

    Raises:
        InputError: The device does not exist.
    """
    if device not in ("cuda", "cpu"):
        raise InputError(f"device = {device!r}, but it must be 'cuda' or 'cpu'")
    name = device_name(resolve_device(device))
    content: dict[str, Any] = {"device": name, "quick": quick, "rows": []}
    with suppress(ModuleNotFoundError):  # of a package whose version is recorded
        content["environment"] = environment(name)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "gpu.json", content)
    for stage, (work, limit) in STAGES.items():
        print(f"{stage} ...", flush=True)
        start, status = time.perf_counter(), 0
        given = out, stage, work, device, quick
        if quick:
            _run_stage(*given)
        else:
            process = PROCESSES.Process(target=_run_stage, args=given)
            process.start()
            process.join(limit if device == "cuda" else 4 * limit)  # a CPU is slower
            status = process.exitcode
            process.kill()
            process.join()
        end = {0: "ended", None: "was cut"}.get(status, f"died with exit status {status}")
        _add_row(out, stage, end, f"after {time.perf_counter() - start:.1f} s", status == 0)
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.txt'}")
    rows = json.loads((out / "gpu.json").read_text(encoding="utf-8"))["rows"]
    return not any(row["ok"] is False for row in rows)


def _run_stage(out: Path, stage: str, work: Stage, device: str, quick: bool) -> None:
    try:
        for row in work(device, quick):
            _add_row(out, stage, *row)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)  # a package: nothing was found wrong
        _add_row(out, stage, type(error).__name__, str(error), None if missing else False)


def _add_row(out: Path, stage: str, name: str, value: Any, ok: bool | None) -> None:
    """Add to `gpu.json`, write all of it in `gpu.txt` too, and print what is new."""
    content = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    content["rows"].append({"stage": stage, "name": name, "value": value, "ok": ok})
    write_json(out / "gpu.json", content)
    lines = [f"{MARKS[r['ok']]}{r['stage']}: {r['name']}: {r['value']}" for r in content["rows"]]
    write_atomically(out / "gpu.txt", "\n".join([content["device"], *lines, ""]).encode())
    print(lines[-1], flush=True)
