"""Each config trains, or ends before training in one error that names the key, and `inspect` says the same."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State
from hypothesis import given
from hypothesis import strategies as st
from llmfoundry.command_utils import train_from_yaml
from llmfoundry.registry import callbacks

from llmfoundry_wesar.inspection import Matrix, inspect_config, load_config
from llmfoundry_wesar.methods import names
from llmfoundry_wesar.optimizer import WeSaRAdamW
from tests.fuzz.profile import examples

YAML = "yamls/quickstart.yaml"
TINY = [
    "max_seq_len=16",
    "max_duration=2ba",
    "global_train_batch_size=4",
    "device_train_microbatch_size=2",
    "eval_loader=null",
    "eval_interval=0",
    "loggers=null",
    "log_to_console=false",
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_layers=1",
    "model.vocab_size=97",
    "scheduler.t_warmup=1ba",
    "callbacks.update_ratio_monitor.interval=1ba",
    "callbacks.initial_weights={}",
]
BOOLEAN = ("true", "false", "maybe")
# Key → values, right and wrong ones.
VALUES = {
    "variables.method": names("method"),
    "model.d_model": ("8", "30", "24", "0", "-4", "abc", "16.5", "null"),
    "model.n_heads": ("1", "2", "4", "3", "0"),
    "model.head_dim": ("4", "5", "8", "null"),
    "model.n_layers": ("1", "2", "0", "true"),
    "model.expansion_ratio": ("1", "2.5", "0.03", "0", "-1", "abc"),
    "model.max_seq_len": ("16", "15", "32", "0", "abc"),
    "model.no_bias": BOOLEAN,
    "model.tie_word_embeddings": BOOLEAN,
    "model.learned_pos_emb": BOOLEAN,
    "model.norm_type": ("rmsnorm", "LayerNorm", "low_precision_rmsnorm", "foo", "3"),
    "model.norm_eps": ("1e-3", "0", "-1", "abc", ".nan", "null"),
    "model.z_loss": ("0", "1e-3", "-1", "abc", "true", ".inf"),
    "model.fused_loss": BOOLEAN,
    "model.use_train_metrics": ("true", "false"),
    "model.loss_fn": ("torch_crossentropy", "fused_crossentropy", "foo"),
    "model.embedding_scaling": BOOLEAN,
    "model.embedding_norm": BOOLEAN,
    "model.embedding_fraction": ("0.5", "0", "2", "abc"),
    "model.residual_scaling": BOOLEAN,
    "model.norm_placement": ("pre", "post", "foo"),
    "model.resid_pdrop": ("0.1", "1", "2", "abc"),
    "model.logit_scale": ("0.5", "inv_sqrt_d_model", "foo", "[1]"),
    "model.final_logit_softcapping": ("30", "0", "abc"),
    "model.master_weights_dtype": ("null", "bf16", "foo"),
    "model.fc_type": ("torch", "wesar", "weight_norm", "sigma_reparam", "foo", "3", "{gate_shape: row}"),
    "model.fc_type.name": ("torch", "wesar", "weight_norm", "foo"),
    "model.fc_type.gate_shape": ("scalar", "row", "column", "foo"),
    "model.fc_type.trainable": BOOLEAN,
    "model.fc_type.differentiable_norm": BOOLEAN,
    "model.fc_type.bias": ("true",),
    "model.init_config.name": ("wesar_", "he_init_", "small_init_", "kaiming_normal_", "baseline_", "foo", "3"),
    "model.init_config.sigma": ("0.02", "0", "-1", "abc", "null"),
    "model.init_config.backbone": ("he", "small", "foo"),
    "model.init_config.gain_init": ("method", "backbone", "foo"),
    "model.init_config.init_div_is_residual": ("true", "false", "3", "0", "abc"),
    "model.init_config.emb_init_std": ("0.5", "0", "abc", "null"),
    "model.init_config.emb_init_uniform_lim": ("0.5", "[-1, 2]", "[1]", "0", "abc"),
    "model.attn_config.attn_type": ("multihead_attention", "grouped_query_attention", "multiquery_attention", "foo"),
    "model.attn_config.kv_n_heads": ("1", "2", "3", "0", "abc"),
    "model.attn_config.fused_qkv": BOOLEAN,
    "model.attn_config.rope": BOOLEAN,
    "model.attn_config.rope_theta": ("100", "0", "abc"),
    "model.attn_config.rope_impl": ("hf", "dail", "foo"),
    "model.attn_config.alibi": BOOLEAN,
    "model.attn_config.qk_ln": BOOLEAN,
    "model.attn_config.qk_gn": BOOLEAN,
    "model.attn_config.clip_qkv": ("1", "0", "abc"),
    "model.attn_config.softmax_scale": ("0.3", "abc", ".nan", "[1]"),
    "model.attn_config.attn_logit_softcapping": ("30", "0", "abc"),
    "model.attn_config.sliding_window_size": ("4", "-1", "0", "abc"),
    "model.attn_config.attn_pdrop": ("0.1", "2", "abc"),
    "model.attn_config.n_heads": ("2",),
    "model.attn_config.foo": ("2",),
    "model.ffn_config.ffn_type": ("mptmlp", "mptglu", "foo", "3"),
    "model.ffn_config.ffn_act_fn.name": ("gelu", "silu", "relu", "tanh", "softmax", "linear", "glu", "foo", "3"),
    "model.ffn_config.ffn_hidden_size": ("8", "0", "abc"),
    "model.ffn_config.foo": ("2",),
    "model.foo": ("2",),
    "optimizer.name": ("adamw", "wesar_adamw", "decoupled_adamw", "foo"),
    "optimizer.lr": ("0", "1e-2", "-1", "abc", "null", ".nan"),
    "optimizer.betas": ("[0.9, 0.95]", "[0.9]", "[2, 0]", "3", "abc"),
    "optimizer.eps": ("1e-6", "-1", "abc"),
    "optimizer.weight_decay": ("0", "-1", "abc"),
    "optimizer.sigma": ("0.02", "0", "abc"),
    "optimizer.max_norm": ("1", "0", "null"),
    "optimizer.gated": ("ffn", "foo", "'('", "null"),
    "optimizer.disable_grad": ("norm", "foo", "'('", "3"),
    "optimizer.param_groups": (
        "[]",
        "3",
        "[{param_str_match: ffn, lr: 0.0}]",
        "[{param_str_match: foo}]",
        "[{param_str_match: norm, weight_dekay: 0}]",
        "[{weight_decay: 0}]",
        "[{param_str_match: '('}]",
    ),
    "optimizer.foo": ("2",),
    "callbacks.update_ratio_monitor": ("{}", "null", "3"),
    "callbacks.update_ratio_monitor.interval": ("2ba", "1ep", "0ba", "infba", "10", "abc", "3"),
    "callbacks.update_ratio_monitor.metrics": (
        "[update_ratio, grad_norm]",
        "virtual_update_ratio",
        "[]",
        "foo",
        "[[1]]",
    ),
    "callbacks.update_ratio_monitor.include": ("ffn", "foo", "'('", "3"),
    "callbacks.update_ratio_monitor.by_matrix": BOOLEAN,
    "callbacks.update_ratio_monitor.foo": ("2",),
    "callbacks.gate_monitor.interval": ("1ba", "abc", "0.5dur"),
    "callbacks.gate_monitor.by_role": BOOLEAN,
    "callbacks.power_iteration": ("{}", "{interval: 1ba}", "null"),
    "callbacks.optimizer_gates": ("{}", "{interval: abc}"),
}
ONE = st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.sampled_from(VALUES[key]).map(lambda v: f"{key}={v}"))
NAMED = re.compile(r"(model|optimizer|callbacks|variables|algorithms)\b[^ ]*:? |wesar_adamw: ")


class InitialWeights(Callback):
    """Keeps the initial weights and gates of the last model that was trained, and the number of its steps."""

    start: list[tuple[str, torch.Tensor, torch.Tensor | None]]
    steps: int

    def fit_start(self, state: State, logger: Logger) -> None:
        InitialWeights.steps = 0
        (optimizer,) = state.optimizers
        kept = optimizer.gates() if isinstance(optimizer, WeSaRAdamW) else {}
        InitialWeights.start = []
        for module in state.model.modules():
            if hasattr(module, "role"):
                gate = getattr(module, "gate", kept.get(module.weight))
                gate = None if gate is None else gate.detach().clone()
                InitialWeights.start.append((module.role.name, module.weight.detach().clone(), gate))

    def batch_end(self, state: State, logger: Logger) -> None:
        InitialWeights.steps = state.timestamp.batch.value


callbacks.register("initial_weights", func=InitialWeights)


def agrees(matrix: Matrix, weight: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Compare what `inspect` says with a matrix. 6 standard errors, and 3% for an α₀ that is measured."""
    n = weight.numel()
    in_optimizer = gate is not None and gate.dim() == 0
    std = weight.double().square().mean().sqrt().item() / (gate.item() if in_optimizer else 1)
    assert abs(std - matrix.std) <= (6 / math.sqrt(2 * n) + 1e-2) * matrix.std, (matrix, std)
    assert (gate is None) == (matrix.gate is None), matrix
    if gate is not None and "SigmaReparam" not in matrix.layer:
        rounding = torch.finfo(gate.dtype).eps  # 0.8% for master weights in bfloat16
        tolerance = rounding if "Gated" in matrix.layer else 6 / math.sqrt(2 * n) + 3e-2
        assert gate.double().mean().item() == pytest.approx(matrix.gate, rel=max(tolerance, 1e-5)), matrix


@examples(20)
@given(overrides=st.lists(ONE, max_size=4, unique_by=lambda text: text.partition("=")[0]))
def test_a_config_trains_as_inspect_says_or_is_refused_before(overrides: list[str], dataset: Path) -> None:
    # A key comes before its subkeys, which would be lost otherwise.
    arguments = [f"variables.data={dataset}", *TINY, *sorted(overrides)]
    inspection, said = None, ""
    try:
        config: dict[str, Any] = load_config(YAML, arguments)
        inspection = inspect_config(config)
    except ValueError as error:
        said = str(error)
    InitialWeights.steps = -1
    try:
        train_from_yaml(YAML, arguments).close()
    except ValueError as error:
        assert InitialWeights.steps <= 0, f"late: {error}"
        assert NAMED.search(str(error)) and "\n" not in str(error), f"names no key: {error}"
        if inspection is not None:
            assert "include" in str(error) or "gate" in str(error), f"inspect did not say: {error}"
        return
    if inspection is None:
        assert "init_config.name" in said, f"trains, but inspect said: {said}"
        return
    assert InitialWeights.steps == 2
    rows: dict[str, list[Matrix]] = {}
    for matrix in inspection.matrices:
        rows.setdefault(matrix.role, []).append(matrix)
    assert {role for role, _, _ in InitialWeights.start} == rows.keys()
    for role, weight, gate in InitialWeights.start:
        agrees(next(row for row in rows[role] if row.shape == weight.shape), weight, gate)
