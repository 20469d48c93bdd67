from contextlib import nullcontext
from typing import Any

import pytest
import torch
from composer.core.data_spec import default_split_batch
from llmfoundry.data.utils import get_text_collator
from llmfoundry.models.layers.attention import GroupedQueryAttention, scaled_multihead_dot_product_attention
from llmfoundry.models.layers.layer_builders import build_attention_layer
from llmfoundry.models.mpt.modeling_mpt import gen_rotary_embedding
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmfoundry_wesar.attention import SDPAttention, drop_full_mask, sdpa_or_stock_attention
from tests.recorder import Recorder
from tests.tiny import build

HEADS, WIDTH, LENGTH = 4, 48, 37


def attention(cls: type[GroupedQueryAttention], kv_n_heads: int = HEADS, **kwargs: Any) -> GroupedQueryAttention:
    torch.manual_seed(0)
    return cls(WIDTH, HEADS, kv_n_heads, attn_impl="torch", **{"fused_qkv": False, "softmax_scale": 0.4} | kwargs)


def rope(length: int) -> dict[str, Any]:
    embedding = gen_rotary_embedding("hf", 10000, {}, {"type": "no_scaling", "factor": 1.0}, 64, WIDTH, HEADS)
    return {
        "impl": "hf",
        "rotary_emb": embedding,
        "offset_info": torch.arange(length)[None],
        "seq_len": length,
    }


def results(module: GroupedQueryAttention, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return the output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    output = module(x, **kwargs)[0]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), [x, *module.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize("kv_n_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("fused_qkv", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("rotate", [False, True], ids=["", "rope"])
def test_equals_stock(kv_n_heads: int, fused_qkv: bool, precision: str, rotate: bool):
    """Output and every gradient are as close to the stock layer in float64 as the stock layer of the same dtype is.

    The two layers round at different places and sum in another order, so half as much error again is allowed. In
    float32 a sum of the stock layer may be exact by chance, so 1e-6 is allowed in addition.
    """
    stock, ours = (
        attention(cls, kv_n_heads, fused_qkv=fused_qkv, bias=False, attention_bias=False)
        for cls in (GroupedQueryAttention, SDPAttention)
    )
    torch.manual_seed(1)
    x = torch.randn(2, LENGTH, WIDTH)
    kwargs = {"rotary_emb_w_meta_info": rope(LENGTH)} if rotate else {}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # All three layers start from numbers that bfloat16 represents exactly.
    for tensor in (x, *stock.parameters(), *ours.parameters()):
        tensor.data = tensor.data.bfloat16().to(dtype)
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        in_stock, in_ours = results(stock, x, **kwargs), results(ours, x, **kwargs)
    truth = results(stock.double(), x.double(), **kwargs)
    for exact, expected, actual in zip(truth, in_stock, in_ours, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - exact).norm() <= 1.5 * (expected - exact).norm() + 1e-6 * exact.norm()


def call(function: Any, length: int = 9, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, length, WIDTH), torch.randn(2, length, WIDTH // 2), torch.randn(2, length, WIDTH // 2)
    return function(q, k, v, HEADS, 2, **{"is_causal": True} | kwargs)


@pytest.mark.parametrize(
    "feature",
    [
        {"key_padding_mask": torch.arange(9).repeat(2, 1) < torch.tensor([[9], [5]])},
        {"attn_bias": torch.arange(-8.0, 1.0).view(1, 1, 1, 9) / 4},
        {"attn_logit_softcapping": 0.5},
        {"sliding_window_size": 2},
        {"softmax_scale": 0.0},
    ],
    ids=lambda feature: next(iter(feature)),
)
def test_what_no_kernel_computes_goes_to_the_stock_function(feature: dict[str, Any]):
    """The result is the stock function's to the bit, and differs from that of plain causal attention."""
    expected = call(scaled_multihead_dot_product_attention, **feature)[0]
    assert torch.equal(call(sdpa_or_stock_attention, **feature)[0], expected)
    assert not torch.allclose(call(sdpa_or_stock_attention)[0], expected, atol=1e-2)


def test_fewer_queries_than_keys_see_as_in_the_stock_function():
    """In foundry the last query sees every key. In a kernel the first query would see only the first key."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, WIDTH), torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)
    ours, stock = (
        f(q, k, v, HEADS, HEADS, is_causal=True)[0]
        for f in (sdpa_or_stock_attention, scaled_multihead_dot_product_attention)
    )
    assert torch.equal(ours, stock)


def test_weights_on_request():
    output, weights, _ = call(sdpa_or_stock_attention, needs_weights=True)
    assert weights is not None
    assert torch.equal(weights, call(scaled_multihead_dot_product_attention, needs_weights=True)[1])
    torch.testing.assert_close(output, call(sdpa_or_stock_attention)[0], rtol=1e-5, atol=1e-6)


def test_cache_has_the_stock_layout_and_continues_a_sequence():
    """The last of 9 tokens, from the cache of 8, equals the last row of a call with all 9, to float32 rounding."""
    whole = call(sdpa_or_stock_attention, length=9, past_key_value=())
    stock = call(scaled_multihead_dot_product_attention, length=9, past_key_value=())
    torch.testing.assert_close(whole[2], stock[2], rtol=0, atol=0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, width) for width in (WIDTH, WIDTH // 2, WIDTH // 2))
    cache = sdpa_or_stock_attention(q[:, :8], k[:, :8], v[:, :8], HEADS, 2, past_key_value=(), is_causal=True)[2]
    step = sdpa_or_stock_attention(q[:, 8:], k[:, 8:], v[:, 8:], HEADS, 2, past_key_value=cache, is_causal=True)
    torch.testing.assert_close(step[0], whole[0][:, 8:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step[2], whole[2], rtol=0, atol=0)


def test_dropout_is_that_of_the_stock_function():
    """On a CPU both functions draw the same mask from the same seed. In evaluation mode there is no dropout."""
    dropout = {"dropout_p": 0.4, "training": True}
    ours, stock = (call(f, **dropout)[0] for f in (sdpa_or_stock_attention, scaled_multihead_dot_product_attention))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    evaluated = call(sdpa_or_stock_attention, **{**dropout, "training": False})[0]
    assert torch.equal(evaluated, call(sdpa_or_stock_attention)[0])
    assert not torch.allclose(evaluated, ours, atol=1e-2)


@pytest.mark.parametrize("kv_n_heads", [4, 2, 1])
def test_never_makes_a_tensor_of_length_squared(kv_n_heads: int):
    """Forward and backward with RoPE: no tensor is larger than an activation. In the stock layer one is."""
    length = 256
    largest = {}
    for cls in (SDPAttention, GroupedQueryAttention):
        module = attention(cls, kv_n_heads)
        with Recorder() as recorder:
            results(module, torch.randn(1, length, WIDTH), rotary_emb_w_meta_info=rope(length))
        largest[cls] = max(recorder.largest.values())
    assert largest[SDPAttention] == length * WIDTH
    assert largest[GroupedQueryAttention] == length**2 * HEADS


def test_compiles_without_a_graph_break():
    module, x = attention(SDPAttention, 2), torch.randn(2, LENGTH, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x), results(module, x), rtol=1e-5, atol=1e-6)


def test_flash_impl_is_refused():
    with pytest.raises(ValueError, match=r"attn_impl: flash .* use torch"):
        build_attention_layer("sdpa_attention", {"d_model": WIDTH, "n_heads": HEADS, "attn_impl": "flash"})


def models_of_each_kind(attn_config: dict[str, Any] | None = None, **overrides: Any) -> tuple[Any, Any]:
    """Build the same model with our attention, multi-head by default, and with the stock one."""
    kinds = ({"attn_type": "sdpa_attention"}, {"attn_type": "grouped_query_attention", "kv_n_heads": 4})
    ours, stock = (
        build("small_init", attn_config=kind | (attn_config or {}), n_layers=3, **overrides) for kind in kinds
    )
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def assert_same_gradients(ours: Any, stock: Any):
    """Check that the gradients are equal to float32 rounding, through three layers."""
    for (name, actual), expected in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (actual.grad - expected.grad).norm() < 1e-5 * expected.grad.norm(), name


def tokens(*lengths: int) -> dict[str, Any]:
    """Make a batch with the text loader's own collator, padded to the longest sequence."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    tokenizer.padding_side = "right"
    collate, _ = get_text_collator({"dataset": {}}, tokenizer, len(lengths))
    generator = torch.Generator().manual_seed(0)
    return collate([{"input_ids": torch.randint(1, 97, (n,), generator=generator).tolist()} for n in lengths])


def test_mask_is_dropped_only_where_no_token_is_padding():
    """The mask is dropped for each microbatch on its own.

    A batch without the collator's count of tokens keeps its mask.
    """
    batch = tokens(16, 16, 16, 7)
    assert not batch["attention_mask"].all()
    full, padded = default_split_batch(batch, 2)
    assert drop_full_mask(padded) is padded
    dropped = drop_full_mask(full)
    assert full.keys() - dropped.keys() == {"attention_mask"}
    assert all(dropped[key] is full[key] for key in dropped)
    uncounted = {key: full[key] for key in ("input_ids", "attention_mask")}
    assert drop_full_mask(uncounted) is uncounted
    assert drop_full_mask(dropped) is dropped


@pytest.mark.parametrize("lengths", [(16, 16), (16, 9)], ids=["full", "padded"])
@pytest.mark.parametrize(
    "attn_config", [{}, {"kv_n_heads": 2}, {"alibi": True, "rope": False}], ids=["rope", "grouped", "alibi"]
)
def test_model_equals_stock_and_reads_nothing_back(lengths: tuple[int, ...], attn_config: dict[str, Any]):
    """Logits and every gradient are equal to float32 rounding. The host reads a value only if a mask has padding."""
    batch = tokens(*lengths)
    ours, stock = models_of_each_kind(attn_config)
    with Recorder() as recorder:
        outputs = ours(batch)
    assert recorder.reads == (0 if lengths == (16, 16) else 1)
    # The model's forward has not changed the batch: the stock forward still sees its mask.
    reference = super(type(stock), stock).forward(batch)
    torch.testing.assert_close(outputs.logits, reference.logits, rtol=1e-5, atol=1e-5)
    ours.loss(outputs, batch).backward()
    stock.loss(reference, batch).backward()
    assert_same_gradients(ours, stock)


def test_block_overrides_with_reused_keys_and_a_window():
    """Every gradient is equal if one layer reuses the keys of the layer before it and another has a sliding window."""
    overrides = {
        "order": [{"name": "default"}, {"name": "reuse"}, {"name": "window"}],
        "overrides": {
            "reuse": {"attn_config": {"reuse_kv_layer_idx": -1}},
            "window": {"attn_config": {"sliding_window_size": 3}},
        },
    }
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    models = models_of_each_kind(block_overrides=overrides)
    for model in models:
        model.loss(model(batch), batch).backward()
    assert_same_gradients(*models)


def test_generation_with_a_cache_and_left_padding():
    """Prompts of unequal length are continued greedily as the stock model continues them without a cache."""
    ours, stock = models_of_each_kind()
    prompt = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = stock.model.eval().generate(prompt, use_cache=False, **arguments)
    assert torch.equal(ours.model.eval().generate(prompt, use_cache=True, **arguments), expected)
