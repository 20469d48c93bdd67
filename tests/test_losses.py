from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from llmfoundry_wesar import losses
from llmfoundry_wesar.losses import LossLinear, cross_entropy, linear_cross_entropy
from tests.distributed import launch
from tests.recorder import Recorder

Z_LOSS = 0.01


def plain(logits: Tensor, targets: Tensor, z_loss: float = Z_LOSS) -> tuple[Tensor, Tensor]:
    """Compute the formula as it is written, over the unmasked rows only."""
    logits, targets = logits[targets != -100], targets[targets != -100]
    lse = torch.log(torch.exp(logits).sum(-1))
    return (lse - logits[range(len(targets)), targets]).mean(), z_loss * (lse**2).mean()


def example(tokens: int, vocabulary: int, width: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / 2
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, copy=True).requires_grad_()


@pytest.fixture(params=[1, 7, 10**9], ids=["token by token", "uneven chunks", "one chunk"])
def tokens_a_chunk(request, monkeypatch):
    """Set the number of tokens in a chunk, for a vocabulary of 101."""
    monkeypatch.setattr(losses, "_CHUNK", 101 * request.param)
    monkeypatch.setitem(losses.PROJECTED_CHUNK, "cpu", 101 * request.param)


@pytest.fixture(params=["softmax", "kernels"])
def device(request, monkeypatch):
    """Choose the code for a CPU or the functions that CUDA compiles, which run uncompiled here."""
    if request.param == "kernels":
        monkeypatch.setattr(losses, "_takes_kernels", lambda logits: True)
        monkeypatch.setattr(losses, "_compiled_row_terms", losses._row_terms)
        monkeypatch.setattr(losses, "_compiled_gradient", losses._gradient)
    return request.param


def test_uniform_logits_by_hand():
    """Equal logits c over V = 8 give log 8 and ζ·(c + log 8)², for any values in the masked rows."""
    logits = torch.full((2, 3, 8), 2.0)
    logits[0, 0] = 1e4
    targets = torch.tensor([[-100, 1, 2], [3, -100, 5]])
    terms = cross_entropy(logits, targets, z_loss=0.5)
    log8 = 2.0794415416798357
    assert terms.cross_entropy.item() == pytest.approx(log8, rel=1e-6)
    assert terms.z_loss.item() == pytest.approx(0.5 * (2 + log8) ** 2, rel=1e-6)
    assert terms.total.item() == pytest.approx(log8 + 0.5 * (2 + log8) ** 2, rel=1e-6)


# Each gradient is computed in float32, or float64, and rounded once. The logits are of order 10, so lse loses one
# digit.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
@pytest.mark.usefixtures("device", "tokens_a_chunk")
def test_cross_entropy_equals_formula(dtype: torch.dtype, rtol: float):
    """The logits are not changed, because Composer computes its train metrics from them after the loss."""
    hidden, weight, targets = example(23, 101)
    logits = leaf(hidden @ weight.T, dtype)
    exact = leaf(logits.detach(), torch.float64)
    terms = cross_entropy(logits, targets, Z_LOSS)
    reference = plain(exact, targets)
    value_rtol = min(rtol, 1e-6)
    torch.testing.assert_close(terms.cross_entropy.double(), reference[0], rtol=value_rtol, atol=0)
    torch.testing.assert_close(terms.z_loss.double(), reference[1], rtol=value_rtol, atol=0)
    (0.7 * terms.total).backward()
    (0.7 * sum(reference)).backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits, exact.to(dtype))
    # Below float16's smallest normal number its spacing is 2⁻²⁴.
    atol = 2**-24 if dtype == torch.float16 else 1e-3 * rtol
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("device", "tokens_a_chunk")
def test_linear_cross_entropy_equals_formula(dtype: torch.dtype, rtol: float):
    """Equal except for the order of sums: rtol is relative to the largest entry."""
    hidden, weight, targets = example(23, 101)
    ours, exact = [leaf(hidden, dtype), leaf(weight, dtype)], [leaf(hidden, torch.float64), leaf(weight, torch.float64)]
    terms = linear_cross_entropy(*ours, targets, Z_LOSS)
    reference = plain(exact[0] @ exact[1].T, targets)
    torch.testing.assert_close(terms.cross_entropy.double(), reference[0], rtol=rtol, atol=0)
    torch.testing.assert_close(terms.z_loss.double(), reference[1], rtol=rtol, atol=0)
    (0.7 * terms.total).backward()
    (0.7 * sum(reference)).backward()
    for tensor, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), truth.grad, rtol=0, atol=rtol * truth.grad.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.usefixtures("device", "tokens_a_chunk")
def test_linear_cross_entropy_in_bfloat16_errs_no_more_than_unfused(autocast: bool):
    """Both round the same operands. The order of the sums differs, so a fifth more error is allowed."""
    hidden, weight, targets = example(23, 101)
    # The inputs of the products are rounded to bfloat16, so that the reference starts from the same values.
    hidden, weight = hidden.bfloat16().double(), weight.bfloat16().double()
    exact = [leaf(hidden, torch.float64), leaf(weight, torch.float64)]
    sum(plain(exact[0] @ exact[1].T, targets)).backward()
    errors = {}
    for fused in (True, False):
        pair = [leaf(hidden, torch.bfloat16), leaf(weight, torch.float32 if autocast else torch.bfloat16)]
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            if fused:
                total = linear_cross_entropy(*pair, targets, Z_LOSS).total
            else:
                total = sum(plain(F.linear(*pair).float(), targets))
        assert total.dtype == torch.float32
        total.backward()
        assert pair[1].grad.dtype == pair[1].dtype
        errors[fused] = [(p.grad.double() - e.grad).norm() / e.grad.norm() for p, e in zip(pair, exact, strict=True)]
    assert errors[True][0] < 1.2 * errors[False][0]
    assert errors[True][1] < 1.2 * errors[False][1]


def test_weight_gradient_is_summed_in_float32():
    """A thousand tokens have the same small gradient. A sum in bfloat16 would stop growing after 256 of them."""
    hidden, weight = torch.ones(1000, 1, dtype=torch.bfloat16), leaf(torch.zeros(2, 1), torch.float32)
    targets = torch.zeros(1000, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setitem(losses.PROJECTED_CHUNK, "cpu", 2)
        linear_cross_entropy(hidden, weight, targets).total.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.5], [0.5]]), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("device")
def test_all_masked_is_zero_without_nan():
    """The loss is 0, as in foundry's `compute_loss_from_logits`."""
    hidden, weight, _ = example(5, 11)
    hidden, weight = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    targets = torch.full((5,), -100)
    for terms in (cross_entropy(hidden @ weight.T, targets, 1.0), linear_cross_entropy(hidden, weight, targets, 1.0)):
        assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
        hidden.grad = weight.grad = None
        terms.total.backward()
        assert not hidden.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize("fused", [False, True])
def test_trainer_may_scale_the_total_in_place_and_log_the_terms(fused: bool):
    """Composer multiplies `total` in place by the microbatch's share of the batch, and logs the other terms."""
    hidden, weight, targets = example(23, 101)
    gradients = []
    for in_place in (True, False):
        h, w = leaf(hidden, torch.float64), leaf(weight, torch.float64)
        terms = linear_cross_entropy(h, w, targets, Z_LOSS) if fused else cross_entropy(h @ w.T, targets, Z_LOSS)
        logged = [terms.cross_entropy.item(), terms.z_loss.item()]
        assert not terms.cross_entropy.requires_grad
        assert not terms.z_loss.requires_grad
        total = terms.total.mul_(0.25) if in_place else terms.total * 0.25
        total.backward()
        assert [terms.cross_entropy.item(), terms.z_loss.item()] == logged
        gradients.append((h.grad, w.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("fused", [False, True])
def test_second_backward_gives_the_same_gradient(fused: bool):
    """The backward pass overwrites nothing that it reads."""
    hidden, weight, targets = example(23, 101)
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    total = (linear_cross_entropy(h, w, targets) if fused else cross_entropy(h @ w.T, targets)).total
    first = torch.autograd.grad(total, (h, w), 0.3 * torch.ones(()), retain_graph=True)
    second = torch.autograd.grad(total, (h, w), 0.3 * torch.ones(()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_no_more_than_a_chunk_in_float32_and_no_host_read(monkeypatch: pytest.MonkeyPatch):
    """Beside T×V logits in bfloat16, only their gradient has this size, also in bfloat16.

    Fused, not even the logits have it.
    """
    monkeypatch.setattr(losses, "_CHUNK", 4 * 500)
    monkeypatch.setitem(losses.PROJECTED_CHUNK, "cpu", 4 * 500)
    # Call the function itself, because the recorder does not see inside a custom operator.
    monkeypatch.setattr(losses, "_projected", losses._projected._init_fn)
    tokens, vocabulary, width = 60, 500, 3
    hidden, weight, targets = example(tokens, vocabulary, width)
    hidden, weight = leaf(hidden, torch.bfloat16), leaf(weight, torch.bfloat16)
    logits = (hidden @ weight.T).detach().requires_grad_()
    with Recorder() as unfused:
        cross_entropy(logits, targets, Z_LOSS).total.backward()
    with Recorder() as fused:
        linear_cross_entropy(hidden, weight, targets, Z_LOSS).total.backward()
    with Recorder() as stock:
        loss = F.cross_entropy(logits.float(), targets, reduction="none").sum()
        (loss if torch.all(targets == -100) else loss / (targets != -100).sum()).backward()
    assert (stock.largest[torch.float32], stock.reads) == (tokens * vocabulary, 1)
    assert (unfused.largest[torch.float32], unfused.reads) == (4 * vocabulary, 0)
    assert unfused.largest[torch.bfloat16] == tokens * vocabulary
    assert (fused.largest[torch.float32], fused.reads) == (4 * vocabulary, 0)
    assert fused.largest[torch.bfloat16] == 4 * vocabulary


def test_head_compiles_without_a_graph_break():
    """Compiled and eager run the same operators in the same order, so only the kernels' rounding differs."""
    torch.manual_seed(0)
    head, hidden = LossLinear(16, 33, bias=False), torch.randn(2, 5, 16)
    targets = torch.randint(33, (2, 5))
    results = []
    for forward in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        head.weight.grad = None
        terms = forward(hidden, targets, Z_LOSS)
        terms.total.backward()
        results.append((*(term.detach() for term in terms), head.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = LossLinear(6, 13, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor | losses.LossTerms:
        return self.head(self.body(hidden), targets, Z_LOSS)


def sharded_steps() -> list[tuple[float, list[Tensor]]]:
    """Return loss and gradients, fused and unfused, of a model whose head FSDP2 shards as a unit, as Composer does."""
    steps = []
    for fused in (True, False):
        torch.manual_seed(0)
        model, rank = TinyModel(), dist.get_rank()
        hidden, targets = torch.randn(2, 40, 6)[rank], torch.randint(13, (2, 40))[rank]
        fully_shard(model.head)
        fully_shard(model)
        total = model(hidden, targets).total if fused else cross_entropy(model(hidden), targets, Z_LOSS).total
        total.backward()
        steps.append((total.item(), [parameter.grad.full_tensor() for parameter in model.parameters()]))
    return steps


def test_fused_loss_of_a_sharded_head_equals_the_unfused_one():
    """On two ranks, except for the order of float32 sums.

    A head that is used outside its own forward would see only a shard.
    """
    for fused, unfused in launch(sharded_steps):
        torch.testing.assert_close(fused, unfused, rtol=1e-5, atol=1e-6)
