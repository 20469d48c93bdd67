"""Foundry's own configs train under WeSaR with the keys that the README gives.

The texts are shortened copies of scripts/train/yamls/pretrain/{mpt-125m,hf-llama-3.1-8B}.yaml of llm-foundry. A CPU
needs another precision, init device and `loss_fn`, and smaller sizes. `torch_dtype: bfloat16` of the Llama is left out,
because with it no weight is in float32.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from composer import Trainer
from composer.loggers import InMemoryLogger
from llmfoundry.command_utils import train
from omegaconf import DictConfig, OmegaConf

from llmfoundry_wesar.methods import expand
from tests.distributed import REPOSITORY

COMMON = OmegaConf.create("""
variables: {data_local: null, data_remote: null, max_seq_len: 2048, global_seed: 17, model_name: null}
max_seq_len: ${variables.max_seq_len}
run_name: stock
tokenizer:
  name: EleutherAI/gpt-neox-20b
  kwargs: {model_max_length: '${variables.max_seq_len}'}
train_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    remote: ${variables.data_remote}
    split: train
    shuffle: true
    max_seq_len: ${variables.max_seq_len}
    shuffle_seed: ${variables.global_seed}
  drop_last: true
  num_workers: 8
scheduler: {name: cosine_with_warmup, t_warmup: 100ba, alpha_f: 0.1}
optimizer: {name: decoupled_adamw, lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-08, weight_decay: 0.0}
algorithms:
  gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}
max_duration: 4800ba
eval_interval: 500ba
global_train_batch_size: 256
seed: ${variables.global_seed}
device_train_microbatch_size: 16
precision: amp_bf16
fsdp_config: {sharding_strategy: FULL_SHARD, mixed_precision: PURE, limit_all_gathers: true}
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks: {speed_monitor: {window_size: 10}, lr_monitor: {}, memory_monitor: {}, runtime_estimator: {}}
""")
MODELS = {
    "mpt-125m": """
name: mpt_causal_lm
init_device: meta
d_model: 768
n_heads: 12
n_layers: 12
expansion_ratio: 4
max_seq_len: ${variables.max_seq_len}
vocab_size: 50368
attn_config: {attn_impl: flash}
""",
    "hf-llama-3.1-8B": """
name: hf_causal_lm
init_device: meta
pretrained_model_name_or_path: ${variables.model_name}
pretrained: false
use_auth_token: true
use_flash_attention_2: true
""",
}
SMALL = ["max_duration=3ba", "global_train_batch_size=8", "device_train_microbatch_size=4", "variables.max_seq_len=16"]
SMALL += ["scheduler.t_warmup=0ba", "precision=fp32", "model.init_device=cpu", "train_loader.num_workers=0"]
SMALL += ["train_loader.prefetch_factor=null", "train_loader.persistent_workers=false", "loggers.inmemory={}"]
SIZES = {
    "mpt-125m": "d_model=32 n_heads=4 n_layers=2 vocab_size=97 attn_config.attn_impl=torch loss_fn=torch_crossentropy",
    "hf-llama-3.1-8B": "use_auth_token=false use_flash_attention_2=false",
}
# The two blocks of the README: gates in the optimizer, and gates in MPT's layers.
IN_OPTIMIZER, IN_LAYERS = re.findall("```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def small_run(name: str, readme: str, dataset: Path, *overrides: str) -> tuple[Trainer, InMemoryLogger]:
    """Train one of foundry's configs with keys of the README for three steps."""
    config = OmegaConf.merge(COMMON, {"model": OmegaConf.create(MODELS[name])}, OmegaConf.create(readme))
    # As on a GPU, where the precision is another: nothing is refused.
    expand(OmegaConf.to_container(config, resolve=True), check_data=False)  # type: ignore[arg-type]
    data = [f"variables.data_local={dataset}", f"tokenizer.name={Path(dataset) / 'tokenizer'}"]
    changes = [*SMALL, *data, *(f"model.{size}" for size in SIZES[name].split()), *overrides]
    config = OmegaConf.merge(config, OmegaConf.from_cli(changes))
    assert isinstance(config, DictConfig)
    trainer = train(config)
    [logger] = [each for each in trainer.logger.destinations if isinstance(each, InMemoryLogger)]
    trainer.close()
    losses = torch.tensor([float(value) for _, value in logger.data["loss/train/total"]])
    assert len(losses) == 3 and losses.isfinite().all()
    return trainer, logger


@pytest.mark.parametrize("name", MODELS)
def test_two_lines_train_it_under_wesar(name, dataset, tmp_path):
    """Every matrix gets a gate: an MPT's fused q, k, v, tied embeddings and learned positions, and a Llama's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97).save_pretrained(tmp_path)
    trainer, _ = small_run(name, IN_OPTIMIZER, dataset, f"variables.model_name={tmp_path}")
    [optimizer] = trainer.state.optimizers
    for parameter, state in optimizer.state.items():
        assert ("gate" in state) == (parameter.ndim > 1)
        if "gate" in state:
            assert state["gate"].isfinite().all() and (state["gate"] > 0).all()


def test_gates_in_its_layers_train_foundrys_mpt(dataset):
    """Each of the two blocks' six matrices, W_e and W_p have a gate, and it is logged."""
    _, logger = small_run("mpt-125m", IN_LAYERS, dataset)
    for family in ("gate/", "update_ratio/"):
        assert len([key for key in logger.data if key.startswith(family)]) == 14
