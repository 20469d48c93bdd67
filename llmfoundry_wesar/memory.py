"""Estimate the memory that training takes on each GPU: `llmfoundry-wesar inspect CONFIG --gpus N`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmfoundry_wesar.losses import PROJECTED_CHUNK

GIB = 2**30
# 80 GB are 74.5 GiB; the 79.6 GiB of an H100 leave 5 for CUDA, NCCL and gaps between allocations.
CAPACITY = 80e9 / GIB


@dataclass(frozen=True)
class Memory:
    """What one of the GPUs holds at the peak of a training step, in GiB.

    Attributes:
        gpus: Their number; FSDP shards over all of them.
        parameters: In float32, this GPU's part.
        gradients: The same.
        optimizer: Two moments in float32, the same.
        copies: Parameters in bfloat16: what FSDP has gathered, or what autocast keeps from forward to backward.
        activations: Kept for the backward pass of one microbatch.
        logits: And their gradient; under `fused_loss` those of a chunk, and the gradients that are computed from them.
        peak: The most at one time. With a single microbatch a step, gradients only come as activations go.
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
        """Whether 80 GB hold it."""
        return self.peak <= CAPACITY

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self) | {"fits_80_gb": self.fits}

    def __str__(self) -> str:
        parts = {key: value for key, value in asdict(self).items() if key not in ("gpus", "peak")}
        lines = [f"{name:<12}{value:7.1f} GiB" for name, value in (parts | {"peak": self.peak}).items()]
        verdict = "80 GB hold it" if self.fits else "80 GB do not hold it"
        return "\n".join([f"each of {self.gpus} GPUs:", *lines, f"{verdict} ({CAPACITY:.1f} GiB)"])


def _block(model: Mapping[str, Any], compiled: bool) -> float:
    """Bytes that a block keeps of each token, under autocast to bfloat16 and with fused attention.

    The residual stream is float32. A block keeps it in front of both norms (4d each), what it is cast to for W_q, W_k
    and W_v (2d each) and for W_u (2d), queries, keys, values and the attention's output (2 bytes an entry), and the
    feed-forward layer's hidden values before and after the activation. Compiled, the casts for W_q, W_k and W_v are
    computed again instead.
    """
    d, attention = model["d_model"], model.get("attn_config") or {}
    heads = attention.get("kv_n_heads") or model["n_heads"]
    values = d * heads / model["n_heads"]
    glu = (model.get("ffn_config") or {}).get("ffn_type") == "mptglu"
    hidden = model.get("expansion_ratio", 4) * d
    return 4 * d + (0 if compiled else 6 * d) + 2 * (2 * d + 2 * values) + 6 * d + 2 * hidden * (4 if glu else 2)


def estimate(config: Mapping[str, Any], parameters: int, gpus: int) -> Memory:
    """Estimate the peak memory of a training step with AdamW in `amp_bf16`.

    On an H100 the peaks of `wesar` and `small_init` at 130M and 1.3B, eager and compiled, were within 1% of this.

    Args:
        config: A training config, as `inspection.load_config` returns it, with a model of the MPT family.
        parameters: Their number.
        gpus: Over how many of them FSDP shards the model. One GPU holds all of it.

    Raises:
        ValueError: If the microbatch is no number, or the model is no MPT.
    """
    model, fsdp = config["model"], config.get("fsdp_config") or {}
    microbatch = config.get("device_train_microbatch_size")
    if not isinstance(microbatch, int):
        raise ValueError(
            f"device_train_microbatch_size: {microbatch!r} is not a number of sequences, which --gpus needs: set one."
        )
    if "mpt" not in model["name"]:
        raise ValueError(f"model.name: {model['name']} is not known to --gpus, which needs wesar_mpt_causal_lm.")
    d, layers, vocabulary = model["d_model"], model["n_layers"], model["vocab_size"]
    tokens = microbatch * config["max_seq_len"]
    shards = gpus if fsdp else 1
    block = _block(model, compiled=config.get("compile_config") is not None)
    kept = (layers * 4 * d + block) if fsdp.get("activation_checkpointing") else layers * block
    # And the rows of W_e, the stream in front of the last norm, and what that is cast to.
    activations = tokens * (kept + 10 * d)
    logits = 4.0 * tokens * vocabulary
    if model.get("fused_loss"):
        logits = min(logits, 4.0 * PROJECTED_CHUNK["cuda"]) + 8 * vocabulary * d + 4 * tokens * d
    copies = 2.0 * parameters
    if shards > 1 and fsdp.get("sharding_strategy", "FULL_SHARD") == "FULL_SHARD":
        # W_e and W_p, and two blocks, of which one is fetched ahead.
        matrices = 2 * vocabulary * d
        copies = 2.0 * (matrices + 2 * (parameters - matrices) / layers)
    elif shards == 1 and (model.get("fc_type") or {}).get("name") == "wesar":
        copies = 0.0  # αW is computed again
    part = 4.0 * parameters / shards
    working = activations + logits
    accumulates = config["global_train_batch_size"] > microbatch * gpus
    peak = 3 * part + copies + (part + working if accumulates else max(part, working))
    return Memory(gpus, *(x / GIB for x in (part, part, 2 * part, copies, activations, logits, peak)))
