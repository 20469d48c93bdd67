"""Hugging Face decoders from scratch: in every supported family each matrix starts by its role.

The tests need no network: each model is built from its config class.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from composer.loggers import InMemoryLogger
from llmfoundry.command_utils import train_from_yaml
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmfoundry_wesar.hf_model import ComposerWeSaRHFCausalLM, role_init
from llmfoundry_wesar.losses import cross_entropy
from llmfoundry_wesar.methods import expand, load
from tests.distributed import REPOSITORY
from tests.tiny import within_sampling_error

HE = {"name": "he_init_", "emb_init_std": 1.0}
d, N, FF = 64, 2, 96
IN = math.sqrt(1 / d)
OUT = math.sqrt(1 / d) / math.sqrt(2 * N)
DOWN = math.sqrt(2 / FF) / math.sqrt(2 * N)

SIZES = {"hidden_size": d, "num_hidden_layers": N, "num_attention_heads": 4, "vocab_size": 128}
SIZES |= {"intermediate_size": FF, "max_position_embeddings": 32, "pad_token_id": None}
GQA = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
COMMON = {"embed_tokens": 1.0, "lm_head": IN}
ATTENTION = {**COMMON, "q_proj": IN, "k_proj": IN, "v_proj": IN, "o_proj": OUT}
LLAMA = {**ATTENTION, "gate_proj": IN, "up_proj": IN, "down_proj": DOWN}
# Gemma ties W_e to W_p. The tied matrix starts as W_p does in other models.
GEMMA = {**LLAMA, "embed_tokens": IN, "lm_head": IN}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
NEOX = {"query_key_value": IN, "dense": OUT, "dense_h_to_4h": IN, "dense_4h_to_h": DOWN}
GPT2 = {"n_embd": d, "n_layer": N, "n_head": 4, "n_inner": FF, "vocab_size": 128, "n_positions": 32}

# Config class → its arguments, and He's standard deviation of each matrix by the last name in its module's path.
FAMILIES = {
    "Llama": (GQA, LLAMA),
    "Mistral": (GQA, LLAMA),
    "Qwen2": (GQA, LLAMA),
    "Qwen3": ({**GQA, "head_dim": 32}, {**LLAMA, "o_proj": math.sqrt(1 / 128) / 2}),
    "Olmo": (GQA, LLAMA),
    "Olmo2": (GQA, LLAMA),
    "Gemma": ({**GQA, "head_dim": 16, "tie_word_embeddings": True}, GEMMA),
    "Gemma2": ({**GQA, "head_dim": 16, "tie_word_embeddings": True}, GEMMA),
    "Gemma3Text": ({**GQA, "head_dim": 16, "tie_word_embeddings": True}, GEMMA),
    "GPT2": (
        GPT2,
        {"wte": IN, "wpe": IN, "c_attn": IN, "attn.c_proj": OUT, "c_fc": IN, "mlp.c_proj": DOWN, "lm_head": IN},
    ),
    "GPTNeoX": (SIZES, {"embed_in": 1.0, "embed_out": IN, **NEOX}),
    "Phi": (SIZES, {**COMMON, "q_proj": IN, "k_proj": IN, "v_proj": IN, "dense": OUT, "fc1": IN, "fc2": DOWN}),
    "Phi3": (GQA, {**COMMON, "qkv_proj": IN, "o_proj": OUT, "gate_up_proj": IN, "down_proj": DOWN}),
    "Mixtral": (
        {**GQA, "num_local_experts": 4},
        {**ATTENTION, "block_sparse_moe.gate": IN, "w1": IN, "w2": DOWN, "w3": IN},
    ),
    "Qwen2Moe": (
        {**GQA, **MOE, "shared_expert_intermediate_size": FF},
        {
            **{**LLAMA, "down_proj": math.sqrt(2 / 48) / 2},
            **{"shared_expert.down_proj": DOWN, "mlp.gate": IN, "shared_expert_gate": IN},
        },
    ),
    "Qwen3Moe": (
        {**GQA, **MOE, "head_dim": 16},
        {**LLAMA, "down_proj": math.sqrt(2 / 48) / 2, "mlp.gate": IN},
    ),
    "Olmoe": ({**GQA, "num_experts": 4}, {**LLAMA, "mlp.gate": IN}),
    "Starcoder2": (GQA, {**ATTENTION, "c_fc": IN, "mlp.c_proj": DOWN}),
}
TIED = ("Gemma", "Gemma2", "Gemma3Text", "GPT2")


def saved(folder: Path, family: str, **changes) -> str:
    """Write a `config.json` of a tiny model into a folder and return the folder."""
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family][0], **changes})
    config.save_pretrained(folder)
    return str(folder)


def build(path: str, init_config: dict | None = None, **keys) -> ComposerWeSaRHFCausalLM:
    torch.manual_seed(0)
    keys = {"pretrained": False, "tokenizer": None, **keys}
    return ComposerWeSaRHFCausalLM(pretrained_model_name_or_path=path, init_config=init_config, **keys)


def assert_starts(model: nn.Module, expected: dict[str, float], norm: float) -> None:
    """Check that every matrix has its standard deviation, all names occur, norms are `norm`, and biases are 0."""
    found = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, kind = name.rpartition(".")
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, norm if kind == "weight" else 0.0)), name
            continue
        [*_, key] = sorted((key for key in expected if f".{path}".endswith(f".{key}")), key=len)
        found.add(key)
        assert within_sampling_error(parameter, expected[key]), (name, parameter.std().item(), expected[key])
    assert found == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_starts_by_its_role(family, tmp_path):
    """Once as built, and once initialised again after all tensors were filled with NaN, as on the meta device.

    The formulas of this file use the widths and none of our functions. Composer calls `param_init_fn` for modules with
    parameters of their own, parents first.
    """
    expected = FAMILIES[family][1]
    init = HE if family not in TIED else {"name": "he_init_"}
    model = build(saved(tmp_path, family), init).model
    norm = 0.0 if family.startswith("Gemma") else 1.0
    assert_starts(model, expected, norm)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (family in TIED)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            model.param_init_fn(module)
    assert_starts(model, expected, norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_spares_norms_but_no_matrix(family):
    """The settings' param group, on the names of each family."""
    [group] = load("setting", "rapid").optimizer.param_groups
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            is_bias = kind == "bias" and isinstance(module, nn.Linear | Conv1D)
            spared = re.search(group.param_str_match, f"model.{name}.{kind}") is not None
            assert is_bias or spared == (parameter.ndim == 1), f"{name}.{kind}"


def test_small_init(tmp_path):
    """σ = √(2/5d) everywhere, divided by √2N for residual outputs, for any fan-in. W_e has it too unless it is set."""
    std = math.sqrt(2 / (5 * d))
    expected = {name: std / 2 if name in ("o_proj", "down_proj") else std for name in LLAMA}
    assert_starts(build(saved(tmp_path, "Llama"), {"name": "small_init_"}).model, expected, 1.0)
    expected |= {"o_proj": std, "down_proj": std, "embed_tokens": 0.5}
    init = {"name": "small_init_", "emb_init_std": 0.5, "init_div_is_residual": False}
    assert_starts(build(saved(tmp_path, "Llama"), init).model, expected, 1.0)


def test_a_pretrained_model_is_left_as_it_is(tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**FAMILIES["Llama"][0])
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    with pytest.warns(UserWarning, match=r"model.init_config is not used, because model.pretrained is true"):
        after = build(str(tmp_path), HE, pretrained=True).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_activation_decides_the_gain_of_the_down_projection(tmp_path):
    expected = {**LLAMA, "down_proj": 5 / 3 * math.sqrt(1 / FF) / 2}
    assert_starts(build(saved(tmp_path, "Llama", hidden_act="tanh"), HE).model, expected, 1.0)
    path = saved(tmp_path, "Llama", hidden_act="relu2")
    with pytest.raises(ValueError, match=r"model.config_overrides.hidden_act: no He gain is known for 'relu2'"):
        build(path, HE)
    build(path, {"name": "small_init_"})


def test_a_matrix_of_unknown_role_is_named_with_the_key_that_gives_it_one():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))
    layer = model.model.layers[1]
    layer.my_proj = nn.Linear(d, d)
    with pytest.raises(ValueError, match=r"model.layers.1.my_proj \(Linear: weight \(64, 64\)\).*{my_proj: W_u}"):
        role_init(model, HE)
    role_init(model, {**HE, "roles": {"my_proj": "W_d"}})
    assert layer.my_proj.role.name == "W_d" and layer.my_proj.role.activation == "silu"
    role_init(model, {**HE, "roles": {"my_proj": "W_u", "mlp.down_proj": "W_o"}})
    assert (layer.my_proj.role.name, layer.mlp.down_proj.role.name) == ("W_u", "W_o")
    layer.experts = nn.ParameterList([torch.zeros(4, d, d)])
    with pytest.raises(ValueError, match=r"layers.1.experts \(ParameterList: 0 \(4, 64, 64\)\) has no known role"):
        role_init(model, {**HE, "roles": {"my_proj": "W_u"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_config": None}, r"model.init_config: None is not a mapping, but pretrained: false needs"),
        ({"init_config": {"name": "wesar_", "sigma": 0.1}}, r"name: 'wesar_' is not one of he_init_, small_init_"),
        ({"init_config": {}}, r"name: None is not one of"),
        ({"init_config": {**HE, "sigma": 0.1}}, r"sigma: 0.1 is not used by he_init_"),
        ({"init_config": {**HE, "emb_init_std": -1}}, r"emb_init_std: -1 is not a positive number"),
        ({"init_config": {**HE, "roles": "W_u"}}, r"roles: 'W_u' is not a mapping"),
        ({"init_config": {**HE, "roles": {"o_proj": "W_x"}}}, r"roles.o_proj: 'W_x' is not one of W_e, W_pos"),
        ({"init_config": {**HE, "roles": {"oproj": "W_o"}}}, r"roles: no path of a matrix ends with oproj"),
        (
            {"init_config": HE, "config_overrides": {"tie_word_embeddings": True}},
            r"emb_init_std: 1.0 is also .* W_p.*`model.config_overrides.tie_word_embeddings: false`",
        ),
        ({"init_config": HE, "zloss": 0.1}, r"model.zloss: 0.1 has no effect.*did you mean z_loss"),
        ({"init_config": HE, "embedding_scaling": True}, r"model.embedding_scaling: True has no effect"),
        ({"init_config": HE, "z_loss": -1}, r"model.z_loss: -1 is not a number ≥ 0"),
    ],
)
def test_a_wrong_section_is_refused_by_key(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(saved(tmp_path, "Llama"), **changes)


def test_names_of_adapters_are_not_looked_for_in_the_model_without_them(tmp_path):
    model = {"name": "wesar_hf_causal_lm", "pretrained_model_name_or_path": saved(tmp_path, "Llama")}
    config = {"optimizer": {"name": "wesar_adamw", "gated": "lora_A"}}
    with pytest.raises(ValueError, match=r"optimizer.gated: 'lora_A' matches no trained parameter"):
        expand({"model": model, **config})
    model |= {"peft_config": {"peft_type": "LORA"}, "z_loss": 1e-4}
    expand({"model": model, **config})
    with pytest.raises(ValueError, match=r"optimizer.sgima: 0.1 is not an option of wesar_adamw; did you mean sigma"):
        expand({"model": model, "optimizer": {"name": "wesar_adamw", "sgima": 0.1}})
    with pytest.raises(ValueError, match=r"callbacks.kill_loss_spike: .* set model.z_loss: 0"):
        expand({"model": model, "callbacks": {"kill_loss_spike": {}}, **config})


def test_z_loss_is_that_of_our_cross_entropy(tmp_path):
    """Value and gradient, with masked tokens. Both are float32 sums of 45 terms in different orders."""
    model = build(saved(tmp_path, "Llama"), HE, z_loss=0.1)
    ids = torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids < 16, -100)}
    outputs = model(batch)
    terms = model.loss(outputs, batch)
    expected = cross_entropy(outputs["logits"][:, :-1], batch["labels"][:, 1:], 0.1)
    weight = model.model.lm_head.weight
    gradients = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (terms["total"], expected.total)]
    for ours, reference in zip(
        (terms["loss"], terms["z_loss"], terms["total"]), expected[1:] + expected[:1], strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # the logits are bfloat16, the z-loss is computed in float32
        outputs = model(batch)
        z_loss = model.loss(outputs, batch)["z_loss"]
    assert outputs["logits"].dtype == torch.bfloat16
    expected = cross_entropy(outputs["logits"][:, :-1].float(), batch["labels"][:, 1:], 0.1)
    torch.testing.assert_close(z_loss, expected.z_loss, rtol=1e-5, atol=0)


LLAMA_YAML = [
    "run_name=tiny",
    "precision=fp32",
    "max_seq_len=16",
    "max_duration=2ba",
    "global_train_batch_size=8",
    "device_train_microbatch_size=4",
    "eval_interval=0",
    "scheduler.t_warmup=0ba",
    "train_loader.num_workers=0",
    "train_loader.prefetch_factor=null",
    "train_loader.persistent_workers=false",
    "eval_loader=null",
    "save_folder=null",
    "autoresume=false",
    "log_to_console=false",
    "callbacks.speed_monitor=null",
    "callbacks.update_ratio_monitor.interval=1ba",
    "callbacks.gate_monitor.interval=1ba",
    "loggers.inmemory={}",
    "model.config_overrides={hidden_size: 32, num_hidden_layers: 2, intermediate_size: 64, num_attention_heads: 4,"
    " num_key_value_heads: 2, head_dim: 8, vocab_size: 97}",
]


INIT = "model.init_config={name: he_init_, emb_init_std: 1.0}"


@pytest.mark.parametrize("overrides", [[], ["variables.method=null", INIT, "callbacks.gate_monitor=null"]])
def test_foundry_trains_the_llama_of_the_yaml(overrides, dataset, tmp_path, monkeypatch):
    """Foundry's own function trains yamls/llama-160m.yaml, made tiny, for two steps, and every matrix moves.

    Once with the gates in the optimizer and once with the setting's AdamW.
    """
    monkeypatch.chdir(REPOSITORY)
    paths = [f"variables.data={dataset}", f"loggers.tensorboard.log_dir={tmp_path}"]
    trainer = train_from_yaml("yamls/llama-160m.yaml", [*LLAMA_YAML, *paths, *overrides])
    [logger] = [each for each in trainer.logger.destinations if isinstance(each, InMemoryLogger)]
    trainer.close()
    assert {key for key in logger.data if key.startswith("loss/train")} == {
        f"loss/train/{key}" for key in ("total", "loss", "z_loss")
    }
    ratios = [pairs[-1][1] for key, pairs in logger.data.items() if key.startswith("update_ratio/")]
    assert len(ratios) == 7 * 2 + 2 and min(map(float, ratios)) > 0
