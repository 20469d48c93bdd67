"""Log the update ratio of every matrix, measured on the real optimizer step."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from composer.core import State, Time
from composer.devices import Device
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.layers import Gated, Reparameterized
from llmfoundry_wesar.optimizer import WeSaRAdamW, optimizer_gates
from llmfoundry_wesar.sharded import (
    Shard,
    module_path,
    named_shards,
    reparameterized_layers,
    squares,
    sum_over_ranks,
    virtual_slices,
)

METRICS = ("update_ratio", "virtual_update_ratio", "weight_norm", "virtual_weight_norm", "grad_norm")


class UpdateRatioMonitor(IntervalCallback):
    """Log how much an optimizer step changes each matrix, relative to the matrix.

    It measures every trainable parameter of two or more dimensions, in any model. W is the parameter before the real
    step and W' after it, so clipping, schedule, parameter groups and loss scaling are included. V is the virtual weight
    (αW if there is a gate), and ‖·‖ the Euclidean norm of all elements. If `WeSaRAdamW` keeps the gate, the parameter
    is V, and W = V/α.

    +---------------------------------+------------------------------------------------------------------+
    | Key                             | Logged data                                                      |
    +=================================+==================================================================+
    | ``update_ratio/MODULE``         | ‖W' - W‖ / ‖W‖; 0 if W' = W, inf if W was 0 and changed          |
    +---------------------------------+------------------------------------------------------------------+
    | ``virtual_update_ratio/MODULE`` | ‖V' - V‖ / ‖V‖; 0 if V' = V, inf if V was 0 and changed          |
    +---------------------------------+------------------------------------------------------------------+
    | ``weight_norm/MODULE``          | ‖W‖                                                              |
    +---------------------------------+------------------------------------------------------------------+
    | ``virtual_weight_norm/MODULE``  | ‖V‖                                                              |
    +---------------------------------+------------------------------------------------------------------+
    | ``grad_norm/MODULE``            | ‖∂L/∂W‖ after clipping; 0 if there is no gradient                |
    +---------------------------------+------------------------------------------------------------------+

    MODULE is the plain module path, such as ``model.transformer.blocks.11.ffn.down_proj``. It is the same under DDP and
    FSDP. If the parameter is not called ``weight``, its name is added. Layers that are not reparameterised have no
    virtual metrics. A value is logged at the number of steps done, so the first is at 1.

    A due step costs one all-reduce, one transfer to the host and, for the update ratios, a copy of this rank's part of
    the matrices during the optimizer step. If a layer's virtual weight is not αW with a single α, its virtual metrics
    gather the matrix on each rank, before and after the step (`virtual_slices`). Other steps cost nothing.

    Args:
        interval: A Composer time string: with "10ba" the steps 0, 10, 20, … are due.
        metrics: The metrics of the table to log.
        include: A regular expression. Only modules whose path contains a match are measured.
        exclude: A regular expression. Modules whose path contains a match are not measured.

    Raises:
        ValueError: If an argument is invalid; at the start of training, if an expression matches no matrix or no matrix
            is left.
    """

    def __init__(
        self,
        interval: str | Time = "10ba",
        metrics: str | Sequence[str] = METRICS,
        include: str | None = None,
        exclude: str | None = None,
    ):
        super().__init__(interval)
        self.metrics = ensure_tuple(metrics)
        if not self.metrics or not set(self.metrics) <= set(METRICS):
            raise ValueError(f"metrics: {list(self.metrics)} is not a list of one or more of {', '.join(METRICS)}.")
        self.include = _compile("include", include)
        self.exclude = _compile("exclude", exclude)
        self._step: _Step | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check the expressions against the model."""
        names = [matrix.name for matrix in _matrices(state)]
        for key, pattern in (("include", self.include), ("exclude", self.exclude)):
            if pattern is not None and not any(map(pattern.search, names)):
                raise ValueError(f"{key}: {pattern.pattern!r} matches none of the matrices {', '.join(names)}.")
        if not any(map(self._selects, names)):
            raise ValueError("include, exclude: no trainable matrix is left for update_ratio_monitor.")

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Record the values before a due step. Algorithms have clipped the gradients by now."""
        if self.due(state):
            matrices = [matrix for matrix in _matrices(state) if self._selects(matrix.name)]
            self._step = _Step(matrices, self.metrics, state.optimizers) if matrices else None

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure and log the step."""
        if self._step is not None:
            logger.log_metrics(self._step.finish(state.device))
            self._step = None

    def _selects(self, name: str) -> bool:
        included = self.include is None or self.include.search(name) is not None
        return included and (self.exclude is None or self.exclude.search(name) is None)


def _compile(key: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error


class _Matrix(NamedTuple):
    name: str
    parameter: Shard
    gate: Shard | None  # if the virtual weight is αW with a single α
    is_virtual: bool  # whether the parameter is αW, because the optimizer has the gate
    layer: Reparameterized | None  # if the virtual weight is neither W nor αW with a single α


def _matrices(state: State) -> list[_Matrix]:
    """Return the trainable matrices of the model."""
    shards = named_shards(state.model)
    layers = reparameterized_layers(state.model)
    kept = optimizer_gates(state.optimizers)
    matrices = []
    for name, shard in shards.items():
        if not shard.parameter.requires_grad or len(shard.shape) < 2:
            continue
        path = module_path(name)
        layer = layers.get(path) if path != name else None
        gate = kept.get(shard.parameter)
        if isinstance(layer, Gated) and layer.gate_shape == "scalar":
            layer, gate = None, shards[f"{path}.gate"]
        matrices.append(_Matrix(path, shard, gate, shard.parameter in kept, layer))
    return matrices


class _Step:
    """Hold the values before one optimizer step. `finish` returns the metrics after it.

    Lists hold the parameters, then the virtual weights that have to be computed. The metrics of αW follow from ‖W‖,
    ‖ΔW‖, ⟨ΔW, W⟩ and α. If the parameter is V, the metrics of W = V/α follow in the same way.
    """

    def __init__(self, matrices: list[_Matrix], metrics: tuple[str, ...], optimizers: Sequence[Optimizer]):
        virtual = any(metric.startswith("virtual") for metric in metrics)
        self.metrics = metrics
        self.matrices = matrices
        self.optimizers = optimizers
        self.gates = [(i, m.gate) for i, m in enumerate(matrices) if m.gate and (virtual or m.is_virtual)]
        self.layers = [(i, m.layer) for i, m in enumerate(matrices) if virtual and m.layer is not None]
        parameters = self._parameters()
        self.addends = {"parameter": squares(parameters), "gate": self._gates()}
        if "grad_norm" in metrics:
            # Before the step, since an optimizer may overwrite gradients (SGD with Nesterov's momentum does).
            self.addends["grad"] = squares([matrix.parameter.local_grad for matrix in matrices])
        moves = any(metric.endswith("update_ratio") for metric in metrics)
        self.before = [part.to(_wide(part), copy=True) for part in parameters] if moves else None

    def _parameters(self) -> list[Tensor]:
        slices = virtual_slices([(layer, self.matrices[i].parameter.unit) for i, layer in self.layers])
        return [matrix.parameter.local for matrix in self.matrices] + slices

    def _gates(self) -> list[Tensor]:
        """Return this rank's addend to each scalar gate: its value, or 0 if the shard is empty."""
        return [gate.local.sum(dtype=_wide(gate.local)) for _, gate in self.gates]

    def finish(self, device: Device) -> dict[str, float]:
        """Return the metrics of the step by key. Call this after the step."""
        if self.before is not None:
            after = self._parameters()
            update = self.before
            torch._foreach_sub_(update, after)  # -ΔW, in the copy's memory  # pyright: ignore
            self.addends["update"] = squares(update)
            self.addends["inner"] = [torch.dot(_flat(update[i]), _flat(after[i])) for i, _ in self.gates]
            self.addends["gate_after"] = self._gates()
        # The factor by which WeSaRAdamW clips in its step. Other optimizers get clipped gradients.
        clipping = [o.clipping for o in self.optimizers if isinstance(o, WeSaRAdamW) and o.clipping is not None]
        self.addends["clipping"] = clipping
        sums = sum_over_ranks(self.addends, device)

        count = len(self.matrices)
        gated = torch.tensor([i for i, _ in self.gates], dtype=torch.long)
        is_virtual = torch.tensor([self.matrices[i].is_virtual for i, _ in self.gates], dtype=torch.bool)
        replicas = torch.tensor([m.parameter.replicas for m in self.matrices] + [1] * len(self.layers))
        gate_replicas = torch.tensor([gate.replicas for _, gate in self.gates])

        def factors(gates: Tensor) -> Tensor:
            """Return V/W if the parameters are W, and W/V if they are V."""
            gates = gates / gate_replicas
            return torch.where(is_virtual, 1 / gates, gates)

        square = sums["parameter"] / replicas
        factor = factors(sums["gate"])
        other_square = torch.cat([factor.square() * square[gated], square[count:]])
        values = {"weight_norm": (square[:count].sqrt(), other_square.sqrt())}
        if "update" in sums:
            update = sums["update"] / replicas
            inner = -sums["inner"] / replicas[gated] - update[gated]  # ⟨ΔW, W'⟩ - ‖ΔW‖² = ⟨ΔW, W⟩
            factor_after = factors(sums["gate_after"])
            move = factor_after - factor
            # ‖α'W' - αW‖² = ‖α'ΔW + (α' - α)W‖²
            moved = factor_after.square() * update[gated] + move.square() * square[gated]
            moved += 2 * factor_after * move * inner
            moved = torch.cat([moved.clamp(min=0), update[count:]])
            values["update_ratio"] = (_ratio(update[:count], square[:count]), _ratio(moved, other_square))

        names = [matrix.name for matrix in self.matrices]
        other_names = [names[i] for i in gated.tolist() + [i for i, _ in self.layers]]
        logged = {}
        for metric, (of_parameter, of_other) in values.items():
            actual = dict(zip(names, of_parameter.tolist(), strict=True))
            virtual = dict(zip(other_names, of_other.tolist(), strict=True))
            for i in gated[is_virtual].tolist():
                actual[names[i]], virtual[names[i]] = virtual[names[i]], actual[names[i]]
            logged |= {metric: actual, f"virtual_{metric}": virtual}
        if "grad" in sums:
            grad = (sums["grad"] / replicas[:count]).sqrt()
            grad[gated[is_virtual]] /= factor[is_virtual]  # ∂L/∂W = α·∂L/∂V
            if clipping:
                grad *= sums["clipping"] / dist.get_world_size()
            logged["grad_norm"] = dict(zip(names, grad.tolist(), strict=True))
        return {f"{metric}/{name}": value for metric in self.metrics for name, value in logged[metric].items()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten().to(_wide(tensor))


def _ratio(moved: Tensor, start: Tensor) -> Tensor:
    """Return √(moved / start), and 0 where `moved` is 0."""
    return (moved / start).sqrt().masked_fill(moved == 0, 0.0)
