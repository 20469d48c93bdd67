"""Save merged Hugging Face models during training."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist_and_time, parse_uri
from llmfoundry.callbacks.hf_checkpointer import HuggingFaceCheckpointer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.export.card import model_card
from llmfoundry_wesar.export.checkpoints import Progress
from llmfoundry_wesar.export.conversion import hf_config, require_finite, to_hf
from llmfoundry_wesar.export.folders import whole
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM

log = logging.getLogger(__name__)
_KEY = "callbacks.merged_hf_checkpointer.huggingface_folder_name"


class MergedHuggingFaceCheckpointer(HuggingFaceCheckpointer):
    """Save the merged model that `llmfoundry-wesar export --format hf` writes, by foundry's `HuggingFaceCheckpointer`.

    The gates are merged in float32 on rank 0; then the weights are rounded to `precision`. A local folder is written
    completely or not at all. The exception is the last folder if `mlflow_registered_model_name` is set, because MLflow
    continues to read it. An existing folder of the same name is replaced if the new one has all of its files.
    Otherwise the existing folder is renamed and kept.

    Args:
        save_folder: As for `HuggingFaceCheckpointer`.
        *args: As for `HuggingFaceCheckpointer`.
        **kwargs: As for `HuggingFaceCheckpointer`, such as `save_interval` and `precision`.

    Raises:
        ValueError: At the start of the run, if neither Arcee nor Llama can represent the model, or
            `huggingface_folder_name` is not a folder below `save_folder/huggingface`.
    """

    def __init__(self, save_folder: str, *args: Any, **kwargs: Any):
        super().__init__(save_folder, *args, **kwargs)
        backend, *_ = parse_uri(save_folder)
        if not backend:
            # The base class reads a path as a URI, and would leave out what follows a `#` or `?`.
            self.save_dir_format_str = save_folder
        # The base class rounds W and α to `dtype` when it gathers them. Only their product may be rounded.
        self.merged_dtype, self.dtype = self.dtype, torch.float32

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Check before training that the model can be exported. Pass all events to the base class."""
        if event == Event.INIT:
            config = getattr(state.model, "config", None)
            if not isinstance(config, WeSaRMPTConfig):
                raise ValueError(
                    "callbacks.merged_hf_checkpointer needs model.name: wesar_mpt_causal_lm. "
                    "For other models, which have no gates to merge, use hf_checkpointer."
                )
            self.trained_config = config
            self.plain_config = hf_config(config)
            self._name(state)
        super().run_event(event, state, logger)

    def transform_model_and_tokenizer(  # type: ignore[override]
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Merge the model that the base class has gathered."""
        assert isinstance(model, WeSaRMPTForCausalLM)
        plain = to_hf(model, tokenizer, self.merged_dtype)
        try:
            for name, weight in plain.state_dict().items():
                require_finite(name, weight)
        except ValueError as error:  # only warn, because the run and its checkpoints may still be useful
            log.warning("callbacks.merged_hf_checkpointer: %s", error)
        self.parameters = plain.num_parameters()
        return plain, tokenizer

    def save_additional_contents(self, state: State, logger: Logger, save_dir: str) -> None:
        """Write the model card."""
        metrics = {
            f"{evaluator}/{name}": float(metric._computed)
            for evaluator, evaluator_metrics in state.eval_metrics.items()
            for name, metric in evaluator_metrics.items()
            if metric._computed is not None  # computing it here would wait for the other ranks
        }
        progress = Progress(state.run_name, state.timestamp.batch.value, state.timestamp.token.value, metrics)
        dtype = str(self.merged_dtype).removeprefix("torch.")
        trained = self.trained_config.to_dict()
        card = model_card(state.run_name, self.plain_config, self.parameters, trained, progress, "hf", dtype)
        Path(save_dir, "README.md").write_text(card, encoding="utf-8")

    def _name(self, state: State) -> str:
        """Return the path below `save_folder` to which the model is written at this step."""
        name = format_name_with_dist_and_time(self.huggingface_folder_name_fstr, state.run_name, state.timestamp)
        path = PurePosixPath(os.path.normpath(name))
        if path.parts[:1] != ("huggingface",) or len(path.parts) < 2:
            raise ValueError(
                f"{_KEY}: {os.path.relpath(self.huggingface_folder_name_fstr, 'huggingface')!r} is not a folder below "
                f"save_folder/huggingface; give one, such as ba{{batch}}."
            )
        return str(path)

    def _save_checkpoint(
        self, state: State, logger: Logger, upload_to_save_folder: bool, register_to_mlflow: bool
    ) -> None:
        format_string, name = self.huggingface_folder_name_fstr, self._name(state)
        # A remote folder is uploaded from a temporary one. MLflow continues to read the local folder after this call.
        if self.remote_ud is not None or register_to_mlflow:
            return super()._save_checkpoint(state, logger, upload_to_save_folder, register_to_mlflow)
        save_folder = format_name_with_dist_and_time(self.save_dir_format_str, state.run_name, state.timestamp)
        writing = dist.get_global_rank() == 0
        with whole(Path(save_folder, name), replace=True) if writing else nullcontext() as partial:
            if partial is not None:
                # Escape braces, because the base class formats this string.
                relative = os.path.relpath(partial, save_folder).replace("{", "{{").replace("}", "}}")
                self.huggingface_folder_name_fstr = relative
            try:
                super()._save_checkpoint(state, logger, upload_to_save_folder, register_to_mlflow)
            finally:
                self.huggingface_folder_name_fstr = format_string
        dist.barrier()
