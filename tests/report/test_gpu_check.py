import json
import multiprocessing
import os
import time

import pytest
import torch

from nbutils.__main__ import main
from nbutils.report import gpu_check
from nbutils.report.gpu_check import STAGES
from nbutils.studies import runner


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_ends_with_one_line(tmp_path, capsys):
    assert main(["gpu-check", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: device = 'cuda', but this machine has no CUDA device; use 'auto' or 'cpu'"
    ]


def test_every_stage_runs_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_sum_up", lambda study, out: {})  # the longest part of a study
    assert main(["gpu-check", "--out", str(tmp_path), "--device", "cpu", "--quick"]) == 0
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    assert {stage["state"] for stage in stages.values()} == {"passed"}
    assert all(stage["rows"] for stage in stages.values())
    assert (tmp_path / "gpu.txt").read_text().startswith("cpu\nprobes: passed in ")
    assert sum(limit for _, limit in STAGES.values()) <= 8 * 60


def first(device, quick):
    yield "first", 1, True


def endless(device, quick):
    yield from first(device, quick)
    time.sleep(60)


def broken(device, quick):
    yield from first(device, quick)
    [][1]


def killed(device, quick):
    yield from first(device, quick)
    os._exit(3)


def missing(device, quick):
    yield from first(device, quick)
    import nothing_of_this_name  # noqa: F401


def wrong(device, quick):
    yield from first(device, quick)
    yield "second", 0, False


@pytest.mark.parametrize(
    ("work", "state", "reason"),
    [
        (endless, "cut", "took over 1 s"),
        (broken, "failed", "IndexError: list index out of range"),
        (killed, "failed", "exit status 3"),
        (missing, "skipped", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        (wrong, "failed", ""),
        (first, "passed", ""),
    ],
)
def test_a_stage_keeps_its_rows_however_it_ends(work, state, reason, monkeypatch):
    monkeypatch.setattr(gpu_check, "PROCESSES", multiprocessing.get_context("fork"))  # no import
    stage = gpu_check.run_stage(work, "cpu", quick=False, limit=1)
    assert (stage["state"], stage["reason"]) == (state, reason)
    assert stage["rows"][0] == {"name": "first", "value": 1, "ok": True}


def test_a_quick_stage_that_fails_leaves_the_others():
    stage = gpu_check.run_stage(broken, "cpu", quick=True, limit=1)
    assert (stage["state"], len(stage["rows"])) == ("failed", 1)
