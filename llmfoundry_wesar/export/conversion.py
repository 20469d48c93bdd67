"""Convert between model classes without changing the function that the model computes. In memory, on the CPU.

    build_mpt   config and weights  ->  the model as it was trained
    from_llama  config and weights of an Arcee or Llama  ->  config and weights of an MPT
    merge       a trained model  ->  foundry's plain MPT
    to_hf       a trained model  ->  ArceeForCausalLM, or LlamaForCausalLM for a GLU
    to_gated    a trained model  ->  a model with the layers of a method

If the target cannot express the model, a ValueError names the config key.
"""

import json
import math
from typing import Any

import torch
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from llmfoundry.models.utils import init_empty_weights
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar import methods
from llmfoundry_wesar.export.arcee import ArceeConfig, ArceeForCausalLM
from llmfoundry_wesar.keys import arguments
from llmfoundry_wesar.layers import Reparameterized, ScaledEmbedding
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM

Weights = dict[str, Tensor]

# The values of config keys that a plain MPT, or a Llama, can express.
_AS_MPT: dict[str, tuple] = {
    "norm_placement": ("pre",),
    "embedding_norm": (False,),
    # true gives the matrices of the attention other names.
    "fuse_norm_attn_norm": (None, False),
}
_AS_LLAMA: dict[str, tuple] = {
    **_AS_MPT,
    "norm_type": ("rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm"),
    "learned_pos_emb": (False,),
    "attn_config.attn_type": (
        "multihead_attention",
        "grouped_query_attention",
        "multiquery_attention",
        "sdpa_attention",
    ),
    "attn_config.rope": (True,),
    "attn_config.rope_impl": ("hf",),
    "attn_config.rope_hf_config.type": ("no_scaling", "llama3"),
    "attn_config.alibi": (False,),
    "attn_config.clip_qkv": (None,),
    "attn_config.qk_ln": (False,),
    "attn_config.qk_gn": (False,),
    "attn_config.attn_logit_softcapping": (None,),
    "attn_config.attn_temperature_tuning.attn_scale": (0.0,),
    "attn_config.sliding_window_size": (-1,),
    "attn_config.kv_dim": (None,),
    "ffn_config.ffn_type": ("mptmlp", "mptglu"),
    "block_overrides": (None,),
    "final_logit_softcapping": (None,),
}
# transformers' name of an activation function → foundry's `ffn_act_fn`: torch's name and options.
_ACTIVATIONS = {
    "gelu": {"name": "gelu", "approximate": "none"},
    "gelu_pytorch_tanh": {"name": "gelu", "approximate": "tanh"},
    "quick_gelu": {"name": "quick_gelu"},
    "relu": {"name": "relu"},
    "silu": {"name": "silu"},
}
# Of RoPE with scaled frequencies, as Llama 3.1 has it. transformers and foundry use the same names.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_MODULES = {"transformer.wte": "model.embed_tokens", "transformer.norm_f": "model.norm", "lm_head": "lm_head"}
_BLOCK_MODULES = {
    "norm_1": "input_layernorm",
    "attn.Wq": "self_attn.q_proj",
    "attn.Wk": "self_attn.k_proj",
    "attn.Wv": "self_attn.v_proj",
    "attn.out_proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}


def _module_names(n_layers: int) -> dict[str, str]:
    """Map each module name of an MPT to Llama's."""
    blocks = {
        f"transformer.blocks.{i}.{mpt}": f"model.layers.{i}.{llama}"
        for i in range(n_layers)
        for mpt, llama in _BLOCK_MODULES.items()
    }
    return _MODULES | blocks


def _rename(weights: Weights, modules: dict[str, str]) -> Weights:
    renamed = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        renamed[f"{modules.get(module, module)}.{kind}"] = weight
    return renamed


def _require(config: Any, admissible: dict[str, tuple], target: str) -> None:
    tree, refused = config.to_dict(), []
    for key, values in admissible.items():
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # Foundry accepts the names of norms in upper or lower case.
        if (value.lower() if key == "norm_type" else value) not in values:
            refused.append(f"model.{key}: {json.dumps(value)} (only {' or '.join(map(json.dumps, values))})")
    if refused:
        raise ValueError(f"{target} cannot express {', '.join(refused)}.")


def _fill(model: nn.Module, weights: Weights) -> None:
    """Assign weights to a model on the meta device, without copying them."""
    wanted = model.state_dict()
    shapes = {name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape}
    for what, names in (
        ("are missing", wanted.keys() - weights.keys()),
        ("are unknown", weights.keys() - wanted.keys()),
        ("have another shape", shapes),
    ):
        if names:
            raise ValueError(
                f"weights and config do not fit together: {len(names)} weights {what}, such as {min(names)}."
            )
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    model.eval()


def require_finite(name: str, weight: Tensor) -> None:
    """Raise a ValueError that names the tensor if it has an infinite value or NaN, from divergence or from rounding."""
    if weight.isfinite().all():
        return
    if weight.dtype in (torch.float16, torch.bfloat16) and not weight.isnan().any():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has a value that is too large for {dtype}; use --dtype float32.")
    raise ValueError(f"{name} is not finite, because the run has diverged; use an earlier checkpoint.")


def is_arcee(config: LlamaConfig) -> bool:
    """Return whether a config from `hf_config` is that of an Arcee, which has ungated feed-forward layers."""
    return config.model_type == ArceeConfig.model_type


def build_mpt(config: MPTConfig, weights: Weights) -> MPTForCausalLM:
    """Build the MPT of a config, ours (`WeSaRMPTConfig`) or foundry's, with the given weights. They are not copied.

    Raises:
        ValueError: The weights do not fit the config.
    """
    config.init_device = "meta"
    model = WeSaRMPTForCausalLM(config) if isinstance(config, WeSaRMPTConfig) else MPTForCausalLM(config)
    config.init_device = "cpu"
    _fill(model, weights)
    return model


def _without_tied_copy(weights: Weights) -> Weights:
    """Leave out W_p if W_e is tied to it. A Composer checkpoint has the one matrix under both names.

    Raises:
        ValueError: The two differ, so that it is unknown which function was trained.
    """
    rest = dict(weights)
    w_p, w_e = rest.pop("lm_head.weight", None), rest.get("model.embed_tokens.weight")
    if w_p is None or w_e is None:
        return weights
    # NaN equals NaN here, because both names of a run that has diverged have it. The callers report that.
    if w_p.shape != w_e.shape or not torch.allclose(w_p.float(), w_e.float(), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "tie_word_embeddings: true, but lm_head.weight differs from model.embed_tokens.weight; set "
            "tie_word_embeddings: false if the model was trained with both."
        )
    return rest


def from_llama(llama: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Turn config and weights of an Arcee or Llama model into those of an MPT.

    Raises:
        ValueError: MPT cannot express the model, or the weights contradict the config; the message names the key.
    """
    config = LlamaConfig.from_dict({**llama, "rope_scaling": None})
    # transformers ≥ 5 writes `rope_parameters`, earlier versions write `rope_theta` and `rope_scaling`.
    rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", "default")
    for key, value, admissible in (
        ("rope_type", rope_type, ("default", "llama3")),
        ("rope_scaling.type", rope.get("type", rope_type), (rope_type,)),  # its name before transformers 4.43
        ("hidden_act", config.hidden_act, _ACTIVATIONS),
        ("mlp_bias", config.mlp_bias, (config.attention_bias,)),
        ("quantization_config", llama.get("quantization_config"), (None,)),
    ):
        if value not in admissible:
            raise ValueError(f"MPT cannot express {key}: {json.dumps(value)}.")
    own_head_dim = config.head_dim * config.num_attention_heads != config.hidden_size
    mpt = {
        "model_type": "mpt",
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim if own_head_dim else None,
        "max_seq_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "no_bias": not config.attention_bias,
        "norm_type": "rmsnorm",
        "norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "learned_pos_emb": False,
        "attn_config": {
            "attn_type": "grouped_query_attention",
            "attn_impl": "torch",
            "kv_n_heads": config.num_key_value_heads,
            "fused_qkv": False,
            # Foundry's default softmax_scale is 1/√(d_model/n_heads), even if head_dim is set.
            "softmax_scale": config.head_dim**-0.5 if own_head_dim else None,
            "rope": True,
            "rope_impl": "hf",
            "rope_theta": rope.get("rope_theta", config.rope_theta),
            "rope_hf_config": {"type": "llama3", **{key: rope[key] for key in _LLAMA3}}
            if rope_type == "llama3"
            else {"type": "no_scaling", "factor": 1.0},
        },
        "ffn_config": {
            "ffn_type": "mptglu" if llama["model_type"] == "llama" else "mptmlp",
            "ffn_hidden_size": config.intermediate_size,
            "ffn_act_fn": _ACTIVATIONS[config.hidden_act],
        },
        "init_config": {"name": "small_init_"},
    }
    # Constants that follow from the config; transformers ≤ 4.31 saved them.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        weights = _without_tied_copy(weights)
    return mpt, _rename(weights, {llama: mpt for mpt, llama in _module_names(config.num_hidden_layers).items()})


def _multipliers(model: WeSaRMPTForCausalLM) -> dict[str, float]:
    """Map a module name to the constant by which the forward pass multiplies its output, if there is one."""
    config = model.config
    assert isinstance(model.transformer.wte, ScaledEmbedding)
    multipliers = {"transformer.wte": model.transformer.wte.scale}
    if config.residual_scaling:
        for i in range(config.n_layers):
            for name in ("attn.out_proj", "ffn.down_proj"):
                multipliers[f"transformer.blocks.{i}.{name}"] = 1 / math.sqrt(2 * config.n_layers)
    return multipliers


def _split(weights: Weights, config: Any) -> Weights:
    """Split a fused W_qkv into W_q, W_k and W_v, and copy a tied W_e to W_p."""
    head_dim = config.head_dim or config.d_model // config.n_heads
    queries = config.n_heads * head_dim
    split = {}
    for name, weight in weights.items():
        if ".Wqkv." in name:
            keys = (weight.size(0) - queries) // 2
            for part, matrix in zip("qkv", weight.split([queries, keys, keys]), strict=True):
                split[name.replace("Wqkv", f"W{part}")] = matrix.contiguous()
        else:
            split[name] = weight
    if "lm_head.weight" not in split:
        split["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    return split


@torch.no_grad()
def merge(model: WeSaRMPTForCausalLM) -> MPTForCausalLM:
    """Make foundry's plain MPT with the same function: gates, embedding and residual scaling are merged into weights.

    Embedding scaling unties W_e and W_p, because it multiplies only W_e.

    Raises:
        ValueError: Plain MPT cannot express the model; the message names the keys.
    """
    config = model.config
    _require(config, _AS_MPT, "plain MPT")
    modules, multipliers = dict(model.named_modules()), _multipliers(model)
    plain: Weights = {}
    for name, weight in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        module = modules[path]
        if isinstance(module, Reparameterized):
            if kind not in ("weight", "bias"):
                continue
            weight = module.virtual_weight() if kind == "weight" else weight
        plain[name] = weight * multipliers[path] if multipliers.get(path, 1) != 1 else weight
    tied = config.tie_word_embeddings
    if tied and multipliers["transformer.wte"] != 1:
        tied, plain["lm_head.weight"] = False, model.get_input_embeddings().weight
    tree = {key: value for key, value in config.to_dict().items() if key not in arguments(WeSaRMPTConfig)}
    attention = dict(tree["attn_config"])
    if attention["attn_type"] == "sdpa_attention":
        attention["attn_type"] = "grouped_query_attention"
        attention["kv_n_heads"] = attention.get("kv_n_heads") or config.n_heads
    tree |= {
        "attn_config": attention,
        "ffn_config": {key: value for key, value in tree["ffn_config"].items() if key != "fc_type"},
        "fc_type": {"name": "torch"},
        "init_config": {"name": "small_init_"},
        "tie_word_embeddings": tied,
    }
    return build_mpt(MPTConfig.from_dict(tree), plain)  # type: ignore[arg-type]


def hf_config(config: WeSaRMPTConfig) -> LlamaConfig:
    """Return the config of `to_hf`'s model. It does not need the weights.

    Raises:
        ValueError: Neither Arcee nor Llama can express the model; the message names the keys.
    """
    glu = config.ffn_config["ffn_type"] == "mptglu"
    target = "LlamaForCausalLM" if glu else "ArceeForCausalLM"
    _require(config, _AS_LLAMA, target)
    activation = config.ffn_config.get("ffn_act_fn") or {"name": "gelu"}
    if activation["name"] == "gelu":
        activation = {"approximate": "none", **activation}
    activations = [name for name, options in _ACTIVATIONS.items() if options == activation]
    if not activations:
        raise ValueError(f"{target} cannot express model.ffn_config.ffn_act_fn: {json.dumps(activation)}.")
    if config.attention_bias == config.no_bias:
        raise ValueError(
            f"{target} cannot express model.attention_bias: {json.dumps(config.attention_bias)} with "
            f"model.no_bias: {json.dumps(config.no_bias)}."
        )
    attention = config.attn_config
    rope = attention["rope_hf_config"]
    scaling = {"rope_type": "llama3", **{key: rope[key] for key in _LLAMA3}} if rope["type"] == "llama3" else None
    kv_heads = 1 if attention["attn_type"] == "multiquery_attention" else attention.get("kv_n_heads")
    return (LlamaConfig if glu else ArceeConfig)(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ffn_config.get("ffn_hidden_size") or int(config.d_model * config.expansion_ratio),
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=kv_heads or config.n_heads,
        head_dim=config.head_dim or config.d_model // config.n_heads,
        hidden_act=activations[0],
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_theta=attention["rope_theta"],
        rope_scaling=scaling,
        attention_bias=config.attention_bias,
        mlp_bias=not config.no_bias,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def to_hf(
    model: WeSaRMPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """Make an `ArceeForCausalLM`, or for a GLU a `LlamaForCausalLM`, with the same function.

    Args:
        model: The model as it was trained.
        tokenizer: Its BOS, EOS and pad token go into the config, for generation.
        dtype: Type of the new weights. Gates are merged in the type of `model`.

    Raises:
        ValueError: Neither class can express the model; the message names the keys.
    """
    config = hf_config(model.config)
    if tokenizer is not None:
        config.update({f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    plain = merge(model)
    weights = _split(plain.state_dict(), plain.config)
    if plain.logit_scale is not None:
        weights["lm_head.weight"] = weights["lm_head.weight"] * plain.logit_scale
    # Llama scales scores by 1/√head_dim. Foundry's default is 1/√(d_model/n_heads), even if head_dim is set.
    scale = plain.config.attn_config["softmax_scale"]
    scale = (plain.config.d_model / plain.config.n_heads) ** -0.5 if scale is None else scale
    if not math.isclose(factor := scale * math.sqrt(config.head_dim), 1.0):
        weights = {name: weight * factor if ".Wq." in name else weight for name, weight in weights.items()}
    weights = _rename(weights, _module_names(plain.config.n_layers))
    with init_empty_weights():
        llama = ArceeForCausalLM(config) if isinstance(config, ArceeConfig) else LlamaForCausalLM(config)
    _fill(llama, {name: weight.to(dtype) for name, weight in weights.items()})
    return llama


def _without_score_matrix(attention: dict[str, Any]) -> dict[str, Any]:
    """Replace foundry's `torch` attention by `sdpa_attention`, which computes the same. Keep any other attention.

    In training foundry's classes would store the S×S matrix of scores.
    """
    kv_heads = {
        "multihead_attention": None,  # as many as query heads
        "grouped_query_attention": attention.get("kv_n_heads"),
        "multiquery_attention": 1,
    }
    if attention["attn_impl"] != "torch" or attention["attn_type"] not in kv_heads:
        return attention
    return {**attention, "attn_type": "sdpa_attention", "kv_n_heads": kv_heads[attention["attn_type"]]}


@torch.no_grad()
def to_gated(model: WeSaRMPTForCausalLM, method: str) -> WeSaRMPTForCausalLM:
    r"""Make a model with the layers of a method and the same function, to continue training with the method.

    A virtual weight :math:`\bar W` of n entries becomes :math:`\alpha W` with
    :math:`\alpha = \lVert\bar W\rVert/(\sigma\sqrt n)`, where σ is the method's. So every actual weight has the root
    mean square :math:`\lVert W\rVert/\sqrt n = \sigma`, and all update ratios are alike, as in training from scratch.
    Foundry's `torch` attention becomes `sdpa_attention`.

    Args:
        model: A plain model, or a model of another method.
        method: A value of `variables.method`.

    Raises:
        ValueError: The method is unknown or cannot compute the function of a plain model, or a matrix is 0 or not
            finite.
    """
    options = OmegaConf.to_container(methods.load("method", method).model, resolve=True)
    assert isinstance(options, dict)
    plain = merge(model)
    tree = plain.config.to_dict()
    tree |= {
        "attn_config": {**_without_score_matrix(tree["attn_config"]), "fused_qkv": False},
        "tie_word_embeddings": False,
        "init_device": "meta",
        **options,
    }
    config = WeSaRMPTConfig.from_dict(tree)  # type: ignore[arg-type]
    assert isinstance(config, WeSaRMPTConfig)
    _require(config, _AS_MPT, f"the method {method} cannot start from a plain model, which")
    gated = WeSaRMPTForCausalLM(config)
    config.init_device = "cpu"
    modules, multipliers = dict(gated.named_modules()), _multipliers(gated)
    weights: Weights = {}
    for name, weight in _split(plain.state_dict(), plain.config).items():
        path, _, kind = name.rpartition(".")
        module = modules[path]
        if path in multipliers:
            weight = weight / multipliers[path]
        if kind == "weight" and isinstance(module, Reparameterized):
            scale = weight.square().mean().sqrt().item() / config.init_config["sigma"]
            if not 0 < scale < math.inf:
                raise ValueError(f"{name} gives no value for its gate: its root mean square is 0 or not finite.")
            module.to_empty(device="cpu", recurse=False)
            module.weight.copy_(weight / scale)
            try:
                module.start_gate_(scale, "backbone")
            except ValueError as error:
                raise ValueError(f"{name} cannot be trained with {method}: {error}.") from error
            # This adds an empty bias too. The real bias comes later in the loop, and replaces it.
            weights |= module.state_dict(prefix=f"{path}.")
        else:
            weights[name] = weight
    _fill(gated, weights)
    return gated
