"""`wesar_mpt_causal_lm`: foundry's MPT with the options of the compared methods."""

import functools
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from llmfoundry.layers_registry import fcs, ffns_with_megablocks, param_init_fns
from llmfoundry.models.layers.blocks import MPTBlock
from llmfoundry.models.layers.layer_builders import build_norm
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import ComposerMPTCausalLM, MPTForCausalLM, MPTModel
from llmfoundry.models.utils.config_defaults import init_config_defaults
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.attention import drop_full_mask
from llmfoundry_wesar.initialization import (
    activation_gain,
    assign_roles,
    check_embedding_init,
    check_init_config,
    check_tied_embedding,
    embedding_std,
)
from llmfoundry_wesar.keys import arguments, check_sections, check_values, did_you_mean, is_number
from llmfoundry_wesar.layers import (
    EMBEDDINGS,
    Gated,
    GatedLinear,
    Reparameterized,
    SigmaReparamLinear,
    WeightNormLinear,
)
from llmfoundry_wesar.losses import LossHead, LossLinear, LossTerms, cross_entropy
from llmfoundry_wesar.roles import ROLES
from llmfoundry_wesar.sharded import plain_name, reparameterized_layers

log = logging.getLogger(__name__)

# The functions that initialise each matrix by its role: for reparameterised and for plain layers.
_ROLE_INITS = ("wesar_", "he_init_")

# The keys of a batch that the stock forward uses.
_INPUTS = ("input_ids", "attention_mask", "sequence_id", "inputs_embeds", "position_ids")


class GatedLossHead(LossHead, GatedLinear):
    """`GatedLinear` as a `LossHead`."""


class WeightNormLossHead(LossHead, WeightNormLinear):
    """`WeightNormLinear` as a `LossHead`."""


class SigmaReparamLossHead(LossHead, SigmaReparamLinear):
    """`SigmaReparamLinear` as a `LossHead`, with its power iteration before the fused loss too."""

    def forward(self, input: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor | LossTerms:
        """As `LossHead.forward`."""
        if targets is not None:
            self.step_power_iteration()
        return super().forward(input, targets, z_loss)


_LOSS_HEADS: dict[type[nn.Module], type[LossHead]] = {
    nn.Linear: LossLinear,
    GatedLinear: GatedLossHead,
    WeightNormLinear: WeightNormLossHead,
    SigmaReparamLinear: SigmaReparamLossHead,
}


class WeSaRMPTConfig(MPTConfig):
    """`MPTConfig` with the options of the compared methods.

    Args:
        z_loss: Coefficient of the mean squared log-partition added to the loss (paper, Table 3: 1e-4).
        embedding_scaling: Multiply the embedding's output by the constant 1/σ_e (Takase et al. 2023). In WeSaR this
            factor is in the gate of W_e. If the key is set, that gate starts at 1.
        embedding_norm: Apply a norm of `norm_type` to the embedding's output (Le Scao et al. 2022).
        residual_scaling: Multiply every residual branch by 1/√2N (Noci et al. 2022; paper, appendix C.3).
        norm_placement: `pre`, or `post` for Post-LN.
        fused_loss: In training compute the loss together with the product with W_p, without storing all logits.
        **kwargs: As for `MPTConfig`.

    Raises:
        ValueError: If options exclude each other. The message names key, value and fix.
    """

    def __init__(
        self,
        z_loss: float = 0.0,
        embedding_scaling: bool = False,
        embedding_norm: bool = False,
        residual_scaling: bool = False,
        norm_placement: str = "pre",
        fused_loss: bool = False,
        **kwargs: Any,
    ):
        check_values(kwargs)
        self.z_loss = z_loss
        self.embedding_scaling = embedding_scaling
        self.embedding_norm = embedding_norm
        self.residual_scaling = residual_scaling
        self.norm_placement = norm_placement
        self.fused_loss = fused_loss
        super().__init__(**kwargs)

    @property
    def fc_class(self) -> type[nn.Linear]:
        """The class that `fc_type` names."""
        return fcs.get(self.fc_type["name"])  # type: ignore[return-value]

    @property
    def activation(self) -> str:
        """The name of the feed-forward layer's activation function."""
        return (self.ffn_config.get("ffn_act_fn") or {"name": "gelu"})["name"]

    @property
    def embedding_std(self) -> float:
        """σ_e, the initial standard deviation of the embedding's virtual weight, without embedding scaling."""
        init, fc_class = self.init_config, self.fc_class
        if issubclass(fc_class, Gated):
            return init["sigma"]
        if issubclass(fc_class, Reparameterized):
            shape = (self.vocab_size, self.d_model)
            return fc_class.expected_start(shape, init["sigma"], 1.0, init.get("gain_init", "method"))[1]
        if std := embedding_std(init, self.d_model):
            return std
        raise ValueError(
            f"model.embedding_scaling: true needs σ_e, which is not known for model.init_config.name: {init['name']}. "
            "Set model.init_config.emb_init_std, or use small_init_, he_init_ or wesar_."
        )

    def _check_fc_options(self) -> None:
        """Refuse an option that the class of `fc_type` does not have. Classes of other packages are not checked."""
        if self.fc_class in EMBEDDINGS:
            known = {*arguments(self.fc_class)} - {*arguments(nn.Linear)}
            for key in self.fc_type.keys() - known - {"name", "bias", "device"}:
                raise ValueError(
                    f"model.fc_type.{key}: {self.fc_type[key]!r} is not an option of {self.fc_type['name']}; "
                    f"remove it. The options are: {', '.join(sorted(known)) or 'none'}."
                )

    def _validate_config(self) -> None:
        super()._validate_config()
        for key in ("embedding_scaling", "embedding_norm", "residual_scaling", "fused_loss"):
            if not isinstance(value := getattr(self, key), bool):
                raise ValueError(f"model.{key}: {value!r} is not one of true, false.")
        if not is_number(self.z_loss) or self.z_loss < 0:
            raise ValueError(f"model.z_loss: {self.z_loss!r} is not a number ≥ 0; the paper's is 1.0e-4.")
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f"model.norm_placement: {self.norm_placement!r} is not one of pre, post.")
        if self.norm_placement == "post" and getattr(self, "fuse_norm_attn_norm", False):
            raise ValueError(
                "model.norm_placement: post does not work with fuse_norm_attn_norm: true; set that to false."
            )
        if self.fc_type["name"] not in fcs:
            raise ValueError(
                f"model.fc_type.name: {self.fc_type['name']!r} is not one of {', '.join(sorted(fcs.get_all()))}."
            )
        self._check_fc_options()
        if self.ffn_config["ffn_type"] in ffns_with_megablocks:
            for key in ("z_loss", "fused_loss"):
                if getattr(self, key):
                    raise ValueError(
                        f"model.{key}: {getattr(self, key)} does not work with ffn_type: "
                        f"{self.ffn_config['ffn_type']}, whose loss has a term for the load of its experts; set it to "
                        f"{'0' if key == 'z_loss' else 'false'}."
                    )
        if self.fused_loss:
            for key in ("tie_word_embeddings", "logit_scale", "final_logit_softcapping"):
                if getattr(self, key):
                    raise ValueError(
                        f"model.fused_loss: true does not work with {key}: {getattr(self, key)}; remove one of them."
                    )
            if self.fc_class not in _LOSS_HEADS:
                raise ValueError(
                    f"model.fused_loss: true does not work with fc_type.name: {self.fc_type['name']}; set it to false."
                )
        reparameterized = issubclass(self.fc_class, Reparameterized)
        init = self.init_config["name"]
        if reparameterized and init != "wesar_":
            raise ValueError(
                f"model.init_config.name: {init} does not initialise the gates of model.fc_type.name: "
                f"{self.fc_type['name']}. Set `model.init_config: {{name: wesar_, sigma: 0.0063245553, backbone: he}}`."
            )
        if not reparameterized and init == "wesar_":
            raise ValueError(
                f"model.init_config.name: wesar_ needs layers with gates, and `model.fc_type: {self.fc_type['name']}` "
                "has none. Set `model.fc_type: {name: wesar}`."
            )
        if reparameterized and self.tie_word_embeddings:
            raise ValueError(
                "model.tie_word_embeddings: true would give W_e and W_p the same gate, but they need very different "
                "ones. Set it to false."
            )
        if reparameterized and self.attn_config["fused_qkv"]:
            raise ValueError(
                "model.attn_config.fused_qkv: true would give W_q, W_k and W_v one common gate. Set it to false."
            )
        if self.tie_word_embeddings:
            check_tied_embedding(self.init_config.get("emb_init_std"), self.d_model, "model.tie_word_embeddings")
        if init not in _ROLE_INITS:
            known = {"name", *arguments(param_init_fns.get(init))} - {"module", "n_layers", "d_model"}
            for key, value in self.init_config.items():
                if key not in known and (key not in init_config_defaults or value != init_config_defaults[key]):
                    raise ValueError(f"model.init_config.{key}: {value!r} is not used by {init}; remove it.")
            check_embedding_init(self.init_config)
            return
        check_init_config(**self.init_config)
        if self.init_config.get("backbone", "he") == "he":
            activation_gain(self.activation)
        if self.ffn_config["ffn_type"] not in ("mptmlp", "mptglu"):
            raise ValueError(
                f"model.ffn_config.ffn_type: {self.ffn_config['ffn_type']} has matrices without a known role, which "
                f"{init} needs; use mptmlp or mptglu."
            )
        if self.learned_pos_emb and reparameterized:
            raise ValueError(
                "model.learned_pos_emb: true is not supported with gated layers; the paper uses RoPE. "
                "Set `learned_pos_emb: false` and `attn_config: {rope: true, rope_impl: hf}`."
            )


def check_keys(model: Mapping[str, Any]) -> None:
    """Refuse unknown keys in a YAML's `model` section, which the config class would ignore.

    Raises:
        ValueError: If foundry's model and config classes and `WeSaRMPTConfig` do not know a key, or if options of the
            loss exclude each other.
    """
    own = {*arguments(ComposerMPTCausalLM), *arguments(MPTConfig), *arguments(WeSaRMPTConfig)}
    own.add("fuse_norm_attn_norm")  # foundry's blocks read it, but no signature has it
    known = own | vars(PretrainedConfig()).keys()
    for key, value in model.items():
        if key not in known:
            raise ValueError(
                f"model.{key}: {value!r} has no effect, since wesar_mpt_causal_lm has no such key; "
                + did_you_mean(key, own, "remove it.")
            )
    check_sections(model)
    loss_fn = model.get("loss_fn", "torch_crossentropy")
    if model.get("z_loss") and loss_fn != "torch_crossentropy":
        raise ValueError(f"model.loss_fn: {loss_fn} has no z-loss; set model.loss_fn: torch_crossentropy.")
    if model.get("fused_loss") and model.get("use_train_metrics", True):
        raise ValueError("model.fused_loss: true gives no logits for metrics; set model.use_train_metrics: false.")


class _Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


class PostNormBlock(MPTBlock):
    r"""A block with the norm after the residual connection, :math:`y = \mathrm{LN}(f(x) + x)`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attention_mask: torch.ByteTensor | None = None, output_attentions: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """As `MPTBlock.forward`."""
        optional = ("prev_layer_key_value", "key_value_states", "pos_id_within_seq")
        kwargs = {k: v for k, v in kwargs.items() if k not in optional or v is not None}
        attention, weights, past_key_value = self.attn(
            x, attention_mask=attention_mask, needs_weights=output_attentions, **kwargs
        )
        assert self.norm_2 is not None
        x = self.norm_1(x + self.resid_attn_dropout(attention))
        x = self.norm_2(x + self.resid_ffn_dropout(self.apply_ffn(attention_mask, x)))
        return x, weights, past_key_value


class WeSaRMPTModel(MPTModel):
    """`MPTModel` with the embedding that belongs to `fc_type`, and with the other options of `WeSaRMPTConfig`."""

    config: WeSaRMPTConfig

    def __init__(self, config: WeSaRMPTConfig):
        super().__init__(config)
        # Foundry sets this in the first forward pass, after which torch.compile would compile the whole model again.
        self._attn_bias_initialized = self.attn_bias_shape is None
        if config.norm_placement == "post":
            # The output of the last block is already normalised.
            self.norm_f = nn.Identity()

    @property
    def block_class(self) -> type[MPTBlock]:
        """The class of the blocks, by `norm_placement`."""
        return PostNormBlock if self.config.norm_placement == "post" else MPTBlock

    def construct_blocks(self, config: WeSaRMPTConfig) -> nn.ModuleList:  # type: ignore[override]
        """Build the blocks and replace the stock embedding. This runs before the parameters are initialised."""
        options = {k: v for k, v in config.fc_type.items() if k not in ("name", "bias", "device")}
        self.wte = EMBEDDINGS.get(config.fc_class, EMBEDDINGS[nn.Linear])(
            config.vocab_size,
            config.d_model,
            padding_idx=config.pad_token_id,
            device=config.init_device,
            scale=1 / config.embedding_std if config.embedding_scaling else 1.0,
            **options,
        )
        if config.embedding_norm:
            norm = build_norm(config.norm_type.lower(), config.d_model, config.norm_eps, config.init_device)
            # `optimizer.param_groups` of the settings finds it by the name `norm` and excludes it from weight decay.
            self.emb_drop = nn.Sequential(OrderedDict(norm=norm, dropout=self.emb_drop))
        blocks = super().construct_blocks(config)
        if config.residual_scaling:
            scale = 1 / math.sqrt(2 * config.n_layers)
            for module in list(blocks.modules()):
                for name in ("resid_attn_dropout", "resid_ffn_dropout"):
                    if hasattr(module, name):
                        setattr(module, name, nn.Sequential(getattr(module, name), _Scale(scale)))
        assign_roles(self, config.activation)
        assign_roles(blocks, config.activation)
        return blocks


def _check_gates(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse weights that were saved of layers with other gates. Composer resumes without comparing their names.

    Raises:
        ValueError: If a layer's weight is loaded without its gate or singular vectors, or the model has no such layer.
    """
    leaves = ("gate", "left", "right")  # of `Gated`, `WeightNormalized` and `SpectrallyNormalized`
    own = {plain_name(name): tensor for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    # For what a whole checkpoint lacks, torch's loading under FSDP2 fills in the model's own tensors.
    kept = set(map(id, own.values()))
    saved = {plain_name(name).removeprefix(plain_name(prefix)) for name, t in state_dict.items() if id(t) not in kept}
    pairs = [(name, f"{name}.{leaf}") for name in reparameterized_layers(model) for leaf in leaves]
    lacking = [tensor for name, tensor in pairs if tensor in own and f"{name}.weight" in saved and tensor not in saved]
    surplus = sorted(name for name in saved - own.keys() if name.rpartition(".")[2] in leaves)
    if names := lacking or surplus:
        message = (
            f"load_path: the {'checkpoint' if lacking else 'model'} lacks {len(names)} tensors, such as {names[0]}. "
            "The checkpoint was saved with another variables.method or model.fc_type; set that one. Or convert it: "
            "`llmfoundry-wesar export --format mpt` makes a plain model of it, and `llmfoundry-wesar reparameterize` "
            "makes a gated one of a plain one."
        )
        # Show it at once: if Composer loads on rank 0 only, the others wait for rank 0 until the time-out.
        log.error(message)
        raise ValueError(message)


class WeSaRMPTForCausalLM(MPTForCausalLM):
    """`MPTForCausalLM` whose W_p is a layer of `fc_type`, and is initialised on every device."""

    config_class = WeSaRMPTConfig
    config: WeSaRMPTConfig

    def __init__(self, config: WeSaRMPTConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_check_gates)
        if config.attn_config["rope"]:
            # Foundry makes it a unit of FSDP, though it has no parameters. Every block calls it, and the hooks would
            # break each block's graph under torch.compile.
            self.transformer.rotary_embedding._fsdp_wrap = False  # type: ignore[assignment]
        if self.lm_head is not None:
            options = {**config.fc_type, "bias": False, "device": config.init_device}
            del options["name"]
            head_class = _LOSS_HEADS[config.fc_class] if config.fused_loss else config.fc_class
            self.lm_head = head_class(config.d_model, config.vocab_size, **options)
            self.lm_head._fsdp_wrap = True  # type: ignore[assignment]
            self.lm_head.role = ROLES["lm_head"]  # type: ignore[assignment]
            if config.init_device != "meta":
                self.lm_head.apply(self.param_init_fn)

    @functools.wraps(MPTForCausalLM.forward)  # transformers' generate reads the signature
    def forward(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast | LossTerms:
        """As `MPTForCausalLM.forward`. With `targets` (only under `fused_loss`) it returns the loss, not logits."""
        if targets is None:
            return super().forward(*args, **kwargs)
        assert self.lm_head is not None
        return self.lm_head(self.transformer(*args, **kwargs).last_hidden_state, targets, self.config.z_loss)

    @property
    def backbone_model_class(self) -> type[MPTModel]:
        """The class of `transformer`."""
        return WeSaRMPTModel


class ComposerWeSaRMPTCausalLM(ComposerMPTCausalLM):
    r"""The model that foundry builds for `model.name: wesar_mpt_causal_lm`.

    It has the keys of `mpt_causal_lm` and those of `WeSaRMPTConfig`. With a z-loss the training loss is
    :math:`\mathrm{CE} + c\,\mathrm{mean}(\log^2 Z)` over the tokens with a target, and Composer logs
    `loss/train/total`, `loss/train/loss` (the cross-entropy) and `loss/train/z_loss` (with its coefficient).

    Args:
        tokenizer: Its vocabulary must fit into `vocab_size`.
        loss_fn: As in foundry, but with the default `torch_crossentropy`, which needs no other package.
        **kwargs: `use_train_metrics`, `additional_train_metrics`, and the keys of the config.

    Raises:
        ValueError: If a key is unknown, the tokenizer has more tokens than the embedding has rows, or `loss_fn` has no
            z-loss.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        loss_fn: str | dict = "torch_crossentropy",
        **kwargs: Any,
    ):
        vocab_size = kwargs.get("vocab_size", MPTConfig().vocab_size)
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise ValueError(
                f"model.vocab_size: {vocab_size} is less than the {len(tokenizer)} tokens of the tokenizer. Set it to "
                f"{len(tokenizer)} or more, or train a smaller tokenizer."
            )
        check_keys({"loss_fn": loss_fn, **kwargs})
        super().__init__(tokenizer=tokenizer, loss_fn=loss_fn, **kwargs)
        self.has_megablocks = self.config.ffn_config["ffn_type"] in ffns_with_megablocks

    @property
    def model_class(self) -> type[MPTForCausalLM]:
        """The Hugging Face model inside."""
        return WeSaRMPTForCausalLM

    @property
    def config_class(self) -> type[MPTConfig]:
        """The config of `model_class`."""
        return WeSaRMPTConfig

    def forward(self, batch: MutableMapping) -> CausalLMOutputWithPast | LossTerms:  # type: ignore[override]
        """Return the logits of a microbatch, or in training under `fused_loss` its loss.

        The mask of a microbatch without padding is dropped, because causal attention does not need it.
        """
        batch = drop_full_mask(batch)
        if self.has_megablocks:
            return super().forward(batch)
        # This is what the stock forward does for models without MegaBlocks. The stock forward also looks into a
        # registry, which reads entry points, and dynamo cannot trace that (torch 2.11, Python 3.12).
        inputs = {key: batch.get(key) for key in _INPUTS}
        if self.training and self.config.fused_loss:
            inputs["targets"] = self.get_targets(batch)
        return self.model(**inputs)

    def loss(self, outputs: CausalLMOutputWithPast | LossTerms, batch: Mapping) -> dict[str, Tensor] | Tensor:  # type: ignore[override]
        """Return the loss of a microbatch, as the class describes it."""
        if isinstance(outputs, LossTerms):
            terms = outputs
        elif self.config.z_loss:
            assert isinstance(outputs.logits, Tensor)
            terms = cross_entropy(outputs.logits, self.get_targets(batch), self.config.z_loss)
        else:
            return super().loss(outputs, batch)
        if not self.config.z_loss:
            return terms.total
        return {"total": terms.total, "loss": terms.cross_entropy, "z_loss": terms.z_loss}
