"""Find the steps that are due at an interval, which is a Composer time string."""

import math
import re
from typing import Any

from composer.core import Callback, State, Time, Timestamp, TimeUnit


def parse_time(time: Any, key: str, unit: TimeUnit | None = None, example: str = "10ba") -> Time:
    """Read a time of a config.

    Args:
        time: The value.
        key: Its key, for the error.
        unit: The unit of a number without one; None to refuse it.
        example: A time that would be right, for the error.

    Raises:
        ValueError: If Composer does not take it as a time.
    """
    try:
        return Time.from_input(time, unit)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: {time!r} is not a time such as {example!r}, '1ep' or '1e6tok'.") from error


def _one_step_back(now: Timestamp, batches_per_epoch: int | None) -> Timestamp:
    """Return the timestamp before the last step, assuming that all steps had the same size."""
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


class Interval:
    """Find the training steps that are due: the first, and each step before which another interval has ended.

    With "10ba" the steps 0, 10, 20, … are due, with "1ep" the first step of each epoch. Checkpoints contain no state of
    the callback, because a sharded checkpoint that was saved without the callback could then not be loaded with it. A
    resumed run has the same due steps as an uninterrupted run, if the last step before it had the usual size.

    Args:
        interval: A positive time in Composer's units: ba, ep, sp, tok, sec, or dur for a fraction of the training.
        key: The key of the interval in a config, for errors.
        off: How to turn off what happens at the interval, for errors.

    Raises:
        ValueError: If `interval` is not such a time.
    """

    def __init__(self, interval: str | Time, key: str = "interval", off: str = "to log nothing, remove the callback"):
        self.time = parse_time(interval, key)
        if not 0 < self.time.value < math.inf:
            raise ValueError(f"{key}: {interval!r} is not a positive time; {off}.")
        self._passed: int | None = None

    def due(self, state: State) -> bool:
        """Return whether the current step is due. Call this once in each step, before the timestamp advances."""
        previous, self._passed = self._passed, self._multiples(state, state.timestamp)
        if previous is None and state.timestamp.batch.value > 0:
            batches_per_epoch = None if state.dataloader_len is None else state.dataloader_len.value
            previous = self._multiples(state, _one_step_back(state.timestamp, batches_per_epoch))
        return self._passed != previous

    def _multiples(self, state: State, timestamp: Timestamp) -> int:
        """Return the number of whole intervals between the start of training and `timestamp`."""
        unit, length = self.time.unit, self.time.value
        if unit == TimeUnit.DURATION:
            assert state.max_duration is not None  # set while training
            unit, length = state.max_duration.unit, state.max_duration.value * length
        elapsed = timestamp.get(unit).value
        if unit == TimeUnit.EPOCH and state.dataloader_len is not None:
            elapsed += timestamp.batch_in_epoch.value / state.dataloader_len.value
        # Allow for rounding errors: 0.07 × 100 steps are 7.000000000000001.
        return math.floor(elapsed / length + 1e-9)


class IntervalCallback(Callback):
    """The base class of callbacks that act at an interval.

    Args:
        interval: As for `Interval`.

    Raises:
        ValueError: As for `Interval`.
    """

    def __init__(self, interval: str | Time = "10ba"):
        self._interval = Interval(interval, self.key("interval"))
        self.interval = self._interval.time

    @classmethod
    def name(cls) -> str:
        """Return the callback's key in a config."""
        return re.sub("(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def key(cls, option: str) -> str:
        """Return the config's key of an option, `callbacks.NAME.OPTION`."""
        return f"callbacks.{cls.name()}.{option}"

    def due(self, state: State) -> bool:
        """Return whether the current step is due. Call this once in each step, before the timestamp advances."""
        return self._interval.due(state)
