"""Figures from tidy tables: each function draws on the axes that it is given.

`from nbutils import plots; plots.use_style(); plots.plot_history(ax, result.history)`. One file
per topic: `curves` (against epochs), `final` (outcomes), `windows` (accumulation as a picture),
`accumulation` (equivalence and mistakes), `rates`, `noise`, `cost`, `images` (and the network),
`advice`. The notebooks that teach use

    plot_network(ax, layers)                            layers: `activations`, `weights` by name
    plot_windows(ax, sizes)                             images of each micro-batch of each update
    plot_gradient_sum((ax1, ax2), micro, total, large)  gradients of a convolution's filters
    plot_overlay(ax, {name: history}, against)          against "epoch", "updates" or "seconds"
    plot_misread(ax, images, labels, predictions)       predictions: (networks, n)

scipy is imported only by the functions that need it.
"""

from nbutils.plots.accumulation import plot_damage, plot_drift, plot_ladder
from nbutils.plots.advice import plot_noise, plot_race, plot_rates, plot_sizes
from nbutils.plots.cost import COSTS, plot_cost, plot_cost_map, plot_search
from nbutils.plots.curves import METRIC_NAMES, plot_accuracy, plot_history, plot_overlay
from nbutils.plots.final import plot_final, plot_normalisations
from nbutils.plots.images import plot_class_balance, plot_digits, plot_misread, plot_network
from nbutils.plots.noise import plot_noise_scale, plot_updates_to_target
from nbutils.plots.rates import plot_fixed_rates, plot_rate_map, plot_scaling_rules
from nbutils.plots.style import batch_size_colours, save_figure, use_style
from nbutils.plots.windows import plot_gradient_sum, plot_windows

__all__ = [
    "COSTS",
    "METRIC_NAMES",
    "batch_size_colours",
    "plot_accuracy",
    "plot_class_balance",
    "plot_cost",
    "plot_cost_map",
    "plot_damage",
    "plot_digits",
    "plot_drift",
    "plot_final",
    "plot_fixed_rates",
    "plot_gradient_sum",
    "plot_history",
    "plot_ladder",
    "plot_misread",
    "plot_network",
    "plot_noise",
    "plot_noise_scale",
    "plot_normalisations",
    "plot_overlay",
    "plot_race",
    "plot_rate_map",
    "plot_rates",
    "plot_scaling_rules",
    "plot_search",
    "plot_sizes",
    "plot_updates_to_target",
    "plot_windows",
    "save_figure",
    "use_style",
]
