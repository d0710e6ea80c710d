"""The book's pictures: a style, static plots, and interactive pictures.

The interactive ones need the extra "moving": Altair for pages, ipywidgets where a kernel runs. The rest needs matplotlib.
"""

from .diagrams import block, cell, cells
from .evolution_chart import evolution
from .folds_chart import folds
from .mixing_chart import mixing
from .moving import Choice, Moving, Slider
from .plots import cost_by_templates, curves, filters, grid, plan, similarity_matrix, similarity_rows
from .points import labelled_points
from .search_chart import search
from .style import COLOURS, CYCLE, cluster_colours, ink, use_style

__all__ = [
    "COLOURS",
    "CYCLE",
    "Choice",
    "Moving",
    "Slider",
    "block",
    "cell",
    "cells",
    "cluster_colours",
    "cost_by_templates",
    "curves",
    "evolution",
    "filters",
    "folds",
    "grid",
    "ink",
    "labelled_points",
    "mixing",
    "plan",
    "search",
    "similarity_matrix",
    "similarity_rows",
    "use_style",
]
