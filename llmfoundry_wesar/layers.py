"""Linear and embedding layers with a reparameterised weight. They hold the state; `functional` has the formulas.

Each reparameterisation is one mixin, combined with a linear base and an embedding base. The mixin computes the virtual
weight from the layer's parameters. `initialization` sets their initial values.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from llmfoundry.models.layers.custom_embedding import SharedEmbedding
from torch import Tensor, nn

from llmfoundry_wesar import functional
from llmfoundry_wesar.functional import GateShape

NO_POWER_ITERATION = (
    "callbacks.power_iteration is missing: σReparam needs one power iteration a step, else ‖W‖₂ is not updated. Add "
    "`callbacks: {power_iteration: {}}`."
)
GainInit = Literal["method", "backbone"]
# What torch accepts as a device.
Device = torch.device | str | None


class ScaledEmbedding(SharedEmbedding):
    r"""Foundry's embedding with its output multiplied by a constant, :math:`y = c\,W_{t}`.

    Embedding scaling of Vaswani et al. (2017) and Takase et al. (2023): with :math:`c = 1/\sigma_e` the output has unit
    variance. With `unembed=True` the layer is the output projection, and nothing is scaled, as in foundry.

    Shape:
        ids (...) -> (..., embedding_dim); unembed: (..., embedding_dim) -> (..., num_embeddings).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.scale = scale

    def virtual_weight(self) -> Tensor:
        """Return the matrix of the forward pass, (num_embeddings, embedding_dim)."""
        return self.weight

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of the virtual weight for ids (...), (..., embedding_dim)."""
        return F.embedding(ids, self.virtual_weight(), self.padding_idx)

    def forward(self, input: Tensor, unembed: bool = False) -> Tensor:
        if unembed:
            return F.linear(input, self.virtual_weight())
        output = self.rows(input)
        return output if self.scale == 1.0 else output * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.6g}"


class Reparameterized(nn.Module):
    """Base of the reparameterised layers: an actual weight W and a gate α, which give the virtual weight."""

    weight: nn.Parameter
    gate: Tensor

    def virtual_weight(self) -> Tensor:
        """Return the weight of the forward pass, with the shape of `weight`."""
        raise NotImplementedError

    def start_gate_(self, scale: float, gain_init: GainInit = "method") -> None:
        """Set the gate to its initial value. Call it after the actual weight has been initialised.

        Args:
            scale: σ_•/σ, the ratio of the virtual weight's standard deviation to the actual one's.
            gain_init: `backbone` makes the virtual weight `scale` × W; `method` sets the method's own initial value.

        Raises:
            ValueError: If the layer divides by a norm that is 0.
        """
        raise NotImplementedError

    @classmethod
    def expected_start(
        cls, shape: tuple[int, int], sigma: float, backbone_std: float, gain_init: GainInit = "method"
    ) -> tuple[float, float]:
        """Return the value that `start_gate_` would set for a Gaussian matrix, without the matrix.

        Args:
            shape: (rows, columns).
            sigma: σ, the standard deviation of the actual weight.
            backbone_std: σ_•.
            gain_init: As for `start_gate_`.

        Returns:
            The gate, and the standard deviation of the virtual weight.
        """
        raise NotImplementedError


class _ReparameterizedLinear(Reparameterized, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.virtual_weight(), self.bias)


class Gated(Reparameterized):
    """WeSaR: the virtual weight is αW (Nishida et al. 2024, section 4.1)."""

    gate_shape: GateShape

    def _add_gate(self, gate_shape: GateShape, trainable: bool) -> None:
        if gate_shape not in get_args(GateShape):
            raise ValueError(f"model.fc_type.gate_shape: {gate_shape!r} is not one of scalar, row, column.")
        if not isinstance(trainable, bool):
            raise ValueError(f"model.fc_type.trainable: {trainable!r} is not one of true, false.")
        self.gate_shape = gate_shape
        # A scalar gate has the shape (1,), because FSDP cannot shard a 0-dimensional parameter.
        size = {"scalar": 1, "row": self.weight.size(0), "column": self.weight.size(1)}[gate_shape]
        gate = self.weight.new_ones(size)
        if trainable:
            self.gate = nn.Parameter(gate)
        else:
            self.register_buffer("gate", gate)

    def _broadcast_gate(self) -> Tensor:
        return functional.broadcast_gate(self.gate, self.gate_shape)

    def virtual_weight(self) -> Tensor:
        return functional.gated_weight(self.weight, self._broadcast_gate())

    def start_gate_(self, scale: float, gain_init: GainInit = "method") -> None:
        """Set α to `scale`, which is WeSaR's initial value under both values of `gain_init`."""
        nn.init.constant_(self.gate, scale)

    @classmethod
    def expected_start(
        cls, shape: tuple[int, int], sigma: float, backbone_std: float, gain_init: GainInit = "method"
    ) -> tuple[float, float]:
        """Return σ_•/σ and σ_•."""
        return backbone_std / sigma, backbone_std


class GatedLinear(Gated, nn.Linear):
    r"""`nn.Linear` with a gate on its weight, :math:`y = x(\alpha W)^\top + b` (Nishida et al. 2024, section 4.1).

    Args:
        in_features: I.
        out_features: O.
        bias: Whether to add b. The gate does not multiply it.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.
        gate_shape: One α for the matrix (`scalar`, the paper), for each row or for each column (arXiv 2601.04890).
        trainable: Whether α is trained. If not, it is a buffer and not a parameter (Table 7, fixed α).

    Parameters:
        weight: (O, I), the actual weight W.
        gate: α, (1,), (O,) or (I,); 1 until the init function sets it.
        bias: (O,).

    Raises:
        ValueError: If `gate_shape` is unknown or `trainable` is not a boolean.

    >>> layer = GatedLinear(8, 4, bias=False)
    >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
    {'weight': (4, 8), 'gate': (1,)}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        gate_shape: GateShape = "scalar",
        trainable: bool = True,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_gate(gate_shape, trainable)

    def forward(self, input: Tensor) -> Tensor:
        return functional.gated_linear(input, self.weight, self._broadcast_gate(), self.bias)


class GatedEmbedding(Gated, ScaledEmbedding):
    """An embedding with a gate on its matrix. For the arguments see `ScaledEmbedding` and `GatedLinear`."""

    def __init__(self, *args: Any, gate_shape: GateShape = "scalar", trainable: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._add_gate(gate_shape, trainable)

    def rows(self, ids: Tensor) -> Tensor:
        """As in the base class. Only these rows are multiplied, not the whole matrix."""
        gate = F.embedding(ids, self._broadcast_gate()) if self.gate_shape == "row" else self.gate
        return F.embedding(ids, self.weight, self.padding_idx) * gate


def _check_norms(norms: Tensor) -> None:
    """Refuse a norm of 0, by which a layer would divide."""
    if not norms.is_meta and not norms.all():
        raise ValueError(
            "the norm of the matrix, or of one of its rows, is 0, and the layer divides by it (model.pad_token_id: N "
            "makes row N of the embedding 0)"
        )


class WeightNormalized(Reparameterized):
    """Weight normalisation: rows of the virtual weight are αw/‖w‖ (Salimans and Kingma 2016; paper, appendix C.1)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(self.weight.new_ones(self.weight.size(0)))

    def virtual_weight(self) -> Tensor:
        return functional.weight_norm(self.weight, self.gate)

    def start_gate_(self, scale: float, gain_init: GainInit = "method") -> None:
        """Set the gates to the norms of the rows, as torch does; under `backbone` to `scale` × these norms."""
        factor = scale if gain_init == "backbone" else 1.0
        with torch.no_grad():
            norms = torch.linalg.vector_norm(self.weight, dim=1)
            _check_norms(norms)
            self.gate.copy_(factor * norms)

    @classmethod
    def expected_start(
        cls, shape: tuple[int, int], sigma: float, backbone_std: float, gain_init: GainInit = "method"
    ) -> tuple[float, float]:
        """Return the expected norm of a row, √columns × std, and std."""
        std = backbone_std if gain_init == "backbone" else sigma
        return std * math.sqrt(shape[1]), std


class WeightNormLinear(WeightNormalized, _ReparameterizedLinear):
    """`nn.Linear` with weight normalisation; parameters weight (O, I), gate (O,) and bias (O,)."""


class WeightNormEmbedding(WeightNormalized, ScaledEmbedding):
    """An embedding with weight normalisation. For the arguments see `ScaledEmbedding`."""


class SpectrallyNormalized(Reparameterized):
    """σReparam: the virtual weight is αW/‖W‖₂ (Zhai et al. 2023; paper, appendix C.2).

    The singular vectors u and v are buffers. The callback `power_iteration` sets `iterate` once a step, and the next
    forward pass makes one power iteration. So all microbatches and recomputed activations of a step use the same ‖W‖₂.
    """

    left: Tensor
    right: Tensor

    def __init__(self, *args: Any, differentiable_norm: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(differentiable_norm, bool):
            raise ValueError(f"model.fc_type.differentiable_norm: {differentiable_norm!r} is not one of true, false.")
        self.gate = nn.Parameter(self.weight.new_ones(1))
        self.differentiable_norm = differentiable_norm
        self.iterate: bool | None = None
        rows, columns = self.weight.shape
        self.register_buffer("left", self.weight.new_full((rows,), rows**-0.5))
        self.register_buffer("right", self.weight.new_full((columns,), columns**-0.5))

    def iterate_(self, steps: int = 1) -> None:
        """Update u and v by `steps` power iterations."""
        for _ in range(steps):
            left, right = functional.power_iteration(self.weight, self.left, self.right)
            self.left.copy_(left)
            self.right.copy_(right)

    def virtual_weight(self) -> Tensor:
        # Pass copies: autograd may keep them, and the next power iteration overwrites the buffers.
        return functional.sigma_reparam(
            self.weight, self.gate, self.left.clone(), self.right.clone(), self.differentiable_norm
        )

    def start_gate_(self, scale: float, gain_init: GainInit = "method") -> None:
        """Find u and v by 32 power iterations. Then set α to 1, or under `backbone` to `scale` × ‖W‖₂."""
        with torch.no_grad():
            # Start from a fixed sequence instead of random numbers, so that all ranks and devices get the same u and v.
            angles = torch.arange(len(self.left), device=self.left.device, dtype=torch.float64)
            self.left.copy_(F.normalize(torch.cos(angles * angles), dim=0))
            self.iterate_(steps=32)
            norm = self.left @ (self.weight @ self.right)
            _check_norms(norm)
            self.gate.copy_(scale * norm if gain_init == "backbone" else torch.ones_like(norm))

    @classmethod
    def expected_start(
        cls, shape: tuple[int, int], sigma: float, backbone_std: float, gain_init: GainInit = "method"
    ) -> tuple[float, float]:
        """As in the base class, with ‖W‖₂ ≈ σ(√rows + √columns) for a Gaussian matrix (Davidson and Szarek 2001)."""
        spread = math.sqrt(shape[0]) + math.sqrt(shape[1])
        return (backbone_std * spread, backbone_std) if gain_init == "backbone" else (1.0, 1 / spread)

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        self.step_power_iteration()
        return super().forward(input, *args)

    def step_power_iteration(self) -> None:
        """Update u and v once if `iterate` is set.

        Raises:
            RuntimeError: In training, if `iterate` was never set.
        """
        if not self.training:
            return
        if self.iterate is None:
            raise RuntimeError(NO_POWER_ITERATION)
        if self.iterate:
            self.iterate_()
            self.iterate = False


class SigmaReparamLinear(SpectrallyNormalized, _ReparameterizedLinear):
    """`nn.Linear` with σReparam; parameters weight (O, I), gate (1,) and bias (O,), buffers left (O,) and right (I,).

    Args:
        in_features: I.
        out_features: O.
        bias: As for `nn.Linear`.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.
        differentiable_norm: Whether the gradient goes through ‖W‖₂, as in Zhai et al.'s code (paper: no).
    """


class SigmaReparamEmbedding(SpectrallyNormalized, ScaledEmbedding):
    """An embedding with σReparam. For the arguments see `ScaledEmbedding` and `SigmaReparamLinear`."""


# The embedding class with the same reparameterisation as each linear class.
EMBEDDINGS: dict[type[nn.Linear], type[ScaledEmbedding]] = {
    nn.Linear: ScaledEmbedding,
    GatedLinear: GatedEmbedding,
    WeightNormLinear: WeightNormEmbedding,
    SigmaReparamLinear: SigmaReparamEmbedding,
}
