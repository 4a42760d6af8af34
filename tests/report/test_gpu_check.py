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
    for stage, (*rows, end) in stages.items():
        assert rows, stage
        assert end[0] == "ended"
    text = (tmp_path / "gpu.txt").read_text()
    assert text.startswith("cpu\nprobes\n  ok  device = 'cpu' as the first use of it: works\n")
    assert all(f"\n{stage}\n" in text for stage in STAGES)
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
    ("work", "rows"),
    [
        (endless, [["was cut", False]]),
        (broken, [["IndexError", False], ["ended", True]]),
        (killed, [["died with exit status 3", False]]),
        (missing, [["ModuleNotFoundError", None], ["ended", True]]),
        (wrong, [["second", False], ["ended", True]]),
        (first, [["ended", True]]),
    ],
)
def test_a_stage_keeps_its_rows_however_it_ends(work, rows, monkeypatch):
    monkeypatch.setattr(gpu_check, "PROCESSES", multiprocessing.get_context("fork"))  # no import
    found = gpu_check.run_stage(work, "cpu", quick=False, limit=1)
    assert found[0] == ("first", 1, True)
    assert [[name, ok] for name, _, ok in found[1:]] == rows


def test_a_stage_that_fails_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STAGES", {"one": (broken, 1), "other": (missing, 1)})
    assert not gpu_check.run_gpu_check(tmp_path, "cpu", quick=True)
    text = (tmp_path / "gpu.txt").read_text()
    assert "  BAD IndexError: list index out of range\n" in text
    assert "      ModuleNotFoundError: No module named 'nothing_of_this_name'\n" in text
    monkeypatch.setattr(gpu_check, "STAGES", {"other": (missing, 1)})
    assert gpu_check.run_gpu_check(tmp_path, "cpu", quick=True)
