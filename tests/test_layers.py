import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmfoundry_wesar.layers import (
    EMBEDDINGS,
    GatedEmbedding,
    GatedLinear,
    ScaledEmbedding,
    SigmaReparamEmbedding,
    SigmaReparamLinear,
    WeightNormEmbedding,
    WeightNormLinear,
)

LINEAR = {
    "gated": lambda **kw: GatedLinear(5, 7, **kw),
    "rows": lambda **kw: GatedLinear(5, 7, gate_shape="row", **kw),
    "columns": lambda **kw: GatedLinear(5, 7, gate_shape="column", **kw),
    "fixed": lambda **kw: GatedLinear(5, 7, trainable=False, **kw),
    "weight_norm": lambda **kw: WeightNormLinear(5, 7, **kw),
    "sigma_reparam": lambda **kw: SigmaReparamLinear(5, 7, **kw),
}
EMBEDDING = {
    "gated": lambda **kw: GatedEmbedding(11, 5, **kw),
    "rows": lambda **kw: GatedEmbedding(11, 5, gate_shape="row", **kw),
    "columns": lambda **kw: GatedEmbedding(11, 5, gate_shape="column", **kw),
    "fixed": lambda **kw: GatedEmbedding(11, 5, trainable=False, **kw),
    "weight_norm": lambda **kw: WeightNormEmbedding(11, 5, **kw),
    "sigma_reparam": lambda **kw: SigmaReparamEmbedding(11, 5, **kw),
}
# Number of elements of the gate: (in a linear layer, in an embedding).
SIZES = {
    "gated": (1, 1),
    "rows": (7, 11),
    "columns": (5, 5),
    "fixed": (1, 1),
    "weight_norm": (7, 11),
    "sigma_reparam": (1, 1),
}


def started(layer, scale=1.3):
    """Return a layer after its init, in evaluation mode, because σReparam needs its callback to train."""
    layer.start_gate_(scale)
    if layer.gate.numel() > 1:
        with torch.no_grad():
            layer.gate.mul_(torch.linspace(0.5, 2, layer.gate.numel()))
    return layer.eval()


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_computes_with_its_virtual_weight(kind):
    torch.manual_seed(0)
    layer, x = started(LINEAR[kind]()).double(), torch.randn(3, 5, dtype=torch.float64)
    assert layer.gate.shape == (SIZES[kind][0],)
    assert not torch.equal(layer.virtual_weight(), layer.weight)
    expected = x @ layer.virtual_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_embedding_computes_with_its_virtual_weight(kind):
    """Values and gradients of the lookup and of the unembedding. Only the lookup has the constant scale."""
    torch.manual_seed(0)
    layer = started(EMBEDDING[kind](scale=3.0)).double()
    assert layer.gate.shape == (SIZES[kind][1],)
    ids, hidden = torch.tensor([[0, 3, 3], [10, 1, 0]]), torch.randn(2, 5, dtype=torch.float64)
    parameters = list(layer.parameters())
    outputs = [
        (layer(ids), 3.0 * layer.virtual_weight()[ids]),
        (layer(hidden, True), hidden @ layer.virtual_weight().T),
    ]
    for ours, reference in outputs:
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, parameters, cotangent, retain_graph=True),
            torch.autograd.grad(reference, parameters, cotangent, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ScaledEmbedding, GatedEmbedding])
def test_the_padding_token_gets_no_gradient(make):
    layer = make(11, 5, padding_idx=3)
    layer(torch.tensor([3, 1])).sum().backward()
    assert layer.weight.grad.any(dim=1).nonzero().tolist() == [[1]]


@pytest.mark.parametrize("kind", LINEAR)
def test_copies_keep_values_class_and_trainability(kind):
    layer = started(LINEAR[kind]())
    x = torch.randn(3, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in layer.named_parameters()]
        assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = LINEAR[kind]().eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    assert "gate" in fresh.state_dict()


@pytest.mark.parametrize("kind", LINEAR)
def test_dtypes_and_autocast(kind):
    """`.to` converts the gate too. Autocast gives the result of float32, rounded to the 8 bits of bfloat16."""
    torch.manual_seed(0)
    layer, x = started(LINEAR[kind]()), torch.randn(3, 5)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    layer = started(LINEAR[kind]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("kind", "backend"), [("gated", "inductor"), ("weight_norm", "aot_eager"), ("sigma_reparam", "aot_eager")]
)
def test_compiles_without_a_graph_break(kind, backend):
    """One kind with generated code, which takes ten seconds on a CPU."""
    torch.manual_seed(0)
    layer, x = started(LINEAR[kind]()), torch.randn(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    parameters = list(layer.parameters())
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), parameters),
        torch.autograd.grad(layer(x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [*LINEAR.values(), *EMBEDDING.values()])
def test_meta_device_holds_no_data_until_it_is_materialised(make):
    layer = make(device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.normal_()
    layer.start_gate_(2.0)
    assert all(t.isfinite().all() for t in (layer.virtual_weight(), layer.gate))


@pytest.mark.parametrize("make", [WeightNormLinear, SigmaReparamLinear])
def test_a_layer_that_would_divide_by_a_norm_of_0_does_not_start(make):
    """Its output would be NaN. One row of zeros is enough for weight normalisation, but not for σReparam."""
    layer = make(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    with (
        pytest.raises(ValueError, match="is 0, and the layer divides by it")
        if make is WeightNormLinear
        else nullcontext()
    ):
        layer.start_gate_(1.0)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="the norm of the matrix, or of one of its rows, is 0"):
        layer.start_gate_(1.0)


def test_unknown_gate_shape_is_refused():
    with pytest.raises(ValueError, match=r"gate_shape: 'rows'.*scalar, row, column"):
        GatedLinear(2, 2, gate_shape="rows")


def test_every_linear_class_has_its_embedding():
    for linear, embedding in EMBEDDINGS.items():
        ours = {base for base in linear.__mro__ if base.__module__ == "llmfoundry_wesar.layers"} - {linear}
        shared = {base for base in embedding.__mro__ if base.__module__ == "llmfoundry_wesar.layers"}
        assert {base for base in ours if "Linear" not in base.__name__} <= shared


def test_with_a_fixed_gate_adamw_on_the_actual_weight_follows_adamw_on_the_virtual_one():
    """Section 4.2: with ε → 0 Adam's step does not depend on the scale of the gradient.

    So W moves by lr·M/√V for any α, and αW moves as a plain weight with learning rate lr·α. Weight decay multiplies W,
    and therefore αW, by 1 − lr·λ. The plain weight gets the same factor from λ/α.
    """
    torch.manual_seed(0)
    alpha, lr, decay = 0.37, 1e-2, 0.1
    gated = GatedLinear(6, 4, bias=False, trainable=False).double()
    gated.start_gate_(alpha)
    plain = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(alpha * gated.weight)
    options = {"betas": (0.9, 0.95), "eps": 1e-30}
    optimizers = [
        torch.optim.AdamW(gated.parameters(), lr=lr, weight_decay=decay, **options),
        torch.optim.AdamW(plain.parameters(), lr=lr * alpha, weight_decay=decay / alpha, **options),
    ]
    for _ in range(50):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
        for layer, optimizer in zip((gated, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(layer(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(gated.virtual_weight(), plain.weight, rtol=1e-9, atol=1e-12)


def test_sigma_reparam_divides_by_the_spectral_norm():
    """When u and v have converged, ‖W‖₂ agrees with the SVD up to the square of their remaining angle."""
    torch.manual_seed(0)
    layer = SigmaReparamLinear(64, 48, bias=False)
    nn.init.normal_(layer.weight)
    layer.start_gate_(1.0)
    layer.iterate_(steps=100)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.virtual_weight(), 2).item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_sigma_reparam_starts_near_the_spectral_norm(seed):
    """After the warm-up that the init runs, ‖W‖₂ is near that of the SVD.

    The error grows as the two largest singular values come closer: at most 3.3% here. With 8 iterations it would be up
    to 7%, with none a factor of 20 and more. Further iterations continue from the warm-up's vectors.
    """
    torch.manual_seed(seed)
    layer = SigmaReparamLinear(128, 512, bias=False)
    nn.init.normal_(layer.weight)
    layer.start_gate_(1.0)
    start = torch.linalg.matrix_norm(layer.virtual_weight(), 2).item()
    assert 1 - 1e-5 < start < 1.05
    layer.iterate_(steps=32)
    assert 1 - 1e-5 < torch.linalg.matrix_norm(layer.virtual_weight(), 2).item() < start + 1e-5


def test_sigma_reparam_iterates_once_a_step_and_never_without_its_callback():
    layer = SigmaReparamLinear(5, 7)
    layer.start_gate_(1.0)
    with pytest.raises(RuntimeError, match=r"callbacks: \{power_iteration"):
        layer(torch.randn(2, 5))
    nn.init.normal_(layer.weight)
    layer.iterate = True
    before = layer.left.clone()
    layer(torch.randn(2, 5))
    after = layer.left.clone()
    assert not torch.equal(before, after)
    layer(torch.randn(2, 5))
    assert torch.equal(layer.left, after)
    layer.iterate = True
    layer.eval()(torch.randn(2, 5))
    assert torch.equal(layer.left, after)
