"""What a config would train, worked out without allocating a weight: `llmfoundry-wesar inspect`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn
from yaml import YAMLError

from llmfoundry_wesar.initialization import Role, backbone_std
from llmfoundry_wesar.layers import Reparameterized, ScaledEmbedding
from llmfoundry_wesar.methods import expand
from llmfoundry_wesar.model import WeSaRMPTConfig, WeSaRMPTForCausalLM, check_keys


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
        update_ratio: Of Adam's first step at the full learning rate, lr·√n/‖W‖ = lr/σ for a matrix of n entries.
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
            numbers = ("–" if x is None else f"{x:.4g}" for x in (m.virtual_std, m.std, m.gate, m.update_ratio))
            rows.append((m.role, f"{m.shape[0]} × {m.shape[1]}", str(m.count), m.layer, *numbers))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        return "\n".join([*lines, "", f"{self.parameters:,} parameters ({self.parameters / 1e6:,.1f}M)"])


def load_config(path: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a training YAML as foundry's trainer does: with overrides, interpolations, method and setting.

    Args:
        path: The YAML.
        overrides: key=value, as on the trainer's command line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or the method or setting is not known.
    """
    try:
        loaded = OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    config = OmegaConf.merge(loaded, OmegaConf.from_cli(overrides or []))
    assert isinstance(config, DictConfig)
    return expand(OmegaConf.to_container(config, resolve=True), check_data=False)  # type: ignore[arg-type]


def _matrix(module: nn.Linear | nn.Embedding, role: Role, config: Any, lr: float) -> Matrix:
    init = config.init_config
    rows, columns = module.weight.shape
    divisor = init["init_div_is_residual"]
    divisor = 1.0 if divisor is False else math.sqrt(2 * config.n_layers) if divisor is True else float(divisor)
    backbone = init.get("backbone", "small" if init["name"] == "small_init_" else "he")
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
    scale = module.scale if isinstance(module, ScaledEmbedding) else 1.0
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
    for key in ("loss_fn", "use_train_metrics", "additional_train_metrics", "master_weights_dtype"):
        model_config.pop(key, None)
    check_keys(model_config)
    hf_config = WeSaRMPTConfig(**model_config)
    if hf_config.init_config["name"] not in ("wesar_", "he_init_", "small_init_"):
        raise ValueError(
            f"model.init_config.name: {hf_config.init_config['name']!r} has no σ_• in the paper; "
            "use wesar_, he_init_ or small_init_."
        )
    model = WeSaRMPTForCausalLM(hf_config)
    lr = float(config["optimizer"]["lr"])
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
