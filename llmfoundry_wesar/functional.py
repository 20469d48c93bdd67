"""The maths of the reparameterisations: pure functions of tensors, no state.

Shapes: O rows of a matrix (out_features, or the vocabulary), I columns (in_features, or the width),
"..." any leading batch dimensions. A gate is (1,), (O,) or (I,); `broadcast_gate` says which by name.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GateShape = Literal["scalar", "row", "column"]


def broadcast_gate(gate: Tensor, gate_shape: GateShape) -> Tensor:
    """View a gate so that it multiplies an (O, I) matrix: (1,) -> (1, 1), (O,) -> (O, 1), (I,) -> (1, I)."""
    return gate.unsqueeze(0) if gate_shape == "column" else gate.unsqueeze(-1)


def gated_weight(weight: Tensor, gate: Tensor) -> Tensor:
    r"""The virtual weight of WeSaR, :math:`\bar W = \alpha W` (Nishida et al. 2024, section 4.1).

    Args:
        weight: (O, I), the actual weight W.
        gate: α, as `broadcast_gate` gives it: (1, 1), (O, 1) or (1, I).

    Returns:
        (O, I), in the wider of the two dtypes.
    """
    return weight * gate


def _gate_gradient(grad: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """⟨∂L/∂(αW), W⟩, summed over the dimensions along which the gate is broadcast."""
    if gate.numel() == 1 and grad.dtype == weight.dtype == torch.float32:
        return torch.dot(grad.reshape(-1), weight.reshape(-1)).reshape(gate.shape)
    product = grad.to(torch.promote_types(grad.dtype, torch.float32)) * weight
    return product.sum_to_size(gate.shape).to(gate.dtype)


class _GatedLinear(torch.autograd.Function):
    """y = x (αW)ᵀ, keeping only x, W and α for the backward pass.

    Autograd would keep αW as well. Under FSDP that is a whole unsharded matrix for each layer, which resharding W
    after the forward pass does not free; recomputing αW is one elementwise pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.x_dtype, ctx.dtype = x.dtype, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, gate)
        return F.linear(x, gated_weight(weight, gate).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, gate = ctx.saved_tensors
        grad_x = grad_weight = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ gated_weight(weight, gate).to(ctx.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # ∂L/∂(αW); both gradients follow from it without another pass over the activations.
            grad = grad_y.reshape(-1, grad_y.size(-1)).T @ x.reshape(-1, x.size(-1))
            if ctx.needs_input_grad[2]:
                grad_gate = _gate_gradient(grad, weight, gate)
            grad_weight = (grad * gate).to(weight.dtype)
        return grad_x, grad_weight, grad_gate, None


def gated_linear(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    r"""A linear map with the virtual weight, :math:`y = x (\alpha W)^\top` (Nishida et al. 2024, section 4.1).

    Equal to ``F.linear(x, gated_weight(weight, gate))`` in value and gradients,

    .. math:: \partial L/\partial W = \alpha\,G, \quad \partial L/\partial\alpha = \langle G, W\rangle,
              \quad G = \partial L/\partial(\alpha W),

    and under autocast in the dtype that `F.linear` would use there. It keeps no αW for the backward pass.

    Args:
        x: (..., I).
        weight: (O, I), the actual weight W.
        gate: α, as `broadcast_gate` gives it: (1, 1), (O, 1) or (1, I).

    Returns:
        (..., O).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        return _GatedLinear.apply(x, weight, gate, dtype)  # type: ignore[return-value]


def weight_norm(weight: Tensor, gain: Tensor) -> Tensor:
    r"""Weight normalisation by row, :math:`\bar w = \alpha\,w / \lVert w\rVert` (Salimans and Kingma 2016).

    The gradient goes through the norm, as in ``torch.nn.utils.parametrizations.weight_norm``, whose fused kernel this
    is (Nishida et al. 2024, appendix C.1).

    Args:
        weight: (O, I).
        gain: (O,), one α a row.

    Returns:
        (O, I).
    """
    return torch._weight_norm(weight, gain.unsqueeze(-1), 0)  # type: ignore[reportPrivateImportUsage]


@torch.no_grad()
def power_iteration(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of the power method towards the first singular vectors (Miyato et al. 2018, algorithm 1).

    :math:`v \leftarrow W^\top u/\lVert W^\top u\rVert`, then :math:`u \leftarrow W v/\lVert W v\rVert`.

    Args:
        weight: (O, I).
        left: u, (O,), of unit length.
        right: v, (I,), replaced at once; it sets the dtype of the arithmetic.

    Returns:
        The new u and v.
    """
    weight = weight.to(right.dtype)
    right = F.normalize(weight.T @ left, dim=0)
    return F.normalize(weight @ right, dim=0), right


def sigma_reparam(
    weight: Tensor, gate: Tensor, left: Tensor, right: Tensor, differentiable_norm: bool = False
) -> Tensor:
    r"""σReparam, :math:`\bar W = \alpha\,W / \lVert W\rVert_2`, with :math:`\lVert W\rVert_2 = u^\top W v`.

    Zhai et al. 2023; Nishida et al. 2024, section 5.3.

    Args:
        weight: (O, I).
        gate: (1,), α.
        left: u, (O,), the first left singular vector as far as the power method has come.
        right: v, (I,), the first right one.
        differentiable_norm: Whether the gradient goes through the spectral norm. It does not in Nishida et al. 2024
            (appendix C.2); it does in apple/ml-sigma-reparam.

    Returns:
        (O, I).
    """
    with torch.set_grad_enabled(differentiable_norm and torch.is_grad_enabled()):
        spectral_norm = left @ (weight.to(left.dtype) @ right)
    return weight * (gate / spectral_norm).to(weight.dtype)
