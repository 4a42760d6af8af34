"""The bench compares like with like, and says what it measured. Nothing here is timed."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from nbutils import InputError, RunConfig
from nbutils.data.dataset import Dataset, Split
from nbutils.report import bench
from nbutils.report.bench import UsualLoop, run_bench, save, table, verify
from nbutils.report.floors import work_per_image

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulation_steps": 3}, {"norm": "none", "batch_size": 300}, {"dropout": 0.0}],
    ids=str,
)
def test_the_usual_loop_and_ours_end_at_the_same_weights(few_digits, settings):
    config = replace(RunConfig(batch_size=40, precision="float64", device="cpu"), **settings)
    assert verify(config, few_digits, CPU) < 1e-12


def test_loops_that_train_differently_are_not_timed(few_digits, monkeypatch):
    epoch = UsualLoop.epoch

    def with_one_image_less(self):
        self.order.images -= 1
        epoch(self)

    monkeypatch.setattr(UsualLoop, "epoch", with_one_image_less)
    config = RunConfig(batch_size=40, precision="float64", device="cpu")
    with pytest.raises(RuntimeError, match=r"40: after an epoch in float64 the weights .* differ"):
        verify(config, few_digits, CPU)


def test_what_a_bench_leaves(few_digits, tmp_path):
    rows = run_bench(few_digits, images=200, repeats=2, device="cpu", settings=[(50, 1), (30, 4)])
    assert [row.setting for row in rows] == ["50", "4 x 30"]
    for row in rows:
        assert row.device.startswith("cpu (")
        assert row.images == 200
        assert row.weights_differ < 1e-12
        for figure, (low, high) in row.spread.items():
            assert 0 < low <= getattr(row, figure) <= high
        assert list(row.floors) == ["arithmetic"]
    save(rows, tmp_path / "new" / "bench.json")
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written == json.loads(json.dumps([asdict(row) for row in rows]))
    expected = {"setting", "device", "baseline_seconds", "seconds", "ratio", "floor_ratio"}
    assert expected <= set(written[0])
    assert list(table(rows).index) == ["50", "4 x 30"]


def test_seconds_are_scaled_to_all_images(few_digits, monkeypatch):
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: (work(), 1.0)[1])
    monkeypatch.setattr(bench, "_second_epoch", lambda config, data: 1.0)
    (row,) = run_bench(few_digits, images=100, repeats=1, device="cpu", settings=[(50, 1)])
    assert row.seconds == row.baseline_seconds == 3.0  # 300 images


def test_the_floor_counts_what_the_network_computes():
    data = Dataset(
        "zeros",
        *[Split(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8).long())] * 3,
        class_names=tuple("0123456789"),
    )
    counts = work_per_image(RunConfig(batch_size=8), data, CPU)
    first, second, third = 784 * 9 * 16, 196 * 9 * 16 * 32, 49 * 9 * 32 * 64
    last = 576 * 10
    # Twice a multiplication and an addition for the gradients, but none for the input's.
    assert counts["arithmetic"] == 2 * (2 * first + 3 * (second + third + last))
    assert counts["launch"] > 3
    assert counts["memory"] > 4 * 12544


@pytest.mark.parametrize("settings", [{"images": 40}, {"repeats": 0}], ids=str)
def test_too_little_is_refused(few_digits, settings):
    with pytest.raises(InputError, match="there must be 50 images or more, and 1 repeat"):
        run_bench(few_digits, **{"settings": [(50, 1)], "device": "cpu"} | settings)
