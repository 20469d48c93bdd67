"""What both monitors log by role, against what they log by matrix."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from llmfoundry_wesar.callbacks import GateMonitor, UpdateRatioMonitor
from llmfoundry_wesar.callbacks.role_monitor import RoleMonitor
from tests.callbacks.training import MATRICES, SCALAR_GATED, VECTOR_GATED, regression, train

STATISTICS = {"min": np.min, "median": np.median, "max": np.max}
QUANTITIES = ("update_ratio", "gate")


def logged(*monitors: RoleMonitor) -> dict[str, dict[int, float]]:
    """Return what monitors log in a run, without the trainer's own metrics."""
    model = regression()
    metrics = train(model, torch.optim.AdamW(model.parameters(), lr=0.1), list(monitors))
    return {key: values for key, values in metrics.items() if key.split("/")[0].removeprefix("role_") in QUANTITIES}


def test_roles_have_the_range_of_their_matrices() -> None:
    """`up` and `down` are in both blocks. A layer with a gate for each row counts with the mean of its gates."""
    metrics = logged(UpdateRatioMonitor("2ba"), GateMonitor("2ba"))
    expected = {}
    for quantity, paths in zip(QUANTITIES, (MATRICES, SCALAR_GATED | VECTOR_GATED), strict=True):
        for role in {path.rpartition(".")[2] for path in paths}:
            keys = [f"{quantity}/{path}" for path in paths if path.endswith(f".{role}")]
            series = [metrics[key if key in metrics else f"{key}/mean"] for key in keys]
            assert len(series) == (2 if role in ("up", "down") else 1)
            for name, statistic in STATISTICS.items():
                expected[f"role_{quantity}/{role}/{name}"] = {
                    step: float(statistic([values[step] for values in series])) for step in series[0]
                }
    assert {key: values for key, values in metrics.items() if key.startswith("role_")} == expected
    assert expected["role_update_ratio/up/min"][3] < expected["role_update_ratio/up/max"][3]


def test_either_can_be_turned_off() -> None:
    both = logged(UpdateRatioMonitor("1ba"), GateMonitor("1ba"))
    roles = {key: values for key, values in both.items() if key.startswith("role_")}
    assert logged(UpdateRatioMonitor("1ba", by_matrix=False), GateMonitor("1ba", by_matrix=False)) == roles
    matrices = {key: values for key, values in both.items() if key not in roles}
    assert logged(UpdateRatioMonitor("1ba", by_role=False), GateMonitor("1ba", by_role=False)) == matrices


@pytest.mark.parametrize(
    ("monitor", "arguments", "message"),
    [
        (
            GateMonitor,
            {"by_role": False, "by_matrix": False},
            "callbacks.gate_monitor: by_role: false and by_matrix: fal",
        ),
        (
            UpdateRatioMonitor,
            {"by_role": False, "by_matrix": False},
            "callbacks.update_ratio_monitor: by_role: false and",
        ),
        (
            UpdateRatioMonitor,
            {"by_matrix": False, "metrics": ["update_ratio", "grad_norm"]},
            "callbacks.update_ratio_monitor.metrics: ['update_ratio', 'grad_norm'] needs by_matrix: true",
        ),
    ],
)
def test_what_would_log_less_than_asked_is_refused(
    monitor: type[RoleMonitor], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        monitor(**arguments)
