"""`wesar_hf_causal_lm`: foundry's `hf_causal_lm` with initialisation by role and with z-loss.

The layers are those of transformers, so WeSaR's gates have to be in the optimizer: `optimizer.name: wesar_adamw`.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmfoundry.models.hf import ComposerHFCausalLM
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.initialization import (
    BACKBONES,
    Backbone,
    MatrixInit,
    activation_gain,
    check_init_config,
    check_tied_embedding,
    init_matrix,
    residual_divisor,
)
from llmfoundry_wesar.keys import arguments, did_you_mean, is_number
from llmfoundry_wesar.losses import IGNORE_INDEX
from llmfoundry_wesar.roles import BY_NAME, find_role

# Names of the activation in front of W_d in the configs of transformers.
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def _activation(config: PretrainedConfig, backbone: Backbone) -> str:
    """Return the name of the activation in front of W_d. With backbone `he` it must have a known gain."""
    for key in _ACTIVATIONS:
        if name := getattr(config, key, None):
            if backbone == "he":
                activation_gain(name, f"model.config_overrides.{key}")
            return name
    return "gelu"


def assign_hf_roles(model: nn.Module, roles: Mapping[str, str], activation: str) -> bool:
    """Set the attribute `role` of every module of a Hugging Face decoder that has a matrix.

    If two modules share a matrix, only the first gets a role: the embedding, if W_e and W_p are tied.

    Args:
        model: The decoder.
        roles: `model.init_config.roles`: from the end of a module's path (one or two names) to the name of a role.
        activation: The activation in front of W_d.

    Returns:
        Whether W_e and W_p are one matrix.

    Raises:
        ValueError: If a matrix has no role, or an entry of `roles` fits no module or has an unknown role.
    """
    for name, role in roles.items():
        if role not in BY_NAME:
            raise ValueError(f"model.init_config.roles.{name}: {role!r} is not one of {', '.join(BY_NAME)}.")
    own, unused, seen, tied = {name: BY_NAME[role] for name, role in roles.items()}, set(roles), set(), False
    for path, module in model.named_modules():
        shapes = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.ndim > 1}
        if not shapes:
            continue
        unused = {name for name in unused if not f".{path}".endswith(f".{name}")}
        role = find_role(path, own) or find_role(path)
        if role is None or list(shapes) != ["weight"] or len(shapes["weight"]) != 2:
            held = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
            raise ValueError(
                f"model.init_config.roles: {path} ({type(module).__name__}: {held}) has no known role; "
                f"if it is one matrix, give its role: `roles: {{{path.rpartition('.')[2]}: W_u}}`, "
                f"with one of {', '.join(BY_NAME)}."
            )
        if id(module.weight) in seen:
            tied = True
            continue
        seen.add(id(module.weight))
        module.role = replace(role, activation=activation) if role.name == "W_d" else role  # type: ignore[assignment]
    if unused:
        raise ValueError(
            f"model.init_config.roles: no path of a matrix ends with {', '.join(sorted(unused))}; remove it."
        )
    return tied


def role_init(model: PreTrainedModel, init_config: Mapping[str, Any]) -> Callable[[nn.Module], None]:
    r"""Assign the roles of a Hugging Face decoder, and return the function that initialises its modules by role.

    :math:`W_\bullet \sim N(0, \sigma_\bullet^2)` with `backbone_std` for σ_•. N and d are those of the model's config.
    Biases start with 0 and norms with 1. Norms of Gemma, which multiply by 1 + weight, start with 0.

    Args:
        model: The decoder. This function does not change its parameters.
        init_config: The section `model.init_config`; see `ComposerWeSaRHFCausalLM`.

    Raises:
        ValueError: If the section is wrong, a matrix has no role, or W_e's scale is too large for tied embeddings.
    """
    options = {"roles": {}, **init_config}
    name, roles = options.get("name"), options.pop("roles")
    if name not in BACKBONES:
        raise ValueError(
            f"model.init_config.name: {name!r} is not one of {', '.join(BACKBONES)}, which initialise the plain layers "
            "of a Hugging Face model. For gates set `optimizer.name: wesar_adamw`."
        )
    if not isinstance(roles, Mapping):
        raise ValueError(f"model.init_config.roles: {roles!r} is not a mapping; write `roles: {{my_proj: W_u}}`.")
    check_init_config(**options)
    backbone, config, std = BACKBONES[name], model.config, options.get("emb_init_std")
    if assign_hf_roles(model, roles, _activation(config, backbone)):
        check_tied_embedding(std, config.hidden_size, "model.config_overrides.tie_word_embeddings")
    divisor = residual_divisor(options.get("init_div_is_residual", True), config.num_hidden_layers)
    init = MatrixInit(backbone, config.hidden_size)

    def initialize(module: nn.Module) -> None:
        if hasattr(module, "role"):
            init_matrix(module, init, divisor, std)
            return
        one = 0.0 if type(module).__name__.startswith("Gemma") else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.constant_(parameter, one if name == "weight" else 0.0)

    return initialize


class ComposerWeSaRHFCausalLM(ComposerHFCausalLM):
    r"""The model that foundry builds for `model.name: wesar_hf_causal_lm`.

    With `pretrained: false` each matrix is initialised by its role, which follows from its module's name
    (`roles.ROLES`). With `pretrained: true` nothing is initialised. W_q, W_k and W_v in one matrix are initialised as
    three matrices would be. Tied embeddings are initialised as W_e; leave `emb_init_std` at its default for them.

    Args:
        tokenizer: As for foundry.
        pretrained_model_name_or_path: As for foundry: a name on the Hub, or a local folder with a `config.json`.
        pretrained: As for foundry.
        init_config: How to initialise a model that is not pretrained.
            `name`: `he_init_` or `small_init_`.
            `emb_init_std`: Standard deviation of W_e and of learned positions. By default W_q's; WeSaR's value is 1.
            `init_div_is_residual`: As in foundry, the divisor of σ_o and σ_d: a number, √2N if true, 1 if false.
            `roles`: For modules with unknown names: the end of the module's path and its role, as `{my_proj: W_u}`.
        z_loss: Coefficient of the mean squared log-partition added to the loss (paper, Table 3: 1e-4).
        **kwargs: The other keys of `hf_causal_lm`, with the same meaning.

    Raises:
        ValueError: If a key is unknown or wrong, or the role of a matrix is not known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pretrained_model_name_or_path: str,
        pretrained: bool = True,
        init_config: Mapping[str, Any] | None = None,
        z_loss: float = 0.0,
        **kwargs: Any,
    ):
        check_hf_keys({**kwargs, "pretrained": pretrained, "init_config": init_config, "z_loss": z_loss})
        super().__init__(tokenizer, pretrained_model_name_or_path, pretrained, **kwargs)
        self.z_loss = z_loss
        if pretrained:
            if init_config is not None:
                warnings.warn(
                    "model.init_config is not used, because model.pretrained is true, which is the default. To train "
                    "from scratch, set it to false.",
                    stacklevel=2,
                )
            return
        assert init_config is not None
        initialize = role_init(self.model, init_config)
        for module in self.model.modules():
            if hasattr(module, "role"):
                initialize(module)
        # Ranks that have the model on the meta device call this, also for the norms.
        self.model.param_init_fn = initialize  # type: ignore[assignment]

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor] | Tensor:
        """Return the loss of a microbatch; with z-loss a dict of `total`, `loss` and `z_loss`, as in our MPT."""
        loss = super().loss(outputs, batch)
        if not self.z_loss:
            return loss
        lse = outputs["logits"][:, :-1].float().logsumexp(-1)
        unmasked = batch["labels"][:, 1:] != IGNORE_INDEX
        z_loss = self.z_loss * (lse.square() * unmasked).sum() / unmasked.sum().clamp(min=1)
        return {"total": loss + z_loss, "loss": loss.detach(), "z_loss": z_loss.detach()}


def check_hf_keys(model: Mapping[str, Any]) -> None:
    """Check the `model` section of `wesar_hf_causal_lm`.

    Raises:
        ValueError: If a key is unknown, `init_config` is missing or `z_loss` is not a number.
    """
    known = [*arguments(ComposerHFCausalLM), *arguments(ComposerWeSaRHFCausalLM)]
    for key, value in model.items():
        if key not in known:
            raise ValueError(
                f"model.{key}: {value!r} has no effect, since wesar_hf_causal_lm has no such key; "
                + did_you_mean(key, known, "remove it.")
            )
    z_loss = model.get("z_loss", 0.0)
    if not is_number(z_loss) or z_loss < 0:
        raise ValueError(f"model.z_loss: {z_loss!r} is not a number ≥ 0; the paper's is 1.0e-4.")
    if not model.get("pretrained", True) and not isinstance(model.get("init_config"), Mapping):
        raise ValueError(
            f"model.init_config: {model.get('init_config')!r} is not a mapping, but pretrained: false needs one; write "
            "`init_config: {name: he_init_, emb_init_std: 1.0}`."
        )
