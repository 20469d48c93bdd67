"""Update ratios against full copies of the model in float64, taken before and after the same optimizer steps."""

import copy
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Logger, State
from composer.algorithms import GradientClipping
from composer.optim import CosineAnnealingScheduler, DecoupledAdamW
from llmfoundry.utils.builders import build_callback
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW, Optimizer

from llmfoundry_wesar.callbacks import UpdateRatioMonitor
from llmfoundry_wesar.callbacks.update_ratio_monitor import METRICS
from llmfoundry_wesar.figures import Network, draw_heat, pixels
from llmfoundry_wesar.layers import Reparameterized
from llmfoundry_wesar.roles import by_role
from tests.callbacks.training import (
    MATRICES,
    SCALAR_GATED,
    STEPS,
    VECTOR_GATED,
    Net,
    Pictures,
    Watched,
    regression,
    train,
)


class Copies(Callback):
    """Computes the metrics from a copy of the whole model before each step, with every virtual weight formed."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int, float]] = {}
        self.grad_norm: list[float] = []
        self.lr: list[float] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.before = copy.deepcopy(state.model).double()
        self.grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone().to_dense().double()
            for name, p in state.model.named_parameters()
        }
        self.lr.append(state.optimizers[0].param_groups[0]["lr"])
        self.grad_norm.append(math.hypot(*(grad.norm().item() for grad in self.grads.values())))

    def batch_end(self, state: State, logger: Logger) -> None:
        after = copy.deepcopy(state.model).double()
        for name, parameter in self.before.named_parameters():
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            path = name.removesuffix(".weight")
            self._note("grad_norm", path, self.grads[name].norm(), state)
            self._norms("", path, parameter, after.get_parameter(name), state)
        for name, layer in self.before.named_modules():
            if isinstance(layer, Reparameterized):
                new = after.get_submodule(name)
                assert isinstance(new, Reparameterized)
                self._norms("virtual_", name, layer.virtual_weight(), new.virtual_weight(), state)

    def _norms(self, kind: str, name: str, old: torch.Tensor, new: torch.Tensor, state: State) -> None:
        self._note(f"{kind}weight_norm", name, old.norm(), state)
        self._note(f"{kind}update_ratio", name, (new - old).norm() / old.norm(), state)

    def _note(self, metric: str, name: str, value: torch.Tensor, state: State) -> None:
        self.metrics.setdefault(f"{metric}/{name}", {})[state.timestamp.batch.value] = value.item()


def monitored(model: Any, optimizer: Optimizer, *callbacks: Callback, **trainer: Any) -> dict[str, dict[int, float]]:
    """Return what the monitor logs of the matrices if it measures everything in every step."""
    logged = train(model, optimizer, [UpdateRatioMonitor("1ba", METRICS), *callbacks], **trainer)
    return {key: values for key, values in logged.items() if key.split("/")[0] in METRICS}


def agrees(measured: dict[str, dict[int, float]], copies: Copies, tolerance: float = 1e-5) -> bool:
    """Check that keys, steps and values agree.

    Norms of up to 78 elements in float32 have rounding errors of about 1e-7. ‖W'−W‖ is about 1e-2 ‖W‖, so its error is
    a hundred times as large.
    """
    assert measured.keys() == copies.metrics.keys()
    for key, values in copies.metrics.items():
        assert measured[key] == pytest.approx(values, rel=tolerance), key
    return True


def _sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def _nesterov(model: nn.Module) -> Optimizer:
    # Overwrites the gradients with the direction of its step.
    return SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)


def _adamw_with_two_groups(model: nn.Module) -> Optimizer:
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("gate")]
    return AdamW([{"params": others}, {"params": gates, "lr": 0.1, "weight_decay": 0.0}], lr=0.01, weight_decay=0.5)


def _decoupled_adamw(model: nn.Module) -> Optimizer:
    return DecoupledAdamW(model.parameters(), lr=0.01, weight_decay=1e-2)


@pytest.mark.parametrize("optimizer", [_sgd, _nesterov, _adamw_with_two_groups, _decoupled_adamw])
def test_metrics_are_those_of_full_copies(optimizer: Any) -> None:
    model = regression()
    copies = Copies()
    assert agrees(monitored(model, optimizer(model), copies), copies)
    assert {key.partition("/")[2] for key in copies.metrics} == MATRICES


def test_clipped_gradients_under_a_moving_schedule() -> None:
    """For plain SGD the update ratio is lr·‖g‖/‖W‖, with the clipped gradient and learning rate of the same step."""
    model = regression()
    copies = Copies()
    measured = monitored(
        model,
        SGD(model.parameters(), lr=0.1),
        copies,
        algorithms=[GradientClipping("norm", clipping_threshold=0.5)],
        schedulers=CosineAnnealingScheduler(),
    )
    assert copies.grad_norm == pytest.approx([0.5] * STEPS, rel=1e-4)
    assert agrees(measured, copies)
    assert copies.lr[0] == 0.1 and copies.lr[-1] < 0.06
    for step, lr in enumerate(copies.lr, start=1):
        for name in MATRICES:
            gradient, weight = (measured[f"{metric}/{name}"][step] for metric in ("grad_norm", "weight_norm"))
            # Rounding W' to float32 gives an error of 3e-8 ‖W‖. The updates are 1e-4 ‖W‖ or more.
            assert measured[f"update_ratio/{name}"][step] == pytest.approx(lr * gradient / weight, rel=1e-3)


def test_bfloat16_parameters_are_summed_in_float32() -> None:
    """Differences of neighbouring bfloat16 values are exact. Sums of squares in bfloat16 would be wrong by 1e-2.

    Virtual weights are not rounded to bfloat16, as they are in the forward pass: that would change these ratios by 20%.
    """
    model = regression().bfloat16()
    copies = Copies()
    assert agrees(monitored(model, SGD(model.parameters(), lr=0.1), copies), copies)


class SkipsOddSteps(SGD):
    """Skips odd steps, as a gradient scaler skips a step after an overflow."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()  # where Composer's trainer runs the forward and backward passes
        self.calls += 1
        if self.calls % 2 == 1:
            super().step()
        return loss


def test_skipped_step_has_ratio_zero() -> None:
    model = regression()
    measured = monitored(model, SkipsOddSteps(model.parameters(), lr=0.1))
    for key, values in measured.items():
        if "update_ratio" in key:
            assert values[1] > 0 and values[2] == 0 and values[3] > 0 and values[4] == 0, key


class Rescaling(SGD):
    """Moves a factor from the gates to the weights, another factor in each step."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            factor = 1 + loss
            for parameter in self.param_groups[0]["params"]:
                parameter *= 1 / factor if parameter.shape == (1,) else factor
        return loss


def test_virtual_weight_that_stands_still() -> None:
    """αW stays while α and W move.

    Its update is the root of a difference of sums with errors of 1e-7, so 3e-4 is allowed.
    """
    model = regression()
    layers = [model.get_submodule(name) for name in sorted(SCALAR_GATED)]
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.gate)]
    measured = monitored(model, Rescaling(parameters, lr=0.1))
    for name in SCALAR_GATED:
        assert min(measured[f"update_ratio/{name}"].values()) > 0.1
        assert all(0 <= ratio < 1e-3 for ratio in measured[f"virtual_update_ratio/{name}"].values())


class Oddities(nn.Module):
    """Matrices that are zero, do not move, or have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.sparse = nn.Embedding(11, 6, sparse=True)
        self.dead = nn.Parameter(torch.zeros(6, 6))
        self.broken = nn.Parameter(torch.full((6, 6), math.nan))
        nn.init.zeros_(self.zero.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.sparse(ids))
        broken = (x.detach() @ self.broken).sum() * torch.zeros(())
        return (x + self.zero(x) + x @ self.dead.square())[:, :3] + broken.nan_to_num()


def test_zeros_nan_frozen_unused_and_sparse() -> None:
    model = regression(Oddities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = monitored(model, SGD(model.parameters(), lr=0.1))
    (message,) = [str(w.message) for w in caught if "NaN for the first time" in str(w.message)]
    assert "update_ratio_monitor: NaN for the first time, in update_ratio/net.broken, weight_norm/net.broken" in message
    assert not any("frozen" in key for key in measured)
    assert measured["weight_norm/net.zero"][1] == 0
    assert measured["update_ratio/net.zero"][1] == math.inf
    assert 0 < measured["update_ratio/net.zero"][2] < math.inf
    assert set(measured["update_ratio/net.dead"].values()) == {0}  # 0/0: its gradient is 0 too
    assert set(measured["grad_norm/net.unused"].values()) == set(measured["update_ratio/net.unused"].values()) == {0}
    for metric in ("update_ratio", "weight_norm"):
        assert all(map(math.isnan, measured[f"{metric}/net.broken"].values()))
    # The gradient of a row that occurs twice has two parts. Plain SGD moves by lr times their sum.
    for step in range(1, STEPS + 1):
        ratio, gradient, weight = (
            measured[f"{m}/net.sparse"][step] for m in ("update_ratio", "grad_norm", "weight_norm")
        )
        assert 0 < ratio == pytest.approx(0.1 * gradient / weight, rel=1e-4)


def test_nothing_happens_on_other_steps() -> None:
    model = regression()
    watched = Watched(UpdateRatioMonitor("3ba", METRICS))
    train(model, _sgd(model), [watched])
    operations = {event: operations for event, operations in watched.operations.items() if operations}
    assert set(operations) == {("after_train_batch", 0), ("batch_end", 1), ("after_train_batch", 3), ("batch_end", 4)}
    # A due step reads all values in one transfer. Each value on its own would wait for a GPU.
    assert not any("aten::_local_scalar_dense" in names for names in operations.values())


def test_snapshot_only_for_update_ratios() -> None:
    """Other metrics need no copy of the weights, and scalar gates need no virtual weight."""
    copied = {}
    for metrics in (METRICS, ("weight_norm", "virtual_weight_norm", "grad_norm")):
        model = regression()
        watched = Watched(UpdateRatioMonitor("1ba", metrics, include="embedding|blocks"))
        train(model, _sgd(model), [watched])
        copied[metrics] = watched.operations["after_train_batch", 1].count("aten::_to_copy")
    assert list(copied.values()) == [5, 0]


def test_a_picture_shows_what_was_logged_so_far() -> None:
    """In the middle of training and at its end; without an interval there is none."""
    model, pictures = regression(), Pictures()
    monitor = UpdateRatioMonitor("1ba", picture_interval="0.5dur")
    logged = train(model, _sgd(model), [monitor], loggers=[pictures], run_name="run")
    assert list(pictures.logged) == [2, 4]
    roles = by_role({name: 0.0 for name in MATRICES})
    for last, picture in pictures.logged.items():
        assert last is not None and picture.dtype == np.uint8
        keys = {role: [f"role_update_ratio/{role}/{statistic}" for statistic in roles[role]] for role in roles}
        ranges = {
            role: (np.arange(1, last + 1), np.array([[logged[key][i + 1] for i in range(last)] for key in keys[role]]))
            for role in roles
        }
        ratios = {name: logged[f"update_ratio/{name}"][last] for name in MATRICES}
        expected = draw_heat({"run": Network(f"update ratio at step {last}", ratios, ranges)})
        np.testing.assert_array_equal(picture, pixels(expected))
    train(model, _sgd(model), [UpdateRatioMonitor("1ba", picture_interval=None)], loggers=[none := Pictures()])
    assert not none.logged


def test_only_the_chosen_metrics_and_modules() -> None:
    model = regression()
    monitor = UpdateRatioMonitor("2ba", ["update_ratio", "virtual_weight_norm"], r"blocks\.\d|embedding", r"down$")
    logged = train(model, _sgd(model), [monitor])
    expected = {f"{metric}/{name}" for metric in monitor.metrics for name in SCALAR_GATED}
    assert {key for key in logged if "/net." in key} == expected
    assert all(list(logged[key]) == [1, 3] for key in expected)


def test_wrappers_leave_no_trace_in_names() -> None:
    model = regression()
    assert isinstance(model.net, Net)
    model.net.blocks[0] = checkpoint_wrapper(model.net.blocks[0])
    model.net.blocks[1] = torch.compile(model.net.blocks[1], backend="eager")  # pyright: ignore
    measured = monitored(model, _sgd(model))
    assert {key.partition("/")[2] for key in measured} == MATRICES
    assert {key.partition("/")[2] for key in measured if key.startswith("virtual")} == SCALAR_GATED | VECTOR_GATED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["update_ratios"]}, "metrics: ['update_ratios'] is not a list of one or more of update_ratio, "),
        ({"metrics": []}, "metrics: [] is not a list of one or more of"),
        ({"include": "("}, "include: '(' is not a regular expression"),
        ({"exclude": "*"}, "exclude: '*' is not a regular expression"),
        ({"interval": 10}, "interval: 10 is not a time"),
        (
            {"picture_interval": "0ba"},
            "monitor.picture_interval: '0ba' is not a positive time; to draw nothing, set it to null.",
        ),
    ],
)
def test_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        UpdateRatioMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "atn"}, "include: 'atn' matches none of the matrices net.offset, net.embedding"),
        ({"exclude": "atn"}, "exclude: 'atn' matches none of the matrices"),
        ({"include": "up", "exclude": "blocks"}, "no trainable matrix is left"),
    ],
)
def test_expression_that_fits_nothing_is_refused_before_training(arguments: dict[str, str], message: str) -> None:
    model = regression()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        train(model, _sgd(model), [UpdateRatioMonitor(**arguments)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_foundry_builds_it_from_yaml_arguments() -> None:
    monitor = build_callback("update_ratio_monitor", {"interval": "5ba", "metrics": "update_ratio", "include": "ffn"})
    assert isinstance(monitor, UpdateRatioMonitor)
    assert (str(monitor.interval), monitor.metrics) == ("5ba", ("update_ratio",))
