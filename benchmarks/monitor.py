"""Measure what the monitors add to a training step: time, peak memory and host synchronisations."""

import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Event, State
from composer.callbacks import OptimizerMonitor
from composer.loggers import Logger
from llmfoundry import registry

from benchmarks.record import Recorder
from benchmarks.sizes import load, shape
from benchmarks.trainer import configure, decoupled, run_trainer, write_data
from llmfoundry_wesar.callbacks import SpikeRecorder, UpdateRatioMonitor
from llmfoundry_wesar.callbacks.measurement import METRICS

DUE, IDLE, NONE = "update_ratio_monitor, due step", "update_ratio_monitor, other step", "none"
SPIKES = "spike_recorder"
MONITORS = {
    NONE: Callback,
    DUE: partial(UpdateRatioMonitor, "1ba", METRICS),
    IDLE: partial(UpdateRatioMonitor, "1000000ba", METRICS),
    SPIKES: partial(SpikeRecorder, nats=1e9),  # never writes
    "optimizer_monitor": partial(OptimizerMonitor, batch_log_interval=1),
}
# optimizer_monitor measures more than gradient norms only with Composer's own optimizer.
_OPTIMIZERS: dict[str, Callable[[dict], dict]] = {"adamw, fused": dict, "decoupled_adamw": decoupled}
_UNITS = ("ms", "GiB at peak", "host synchronisations in a step")
_PAPER_BATCH = 2**20  # tokens
# Round 0 is a warm-up, round 1 counts synchronisations, and the later rounds are timed.
_COUNTED, _TIMED, _LAST = 1, 2, 8


class Alternate(Callback):
    """Runs one monitor in each batch, in turn, and takes the batch's readings.

    Rounds run A B C D and D C B A alternately. So all monitors are compared within one run, and a linear drift cancels.
    """

    def __init__(self, device: str, seconds: float):
        self.cuda, self.seconds = device == "cuda", seconds
        self.monitors = {variant: make() for variant, make in MONITORS.items()}
        self.readings: dict[tuple[str, str], list[float]] = defaultdict(list)  # by unit and variant

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            for monitor in self.monitors.values():
                monitor.run_event(event, state, logger)
        if event == Event.BATCH_START:
            self._begin(state.timestamp.batch.value)
        if event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END):
            self.monitors[self.active].run_event(event, state, logger)
        if event == Event.BATCH_END and self._end():
            state.stop_training()

    def _begin(self, batch: int) -> None:
        self.round, turn = divmod(batch, len(MONITORS))
        self.active = list(MONITORS)[turn if self.round % 2 == 0 else -1 - turn]
        self.round_ends = turn == len(MONITORS) - 1
        if self.round == _TIMED and turn == 0:
            self.deadline = time.monotonic() + self.seconds
        self.counting = ExitStack()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if self.round == _COUNTED:
                self.caught = self.counting.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                self.counting.callback(torch.cuda.set_sync_debug_mode, "default")
                torch.cuda.set_sync_debug_mode("warn")
        self.start = time.perf_counter()

    def _end(self) -> bool:
        """Take the batch's readings, and return whether it is the last batch."""
        self.counting.close()
        if self.cuda:
            torch.cuda.synchronize()
        elapsed, readings = time.perf_counter() - self.start, {}
        if self.round >= _TIMED:
            readings["ms"] = elapsed * 1e3
        if self.cuda and self.round >= _TIMED:
            readings["GiB at peak"] = torch.cuda.max_memory_allocated() / 2**30
        if self.cuda and self.round == _COUNTED:
            readings[_UNITS[2]] = sum("synchronizing" in str(warning.message) for warning in self.caught)
        for unit, reading in readings.items():
            self.readings[unit, self.active].append(reading)
        return self.round_ends and self.round >= _LAST and time.monotonic() > self.deadline


registry.callbacks.register("alternate", func=Alternate)


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size with each optimizer. Eager only, because no monitor is compiled."""
    for optimizer, change in {} if compiled else _OPTIMIZERS.items():
        callbacks = {"alternate": {"device": recorder.device, "seconds": seconds}}
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), load(size, "wesar"))
            config = configure(recorder, size, "wesar", Path(folder), callbacks)
            # The cost of a monitor does not depend on the batch, and one microbatch gives the most steps.
            config["global_train_batch_size"] = config["device_train_microbatch_size"]
            config["optimizer"] = change(config["optimizer"])
            recorder.about(suite="monitor", name=f"{size}, {optimizer}", dtype=recorder.dtype, compiled=False)
            recorder.about(shape=shape(config))
            state = run_trainer(config).state
        [readings] = [callback.readings for callback in state.callbacks if isinstance(callback, Alternate)]
        del state
        for unit in _UNITS:
            for variant in MONITORS:
                recorder.add(readings[unit, variant], readings[unit, NONE], variant=variant, unit=unit)
        none, due, idle, spikes = (np.array(readings["ms", variant]) for variant in (NONE, DUE, IDLE, SPIKES))
        steps = _PAPER_BATCH / (config["global_train_batch_size"] * config["max_seq_len"])
        shares = {
            "update_ratio_monitor, every step": due - none,
            "update_ratio_monitor, every 10th": (due + 9 * idle) / 10 - none,
            f"{SPIKES}, every step": spikes - none,
        }
        for variant, added in shares.items():
            percent = 100 * added / (np.median(none) * steps)
            note = f"derived: milliseconds added to one step, over {steps:g} steps as measured"
            recorder.add(percent, variant=variant, unit="% of a 1M-token step", note=note)
