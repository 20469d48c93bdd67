"""Estimate the memory that training needs on each GPU, for `llmfoundry-wesar inspect CONFIG --gpus N`."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmfoundry.models.mpt.configuration_mpt import MPTConfig

from llmfoundry_wesar.losses import PROJECTED_CHUNK

GIB = 2**30
# 80 GB are 74.5 GiB. An H100 has 79.6 GiB; the rest is for CUDA, NCCL and gaps between allocations.
CAPACITY = 80e9 / GIB


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU at the peak of a training step, in GiB.

    Attributes:
        gpus: Number of GPUs of the run.
        parameters: This GPU's part of the parameters, in float32.
        gradients: This GPU's part of the gradients, in float32.
        optimizer: This GPU's part of the two moments, in float32.
        copies: Parameters in bfloat16: those that FSDP has gathered, or that autocast keeps for the backward pass.
        activations: Activations that are kept for the backward pass of one microbatch.
        logits: Logits and their gradient. Under `fused_loss` those of one chunk, and the gradients computed from them.
        peak: The largest sum. With one microbatch a step, activations are freed while gradients are computed.
    """

    gpus: int
    parameters: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    logits: float
    peak: float

    @property
    def fits(self) -> bool:
        """Whether the peak is at most 80 GB."""
        return self.peak <= CAPACITY

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self) | {"fits_80_gb": self.fits}

    def __str__(self) -> str:
        parts = {key: value for key, value in asdict(self).items() if key not in ("gpus", "peak")}
        lines = [f"{name:<12}{value:7.1f} GiB" for name, value in (parts | {"peak": self.peak}).items()]
        verdict = "fits into 80 GB" if self.fits else "does not fit into 80 GB"
        return "\n".join([f"each of {self.gpus} GPUs:", *lines, f"{verdict} ({CAPACITY:.1f} GiB)"])


def _block(model: Mapping[str, Any], compiled: bool) -> float:
    """Return the bytes that a block keeps for each token, under autocast to bfloat16 and with fused attention.

    The residual stream is float32. A block keeps the inputs of both norms (4d each), the bfloat16 inputs of W_q, W_k,
    W_v and W_u (2d each), queries, keys, values and the attention's output (2 bytes an entry; keys and values of all
    heads, because grouped ones are repeated), and the hidden values of the feed-forward layer before and after the
    activation. A compiled block computes the inputs of W_q, W_k and W_v again.
    """
    d, ffn = model["d_model"], model["ffn_config"] or {}
    width = model["n_heads"] * (model.get("head_dim") or d // model["n_heads"])
    hidden = ffn.get("ffn_hidden_size") or model["expansion_ratio"] * d
    values = 4 if ffn.get("ffn_type") == "mptglu" else 2
    return 4 * d + (0 if compiled else 6 * d) + 2 * 4 * width + 6 * d + 2 * hidden * values


def _shards(fsdp: Mapping[str, Any], gpus: int) -> int:
    """Return the number of GPUs over which parameters, gradients and moments are sharded."""
    if not fsdp:
        return 1
    if os.environ.get("FSDP_VERSION", "1") == "2":  # for which Composer ignores the keys below
        return gpus
    if str(fsdp.get("sharding_strategy", "")).upper() == "NO_SHARD":
        return 1
    degree = fsdp.get("data_parallel_shard_degree") or -1
    return degree if degree != -1 else gpus // (fsdp.get("data_parallel_replicate_degree") or 1)


def estimate(config: Mapping[str, Any], parameters: int, gpus: int) -> Memory:
    """Estimate the peak memory of a training step with AdamW in `amp_bf16`.

    On an H100 the estimates for `wesar` and `small_init` at 130M and 1.3B, eager and compiled, were within 1%. With
    `fused_loss`, the 130M model compiled as a whole took 6% more on an H200.

    Args:
        config: A training config, as `inspection.load_config` returns it, with a model of the MPT family.
        parameters: Number of parameters.
        gpus: Number of GPUs of the run.

    Raises:
        ValueError: If the microbatch is not a number, or the model is not an MPT.
    """
    # The keys that the config leaves out have foundry's default values.
    model, fsdp = MPTConfig().to_dict() | config["model"], config.get("fsdp_config") or {}
    microbatch = config.get("device_train_microbatch_size")
    if not isinstance(microbatch, int):
        raise ValueError(
            f"device_train_microbatch_size: {microbatch!r} is not a number; --gpus needs a number of sequences."
        )
    if "mpt" not in model["name"]:
        raise ValueError(f"model.name: {model['name']} is not supported by --gpus; use wesar_mpt_causal_lm.")
    d, layers, vocabulary, fc_type = (model[key] for key in ("d_model", "n_layers", "vocab_size", "fc_type"))
    tokens = microbatch * config["max_seq_len"]
    shards = _shards(fsdp, gpus)
    checkpointing = bool(fsdp.get("activation_checkpointing"))
    # Composer compiles nothing within checkpointed blocks.
    block = _block(model, compiled=config.get("compile_config") is not None and not checkpointing)
    kept = (layers * 4 * d + block) if checkpointing else layers * block
    # Also the output of W_e, the input of the last norm, and the bfloat16 input of W_p.
    activations = tokens * (kept + 10 * d)
    logits = 4.0 * tokens * vocabulary
    if model.get("fused_loss"):
        logits = min(logits, 4.0 * PROJECTED_CHUNK["cuda"]) + 8 * vocabulary * d + 4 * tokens * d
    copies = 2.0 * parameters
    if shards > 1 and fsdp.get("sharding_strategy", "FULL_SHARD") == "FULL_SHARD":
        # W_e, W_p and two blocks: the current one and the next one, which is gathered in advance.
        matrices = 2 * vocabulary * d
        copies = 2.0 * (matrices + 2 * (parameters - matrices) / layers)
    elif (gpus == 1 or not fsdp) and (fc_type if isinstance(fc_type, str) else fc_type["name"]) == "wesar":
        copies = 0.0  # gated layers compute αW again in the backward pass
    part = 4.0 * parameters / shards
    working = activations + logits
    accumulates = config["global_train_batch_size"] > microbatch * gpus
    peak = 3 * part + copies + (part + working if accumulates else max(part, working))
    return Memory(gpus, *(x / GIB for x in (part, part, 2 * part, copies, activations, logits, peak)))
