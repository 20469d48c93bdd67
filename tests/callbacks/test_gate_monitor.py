"""The gate monitor on one process. `test_sharded` tests it on two."""

import pytest
import torch
from composer import Callback, Logger, State
from llmfoundry.utils.builders import build_callback
from torch import nn

from llmfoundry_wesar.callbacks import GateMonitor
from tests.callbacks.training import SCALAR_GATED, VECTOR_GATED, Watched, regression, train


class Gates(Callback):
    """Keeps the gates at the start of each step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, torch.Tensor]] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        for name in SCALAR_GATED | VECTOR_GATED:
            gate = state.model.get_parameter(f"{name}.gate").detach().clone()
            self.values.setdefault(name, {})[state.timestamp.batch.value] = gate


def test_gates_that_the_step_used_are_logged_exactly() -> None:
    model = regression()
    gates = Gates()
    logged = train(model, torch.optim.AdamW(model.parameters(), lr=0.1), [GateMonitor("2ba"), gates])
    for name in SCALAR_GATED:
        assert logged[f"gate/{name}"] == {step: gates.values[name][step].item() for step in (0, 2)}
        assert logged[f"gate/{name}"][0] != logged[f"gate/{name}"][2]
    for name in VECTOR_GATED:
        for step in (0, 2):
            gate = gates.values[name][step].double()
            assert logged[f"gate/{name}/mean"][step] == pytest.approx(gate.mean().item(), rel=1e-12)
            assert logged[f"gate/{name}/min"][step] == gate.min().item()
            assert logged[f"gate/{name}/max"][step] == gate.max().item()


def test_nothing_happens_on_other_steps() -> None:
    model = regression()
    watched = Watched(GateMonitor("3ba"))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [watched])
    operations = {event: operations for event, operations in watched.operations.items() if operations}
    assert set(operations) == {("after_train_batch", 0), ("after_train_batch", 3)}
    # A due step reads all values in one transfer. Each value on its own would wait for a GPU.
    assert not any("aten::_local_scalar_dense" in names for names in operations.values())


def test_model_without_gates_gets_one_warning_and_trains() -> None:
    model = regression(lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3)))
    with pytest.warns(UserWarning, match="gate_monitor: the model has no gates") as warnings:
        logged = train(model, torch.optim.SGD(model.parameters(), lr=0.1), [GateMonitor("1ba")])
    assert sum("gate_monitor" in str(warning.message) for warning in warnings) == 1
    assert not any(key.startswith("gate/") for key in logged)


def test_foundry_builds_it_from_yaml_arguments() -> None:
    monitor = build_callback("gate_monitor", {})
    assert isinstance(monitor, GateMonitor)
    assert str(monitor.interval) == "10ba"
