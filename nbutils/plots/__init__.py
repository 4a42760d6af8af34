"""Figures from tidy tables: each function draws on the axes (`ax`) that it is given."""

from nbutils.plots.accumulation import (
    COSTS,
    plot_cost,
    plot_cost_map,
    plot_damage,
    plot_drift,
    plot_gradient_sum,
    plot_ladder,
    plot_search,
    plot_windows,
)
from nbutils.plots.advice import plot_noise, plot_race, plot_rates, plot_sizes
from nbutils.plots.curves import (
    plot_accuracy,
    plot_final,
    plot_history,
    plot_normalisations,
    plot_overlay,
)
from nbutils.plots.images import plot_class_balance, plot_digits, plot_misread, plot_network
from nbutils.plots.rates import (
    plot_fixed_rates,
    plot_noise_scale,
    plot_rate_map,
    plot_scaling_rules,
    plot_updates_to_target,
)
from nbutils.plots.style import save_figure, use_style
