"""GGUF files describe the same function, read with the gguf package into transformers' Starcoder2 and Llama.

llama.cpp itself was run by hand on these models; docs/tools.md has the figures.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.starcoder2 import Starcoder2Config, Starcoder2ForCausalLM

from llmfoundry_wesar.export.conversion import hf_config, to_hf
from llmfoundry_wesar.export.files import export, load
from llmfoundry_wesar.export.llama_cpp import architecture, check, write_gguf
from tests.tiny import build
from tests.trained import VOCABULARY, Trained, assert_same_logits, logits

FLOAT32 = 1e-5  # same reason as in test_conversion; rewriting in float64 adds one more rounding


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _weights(file: Path) -> dict[str, Tensor]:
    """Return every tensor by llama.cpp's name, in float32."""
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in tensors}


_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}


def _transformers_name(name: str, mlp: dict[str, str]) -> str:
    *block, module, kind = name.split(".")
    if not block:
        return f"{_MODULES[module]}.{kind}"
    return f"model.layers.{block[1]}.{(_BLOCK_MODULES | mlp)[module]}.{kind}"


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Convert from the order in which a pair's channels are neighbours to the order that transformers expects."""
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _read_back(file: Path) -> torch.nn.Module:
    """Build the model that a GGUF file describes, from the file alone, in transformers' class for its architecture."""
    reader = gguf.GGUFReader(file)
    arch = _value(reader, "general.architecture")
    keys = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
        "rope_theta": "rope.freq_base",
    }
    options = {name: _value(reader, f"{arch}.{key}") for name, key in keys.items()}
    width = _value(reader, f"{arch}.attention.key_length")
    assert width == _value(reader, f"{arch}.attention.value_length") == _value(reader, f"{arch}.rope.dimension_count")
    weights = _weights(file)
    if arch == "starcoder2":
        # llama.cpp has no key for the width of a head: it is the stream's width divided by the number of heads.
        assert width * options["num_attention_heads"] == options["hidden_size"]
        eps = _value(reader, "starcoder2.attention.layer_norm_epsilon")
        config = Starcoder2Config(norm_epsilon=eps, hidden_act="gelu", tie_word_embeddings=False, **options)
        model, mlp = Starcoder2ForCausalLM(config), {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    else:
        eps = _value(reader, "llama.attention.layer_norm_rms_epsilon")
        config = LlamaConfig(head_dim=width, rms_norm_eps=eps, attention_bias=True, mlp_bias=True, **options)
        model, mlp = LlamaForCausalLM(config), {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        for name in weights:
            for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
                if part in name:
                    weights[name] = _halves(weights[name], heads)
    wanted = model.state_dict()
    renamed = {_transformers_name(name, mlp): weight for name, weight in weights.items()}
    assert not renamed.keys() - wanted.keys()
    left = wanted.keys() - renamed.keys()
    assert all(arch == "llama" and name.endswith(".bias") for name in left)  # llama.cpp has no bias there
    model.load_state_dict(renamed | {name: torch.zeros_like(wanted[name]) for name in left})
    return model


@pytest.mark.parametrize(
    "case, arch",
    [
        ("wesar", "starcoder2"),
        ("grouped", "starcoder2"),  # all heads together are wider than the stream
        ("biases", "starcoder2"),
        ("residual_scaling_he", "starcoder2"),
        ("fused_and_tied", "starcoder2"),
        ("glu", "llama"),
    ],
)
def test_the_file_describes_the_trained_model(case, arch, trained, tmp_path):
    export(trained[case].folder, tmp_path / "out", "gguf")
    file = tmp_path / "out" / "model.gguf"
    assert _value(gguf.GGUFReader(file), "general.architecture") == arch
    assert_same_logits(logits(_read_back(file), trained[case].ids), trained[case].logits, FLOAT32)


@pytest.fixture
def tokenizer(trained) -> PreTrainedTokenizerFast:
    return load(trained["wesar"].folder)[1]  # type: ignore[return-value]


_GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}


@pytest.mark.parametrize(
    "arch, options",
    {
        "starcoder2, grouped heads": ("starcoder2", {"attn_config": _GROUPED}),
        "starcoder2, one group": ("starcoder2", {"attn_config": {"attn_type": "multiquery_attention"}}),
        "a constant gate": ("llama", {"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}, "attn_config": _GROUPED}),
        "a constant gate and biases": ("llama", {"ffn_config": {"ffn_act_fn": {"name": "silu"}}, "no_bias": False}),
        "llama, grouped heads and biases": (
            "llama",
            {
                "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
                "attn_config": _GROUPED,
                "no_bias": False,
            },
        ),
    }.values(),
)
def test_every_form_describes_the_model(arch, options, tokenizer, trained, tmp_path):
    """Norms, gates and biases are far from their start, and the vocabulary has padding."""
    model = build(vocab_size=VOCABULARY + 20, max_seq_len=64, norm_eps=1e-3, **options).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (parameter.std() if parameter.numel() > 1 else 1)
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    plain = to_hf(model, tokenizer)
    assert architecture(plain.config) == arch
    write_gguf(plain, tokenizer, tmp_path / "model.gguf")
    ids = trained["wesar"].ids
    assert_same_logits(logits(_read_back(tmp_path / "model.gguf"), ids), logits(model, ids), FLOAT32)
    tokens, types = (
        _value(gguf.GGUFReader(tmp_path / "model.gguf"), f"tokenizer.ggml.{key}") for key in ("tokens", "token_type")
    )
    assert len(tokens) == len(types) == VOCABULARY + 20 == len(set(tokens))
    assert set(types[VOCABULARY:]) == {gguf.TokenType.UNUSED}


@pytest.mark.parametrize(
    "dtype, name, bound",
    [
        ("f16", "F16", lambda weight: weight.abs() * 2**-11 + 2**-25),
        ("bfloat16", "BF16", lambda weight: weight.abs() * 2**-8),
        # A block of 32 entries has a float16 scale, its largest entry / 127. The error is half a step, and that of the
        # scale.
        ("q8_0", "Q8_0", lambda weight: weight.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1) / 200),
    ],
)
def test_matrices_are_rounded_to_the_type_and_nothing_else_is(dtype, name, bound, trained, tmp_path):
    """The error is at most half a unit in the last place: 2⁻¹¹ of the value in float16, 2⁻⁸ in bfloat16."""
    case = "glu" if dtype == "q8_0" else "wesar"  # wesar gets 5 heads of 8 channels, which 32 does not divide
    export(trained[case].folder, tmp_path / "f32", "gguf")
    export(trained[case].folder, tmp_path / "out", "gguf", dtype)
    exact, rounded = (_weights(tmp_path / folder / "model.gguf") for folder in ("f32", "out"))
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert exact.keys() == rounded.keys()
    for key, weight in exact.items():
        if weight.ndim == 1:
            assert types[key] == "F32" and torch.equal(rounded[key], weight)
        else:
            assert types[key] == name and not torch.equal(rounded[key], weight)
            assert ((rounded[key] - weight).abs() <= bound(weight)).all(), key


def test_the_tokenizer_goes_along(trained, tmp_path):
    """Tokens, merges, special tokens, and the text of a chat template."""
    export(trained["wesar"].folder, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    _, tokenizer = load(trained["wesar"].folder)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    assert _value(reader, "tokenizer.ggml.model") == "gpt2" and _value(reader, "tokenizer.ggml.pre") == "gpt-2"
    tokens = _value(reader, "tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens)} == tokenizer.get_vocab()
    assert [merge.split() for merge in _value(reader, "tokenizer.ggml.merges")] == [
        list(merge) for merge in tree["model"]["merges"]
    ]
    for kind in ("bos", "eos"):
        assert _value(reader, f"tokenizer.ggml.{kind}_token_id") == getattr(tokenizer, f"{kind}_token_id")
        assert _value(reader, f"tokenizer.ggml.add_{kind}_token") is False
    types = _value(reader, "tokenizer.ggml.token_type")
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [tokenizer.eos_token_id]


def _changed(tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], **options: Any) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(tree[key], dict) and isinstance(value, dict) else value
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **{"eos_token": tokenizer.eos_token, **options}
    )


def _template(*pieces: str) -> dict[str, Any]:
    special = {piece: {"id": piece, "ids": [0], "tokens": [piece]} for piece in pieces if piece != "A"}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def test_a_bos_that_the_tokenizer_adds_is_added_by_llama_cpp(tokenizer, trained, tmp_path):
    model, _ = load(trained["wesar"].folder)
    eos = tokenizer.eos_token
    for pieces, added in {(eos, "A"): (True, False), ("A", eos): (False, True), (eos, "A", eos): (True, True)}.items():
        bos = _changed(tokenizer, {"post_processor": _template(*pieces)}, bos_token=eos)
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_gguf(to_hf(model, bos), bos, file)
        reader = gguf.GGUFReader(file)
        assert tuple(_value(reader, f"tokenizer.ggml.add_{kind}_token") for kind in ("bos", "eos")) == added


_SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"normalizer": {"type": "NFC"}}, 'normalizer: {"type": "NFC"}'),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "pre_tokenizer.add_prefix_space: true"),
        ({"pre_tokenizer": {"use_regex": False}}, "pre_tokenizer.use_regex: false"),
        ({"pre_tokenizer": None}, "pre_tokenizer.type: null"),
        ({"pre_tokenizer": _SPLIT}, 'pre_tokenizer.type: "Split"'),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges: true"),
        ({"model": {"dropout": 0.1}}, "model.dropout: 0.1"),
        ({"post_processor": _template("A", "!", "!")}, "post_processor, which adds more than a BOS and EOS"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused_by_name(change, words, tokenizer, trained):
    config = hf_config(load(trained["wesar"].folder)[0].config)
    with pytest.raises(ValueError, match="--format gguf cannot express the tokenizer's") as refusal:
        # The class sets this option itself.
        prefix = change.get("pre_tokenizer") == {"add_prefix_space": True}
        check(config, _changed(tokenizer, change, add_prefix_space=prefix), "float32")
    assert words in str(refusal.value)


def test_other_tokenizers_are_refused_by_name(tokenizer, dataset, trained):
    config = hf_config(load(trained["wesar"].folder)[0].config)
    check(config, tokenizer, "float32")
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        check(config, None, "float32")
    with pytest.raises(ValueError, match=r'tokenizer\'s model\.type: "WordLevel"'):
        check(config, AutoTokenizer.from_pretrained(dataset / "tokenizer"), "float32")
    with pytest.raises(ValueError, match=r"tokenizer's eos_token: null"):
        check(config, _changed(tokenizer, {}, eos_token=None), "float32")
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"the tokenizer has 301 tokens, but the model only 300 \(model\.vocab_size\)"):
        check(config, tokenizer, "float32")


LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "section, options, words",
    [
        (
            "ffn_config",
            {"ffn_type": "mptglu", "ffn_act_fn": {"name": "gelu"}},
            "ffn_act_fn: gelu with ffn_type: mptglu (only silu)",
        ),
        (
            "ffn_config",
            {"ffn_type": "mptglu", "ffn_act_fn": {"name": "quick_gelu"}},
            "quick_gelu with ffn_type: mptglu (only silu)",
        ),
        (
            "ffn_config",
            {"ffn_act_fn": {"name": "relu"}},
            "relu with ffn_type: mptmlp (only quick_gelu or silu or gelu)",
        ),
        ("attn_config", {"rope_hf_config": LLAMA3}, 'model.attn_config.rope_hf_config.type: "llama3"; export with'),
    ],
)
def test_what_is_not_written_for_llama_cpp_is_refused_by_name(section, options, words, tokenizer):
    """llama.cpp would compute another function without an error."""
    config = hf_config(build(vocab_size=VOCABULARY, **{section: options}).model.config)
    with pytest.raises(ValueError) as refusal:
        check(config, tokenizer, "float32")
    assert words in str(refusal.value)


def test_rows_that_q8_0_cannot_divide_are_refused(trained: dict[str, Trained], tmp_path):
    """The matrix has 5 heads of 8 channels, and the blocks of q8_0 have 32."""
    with pytest.raises(ValueError, match=r"--dtype q8_0: rows of .* have 40 entries, not a multiple of 32"):
        export(trained["wesar"].folder, tmp_path / "out", "gguf", "q8_0")
    assert not list(tmp_path.iterdir())
