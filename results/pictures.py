"""What the pictures of the claims share."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmfoundry_wesar.runs.plot import STYLE


def panels(columns: int, sharey: bool = False, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A row of panels, in the style of `plot`."""
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(3.8 * columns, height), layout="constrained")
        axes = picture.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    return picture, list(axes)


def band(axis: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str, **style: Any) -> None:
    """The mean over seeds of values (seeds, x), and the range of the seeds as a band."""
    axis.plot(x, values.mean(axis=0), color=colour, label=label, **style)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def over_steps(
    axis: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, label: str, **style: Any
) -> None:
    """The `band` of each seed's (steps, values), of which all steps are the same."""
    band(axis, curves[0][0], np.stack([values for _, values in curves]), colour, label, linewidth=1.3, **style)
    axis.set_xlabel("step")


def dots(axis: Axes, groups: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """A line for each group: a dot for each seed, a bar at the mean; the first group is on top, an empty one blank."""
    for position, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=False)):
        axis.plot(values, np.full(len(values), position), "o", color=colour, alpha=0.5, markersize=4, label=name)
        axis.plot(
            [np.mean(values) if values else np.nan], [position], "|", color=colour, markersize=16, markeredgewidth=2
        )
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
