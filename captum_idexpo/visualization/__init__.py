"""Plots in addition to `captum.attr.visualization`: score curves and quadrants, explanations, histories, fronts.

The functions return Matplotlib figures, never show them, and leave pyplot's state unchanged. The colours are Okabe and
Ito's, which colour-blind readers can distinguish. Markers, lines and hatches differ, too, for prints in grey.
"""

from captum_idexpo.visualization._figures import COLORS
from captum_idexpo.visualization.bars import plot_attribution_bars
from captum_idexpo.visualization.comparisons import plot_comparison
from captum_idexpo.visualization.maps import draw_heat_map, draw_image, plot_explanations, to_captum
from captum_idexpo.visualization.runs import plot_front, plot_fronts, plot_history
from captum_idexpo.visualization.scores import plot_curves, plot_quadrants

__all__ = [
    "COLORS",
    "draw_heat_map",
    "draw_image",
    "plot_attribution_bars",
    "plot_comparison",
    "plot_curves",
    "plot_explanations",
    "plot_front",
    "plot_fronts",
    "plot_history",
    "plot_quadrants",
    "to_captum",
]
