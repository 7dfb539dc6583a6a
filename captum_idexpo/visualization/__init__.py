"""Pictures beside `captum.attr.visualization`: curves and quadrants of scores, explanations, histories, fronts.

Matplotlib figures, returned and never shown; pyplot's state stays as it is. Colours are Okabe and Ito's, which the
colour-blind tell apart, and markers, lines and hatches differ with them, so that a print in grey can be read as well.
"""

from captum_idexpo.visualization._figures import COLORS
from captum_idexpo.visualization.bars import plot_attribution_bars
from captum_idexpo.visualization.maps import draw_heat_map, draw_image, plot_explanations, to_captum
from captum_idexpo.visualization.runs import plot_front, plot_fronts, plot_history
from captum_idexpo.visualization.scores import plot_curves, plot_quadrants

__all__ = [
    "COLORS",
    "draw_heat_map",
    "draw_image",
    "plot_attribution_bars",
    "plot_curves",
    "plot_explanations",
    "plot_front",
    "plot_fronts",
    "plot_history",
    "plot_quadrants",
    "to_captum",
]
