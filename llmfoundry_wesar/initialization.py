"""Initialise each matrix with its standard deviation σ_•.

Foundry calls a *param init function* (`model.init_config.name`) on every module. `generic_param_init_fn_` then tries
the *module init functions* until one handles the module. `init_matrix` is ours. It handles reparameterised layers, and
under the param init functions of this file plain matrices too. Foundry's own module init functions handle the norms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from llmfoundry.models.layers.attention import GroupedQueryAttention
from llmfoundry.models.layers.ffn import MPTMLP
from llmfoundry.models.utils.config_defaults import init_config_defaults
from llmfoundry.models.utils.param_init_fns import generic_param_init_fn_, summon_dtensor
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmfoundry_wesar.keys import is_number
from llmfoundry_wesar.layers import GainInit, Reparameterized, ScaledEmbedding
from llmfoundry_wesar.roles import ROLES, Role, find_role

Backbone = Literal["he", "small"]
# The backbones of the init functions for plain layers. `small_init_` is foundry's.
BACKBONES: dict[str, Backbone] = {"he_init_": "he", "small_init_": "small"}


def activation_gain(activation: str, key: str = "model.ffn_config.ffn_act_fn.name") -> float:
    """Return He's gain of an activation function from `torch.nn.init.calculate_gain`: √2 = 1/√E[f(z)²] for the ReLU.

    GELU, SiLU and Mish have the gain of the ReLU, as in the paper (Table 1, footnote 2). In a GLU the activation is
    multiplied by an independent factor of unit variance, which does not change the gain.

    Args:
        activation: Its name in `torch.nn.functional` or in transformers, which has several names for the GELU.
        key: The config's key for the activation, for the error message.

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
    """Set the attribute `role` of every linear layer and embedding in `module` whose name has a role.

    Args:
        module: A model, a block, or the parent of a matrix.
        activation: The activation in front of W_d.
    """
    for name, child in module.named_modules():
        role = find_role(name)
        if role is not None and isinstance(child, nn.Linear | nn.Embedding):
            if role.name == "W_d":
                role = replace(role, activation=activation)
            child.role = role  # type: ignore[assignment]


def backbone_std(role: Role, backbone: Backbone, fan_in: int, d_model: int, div_is_residual: float) -> float:
    r"""Return σ_•, the initial standard deviation of a matrix (Table 1, columns He and Small).

    He: :math:`\text{gain}/\sqrt{d_\text{in}}`. Small: :math:`\sqrt{2/5d}`. Both are divided by `div_is_residual` if the
    output is added to the residual stream. The value for W_e is without embedding scaling.

    Args:
        role: The role of the matrix.
        backbone: `he` or `small`.
        fan_in: d_in, the number of input features, as `fan_in` returns it.
        d_model: d, the model's width.
        div_is_residual: √2N in the paper.

    Raises:
        ValueError: If no gain is known for He.
    """
    std = activation_gain(role.activation) / math.sqrt(fan_in) if backbone == "he" else math.sqrt(2 / (5 * d_model))
    return std / div_is_residual if role.residual else std


def embedding_std(init_config: Mapping[str, Any], d_model: int) -> float | None:
    """Return σ_e of a plain embedding under `model.init_config`, or None if the init function is not known.

    Raises:
        ValueError: As in `check_embedding_init`.
    """
    check_embedding_init(init_config)
    if (std := init_config.get("emb_init_std")) is not None:
        return std
    if (limit := init_config.get("emb_init_uniform_lim")) is not None:
        low, high = limit if isinstance(limit, Sequence) else (-limit, limit)
        return (high - low) / math.sqrt(12)
    backbone = BACKBONES.get(init_config["name"])
    return backbone and backbone_std(ROLES["wte"], backbone, d_model, d_model, 1.0)


def check_embedding_init(init_config: Mapping[str, Any]) -> None:
    """Refuse wrong values of foundry's keys for the initial embedding.

    Raises:
        ValueError: If both keys are set, or a value gives no positive standard deviation.
    """
    std, limit = init_config.get("emb_init_std"), init_config.get("emb_init_uniform_lim")
    if std is not None and not (is_number(std) and std > 0):
        raise ValueError(f"model.init_config.emb_init_std: {std!r} is not a positive number.")
    if limit is None:
        return
    if std is not None:
        raise ValueError(
            f"model.init_config.emb_init_uniform_lim: {limit!r} is not used, because emb_init_std: {std!r} is set; "
            "remove one of them."
        )
    low, high = cast(Any, limit if isinstance(limit, Sequence) and len(limit) == 2 else (0, limit))
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(
            f"model.init_config.emb_init_uniform_lim: {limit!r} is neither a positive number nor a list of a lower and "
            "a higher one."
        )


def fan_in(module: nn.Module) -> int:
    """Return d_in of a matrix: the number of its columns, or of its rows in GPT-2's transposed Conv1D."""
    assert isinstance(module.weight, Tensor)
    return module.weight.size(0 if isinstance(module, Conv1D) else 1)


def residual_divisor(init_div_is_residual: Any, n_layers: int) -> float:
    """Return the divisor of σ_o and σ_d for `model.init_config.init_div_is_residual`.

    It is √2N for true and 1 for false. A number is the divisor itself.

    Raises:
        ValueError: If it is neither a boolean nor a positive number.
    """
    if isinstance(init_div_is_residual, bool):
        return math.sqrt(2 * n_layers) if init_div_is_residual else 1.0
    if not is_number(init_div_is_residual) or init_div_is_residual <= 0:
        raise ValueError(
            f"model.init_config.init_div_is_residual: {init_div_is_residual!r} is neither a boolean nor a positive "
            "number; the paper's value is true, which gives √2N."
        )
    return float(init_div_is_residual)


@dataclass(frozen=True)
class MatrixInit:
    """The rule that initialises the matrices. `generic_param_init_fn_` passes it to `init_matrix` as `init_fn_`.

    Attributes:
        backbone: The rule for σ_•.
        d_model: d.
        sigma: The common σ of all actual weights, or None for plain layers, which start with σ_•.
        gain_init: `method` gives the gate its method's initial value; `backbone` gives the virtual weight σ_•.
    """

    backbone: Backbone
    d_model: int
    sigma: float | None = None
    gain_init: GainInit = "method"

    def __call__(self, weight: Tensor) -> None:
        """Refuse a matrix without a role. Foundry calls this for matrices that `init_matrix` does not handle."""
        raise ValueError(
            f"model.init_config initialises each matrix by its role, and one of shape {tuple(weight.shape)} has none. "
            "Set `model.name: wesar_mpt_causal_lm`, and `model.ffn_config.ffn_type` to mptmlp or mptglu."
        )


def _stock_role(module: nn.Module, d_model: int) -> Role | None:
    """Return the role of a matrix of foundry's own MPT, whose init functions get the module but not its name.

    Foundry marks the layers whose output is added to the residual stream. Of these, W_o has d input features and W_d
    has more. All other linear layers have one rule, so they can share a role.

    Raises:
        ValueError: If the number of input features does not distinguish W_o from W_d, or the gain of W_d is not √2.
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
            wrong = "model.expansion_ratio: W_d has as many input features as W_o"
        activation = getattr(module.act, "func", module.act).__name__
        if activation_gain(activation) != activation_gain("gelu"):
            wrong = f"model.ffn_config.ffn_act_fn.name: {activation} does not have the gain of the GELU"
    if wrong and not any(hasattr(child, "role") for child in module.children()):
        raise ValueError(f"{wrong}. Under mpt_causal_lm he_init_ does not support this; use wesar_mpt_causal_lm.")
    return None


@summon_dtensor
def init_matrix(
    module: nn.Module, init_fn_: Any, div_is_residual: float = 1.0, emb_init_std: float | None = None, **_: Any
) -> bool:
    """Initialise a matrix by its role.

    Returns:
        Whether it handled the module. Under foundry's own param init functions it handles none.

    Raises:
        ValueError: If the layer needs another init function, or the role of a matrix is not known.
    """
    if not isinstance(init_fn_, MatrixInit):
        if isinstance(module, Reparameterized):
            raise ValueError(
                f"model.init_config.name is a plain init function, which does not initialise the gate of "
                f"{type(module).__name__}. Set `model.init_config: {{name: wesar_, sigma: 0.0063245553}}` "
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
        name, kind = ("he_init_", "plain") if sigma is None else ("wesar_", "reparameterised")
        raise ValueError(
            f"model.init_config.name: {name} is for {kind} layers, and {type(module).__name__} is not one. Set "
            f"`model.fc_type: {{name: {'torch' if sigma is None else 'wesar'}}}`, or `model.init_config.name: "
            f"{'wesar_' if sigma is None else 'he_init_'}`."
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
        # Embedding scaling: the embedding's output starts with variance 1 under both backbones.
        virtual_std = 1.0 / module.scale if isinstance(module, ScaledEmbedding) else std
        module.start_gate_(virtual_std / sigma, init_fn_.gain_init)
    return True


def check_init_config(name: str, init_div_is_residual: Any = True, **options: Any) -> None:
    """Refuse a `model.init_config` of `wesar_` or `he_init_` with a wrong value or a key that it does not use.

    Args:
        name: The init function.
        init_div_is_residual: As for `residual_divisor`.
        **options: All other keys. Foundry's keys are accepted if they have foundry's default value, and the keys of the
            other function if they are null.

    Raises:
        ValueError: If a key is unknown or a value is not allowed.
    """
    residual_divisor(init_div_is_residual, 1)
    own = ("sigma", "backbone", "gain_init") if name == "wesar_" else ("emb_init_std",)
    if name == "wesar_":
        sigma: Any = options.get("sigma")
        if not is_number(sigma) or sigma <= 0:
            raise ValueError(
                f"model.init_config.sigma: {sigma!r} is not a positive number; the paper's is 0.0063245553 (σ² = 4e-5)."
            )
        for key, choices in (("backbone", Backbone), ("gain_init", GainInit)):
            if (value := options.get(key, get_args(choices)[0])) not in get_args(choices):
                raise ValueError(f"model.init_config.{key}: {value!r} is not one of {', '.join(get_args(choices))}.")
    else:
        check_embedding_init({"emb_init_std": options.get("emb_init_std")})
    for key, value in options.items():
        if key in own or value is None or init_config_defaults.get(key) == value:
            continue
        raise ValueError(
            f"model.init_config.{key}: {value!r} is not used by {name}; remove it. "
            f"Known keys: {', '.join(sorted((*own, 'init_div_is_residual')))}."
        )


def check_tied_embedding(emb_init_std: Any, d_model: int, untie: str) -> None:
    """Refuse a standard deviation of tied embeddings that is too large for W_p.

    The output of the final norm has the norm √d. So the logits start with a standard deviation of `emb_init_std` × √d,
    and the logit of the input token is far larger: with `emb_init_std` 1 and d = 768 the initial loss is 724.

    Args:
        emb_init_std: As for `he_init_`.
        d_model: d.
        untie: The config's key that unties the embeddings, for the error message.

    Raises:
        ValueError: If the initial logits would have a standard deviation above 4.
    """
    if is_number(emb_init_std) and emb_init_std * math.sqrt(d_model) > 4:
        raise ValueError(
            f"model.init_config.emb_init_std: {emb_init_std!r} is also the standard deviation of W_p, because the "
            f"embeddings are tied. That of the initial logits would be {emb_init_std * math.sqrt(d_model):.3g}. "
            f"Set it to null, or set `{untie}: false`."
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
    r"""Initialise all actual weights with one σ and the gates with σ_•/σ (Nishida et al. 2024, section 4.1, Table 1).

    :math:`W_\bullet \sim N(0, \sigma^2)`, :math:`\alpha_\bullet = \sigma_\bullet/\sigma` with `backbone_std` for σ_•,
    and σ_e = 1 (embedding scaling). Gates of weight normalisation start at the norms of the rows and gates of σReparam
    at 1, unless `gain_init` is `backbone`. Biases start at 0, and the weights of norms at 1.

    Args:
        module: The module whose own parameters are initialised.
        n_layers: N.
        d_model: d.
        sigma: σ; √4e-5 ≈ 0.0063245553 in the paper.
        backbone: `he` (the paper's choice) or `small`.
        gain_init: `method` or `backbone`.
        init_div_is_residual: As in foundry, the divisor of σ_o and σ_d: a number, √2N if True, 1 if False.
        **kwargs: Foundry's other keys of `model.init_config`, accepted at their default only.

    Raises:
        ValueError: If a key is unknown, σ is missing or not positive, or a matrix has no gate or no role.
    """
    kwargs.pop("name", None)
    check_init_config("wesar_", init_div_is_residual, sigma=sigma, backbone=backbone, gain_init=gain_init, **kwargs)
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
    r"""Initialise plain layers by He's rule as in the paper (Table 1).

    :math:`W_\bullet \sim N(0, \text{gain}^2/d_\text{in})`; σ_o and σ_d are divided by √2N. The gain is √2 for W_d and 1
    for all other matrices; foundry's `kaiming_normal_` has one gain for all. The standard deviation of embeddings is
    √(1/d) unless `emb_init_std` is set. Embedding scaling has its own key, `model.embedding_scaling`.

    This works for foundry's own `mpt_causal_lm` too, except for its untied `lm_head`. Foundry builds it after the init
    function has run, so with `init_device: cpu` or `mixed` it keeps torch's default, a standard deviation of √(1/3d).

    Args:
        module: The module whose own parameters are initialised.
        n_layers: N.
        d_model: d.
        init_div_is_residual: As in foundry, the divisor of σ_o and σ_d: a number, √2N if True, 1 if False.
        emb_init_std: As in foundry: the standard deviation of W_e and of learned positions. WeSaR's is 1.
        **kwargs: Foundry's other keys of `model.init_config`, accepted at their default only.

    Raises:
        ValueError: If a key is unknown, a matrix is reparameterised, or the role of a matrix is not known.
    """
    kwargs.pop("name", None)
    check_init_config("he_init_", init_div_is_residual, emb_init_std=emb_init_std, **kwargs)
    generic_param_init_fn_(module, MatrixInit("he", d_model), n_layers, d_model, init_div_is_residual, emb_init_std)
