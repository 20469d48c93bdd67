"""Read a Composer checkpoint, whole or sharded, without running anything that it contains.

Only plain data is unpickled. Tensors are read by `torch.load` with `weights_only`; the metadata of a sharded checkpoint
is read by an unpickler that allows only the classes which torch writes there. Any other class is refused.
"""

import datetime
import io
import pickle
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
import torch
from composer.core import Time, Timestamp, TimeUnit
from composer.models import HuggingFaceModel
from llmfoundry.callbacks.curriculum_learning_callback import CurriculumLearningState
from llmfoundry.callbacks.dataset_swap_callback import DatasetSwapStateDict
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.torch_version import TorchVersion
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def _enum_member(enum: Any, name: str) -> Enum:
    """Stand in for `getattr`, by which Python 3.11.2, for one, pickles the members of an enum."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise pickle.UnpicklingError("loading builtins.getattr could run code")
    return enum[name]


# Classes that Composer and foundry save besides tensors and plain containers: times, numpy's random state, torch's
# version, and the states of foundry's callbacks. None of them runs code when it is loaded.
_PLAIN_CLASSES: list[Any] = [
    Time,
    Timestamp,
    TimeUnit,
    CurriculumLearningState,
    DatasetSwapStateDict,
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (_enum_member, "builtins.getattr"),
    # The function that rebuilds an array; its module differs between numpy 1 and numpy 2.
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
_METADATA_CLASSES = {
    *((metadata.__name__, name) for name in [*metadata.__all__, "_MEM_FORMAT_ENCODING"]),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}
_SHARDED_KEYS = [("state", key) for key in ("model", "integrations", "timestamp", "run_name")]
_PREFIX = "model."  # prefix of the Hugging Face model's names in Composer's `HuggingFaceModel`


@dataclass(frozen=True)
class Progress:
    """How far a run was trained; 0 and empty for a model that does not come from a training checkpoint.

    Attributes:
        run_name: Name of the run.
        batches: Optimizer steps.
        tokens: Training tokens, as Composer counts them.
        metrics: `EVALUATOR/METRIC` → value, as far as the checkpoint has them. The trainer saves them only with
            Composer's `save_metrics`.
    """

    run_name: str = ""
    batches: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The model of a training checkpoint.

    Attributes:
        config: The Hugging Face config, as in `config.json`.
        weights: Parameters and buffers by their names in the Hugging Face model.
        tokenizer: The tokenizer, or None if the run had none.
        progress: How far the model was trained.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    progress: Progress = field(default_factory=Progress)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint at a path.

    Args:
        path: A checkpoint (a `.pt` file, or the folder of a sharded checkpoint), or a `save_folder`. In a
            `save_folder` it is the latest checkpoint, or the only one.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: There are several checkpoints and no link to the latest, or two links, to a whole and to a sharded
            one. (After a copy neither names nor times show which of the two is later.)
    """
    path = Path(path)
    if path.is_file() or (path / ".metadata").is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    latest = [path / name for name in ("latest-rank0.pt", "latest-sharded-rank0")]
    found = [link.resolve() for link in latest if link.exists()]
    if len(found) > 1:
        raise ValueError(f"{path}: links to two latest checkpoints, {found[0]} and {found[1]}; name one of them.")
    checkpoints = {*path.glob("*.pt"), *(file.parent for file in path.glob("*/.metadata"))}
    # By the numbers in the names, so that ba10 comes after ba9.
    found = found or sorted(checkpoints, key=lambda file: ([int(n) for n in re.findall(r"\d+", file.name)], file.name))
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint in this folder (no .pt file, and no folder with a .metadata).")
    if len(found) > 1:
        raise ValueError(f"{path}: {len(found)} checkpoints and no link to the latest; name one, such as {found[-1]}.")
    return found[0]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read config, weights and tokenizer of a Composer checkpoint of a Hugging Face model.

    The weights of a whole checkpoint stay on disk until they are used (mmap). The checksum of every tensor is verified.

    Args:
        path: As for `find_checkpoint`.

    Raises:
        FileNotFoundError: There is no checkpoint, or a part of it is missing.
        ValueError: The checkpoint is damaged, is not one of Composer's with a Hugging Face model, or needs to run code.
    """
    path = find_checkpoint(path)
    state = (_read_sharded if path.is_dir() else _read_whole)(path)
    try:
        weights, model = state["state"]["model"], state["state"]["integrations"]["huggingface"]
        config, tokenizer = dict(model["model"]["config"]["content"]), model.get("tokenizer")
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a Composer checkpoint of a Hugging Face model; it must have `state.model` and "
            f"`state.integrations.huggingface` ({error!r})."
        ) from error
    if strange := [name for name, tensor in weights.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path}: not a Composer checkpoint of a Hugging Face model: {strange[0]} is not a tensor.")
    tokenizer = _load_tokenizer(tokenizer, path) if tokenizer else None
    return Checkpoint(config, weights, tokenizer, _progress(state["state"]))


def read_timestamp(path: str | Path) -> dict[str, int]:
    """Read how far a run was trained, without the weights of a sharded checkpoint.

    Args:
        path: As for `find_checkpoint`.

    Returns:
        Unit (epoch, batch, sample, token, …) → count.

    Raises:
        FileNotFoundError: As in `read_checkpoint`.
        ValueError: As in `read_checkpoint`.
    """
    path = find_checkpoint(path)
    state = _read_sharded(path, [("state", "timestamp")]) if path.is_dir() else _read_whole(path)
    try:
        return state["state"]["timestamp"]["Timestamp"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a Composer checkpoint; it must have `state.timestamp` ({error!r}).") from error


def _progress(state: dict[str, Any]) -> Progress:
    time = (state.get("timestamp") or {}).get("Timestamp", {})
    metrics = {
        f"{evaluator}/{name}": float(saved["_computed"])
        for evaluator, saved_metrics in (state.get("eval_metrics") or {}).items()
        for name, saved in saved_metrics.items()
        if saved.get("_computed") is not None
    }
    return Progress(str(state.get("run_name") or ""), int(time.get("batch", 0)), int(time.get("token", 0)), metrics)


def _load_tokenizer(files: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    if outside := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{path}: refused, because its tokenizer has a file outside of its folder: {outside[0]}.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
                {"tokenizer": files}, trust_remote_code=False, tokenizer_save_dir=folder
            )
    except OSError:
        raise
    except Exception as error:  # the package tokenizers raises plain Exceptions
        raise ValueError(f"{path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]}).") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _verify(file: str | Path | IO[bytes], name: str | Path) -> None:
    """Verify the checksums of an archive that `torch.save` wrote, because `torch.load` does not."""
    try:
        with ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises errors of many classes for damage, such as UnicodeDecodeError
        raise ValueError(f"{name}: not a checkpoint, or cut short ({error}).") from error
    if damaged:
        raise ValueError(f"{name}: damaged ({damaged} has a wrong checksum).")


def _read_whole(path: Path) -> Any:
    _verify(path, path)
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not foreign:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a checkpoint ({str(error).splitlines()[0]}).") from error
    raise ValueError(f"{path}: refused, because loading {', '.join(sorted(foreign))} could run code.")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"loading {module}.{name} could run code")


class _Reader(filesystem.FileSystemReader):
    def read_metadata(self) -> metadata.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return _MetadataUnpickler(file).load()

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        part = io.BytesIO(super()._slice_file(file, sinfo).read(sinfo.length))
        _verify(part, sinfo.relative_path)
        part.seek(0)
        return part


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _read_sharded(path: Path, keys: Collection[tuple[str, ...]] = _SHARDED_KEYS) -> Any:
    reader = _Reader(path)
    try:
        known = reader.read_metadata()
        # Do not read the optimizer states: they are two thirds of a checkpoint.
        paths = {name: place for name, place in (known.planner_data or {}).items() if place[:2] in keys}
        entries = {name: known.state_dict_metadata[name] for name in paths}
        values = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, metadata.TensorStorageMetadata)
            else None
            for name, entry in entries.items()
        }
    except Exception as error:
        raise ValueError(f"{path}/.metadata: refused or damaged ({error}).") from error
    try:
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            load(values, storage_reader=reader, planner=_Planner(flatten_state_dict=False), no_dist=True)
    except CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{error.filename}: a part of this checkpoint is missing.") from failure
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from failure
    return unflatten_state_dict(values, paths)
