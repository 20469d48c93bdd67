"""A callback that acts on the steps which an interval in Composer's time strings selects."""

import math

from composer.core import Callback, State, Time, Timestamp, TimeUnit


def _parse(interval: str | Time) -> Time:
    try:
        time = Time.from_input(interval)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"interval: {interval!r} is not a time such as '10ba', '1ep' or '1e6tok'.") from error
    if time.value <= 0:
        raise ValueError(f"interval: {interval!r} is not positive; leave the callback out to log nothing.")
    return time


def _one_step_back(now: Timestamp, batches_per_epoch: int | None) -> Timestamp:
    """The timestamp before the last step, supposing that all steps were of one size."""
    steps = now.batch.value
    new_epoch = now.batch_in_epoch.value == 0
    return now.copy(
        epoch=now.epoch.value - new_epoch,
        batch=steps - 1,
        batch_in_epoch=(batches_per_epoch or 1) - 1 if new_epoch else now.batch_in_epoch.value - 1,
        sample=now.sample.value * (steps - 1) // steps,
        token=now.token.value * (steps - 1) // steps,
        total_wct=now.total_wct - now.batch_wct,
    )


class IntervalCallback(Callback):
    """Knows which training steps are due: the first, and each one before which a multiple of the interval was passed.

    With "10ba" these are the steps 0, 10, 20, …, with "1ep" the first one of each epoch. No state goes into
    checkpoints, since a sharded one that was saved without this callback could then not be loaded with it. A resumed
    run has the due steps of an uninterrupted one if the step before was of the run's usual size.

    Args:
        interval: A positive time in Composer's units: ba, ep, sp, tok, sec, or dur for a part of the training.

    Raises:
        ValueError: If `interval` is not such a time.
    """

    def __init__(self, interval: str | Time = "10ba"):
        self.interval = _parse(interval)
        self._passed: int | None = None

    def due(self, state: State) -> bool:
        """Whether to measure the present step; True only once in it, and to be asked before the timestamp moves on."""
        previous, self._passed = self._passed, self._multiples(state, state.timestamp)
        if previous is None and state.timestamp.batch.value > 0:
            batches_per_epoch = None if state.dataloader_len is None else state.dataloader_len.value
            previous = self._multiples(state, _one_step_back(state.timestamp, batches_per_epoch))
        return self._passed != previous

    def _multiples(self, state: State, timestamp: Timestamp) -> int:
        """How many multiples of the interval lie between the start of training and `timestamp`."""
        unit, length = self.interval.unit, self.interval.value
        if unit == TimeUnit.DURATION:
            assert state.max_duration is not None  # set while training
            unit, length = state.max_duration.unit, state.max_duration.value * length
        elapsed = timestamp.get(unit).value
        if unit == TimeUnit.EPOCH and state.dataloader_len is not None:
            elapsed += timestamp.batch_in_epoch.value / state.dataloader_len.value
        # 0.07 of 100 steps are 7.000000000000001.
        return math.floor(elapsed / length + 1e-9)
