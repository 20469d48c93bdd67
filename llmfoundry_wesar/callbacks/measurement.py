"""Measure one optimizer step: the norm, the update and the gradient of every matrix."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry_wesar.layers import Gated, Reparameterized
from llmfoundry_wesar.optimizer import WeSaRAdamW, optimizer_gates
from llmfoundry_wesar.sharded import (
    Shard,
    module_path,
    named_shards,
    reparameterized_layers,
    squares,
    virtual_slices,
)

METRICS = ("update_ratio", "virtual_update_ratio", "weight_norm", "virtual_weight_norm", "grad_norm")


class Matrix(NamedTuple):
    """A trainable parameter of two or more dimensions.

    Attributes:
        name: The plain path of its module, with the parameter's own name if that is not ``weight``.
        parameter: The parameter.
        gate: α, if the virtual weight is αW with a single α.
        is_virtual: Whether the parameter is αW, because the optimizer has the gate.
        layer: The layer whose virtual weight is neither W nor αW with a single α.
    """

    name: str
    parameter: Shard
    gate: Shard | None
    is_virtual: bool
    layer: Reparameterized | None


def trainable_matrices(state: State) -> list[Matrix]:
    """Return the trainable matrices of the model in their order there."""
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
        matrices.append(Matrix(path, shard, gate, shard.parameter in kept, layer))
    return matrices


class StepMeasurement:
    """Measure the metrics of `UpdateRatioMonitor` in one optimizer step.

    Make it after the backward pass and before the step. Call `finish` after the step, and pass the sums of `addends`
    over all ranks to `metrics`. Nothing before `metrics` waits for the device.

    Lists hold the parameters, then the virtual weights that have to be computed. The metrics of αW follow from ‖W‖,
    ‖ΔW‖, ⟨ΔW, W⟩ and α. If the parameter is V, the metrics of W = V/α follow in the same way.

    Args:
        matrices: The matrices to measure.
        metrics: Names in `METRICS`.
        optimizers: The optimizers that make the step.

    Attributes:
        addends: This rank's addends by name, 0-dimensional.
    """

    def __init__(self, matrices: list[Matrix], metrics: tuple[str, ...], optimizers: Sequence[Optimizer]):
        virtual = any(metric.startswith("virtual") for metric in metrics)
        self.metric_names = metrics
        self.matrices = matrices
        self.optimizers = optimizers
        self.gates = [(i, m.gate) for i, m in enumerate(matrices) if m.gate and (virtual or m.is_virtual)]
        self.layers = [(i, m.layer) for i, m in enumerate(matrices) if virtual and m.layer is not None]
        parameters = self._parameters()
        self.addends: dict[str, list[Tensor]] = {"parameter": squares(parameters), "gate": self._gates()}
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

    def finish(self) -> None:
        """Add the values after the step, and free the copies of the values before it."""
        if self.before is not None:
            after = self._parameters()
            update, self.before = self.before, None
            torch._foreach_sub_(update, after)  # -ΔW, in the copy's memory  # pyright: ignore
            self.addends["update"] = squares(update)
            self.addends["inner"] = [torch.dot(_flat(update[i]), _flat(after[i])) for i, _ in self.gates]
            self.addends["gate_after"] = self._gates()
        # The factor by which WeSaRAdamW clips in its step. Other optimizers get clipped gradients.
        clipping = [o.clipping for o in self.optimizers if isinstance(o, WeSaRAdamW) and o.clipping is not None]
        self.addends["clipping"] = clipping

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics by key.

        Args:
            sums: The sum over ranks of each of the addends by name, 1-D, in float64 and on the host.
        """
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
            if len(sums["clipping"]):
                grad *= sums["clipping"] / dist.get_world_size()
            logged["grad_norm"] = dict(zip(names, grad.tolist(), strict=True))
        return {f"{metric}/{name}": value for metric in self.metric_names for name, value in logged[metric].items()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten().to(_wide(tensor))


def _ratio(moved: Tensor, start: Tensor) -> Tensor:
    """Return √(moved / start), and 0 where `moved` is 0."""
    return (moved / start).sqrt().masked_fill(moved == 0, 0.0)
