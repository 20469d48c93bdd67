"""Record what every matrix does around a spike of the loss."""

import csv
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import State, Time
from composer.loggers import Logger, TensorboardLogger
from composer.utils import dist, format_name_with_dist
from torch import Tensor

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.callbacks.measurement import StepMeasurement, trainable_matrices
from llmfoundry_wesar.export.folders import whole
from llmfoundry_wesar.figures import pixels
from llmfoundry_wesar.sharded import sum_over_ranks
from llmfoundry_wesar.spikes import FOLDER, JUMP_WINDOW, QUANTITIES, Record, cause, draw_spike, headline, jumped, write

log = logging.getLogger(__name__)

# The losses that the trainer logs: the cross-entropy if the loss has several terms, else the loss.
_LOSSES = ("loss/train/loss", "loss/train/total")


@dataclass
class _Step:
    """One step. The tensors stay on the device."""

    number: int
    loss: float
    learning_rate: float
    addends: Tensor | None  # this rank's, 1-D, in the order of the measurement's; None if the step was not due


@dataclass
class _Spike:
    """A spike whose steps are still being recorded."""

    step: int
    batch: str
    tokens: dict[int, Any]  # step → tokens of all ranks


class SpikeRecorder(IntervalCallback):
    """Keep the last steps of every matrix, and write them down when the loss jumps.

    Each step it measures the update ratio, the gradient norm and the gate of every trainable matrix, as
    `UpdateRatioMonitor` and `GateMonitor` do, in any model and with any optimizer. The values stay on the device: a
    step costs a copy of this rank's part of the matrices during the optimizer step, and neither a collective nor a
    transfer. The loss is the one that the trainer has already averaged over ranks and read.

    The loss jumps if it is above the median of the 16 losses before by more than `nats` and by more than `deviations`
    standard deviations of the differences between these losses; or if it is no longer finite. Then the folder
    ``<folder>/<step>`` is written, and again when `after` more steps have been recorded:

    - ``matrices.csv``: all values, a row for each step and matrix.
    - ``report.md``: the step, the losses, the learning rate, the batch, and the matrices in the order in which they
      left their usual range (`spikes.moves`).
    - ``spike.png``: the loss, and all matrices relative to their median before. It is logged as an image too.
    - ``tokens.csv``: the tokens of the spike's batch and of the one before, if batches have ``input_ids``.

    A checkpoint holds nothing of it. After a resumption it starts with an empty window, and keeps the folders that
    are there. What it cannot write, it says in a warning: the training goes on.

    Args:
        window: The number of steps to keep from before a spike.
        after: The number of steps to record after a spike. A jump within them belongs to the same spike.
        deviations: See above.
        nats: See above.
        most: The largest number of spikes to write in a run, those of earlier processes included.
        folder: Where to write, on a local disk; ``{run_name}`` is replaced, as in Composer's folders. By default
            ``spikes`` beside TensorBoard's event files, or in a folder with the run's name if there is no such logger.
        interval: Which steps to measure, as a Composer time string.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        window: int = 100,
        after: int = 20,
        deviations: float = 5.0,
        nats: float = 0.3,
        most: int = 10,
        folder: str | None = None,
        interval: str | Time = "1ba",
    ):
        super().__init__(interval)
        for key, value, least in (("window", window, 1), ("after", after, 0), ("most", most, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{self.key(key)}: {value!r} is not a whole number of at least {least}.")
        for key, value in (("deviations", deviations), ("nats", nats)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{self.key(key)}: {value!r} is not a number of at least 0.")
        if folder is not None and (not isinstance(folder, str) or "://" in folder):
            raise ValueError(f"{self.key('folder')}: {folder!r} is not the name of a local folder.")
        self.window, self.after, self.deviations, self.nats, self.most = window, after, deviations, nats, most
        self.folder = folder
        self._losses: deque[float] = deque(maxlen=JUMP_WINDOW + 1)
        self._steps: deque[_Step] = deque(maxlen=window + after + 1)
        self._batches: deque[tuple[int, Any]] = deque(maxlen=2)
        self._measurement: StepMeasurement | None = None  # of the last step that was due
        self._parts: dict[str, int] = {}  # the number of addends of each name
        self._rate, self._due = math.nan, False
        self._spike: _Spike | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the folder, and say so if it is already full.

        Raises:
            ValueError: If no matrix is trained.
        """
        if not trainable_matrices(state):
            raise ValueError(
                "callbacks.spike_recorder: no matrix is trained, so there is nothing to record; remove it."
            )
        if self.folder is None:
            logs = (d.log_dir for d in logger.destinations if isinstance(d, TensorboardLogger))
            self._path = Path(next(logs, None) or "", state.run_name, FOLDER)
        else:
            self._path = Path(format_name_with_dist(self.folder, state.run_name))
        if self._written() >= self.most and dist.get_global_rank() == 0:
            log.warning(
                "spike_recorder: %s has at least %d spikes, so this run writes none. Raise %s, or give another folder.",
                self._path,
                self.most,
                self.key("most"),
            )

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Record the values before the step."""
        self._rate = float(state.optimizers[0].param_groups[0]["lr"])
        matrices = trainable_matrices(state) if self.due(state) else []  # none if all were frozen since the start
        self._due = bool(matrices)
        if matrices:
            self._measurement = StepMeasurement(matrices, ("update_ratio", "grad_norm"), state.optimizers)
            # As `GateMonitor`: the gates that the forward passes used.
            self._measurement.addends["gates"] = [
                matrix.gate.local.sum() for matrix in self._measurement.matrices if matrix.gate is not None
            ]

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """Record the values after the step, and look at the loss."""
        number = state.timestamp.batch.value - 1
        loss = next((state.total_loss_dict[key] for key in _LOSSES if key in state.total_loss_dict), math.nan)
        addends = self._addends() if self._due else None
        self._steps.append(_Step(number, loss, self._rate, addends))
        self._batches.append((number, state.batch["input_ids"] if _has_tokens(state.batch) else None))
        self._losses.append(loss)
        if self._spike is not None:
            if number == self._spike.step + self.after:
                self._write(state, logger, last=True)
        elif jumped(self._losses, self.deviations, self.nats) and (written := self._written()) < self.most:
            if not any(step.addends is not None for step in self._since(number - self.window)):
                log.warning(
                    "spike_recorder: the loss jumps at step %d; none of the %d steps before was measured, so lower %s.",
                    number,
                    self.window,
                    self.key("interval"),
                )
                return
            self._spike = _Spike(number, _batch(state), self._tokens())
            self._write(state, logger, last=self.after == 0)
            if written == self.most - 1 and dist.get_global_rank() == 0:
                log.warning("spike_recorder: no later spike is written. To see more, raise %s.", self.key("most"))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write a spike shortly before the end again, with the steps after it."""
        if self._spike is not None:
            self._write(state, logger, last=True)

    def _since(self, first: int) -> list[_Step]:
        return [step for step in self._steps if step.number >= first]

    def _addends(self) -> Tensor:
        assert self._measurement is not None
        self._measurement.finish()
        parts = self._measurement.addends
        lengths = {name: len(part) for name, part in parts.items()}
        if lengths != self._parts:  # other matrices than before, such as after a layer was frozen
            self._steps.clear()
            self._parts = lengths
        return torch.stack([addend for part in parts.values() for addend in part])

    def _written(self) -> int:
        """Return the number of spikes in the folder, which only rank 0 may see."""
        count = [len([path for path in self._path.glob("*/report.md") if path.parent.name.isdecimal()])]
        dist.broadcast_object_list(count)
        return count[0]

    def _tokens(self) -> dict[int, Any]:
        """Return the tokens of the last steps on all ranks, (sequences, length)."""
        tokens = {}
        for number, batch in self._batches:
            if batch is not None:
                tokens[number] = [part for rank in dist.all_gather_object(batch.cpu().numpy()) for part in rank]
        return tokens

    def _write(self, state: State, logger: Logger, last: bool) -> None:
        """Write the folder on rank 0. The last time, with all steps after the spike, log the picture too."""
        assert self._spike is not None
        spike, self._spike = self._spike, None if last else self._spike
        record = self._record(state, spike)
        if dist.get_global_rank() != 0:
            return
        picture = draw_spike(record)
        try:
            with whole(self._path / str(spike.step), replace=True) as folder:
                folder.mkdir()
                write(record, folder, picture)
                if spike.tokens:
                    _write_tokens(folder / "tokens.csv", spike.tokens)
        except OSError as error:  # such as a full disk, which must not end a training of days
            log.warning("spike_recorder: %s. The report is not written: %s.", headline(record), error)
            return
        if last:
            logger.log_images(pixels(picture), name="spike", channels_last=True, use_table=False)
        else:
            log.warning("spike_recorder: %s. %s See %s.", headline(record), cause(record), self._path / str(spike.step))

    def _record(self, state: State, spike: _Spike) -> Record:
        """Sum over ranks what was kept, with one collective, and make it readable."""
        measurement = self._measurement
        assert measurement is not None
        steps = self._since(spike.step - self.window)
        measured = [i for i, step in enumerate(steps) if step.addends is not None]
        columns = torch.stack([step.addends for step in steps if step.addends is not None]).unbind(1)
        parts, start = {}, 0
        for name, length in self._parts.items():
            parts[name] = columns[start : start + length]
            start += length
        sums = sum_over_ranks(parts, state.device)  # each (addends, measured steps)
        names = [matrix.name for matrix in measurement.matrices]
        gates = [(i, m.gate.replicas) for i, m in enumerate(measurement.matrices) if m.gate is not None]
        values = {quantity: np.full((len(measured), len(names)), np.nan) for quantity in QUANTITIES}
        for row in range(len(measured)):
            metrics = measurement.metrics({name: part[:, row] for name, part in sums.items()})
            for quantity in ("update_ratio", "grad_norm"):
                values[quantity][row] = [metrics[f"{quantity}/{name}"] for name in names]
            for (i, replicas), total in zip(gates, sums["gates"][:, row].tolist(), strict=True):
                values["gate"][row, i] = total / replicas
        return Record(
            spike=spike.step,
            steps=np.array([step.number for step in steps]),
            losses=np.array([step.loss for step in steps]),
            learning_rates=np.array([step.learning_rate for step in steps]),
            measured=np.array(measured),
            matrices=names,
            values=values,
            batch=spike.batch,
        )


def _has_tokens(batch: Any) -> bool:
    return isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor)


def _batch(state: State) -> str:
    """Describe the batch of the step that has just ended."""
    before, now = state.previous_timestamp, state.timestamp
    assert before is not None
    text = f"samples {before.sample.value:,} to {now.sample.value - 1:,} of the training"
    if now.token.value > 0:
        text += f", tokens {before.token.value:,} to {now.token.value - 1:,}"
    text += f", in epoch {before.epoch.value}; all counted from 0."
    if _has_tokens(state.batch):
        text += " `tokens.csv` has the tokens of this batch and of the one before."
    return text


def _write_tokens(path: Path, tokens: dict[int, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "sequence", "tokens"])
        for step, sequences in tokens.items():
            writer.writerows((step, i, " ".join(map(str, sequence.tolist()))) for i, sequence in enumerate(sequences))
