"""Measure the forms of the gated product, and the rounding of a gate to bfloat16."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Recorder
from benchmarks.sizes import load
from llmfoundry_wesar.functional import gated_linear
from llmfoundry_wesar.inspection import inspect_config

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {
    "F.linear(x, W)": lambda x, weight, gate: F.linear(x, weight),
    "F.linear(x, αW)": lambda x, weight, gate: F.linear(x, weight * gate),
    "gated_linear": gated_linear,
    "α F.linear(x, W)": lambda x, weight, gate: F.linear(x, weight) * gate,
}


def _results(form: Form, inputs: tuple[Tensor, ...], grad: Tensor, autocast: torch.autocast) -> list[Tensor]:
    """Return the product and its gradients by x, W and α."""
    with autocast:
        y = form(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype), allow_unused=True)]


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure the product with W_u of one size, in both precisions."""
    config, device = load(size, "wesar"), recorder.device
    matrices = {matrix.role: matrix for matrix in inspect_config(config).matrices}
    up, tokens = matrices["W_u"], config["device_train_microbatch_size"] * config["max_seq_len"]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # Composer's trainer may have chosen TF32
    x = torch.randn(tokens, up.shape[1], device=device, requires_grad=True)
    weight = torch.randn(up.shape, device=device).mul_(up.std).requires_grad_()
    gate = torch.full((1,), up.gate, device=device, requires_grad=True)
    inputs, grad = (x, weight, gate), torch.randn(tokens, up.shape[0], device=device)
    for dtype in ("amp_bf16", "fp32"):
        shape = f"x={tuple(x.shape)} W={up.shape}"
        recorder.about(suite="gate", name=f"{size} W_u", dtype=dtype, shape=shape, compiled=compiled)
        torch._dynamo.reset()
        autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "amp_bf16")
        forms = {name: torch.compile(form, fullgraph=True) if compiled else form for name, form in FORMS.items()}
        functions = {name: partial(_results, form, inputs, grad, autocast) for name, form in forms.items()}
        recorder.compare(functions, seconds / 2)
        exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        exact = _results(FORMS["F.linear(x, αW)"], exact_inputs, grad.double(), torch.autocast(device, enabled=False))
        for name in list(FORMS)[1:]:
            for what, ours, truth in zip(("y", "∂x", "∂W", "∂α"), functions[name](), exact, strict=True):
                error = torch.linalg.vector_norm(ours.double() - truth) / torch.linalg.vector_norm(truth)
                recorder.add([error.item()], variant=name, unit=f"relative error of {what}")
    if not compiled:
        recorder.about(dtype="bf16", shape="(1,)")
        for matrix in matrices.values():
            assert matrix.gate is not None
            rounded = torch.tensor(matrix.gate, dtype=torch.bfloat16).item()
            row = {"name": f"{size} α", "variant": f"{matrix.role} α={matrix.gate:.5g}", "note": "arithmetic"}
            recorder.add([abs(rounded / matrix.gate - 1)], **row, unit="relative error of αW")
            recorder.add([2.0 ** (math.frexp(rounded)[1] - 8)], **row, unit="spacing of α")
