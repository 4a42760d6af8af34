"""The bench compares like with like, and says what it measured. Nothing here is timed."""

import json
from dataclasses import replace

import pytest
import torch

from nbutils import InputError, RunConfig
from nbutils.analysis.pick import quiet_seconds
from nbutils.report import bench
from nbutils.report.bench import operations_per_image, run_bench, save, table, verify

CPU = torch.device("cpu")
CONFIG = RunConfig(batch_size=40, precision="float64", device="cpu")


@pytest.fixture
def fewer_digits(few_digits):
    return few_digits.subset(100)


@pytest.mark.parametrize(
    "settings", [{}, {"accumulation_steps": 2}, {"norm": "none", "dropout": 0.0}], ids=str
)
def test_the_usual_loop_and_ours_end_at_the_same_weights(fewer_digits, settings):
    assert verify(replace(CONFIG, **settings), fewer_digits, CPU) < 1e-12


def test_loops_that_train_differently_are_not_timed(fewer_digits, monkeypatch):
    monkeypatch.setattr(bench, "RandomSampler", lambda images, generator: range(len(images)))
    with pytest.raises(RuntimeError, match=r"40: after an epoch in float64 the weights .* differ"):
        verify(CONFIG, fewer_digits, CPU)


def test_what_a_bench_leaves(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "processors", lambda: 1)
    monkeypatch.setattr(bench, "floor_seconds", lambda *_: 0.5)
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: (work(), 2.0)[1])
    monkeypatch.setattr(bench, "second_epoch", lambda config, data: 1.0)
    rows = list(run_bench(few_digits, 100, 2, "cpu", settings=[(50, 1), (30, 3)]))
    save(rows, tmp_path / "new" / "bench.json")
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == rows
    one, other = rows
    assert other["setting"] == "3 x 30"
    assert one["device"].startswith("cpu (")
    assert one["weights_differ"] < 1e-12
    # 100 images took 1 s and 2 s, and there are 300.
    assert [one["seconds"], one["baseline_seconds"]] == [3, 6]
    assert [one["ratio"], one["floor_ratio"]] == [2, 6]
    assert one["spread"]["ratio"] == [2, 2]
    assert table(rows).loc["3 x 30", "times as fast"] == "2.00 (2.00 to 2.00)"
    assert quiet_seconds(tmp_path / "new" / "bench.json") == {"50": 3, "3 x 30": 3}


def test_the_floor_counts_what_the_network_computes(few_digits):
    first, second, third = 784 * 9 * 16, 196 * 9 * 16 * 32, 49 * 9 * 32 * 64
    last = 576 * 10
    # Twice a multiplication and an addition for the gradients, but none for the input's.
    expected = 2 * (2 * first + 3 * (second + third + last))
    assert operations_per_image(RunConfig(), few_digits) == expected


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ({"settings": [(50, 1)], "images": 40}, 50),
        ({"settings": [(50, 1)], "repeats": 0}, 50),
        ({}, 1024),  # the largest of the study
    ],
)
def test_too_little_is_refused(few_digits, given, least):
    with pytest.raises(InputError, match=f"there must be {least} images or more, and 1 repeat"):
        next(run_bench(few_digits, device="cpu", **given))
