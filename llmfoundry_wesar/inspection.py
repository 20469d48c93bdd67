"""What a config would train, worked out without allocating a weight: `llmfoundry-wesar inspect`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from omegaconf import DictConfig, OmegaConf
from torch import nn
from yaml import YAMLError

from llmfoundry_wesar.initialization import backbone_std, is_number, residual_divisor
from llmfoundry_wesar.layers import Reparameterized, ScaledEmbedding
from llmfoundry_wesar.methods import expand
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM, check_keys, did_you_mean
from llmfoundry_wesar.roles import Role


@dataclass(frozen=True)
class Matrix:
    """One kind of matrix of a model: all of one role and shape.

    Attributes:
        role: The paper's name.
        shape: (rows, columns).
        count: How many there are in the model.
        layer: Class of the layer that holds them.
        virtual_std: σ_•, the standard deviation that the forward pass starts with, embedding scaling included.
        std: σ, that of the actual weight.
        gate: What α starts at; for weight normalisation the rows' expected norm; None without a gate.
        update_ratio: Of Adam's first step at the full learning rate, lr·√n/‖W‖ = lr/σ for a matrix of n entries. That
            of W_e is an upper bound: rows of tokens that do not occur in the batch do not move.
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
    """A model's matrices and its number of parameters, gates and norms included."""

    matrices: list[Matrix]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("role", "shape", "count", "layer", "σ_•", "σ", "gate", "Δ/W, step 1")
        rows = []
        for m in self.matrices:
            numbers = ["–" if x is None else f"{x:.4g}" for x in (m.virtual_std, m.std, m.gate, m.update_ratio)]
            if m.role == "W_e":
                numbers[-1] = f"≤ {numbers[-1]}"
            rows.append((m.role, f"{m.shape[0]} × {m.shape[1]}", str(m.count), m.layer, *numbers))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        return "\n".join([*lines, "", f"{self.parameters:,} parameters ({self.parameters / 1e6:,.1f}M)"])


def load_config(path: str, overrides: list[str] | None = None, check_data: bool = False) -> dict[str, Any]:
    """Read a training YAML as foundry's trainer does: with overrides, interpolations, method and setting.

    Args:
        path: The YAML.
        overrides: key=value, as on the trainer's command line.
        check_data: As for `methods.expand`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it or an override is no YAML, a top-level key is none of the trainer's, or the method or setting
            is not known.
    """
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path}: no mapping of keys to values, as a training YAML is.")
    for text in overrides or []:
        if "=" not in text:
            raise ValueError(f"{text!r} is no override; write key=value.")
        try:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_cli([text]))
        except YAMLError as error:
            raise ValueError(f"{text}: {error}") from error
    for key in loaded:
        if key not in TRAIN_CONFIG_KEYS:
            fix = did_you_mean(str(key), TRAIN_CONFIG_KEYS, "put what other keys refer to under `variables`.")
            raise ValueError(f"{key}: no key of a training config; {fix}")
    return expand(OmegaConf.to_container(loaded, resolve=True), check_data)  # type: ignore[arg-type]


def _matrix(module: nn.Linear | nn.Embedding, role: Role, config: Any, lr: float) -> Matrix:
    init = config.init_config
    rows, columns = module.weight.shape
    divisor = residual_divisor(init["init_div_is_residual"], config.n_layers)
    backbone = init.get("backbone", "small" if init["name"] == "small_init_" else "he")
    scale = module.scale if isinstance(module, ScaledEmbedding) else 1.0
    if isinstance(module, nn.Embedding):
        wanted = 1.0 / scale if isinstance(module, Reparameterized) else config.embedding_std
    else:
        wanted = backbone_std(role, backbone, columns, config.d_model, divisor)
    std, gate = wanted, None
    if isinstance(module, Reparameterized):
        std = init["sigma"]
        gate, wanted = module.expected_start((rows, columns), std, wanted, init.get("gain_init", "method"))
    return Matrix(role.name, (rows, columns), 1, type(module).__name__, wanted * scale, std, gate, lr / std)


def inspect_config(config: dict[str, Any]) -> Inspection:
    """Say what each matrix of a model would start at, and count its parameters.

    Args:
        config: A training config, as `load_config` returns it.

    Returns:
        One row for each role and shape, in the order of the model.

    Raises:
        ValueError: If the model or its init function is none whose scales are known, or the config is wrong.
    """
    for section, key in (("model", "name"), ("optimizer", "lr")):
        if not isinstance(config.get(section), Mapping) or key not in config[section]:
            raise ValueError(f"{section}.{key} is missing: inspect takes a training YAML, as the trainer does.")
    model_config = {**config["model"], "init_device": "meta"}
    name = model_config.pop("name")
    if name != "wesar_mpt_causal_lm":
        raise ValueError(f"model.name: {name!r} has no roles to inspect; use wesar_mpt_causal_lm.")
    lr = config["optimizer"]["lr"]
    if not is_number(lr) or not lr > 0:
        raise ValueError(f"optimizer.lr: {lr!r} is not a positive number; the paper's is 1.0e-3 (rapid) or 5.0e-4.")
    check_keys(model_config)
    for key in ("loss_fn", "use_train_metrics", "additional_train_metrics", "master_weights_dtype"):
        model_config.pop(key, None)
    try:
        hf_config = WeSaRMPTConfig(**model_config)
        model = WeSaRMPTForCausalLM(hf_config)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        # Foundry checks few types.
        raise ValueError(
            f"model: no model can be built from these values ({type(error).__name__}: {error}); compare their types "
            "with those in yamls/130m.yaml."
        ) from error
    if hf_config.init_config["name"] not in ("wesar_", "he_init_", "small_init_"):
        raise ValueError(
            f"model.init_config.name: {hf_config.init_config['name']!r} has no σ_• in the paper; "
            "use wesar_, he_init_ or small_init_."
        )
    matrices: dict[tuple, Matrix] = {}
    for module in model.modules():
        role = getattr(module, "role", None)
        if role is None:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        matrix = _matrix(module, role, hf_config, lr)
        key = (matrix.role, matrix.shape)
        matrices[key] = replace(matrix, count=matrices[key].count + 1) if key in matrices else matrix
    return Inspection(list(matrices.values()), sum(p.numel() for p in model.parameters()))
