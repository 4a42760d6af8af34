"""The stages of `python -m nbutils gpu-check`: each checks or measures one thing on a device.

A stage is a function of the device and of whether to be quick; it returns rows, each with a
`name`, a `value` (a number or a few words) and `ok`, which is None where nothing is judged.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nbutils.data.dataset import Dataset
from nbutils.data.sources import load_dataset
from nbutils.errors import InputError
from nbutils.paths import ROOT
from nbutils.report.bench import SETTINGS, run_bench, setting_name
from nbutils.training.config import RunConfig
from nbutils.training.result import RunResult
from nbutils.training.train import train, train_many

Rows = list[dict[str, Any]]

BUDGET = 2 * 10**9
"""Bytes within which the largest batch is searched."""


class Skipped(Exception):
    """A stage cannot run here; the message says why."""


def row(name: str, value: Any, ok: bool | None = None) -> dict[str, Any]:
    """One row of a stage's outcome."""
    return {"name": name, "value": value, "ok": ok}


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


def tests(device: str, quick: bool) -> Rows:
    """The tests marked `cuda`, in a process of their own."""
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        raise Skipped(f"needs {' and '.join(missing)}, from the extra dev")
    selected = ["tests/training/test_cuda_graph.py"] if quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *selected]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    return [row("tests marked cuda", last, done.returncode == 0)]


def probes(device: str, quick: bool) -> Rows:
    """What a review of torch's sources found to go wrong on a GPU."""
    data = load_dataset("mnist-5k").subset(512)
    indexed = "cuda:0" if device == "cuda" else device
    # The first use of CUDA in this process, by its index: that used to fail.
    train(_config(indexed), data, progress=False)
    rows = [row(f"device = {indexed!r} as the first use of it", "works", True)]
    if device != "cuda":
        return rows
    gc.collect()
    gc.disable()
    before = torch.cuda.memory_allocated()
    train(_config(device), data, progress=False)
    left = torch.cuda.memory_allocated() - before
    gc.enable()
    # cuBLAS keeps a workspace for the stream; nothing else may stay.
    rows.append(row("bytes left after a run, collector off", left, left < 2**26))
    exact, rounded = (_convolution_error(allow) for allow in (False, True))
    rows.append(row("error of a float32 convolution", f"{exact:.1e}", exact < 1e-5))
    rows.append(row("the same with TF32", f"{rounded:.1e}"))
    return rows


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
    combinations = itertools.product(
        ("batch", "ghost", "group", "none"),
        ("adam", "sgd"),
        ("constant", "one-cycle"),
        (False, True),
        ("float32", "float64", "bfloat16"),
    )
    names = ("norm", "optimizer", "schedule", "augment", "precision")
    different, count = [], 0
    for values in list(combinations)[:: 40 if quick else 1]:
        settings = dict(zip(names, values, strict=True))
        config = _config(device, batch_size=64, accumulation_steps=2, **settings)
        graphed, plain = (
            train(config, data, progress=False, cuda_graph=graph) for graph in (True, False)
        )
        count += 1
        if not _same(graphed, plain):
            different.append(" ".join(map(str, values)))
    verdict = f"{count - len(different)} of {count} bitwise equal"
    rows = [row("graph against plain loop", verdict, not different)]
    return [*rows, *(row("differs", name, False) for name in different)]


def _same(one: RunResult, other: RunResult) -> bool:
    ours, theirs = (result.history.drop(columns="seconds") for result in (one, other))
    states = one.model.state_dict(), other.model.state_dict()
    return ours.equals(theirs) and all(torch.equal(states[0][n], states[1][n]) for n in states[1])


def epochs(device: str, quick: bool) -> Rows:
    """Seconds of a second epoch, by plain loop and by graph."""
    data, rows = _digits(quick), []
    settings = [(32, 1), (128, 1), (1024, 1), (128, 8)]
    for batch_size, steps in settings[-1:] if quick else settings:
        for graph in (True, False):
            config = _config(device, batch_size=batch_size, accumulation_steps=steps)
            history = train(config, data, progress=False, cuda_graph=graph).history
            how = "graph" if graph else "plain loop"
            name = f"{setting_name(config)}, {how}: s per epoch of {len(data.train.labels):,}"
            rows.append(row(name, round(history["seconds"].diff().iloc[-1], 4)))
    return rows


def side_by_side(device: str, quick: bool) -> Rows:
    """Seconds of several seeds that share the device."""
    data, rows = _digits(quick), []
    for runs in (1, 2) if quick else (1, 4, 8, 16):
        configs = [_config(device, seed=seed) for seed in range(runs)]
        results = train_many(configs, data, progress=False)
        seconds = max(result.history["seconds"].diff().iloc[-1] for result in results)
        rows.append(row(f"{runs} seeds of 128 side by side: s per epoch", round(seconds, 4)))
    return rows


def bench(device: str, quick: bool) -> Rows:
    """`python -m nbutils bench`."""
    settings = ((128, 1),) if quick else SETTINGS
    images, repeats = (1200, 1) if quick else (54_000, 3)
    return [
        row(f"{each.setting}: {label}", round(value, 3))
        for each in run_bench(_digits(quick), images, repeats, device, settings)
        for label, value in (
            ("usual loop, s per epoch", each.baseline_seconds),
            ("ours, s per epoch", each.seconds),
            ("times as fast", each.ratio),
            ("times the floor", each.floor_ratio),
        )
    ]


def study(device: str, quick: bool) -> Rows:
    """The study of batch sizes on the embedded digits, end to end."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["--set", "epochs=1", "--set", "batch_size=64"] if quick else []
        out = str(Path(folder, "runs"))
        command = [sys.executable, "-m", "nbutils", "run", "batch-size", "--out", out, *short]
        command += ["--set", f"device={device}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    text = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return [row("study batch-size", text[0] if done.returncode else "whole", not done.returncode)]


def largest_batch(device: str, quick: bool) -> Rows:
    """The largest batch within a budget against what one update of it really takes."""
    from nbutils import largest_batch_size
    from nbutils.measure.cost import measure

    data = load_dataset("mnist-5k")
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float32)
    factory = "nbutils.training.model:DigitCNN"
    budget = BUDGET // 20 if quick else BUDGET
    found = largest_batch_size(
        factory, images, data.train.labels, memory_budget=budget, device=device
    )
    again = measure(factory, images, data.train.labels, found.batch_size, 2, device=device)
    fits = again.peak_memory <= budget
    return [
        row("largest batch within the budget", found.batch_size),
        row("bytes that it takes, of the budget", f"{again.peak_memory} of {budget}", fits),
    ]


STAGES: dict[str, tuple[Callable[[str, bool], Rows], int]] = {
    "probes": (probes, 60),
    "graphs": (graphs, 120),
    "epochs": (epochs, 60),
    "bench": (bench, 120),
    "tests": (tests, 120),
    "side by side": (side_by_side, 60),
    "largest batch": (largest_batch, 60),
    "study": (study, 90),
}
"""The stages, the most valuable first, and the seconds that each may take."""
