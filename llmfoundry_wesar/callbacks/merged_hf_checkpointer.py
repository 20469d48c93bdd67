"""Plain Hugging Face models, during training."""

import os
import shutil
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist_and_time
from llmfoundry.callbacks.hf_checkpointer import HuggingFaceCheckpointer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.export.conversion import hf_config, to_hf
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM


class MergedHuggingFaceCheckpointer(HuggingFaceCheckpointer):
    """Foundry's `HuggingFaceCheckpointer`, saving the merged model that `llmfoundry-wesar export --format hf` writes.

    It merges in float32 on rank 0, whatever `precision` is written. A local folder appears whole or not at all, but for
    the last one if `mlflow_registered_model_name` is set, since MLflow goes on reading the folder that it is given.

    Args:
        *args: As for `HuggingFaceCheckpointer`.
        **kwargs: As for `HuggingFaceCheckpointer`: `save_folder`, `save_interval`, `precision`, …

    Raises:
        ValueError: At the start of the run, if neither Arcee nor Llama can express the model.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The base class casts what it gathers to `dtype`: W and α, not their product.
        self.merged_dtype, self.dtype = self.dtype, torch.float32

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Refuse a model that cannot be exported before it is trained; the rest is the base class's."""
        if event == Event.INIT:
            config = getattr(state.model, "config", None)
            if not isinstance(config, WeSaRMPTConfig):
                raise ValueError(
                    "callbacks.merged_hf_checkpointer goes with model.name: wesar_mpt_causal_lm; "
                    "other models have nothing to merge, use hf_checkpointer."
                )
            hf_config(config)
        super().run_event(event, state, logger)

    def transform_model_and_tokenizer(  # type: ignore[override]
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Merge the model that the base class has gathered."""
        assert isinstance(model, WeSaRMPTForCausalLM)
        return to_hf(model, tokenizer, self.merged_dtype), tokenizer

    def _save_checkpoint(
        self, state: State, logger: Logger, upload_to_save_folder: bool, register_to_mlflow: bool
    ) -> None:
        # A remote folder is uploaded from a temporary one, and MLflow goes on reading the folder that it is given.
        if self.remote_ud is not None or register_to_mlflow:
            return super()._save_checkpoint(state, logger, upload_to_save_folder, register_to_mlflow)
        name = self.huggingface_folder_name_fstr
        self.huggingface_folder_name_fstr = f"{name}.partial"
        try:
            super()._save_checkpoint(state, logger, upload_to_save_folder, register_to_mlflow)
        finally:
            self.huggingface_folder_name_fstr = name
        if dist.get_global_rank() == 0:
            folder = format_name_with_dist_and_time(
                os.path.join(self.save_dir_format_str, name), state.run_name, state.timestamp
            )
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(f"{folder}.partial", folder)
        dist.barrier()
