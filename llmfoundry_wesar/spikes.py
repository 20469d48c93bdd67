"""Describe what a run's matrices did around a spike of the loss: which of them left its usual range first."""

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from llmfoundry_wesar.figures import STYLE

QUANTITIES = {"update_ratio": "update ratio", "grad_norm": "gradient norm", "gate": "gate"}
FOLDER = "spikes"
# A jump is measured from the median of this many losses before, also by `runs.summary.largest_jump`.
JUMP_WINDOW = 16

# A matrix leaves its usual range if the logarithm of a value is further from its median in the 32 steps before than 6
# standard deviations there, and the value more than a factor of 1.5 away.
RANGE_STEPS, DEVIATIONS, MARGIN = 32, 6, 1.5
# With fewer steps before, its usual range is not known.
LEAST_STEPS = 8
# The steps before the loss in which the first matrix is looked for.
LOOK_BACK = 20
# An update ratio that has grown slowly does not leave that range. It has grown if its median in the last 8 steps before
# the loss is this many times its median in the older half of the recorded steps, at an equal learning rate.
GROWTH_STEPS, GROWTH = 8, 2.0
_ROWS = 20
_COLOURS = (0.1, 10)
_DPI = 120


@dataclass(frozen=True)
class Move:
    """A matrix left its usual range.

    Attributes:
        matrix: Its name.
        quantity: A key of `QUANTITIES`.
        before: How many steps before the loss.
        factor: The value ÷ the median of the 32 steps before, the most extreme one up to the spike.
    """

    matrix: str
    quantity: str
    before: int
    factor: float


@dataclass(frozen=True)
class Record:
    """The steps around a spike. Step t has the loss and gradients of batch t, counted from 0, and the update after it.

    Attributes:
        spike: The step at which the loss jumped.
        steps: The steps before and after it.
        losses: The loss of each step.
        learning_rates: The learning rate of each step, of the first parameter group.
        measured: The indices of the steps at which the matrices were measured.
        matrices: The names of the matrices.
        values: Quantity → (measured steps, matrices). All NaN if a matrix has no gate.
        batch: What tells which batch the spike's step had.
    """

    spike: int
    steps: np.ndarray
    losses: np.ndarray
    learning_rates: np.ndarray
    measured: np.ndarray
    matrices: list[str]
    values: dict[str, np.ndarray]
    batch: str

    @property
    def index(self) -> int:
        """The index of the spike in `steps`."""
        return int(np.searchsorted(self.steps, self.spike))

    @property
    def loss_before(self) -> float:
        """The median of the 16 losses before the spike, without those that are not finite. NaN if there is none."""
        recent = _recent(self.losses[: self.index])
        return float(np.median(recent)) if len(recent) else math.nan

    @property
    def loss_at_top(self) -> float:
        """The largest loss from the spike on, or the first that is not finite."""
        after = self.losses[self.index :]
        odd = after[~np.isfinite(after)]
        return float(odd[0] if len(odd) else after.max())

    @cached_property
    def moved(self) -> list[Move]:
        """What `moves` returns, which report, picture and log line need."""
        return moves(self)

    @cached_property
    def grown(self) -> tuple[str, float, int] | None:
        """What `growth` returns, which they need if no matrix moved before the loss."""
        return growth(self)


def _recent(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return those of the last 16 losses that are finite."""
    recent = np.asarray(losses, dtype=float)[-JUMP_WINDOW:]
    return recent[np.isfinite(recent)]


def jumped(losses: Sequence[float], deviations: float, nats: float) -> bool:
    """Return whether the last loss is a jump.

    It is if it is not finite although the one before was, or if it is above the median of the 16 losses before by more
    than `nats` and by more than `deviations` standard deviations of the differences between these losses. (In a
    longer window, spikes that come in series would hide each other.)
    """
    *before, last = losses
    if not before or not math.isfinite(before[-1]):
        return False
    if not math.isfinite(last):
        return True
    recent = _recent(before)
    spread = float(np.diff(recent).std()) if len(recent) > 1 else 0.0
    return len(before) >= JUMP_WINDOW and last - float(np.median(recent)) > max(nats, deviations * spread)


def moves(record: Record) -> list[Move]:
    """Return the matrices that were outside their usual range when the loss jumped, and since when, at most 20 steps.

    The usual range is the median of the 32 steps before, with a margin of 6 standard deviations of the logarithms and
    at least a factor of 1.5 on either side. A value that is not finite is outside. A matrix that came back before the
    step of the loss or the one before it does not count, because single values are often outside by chance. Of a
    matrix's quantities the first one outside counts.

    Returns:
        In the order in which they left it. In the same step, those that grew come first, by how much they grew.
    """
    steps = record.steps[record.measured]
    first, end = np.searchsorted(steps, [record.spike - LOOK_BACK, record.spike + 1])
    found: dict[str, Move] = {}
    for quantity, values in record.values.items():
        for name, series in zip(record.matrices, values.T, strict=True):
            factors = _factors(series[:first], series[first:end])
            since = _outside_since(factors)
            if since is None:
                continue
            factor = max(factors[since:], key=lambda value: abs(math.log(max(value, 1e-300))))
            move = Move(name, quantity, int(record.spike - steps[first + since]), factor)
            if name not in found or _order(move) < _order(found[name]):
                found[name] = move
    return sorted(found.values(), key=_order)


def growth(record: Record) -> tuple[str, float, int] | None:
    """Return the matrix whose update ratio had grown most before the loss, by which factor, and since which step.

    None if none had grown by the factor `GROWTH`, or if fewer than four times `LEAST_STEPS` steps were measured before.
    """
    before = record.measured[record.steps[record.measured] < record.spike]
    if len(before) < 4 * LEAST_STEPS:
        return None
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matrices without an update
        relative = record.values["update_ratio"][: len(before)] / record.learning_rates[before, None]
        half = len(before) // 2
        factors = np.nanmedian(relative[-GROWTH_STEPS:], axis=0) / np.nanmedian(relative[:half], axis=0)
    factors = np.where(np.isfinite(factors), factors, 0)
    most = int(factors.argmax())
    if factors[most] < GROWTH:
        return None
    return record.matrices[most], float(factors[most]), int(record.steps[before[half]])


def _outside_since(factors: list[float]) -> int | None:
    """Return the first index of the unbroken stretch of factors other than 1 that ends at the last or last but one."""
    end = len(factors) - (1 if factors and factors[-1] != 1 else 2)
    start = end
    while start >= 0 and factors[start] != 1:
        start -= 1
    return start + 1 if start < end else None


def _factors(before: np.ndarray, values: np.ndarray) -> list[float]:
    """Return each value ÷ its usual size, or 1 if it is in its usual range. Values outside do not change the range."""
    usual, factors = list(before), []
    for value in values:
        factors.append(_factor(np.abs(usual[-RANGE_STEPS:]), abs(float(value))))
        if factors[-1] == 1:
            usual.append(value)
    return factors


def _factor(usual: np.ndarray, value: float) -> float:
    logs = np.log(usual[np.isfinite(usual) & (usual > 0)])
    if len(logs) < LEAST_STEPS:
        return 1.0
    if not math.isfinite(value):
        return math.inf
    middle = float(np.median(logs))
    distance = abs(math.log(max(value, 1e-300)) - middle)
    return 1.0 if distance <= max(math.log(MARGIN), DEVIATIONS * float(logs.std())) else value / math.exp(middle)


def _order(move: Move) -> tuple[int, bool, float]:
    return -move.before, move.factor < 1, -move.factor


def headline(record: Record) -> str:
    """Return one line: the step and the losses."""
    return f"Spike at step {record.spike:,}: loss {record.loss_before:.3f} → {record.loss_at_top:.3f}"


def cause(record: Record) -> str:
    """Return one line: the matrix that moved first; if none did, the one that had grown most, or else the batch."""
    found = record.moved
    if not found or found[0].before == 0:
        text = "No matrix left its usual range before the loss; look at the batch."
        if record.grown:
            name, factor, since = record.grown
            text = (
                "No matrix left its usual range at once, but update ratios had grown before the loss: "
                f"`{name}` × {factor:.3g} since step {since:,}."
            )
        if found:
            also = f" with {len(found) - 1} others" if len(found) > 1 else ""
            change = f"{QUANTITIES[found[0].quantity]} × {found[0].factor:.3g}"
            text += f" In the loss's step `{found[0].matrix}` left it{also}: {change}."
        return text
    first = found[0]
    return f"First to move: `{first.matrix}`, {QUANTITIES[first.quantity]} × {first.factor:.3g}, {_when(first)}."


def _when(move: Move) -> str:
    return f"{move.before} step{'s' if move.before > 1 else ''} before the loss" if move.before else "with the loss"


def report(record: Record) -> str:
    """Return the text of `report.md`."""
    index, found = record.index, record.moved
    finite = "" if math.isfinite(record.losses[index]) else ", which is not finite"
    lines = [
        f"{place}. `{move.matrix}`: {QUANTITIES[move.quantity]} × {move.factor:.3g}, {_when(move)}\n"
        for place, move in enumerate(found[:_ROWS], 1)
    ]
    more = (
        f"\n{len(found) - _ROWS} more matrices left it; `matrices.csv` has all values.\n" if len(found) > _ROWS else ""
    )
    return (
        f"# {headline(record)}\n\n{cause(record)}\n\n"
        f"- Loss: {record.loss_before:.4f} before (median of {JUMP_WINDOW} steps), {record.losses[index]:.4f} at step "
        f"{record.spike}{finite}, {record.loss_at_top:.4f} at its top.\n"
        f"- Learning rate: {record.learning_rates[index]:.3g}.\n"
        f"- Batch: {record.batch}\n"
        f"- Recorded: steps {record.steps[0]} to {record.steps[-1]}.\n\n"
        f"## Matrices in the order in which they left their usual range\n\n"
        f"A value is outside if it differs from its median in the {RANGE_STEPS} steps before by more than "
        f"{DEVIATIONS} standard deviations of the logarithms and by more than a factor of {MARGIN}. Listed are the "
        f"matrices that were outside when the loss jumped, and since when, at most {LOOK_BACK} steps. Change: the most "
        "extreme value ÷ that median.\n\n"
        f"{''.join(lines)}{more}"
    )


def draw_spike(record: Record) -> Figure:
    """Draw the loss, and every matrix's update ratio and gradient norm relative to its median before the spike.

    A row of the heat maps is a matrix, in the order in which they left their usual range, then in the model's.
    """
    order = [move.matrix for move in record.moved]
    order += [name for name in record.matrices if name not in set(order)]
    rows = [record.matrices.index(name) for name in order]
    steps = record.steps[record.measured]
    named = min(len(order), _ROWS)
    # The other rows are thin if there are many, so that the names of the first ones can be read.
    others = len(order) - named
    height = min(1, named / max(others, 1))
    heights = np.concatenate([np.arange(named), named - 0.5 + height * (np.arange(others) + 0.5)])
    inches = max(1.6, 0.115 * (named + height * others))
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(9.6, 2.4 + 2 * inches), layout="constrained")
        top, *maps = picture.subplots(3, 1, sharex=True, height_ratios=[1.6, inches, inches])
        top.plot(record.steps, record.losses, color="#000000")
        top.set_ylabel("loss")
        for axis, quantity in zip(maps, ("update_ratio", "grad_norm"), strict=True):
            values = record.values[quantity][:, rows].T
            before = values[:, steps < record.spike - LOOK_BACK]
            with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rows without a finite value, which stay empty
                relative = values / np.nanmedian(before, axis=1, keepdims=True)
            relative = np.clip(relative, *_COLOURS)
            norm = LogNorm(*_COLOURS)
            mesh = axis.pcolormesh(steps, heights, relative, norm=norm, cmap="RdBu_r", shading="nearest")
            axis.set_yticks(range(named), [name.removeprefix("model.") for name in order[:named]], fontsize="xx-small")
            axis.invert_yaxis()
            axis.grid(False)
            axis.set_title(f"{QUANTITIES[quantity]} ÷ median before", fontsize="medium")
            picture.colorbar(mesh, ax=axis, ticks=[0.1, 0.3, 1, 3, 10], format="%g")
        for axis in (top, *maps):
            axis.axvline(record.spike, color="#8C8C8C", linewidth=0.8, linestyle="--")
        maps[-1].set_xlabel("step")
        top.set_title(f"{headline(record)}\n{cause(record)}".replace("`", ""), fontsize="medium", loc="left", wrap=True)
    return picture


def write(record: Record, folder: Path, picture: Figure) -> None:
    """Write `matrices.csv`, `report.md` and `spike.png` into an existing folder."""
    with (folder / "matrices.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss", "learning_rate", "matrix", *QUANTITIES])
        columns = [record.values[quantity] for quantity in QUANTITIES]
        empty = [np.isnan(column).all(axis=0) for column in columns]  # no gate
        for row, t in enumerate(record.measured):
            step = [record.steps[t], *(f"{value:.8g}" for value in (record.losses[t], record.learning_rates[t]))]
            for i, name in enumerate(record.matrices):
                cells = [
                    "" if none[i] else f"{column[row, i]:.8g}" for column, none in zip(columns, empty, strict=True)
                ]
                writer.writerow([*step, name, *cells])
    (folder / "report.md").write_text(report(record), encoding="utf-8")
    picture.savefig(folder / "spike.png", dpi=_DPI)


def find_reports(run: str | Path) -> list[Path]:
    """Return the reports in or below a folder, in the order of their steps.

    Raises:
        FileNotFoundError: There is none.
    """
    found = [path for path in Path(run).rglob("report.md") if path.parent.name.isdecimal()]
    if not found:
        raise FileNotFoundError(f"{run}: no report of spike_recorder in or below this folder, <step>/report.md")
    return sorted(found, key=lambda path: (path.parents[1], int(path.parent.name)))


def summarise(report: Path) -> str:
    """Return the headline and the cause of a report in one line."""
    title, _, first, *_ = report.read_text(encoding="utf-8").splitlines()
    return f"{title.removeprefix('# ')}. {first.replace('`', '')}"
