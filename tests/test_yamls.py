"""The paper's configurations, as the files in yamls/ give them to the trainer."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer.core import Time
from llmfoundry.models.layers.norm import RMSNorm
from omegaconf import OmegaConf

from llmfoundry_wesar.inspection import inspect_config, load_config
from llmfoundry_wesar.methods import load, names
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM


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
    """`test_methods.py` tests the settings themselves. Both settings have the same corpus."""
    for setting in names("setting"):
        config = load_config(f"yamls/{size}.yaml", [f"variables.setting={setting}"])
        assert OmegaConf.merge(config, load("setting", setting)) == config
        assert Time.from_timestring(config["max_duration"]) == Time(30_000_000_000, "tok")


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
