"""`python -m nbutils gpu-check`: everything that has to be seen on a GPU, in one command.

Each stage of `nbutils.report.gpu_stages` runs in a process of its own with a time limit. After
each one `gpu.json` and `gpu.txt` are written anew, so that a cut costs only what comes later.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nbutils.errors import InputError
from nbutils.paths import ROOT, write_atomically

NEEDED = ("torchvision", "pandas", "scipy", "papermill", "psutil", "filelock", "yaml", "jinja2")
"""Modules that stages need beside torch and numpy."""


def run_gpu_check(out: Path, device: str = "cuda", quick: bool = False) -> bool:
    """Run all stages; whether every one of them passed or was skipped.

    Args:
        out: The folder of `gpu.json` and `gpu.txt`; made where there is none.
        device: "cuda", or "cpu" to try the command itself.
        quick: Whether to shrink every stage, for tests.

    Raises:
        InputError: The device does not exist.
    """
    from nbutils.machine import device_name, environment
    from nbutils.report.gpu_stages import STAGES
    from nbutils.training.setup import resolve_device

    if device not in ("cuda", "cpu"):
        raise InputError(f"device = {device!r}, but it must be 'cuda' or 'cpu'")
    place = resolve_device(device)
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        print(f"missing packages, what needs them is skipped: {', '.join(missing)}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "device": device_name(place),
        "environment": None if missing else environment(device_name(place)),
        "missing": missing,
        "quick": quick,
        "stages": {},
    }
    for name, (_, limit) in STAGES.items():
        limit *= 1 if device == "cuda" else 4  # a CPU is slower
        print(f"{name} ...", flush=True)
        content["stages"][name] = outcome = _run_stage(name, device, quick, limit)
        write_atomically(out / "gpu.json", (json.dumps(content, indent=1) + "\n").encode())
        write_atomically(out / "gpu.txt", table(content).encode())
        print(_lines(name, outcome), flush=True)
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.txt'}")
    return all(stage["state"] in ("passed", "skipped") for stage in content["stages"].values())


def _run_stage(name: str, device: str, quick: bool, limit: int) -> dict[str, Any]:
    """The outcome of a stage: `state`, `seconds`, `rows`, and the `reason` where it has none."""
    command = [sys.executable, "-m", "nbutils.report.gpu_check", name, device, str(int(quick))]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        outcome: dict[str, Any] = {"state": "cut", "reason": f"took over {limit} s", "rows": []}
    else:
        try:
            outcome = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            reason = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
            outcome = {"state": "failed", "reason": reason, "rows": []}
    return outcome | {"seconds": round(time.perf_counter() - start, 1)}


def table(content: dict[str, Any]) -> str:
    """The outcome of all stages as text, one line per row."""
    stages = content["stages"].items()
    return "\n".join([content["device"], *(_lines(name, stage) for name, stage in stages)]) + "\n"


def _lines(name: str, outcome: dict[str, Any]) -> str:
    marks = {True: "ok  ", False: "BAD ", None: "    "}
    head = f"{name}: {outcome['state']} in {outcome['seconds']} s {outcome.get('reason', '')}"
    rows = [f"  {marks[row['ok']]}{row['name']}: {row['value']}" for row in outcome["rows"]]
    return "\n".join([head.rstrip(), *rows])


def _main(name: str, device: str, quick: str) -> None:
    """The process of one stage: it prints its outcome as one line of JSON."""
    outcome: dict[str, Any] = {"rows": []}
    try:
        from nbutils.report.gpu_stages import STAGES, Skipped

        try:
            outcome["rows"] = STAGES[name][0](device, quick == "1")
            good = all(row["ok"] is not False for row in outcome["rows"])
            outcome["state"] = "passed" if good else "failed"
        except Skipped as reason:
            outcome |= {"state": "skipped", "reason": str(reason)}
    except ModuleNotFoundError as error:
        outcome |= {"state": "skipped", "reason": f"needs the package {error.name}"}
    except Exception as error:  # one stage must not end the others
        outcome |= {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(outcome))


if __name__ == "__main__":
    _main(*sys.argv[1:])
