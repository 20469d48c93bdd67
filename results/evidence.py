"""Plan, train, keep and read the runs that the claims are judged by.

runs.csv            a row for each run that has ended, with the columns of `summary`; rows are only ever appended
curves/RUN.csv.xz   of a finished run the metrics that a claim needs, see KEPT
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from llmfoundry_wesar.runs.compare import Run, plan, run_series
from llmfoundry_wesar.runs.scalars import Scalars, find_curves, read_scalars, write_csv
from llmfoundry_wesar.runs.summary import Row, append_rows, read_rows

K, V = TypeVar("K"), TypeVar("V")
FOLDER = Path(__file__).parent
# Besides the training loss.
KEPT = re.compile(r"metrics/eval/|update_ratio/|(weight_norm|grad_norm|gate)/.*\bffn\.")
# Of each matrix's metrics at most this many steps are kept; of the losses all.
POINTS = 50
# An older expression for the same parameters. The runs of this model were all trained with it, and their names have a
# hash of their configs.
GROUPS = r"optimizer.param_groups=[{param_str_match: 'norm|\.gate$|_ln\.', weight_decay: 0.0}]"
_METRICS = "callbacks.update_ratio_monitor.metrics=[update_ratio,weight_norm,grad_norm]"
# The first of the YAML's three loaders, which is the only one whose data the text has.
_VALIDATION = (
    "[{label: val, name: text, dataset: {local: '${variables.data}', split: val, shuffle: false,"
    " max_seq_len: '${max_seq_len}'}, drop_last: true, num_workers: 1}]"
)
DIGITS = 5
SEEDS = tuple(range(11, 16))
# The two methods that most claims compare, and the seeds of their runs at LEARNING_RATE.
MAIN, MAIN_SEEDS = ("small_init", "wesar"), tuple(range(11, 19))
# Of the longer runs: the seeds that are judged, and the one that only chooses learning rates.
LONG_SEEDS, LONG_SEARCH_SEED = (21, 22, 23), 29
SPIKE_SEARCH_SEED = 49
LEARNING_RATE = 1e-3


class Size(NamedTuple):
    """A model size and a length of training.

    Attributes:
        config: The training YAML.
        overrides: Those of all runs.
        parameters: Limits of the number of parameters.
        length: `max_duration`, if the runs vary it, else "".
        seeds: The seeds that are judged.
        main_seeds: Those of MAIN at LEARNING_RATE.
    """

    config: str
    overrides: tuple[str, ...]
    parameters: tuple[float, float]
    length: str = ""
    seeds: tuple[int, ...] = SEEDS
    main_seeds: tuple[int, ...] = MAIN_SEEDS


def _small(data: str, *own: str, **attributes: Any) -> Size:
    """Return a size of the quickstart's model, with the English text in the folders `data` and `data`-val."""
    overrides = [f"variables.data={data}", f"eval_loader.dataset.local={data}-val", "eval_loader.dataset.split=train"]
    overrides += ["save_folder=checkpoints", GROUPS, _METRICS, *own]
    return Size("yamls/quickstart.yaml", tuple(overrides), (2e6, 3e6), **attributes)


def _long(steps: int, interval: int) -> Size:
    """Return the size of longer runs, which log every `interval` steps."""
    return _small(
        "data/english-49m",
        "scheduler.t_warmup=100ba",
        "save_interval=250ba",
        "save_num_checkpoints_to_keep=1",
        f"callbacks.update_ratio_monitor.interval={interval}ba",
        f"callbacks.gate_monitor.interval={interval}ba",
        length=f"{steps}ba",
        seeds=LONG_SEEDS,
        main_seeds=LONG_SEEDS,
    )


LONG = {"2m-1500": _long(1500, 15), "2m-5000": _long(5000, 50)}
SIZES = {
    "2m": _small("data/english"),
    **LONG,
    # Plain weights that spike, because the model learns its text by heart.
    "spike": Size(
        "yamls/spike.yaml",
        (
            "variables.data=data/english-49m",
            "eval_loader={name: text, dataset: {local: data/english-49m-val, split: train, shuffle: false,"
            " max_seq_len: 64}, drop_last: false, num_workers: 0, prefetch_factor: null, persistent_workers: false}",
            "eval_interval=1dur",
            "device_eval_batch_size=64",
            "callbacks.update_ratio_monitor={interval: 10ba, metrics: [update_ratio]}",
        ),
        (5e5, 1e6),
        seeds=tuple(range(41, 49)),
    ),
    # The paper's rapid setting, but a sixteenth of its batch. One GPU takes about a minute for a run.
    "130m": Size(
        "yamls/130m.yaml",
        (
            "variables.data=data/english-32k",
            "global_train_batch_size=32",
            "max_duration=305ba",
            "scheduler.t_warmup=50ba",
            f"eval_loader={_VALIDATION}",
            "eval_interval=1dur",
            "model.init_device=cpu",
            "save_folder=null",
            _METRICS,
        ),
        (1.3e8, 1.4e8),
        seeds=(31,),
        main_seeds=(31,),
    ),
}


@dataclass(frozen=True)
class Series:
    """Runs of one claim: every method with every seed and every combination of the varied values.

    Attributes:
        methods: Values of `variables.method`.
        seeds: Seeds of the weights and of the data order; by default the size's.
        vary: Key → values.
        size: A name in `SIZES`.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    vary: Mapping[str, tuple[str, ...]] | None = None
    size: str = "2m"

    def plan(self, work: Path, overrides: Sequence[str] = ()) -> list[Run]:
        """List the runs, see `compare.plan`."""
        size = SIZES[self.size]
        varied = {"max_duration": (size.length,)} if size.length else {}
        vary = [f"{key}={','.join(values)}" for key, values in {**varied, **(self.vary or {})}.items()]
        return plan(size.config, self.methods, self.seeds or size.seeds, work, vary, [*size.overrides, *overrides])


def keep(row: Row, scalars: Scalars, folder: Path) -> None:
    """Write the curves of a run if it has finished, then append its row to `runs.csv`."""
    if row["status"] == "finished":
        kept = {}
        losses = [curve.metric for curve in find_curves("", scalars, "loss")]
        for metric, (steps, values) in scalars.items():
            if metric in losses or KEPT.match(metric):
                every = 1 if metric in losses else -(-len(steps) // POINTS)
                rounded = [f"{value:.{DIGITS}g}" for value in values[::every]]
                kept[metric] = (steps[::every], np.array(rounded, dtype=np.float32))
        write_csv(folder / "curves" / f"{row['run']}.csv.xz", {row["run"]: kept})
    append_rows(folder / "runs.csv", [row])


def run(series: Iterable[Series], work: Path, folder: Path = FOLDER, overrides: Sequence[str] = ()) -> int:
    """Train the runs that are not kept yet, one after the other, and keep each as soon as it ends.

    Args:
        series: Runs, the most important first.
        work: The folder of `compare` for logs, event files and checkpoints. A run that has finished there is kept
            without training it again.
        folder: The folder of `runs.csv` and `curves`.
        overrides: `key=value` for all runs, as for the trainer.

    Returns:
        How many runs have failed or were killed. The next call tries them again.
    """
    path, failed = folder / "runs.csv", 0
    kept = {row["run"] for row in read_rows(path) if row["status"] == "finished"} if path.exists() else set()
    for each in (each for group in series for each in group.plan(work, overrides) if each.name not in kept):
        finished = False
        for row in run_series([each], work):
            finished = row["status"] == "finished"
            keep(row, read_scalars(work / "tensorboard" / each.name) if finished else {}, folder)
        failed += not finished
    return failed


class Lacking(ValueError):
    """A claim cannot be judged yet, because the runs that the message names are not kept."""


def without_lacking(find: Callable[[K], V], keys: Iterable[K]) -> dict[K, V]:
    """Return key → what `find` returns for it, without the keys whose runs are lacking."""
    found = {}
    for key in keys:
        with suppress(Lacking):
            found[key] = find(key)
    return found


class Interval(NamedTuple):
    """A mean over seeds with its 95% t-interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: np.ndarray) -> Interval:
    """Compute the mean of at least two values and its 95% t-interval.

    The difference of two methods' arrays gives the paired interval, because all arrays have the order of the seeds.
    """
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half)


def jumped(row: Row) -> bool:
    """Tell whether the training loss of a run jumped by more than 1 nat, see `summary.largest_jump`."""
    return float(row["largest_jump"] or 0) > 1


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _variation(row: Row) -> dict[str, float | str]:
    pairs = (text.partition("=") for text in row["variation"].split())
    return {key: _number(value) for key, _, value in pairs}


class Evidence:
    """The runs of one size that a folder keeps.

    Args:
        folder: The folder of `runs.csv` and `curves`.
        size: A name in `SIZES`.
    """

    def __init__(self, folder: Path = FOLDER, size: str = "2m"):
        self.folder = folder
        self.size = SIZES[size]
        low, high = self.size.parameters
        rows = [
            row
            for row in read_rows(folder / "runs.csv")
            if low < float(row["parameters"]) < high and _variation(row).get("max_duration", "") == self.size.length
        ]
        self.rows = [row for row in rows if row["status"] == "finished"]
        self.failed = [row for row in rows if row["status"] != "finished"]

    def find(self, method: str, seeds: Sequence[int] = (), **varied: float | str) -> list[Row]:
        """Find the row of a method's run for each of the seeds. If a run has several rows, take the last.

        Args:
            method: The value of `variables.method`.
            seeds: The seeds, in the order of the result; by default the size's.
            **varied: `learning_rate`, by default LEARNING_RATE; `sigma`, by default the method's; `betas` and
                `final_rate` (its share of the highest rate), by default the YAML's.

        Raises:
            Lacking: The run of a seed is not there.
        """
        seeds = seeds or self.size.seeds
        names = {"learning_rate": "optimizer.lr", "sigma": "model.init_config.sigma"}
        names |= {"betas": "optimizer.betas", "final_rate": "scheduler.alpha_f"}
        usual = ("learning_rate", LEARNING_RATE)
        variation = {names[name]: value for name, value in varied.items() if (name, value) != usual}
        if self.size.length:
            variation["max_duration"] = self.size.length
        found = {
            int(row["seed"]): row
            for row in self.rows
            if row["method"] == method and int(row["seed"]) in seeds and _variation(row) == variation
        }
        if len(found) < len(seeds):
            texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in varied.items()}
            with_values = "".join(f" {name} {text}" for name, text in texts.items())
            raise Lacking(f"{len(found)} of {len(seeds)} runs of {method}{with_values}")
        return [found[seed] for seed in seeds]

    def losses(self, method: str, seeds: Sequence[int] = (), **varied: float | str) -> np.ndarray:
        """Return the held-out loss for each of the seeds; arguments and errors as for `find`."""
        return np.array([float(row["held_out_loss"]) for row in self.find(method, seeds, **varied)])

    def curves(self, row: Row) -> Scalars:
        """Read the metrics that are kept of a run."""
        return read_scalars(self.folder / "curves" / f"{row['run']}.csv.xz")


def by_role(runs: Sequence[Scalars], family: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return role → (steps, values), where the values of its matrices have the shape (runs, blocks, steps)."""
    metrics: dict[str, list[str]] = defaultdict(list)
    for curve in find_curves("", runs[0], family):
        metrics[curve.role].append(curve.metric)
    return {
        role: (runs[0][names[0]][0], np.array([[run[name][1] for name in names] for run in runs], dtype=float))
        for role, names in metrics.items()
    }


def median_update_ratio(scalars: Scalars) -> float:
    """Compute the median over all matrices and all steps with an update."""
    ratios = np.concatenate([values for metric, (_, values) in scalars.items() if metric.startswith("update_ratio/")])
    return float(np.median(ratios[np.isfinite(ratios) & (ratios > 0)]))


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim.

    Attributes:
        status: confirmed, not confirmed, not decided, or measured if the claim has no bar.
        sentences: The figures that the status follows from.
        picture: A picture of them.
        table: More figures: a header and rows.
    """

    status: str
    sentences: str
    picture: Figure | None = None
    table: Sequence[Sequence[str]] = ()


def decide(passed: bool, opposite: bool) -> str:
    """Return a claim's status from whether it passed its bar, and whether its opposite would pass the same bar."""
    return "confirmed" if passed else "not confirmed" if opposite else "not decided"
