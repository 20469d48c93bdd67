"""Check a training config with the model that it describes, before anything is trained.

The trainer does this in the config transform, and `inspect` and `compare` do it too. So all of them refuse the same
configs, in the same words.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import TimeUnit
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from llmfoundry.registry import callbacks as callback_registry
from llmfoundry.registry import optimizers, schedulers
from llmfoundry.utils.builders import build_optimizer
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llmfoundry_wesar.callbacks import PowerIteration, UpdateRatioMonitor
from llmfoundry_wesar.callbacks.interval import IntervalCallback, parse_time
from llmfoundry_wesar.callbacks.power_iteration import check_power_iteration
from llmfoundry_wesar.hf_model import ComposerWeSaRHFCausalLM, check_hf_keys
from llmfoundry_wesar.keys import arguments, check_values, datasets, did_you_mean, is_number, takes_any_key
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM, check_keys
from llmfoundry_wesar.optimizer import WeSaRAdamW, second_gate
from llmfoundry_wesar.sharded import module_path, reparameterized_layers

# Keys of `model` that do not reach the config class.
_NOT_IN_CONFIG = ("name", "loss_fn", "use_train_metrics", "additional_train_metrics", "master_weights_dtype")
_DTYPES = {"f16": torch.float16, "float16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def meta_model(model: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model of a config's `model` section on the meta device.

    Args:
        model: The section, with `name`: wesar_mpt_causal_lm, mpt_causal_lm or wesar_hf_causal_lm.

    Raises:
        ValueError: If a key or value is wrong.
    """
    section = copy.deepcopy(dict(model))
    name, dtype = section["name"], section.pop("master_weights_dtype", None)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"model.master_weights_dtype: {dtype!r} is not one of {', '.join(_DTYPES)}.")
    keys = {key: value for key, value in section.items() if key != "name"}
    try:
        if name == "wesar_hf_causal_lm":
            built = _hf(keys)
        else:
            if name == "wesar_mpt_causal_lm":
                check_keys(keys)
            check_values(keys)
            keys = {key: value for key, value in keys.items() if key not in _NOT_IN_CONFIG}
            config = (WeSaRMPTConfig if name == "wesar_mpt_causal_lm" else MPTConfig)(**{**keys, "init_device": "meta"})
            built = WeSaRMPTForCausalLM(config) if isinstance(config, WeSaRMPTConfig) else MPTForCausalLM(config)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError, NotImplementedError) as error:
        # Foundry does not check most types, so a wrong one raises one of these errors.
        raise ValueError(
            f"model: no model can be built from these values ({type(error).__name__}: {error}); compare their types "
            "with those in yamls/130m.yaml."
        ) from error
    return built if dtype is None else built.to(_DTYPES[dtype])  # type: ignore[return-value]


def _hf(section: dict[str, Any]) -> PreTrainedModel:
    check_hf_keys(section)
    config = ComposerWeSaRHFCausalLM.build_config(
        section["pretrained_model_name_or_path"],
        trust_remote_code=section.get("trust_remote_code", True),
        use_auth_token=section.get("use_auth_token", False),
        attn_implementation="eager",
        config_overrides=section.get("config_overrides") or {},
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.get("trust_remote_code", True))


def check_config(config: Mapping[str, Any], model: nn.Module) -> WeSaRAdamW | None:
    """Check what a config says beside its `model` section.

    Args:
        config: A training config, expanded.
        model: The model, from `meta_model`.

    Returns:
        The optimizer, if it is `wesar_adamw`.

    Raises:
        ValueError: If the sequences are too long for the model, the warm-up and the training have two units, a
            callback of ours has a wrong key or value or does nothing, the optimizer has one, or a callback of foundry
            does not work with the model.
    """
    _check_lengths(config)
    _check_warmup(config)
    # The model lacks adapters, which peft adds later. So with them no names can be looked for.
    adapters = any(config["model"].get(key) for key in ("peft_config", "pretrained_lora_id_or_path"))
    _check_callbacks(config, model, adapters)
    return _check_optimizer(config.get("optimizer"), model, adapters)


def _check_lengths(config: Mapping[str, Any]) -> None:
    """Refuse sequences that are too long, also those of evaluations, which the model would meet hours later."""
    if config["model"]["name"] == "wesar_hf_causal_lm":
        return
    longest = config["model"].get("max_seq_len", MPTConfig().max_seq_len)
    lengths = [("max_seq_len", config.get("max_seq_len"))]
    lengths += [(f"{name}.dataset.max_seq_len", dataset.get("max_seq_len")) for name, dataset in datasets(config)]
    # Foundry moves the name of a file of tasks to `icl_tasks_str`, before it calls its config transforms.
    if config.get("icl_tasks") or config.get("icl_tasks_str"):
        lengths.append(("icl_seq_len", config.get("icl_seq_len")))
    for key, length in lengths:
        if is_number(length) and length > longest:
            raise ValueError(
                f"model.max_seq_len: {longest} is less than {key}: {length}; set model.max_seq_len to {length} or more."
            )


def _check_warmup(config: Mapping[str, Any]) -> None:
    """Refuse a warm-up in another unit than the decay. Composer does so only when all ranks have built the model."""
    scheduler, duration = config.get("scheduler") or {}, config.get("max_duration")
    name = str(scheduler.get("name"))
    if duration is None or name not in schedulers or not {"t_warmup", "t_max"} <= {*arguments(schedulers.get(name))}:
        return
    times = {
        "max_duration": duration,
        "scheduler.t_max": scheduler.get("t_max", "1dur"),
        "scheduler.t_warmup": scheduler.get("t_warmup"),
    }
    units: dict[str, TimeUnit] = {}
    for key, time in times.items():
        unit = parse_time(time, key, TimeUnit.EPOCH, example="100ba").unit
        if unit == TimeUnit.DURATION:
            unit = units.get("max_duration", unit)
        units[key] = TimeUnit.BATCH if unit == TimeUnit.EPOCH else unit  # as the schedulers count epochs
    if units["scheduler.t_warmup"] != units["scheduler.t_max"]:
        end = "scheduler.t_max" if "t_max" in scheduler else "max_duration"
        raise ValueError(
            f"scheduler.t_warmup: {scheduler['t_warmup']} and {end}: {times[end]} have two units; write both in the "
            "same one."
        )


def _check_callbacks(config: Mapping[str, Any], model: nn.Module, adapters: bool) -> None:
    callbacks = config.get("callbacks")
    if not isinstance(callbacks, Mapping | None):
        raise ValueError(f"callbacks: {callbacks!r} is not a mapping; write `callbacks: {{name: {{key: value}}}}`.")
    callbacks = callbacks or {}
    for name, options in callbacks.items():
        cls = callback_registry.get(name) if name in callback_registry else None
        # The checkpointer is not built: its constructor prepares the upload.
        if not (isinstance(cls, type) and issubclass(cls, IntervalCallback | PowerIteration)):
            continue
        if not isinstance(options, Mapping | None):
            raise ValueError(f"callbacks.{name}: {options!r} is not a mapping; write `{name}: {{interval: 10ba}}`.")
        known = arguments(cls)
        for key, value in (options or {}).items():
            if key not in known:
                fix = did_you_mean(str(key), known, "remove it.")
                raise ValueError(f"callbacks.{name}.{key}: {value!r} is not an option of {name}; {fix}")
        callback = cls(**(options or {}))
        if isinstance(callback, UpdateRatioMonitor) and not adapters:
            named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad]
            callback.check([module_path(f"model.{name}") for name, _ in named])
    check_power_iteration(model, "power_iteration" in callbacks)
    section = config["model"]
    if "hf_checkpointer" in callbacks and section["name"] == "wesar_mpt_causal_lm":
        raise ValueError(
            "callbacks.hf_checkpointer: transformers cannot load the folders that it writes of wesar_mpt_causal_lm; "
            "use merged_hf_checkpointer, which has the same keys."
        )
    if "loss_perp_v_len" in callbacks and section.get("fused_loss"):
        raise ValueError(
            "callbacks.loss_perp_v_len: it needs the logits, which model.fused_loss: true does not keep; remove it, or "
            "set model.fused_loss: false."
        )
    if "kill_loss_spike" in callbacks and section.get("z_loss"):
        raise ValueError(
            "callbacks.kill_loss_spike: foundry's callback fails in the first step if the loss has several terms; "
            "remove it, or set model.z_loss: 0. nan_monitor stops a run whose loss is NaN."
        )


def _check_optimizer(optimizer: Any, model: nn.Module, adapters: bool) -> WeSaRAdamW | None:
    if not isinstance(optimizer, Mapping) or "name" not in optimizer:
        raise ValueError(f"optimizer: {optimizer!r} is not a mapping with a `name`.")
    options = copy.deepcopy(dict(optimizer))
    name = options.pop("name")
    if name not in optimizers:
        raise ValueError(f"optimizer.name: {name!r} is not one of {', '.join(sorted(optimizers.get_all()))}.")
    if name == "wesar_adamw" and (layers := reparameterized_layers(model)):
        raise ValueError(second_gate(f"model.{next(iter(layers))}"))
    known = {*arguments(optimizers.get(name)), "param_groups", "disable_grad"} - {"params"}
    open_ended = takes_any_key(optimizers.get(name))
    groups = options.get("param_groups") or []
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"optimizer.param_groups: {groups!r} is not a list of mappings with `param_str_match`.")
    for prefix, keys in (("", options), *((f"param_groups.{i}.", group) for i, group in enumerate(groups))):
        for key, value in keys.items():
            if not prefix and not open_ended and key not in known:
                fix = did_you_mean(str(key), known, "remove it.")
                raise ValueError(f"optimizer.{prefix}{key}: {value!r} is not an option of {name}; {fix}")
            if key in ("lr", "eps", "weight_decay") and not (is_number(value) and value >= 0):
                raise ValueError(f"optimizer.{prefix}{key}: {value!r} is not a number ≥ 0.")
        if prefix:
            _check_pattern(f"{prefix}param_str_match", keys.get("param_str_match"))
    betas = options.get("betas")
    right = isinstance(betas, list) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    if betas is not None and not right:
        raise ValueError(f"optimizer.betas: {betas!r} is not a list of two numbers ≥ 0 and below 1.")
    frozen = options.get("disable_grad") or []
    if not isinstance(frozen, str | list):
        raise ValueError(f"optimizer.disable_grad: {frozen!r} is not a regular expression or a list of them.")
    for pattern in [frozen] if isinstance(frozen, str) else frozen:
        _check_pattern("disable_grad", pattern)
        if not adapters and not any(
            re.search(pattern, f"model.{parameter}") for parameter, _ in model.named_parameters()
        ):
            raise ValueError(f"optimizer.disable_grad: {pattern!r} fits no parameter; correct or remove it.")
    return None if adapters else _built(name, options, groups, model)


def _check_pattern(key: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"optimizer.{key}: {pattern!r} is not a regular expression: {error}.") from error


def _built(name: str, options: dict[str, Any], groups: list[Any], model: nn.Module) -> WeSaRAdamW | None:
    """Build the optimizer as the trainer does, and check that each group has parameters."""
    composer = nn.Module()  # parameters have the names that they have in Composer's model
    composer.model = model
    if name != "wesar_adamw":  # torch's fused optimizers do not take parameters on the meta device
        options = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
    try:
        built = build_optimizer(composer, name, copy.deepcopy(options))
        if isinstance(built, WeSaRAdamW):
            built.bind(composer)
    except (TypeError, IndexError) as error:
        raise ValueError(f"optimizer: {name} cannot be built from {options} ({error}).") from error
    # Foundry puts the parameters that no group has into a group of their own, in front of the others.
    for i, (group, made) in enumerate(zip(groups, built.param_groups[1:], strict=False)):
        for key in group.keys() - built.defaults.keys() - {"param_str_match"}:
            fix = did_you_mean(str(key), built.defaults, "remove it.")
            raise ValueError(f"optimizer.param_groups.{i}.{key}: {group[key]!r} is not an option of a group; {fix}")
        if not made["params"]:
            raise ValueError(
                f"optimizer.param_groups.{i}.param_str_match: {group['param_str_match']!r} fits no parameter"
                f"{' that the groups before have not taken' if i else ''}; correct it or remove the group."
            )
    return built if isinstance(built, WeSaRAdamW) else None
