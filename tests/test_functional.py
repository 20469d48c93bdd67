import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from llmfoundry_wesar import functional

# The default compiler without its code generation, which takes a minute.
PARTITIONED = aot_autograd(
    fw_compiler=lambda graph, _: graph.forward,
    bw_compiler=lambda graph, _: graph.forward,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table(),
)

GATES = {"scalar": (1,), "row": (7, 1), "column": (5,)}


@pytest.fixture(params=["autograd", "own backward"])
def form(request, monkeypatch):
    """Choose one of the two forms of `gated_linear`; both are tested on small matrices."""
    monkeypatch.setattr(functional, "_SMALL", 2**16 if request.param == "autograd" else 0)
    return request.param


def inputs(gate_shape, dtype=torch.float64, batch=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, 5), (7, 5), GATES[gate_shape], (7,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(function, tensors):
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def plain(x, weight, gate, bias=None):
    return F.linear(x, weight * gate, bias)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("gate_shape", GATES)
def test_gated_linear_equals_autograd_through_the_product(gate_shape, batch, form):
    """The value and all four gradients are equal in float64, where only the order of sums differs."""
    tensors = inputs(gate_shape, batch=batch)
    for ours, theirs in zip(gradients(functional.gated_linear, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate_shape", GATES)
def test_gated_linear_passes_gradcheck(gate_shape, form):
    assert torch.autograd.gradcheck(functional.gated_linear, inputs(gate_shape))


def test_gated_linear_has_no_wrong_second_derivative(form):
    """Autograd's form has the right second derivative.

    The other form overwrites memory it would need, so autograd raises.
    """
    tensors = inputs("scalar")
    if form == "autograd":
        assert torch.autograd.gradgradcheck(functional.gated_linear, tensors)
    else:
        output = functional.gated_linear(*tensors).square().sum()
        first = torch.autograd.grad(output, tensors, create_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(sum(g.sum() for g in first), tensors)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_gated_linear_skips_what_needs_no_gradient(frozen, form):
    """The other gradients do not depend on which input needs none."""
    tensors = inputs("scalar")
    expected = [gradient for i, gradient in enumerate(gradients(plain, tensors)[1:]) if i != frozen]
    tensors[frozen].requires_grad_(False)
    output = functional.gated_linear(*tensors)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    assert [t.grad is None for t in tensors] == [i == frozen for i in range(4)]
    for ours, theirs in zip([t.grad for t in tensors if t.grad is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gated_linear_used_twice_adds_up_its_gradients(form):
    """One matrix and gate are used in two products, as with shared layers or recomputed activations."""
    tensors = inputs("scalar")

    def twice(product):
        return lambda x, *others: product(x, *others) + product(x.sin(), *others)

    found, expected = gradients(twice(functional.gated_linear), tensors), gradients(twice(plain), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Dtypes of x, of W and b, and of α, and whether autocast to bfloat16 is on. In this order: eager float32, the trainer's
# amp_bf16, FSDP's mixed precision with every parameter in bfloat16, and the same with the gates in float32.
PRECISIONS = {
    "float32": ((torch.float32, torch.float32, torch.float32), False),
    "autocast": ((torch.float32, torch.float32, torch.float32), True),
    "autocast, half the input": ((torch.bfloat16, torch.float32, torch.float32), True),
    "FSDP": ((torch.bfloat16, torch.bfloat16, torch.bfloat16), False),
    "FSDP, autocast": ((torch.float32, torch.bfloat16, torch.bfloat16), True),
    "FSDP, gate in float32": ((torch.bfloat16, torch.bfloat16, torch.float32), False),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gated_linear_is_as_exact_as_the_plain_product(precision, compiled, form):
    """Against float64, the errors of value and gradients are at most a quarter larger than autograd's, by chance.

    The gate's gradient is one number, so its error depends on chance: half a unit in its last place is allowed.
    """
    dtypes, autocast = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    dtypes = (*dtypes, dtypes[1])
    shapes = [(64, 128), (96, 128), (1,), (96,)]
    tensors = [torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    exact = gradients(plain, [t.double().requires_grad_() for t in tensors])
    unit = torch.finfo(torch.float32 if precision == "float32" else torch.bfloat16).eps / 2

    def reference(x, weight, gate, bias):
        dtype = torch.bfloat16 if autocast else x.dtype
        return F.linear(x.to(dtype), (weight * gate).to(dtype), bias.to(dtype))

    torch._dynamo.reset()
    ours = torch.compile(functional.gated_linear, backend="aot_eager", fullgraph=True)
    errors = []
    for function in (ours if compiled else functional.gated_linear, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = gradients(function, [t.clone().requires_grad_() for t in tensors])
        assert found[0].dtype == (torch.bfloat16 if autocast else dtypes[0])
        assert tuple(g.dtype for g in found[1:]) == dtypes
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(1.25 * theirs, unit)


def test_the_gates_gradient_of_a_large_matrix_is_a_sum_of_float32_exactness():
    """The sum has 2²¹ terms. Added one after the other the error would be 1e-5, added in blocks a few units of 6e-8."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gate = (torch.randn(s, generator=generator) for s in [(2, 2048), (1024, 2048), (1,)])
    found = gradients(functional.gated_linear, [t.clone().requires_grad_() for t in (x, weight, gate)])[-1]
    exact = gradients(plain, [t.double().requires_grad_() for t in (x, weight, gate)])[-1]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_gated_linear_keeps_no_virtual_weight_for_the_backward_pass():
    """For a matrix that is not small, autograd saves only the inputs."""
    tensors = [torch.randn(s, requires_grad=True) for s in [(2, 256), (257, 256), (1,)]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        functional.gated_linear(*tensors)
    assert set(saved) == {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_gated_linear_keeps_no_virtual_weight_either(autocast):
    """With the default compiler's partitioner and decompositions, only x, W and α are kept between the passes.

    The plain product keeps αW: the partitioner never recomputes what a product of the backward pass reads.
    """
    kept = {}
    for name, product in {"ours": functional.gated_linear, "plain": plain}.items():
        torch._dynamo.reset()
        tensors = [torch.randn(s, requires_grad=True) for s in [(2, 256), (257, 256), (1,)]]
        saved = []
        compiled = torch.compile(product, backend=PARTITIONED, fullgraph=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            compiled(*tensors)
        kept[name] = sum(t.numel() == 257 * 256 and t.data_ptr() != tensors[1].data_ptr() for t in saved)
    assert kept == {"ours": 0, "plain": 1}


def test_weight_norm_equals_torch():
    """Value and gradients equal those of torch.nn.utils.parametrizations.weight_norm, which has the same formula."""
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
    """The paper (appendix C.2) treats ‖W‖₂ as a constant. The code of Zhai et al. differentiates it: ∂σ/∂W = uvᵀ."""
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


def test_sigma_reparam_of_a_bfloat16_weight_is_rounded_once():
    """To the bit, under FSDP's mixed precision. If α/‖W‖₂ were in bfloat16, every entry could be wrong by up to 2⁻⁹."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.tensor([1.375], dtype=torch.bfloat16)
    vectors = functional.power_iteration(weight, torch.full((64,), 64**-0.5), torch.full((32,), 32**-0.5))
    norm = vectors[0] @ (weight.float() @ vectors[1])
    found = functional.sigma_reparam(weight, gate, *vectors)
    assert torch.equal(found, (weight.float() * (gate.float() / norm)).bfloat16())
    assert not torch.equal(found, weight * (gate / norm).bfloat16())


def test_sigma_reparam_computes_the_norm_in_float32_under_autocast():
    """To the bit. In bfloat16 the norm would not change for several steps, and then jump by 0.4%."""
    weight, gate = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    vectors = torch.full((64,), 64**-0.5), torch.full((32,), 32**-0.5)
    expected = functional.power_iteration(weight, *vectors)
    scaled = functional.sigma_reparam(weight, gate, *expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.power_iteration(weight, *vectors)
        assert torch.equal(functional.sigma_reparam(weight, gate, *expected), scaled)
        low = [v.bfloat16() for v in vectors]
        assert [v.dtype for v in functional.power_iteration(weight.bfloat16(), *low)] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
