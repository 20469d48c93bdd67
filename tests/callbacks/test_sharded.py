"""The monitors on two processes, under each way to spread a model, against one process on the same batches."""

from collections import Counter
from typing import Any

import pytest
import torch
from composer.utils.parallelism import FSDP2Config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from llmfoundry_wesar.callbacks import GateMonitor, UpdateRatioMonitor
from tests.callbacks.training import MATRICES, SCALAR_GATED, VECTOR_GATED, Block, Watched, regression, train
from tests.distributed import launch

SPREADS = ("ddp", "fsdp2", "hsdp_replicated", "hsdp_sharded", "fsdp1")


def _monitored(spread: str) -> tuple[dict[str, dict[int, float]], dict[str, Counter[str]]]:
    """What the monitors log in a run, and the collectives of their second step."""
    model = regression()
    fsdp: Any = None
    if spread == "fsdp2":
        fsdp = {}
    elif spread.startswith("hsdp"):
        shape = (2, 1) if spread == "hsdp_replicated" else (1, 2)
        fsdp = FSDP2Config(device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    elif spread == "fsdp1":
        # Composer's own FSDP1 needs CUDA; torch's does not.
        policy = ModuleWrapPolicy({Block})
        model.net = FSDP1(model.net, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    watched = {"updates": Watched(UpdateRatioMonitor("1ba")), "gates": Watched(GateMonitor("1ba"))}
    logged = train(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        list(watched.values()),
        parallelism_config=None if fsdp is None else {"fsdp": fsdp},
    )
    metrics = {key: values for key, values in logged.items() if "/net." in key}
    collectives = {}
    for name, callback in watched.items():
        operations = callback.operations["after_train_batch", 1] + callback.operations["batch_end", 2]
        collectives[name] = Counter(
            operation for operation in operations if "c10d" in operation and "wait" not in operation
        )
    return metrics, collectives


def _flat_parameters() -> str:
    """The monitors' answer to FSDP1 without `use_orig_params`."""
    model = regression()
    model.net = FSDP1(model.net, use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), [UpdateRatioMonitor()])
    return str(error.value)


def _monitored_everywhere() -> dict[str, Any]:
    """All of it in one job: starting one takes longer than all runs."""
    return {spread: _monitored(spread) for spread in SPREADS} | {"flat": _flat_parameters()}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Any]]:
    return launch(_monitored_everywhere)


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[int, float]]:
    return _monitored("none")[0]


def test_names_are_plain_module_paths(one_process: dict[str, dict[int, float]]) -> None:
    gated = SCALAR_GATED | VECTOR_GATED
    expected = {f"{metric}/{name}" for metric in ("update_ratio", "weight_norm", "grad_norm") for name in MATRICES}
    expected |= {f"{metric}/{name}" for metric in ("virtual_update_ratio", "virtual_weight_norm") for name in gated}
    expected |= {f"gate/{name}" for name in SCALAR_GATED}
    expected |= {f"gate/{name}/{statistic}" for name in VECTOR_GATED for statistic in ("mean", "min", "max")}
    assert set(one_process) == expected


@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_log_what_one_does(spread: str, two_processes: list, one_process: dict) -> None:
    """Same keys, steps and values on both ranks; 1e-5 because gradients and squares are added up in another order."""
    for rank in two_processes:
        metrics, _ = rank[spread]
        assert metrics.keys() == one_process.keys()
        for key, values in one_process.items():
            assert metrics[key] == pytest.approx(values, rel=1e-5), key


@pytest.mark.parametrize("spread", SPREADS)
def test_a_step_costs_one_collective(spread: str, two_processes: list) -> None:
    """Besides it, the two layers with vector gates are gathered before and after the step, if they are sharded."""
    gathers = {
        "fsdp2": {"_c10d_functional::all_gather_into_tensor": 8},  # W and α of each
        "hsdp_sharded": {"_c10d_functional::all_gather_into_tensor": 8},
        "hsdp_replicated": {"_c10d_functional::all_gather_into_tensor": 8},
        "fsdp1": {"c10d::allgather_": 2},  # the unit that holds both
    }
    for rank in two_processes:
        _, collectives = rank[spread]
        assert collectives["updates"] == {"c10d::allreduce_": 1, **gathers.get(spread, {})}
        assert collectives["gates"] == {"c10d::allgather_": 1}


def test_fsdp1_without_original_parameters_is_refused(two_processes: list) -> None:
    assert "fsdp_config.use_orig_params: false" in two_processes[0]["flat"]
