"""The paper's configurations, as the files in yamls/ give them to the trainer."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer.core import Callback, State, Time
from composer.loggers import Logger
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml
from llmfoundry.models.layers.norm import RMSNorm
from omegaconf import OmegaConf

from llmfoundry_wesar.inspection import inspect_config, load_config
from llmfoundry_wesar.methods import load, names
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM
from tests.distributed import REPOSITORY

SCHEDULES = {"rapid": (1e-3, 100), "stable": (5e-4, 2000)}  # learning rate and steps of warm-up (Table 3)


@pytest.mark.parametrize(
    ("size", "d", "layers", "heads"), [("130m", 768, 12, 12), ("1.3b", 2048, 24, 16), ("13b", 5120, 40, 40)]
)
def test_table_10(size, d, layers, heads):
    """With GELU (section 5.1) and separate W_e and W_p (Table 1), read from the model without allocating a weight."""
    config = load_config(f"yamls/{size}.yaml")
    section = {**config["model"], "init_device": "meta"}
    assert section.pop("name") == "wesar_mpt_causal_lm"
    model = WeSaRMPTForCausalLM(WeSaRMPTConfig(**section))
    transformer = model.transformer

    assert len(transformer.blocks) == layers
    assert transformer.wte.weight.shape == model.lm_head.weight.shape == (32000, d)
    assert transformer.wte.weight is not model.lm_head.weight
    x = torch.linspace(-3, 3, 7)
    for block in transformer.blocks:
        assert (block.attn.n_heads, block.attn.kv_n_heads, block.attn.head_dim) == (heads, heads, d // heads)
        assert block.ffn.up_proj.weight.shape == block.ffn.down_proj.weight.T.shape == (4 * d, d)
        assert torch.equal(block.ffn.act(x), F.gelu(x))

    norms = [module for name, module in model.named_modules() if "norm" in name]
    assert len(norms) == 2 * layers + 1
    assert all(type(norm) is RMSNorm and norm.eps == 1e-5 for norm in norms)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert transformer.rope and not transformer.learned_pos_emb and not transformer.alibi
    loaders = [config["train_loader"], *config["eval_loader"]]
    assert {part["max_seq_len"] for part in (config, section, *(loader["dataset"] for loader in loaders))} == {2048}


@pytest.mark.parametrize("size", ["130m", "1.3b", "13b"])
def test_tables_3_and_11_are_not_overridden(size):
    """`test_methods.py` tests the settings themselves. Both settings of the paper have the same corpus."""
    configs = {name: load_config(f"yamls/{size}.yaml", [f"variables.setting={name}"]) for name in names("setting")}
    for setting, config in configs.items():
        assert OmegaConf.merge(config, load("setting", setting)) == config
    for config in (configs[setting] for setting in SCHEDULES):
        batch = config["global_train_batch_size"] * config["max_seq_len"]
        assert Time.from_timestring(config["max_duration"]) == Time(30_000_000_000 // batch, "ba")


# The data of the tests, a model for a CPU, and nothing that could hide a fault in lengths and schedule.
SHRUNK = ["max_seq_len=16", "model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=97"]
SHRUNK += ["global_train_batch_size=8", "device_train_microbatch_size=4", "train_loader.num_workers=1"]
SHRUNK += ["precision=fp32", "model.init_device=cpu", "compile_config=null", "eval_loader=null", "eval_interval=0"]
SHRUNK += ["save_folder=null", "autoresume=false", "loggers=null", "log_to_console=false", "callbacks.second_step={}"]


class SecondStep(Callback):
    """End the training after two steps, because Composer sets the rate of the first two to 0."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 2:
            state.stop_training()


@pytest.mark.parametrize("setting", SCHEDULES)
@pytest.mark.parametrize("size", ["130m", "1.3b", "13b"])
def test_the_trainer_starts_with_the_papers_length_and_schedule(size, setting, dataset):
    """After two steps the learning rate is that of the first step of the warm-up."""
    registry.callbacks.register("second_step", func=SecondStep)
    variables = [f"variables.setting={setting}", f"variables.data={dataset}"]
    trainer = train_from_yaml(str(REPOSITORY / f"yamls/{size}.yaml"), [*SHRUNK, *variables])
    trainer.close()
    assert trainer.state.timestamp.batch == 2
    rate, steps = SCHEDULES[setting]
    assert trainer.state.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate / steps)


def test_the_llama_has_the_size_that_its_head_says():
    """162.4M parameters in the rapid setting, and the gates of He's scales over one σ."""
    config = load_config("yamls/llama-160m.yaml")
    assert OmegaConf.merge(config, {"optimizer": {"lr": 1e-3, "weight_decay": 0.01}}) == config
    assert config["optimizer"]["name"] == "wesar_adamw" and config["optimizer"]["max_norm"] == 1.0
    inspection = inspect_config(config)
    assert f"{inspection.parameters / 1e6:.1f}" == "162.4"
    gates = {matrix.role: matrix.gate for matrix in inspection.matrices}
    assert gates["W_e"] == pytest.approx(1 / 0.0063245553)
    assert gates["W_d"] == pytest.approx(math.sqrt(2 / (3072 * 24)) / 0.0063245553)
    assert {matrix.count for matrix in inspection.matrices} == {1, 12}
    tokens = config["global_train_batch_size"] * config["max_seq_len"]
    assert tokens == 1_048_576 and round(3100 * tokens / inspection.parameters) == 20


@pytest.mark.parametrize("path", sorted(Path("yamls").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_run_that_was_killed_while_it_saved_can_be_resumed(path):
    """With `autoresume` alone, Composer refuses a folder with a checkpoint that is later than the one it resumes."""
    config = OmegaConf.load(path)
    assert config.get("save_overwrite", False) == config.get("autoresume", False)
