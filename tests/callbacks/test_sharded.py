"""The monitors on two to four processes, each way to distribute a model, against one process on the same batches."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, Event
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from llmfoundry_wesar.callbacks import GateMonitor, OptimizerGates, SpikeRecorder, UpdateRatioMonitor
from llmfoundry_wesar.callbacks.update_ratio_monitor import METRICS
from llmfoundry_wesar.optimizer import WeSaRAdamW
from tests.callbacks.test_spike_recorder import Inject, repeat, rows
from tests.callbacks.training import (
    MATRICES,
    SCALAR_GATED,
    STEPS,
    VECTOR_GATED,
    VOCABULARY,
    Block,
    Net,
    Pictures,
    PlainNet,
    Regression,
    Watched,
    collectives,
    regression,
    train,
    watch_steps,
)
from tests.distributed import launch

NETS = (Net, PlainNet)  # gates in layers, gates in the optimizer
SPREADS = ("ddp", "fsdp2", "fsdp1", "no_shard")
# Two copies of a model that is sharded on two processes each, under FSDP1. torch 2.7's FSDP2 needs CUDA for it.
HYBRID = ("hybrid",)


def _monitored(spread: str, net: type[Net] = Net) -> tuple[dict[str, dict[int, float]], dict[str, Counter[str]]]:
    """Return what the monitors log in a run, and the collectives of their second step.

    SGD trains layers with gates. `WeSaRAdamW` trains plain ones and counts the collectives of its own steps.
    """
    model = regression(net)
    fsdp: Any = None
    if spread == "fsdp2":
        fsdp = {}
    elif spread in ("fsdp1", "no_shard", "hybrid"):
        # Composer's own FSDP1 needs CUDA, torch's does not.
        options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
        if spread == "no_shard":
            options |= {"sharding_strategy": ShardingStrategy.NO_SHARD}
        if spread == "hybrid":
            options |= {"sharding_strategy": ShardingStrategy.HYBRID_SHARD}
            options |= {"device_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}
        model.net = FSDP1(model.net, auto_wrap_policy=ModuleWrapPolicy({Block}), **options)
    ratios = UpdateRatioMonitor("1ba", METRICS, picture_interval="1dur" if net is Net else None)
    watched = {"updates": Watched(ratios), "gates": Watched(GateMonitor("1ba"))}
    callbacks: list[Callback] = [*watched.values()]
    if net is Net:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = WeSaRAdamW(model.parameters(), lr=0.01, weight_decay=0.1, sigma=0.1, max_norm=0.5)
        callbacks.append(OptimizerGates())
    steps = watch_steps(optimizer)
    pictures = Pictures()
    sharding = None if fsdp is None else {"fsdp": fsdp}
    logged = train(model, optimizer, callbacks, parallelism_config=sharding, loggers=[pictures])
    metrics = {key: values for key, values in logged.items() if "/net." in key or key.startswith(("role_", "loss/"))}
    found = {
        "step": collectives(steps[1]),
        "pictures": Counter(pictures.logged.keys()),
        "waits": Counter(set(steps[1]) & {"aten::_local_scalar_dense", "aten::nonzero"}),
    }
    for name, callback in watched.items():
        found[name] = collectives(callback.operations["after_train_batch", 1] + callback.operations["batch_end", 2])
    return metrics, found


def _monitored_by_each(spreads: tuple[str, ...]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    return {(net.__name__, spread): _monitored(spread, net)[0] for net in NETS for spread in spreads}


def _step_by_fsdp1(model: Regression, optimizer: WeSaRAdamW, steps: range) -> None:
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    for step in steps:
        ids = torch.arange(step, step + 4 * ranks) % VOCABULARY
        part = (ids[rank::ranks], torch.ones(4, 3))
        optimizer.zero_grad()
        model.loss(model(part), part).backward()
        optimizer.step()


def _saved_and_loaded_by_fsdp1() -> tuple[bool, int]:
    """Return whether a model continues equally from its whole state, and how many parameters are empty on this rank."""
    models, optimizers = [], []
    for _ in range(2):
        models.append(regression(PlainNet))
        policy = ModuleWrapPolicy({Block})
        models[-1].net = FSDP1(
            models[-1].net, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizers.append(WeSaRAdamW(models[-1].parameters(), lr=0.01, sigma=0.1, max_norm=0.5))
        optimizers[-1].bind(models[-1])
    _step_by_fsdp1(models[0], optimizers[0], range(3))
    options = StateDictOptions(full_state_dict=True)
    weights, state = copy.deepcopy(get_state_dict(models[0], optimizers[0], options=options))
    set_state_dict(models[1], optimizers[1], model_state_dict=weights, optim_state_dict=state, options=options)
    for model, optimizer in zip(models, optimizers, strict=True):
        _step_by_fsdp1(model, optimizer, range(3, 5))
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    return all(torch.equal(*pair) for pair in pairs), sum(ours.numel() == 0 for ours, _ in pairs)


def _on_more_processes(spreads: tuple[str, ...]) -> dict[str, Any]:
    return {"monitored": _monitored_by_each(spreads), "state": _saved_and_loaded_by_fsdp1()}


def _flat_parameters() -> str:
    """Return the monitors' error under FSDP1 without `use_orig_params`."""
    model = regression()
    model.net = FSDP1(model.net, use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), [UpdateRatioMonitor()])
    return str(error.value)


def _recorded(folder: Path, **trainer: Any) -> Counter[str]:
    """Record a spike, and return the collectives of a step without one."""
    model = regression()
    recorder = Watched(SpikeRecorder(folder=str(folder), window=10, after=2, nats=0.2))
    callbacks = [Inject(Event.AFTER_DATALOADER, 25, repeat), recorder]
    train(model, torch.optim.SGD(model.parameters(), lr=0.02), callbacks, 28, **trainer)
    return collectives(recorder.operations["after_train_batch", 1] + recorder.operations["batch_end", 2])


def _monitored_everywhere(folder: Path) -> dict[str, Any]:
    """Run all cases in one job, because starting a job takes longer than all runs."""
    runs = {(net.__name__, spread): _monitored(spread, net) for net in NETS for spread in SPREADS}
    return {
        **runs,
        "flat": _flat_parameters(),
        "recorded": _recorded(folder, parallelism_config={"fsdp": {}}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spikes")


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> list[dict[str, Any]]:
    return launch(_monitored_everywhere, folder)


@pytest.fixture(scope="module", params=[(3, SPREADS), (4, HYBRID)], ids=["3", "4"])
def more_processes(request: pytest.FixtureRequest) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the ways to distribute a model, and what each process found."""
    processes, spreads = request.param
    return spreads, launch(_on_more_processes, spreads, processes=processes)


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, dict[int, float]]]:
    return {net.__name__: _monitored("none", net)[0] for net in NETS}


def _of_roles(quantity: str, matrices: set[str]) -> set[str]:
    """Return the keys of the roles, which are the last parts of the matrices' names."""
    roles = {name.rpartition(".")[2] for name in matrices}
    return {f"role_{quantity}/{role}/{statistic}" for role in roles for statistic in ("min", "median", "max")}


def _assert_logged(metrics: dict[str, dict], expected: dict[str, dict], tolerance: float) -> None:
    assert metrics.keys() == expected.keys()
    for key, values in expected.items():
        assert metrics[key] == pytest.approx(values, rel=tolerance), key


def test_names_are_plain_module_paths(one_process: dict[str, dict]) -> None:
    gated = SCALAR_GATED | VECTOR_GATED
    expected = {f"{metric}/{name}" for metric in ("update_ratio", "weight_norm", "grad_norm") for name in MATRICES}
    expected |= {f"{metric}/{name}" for metric in ("virtual_update_ratio", "virtual_weight_norm") for name in gated}
    expected |= {f"gate/{name}" for name in SCALAR_GATED}
    expected |= {f"gate/{name}/{statistic}" for name in VECTOR_GATED for statistic in ("mean", "min", "max")}
    expected |= _of_roles("update_ratio", MATRICES) | _of_roles("gate", gated)
    assert set(one_process["Net"]) == expected | {"loss/train/total"}
    expected = {f"{metric}/{name}" for metric in (*METRICS, "gate") for name in MATRICES}
    expected |= _of_roles("update_ratio", MATRICES) | _of_roles("gate", MATRICES)
    assert set(one_process["PlainNet"]) == expected | {"loss/train/total"}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_log_what_one_does(spread: str, net: type[Net], two_processes: list, one_process: dict) -> None:
    """Keys, steps and values are equal on both ranks.

    1e-5, because gradients and squares are added in another order.
    """
    for rank in two_processes:
        metrics, _ = rank[net.__name__, spread]
        _assert_logged(metrics, one_process[net.__name__], 1e-5)


def test_more_processes_log_what_one_does(more_processes: tuple, one_process: dict) -> None:
    """The matrices have 6, 11 and 13 rows, so that some of their shards are uneven."""
    spreads, ranks = more_processes
    for rank in ranks:
        assert len(rank["monitored"]) == len(NETS) * len(spreads)
        for (net, _), metrics in rank["monitored"].items():
            _assert_logged(metrics, one_process[net], 2e-5)


def test_a_state_of_fsdp1_goes_on_to_the_bit_where_a_rank_holds_nothing(more_processes: tuple) -> None:
    """Three processes are the fewest in which several ranks have the state of a matrix that another rank lacks."""
    _, ranks = more_processes
    results = [rank["state"] for rank in ranks]
    assert all(same for same, _ in results)
    assert sum(empty for _, empty in results) > 0


@pytest.mark.parametrize("spread", SPREADS)
def test_only_one_rank_draws_the_picture(spread: str, two_processes: list) -> None:
    assert [rank["Net", spread][1]["pictures"] for rank in two_processes] == [{STEPS: 1}, {}]


@pytest.mark.parametrize("spread", SPREADS)
def test_a_step_costs_one_collective(spread: str, two_processes: list) -> None:
    """In addition, the two layers with vector gates are gathered before and after the step, if they are sharded."""
    gathers = {
        "fsdp2": {"_c10d_functional::all_gather_into_tensor": 8},  # W and α of each
        "fsdp1": {"c10d::allgather_": 2},  # the FSDP unit that holds both
    }
    for rank in two_processes:
        _, found = rank["Net", spread]
        assert found["updates"] == {"c10d::allreduce_": 1, **gathers.get(spread, {})}
        assert found["gates"] == {"c10d::allgather_": 1}


@pytest.mark.parametrize("spread", SPREADS)
def test_a_step_of_the_optimizer_costs_one_collective(spread: str, two_processes: list) -> None:
    """It needs none where each rank has all gradients."""
    for rank in two_processes:
        _, found = rank["PlainNet", spread]
        assert found["step"] == ({} if spread in ("ddp", "no_shard") else {"c10d::allreduce_": 1})
        assert found["waits"] == {}  # no value is read back to the host
        assert found["updates"] == {"c10d::allreduce_": 1}


def test_fsdp1_without_original_parameters_is_refused(two_processes: list) -> None:
    assert "fsdp_config.use_orig_params: false" in two_processes[0]["flat"]


def test_two_processes_record_the_spike_that_one_does_without_a_collective_before_it(
    two_processes: list, folder: Path, tmp_path: Path
) -> None:
    assert _recorded(tmp_path) == {}
    for rank in two_processes:
        assert rank["recorded"] == {}
    ours, theirs = rows(folder / "25"), rows(tmp_path / "25")
    assert ours.keys() == theirs.keys() and len(ours) == 13 * len(MATRICES)
    for key, row in theirs.items():
        for column, value in row.items():
            expected = value if column == "matrix" or not value else pytest.approx(float(value), rel=1e-5)
            assert (ours[key][column] if column == "matrix" or not value else float(ours[key][column])) == expected
