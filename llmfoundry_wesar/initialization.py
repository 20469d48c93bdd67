"""Which standard deviation each matrix should start at (σ_•), and the functions that put it there.

Foundry calls a *param init function* (`model.init_config.name`) on every module; `generic_param_init_fn_` passes it on
to the first of the *module init functions* that takes the module. Ours, `init_matrix`, takes every reparameterised
layer and, under the init functions of this module, every matrix; norms are left to foundry's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from llmfoundry.models.layers.attention import GroupedQueryAttention
from llmfoundry.models.layers.ffn import MPTMLP
from llmfoundry.models.utils.config_defaults import init_config_defaults
from llmfoundry.models.utils.param_init_fns import generic_param_init_fn_, summon_dtensor
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmfoundry_wesar.layers import GainInit, Reparameterized, ScaledEmbedding
from llmfoundry_wesar.roles import ROLES, Role, find_role

Backbone = Literal["he", "small"]
# The backbone of the init functions for plain layers; `small_init_` is foundry's own.
BACKBONES: dict[str, Backbone] = {"he_init_": "he", "small_init_": "small"}


def activation_gain(activation: str, key: str = "model.ffn_config.ffn_act_fn.name") -> float:
    """He's gain of an activation function, as `torch.nn.init.calculate_gain` has it: 1/√E[f(z)²] = √2 for the ReLU.

    The smooth relatives of the ReLU get its √2, as in the paper (Table 1, footnote 2). A GLU multiplies the activation
    by an independent factor of unit variance, which leaves the gain as it is.

    Args:
        activation: A name in `torch.nn.functional`, or in transformers, which has several for the GELU.
        key: The key of the config that names the activation, for the error.

    Raises:
        ValueError: If no gain is known for it.
    """
    smooth = str(activation).startswith("gelu") or activation in ("quick_gelu", "silu", "swish", "mish")
    try:
        return nn.init.calculate_gain("relu" if smooth else activation)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{key}: no He gain is known for {activation!r}; "
            "use one of gelu, quick_gelu, silu, mish, relu, leaky_relu, selu, tanh, sigmoid."
        ) from error


def assign_roles(module: nn.Module, activation: str = "gelu") -> None:
    """Give every matrix below `module` whose name has one its `role` attribute.

    Args:
        module: A model, a block, or a single matrix under its own name's parent.
        activation: The activation in front of W_d.
    """
    for name, child in module.named_modules():
        role = find_role(name)
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


def embedding_std(init_config: Mapping[str, Any], d_model: int) -> float | None:
    """Return σ_e of a plain embedding, as `model.init_config` has it drawn, or None where that does not tell it."""
    if std := init_config.get("emb_init_std"):
        return std
    if (limit := init_config.get("emb_init_uniform_lim")) is not None:
        low, high = limit if isinstance(limit, Sequence) else (-limit, limit)
        return (high - low) / math.sqrt(12)
    backbone = BACKBONES.get(init_config["name"])
    return backbone and backbone_std(ROLES["wte"], backbone, d_model, d_model, 1.0)


def is_number(value: Any) -> bool:
    """Whether a value of a config is a number; Python takes a boolean for one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def fan_in(module: nn.Module) -> int:
    """Return d_in of a matrix: its columns, or its rows in GPT-2's transposed Conv1D."""
    assert isinstance(module.weight, Tensor)
    return module.weight.size(0 if isinstance(module, Conv1D) else 1)


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
            "set `model.name: wesar_mpt_causal_lm`, and `model.ffn_config.ffn_type` to mptmlp or mptglu."
        )


def _stock_role(module: nn.Module, d_model: int) -> Role | None:
    """Return the role of a matrix of foundry's own MPT, whose init functions see a module without its name.

    Foundry marks the outputs to the residual stream. Of these, W_o takes d features and W_d takes more. All other
    matrices of a plain model have one rule.

    Raises:
        ValueError: If the module shows that this does not tell W_o from W_d, or that W_d's gain is not √2.
    """
    if isinstance(module, nn.Embedding):
        return ROLES["wte"]
    if isinstance(module, nn.Linear):
        if not getattr(module, "_is_residual", False):
            return ROLES["up_proj"]
        return ROLES["out_proj"] if module.in_features == d_model else replace(ROLES["down_proj"], activation="gelu")
    wrong = None
    if isinstance(module, GroupedQueryAttention) and module.out_proj.in_features != d_model:
        wrong = "model.head_dim: n_heads × head_dim is not d_model"
    if isinstance(module, MPTMLP):
        if module.down_proj.in_features == d_model:
            wrong = "model.expansion_ratio: W_d is as wide as W_o"
        activation = getattr(module.act, "func", module.act).__name__
        if activation_gain(activation) != activation_gain("gelu"):
            wrong = f"model.ffn_config.ffn_act_fn.name: {activation} has not the gain of the GELU"
    if wrong and not any(hasattr(child, "role") for child in module.children()):
        raise ValueError(f"{wrong}, which the init function of mpt_causal_lm cannot see: use wesar_mpt_causal_lm.")
    return None


@summon_dtensor
def init_matrix(
    module: nn.Module, init_fn_: Any, div_is_residual: float = 1.0, emb_init_std: float | None = None, **_: Any
) -> bool:
    """Initialise a matrix by its role, and refuse a reparameterised layer to every plain init function.

    Returns:
        Whether it took the module; under foundry's own init functions it takes none.

    Raises:
        ValueError: If layer and init function do not belong together, or the role of a matrix cannot be known.
    """
    if not isinstance(init_fn_, MatrixInit):
        if isinstance(module, Reparameterized):
            raise ValueError(
                f"model.init_config.name is a plain init function, which leaves the gate of {type(module).__name__} as "
                "it is: set `model.init_config: {name: wesar_, sigma: 0.0063245553, backbone: he}`, "
                "or `model.fc_type: torch`."
            )
        return False
    sigma = init_fn_.sigma
    role: Role | None = getattr(module, "role", None)
    if role is None and sigma is None:
        role = _stock_role(module, init_fn_.d_model)
    if role is None:
        return False
    if (sigma is not None) != isinstance(module, Reparameterized):
        raise ValueError(
            f"model.init_config.name: wesar_ is for reparameterised layers and he_init_ for plain ones, and "
            f"{type(module).__name__} is not: set `model.fc_type: {{name: {'torch' if sigma is None else 'wesar'}}}`, "
            f"or `model.init_config.name: {'wesar_' if sigma is None else 'he_init_'}`."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    std = backbone_std(role, init_fn_.backbone, fan_in(module), init_fn_.d_model, div_is_residual)
    if isinstance(module, nn.Embedding) and emb_init_std is not None:
        std = emb_init_std
    nn.init.normal_(weight, std=std if sigma is None else sigma)
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            with torch.no_grad():
                weight[module.padding_idx].fill_(0)
    elif isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)
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
    emb_init_std: Any = None,
    **kwargs: Any,
) -> None:
    """Refuse a `model.init_config` of `wesar_` or `he_init_` that is wrong or has keys that would change nothing.

    Args:
        name: The init function.
        sigma: As for `wesar_`.
        backbone: As for `wesar_`.
        gain_init: As for `wesar_`.
        init_div_is_residual: As for `residual_divisor`.
        emb_init_std: As for `he_init_`.
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
        unused = {"emb_init_std": emb_init_std}
    else:
        known |= {"emb_init_std"}
        if emb_init_std is not None and (not is_number(emb_init_std) or not 0 < emb_init_std < math.inf):
            raise ValueError(f"model.init_config.emb_init_std: {emb_init_std!r} is not a positive number.")
        unused = {"sigma": sigma}
    kwargs |= {key: value for key, value in unused.items() if value is not None}
    for key, value in kwargs.items():
        if key not in init_config_defaults or value != init_config_defaults[key]:
            raise ValueError(
                f"model.init_config.{key}: {value!r} is not used by {name}; remove it. "
                f"Known keys: {', '.join(sorted(known))}."
            )


def check_tied_embedding(emb_init_std: Any, d_model: int, untie: str) -> None:
    """Refuse a standard deviation of W_e at which W_p, if it is the same matrix, would make huge logits.

    The final norm's output has a norm of √d, so that logits start with `emb_init_std` × √d, and far above that for the
    token that was read last: with a standard deviation of 1, d = 768 starts at a loss of 724.

    Args:
        emb_init_std: As for `he_init_`.
        d_model: d.
        untie: The key of the config that unties the two, for the error.

    Raises:
        ValueError: If logits would start with a standard deviation above 4.
    """
    if is_number(emb_init_std) and emb_init_std * math.sqrt(d_model) > 4:
        raise ValueError(
            f"model.init_config.emb_init_std: {emb_init_std!r} is also the standard deviation of W_p, since the "
            f"embeddings are tied, and would start logits at {emb_init_std * math.sqrt(d_model):.3g}: "
            f"set it to null, or `{untie}: false`."
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
    emb_init_std: float | None = None,
    **kwargs: Any,
) -> None:
    r"""He initialisation of plain layers as the paper has it (Table 1).

    :math:`W_\bullet \sim N(0, \text{gain}^2/d_\text{in})`, σ_o and σ_d divided by √2N. Unlike foundry's
    `kaiming_normal_` it has the gain √2 for W_d alone. Embeddings are drawn with √(1/d), like the others, unless
    `emb_init_std` is set; embedding scaling by a constant is `model.embedding_scaling`.

    Foundry's own `mpt_causal_lm` works too. Its untied `lm_head` is built after the init function has run, so that with
    `init_device: cpu` or `mixed` it keeps torch's default, a standard deviation of √(1/3d).

    Args:
        module: The module whose own parameters are to be written.
        n_layers: N.
        d_model: d.
        init_div_is_residual: As in foundry: True divides σ_o and σ_d by √2N, a number by that, False by nothing.
        emb_init_std: As in foundry: the standard deviation of W_e, and of learned positions; 1 with gates in the
            optimizer.
        **kwargs: Foundry's other defaults of `model.init_config`, accepted only at their default.

    Raises:
        ValueError: If a key is unknown, or a matrix is reparameterised or its role cannot be known.
    """
    kwargs.pop("name", None)
    check_init_config("he_init_", init_div_is_residual=init_div_is_residual, emb_init_std=emb_init_std, **kwargs)
    generic_param_init_fn_(module, MatrixInit("he", d_model), n_layers, d_model, init_div_is_residual, emb_init_std)
