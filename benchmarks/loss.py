"""Measure cross-entropy with z-loss: from the output projection's input to the gradients of that input and of W_p."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Recorder
from benchmarks.sizes import load
from llmfoundry_wesar import losses

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_Z_LOSS = 1e-4


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets) + _Z_LOSS * logits.logsumexp(-1).square().mean()


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return losses.cross_entropy(F.linear(hidden, weight), targets, _Z_LOSS).total


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return losses.linear_cross_entropy(hidden, weight, targets, _Z_LOSS).total


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size. The compiled baseline is the compiled formula. The other losses are the same in both modes."""
    config, device = load(size, "wesar"), recorder.device
    tokens = config["device_train_microbatch_size"] * config["max_seq_len"]
    vocabulary, width = config["model"]["vocab_size"], config["model"]["d_model"]
    shape = f"T={tokens} V={vocabulary} d={width}"
    recorder.about(suite="loss", name=size, dtype=recorder.dtype, shape=shape, compiled=compiled)
    torch.manual_seed(0)
    torch._dynamo.reset()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device).mul_(width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def gradients(loss: Loss) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=recorder.dtype == "amp_bf16"):
            value = loss(hidden, weight, targets)
        return torch.autograd.grad(value, (hidden, weight))

    forms: dict[str, Loss] = {"plain formula": torch.compile(_plain) if compiled else _plain}
    forms |= {"cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy}
    recorder.compare({name: partial(gradients, form) for name, form in forms.items()}, seconds)
