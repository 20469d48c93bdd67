"""Show the initial scale of each matrix of a config's model, without allocating it: `llmfoundry-wesar inspect`."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
import yaml
from llmfoundry.models.mpt import MPTConfig
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from llmfoundry.utils.registry_utils import import_file
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from llmfoundry_wesar.check import check_config, meta_model
from llmfoundry_wesar.hf_model import role_init
from llmfoundry_wesar.initialization import (
    BACKBONES,
    assign_roles,
    backbone_std,
    check_tied_embedding,
    embedding_std,
    fan_in,
    residual_divisor,
)
from llmfoundry_wesar.keys import did_you_mean
from llmfoundry_wesar.layers import Reparameterized, ScaledEmbedding
from llmfoundry_wesar.methods import expand
from llmfoundry_wesar.model import WeSaRMPTConfig
from llmfoundry_wesar.roles import Role


@dataclass(frozen=True)
class Matrix:
    """All matrices of a model with the same role and shape.

    Attributes:
        role: The paper's name.
        shape: (rows, columns).
        count: Number of these matrices.
        layer: Class of their layer.
        virtual_std: σ_•, the initial standard deviation of the virtual weight, with embedding scaling.
        std: σ, the initial standard deviation of the actual weight.
        gate: The initial α. For weight normalisation the expected norm of a row; None without a gate.
        update_ratio: ‖ΔW‖/‖W‖ of Adam's first step at the full learning rate: lr·√n/‖W‖ = lr/σ for n entries. For W_e
            it is an upper bound: rows of tokens that are not in the batch do not move.
    """

    role: str
    shape: tuple[int, int]
    count: int
    layer: str
    virtual_std: float
    std: float
    gate: float | None
    update_ratio: float


@dataclass(frozen=True)
class Inspection:
    """The matrices of a model, and the number of all its parameters."""

    matrices: list[Matrix]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("role", "shape", "count", "layer", "σ_•", "σ", "gate", "lr/σ")
        rows = []
        for m in self.matrices:
            numbers = ["–" if x is None else f"{x:.4g}" for x in (m.virtual_std, m.std, m.gate, m.update_ratio)]
            if m.role == "W_e":
                numbers[-1] = f"≤ {numbers[-1]}"
            rows.append((m.role, f"{m.shape[0]} × {m.shape[1]}", str(m.count), m.layer, *numbers))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        return "\n".join([*lines, "", f"{self.parameters:,} parameters ({self.parameters / 1e6:,.1f}M)"])


def yaml_line(value: Any) -> str:
    """Write plain data as one line of YAML, for an override.

    It has no `$`, because Composer's launcher replaces `$NAME` in its arguments by environment variables.
    """
    line = yaml.safe_dump(value, default_style='"', default_flow_style=True, width=math.inf)  # type: ignore[arg-type]
    return line.rstrip("\n").replace("$", r"\x24")  # a `$` can only be in a quoted string


def _check_comment(override: str) -> None:
    """Refuse an override of which the trainer would read only a part, such as `variables.data=my #1 folder`."""
    key, _, value = override.partition("=")
    value = value.strip()
    try:
        node = yaml.compose(value)
    except yaml.YAMLError as error:  # such as a tab after a number, which OmegaConf removes
        raise ValueError(f"{override}: {error}") from error
    end = 0 if node is None else node.end_mark.index
    if left_out := value[end:].strip():
        raise ValueError(
            f"{override}: YAML takes {left_out!r} for a comment; quote the value: "
            f"{shlex.quote(f'{key}={yaml_line(value)}')}"
        )


# Foundry imports these files too, before it reads the config, since they may register what the config names.
_import_once = cache(import_file)


def load_config(path: str, overrides: list[str] | None = None, check_data: bool = False) -> dict[str, Any]:
    """Read a training YAML as foundry's trainer does, with overrides, interpolations, method and setting.

    Args:
        path: The YAML.
        overrides: key=value, as on the trainer's command line.
        check_data: As for `methods.expand`.

    Raises:
        FileNotFoundError: If there is no such file, or one of its `code_paths` is missing.
        RuntimeError: If the code of one of its `code_paths` fails.
        ValueError: If the file or an override is not YAML or has a comment, or a top-level key, the method or the
            setting is not known.
    """
    OmegaConf.clear_resolver("oc.env")  # as foundry does, so that no YAML reads the environment
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path}: this is not a training YAML, which is a mapping of keys to values.")
    for text in overrides or []:
        if "=" not in text:
            raise ValueError(f"{text!r} is not an override; write key=value.")
        try:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_cli([text]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{text}: {error}") from error
        except TypeError as error:
            raise ValueError(f"{text}: the YAML has a mapping here; write key.subkey=value.") from error
        _check_comment(text)
    for key in loaded:
        if key not in TRAIN_CONFIG_KEYS:
            fix = did_you_mean(str(key), TRAIN_CONFIG_KEYS, "put your own variables under `variables`.")
            raise ValueError(f"{key}: this is not a key of a training config; {fix}")
    for code in OmegaConf.select(loaded, "code_paths") or []:
        _import_once(code)
    try:
        config = expand(OmegaConf.to_container(loaded, resolve=True), check_data, check_keys=False)  # type: ignore[arg-type]
        # As in foundry, after the config transforms too: a `\\${` has become a `${` by now.
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Start:
    """The values that the initial scales depend on.

    Attributes:
        init: `model.init_config`.
        n_layers: N.
        d_model: d.
        embedding_std: σ_e of plain layers.
        output_std: σ_p, if it does not follow from the backbone.
    """

    init: Mapping[str, Any]
    n_layers: int
    d_model: int
    embedding_std: float | None
    output_std: float | None = None


def _start(model: PreTrainedModel, section: Mapping[str, Any]) -> _Start:
    """Check that the model of a config can be initialised by role, give it the roles, and return its start."""
    if section["name"] == "wesar_hf_causal_lm":
        if section.get("pretrained", True):
            raise ValueError(
                "model.pretrained: true is not supported by inspect, which reads no weights; set it to false."
            )
        role_init(model, section["init_config"])
        init, config = section["init_config"], model.config
        return _Start(init, config.num_hidden_layers, config.hidden_size, embedding_std(init, config.hidden_size))
    config = model.config
    assert isinstance(config, MPTConfig)
    init = config.init_config
    if init["name"] not in ("wesar_", *BACKBONES):
        raise ValueError(
            f"model.init_config.name: {init['name']!r} is not supported; use wesar_, he_init_ or small_init_."
        )
    if isinstance(config, WeSaRMPTConfig):
        return _Start(init, config.n_layers, config.d_model, config.embedding_std)
    if config.tie_word_embeddings:
        check_tied_embedding(init.get("emb_init_std"), config.d_model, "model.tie_word_embeddings")
    # On the meta device this only checks that it could initialise the model.
    model.apply(model.param_init_fn)  # type: ignore[arg-type]
    assign_roles(model, (config.ffn_config.get("ffn_act_fn") or {"name": "gelu"})["name"])
    # Foundry builds lm_head after the init function has run, so it keeps torch's U(−1/√d, 1/√d).
    output_std = None if section.get("init_device") == "meta" else 1 / math.sqrt(3 * config.d_model)
    return _Start(init, config.n_layers, config.d_model, embedding_std(init, config.d_model), output_std)


def _matrix(module: nn.Module, role: Role, start: _Start, lr: float, sigma: float | None) -> Matrix:
    """Return the initial values of one matrix.

    Args:
        module: The module of the matrix.
        role: The role of the matrix.
        start: The values that its scale depends on.
        lr: The learning rate.
        sigma: σ if its gate is in the optimizer, else None.
    """
    assert isinstance(module.weight, torch.Tensor)
    rows, columns = module.weight.shape
    scale = module.scale if isinstance(module, ScaledEmbedding) else 1.0
    if isinstance(module, nn.Embedding):
        wanted = 1.0 / scale if isinstance(module, Reparameterized) else start.embedding_std
        assert wanted is not None
    elif role.name == "W_p" and start.output_std is not None:
        wanted = start.output_std
    else:
        divisor = residual_divisor(start.init.get("init_div_is_residual", True), start.n_layers)
        backbone = BACKBONES.get(start.init["name"]) or start.init.get("backbone", "he")
        wanted = backbone_std(role, backbone, fan_in(module), start.d_model, divisor)
    std, gate = wanted, None
    if isinstance(module, Reparameterized):
        std = start.init["sigma"]
        gate, wanted = module.expected_start((rows, columns), std, wanted, start.init.get("gain_init", "method"))
    elif sigma is not None:
        std, gate = sigma, wanted / sigma
    return Matrix(role.name, (rows, columns), 1, type(module).__name__, wanted * scale, std, gate, lr / std)


def inspect_config(config: dict[str, Any]) -> Inspection:
    """Return the initial values of each matrix of a config's model, and the number of parameters.

    Args:
        config: A training config, as `load_config` returns it.

    Returns:
        One entry for each role and shape, in the order of the model.

    Raises:
        ValueError: If the config is wrong, or the scales of the model or its init function are not known.
    """
    for section, key in (("model", "name"), ("optimizer", "lr")):
        if not isinstance(config.get(section), Mapping) or key not in config[section]:
            raise ValueError(f"{section}.{key} is missing: inspect needs a training YAML.")
    section = config["model"]
    if section["name"] not in ("wesar_mpt_causal_lm", "mpt_causal_lm", "wesar_hf_causal_lm"):
        raise ValueError(
            f"model.name: {section['name']!r} is not supported by inspect; use wesar_mpt_causal_lm, mpt_causal_lm or "
            "wesar_hf_causal_lm."
        )
    model = meta_model(section)
    start = _start(model, section)
    gates, lr = check_config(config, model), config["optimizer"]["lr"]
    matrices: dict[tuple, Matrix] = {}
    for module in model.modules():
        role = getattr(module, "role", None)
        if role is None:
            continue
        assert isinstance(module.weight, torch.Tensor)
        sigma = gates.sigma if gates is not None and gates.has_gate(module.weight) else None
        matrix = _matrix(module, role, start, lr, sigma)
        key = (matrix.role, matrix.shape, sigma)
        matrices[key] = replace(matrix, count=matrices[key].count + 1) if key in matrices else matrix
    return Inspection(list(matrices.values()), sum(p.numel() for p in model.parameters()))
