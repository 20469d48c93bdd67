"""Compute causal self-attention without the S×S matrix, by `torch.nn.functional.scaled_dot_product_attention`.

Shapes: B sequences, S tokens, H query heads, G key and value heads (G divides H), D width of a head.
"""

from collections.abc import MutableMapping
from typing import Any

import torch.nn.functional as F
from llmfoundry.models.layers.attention import (
    GroupedQueryAttention,
    repeat_kv_for_gqa,
    scaled_multihead_dot_product_attention,
)
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


def sdpa_or_stock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_heads: int,
    kv_n_heads: int,
    past_key_value: KeyValue | tuple[()] | None = None,
    softmax_scale: float | None = None,
    attn_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    needs_weights: bool = False,
    attn_logit_softcapping: float | None = None,
    sliding_window_size: int = -1,
) -> tuple[Tensor, Tensor | None, KeyValue | None]:
    """Compute foundry's `torch` attention, by a fused kernel if that gives the same result.

    Foundry's function is used for a call with a padding mask, a bias (ALiBi, sequence ids), a filled cache,
    soft-capping, a window or `needs_weights`.

    Args:
        query: (B, S, H·D).
        key: (B, S, G·D).
        value: (B, S, G·D).
        n_heads: H.
        kv_n_heads: G.
        past_key_value: Keys (B, G, D, S) and values (B, G, S, D) of earlier tokens; `()` if there are none yet.
        softmax_scale: Factor on the scores; 1/√D if None.
        attn_bias: Added to the scores.
        key_padding_mask: (B, S), False for padding.
        is_causal: Whether a token attends only to itself and to earlier tokens.
        dropout_p: Probability of dropping a weight, in training. On a CPU dropout needs the S×S matrix.
        training: Whether to apply dropout.
        needs_weights: Whether to return the weights.
        attn_logit_softcapping: Bound on the scores.
        sliding_window_size: Number of tokens on each side that a token attends to; -1 for all.

    Returns:
        The output (B, S, H·D), the weights if `needs_weights`, and keys and values unless `past_key_value` is None.
    """
    fused = (
        not past_key_value
        and attn_bias is None
        and key_padding_mask is None
        and not needs_weights
        and attn_logit_softcapping is None
        and sliding_window_size == -1
        and softmax_scale != 0  # a kernel would multiply the masked scores, −∞, by 0
        # With more keys than queries, the kernels align the causal mask with the first key, foundry with the last.
        and query.size(1) == key.size(1)
    )
    if not fused:
        return scaled_multihead_dot_product_attention(
            query,
            key,
            value,
            n_heads,
            kv_n_heads,
            past_key_value=past_key_value,  # type: ignore[arg-type]
            softmax_scale=softmax_scale,
            attn_bias=attn_bias,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            training=training,
            needs_weights=needs_weights,
            attn_logit_softcapping=attn_logit_softcapping,
            sliding_window_size=sliding_window_size,
        )
    q = query.unflatten(-1, (n_heads, -1))
    k = key.unflatten(-1, (kv_n_heads, -1))
    v = value.unflatten(-1, (kv_n_heads, -1))
    present = None if past_key_value is None else (k.permute(0, 2, 3, 1), v.transpose(1, 2))
    # Repeat k and v, because some kernels have no `enable_gqa`, such as the CPU kernel that avoids the S×S matrix.
    repeats = n_heads // kv_n_heads
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        repeat_kv_for_gqa(k, repeats).transpose(1, 2),
        repeat_kv_for_gqa(v, repeats).transpose(1, 2),
        dropout_p=dropout_p if training else 0.0,
        is_causal=is_causal,
        scale=softmax_scale,
    )
    return output.transpose(1, 2).flatten(2), None, present


class SDPAttention(GroupedQueryAttention):
    """Foundry's grouped-query attention with `sdpa_or_stock_attention` as its attention function.

    It is registered as `sdpa_attention`, for multi-head (the default), grouped-query and multi-query attention::

        attn_config:
          attn_type: sdpa_attention
          attn_impl: torch
          kv_n_heads: 4  # n_heads if left out

    Args:
        d_model: Width of the model.
        n_heads: H.
        kv_n_heads: G; H if None.
        attn_impl: Must be `torch`, which determines the layout of masks and caches.
        **kwargs: As for `GroupedQueryAttention`.

    Raises:
        ValueError: If `attn_impl` is not `torch`.
    """

    def __init__(
        self, d_model: int, n_heads: int, kv_n_heads: int | None = None, attn_impl: str = "torch", **kwargs: Any
    ):
        if attn_impl != "torch":
            raise ValueError(
                f"model.attn_config.attn_impl: {attn_impl} does not work with attn_type: sdpa_attention; use torch."
            )
        super().__init__(d_model, n_heads, n_heads if kv_n_heads is None else kv_n_heads, attn_impl=attn_impl, **kwargs)
        self.attn_fn = sdpa_or_stock_attention


def drop_full_mask(batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return the batch without its `attention_mask` if all tokens are unmasked, else the batch itself.

    The mask is on the device, and reading it would make the host wait. So this reads `total_tokens`, the number of
    unmasked tokens of each row, which foundry's collators add to the batch. A batch without it keeps its mask.

    Args:
        batch: A batch as the trainer passes it to the model's forward.
    """
    mask, counts = batch.get("attention_mask"), batch.get("total_tokens")
    if mask is None or counts is None or sum(counts) != mask.numel():
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"}
