"""Compare `wesar_adamw` with gated layers under AdamW, and with formulas."""

import copy
import math
from typing import Any

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, DataSpec
from composer.optim import LinearWithWarmupScheduler
from llmfoundry.utils.builders import build_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llmfoundry_wesar.callbacks import GateMonitor, OptimizerGates, UpdateRatioMonitor
from llmfoundry_wesar.callbacks.update_ratio_monitor import METRICS
from llmfoundry_wesar.layers import Gated
from llmfoundry_wesar.optimizer import WeSaRAdamW
from llmfoundry_wesar.sharded import reparameterized_layers
from tests.callbacks import training
from tests.tiny import PAPER_SIGMA, batch, build

LR, BETAS, EPS, DECAY, MAX_NORM = 2e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
FROZEN = "model.transformer.blocks.0.norm_1.weight"

MODELS = {
    "paper": {},
    "GQA": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
    "GLU": {"ffn_config": {"ffn_type": "mptglu"}, "no_bias": False},
}


def pair(**overrides: Any) -> tuple[nn.Module, nn.Module]:
    """Build a gated model and the plain one with V = αW in float64, with a frozen norm in both.

    Each W is scaled to have exactly σ, so that rms(V)/σ is the gate.
    """
    gated = build("wesar", **overrides).double()
    plain = build("he_init", embedding_scaling=False, **overrides).double()
    with torch.no_grad():
        for layer in reparameterized_layers(gated).values():
            layer.weight.mul_(PAPER_SIGMA / layer.weight.square().mean().sqrt())
        copy_virtual(gated, plain)
    for model in (gated, plain):
        model.get_parameter(FROZEN).requires_grad = False
    return gated, plain


@torch.no_grad()
def copy_virtual(gated: nn.Module, plain: nn.Module) -> None:
    layers = reparameterized_layers(gated)
    for name, parameter in plain.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        parameter.copy_(gated.get_parameter(name) if layer is None else layer.weight * layer.gate)


def optimizers(gated: nn.Module, plain: nn.Module) -> tuple[torch.optim.AdamW, WeSaRAdamW]:
    """Build both optimizers with foundry's builder and the settings' kind of parameter groups."""
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    groups = {"param_groups": [{"param_str_match": r"norm|gate|bias", "weight_decay": 0.0}]}
    adamw = build_optimizer(gated, "adamw", copy.deepcopy(options | groups))
    return adamw, build_optimizer(plain, "wesar_adamw", options | copy.deepcopy(groups) | {"max_norm": MAX_NORM})


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_each_step_is_the_gated_models(overrides):
    """In float64, after one step from equal states, weights, gates and all moments differ by at most 1e-13.

    A step has two microbatches. There is a warm-up, and clipping by MAX_NORM takes effect in each step.
    """
    gated, plain = pair(**overrides)
    adamw, wesar = optimizers(gated, plain)
    layers = reparameterized_layers(gated)
    for step in range(4):
        copy_virtual(gated, plain)
        for name, layer in layers.items():
            if step > 0:
                copy_state(adamw, layer, wesar.state[plain.get_submodule(name).weight])
        for name, parameter in gated.named_parameters():
            if step > 0 and name.rpartition(".")[0] not in layers and parameter.requires_grad:
                for key, value in adamw.state[parameter].items():
                    wesar.state[plain.get_parameter(name)][key].copy_(value)
        for model, optimizer in ((gated, adamw), (plain, wesar)):
            optimizer.zero_grad()
            for seed in (step, 100 + step):
                part = batch(seed=seed)
                (model.loss(model(part), part) / 2).backward()
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / 3)
        assert torch.nn.utils.clip_grad_norm_(gated.parameters(), MAX_NORM) > 2 * MAX_NORM
        adamw.step()
        wesar.step()
        for name, layer in layers.items():
            virtual = plain.get_submodule(name).weight
            assert relative(virtual, layer.weight * layer.gate) < 1e-13
            expected = {key: value.clone() for key, value in wesar.state[virtual].items()}
            copy_state(adamw, layer, expected)
            for key, value in expected.items():
                assert relative(wesar.state[virtual][key], value) < 1e-13, (name, key)
        for name, parameter in plain.named_parameters():
            if name.rpartition(".")[0] not in layers:
                assert relative(parameter, gated.get_parameter(name)) < 1e-13, name


@torch.no_grad()
def copy_state(adamw: torch.optim.AdamW, layer: Gated, state: dict[str, Tensor]) -> None:
    """Convert the gated model's state of a matrix to the form of the other optimizer. The two gate bounds stay."""
    state["gate"].copy_(layer.gate.squeeze())
    for prefix, parameter in (("", layer.weight), ("gate_", layer.gate)):
        for key in ("exp_avg", "exp_avg_sq"):
            state[prefix + key].copy_(adamw.state[parameter][key].view_as(state[prefix + key]))
    state["step"].copy_(adamw.state[layer.weight]["step"])


def train(model: Any, optimizer: torch.optim.Optimizer, *callbacks: Callback, **options: Any) -> dict[str, dict]:
    """Run Composer's trainer on random tokens and return what it logged, by key and step."""
    ids = torch.randint(0, 97, (15 * 4, 16), generator=torch.Generator().manual_seed(2))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    batches = DataSpec(loader, get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel())
    options |= {"max_duration": "15ba", "device_train_microbatch_size": 2}
    return training.fit(model, optimizer, list(callbacks), batches, **options)


def test_fifteen_steps_of_the_trainer_are_the_gated_models():
    """Composer's trainer, clipping, schedule and accumulation: all that the monitors log, and the loss.

    In float64 the two runs drift apart by rounding: 2e-15 was seen in the weights, and 1e-10 is allowed.
    """
    gated, plain = pair()
    adamw, wesar = optimizers(gated, plain)
    monitors = [GateMonitor("1ba"), UpdateRatioMonitor("1ba", METRICS)]
    schedule = LinearWithWarmupScheduler("4ba")
    clipping = GradientClipping("norm", MAX_NORM)
    ours = train(plain, wesar, OptimizerGates(), *copy.deepcopy(monitors), schedulers=schedule)
    theirs = train(gated, adamw, *monitors, schedulers=schedule, algorithms=clipping)
    families = ("gate/", *(f"{metric}/" for metric in METRICS))
    keys = [key for key in theirs if key.startswith(families)]
    assert len(keys) == 14 * (1 + len(METRICS))
    assert set(keys) == {key for key in ours if key.startswith(families)}
    for key in [*keys, "loss/train/total"]:
        assert len(ours[key]) == 15
        assert ours[key] == pytest.approx(theirs[key], rel=1e-10), key
    assert theirs["loss/train/total"][14] < theirs["loss/train/total"][1] - 0.1


def matrix() -> nn.Parameter:
    """Return V with rms(V) = 2, thus α₀ = 4 with σ = 1/2, and a G with ⟨G, V⟩ = 3."""
    parameter = nn.Parameter(torch.tensor([[2.0, -2.0], [2.0, 2.0]], dtype=torch.float64))
    parameter.grad = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    return parameter


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_by_hand(max_norm):
    """∂L/∂α = 3/4 and ∂L/∂W = 4G, so their norm is √(16·1.25 + 0.75²). At the first step m̂ = g and √v̂ = |g|."""
    part = 1.0 if max_norm is None else 1 / (math.sqrt(20.5625) + 1e-6)
    weight = matrix()
    optimizer = WeSaRAdamW([weight], lr=0.1, eps=1.0, weight_decay=0.5, sigma=0.5, max_norm=max_norm)
    optimizer.step()
    gate = 4 - 0.1 * 0.75 * part / (0.75 * part + 1)
    moved = torch.tensor([[4 * part / (4 * part + 1), 0.0], [0.0, 2 * part / (2 * part + 1)]], dtype=torch.float64)
    expected = gate / 4 * (1 - 0.1 * 0.5) * matrix().detach() - gate * 0.1 * moved
    assert optimizer.state[weight]["gate"].item() == pytest.approx(gate, rel=1e-14)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=0)
    assert torch.equal(weight.grad, matrix().grad)


def test_parameters_without_a_gate_move_as_under_adamw():
    """They move as under torch's AdamW, for five steps of noise and a changing learning rate.

    The gated one does not.
    """
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    options = {"lr": 1e-2, "betas": BETAS, "weight_decay": 0.3}
    ours, theirs = [{name: nn.Parameter(p.clone()) for name, p in zip("ab", start, strict=True)} for _ in range(2)]
    extra = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    wesar = WeSaRAdamW([*ours.items(), ("c", extra)], gated="^c$", **options)
    adamw = torch.optim.AdamW(theirs.values(), **options)
    for step in range(5):
        extra.grad = torch.ones_like(extra)
        for name in "ab":
            ours[name].grad = theirs[name].grad = torch.randn_like(ours[name])
        for optimizer in (wesar, adamw):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for name in "ab":
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=0)
    assert list(wesar.gates()) == [extra]


def test_compiled_kernels_compute_the_same_step():
    """Two matrices that are parts of one tensor, as under FSDP1, and a vector; the second step lacks a gradient.

    In float32, where rounding changes entries of up to 4 by up to 2.4e-7 a step.
    """
    shapes = [(64, 48), (32, 64), (48,)]

    def random(seed: int) -> list[torch.Tensor]:
        flat = torch.randn(64 * 48 + 32 * 64 + 48, generator=torch.Generator().manual_seed(seed))
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    models = [[nn.Parameter(part) for part in random(0)] for _ in range(2)]
    steps = [WeSaRAdamW(w, lr=1e-4, max_norm=1.0, fused=fused) for w, fused in zip(models, (False, True), strict=True)]
    for seed in range(3):
        for weights, optimizer in zip(models, steps, strict=True):
            for weight, grad in zip(weights, random(seed + 1), strict=True):
                weight.grad = grad
            if seed == 1:
                weights[0].grad = None
            optimizer.step()
    for eager, compiled, start in zip(*models, random(0), strict=True):
        assert (eager - start).norm() > 1e-4 * start.norm()
        torch.testing.assert_close(eager.detach(), compiled.detach(), rtol=0, atol=1e-6)


def test_what_has_no_gradient_stays():
    """A step without any gradient, a step with one, and a frozen parameter.

    As in torch, the step count counts gradients.
    """
    used, unused, frozen = matrix(), matrix(), matrix()
    unused.grad = frozen.grad = None
    frozen.requires_grad = False
    optimizer = WeSaRAdamW([used, unused, frozen], lr=0.1, sigma=0.5, max_norm=1.0)
    used.grad, grad = None, used.grad
    optimizer.step()
    assert torch.equal(used, matrix()) and optimizer.state[used]["step"] == 0
    used.grad = grad
    optimizer.step()
    alone = matrix()
    WeSaRAdamW([alone], lr=0.1, sigma=0.5, max_norm=1.0).step()
    assert torch.equal(used, alone)
    assert torch.equal(unused, matrix()) and optimizer.state[unused]["gate"] == 4
    assert frozen not in optimizer.state


def test_a_closure_has_its_gradients_used():
    weight = matrix()
    weight.grad = None
    optimizer = WeSaRAdamW([weight], lr=0.1, sigma=0.5)

    def closure() -> Tensor:
        loss = (weight * matrix().grad).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    alone = matrix()
    WeSaRAdamW([alone], lr=0.1, sigma=0.5).step()
    assert torch.equal(weight, alone)


def test_a_gate_is_held_at_a_hundredth_and_named():
    """A step of 5 would take α from 4 to −1. The gate and the matrix move as if it went to 1% of 4."""
    weight = matrix()
    optimizer = WeSaRAdamW([("some.weight", weight)], lr=5.0, eps=1e-12, weight_decay=0.0, sigma=0.5)
    weight.grad = torch.sign(weight.detach())
    optimizer.step()
    assert optimizer.held() == ["some.weight"]
    assert optimizer.gates()[weight].item() == pytest.approx(0.04, rel=1e-12)
    expected = 0.01 * matrix().detach() - 0.04 * 5 * torch.sign(matrix().detach())
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=0)
    weight.grad.neg_()
    optimizer.step()
    assert optimizer.held() == ["some.weight"]


def test_a_state_goes_through_a_file_to_the_bit(tmp_path):
    """The state of an older AdamW is refused, and the error says what to do."""
    weights = [matrix().float(), matrix().float()]
    weights = [nn.Parameter(weight.detach()) for weight in weights]
    first, second = [WeSaRAdamW([w], lr=0.1, sigma=0.5) for w in weights]
    for _ in range(2):
        weights[0].grad = matrix().grad.float()
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    weights[1].data.copy_(weights[0])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for weight, optimizer in zip(weights, (first, second), strict=True):
        weight.grad = matrix().grad.float()
        optimizer.step()
    assert torch.equal(*weights)
    adamw = torch.optim.AdamW([weights[0]])
    adamw.step()
    second.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match=r"no gate for a parameter of shape .2, 2.*load_weights_only: true"):
        second.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sigma": 0.0}, "sigma: 0.0 is not a positive number"),
        ({"sigma": math.nan}, "sigma: nan is not"),
        ({"max_norm": -1.0}, "max_norm: -1.0 is not"),
        ({"gated": "("}, r"optimizer.gated: '\(' is not a regular expression"),
        ({"gated": "lm_heat"}, "optimizer.gated: 'lm_heat' matches no trained parameter; .* some of a.weight, b.bias"),
        ({"amsgrad": True}, "amsgrad: True is not supported by wesar_adamw; remove"),
        ({"maximize": True}, "maximize: True is not supported by wesar_adamw; remove"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeSaRAdamW([("a.weight", matrix()), ("b.bias", nn.Parameter(torch.ones(3)))], **options)


def test_an_option_that_no_group_can_have_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.param_groups: sigma: 0.1 is not an option of a group; set it"):
        WeSaRAdamW([{"params": [matrix()], "lr": 0.1, "sigma": 0.1}])


def test_parameters_that_cannot_have_a_gate_are_refused():
    half = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16), requires_grad=False)
    optimizer = WeSaRAdamW([half, matrix()])  # a frozen matrix has no small updates
    optimizer.step()
    half.requires_grad_()
    with pytest.raises(ValueError, match=r"of torch.bfloat16 parameters.*amp_bf16"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"of torch.bfloat16 parameters.*amp_bf16"):
        WeSaRAdamW([half])
    zeros = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"2 initial gates .* \(a.weight: 0; b.weight: 0\); initialise the matrix"):
        WeSaRAdamW([("a.weight", zeros[0]), ("c.weight", matrix()), ("b.weight", zeros[1])]).gates()
    with pytest.raises(ValueError, match=r"1 initial gates .*lora_B.default.weight: 0\); set optimizer.gated: lora_A"):
        WeSaRAdamW([("q.lora_A.default.weight", matrix()), ("q.lora_B.default.weight", zeros[0])]).gates()
    with pytest.raises(ValueError, match="the default matches no trained parameter"):
        WeSaRAdamW([nn.Parameter(torch.ones(3))]).gates()
    with pytest.raises(ValueError, match=r"gated: 'up' needs the names of the parameters; pass model.named_param"):
        WeSaRAdamW([matrix()], gated="up").gates()


@pytest.mark.parametrize(
    "method, options, message",
    [
        (
            "he_init",
            {"algorithms": GradientClipping("norm", 1.0)},
            "gradient_clipping: .*max_norm: 1.0; remove",
        ),
        ("wesar", {}, "optimizer.name: wesar_adamw would give model.transformer.wte a second gate"),
    ],
)
def test_runs_that_cannot_train_with_it_are_refused(method, options, message):
    model = build(method)
    with pytest.raises(ValueError, match=message):
        train(model, WeSaRAdamW(model.parameters(), max_norm=1.0), OptimizerGates(), **options)


def test_a_run_of_another_optimizer_is_not_resumed(tmp_path):
    model = training.regression(training.PlainNet)
    training.train(model, torch.optim.AdamW(model.parameters()), [], save_folder=str(tmp_path))
    resumed = {"load_path": str(tmp_path / "ep1-ba4-rank0.pt"), "max_duration": "2ep"}
    with pytest.raises(
        ValueError, match=r"checkpoint has 4 steps, but no state of wesar_adamw: .*load_weights_only: true"
    ):
        training.train(model, WeSaRAdamW(model.parameters()), [OptimizerGates()], **resumed)


@pytest.mark.filterwarnings("error:wesar_adamw")
@pytest.mark.parametrize(("interval", "steps"), [("2ba", 2), ("100ba", 4)])
def test_a_warning_names_held_gates_at_the_interval_or_at_the_end(interval, steps):
    """A learning rate of 100 takes all gates to their lower bounds. As an error, the warning ends the run."""
    model = training.regression(training.PlainNet)
    optimizer = WeSaRAdamW(model.parameters(), lr=100.0, sigma=0.1)
    with pytest.raises(UserWarning, match=r"gates of .*net\.row.* were held at 1% .* lower optimizer.lr"):
        training.train(model, optimizer, [OptimizerGates(interval)])
    assert optimizer.state[model.net.row.weight]["step"] == steps
