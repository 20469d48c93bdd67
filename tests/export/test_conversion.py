"""Convert models to models: the same function in the layers of another architecture."""

import catalogue
import pytest
import torch
from llmfoundry.layers_registry import attention_classes
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from llmfoundry_wesar.attention import SDPAttention
from llmfoundry_wesar.export.arcee import ArceeForCausalLM
from llmfoundry_wesar.export.conversion import build_mpt, from_llama, hf_config, merge, to_gated, to_hf
from llmfoundry_wesar.export.files import load, model_section
from llmfoundry_wesar.layers import Reparameterized, ScaledEmbedding
from llmfoundry_wesar.methods import names
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM
from tests.recorder import Recorder
from tests.tiny import batch, build, model_config
from tests.trained import EXPRESSIBLE, INEXPRESSIBLE, assert_same_logits, logits

# Merging rounds every entry of every matrix to float32, 6e-8 relative, and kernels may add in another order: 3e-7 was
# seen. A missing multiplier, or a missing gate of one row, would give an error above 1e-3.
FLOAT32 = 1e-5


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_plain_mpt_computes_what_the_trained_model_does(case, trained):
    model, _ = load(trained[case].folder)
    plain = merge(model)
    assert type(plain) is MPTForCausalLM
    assert not [name for name in plain.state_dict() if name.endswith((".gate", ".left", ".right"))]
    assert_same_logits(logits(plain, trained[case].ids), trained[case].logits, FLOAT32)


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_plain_llama_or_arcee_computes_what_the_trained_model_does(case, trained):
    model, tokenizer = load(trained[case].folder)
    plain = to_hf(model, tokenizer)
    assert type(plain) is (LlamaForCausalLM if case == "glu" else ArceeForCausalLM)
    assert_same_logits(logits(plain, trained[case].ids), trained[case].logits, FLOAT32)


@pytest.mark.parametrize("method", sorted(set(names("method")) - INEXPRESSIBLE.keys()))
@pytest.mark.parametrize("case", ["small_init", "fused_and_tied", "biases"])
def test_every_method_can_start_from_any_model(case, method, trained):
    """The function stays the same, and every actual weight gets the method's σ, for any matrices of the model.

    1e-6 for σ, which is a sum over 512 entries or more in float32.
    """
    model, _ = load(trained[case].folder)
    gated = to_gated(model, method)
    assert_same_logits(logits(gated, trained[case].ids), trained[case].logits, FLOAT32)
    for module in gated.modules():
        if isinstance(module, Reparameterized):
            rms = module.weight.square().mean().sqrt().item()
            assert rms == pytest.approx(gated.config.init_config["sigma"], rel=1e-6)


@pytest.mark.parametrize(
    "attention, features",
    [
        ({"attn_type": "multihead_attention"}, {"softmax_scale": 0.4}),
        ({"attn_type": "multihead_attention"}, {"clip_qkv": 0.1, "qk_ln": True}),
        ({"attn_type": "multihead_attention"}, {"rope": False, "alibi": True}),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {"sliding_window_size": 3}),
        ({"attn_type": "multiquery_attention"}, {"fused_qkv": True, "attn_logit_softcapping": 0.5}),
        ({"attn_type": "sdpa_attention"}, {}),
    ],
)
def test_a_gated_model_needs_no_matrix_of_scores(attention, features):
    """Every attention of foundry becomes ours, with the same function.

    The matrix of scores is the largest tensor of the plain model. In the gated model it exists only if no kernel has
    the feature.
    """
    length = 512
    torch.manual_seed(0)
    config = WeSaRMPTConfig(**model_config("small_init", attn_config=attention | features, max_seq_len=length))
    model = WeSaRMPTForCausalLM(config)
    plain, gated = merge(model), to_gated(model, "wesar")
    assert gated.config.attn_config["attn_type"] == "sdpa_attention"
    assert model_section(gated.config)["attn_config"]["attn_type"] == "sdpa_attention"
    ids = batch(1, length)["input_ids"]
    largest = {}
    for name, model in (("plain", plain), ("gated", gated)):
        with Recorder() as recorder:
            model(ids)
        largest[name] = recorder.largest[torch.float32]
    assert largest["plain"] == 4 * length**2
    kernel = not features.keys() & {"alibi", "sliding_window_size", "attn_logit_softcapping"}
    assert largest["gated"] < length**2 if kernel else largest["gated"] == largest["plain"]
    assert_same_logits(logits(gated, ids), logits(plain, ids), FLOAT32)


@pytest.mark.parametrize("key, value", [("attn_impl", "flash"), ("attn_type", "another")])
def test_an_attention_that_ours_may_not_equal_is_kept(key, value, monkeypatch):
    """`sdpa_attention` refuses `attn_impl: flash`, and the class of another package may compute something else."""
    monkeypatch.setitem(catalogue.REGISTRY, (*attention_classes.namespace, "another"), SDPAttention)
    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": 4}
    model = WeSaRMPTForCausalLM(WeSaRMPTConfig(**model_config("small_init", attn_config=grouped)))
    model.config.attn_config[key] = value
    assert to_gated(model, "wesar").config.attn_config == model.config.attn_config


def test_there_and_back_again_is_exact_to_float32_rounding(trained):
    """α(W̄/α) has two roundings of half a unit in the last place, 2⁻²⁴ each."""
    model, _ = load(trained["wesar"].folder)
    plain = merge(model)
    again = merge(to_gated(model, "wesar"))
    for (name, weight), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(other, weight, rtol=2**-22, atol=0, msg=name)


def test_llama_becomes_the_mpt_that_it_was_made_from(trained):
    """Config and weights of a model with a GLU, grouped heads and biases, through Hugging Face's names and back.

    Files of transformers up to 4.31 also contain constants. Their values are ignored: the config determines them.
    """
    for case in ("glu", "grouped", "biases"):
        model, _ = load(trained[case].folder)
        llama = to_hf(model)
        constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        config, weights = from_llama(llama.config.to_dict(), llama.state_dict() | constants)
        again = build_mpt(WeSaRMPTConfig.from_dict(config), weights)
        assert_same_logits(logits(again, trained[case].ids), trained[case].logits, FLOAT32)


def test_tied_embeddings_have_two_names_but_one_value():
    """The state of a tied Llama has the matrix twice. After divergence it has NaN. Two values are refused."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(97, 32, 64, 2, 4, tie_word_embeddings=True))
    weights, ids = llama.state_dict(), batch()["input_ids"]
    config, renamed = from_llama(llama.config.to_dict(), weights)
    again = build_mpt(WeSaRMPTConfig(**config), renamed)
    assert again.lm_head is None
    assert_same_logits(logits(again, ids), logits(llama, ids), FLOAT32)
    weights["model.embed_tokens.weight"][5] = float("nan")
    from_llama(llama.config.to_dict(), weights)
    weights["lm_head.weight"] = torch.zeros(97, 32)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: true, but lm_head\.weight differs from"):
        from_llama(llama.config.to_dict(), weights)


def test_scaled_rope_of_llama_3_is_kept():
    """Against transformers' own Llama, where the scaling changes the logits, and back."""
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    config = LlamaConfig(97, 32, 64, 2, 4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3)
    config.rope_scaling = rope
    llama, ids = LlamaForCausalLM(config), batch()["input_ids"]
    tree, weights = from_llama(config.to_dict(), llama.state_dict())
    model = build_mpt(WeSaRMPTConfig.from_dict(tree), weights)
    assert_same_logits(logits(model, ids), logits(llama, ids), FLOAT32)
    again = to_hf(to_gated(model, "wesar"))
    assert again.config.rope_scaling == rope
    assert_same_logits(logits(again, ids), logits(llama, ids), FLOAT32)
    config.rope_scaling = None
    unscaled = LlamaForCausalLM(config)
    unscaled.load_state_dict(llama.state_dict())
    assert (logits(unscaled, ids) - logits(llama, ids)).abs().max() > 0.1


def test_rope_is_read_as_transformers_5_writes_it(trained):
    """Transformers 5 has `rope_parameters` in place of `rope_theta`.

    The models here have 500, which is not the default.
    """
    model, _ = load(trained["wesar"].folder)
    llama = to_hf(model).config.to_dict()
    assert llama.pop("rope_theta") == 500
    llama["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    assert from_llama(llama, {})[0]["attn_config"]["rope_theta"] == 500


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_no_plain_model_has_is_refused_by_name(case, trained):
    model, _ = load(trained[case].folder)
    assert_same_logits(logits(model, trained[case].ids), trained[case].logits, FLOAT32)  # it can still be loaded
    for target in (merge, to_hf, lambda model: to_gated(model, "wesar")):
        with pytest.raises(ValueError, match=rf"cannot express model\.{INEXPRESSIBLE[case]}: "):
            target(model)
    small, _ = load(trained["small_init"].folder)
    with pytest.raises(ValueError, match=rf"model\.{INEXPRESSIBLE[case]}: "):
        to_gated(small, case)


def test_a_fused_norm_is_refused_by_name():
    """Fusing renames the matrices of a block, so multipliers would miss them, and a Llama has no place for them."""
    config = WeSaRMPTConfig(**model_config("residual_scaling_he"), fuse_norm_attn_norm=True)
    model = WeSaRMPTForCausalLM(config)
    for target in (merge, to_hf, lambda model: to_gated(model, "wesar")):
        with pytest.raises(ValueError, match=r"cannot express model\.fuse_norm_attn_norm: true \(only null or false\)"):
            target(model)


def test_the_name_of_a_norm_may_have_capitals():
    """Foundry trains with such a name."""
    assert hf_config(build(norm_type="RMSNorm").model.config).rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    "key, options",
    [
        ("norm_type", {"norm_type": "layernorm"}),
        ("learned_pos_emb", {"learned_pos_emb": True, "attn_config": {"rope": False}}),
        ("attn_config.rope", {"attn_config": {"rope": False, "alibi": True}}),
        ("attn_config.alibi", {"attn_config": {"rope": False, "alibi": True}}),
        ("attn_config.rope_hf_config.type", {"attn_config": {"rope_hf_config": {"type": "linear", "factor": 2.0}}}),
        ("attn_config.clip_qkv", {"attn_config": {"clip_qkv": 6.0}}),
        ("attn_config.qk_ln", {"attn_config": {"qk_ln": True}}),
        ("attn_config.qk_gn", {"attn_config": {"qk_gn": True}}),
        ("attn_config.attn_logit_softcapping", {"attn_config": {"attn_logit_softcapping": 30.0}}),
        ("attn_config.sliding_window_size", {"attn_config": {"sliding_window_size": 8}}),
        (
            "attn_config.attn_temperature_tuning.attn_scale",
            {"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1, "floor_scale": 8}}},
        ),
        ("attn_config.kv_dim", {"attn_config": {"kv_dim": 32}}),
        ("block_overrides", {"block_overrides": {"order": [{"name": "default", "repeat": 2}], "overrides": {}}}),
        ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
        ("attention_bias", {"attention_bias": True}),
        ("ffn_config.ffn_act_fn", {"ffn_config": {"ffn_act_fn": {"name": "selu"}}}),
    ],
)
def test_what_llama_has_not_is_refused_by_name(key, options):
    """Each option changes the function, so a model without it would be another model."""
    model = build(None, init_config={"name": "small_init_"}, **options).model
    with pytest.raises(ValueError, match=rf"ArceeForCausalLM cannot express .*model\.{key}: "):
        hf_config(model.config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "relu2"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "rope_type": "default", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "rope_type": "llama3", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_what_mpt_has_not_is_refused_by_name(key, value, trained):
    model, _ = load(trained["wesar"].folder)
    name = r"rope_(scaling\.)?type" if key.startswith("rope") else key
    with pytest.raises(ValueError, match=rf"MPT cannot express {name}: "):
        from_llama({**to_hf(model).config.to_dict(), key: value}, {})


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_matrix_without_a_scale_gets_no_gate(value, trained):
    model, _ = load(trained["small_init"].folder)
    model.transformer.blocks[1].ffn.up_proj.weight.fill_(value)
    with pytest.raises(ValueError, match=r"transformer\.blocks\.1\.ffn\.up_proj\.weight gives no value for its gate"):
        to_gated(model, "wesar")


def test_weight_normalisation_refuses_a_row_of_zeros(trained):
    """As a vocabulary that was padded has."""
    model, _ = load(trained["small_init"].folder)
    model.transformer.wte.weight[7] = 0
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight cannot be trained with weight_norm: the norm of"):
        to_gated(model, "weight_norm")


def test_a_softmax_scale_of_0_is_kept(trained):
    """Every token then attends equally to those before it."""
    model, _ = load(trained["wesar"].folder)
    for module in model.modules():
        if hasattr(module, "softmax_scale"):
            module.softmax_scale = 0.0
    model.config.attn_config["softmax_scale"] = 0.0
    ids = trained["wesar"].ids
    assert_same_logits(logits(to_hf(model), ids), logits(model, ids), FLOAT32)


def test_weights_of_another_config_are_refused(trained):
    model, _ = load(trained["wesar"].folder)
    weights = dict(model.state_dict())
    weights["transformer.norm_f.weight"] = torch.ones(31)
    with pytest.raises(ValueError, match=r"1 weights have another shape, such as transformer\.norm_f\.weight"):
        build_mpt(model.config, weights)
    del weights["transformer.norm_f.weight"]
    with pytest.raises(ValueError, match=r"1 weights are missing, such as transformer\.norm_f\.weight"):
        build_mpt(model.config, weights)


def test_the_stock_embedding_is_scaled_once(trained):
    """Embedding scaling unties W_e and W_p. The unembedding is not scaled, even if both were one matrix."""
    model, _ = load(trained["fused_and_tied"].folder)
    assert isinstance(model.transformer.wte, ScaledEmbedding)
    assert model.config.tie_word_embeddings and model.transformer.wte.scale != 1
    plain = merge(model)
    assert torch.equal(plain.lm_head.weight, model.transformer.wte.weight)
    assert torch.equal(plain.transformer.wte.weight, model.transformer.wte.weight * model.transformer.wte.scale)
