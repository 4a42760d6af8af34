import json
import subprocess
import sys

import pytest
import torch

from nbutils.paths import ROOT
from nbutils.report import gpu_check
from nbutils.report.gpu_stages import STAGES


def command(*arguments):
    line = [sys.executable, "-m", "nbutils", "gpu-check", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    done = command("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: device = 'cuda', but this machine has no CUDA device; use 'auto' or 'cpu'"
    ]


def test_every_stage_runs_on_the_cpu(tmp_path):
    done = command("--out", tmp_path, "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    assert {stage["state"] for stage in stages.values()} == {"passed"}
    assert (tmp_path / "gpu.txt").read_text().startswith("cpu\nprobes: passed in ")


def test_a_stage_that_takes_too_long_is_cut_and_leaves_the_others(tmp_path, monkeypatch):
    stages = {"probes": (None, 0), "unknown": (None, 60)}
    monkeypatch.setattr("nbutils.report.gpu_stages.STAGES", stages)
    assert not gpu_check.run_gpu_check(tmp_path, "cpu", quick=True)
    outcome = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert outcome["probes"]["state"] == "cut"
    assert outcome["unknown"]["state"] == "failed"  # its own process does not know it
    assert "KeyError: 'unknown'" in outcome["unknown"]["reason"]
