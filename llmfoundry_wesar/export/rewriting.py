r"""Rewrite the weights of a model for an architecture of llama.cpp that computes the same function, in float64.

**RMSNorm as LayerNorm.** LayerNorm subtracts the mean over channels. If the mean is 0, LayerNorm equals RMSNorm. So
the residual stream of width :math:`d` is embedded into a wider stream, :math:`D > d`, in which every vector has the
mean 0. To do so, pad a vector with zeros and multiply it by an orthogonal matrix :math:`R` that maps the first unit
vector of the padding to :math:`u = (1, \dots, 1)/\sqrt D`. The mean of the result is this channel's value, 0, divided
by :math:`\sqrt D`. With :math:`E`, the first :math:`d` columns of :math:`R`, and
:math:`\varepsilon' = \varepsilon d/D`,

.. math:: \mathrm{RMSNorm}_\varepsilon(x) = \sqrt{d/D}\; E^\top\, \mathrm{LayerNorm}_{\varepsilon'}(E x).

A matrix W that writes to the stream becomes :math:`EW`. A matrix W that reads a norm with the weight g becomes
:math:`\sqrt{d/D}\; W \mathrm{diag}(g) E^\top`, and the norm's weight becomes 1. In Starcoder2 the width of the stream
is the number of heads times their width, so D is such a product; the new heads are zeros.

**A gate that is constantly 1.** Let :math:`\mathrm{act}(x) = x\,\sigma(cx) = \mathrm{silu}(cx)/c`; it is quick_gelu
for c = 1.702 and silu for c = 1. Then the ungated layer :math:`W_d\,\mathrm{act}(W_u x)` equals Llama's gated layer
:math:`W_\mathrm{down}(\mathrm{silu}(W_\mathrm{gate} x) \odot (W_\mathrm{up} x + b_\mathrm{up}))` with
:math:`W_\mathrm{gate} = c W_u,\; W_\mathrm{up} = 0,\; b_\mathrm{up} = 1,\; W_\mathrm{down} = W_d/c`.

**Rotary embedding.** transformers rotates channel i of a head together with channel i + w/2; llama.cpp's `llama`
rotates channel 2i together with 2i + 1.

Shapes: d width of the stream, D of the wider stream, w width of a head; H query heads in K groups.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# The norm that a matrix of a block reads. The other matrices of a block write to the stream.
_NORM_OF = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "up_proj": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Heads:
    """Attention heads: `queries` query heads, in `groups` that share a key and a value, with `width` channels each."""

    queries: int
    groups: int
    width: int

    def widened(self, d: int) -> "Heads":
        """Add the fewest heads so that all heads together have more than d channels; prefer fewer groups."""
        needed, each = d // self.width + 1, self.queries // self.groups
        counts = [
            (groups * max(each, math.ceil(needed / groups)), groups)
            for groups in range(self.groups, self.groups + needed + 1)
        ]
        return Heads(*min(counts), self.width)


def embed(matrix: Tensor, width: int) -> Tensor:
    r"""Multiply a matrix by E: its columns, vectors of the stream, become vectors of the wider stream.

    R is Householder's reflection :math:`I - 2vv^\top` with v along :math:`e_d - u`, so E is never stored.

    Args:
        matrix: (d, …).
        width: D > d.

    Returns:
        (D, …); every column has the mean 0.
    """
    d = matrix.size(0)
    padded = torch.cat([matrix, matrix.new_zeros(width - d, *matrix.shape[1:])])
    v = matrix.new_full((width,), -(width**-0.5))
    v[d] += 1
    v /= v.norm()
    columns = padded.view(width, -1)
    return columns.addr_(v, v @ columns, alpha=-2).view_as(padded)


def reader(matrix: Tensor, gain: Tensor, width: int) -> Tensor:
    r"""Rewrite a matrix that reads RMSNorm(x)·g to read LayerNorm(Ex): :math:`\sqrt{d/D}\; W \mathrm{diag}(g) E^\top`.

    Args:
        matrix: (n, d).
        gain: (d,), the weight g of the norm.
        width: D > d.

    Returns:
        (n, D).
    """
    return embed((matrix * gain).T, width).T.mul_(math.sqrt(gain.numel() / width))


def pad_heads(tensor: Tensor, heads: Heads, wider: Heads, groups_only: bool = False) -> Tensor:
    """Pad the first dimension, which holds the heads group by group, with zeros for the new heads.

    Args:
        tensor: (H·w, …), or (K·w, …) with `groups_only`.
        heads: The heads before padding.
        wider: The heads after padding.
        groups_only: Whether there is one head for each group, as for keys and values.
    """
    each, wider_each = (1, 1) if groups_only else (h.queries // h.groups for h in (heads, wider))
    padded = tensor.new_zeros(wider.groups, wider_each, heads.width, *tensor.shape[1:])
    padded[: heads.groups, :each] = tensor.view(heads.groups, each, heads.width, *tensor.shape[1:])
    return padded.flatten(0, 2)


def starcoder2(weights: Mapping[str, Tensor], heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """Rewrite an Arcee model with GELU as a Starcoder2 with the heads `heads.widened(d)` and ε·d/D in the norms.

    Args:
        weights: Weights by Arcee's names, in any floating-point type or on the meta device.
        heads: Arcee's heads.

    Yields:
        Name and tensor in float64, one at a time. The names are Arcee's. Every norm and every matrix of a block also
        has a `.bias`, because llama.cpp requires it.
    """
    d = weights["model.norm.weight"].numel()
    wider = heads.widened(d)
    width = wider.queries * wider.width
    for name, weight in weights.items():
        weight = weight.double()
        path, _, kind = name.rpartition(".")
        block, _, module = path.rpartition(".")
        if module.endswith("norm"):
            yield name, weight.new_ones(width)
            yield f"{path}.bias", weight.new_zeros(width)
            continue
        if module == "lm_head":
            yield name, reader(weight, weights["model.norm.weight"].double(), width)
            continue
        if module == "embed_tokens":
            yield name, embed(weight.T, width).T
            continue
        if kind == "weight" and module in _NORM_OF:
            norm = f"{block.rpartition('.')[0]}.{_NORM_OF[module]}.weight"
            weight = reader(weight, weights[norm].double(), width)
        if module in ("q_proj", "k_proj", "v_proj"):
            weight = pad_heads(weight, heads, wider, groups_only=module != "q_proj")
        elif module in ("o_proj", "down_proj"):
            weight = embed(weight, width)
            if module == "o_proj" and kind == "weight":
                weight = pad_heads(weight.T, heads, wider).T
        yield name, weight
        if kind == "weight" and f"{path}.bias" not in weights:
            yield f"{path}.bias", weight.new_zeros(weight.size(0))


def constant_gate(weights: Mapping[str, Tensor], slope: float) -> Iterator[tuple[str, Tensor]]:
    """Rewrite an Arcee model with the activation x·σ(cx) as a Llama with a constant factor in its feed-forward layer.

    Args:
        weights: Weights by Arcee's names, in any floating-point type or on the meta device.
        slope: c.

    Yields:
        Name and tensor in float64, one at a time. The names are Llama's; `up_proj` has a bias.
    """
    for name, weight in weights.items():
        weight = weight.double()
        if ".up_proj." in name:
            yield name.replace("up_proj", "gate_proj"), slope * weight
            if name.endswith("weight"):
                yield name, torch.zeros_like(weight)
                yield name.replace("weight", "bias"), weight.new_ones(weight.size(0))
        elif name.endswith("down_proj.weight"):
            yield name, weight / slope
        else:
            yield name, weight


def neighbouring_pairs(tensor: Tensor, n_heads: int) -> Tensor:
    """Reorder the channels of every head so that two channels which are rotated together are neighbours.

    Args:
        tensor: Weight or bias of W_q or W_k, (n_heads·w, …), in transformers' order.
        n_heads: Number of heads in `tensor`.
    """
    return tensor.view(n_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
