"""Measure the throughput of the stock trainer, from foundry's own configuration to ours, one change at a time."""

import contextlib
import io
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
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

from benchmarks.record import Recorder, reason
from benchmarks.sizes import load, shape
from llmfoundry_wesar.callbacks.measurement import METRICS

PEAK = 989e12  # bf16 FLOP/s of an H100 and of an H200
_WARMUP, _FEWEST = 4, 6  # batches
_PATIENCE, _EXIT = 300, 15  # seconds for imports and compilation, and for the end of a process
_SEQUENCES = 64  # a GPU's share of the paper's batch of 512 sequences, on 8 GPUs
_MONITORS = {
    "update_ratio_monitor": {"interval": "10ba", "metrics": list(METRICS)},
    "gate_monitor": {"interval": "10ba"},
}


# A new process must not inherit a CUDA context, so it cannot be forked.
_PROCESSES = multiprocessing.get_context("spawn")


class StopAfter(Callback):
    """Ends the training `seconds` after the warm-up."""

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
    """Write random tokens for 64 batches, and a tokenizer for them."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    size = (64 * min(config["global_train_batch_size"], _SEQUENCES), config["max_seq_len"])
    tokens = np.random.default_rng(0).integers(0, config["model"]["vocab_size"], size, dtype=np.int32)
    with MDSWriter(out=str(folder / "train"), columns={"tokens": "ndarray:int32"}) as writer:
        for row in tokens:
            writer.write({"tokens": row})


def configure(recorder: Recorder, size: str, method: str, data: Path, callbacks: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a size for one process, with the data in a folder and only these callbacks."""
    config = load(size, method)
    for key in (
        "eval_loader",
        "eval_interval",
        "save_folder",
        "save_interval",
        "autoresume",
        "fsdp_config",
        "compile_config",
    ):
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
    """Train with the stock trainer, and hide the config that foundry prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = train(OmegaConf.create(config))
        trainer.close()
    return trainer


def decoupled(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Replace torch's AdamW with Composer's, whose weight decay must be 0.01 × the paper's lr."""
    stock = {"name": "decoupled_adamw", "weight_decay": 1e-5}
    return {key: value for key, value in optimizer.items() if key != "fused"} | stock


def variants(plain: dict[str, Any], wesar: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """List the variants from the stock configuration to all of ours, each with one more change."""
    model, optimizer = plain["model"], decoupled(plain["optimizer"])
    attention = {**model["attn_config"], "attn_type": "multihead_attention"}
    stock = {"name": "mpt_causal_lm", "loss_fn": "torch_crossentropy", "attn_config": attention}
    stock = {k: v for k, v in model.items() if k not in ("z_loss", "embedding_scaling", "fused_loss")} | stock
    few = max(1, plain["device_train_microbatch_size"] // 4)  # for the S×S matrices
    metrics, logits = {"use_train_metrics": True}, {"fused_loss": False, "use_train_metrics": True}
    compiled = {"compile_config": {}}
    return {
        "stock": plain | {"model": stock | metrics, "optimizer": optimizer, "device_train_microbatch_size": few},
        "+ sdpa_attention": plain | {"model": model | logits | {"z_loss": 0.0}, "optimizer": optimizer},
        "+ z-loss, in one pass": plain | {"model": model | logits, "optimizer": optimizer},
        "+ fused adamw": plain | {"model": model | logits},
        "+ no train metrics": plain | {"model": model | {"fused_loss": False}},
        "+ fused_loss": plain,
        "+ compile": plain | compiled,
        "+ gates": wesar | compiled,
        "+ monitors": wesar | compiled | {"callbacks": wesar["callbacks"] | _MONITORS},
    }


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size, the variants with `compile_config` or those without; ratios are to the first of them.

    Each variant has a process of its own, so that memory left by another has no effect, and a failure gives a row.
    """
    callbacks = {"stop_after": {"seconds": seconds}, "speed_monitor": {"window_size": 1, "gpu_flops_available": PEAK}}
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, load(size, "wesar"))
        configs = [configure(recorder, size, method, data, callbacks) for method in ("small_init", "wesar")]
        for variant, config in variants(*configs).items():
            if ("compile_config" in config) != compiled:
                continue
            recorder.about(suite="trainer", name=size, variant=variant, dtype=recorder.dtype, compiled=compiled)
            recorder.about(shape=shape(config))
            try:
                measured = _in_a_process(config, seconds)
            except (RuntimeError, TimeoutError) as error:
                recorder.add([], unit="tokens/s", note=str(error))
                continue
            first = first or measured["tokens_per_sec"]
            note = "of 989 TFLOP/s; N as foundry counts it"
            recorder.add(measured["tokens_per_sec"], first, paired=False, unit="tokens/s")
            recorder.add(measured["mfu"], unit="MFU, 6N + 12·L·d·T", note=note)
            causal = np.array(measured["mfu"]) * (1 - measured["attention"] / 2)
            recorder.add(causal, unit="MFU, 6N + 6·L·d·T", note=note)
            recorder.add(measured["peak"], unit="GiB at peak")


def _in_a_process(config: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run `_measure` in another process and return its result.

    Raises:
        RuntimeError: If it failed, with the reason.
        TimeoutError: If it took much longer than it should.
    """
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_send, args=(sender, config))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_PATIENCE + 3 * seconds):
            raise TimeoutError(f"no result after {_PATIENCE + 3 * seconds:g} s")
        result = receiver.recv()
        process.join(_EXIT)
    except EOFError:
        raise RuntimeError("the process ended without a result") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _send(sender: Connection, config: dict[str, Any]) -> None:
    try:
        sender.send(_measure(config))
    except Exception as error:
        sender.send(reason(error))


def _measure(config: dict[str, Any]) -> dict[str, Any]:
    """Return tokens/s and MFU of each batch after the warm-up, attention's share of the FLOP, and a GPU's peak, GiB."""
    trainer = run_trainer(config)
    [logged] = [d.data for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    result: dict[str, Any] = {
        key: [float(v) for time, v in logged[f"throughput/device/{key}"] if time.batch.value > _WARMUP]
        for key in ("tokens_per_sec", "mfu")
    }
    model, length = trainer.state.model, config["max_seq_len"]
    flops = model.flops_per_batch({"input_ids": torch.empty(1, length, device="meta")})
    peak = [torch.cuda.max_memory_allocated() / 2**30] if torch.cuda.is_available() else []
    return result | {"attention": 3 * model.get_attention_flops(length) / flops, "peak": peak}
