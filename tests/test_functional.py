import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmfoundry_wesar import functional

GATES = {"scalar": (1, 1), "row": (7, 1), "column": (1, 5)}


def inputs(gate_shape, dtype=torch.float64, batch=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, 5), (7, 5), GATES[gate_shape]]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(function, tensors):
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def plain(x, weight, gate):
    return F.linear(x, weight * gate)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("gate_shape", GATES)
def test_gated_linear_equals_autograd_through_the_product(gate_shape, batch):
    """Value and all three gradients in float64, where only the order of sums differs."""
    tensors = inputs(gate_shape, batch=batch)
    for ours, theirs in zip(gradients(functional.gated_linear, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate_shape", GATES)
def test_gated_linear_passes_gradcheck(gate_shape):
    assert torch.autograd.gradcheck(functional.gated_linear, inputs(gate_shape))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gated_linear_skips_what_needs_no_gradient(frozen):
    tensors = inputs("scalar")
    tensors[frozen].requires_grad_(False)
    functional.gated_linear(*tensors).sum().backward()
    assert [t.grad is None for t in tensors] == [i == frozen for i in range(3)]


def test_gated_linear_is_as_exact_as_the_plain_product_under_autocast():
    """bf16 has 8 bits, so either path is off by about 2⁻⁸; ours may be no worse than a quarter more."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gate = (torch.randn(s, generator=generator) for s in [(64, 128), (96, 128), (1, 1)])
    exact = gradients(plain, [t.double().requires_grad_() for t in (x, weight, gate)])
    errors = []
    for function in (functional.gated_linear, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(function, [t.clone().requires_grad_() for t in (x, weight, gate)])
        assert found[0].dtype == torch.bfloat16
        assert [g.dtype for g in found[1:]] == [torch.float32] * 3
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(1.25 * theirs, 2**-9)


def test_gated_linear_keeps_no_virtual_weight_for_the_backward_pass():
    tensors = inputs("scalar", torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        functional.gated_linear(*tensors)
    assert set(saved) == {t.data_ptr() for t in tensors}


def test_weight_norm_equals_torch():
    """Value and gradients of torch.nn.utils.parametrizations.weight_norm, which uses the same formula."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False).double())
    parameters = layer.parametrizations.weight
    gain = parameters.original0.detach().mul(1.5)
    with torch.no_grad():
        parameters.original0.copy_(gain)
    (layer.weight**3).sum().backward()
    weight = parameters.original1.detach().clone().requires_grad_()
    gain = gain.squeeze(-1).requires_grad_()
    virtual = functional.weight_norm(weight, gain)
    (virtual**3).sum().backward()
    torch.testing.assert_close(virtual, layer.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, parameters.original1.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gain.grad, parameters.original0.grad.squeeze(-1), rtol=1e-12, atol=1e-12)
    rows = gain.unsqueeze(-1) * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(virtual, rows, rtol=1e-12, atol=1e-12)


def test_power_iteration_finds_the_first_singular_vectors():
    torch.manual_seed(0)
    weight = torch.randn(9, 6, dtype=torch.float64)
    left, right = F.normalize(torch.randn(9, dtype=torch.float64), dim=0), torch.zeros(6, dtype=torch.float64)
    for _ in range(200):
        left, right = functional.power_iteration(weight, left, right)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(left @ weight @ right, s[0], rtol=1e-10, atol=0)
    torch.testing.assert_close((left @ u[:, 0]).abs() * (right @ vh[0]).abs(), torch.ones_like(s[0]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("differentiable", [False, True])
def test_sigma_reparam_gradient_is_the_one_that_is_asked_for(differentiable):
    """The paper (appendix C.2) holds ‖W‖₂ constant; Zhai et al.'s code differentiates it, ∂σ/∂W = uvᵀ."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    u, s, vh = torch.linalg.svd(weight.detach())
    virtual = functional.sigma_reparam(weight, gate, u[:, 0], vh[0], differentiable)
    torch.testing.assert_close(virtual, gate * weight / s[0], rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(6, 5, dtype=torch.float64)
    grad_weight, grad_gate = torch.autograd.grad(virtual, (weight, gate), cotangent)
    expected = gate / s[0] * cotangent
    if differentiable:
        expected = expected - gate / s[0] ** 2 * (cotangent * weight).sum() * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(grad_weight, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_gate, (cotangent * weight).sum().view(1) / s[0], rtol=1e-10, atol=1e-12)
