"""Draw the update ratios of a whole network: a curve and a band for each role, and a heat map of block × role.

`update_ratio_monitor` draws during training what `plot` draws afterwards. So this module stands below both, and knows
neither trainers nor logs. It does not import torch, so that `plot` starts quickly.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llmfoundry_wesar.roles import BY_NAME, block_index, role_name, role_order

Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Role → (x, values). The rows of values are the least, median and greatest value over the matrices of the role."""

UPDATE_RATIO = r"update ratio $\|\Delta W\| / \|W\|$"

# Okabe and Ito's colours, which colour-blind readers can distinguish; grey replaces their yellow.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C"]

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.01,
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}

_LINE_HEIGHT = 0.16  # inches


class Network(NamedTuple):
    """What `draw_heat` shows of one run.

    Attributes:
        title: The text above the heat map.
        ratios: Module path → update ratio of the matrix at one step.
        roles: The curves so far.
    """

    title: str
    ratios: Mapping[str, float]
    roles: Ranges


def math_error(text: str) -> str:
    """Return why matplotlib cannot draw a text with `$…$` as a formula; empty if it can."""
    if not is_math_text(text):
        return ""
    try:
        MathTextParser("path").parse(text)
    except ValueError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def symbol(name: str) -> str:
    """Return a text for matplotlib: the symbol of a role, or the name of a run, matrix or method."""
    if name in BY_NAME:
        return f"$W_{{{name[2:]}}}$"
    return name.replace("$", r"\$") if math_error(name) else name


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name."""
    many = map(to_hex, matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(names))))
    return dict(zip(names, COLOURS if len(names) <= len(COLOURS) else many, strict=False))


def label_ends(axis: Axes, lines: Sequence[tuple[str, Line2D]], gap: float) -> None:
    """Write each line's name beside its last point.

    Names are moved as little as possible (least squares) to be `gap` apart, as a fraction of the axis, and inside it.
    """
    low, high = axis.get_ylim()
    ends = []
    for name, line in lines:
        values = np.asarray(line.get_ydata(), dtype=float)
        inside = values[(values >= low) & (values <= high)]
        if len(inside):
            height = (axis.transScale + axis.transLimits).transform((1.0, inside[-1]))[1]
            ends.append((height, name, line.get_color()))
    ends.sort(key=lambda end: end[0])
    gap = min(gap, 1 / max(len(ends), 1))
    # Without the gaps, heights must not decrease: pool names that overlap at their mean (isotonic regression).
    pools: list[list[float]] = []
    for index, (height, _, _) in enumerate(ends):
        pools.append([height - index * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    lowest = np.clip([np.mean(pool) for pool in pools for _ in pool], 0, 1 - gap * max(len(ends) - 1, 0))
    heights = lowest + gap * np.arange(len(ends))
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axis.annotate(name, (1.01, height), xycoords="axes fraction", color=colour, va="center", annotation_clip=False)


def text_gap(axis: Axes) -> float:
    """Return the height of a line of text, as a fraction of the axis."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    return _LINE_HEIGHT * figure.dpi / axis.bbox.height


def token_ticks(axes: Iterable[Axes]) -> str:
    """Write tokens at an x-axis in millions or billions, and return its label."""
    axes = list(axes)
    most = max(axis.get_xlim()[1] for axis in axes)
    unit, label = (1e9, "tokens (billions)") if most >= 1e9 else (1e6, "tokens (millions)")
    for axis in axes:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
    return label


def _log_ticks(axis: Axes) -> None:
    """Make the y-axis logarithmic, with three ticks in a decade. More of them would double the time to draw."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_range(axis: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str) -> Line2D:
    """Draw a median as a line and the range as a band. Points that a logarithmic axis cannot show leave a gap."""
    least, median, greatest = np.where(values > 0, values, np.nan)
    axis.fill_between(x, least, greatest, color=colour, alpha=0.18, linewidth=0)
    (line,) = axis.plot(x, median, color=colour, label=label, marker="." if len(x) == 1 else None)
    return line


def draw_roles(runs: Mapping[str, Ranges], x: str = "step") -> Figure:
    """Draw a panel for each role, with the median of each run as a line and the range over the blocks as a band.

    Args:
        runs: Name → curves.
        x: What the x-values are: `step` or `tokens`.

    Returns:
        The figure. Each line has the label `<run> role_update_ratio/<role>/median`.
    """
    roles = sorted({role for ranges in runs.values() for role in ranges}, key=role_order)
    columns = min(len(roles), 4)
    rows, colours = math.ceil(len(roles) / columns), colours_of(list(runs))
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(2.2 * columns + 1.4, 2.0 * rows + 0.5), layout="constrained")
        grid = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for unused in grid.flat[len(roles) :]:
            unused.remove()
        axes = dict(zip(roles, grid.flat, strict=False))
        lines: dict[Axes, list[tuple[str, Line2D]]] = defaultdict(list)
        for position, (role, axis) in enumerate(axes.items()):
            _log_ticks(axis)
            axis.set_title(symbol(role), fontsize="medium")
            axis.tick_params(labelbottom=position + columns >= len(roles))
            for run, ranges in runs.items():
                if role in ranges:
                    label = f"{run} role_update_ratio/{role}/median"
                    lines[axis].append((symbol(run), _draw_range(axis, *ranges[role], colours[run], label)))
        picture.supylabel(f"{UPDATE_RATIO}, median and range of the blocks", fontsize="medium")
        picture.supxlabel(token_ticks(axes.values()) if x == "tokens" else x, fontsize="medium")
        picture.draw_without_rendering()
        for axis in (axes[role] for role in (*roles[columns - 1 :: columns], roles[-1])):
            label_ends(axis, lines.pop(axis, ()), text_gap(axis))
    return picture


def draw_heat(networks: Mapping[str, Network], x: str = "step") -> Figure:
    """Draw a row for each run: a heat map of all matrices, and beside it the curves and bands of the roles.

    The colour is the update ratio on a logarithmic scale of at least a decade. All runs have the same scales. A matrix
    outside the blocks fills its row. A cell with several matrices has their median. A cell is grey if its update ratio
    is 0 or not finite.

    Args:
        networks: Name → what to show, at least one.
        x: What the x-values of the curves are: `step` or `tokens`.

    Returns:
        The figure. Each line has the label `<run> role_update_ratio/<role>/median`.
    """
    roles = sorted({role for network in networks.values() for role in network.roles}, key=role_order)
    colours, scale = colours_of(roles), _scale(network.ratios for network in networks.values())
    with matplotlib.rc_context(STYLE):
        rows = len(networks)
        # Margins and the titles' heights are fixed, because computing them would take most of the time of drawing.
        height, title = 3.0 * rows + 0.6, {"fontsize": "medium", "y": 1.01}
        picture = Figure(figsize=(10.0, height))
        picture.subplots_adjust(0.06, 0.5 / height, 0.95, 1 - 0.3 / height, wspace=0.05, hspace=0.35)
        grid = picture.subplots(rows, 3, squeeze=False, width_ratios=[1, 0.03, 1.1])
        lines: dict[Axes, list[tuple[str, Line2D]]] = {}
        for (run, network), (heat, bar, curves) in zip(networks.items(), grid, strict=True):
            bar.set_position(bar.get_position().translated(-0.012, 0))
            curves.set_position(curves.get_position().shrunk(0.86, 1).translated(0.07, 0))
            heat.set_title(network.title, **title)
            _draw_heat_map(heat, network.ratios, scale)
            picture.colorbar(heat.images[0], cax=bar)
            _log_ticks(bar)
            _log_ticks(curves)
            curves.set_title(f"{UPDATE_RATIO}: median and range of the blocks", **title)
            lines[curves] = [
                (symbol(role), _draw_range(curves, *ranges, colours[role], f"{run} role_update_ratio/{role}/median"))
                for role, ranges in network.roles.items()
            ]
            if curves is not grid[0, 2]:
                curves.sharey(grid[0, 2])
        for curves, named in lines.items():
            label_ends(curves, named, text_gap(curves))
        heat.set_xlabel("block")
        curves.set_xlabel(token_ticks([curves]) if x == "tokens" else x)
    return picture


def _scale(networks: Iterable[Mapping[str, float]]) -> LogNorm:
    values = [value for ratios in networks for value in ratios.values() if 0 < value < math.inf]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    widen = max(1.0, math.sqrt(10 * low / high))
    return LogNorm(low / widen, high * widen)


def _draw_heat_map(axis: Axes, ratios: Mapping[str, float], scale: LogNorm) -> None:
    cells: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for path, ratio in ratios.items():
        cells[role_name(path), block_index(path)].append(ratio)
    roles = sorted({role for role, _ in cells}, key=role_order)
    blocks = 1 + max((block for _, block in cells if block is not None), default=0)
    values = np.full((len(roles), blocks), np.nan)
    for (role, block), found in cells.items():
        values[roles.index(role), slice(None) if block is None else block] = np.median(found)
    usable = np.isfinite(values) & (values > 0)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#BBBBBB")
    axis.imshow(np.where(usable, values, np.nan), aspect="auto", cmap=colours, norm=scale, interpolation="nearest")
    axis.set_yticks(range(len(roles)), [symbol(role) for role in roles])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(visible=False)


def pixels(picture: Figure) -> np.ndarray:
    """Return the pixels of a figure, as uint8 with the shape (height, width, 3)."""
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
