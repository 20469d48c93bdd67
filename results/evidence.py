"""The runs behind the claims: which they are, how they are done and kept, and how they are read back.

runs.csv            a line for each run that ended, with the columns of `summary`; it is only ever appended to
curves/RUN.csv.xz   what a finished run logged: its losses, and the KEPT metrics of every matrix
"""

import csv
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from llmfoundry_wesar.runs.compare import Run, plan, results, run_series
from llmfoundry_wesar.runs.scalars import Scalars, find_curves, read_scalars, replacing, write_csv
from llmfoundry_wesar.runs.summary import COLUMNS, Row, read_rows

FOLDER = Path(__file__).parent
KEPT = ("loss/train/loss", "metrics/eval/", "update_ratio/", "weight_norm/", "grad_norm/", "gate/")
DIGITS = 5
SEEDS = tuple(range(11, 16))
# The comparison that most claims are about, and its seeds at LEARNING_RATE.
MAIN, MAIN_SEEDS = ("small_init", "wesar"), tuple(range(11, 19))
LEARNING_RATE = 1e-3
FEWEST = 5


class Size(NamedTuple):
    """A model, its text and its training."""

    config: str
    overrides: tuple[str, ...]
    parameters: tuple[float, float]


SIZES = {
    "2m": Size(
        "yamls/quickstart.yaml",
        (
            "variables.data=data/english",
            "eval_loader.dataset.local=data/english-val",
            "eval_loader.dataset.split=train",
            "save_folder=checkpoints",
        ),
        (2e6, 3e6),
    ),
    # The paper's rapid setting on one GPU: 96 batches of 1,048,576 tokens.
    "130m": Size(
        "yamls/130m.yaml",
        (
            "variables.data=data/english-32k",
            "max_duration=100_000_000tok",
            "eval_interval=1dur",
            "model.init_device=cpu",
            "save_folder=checkpoints",
        ),
        (1.3e8, 1.4e8),
    ),
}


@dataclass(frozen=True)
class Series:
    """Runs of one claim: every method with every seed and every combination of the varied values.

    Attributes:
        methods: Values of `variables.method`.
        seeds: Of weights and data order.
        vary: Key → values.
        size: A name in `SIZES`.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    vary: Mapping[str, tuple[str, ...]] | None = None
    size: str = "2m"

    def plan(self, work: Path, overrides: Sequence[str] = ()) -> list[Run]:
        """The runs, by `compare.plan`."""
        config, own, _ = SIZES[self.size]
        vary = [f"{key}={','.join(values)}" for key, values in (self.vary or {}).items()]
        return plan(config, self.methods, self.seeds, work, vary, [*own, *overrides])


def append(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV, which begins with its columns."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def keep(row: Row, scalars: Scalars, folder: Path) -> None:
    """Adds a run that ended to `runs.csv`, after its curves if it finished."""
    if row["status"] == "finished":
        kept = {
            metric: (steps, np.array([f"{value:.{DIGITS}g}" for value in values], dtype=np.float32))
            for metric, (steps, values) in scalars.items()
            if metric.startswith(KEPT)
        }
        write_csv(folder / "curves" / f"{row['run']}.csv.xz", {row["run"]: kept})
    append(folder / "runs.csv", COLUMNS, [row])


def run(series: Iterable[Series], minutes: float, work: Path, folder: Path, overrides: Sequence[str] = ()) -> int:
    """Does the runs that are not kept yet, as many as end within the time.

    A run starts only if one as long as the longest so far would still end in time.

    Args:
        series: In the order of their importance.
        minutes: For all together.
        work: The folder of `compare` for logs, event files and checkpoints. What has finished there is kept first.
        folder: Of `runs.csv` and `curves`.
        overrides: `key=value` for all runs, as for the trainer.

    Returns:
        How many runs are left, those that failed among them.
    """
    end, longest, left = time.monotonic() + 60 * minutes, 0.0, 0
    for group in series:
        for each in group.plan(work, overrides):
            path = folder / "runs.csv"
            rows = read_rows(path) if path.exists() else []
            if any(row["run"] == each.name and row["status"] == "finished" for row in rows):
                continue
            start, done = time.monotonic(), any(row["status"] == "finished" for row in results([each], work))
            if not done and start + longest >= end:
                left += 1
                continue
            finished = False
            for row in run_series([each], work):
                finished = row["status"] == "finished"
                keep(row, read_scalars(work / "tensorboard" / each.name) if finished else {}, folder)
            left += not finished
            longest = max(longest, time.monotonic() - start)
    return left


class Lacking(Exception):
    """A claim cannot be judged yet, for want of the runs that the message names."""


class Interval(NamedTuple):
    """A mean over seeds with its 95% t-interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Iterable[float]) -> Interval:
    """The mean of at least two values, with its 95% t-interval."""
    array = np.array(list(values), dtype=float)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return Interval(array.mean(), array.mean() - half, array.mean() + half, len(array))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """The interval of first − second over the seeds that both have."""
    return interval(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))


def jumped(row: Row) -> bool:
    """Whether a run's training loss jumped by more than 1 nat, by `summary.largest_jump`."""
    return float(row["largest_jump"] or 0) > 1


def _variation(row: Row) -> frozenset[tuple[str, float]]:
    pairs = (text.partition("=") for text in row["variation"].split())
    return frozenset((key, float(value)) for key, _, value in pairs)


class Evidence:
    """What is kept in a folder of runs, of one size.

    Args:
        folder: Of `runs.csv` and `curves`.
        size: A name in `SIZES`.
    """

    def __init__(self, folder: Path = FOLDER, size: str = "2m"):
        self.folder = folder
        low, high = SIZES[size].parameters
        rows = [row for row in read_rows(folder / "runs.csv") if low < float(row["parameters"]) < high]
        self.rows = [row for row in rows if row["status"] == "finished"]
        self.failed = [row for row in rows if row["status"] != "finished"]

    def find(self, method: str, seeds: Sequence[int] = SEEDS, fewest: int = FEWEST, **vary: float) -> dict[int, Row]:
        """Seed → row of the runs of a method, by keyword `learning_rate` or `sigma` if they vary.

        Raises:
            Lacking: There are fewer than so many.
        """
        names = {"learning_rate": "optimizer.lr", "sigma": "model.init_config.sigma"}
        wanted = frozenset((names[name], value) for name, value in vary.items())
        if vary.get("learning_rate") == LEARNING_RATE:
            wanted -= {("optimizer.lr", LEARNING_RATE)}
        found = {
            int(row["seed"]): row
            for row in self.rows
            if row["method"] == method and int(row["seed"]) in seeds and _variation(row) == wanted
        }
        if len(found) < fewest:
            with_values = "".join(f" {name} {value:g}" for name, value in vary.items())
            raise Lacking(f"{len(found)} of {fewest} runs of {method}{with_values}")
        return dict(sorted(found.items()))

    def losses(self, method: str, seeds: Sequence[int] = SEEDS, **vary: float) -> dict[int, float]:
        """Seed → held-out loss; as for `find`."""
        return {seed: float(row["held_out_loss"]) for seed, row in self.find(method, seeds, **vary).items()}

    def curves(self, row: Row) -> Scalars:
        """What a run logged."""
        return read_scalars(self.folder / "curves" / f"{row['run']}.csv.xz")


def by_role(scalars: Scalars, family: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Role → steps, and the metrics of its matrices (blocks, steps)."""
    found: dict[str, list[str]] = {}
    for curve in find_curves("", scalars, family):
        found.setdefault(curve.role, []).append(curve.metric)
    return {
        role: (scalars[metrics[0]][0], np.stack([scalars[metric][1].astype(float) for metric in metrics]))
        for role, metrics in found.items()
    }


@dataclass(frozen=True)
class Verdict:
    """What a claim came to.

    Attributes:
        status: confirmed, not confirmed, or not decided.
        sentences: With the figures that say so.
        picture: What shows it.
        table: More figures, lines of a Markdown table.
    """

    status: str
    sentences: str
    picture: Figure | None = None
    table: Sequence[Sequence[str]] = ()


def decide(passed: bool, opposite: bool) -> str:
    """A claim's status, by whether its bar was passed, and whether the opposite would have passed the same bar."""
    return "confirmed" if passed else "not confirmed" if opposite else "not decided"


def save(picture: Figure, path: Path) -> None:
    """Writes a picture, without what would make equal pictures differ."""
    with replacing(path) as partial:
        picture.savefig(partial, dpi=160, metadata={"Software": None})
