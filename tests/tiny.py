"""Build a model that is small enough for every test, and its parts."""

import math
from typing import Any

import torch
from llmfoundry.models.layers.layer_builders import build_fc  # noqa: F401  (imports the stock registrations)

from llmfoundry_wesar.methods import load
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM

PAPER_SIGMA = 4e-5**0.5


def model_config(method: str | None = None, **overrides: Any) -> dict[str, Any]:
    """Return the `model` section of a config without its name: the paper's architecture at d = 32, N = 2, V = 97."""
    config: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "expansion_ratio": 4,
        "max_seq_len": 16,
        "vocab_size": 97,
        "no_bias": True,
        "norm_type": "rmsnorm",
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "learned_pos_emb": False,
        "attn_config": {"attn_impl": "torch", "fused_qkv": False, "rope": True, "rope_impl": "hf"},
    }
    if method is not None:
        config |= load("method", method)["model"]
    for key, value in overrides.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def build(method: str | None = "wesar", seed: int = 0, **overrides: Any) -> ComposerWeSaRMPTCausalLM:
    """Build the model of a method on the CPU."""
    torch.manual_seed(seed)
    return ComposerWeSaRMPTCausalLM(**model_config(method, **overrides))


def batch(sequences: int = 3, length: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    """Draw random tokens; each of them is also a target."""
    ids = torch.randint(0, 97, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def within_sampling_error(weight, std):
    """Compare with std within six standard errors of n normal draws, σ/√2n: one false alarm in 10⁹ matrices."""
    return abs(weight.std(correction=0).item() - std) < 6 * std / math.sqrt(2 * weight.numel())
