"""The stock trainer with a real data loader and the YAML that a user starts with."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.utils import dist
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml

from llmfoundry_wesar import functional
from llmfoundry_wesar.export.files import export, reparameterize
from llmfoundry_wesar.methods import names
from tests.distributed import REPOSITORY, launch

TINY = [
    "run_name=tiny",
    "seed=3",
    "max_seq_len=16",
    "max_duration=4ba",
    "global_train_batch_size=8",
    "device_train_microbatch_size=4",
    "device_eval_batch_size=4",
    "eval_interval=0",
    "model.d_model=32",
    "model.n_layers=2",
    "model.vocab_size=97",
    "scheduler.t_warmup=0ba",  # with a warm-up Composer's first two steps have a learning rate of 0
    "optimizer.lr=5e-3",
    "callbacks.update_ratio_monitor.interval=1ba",
    "callbacks.update_ratio_monitor.metrics=[update_ratio,virtual_update_ratio,weight_norm,grad_norm]",
    "callbacks.update_ratio_monitor.picture_interval=null",  # drawing takes longer than these runs
    "callbacks.gate_monitor.interval=1ba",
    "loggers.inmemory={}",
    "log_to_console=false",
]
HELD_OUT = "metrics/eval/LanguageCrossEntropy"
RESUMED = ["wesar", "sigma_reparam", "wesar_adamw"]  # with gates, singular vectors, and gates in the optimizer


def train(data: Path, log_dir: Path, *overrides: str) -> dict[str, list[tuple[int, float]]]:
    """Train quickstart.yaml, made tiny, and return what it logged: metric → (step, value) pairs."""
    paths = [f"variables.data={data}", f"loggers.tensorboard.log_dir={log_dir}"]
    trainer = train_from_yaml(str(REPOSITORY / "yamls/quickstart.yaml"), [*TINY, *paths, *overrides])
    [logger] = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    trainer.close()
    families = ("loss/train", "role_", "gate/", "update_ratio/", "virtual_update_ratio/", "grad_norm/", "weight_norm/")
    return {
        key: [(time.batch.value, float(value)) for time, value in pairs]
        for key, pairs in logger.data.items()
        if key.startswith((*families, HELD_OUT))
    }


def assert_same(ours: dict[str, list], theirs: dict[str, list], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, pairs in ours.items():
        assert [step for step, _ in pairs] == [step for step, _ in theirs[key]], key
        values = [torch.tensor([value for _, value in run[key]], dtype=torch.float64) for run in (ours, theirs)]
        torch.testing.assert_close(*values, rtol=tolerance, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


def train_methods(data: Path, log_dir: Path, methods: list[str], *overrides: str) -> dict[str, Any]:
    return {method: train(data, log_dir / method, f"variables.method={method}", *overrides) for method in methods}


def train_methods_as_if_large(*args: Any) -> dict[str, Any]:
    """Train with the form of `gated_linear` that large matrices have: it keeps W, which FSDP2 gathers again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_SMALL", 0)
        return train_methods(*args)


def test_every_method_on_two_fsdp2_processes_logs_what_one_process_does(dataset, tmp_path):
    """Losses, gates, norms and update ratios of all methods agree.

    One process has the form of `gated_linear` for small matrices. Two processes add the same gradients in another
    order, which changes a sum by 1e-7 of its value. Over four steps 5e-6 was seen, and 5e-5 is allowed. A missing rank
    or a wrong scale would be a factor.
    """
    methods = names("method")
    one = train_methods(dataset, tmp_path / "one", methods, "device_train_microbatch_size=4")
    sharded = ["fsdp_config.sharding_strategy=FULL_SHARD", "model.init_device=mixed"]
    two = launch(train_methods_as_if_large, dataset, tmp_path / "two", methods, *sharded, timeout=600)
    for method in methods:
        assert len([key for key in one[method] if key.startswith("update_ratio/")]) == 14
        assert_same(two[0][method], one[method], 5e-5)


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_continues_to_the_bit(method, dataset, tmp_path):
    """The run stops after two of four batches and starts again from the checkpoint."""
    options = [f"variables.method={method}"]
    whole = train(dataset, tmp_path / "whole", *options)
    save = [f"save_folder={tmp_path}/checkpoints", "save_interval=2ba"]
    train(dataset, tmp_path / "first", "max_duration=2ba", "scheduler.t_max=4ba", *options, *save)
    [checkpoint] = Path(tmp_path, "checkpoints").glob("*ba2*")
    rest = train(dataset, tmp_path / "second", f"load_path={checkpoint}", *options)
    assert len(rest["loss/train/total"]) == 2
    assert rest == {key: pairs[2:] for key, pairs in whole.items()}


def stop_resume_and_reload(data: Path, folder: Path, method: str) -> tuple[dict, dict[str, dict], dict]:
    """Run without a stop, resume from each kind of checkpoint, and run from a file that was made of the model."""

    def options(checkpoints: str) -> list[str]:
        fsdp = f"fsdp_config={{sharding_strategy: FULL_SHARD, state_dict_type: {checkpoints}}}"
        return [f"variables.method={method}", "model.init_device=mixed", "eval_interval=1dur", fsdp]

    whole, rest = train(data, folder, *options("sharded")), {}
    for checkpoints in ("sharded", "full"):
        save = [f"save_folder={folder / checkpoints}", "save_interval=2ba", "autoresume=true"]
        train(data, folder, *options(checkpoints), *save, "max_duration=2ba", "scheduler.t_max=4ba")
        rest[checkpoints] = train(data, folder, *options(checkpoints), *save)
    if dist.get_global_rank() == 0:
        export(folder / "sharded", folder / "plain")
        reparameterize(folder / "plain", folder / "gated.pt", method)
    dist.barrier()
    if method == "wesar_adamw":
        [checkpoint] = (folder / "sharded").glob("ep0-ba2")
        ignored = [f"load_path={checkpoint}", "load_ignore_keys=[state/optimizers]"]
        with pytest.raises(ValueError, match=r"no state of wesar_adamw: .*load_ignore_keys leaves the state out"):
            train(data, folder, *options("sharded"), *ignored)
        # The load makes a step with the initial weights. The gates have to start from the loaded ones nevertheless.
        ignored = [f"load_path={checkpoint}", "load_ignore_keys=[state/optimizers,state/timestamp]", "max_duration=1ba"]
        weights_only = [f"load_path={checkpoint}", "load_weights_only=true", "max_duration=1ba"]
        started, expected = (train(data, folder, *options("sharded"), *keys) for keys in (ignored, weights_only))
        gates = [key for key in expected if key.startswith("gate/")]
        assert len(gates) == 14 or dist.get_global_rank() > 0, "rank 0 logs"
        assert [started[key][0] for key in gates] == [expected[key][0] for key in gates]
    load = [f"load_path={folder / 'gated.pt'}", "load_weights_only=true", "max_duration=1ba"]
    # After this evaluation FSDP2 holds whole parameters, in which the optimizer's gates have to be found too.
    load += ["eval_first=true", "fsdp_config.reshard_after_forward=false"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gate_monitor: the model has no gates")
        return whole, rest, train(data, folder, *options("full"), *load)


def stop_resume_and_reload_each(data: Path, folder: Path) -> dict[str, tuple[dict, dict[str, dict], dict]]:
    runs = {method: stop_resume_and_reload(data, folder / method, method) for method in RESUMED}
    [plain] = Path(folder, "wesar_adamw/full").glob("ep0-ba2-*")
    # With `init_device: cpu` all ranks load. With `mixed` rank 0 would be refused alone, and wait for the others.
    load = ["fsdp_config={state_dict_type: full}", "model.init_device=cpu", f"load_path={plain}"]
    with pytest.raises(ValueError, match="load_path: the checkpoint lacks 14 tensors"):
        train(data, folder, *load, "variables.method=wesar", "load_weights_only=true")
    return runs


def test_two_fsdp2_processes_resume_to_the_bit_and_load_a_gated_file(dataset, tmp_path):
    """With `autoresume`, from sharded and from whole checkpoints; and from the file that `reparameterize` makes.

    A resumed run is equal to the bit as on one process, because the sum over two ranks has only one order. The file has
    the held-out loss of its model up to the rounding of α(W̄/α) to float32, 1e-7. With `load_monolith_rank0_only` and
    without `init_device: mixed` WeSaR's loss would be 3.4 instead of 1.4.
    """
    runs = launch(stop_resume_and_reload_each, dataset, tmp_path, timeout=600)[0]
    for method, (whole, rest, loaded) in runs.items():
        assert len(whole["loss/train/total"]) == 4
        for checkpoints in ("sharded", "full"):
            assert rest[checkpoints] == {key: pairs[-2:] for key, pairs in whole.items()}, (method, checkpoints)
        assert loaded[HELD_OUT][0] == (0, pytest.approx(whole[HELD_OUT][0][1], rel=1e-5)), method
    [checkpoint] = Path(tmp_path, "wesar_adamw/full").glob("ep0-ba2-*")
    options = ["variables.method=wesar_adamw", f"load_path={checkpoint}", "eval_interval=1dur"]
    alone, (two, _, _) = train(dataset, tmp_path / "alone", *options), runs["wesar_adamw"]
    assert_same(alone, {key: pairs[-2:] for key, pairs in two.items()}, 5e-5)


STOCK = """
import json, runpy, sys, warnings
warnings.filterwarnings("ignore")
runpy.run_path(sys.argv[1])
from composer.loggers import InMemoryLogger
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml
assert "wesar" not in registry.config_transforms
trainer = train_from_yaml(sys.argv[2])
[logger] = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
print("LOSSES", json.dumps([float(value) for _, value in logger.data["loss/train/total"]]))
"""


def test_the_stock_model_does_not_notice_the_plugin(dataset, tmp_path):
    """The losses are equal to the last bit with and without the plugin's entry points."""
    from omegaconf import OmegaConf

    config = OmegaConf.merge(OmegaConf.load(REPOSITORY / "yamls/quickstart.yaml"), OmegaConf.from_cli(TINY))
    for section, keys in {"model": ["z_loss"], "callbacks": ["update_ratio_monitor", "gate_monitor"]}.items():
        for key in keys:
            del config[section][key]
    config.variables = {"data": str(dataset)}
    config.run_name = "stock"
    config.loggers = {"inmemory": {}}
    config.model |= {"name": "mpt_causal_lm", "loss_fn": "torch_crossentropy", "init_config": {"name": "small_init_"}}
    config.model.attn_config.attn_type = "multihead_attention"
    config.optimizer = {"name": "decoupled_adamw", "lr": 5e-3}
    OmegaConf.save(config, tmp_path / "stock.yaml")
    command = [sys.executable, "-c", STOCK, str(REPOSITORY / "tests/without_plugin.py"), str(tmp_path / "stock.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    [line] = [line for line in run.stdout.splitlines() if line.startswith("LOSSES")]
    assert "wesar" in registry.config_transforms
    trainer = train_from_yaml(str(tmp_path / "stock.yaml"))
    [logger] = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    trainer.close()
    losses = [float(value) for _, value in logger.data["loss/train/total"]]
    assert len(losses) == 4 and json.loads(line.removeprefix("LOSSES")) == losses
