r"""Cross-entropy with z-loss, over given logits or together with the output projection.

.. math:: L = \frac1n\sum_i (\mathrm{lse}_i - x_{i,t_i}) + \frac{\zeta}{n}\sum_i \mathrm{lse}_i^2,
          \quad \mathrm{lse}_i = \log\sum_v e^{x_{i,v}}

with logits x, targets t, both sums over the n unmasked tokens, and ζ = `z_loss` (PaLM, section 5).
Shapes: T tokens, V entries of the vocabulary, d width of the model.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100

# Number of logits in one chunk on a CPU. Only a chunk has float32 copies.
_CHUNK = 2**23
# Chunks are larger with the projection, because each adds a V×d product to the weight's gradient. On a GPU a chunk and
# its gradient, in bfloat16, take 512 MiB each.
PROJECTED_CHUNK = {"cpu": 2**26, "cuda": 2**28}


class LossTerms(NamedTuple):
    """A loss and its two terms, each a mean over the unmasked tokens.

    Attributes:
        total: `cross_entropy + z_loss`. Only this one can be differentiated.
        cross_entropy: In nats; detached.
        z_loss: ζ·mean(lse²); detached.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def _chunks(tokens: int, vocabulary: int, limit: int) -> Iterator[slice]:
    # A power of two, because a GPU multiplies aligned sizes faster. Chunks of one size are compiled once.
    size = 1 << max(0, (limit // vocabulary).bit_length() - 1)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities (T, V) in at least float32, those of the targets (T), and lse (T)."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # Use entry 0 for masked tokens. The callers exclude them.
    index = targets.clamp(min=0).unsqueeze(-1)
    target_log_p = log_p.gather(-1, index).squeeze(-1)
    return log_p, target_log_p, logits.gather(-1, index).squeeze(-1) - target_log_p


def _logits_gradient_(p: Tensor, targets: Tensor, lse: Tensor, z_loss: float, scale: Tensor | float) -> Tensor:
    """Turn probabilities (T, V) into ∂L/∂x, in place: scale · ((1 + 2ζ·lse) p − onehot(t)), and 0 for masked tokens."""
    row = (targets != IGNORE_INDEX).to(p.dtype) * scale
    p *= (row * (1 + 2 * z_loss * lse)).unsqueeze(-1)
    return p.scatter_add_(-1, targets.clamp(min=0).unsqueeze(-1), -row.unsqueeze(-1))


def _row_terms(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's log-probability and lse, (T) and (T). The compiled function reads the logits once."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(x, -1)
    return x.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) - lse, lse


def _gradient(logits: Tensor, targets: Tensor, lse: Tensor, z_loss: float, scale: Tensor) -> Tensor:
    """Return ∂L/∂x (T, V) in the dtype of x. The compiled function reads the logits once and writes once."""
    row = (targets != IGNORE_INDEX).to(lse.dtype) * scale
    p = torch.exp(logits.to(lse.dtype) - lse.unsqueeze(-1)) * (row * (1 + 2 * z_loss * lse)).unsqueeze(-1)
    is_target = torch.arange(logits.size(-1), device=logits.device) == targets.unsqueeze(-1)
    return torch.where(is_target, p - row.unsqueeze(-1), p).to(logits.dtype)


def _takes_kernels(logits: Tensor) -> bool:
    """Return whether to use the compiled functions. On a CPU torch's softmax over chunks is faster."""
    return logits.is_cuda


_compiled_row_terms = torch.compile(_row_terms, dynamic=False)
_compiled_gradient = torch.compile(_gradient, dynamic=False)


def _terms(target_log_p: Tensor, lse: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three loss terms and n. If all tokens are masked, n is 1 and the loss 0."""
    unmasked = targets != IGNORE_INDEX
    n = unmasked.sum().clamp(min=1)
    cross_entropy = -torch.where(unmasked, target_log_p, 0).sum() / n
    z = z_loss * torch.where(unmasked, lse.square(), 0).sum() / n
    return cross_entropy + z, cross_entropy, z, n


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        if _takes_kernels(logits):
            target_log_p, lse = _compiled_row_terms(logits, targets)
        else:
            rows = [_log_softmax(logits[c], targets[c])[1:] for c in _chunks(len(logits), logits.size(1), _CHUNK)]
            target_log_p, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
        total, cross_entropy, z, n = _terms(target_log_p, lse, targets, z_loss)
        ctx.save_for_backward(logits, targets, lse, n)
        ctx.z_loss = z_loss
        ctx.mark_non_differentiable(cross_entropy, z)
        return total, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, targets, lse, n = ctx.saved_tensors
        if _takes_kernels(logits):
            return _compiled_gradient(logits, targets, lse, ctx.z_loss, grad_total / n), None, None
        gradient = torch.empty_like(logits)
        for c in _chunks(len(logits), logits.size(1), _CHUNK):
            # Compute the softmax again: keeping it would take twice the memory and round a second time.
            p = torch.softmax(logits[c], -1, dtype=lse.dtype)
            gradient[c] = _logits_gradient_(p, targets[c], lse[c], ctx.z_loss, grad_total / n)
        return gradient, None, None


# A custom operator, so that `torch.compile` does not unroll the loop over chunks.
@torch.library.custom_op("llmfoundry_wesar::linear_cross_entropy", mutates_args=())
def _projected(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the targets' log-probabilities (T), lse (T), and n times the gradients for `hidden` and `weight`."""
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    one = torch.ones((), device=hidden.device)
    rows = []
    for c in _chunks(len(hidden), len(weight), PROJECTED_CHUNK[hidden.device.type]):
        logits = hidden[c] @ weight.T
        if _takes_kernels(logits):
            target_log_p, lse = _compiled_row_terms(logits, targets[c])
            gradient = _compiled_gradient(logits, targets[c], lse, z_loss, one)
        else:
            log_p, target_log_p, lse = _log_softmax(logits, targets[c])
            gradient = _logits_gradient_(log_p.exp_(), targets[c], lse, z_loss, 1.0).to(logits.dtype)
            del log_p
        rows.append((target_log_p, lse))
        torch.mm(gradient, weight, out=grad_hidden[c])
        grad_weight += gradient.T @ hidden[c]
        del logits, gradient  # otherwise the next chunk would be a third one in memory
    target_log_p, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return target_log_p, lse, grad_hidden, grad_weight


@_projected.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    row = hidden.new_empty(len(hidden), dtype=dtype)
    return row, torch.empty_like(row), torch.empty_like(hidden), torch.empty_like(weight, dtype=dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute both gradients in the forward pass, so that logits are not kept; `backward` only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = hidden.dtype, weight.dtype
        target_log_p, lse, grad_hidden, grad_weight = _projected(hidden.to(dtype), weight.to(dtype), targets, z_loss)
        total, cross_entropy, z, n = _terms(target_log_p, lse, targets, z_loss)
        ctx.save_for_backward(grad_hidden, grad_weight, n)
        ctx.mark_non_differentiable(cross_entropy, z)
        return total, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, n = ctx.saved_tensors
        scale = grad_total / n
        hidden_dtype, weight_dtype = ctx.dtypes
        return (grad_hidden * scale).to(hidden_dtype), (grad_weight * scale).to(weight_dtype), None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossTerms:
    r"""Compute cross-entropy and z-loss, as means over the unmasked tokens.

    The forward pass reads the logits once. The backward pass reads them again and gives their gradient in their dtype,
    :math:`((1 + 2\zeta\,\mathrm{lse}_i)\,p_{iv} - 1[v = t_i])/n`. The logits are not changed. The arithmetic is in
    float32: on a CPU for one chunk of tokens at a time, on a GPU in one compiled kernel for each pass.

    Args:
        logits: (..., V).
        targets: (...), -100 for masked tokens. If all tokens are masked, the loss is 0.
        z_loss: ζ.
    """
    with torch.autocast(logits.device.type, enabled=False):
        terms = _CrossEntropy.apply(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), z_loss)
    return LossTerms(*terms)  # type: ignore[misc]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossTerms:
    r"""Compute `cross_entropy` of the logits ``hidden @ weight.T`` without storing all logits.

    For each chunk of tokens, the logits, their gradient and the products with it are computed together. The products
    have the dtype of `nn.functional.linear`, also under autocast. The weight's gradient is summed over the chunks in
    float32. The host does not wait for any value.

    Args:
        hidden: (..., d), input of the output projection.
        weight: (V, d), the virtual weight.
        targets: (...), -100 for masked tokens. If all tokens are masked, the loss is 0.
        z_loss: ζ.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    with torch.autocast(device, enabled=False):
        return LossTerms(*_LinearCrossEntropy.apply(hidden, weight, targets, z_loss, dtype))  # type: ignore[misc]


class LossHead(nn.Module):
    """Mixin for an output projection without bias. Its forward returns the loss if it is given targets.

    FSDP gathers a module's parameters only for the module's own forward, so the fused loss has to be computed there.
    The layer class after the mixin must have `virtual_weight()`.
    """

    virtual_weight: Callable[[], Tensor]

    def forward(self, input: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor | LossTerms:
        """Return the logits (..., V) of `input` (..., d), or with `targets` (...) their `linear_cross_entropy`."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.virtual_weight(), targets, z_loss)


class LossLinear(LossHead, nn.Linear):
    """`nn.Linear` as a `LossHead`."""

    def virtual_weight(self) -> Tensor:
        """Return the weight."""
        return self.weight
