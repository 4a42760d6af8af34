"""`python -m nbutils gpu-check`: everything that has to be seen on a GPU, in one command.

A stage is a generator, called with the device and whether to be quick. It yields rows: a name, a
number or a few words, and whether that is right, None where nothing is judged. A stage that fails
or is cut keeps its rows and leaves the others.
"""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
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
from nbutils.training.setup import resolve_device
from nbutils.training.train import train, train_many

Rows = Iterator[tuple[str, Any, bool | None]]
Stage = Callable[[str, bool], Rows]


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
            error = relative_difference(F.conv2d(images, weights), truth)
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
            results = [train(config, data, progress=False, cuda_graph=g) for g in (True, False)]
            ours, theirs = (result.model.state_dict() for result in results)
            equal = all(torch.equal(weights, theirs[name]) for name, weights in ours.items())
            histories = [result.history.drop(columns="seconds") for result in results]
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
    labels = ["usual loop, s per epoch", "ours, s per epoch", "times as fast", "times the floor"]
    repeats = 1 if quick else 3
    for row in run_bench(_digits(quick), 13_500, repeats, device, _settings(quick)):
        for figure, label in zip(FIGURES, labels, strict=True):
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
    for runs in (2,) if quick else (1, 4, 8, 16):
        configs = [_config(device, seed=seed) for seed in range(runs)]
        results = train_many(configs, _digits(quick), progress=False)
        seconds = max(result.history["seconds"].diff().iloc[-1] for result in results)
        yield f"{runs} seeds of 128 side by side: s per epoch", round(seconds, 4), None


def largest_batch(device: str, quick: bool) -> Rows:
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


def study(device: str, quick: bool) -> Rows:
    """The study of batch sizes on the embedded digits, end to end; when quick, one run of it."""
    from nbutils.studies.runner import run_study
    from nbutils.studies.study import load_study

    fewer: dict[str, Any] = {"epochs": [1], "batch_size": [512]} if quick else {}
    plan = load_study("batch-size", {"device": [device], **fewer})
    plan = replace(plan, runs=plan.runs[: 1 if quick else None])
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


def run_gpu_check(out: Path, device: str = "cuda", quick: bool = False) -> bool:
    """Run all stages, on "cpu" or when `quick` only to try them; whether none failed or was cut.

    When `quick`, they run in this process and without limits, which saves eight imports of torch.
    After each stage `gpu.json` and `gpu.txt` are written anew.

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
    for stage, (work, limit) in STAGES.items():
        print(f"{stage} ...", flush=True)
        longest = limit if device == "cuda" else 4 * limit  # a CPU is slower
        found = stages[stage] = run_stage(work, device, quick, longest)
        text = [f"{stage}: {found['state']} in {found['seconds']} s {found['reason']}".rstrip()]
        text += [f"  {marks[row['ok']]}{row['name']}: {row['value']}" for row in found["rows"]]
        print(*text, sep="\n", flush=True)
        lines += text
        write_json(out / "gpu.json", content)
        write_atomically(out / "gpu.txt", ("\n".join(lines) + "\n").encode())
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.txt'}")
    return all(found["state"] in ("passed", "skipped") for found in stages.values())


def run_stage(work: Stage, device: str, quick: bool, limit: float) -> dict[str, Any]:
    """What a stage found in a process of its own, in `limit` seconds; here if it is quick.

    Returns:
        `state`: "passed", "failed", "skipped" if a package is missing, or "cut"; the `reason`,
        empty if it passed; `seconds`; and the `rows` so far.
    """
    start, sent = time.perf_counter(), list[Any]()
    end = {"state": "cut", "reason": f"took over {limit} s"}
    if quick:
        _send_rows(work, device, quick, sent.append)
    else:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_send_rows, args=(work, device, quick, sender.send))
        process.start()
        sender.close()
        try:
            while not _has_ended(sent) and receiver.poll(start + limit - time.perf_counter()):
                sent.append(receiver.recv())
        except EOFError:  # it died
            process.join()
            end = {"state": "failed", "reason": f"exit status {process.exitcode}"}
        process.kill()
        process.join()
    if _has_ended(sent):
        end = sent.pop()
    if end["state"] == "passed" and any(row["ok"] is False for row in sent):
        end["state"] = "failed"
    return {**end, "seconds": round(time.perf_counter() - start, 1), "rows": sent}


def _has_ended(sent: list[dict[str, Any]]) -> bool:
    return bool(sent) and "state" in sent[-1]


def _send_rows(work: Stage, device: str, quick: bool, send: Callable[[Any], object]) -> None:
    end = {"state": "passed", "reason": ""}
    try:
        for name, value, ok in work(device, quick):
            send({"name": name, "value": value, "ok": ok})
    except Exception as error:
        state = "skipped" if isinstance(error, ModuleNotFoundError) else "failed"
        end = {"state": state, "reason": f"{type(error).__name__}: {error}"}
    send(end)
