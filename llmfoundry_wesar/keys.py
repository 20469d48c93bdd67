"""Check keys and values of a config's `model` section. Foundry checks few types, and ignores some keys."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from llmfoundry.layers_registry import (
    attention_classes,
    ffns,
    ffns_with_megablocks,
    ffns_with_norm,
    norms,
    param_init_fns,
)
from llmfoundry.models.layers.attention import is_flash_v2_installed
from llmfoundry.models.layers.ffn import resolve_ffn_act_fn
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.utils.config_defaults import attn_config_defaults

_MODEL_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(MPTConfig).parameters.items()}
_WHOLE = ("d_model", "n_heads", "n_layers", "head_dim", "max_seq_len", "vocab_size", "kv_n_heads", "ffn_hidden_size")
_POSITIVE = ("expansion_ratio", "rope_theta", "alibi_bias_max", "embedding_fraction", "clip_qkv")
_POSITIVE += ("final_logit_softcapping", "attn_logit_softcapping")
_FRACTIONS = ("resid_pdrop", "emb_pdrop", "attn_pdrop")
_NUMBERS = ("softmax_scale", "sliding_window_size")
# Keys of a section for which foundry passes a value of the model, and the key that sets it.
_BY_ALL = {"bias": "no_bias", "device": "init_device"}
_OF_THE_MODEL = {
    "attn_config": {key: key for key in ("attention_bias", "d_model", "fc_type", "head_dim", "n_heads")} | _BY_ALL,
    "ffn_config": {key: key for key in ("d_model", "expansion_ratio", "fc_type")} | _BY_ALL,
    "fc_type": _BY_ALL,
}


def arguments(cls: Callable) -> list[str]:
    """Return the names of the parameters of a class's constructor or of a function, without *args and **kwargs."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def takes_any_key(cls: Callable) -> bool:
    """Return whether a class's constructor or a function has **kwargs, so that it may take other keys than it names."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())


def datasets(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each loader's name, with its label if it has one, and its `dataset` section.

    Raises:
        ValueError: If one of the sections is not a mapping.
    """
    # Foundry moves an `eval_loader` that is a list to `eval_loaders`, before it calls its config transforms.
    for key in ("train_loader", "eval_loader", "eval_loaders"):
        loaders = config.get(key) or []
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            dataset = (loader.get("dataset") or {}) if isinstance(loader, Mapping) else None
            if not isinstance(dataset, Mapping):
                raise ValueError(f"{key.removesuffix('s')}: {loader!r} is not a mapping with a mapping `dataset`.")
            yield f"{key.removesuffix('s')} {loader.get('label') or ''}".strip(), dataset


def did_you_mean(key: str, known: Iterable[str], otherwise: str) -> str:
    """Return the advice for an unknown key: the known key with a similar name, or `otherwise` if there is none."""
    close = difflib.get_close_matches(key, known)
    return f"did you mean {close[0]}?" if close else otherwise


def is_number(value: Any) -> bool:
    """Return whether a value of a config is a finite number. In Python a boolean is an int, so it is excluded."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_values(model: Mapping[str, Any]) -> None:
    """Refuse values from which no model of the MPT family can be built, or that fail at the first step.

    Args:
        model: The keys of `MPTConfig`. Keys that are absent, and unknown keys, are not checked.

    Raises:
        ValueError: If a value has the wrong type or is out of its range. The message has the whole key and the value.
    """
    for key in ("attn_config", "ffn_config", "init_config"):
        if not isinstance(section := model.get(key), Mapping | None):
            raise ValueError(f"model.{key}: {section!r} is not a mapping of keys to values.")
    fc_type, init = model.get("fc_type", "torch"), model.get("init_config")
    if not isinstance(fc_type, str) and not (isinstance(fc_type, Mapping) and isinstance(fc_type.get("name"), str)):
        raise ValueError(f"model.fc_type: {fc_type!r} is neither a name nor a mapping with a `name`.")
    attention, ffn = model.get("attn_config") or {}, model.get("ffn_config") or {}
    _check_numbers("model.", model, _MODEL_DEFAULTS)
    _check_numbers("model.attn_config.", attention, attn_config_defaults)
    _check_numbers("model.ffn_config.", ffn, {})
    for key, value, registries in (
        ("norm_type", model.get("norm_type"), [norms]),
        ("attn_config.attn_type", attention.get("attn_type"), [attention_classes]),
        ("ffn_config.ffn_type", ffn.get("ffn_type"), [ffns, ffns_with_norm, ffns_with_megablocks]),
        ("init_config.name", init and init.get("name", ""), [param_init_fns]),
    ):
        known = sorted(name for registry in registries for name in registry.get_all())
        name = value.lower() if key == "norm_type" and isinstance(value, str) else value
        if value is not None and name not in known:
            raise ValueError(f"model.{key}: {value!r} is not one of {', '.join(known)}.")
    scale, rope_impl = model.get("logit_scale"), attention.get("rope_impl", "hf")
    if scale is not None and not is_number(scale) and scale != "inv_sqrt_d_model":
        raise ValueError(f"model.logit_scale: {scale!r} is neither a number nor inv_sqrt_d_model.")
    usable = rope_impl == "hf" or (rope_impl == "dail" and is_flash_v2_installed(v2_version="2.0.1"))
    if attention.get("rope") and not usable:
        fix = "needs the package flash_attn" if rope_impl == "dail" else "is not one of hf, dail"
        raise ValueError(f"model.attn_config.rope_impl: {rope_impl!r} {fix}; set it to hf.")
    if attention.get("attn_type") == "grouped_query_attention" and attention.get("kv_n_heads") is None:
        raise ValueError("model.attn_config.kv_n_heads is missing: attn_type: grouped_query_attention needs it.")
    _check_widths(model, attention, ffn)
    _check_activation(ffn.get("ffn_act_fn"))


def _check_numbers(prefix: str, section: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(defaults.get(key), bool):
            right, wanted = isinstance(value, bool), "one of true, false"
        elif key in _WHOLE:
            right, wanted = is_number(value) and value >= 1 and value == int(value), "a whole number ≥ 1"
        elif key in _POSITIVE:
            right, wanted = is_number(value) and value > 0, "a positive number"
        elif key in _FRACTIONS:
            right, wanted = is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
        elif key in _NUMBERS:
            right, wanted = is_number(value), "a number"
        elif key == "norm_eps":
            right, wanted = is_number(value) and value >= 0, "a number ≥ 0"
        else:
            continue
        optional = value is None and defaults.get(key) is None
        if not right and not optional:
            raise ValueError(f"{prefix}{key}: {value!r} is not {wanted}.")


def _check_widths(model: Mapping[str, Any], attention: Mapping[str, Any], ffn: Mapping[str, Any]) -> None:
    d_model, n_heads = (model.get(key, _MODEL_DEFAULTS[key]) for key in ("d_model", "n_heads"))
    if d_model % n_heads != 0:
        raise ValueError(f"model.n_heads: {n_heads} does not divide d_model: {d_model}; change one of them.")
    width = model.get("head_dim") or d_model // n_heads
    if attention.get("rope") and width % 2:
        key = "head_dim" if model.get("head_dim") else "n_heads"
        raise ValueError(
            f"model.{key}: {model.get(key)} gives heads of width {width}, but attn_config.rope: true rotates pairs of "
            "entries; choose an even width."
        )
    kv_n_heads = attention.get("kv_n_heads") or 1
    if n_heads % kv_n_heads:
        raise ValueError(f"model.attn_config.kv_n_heads: {kv_n_heads} does not divide n_heads: {n_heads}.")
    hidden = d_model * model.get("expansion_ratio", 4)
    if ffn.get("ffn_hidden_size") is None and hidden != int(hidden):
        raise ValueError(
            f"model.expansion_ratio: {model['expansion_ratio']} × d_model: {d_model} is {hidden:g}, not a whole number."
        )


def _check_activation(activation: Any) -> None:
    """Try the activation function in front of W_d, which foundry takes from `torch.nn.functional` by its name."""
    if activation is None:
        return
    if not isinstance(activation, Mapping) or not isinstance(activation.get("name"), str):
        raise ValueError(f"model.ffn_config.ffn_act_fn: {activation!r} is not a mapping with a `name`.")
    probe = torch.zeros(2, 4)
    try:
        result = resolve_ffn_act_fn(dict(activation))(probe)
    except Exception as error:  # whatever a function of torch raises for wrong arguments
        raise ValueError(
            f"model.ffn_config.ffn_act_fn: {dict(activation)} is not an activation function with its options "
            f"({error}); use for example {{name: gelu}} or {{name: silu}}."
        ) from error
    if not isinstance(result, torch.Tensor) or result.shape != probe.shape or result.dtype != probe.dtype:
        raise ValueError(
            f"model.ffn_config.ffn_act_fn.name: {activation['name']!r} is not an activation function, which gives a "
            "number for each number; use for example gelu or silu."
        )


def check_sections(model: Mapping[str, Any]) -> None:
    """Refuse keys of the sections of `model` that the layers do not take, or that another key sets.

    Args:
        model: The `model` section of a YAML.

    Raises:
        ValueError: If there is such a key, or as in `check_values`.
    """
    check_values(model)
    for name, others in _OF_THE_MODEL.items():
        section = model.get(name)
        if isinstance(section, Mapping):
            for key in section.keys() & others.keys():
                raise ValueError(
                    f"model.{name}.{key}: {section[key]!r} has no place here; remove it and set model.{others[key]}."
                )
    attention, ffn = model.get("attn_config") or {}, model.get("ffn_config") or {}
    if model.get("learned_pos_emb") and (attention.get("rope") or attention.get("alibi")):
        key = "rope" if attention.get("rope") else "alibi"
        raise ValueError(f"model.learned_pos_emb: true is not used with attn_config.{key}: true; remove one of them.")
    attention_class = attention_classes.get(attention.get("attn_type", attn_config_defaults["attn_type"]))
    ffn_type = ffn.get("ffn_type", "mptmlp")
    known = {
        "attn_config": {*arguments(attention_class), *attn_config_defaults, "seq_parallel_world_size"},
        "ffn_config": {*arguments(ffns.get(ffn_type)), "ffn_type"} if ffn_type in ffns else {*ffn},
    }
    for name, section in (("attn_config", attention), ("ffn_config", ffn)):
        for key in section.keys() - known[name]:
            kind = attention.get("attn_type", "multihead_attention") if name == "attn_config" else ffn_type
            usable = known[name] - _OF_THE_MODEL[name].keys()
            raise ValueError(
                f"model.{name}.{key}: {section[key]!r} is not an option of {kind}; "
                + did_you_mean(str(key), usable, "remove it.")
            )
