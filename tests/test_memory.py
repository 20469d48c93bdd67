"""Compare the estimate of a GPU's memory with what PyTorch allocated on an H100."""

import json

import pytest
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.inspection import inspect_config, load_config
from llmfoundry_wesar.memory import estimate

# Peak memory in GiB of one step with AdamW on one microbatch, with logits, measured on 2026-11-26 (torch 2.11.0).
MEASURED = {
    ("130m", "wesar", False): 32.43,
    ("130m", "small_init", False): 32.52,
    ("130m", "wesar", True): 29.05,
    ("130m", "small_init", True): 29.15,
    ("1.3b", "wesar", False): 47.38,
    ("1.3b", "small_init", False): 49.69,
    ("1.3b", "wesar", True): 42.86,
    ("1.3b", "small_init", True): 45.11,
}


def memory(size: str, gpus: int, *overrides: str):
    config = load_config(f"yamls/{size}.yaml", list(overrides))
    return estimate(config, inspect_config(config).parameters, gpus)


@pytest.mark.parametrize(("size", "method", "compiled"), MEASURED)
def test_the_estimate_is_what_an_h100_used(size, method, compiled):
    """The estimate is within 1%. It ignores workspaces and rounding to 512 bytes. Eager and compiled differ by 10%."""
    batch = {"130m": 32, "1.3b": 8}[size]
    overrides = [f"variables.method={method}", "model.fused_loss=false", f"global_train_batch_size={batch}"]
    if not compiled:
        overrides.append("compile_config=null")
    expected = MEASURED[size, method, compiled]
    assert memory(size, 1, *overrides).peak == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("size", "gpus", "overrides", "peak"),
    [
        ("130m", 1, ["variables.method=wesar"], 23.0),
        ("130m", 1, ["variables.method=small_init"], 23.2),
        ("1.3b", 8, [], 32.4),
        ("1.3b", 8, ["device_train_microbatch_size=16"], 58.4),
        ("13b", 64, [], 14.0),
    ],
)
def test_the_estimates_of_whole_configs_are_those_of_the_docs(size, gpus, overrides, peak):
    """They have fused losses, several microbatches in a step, and at 13B parameters that FSDP gathers in each block."""
    assert memory(size, gpus, *overrides).peak == pytest.approx(peak, abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "entries"),
    [
        # Keys and values are repeated for all heads; of an entry 2 bytes are kept.
        (["model.attn_config={attn_type: grouped_query_attention, kv_n_heads: 2}"], 0),
        (["model.head_dim=128"], 4 * 12 * (128 - 64)),
        (["model.ffn_config={ffn_type: mptmlp, ffn_hidden_size: 4096}"], 2 * (4096 - 3072)),
    ],
)
def test_sizes_of_heads_and_feed_forward_layers_count(overrides, entries):
    """By hand: 130M has 12 heads of 64 and a hidden size of 3072. The number of parameters is held fixed."""
    plain, other = (load_config("yamls/130m.yaml", ["compile_config=null", *more]) for more in ([], overrides))
    tokens = plain["device_train_microbatch_size"] * 2048
    more = estimate(other, 10**8, 1).activations - estimate(plain, 10**8, 1).activations
    assert more * 2**30 == pytest.approx(12 * tokens * 2 * entries)


def test_the_papers_configs_fit_and_what_does_not_is_said():
    """13B has 155 GB of weights and moments, 12 bytes a parameter, over 64 GPUs. It fits only with checkpointing."""
    assert all(memory(size, gpus).fits for size, gpus in {"130m": 8, "1.3b": 8, "13b": 64}.items())
    large = memory("13b", 64)
    assert large.parameters + large.optimizer == pytest.approx(12 * 12.911e9 / 64 / 2**30, rel=1e-3)
    assert not memory("13b", 1).fits
    # For each token and entry, 40 compiled blocks keep 34 bytes. With checkpointing they keep 4, and the one at work
    # keeps 40, because it is not compiled.
    whole = memory("13b", 64, "fsdp_config.activation_checkpointing=false")
    tokens, d = 4 * 2048, 5120
    assert whole.activations == pytest.approx(tokens * d * (40 * 34 + 10) / 2**30)
    assert large.activations == pytest.approx(tokens * d * (40 * 4 + 40 + 10) / 2**30)


def test_the_command_prints_it_and_names_a_microbatch_that_is_no_number():
    run = CliRunner().invoke(app, ["inspect", "yamls/1.3b.yaml", "--gpus", "8", "--json"])
    assert json.loads(run.stdout)["memory"]["fits_80_gb"] is True
    run = CliRunner().invoke(app, ["inspect", "yamls/1.3b.yaml", "--gpus", "8"])
    assert "each of 8 GPUs:" in run.stdout and "fits into 80 GB" in run.stdout
    run = CliRunner().invoke(app, ["inspect", "yamls/1.3b.yaml", "device_train_microbatch_size=auto", "--gpus", "8"])
    assert run.exit_code != 0 and "device_train_microbatch_size: 'auto' is not a number" in run.stderr


def test_sharding_over_fewer_gpus_needs_more_memory(monkeypatch):
    """NO_SHARD keeps what one GPU without FSDP has; a hybrid of 2 × 4 GPUs what four have. FSDP2 ignores both keys."""
    monkeypatch.setenv("FSDP_VERSION", "1")
    one, eight, four = (memory("1.3b", gpus) for gpus in (1, 8, 4))
    none = memory("1.3b", 8, "fsdp_config.sharding_strategy=NO_SHARD")
    hybrid = ["fsdp_config.sharding_strategy=HYBRID_SHARD", "fsdp_config.data_parallel_replicate_degree=2"]
    assert none.parameters == one.parameters == 8 * eight.parameters
    assert none.optimizer == one.optimizer == 8 * eight.optimizer
    assert memory("1.3b", 8, *hybrid).optimizer == four.optimizer
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert memory("1.3b", 8, *hybrid) == eight


def test_keys_that_a_config_leaves_out_have_foundrys_values():
    config = load_config(
        "yamls/130m.yaml", ["variables.method=small_init", "fsdp_config=null", "model.vocab_size=50368"]
    )
    short = {**config, "model": {key: value for key, value in config["model"].items() if key != "vocab_size"}}
    short["model"]["fc_type"] = "torch"
    assert estimate(short, 10**8, 1) == estimate(config, 10**8, 1)
