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
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == list(STAGES)
    for stage in STAGES:
        *found, end = (row["name"] for row in rows if row["stage"] == stage)
        assert found, stage
        assert end == "ended"
    lines = (tmp_path / "gpu.txt").read_text().splitlines()
    assert lines[:2] == ["cpu", "ok  probes: device = 'cpu' as the first use of it: works"]
    assert len(lines) == 1 + len(rows)
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


ERROR = "BAD one: IndexError: list index out of range"
MISSING = "    one: ModuleNotFoundError: No module named 'nothing_of_this_name'"


@pytest.mark.parametrize(
    ("work", "quick", "end", "good"),
    [
        (endless, False, ["BAD one: was cut: after "], False),
        (broken, False, [ERROR, "ok  one: ended"], False),
        (broken, True, [ERROR, "ok  one: ended"], False),
        (killed, False, ["BAD one: died with exit status 3: after "], False),
        (missing, False, [MISSING, "ok  one: ended"], True),
        (wrong, False, ["BAD one: second: 0", "ok  one: ended"], False),
        (first, False, ["ok  one: ended: after "], True),
    ],
)
def test_a_stage_keeps_its_rows_however_it_ends_and_leaves_the_others(
    tmp_path, monkeypatch, work, quick, end, good
):
    monkeypatch.setattr(gpu_check, "PROCESSES", multiprocessing.get_context("fork"))  # no import
    monkeypatch.setattr(gpu_check, "STAGES", {"one": (work, 0.5), "other": (first, 5)})
    assert gpu_check.run_gpu_check(tmp_path, "cpu", quick) == good
    lines = (tmp_path / "gpu.txt").read_text().splitlines()
    expected = ["cpu", "ok  one: first: 1", *end, "ok  other: first: 1", "ok  other: ended"]
    assert len(lines) == len(expected)
    assert all(map(str.startswith, lines, expected))
