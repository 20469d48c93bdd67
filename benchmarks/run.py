"""Run benchmark suites and append rows to a CSV: `python -m benchmarks.run --help`."""

import gc
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import data, gate, loss, monitor, optimizer, precision, step, trainer
from benchmarks.record import Recorder, reason
from benchmarks.sizes import SIZES

SUITES: dict[str, Callable[[Recorder, str, bool, float], None]] = {
    "step": step.run,
    "trainer": trainer.run,
    "monitor": monitor.run,
    "loss": loss.run,
    "gate": gate.run,
    "optimizer": optimizer.run,
    "data": data.run,
    "precision": precision.run,
}
MODES = {"eager": False, "compiled": True}
# A suite takes _TIMES × `--seconds` of measuring, and _BESIDES seconds more, eager and compiled, on a GPU.
_TIMES = {"step": 1, "trainer": 6, "monitor": 2, "loss": 1, "gate": 1, "optimizer": 1, "data": 0, "precision": 1}
_BESIDES = {
    "step": (15, 60),
    "trainer": (6 * 45, 3 * 75),
    "monitor": (60, 0),
    "loss": (5, 30),
    "gate": (5, 30),
    "optimizer": (10, 0),
    "data": (40, 0),
    "precision": (300, 0),
}


def _chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name}: choose from {', '.join(known)}.", param_hint=option)
    return names


def expected(suite: str, compiled: bool, seconds: float) -> float:
    """Estimate the seconds that a suite takes for one size in one mode, on a GPU."""
    besides = _BESIDES[suite][compiled]
    return besides + (_TIMES[suite] * seconds if besides else 0)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[str, typer.Option(help="The suites to run.")] = ",".join(SUITES),
    sizes: Annotated[str, typer.Option(help=f"Some of {','.join(SIZES)}.")] = "tiny",
    modes: Annotated[str, typer.Option(help="With torch.compile or without.")] = ",".join(MODES),
    methods: Annotated[str, typer.Option(help="The methods of `step`; ratios are to the first one.")] = ",".join(
        step.METHODS
    ),
    seconds: Annotated[
        float, typer.Option(help="Time of measuring, for each group of variants or trainer run.")
    ] = 20.0,
    minutes: Annotated[float, typer.Option(help="Start nothing that is expected to end later.")] = float("inf"),
    out: Annotated[Path, typer.Option(help="The CSV.")] = Path("results/benchmarks.csv"),
    commit: Annotated[str | None, typer.Option(help="The commit of the code, if git cannot tell.")] = None,
) -> None:
    """Run suites, each for all sizes and modes that the device allows."""
    [device] = _chosen("--device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: PyTorch sees no GPU on this machine.", param_hint="--device")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise the trainer would use the GPU
    suites, names = _chosen("--suite", suite, SUITES), _chosen("--sizes", sizes, SIZES)
    chosen = _chosen("--methods", methods, step.KNOWN)
    try:
        recorder = Recorder(out, device, commit)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    parts = list(product(suites, names, _chosen("--modes", modes, MODES)))
    times = [expected(name, MODES[mode], seconds) for name, _, mode in parts]
    print(f"{len(parts)} parts, on a GPU about {sum(times) / 60:.0f} minutes:")
    for part, needed in zip(parts, times, strict=True):
        print(f"  {needed / 60:5.1f} min  {' '.join(part)}", flush=True)
    end = time.monotonic() + 60 * minutes
    failed = []
    for (name, size, mode), needed in zip(parts, times, strict=True):
        if time.monotonic() + needed > end:
            print(f"left out, for --minutes {minutes:g}: {name} {size} {mode}", flush=True)
            continue
        function = partial(step.run, methods=chosen) if name == "step" else SUITES[name]
        recorder.about(suite=name, name=size, dtype=recorder.dtype, shape="", compiled=MODES[mode])
        try:
            function(recorder, size, MODES[mode], seconds)
        except Exception as error:
            recorder.add([], variant="all", unit="ms", note=reason(error))
            failed.append(f"{name} {size} {mode}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if failed:
        print(f"failed: {'; '.join(failed)}", flush=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
