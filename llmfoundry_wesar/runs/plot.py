"""Draw the paper's figures from the logs of runs.

`plot` reads folders and writes a picture; `draw` starts from metrics in memory. Blocks are counted from 0, as in the
metric keys: `blocks.0` is the paper's 1st layer.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from llmfoundry_wesar.figures import (
    STYLE,
    UPDATE_RATIO,
    Network,
    Ranges,
    colours_of,
    draw_heat,
    draw_roles,
    label_ends,
    math_error,
    symbol,
    text_gap,
    token_ticks,
)
from llmfoundry_wesar.roles import role_order
from llmfoundry_wesar.runs.scalars import (
    Curve,
    Scalars,
    find_curves,
    load_runs,
    median_update_ratio_quotient,
    replacing,
    role_ranges,
    write_csv,
)


class Spec(NamedTuple):
    """What a figure shows. It has one panel for each value of the `Curve` attribute that `panels` names."""

    shows: str
    panels: str
    families: tuple[str, ...]
    roles: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


FIGURES = {
    "1": Spec("loss; update ratios of W_d and W_u", "family", ("loss", "update_ratio"), ("W_d", "W_u")),
    "2": Spec("loss", "family", ("loss",)),
    "3": Spec("norms of W_d and W_u", "family", ("weight_norm",), ("W_d", "W_u"), ("virtual_weight_norm",)),
    "8": Spec("gradient norms of all matrices of a block", "run", ("grad_norm",)),
    "9": Spec("update ratios of all matrices of a block, with --layer also 10 to 12", "run", ("update_ratio",)),
    "gates": Spec("all gates", "role", ("gate",)),
    "roles": Spec("update ratios of each role, the range of all blocks", "role", ("update_ratio",)),
    "heat": Spec("last update ratios of all matrices, with the curves of the roles", "run", ("update_ratio",)),
}
_OF_NETWORK = ("roles", "heat")  # the figures that show all blocks at once

_QUANTITIES = {
    "loss": "training loss (nats per token)",
    "update_ratio": UPDATE_RATIO,
    "weight_norm": r"norm $\|W\|$",
    "grad_norm": r"gradient norm $\|\partial\mathcal{L} / \partial W\|$",
    "gate": r"gate $\alpha$",
}

_HOW_TO_LOG = {
    "loss": "with `loggers: {tensorboard: {log_dir: runs}}` in the YAML",
    "update_ratio": "with `callbacks: {update_ratio_monitor: {by_matrix: true}}` in the YAML",
    "weight_norm": "with `callbacks: {update_ratio_monitor: {metrics: [update_ratio, weight_norm]}}` in the YAML",
    "grad_norm": "with `callbacks: {update_ratio_monitor: {metrics: [update_ratio, grad_norm]}}` in the YAML",
    "gate": "a model with gates, with `callbacks: {gate_monitor: {by_matrix: true}}` in the YAML",
}

_SUFFIXES = (".pdf", ".png", ".svg")
FINAL_BATCHES = 10


def _in_block(curves: list[Curve], layer: int | None) -> list[Curve]:
    """Return the curves of block `layer`, or of the last block if it is None."""
    blocks = sorted({curve.block for curve in curves if curve.block is not None})
    if layer is not None and blocks and layer not in blocks:
        raise ValueError(
            f"run {curves[0].run!r} has no {curves[0].family} metrics of block {layer}: "
            f"--layer counts from 0; the logged blocks are {', '.join(map(str, blocks))}"
        )
    return [curve for curve in curves if curve.block in (blocks[-1:] if layer is None else [layer])]


def _check_options(figure: str, layer: int | None = None, smooth: int = 1, x: str = "step") -> None:
    if figure not in FIGURES:
        known = "; ".join(f"{name} ({spec.shows})" for name, spec in FIGURES.items())
        raise ValueError(f"unknown figure {figure!r}; the figures are: {known}")
    if layer is not None and FIGURES[figure].families == ("loss",):
        raise ValueError(f"figure {figure} shows only the loss: leave out --layer")
    if layer is not None and figure in _OF_NETWORK:
        raise ValueError(f"figure {figure} shows all blocks: leave out --layer")
    if smooth < 1:
        raise ValueError(f"--smooth {smooth}: must be at least 1")
    if x not in ("step", "tokens"):
        raise ValueError(f"--x {x}: must be step or tokens")


def select(figure: str, runs: Mapping[str, Scalars], layer: int | None = None) -> list[Curve]:
    """Select the curves of a figure.

    The loss is the cross-entropy, also for a model with z-loss. Such a model logs the cross-entropy as
    `loss/train/loss` and the sum as `loss/train/total`; any other model logs only `loss/train/total`.

    Args:
        figure: A name in `FIGURES`.
        runs: Name → metrics, as from `load_runs`.
        layer: Index of the block, from 0. None: the last block of each run; for `gates`, all blocks.

    Raises:
        ValueError: The figure is unknown, or a run has not logged metrics or a block that the figure needs.
    """
    _check_options(figure, layer)
    spec = FIGURES[figure]
    curves = []
    for run, scalars in runs.items():
        for family in spec.families + spec.also:
            found = find_curves(run, scalars, family)
            if figure == "roles":
                found = find_curves(run, scalars, "role_update_ratio") or found
            if family != "loss":
                found = [curve for curve in found if not spec.roles or curve.role in spec.roles]
                if not (layer is None and family == "gate") and figure not in _OF_NETWORK:
                    found = _in_block(found, layer)
            lacking = set(spec.roles if family != "loss" else ()) - {curve.role for curve in found}
            if family in spec.families and (lacking or not found):
                of = f" of {' and '.join(sorted(lacking))}" if lacking else ""
                raise ValueError(
                    f"run {run!r} has no {family} metrics{of}, which figure {figure} shows: train {_HOW_TO_LOG[family]}"
                )
            curves += found
    return curves


def _x_values(run: str, scalars: Scalars, steps: np.ndarray, x: str) -> np.ndarray:
    if x == "step":
        return steps
    if "time/token" not in scalars:
        raise ValueError(f"run {run!r} has no time/token metric: its data loader does not count tokens; use --x step")
    return np.interp(steps, *scalars["time/token"])


def _moving_average(values: np.ndarray, points: int) -> np.ndarray:
    """Return at each point the mean of the last `points` finite values (fewer at the start)."""
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), np.ones(points))[: len(values)]
    count = np.convolve(finite, np.ones(points))[: len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def _line_style(curve: Curve, spec: Spec, deepest: int) -> dict[str, Any]:
    if curve.virtual:
        return {"linestyle": "--" if curve.role == "W_u" else "-", "linewidth": 0.7}
    if spec.roles and curve.role:
        # Under WeSaR the two lines should coincide: narrow dashes stay visible on a broad pale line.
        return {"linestyle": "--", "zorder": 3} if curve.role == "W_u" else {"linewidth": 2.2, "alpha": 0.6}
    if spec.panels == "role" and curve.block is not None:
        return {"alpha": 0.25 + 0.75 * (curve.block + 1) / (deepest + 1)}
    return {}


def _layout(spec: Spec, panels: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    columns = 1 if spec.panels == "family" else min(len(panels), 4 if len(panels) > 6 else 3)
    rows = math.ceil(len(panels) / columns)
    size = (7.2, 2.6 * rows + 0.4) if spec.panels == "family" else (2.5 * columns + 1.0, 2.0 * rows + 0.5)
    picture = Figure(figsize=size, layout="constrained")
    grid = picture.subplots(rows, columns, sharex=True, sharey=spec.panels == "run", squeeze=False)
    for unused in grid.flat[len(panels) :]:
        unused.remove()
    axes = dict(zip(panels, grid.flat, strict=False))
    for position, (panel, axis) in enumerate(axes.items()):
        quantity = panel if spec.panels == "family" else spec.families[0]
        if quantity not in ("loss", "gate"):
            # A step without an update has the ratio 0, which a logarithmic axis cannot show: leave a gap.
            axis.set_yscale("log", nonpositive="mask")
        if quantity == "weight_norm":
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks(LogFormatter(minor_thresholds=(2, 0.5)))
        if spec.panels != "family":
            axis.set_title(symbol(panel), fontsize="medium")
        axis.tick_params(labelbottom=position + columns >= len(panels))
    return picture, axes


def _label_axes(picture: Figure, axes: dict[str, Axes], spec: Spec, curves: Sequence[Curve], x: str) -> None:
    blocks = {curve.block for curve in curves if curve.block is not None}
    where = f", block {min(blocks)}" if len(blocks) == 1 else "" if spec.panels == "role" else ", last block"
    if x == "tokens":
        x = token_ticks(axes.values())
    if spec.panels == "family":
        for family, axis in axes.items():
            axis.set_ylabel(_QUANTITIES[family] + (where if family != "loss" else ""))
        axes[spec.families[-1]].set_xlabel(x)
        picture.align_ylabels()
    else:
        picture.supylabel(_QUANTITIES[spec.families[0]] + where, fontsize="medium")
        picture.supxlabel(x, fontsize="medium")


def _explain_roles(axis: Axes, spec: Spec, curves: Sequence[Curve]) -> None:
    styles = {symbol(role): Curve("", "", "", role) for role in spec.roles}
    if any(curve.virtual for curve in curves):
        styles[r"thin: virtual, $\alpha W$"] = Curve("", "virtual_", "")
    handles = [
        Line2D([], [], color="#555555", label=label, **_line_style(curve, spec, 0)) for label, curve in styles.items()
    ]
    axis.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), borderpad=0)


def draw(
    figure: str, runs: Mapping[str, Scalars], layer: int | None = None, smooth: int = 1, x: str = "step"
) -> Figure:
    """Draw one of the paper's figures.

    In figures 1 to 3 each run has a colour; W_d is a solid line and W_u a dashed one. In 8 and 9 each run has a panel
    and each role a colour. In `gates` each role has a panel and each run a colour, palest for the first block. `roles`
    and `heat` are those of `draw_roles` and `draw_heat`; their curves come from the metrics of the roles or, without
    these and in `heat`, from those of the matrices.

    Args:
        figure: A name in `FIGURES`.
        runs: Name → metrics, as from `load_runs`.
        layer: Index of the block, from 0. None: the last block of each run; for `gates`, all blocks.
        smooth: Draw the mean of the last `smooth` logged points, and the points themselves as a pale line. In `roles`
            and `heat` the points themselves are left out.
        x: `step` or `tokens`.

    Returns:
        The figure. Each curve has the label `<run> <metric>`.

    Raises:
        ValueError: As in `select`; `smooth` is below 1, `x` is unknown, or a run has no token counts.
    """
    _check_options(figure, layer, smooth, x)
    curves = select(figure, runs, layer)
    spec = FIGURES[figure]
    if figure in _OF_NETWORK:
        return _draw_network(figure, runs, curves, smooth, x)
    roles = sorted({curve.role for curve in curves}, key=role_order)
    panels = {"family": spec.families, "run": list(runs), "role": roles}[spec.panels]
    hues = roles if spec.panels == "run" else list(runs)
    colours = colours_of(hues)
    deepest = max(curve.block or 0 for curve in curves)
    with matplotlib.rc_context(STYLE):
        picture, axes = _layout(spec, panels)
        named = defaultdict(list)
        for curve in curves:
            panel, hue = getattr(curve, spec.panels), curve.role if spec.panels == "run" else curve.run
            steps, values = runs[curve.run][curve.metric]
            xs = _x_values(curve.run, runs[curve.run], steps, x)
            style = _line_style(curve, spec, deepest)
            if smooth > 1:
                axes[panel].plot(xs, values, color=colours[hue], alpha=0.3, linewidth=0.7)
                values = _moving_average(values, smooth)
            if len(steps) == 1:
                style["marker"] = "."
            (line,) = axes[panel].plot(xs, values, color=colours[hue], label=f"{curve.run} {curve.metric}", **style)
            first = spec.panels == "family" and panel == panels[0]
            if spec.panels == "run" or (first and curve.role != "W_u" and not curve.virtual):
                named[panel].append((symbol(hue), line))
        _label_axes(picture, axes, spec, curves, x)
        if spec.roles:
            _explain_roles(axes[panels[-1]], spec, curves)
        if spec.panels == "role":
            handles = [Line2D([], [], color=colours[run], label=symbol(run)) for run in runs]
            title = "pale: first block\nfull: last block" if deepest and layer is None else None
            picture.legend(handles=handles, loc="outside right upper", title=title, alignment="left")
        picture.draw_without_rendering()
        for panel, lines in named.items():
            label_ends(axes[panel], lines, text_gap(axes[panel]))
    return picture


def _draw_network(figure: str, runs: Mapping[str, Scalars], curves: Sequence[Curve], smooth: int, x: str) -> Figure:
    ranges: dict[str, Ranges] = {}
    networks = {}
    for run, scalars in runs.items():
        logged = {curve.metric: scalars[curve.metric] for curve in curves if curve.run == run}
        ranges[run] = {
            role: (_x_values(run, scalars, steps, x), np.array([_moving_average(row, smooth) for row in values]))
            for role, (steps, values) in role_ranges(logged).items()
        }
        ratios = {metric.partition("/")[2]: float(values[-1]) for metric, (_, values) in logged.items()}
        last = max(steps[-1] for steps, _ in logged.values())
        networks[run] = Network(f"{symbol(run)}: update ratio at step {last}", ratios, ranges[run])
    return draw_roles(ranges, x) if figure == "roles" else draw_heat(networks, x)


def shown(figure: str, runs: Mapping[str, Scalars], layer: int | None = None, x: str = "step") -> dict[str, Scalars]:
    """Return the metrics that `draw` needs for a figure. With `x` = tokens, also `time/token` at their steps.

    Raises:
        ValueError: As in `draw`.
    """
    part: dict[str, Scalars] = {run: {} for run in runs}
    for curve in select(figure, runs, layer):
        part[curve.run][curve.metric] = runs[curve.run][curve.metric]
    if x == "tokens":
        for run, scalars in part.items():
            steps = np.unique(np.concatenate([steps for steps, _ in scalars.values()]))
            scalars["time/token"] = steps, _x_values(run, runs[run], steps, x).astype(np.float32)
    return part


def plot(
    paths: Sequence[str | Path],
    out: str | Path,
    figure: str = "1",
    layer: int | None = None,
    labels: Sequence[str] = (),
    smooth: int = 1,
    x: str = "step",
    csv: str | Path | None = None,
    tabled: bool = False,
) -> str | None:
    """Read runs and write the picture of a figure.

    Args:
        paths: TensorBoard folders and CSV files, as for `load_runs`.
        out: The picture: `.png`, `.svg` or `.pdf`. An older one is replaced only when the new one is complete.
        figure: As in `draw`.
        layer: As in `draw`.
        labels: Names of the runs, as for `load_runs`.
        smooth: As in `draw`.
        x: As in `draw`.
        csv: A file for the logged values of the curves in the picture. It can be one of `paths` later.
        tabled: Whether to return the `table` too, and to write the metrics that it needs to `csv`.

    Returns:
        The `table`, if `tabled`.

    Raises:
        FileNotFoundError: As in `load_runs`.
        ValueError: As in `load_runs` and `draw`, if `tabled` as in `table`; `out` or `csv` has a wrong suffix.
    """
    if Path(out).suffix not in _SUFFIXES:
        raise ValueError(f"--out {out}: the suffix must be {' or '.join(_SUFFIXES)}")
    if csv is not None and Path(csv).suffix != ".csv":
        raise ValueError(f"--csv {csv}: the suffix must be .csv")
    _check_options(figure, layer, smooth, x)
    for label in labels:
        if error := math_error(label):
            raise ValueError(f"--label {label}: matplotlib cannot read its formula ({error}); for a $ write \\$")
    runs = load_runs(paths, labels)
    picture = draw(figure, runs, layer, smooth, x)
    summed_up = table(runs) if tabled else None  # before anything is written, because a run may lack metrics for it
    if csv is not None:
        part = shown(figure, runs, layer, x)
        write_csv(csv, {run: part[run] | (_summed_up(runs[run]) if tabled else {}) for run in runs})
    with replacing(out) as partial:
        picture.savefig(partial, dpi=200)
    return summed_up


def _held_out(scalars: Scalars) -> list[str]:
    return [key for key in scalars if key.startswith("metrics/eval/") and key.endswith("LanguageCrossEntropy")]


def _summed_up(scalars: Scalars) -> Scalars:
    """Return the metrics that `table` reads."""
    curves = [curve for family in ("loss", "update_ratio") for curve in find_curves("", scalars, family)]
    kept = [curve.metric for curve in curves if curve.role in ("", "W_d", "W_u")]
    return {metric: scalars[metric] for metric in [*kept, *_held_out(scalars)]}


def table(runs: Mapping[str, Scalars]) -> str:
    """Make a Markdown table of runs.

    Final loss: mean of the last FINAL_BATCHES logged losses. Held-out loss: last loss on the first evaluation set, if
    there is one. Last column: `median_update_ratio_quotient`. What a run did not log is a dash.

    Raises:
        ValueError: A run has no loss.
    """
    title, width = "median ‖ΔW_d‖/‖W_d‖ ÷ ‖ΔW_u‖/‖W_u‖", max(map(len, ["run", *runs]))
    lines = [f"| {'run':{width}} | final loss | held-out loss | {title} |"]
    lines.append(f"|{'-' * (width + 2)}|-----------:|--------------:|{'-' * len(title)}-:|")
    for run, scalars in runs.items():
        found = find_curves(run, scalars, "loss")
        if not found:
            raise ValueError(f"run {run!r} has no loss metrics: train {_HOW_TO_LOG['loss']}, or leave out --table")
        quotient = median_update_ratio_quotient(scalars)
        _, losses = scalars[found[0].metric]
        held_out = next((f"{scalars[key][1][-1]:.3f}" for key in _held_out(scalars)), "–")
        cells = [f"{losses[-FINAL_BATCHES:].mean(dtype=float):10.3f}", f"{held_out:>13}"]
        cells.append(f"{'–' if math.isnan(quotient) else f'{quotient:.2f}':>{len(title)}}")
        lines.append(f"| {run:{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)
