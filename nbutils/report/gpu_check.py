"""`python -m nbutils gpu-check`: everything that has to be seen on a GPU, in one command.

Each stage runs in a process of its own with a time limit. It is a generator, called with the device
and whether to be quick; it yields rows: a name, a number or a few words, and whether that is right,
None where nothing is judged. After each stage `gpu.json` and `gpu.txt` are written anew, and a
stage that is cut keeps the rows it has yielded, so that a cut costs only what comes later.
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

from nbutils.analysis.outcomes import setting_name
from nbutils.data.dataset import Dataset
from nbutils.data.sources import load_dataset
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.paths import ROOT, write_atomically
from nbutils.report.bench import run_bench, second_epoch
from nbutils.training.config import RunConfig
from nbutils.training.result import RunResult
from nbutils.training.setup import resolve_device
from nbutils.training.train import train, train_many

Rows = Iterator[tuple[str, Any, bool | None]]

BUDGET = 2 * 10**9
"""Bytes within which the largest batch is searched."""

SETTINGS = ((32, 1), (128, 1), (1024, 1), (128, 8))
"""Batch size and accumulation steps of what is timed."""


def _digits(quick: bool) -> Dataset:
    """Full MNIST where its files are, else the embedded digits; few of them for a quick check."""
    if quick:
        return load_dataset("mnist-5k").subset(1100)
    try:
        return load_dataset("mnist")
    except InputError:
        return load_dataset("mnist-5k")


def _config(device: str, **settings: Any) -> RunConfig:
    # float32 holds this rate exactly, and a graph reads the rate in float32.
    return RunConfig.from_dict({"device": device, "epochs": 2, "learning_rate": 2**-10} | settings)


def probes(device: str, quick: bool) -> Rows:
    """What a review of torch's sources found to go wrong on a GPU."""
    data = load_dataset("mnist-5k").subset(512)
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
    exact, rounded = (_convolution_error(allow) for allow in (False, True))
    yield "error of a float32 convolution", f"{exact:.1e}", exact < 1e-5
    yield "the same with TF32", f"{rounded:.1e}", None


def _convolution_error(allow_tf32: bool) -> float:
    images = torch.randn(64, 32, 28, 28, device="cuda")
    weights = torch.randn(32, 32, 3, 3, device="cuda") / 17
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
        ours = torch.nn.functional.conv2d(images, weights)
    truth = torch.nn.functional.conv2d(images.double(), weights.double())
    return ((ours - truth).norm() / truth.norm()).item()


def graphs(device: str, quick: bool) -> Rows:
    """Replayed graphs against the plain loop, bitwise, for every kind of setting."""
    data = load_dataset("mnist-5k").subset(300)
    choices = {
        "optimizer": ("adam", "sgd"),
        "schedule": ("constant", "one-cycle"),
        "augment": (False, True),
        "precision": ("float32", "float64", "bfloat16"),
    }
    combinations = list(itertools.product(*choices.values()))
    for norm in ("batch", "ghost", "group", "none"):
        different, tried = [], combinations[-1:] if quick else combinations
        for values in tried:
            settings = dict(zip(choices, values, strict=True)) | {"norm": norm}
            config = _config(device, batch_size=64, accumulation_steps=2, **settings)
            graphed, plain = (
                train(config, data, progress=False, cuda_graph=graph) for graph in (True, False)
            )
            if not _same(graphed, plain):
                different.append(" ".join(map(str, values)))
        equal = f"{len(tried) - len(different)} of {len(tried)} bitwise equal"
        yield f"graph against plain loop, norm {norm}", equal, not different
        yield from (("differs", f"{norm} {name}", False) for name in different)


def _same(one: RunResult, other: RunResult) -> bool:
    ours, theirs = (result.history.drop(columns="seconds") for result in (one, other))
    states = one.model.state_dict(), other.model.state_dict()
    return ours.equals(theirs) and all(torch.equal(states[0][n], states[1][n]) for n in states[1])


def epochs(device: str, quick: bool) -> Rows:
    """Seconds of a second epoch, by plain loop and by graph."""
    data = _digits(quick)
    for batch_size, steps in SETTINGS[-1:] if quick else SETTINGS:
        config = _config(device, batch_size=batch_size, accumulation_steps=steps)
        for how, graph in {"graph": True, "plain loop": False}.items():
            seconds = round(second_epoch(config, data, cuda_graph=graph), 4)
            name = setting_name(batch_size, steps)
            yield f"{name}, {how}: s per epoch of {len(data.train.labels):,}", seconds, None


def bench(device: str, quick: bool) -> Rows:
    """`python -m nbutils bench`, with fewer settings."""
    images, repeats = (1200, 1) if quick else (13_500, 3)
    settings = SETTINGS[1:2] if quick else SETTINGS
    labels = {
        "baseline_seconds": "usual loop, s per epoch",
        "seconds": "ours, s per epoch",
        "ratio": "times as fast",
        "floor_ratio": "times the floor",
    }
    for row in run_bench(_digits(quick), images, repeats, device, settings):
        for figure, label in labels.items():
            yield f"{row['setting']}: {label}", round(row[figure], 3), None


def tests(device: str, quick: bool) -> Rows:
    """The tests marked `cuda`."""
    import hypothesis  # noqa: F401 # the tests need it
    import pytest

    selected = "tests/training/test_cuda_graph.py" if quick else "tests"
    with redirect_stdout(io.StringIO()) as text:
        status = pytest.main(["-q", "-m", "cuda", selected])
    yield "tests marked cuda", text.getvalue().strip().splitlines()[-1], status == 0


def side_by_side(device: str, quick: bool) -> Rows:
    """Seconds of several seeds that share the device."""
    data = _digits(quick)
    for runs in (1, 2) if quick else (1, 4, 8, 16):
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

    plan = load_study("batch-size", {"device": [device]})
    if quick:
        plan = load_study("batch-size", {"device": [device], "epochs": [1], "batch_size": [512]})
        plan = replace(plan, runs=plan.runs[:1])
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
    lines = [name]
    for stage, (_, limit) in STAGES.items():
        print(f"{stage} ...", flush=True)
        call = f"from nbutils.report.gpu_check import _main; _main({stage!r}, {device!r}, {quick})"
        # A CPU is slower.
        stages[stage] = in_process(call, limit if device == "cuda" else 4 * limit)
        lines.append(_as_text(stage, **stages[stage]))
        print(lines[-1], flush=True)
        write_atomically(out / "gpu.json", (json.dumps(content, indent=1) + "\n").encode())
        write_atomically(out / "gpu.txt", ("\n".join(lines) + "\n").encode())
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.txt'}")
    return all(outcome["state"] in ("passed", "skipped") for outcome in stages.values())


def in_process(code: str, limit: int) -> dict[str, Any]:
    """Run Python code that prints rows as lines of JSON, for `limit` seconds at most.

    Returns:
        `state`: "passed", "failed", "skipped" if a package is missing, or "cut"; the `rows` so far;
        `seconds`; and the `reason`, empty if the code ended by itself.
    """
    start = time.perf_counter()
    state, reason = "passed", ""
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=limit)
        printed = done.stdout
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            missing = "ModuleNotFoundError" in reason or "PackageNotFoundError" in reason
            state = "skipped" if missing else "failed"
    except subprocess.TimeoutExpired as expired:
        printed, state, reason = expired.stdout or b"", "cut", f"took over {limit} s"
    rows = [json.loads(line) for line in printed.splitlines(keepends=True) if line.endswith(b"\n")]
    if state == "passed" and any(row["ok"] is False for row in rows):
        state = "failed"
    seconds = round(time.perf_counter() - start, 1)
    return {"state": state, "reason": reason, "seconds": seconds, "rows": rows}


def _main(stage: str, device: str, quick: bool) -> None:
    """The process of one stage: it prints each row as one line of JSON."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no row
    for name, value, ok in STAGES[stage][0](device, quick):
        print(json.dumps({"name": name, "value": value, "ok": ok}), file=rows, flush=True)


def _as_text(
    stage: str, state: str, reason: str, seconds: float, rows: list[dict[str, Any]]
) -> str:
    marks = {True: "ok  ", False: "BAD ", None: "    "}
    lines = [f"  {marks[row['ok']]}{row['name']}: {row['value']}" for row in rows]
    return "\n".join([f"{stage}: {state} in {seconds} s {reason}".rstrip(), *lines])
