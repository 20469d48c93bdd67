"""Train small models of every kind for a few steps on real text with the stock trainer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmfoundry.command_utils import train_from_yaml
from torch import Tensor

from llmfoundry_wesar.data.shards import prepare
from llmfoundry_wesar.inspection import yaml_line
from llmfoundry_wesar.methods import names
from tests.distributed import REPOSITORY

TEXT = Path(os.__file__).read_text()
LENGTH, VOCABULARY = 64, 300
TINY = [
    "run_name=tiny",
    "seed=3",
    f"max_seq_len={LENGTH}",
    "max_duration=4ba",
    "global_train_batch_size=8",
    "device_train_microbatch_size=4",
    "eval_loader=null",
    "eval_interval=0",
    "model.d_model=32",
    "model.n_layers=2",
    f"model.vocab_size={VOCABULARY}",
    "model.norm_eps=1e-3",
    "model.attn_config.rope_theta=500",
    "scheduler.t_warmup=2ba",
    "optimizer.lr=2e-2",  # moves the gates and norms far from their start
    "callbacks.update_ratio_monitor=null",
    "callbacks.gate_monitor=null",
    "loggers=null",
    "log_to_console=false",
]
# Name → overrides: every method, and shapes and options that no method has.
CASES = {method: [f"variables.method={method}"] for method in names("method")} | {
    "row_gates": ["model.fc_type.gate_shape=row"],
    "column_gates": ["model.fc_type.gate_shape=column"],
    "biases": ["model.no_bias=false", "model.attn_config.softmax_scale=0.5"],
    "glu": [
        "model.ffn_config={ffn_type: mptglu, ffn_act_fn: {name: silu}}",
        "model.attn_config.attn_type=sdpa_attention",
    ],
    "grouped": ["model.attn_config={attn_type: grouped_query_attention, kv_n_heads: 2}", "model.head_dim=16"],
    "fused_and_tied": [
        "variables.method=small_init",
        "model.attn_config.fused_qkv=true",
        "model.tie_word_embeddings=true",
        "model.logit_scale=0.5",
    ],
}
# Gates as parameters, gates as buffers, other buffers, and a GLU, which is exported as a Llama.
SHARDED = ["wesar", "wesar_fixed", "sigma_reparam", "glu"]
# Method → its key for a norm that neither a Llama nor a plain MPT has.
INEXPRESSIBLE = {"sigma_reparam_post_ln": "norm_placement", "embedding_norm": "embedding_norm"}
EXPRESSIBLE = sorted(CASES.keys() - INEXPRESSIBLE.keys())


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: The run's save_folder.
        ids: Tokens of real text, (4, LENGTH).
        logits: The model's logits for `ids`.
    """

    folder: Path
    ids: Tensor
    logits: Tensor


def prepare_text(folder: Path) -> Path:
    """Tokenize the source of a module of the standard library with the project's own tool."""
    source = folder / "text.txt"
    source.write_text(TEXT)
    prepare(folder / "data", [source], sequence_length=LENGTH, vocab_size=VOCABULARY, val_fraction=0)
    return folder / "data"


def train(data: Path, *overrides: str, yaml: Path = REPOSITORY / "yamls/quickstart.yaml") -> Any:
    """Train quickstart.yaml, or another YAML, made tiny, and return the finished trainer."""
    trainer = train_from_yaml(str(yaml), [*TINY, f"variables.data={data}", *overrides])
    trainer.close()
    return trainer


def train_case(data: Path, folder: Path, *overrides: str) -> Trained:
    """Train with a checkpoint at the end."""
    composer = train(data, f"save_folder={folder}", "save_interval=1dur", *overrides).state.model
    ids = text_ids(composer.tokenizer)
    return Trained(folder, ids, logits(composer.model, ids))


def train_cases(data: Path, folder: Path) -> dict[str, Trained]:
    """Train every case. If a plain model can compute the same, write merged models into the same folder."""
    runs = {}
    for case, overrides in CASES.items():
        saves = [merged_saves(folder / case)] if case in EXPRESSIBLE else []
        runs[case] = train_case(data, folder / case, *overrides, *saves)
    return runs


def train_sharded(data: Path, folder: Path) -> dict[str, Trained]:
    """Train on the two processes of this job, with sharded checkpoints and merged models in the same folders."""
    fsdp = ["fsdp_config={sharding_strategy: FULL_SHARD, state_dict_type: sharded}", "model.init_device=mixed"]
    runs = {}
    for case in SHARDED:
        saves = ["save_interval=2ba", merged_saves(folder / case)]
        runs[case] = train_case(data, folder / case, *CASES[case], *fsdp, *saves)
    return runs


def merged_saves(folder: Path, precision: str = "float32") -> str:
    """Return the override that adds the callback merged_hf_checkpointer."""
    keys = {"save_folder": str(folder), "save_interval": "2ba", "precision": precision}
    return f"callbacks.merged_hf_checkpointer={yaml_line(keys)}"


def text_ids(tokenizer: Any) -> Tensor:
    """Return the tokens of four passages of the text, (4, LENGTH)."""
    ids = [tokenizer(TEXT[1000 * i :][:500]).input_ids[:LENGTH] for i in range(4)]
    return torch.tensor(ids)


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Compute the logits of a Hugging Face model in evaluation mode, in float32."""
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float()


def assert_same_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Compare in norm and in the worst entry, relative to the largest."""
    assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance
