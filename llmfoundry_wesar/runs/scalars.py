"""Read the metrics of runs from TensorBoard folders and CSV files, and find the matrix and block of each metric."""

import csv
import itertools
import logging
import lzma
import math
import os
import struct
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
from tensorboard.compat.proto import event_pb2

from llmfoundry_wesar.roles import block_index, role_name, role_order

# Of a record in an event file.
_HEAD, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
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


def _series(steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort points by step. If a step occurs twice, keep the later point."""
    # `np.unique` returns the first index of a step, so look from the end.
    unique, index = np.unique(np.array(steps, dtype=np.int64)[::-1], return_index=True)
    return unique, np.array(values, dtype=np.float32)[::-1][index]


def _masked_crc32c(data: bytes) -> int:
    """Return a checksum of TFRecord, the format of event files."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_record(data: bytes, position: int) -> bytes:
    """Return the record at a position of a TFRecord file: length, its checksum, then the record and its checksum.

    TensorBoard's own reader computes the checksums in Python, and takes five times as long.

    Raises:
        EOFError: The data end within the record.
        ValueError: A checksum is wrong.
    """
    start = position + _HEAD.size
    if start > len(data):
        raise EOFError
    length, checksum = _HEAD.unpack_from(data, position)
    if _masked_crc32c(data[position : position + 8]) != checksum:
        raise ValueError
    end = start + length
    if end + _CHECKSUM.size > len(data):
        raise EOFError
    record = data[start:end]
    if _masked_crc32c(record) != _CHECKSUM.unpack_from(data, end)[0]:
        raise ValueError
    return record


def _read_events(file: Path) -> Iterator[Any]:
    """Yield the events of a file. Say so if a record is cut off or damaged, and stop there."""
    data, position, after = file.read_bytes(), 0, "before any metric"
    try:
        while position < len(data):
            record = _read_record(data, position)
            position += _HEAD.size + len(record) + _CHECKSUM.size
            event = event_pb2.Event.FromString(record)  # type: ignore[attr-defined]
            if event.HasField("summary"):
                after = f"after step {event.step}"
            yield event
    except EOFError:
        log.warning(
            "%s: ends within a record, %s: the run was killed, or still writes, or the file was cut", file, after
        )
    except ValueError:
        size = len(data)
        log.warning("%s: damaged %s, at byte %d of %d: the rest of this file is left out", file, after, position, size)


def _join(folder: Path, points: Mapping[str, Sequence[array]]) -> Scalars:
    """Join what the trainers of a folder logged to one run, and say which older runs are left out.

    A trainer logs `time/batch` at every step. It starts at step 0 or, if it resumes a run, at the step s of the
    checkpoint. Then what was logged before for later steps than s belongs to a branch that was given up.

    Args:
        folder: Its name is for the message.
        points: Metric → wall times in seconds, steps, values.
    """
    columns = {}
    for metric, (times, steps, values) in points.items():
        # By time, since the file names have whole seconds, so that their order is not enough.
        order = np.lexsort((steps, times))
        columns[metric] = np.array(times)[order], np.array(steps)[order], np.array(values)[order]
    times, steps, _ = columns.get("time/batch", (np.empty(0), np.empty(0), None))
    first = np.flatnonzero(np.diff(steps) < 0) + 1  # of each later trainer
    if len(new := times[first][steps[first] == 0]):
        log.warning(
            "%s: %d runs that began at step 0; only the newest is read, which began at %s",
            folder,
            len(new) + 1,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(new[-1])),
        )
    for start, step in zip(times[first], steps[first], strict=True):
        # The first points of a new run, such as an evaluation at step 0, can be older than its `time/batch`.
        end = max(t[(t < start) & (s > step)].max(initial=-math.inf) for t, s, _ in columns.values())
        for metric, (t, s, values) in columns.items():
            keep = (t > end) | (step > 0) & (s <= step)
            columns[metric] = t[keep], s[keep], values[keep]
    return {metric: _series(s, values) for metric, (_, s, values) in columns.items() if len(s)}


def _read_folder(path: Path) -> dict[str, Scalars]:
    files = sorted(path.rglob("*tfevents*"), key=lambda file: (file.parent, file.name))
    if not files:
        raise FileNotFoundError(
            f"{path}: no TensorBoard event files in or below this folder; "
            "name the run's folder, <loggers.tensorboard.log_dir>/<run_name>"
        )
    runs: dict[Path, Scalars] = {}
    for folder, parts in itertools.groupby(files, key=lambda file: file.parent):
        points: dict[str, tuple[array, ...]] = defaultdict(lambda: (array("d"), array("q"), array("f")))
        for event in itertools.chain.from_iterable(map(_read_events, parts)):
            for value in event.summary.value:
                # At every evaluation Composer writes the last losses again as hparams/…, into another folder.
                if value.HasField("simple_value") and not value.tag.startswith("hparams/"):
                    times, steps, values = points[value.tag]
                    times.append(event.wall_time)
                    steps.append(event.step)
                    values.append(value.simple_value)
        if points:
            runs[folder] = _join(folder, points)
    if not runs:
        raise ValueError(f"{path}: no metrics in its {len(files)} TensorBoard event files")
    if len(runs) == 1:
        return {folder.resolve().name: run for folder, run in runs.items()}
    return {folder.relative_to(path).as_posix(): run for folder, run in runs.items()}


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
    return {
        run: {key: _series(*zip(*found, strict=True)) for key, found in metrics.items()}
        for run, metrics in points.items()
    }


def read_runs(path: str | Path) -> dict[str, Scalars]:
    """Read every run in a TensorBoard folder, or in a `.csv` or `.csv.xz` file of `write_csv`.

    Composer's `TensorboardLogger` opens a new event file in `<log_dir>/<run_name>` after each flush, so all files of
    one folder are one run. If a run was resumed from a checkpoint, what it had logged after the checkpoint is left
    out. If several runs that began at step 0 used a folder, the newest is read. A warning says so, and also which file
    is damaged or cut, and after which step.

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
    return sorted(curves, key=lambda curve: (role_order(curve.role), curve.block or 0))


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
