"""Find the role of a matrix from the name of its module. Does not import torch, so that `plot` starts quickly."""

from collections.abc import Mapping
from dataclasses import dataclass


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
