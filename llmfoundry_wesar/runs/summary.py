"""Summarise runs: the results of each as a row of `runs.csv`, and a table and loss curves of many.

`runs.csv` has a row with `COLUMNS` for each run that has ended. Rows are only appended, never changed.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llmfoundry_wesar.runs.plot import FINAL_BATCHES, draw
from llmfoundry_wesar.runs.scalars import Scalars, find_curves, read_scalars, replacing
from llmfoundry_wesar.spikes import JUMP_WINDOW

Row = dict[str, str]
"""A row of `runs.csv`: column → text, empty if the value is not known."""

COLUMNS = {
    "run": "name of the log and of the TensorBoard folder",
    "method": "variables.method",
    "variation": "key=value of every varied key, separated by spaces",
    "seed": "seed of the trainer and of the data order",
    "config_hash": "hash of all keys of the expanded config that can change the result",
    "status": "finished, diverged (final_loss or held_out_loss is not finite), or failed",
    "commit": "commit of this project, -dirty with uncommitted changes; its version if there is no repository",
    "versions": "versions of the packages",
    "hardware": "processor or GPU, and their number",
    "tokens": "training tokens",
    "final_loss": "training cross-entropy, mean of the last FINAL_BATCHES batches",
    "held_out_loss": "cross-entropy on eval_loader (the first, if it is a list) at the end",
    "held_out_perplexity": "exponential of held_out_loss",
    "tokens_per_second": "training without evaluation, from the end of the first batch to the end of the last",
    "peak_memory_gb": "in 10⁹ bytes: allocated by torch on rank 0's GPU; on CPUs the largest process's resident memory",
    "parameters": "number of parameters of the model, with gates and norms",
    "largest_jump": "see largest_jump",
    "spikes": "see spikes",
    "wall_seconds": "time from start to end of the process",
}

SPIKE_WINDOW, SPIKE_DEVIATIONS = 128, 6

# Title → column and format.
_TABLE = {
    "training loss": ("final_loss", ".3f"),
    "held-out loss": ("held_out_loss", ".3f"),
    "perplexity": ("held_out_perplexity", ".2f"),
    "largest jump": ("largest_jump", ".2f"),
    "spikes": ("spikes", ".1f"),
    "memory (GB)": ("peak_memory_gb", ".2f"),
}
_BOLD = ("final_loss", "held_out_loss", "held_out_perplexity")
_BASELINE = "small_init"
_LOSS = "loss/train/loss"


def spike_steps(losses: np.ndarray) -> np.ndarray:
    """Return the indices of the losses more than 6 standard deviations above the mean of the 128 losses before.

    This is the rule of OLMo-core's `StabilityMonitorCallback`; its spike score is the number of spikes divided by the
    number of steps. The standard deviation is the population's. The first 128 steps are never spikes, nor is a step
    after 128 equal losses.
    """
    if len(losses) <= SPIKE_WINDOW:
        return np.array([], dtype=np.int64)
    before = np.lib.stride_tricks.sliding_window_view(losses[:-1].astype(np.float64), SPIKE_WINDOW)
    mean, deviation = before.mean(axis=1), before.std(axis=1)
    above = (losses[SPIKE_WINDOW:] > mean + SPIKE_DEVIATIONS * deviation) & (deviation >= 1e-10)
    return SPIKE_WINDOW + np.flatnonzero(above)


def spikes(losses: np.ndarray) -> int:
    """Count the `spike_steps`."""
    return len(spike_steps(losses))


def largest_jump(losses: np.ndarray) -> float:
    """Return the largest loss_t − median of the 16 losses before t, in nats.

    NaN if there are at most 16 losses or one of them is NaN. The window is short, so that it finds a jump also while
    the loss falls fast.
    """
    if len(losses) <= JUMP_WINDOW:
        return math.nan
    before = np.lib.stride_tricks.sliding_window_view(losses[:-1].astype(np.float64), JUMP_WINDOW)
    return float(np.max(losses[JUMP_WINDOW:] - np.median(before, axis=1)))


def _losses(scalars: Scalars) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the cross-entropy, as `plot` shows it."""
    curves = find_curves("", scalars, "loss")
    if not curves:
        raise ValueError("logged no training loss")
    return scalars[curves[0].metric]


def measure(scalars: Scalars, held_out: str) -> dict[str, float]:
    """Compute the columns of `runs.csv` that come from the metrics of a finished run.

    Args:
        scalars: As from `read_scalars`, with `time/train` of Composer's speed monitor in seconds.
        held_out: Metric key of the held-out loss.

    Raises:
        ValueError: The run logged no training loss, held-out loss, tokens or times.
    """
    _, losses = _losses(scalars)
    if lacking := [key for key in (held_out, "time/token", "time/train") if key not in scalars]:
        raise ValueError(f"logged no {lacking[0]}")
    held_out_loss = float(scalars[held_out][1][-1])
    steps, seconds = scalars["time/train"]
    tokens = np.interp(steps, *scalars["time/token"])
    measured = {
        "tokens": int(scalars["time/token"][1][-1]),
        "final_loss": float(losses[-FINAL_BATCHES:].mean(dtype=np.float64)),
        "held_out_loss": held_out_loss,
        "held_out_perplexity": float(np.exp(held_out_loss)),
        "tokens_per_second": float((tokens[-1] - tokens[0]) / (seconds[-1] - seconds[0]))
        if len(steps) > 1
        else math.nan,
        "largest_jump": largest_jump(losses),
        # A comparison with NaN is false, so a run that has diverged would have no spikes.
        "spikes": spikes(losses) if np.isfinite(losses).all() else math.nan,
    }
    if "memory/peak_allocated_mem" in scalars:
        measured["peak_memory_gb"] = float(scalars["memory/peak_allocated_mem"][1].max())
    return measured


def status(measured: Mapping[str, float]) -> str:
    """Return the status of a run whose trainer ended without an error, from what `measure` returns."""
    ends = (measured["final_loss"], measured["held_out_loss"])
    return "finished" if all(map(math.isfinite, ends)) else "diverged"


def read_rows(path: str | Path) -> list[Row]:
    """Read a `runs.csv`.

    Raises:
        ValueError: The file is damaged or has other columns.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames != list(COLUMNS):
                raise ValueError(f"{path}: has the columns of another version; use a new folder")
            return list(rows)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it or use a new folder") from error


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = COLUMNS) -> None:
    """Append rows to a CSV file. A new file gets a header, even without rows."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Format rows of a Markdown table."""
    # A `|` or a new line would end the cell. It can be in the value of a varied key.
    cells = ([cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _mean(values: np.ndarray, form: str) -> str:
    if not len(values):
        return "–"
    return f"{values.mean():{form}}" + (f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else "")


def table(rows: Sequence[Row]) -> str:
    """Make a Markdown table with a row for each method and variation: mean ± sample standard deviation.

    Only finished runs count; n is their number, and that of the diverged runs is beside it. The lowest mean losses are
    bold. `time` is the time per token, divided by that of `small_init` with the same variation.

    Args:
        rows: Rows of `runs.csv`, at most one for each run.
    """
    columns = [column for column, _ in _TABLE.values()]
    groups: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key in dict.fromkeys((row["method"], row["variation"]) for row in rows):
        finished = [row for row in rows if (row["method"], row["variation"]) == key and row["status"] == "finished"]
        groups[key] = {
            column: np.array([float(row[column]) for row in finished if row[column]])
            for column in (*columns, "tokens_per_second", "parameters")
        }
    means = {column: [group[column].mean() for group in groups.values() if len(group[column])] for column in _BOLD}
    best = {column: min((mean for mean in means[column] if not math.isnan(mean)), default=None) for column in _BOLD}
    lines = [["method", "variation", "n", *_TABLE, "time", "parameters"]]
    lines.append(["---", "---", *["--:"] * (len(lines[0]) - 2)])
    for (method, variation), group in groups.items():
        key = (method, variation, "diverged")
        diverged = sum((row["method"], row["variation"], row["status"]) == key for row in rows)
        line = [method, variation, f"{len(group['parameters'])}" + (f" ({diverged} diverged)" if diverged else "")]
        for column, form in _TABLE.values():
            text = _mean(group[column], form)
            line.append(f"**{text}**" if len(group[column]) and group[column].mean() == best.get(column) else text)
        baseline = groups.get((_BASELINE, variation), {}).get("tokens_per_second", np.array([]))
        time = baseline.mean() / group["tokens_per_second"] if len(baseline) else baseline
        lines.append([*line, _mean(time, ".2f"), _mean(group["parameters"][:1], ",.0f")])
    if not any(variation for _, variation in groups):
        lines = [[line[0], *line[2:]] for line in lines]
    return markdown(lines)


def write_table(rows: Sequence[Row], path: str | Path) -> None:
    """Write the table, and below it the definitions, the conditions, and the diverged and failed runs."""
    notes = [
        f"Mean ± sample standard deviation over n runs. Training loss: mean of the last {FINAL_BATCHES} batches. "
        f"Time: per token, divided by that of {_BASELINE}. Peak memory {COLUMNS['peak_memory_gb']}.",
        f"Spikes: losses more than {SPIKE_DEVIATIONS} standard deviations above the mean of the {SPIKE_WINDOW} losses "
        f"before. Largest jump: of a loss above the median of the {JUMP_WINDOW} losses before, in nats.",
    ]
    for column in ("tokens", "hardware", "commit", "versions"):
        if values := dict.fromkeys(row[column] for row in rows if row[column]):
            notes.append(f"{column.capitalize()}: {'; '.join(values)}.")
    for kind in ("diverged", "failed"):
        if names := [row["run"] for row in rows if row["status"] == kind]:
            notes.append(f"{kind.capitalize()}: {', '.join(names)}.")
    with replacing(path) as partial:
        partial.write_text(table(rows) + "\n" + "".join(f"- {note}\n" for note in notes), encoding="utf-8")


def draw_curves(rows: Sequence[Row], tensorboard: str | Path) -> Figure:
    """Draw the training loss of each method and variation: the mean over seeds, and each seed as a pale line.

    Args:
        rows: As for `table`, at least one of them finished.
        tensorboard: The folder with the TensorBoard folders of the runs.
    """
    seeds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "finished":
            losses = _losses(read_scalars(Path(tensorboard, row["run"])))
            seeds[f"{row['method']} {row['variation']}".strip()].append(losses)
    means: dict[str, Scalars] = {
        name: {_LOSS: (found[0][0], np.mean([losses for _, losses in found], axis=0))} for name, found in seeds.items()
    }
    smooth = max(1, max(len(scalars[_LOSS][0]) for scalars in means.values()) // 60)
    picture = draw("2", means, smooth=smooth)
    axis = picture.axes[0]
    axis.autoscale(False)  # `draw` has put the names beside the ends of the lines
    colours = {line.get_label(): line.get_color() for line in axis.lines}
    for name, found in seeds.items():
        for steps, losses in found:
            colour = colours[f"{name} {_LOSS}"]
            axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.5, zorder=1, label=f"{name} seed")
    return picture
