"""Run everything that only a GPU can show: `python -m benchmarks.gpu --minutes 9 --out DIR`.

Each step is a process with a time limit of its own. Its output goes to DIR/<step>.log, measurements go to
DIR/benchmarks.csv, and name, seconds and outcome of the step to DIR/steps.csv, each as soon as it is known. If a step
fails, the others still run.
"""

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

_ROOT = Path(__file__).parents[1]
_BATCHES, _HALF = 40, 20
# Sizes small enough to test this script on a CPU.
_TINY = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.vocab_size=500",
    "max_seq_len=64",
    "device_train_microbatch_size=4",
    "precision=fp32",
    "compile_config.backend=aot_eager",
]
# A process waits up to 5 s for each of its loader's workers when it ends.
_LOADER = [
    "train_loader.num_workers=0",
    "train_loader.prefetch_factor=null",
    "train_loader.persistent_workers=false",
]


def _train(method: str, data: Path, out: Path, tiny: bool, *overrides: str) -> list[str]:
    """Return the command of the stock trainer on the 130M YAML, compiled, with monitors and checkpoints."""
    options = [
        f"variables.method={method}",
        f"variables.data={data}",
        "model.init_device=cpu",
        "eval_loader=null",
        "eval_interval=0",
        f"max_duration={_BATCHES}ba",
        f"scheduler.t_max={_BATCHES}ba",
        "scheduler.t_warmup=5ba",
        f"save_interval={_HALF}ba",
        "save_num_checkpoints_to_keep=-1",
        "autoresume=false",
        f"loggers.tensorboard.log_dir={out}/events",
        *_LOADER,
        *(["global_train_batch_size=8", *_TINY] if tiny else ["global_train_batch_size=64"]),
        *overrides,
    ]
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "1", "-c", sys.executable]
    return [*launcher, "-m", "llmfoundry.cli.cli", "train", str(_ROOT / "yamls/130m.yaml"), *options]


def plan(out: Path, data: Path | None, device: str, seconds: float) -> list[tuple[str, float, list[str]]]:
    """List the steps, the most important first: name, time limit in seconds, command."""
    tiny = device == "cpu"
    shards = out / "data" if data is None else data
    steps: list[tuple[str, float, list[str]]] = []
    cli = [sys.executable, "-c", "from llmfoundry_wesar.cli import app; app()"]
    if data is None:
        text = [
            "data",
            str(shards),
            "--source",
            "stdlib",
            "--val-fraction",
            "0",
            "--max-tokens",
            "200K" if tiny else "4M",
        ]
        size = ["--sequence-length", "64", "--vocab-size", "500"] if tiny else []
        steps.append(("data", 120, [*cli, *text, *size]))
    bench = [sys.executable, "-m", "benchmarks.run", "--device", device, "--out", str(out / "benchmarks.csv")]
    bench += ["--seconds", f"{seconds:g}"]
    small, large = ("tiny", "tiny") if tiny else ("130m", "1.3b")
    for method in ("wesar", "small_init"):
        folder = out / method
        run = _train(method, shards, folder, tiny, f"run_name={method}", f"save_folder={folder}/whole")
        steps.append((f"train {method}", 120, run))
        if method == "wesar":
            steps.append(("trainer 130m", 150, [*bench, "--suite", "trainer", "--sizes", small, "--modes", "compiled"]))
    checkpoint = f"load_path={out}/wesar/whole/ep0-ba{_HALF}-rank0.pt"
    names = ["run_name=resumed", f"save_folder={out}/wesar/resumed"]
    steps.append(("resume", 120, _train("wesar", shards, out / "wesar", tiny, checkpoint, *names)))
    compare = [sys.executable, "-m", "benchmarks.gpu_checks"]
    events = [str(out / "wesar/events" / name) for name in ("wesar", "resumed")]
    steps.append(("same losses", 60, [*compare, "same", *events, device]))
    latest = str(out / f"wesar/whole/ep0-ba{_BATCHES}-rank0.pt")
    steps.append(("export", 60, [*cli, "export", latest, str(out / "wesar/plain")]))
    steps.append(("same logits", 60, [*compare, "logits", latest, str(out / "wesar/plain")]))
    steps.append(("fsdp", 90, [*compare, "fsdp", device]))
    for mode in ("compiled", "eager"):
        steps.append((f"step 130m {mode}", 150, [*bench, "--suite", "step", "--sizes", small, "--modes", mode]))
        two = [*bench, "--suite", "step", "--sizes", large, "--modes", mode, "--methods", "small_init,wesar"]
        steps.append((f"step 1.3b {mode}", 90, two))
    steps.append(("monitor 130m", 90, [*bench, "--suite", "monitor", "--sizes", small, "--modes", "eager"]))
    steps.append(("monitor 1.3b", 90, [*bench, "--suite", "monitor", "--sizes", large, "--modes", "eager"]))
    steps.append(("loss", 60, [*bench, "--suite", "loss,optimizer", "--sizes", small, "--modes", "eager"]))
    steps.append(("trainer eager", 300, [*bench, "--suite", "trainer", "--sizes", small, "--modes", "eager"]))
    steps.append(("trainer 1.3b", 560, [*bench, "--suite", "trainer", "--sizes", large, "--modes", "compiled"]))
    return steps


def main(
    out: Annotated[Path, typer.Option(help="A folder for logs and results.")],
    minutes: Annotated[
        float, typer.Option(help="Time for all steps; a step that would begin later is left out.")
    ] = 9.0,
    data: Annotated[Path | None, typer.Option(help="Token shards of 2048 and their tokenizer. [default: made]")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to test this script at a tiny size.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Time of measuring, as for benchmarks.run.")] = 5.0,
    only: Annotated[str | None, typer.Option(help="Steps to run again in the same DIR, as a,b.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit of the code, if git cannot tell.")] = None,
) -> None:
    """Train, resume, export and measure on one GPU, each step in a process of its own."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device}: choose from cuda, cpu.", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: PyTorch sees no GPU on this machine.", param_hint="--device")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = {
        **os.environ,
        **hidden,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    steps = plan(out, None if data is None else data.absolute(), device, seconds)
    if only is not None:
        names = [name for name, *_ in steps]
        for name in only.split(","):
            if name not in names:
                raise typer.BadParameter(f"{name}: choose from {', '.join(names)}.", param_hint="--only")
        steps = [step for step in steps if step[0] in only.split(",")]
    patience = 1 if device == "cuda" else 5  # a CPU may be slow
    end, failed = time.monotonic() + 60 * minutes, False
    with (out / "steps.csv").open("a", newline="") as file:
        rows = csv.writer(file)
        for name, limit, command in steps:
            if "benchmarks.run" in command and commit is not None:
                command = [*command, "--commit", commit]
            left, start = end - time.monotonic(), time.monotonic()
            outcome = "left out: no time"
            if left > 10:
                with (out / f"{name.replace(' ', '-')}.log").open("w") as log:
                    try:
                        job = subprocess.run(
                            command,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            timeout=math.ceil(min(limit * patience, left)),
                            cwd=out,
                            env=environment,
                        )
                        outcome = "ok" if job.returncode == 0 else f"failed: exit status {job.returncode}"
                    except subprocess.TimeoutExpired:
                        outcome = "failed: out of time"
            failed |= outcome.startswith("failed")
            rows.writerow((name, f"{time.monotonic() - start:.1f}", outcome))
            file.flush()
            print(f"{name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
