r"""Rewrite the weights of a model for an architecture that llama.cpp has. Pure functions of tensors, exact in float64.

**RMSNorm as LayerNorm.** LayerNorm subtracts the mean over channels; where that is 0 it is RMSNorm. So the residual
stream of width :math:`d` is embedded into a wider one, :math:`D > d`, in which every vector has the mean 0: it is
padded with zeros and turned by an orthogonal matrix :math:`R` that takes the first channel of the padding to
:math:`u = (1, \dots, 1)/\sqrt D`. The mean of the turned vector is then that channel, which is 0, over
:math:`\sqrt D`. With :math:`E`, the first :math:`d` columns of :math:`R`, and
:math:`\varepsilon' = \varepsilon d/D`,

.. math:: \mathrm{RMSNorm}_\varepsilon(x) = \sqrt{d/D}\; E^\top\, \mathrm{LayerNorm}_{\varepsilon'}(E x).

A matrix W that writes to the stream becomes :math:`EW`; one that reads a norm with the weight g becomes
:math:`\sqrt{d/D}\; W \mathrm{diag}(g) E^\top`, and the norm's own weight becomes 1. Starcoder2's heads fill its
stream, so that D is the head width times a number of heads, of which the new ones are zeros.

**A gate that is constantly 1.** With :math:`\mathrm{act}(x) = x\,\sigma(cx) = \mathrm{silu}(cx)/c`, which is quick_gelu
for c = 1.702 and silu for c = 1, the ungated layer :math:`W_d\,\mathrm{act}(W_u x)` is Llama's gated one,
:math:`W_\mathrm{down}(\mathrm{silu}(W_\mathrm{gate} x) \odot (W_\mathrm{up} x + b_\mathrm{up}))`, with
:math:`W_\mathrm{gate} = c W_u,\; W_\mathrm{up} = 0,\; b_\mathrm{up} = 1,\; W_\mathrm{down} = W_d/c`.

**Rotary embedding of neighbours.** Transformers rotates channel i of a head with channel i + w/2, llama.cpp's `llama`
channel 2i with 2i + 1.

Shapes: d width of the stream, D of the wider one, w of a head, f of the feed-forward layer; H query heads in K groups.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# What each matrix of a block, and the output projection, reads; the others write to the stream.
_NORM_OF = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "up_proj": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Heads:
    """Attention heads: `queries` of them in `groups` that share a key and a value, each of `width` channels."""

    queries: int
    groups: int
    width: int

    def widened(self, d: int) -> "Heads":
        """Add the fewest heads with which all of them have more than d channels; the fewest groups among those."""
        needed, each = d // self.width + 1, self.queries // self.groups
        counts = [
            (groups * max(each, math.ceil(needed / groups)), groups)
            for groups in range(self.groups, self.groups + needed + 1)
        ]
        return Heads(*min(counts), self.width)


def embed(matrix: Tensor, width: int) -> Tensor:
    r"""Multiply by E: turn the columns of a matrix, vectors of the stream, into those of a wider stream.

    R is Householder's reflection :math:`I - 2vv^\top` with v along :math:`e_d - u`, so that E needs no memory.

    Args:
        matrix: (d, …).
        width: D > d.

    Returns:
        (D, …), with the mean 0 in every column.
    """
    d = matrix.size(0)
    padded = torch.cat([matrix, matrix.new_zeros(width - d, *matrix.shape[1:])])
    v = matrix.new_full((width,), -(width**-0.5))
    v[d] += 1
    v /= v.norm()
    columns = padded.view(width, -1)
    return columns.addr_(v, v @ columns, alpha=-2).view_as(padded)


def reader(matrix: Tensor, gain: Tensor, width: int) -> Tensor:
    r"""Make a matrix that reads RMSNorm(x)·gain read LayerNorm(Ex): :math:`\sqrt{d/D}\; W \mathrm{diag}(g) E^\top`.

    Args:
        matrix: (n, d).
        gain: (d,), the weight of the norm.
        width: D > d.

    Returns:
        (n, D).
    """
    return embed((matrix * gain).T, width).T.mul_(math.sqrt(gain.numel() / width))


def pad_heads(tensor: Tensor, heads: Heads, wider: Heads, groups_only: bool = False) -> Tensor:
    """Give the leading dimension, which holds heads group by group, the zeros of the heads that are added.

    Args:
        tensor: (H·w, …), or (K·w, …) with `groups_only`.
        heads: The heads that it has.
        wider: Those that it is to have.
        groups_only: Whether it has one head a group: keys and values.
    """
    each, wider_each = (1, 1) if groups_only else (h.queries // h.groups for h in (heads, wider))
    padded = tensor.new_zeros(wider.groups, wider_each, heads.width, *tensor.shape[1:])
    padded[: heads.groups, :each] = tensor.view(heads.groups, each, heads.width, *tensor.shape[1:])
    return padded.flatten(0, 2)


def starcoder2(weights: Mapping[str, Tensor], heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """Rewrite an Arcee model with GELU as a Starcoder2 with the heads `heads.widened(d)` and the norms' ε·d/D.

    Args:
        weights: By Arcee's names, in any floating-point type or on the meta device.
        heads: Arcee's.

    Yields:
        Name and tensor in float64, one at a time. Arcee's names, and a `.bias` for every norm and every matrix of a
        block: llama.cpp wants them all.
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
    """Rewrite an Arcee model with the activation x·σ(cx) as a Llama whose gates are constantly 1.

    Args:
        weights: By Arcee's names, in any floating-point type or on the meta device.
        slope: c.

    Yields:
        Name and tensor in float64, one at a time, by Llama's names, with a bias for `up_proj`.
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
    """Order the channels of every head so that those which are rotated together are neighbours.

    Args:
        tensor: Weight or bias of W_q or W_k, (n_heads·w, …), as transformers has it.
        n_heads: Its heads.
    """
    return tensor.view(n_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
