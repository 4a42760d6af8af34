import matplotlib.pyplot as plt
import pandas as pd
import pytest
from made_up_runs import runs_of

from nbutils import RunConfig, plots
from nbutils.plots.explorer import Explorer, LiveCurves


@pytest.fixture
def explorer():
    plots.use_style()
    configs = [RunConfig(batch_size=size, seed=seed) for size in (32, 64) for seed in (0, 1)]
    configs.append(RunConfig(batch_size=8, accumulation_steps=8))
    yield Explorer(runs_of(*[(config, [0.5, 0.9, 0.98], 6) for config in configs]))
    plt.close("all")


def test_each_control_changes_the_figure_and_its_title(explorer):
    (ax,) = explorer.figure.axes
    assert len(ax.lines) == 3
    assert ax.get_title("left") == "validation accuracy (after the epoch)"
    explorer.settings.value = ["32"]
    explorer.seeds.value = [1]
    explorer.metric.value = "test_accuracy"
    explorer.against.value = "seconds"
    explorer.scale.value = "error"
    (ax,) = explorer.figure.axes
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [2, 4, 6]
    assert line.get_ydata() == pytest.approx([50.1, 10.1, 2.1])
    assert ax.get_title("left") == "test error (after the epoch)"


def test_nothing_chosen_says_so(explorer):
    explorer.settings.value = []
    (ax,) = explorer.figure.axes
    assert not ax.lines
    assert "Nothing is chosen" in ax.texts[0].get_text()


@pytest.mark.parametrize("stored", [False, True])
def test_without_a_kernel_there_is_a_picture(explorer, monkeypatch, stored):
    monkeypatch.setenv("TQDM_DISABLE", "1" if stored else "")
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBORw0KGgo")
    assert ("application/vnd.jupyter.widget-view+json" in bundle) != stored


def test_a_live_run_adds_its_curve_to_the_earlier_ones():
    def train(size):
        return pd.DataFrame({"seconds": [0.1, 2.0], "accuracy": [0.5, 1 - size / 1000]})

    live = LiveCurves(train, [32, 64, 128], first=64)
    live.size.value = 128
    live.button.click()
    (ax,) = live.figure.axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in ax.lines}
    assert ends == pytest.approx({"64": 0.936, "128": 0.872})
    assert not live.button.disabled
