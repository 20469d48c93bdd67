"""Series of runs: which runs are planned, and that an interrupted series ends like an uninterrupted one."""

import csv
import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.runs.compare import plan, results, run_series
from llmfoundry_wesar.runs.leftovers import discard_end
from llmfoundry_wesar.runs.scalars import read_scalars
from llmfoundry_wesar.runs.summary import COLUMNS, read_rows, table
from results.evidence import GROUPS
from tests.logged_runs import record
from tests.trained import train

CONFIG = str(Path(__file__).parents[2] / "yamls/quickstart.yaml")
LENGTH, VOCABULARY, BATCH, BATCHES = 16, 64, 8, 4
# The quickstart with a model of two blocks, d = 32.
TINY = [f"max_seq_len={LENGTH}", f"max_duration={BATCHES}ba", "console_log_interval=1ba", "scheduler.t_warmup=2ba"]
TINY += [f"global_train_batch_size={BATCH}", f"device_train_microbatch_size={BATCH}"]
TINY += ["callbacks.update_ratio_monitor.picture_interval=null"]  # drawing takes longer than these runs
TINY += ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", f"model.vocab_size={VOCABULARY}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Write token shards and a tokenizer as `llmfoundry-wesar data` does."""
    out = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, sequences in {"train": BATCH * BATCHES, "val": 8}.items():
        with MDSWriter(out=str(out / split), columns={"tokens": "ndarray:int32"}) as writer:
            for _ in range(sequences):
                writer.write({"tokens": random.integers(VOCABULARY, size=LENGTH, dtype=np.int32)})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(out / "tokenizer")
    return str(out)


def make(out, methods=("wesar",), seeds=(1,), vary=(), overrides=(), **options):
    return plan(CONFIG, methods, seeds, out, vary, [*TINY, *overrides], **options)


def test_plan_has_every_combination_and_the_first_seed_of_all_first(tmp_path):
    vary = ["optimizer.lr=1e-3,2e-3", "model.init_config.sigma=0.01,0.02"]
    runs = make(tmp_path, ["wesar", "weight_norm"], [3, 5], vary)
    assert [run.seed for run in runs] == [3] * 8 + [5] * 8
    assert [run.method for run in runs] == ["wesar", "weight_norm"] * 8
    expected = {f"optimizer.lr={lr} model.init_config.sigma={s}" for lr in ("1e-3", "2e-3") for s in (0.01, 0.02)}
    assert {run.variation for run in runs} == expected
    assert len({run.name for run in runs}) == len({run.config_hash for run in runs}) == 16
    # With one seed, all methods and variations have the same data order and the same draws of the weights.
    for run in runs:
        assert {f"seed={run.seed}", f"train_loader.dataset.shuffle_seed={run.seed}"} <= set(run.command)
        assert {f"variables.method={run.method}", *run.variation.split()} <= set(run.command)


def test_hash_depends_on_what_changes_the_result_and_on_nothing_else(tmp_path):
    (run,) = make(tmp_path / "a")
    silent = ["progress_bar=true", "console_log_interval=7ba", "loggers.tensorboard.flush_interval=3", "save_folder=x"]
    silent += ["callbacks.update_ratio_monitor.metrics=grad_norm", "callbacks.gate_monitor.by_matrix=false"]
    for (same,) in (make(tmp_path / "b"), make(tmp_path / "a", overrides=silent), make(tmp_path / "a", nproc=2)):
        assert same.config_hash == run.config_hash and same.name == run.name
    others = [
        make(tmp_path, overrides=["optimizer.lr=2e-3"]),
        make(tmp_path, overrides=["variables.data=elsewhere"]),
        make(tmp_path, overrides=["model.init_config.sigma=0.01"]),  # a key that only the expanded config has
        make(tmp_path, seeds=[2]),
        make(tmp_path, ["wesar_small"]),
    ]
    assert len({run.config_hash, *(other.config_hash for (other,) in others)}) == 1 + len(others)


def test_the_committed_runs_are_those_of_todays_quickstart():
    """One run of each method: a change of the YAML, of a method or of a setting would change the hash.

    The expression for weight decay is an older one, which fits the same parameters.
    """
    path = Path(__file__).parents[2] / "results/quickstart-compare/runs.csv"
    rows = [row for row in csv.DictReader(path.open()) if row["seed"] == "1"]
    runs = plan(CONFIG, [row["method"] for row in rows], [1], path.parent, overrides=[GROUPS])
    assert [run.config_hash for run in runs] == [row["config_hash"] for row in rows]


def test_commands_are_the_stock_ones(tmp_path, monkeypatch):
    (run,) = make(tmp_path)
    assert [Path(run.command[0]).name, *run.command[1:3]] == ["llmfoundry", "train", CONFIG]
    monkeypatch.chdir(tmp_path)
    Path("-a.yaml").write_text(Path(CONFIG).read_text())
    (run,) = plan("-a.yaml", ["wesar"], [1], tmp_path / "out")
    assert run.command[1:3] == ("train", "./-a.yaml")
    (run,) = make(tmp_path, overrides=["save_folder=x"], nproc=2)
    composer, *arguments = run.command[:4]
    assert Path(composer).name == "composer" and arguments == ["-n", "2", "-c"]
    # Each run has a checkpoint folder of its own, and a stopped run continues from it.
    assert run.command[-3:] == (
        f'save_folder="{tmp_path}/checkpoints/{run.name}"',
        "save_overwrite=true",
        "autoresume=true",
    )
    # Without such a folder Composer would refuse the YAML's `autoresume: true` after a minute.
    (run,) = plan(
        str(Path(__file__).parents[2] / "yamls/130m.yaml"), ["wesar"], [1], tmp_path, overrides=["save_folder=null"]
    )
    assert run.command[-1] == "autoresume=false"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["wesar", "foo"]}, "variables.method: 'foo' is not known"),
        ({"methods": []}, "--methods: no values"),
        ({"seeds": []}, "--seeds: no values"),
        ({"vary": ["optimizer.lr="]}, "--vary optimizer.lr=: no values"),
        ({"methods": ["wesar", "wesar"]}, "the plan has this run twice"),
        ({"vary": ["optimizer.lr=1e-3,0.001"]}, "the plan has this run twice"),
        ({"overrides": ["seed=3"]}, "seed: compare sets it"),
        ({"vary": ["optimizer.lr=1e-3"], "overrides": ["optimizer.lr=1e-3"]}, "optimizer.lr: --vary sets it"),
        ({"overrides": ["eval_loader=null"]}, "eval_loader must be a loader, or a list whose first loader has a label"),
        ({"overrides": ["eval_interval=0"]}, "eval_interval: 0 is not a positive time, such as 1dur; compare needs"),
        ({"vary": ["eval_interval=0ba"]}, "eval_interval: 0ba is not"),
        ({"overrides": ["max_duration=soon"]}, "max_duration: 'soon' is not a time such as"),
        ({"overrides": ["max_duration=infba"]}, "max_duration: 'infba' is not a time such as"),
        ({"overrides": ["eval_subset_num_batches=0"]}, "with eval_subset_num_batches: 0 there is no held-out loss"),
        ({"overrides": ["only_hf_checkpoint=true"]}, "with only_hf_checkpoint: True there is no held-out loss"),
        ({"overrides": ["callbacks.async_eval={interval: 1ba}"]}, "callbacks.async_eval evaluates in another run"),
        ({"overrides": ["model.n_heads=5"]}, "n_heads"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"no runs\.csv"):
        run_series(make(tmp_path), tmp_path)
    (tmp_path / "runs.csv").write_text("method,loss\n")
    with pytest.raises(ValueError, match="columns"):
        run_series(make(tmp_path), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.csv", "thesis.tex"]


def test_a_config_that_changes_under_a_series_stops_it(tmp_path, data):
    """Otherwise a run would be recorded under the hash of another run."""
    (tmp_path / "train.yaml").write_text(Path(CONFIG).read_text())
    own = [*TINY, f"variables.data={data}"]
    runs = plan(str(tmp_path / "train.yaml"), ["wesar"], [1], tmp_path / "out", overrides=own)
    (tmp_path / "train.yaml").write_text(Path(CONFIG).read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
    with pytest.raises(ValueError, match="changed while the series ran"):
        run_series(runs, tmp_path / "out")
    assert read_rows(tmp_path / "out/runs.csv") == []


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def trainer_in(out: Path) -> int:
    """Return the trainer's process id from the file that holds the lock."""
    return int((out / ".lock").read_text().split()[-1])


def unlocked(out: Path) -> bool:
    with (out / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_an_interrupted_series_ends_as_if_it_had_not_been(tmp_path, data):
    """Four short runs: one finishes, one is killed and later stopped before its end, one fails."""
    out = tmp_path / "out"
    overrides = [*TINY, f"variables.data={data}"]
    arguments = ["compare", CONFIG, *overrides, "--methods", "small_init", "--seeds", "1", "--out", str(out), "--vary"]
    first, second = plan(CONFIG, ["small_init"], [1], out, ["optimizer.eps=1e-8,1e-2"], overrides)
    log = out / "logs" / f"{second.name}.txt"

    # The tool is killed while the second trainer runs. The trainer continues and keeps the folder locked.
    command = [
        sys.executable,
        "-c",
        "from llmfoundry_wesar.cli import app; app()",
        *arguments,
        "optimizer.eps=1e-8,1e-2",
    ]
    tool = subprocess.Popen(command)
    # The trainer creates this folder some seconds before its first batch. Its four batches take less than 0.1 s.
    wait_for(lambda: tool.poll() is not None or (out / "tensorboard" / second.name).exists())
    trainer = trainer_in(out)
    os.killpg(trainer, signal.SIGSTOP)  # it must not finish in the meantime
    tool.kill()
    assert tool.wait() == -signal.SIGKILL
    with pytest.raises(RuntimeError, match=f"still runs here; .* process group {trainer}"):
        run_series([first, second], out)
    os.killpg(trainer, signal.SIGKILL)
    wait_for(lambda: unlocked(out))
    (row,) = read_rows(out / "runs.csv")
    assert row["run"] == first.name and row["status"] == "finished"
    kept = {path: path.stat().st_mtime_ns for path in (out / "tensorboard" / first.name).iterdir()}
    # The metrics of the killed run must not count as those of the new run.
    partial = out / "tensorboard" / second.name / "events.out.tfevents.0.partial"
    partial.touch()

    # SIGTERM stops the trainer too.
    log.unlink()

    def stop() -> None:
        wait_for(log.exists)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_series([first, second], out)
    with pytest.raises(ProcessLookupError):
        os.kill(trainer_in(out), 0)
    assert read_rows(out / "runs.csv") == [row]

    # The third call does the rest, with one more run, whose logs have no place.
    (third,) = plan(CONFIG, ["small_init"], [1], out, ["optimizer.eps=1e-4"], overrides)
    (out / "tensorboard" / third.name).touch()
    arguments.append("optimizer.eps=1e-8,1e-4,1e-2")
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 1 and "2 of 3 runs finished" in ended.output
    rows = read_rows(out / "runs.csv")
    assert rows[0] == row and [row["status"] for row in rows] == ["finished", "failed", "finished"]
    failed_log = out / "logs" / f"{rows[1]['run']}.txt"
    assert f"failed (exit code 1), see {failed_log}" in ended.output
    assert "Error" in failed_log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and not partial.exists()

    # The recorded values are the logged ones.
    assert rows[2]["run"] == second.name and rows[2]["config_hash"] == second.config_hash
    logged = [read_scalars(out / "tensorboard" / run.name) for run in (first, second)]
    steps, losses = logged[1]["loss/train/loss"]
    assert len(steps) == BATCHES
    assert float(rows[2]["final_loss"]) == pytest.approx(np.mean(losses), rel=1e-6)
    assert float(rows[2]["held_out_loss"]) == logged[1]["metrics/eval/LanguageCrossEntropy"][1][-1]
    assert int(rows[2]["tokens"]) == BATCH * LENGTH * BATCHES
    # d = 32, N = 2, V = 64: embedding and W_p, 12 d² a block, five RMSNorms of width d.
    assert int(rows[2]["parameters"]) == 2 * 64 * 32 + 2 * 12 * 32**2 + 5 * 32
    assert 0 < float(rows[2]["tokens_per_second"]) < math.inf and 0.1 < float(rows[2]["peak_memory_gb"]) < 50
    # Both runs have the same seed, so weights and first batch are equal to the bit. Only the optimizer's ε differs.
    assert logged[0]["loss/train/loss"][1][0] == losses[0]
    assert logged[0]["loss/train/loss"][1][-1] != losses[-1]
    assert (out / "table.md").read_text().startswith(table(rows))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    # A further call changes nothing.
    before = (out / "runs.csv").read_bytes()
    assert run_series([first, second], out) == [rows[0], rows[2]]
    assert (out / "runs.csv").read_bytes() == before
    arguments += ["--dry-run"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and f"finished: {second.name}\n" in shown.output
    assert f"failed: {rows[1]['run']}\n" in shown.output and "1 of 3 runs to do" in shown.output


def test_a_series_without_its_data_does_not_start(tmp_path):
    runs = make(tmp_path / "out", overrides=[f"variables.data={tmp_path}/none"])
    with pytest.raises(ValueError, match=r"train_loader: there is no data in .*/none/train; .* change variables\.data"):
        run_series(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["callbacks=5", "callbacks.update_ratio_monitor=5", "callbacks.gate_monitor=x"])
def test_callbacks_that_are_no_mapping_are_refused_by_name(override, tmp_path):
    with pytest.raises(ValueError, match=r"^callbacks.* is not a mapping"):
        plan(CONFIG, ["wesar"], [1], tmp_path, overrides=[override])


def test_a_folder_of_a_callback_that_all_runs_would_share_is_refused(tmp_path):
    def planned(seeds, folder):
        return plan(CONFIG, ["wesar"], seeds, tmp_path, overrides=[f"callbacks.spike_recorder.folder={folder}"])

    with pytest.raises(ValueError, match=r"spike_recorder\.folder: two runs would write to 'spikes'; add \{run_name\}"):
        planned([1, 2], "spikes")
    assert len(planned([1], "spikes")) == 1
    for folder in ("'spikes/{run_name}'", "spikes/${run_name}", "spikes/${seed}"):
        assert len(planned([1, 2], folder)) == 2


def test_a_list_in_brackets_is_one_value(tmp_path):
    runs = make(tmp_path, vary=["optimizer.betas=[0.9,0.95],[0.9,0.99]"])
    assert [run.variation for run in runs] == ["optimizer.betas=[0.9,0.95]", "optimizer.betas=[0.9,0.99]"]


def test_a_killed_run_is_reported_without_a_row(tmp_path, data, capsys):
    """A trainer that a signal ends says nothing about its method."""
    (run,) = make(tmp_path / "out", overrides=[f"variables.data={data}"])
    command = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run_series([replace(run, command=command)], tmp_path / "out") == []
    assert f"{run.name}: killed by SIGKILL" in capsys.readouterr().out
    assert read_rows(tmp_path / "out/runs.csv") == results([run], tmp_path / "out") == []


def test_a_run_that_was_killed_while_it_saved_is_resumed(tmp_path, data):
    """The half-written checkpoint has no symlink yet, and Composer would refuse to overwrite it."""
    (run,) = make(tmp_path / "out", overrides=[f"variables.data={data}", "save_folder=x", "save_interval=2ba"])
    half = tmp_path / "out/checkpoints" / run.name / "ep0-ba2-rank0.pt"
    half.parent.mkdir(parents=True)
    (tmp_path / "out/runs.csv").write_text(",".join(COLUMNS) + "\n")
    half.write_bytes(b"PK")
    (row,) = run_series([run], tmp_path / "out")
    assert row["status"] == "finished" and half.stat().st_size > 2


def test_a_run_that_ended_after_compare_was_killed_is_not_trained_again(tmp_path, data, capsys):
    """Its log has the held-out loss of the last step. Without that loss the trainer is started, which ends at once."""
    (run,) = make(tmp_path / "out", overrides=[f"variables.data={data}"])
    run = replace(run, command=(sys.executable, "-c", "raise SystemExit(3)"))
    steps = {
        step: {"loss/train/total": 5.0 - step, "time/batch": step, "time/token": 128.0 * step, "time/train": step}
        for step in range(BATCHES + 1)
    }
    del steps[BATCHES]["loss/train/total"]
    record(tmp_path / "log", run.name, steps)
    (tmp_path / "out/tensorboard").mkdir(parents=True)
    (tmp_path / "out/runs.csv").write_text(",".join(COLUMNS) + "\n")
    shutil.copytree(tmp_path / "log" / run.name, tmp_path / "out/tensorboard" / run.name)
    (failed,) = run_series([run], tmp_path / "out")
    assert failed["status"] == "failed" and "failed (exit code 3)" in capsys.readouterr().out
    record(tmp_path / "log", run.name, {BATCHES: {run.held_out: 2.5}})
    shutil.copytree(tmp_path / "log" / run.name, tmp_path / "out/tensorboard" / run.name)
    (row,) = run_series([run], tmp_path / "out")
    assert row["status"] == "finished" and float(row["held_out_loss"]) == 2.5 and float(row["final_loss"]) == 3.5
    assert "finished after an earlier compare was killed, held-out loss 2.500" in capsys.readouterr().out
    assert row["commit"] == row["peak_memory_gb"] == ""
    assert "| **2.500** |" in (tmp_path / "out/table.md").read_text()


def test_a_run_that_turned_nan_has_diverged(tmp_path, data, capsys):
    """It is not repeated. The table counts it apart, and a finished run of the same method alone gives the means."""
    runs = make(tmp_path / "out", seeds=[1, 2], overrides=[f"variables.data={data}"])
    for run, loss in zip(runs, (math.nan, 4.0), strict=True):
        steps = {
            step: {"loss/train/total": loss, "time/batch": step, "time/token": 9.0 * step, "time/train": step}
            for step in range(BATCHES + 1)
        }
        record(tmp_path / "out/tensorboard", run.name, steps | {BATCHES: steps[BATCHES] | {run.held_out: loss}})
    (tmp_path / "out/runs.csv").write_text(",".join(COLUMNS) + "\n")
    diverged, finished = run_series(runs, tmp_path / "out")
    assert (diverged["status"], diverged["spikes"], finished["status"]) == ("diverged", "nan", "finished")
    assert f"{runs[0].name}: diverged after an earlier" in capsys.readouterr().out
    text = (tmp_path / "out/table.md").read_text()
    assert "| wesar | 1 (1 diverged) | **4.000** | **4.000** |" in text and f"- Diverged: {runs[0].name}.\n" in text
    arguments = ["compare", CONFIG, *TINY, f"variables.data={data}", "--methods", "wesar", "--seeds", "1,2", "--out"]
    shown = CliRunner().invoke(app, [*arguments, str(tmp_path / "out"), "--dry-run"])
    assert f"diverged: {runs[0].name}\n" in shown.output and "0 of 2 runs to do" in shown.output
    ended = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert ended.exit_code == 0 and "2 of 2 runs finished, 1 of them diverged, see" in ended.output


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_evaluation_goes_on(text_data, tmp_path):
    """Composer refuses to continue from that checkpoint. From the one before, the run ends with the same weights."""
    saves = [f"save_folder={tmp_path}", "save_interval=2ba", "save_overwrite=true", "autoresume=true"]
    whole = train(text_data, *saves).state.model.state_dict()
    with pytest.raises(ValueError, match="less than or equal to the elapsed training duration"):
        train(text_data, *saves)
    discard_end(tmp_path, "4ba")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ep0-ba2-rank0.pt", "latest-rank0.pt"]
    discard_end(tmp_path, "4ba")  # the run is not at its end now
    resumed = train(text_data, *saves).state.model.state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    (tmp_path / "ep0-ba2-rank0.pt").unlink()
    discard_end(tmp_path, "4ba")
    assert not list(tmp_path.iterdir())
