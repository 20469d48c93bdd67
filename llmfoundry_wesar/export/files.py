"""Export a training checkpoint to the files of a plain model, and turn a plain model into a gated checkpoint."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from composer.models import HuggingFaceModel
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from llmfoundry.models.utils.config_defaults import attn_config_defaults, init_config_defaults
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.export import clients
from llmfoundry_wesar.export.card import model_card
from llmfoundry_wesar.export.checkpoints import Checkpoint, find_checkpoint, read_checkpoint
from llmfoundry_wesar.export.conversion import build_mpt, from_llama, hf_config, merge, require_finite, to_gated, to_hf
from llmfoundry_wesar.export.folders import check_new, whole
from llmfoundry_wesar.keys import arguments
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM

Format = Literal["hf", "gguf", "mpt"]
# Value of `--dtype` → its long name. q8_0 exists only in GGUF.
DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "q8_0")} | {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
}
_INDEX = "model.safetensors.index.json"
log = logging.getLogger(__name__)


def load(path: str | Path) -> tuple[WeSaRMPTForCausalLM, PreTrainedTokenizerBase | None]:
    """Load a trained model in float32, and its tokenizer if there is one.

    Args:
        path: A Composer checkpoint or a `save_folder`, as for `checkpoints.find_checkpoint`, or a folder with the
            `config.json` and the safetensors of an Arcee, Llama or MPT model.

    Raises:
        FileNotFoundError: There is no such checkpoint or model.
        ValueError: The model is damaged, needs to run code, or cannot be expressed as an MPT.
    """
    checkpoint = _read(Path(path))
    return _build(path, checkpoint), checkpoint.tokenizer


def find_model(path: str | Path) -> Path:
    """Return the folder of a plain model, or the checkpoint, at a path.

    Raises:
        FileNotFoundError: As in `find_checkpoint`.
        ValueError: As in `find_checkpoint`.
    """
    return Path(path) if Path(path, "config.json").is_file() else find_checkpoint(path)


def _read(path: Path) -> Checkpoint:
    return _read_folder(path) if (path / "config.json").is_file() else read_checkpoint(path)


def _build(path: str | Path, checkpoint: Checkpoint) -> WeSaRMPTForCausalLM:
    config, weights = checkpoint.config, checkpoint.weights
    try:
        _check_sizes(config, len(weights))
        if config.get("model_type") in ("arcee", "llama"):
            config, weights = from_llama(config, weights)
        if config.get("model_type") != "mpt":
            raise ValueError(
                f"model_type: {config.get('model_type')} must be arcee, llama or mpt; for another Hugging Face model "
                "hf_checkpointer writes the folder, and lm_eval scores it."
            )
        # This attention needs neither a GPU nor another package; foundry's own exports set it too.
        attention = {**config["attn_config"], "attn_impl": "torch"}
        mpt_config = WeSaRMPTConfig.from_dict({**config, "attn_config": attention})
        assert isinstance(mpt_config, WeSaRMPTConfig)
        model = build_mpt(mpt_config, {name: weight.float() for name, weight in weights.items()})
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"{path}: {error}") from error
    assert isinstance(model, WeSaRMPTForCausalLM)
    return model


def _check_sizes(config: dict[str, Any], weights: int) -> None:
    """Refuse sizes of a config for which building the model would fail in cryptic words, or take for ever."""
    layers = ("n_layers", "num_hidden_layers")
    for key in (
        *layers,
        "d_model",
        "hidden_size",
        "n_heads",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        value = config.get(key)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{key}: {value!r} is not a whole number ≥ 1.")
        if key in layers and (value or 0) > weights:
            raise ValueError(f"{key}: {value} is too large for the {weights} weights of the model.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except ValueError as error:  # JSON and UTF-8 errors too
        raise ValueError(f"{file}: damaged ({error}).") from error
    return content


def _read_folder(path: Path) -> Checkpoint:
    config = _read_json(path / "config.json")
    weights: dict[str, torch.Tensor] = {}
    for file, names in _weight_files(path).items():
        try:
            tensors = load_file(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: missing, but {_INDEX} names it.") from error
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{file}: damaged ({error}).") from error
        if names is not None:
            if missing := names - tensors.keys():
                raise ValueError(f"{file}: does not have {min(missing)}, which {_INDEX} expects in it.")
            tensors = {name: tensors[name] for name in names}
        weights |= tensors
    return Checkpoint(config, weights, _read_tokenizer(path))


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Return the files of a model's weights. Each maps to the names to read from it; None means all."""
    whole_file, index = path / "model.safetensors", path / _INDEX
    others = sorted(path.glob("*.safetensors"))
    if not others and not index.is_file():
        raise FileNotFoundError(f"{path}: no .safetensors file; pickled weights are not read.")
    if index.is_file() and whole_file.is_file():
        raise ValueError(f"{path}: has both {whole_file.name} and {_INDEX}; remove the wrong one.")
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: damaged (no weight_map).")
        if outside := [file for file in places.values() if Path(file).name != file]:
            raise ValueError(f"{index}: refused, because it names a file outside of its folder: {outside[0]}.")
        files: dict[Path, set[str] | None] = {
            path / file: {name for name, place in places.items() if place == file} for file in places.values()
        }
    elif whole_file.is_file():
        files = {whole_file: None}
    elif len(others) == 1:
        files = {others[0]: None}
    else:
        raise ValueError(f"{path}: {len(others)} .safetensors files, no {whole_file.name} and no {_INDEX}.")
    if ignored := [file.name for file in others if file not in files]:
        used = _INDEX if index.is_file() else whole_file.name
        log.warning("%s: the weights are read from %s; ignored: %s", path, used, ", ".join(ignored))
    return files


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the package tokenizers raises plain Exceptions
        why = f"cannot be loaded ({str(error).splitlines()[0]})"
        if "trust_remote_code" in why:
            why = "needs code of its own, which is not run"
        raise ValueError(f"{path}: its tokenizer {why}; replace it, or remove {file.name} to use none.") from error


def model_section(config: MPTConfig) -> dict[str, Any]:
    """Return the `model` section of a training YAML that builds the model of a config."""
    ours = isinstance(config, WeSaRMPTConfig)
    tree, defaults = config.to_dict(), {**type(config)().to_dict(), "attention_bias": not config.no_bias}
    keys = {*arguments(MPTConfig), *arguments(type(config))} - {"init_device"}
    section = {key: tree[key] for key in tree if key in keys and tree[key] != defaults.get(key)}
    for key, defaults in (("attn_config", attn_config_defaults), ("init_config", init_config_defaults)):
        section[key] = {name: value for name, value in tree[key].items() if value != defaults.get(name)}
    section["ffn_config"] = {name: value for name, value in tree["ffn_config"].items() if name != "fc_type"}
    return {"name": "wesar_mpt_causal_lm" if ours else "mpt_causal_lm", **section}


def _save_composer(model: MPTForCausalLM, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> None:
    """Write a checkpoint for `load_path` with `load_weights_only: true`."""
    composer = HuggingFaceModel(model, tokenizer=tokenizer, shift_labels=True)  # type: ignore[arg-type]
    state = {"model": composer.state_dict(), "integrations": {"huggingface": composer.get_metadata()}}
    torch.save({"state": state}, path)


def export(path: str | Path, out: str | Path, format: Format = "hf", dtype: str = "float32") -> str:
    """Write the plain model of a checkpoint to a new folder, with its tokenizer.

    - `hf`: config, safetensors and generation config of an `ArceeForCausalLM`, or for a GLU of a `LlamaForCausalLM`,
      and a model card, README.md.
    - `gguf`: `model.gguf` for llama.cpp (see `llama_cpp`), and a model card.
    - `mpt`: `checkpoint.pt` for the stock trainer's `load_path` with `load_weights_only: true` (under FSDP also set
      `fsdp_config.state_dict_type: full`), and `model.yaml`, the `model` section for it (`name: mpt_causal_lm`).

    Args:
        path: As for `load`.
        out: The folder. If anything fails, it is not created.
        format: `hf`, `gguf` or `mpt`.
        dtype: Type of the written weights: float32, bfloat16 or float16, and q8_0 for `gguf`. Gates are merged in
            float32.

    Returns:
        Which other programs load the model, as lines of text; empty for `mpt`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is damaged, the format cannot express the model, a weight is not finite in `dtype`,
            or an option is unknown.
        RuntimeError: The package gguf is not installed.
        OSError: Writing fails.
    """
    _check_options(format, dtype)
    check_new(out)
    checkpoint = _read(Path(path))
    model, tokenizer, progress = _build(path, checkpoint), checkpoint.tokenizer, checkpoint.progress
    if format == "mpt":
        _export_mpt(model, tokenizer, Path(out), DTYPES[dtype])
        return ""
    config = hf_config(model.config)  # type: ignore[arg-type]
    if format == "gguf":
        from llmfoundry_wesar.export import llama_cpp

        llama_cpp.check(config, tokenizer, DTYPES[dtype])
    name = progress.run_name or Path(out).name
    plain = to_hf(model, tokenizer, torch.float32 if format == "gguf" else getattr(torch, DTYPES[dtype]))
    card = model_card(name, config, plain.num_parameters(), model.config.to_dict(), progress, format, dtype)
    with whole(out) as folder:
        folder.mkdir()
        if format == "gguf":
            llama_cpp.write_gguf(plain, tokenizer, folder / "model.gguf", DTYPES[dtype], name)  # type: ignore
        else:
            _require_finite(plain)
            plain.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return clients.table(config, format)


def _check_options(format: str, dtype: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"--format {format}: not one of {', '.join(get_args(Format))}.")
    known = [name for name, meaning in DTYPES.items() if meaning != "q8_0" or format == "gguf"]
    if dtype not in known:
        raise ValueError(f"--dtype {dtype}: with --format {format} it must be one of {', '.join(known)}.")
    if format == "gguf" and find_spec("gguf") is None:
        raise RuntimeError("the package gguf is missing: pip install gguf.")


def _require_finite(model: torch.nn.Module) -> None:
    for name, weight in model.state_dict().items():
        require_finite(name, weight)


def _export_mpt(model: WeSaRMPTForCausalLM, tokenizer: PreTrainedTokenizerBase | None, out: Path, dtype: str) -> None:
    plain = merge(model).to(getattr(torch, dtype))
    _require_finite(plain)
    with whole(out) as folder:
        folder.mkdir()
        _save_composer(plain, tokenizer, folder / "checkpoint.pt")
        OmegaConf.save({"model": model_section(plain.config)}, folder / "model.yaml")  # type: ignore[arg-type]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def reparameterize(path: str | Path, out: str | Path, method: str = "wesar") -> dict[str, Any]:
    """Write a plain model as a checkpoint from which the stock trainer continues with a method; see `to_gated`.

    Args:
        path: As for `load`.
        out: The checkpoint, for `load_path` with `load_weights_only: true`; under FSDP also set
            `fsdp_config.state_dict_type: full`. If anything fails, it is not created.
        method: A value of `variables.method`.

    Returns:
        The `model` section of the training YAML for this checkpoint.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: There is no model.
        ValueError: The model is damaged, or the method is unknown or cannot start from it.
        OSError: Writing fails.
    """
    check_new(out)
    model, tokenizer = load(path)
    _require_finite(model)
    gated = to_gated(model, method)
    with whole(out) as file:
        _save_composer(gated, tokenizer, file)
    return model_section(gated.config)
