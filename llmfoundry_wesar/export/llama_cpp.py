"""Write a plain model as a GGUF file for llama.cpp and programs built on it (Ollama, LM Studio).

llama.cpp has no Arcee that computes GELU, so the weights are rewritten for an architecture that it has:

| feed-forward layer | architecture | how |
|---|---|---|
| GLU with silu | `llama` | as it is |
| ungated quick_gelu, silu | `llama` | with a constant gate (`rewriting.constant_gate`) |
| ungated gelu, exact or tanh | `starcoder2` | with RMSNorm as LayerNorm (`rewriting.starcoder2`) |

llama.cpp computes GELU's tanh form from a table in float16. Compared with exact GELU, logits differ by about 4e-5.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from llmfoundry_wesar.export.conversion import is_arcee, require_finite
from llmfoundry_wesar.export.rewriting import Heads, constant_gate, neighbouring_pairs, starcoder2

# `--dtype` → type of the matrices. Norms and biases stay in float32, as in llama.cpp's own converter.
_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_SLOPES = {"quick_gelu": 1.702, "silu": 1.0}  # c of act(x) = x·σ(cx)

Rewritten = Iterator[tuple[str, Tensor]]


def architecture(config: LlamaConfig) -> str:
    """Return the name of llama.cpp's architecture for an Arcee or Llama model.

    Raises:
        ValueError: There is none; the message names the key.
    """
    if config.hidden_act in (_SLOPES if is_arcee(config) else ("silu",)):
        return "llama"
    if is_arcee(config) and config.hidden_act in ("gelu", "gelu_pytorch_tanh"):
        return "starcoder2"
    kind, known = ("mptmlp", [*_SLOPES, "gelu"]) if is_arcee(config) else ("mptglu", ["silu"])
    raise ValueError(
        f"--format gguf: llama.cpp has no architecture for model.ffn_config.ffn_act_fn: {config.hidden_act} with "
        f"ffn_type: {kind} (only {' or '.join(known)}); export with --format hf."
    )


def _heads(config: LlamaConfig) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)


def _stream(config: LlamaConfig) -> tuple[int, Heads]:
    """Return the width of the residual stream and the heads of the rewritten model."""
    if architecture(config) == "llama":
        return config.hidden_size, _heads(config)
    heads = _heads(config).widened(config.hidden_size)
    return heads.queries * heads.width, heads


def rewrite(weights: Mapping[str, Tensor], config: LlamaConfig) -> Rewritten:
    """Yield name and tensor of the weights for `architecture(config)`, in float64 and with transformers' names."""
    if architecture(config) == "starcoder2":
        yield from starcoder2(weights, _heads(config))
        return
    slope = _SLOPES[config.hidden_act]
    gated = constant_gate(weights, slope) if is_arcee(config) else ((n, w.double()) for n, w in weights.items())
    for name, weight in gated:
        for projection, n_heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f".{projection}_proj." in name:
                weight = neighbouring_pairs(weight, n_heads)
        yield name, weight


def check(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase | None, dtype: str) -> None:
    """Refuse a model, tokenizer or dtype that cannot be written, before any weight is computed; see `write_gguf`."""
    if config.rope_scaling:
        raise ValueError(
            "--format gguf cannot express model.attn_config.rope_hf_config.type: "
            f"{json.dumps(config.rope_scaling['rope_type'])}; export with --format hf, and convert a GLU with "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    architecture(config)
    _check_tokenizer(tokenizer, config.vocab_size)
    width, heads = _stream(config)
    block = gguf.GGML_QUANT_SIZES[_TYPES[dtype][0]][0]
    for what, row in (
        ("matrices that read the residual stream", width),
        ("W_o", heads.queries * heads.width),
        ("W_d", config.intermediate_size),
    ):
        if row % block:
            raise ValueError(
                f"--dtype {dtype}: rows of {what} have {row} entries, not a multiple of {block}; use another --dtype."
            )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
    """Refuse a tokenizer that llama.cpp's byte-level BPE cannot reproduce.

    Raises:
        ValueError: The message names the key of the tokenizer.
    """
    hint = "; export with --format hf, or train with a tokenizer of `llmfoundry-wesar data`."
    if tokenizer is None:
        raise ValueError("--format gguf: the checkpoint has no tokenizer, which a GGUF file needs.")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--format gguf cannot express a {type(tokenizer).__name__}: only fast tokenizers{hint}")
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = tree["model"], tree["pre_tokenizer"] or {}
    known = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    refused = [
        ("model.type", model["type"], model["type"] == "BPE"),
        ("normalizer", tree["normalizer"], tree["normalizer"] is None),
        *(("pre_tokenizer." + key, splits.get(key), splits.get(key) == value) for key, value in known.items()),
        *(
            (f"model.{key}", model.get(key), not model.get(key))
            for key in ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        ),
        *(
            (f"added token {token['content']}: {key}", True, not token[key])
            for token in tree["added_tokens"]
            for key in ("lstrip", "rstrip", "single_word")
        ),
        ("eos_token", None, tokenizer.eos_token_id is not None),
    ]
    for key, value, expressible in refused:
        if not expressible:
            raise ValueError(f"--format gguf cannot express the tokenizer's {key}: {json.dumps(value)}{hint}")
    if max(tokenizer.get_vocab().values()) >= vocab_size:
        raise ValueError(
            f"--format gguf: the tokenizer has {len(tokenizer)} tokens, but the model only {vocab_size} "
            "(model.vocab_size)."
        )
    _added(tokenizer)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether a tokenizer adds a BOS before a text, and whether it adds an EOS after it."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if ids == [tokenizer.bos_token_id] * bos + text + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise ValueError("--format gguf cannot express the tokenizer's post_processor, which adds more than a BOS and EOS.")


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(vocab_size):
        # Rows of the embedding without a token are padding.
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        if index not in vocabulary:
            types.append(gguf.TokenType.UNUSED)
        elif index not in added:
            types.append(gguf.TokenType.NORMAL)
        else:
            types.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    bos, eos = _added(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids: dict[str, Any] = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    # If these ids are missing, llama.cpp uses token 11 as BOS and EOS.
    writer.add_bos_token_id(ids["eos"] if ids["bos"] is None else ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    if ids["pad"] is not None:
        writer.add_pad_token_id(ids["pad"])
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    width, heads = _stream(config)
    if writer.arch == "starcoder2":
        writer.add_layer_norm_eps(config.rms_norm_eps * config.hidden_size / width)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.queries)
    writer.add_head_count_kv(heads.groups)
    writer.add_key_length(heads.width)
    writer.add_value_length(heads.width)
    writer.add_rope_dimension_count(heads.width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _stored(weight: Tensor, dtype: str) -> gguf.GGMLQuantizationType:
    """Return the GGUF type of a tensor."""
    return gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else _TYPES[dtype][0]


def _quantize(name: str, weight: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    require_finite(name, weight)
    with np.errstate(over="ignore", invalid="ignore"):
        data = gguf.quantize(np.ascontiguousarray(weight.float().numpy()), kind)
        if not np.isfinite(gguf.dequantize(data, kind)).all():
            raise ValueError(f"{name} has a value that is too large for {kind.name.lower()}; use --dtype float32.")
    return data


def write_gguf(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    file: Path,
    dtype: str = "float32",
    name: str = "",
) -> None:
    """Write an Arcee or Llama model as a GGUF file, one tensor at a time, without a second copy of all weights.

    Args:
        model: The model in float32, as from `conversion.to_hf`.
        tokenizer: A byte-level BPE tokenizer, as from `llmfoundry-wesar data`.
        file: The file to write.
        dtype: Type of the matrices: float32, float16, bfloat16 or q8_0. They are rewritten in float64.
        name: Name of the model, which programs show.

    Raises:
        ValueError: llama.cpp cannot express model or tokenizer, or a weight is not finite in `dtype`.
        OSError: Writing fails.
    """
    config = model.config
    assert isinstance(config, LlamaConfig)
    check(config, tokenizer, dtype)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    arch = architecture(config)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(file, arch)
    if name:
        writer.add_name(name)
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_config(writer, config)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    # The file begins with the shapes of all tensors. Tensors on the meta device give them without computing.
    shapes = {key: weight.to("meta") for key, weight in model.state_dict().items()}
    for key, weight in rewrite(shapes, config):
        kind = _stored(weight, dtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            names.get_name(key, (".weight", ".bias")) or key,
            weight.shape,
            np.dtype(np.float32),
            weight.numel() // block * size,
            kind,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, weight in rewrite(model.state_dict(), config):
            writer.write_tensor_data(_quantize(key, weight, _stored(weight, dtype)))
    finally:
        writer.close()
