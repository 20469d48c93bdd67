"""Compute the reparameterisations and the optimizer's step, as functions of tensors.

Shapes: a matrix has O rows (out_features, or the vocabulary) and I columns (in_features, or the width); "..." are any
leading batch dimensions. A gate is (1,), (O,) or (I,) if its `gate_shape` is scalar, row or column.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateShape = Literal["scalar", "row", "column"]


def broadcast_gate(gate: Tensor, gate_shape: GateShape) -> Tensor:
    """View a gate so that it can multiply an (O, I) matrix. A row gate becomes (O, 1); other gates keep their shape."""
    return gate.unsqueeze(-1) if gate_shape == "row" else gate


def gated_weight(weight: Tensor, gate: Tensor) -> Tensor:
    r"""Return the virtual weight of WeSaR, :math:`\bar W = \alpha W` (Nishida et al. 2024, section 4.1).

    Args:
        weight: (O, I), the actual weight W.
        gate: α, as `broadcast_gate` gives it: (1,), (O, 1) or (I,).

    Returns:
        (O, I), in the wider of the two dtypes.
    """
    return weight * gate


# A matrix of at most this many entries uses plain autograd, which keeps αW for the backward pass: 256 KiB in float32.
_SMALL = 2**16


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a·b in `dtype`, rounded once. On a GPU this is one kernel."""
    if a.dtype == b.dtype == dtype:
        return a * b
    return torch.mul(a, b, out=a.new_empty(torch.broadcast_shapes(a.shape, b.shape), dtype=dtype))


def _gradients(grad: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return ∂L/∂W = αG and ∂L/∂α = ⟨G, W⟩, each in the dtype of its parameter. `grad` (G) may be overwritten.

    ⟨G, W⟩ is the sum over the dimensions along which the gate is broadcast. The compiled function reads G and W once.
    """
    grad = grad.to(torch.promote_types(grad.dtype, weight.dtype))
    product = grad.to(torch.promote_types(gate.dtype, torch.float32)) * weight
    if gate.numel() == 1:
        # Sum each row first: the compiler puts this sum into one kernel with αG, but not a sum over the whole matrix.
        product = product.sum(-1)
    grad_gate = product.sum_to_size(gate.shape).to(gate.dtype)
    return grad.mul_(gate) if grad.dtype == weight.dtype else _product(grad, gate, weight.dtype), grad_gate


# For CUDA. The compiler computes both results in one kernel only if the sizes are constant.
_compiled_gradients = torch.compile(_gradients, dynamic=False)


class _GatedLinear(torch.autograd.Function):
    """Compute y = x (αW)ᵀ + b, and keep only x, W and α for the backward pass.

    Autograd would keep αW too. Under FSDP this is a whole matrix for each layer, and resharding W does not free it.
    Computing αW again takes one elementwise pass.

    Second derivatives are not supported: that of ∂L/∂α raises an error, because `_gradients` overwrites G.
    `once_differentiable` would refuse all of them clearly, but it costs 2 µs a call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, gate)
        return F.linear(x, _product(weight, gate, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, gate = ctx.saved_tensors
        needs_x, needs_weight, needs_gate, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_gate = None
        rows = grad_y.reshape(-1, grad_y.size(-1))
        if needs_x:
            # Write αW here and Wα in the forward pass: the compiler would compute equal expressions once and keep αW.
            grad_x = grad_y @ _product(gate, weight, x.dtype)
        if needs_weight or needs_gate:
            # ∂L/∂(αW). Both gradients follow from it.
            grad = rows.t() @ x.reshape(-1, x.size(-1))
            if needs_gate:
                gradients = _compiled_gradients if weight.is_cuda else _gradients
                grad_weight, grad_gate = gradients(grad, weight, gate)
            else:
                grad_weight = _product(grad, gate, weight.dtype)
        return grad_x, grad_weight, grad_gate, rows.sum(0) if needs_bias else None


def gated_linear(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Apply a gated linear map, :math:`y = x (\alpha W)^\top + b` (Nishida et al. 2024, section 4.1).

    Equal to ``F.linear(x, gated_weight(weight, gate), bias)`` in value, dtype (also under autocast) and gradients,

    .. math:: \partial L/\partial W = \alpha\,G, \quad \partial L/\partial\alpha = \langle G, W\rangle,
              \quad G = \partial L/\partial(\alpha W),

    αW is not kept for the backward pass, unless W is small: then keeping αW takes less time than calling a Python
    function in the backward pass. `benchmarks/README.md` has the measurements.

    Args:
        x: (..., I).
        weight: (O, I), the actual weight W.
        gate: α, as `broadcast_gate` gives it: (1,), (O, 1) or (I,).
        bias: b, (O,). The gate does not multiply it.

    Returns:
        (..., O).
    """
    if weight.numel() <= _SMALL:
        return F.linear(x, gated_weight(weight, gate).to(x.dtype), bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    return _GatedLinear.apply(x, weight, gate, bias)  # type: ignore[return-value]


def weight_norm(weight: Tensor, gain: Tensor) -> Tensor:
    r"""Normalise each row of a weight, :math:`\bar w = \alpha\,w / \lVert w\rVert` (Salimans and Kingma 2016).

    The gradient goes through the norm (Nishida et al. 2024, appendix C.1). The kernel is that of
    ``torch.nn.utils.parametrizations.weight_norm``.

    Args:
        weight: (O, I).
        gain: (O,), one α a row.

    Returns:
        (O, I).
    """
    return torch._weight_norm(weight, gain.unsqueeze(-1), 0)  # type: ignore[reportPrivateImportUsage]


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Disable autocast, except on the meta device, which autocast does not support."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@torch.no_grad()
def power_iteration(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""Make one step of the power method towards the first singular vectors (Miyato et al. 2018, algorithm 1).

    :math:`v \leftarrow W^\top u/\lVert W^\top u\rVert`, then :math:`u \leftarrow W v/\lVert W v\rVert`.

    Args:
        weight: (O, I).
        left: u, (O,), of unit length.
        right: v, (I,). Its values are not used. The arithmetic is in its dtype, or in float32 if that is wider.

    Returns:
        The new u and v.
    """
    dtype = torch.promote_types(right.dtype, torch.float32)
    with _without_autocast(weight):
        weight = weight.to(dtype)
        right = F.normalize(weight.T @ left.to(dtype), dim=0)
        return F.normalize(weight @ right, dim=0), right


def sigma_reparam(
    weight: Tensor, gate: Tensor, left: Tensor, right: Tensor, differentiable_norm: bool = False
) -> Tensor:
    r"""Divide a weight by its spectral norm :math:`\lVert W\rVert_2 = u^\top W v`.

    σReparam: :math:`\bar W = \alpha\,W / \lVert W\rVert_2` (Zhai et al. 2023; Nishida et al. 2024, section 5.3).

    Args:
        weight: (O, I).
        gate: (1,), α.
        left: u, (O,), the current estimate of the first left singular vector.
        right: v, (I,), the current estimate of the first right singular vector.
        differentiable_norm: Whether the gradient goes through the spectral norm: no in Nishida et al. 2024 (appendix
            C.2), yes in apple/ml-sigma-reparam.

    Returns:
        (O, I).
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    with (
        torch.set_grad_enabled(differentiable_norm and torch.is_grad_enabled()),
        # In bfloat16 the norm would not change for many steps and then jump by 2⁻⁸, and the virtual weight with it.
        _without_autocast(weight),
    ):
        spectral_norm = left.to(dtype) @ (weight.to(dtype) @ right.to(dtype))
    # Cast the gate first: a bfloat16 gate divided by a 0-dimensional float32 norm would be rounded to bfloat16.
    return (weight.to(dtype) * (gate.to(dtype) / spectral_norm)).to(weight.dtype)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    shrink: Tensor,
    size: Tensor,
    root: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    r"""Update a tensor by one step of AdamW, in place (Loshchilov and Hutter 2019, algorithm 2).

    .. math:: m &\leftarrow \beta_1 m + (1 - \beta_1)\,s g \\
              v &\leftarrow \beta_2 v + (1 - \beta_2)\,(s g)^2 \\
              w &\leftarrow f w - \eta\,m / (\rho\sqrt v + \epsilon)

    With :math:`s = 1`, :math:`f = 1 - \mathrm{lr}\,\lambda`, :math:`\eta = \mathrm{lr} / (1 - \beta_1^t)` and
    :math:`\rho = 1 / \sqrt{1 - \beta_2^t}` this is ``torch.optim.AdamW``. `WeSaRAdamW` puts the gate into s, f and η.

    Args:
        weight: w, of any shape.
        grad: g, of the shape of w; not changed.
        exp_avg: m, of the shape of w.
        exp_avg_sq: v, of the shape of w.
        scale: s. The last four tensors are 0-dimensional and on the device, so that the host waits for no value.
        shrink: f.
        size: η.
        root: ρ.
        betas: β₁ and β₂.
        eps: ε.
    """
    grad = grad * scale
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    step = exp_avg / exp_avg_sq.sqrt().mul_(root).add_(eps)
    weight.mul_(shrink).sub_(step.mul_(size))


def foreach_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    numbers: Sequence[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update several tensors by one step of AdamW each, in place.

    Args:
        weights: As for `adamw_`, one for each tensor, like the next three.
        grads: Not changed.
        exp_avgs: Changed.
        exp_avg_sqs: Changed.
        numbers: For each tensor its s, f, η and ρ, (4,).
        betas: β₁ and β₂.
        eps: ε.
    """
    for *tensors, four in zip(weights, grads, exp_avgs, exp_avg_sqs, numbers, strict=True):
        adamw_(*tensors, *four.unbind(), betas=betas, eps=eps)


# One kernel for each tensor, which reads four tensors and writes three. They are compiled together, because a compiled
# function for each tensor would take longer to call than its kernel takes to run.
compiled_foreach_adamw_ = torch.compile(foreach_adamw_, dynamic=False)
