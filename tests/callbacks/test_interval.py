"""Which steps are due, in real runs of Composer's trainer."""

import time
from pathlib import Path

import pytest
import torch
from composer import Event, Logger, State

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from tests.callbacks.training import BATCH, regression, train

EPOCH, STEPS = 5, 13
DUE = {
    "1ba": range(STEPS),
    "4ba": (0, 4, 8, 12),
    "5ba": (0, 5, 10),  # the last step of each epoch passes a multiple
    "20ba": (0,),
    "1ep": (0, 5, 10),
    "2ep": (0, 10),
    f"{3 * BATCH}sp": (0, 3, 6, 9, 12),
    f"{3 * BATCH - 1}sp": (0, 3, 6, 9, 12),  # steps 2, 5, 8 and 11 pass 35, 70, 105 and 140 samples
    f"{BATCH // 2}sp": range(STEPS),  # several multiples in a step
    f"{4 * BATCH}tok": (0, 4, 8, 12),
    "0.25dur": (0, 4, 7, 10),  # quarters of 13 steps: 3.25, 6.5, 9.75
    "0.1dur": (0, 2, 3, 4, 6, 7, 8, 10, 11, 12),
}


class Probe(IntervalCallback):
    """Keeps the due steps."""

    def __init__(self, interval: str):
        super().__init__(interval)
        self.steps: list[int] = []
        self.seconds: list[int] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_TRAIN_BATCH:
            self.seconds.append(int(state.timestamp.total_wct.total_seconds()))
            if self.due(state):
                self.steps.append(state.timestamp.batch.value)


def _run(max_duration: str = f"{STEPS}ba", **trainer) -> dict[str, list[int]]:
    probes = [Probe(interval) for interval in DUE]
    model = regression()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), probes, EPOCH, max_duration=max_duration, **trainer)
    return {interval: probe.steps for interval, probe in zip(DUE, probes, strict=True)}


def test_due_steps_are_those_after_a_multiple_of_the_interval() -> None:
    assert _run() == {interval: list(steps) for interval, steps in DUE.items()}


def test_resumed_run_has_the_due_steps_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """From checkpoints within an epoch and at its end, on a multiple of some intervals and next to it."""
    whole = _run(save_folder=str(tmp_path), save_filename="{batch}.pt", save_interval="1ba")
    for start in (3, 4, 5, 6, 10):
        resumed = _run(load_path=str(tmp_path / f"{start}.pt"))
        assert resumed == {interval: [step for step in steps if step >= start] for interval, steps in whole.items()}


def test_part_of_training_counted_in_epochs() -> None:
    """Two epochs of 5 steps. A part need not be whole epochs, and 0.6 is 3 × 0.2 in spite of float rounding."""
    due = _run("2ep")
    assert due["0.25dur"] == [0, 3, 5, 8]
    assert due["0.1dur"] == list(range(10))


def test_seconds_follow_the_trainers_clock() -> None:
    probe = Probe("1sec")
    model = regression()
    model.net.register_forward_hook(lambda *_: time.sleep(0.6))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [probe])
    expected = [step for step, now in enumerate(probe.seconds) if step == 0 or now != probe.seconds[step - 1]]
    assert probe.steps == expected
    assert 1 < len(expected) < len(probe.seconds)


@pytest.mark.parametrize("interval", ["ten", "10", "10batches", "1.5ba", "0ba", "-1ba", 10, None])
def test_bad_interval_is_refused(interval: str) -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.interval_callback\.interval: "):
        IntervalCallback(interval)
