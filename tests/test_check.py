"""What the trainer refuses before training, `inspect` and `compare` refuse in the same words, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from llmfoundry_wesar.inspection import inspect_config, load_config
from llmfoundry_wesar.methods import expand

YAML = "yamls/quickstart.yaml"


def messages(overrides: str, data: Path) -> list[str]:
    """Return what `inspect` and the trainer's config transform say to quickstart.yaml with overrides."""
    arguments = [f"variables.data={data}", "max_seq_len=16", *filter(None, overrides.split("; "))]
    written: Any = OmegaConf.merge(OmegaConf.load(YAML), *(OmegaConf.from_cli([text]) for text in arguments))
    checks = (
        lambda: inspect_config(load_config(YAML, arguments)),
        lambda: expand(OmegaConf.to_container(written, resolve=True)),
    )
    said = []
    for check in checks:
        try:
            check()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


REFUSED = {
    # Keys that would do nothing, or another thing than they say.
    "variables.method=he_init; model.init_config.backbone=small": "backbone: 'small' is not used by he_init_",
    "variables.method=he_init; model.init_config.gain_init=method": "gain_init: 'method' is not used by he_init_",
    "variables.method=small_init; model.init_config.backbone=he": "backbone: 'he' is not used by small_init_",
    "variables.method=small_init; model.init_config.init_std=0.1": "init_std: 0.1 is not used by small_init_",
    "variables.method=small_init; model.init_config.emb_init_std=0": "emb_init_std: 0 is not a positive number",
    "variables.method=he_init; model.init_config.emb_init_std=0": "emb_init_std: 0 is not a positive number",
    "variables.method=small_init; model.init_config.emb_init_uniform_lim=[1,0]": r"emb_init_uniform_lim: \[1, 0\] is",
    "variables.method=small_init; model.init_config.emb_init_uniform_lim=1; model.init_config.emb_init_std=1": (
        "emb_init_uniform_lim: 1 is not used, because emb_init_std: 1 is set; remove one of them"
    ),
    "model.ffn_config.fc_type=torch": "model.ffn_config.fc_type: 'torch' has no place here; .*model.fc_type",
    "model.attn_config.fc_type=torch": "model.attn_config.fc_type: 'torch' has no place here; .*model.fc_type",
    "model.attn_config.n_heads=2": "model.attn_config.n_heads: 2 has no place here; .*model.n_heads",
    "model.fc_type.bias=true": "model.fc_type.bias: True has no place here; remove it and set model.no_bias",
    "model.fc_type.device=cpu": "model.fc_type.device: 'cpu' has no place here; remove it and set model.init_device",
    "model.attn_config.fusd_qkv=true": "model.attn_config.fusd_qkv: True is not .*mean fused_qkv",
    "model.ffn_config.ffn_actfn=silu": "model.ffn_config.ffn_actfn: 'silu' is not an option of mptmlp; .*ffn_act_fn",
    "variables.method=sigma_reparam; model.fc_type.differentiable_norm=maybe": (
        "model.fc_type.differentiable_norm: 'maybe' is not one of true, false"
    ),
    "variables.methd=small_init": "variables.methd: 'small_init' is not read; did you mean variables.method",
    "callbacks.power_iteration={}": "callbacks.power_iteration: no layer of this model has σReparam",
    "optimizer.param_groups=[{param_str_match: foo}]": "optimizer.param_groups.0.param_str_match: 'foo' fits no",
    "optimizer.param_groups=[{param_str_match: norm, weight_dekay: 0}]": "groups.0.weight_dekay: 0 .*weight_decay",
    "optimizer.disable_grad=foo": "optimizer.disable_grad: 'foo' fits no parameter",
    "variables.setting=rapid; optimizer.name=decoupled_adamw": (
        "optimizer.name: decoupled_adamw does not take fused, which .* sets for adamw; use adamw, or"
    ),
    "variables.setting=rapid; scheduler.name=constant_with_warmup": "scheduler.name: constant_.* does not take alpha_f",
    "optimizer.lrr=1": "optimizer.lrr: 1 is not an option of adamw; did you mean lr",
    "callbacks.kill_loss_spike={}": "callbacks.kill_loss_spike: .* set model.z_loss: 0",
    "callbacks.hf_checkpointer={save_folder: x}": "callbacks.hf_checkpointer: transformers cannot .* use merged_hf_ch",
    "callbacks.loss_perp_v_len={}; model.fused_loss=true; model.use_train_metrics=false": (
        "callbacks.loss_perp_v_len: it needs the logits"
    ),
    "train_loader=5": "train_loader: 5 is not a mapping with a mapping `dataset`",
    "eval_loader.dataset=5": "eval_loader: .*'dataset': 5.* is not a mapping with a mapping `dataset`",
    "fsdp_config=5": "fsdp_config: 5 is not a mapping of keys to values",
    "callbacks.gate_monitor.intervall=1ba": "callbacks.gate_monitor.intervall: '1ba' is .*did you mean interval",
    # Values that would fail late or in cryptic words.
    "model.d_model=30; model.n_heads=2": "model.n_heads: 2 gives heads of width 15, but attn_config.rope: true",
    "model.head_dim=7": "model.head_dim: 7 gives heads of width 7, but",
    "model.n_heads=3": "model.n_heads: 3 does not divide d_model: 128",
    "model.ffn_config.ffn_act_fn.name=linear": "model.ffn_config.ffn_act_fn: .*'linear'.* is not an activation",
    "model.ffn_config.ffn_act_fn.name=glu": "model.ffn_config.ffn_act_fn.name: 'glu' is not an activation function",
    "model.ffn_config.ffn_act_fn={name: gelu, aproximate: tanh}": "model.ffn_config.ffn_act_fn: .* is not",
    "model.norm_eps=abc": "model.norm_eps: 'abc' is not a number ≥ 0",
    "model.attn_config.softmax_scale=abc": "model.attn_config.softmax_scale: 'abc' is not a number",
    "model.max_seq_len=15": "model.max_seq_len: 15 is less than max_seq_len: 16; set model.max_seq_len to 16 or more",
    "eval_loader.dataset.max_seq_len=17": "max_seq_len: 16 is less than eval_loader.dataset.max_seq_len: 17; set model",
    "eval_loader.label=1; eval_loader.dataset.max_seq_len=17": "is less than eval_loader 1.dataset.max_seq_len: 17",
    "icl_tasks_str=tasks.yaml; icl_seq_len=17": "model.max_seq_len: 16 is less than icl_seq_len: 17",
    "icl_tasks=tasks.yaml; icl_seq_len=17": "model.max_seq_len: 16 is less than icl_seq_len: 17",
    "max_duration=1000tok; scheduler.t_warmup=2ba": "t_warmup: 2ba and max_duration: 1000tok have two units; write",
    "scheduler.t_max=1000tok": "scheduler.t_warmup: .*ba and scheduler.t_max: 1000tok have two units",
    "max_duration=infba": "max_duration: 'infba' is not a time such as '100ba'",
    "scheduler.t_warmup=soon": "scheduler.t_warmup: 'soon' is not a time such as '100ba'",
    "model.n_layers=0": "model.n_layers: 0 is not a whole number ≥ 1",
    "model.n_layers=true": "model.n_layers: True is not a whole number ≥ 1",
    "model.expansion_ratio=0": "model.expansion_ratio: 0 is not a positive number",
    "model.expansion_ratio=1.3": "model.expansion_ratio: 1.3 × d_model: 128 is 166.4, not a whole number",
    "model.tie_word_embeddings=maybe": "model.tie_word_embeddings: 'maybe' is not one of true, false",
    "model.norm_type=foo": "model.norm_type: 'foo' is not one of .*rmsnorm",
    "model.attn_config.attn_type=foo": "model.attn_config.attn_type: 'foo' is not one of .*sdpa_attention",
    "model.init_config.name=foo": "model.init_config.name: 'foo' is not one of .*wesar_",
    "model.master_weights_dtype=f32": "model.master_weights_dtype: 'f32' is not one of f16",
    "variables.method=wesar_adamw; model.master_weights_dtype=bf16": "updates of torch.bfloat16 parameters are lost",
    "callbacks.update_ratio_monitor.interval=infba": "callbacks.update_ratio_monitor.interval: 'infba' is not a",
    "callbacks.update_ratio_monitor.include=3": "callbacks.update_ratio_monitor.include: 3 is not a regular expression",
    "callbacks.update_ratio_monitor.by_role=maybe": "callbacks.update_ratio_monitor.by_role: 'maybe' is not one of",
    "callbacks.gate_monitor=10ba": "callbacks.gate_monitor: '10ba' is not a mapping",
    "optimizer.name=foo": "optimizer.name: 'foo' is not one of .*wesar_adamw",
    "optimizer.lr=-1": "optimizer.lr: -1 is not a number ≥ 0",
    "optimizer.betas=3": "optimizer.betas: 3 is not a list of two numbers",
    "optimizer.betas=[0.9, 1]": r"optimizer.betas: \[0.9, 1\] is not a list of two numbers",
    "optimizer.disable_grad=3": "optimizer.disable_grad: 3 is not a regular expression",
    "callbacks.update_ratio_monitor.include=foo": "callbacks.update_ratio_monitor.include: 'foo' matches none",
    "model.logit_scale=foo": "model.logit_scale: 'foo' is neither a number nor inv_sqrt_d_model",
    "model.attn_config.rope_impl=foo": "model.attn_config.rope_impl: 'foo' is not one of hf, dail; set it to hf",
    "model.attn_config.attn_type=grouped_query_attention": "model.attn_config.kv_n_heads is missing",
    "model.learned_pos_emb=true": "model.learned_pos_emb: true is not used with attn_config.rope: true",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_the_trainer_and_inspect_refuse_it_in_the_same_words(overrides, dataset):
    said, by_the_trainer = messages(overrides, dataset)
    assert by_the_trainer == said and re.search(REFUSED[overrides], said), said


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "optimizer.lr=0",
        "model.master_weights_dtype=bf16",
        "variables.methods=mine",
        "callbacks=null",
        "callbacks.kill_loss_spike={}; model.z_loss=0",
        "callbacks.loss_perp_v_len={}",
        "icl_seq_len=17",
        "max_duration=1ep; scheduler.t_warmup=1ba; scheduler.t_max=0.5dur",
        "max_duration=256tok; scheduler.t_warmup=0.5dur",
    ],
)
def test_what_trains_is_not_refused(overrides, dataset):
    assert messages(overrides, dataset) == ["", ""]


@pytest.mark.parametrize("callbacks", [[], ["gate_monitor"], "gate_monitor"])
def test_callbacks_that_are_no_mapping_are_refused(callbacks):
    """Also before a method's callbacks are merged with them."""
    for variables in ({}, {"method": "sigma_reparam"}):
        model = {"name": "wesar_mpt_causal_lm", "d_model": 8, "n_heads": 2, "n_layers": 1}
        with pytest.raises(ValueError, match=r"^callbacks: .* is not a mapping"):
            expand({"variables": variables, "callbacks": callbacks, "model": model, "optimizer": {"name": "adamw"}})


CODE = """
from llmfoundry.registry import optimizers
from torch.optim import AdamW

@optimizers.register("own_adamw")
class OwnAdamW(AdamW):
    def __init__(self, params, **keys):
        super().__init__(params, **keys)
"""


def test_what_the_users_code_registers_is_known(dataset, tmp_path):
    """Also if its constructor names no key. The trainer imports `code_paths` before it expands a config."""
    (tmp_path / "own.py").write_text(CODE)
    own = f"code_paths=[{tmp_path / 'own.py'}]; optimizer={{name: own_adamw, amsgrad: true}}"
    assert messages(own, dataset) == ["", ""]
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        load_config(YAML, ["code_paths=[none.py]"])
