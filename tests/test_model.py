import math
import re

import pytest
import torch
import torch.nn.functional as F
from llmfoundry.models.mpt.modeling_mpt import ComposerMPTCausalLM
from llmfoundry.utils.builders import build_optimizer
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmfoundry_wesar.layers import Gated, Reparameterized
from llmfoundry_wesar.methods import load, names
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM, WeSaRMPTConfig
from tests.tiny import PAPER_SIGMA, batch, build, model_config

PLAIN = {"init_config": {"name": "small_init_"}}


def logits(model, ids=None):
    model.eval()
    with torch.no_grad():
        return model.model(batch()["input_ids"] if ids is None else ids).logits


def test_without_our_keys_it_is_the_stock_model():
    """With equal parameters, logits and loss equal those of mpt_causal_lm to the bit. Only W_p is drawn differently."""
    ours = build(None, **PLAIN)
    stock = ComposerMPTCausalLM(**model_config(None, **PLAIN), loss_fn="torch_crossentropy")
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours), logits(stock))
    losses = [model.loss(model.train()(batch()), batch()) for model in (ours, stock)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", names("method"))
def test_every_matrix_of_a_method_has_its_kind_of_layer(method):
    model = build(method).model
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert len(matrices) == 14
    reparameterized = method != "wesar_adamw" and method.split("_")[0] in ("wesar", "weight", "sigma")
    assert {isinstance(m, Reparameterized) for m in matrices} == {reparameterized}


def test_fixed_gates_are_no_parameters():
    """They are frozen and absent from the optimizer, but saved in the checkpoint."""
    model = build("wesar_fixed")
    assert not [name for name, _ in model.named_parameters() if "gate" in name]
    assert len([name for name in model.state_dict() if name.endswith(".gate")]) == 14
    trained = {id(p) for group in build_optimizer(model, "adamw", {"lr": 1e-3}).param_groups for p in group["params"]}
    assert not any(id(m.gate) in trained for m in model.modules() if isinstance(m, Gated))


@pytest.mark.parametrize(
    ("saved", "method", "lacks"),
    [
        ("wesar", "he_init", "model lacks 14 tensors, such as lm_head.gate"),
        ("he_init", "wesar", "checkpoint lacks 14 tensors, such as transformer.wte.gate"),
        ("wesar", "sigma_reparam", "checkpoint lacks 28 tensors, such as transformer.wte.left"),
        ("sigma_reparam", "wesar", "model lacks 28 tensors, such as lm_head.left"),
    ],
)
def test_the_weights_of_layers_with_other_gates_are_refused(saved, method, lacks):
    """Composer loads a whole checkpoint without `strict`, so that gates would be dropped without an error."""
    state = build(saved).state_dict()
    with pytest.raises(ValueError, match=f"load_path: the {lacks}. The checkpoint was saved with another variables"):
        build(method).load_state_dict(state, strict=False)


def test_the_weights_of_layers_with_the_same_gates_are_loaded():
    """Also those of a part of the model, as for a new vocabulary."""
    state = build("wesar").state_dict()
    build("wesar_fixed").load_state_dict(state)
    part = {name: tensor for name, tensor in state.items() if "lm_head" not in name}
    assert len(build("wesar").load_state_dict(part, strict=False).missing_keys) == 2


@pytest.mark.parametrize("method", ["wesar", "embedding_norm"])
def test_weight_decay_spares_gates_and_norms_but_no_matrix(method):
    """The settings' param group, on a model with a `gate_proj`, and on one with a norm on its embedding."""
    model = build(method, ffn_config={"ffn_type": "mptglu"})
    groups = load("setting", "rapid").optimizer.param_groups
    optimizer = build_optimizer(
        model, "adamw", {"lr": 1e-3, "weight_decay": 0.01, "param_groups": [dict(g) for g in groups]}
    )
    names_of = {id(p): n for n, p in model.named_parameters()}
    decayed, spared = ({names_of[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(n.endswith(".weight") and "norm" not in n for n in decayed)
    assert all(n.endswith(".gate") or "norm" in n for n in spared)
    assert len(spared) == (5 + 16 if method == "wesar" else 6)
    assert len(decayed) == 16


def test_weight_decay_takes_no_matrix_for_a_norm_where_foundry_fuses_them():
    """If foundry fuses norm and attention, W_q has the name blocks.0.norm_attn_norm.attn.Wq."""
    model = build("wesar", fuse_norm_attn_norm=True)
    [group] = load("setting", "rapid").optimizer.param_groups
    spared = {name for name, _ in model.named_parameters() if re.search(group.param_str_match, name)}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Gated)}
    assert any("norm_attn_norm.attn.Wq" in name for name in matrices)
    assert spared == {name for name, _ in model.named_parameters()} - matrices


@pytest.mark.parametrize("backbone", ["he", "small"])
def test_residual_scaling_computes_the_function_of_the_scaled_init(backbone):
    """Appendix C.3: the multiplier 1/√2N is the init's divisor of W_o and W_d. Only float32 rounding differs."""
    scaled, multiplied = build(f"{backbone}_init"), build(f"residual_scaling_{backbone}")
    for a, b in zip(scaled.parameters(), multiplied.parameters(), strict=True):
        factor = (b.norm() / a.norm()).item()
        assert any(factor == pytest.approx(f, rel=1e-5) for f in (1, math.sqrt(2 * 2)))
    torch.testing.assert_close(logits(scaled), logits(multiplied), rtol=1e-4, atol=1e-5)


def test_post_norm_block_is_norm_of_branch_plus_stream():
    """y = LN(f(x) + x) by hand, and no norm after the last block."""
    model = build(None, norm_placement="post", init_config={"name": "he_init_"}).model.eval()
    transformer, ids = model.transformer, batch()["input_ids"]
    assert isinstance(transformer.norm_f, nn.Identity)
    x = transformer.wte(ids)
    rotary = {
        "impl": "hf",
        "rotary_emb": transformer.rotary_embedding,
        "offset_info": torch.arange(16)[None],
        "seq_len": 16,
    }
    for block in transformer.blocks:
        x = block.norm_1(x + block.attn(x, rotary_emb_w_meta_info=rotary, is_causal=True)[0])
        x = block.norm_2(x + block.ffn(x))
    torch.testing.assert_close(model(ids).logits, model.lm_head(x), rtol=1e-5, atol=1e-5)


def test_embedding_variants_of_takase_et_al():
    """Scaling and norm both give the stream unit variance at the start. Without them it has the variance σ_e²."""
    ids = torch.arange(97)[None, :16]
    streams = {}
    for method in ("small_init", "embedding_norm", "no_embedding_scaling", "wesar"):
        transformer = build(method).model.transformer.eval()
        streams[method] = transformer.emb_drop(transformer.wte(ids)).std().item()
    assert streams["small_init"] == pytest.approx(1, abs=0.1)
    assert streams["wesar"] == pytest.approx(1, abs=0.1)
    assert streams["embedding_norm"] == pytest.approx(1, abs=0.01)
    assert streams["no_embedding_scaling"] == pytest.approx(math.sqrt(2 / 160), rel=0.1)


def test_embedding_detach_shrinks_the_gradient_alone():
    """The remedy of GLM: the same function, with a tenth of the embedding's gradient."""
    models_ = [build("embedding_detach"), build("no_embedding_scaling")]
    gradients = []
    for model in models_:
        loss = F.cross_entropy(
            model.model(batch()["input_ids"]).logits.flatten(0, 1), batch(seed=5)["labels"].flatten()
        )
        loss.backward()
        gradients.append(model.model.transformer.wte.weight.grad)
    assert torch.allclose(logits(models_[0]), logits(models_[1]), atol=1e-6)
    torch.testing.assert_close(gradients[0], 0.1 * gradients[1], rtol=1e-4, atol=1e-8)


def test_z_loss_by_hand_with_masked_tokens():
    """Cross-entropy and z-loss are means over tokens with a target.

    The last token of a row and masked tokens have none.
    """
    coefficient = 0.02
    model, data = build("wesar", z_loss=coefficient), batch()
    data["labels"][0, 5:9] = -100
    outputs = model.train()(data)
    found = model.loss(outputs, data)
    squares, nats = [], []
    for row, targets in zip(outputs.logits.double(), data["labels"], strict=True):
        for position in range(15):
            if (target := targets[position + 1]) != -100:
                log_z = row[position].exp().sum().log()
                squares.append(log_z**2)
                nats.append(log_z - row[position, target])
    assert len(nats) == 3 * 15 - 4
    z_loss, cross_entropy = coefficient * torch.stack(squares).mean(), torch.stack(nats).mean()
    assert found["z_loss"].item() == pytest.approx(z_loss.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert found["total"].item() == pytest.approx((z_loss + cross_entropy).item(), rel=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found["total"], parameters, retain_graph=True),
        torch.autograd.grad(z_loss + cross_entropy, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("method", ["small_init", "wesar", "weight_norm"])
def test_fused_loss_is_the_loss(method, z_loss):
    """Loss and gradients are the same, fused with W_p or from logits, except for the order of sums.

    Evaluation has logits.

    Each gradient is compared in norm, relative to its own norm: half of them differ by less than 4e-7. The gradient of
    a scalar gate is one sum of up to 4,096 terms that nearly cancel. In the worst case its relative difference is 7e-5.
    """
    fused, plain = (build(method, z_loss=z_loss, fused_loss=f, use_train_metrics=False) for f in (True, False))
    data = batch()
    data["labels"][0, 5:9] = -100
    results = []
    for model in (fused, plain):
        loss = model.loss(model.train()(data), data)
        total = loss["total"] if z_loss else loss
        total.backward()
        results.append([total, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 3e-4
    assert torch.equal(logits(fused), logits(plain))


@pytest.mark.parametrize(
    "attention",
    [
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
        {"attn_type": "multiquery_attention"},
        {"attn_type": "sdpa_attention"},
    ],
)
@pytest.mark.parametrize("ffn", ["mptmlp", "mptglu"])
@pytest.mark.parametrize("method", ["wesar", "weight_norm"])
def test_stock_paths_train_with_reparameterised_layers(attention, ffn, method):
    """Every parameter gets a gradient, and the loss on a repeated batch falls."""
    model = build(method, attn_config=attention, ffn_config={"ffn_type": ffn})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.loss(model.train()(batch()), batch())
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_counts_of_parameters_and_flops_are_foundrys():
    """Each matrix adds one gate to the count. As in foundry, flops are 6 a parameter and token, plus attention's."""
    model, plain = build("wesar"), build("small_init")
    assert model.n_total_params == plain.n_total_params + 14 == sum(p.numel() for p in model.parameters())
    tokens = batch()["input_ids"]
    attention = 3 * 2 * 4 * 32 * 16**2
    assert model.flops_per_batch({"input_ids": tokens}) == (6 * 16 * model.n_active_params + attention) * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"init_config": {"name": "small_init_"}},
            "init_config.name: small_init_ does not initialise the gates.*name: wesar_",
        ),
        ({"fc_type": {"name": "torch"}}, "init_config.name: wesar_ needs layers with gates.*fc_type: {name: wesar}"),
        ({"fc_type": {"name": "wezar"}}, "fc_type.name: 'wezar' is not one of .*wesar"),
        ({"attn_config": {"fused_qkv": True}}, "attn_config.fused_qkv: true.*Set it to false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: true.*Set it to false"),
        ({"z_loss": -1.0}, "z_loss: -1.0 is not a number"),
        ({"z_loss": 1e-4, "loss_fn": "fused_crossentropy"}, "loss_fn: fused_crossentropy has no z-loss"),
        ({"fused_loss": True}, "fused_loss: true gives no logits.*use_train_metrics: false"),
        ({"fused_loss": True, "use_train_metrics": False, "logit_scale": 0.5}, "fused_loss: true.*logit_scale: 0.5"),
        ({"norm_placement": "sandwich"}, "norm_placement: 'sandwich' is not one of pre, post"),
        ({"ffn_config": {"ffn_type": "torch_dmoe"}}, "ffn_config.ffn_type: torch_dmoe.*mptmlp or mptglu"),
        ({"attn_config": {"rope": False}, "learned_pos_emb": True}, "learned_pos_emb: true.*rope: true"),
        ({"init_config": {"sigma": 0.0}}, "init_config.sigma: 0.0 is not a positive number"),
        ({"zloss": 1e-4}, r"zloss: 0\.0001 has no effect.*did you mean z_loss\?"),
        ({"colour": "red"}, "colour: 'red' has no effect.*remove it"),
        ({"fc_type": {"trainabel": False}}, "fc_type.trainabel: False is not an option.* gate_shape, trainable"),
        (
            {"fc_type": {"name": "weight_norm", "gate_shape": "row"}},
            "fc_type.gate_shape: 'row' is not an option of .* are: none",
        ),
    ],
)
def test_wrong_options_are_refused_by_key(overrides, message):
    with pytest.raises(ValueError, match=rf"model\.{message}"):
        build("wesar", **overrides)


def test_keys_that_foundry_reads_without_declaring_them_pass():
    assert hasattr(build(fuse_norm_attn_norm=True, torch_dtype="float32").model.transformer.blocks[0], "norm_attn_norm")


def test_embedding_scaling_follows_the_embeddings_own_init():
    """Foundry's keys set σ_e, as it is drawn: the stream starts with unit variance."""
    for keys in ({"emb_init_std": 0.5}, {"emb_init_uniform_lim": 0.1}, {"emb_init_uniform_lim": [-0.3, 0.3]}):
        wte = build(None, embedding_scaling=True, init_config={"name": "small_init_", **keys}).model.transformer.wte
        # 3,104 draws: one standard error of the standard deviation is 1.3% of it.
        assert wte(torch.arange(97)).std().item() == pytest.approx(1, rel=0.06)


def test_wesar_can_have_its_embedding_scale_in_a_constant():
    """The other reading of Table 1: the same function up to float32 rounding, with an α_e of 1."""
    by_gate, by_constant = build("wesar"), build("wesar", embedding_scaling=True)
    wte = by_constant.model.transformer.wte
    assert wte.scale == pytest.approx(1 / PAPER_SIGMA, rel=1e-7) and wte.gate.item() == pytest.approx(1, rel=1e-6)
    assert by_gate.model.transformer.wte.scale == 1
    torch.testing.assert_close(logits(by_constant), logits(by_gate), rtol=1e-4, atol=1e-5)


def test_embedding_scaling_needs_a_known_scale():
    with pytest.raises(ValueError, match=r"embedding_scaling: true needs σ_e, .* kaiming_normal_"):
        build(None, embedding_scaling=True)


@pytest.mark.parametrize(("key", "value", "fix"), [("z_loss", 1e-4, "0"), ("fused_loss", True, "false")])
def test_the_loss_of_megablocks_keeps_its_term_for_the_experts(key, value, fix, monkeypatch):
    """Our loss would leave it out. The package need not be installed: another mixture of experts takes its place."""
    monkeypatch.setattr("llmfoundry_wesar.model.ffns_with_megablocks", ["torch_dmoe"])
    options = {**model_config("small_init"), "ffn_config": {"ffn_type": "torch_dmoe"}}
    with pytest.raises(ValueError, match=rf"model.{key}: {value} does not work with ffn_type: .* set it to {fix}\."):
        WeSaRMPTConfig(**{**options, "z_loss": 0.0, key: value})


def test_a_tokenizer_that_does_not_fit_is_refused():
    vocabulary = {f"t{i}": i for i in range(98)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")))
    with pytest.raises(
        ValueError, match=r"model\.vocab_size: 97 is less than the 98 tokens of the tokenizer. Set it to 98"
    ):
        ComposerWeSaRMPTCausalLM(tokenizer=tokenizer, **model_config("wesar"))


def test_forward_is_the_stock_one():
    """For torch.compile our forward passes the inputs on itself: equal logits to the bit, with and without a mask."""
    model, tokens = build("wesar"), batch()
    mask = torch.ones_like(tokens["input_ids"], dtype=torch.bool)
    mask[0, 9:] = False
    for inputs in (tokens, tokens | {"attention_mask": mask}):
        assert torch.equal(model(inputs).logits, ComposerMPTCausalLM.forward(model, inputs).logits)
