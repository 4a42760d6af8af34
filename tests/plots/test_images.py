"""Pictures of images, networks, windows and gradients, and how figures are saved."""

import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from nbutils import plots


def test_digits_have_one_row_per_class(ax, digits):
    plots.plot_digits(ax, digits.train, digits.class_names, columns=5)
    assert ax.images[0].get_array().shape == (280, 140)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list("0123456789")


def test_class_balance_has_a_bar_per_class_and_split(ax, digits):
    plots.plot_class_balance(ax, digits)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([10.0] * 30)


def test_the_most_misread_images_come_first_with_the_commonest_guess(ax):
    images = np.arange(4 * 9).reshape(4, 1, 3, 3)
    labels = np.array([4, 5, 6, 7])
    guesses = np.array([[4, 3, 1, 7], [4, 3, 6, 7], [4, 8, 6, 7]])
    plots.plot_misread(ax, images, labels, guesses)
    captions = ["5, read as 3\nby 2 of 3", "6, read as 1\nby 1 of 3"]
    assert [text.get_text() for text in ax.texts] == captions
    assert [drawn.get_array().min() for drawn in ax.images] == [9, 18]
    assert ax.get_title("left") == "1 of 4 images are misread by most of 3 networks"


def test_a_network_has_a_name_and_a_shape_under_each_layer(ax):
    layers = {"activations": ["16 x 14 x 14", "10"], "weights": [192, 31_370]}
    plots.plot_network(ax, pd.DataFrame(layers, index=["block", "classifier"]))
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    assert texts[::2] == ["image", "block", "classifier"]
    assert texts[1::2] == ["1 x 28 x 28\n", "16 x 14 x 14\n192 weights", "10\n31,370 weights"]


def test_windows_of_a_long_epoch_show_its_ends_and_what_is_odd(ax):
    plots.plot_windows(ax, [[128] * 8] * 58 + [[128, 128, 128, 128, 96]])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["update 1", "update 2", "update 3", "...", "update 58", "update 59"]
    assert [block.get_width() for block in ax.patches] == [128] * (4 * 8 + 4) + [96]
    assert [bool(block.get_hatch()) for block in ax.patches] == [False] * 36 + [True]
    texts = [text.get_text().strip() for text in ax.texts]
    assert "54 more updates of 1,024 images" in texts
    assert texts[-1] == "608 images"
    plots.plot_windows(ax, [[128] * 8, [128, 16]])  # a block too small for its number
    assert ax.texts[-1].get_text().strip() == "144 images, the last block has 16"


def test_a_gradient_sum_draws_each_row_in_one_scale():
    micro = np.random.default_rng(0).normal(size=(8, 16, 1, 3, 3))
    figure, axes = plt.subplots(2, 1)
    plots.plot_gradient_sum(axes, micro, micro.mean(0), micro.mean(0) + 1e-9)
    assert [len(ax.images) for ax in axes] == [8, 3]
    assert [len({picture.get_clim() for picture in ax.images}) for ax in axes] == [1, 1]
    drawn = np.asarray(axes[0].images[0].get_array())
    assert drawn[1:4, 1:4] == pytest.approx(micro[0, 0, 0])
    assert drawn[5:8, 9:12] == pytest.approx(micro[0, 6, 0])
    assert "9e-10 of the largest" in axes[1].texts[-1].get_text()
    plt.close(figure)


def saved(folder, nudge):
    """A figure whose coordinates another processor computes differently in the last bits."""
    figure, ax = plt.subplots()
    ax.errorbar([1, 2 + nudge], [0.3, 0.4 - nudge], [0.1, 0.1], marker="o", label="a" * 3)
    ax.bar([1], [2 + nudge], hatch="//")
    ax.legend()
    path = plots.save_figure(figure, folder, "figure")
    plt.close(figure)
    return path.read_text()


def test_saved_figures_are_the_same_bytes_on_every_machine(tmp_path):
    plots.use_style()
    text = saved(tmp_path, 0.0)
    assert saved(tmp_path, 1e-13) == text
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]
    parts = set(re.findall(r"#(part\d+)", text))
    assert parts == set(re.findall(r'id="(part\d+)"', text)) != set()


@pytest.mark.parametrize(
    ("imported", "waiting"),
    [
        ("nbutils.plots", {"torch", "scipy.special", "scipy.stats", "seaborn"}),
        ("nbutils.accumulation", {"pandas", "scipy", "matplotlib", "nbutils.errors"}),
    ],
)
def test_what_takes_long_waits_until_it_is_needed(imported, waiting):
    code = f"import {imported}; print({waiting} & set(sys.modules))"
    command = [sys.executable, "-c", f"import sys; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
