"""The recorder keeps what the monitors log, writes it when the loss jumps, and names an injected cause first."""

import argparse
import csv
import doctest
import inspect
import math
import os
import socket
import sys
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, DataSpec, Event, Logger, State
from composer.callbacks import LRMonitor
from composer.optim import LinearWithWarmupScheduler
from llmfoundry.command_utils import train_from_yaml
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from llmfoundry_wesar.callbacks import GateMonitor, SpikeRecorder, UpdateRatioMonitor
from llmfoundry_wesar.cli import app
from llmfoundry_wesar.data.shards import prepare
from llmfoundry_wesar.spikes import Record, cause, find_reports, jumped, moves
from tests.callbacks.training import BATCH, MATRICES, SCALAR_GATED, Metrics, Pictures, PlainNet, fit, regression, train
from tests.tiny import build

STEPS, SPIKE = 70, 50


class Inject(Callback):
    """Change something at the given event of one step, before the callbacks that follow in the list."""

    def __init__(self, event: Event, step: int, change: Any):
        self.event, self.step, self.change = event, step, change

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == self.event and state.timestamp.batch.value == self.step:
            self.change(state)


def explode(state: State) -> None:
    """Multiply one matrix's gradient by 2000, as a wrong kernel might."""
    state.model.net.row.weight.grad *= 2000


def repeat(state: State) -> None:
    """Make a batch of one repeated token, with targets far from the usual ones."""
    ids, targets = state.batch
    state.batch = (torch.zeros_like(ids), targets + 10)


def spoil(state: State) -> None:
    """Make the loss of this step NaN."""
    ids, targets = state.batch
    state.batch = (ids, targets * math.nan)


def record(folder: Path, *injected: Callback, net: Any = None, steps: int = STEPS, **options: Any) -> dict:
    """Train with a recorder, and return what was logged."""
    torch.manual_seed(0)
    model = regression(net) if net else regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = SpikeRecorder(folder=str(folder), **{"window": 40, "after": 10, "nats": 0.2} | options)
    return train(model, optimizer, [*injected, recorder], steps)


def rows(folder: Path) -> dict[tuple[int, str], dict[str, str]]:
    with (folder / "matrices.csv").open(newline="") as file:
        return {(int(row["step"]), row["matrix"]): row for row in csv.DictReader(file)}


def test_it_holds_what_the_monitors_log_and_names_the_exploded_matrix_first(tmp_path):
    """The gradient of step 50 is wrong, so the loss of step 51 jumps."""
    monitors = [UpdateRatioMonitor("1ba", ["update_ratio", "grad_norm"]), GateMonitor("1ba")]
    logged = record(tmp_path, Inject(Event.AFTER_TRAIN_BATCH, SPIKE, explode), *monitors)
    [folder] = tmp_path.iterdir()
    assert folder.name == str(SPIKE + 1)
    found = rows(folder)
    assert found.keys() == {(step, name) for step in range(SPIKE + 1 - 40, SPIKE + 12) for name in MATRICES}
    for (step, name), row in found.items():
        # The monitor logs a step when it is done, and a gate before it.
        for quantity in ("update_ratio", "grad_norm"):
            assert float(row[quantity]) == pytest.approx(logged[f"{quantity}/{name}"][step + 1], rel=1e-6, nan_ok=True)
        if name in SCALAR_GATED:
            assert float(row["gate"]) == pytest.approx(logged[f"gate/{name}"][step], rel=1e-6, nan_ok=True)
        else:
            assert row["gate"] == ""
        assert float(row["loss"]) == pytest.approx(logged["loss/train/total"][step], rel=1e-6, nan_ok=True)
        assert float(row["learning_rate"]) == 0.02
    report = (folder / "report.md").read_text()
    before = np.median([logged["loss/train/total"][step] for step in range(SPIKE - 15, SPIKE + 1)])
    top = max(logged["loss/train/total"][step] for step in range(SPIKE + 1, SPIKE + 12))
    assert report.startswith(f"# Spike at step {SPIKE + 1}: loss {before:.3f} → {top:.3f}\n\nFirst to move: ")
    assert "First to move: `net.row`, update ratio × " in report and "1 step before the loss" in report
    assert f"samples {BATCH * (SPIKE + 1)} to {BATCH * (SPIKE + 2) - 1} of the training" in report
    assert (folder / "spike.png").read_bytes().startswith(b"\x89PNG")
    listed = CliRunner().invoke(app, ["spikes", str(tmp_path)])
    assert listed.exit_code == 0 and "First to move: net.row," in listed.output


def test_a_batch_that_breaks_the_loss_is_named_and_not_a_matrix(tmp_path):
    """One batch of a repeated token: the loss jumps in the same step, before any matrix has moved."""
    pictures, metrics = Pictures("spike"), Metrics()
    torch.manual_seed(0)
    model = regression(PlainNet)
    recorder = SpikeRecorder(folder=str(tmp_path), window=40, after=5, nats=0.2)
    inject = Inject(Event.AFTER_DATALOADER, SPIKE, repeat)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train(model, optimizer, [inject, recorder], STEPS, loggers=[pictures, metrics])
    [folder] = tmp_path.iterdir()
    report = (folder / "report.md").read_text()
    assert report.startswith(f"# Spike at step {SPIKE}: ")
    assert "No matrix left its usual range before the loss; look at the batch. In the loss's step `net." in report
    [picture] = pictures.logged.values()
    assert picture.ndim == 3 and picture.dtype == np.uint8
    assert len(metrics.metrics["loss/train/total"]) == STEPS


def test_a_loss_that_is_not_finite_is_one_spike_and_said_to_be_nan(tmp_path):
    record(tmp_path, Inject(Event.AFTER_DATALOADER, 20, spoil), steps=60)
    [folder] = tmp_path.iterdir()
    report = (folder / "report.md").read_text()
    assert folder.name == "20" and "→ nan\n" in report and "nan at step 20, which is not finite" in report


def test_no_more_than_the_most_are_written_and_those_of_earlier_processes_count(tmp_path, caplog):
    """Two jumps, of which one may be written, which is said; and one if another process has written one of two."""
    twice = [Inject(Event.AFTER_DATALOADER, step, repeat) for step in (30, 60)]
    record(tmp_path / "a", *twice, most=1)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["30"]
    assert caplog.text.count("no later spike is written. To see more, raise callbacks.spike_recorder.most.") == 1
    assert "so this run writes none" not in caplog.text
    record(tmp_path / "a", *twice, most=1)
    assert "a has at least 1 spikes, so this run writes none. Raise callbacks.spike_recorder.most, or" in caplog.text
    (tmp_path / "b/12").mkdir(parents=True)
    (tmp_path / "b/12/report.md").touch()
    record(tmp_path / "b", *twice, most=2)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["12", "30"]


def test_a_resumed_run_starts_with_an_empty_window_and_keeps_the_folders(tmp_path):
    """The first process writes a spike and stops after 40 steps; the second starts from its checkpoint."""
    checkpoint = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "40ba", "autoresume": True}
    options = {"run_name": "resumed", "max_duration": "40ba", **checkpoint}
    for duration, step in (("40ba", 30), ("70ba", 60)):
        inject = Inject(Event.AFTER_DATALOADER, step, repeat)
        recorder = SpikeRecorder(folder=str(tmp_path / "spikes-{run_name}"), window=40, after=5, nats=0.2)
        model = regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        train(model, optimizer, [inject, recorder], STEPS, **options | {"max_duration": duration})
    assert sorted(path.name for path in (tmp_path / "spikes-resumed").iterdir()) == ["30", "60"]
    assert {step for step, _ in rows(tmp_path / "spikes-resumed/60")} == set(range(40, 66))


def test_a_spike_near_the_end_and_a_measurement_at_an_interval(tmp_path):
    """The run ends before `after` steps; every second step is measured, and the loss is looked at in each."""
    record(tmp_path, Inject(Event.AFTER_DATALOADER, 67, repeat), interval="2ba")
    found = rows(tmp_path / "67")
    assert {step for step, _ in found} == set(range(28, 70, 2))


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("a", {"interval": "60ba"}, "at step 50; none of the 40 steps before was measured, so lower callbacks.spike_r"),
        ("file/spikes", {}, "The report is not written: "),
    ],
)
def test_a_spike_that_cannot_be_written_does_not_end_the_training(folder, options, words, tmp_path, caplog):
    """The steps 0 and 60 are measured, which are outside the window; or a file is where the folder should be."""
    (tmp_path / "file").touch()
    logged = record(tmp_path / folder, Inject(Event.AFTER_DATALOADER, SPIKE, repeat), **options)
    assert len(logged["loss/train/total"]) == STEPS
    assert words in caplog.text and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_jump_in_the_last_step_is_said_once_and_its_picture_is_logged(tmp_path, caplog):
    pictures = Pictures("spike")
    model = regression()
    recorder = SpikeRecorder(folder=str(tmp_path), window=20, after=5, nats=0.2)
    inject = Inject(Event.AFTER_DATALOADER, 29, repeat)
    train(model, torch.optim.SGD(model.parameters(), lr=0.02), [inject, recorder], 30, loggers=[pictures])
    assert [path.name for path in tmp_path.iterdir()] == ["29"]
    assert len(pictures.logged) == 1
    assert not any(step.addends.requires_grad for step in recorder._steps)  # else it would keep autograd's graphs
    assert [record.message.partition(":")[0] for record in caplog.records].count("spike_recorder") == 1


def test_tokens_and_learning_rates_are_those_of_their_steps(tmp_path):
    """The loss of step 3 is NaN. A schedule changes the learning rate after each step but the first."""
    ids = torch.randint(97, (6, 2, 16), generator=torch.Generator().manual_seed(2))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids.flatten(0, 1)], batch_size=2)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    inject = Inject(Event.BATCH_START, 3, lambda state: state.model.model.lm_head.weight.data.fill_(math.nan))
    callbacks = [inject, LRMonitor(), SpikeRecorder(folder=str(tmp_path), after=2)]
    logged = fit(model, optimizer, callbacks, DataSpec(loader), schedulers=LinearWithWarmupScheduler("2ba"))
    with (tmp_path / "3/tokens.csv").open(newline="") as file:
        found = {(int(row["step"]), int(row["sequence"])): row["tokens"] for row in csv.DictReader(file)}
    assert found == {(step, i): " ".join(map(str, ids[step, i].tolist())) for step in (2, 3) for i in (0, 1)}
    rates = {step: float(row["learning_rate"]) for (step, _), row in rows(tmp_path / "3").items()}
    assert rates == pytest.approx({0: 0.0} | {step: logged["lr-SGD/group0"][step] for step in range(1, 6)})


def test_a_jump_is_above_the_usual_noise_and_above_the_given_nats():
    """By hand: losses 3 and 3.1 in turn have differences of ±0.1 and the median 3.05."""
    usual = [3.0, 3.1] * 20
    assert not jumped([*usual, 3.34], deviations=0, nats=0.3)
    assert jumped([*usual, 3.36], deviations=0, nats=0.3)
    assert not jumped([*usual, 3.54], deviations=5, nats=0.3)
    assert jumped([*usual, 3.56], deviations=5, nats=0.3)
    assert not jumped([*usual[:15], 9.0], deviations=5, nats=0.3)  # too few losses before
    assert jumped([3.0, math.nan], 5, 0.3) and jumped([3.0, math.inf], 5, 0.3)
    assert not jumped([3.0, math.nan, math.nan], 5, 0.3)


def test_spikes_that_came_before_do_not_hide_the_next():
    losses = [8.0 if step % 20 == 19 else 3 + 0.02 * math.sin(step) for step in range(200)]
    window = [(step, losses[max(0, step - 100) : step + 1]) for step in range(len(losses))]
    assert [step for step, recent in window if jumped(recent, 5, 0.3)] == list(range(19, 200, 20))


def test_moves_are_in_the_order_of_their_steps_and_those_that_grew_first():
    """By hand: values are 1 and 1.21 in turn, median 1.1, standard deviation of the logarithms log(1.1).

    So 6 of them are a factor of 1.1⁶ = 1.77, from 0.62 to 1.95. a is twice as large from 3 steps before the loss on, b
    halves and c is not finite in the step before, d stays inside, and e was outside but came back.
    """
    steps = np.arange(100)
    values = np.tile(np.where(steps % 2, 1.0, 1.21)[:, None], 5)
    values[87:90, 0], values[89, 1], values[89, 2], values[89, 3], values[80:88, 4] = 2.75, 0.55, 3.3, 1.9, 9
    nothing = np.full_like(values, np.nan)
    quantities = {"update_ratio": values, "grad_norm": np.where(values == 3.3, np.nan, values), "gate": nothing}
    losses = np.where(steps < 90, 3.0, 5.0)
    spike = Record(90, steps, losses, np.ones(100), steps, ["a", "b", "c", "d", "e"], quantities, "")
    assert [(move.matrix, move.before) for move in moves(spike)] == [("a", 3), ("c", 1), ("b", 1)]
    assert [move.factor for move in moves(spike)] == pytest.approx([2.5, math.inf, 0.5])
    assert moves(spike)[1].quantity == "grad_norm"  # it is not finite


@pytest.mark.parametrize(("rate", "sentence"), [(1.0, "`a` × 3.52 since step 45."), (1.02, "look at the batch.")])
def test_a_slow_growth_is_told_from_that_of_the_learning_rate(rate, sentence):
    """By hand: a grows by 2% a step, from a median of 1.02²² in steps 0 to 44 to one of 1.02^85.5 in steps 82 to 89."""
    steps = np.arange(100)
    values = np.stack([1.02**steps, np.ones(100)], axis=1)
    quantities = {"update_ratio": values, "grad_norm": np.ones_like(values), "gate": np.full_like(values, np.nan)}
    spike = Record(90, steps, np.where(steps < 90, 3.0, 5.0), rate**steps, steps, ["a", "b"], quantities, "")
    assert moves(spike) == []
    assert cause(spike).endswith(sentence)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="it is known to spike on the modules of Python 3.11 only")
def test_the_committed_config_spikes_and_its_matrices_moved_before(tmp_path):
    """AdamW makes this spike, nothing is injected. At β₂ = 0.95 there is none."""
    modules = (argparse, doctest, inspect, os, socket, tarfile, typing)
    (tmp_path / "text.txt").write_text("\n".join(Path(str(module.__file__)).read_text() for module in modules))
    prepare(tmp_path / "data", [tmp_path / "text.txt"], sequence_length=64, vocab_size=4096, val_fraction=0)
    small = ["model.d_model=32", "model.n_layers=2", "max_duration=400ba", "loggers=null", "log_to_console=false"]
    for beta in (0.95, 0.99):
        folder = tmp_path / str(beta)
        own = [f"variables.data={tmp_path / 'data'}", f"callbacks.spike_recorder.folder={folder}"]
        train_from_yaml("yamls/spike.yaml", [*small, *own, "seed=1", f"optimizer.betas=[0.9,{beta}]"]).close()
    assert not (tmp_path / "0.95").exists() or not list((tmp_path / "0.95").iterdir())
    report = find_reports(tmp_path / "0.99")[0].read_text()
    assert "First to move: `model." in report or "update ratios had grown before the loss: `model." in report


def freeze(state: State) -> None:
    for parameter in state.model.parameters():
        parameter.requires_grad_(parameter.ndim < 2)


def test_a_model_without_a_trained_matrix_is_refused_and_one_that_is_frozen_later_goes_on(tmp_path):
    assert record(tmp_path, Inject(Event.BATCH_START, 3, freeze), steps=6)["loss/train/total"]
    with pytest.raises(ValueError, match=r"callbacks.spike_recorder: no matrix is trained.*; remove it"):
        record(tmp_path, Inject(Event.FIT_START, 0, freeze))


OPTIONS = [{"window": 0}, {"after": -1}, {"most": 2.5}, {"nats": "much"}, {"deviations": -1}, {"folder": "s3://b/c"}]
OPTIONS += [{"folder": 5}]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_option_is_refused_with_its_key(option):
    [(key, value)] = option.items()
    with pytest.raises(ValueError, match=rf"callbacks\.spike_recorder\.{key}: {value!r} is "):
        SpikeRecorder(**option)
