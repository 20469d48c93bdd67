"""Draw what the pictures of several claims have in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmfoundry_wesar.figures import STYLE


def panels(columns: int, sharey: bool = False, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Make a row of panels in the style of `plot`; the height is in inches."""
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(3.8 * columns, height), layout="constrained")
        axes = picture.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    return picture, list(axes)


def band(axis: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str, **style: Any) -> None:
    """Draw the mean over seeds of values (seeds, x) as a line, and the range of the seeds as a band."""
    axis.plot(x, values.mean(axis=0), color=colour, label=label, **style)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def dots(axis: Axes, groups: Mapping[str, np.ndarray], colours: Sequence[str], reach: float = math.inf) -> None:
    """Draw a row for each group, the first on top: a dot for each seed, and a bar at the mean. A row may be empty.

    If a mean is more than `reach` above the least one, it is written at the right edge, and its row has no dots.
    """
    limit = min((values.mean() for values in groups.values() if len(values)), default=0.0) + reach
    for position, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=False)):
        if len(values) and values.mean() > limit:
            place = {"ha": "right", "va": "center", "transform": axis.get_yaxis_transform()}
            axis.text(1, position, f"{values.mean():.2f} →", color=colour, **place)
            values = values[:0]
        axis.plot(values, np.full(len(values), position), "o", color=colour, alpha=0.5, markersize=4, label=name)
        if len(values):
            axis.plot([values.mean()], [position], "|", color=colour, markersize=16, markeredgewidth=2)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.margins(x=0.05)  # else the outermost dots are cut in half
