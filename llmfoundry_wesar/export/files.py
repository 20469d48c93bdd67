"""From a training checkpoint to the files of a plain model, and back."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.export.checkpoints import Checkpoint, read_checkpoint
from llmfoundry_wesar.export.conversion import build_mpt, from_llama, merge, to_gated, to_hf
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM, arguments

Format = Literal["hf", "mpt"]
Dtype = Literal["float32", "bfloat16", "float16"]


def load(path: str | Path) -> tuple[WeSaRMPTForCausalLM, PreTrainedTokenizerBase | None]:
    """Load a trained model in float32, and its tokenizer if there is one.

    Args:
        path: A Composer checkpoint or a `save_folder`, as for `checkpoints.find_checkpoint`, or a folder with the
            `config.json` and the safetensors of an Arcee, Llama or MPT model.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If it is damaged, needs code to be loaded, or is a model that MPT cannot express.
    """
    path = Path(path)
    checkpoint = _read_folder(path) if (path / "config.json").is_file() else read_checkpoint(path)
    config, weights = checkpoint.config, checkpoint.weights
    try:
        if config.get("model_type") in ("arcee", "llama"):
            config, weights = from_llama(config, weights)
        if config.get("model_type") != "mpt":
            raise ValueError(f"the model is of type {config.get('model_type')}, and not arcee, llama or mpt.")
        # The attention that needs neither a GPU nor another package, as in foundry's own exports.
        attention = {**config["attn_config"], "attn_impl": "torch"}
        mpt_config = WeSaRMPTConfig.from_dict({**config, "attn_config": attention})
        assert isinstance(mpt_config, WeSaRMPTConfig)
        model = build_mpt(mpt_config, {name: weight.float() for name, weight in weights.items()})
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"{path}: {error}") from error
    assert isinstance(model, WeSaRMPTForCausalLM)
    return model, checkpoint.tokenizer


def _read_folder(path: Path) -> Checkpoint:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no .safetensors file; pickled weights are not read.")
    weights: dict[str, torch.Tensor] = {}
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} instead of an object")
        for file in files:
            weights |= load_file(file)
    except (ValueError, SafetensorError) as error:  # also of JSON and of UTF-8
        raise ValueError(f"{file}: damaged ({error}).") from error
    return Checkpoint(config, weights, _read_tokenizer(path))


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other kind
        why = f"cannot be loaded ({str(error).splitlines()[0]})"
        if "trust_remote_code" in why:
            why = "needs code of its own, which is not run"
        raise ValueError(f"{path}: its tokenizer {why}; replace it, or remove {file.name} to go without.") from error


def model_section(config: MPTConfig) -> dict[str, Any]:
    """The `model` section of a training YAML that builds the model of a config."""
    ours = isinstance(config, WeSaRMPTConfig)
    tree, defaults = config.to_dict(), {**type(config)().to_dict(), "attention_bias": not config.no_bias}
    keys = {*arguments(MPTConfig), *arguments(type(config))} - {"init_device"}
    section = {key: tree[key] for key in tree if key in keys and tree[key] != defaults.get(key)}
    for key, defaults in (("attn_config", attn_config_defaults), ("init_config", init_config_defaults)):
        section[key] = {name: value for name, value in tree[key].items() if value != defaults.get(name)}
    section["ffn_config"] = {name: value for name, value in tree["ffn_config"].items() if name != "fc_type"}
    return {"name": "wesar_mpt_causal_lm" if ours else "mpt_causal_lm", **section}


def _refuse_existing(out: str | Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; choose another name or remove it.")


@contextmanager
def _whole(out: str | Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to; it becomes `out` at the end, and is gone if anything fails."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        yield partial
        _refuse_existing(out)
        partial.rename(out)
    except Exception as error:
        # A full disk is an OSError here, a RuntimeError in torch and a plain Exception in tokenizers.
        raise OSError(f"{out}: writing failed, and nothing of it is left ({str(error).splitlines()[0]}).") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _save_composer(model: MPTForCausalLM, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> None:
    """Write what `load_path` with `load_weights_only: true` reads."""
    composer = HuggingFaceModel(model, tokenizer=tokenizer, shift_labels=True)  # type: ignore[arg-type]
    state = {"model": composer.state_dict(), "integrations": {"huggingface": composer.get_metadata()}}
    torch.save({"state": state}, path)


def export(path: str | Path, out: str | Path, format: Format = "hf", dtype: Dtype = "float32") -> None:
    """Write the plain model of a checkpoint to a new folder, with its tokenizer.

    `hf` writes config, safetensors and generation config of an `ArceeForCausalLM`, or of a `LlamaForCausalLM` for a
    GLU. `mpt` writes `checkpoint.pt`, for the stock trainer's `load_path` with `load_weights_only: true` (under FSDP
    also `fsdp_config.state_dict_type: full`, since it is one file), and `model.yaml`, the `model` section
    (`name: mpt_causal_lm`) that goes with it.

    Args:
        path: As for `load`.
        out: The folder; it appears whole or not at all.
        format: `hf` or `mpt`.
        dtype: Of the weights; they are merged in float32.

    Raises:
        FileExistsError: If `out` exists.
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the checkpoint is damaged, the format cannot express the model, or an option is unknown.
        OSError: If writing fails.
    """
    for option, value, choices in (("format", format, get_args(Format)), ("dtype", dtype, get_args(Dtype))):
        if value not in choices:
            raise ValueError(f"--{option} {value}: not one of {', '.join(choices)}.")
    _refuse_existing(out)
    model, tokenizer = load(path)
    torch_dtype = getattr(torch, dtype)
    plain = to_hf(model, tokenizer, torch_dtype) if format == "hf" else merge(model).to(torch_dtype)
    with _whole(out) as folder:
        folder.mkdir()
        if isinstance(plain, LlamaForCausalLM):
            plain.save_pretrained(folder)
        else:
            _save_composer(plain, tokenizer, folder / "checkpoint.pt")
            section = model_section(plain.config)  # type: ignore[arg-type]
            OmegaConf.save({"model": section}, folder / "model.yaml")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def reparameterize(path: str | Path, out: str | Path, method: str = "wesar") -> dict[str, Any]:
    """Write a plain model as a checkpoint from which the stock trainer continues with a method; see `to_gated`.

    Args:
        path: As for `load`.
        out: The file, for `load_path` with `load_weights_only: true`, and under FSDP `state_dict_type: full`; it
            appears whole or not at all.
        method: A name that `variables.method` knows.

    Returns:
        The `model` section of a training YAML that goes with it.

    Raises:
        FileExistsError: If `out` exists.
        FileNotFoundError: If there is no model.
        ValueError: If it is damaged, or the method is unknown or cannot start from it.
        OSError: If writing fails.
    """
    _refuse_existing(out)
    model, tokenizer = load(path)
    gated = to_gated(model, method)
    with _whole(out) as file:
        _save_composer(gated, tokenizer, file)
    return model_section(gated.config)
