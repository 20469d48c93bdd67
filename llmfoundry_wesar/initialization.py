"""Which standard deviation each matrix should start at (σ_•), and the functions that put it there.

Foundry calls a *param init function* (`model.init_config.name`) on every module; `generic_param_init_fn_` passes it on
to the first of the *module init functions* that takes the module. Ours, `init_matrix`, takes every matrix that has a
role, and every reparameterised layer; norms, biases and stock models are left to foundry's own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from llmfoundry.models.utils.config_defaults import init_config_defaults
from llmfoundry.models.utils.param_init_fns import generic_param_init_fn_, summon_dtensor
from torch import Tensor, nn

from llmfoundry_wesar.layers import GainInit, Reparameterized, ScaledEmbedding

Backbone = Literal["he", "small"]


@dataclass(frozen=True)
class Role:
    """What a matrix does in the Transformer, as far as its initial scale depends on it.

    Attributes:
        name: The paper's name of the matrix (section 2).
        residual: Whether its output is added to the residual stream, so that σ_• is divided by √2N.
        activation: What is in front of it, for He's gain.
    """

    name: str
    residual: bool = False
    activation: str = "linear"


# By the last part of the module's path in MPT.
ROLES = {
    "wte": Role("W_e"),
    "Wq": Role("W_q"),
    "Wk": Role("W_k"),
    "Wv": Role("W_v"),
    "Wqkv": Role("W_qkv"),
    "out_proj": Role("W_o", residual=True),
    "up_proj": Role("W_u"),
    "gate_proj": Role("W_g"),
    "down_proj": Role("W_d", residual=True),
    "lm_head": Role("W_p"),
}


def activation_gain(activation: str) -> float:
    """He's gain of an activation function, as `torch.nn.init.calculate_gain` has it: 1/√E[f(z)²] = √2 for the ReLU.

    The smooth relatives of the ReLU get its √2, as in the paper (Table 1, footnote 2). A GLU multiplies the activation
    by an independent factor of unit variance, which leaves the gain as it is.

    Args:
        activation: A name in `torch.nn.functional`, as in `model.ffn_config.ffn_act_fn.name`.

    Raises:
        ValueError: If no gain is known for it.
    """
    if activation in ("gelu", "quick_gelu", "silu", "mish"):
        activation = "relu"
    try:
        return nn.init.calculate_gain(activation)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"model.ffn_config.ffn_act_fn.name: no He gain is known for {activation!r}; "
            "use one of gelu, quick_gelu, silu, mish, relu, leaky_relu, selu, tanh, sigmoid."
        ) from error


def assign_roles(module: nn.Module, activation: str = "gelu") -> None:
    """Give every matrix below `module` whose name has one its `role` attribute.

    Args:
        module: A model, a block, or a single matrix under its own name's parent.
        activation: The activation in front of W_d.
    """
    for name, child in module.named_modules():
        role = ROLES.get(name.rpartition(".")[2])
        if role is not None and isinstance(child, nn.Linear | nn.Embedding):
            if role.name == "W_d":
                role = replace(role, activation=activation)
            child.role = role  # type: ignore[assignment]


def backbone_std(role: Role, backbone: Backbone, fan_in: int, d_model: int, div_is_residual: float) -> float:
    r"""σ_•, the standard deviation that the backbone criterion asks of a matrix (Table 1, columns He and Small).

    He: :math:`\text{gain}/\sqrt{d_\text{in}}`. Small: :math:`\sqrt{2/5d}`. Both divided by `div_is_residual` where the
    output is added to the residual stream. W_e is no exception here: embedding scaling comes on top of it.

    Args:
        role: The matrix's.
        backbone: `he` or `small`.
        fan_in: d_in, columns of the matrix.
        d_model: d, the model's width.
        div_is_residual: √2N in the paper.

    Raises:
        ValueError: If no gain is known for He.
    """
    std = activation_gain(role.activation) / math.sqrt(fan_in) if backbone == "he" else math.sqrt(2 / (5 * d_model))
    return std / div_is_residual if role.residual else std


def is_number(value: Any) -> bool:
    """Whether a value of a config is a number; Python takes a boolean for one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def residual_divisor(init_div_is_residual: Any, n_layers: int) -> float:
    """What `model.init_config.init_div_is_residual` divides σ_o and σ_d by: True √2N, a number itself, False nothing.

    Raises:
        ValueError: If it is neither a boolean nor a positive number.
    """
    if isinstance(init_div_is_residual, bool):
        return math.sqrt(2 * n_layers) if init_div_is_residual else 1.0
    if not is_number(init_div_is_residual) or not 0 < init_div_is_residual < math.inf:
        raise ValueError(
            f"model.init_config.init_div_is_residual: {init_div_is_residual!r} is neither a boolean nor a positive "
            "number; the paper's is true, √2N."
        )
    return float(init_div_is_residual)


@dataclass(frozen=True)
class MatrixInit:
    """How to draw the matrices; `generic_param_init_fn_` carries it to `init_matrix` as its `init_fn_`.

    Attributes:
        backbone: The rule for σ_•.
        d_model: d.
        sigma: The common σ of all actual weights. None for plain layers, whose own σ is σ_•.
        gain_init: Whether a gate starts where its method says, or where the virtual weight has σ_•.
    """

    backbone: Backbone
    d_model: int
    sigma: float | None = None
    gain_init: GainInit = "method"

    def __call__(self, weight: Tensor) -> None:
        """What foundry's own module init functions would call, for a matrix that `init_matrix` did not take."""
        raise ValueError(
            f"model.init_config draws each matrix by its role, and one of shape {tuple(weight.shape)} has none: "
            "set `model.name: wesar_mpt_causal_lm`."
        )


@summon_dtensor
def init_matrix(module: nn.Module, init_fn_: Any, div_is_residual: float = 1.0, **_: Any) -> bool:
    """Initialise a matrix that has a role, and refuse a reparameterised layer to every plain init function.

    Returns:
        Whether it took the module; stock modules under stock init functions are never taken.

    Raises:
        ValueError: If layer and init function do not belong together.
    """
    if not isinstance(init_fn_, MatrixInit):
        if isinstance(module, Reparameterized):
            raise ValueError(
                f"model.init_config.name is a plain init function, which leaves the gate of {type(module).__name__} as "
                "it is: set `model.init_config: {name: wesar_, sigma: 0.0063245553, backbone: he}`, "
                "or `model.fc_type: torch`."
            )
        return False
    role: Role | None = getattr(module, "role", None)
    if role is None:
        return False
    assert isinstance(module, nn.Linear | nn.Embedding)
    sigma = init_fn_.sigma
    if (sigma is not None) != isinstance(module, Reparameterized):
        raise ValueError(
            f"model.init_config.name: wesar_ is for reparameterised layers and he_init_ for plain ones, and "
            f"{type(module).__name__} is not: set `model.fc_type: {{name: {'torch' if sigma is None else 'wesar'}}}`, "
            f"or `model.init_config.name: {'wesar_' if sigma is None else 'he_init_'}`."
        )
    std = backbone_std(role, init_fn_.backbone, module.weight.size(1), init_fn_.d_model, div_is_residual)
    nn.init.normal_(module.weight, std=std if sigma is None else sigma)
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].fill_(0)
    elif module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, Reparameterized) and sigma is not None:
        # Embedding scaling: its output has variance 1 whatever the backbone, by its gate or by its constant.
        virtual_std = 1.0 / module.scale if isinstance(module, ScaledEmbedding) else std
        module.start_gate_(virtual_std / sigma, init_fn_.gain_init)
    return True


def check_init_config(
    name: str,
    sigma: Any = None,
    backbone: Any = "he",
    gain_init: Any = "method",
    init_div_is_residual: Any = True,
    **kwargs: Any,
) -> None:
    """Refuse a `model.init_config` of `wesar_` or `he_init_` that is wrong or has keys that would change nothing.

    Args:
        name: The init function.
        sigma: As for `wesar_`.
        backbone: As for `wesar_`.
        gain_init: As for `wesar_`.
        init_div_is_residual: As for `residual_divisor`.
        **kwargs: Everything else; foundry fills in its defaults for all init functions, and those pass.

    Raises:
        ValueError: If a key is unknown or a value is not among those that it may have.
    """
    residual_divisor(init_div_is_residual, 1)
    known = {"init_div_is_residual"}
    if name == "wesar_":
        known |= {"sigma", "backbone", "gain_init"}
        if not is_number(sigma) or not 0 < sigma < math.inf:
            raise ValueError(
                f"model.init_config.sigma: {sigma!r} is not a positive number; the paper's is 0.0063245553 (σ² = 4e-5)."
            )
        for key, value, choices in (("backbone", backbone, Backbone), ("gain_init", gain_init, GainInit)):
            if value not in get_args(choices):
                raise ValueError(f"model.init_config.{key}: {value!r} is not one of {', '.join(get_args(choices))}.")
    elif sigma is not None:
        kwargs["sigma"] = sigma
    for key, value in kwargs.items():
        if key not in init_config_defaults or value != init_config_defaults[key]:
            raise ValueError(
                f"model.init_config.{key}: {value!r} is not used by {name}; remove it. "
                f"Known keys: {', '.join(sorted(known))}."
            )


def wesar_(
    module: nn.Module,
    n_layers: int,
    d_model: int,
    sigma: float | None = None,
    backbone: Backbone = "he",
    gain_init: GainInit = "method",
    init_div_is_residual: int | float | bool = True,
    **kwargs: Any,
) -> None:
    r"""Start every actual weight at one σ and let its gate carry the scale (Nishida et al. 2024, section 4.1, Table 1).

    :math:`W_\bullet \sim N(0, \sigma^2)`, :math:`\alpha_\bullet = \sigma_\bullet/\sigma` with `backbone_std` for σ_•,
    and σ_e = 1 (embedding scaling). The gains of weight normalisation and σReparam start where those methods say (the
    rows' norms; 1), unless `gain_init` is `backbone`. Biases are 0, norm weights 1.

    Args:
        module: The module whose own parameters are to be written.
        n_layers: N.
        d_model: d.
        sigma: σ; √4e-5 ≈ 0.0063245553 in the paper.
        backbone: `he` (the paper's choice) or `small`.
        gain_init: `method` or `backbone`.
        init_div_is_residual: As in foundry: True divides σ_o and σ_d by √2N, a number by that, False by nothing.
        **kwargs: Foundry's other defaults of `model.init_config`, accepted only at their default.

    Raises:
        ValueError: If a key is unknown, σ is missing or not positive, or a matrix has no gate or no role.
    """
    kwargs.pop("name", None)
    check_init_config("wesar_", sigma, backbone, gain_init, init_div_is_residual, **kwargs)
    assert sigma is not None
    init = MatrixInit(backbone, d_model, float(sigma), gain_init)
    generic_param_init_fn_(module, init, n_layers, d_model, init_div_is_residual)


def he_init_(
    module: nn.Module,
    n_layers: int,
    d_model: int,
    init_div_is_residual: int | float | bool = True,
    **kwargs: Any,
) -> None:
    r"""He initialisation of plain layers as the paper has it (Table 1).

    :math:`W_\bullet \sim N(0, \text{gain}^2/d_\text{in})`, σ_o and σ_d divided by √2N. Unlike foundry's
    `kaiming_normal_` it has the gain √2 for W_d alone. W_e is drawn with √(1/d), like the others; embedding scaling is
    `model.embedding_scaling`.

    Args:
        module: The module whose own parameters are to be written.
        n_layers: N.
        d_model: d.
        init_div_is_residual: As in foundry: True divides σ_o and σ_d by √2N, a number by that, False by nothing.
        **kwargs: Foundry's other defaults of `model.init_config`, accepted only at their default.

    Raises:
        ValueError: If a key is unknown, or a matrix is reparameterised or has no role.
    """
    kwargs.pop("name", None)
    check_init_config("he_init_", init_div_is_residual=init_div_is_residual, **kwargs)
    generic_param_init_fn_(module, MatrixInit("he", d_model), n_layers, d_model, init_div_is_residual)
