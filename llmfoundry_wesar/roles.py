"""Find the role and the block of a matrix from the path of its module, and group values by role.

Does not import torch, so that `plot` starts quickly.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Role:
    """The role of a matrix in the Transformer, which decides its initial scale.

    Attributes:
        name: The paper's name of the matrix (section 2).
        residual: Whether its output is added to the residual stream. If so, σ_• is divided by √2N.
        activation: The activation function whose output is the matrix's input. It determines He's gain.
    """

    name: str
    residual: bool = False
    activation: str = "linear"


# Module names in foundry's MPT and in the decoders of transformers. A name is the last part of the module's path, or
# the last two parts if one is ambiguous. Four roles are not in the paper: W_pos (learned positions), W_qkv (W_q, W_k
# and W_v in one matrix), W_g (the gate projection of a GLU) and W_r (the router of a mixture of experts).
ROLES = {
    name: role
    for role, names in (
        (Role("W_e"), "wte embed_tokens embed_in word_embeddings"),
        (Role("W_pos"), "wpe embed_positions"),
        (Role("W_qkv"), "Wqkv c_attn query_key_value qkv_proj"),
        (Role("W_q"), "Wq q_proj"),
        (Role("W_k"), "Wk k_proj"),
        (Role("W_v"), "Wv v_proj"),
        (
            Role("W_o", residual=True),
            "out_proj o_proj attn.c_proj attention.dense self_attn.dense self_attention.dense",
        ),
        (Role("W_r"), "gate router shared_expert_gate"),
        (Role("W_g"), "gate_proj w1"),
        (Role("W_u"), "up_proj c_fc fc1 fc_in dense_h_to_4h w3 gate_up_proj"),
        (Role("W_d", residual=True), "down_proj mlp.c_proj fc2 fc_out dense_4h_to_h w2"),
        (Role("W_p"), "lm_head embed_out"),
    )
    for name in names.split()
}

# The roles by name, in the order of the forward pass.
BY_NAME = {role.name: role for role in ROLES.values()}


def find_role(path: str, roles: Mapping[str, Role] = ROLES) -> Role | None:
    """Return the role of the matrix at a module's path, or None if `roles` has no name for it.

    >>> find_role("transformer.h.0.mlp.c_proj").name
    'W_d'
    """
    *_, parent, name = ["", *path.split(".")]
    return roles.get(f"{parent}.{name}") or roles.get(name)


def role_name(path: str) -> str:
    """Return the paper's name of the matrix at a module's path; without a role, the last part of the path.

    The two matrices of a LoRA, as peft names them, have the name of the matrix that they are added to.

    >>> role_name("model.layers.0.self_attn.q_proj"), role_name("model.layers.0.adapter")
    ('W_q', 'adapter')
    >>> role_name("model.layers.0.self_attn.q_proj.lora_A.default")
    'W_q.lora_A'
    """
    path, lora, rest = path.partition(".lora_")
    path = path.removesuffix(".base_layer")
    role = find_role(path)
    return (role.name if role else path.rpartition(".")[2]) + lora + rest.partition(".")[0]


def block_index(path: str) -> int | None:
    """Return the index of the block at a module's path, from 0, or None if the module is not in a block."""
    block = re.search(r"\.(?:blocks|layers|h)\.(\d+)\.", path)  # MPT, Llama and most others, GPT-2
    return int(block[1]) if block else None


def role_order(role: str) -> tuple[int, str]:
    """Return a sort key: roles in the order of `BY_NAME`, then other names in alphabetical order."""
    names = list(BY_NAME)
    return (names.index(role) if role in names else len(names), role)


def by_role(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the least, median and greatest value of each role, NaN if one of its values is NaN.

    Args:
        values: Module path → value.

    Returns:
        Role name → `min`, `median` and `max`, in the order of `role_order`.
    """
    grouped: dict[str, list[float]] = defaultdict(list)
    for path, value in values.items():
        grouped[role_name(path)].append(value)
    statistics = {"min": np.min, "median": np.median, "max": np.max}
    return {
        role: {name: float(statistic(grouped[role])) for name, statistic in statistics.items()}
        for role in sorted(grouped, key=role_order)
    }
