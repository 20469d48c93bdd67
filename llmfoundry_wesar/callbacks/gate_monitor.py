"""Log the gates of the layers or of the optimizer."""

import math
import warnings

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmfoundry_wesar.callbacks.role_monitor import RoleMonitor
from llmfoundry_wesar.optimizer import optimizer_gates
from llmfoundry_wesar.roles import by_role
from llmfoundry_wesar.sharded import Shard, module_path, named_shards, reparameterized_layers


class GateMonitor(RoleMonitor):
    """Log the gates that the forward passes of a due step used.

    +---------------------------+------------------------------------------------------------------+
    | Key                       | Logged data                                                      |
    +===========================+==================================================================+
    | ``gate/MODULE``           | α of a layer with a single gate, or of `WeSaRAdamW`              |
    +---------------------------+------------------------------------------------------------------+
    | ``gate/MODULE/mean``      | the mean of the gates of a layer with one for each row or column |
    +---------------------------+------------------------------------------------------------------+
    | ``gate/MODULE/min``       | the least of these gates                                         |
    +---------------------------+------------------------------------------------------------------+
    | ``gate/MODULE/max``       | the greatest of these gates                                      |
    +---------------------------+------------------------------------------------------------------+
    | ``role_gate/ROLE/min``    | the least α of the matrices of a role, in all blocks             |
    +---------------------------+------------------------------------------------------------------+
    | ``role_gate/ROLE/median`` | the median α of these matrices                                   |
    +---------------------------+------------------------------------------------------------------+
    | ``role_gate/ROLE/max``    | the greatest α of these matrices                                 |
    +---------------------------+------------------------------------------------------------------+

    MODULE is the plain module path and ROLE the name of its role, as in `UpdateRatioMonitor`. If a layer has a gate for
    each row or column, its role counts the mean of them. A value is logged at the number of steps done before the due
    step, so the initial gates are logged at 0. A due step costs one collective and one transfer to the host. Other
    steps cost nothing.

    Args:
        interval: A Composer time string: with "10ba" the steps 0, 10, 20, … are due.
        by_role: Whether to log the last three rows of the table.
        by_matrix: Whether to log the other rows.

    Raises:
        ValueError: If nothing is left to log, or `interval` is not a positive time.
    """

    quantity = "gate"

    def matrices(self, state: State) -> list[str]:
        """Return the module paths of the gates."""
        return list(_gates(state))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Add charts to the run, and warn if there is nothing to log."""
        super().fit_start(state, logger)
        if not _gates(state):
            warnings.warn("gate_monitor: the model has no gates, so none will be logged.", stacklevel=2)

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Log the gates of a due step. Under FSDP the parameters are sharded again by now."""
        if not self.due(state):
            return
        gates = _gates(state)
        if not gates:
            return
        parts = state.device.tensor_to_device(torch.stack([_summary(gate.local) for gate in gates.values()]))
        totals, minima, maxima = torch.stack(list(dist.all_gather(parts))).cpu().unbind(dim=-1)  # each (ranks, gates)
        summaries = zip(totals.sum(0).tolist(), minima.amin(0).tolist(), maxima.amax(0).tolist(), strict=True)
        metrics, means = {}, {}
        for (name, gate), (total, least, greatest) in zip(gates.items(), summaries, strict=True):
            means[name] = mean = total / (gate.replicas * gate.shape.numel())
            if gate.shape.numel() == 1:
                metrics[f"gate/{name}"] = mean
            else:
                metrics |= {f"gate/{name}/mean": mean, f"gate/{name}/min": least, f"gate/{name}/max": greatest}
        self.log(logger, metrics, by_role(means))


def _gates(state: State) -> dict[str, Shard]:
    """Return the gates by module path."""
    shards = named_shards(state.model)
    kept = optimizer_gates(state.optimizers)
    return {name: shards[f"{name}.gate"] for name in reparameterized_layers(state.model)} | {
        module_path(name): kept[shard.parameter] for name, shard in shards.items() if shard.parameter in kept
    }


def _summary(local: Tensor) -> Tensor:
    """Return the sum, the least and the greatest value of this rank's part of a gate, (3,) in float64."""
    total = local.sum(dtype=torch.float64)
    extremes = local.double().aminmax() if local.numel() > 0 else (total + math.inf, total - math.inf)
    return torch.stack([total, *extremes])
