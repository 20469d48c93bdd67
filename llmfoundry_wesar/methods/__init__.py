"""Expand `variables.method` and `variables.setting` of a training config to the keys of a YAML file.

The files of the compared methods are in this folder, those of the paper's training settings in `settings/`. The run's
own keys take precedence over the method's, and the method's over the setting's. A `null` in a method removes the
setting's key. A file may extend another one (`extends`).
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.registry import optimizers, schedulers
from omegaconf import DictConfig, OmegaConf

from llmfoundry_wesar.data.shards import check_prepared
from llmfoundry_wesar.initialization import check_tied_embedding
from llmfoundry_wesar.keys import arguments, datasets, takes_any_key

_FOLDER = Path(__file__).parent
# The variables that name a file, and where the files are.
_FOLDERS = {"setting": _FOLDER / "settings", "method": _FOLDER}


def names(kind: str) -> list[str]:
    """Return the names of the methods (`kind="method"`) or settings (`kind="setting"`)."""
    return sorted(path.stem for path in _FOLDERS[kind].glob("*.yaml"))


def load(kind: str, name: str) -> DictConfig:
    """Read a method or setting, merged with the file that it extends.

    Raises:
        ValueError: If the name is not known. The message lists the known names.
    """
    if name not in names(kind):
        raise ValueError(
            f"variables.{kind}: {name!r} is not known; use one of {', '.join(names(kind))}. If it is a variable of "
            "your own, rename it."
        )
    config = OmegaConf.load(_FOLDERS[kind] / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    base = config.pop("extends", None)
    return OmegaConf.merge(load(kind, base), config) if base else config  # type: ignore[return-value]


def _without_nulls(config: dict[Any, Any]) -> dict[str, Any]:
    return {
        str(key): _without_nulls(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None
    }


def _marks(model: Any) -> dict[str, str]:
    """Return those keys of a `model` section that tell methods apart."""
    marks = {}
    for section, key in (("fc_type", "name"), ("init_config", "name"), ("init_config", "backbone")):
        value = model.get(section) if isinstance(model, Mapping) else None
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and value.get(key) is not None:
            marks[f"{section}.{key}"] = value[key]
    return marks


def _marks_of(method: str) -> dict[str, str]:
    return {"fc_type.name": "torch"} | _marks(load("method", method).get("model"))


def _check_method(config: Mapping[str, Any], method: str) -> None:
    """Refuse a config whose own keys are those of another method, since they would win, and the run's name be wrong."""
    wanted = _marks_of(method)
    wrong = {mark: value for mark, value in _marks(config.get("model")).items() if value != wanted.get(mark, value)}
    if wrong:  # a value that no method has is left to the checks of the model
        known = [_marks_of(name) for name in names("method")]
        wrong = {mark: value for mark, value in wrong.items() if any(value == marks.get(mark) for marks in known)}
    if wrong:
        found = ", ".join(f"model.{mark}: {value}" for mark, value in wrong.items())
        sections = " and ".join(dict.fromkeys("model." + mark.partition(".")[0] for mark in wrong))
        raise ValueError(
            f"variables.method: {method} has other layers or another initialisation than {found}, which would win; "
            f"remove {sections}, or variables.method."
        )


def _check_stock_model(config: dict[str, Any]) -> None:
    """Refuse what foundry's own models would not check, or would refuse in words that name no key of the config.

    That is a method or setting for `hf_causal_lm`, and a too large `emb_init_std` for an MPT with tied embeddings.
    """
    model = config.get("model") or {}
    if model.get("name") == "hf_causal_lm":
        raise ValueError(
            "model.name: 'hf_causal_lm' does not take the keys that variables.method and variables.setting add to "
            "`model`; set it to wesar_hf_causal_lm, or remove these variables. For gates in the optimizer alone, "
            "`optimizer: {name: wesar_adamw, sigma: …}` suffices."
        )
    if model.get("name") == "mpt_causal_lm" and model.get("tie_word_embeddings", True):
        std = (model.get("init_config") or {}).get("emb_init_std")
        check_tied_embedding(std, model.get("d_model", MPTConfig().d_model), "model.tie_word_embeddings")


def _check_data(config: dict[str, Any]) -> None:
    """Refuse a loader whose local folder is missing, or was prepared for another length or tokenizer.

    Streaming would fail later, without naming the key; the other two would not be noticed.
    """
    for name, dataset in datasets(config):
        local, split = dataset.get("local"), dataset.get("split") or ""
        if local is None or dataset.get("remote"):
            continue
        if not Path(local, split, "index.json").is_file():
            variables = [f"variables.{variable}" for variable, value in config["variables"].items() if value == local]
            raise ValueError(
                f"{name}: there is no data in {Path(local, split)}; prepare it with `llmfoundry-wesar data {local} "
                "--source …`, as the first lines of the YAML and the README say, or change "
                f"{' or '.join(variables) or 'dataset.local'}."
            )
        tokenizer = str((config.get("tokenizer") or {}).get("name"))
        try:
            check_prepared(Path(local), dataset.get("max_seq_len"), tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error


def _check_buffers(config: dict[str, Any]) -> None:
    """Refuse an FSDP1 that would round the buffers of our MPT: RoPE's frequencies, fixed gates, singular vectors."""
    fsdp, precision = config.get("fsdp_config") or {}, config.get("precision") or ""
    if not isinstance(fsdp, dict):
        raise ValueError(f"fsdp_config: {fsdp!r} is not a mapping of keys to values.")
    if (config.get("model") or {}).get("name") != "wesar_mpt_causal_lm" or not fsdp or precision == "fp32":
        return
    mixed = fsdp.get("mixed_precision", "DEFAULT")
    if isinstance(mixed, dict):
        rounds = mixed.get("buffer_dtype") not in (None, "fp32", "float32", "torch.float32")
    else:
        rounds = str(mixed).upper() != "FULL"
    if rounds and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            f"fsdp_config.mixed_precision: under FSDP1 {mixed!r} would round RoPE's frequencies, fixed gates and "
            "singular vectors to 16 bits; write mixed_precision: {param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: "
            "fp32}, or set FSDP_VERSION=2 in the environment."
        )


def _with_optimizer_gates(config: dict[str, Any]) -> dict[str, Any]:
    """Add the callback that `wesar_adamw` needs."""
    if (config.get("optimizer") or {}).get("name") != "wesar_adamw":
        return config
    return config | {"callbacks": {"optimizer_gates": {}} | (config.get("callbacks") or {})}


def _check_ours(config: dict[str, Any]) -> None:
    """Check a config with a model of ours, as `inspect` does. `mpt_causal_lm` trains as without the plugin."""
    from llmfoundry_wesar.check import check_config, meta_model  # slow, and only these models need it

    model = config.get("model") or {}
    if isinstance(model, dict) and model.get("name") in ("wesar_mpt_causal_lm", "wesar_hf_causal_lm"):
        check_config(config, meta_model(model))


def _check_variables(variables: dict[str, Any]) -> None:
    """Refuse a misspelt `method` or `setting`, which would be a variable of the user that nothing reads."""
    for key, value in variables.items():
        for kind in difflib.get_close_matches(str(key), _FOLDERS, n=1, cutoff=0.8):
            if key != kind and isinstance(value, str) and value in names(kind):
                raise ValueError(
                    f"variables.{key}: {value!r} is not read; did you mean variables.{kind}? If it is a variable of "
                    "your own, rename it."
                )


def _check_names(default: dict[Any, Any], merged: dict[Any, Any]) -> None:
    """Refuse another optimizer or scheduler than the default's if it does not take all of the default's keys."""
    for section, registry in (("optimizer", optimizers), ("scheduler", schedulers)):
        wanted, name = (str((part.get(section) or {}).get("name")) for part in (default, merged))
        if name == wanted or not {name, wanted} <= registry.get_all().keys() or takes_any_key(registry.get(name)):
            continue
        known = {*arguments(registry.get(name)), "name", "param_groups"}
        if foreign := [key for key in default[section] if key not in known]:
            raise ValueError(
                f"{section}.name: {name} does not take {', '.join(foreign)}, which variables.setting or "
                f"variables.method sets for {wanted}; use {wanted}, or remove that variable and write the keys that "
                "you need into the config."
            )


def _merge(defaults: list[DictConfig], config: dict[str, Any]) -> dict[str, Any]:
    """Put a config's own keys over the defaults of its method and setting."""
    default = OmegaConf.to_container(OmegaConf.merge(*defaults))
    assert isinstance(default, dict)
    for key, value in default.items():
        if isinstance(value, dict) and not isinstance(config.get(str(key)), dict | None):
            raise ValueError(f"{key}: {config[str(key)]!r} is not a mapping of keys to values.")
    default = _without_nulls(default)
    merged = OmegaConf.to_container(OmegaConf.merge(default, config), resolve=True)
    assert isinstance(merged, dict)
    _check_names(default, merged)
    return {str(key): value for key, value in merged.items()}


def expand(config: dict[str, Any], check_data: bool = True, check_keys: bool = True) -> dict[str, Any]:
    """Add the keys of the run's method and setting that the run does not set, and the callback of `wesar_adamw`.

    A config that uses none of these is returned unchanged.

    Args:
        config: A training config as foundry passes it to its config transforms.
        check_data: Whether to check that the local folders of the loaders exist.
        check_keys: Whether to check keys and values of a config with a model of ours, as `inspect_config` does.

    Returns:
        The expanded config.

    Raises:
        ValueError: If the method or setting is not known, the config has keys of another method, its optimizer or
            scheduler does not take the keys that these set, a folder is missing, FSDP1 would round buffers,
            `mpt_causal_lm` has tied embeddings with a too large `emb_init_std`, or a key or value of a config with a
            model of ours is refused.
    """
    variables = config.get("variables") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"variables: {variables!r} is not a mapping; write `variables: {{name: value}}`.")
    _check_variables(variables)
    defaults = [load(kind, variables[kind]) for kind in _FOLDERS if variables.get(kind) is not None]
    if variables.get("method") is not None:
        _check_method(config, variables["method"])
    expanded = _with_optimizer_gates(_merge(defaults, config) if defaults else config)
    _check_buffers(expanded)
    if defaults:
        _check_stock_model(expanded)
        if check_data:
            _check_data(expanded)
    if check_keys:
        _check_ours(expanded)
    return expanded
