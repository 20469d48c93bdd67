"""Kill the tools and the trainer at random moments, and check that a second attempt ends as if nothing had happened.

`make chaos` runs this. Each trial starts a tool in a process of its own, and ends it early: by SIGKILL at a random
moment, or by a full disk, for which the size of files is limited at random. What it left must not pass for complete.
Then the same call must give the same bits as an undisturbed one, and leave nothing else.
"""

import argparse
import fcntl
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from llmfoundry_wesar.data.shards import prepare
from llmfoundry_wesar.export.checkpoints import read_checkpoint, read_timestamp
from llmfoundry_wesar.export.files import export, reparameterize
from llmfoundry_wesar.inspection import yaml_line
from llmfoundry_wesar.runs.compare import plan, run_series
from llmfoundry_wesar.runs.summary import read_rows
from tests.distributed import REPOSITORY
from tests.trained import LENGTH, TEXT, TINY, VOCABULARY, prepare_text, train

BATCHES = 4
_SAVES = ["save_interval=1ba", "save_overwrite=true", "autoresume=true"]


@dataclass(frozen=True)
class Inputs:
    """What the tools read: text, token shards, a trained checkpoint, and a plain model."""

    text: Path
    data: Path
    checkpoint: Path
    plain: Path


@dataclass(frozen=True)
class Victim:
    """A tool to kill.

    Attributes:
        run: Runs it, with the inputs and a folder for its output.
        check_left: Raises an AssertionError if the folder has a part that would pass for a whole, after a kill.
        result: Returns what two complete folders must have in common.
        full_disk: Whether to try a full disk too.
    """

    run: Callable[[Inputs, Path], object]
    check_left: Callable[[Path, Path], None]
    result: Callable[[Path], object]
    full_disk: bool = True


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _tensors(tree: object) -> Iterator[object]:
    """Yield the leaves of a checkpoint, tensors as bytes."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)
    else:
        yield tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def _train(inputs: Inputs, out: Path) -> None:
    with suppress(FileNotFoundError):
        if read_timestamp(out / "latest-rank0.pt")["batch"] == BATCHES:
            return  # Composer refuses to continue from the end
    train(inputs.data, f"save_folder={yaml_line(str(out))}", f"max_duration={BATCHES}ba", *_SAVES)


def _latest_is_whole(out: Path, _: Path) -> None:
    if (out / "latest-rank0.pt").exists():
        read_checkpoint(out / "latest-rank0.pt")


def _trained(out: Path) -> object:
    state = torch.load(out / f"ep0-ba{BATCHES}-rank0.pt", weights_only=False)["state"]
    return list(_tensors({key: state[key] for key in ("model", "optimizers", "schedulers", "rank_zero_seed")}))


def _prepare(inputs: Inputs, out: Path) -> None:
    prepare(out / "data", [inputs.text], sequence_length=LENGTH, vocab_size=VOCABULARY, val_fraction=0.2)


def _indexed_is_whole(out: Path, reference: Path) -> None:
    """Foundry's loader reads a split that has an index."""
    for index in out.glob("data/*/index.json"):
        assert _files(index.parent) == _files(reference / "data" / index.parent.name), index


def _export(inputs: Inputs, out: Path) -> None:
    if not (out / "model").exists():
        export(inputs.checkpoint, out / "model")


def _reparameterize(inputs: Inputs, out: Path) -> None:
    if not (out / "gated.pt").exists():
        reparameterize(inputs.plain, out / "gated.pt")


def _named_is_whole(out: Path, reference: Path) -> None:
    """What has its final name is complete. Nothing else is left but the partial output of one process."""
    left = {path.name for path in out.iterdir()}
    hidden = {name for name in left if ".partial-" in name}
    assert len(hidden) <= 1, left
    if left - hidden:
        result = _gated if (reference / "gated.pt").exists() else _files
        assert result(_without(out, hidden)) == result(reference)


def _without(out: Path, names: set[str]) -> Path:
    copied = Path(tempfile.mkdtemp(dir=out.parent)) / "named"
    return shutil.copytree(out, copied, ignore=lambda _, found: names & set(found))


def _gated(out: Path) -> object:
    assert [path.name for path in out.iterdir()] == ["gated.pt"]
    state = torch.load(out / "gated.pt", weights_only=False)["state"]
    return list(_tensors(state["model"])), sorted(state["integrations"]["huggingface"]["tokenizer"])


def _compare(inputs: Inputs, out: Path) -> None:
    """Train two runs. The trainer of a killed series continues: wait for it, as the message says."""
    overrides = [text for text in TINY if not text.startswith(("run_name", "seed", "eval", "loggers", "log_to"))]
    overrides += [f"variables.data={yaml_line(str(inputs.data))}", "save_folder=x", *_SAVES[:1]]
    overrides += ["console_log_interval=1ba", "eval_loader.dataset.split=train", "eval_subset_num_batches=1"]
    quickstart = str(REPOSITORY / "yamls/quickstart.yaml")
    runs = plan(quickstart, ["small_init", "wesar"], [1], out / "series", overrides=overrides)
    with suppress(FileNotFoundError), (out / "series/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    run_series(runs, out / "series")


def _rows_are_finished(out: Path, _: Path) -> None:
    if (out / "series/runs.csv").exists():
        assert all(row["status"] == "finished" for row in read_rows(out / "series/runs.csv"))


def _rows(out: Path) -> object:
    columns = ("run", "status", "tokens", "final_loss", "held_out_loss", "largest_jump", "spikes", "parameters")
    rows = read_rows(out / "series/runs.csv")
    assert (out / "series/curves.png").exists() and (out / "series/table.md").exists()
    return sorted([row[column] for column in columns] for row in rows)


VICTIMS = {
    "trainer": Victim(_train, _latest_is_whole, _trained),
    "data": Victim(_prepare, _indexed_is_whole, _files),
    "export": Victim(_export, _named_is_whole, _files),
    "reparameterize": Victim(_reparameterize, _named_is_whole, _gated),
    "compare": Victim(_compare, _rows_are_finished, _rows, full_disk=False),
}


def start(run: Callable[[], object], log: Path, file_size: int | None = None) -> int:
    """Run a function in a child of this process, which has imported everything, and return its process id.

    Args:
        run: The function.
        log: A file for its output.
        file_size: The size in bytes beyond which no file can grow.
    """
    if pid := os.fork():
        os.setpgid(pid, pid)  # here too, because the child may be killed before it does this
        return pid
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _finish(run: Callable[[], object], log: Path) -> float:
    """Run a function to its end, and return the seconds that it took."""
    begin = time.monotonic()
    _, status = os.waitpid(start(run, log), 0)
    assert status == 0, f"{log}:\n{log.read_text()[-5000:]}"
    return time.monotonic() - begin


def _kill(pid: int, out: Path, also_trainer: bool) -> bool:
    """Kill a process and its children, and return whether it still ran."""
    ended, _ = os.waitpid(pid, os.WNOHANG)
    if ended:
        return False
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock = out / "series/.lock"
    if also_trainer and lock.exists() and (left := lock.read_text().split()):
        with suppress(ProcessLookupError):
            os.killpg(int(left[-1]), signal.SIGKILL)
    return True


def chaos(folder: Path, times: int, seed: int, names: list[str]) -> Counter[str]:
    """Make `times` trials, in turn with each of the victims. Return how often each was disturbed, and how.

    Raises:
        AssertionError: After a trial something is not as it must be.
    """
    chance = random.Random(seed)
    text = folder / "documents"
    text.mkdir()
    for place in range(0, len(TEXT), 2000):
        (text / f"{place:06}.txt").write_text(TEXT[place : place + 2000])
    inputs = Inputs(text, folder / "data", folder / "trained", folder / "plain")
    log = folder / "log.txt"
    # In children too: tokenizers cannot use threads in a process that is forked after it has.
    if names != ["data"]:
        _finish(lambda: prepare_text(folder), log)
    if {"export", "reparameterize"} & set(names):
        _finish(lambda: _train(inputs, inputs.checkpoint), log)
        _finish(lambda: export(inputs.checkpoint, inputs.plain), log)
    references = {name: folder / f"{name}-reference" for name in names}
    seconds = {}
    for name, reference in references.items():
        reference.mkdir()
        seconds[name] = _finish(lambda name=name, reference=reference: VICTIMS[name].run(inputs, reference), log)
    counts: Counter[str] = Counter()
    for number in range(times):
        name = names[number % len(names)]
        victim, reference, out = VICTIMS[name], references[name], folder / f"{name}-{number}" / "out"
        out.mkdir(parents=True)
        log = out.parent / "log.txt"
        if victim.full_disk and chance.random() < 0.25:
            largest = max(path.stat().st_size for path in reference.rglob("*") if path.is_file())
            limit = chance.randrange(largest)
            _, status = os.waitpid(start(lambda v=victim, o=out: v.run(inputs, o), log, limit), 0)
            counts[f"{name}, full disk" if status else f"{name}, undisturbed"] += 1
            told = f"files of at most {limit} bytes"
        else:
            pid = start(lambda v=victim, o=out: v.run(inputs, o), log)
            moment = chance.uniform(0, seconds[name])
            time.sleep(moment)
            killed = _kill(pid, out, also_trainer=chance.random() < 0.5)
            counts[f"{name}, killed" if killed else f"{name}, undisturbed"] += 1
            told = f"killed after {moment:.3f} of {seconds[name]:.3f} s"
        try:
            victim.check_left(out, reference)
            _finish(lambda v=victim, o=out: v.run(inputs, o), log)
            assert victim.result(out) == victim.result(reference), "the result differs"
        except Exception as error:
            raise AssertionError(f"trial {number} (--seed {seed}), {name}, {told}, in {out.parent}: {error}") from error
        shutil.rmtree(out.parent)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="number of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    counts = chaos(folder, arguments.times, arguments.seed, arguments.only)
    shutil.rmtree(folder)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
