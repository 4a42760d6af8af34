"""`python -m nbutils gpu-check`: everything that has to be seen on a GPU, in one command.

A stage is a generator, called with the device and whether to be quick. It yields rows: a name, a
number or a few words, and whether that is right, None where nothing is judged. Each runs in a
process of its own with a time limit, and keeps the rows it has yielded if it is cut. `gpu.json` and
`gpu.txt` are written anew after each.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nbutils.analysis.outcomes import setting_name
from nbutils.data.dataset import Dataset
from nbutils.data.sources import load_dataset
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.paths import ROOT, write_atomically
from nbutils.report.bench import run_bench, second_epoch
from nbutils.training.config import RunConfig
from nbutils.training.setup import resolve_device
from nbutils.training.train import train, train_many

Rows = Iterator[tuple[str, Any, bool | None]]

BUDGET = 2 * 10**9
"""Bytes within which the largest batch is searched."""

CUT = "took over"
"""How the reason of a stage begins that its time limit ended."""


def _digits(quick: bool) -> Dataset:
    """Full MNIST where its files are, else the embedded digits; few of them for a quick check."""
    if not quick:
        with suppress(InputError):
            return load_dataset("mnist")
    digits = load_dataset("mnist-5k")
    return digits.subset(250) if quick else digits


def _settings(quick: bool) -> list[tuple[int, int]]:
    """Batch size and accumulation steps of what is timed."""
    return [(100, 2)] if quick else [(32, 1), (128, 1), (1024, 1), (128, 8)]


def _config(device: str, **settings: Any) -> RunConfig:
    # float32 holds this rate exactly, and a graph reads the rate in float32.
    return RunConfig.from_dict({"device": device, "epochs": 2, "learning_rate": 2**-10} | settings)


def probes(device: str, quick: bool) -> Rows:
    """What a review of torch's sources found to go wrong on a GPU."""
    data = _digits(quick=True)
    indexed = "cuda:0" if device == "cuda" else device
    # The first use of CUDA in this process, by its index: that used to fail.
    train(_config(indexed), data, progress=False)
    yield f"device = {indexed!r} as the first use of it", "works", True
    if device != "cuda":
        return
    gc.collect()
    gc.disable()
    before = torch.cuda.memory_allocated()
    train(_config(device), data, progress=False)
    left = torch.cuda.memory_allocated() - before
    gc.enable()
    # cuBLAS keeps a workspace for the stream; nothing else may stay.
    yield "bytes left after a run, collector off", left, left < 2**26
    images = torch.randn(64, 32, 28, 28, device=device)
    weights = torch.randn(32, 32, 3, 3, device=device) / 17
    truth = F.conv2d(images.double(), weights.double())
    for name, tf32 in {"a float32 convolution": False, "the same with TF32": True}.items():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            error = ((F.conv2d(images, weights) - truth).norm() / truth.norm()).item()
        yield f"error of {name}", f"{error:.1e}", None if tf32 else error < 1e-5


def graphs(device: str, quick: bool) -> Rows:
    """Replayed graphs against the plain loop, bitwise, for every kind of setting."""
    data = load_dataset("mnist-5k").subset(200 if quick else 300)
    choices = {
        "optimizer": ("adam", "sgd"),
        "schedule": ("constant", "one-cycle"),
        "augment": (False, True),
        "precision": ("float32", "float64", "bfloat16"),
    }
    combinations = list(itertools.product(*choices.values()))
    tried = combinations[-1:] if quick else combinations
    for norm in ("batch", "ghost", "group", "none"):
        different = []
        for values in tried:
            settings = dict(zip(choices, values, strict=True)) | {"norm": norm}
            settings["epochs"] = 1 if quick else 2
            config = _config(device, batch_size=64, accumulation_steps=2, **settings)
            ours, theirs = (
                train(config, data, progress=False, cuda_graph=g) for g in (True, False)
            )
            weights = theirs.model.state_dict()
            equal = all(
                torch.equal(value, weights[n]) for n, value in ours.model.state_dict().items()
            )
            histories = [result.history.drop(columns="seconds") for result in (ours, theirs)]
            if not (equal and histories[0].equals(histories[1])):
                different.append(" ".join(map(str, values)))
        found = f"{len(tried) - len(different)} of {len(tried)} bitwise equal"
        yield f"graph against plain loop, norm {norm}", found, not different
        yield from (("differs", f"{norm} {name}", False) for name in different)


def epochs(device: str, quick: bool) -> Rows:
    """Seconds of a second epoch, by plain loop and by graph."""
    data = _digits(quick)
    for (batch_size, steps), graph in itertools.product(_settings(quick), (True, False)):
        config = _config(device, batch_size=batch_size, accumulation_steps=steps)
        seconds = round(second_epoch(config, data, cuda_graph=graph), 4)
        name = f"{setting_name(batch_size, steps)}, {'graph' if graph else 'plain loop'}"
        yield f"{name}: s per epoch of {len(data.train.labels):,}", seconds, None


def bench(device: str, quick: bool) -> Rows:
    """`python -m nbutils bench`, with fewer settings."""
    labels = {
        "baseline_seconds": "usual loop, s per epoch",
        "seconds": "ours, s per epoch",
        "ratio": "times as fast",
        "floor_ratio": "times the floor",
    }
    repeats = 1 if quick else 3
    for row in run_bench(_digits(quick), 13_500, repeats, device, _settings(quick)):
        for figure, label in labels.items():
            yield f"{row['setting']}: {label}", round(row[figure], 3), None


def tests(device: str, quick: bool) -> Rows:
    """The tests marked `cuda`."""
    import hypothesis  # noqa: F401 # the tests need it
    import pytest

    selected = ROOT / ("tests/training/test_cuda_graph.py" if quick else "tests")
    with redirect_stdout(io.StringIO()) as text:
        status = pytest.main(["-q", "-m", "cuda", str(selected)])
    yield "tests marked cuda", text.getvalue().strip().splitlines()[-1], status == 0


def side_by_side(device: str, quick: bool) -> Rows:
    """Seconds of several seeds that share the device."""
    data = _digits(quick)
    for runs in (2,) if quick else (1, 4, 8, 16):
        configs = [_config(device, seed=seed) for seed in range(runs)]
        results = train_many(configs, data, progress=False)
        seconds = max(result.history["seconds"].diff().iloc[-1] for result in results)
        yield f"{runs} seeds of 128 side by side: s per epoch", round(seconds, 4), None


def largest_batch(device: str, quick: bool) -> Rows:
    """The largest batch within a budget against what one update of it really takes."""
    from nbutils import largest_batch_size
    from nbutils.measure.cost import measure

    data = load_dataset("mnist-5k")
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float32)
    trained = "nbutils.training.model:DigitCNN", images, data.train.labels
    largest = 2 if quick else None
    found = largest_batch_size(*trained, memory_budget=BUDGET, largest=largest, device=device)
    yield "largest batch within the budget", found.batch_size, None
    peak = measure(*trained, found.batch_size, 2, device=device).peak_memory
    yield "bytes that it takes, of the budget", f"{peak} of {BUDGET}", peak <= BUDGET


def study(device: str, quick: bool) -> Rows:
    """The study of batch sizes on the embedded digits, end to end."""
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    fewer = {"epochs": [1], "batch_size": [512]} if quick else {}
    plan = load_study("batch-size", {"device": [device], **fewer})
    plan = replace(plan, runs=plan.runs[: 1 if quick else None])
    with tempfile.TemporaryDirectory() as folder:
        failures = run_study(plan, folder)
    yield "runs of the study batch-size that failed", len(failures), not failures
    yield from ((name, cause, False) for name, cause in failures.items())


STAGES: dict[str, tuple[Callable[[str, bool], Rows], int]] = {
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


def run_gpu_check(out: Path, device: str = "cuda", quick: bool = False) -> bool:
    """Run all stages, on "cpu" or when `quick` only to try them; whether none failed or was cut.

    When `quick`, they run in this process and without limits, which saves eight imports of torch.

    Raises:
        InputError: The device does not exist.
    """
    if device not in ("cuda", "cpu"):
        raise InputError(f"device = {device!r}, but it must be 'cuda' or 'cpu'")
    name = device_name(resolve_device(device))
    stages: dict[str, Any] = {}
    content: dict[str, Any] = {"device": name, "quick": quick, "stages": stages}
    with suppress(ModuleNotFoundError):  # of a package whose version is recorded
        content["environment"] = environment(name)
    out.mkdir(parents=True, exist_ok=True)
    lines, marks = [name], {True: "ok  ", False: "BAD ", None: "    "}
    for stage, (_, limit) in STAGES.items():
        print(f"{stage} ...", flush=True)
        start = time.perf_counter()
        call = f"from nbutils.report.gpu_check import _main; _main({stage!r}, {device!r})"
        limit = limit if device == "cuda" else 4 * limit  # a CPU is slower
        rows, reason = _here(stage, device) if quick else in_process(call, limit)
        state, seconds = _state(rows, reason), round(time.perf_counter() - start, 1)
        stages[stage] = {"state": state, "reason": reason, "seconds": seconds, "rows": rows}
        text = [f"{stage}: {state} in {seconds} s {reason}".rstrip()]
        text += [f"  {marks[row['ok']]}{row['name']}: {row['value']}" for row in rows]
        print(*text, sep="\n", flush=True)
        lines += text
        write_atomically(out / "gpu.json", (json.dumps(content, indent=1) + "\n").encode())
        write_atomically(out / "gpu.txt", ("\n".join(lines) + "\n").encode())
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.txt'}")
    return all(outcome["state"] in ("passed", "skipped") for outcome in stages.values())


def _state(rows: list[dict[str, Any]], reason: str) -> str:
    """What became of a stage; one is skipped if a package is missing."""
    if reason.startswith(CUT):
        return "cut"
    if "ModuleNotFoundError" in reason or "PackageNotFoundError" in reason:
        return "skipped"
    return "failed" if reason or any(row["ok"] is False for row in rows) else "passed"


def in_process(code: str, limit: int) -> tuple[list[dict[str, Any]], str]:
    """The rows that Python code prints as lines of JSON in `limit` seconds, and why it ended."""
    reason = ""
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=limit)
        printed = done.stdout
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        printed, reason = expired.stdout or b"", f"{CUT} {limit} s"
    whole = printed.splitlines(keepends=True)
    return [json.loads(line) for line in whole if line.endswith(b"\n")], reason


def _main(stage: str, device: str) -> None:
    """The process of one stage: it prints each row as one line of JSON."""
    file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no row
    for row in _rows(stage, device):
        print(json.dumps(row), file=file, flush=True)


def _here(stage: str, device: str) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(_rows(stage, device, quick=True))
    except Exception as error:  # it leaves the other stages, as in a process of its own
        return rows, f"{type(error).__name__}: {error}"
    return rows, ""


def _rows(stage: str, device: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    for name, value, ok in STAGES[stage][0](device, quick):
        yield {"name": name, "value": value, "ok": ok}
