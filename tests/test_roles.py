import math

from llmfoundry_wesar.roles import block_index, by_role

MPT, LLAMA, GPT2 = "model.transformer.blocks", "model.model.layers", "model.transformer.h"


def test_values_are_grouped_by_the_papers_names():
    """By hand: of three values the median is the middle one, of two their mean. Other modules keep their own names."""
    values = {
        "model.adapter": 7.0,
        f"{MPT}.0.ffn.down_proj": 3.0,
        f"{MPT}.10.ffn.down_proj": 8.0,
        f"{LLAMA}.1.mlp.down_proj": 1.0,
        f"{LLAMA}.0.self_attn.q_proj": 2.0,
        f"{GPT2}.0.mlp.c_proj": 4.0,
        f"{MPT}.0.attn.Wq": 5.0,
        "model.transformer.wte": 6.0,
    }
    grouped = by_role(values)
    assert list(grouped) == ["W_e", "W_q", "W_d", "adapter"]
    assert grouped["W_d"] == {"min": 1.0, "median": 3.5, "max": 8.0}
    assert grouped["W_q"] == {"min": 2.0, "median": 3.5, "max": 5.0}
    assert grouped["adapter"] == dict.fromkeys(("min", "median", "max"), 7.0)
    assert by_role({}) == {}


def test_matrices_of_a_lora_have_the_name_of_the_one_that_they_change():
    q_proj = f"base_model.{LLAMA}.0.self_attn.q_proj"
    values = {f"{q_proj}.base_layer": 1.0, f"{q_proj}.lora_A.default": 2.0, f"{q_proj}.lora_B.default": 3.0}
    assert {role: found["max"] for role, found in by_role(values).items()} == {
        "W_q": 1.0,
        "W_q.lora_A": 2.0,
        "W_q.lora_B": 3.0,
    }


def test_a_nan_in_one_block_is_not_hidden():
    values = {f"{MPT}.{block}.attn.Wq": value for block, value in enumerate([1.0, math.nan, 2.0])}
    assert all(map(math.isnan, by_role(values)["W_q"].values()))


def test_blocks_are_numbers_in_the_path():
    paths = [f"{MPT}.10.ffn.down_proj", f"{LLAMA}.3.mlp.up_proj", f"{GPT2}.0.attn.c_attn", "model.lm_head"]
    assert [block_index(path) for path in paths] == [10, 3, 0, None]
