"""Measure, and append rows to a CSV: `python -m benchmarks.run --help`."""

import gc
import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import gate, loss, monitor, precision, step, trainer
from benchmarks.record import Recorder
from benchmarks.sizes import SIZES

SUITES = {
    "step": step.run,
    "trainer": trainer.run,
    "monitor": monitor.run,
    "loss": loss.run,
    "gate": gate.run,
    "precision": precision.run,
}
MODES = {"eager": False, "compiled": True}


def _chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name}: choose from {', '.join(known)}.", param_hint=option)
    return names


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[str, typer.Option(help="What to measure.")] = ",".join(SUITES),
    sizes: Annotated[str, typer.Option(help=f"Of {','.join(SIZES)}.")] = "tiny",
    modes: Annotated[str, typer.Option(help="With torch.compile or without.")] = ",".join(MODES),
    seconds: Annotated[float, typer.Option(help="Of measuring, for each group of variants or trainer run.")] = 20.0,
    out: Annotated[Path, typer.Option(help="The CSV.")] = Path("results/benchmarks.csv"),
    commit: Annotated[str | None, typer.Option(help="That of the code, where git cannot tell.")] = None,
) -> None:
    """Run suites, for each of the sizes and modes, as the device allows."""
    [device] = _chosen("--device", device, ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"])
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer would take the GPU
    suites, names = _chosen("--suite", suite, SUITES), _chosen("--sizes", sizes, SIZES)
    try:
        recorder = Recorder(out, device, commit)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for name, size, mode in product(suites, names, _chosen("--modes", modes, MODES)):
        try:
            SUITES[name](recorder, size, MODES[mode], seconds)
        except torch.OutOfMemoryError:
            recorder.add([], variant="all", unit="ms", note="out of memory")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
