import json

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


def test_a_stage_that_is_cut_keeps_its_rows_and_leaves_the_others():
    row = {"name": "first", "value": 1, "ok": True}
    write = f"import time; print({json.dumps(row)!r}, flush=True)"
    cut = gpu_check.in_process(f"{write}; time.sleep(60)", limit=1)
    assert cut == ([row], "took over 1 s")
    broken = gpu_check.in_process(f"{write}; [][1]", limit=60)
    assert broken == ([row], "IndexError: list index out of range")
    missing = gpu_check.in_process("import nothing_of_this_name", limit=60)
    assert missing == ([], "ModuleNotFoundError: No module named 'nothing_of_this_name'")
    states = [gpu_check._state(*outcome) for outcome in (cut, broken, missing, ([row], ""))]
    assert states == ["cut", "failed", "skipped", "passed"]
    assert gpu_check._state([row | {"ok": False}], "") == "failed"
