import math

import pytest
import torch
from llmfoundry.layers_registry import param_init_fns
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from torch import nn

from llmfoundry_wesar.initialization import activation_gain, backbone_std
from llmfoundry_wesar.layers import GatedLinear, Reparameterized
from llmfoundry_wesar.methods import names
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM
from llmfoundry_wesar.roles import ROLES
from tests.tiny import PAPER_SIGMA, build, model_config, within_sampling_error

# Table 1 as the paper prints it: role → standard deviation as a function of d and N.
TABLE_1 = {
    "he": {
        "W_q": lambda d, N: math.sqrt(1 / d),
        "W_k": lambda d, N: math.sqrt(1 / d),
        "W_v": lambda d, N: math.sqrt(1 / d),
        "W_o": lambda d, N: math.sqrt(1 / (2 * N * d)),
        "W_u": lambda d, N: math.sqrt(1 / d),
        "W_d": lambda d, N: math.sqrt(2 / (8 * N * d)),
        "W_p": lambda d, N: math.sqrt(1 / d),
    },
    "small": {
        "W_q": lambda d, N: math.sqrt(2 / (5 * d)),
        "W_k": lambda d, N: math.sqrt(2 / (5 * d)),
        "W_v": lambda d, N: math.sqrt(2 / (5 * d)),
        "W_o": lambda d, N: math.sqrt(2 / (10 * N * d)),
        "W_u": lambda d, N: math.sqrt(2 / (5 * d)),
        "W_d": lambda d, N: math.sqrt(2 / (10 * N * d)),
        "W_p": lambda d, N: math.sqrt(2 / (5 * d)),
    },
}
SIZES = [(32, 2), (64, 3), (96, 1)]


def matrices(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "role")}


@pytest.mark.parametrize(("d", "N"), SIZES)
@pytest.mark.parametrize("backbone", TABLE_1)
def test_table_1_wesar(backbone, d, N):
    """Every actual weight has the one σ and every gate is σ_•/σ in float32, so virtual weights have Table 1's σ_•."""
    model = build("wesar", d_model=d, n_layers=N, init_config={"backbone": backbone})
    found = matrices(model)
    assert len(found) == 6 * N + 2
    for module in found.values():
        std = 1.0 if module.role.name == "W_e" else TABLE_1[backbone][module.role.name](d, N)
        assert within_sampling_error(module.weight, 0.0063245553)
        assert module.gate.shape == (1,)
        assert module.gate.item() == pytest.approx(std / 0.0063245553, rel=2**-23)
        assert within_sampling_error(module.virtual_weight(), std)


@pytest.mark.parametrize(("d", "N"), SIZES)
@pytest.mark.parametrize(("method", "backbone"), [("he_init", "he"), ("small_init", "small")])
def test_table_1_plain(method, backbone, d, N):
    """Plain weights have Table 1's σ_•. W_e has the σ_• of W_q, and its output is multiplied by the constant 1/σ_e."""
    for module in matrices(build(method, d_model=d, n_layers=N)).values():
        role = "W_q" if module.role.name == "W_e" else module.role.name
        std = TABLE_1[backbone][role](d, N)
        assert within_sampling_error(module.weight, std)
        if module.role.name == "W_e":
            assert module.scale == pytest.approx(1 / std, rel=1e-12)


def test_the_gates_of_the_optimizer_start_from_the_virtual_weights_of_gated_layers():
    """Both have the same draws z: σ_•z and (σ_•/σ)(σz) are equal up to three roundings of float32."""
    plain = dict(build("wesar_adamw").named_modules())
    for name, module in matrices(build("wesar")).items():
        torch.testing.assert_close(plain[name].weight, module.virtual_weight(), rtol=3 * 2**-23, atol=0)


def test_roles_and_fan_in_cover_what_the_table_leaves_out():
    """Another expansion ratio, GLU and grouped queries follow from gain/√d_in. The tanh has its own gain."""
    model = build(
        "wesar",
        expansion_ratio=2,
        ffn_config={"ffn_type": "mptglu"},
        attn_config={"kv_n_heads": 2, "attn_type": "grouped_query_attention"},
    )
    block = model.model.transformer.blocks[0]
    assert block.attn.Wk.weight.shape == (16, 32)
    sigma, residual = 0.0063245553, math.sqrt(2 * 2)
    assert block.attn.Wk.gate.item() == pytest.approx(math.sqrt(1 / 32) / sigma)
    assert block.ffn.gate_proj.gate.item() == pytest.approx(math.sqrt(1 / 32) / sigma)
    assert block.ffn.down_proj.gate.item() == pytest.approx(math.sqrt(2 / 64) / residual / sigma)
    tanh = build("wesar", ffn_config={"ffn_act_fn": {"name": "tanh"}}).model.transformer.blocks[0].ffn.down_proj
    assert tanh.gate.item() == pytest.approx(5 / 3 / math.sqrt(128) / residual / sigma)


def test_activation_gain_is_one_over_the_root_mean_square_for_the_relu():
    z = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert activation_gain("relu") == pytest.approx(1 / torch.relu(z).square().mean().sqrt().item(), rel=1e-2)
    assert activation_gain("gelu") == activation_gain("relu")
    with pytest.raises(ValueError, match=r"ffn_act_fn.name: no He gain is known for 'celu'"):
        activation_gain("celu")


def test_only_he_needs_a_gain():
    celu = {"ffn_config": {"ffn_act_fn": {"name": "celu"}}}
    build("wesar_small", **celu)
    build("small_init", **celu)
    with pytest.raises(ValueError, match="no He gain is known for 'celu'"):
        build("wesar", **celu)


def test_backbone_std_of_the_paper_sizes():
    """By hand for 1.3B: √(1/2048), √(2/(8·24·2048)), √(2/(10·24·2048))."""
    arguments = {"d_model": 2048, "div_is_residual": math.sqrt(48)}
    down = build().model.transformer.blocks[0].ffn.down_proj.role
    assert backbone_std(ROLES["Wq"], "he", 2048, **arguments) == pytest.approx(0.022097087)
    assert backbone_std(down, "he", 8192, **arguments) == pytest.approx(0.0022552754)
    assert backbone_std(down, "small", 8192, **arguments) == pytest.approx(0.0020171796)


@pytest.mark.parametrize("method", names("method"))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_parameter_is_written(method, device):
    """After all tensors are filled with NaN, the init function leaves no NaN, on the meta device too."""
    model = WeSaRMPTForCausalLM(WeSaRMPTConfig(**model_config(method, init_device=device, no_bias=False)))
    if device == "meta":
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
    state = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if "rotary" not in n}}
    for tensor in state.values():
        tensor.data.fill_(float("nan"))
    model.apply(model.param_init_fn)
    assert all(t.isfinite().all() for t in state.values())
    assert len([m for m in model.modules() if hasattr(m, "role")]) == 14


def test_the_same_seed_gives_the_same_model_and_another_one_another():
    weights = [build(seed=s).model.lm_head.weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("method", ["weight_norm", "sigma_reparam"])
def test_gain_init(method):
    """gain_init method: gains are the rows' norms, α is 1. backbone: virtual weights have Table 1's σ_•."""
    for module in matrices(build(method)).values():
        expected = module.weight.norm(dim=1) if method == "weight_norm" else torch.ones(1)
        torch.testing.assert_close(module.gate.detach(), expected)
    for module in matrices(build(method, init_config={"gain_init": "backbone"})).values():
        std = 1.0 if module.role.name == "W_e" else TABLE_1["he"][module.role.name](32, 2)
        assert within_sampling_error(module.virtual_weight(), std)


def test_padding_row_of_the_embedding_is_zero():
    assert build(pad_token_id=3).model.transformer.wte.weight[3].abs().sum() == 0


@pytest.mark.parametrize(
    ("init_config", "message"),
    [
        ({"name": "wesar_"}, "sigma: None is not a positive number"),
        ({"name": "wesar_", "sigma": 0.0}, "sigma: 0.0 is not a positive number"),
        ({"name": "wesar_", "sigma": -1.0}, "sigma: -1.0 is not"),
        ({"name": "wesar_", "sigma": "4e-5"}, "sigma: '4e-5' is not"),
        ({"name": "wesar_", "sigma": 0.1, "backbone": "xavier"}, "backbone: 'xavier' is not one of he, small"),
        ({"name": "wesar_", "sigma": 0.1, "gain_init": "one"}, "gain_init: 'one' is not one of method, backbone"),
        ({"name": "wesar_", "sigma": 0.1, "sigmoid": 1}, "sigmoid: 1 is not used by wesar_.*backbone, gain_init"),
        ({"name": "wesar_", "sigma": 0.1, "emb_init_std": 0.5}, "emb_init_std: 0.5 is not used by wesar_"),
    ],
)
def test_wrong_init_config_is_refused_by_key(init_config, message):
    with pytest.raises(ValueError, match=rf"model\.init_config\.{message}"):
        build(None, fc_type={"name": "wesar"}, init_config=init_config)


def test_he_init_refuses_sigma():
    with pytest.raises(ValueError, match=r"sigma: 0.1 is not used by he_init_.*emb_init_std, init_div_is_residual"):
        build(None, init_config={"name": "he_init_", "sigma": 0.1})


@pytest.mark.parametrize("init", ["small_init_", "kaiming_normal_", "baseline_"])
def test_plain_init_functions_refuse_gated_layers(init):
    """Without our own module init function, foundry's would initialise the weight and leave the gate as it is."""
    with pytest.raises(ValueError, match=r"plain init function.*GatedLinear.*wesar_"):
        param_init_fns.get(init)(GatedLinear(4, 4), n_layers=2, d_model=4, init_std=0.1)


def test_wesar_init_refuses_a_matrix_without_a_role():
    with pytest.raises(ValueError, match=r"has none. Set `model.name: wesar_mpt_causal_lm`"):
        param_init_fns.get("wesar_")(nn.Linear(4, 4), n_layers=2, d_model=4, sigma=PAPER_SIGMA)


def stock(**overrides) -> MPTForCausalLM:
    """Build foundry's own model at d = 64 under `he_init_`, by default fused, tied and with learned positions."""
    torch.manual_seed(0)
    config = {**model_config(), "d_model": 64, "init_config": {"name": "he_init_"}, "learned_pos_emb": True}
    config |= {"attn_config": {"attn_impl": "torch"}, "tie_word_embeddings": True, "no_bias": False, **overrides}
    return MPTForCausalLM(MPTConfig(**config))


@pytest.mark.parametrize("ffn_type", ["mptmlp", "mptglu"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_stock_mpt_starts_by_table_1(ffn_type, device):
    """Fused q, k, v, a GLU, learned positions and W_e start with their σ_• on both devices; norms are 1 and biases 0.

    On the meta device Composer calls the init function only for modules with parameters of their own, parents first.
    """
    model = stock(ffn_config={"ffn_type": ffn_type}, init_device=device)
    if device == "meta":
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                model.param_init_fn(module)
    residual = math.sqrt(2 * 2)
    expected = dict.fromkeys(["wte", "wpe", "Wqkv", "up_proj", "gate_proj"], math.sqrt(1 / 64))
    expected |= {"out_proj": math.sqrt(1 / 64) / residual, "down_proj": math.sqrt(2 / 256) / residual}
    for name, parameter in model.named_parameters():
        *_, module, kind = name.split(".")
        if parameter.ndim == 2:
            assert within_sampling_error(parameter, expected[module]), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in module and kind == "weight")), name


def test_emb_init_std_is_that_of_embeddings_and_positions_alone():
    model = stock(tie_word_embeddings=False, init_config={"name": "he_init_", "emb_init_std": 1.0}).transformer
    assert within_sampling_error(model.wte.weight, 1.0) and within_sampling_error(model.wpe.weight, 1.0)
    assert within_sampling_error(model.blocks[0].attn.Wqkv.weight, math.sqrt(1 / 64))
    ours = build(None, init_config={"name": "he_init_", "emb_init_std": 1.0}, d_model=64).model
    assert within_sampling_error(ours.transformer.wte.weight, 1.0)
    assert within_sampling_error(ours.lm_head.weight, math.sqrt(1 / 64))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"expansion_ratio": 1}, "model.expansion_ratio: W_d has as many input features as W_o"),
        ({"head_dim": 8}, "model.head_dim: n_heads × head_dim is not d_model"),
        ({"ffn_config": {"ffn_act_fn": {"name": "tanh"}}}, "ffn_act_fn.name: tanh does not have the gain of the GELU"),
        ({"ffn_config": {"ffn_act_fn": {"name": "celu"}}}, "ffn_act_fn.name: no He gain is known for 'celu'"),
        ({"fc_type": {"name": "wesar"}}, "he_init_ is for plain layers"),
        ({"init_config": {"name": "he_init_", "emb_init_std": 0}}, "emb_init_std: 0 is not a positive number"),
    ],
)
def test_what_the_stock_model_hides_from_its_init_function_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        stock(**overrides)


def test_our_model_shows_its_roles():
    """With the options that the test above refuses, our model starts with the scales of gain/√d_in."""
    options = {"init_config": {"name": "he_init_"}, "d_model": 64, "no_bias": False, "learned_pos_emb": True}
    options |= {"attn_config": {"rope": False, "fused_qkv": True}, "tie_word_embeddings": True}
    model = build(None, **options, expansion_ratio=1, head_dim=8).model.transformer
    assert within_sampling_error(model.wpe.weight, math.sqrt(1 / 64))
    assert within_sampling_error(model.blocks[0].attn.Wqkv.weight, math.sqrt(1 / 64))
    assert within_sampling_error(model.blocks[0].attn.out_proj.weight, math.sqrt(1 / 32) / 2)
    assert within_sampling_error(model.blocks[0].ffn.down_proj.weight, math.sqrt(2 / 64) / 2)


def test_tied_embeddings_cannot_start_at_one():
    with pytest.raises(ValueError, match=r"emb_init_std: 1.0 is also the standard deviation of W_p.*Set it to null"):
        build(None, tie_word_embeddings=True, init_config={"name": "he_init_", "emb_init_std": 1.0})


def test_stock_layers_are_left_to_foundry():
    """A plain layer has the same draws, to the bit, as from foundry's own function."""
    layers = [nn.Linear(8, 8), nn.Embedding(8, 8), nn.LayerNorm(8)]
    torch.manual_seed(0)
    for layer in layers:
        param_init_fns.get("small_init_")(layer, n_layers=2, d_model=8)
    torch.manual_seed(0)
    std = math.sqrt(2 / 40)
    assert torch.equal(layers[0].weight, torch.empty(8, 8).normal_(std=std))
    assert torch.equal(layers[1].weight, torch.empty(8, 8).normal_(std=std))
    assert not any(isinstance(layer, Reparameterized) for layer in layers)
