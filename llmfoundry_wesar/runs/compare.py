"""Train several methods under equal conditions: a series of runs of the stock trainer, one after the other.

`plan` lists the runs. `run_series` trains those that are not finished, each in its own process. A series has a folder:

    runs.csv    a row for each run that has ended, see `summary`
    table.md    a summary of the runs of the last call
    curves.png  the training losses of these runs
    logs/  tensorboard/  checkpoints/ (if the config saves any), with an entry for each run
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch
from composer.core import TimeUnit
from composer.utils.collect_env import get_cpu_model, get_gpu_model
from omegaconf import OmegaConf
from tqdm import tqdm

from llmfoundry_wesar.callbacks.interval import parse_time
from llmfoundry_wesar.inspection import inspect_config, load_config, yaml_line
from llmfoundry_wesar.methods import load
from llmfoundry_wesar.runs.leftovers import discard_end, is_complete
from llmfoundry_wesar.runs.scalars import read_scalars, replacing
from llmfoundry_wesar.runs.summary import Row, append_rows, draw_curves, measure, read_rows, status, write_table

# Config keys that do not change the result and so are not hashed. `variables` act through the keys that refer to them.
_NO_EFFECT = {"autoresume", "console_log_interval", "flatten_metadata", "log_config", "log_to_console", "loggers"}
_NO_EFFECT |= {"metadata", "progress_bar", "python_log_level", "run_name", "variables"}
# Callback → its keys that only choose what is logged, or where. They are not hashed either.
_LOGGED = {
    "update_ratio_monitor": {"metrics", "by_role", "by_matrix", "picture_interval"},
    "gate_monitor": {"by_role", "by_matrix"},
    "spike_recorder": {"folder"},
}
_OURS = ("variables.method", "seed", "train_loader.dataset.shuffle_seed", "run_name", "loggers.tensorboard.log_dir")
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}]"
_STOP_SECONDS = 30
# The packages whose versions a result names.
PACKAGES = ("torch", "mosaicml", "llm-foundry", "llmfoundry_wesar")


@dataclass(frozen=True)
class Run:
    """One run of a series.

    Attributes:
        name: Name of the log and of the TensorBoard folder.
        method: A file of `methods`.
        variation: `key=value` of every varied key, separated by spaces.
        seed: Seed of the trainer and of the data order.
        config: The training YAML.
        overrides: Changes to the YAML, without the output paths.
        config_hash: Hash of all keys of the expanded config that can change the result.
        parameters: Number of parameters of the model.
        held_out: Metric key of the held-out loss.
        nproc: Number of processes that Composer's launcher starts; None to run without the launcher.
        command: Command that starts the run.
    """

    name: str
    method: str
    variation: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    config_hash: str
    parameters: int
    held_out: str
    nproc: int | None
    command: tuple[str, ...]


def _hash(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in _NO_EFFECT and not key.startswith("save_")}
    for name in _LOGGED.keys() & (kept.get("callbacks") or {}).keys():
        options = {key: value for key, value in (kept["callbacks"][name] or {}).items() if key not in _LOGGED[name]}
        kept["callbacks"] = {**kept["callbacks"], name: options}
    # The name is part of the hash, so that two methods with equal configs stay two rows of the table.
    text = json.dumps([config["variables"]["method"], kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _path(path: Path) -> str:
    """Write a path as YAML that the trainer reads as this path."""
    text = str(path)
    for _ in range(3):  # OmegaConf resolves interpolations before, in and after the config transform `wesar`
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return yaml_line(text)


def _for_launcher(override: str) -> str:
    """Rewrite an override so that Composer's launcher does not replace a `$NAME` in its value."""
    key, _, value = override.partition("=")
    data: Any = OmegaConf.to_container(OmegaConf.from_cli([f"value={value}"]))
    return f"{key}={yaml_line(data['value'])}" if "$" in value else override


def _is_positive(time: Any) -> bool:
    """Return whether the trainer reads a value as a positive time. A number without a unit counts epochs."""
    with suppress(ValueError):
        return parse_time(time, "", TimeUnit.EPOCH).value > 0
    return False


def _held_out(config: str, expanded: Mapping[str, Any]) -> str:
    """Return the metric key of the held-out loss.

    Raises:
        ValueError: The trainer would not log it at the end.
    """
    for key, default, example in (("max_duration", None, "200ba"), ("eval_interval", 1, "1dur")):
        if not _is_positive(value := expanded.get(key, default)):
            raise ValueError(
                f"{config}: {key}: {value} is not a positive time, such as {example}; compare needs the held-out loss "
                "of the trained model"
            )
    refused = {"eval_subset_num_batches": 0, "only_hf_checkpoint": True, "only_composer_checkpoint": True}
    for key, value in refused.items():
        if expanded.get(key) == value:
            raise ValueError(f"{config}: with {key}: {value} there is no held-out loss; remove this key")
    if "async_eval" in (expanded.get("callbacks") or {}):
        raise ValueError(f"{config}: callbacks.async_eval evaluates in another run; remove it")
    match expanded.get("eval_loader"):
        case {"name": _}:
            label = ""
        case [{"label": label}, *_]:
            label = f"{label}/"
        case _:
            raise ValueError(
                f"{config}: eval_loader must be a loader, or a list whose first loader has a label: it gives the "
                "held-out loss"
            )
    return f"metrics/eval/{label}LanguageCrossEntropy"


def _fixed_folders(config: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """Return callback, key and folder, for each folder of a callback that does not hold the run's name."""
    return {
        (name, key, options[key])
        for name, options in (config.get("callbacks") or {}).items()
        for key in ("save_folder", "folder")
        if isinstance(options, Mapping) and isinstance(options.get(key), str) and "{run_name}" not in options[key]
    }


def plan(
    config: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
    nproc: int | None = None,
) -> list[Run]:
    """List the runs of a series. All runs of the first seed come before those of the second seed.

    Args:
        config: A training YAML with an `eval_loader`. If that is a list, its first loader gives the held-out loss.
        methods: Values of `variables.method`.
        seeds: Values of both `seed` and `train_loader.dataset.shuffle_seed`.
        out: The folder of the series.
        vary: `key=v1,v2,…` each; every combination is run with each method and seed.
        overrides: `key=value` for all runs, as for the trainer.
        nproc: Number of processes that Composer's launcher starts for each run. It is not part of the hash.

    Returns:
        All runs, also the finished ones.

    Raises:
        FileNotFoundError: The YAML does not exist.
        ValueError: A list is empty, a method is unknown, a key or run occurs twice, the runs would not log a held-out
            loss at the end or would share a callback's folder, or `inspect_config` refuses the config.
    """
    pairs = [text.partition("=") for text in vary]
    # Split at commas, but not inside brackets: a YAML list is one value.
    sweeps = [[f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values) if value] for key, _, values in pairs]
    lists = {"methods": methods, "seeds": seeds} | {
        f"vary {text}": sweep for text, sweep in zip(vary, sweeps, strict=True)
    }
    if empty := [option for option, values in lists.items() if not values]:
        raise ValueError(f"--{empty[0]}: no values; separate them by commas")
    for method in methods:
        load("method", method)
    fixed = {text.partition("=")[0] for text in overrides}
    key, times = Counter([*_OURS, *(key for key, *_ in pairs), *fixed]).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{key}: {'compare sets it' if key in _OURS else '--vary sets it'} for each run; leave it out")

    @cache
    def parameters(*arguments: str) -> int:
        return inspect_config(load_config(config, list(arguments))).parameters

    out = Path(out).resolve()
    file = f"./{config}" if config.startswith("-") else config  # which the trainer would take for an option
    # Use the launcher of this Python environment; the one on PATH may belong to another.
    scripts = Path(sysconfig.get_path("scripts"))
    launcher = () if nproc is None else (str(scripts / "composer"), "-n", str(nproc), "-c")
    runs: dict[str, Run] = {}
    taken: set[tuple[str, str, str]] = set()
    for seed, combination in product(seeds, product(*sweeps, methods)):
        *varied, method = combination
        common = [*overrides, *varied, f"variables.method={method}"]
        own = [*common, f"seed={seed}", f"train_loader.dataset.shuffle_seed={seed}"]
        expanded, count = load_config(config, own), parameters(*common)
        held_out = _held_out(config, expanded)
        config_hash = _hash(expanded)
        if config_hash in runs:
            raise ValueError(f"{' '.join(own)}: the plan has this run twice; name each method, seed and value once")
        if fixed := _fixed_folders(expanded):  # they may hold it through an interpolation, so read them again
            fixed = _fixed_folders(load_config(config, [*own, "run_name='{run_name}'"]))
        for callback, key, folder in fixed & taken:
            raise ValueError(f"callbacks.{callback}.{key}: two runs would write to {folder!r}; add {{run_name}} to it")
        taken |= fixed
        short = (re.sub(r"^[^=]*\.", "", text) for text in varied)
        # A file name has at most 255 bytes.
        name = re.sub(r"[^\w.=-]", "_", "-".join([method, *short]), flags=re.ASCII)[:180]
        name += f"-seed{seed}-{config_hash}"
        where = [f"run_name={name}", f"loggers.tensorboard.log_dir={_path(out / 'tensorboard')}", "log_to_console=true"]
        where += ["callbacks.speed_monitor.time_unit=seconds", "callbacks.memory_monitor={}"]
        if expanded.get("save_folder"):
            if cut := sorted(set(str(out)) & set("#?;{}")):
                raise ValueError(
                    f"--out {out}: Composer cannot save checkpoints below a folder with {cut[0]} in its name; choose "
                    "another name"
                )
            where += [f"save_folder={_path(out / 'checkpoints' / name)}", "save_overwrite=true", "autoresume=true"]
        elif expanded.get("autoresume"):
            where.append("autoresume=false")  # Composer refuses it without a folder
        arguments = own if nproc is None else [_for_launcher(text) for text in own]
        runs[config_hash] = Run(
            name=name,
            method=method,
            variation=" ".join(varied),
            seed=seed,
            config=config,
            overrides=tuple(own),
            config_hash=config_hash,
            parameters=count,
            held_out=held_out,
            nproc=nproc,
            command=(*launcher, str(scripts / "llmfoundry"), "train", file, *arguments, *where),
        )
    return list(runs.values())


def results(runs: Sequence[Run], out: str | Path) -> list[Row]:
    """Return the row of `runs.csv` for each run that has ended, in the order of `runs`.

    If a run has several rows, take the one that has not failed, else the last.

    Raises:
        FileExistsError: The folder is not empty and is not the folder of a series.
        ValueError: As in `read_rows`.
    """
    out = Path(out)
    if not (out / "runs.csv").exists():
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise FileExistsError(f"{out}: not the folder of a series (it has no runs.csv); name a new folder")
        return []
    rows = sorted(read_rows(out / "runs.csv"), key=lambda row: row["status"] != "failed")
    found = {row["config_hash"]: row for row in rows}
    return [found[run.config_hash] for run in runs if run.config_hash in found]


def _done(runs: Sequence[Run], out: Path) -> set[str]:
    return {row["run"] for row in results(runs, out) if row["status"] != "failed"}


@contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    """Create the folder if needed, and lock it until this process and the trainers that it started have ended."""
    for name in ("logs", "tensorboard"):
        (out / name).mkdir(parents=True, exist_ok=True)
    append_rows(out / "runs.csv", [])
    with (out / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RuntimeError(f"{out}: a series still runs here; wait for it, or end {lock.read()}") from None
        yield lock


def commit_of_code() -> str:
    """Return the commit of the code, with `-dirty` if anything but results has changed; empty without a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # In site-packages git could find the repository of another project.
        return ""
    commit, changes = (
        subprocess.run(["git", "-C", str(root), "--no-optional-locks", *command], capture_output=True, text=True).stdout
        # A series appends to a tracked file in results/, which must not count as a change.
        for command in (["describe", "--always"], ["status", "--porcelain", "--untracked-files=no", ":!results"])
    )
    return commit.strip() + ("-dirty" if commit and changes else "")


def _conditions(nproc: int | None) -> dict[str, str]:
    gpu = torch.cuda.is_available()
    hardware = f"{nproc or 1} × {get_gpu_model()}" if gpu else f"{os.cpu_count()} × {get_cpu_model()}"
    return {
        "commit": commit_of_code() or importlib.metadata.version("llmfoundry_wesar"),
        "versions": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
        "hardware": hardware + (f", {nproc} processes" if nproc else ""),
    }


def _progress(log: Path) -> float:
    """Return the share of the run that is done, from the last log line such as `[batch=50/300]:`.

    If the log counts epochs, it is the share of the current epoch. Below such a line the trainer lists all metrics,
    80 kB at 13B.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500_000))
        found = re.findall(rb"^(?:\[epoch=\d+\])?\[\w+=(\d+)/(\d+)\]", file.read(), re.MULTILINE)
    return int(found[-1][0]) / int(found[-1][1]) if found else 0.0


def _train(run: Run, log: Path, lock: IO[str], bar: tqdm) -> tuple[int, float]:
    """Run the trainer. Return its exit code (negative for a signal) and its peak resident memory in 10⁹ bytes."""
    with log.open("w") as output:
        print("$", shlex.join(run.command), file=output, flush=True)
        # The trainer inherits the lock, because it continues if this process is killed.
        trainer = subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    done = bar.n
    try:
        lock.truncate(0)
        left = f"process {os.getpid()} or, if that has ended, process group {trainer.pid}"
        print(left, end="", file=lock, flush=True)
        # Popen.wait does not report peak memory, os.wait4 does.
        while not (ended := os.wait4(trainer.pid, os.WNOHANG))[0]:
            time.sleep(0.5)
            bar.n = done + _progress(log)
            bar.refresh()
    except BaseException:
        os.killpg(trainer.pid, signal.SIGTERM)
        try:
            trainer.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(trainer.pid, signal.SIGKILL)
        raise
    trainer.returncode = os.waitstatus_to_exitcode(ended[1])
    return trainer.returncode, ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _do(run: Run, out: Path, lock: IO[str], bar: tqdm) -> str:
    """Train one run, if it is not complete, and append its row to `runs.csv`. Return the message for the user."""
    config = load_config(run.config, list(run.overrides))
    if _hash(config) != run.config_hash:
        raise ValueError(f"{run.config}: the YAML or its method changed while the series ran; start compare again")
    log, scalars = out / "logs" / f"{run.name}.txt", out / "tensorboard" / run.name
    row: dict[str, Any] = {
        key: getattr(run, key) for key in ("method", "variation", "seed", "config_hash", "parameters")
    }
    row["run"] = run.name
    with suppress(FileNotFoundError, ValueError):  # there is no log yet, or not all of it
        logged = read_scalars(scalars)
        if is_complete(logged, run.held_out, config["max_duration"]):
            row |= measure(logged, run.held_out)
            row["status"] = status(row)
            append_rows(out / "runs.csv", [row])
            return f"{row['status']} after an earlier compare was killed, held-out loss {row['held_out_loss']:.3f}"
    if "autoresume=true" in run.command:
        discard_end(out / "checkpoints" / run.name, config["max_duration"])
    else:
        shutil.rmtree(scalars, ignore_errors=True)
    row |= {"status": "failed", **_conditions(run.nproc)}
    start = time.monotonic()
    code, row["peak_memory_gb"] = _train(run, log, lock, bar)
    row["wall_seconds"] = time.monotonic() - start
    if code < 0:
        return f"killed by {signal.Signals(-code).name}, see {log}"
    text = f"exit code {code}"
    if not code:
        try:
            row |= measure(read_scalars(scalars), run.held_out)
            row["status"] = status(row)
            text = f"held-out loss {row['held_out_loss']:.3f}, {row['wall_seconds']:.0f} s"
        except (FileNotFoundError, ValueError) as error:
            text = str(error)
    append_rows(out / "runs.csv", [row])
    return f"failed ({text}), see {log}" if row["status"] == "failed" else f"{row['status']}, {text}"


def run_series(runs: Sequence[Run], out: str | Path) -> list[Row]:
    """Train the runs of a plan that are not finished yet, and write table and curves of all of them.

    A run that fails gets a row and is tried again at the next call; one that diverges is not. A run that is killed gets
    no row. All are reported, and the series goes on. A run starts from its last checkpoint if the config saves any,
    else from the beginning. A trainer that ended after `compare` was killed is not started again: its log gives the
    row, without what only `compare` knows, such as the commit. SIGTERM and ctrl-C stop the current run and end the
    series.

    Args:
        runs: From `plan`.
        out: As for `plan`.

    Returns:
        As `results`: a run that did not end has status `failed` or no row.

    Raises:
        FileExistsError: As in `results`.
        KeyboardInterrupt: On SIGTERM or ctrl-C.
        RuntimeError: Another series, or a trainer that it left behind, still runs in the folder.
        ValueError: As in `results`; the YAML has changed since the plan, or its data do not exist.
    """
    out = Path(out).resolve()
    done = _done(runs, out)
    for run in runs:
        if run.name not in done:
            load_config(run.config, list(run.overrides), check_data=True)
    on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _locked(out) as lock:
            done = _done(runs, out)  # again: another series may have ended before we got the lock
            # smoothing=0: remaining time from the mean of all runs so far. disable=None: no bar outside a terminal.
            with tqdm(total=len(runs), initial=len(done), smoothing=0, bar_format=_BAR, disable=None) as bar:
                for number, run in enumerate((run for run in runs if run.name not in done), len(done) + 1):
                    bar.set_description(run.name)
                    tqdm.write(f"{run.name}: {_do(run, out, lock, bar)}")
                    bar.n = number
                    bar.refresh()
                    write_table(results(runs, out), out / "table.md")
            rows = results(runs, out)
            write_table(rows, out / "table.md")
            if any(row["status"] == "finished" for row in rows):
                with replacing(out / "curves.png") as partial:
                    draw_curves(rows, out / "tensorboard").savefig(partial, dpi=200)
            return rows
    finally:
        signal.signal(signal.SIGTERM, on_term)
