"""The rewritings are exact in float64: they are compared with the formulas of the layers that they replace.

1e-12, because the values are of order 1 and a sum has about 100 terms with errors of 1e-16. A wrong ε or factor would
give an error of 1e-3.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfoundry_wesar.export.rewriting import (
    Heads,
    constant_gate,
    embed,
    neighbouring_pairs,
    pad_heads,
    reader,
    starcoder2,
)

EPS = 1e-2  # large, so that a wrong ε is seen


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


@pytest.mark.parametrize("d, width", [(6, 7), (32, 48), (96, 128)])
def test_a_layer_norm_of_the_embedded_stream_is_the_rms_norm(d, width):
    """For every matrix that reads the stream, with the norm's weight.

    E keeps lengths and angles and removes the mean.
    """
    x, gain, matrix = _random(5, d), _random(d), _random(9, d)
    embedded = embed(x.T, width).T
    _close(embedded.mean(-1), torch.zeros(5, dtype=torch.float64))
    _close(embedded @ embedded.T, x @ x.T)
    normed = F.layer_norm(embedded, (width,), eps=EPS * d / width)
    _close(normed @ reader(matrix, gain, width).T, _rms_norm(x, gain) @ matrix.T)


def test_a_bias_is_embedded_like_a_column():
    bias = _random(6)
    _close(embed(bias, 8), embed(bias[:, None], 8)[:, 0])


@pytest.mark.parametrize(
    "heads, d, widened",
    [
        ((12, 12, 64), 768, (13, 13)),  # the paper's 130M: one more head
        ((32, 8, 128), 4096, (36, 9)),  # one more group of 4 heads is less than one more head in each of 8
        ((4, 1, 8), 32, (5, 1)),  # multi-query: one more query head
        ((4, 2, 8), 32, (6, 2)),
        ((4, 2, 16), 32, (4, 2)),  # with head_dim the heads have more channels than the stream
        ((2, 2, 8), 32, (5, 5)),  # with head_dim the heads have fewer channels than the stream
    ],
)
def test_as_few_heads_as_possible_are_added(heads, d, widened):
    wider = Heads(*heads).widened(d)
    assert (wider.queries, wider.groups) == widened and wider.width == heads[2]
    assert wider.queries * wider.width > d and wider.queries % wider.groups == 0


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """(S, H·w), (S, K·w), (S, K·w) -> (S, H·w), causal."""
    q, k, v = (x.view(len(x), -1, heads.width).transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def _block(x: Tensor, weights: dict[str, Tensor], heads: Heads, norm, act) -> Tensor:
    """Compute a whole model of one block, with the biases that its weights have: (S, d) -> logits."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    layer = "model.layers.0."
    normed = norm(x, f"{layer}input_layernorm")
    q, k, v = (linear(normed, f"{layer}self_attn.{name}_proj") for name in "qkv")
    x = x + linear(_attention(q, k, v, heads), f"{layer}self_attn.o_proj")
    up = linear(norm(x, f"{layer}post_attention_layernorm"), f"{layer}mlp.up_proj")
    x = x + linear(act(up), f"{layer}mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def _model(d: int, heads: Heads, biases: bool) -> dict[str, Tensor]:
    q, kv, f = heads.queries * heads.width, heads.groups * heads.width, 2 * d
    shapes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    weights = {f"model.layers.0.{name}.weight": _random(*shape) / math.sqrt(d) for name, shape in shapes.items()}
    if biases:
        weights |= {f"model.layers.0.{name}.bias": _random(shape[0]) for name, shape in shapes.items()}
    for norm in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        weights[f"{norm}.weight"] = 1 + _random(d) / 2
    return weights | {"model.embed_tokens.weight": _random(11, d), "lm_head.weight": _random(11, d)}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("heads, d", [((3, 3, 8), 24), ((4, 2, 8), 32), ((4, 1, 8), 32), ((4, 2, 16), 32)])
def test_a_whole_model_is_the_same_function_with_layer_norms(heads, d, biases):
    """With attention, GELU and residuals. Every norm and matrix of the block gets the bias that llama.cpp expects."""
    heads = Heads(*heads)
    weights = _model(d, heads, biases)
    rewritten = dict(starcoder2(weights, heads))
    wider = heads.widened(d)
    width = wider.queries * wider.width

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), rewritten[f"{name}.weight"], rewritten[f"{name}.bias"], EPS * d / width)

    plain = _block(
        weights["model.embed_tokens.weight"],
        weights,
        heads,
        lambda x, name: _rms_norm(x, weights[f"{name}.weight"]),
        F.gelu,
    )
    _close(_block(rewritten["model.embed_tokens.weight"], rewritten, wider, layer_norm, F.gelu), plain)
    without = {
        name for name in rewritten if name.endswith("weight") and name.replace("weight", "bias") not in rewritten
    }
    assert without == {"model.embed_tokens.weight", "lm_head.weight"}


def test_shapes_are_known_without_data():
    weights = _model(32, Heads(4, 2, 8), biases=False)
    real = starcoder2(weights, Heads(4, 2, 8))
    meta = starcoder2({name: weight.to("meta") for name, weight in weights.items()}, Heads(4, 2, 8))
    for (name, weight), (other, shape) in zip(real, meta, strict=True):
        assert name == other and weight.shape == shape.shape and shape.is_meta


@pytest.mark.parametrize("slope, biases", [(1.702, False), (1.702, True), (1.0, False)])
def test_a_gate_that_is_constantly_1_is_no_gate(slope, biases):
    """x·σ(1.702 x) is quick_gelu in transformers, and x·σ(x) is silu."""
    weights = _model(12, Heads(3, 3, 4), biases)
    gated = dict(constant_gate(weights, slope))
    x = _random(7, 12)

    def linear(weights: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
        name = f"model.layers.0.mlp.{name}"
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    up = linear(weights, x, "up_proj")
    plain = linear(weights, up * torch.sigmoid(slope * up), "down_proj")
    llama = linear(gated, F.silu(linear(gated, x, "gate_proj")) * linear(gated, x, "up_proj"), "down_proj")
    _close(llama, plain)
    mlp = {name for name in weights if ".mlp." in name}
    assert gated.keys() - weights.keys() >= {name.replace("up_proj", "gate_proj") for name in mlp if "up_proj" in name}
    for name in weights.keys() - mlp:
        assert torch.equal(gated[name], weights[name])


def test_rotary_pairs_become_neighbours():
    """Rotating channels 2i and 2i + 1 of the reordered head equals rotating i and i + w/2 of the original head."""
    heads, width, length = 3, 8, 5
    x, matrix = _random(length, 10), _random(heads * width, 10)
    angles = torch.arange(length)[:, None, None] * 0.3 ** torch.arange(width // 2)  # (S, 1, w/2)
    cos, sin = angles.double().cos(), angles.double().sin()
    a, b = (x @ matrix.T).view(length, heads, width).chunk(2, -1)
    halves = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    q = (x @ neighbouring_pairs(matrix, heads).T).view(length, heads, width // 2, 2)
    pairs = torch.stack([q[..., 0] * cos - q[..., 1] * sin, q[..., 0] * sin + q[..., 1] * cos], -1).flatten(-2)
    _close(neighbouring_pairs(halves.flatten(1).T, heads).T, pairs.flatten(1))
    _close(torch.einsum("shw,thw->hst", pairs, pairs), torch.einsum("shw,thw->hst", halves, halves))


def test_added_heads_stand_where_their_group_does():
    """Query heads of a group stay together: 2 groups of 2 heads become 3 groups of 3."""
    heads, wider = Heads(4, 2, 1), Heads(9, 3, 1)
    tensor = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pad_heads(tensor, heads, wider).tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]
    assert pad_heads(tensor[:2], heads, wider, groups_only=True).tolist() == [1, 2, 0]
