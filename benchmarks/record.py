"""Take readings, and write a row of a CSV for each measurement."""

import csv
import datetime
import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils.collect_env import get_cpu_model
from scipy import stats
from tqdm import tqdm

from llmfoundry_wesar.runs.compare import PACKAGES, commit_of_code

_WHAT = ("suite", "name", "variant", "unit")
_NUMBERS = ("n", "median", "p10", "p90", "ratio", "ratio_low", "ratio_high")
_HOW = ("dtype", "shape", "compiled", "note", "device", "hardware", *PACKAGES, "commit", "command", "date")
COLUMNS = (*_WHAT, *_NUMBERS, *_HOW)
_WARMUP, _FEWEST_ROUNDS, _MOST_ROUNDS = 3, 6, 400

Function = Callable[[], object]
Readings = Sequence[float] | np.ndarray


def ratio(values: Readings, baseline: Readings, paired: bool = True) -> list[float]:
    """Return the median of the pairs' ratios, and for 6 pairs or more its interval by order statistics.

    The interval goes from the r-th smallest of n ratios to the r-th largest. It misses the true median with the
    probability 2·P(X < r), X ~ B(n, ½). r is the largest number for which this is at most 5%. With fewer than 6 pairs
    there is none.

    Args:
        values: The readings.
        baseline: The readings of the plain variant.
        paired: Whether each of `values` was taken together with the reading at the same place in `baseline`. If not,
            the result is only the ratio of the medians.
    """
    if not paired:
        return [np.median(values) / np.median(baseline)]
    ratios = np.sort(np.divide(values, baseline))
    rank = int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1  # r, counted from 0
    return [np.median(ratios)] if rank < 0 else [np.median(ratios), ratios[rank], ratios[-1 - rank]]


def reason(error: BaseException) -> str:
    """Say in one line why there is no measurement."""
    if isinstance(error, torch.OutOfMemoryError) or "OutOfMemoryError" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[-1]}"[:200]


class Recorder:
    """Measures on one device, and appends each row to a CSV as soon as it is known.

    Args:
        path: The CSV.
        device: `cpu` or `cuda`.
        commit: The commit of the code, if there is no git repository to ask.

    Raises:
        ValueError: If no commit is known, or the file has other columns.
    """

    def __init__(self, path: Path, device: str, commit: str | None = None):
        if commit is None:
            commit = commit_of_code()
        if not commit:
            raise ValueError("--commit: a result names its commit, and here is no git repository to ask.")
        cpu = f"{os.cpu_count()} × {get_cpu_model()}, {torch.get_num_threads()} threads"
        self.path, self.device = path, device
        self.dtype = "amp_bf16" if device == "cuda" else "fp32"
        self.row: dict[str, Any] = {package: importlib.metadata.version(package) for package in PACKAGES} | {
            "device": device,
            "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
            "commit": commit,
            "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")
        if path.read_text().partition("\n")[0] != ",".join(COLUMNS):
            raise ValueError(f"--out: {path} has other columns than these results; choose another file.")

    def about(self, **row: Any) -> None:
        """Set the columns that the next rows have in common: suite, name, dtype, shape, compiled."""
        self.row |= row

    def add(self, values: Readings, baseline: Readings = (), paired: bool = True, **row: Any) -> None:
        """Append one measurement.

        Args:
            values: The readings. If there are none, `note` says why; by default because a CPU cannot give them.
            baseline: The readings of the plain variant, if there is one. There is no ratio to a reading of 0.
            paired: As for `ratio`.
            **row: variant, unit and note, and columns that differ from `about`.
        """
        numbers: list[float] = [len(values)]
        if len(values):
            numbers += [float(x) for x in np.percentile(values, [50, 10, 90])]
            if len(baseline) and np.all(baseline):
                numbers += [float(x) for x in ratio(values, baseline, paired)]
        cells = {key: f"{number:.8g}" for key, number in zip(_NUMBERS, numbers, strict=False)}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = {"note": "" if len(values) else "not measured on a CPU"} | self.row | row | cells | {"date": date}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        mode = "compiled" if row["compiled"] else "eager"
        print(*(row[key] for key in _WHAT), mode, row["dtype"], cells, row["note"], sep=" | ", flush=True)

    def compare(self, functions: Mapping[str, Function], seconds: float, held: Mapping[str, int] | None = None) -> None:
        """Time functions in turn, measure their peak memory, and add the rows. The first function is the baseline.

        Rounds run A B C and C B A alternately, so that a linear drift of the clock rate cancels over two rounds.

        Args:
            functions: Variant → function.
            seconds: How long to measure, after the warm-up.
            held: Variant → bytes that it holds between calls. They count towards its peak.
        """
        for function in functions.values():
            for _ in range(_WARMUP):
                function()
        times: dict[str, list[float]] = {variant: [] for variant in functions}
        start = time.monotonic()
        with tqdm(desc=f"{self.row['suite']} {self.row['name']}", unit="round", mininterval=5) as bar:
            while bar.n < _FEWEST_ROUNDS or (time.monotonic() - start < seconds and bar.n < _MOST_ROUNDS):
                for variant in list(functions)[:: 1 if bar.n % 2 == 0 else -1]:
                    times[variant].append(self.milliseconds(functions[variant]))
                bar.update()
        peaks = {variant: self.peak(functions[variant], (held or {}).get(variant, 0)) for variant in functions}
        for unit, readings in {"ms": times, "GiB at peak": peaks}.items():
            for variant, values in readings.items():
                self.add(values, next(iter(readings.values())), variant=variant, unit=unit)

    def milliseconds(self, function: Function) -> float:
        """Time one call, from an idle device until the device is idle again."""
        if self.device == "cpu":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def allocated(self) -> int:
        """Return the bytes of tensors on a GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def peak(self, function: Function, held: int) -> list[float]:
        """Return the peak of memory allocated during one call, plus `held`, in GiB; nothing on a CPU."""
        if self.device == "cpu":
            return []
        torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        function()
        return [(torch.cuda.max_memory_allocated() - before + held) / 2**30]
