"""The measured models: those of `yamls/`, and a tiny one."""

from pathlib import Path
from typing import Any

from llmfoundry_wesar.inspection import load_config

_YAMLS = Path(__file__).parents[1] / "yamls"
_TINY = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=97", "max_seq_len=16"]
SIZES = {
    "tiny": ("130m.yaml", [*_TINY, "device_train_microbatch_size=4", "global_train_batch_size=8"]),
    "quickstart": ("quickstart.yaml", ["variables.setting=rapid"]),
    "130m": ("130m.yaml", []),
    "1.3b": ("1.3b.yaml", []),
    "13b-blocks": ("13b.yaml", ["model.n_layers=4"]),
}


def load(size: str, method: str) -> dict[str, Any]:
    """Load the complete training config of a size and method, without anything left to expand."""
    file, overrides = SIZES[size]
    config = load_config(str(_YAMLS / file), [*overrides, f"variables.method={method}"])
    return config | {"variables": {}}


def shape(config: dict[str, Any]) -> str:
    """Describe the shapes of a config for a row. B is the microbatch in sequences, T the tokens of a step."""
    model, microbatch = config["model"], config["device_train_microbatch_size"]
    tokens = config["global_train_batch_size"] * config["max_seq_len"]
    layers = f"d={model['d_model']} L={model['n_layers']} H={model['n_heads']} V={model['vocab_size']}"
    return f"{layers} S={config['max_seq_len']} B={microbatch} T={tokens}"
