"""Read the metrics of runs from TensorBoard folders and CSV files, and find the matrix and block of each metric."""

import csv
import itertools
import logging
import lzma
import math
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from llmfoundry_wesar.roles import block_index, rank, role_name

log = logging.getLogger(__name__)

Scalars = dict[str, tuple[np.ndarray, np.ndarray]]
"""Metric key → (steps, values). Steps are int64 and increasing; values are float32, as in TensorBoard."""


class Curve(NamedTuple):
    """One metric of one run. The loss has no role and no block; W_e and W_p have no block."""

    run: str
    metric: str
    family: str
    role: str = ""
    block: int | None = None

    @property
    def virtual(self) -> bool:
        """Whether the metric is of αW instead of W."""
        return self.metric.startswith("virtual_")


def _series(points: Iterable[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sort points by step. If a step occurs twice, keep the later point of `points`."""
    latest = dict(points)
    steps = sorted(latest)
    return np.array(steps, dtype=np.int64), np.array([latest[step] for step in steps], dtype=np.float32)


class _Point(NamedTuple):
    """A logged value, and the wall time in seconds at which it was logged."""

    time: float
    step: int
    value: float


def _read_events(file: Path) -> Iterator[Any]:
    """Yield the events of a file. Say so if the reader, which stops at a damaged record, did not reach the end."""
    end, position, step = file.stat().st_size, 0, None
    for record in RawEventFileLoader(str(file)).Load():
        position += 8 + 4 + len(record) + 4  # length, its checksum, data, their checksum
        event = event_pb2.Event.FromString(record)  # type: ignore[attr-defined]
        step = event.step if event.HasField("summary") else step
        yield event
    if position >= end:
        return
    after = "before any metric" if step is None else f"after step {step}"
    with file.open("rb") as opened:
        opened.seek(position)
        head = opened.read(12)
    whole_head = len(head) == 12 and masked_crc32c(head[:8]) == struct.unpack("<I", head[8:])[0]
    if len(head) < 12 or (whole_head and position + 16 + struct.unpack("<Q", head[:8])[0] > end):
        log.warning(
            "%s: ends within a record, %s: the run was killed, or still writes, or the file was cut", file, after
        )
    else:
        log.warning("%s: damaged %s, at byte %d of %d: the rest of this file is left out", file, after, position, end)


def _end_of_older_runs(folder: Path, tags: Mapping[str, Sequence[_Point]]) -> float:
    """Return the time at which the older runs of a folder ended, and say that they are left out; −∞ without such runs.

    A trainer that starts from the beginning logs `time/batch` at step 0; one that resumes a run, at a later step first.
    """
    batches = sorted(tags.get("time/batch", []))
    starts = [now for before, now in itertools.pairwise(batches) if now.step == 0 < before.step]
    if not starts:
        return -math.inf
    log.warning(
        "%s: %d runs that began at step 0; only the newest is read, which began at %s",
        folder,
        len(starts) + 1,
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(starts[-1].time)),
    )
    return max(p.time for points in tags.values() for p in points if p.step > 0 and p.time < starts[-1].time)


def _read_folder(path: Path) -> dict[str, Scalars]:
    files = sorted(path.rglob("*tfevents*"))
    if not files:
        raise FileNotFoundError(
            f"{path}: no TensorBoard event files in or below this folder; "
            "name the run's folder, <loggers.tensorboard.log_dir>/<run_name>"
        )
    events: dict[Path, dict[str, list[_Point]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        for event in _read_events(file):
            for value in event.summary.value:
                # At every evaluation Composer writes the last losses again as hparams/…, into another folder.
                if value.HasField("simple_value") and not value.tag.startswith("hparams/"):
                    events[file.parent][value.tag].append(_Point(event.wall_time, event.step, value.simple_value))
    if not events:
        raise ValueError(f"{path}: no metrics in its {len(files)} TensorBoard event files")
    runs = {}
    for folder, tags in events.items():
        name = folder.resolve().name if len(events) == 1 else folder.relative_to(path).as_posix()
        start = _end_of_older_runs(folder, tags)
        # Sort by time here: the file names have whole seconds, so their order is not enough.
        newest = {tag: sorted(point for point in points if point.time > start) for tag, points in tags.items()}
        runs[name] = {tag: _series((p.step, p.value) for p in points) for tag, points in newest.items() if points}
    return runs


def _open_csv(path: Path, mode: str) -> IO[str]:
    return (lzma.open if path.suffix == ".xz" else open)(path, mode + "t", newline="", encoding="utf-8")  # type: ignore[return-value]


def _read_csv(path: Path) -> dict[str, Scalars]:
    points = defaultdict(lambda: defaultdict(list))
    try:
        with _open_csv(path, "r") as file:
            rows = csv.reader(file)
            if next(rows, None) != ["run", "metric", "step", "value"]:
                raise ValueError(f"{path}: the first line must be run,metric,step,value")
            for row in rows:
                try:
                    run, metric, step, value = row
                    points[run][metric].append((int(np.int64(step)), float(value)))
                except (ValueError, OverflowError):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {row} is not run,metric,step,value, "
                        "with a whole number below 2**63 as step"
                    ) from None
    except (csv.Error, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error}); fetch or write it again") from error
    if not points:
        raise ValueError(f"{path}: no rows below the header")
    return {run: {key: _series(found) for key, found in metrics.items()} for run, metrics in points.items()}


def read_runs(path: str | Path) -> dict[str, Scalars]:
    """Read every run in a TensorBoard folder, or in a `.csv` or `.csv.xz` file of `write_csv`.

    Composer's `TensorboardLogger` opens a new event file in `<log_dir>/<run_name>` after each flush, so all files of
    one folder are one run. A run resumed from a checkpoint logs some steps again; the later value is kept. If several
    runs that began at step 0 used a folder, the newest is read. A warning says so, and also which file is damaged or
    cut, and after which step.

    Args:
        path: A run's folder, a folder above it (such as `log_dir`, with all runs in it), or a file.

    Returns:
        Name → metrics. The name is that of the folder with the event files, or, if there are several such folders,
        the path of each below `path`.

    Raises:
        FileNotFoundError: `path` does not exist, or the folder has no event files.
        ValueError: There are no metrics at `path`, or it is damaged or another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    if not path.name.endswith((".csv", ".csv.xz")):
        raise ValueError(f"{path}: neither a TensorBoard folder nor a .csv or .csv.xz file")
    return _read_csv(path)


def read_scalars(run: str | Path) -> Scalars:
    """Read the metrics of the one run at a path; see `read_runs`.

    Raises:
        FileNotFoundError: As in `read_runs`.
        ValueError: As in `read_runs`, or there are several runs.
    """
    runs = read_runs(run)
    if len(runs) > 1:
        raise ValueError(f"{run}: holds several runs, name one of {', '.join(runs)}")
    return next(iter(runs.values()))


def load_runs(paths: Sequence[str | Path], labels: Sequence[str] = ()) -> dict[str, Scalars]:
    """Read the runs at all paths, in this order, and name them by `labels` if given; see `read_runs`.

    Raises:
        FileNotFoundError: As in `read_runs`.
        ValueError: As in `read_runs`; the number of labels is not that of the runs, or two runs have the same name.
    """
    found = [run for path in paths for run in read_runs(path).items()]
    names = list(labels) or [name for name, _ in found]
    if len(names) != len(found):
        runs = ", ".join(name for name, _ in found)
        raise ValueError(f"{len(names)} labels for {len(found)} runs: {runs}; give one --label for each run")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{len(repeated)} runs are called {repeated[0]!r}: give every run its own --label")
    return {name: scalars for name, (_, scalars) in zip(names, found, strict=True)}


def find_curves(run: str, scalars: Scalars, prefix: str) -> list[Curve]:
    """Return the curves of all metrics `<prefix>/<module>`, sorted by role, then block. For `loss`, at most one.

    `role_update_ratio` has three curves for each role: least, median and greatest.
    """
    if prefix == "loss":
        metrics = [key for key in ("loss/train/loss", "loss/train/total") if key in scalars]
        return [Curve(run, metric, "loss") for metric in metrics[:1]]
    curves = []
    for metric in scalars:
        # A vector gate is logged as gate/<module>/mean, /min and /max.
        first, module, statistic = [*metric.split("/"), "", ""][:3]
        if first == prefix and (statistic in ("", "mean") or prefix.startswith("role_")):
            family = prefix.removeprefix("virtual_")
            curves.append(Curve(run, metric, family, role_name(module), block_index(module)))
    return sorted(curves, key=lambda curve: (rank(curve.role), curve.block or 0))


def role_ranges(scalars: Scalars) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the range of the update ratios of each role, sorted by role: role → (steps, values).

    The rows of the values are the least, median and greatest update ratio over the matrices of the role. They are those
    that were logged by role; if none were, they are computed from the matrices, at the steps that all of them have.
    """
    roles = dict.fromkeys(curve.role for curve in find_curves("", scalars, "role_update_ratio"))
    if roles:
        keys = {role: [f"role_update_ratio/{role}/{name}" for name in ("min", "median", "max")] for role in roles}
        return {role: _common([scalars[key] for key in keys[role]]) for role in roles}
    matrices: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for curve in find_curves("", scalars, "update_ratio"):
        matrices[curve.role].append(scalars[curve.metric])
    common = {role: _common(series) for role, series in matrices.items()}
    return {
        role: (steps, np.array([values.min(axis=0), np.median(values, axis=0), values.max(axis=0)]))
        for role, (steps, values) in common.items()
    }


def _common(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all series have, and their values there, with the shape (series, steps)."""
    steps = reduce(np.intersect1d, [steps for steps, _ in series])
    return steps, np.array([values[np.isin(own, steps)] for own, values in series])


def write_csv(path: str | Path, runs: Mapping[str, Scalars]) -> None:
    """Write rows run,metric,step,value, with all digits of float32, so that `read_runs` returns equal values.

    If the path ends with `.xz`, the file is compressed.
    """
    with replacing(path) as partial, _open_csv(partial, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "metric", "step", "value"])
        for run, scalars in runs.items():
            for metric, (steps, values) in scalars.items():
                writer.writerows((run, metric, step, str(value)) for step, value in zip(steps, values, strict=True))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to write. It replaces `path` at the end, and is removed if anything fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def median_update_ratio_quotient(scalars: Scalars) -> float:
    """Return the median over steps and blocks of (‖ΔW_d‖/‖W_d‖) / (‖ΔW_u‖/‖W_u‖).

    It is 1 if both matrices move at the same relative pace, as WeSaR intends (section 4.1 of the paper). Steps with a
    ratio that is 0 or not finite, such as skipped steps, do not count.

    NaN if no block has update ratios of both matrices.
    """
    metrics = {(curve.role, curve.block): curve.metric for curve in find_curves("", scalars, "update_ratio")}
    quotients = []
    for role, block in metrics:
        if role == "W_d" and ("W_u", block) in metrics:
            steps_d, ratios_d = scalars[metrics["W_d", block]]
            steps_u, ratios_u = scalars[metrics["W_u", block]]
            _, at_d, at_u = np.intersect1d(steps_d, steps_u, assume_unique=True, return_indices=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                quotients += list(ratios_d[at_d].astype(float) / ratios_u[at_u])
    usable = [quotient for quotient in quotients if 0 < quotient < math.inf]
    return float(np.median(usable)) if usable else math.nan
