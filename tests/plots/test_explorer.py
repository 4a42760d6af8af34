import pytest
from made_up_runs import runs_of

from nbutils import RunConfig
from nbutils.plots.explorer import Explorer


@pytest.fixture
def explorer():
    configs = [RunConfig(batch_size=size, seed=seed) for size in (32, 64) for seed in (0, 1)]
    configs.append(RunConfig(batch_size=8, accumulation_steps=8))
    return Explorer(runs_of(*[(config, [0.5, 0.9, 0.98], 6) for config in configs]))


def drawn(explorer):
    (ax,) = explorer.figure.axes
    return ax, [line for line in ax.lines if len(line.get_xdata())]


def test_at_first_everything_is_drawn(explorer):
    ax, lines = drawn(explorer)
    assert len(lines) == 3
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy")
    assert "validation" in "".join(ax.get_title(loc=where) for where in ("left", "center"))


def test_each_control_changes_the_figure(explorer):
    explorer.settings.value = ["32"]
    explorer.seeds.value = [1]
    explorer.metric.value = "test_accuracy"
    explorer.against.value = "seconds"
    explorer.scale.value = "error"
    ax, lines = drawn(explorer)
    assert len(lines) == 1
    assert lines[0].get_xdata().tolist() == [2, 4, 6]
    assert lines[0].get_ydata() == pytest.approx([50.1, 10.1, 2.1])
    assert (ax.get_xlabel(), ax.get_yscale()) == ("seconds of training", "log")
    assert "test" in "".join(ax.get_title(loc=where) for where in ("left", "center"))


def test_nothing_chosen_draws_nothing(explorer):
    explorer.settings.value = []
    assert explorer.figure.axes[0].lines[:] == []
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")


def test_without_a_kernel_it_says_what_to_do(explorer):
    assert repr(explorer) == "Run this cell in JupyterLab to choose what is drawn."
