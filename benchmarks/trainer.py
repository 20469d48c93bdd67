"""Throughput of the stock trainer, from foundry's own configuration to ours, one change at a time."""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback, State, Trainer
from composer.loggers import InMemoryLogger, Logger
from llmfoundry import registry
from llmfoundry.command_utils import train
from omegaconf import OmegaConf
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.record import Recorder
from benchmarks.sizes import load, shape

PEAK = 989e12  # bf16 FLOP/s of an H100 and of an H200
_WARMUP, _FEWEST = 4, 6  # batches
_SEQUENCES = 64  # a GPU's part of the paper's batch of 512, on 8 GPUs
_MONITORS = {name: {"interval": "10ba"} for name in ("update_ratio_monitor", "gate_monitor")}


class StopAfter(Callback):
    """Ends the training when `seconds` have passed since the warm-up."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        if batch == _WARMUP:
            self.start = time.monotonic()
        if batch >= _WARMUP + _FEWEST and time.monotonic() - self.start > self.seconds:
            state.stop_training()


registry.callbacks.register("stop_after", func=StopAfter)


def write_data(folder: Path, config: dict[str, Any]) -> None:
    """Random tokens for 64 batches, and a tokenizer that goes with them."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    size = (64 * min(config["global_train_batch_size"], _SEQUENCES), config["max_seq_len"])
    tokens = np.random.default_rng(0).integers(0, config["model"]["vocab_size"], size, dtype=np.int32)
    with MDSWriter(out=str(folder / "train"), columns={"tokens": "ndarray:int32"}) as writer:
        for row in tokens:
            writer.write({"tokens": row})


def configure(recorder: Recorder, size: str, method: str, data: Path, callbacks: dict[str, Any]) -> dict[str, Any]:
    """The config of a size for one process, on the data in a folder, with these callbacks and no others."""
    config = load(size, method)
    for key in ("eval_loader", "eval_interval", "save_folder", "save_interval", "autoresume", "fsdp_config"):
        config.pop(key, None)
    config["train_loader"]["dataset"]["local"] = str(data)
    if recorder.device == "cpu":
        config["train_loader"] |= {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
    config["tokenizer"]["name"] = str(data / "tokenizer")
    config["model"]["init_device"] = "cpu"
    config["optimizer"] |= {"lr": 1e-6, "fused": True}
    return config | {
        "max_duration": "100000ba",
        "global_train_batch_size": min(config["global_train_batch_size"], _SEQUENCES),
        "precision": recorder.dtype,
        "callbacks": callbacks,
        "loggers": {"inmemory": {}},
        "progress_bar": True,
        "log_to_console": False,
        "python_log_level": "error",
    }


def run_trainer(config: dict[str, Any]) -> Trainer:
    """Train with the stock trainer, once what the one before has left behind is gone."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = train(OmegaConf.create(config))
    trainer.close()
    return trainer


def decoupled(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Composer's AdamW in place of torch's, with the weight decay of 0.01 × the paper's lr that it calls for."""
    stock = {"name": "decoupled_adamw", "weight_decay": 1e-5}
    return {key: value for key, value in optimizer.items() if key != "fused"} | stock


def variants(plain: dict[str, Any], wesar: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """From the stock configuration to ours in full, each with one change to the one before."""
    model, optimizer = plain["model"], decoupled(plain["optimizer"])
    attention = {**model["attn_config"], "attn_type": "multihead_attention"}
    stock = {"name": "mpt_causal_lm", "loss_fn": "torch_crossentropy", "attn_config": attention}
    stock = {k: v for k, v in model.items() if k not in ("z_loss", "embedding_scaling")} | stock
    few = max(1, plain["device_train_microbatch_size"] // 4)  # for the S×S matrices
    wesar = wesar | {"callbacks": wesar["callbacks"] | _MONITORS}
    return {
        "stock": plain | {"model": stock, "optimizer": optimizer, "device_train_microbatch_size": few},
        "+ sdpa_attention": plain | {"model": model | {"z_loss": 0.0}, "optimizer": optimizer},
        "+ z-loss, in one pass": plain | {"optimizer": optimizer},
        "+ fused adamw": plain,
        "+ compile": plain | {"compile_config": {}},
        "+ gates and monitors": wesar | {"compile_config": {}},
    }


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size: the variants without `compile_config`, or those with it; ratios are to the first of them."""
    callbacks = {"stop_after": {"seconds": seconds}, "speed_monitor": {"window_size": 1, "gpu_flops_available": PEAK}}
    first: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, load(size, "wesar"))
        configs = [configure(recorder, size, method, data, callbacks) for method in ("small_init", "wesar")]
        for variant, config in variants(*configs).items():
            if ("compile_config" in config) == compiled:
                recorder.about(suite="trainer", name=size, variant=variant, dtype=recorder.dtype, compiled=compiled)
                recorder.about(shape=shape(config))
                try:
                    first = _measure(recorder, config, first)
                except torch.OutOfMemoryError:
                    recorder.add([], unit="tokens/s", note="out of memory")


def _measure(recorder: Recorder, config: dict[str, Any], first: np.ndarray | None) -> np.ndarray:
    """Add the rows of one run; return the tokens/s that ratios are to."""
    trainer = run_trainer(config)
    [logged] = [d.data for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    rate, mfu = (
        np.array([float(value) for time, value in logged[f"throughput/device/{key}"] if time.batch.value > _WARMUP])
        for key in ("tokens_per_sec", "mfu")
    )
    model, length = trainer.state.model, config["max_seq_len"]
    attention = 3 * model.get_attention_flops(length)
    attention /= model.flops_per_batch({"input_ids": torch.empty(1, length, device="meta")})
    first = rate if first is None else first
    recorder.add(rate, first, paired=False, unit="tokens/s")
    recorder.add(mfu, unit="MFU, 6N + 12·L·d·T", note="of 989 TFLOP/s; N as foundry counts it")
    recorder.add(mfu * (1 - attention / 2), unit="MFU, 6N + 6·L·d·T", note="of 989 TFLOP/s; N as foundry counts it")
    recorder.add([torch.cuda.max_memory_allocated() / 2**30] if recorder.device == "cuda" else [], unit="GiB at peak")
    return first
