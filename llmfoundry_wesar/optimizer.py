"""AdamW with WeSaR's gates in the optimizer, so that any model can be trained with gates."""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor, nn

from llmfoundry_wesar.functional import compiled_foreach_adamw_, foreach_adamw_
from llmfoundry_wesar.keys import did_you_mean, is_number
from llmfoundry_wesar.sharded import Shard, local, named_shards, shard_of, squares

# The lower bound of a gate, as a fraction of its initial value.
FLOOR = 0.01


class WeSaRAdamW(torch.optim.AdamW):
    r"""Train each plain matrix V as `torch.optim.AdamW` trains V = αW with a scalar gate α (Nishida et al. 2024, §4).

    With G = ∂L/∂V, the gradients of the gated model are ∂L/∂W = αG and ∂L/∂α = ⟨G, V⟩/α. Let m̂ and v̂ be the
    bias-corrected moments of αG, and α' the gate after its own Adam step, which has no weight decay. A step gives

    .. math:: V' &= (\alpha'/\alpha)(1 - \mathrm{lr}\,\lambda)\,V
                    - \alpha'\,\mathrm{lr}\,\hat m/(\sqrt{\hat v} + \epsilon) \\
              \alpha_0 &= \mathrm{rms}(V_0)/\sigma

    where V' is α'W' of the gated model, and α₀ the initial gate. Any model can be trained: fused W_q, W_k and W_v
    share one gate, and tied embeddings share one. Parameters without a gate are updated as by AdamW.

    `max_norm` bounds the norm of the gated model's gradients,
    :math:`\sqrt{\sum_V(\alpha^2\lVert G\rVert^2 + \langle G, V\rangle^2/\alpha^2) + \sum_p\lVert g_p\rVert^2}`, where
    p are the parameters without a gate. `torch.nn.utils.clip_grad_norm_` would bound the norm of all G and g_p.

    There are two differences to gated layers. α is kept at or above 1% of α₀ (`held`), because at α = 0 the matrix V
    would stay 0; a gated layer's α can change its sign. And α₀ is measured on the initial matrix, not computed.

    A step changes no gradients and, once the gates are initialised, does not wait for the device. If parameters are
    sharded, it makes one all-reduce.

    Args:
        params: As for every optimizer of torch. `gated` needs names: pass `model.named_parameters()`, or call `bind`.
        lr: Learning rate, also of the gates.
        betas: β₁ and β₂, also of the gates.
        eps: ε, also of the gates.
        weight_decay: λ, multiplied by lr as in torch. Gates have no weight decay.
        sigma: σ, the common standard deviation of all W.
        max_norm: The largest norm of all gradients, or None for no clipping.
        gated: A regular expression. Parameters whose name contains a match have a gate. By default, all parameters of
            two or more dimensions have one.
        fused: Whether to compile the update, into one kernel for each tensor. By default on CUDA only.
        amsgrad: Not supported.
        maximize: Not supported.

    Raises:
        ValueError: If an argument is invalid, a trained parameter is neither float32 nor float64, or `gated` has no
            match.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        sigma: float = 4e-5**0.5,
        max_norm: float | None = None,
        gated: str | None = None,
        *,
        fused: bool | None = None,
        amsgrad: bool = False,
        maximize: bool = False,
    ):
        for key, value in (("amsgrad", amsgrad), ("maximize", maximize)):
            if value:
                raise ValueError(f"optimizer.{key}: {value!r} is not supported by wesar_adamw; remove this key.")
        for key, value in (("sigma", sigma), ("max_norm", max_norm)):
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"optimizer.{key}: {value!r} is not a positive number.")
        try:
            self._pattern = None if gated is None else re.compile(gated)
        except (re.error, TypeError) as error:
            raise ValueError(f"optimizer.gated: {gated!r} is not a regular expression: {error}.") from error
        self.sigma, self.max_norm, self.fused = sigma, max_norm, fused
        # The factor by which the last step clipped the gradients, 0-dimensional.
        self.clipping: Tensor | None = None
        self._names: dict[Tensor, str] = {}
        self._shards: dict[Tensor, Shard] = {}
        # Whether a state was loaded that `gates` and `step` have not checked yet.
        self.loaded = False
        # With `capturable`, `load_state_dict` puts the step counts on the device, where `step` reads them.
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, capturable=True)
        for group in params if isinstance(params, list) and isinstance(params[0], dict) else ():
            for key in group.keys() - {*self.defaults, "params", "param_names", "initial_lr"}:
                fix = did_you_mean(str(key), self.defaults, "set it for the whole optimizer, or remove it.")
                raise ValueError(f"optimizer.param_groups: {key}: {group[key]!r} is not an option of a group; {fix}")
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if names:
            self._names = dict(zip(self._parameters(), names, strict=True))
            self._check_gated()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_dtypes(self.param_groups[-1]["params"])

    def bind(self, model: nn.Module) -> None:
        """Read the names, shapes and shards of the parameters from the model. Call it after the model was wrapped.

        Without `bind`, `gated` has no names to search, and the shapes of FSDP1's parameters are not known.

        Raises:
            ValueError: If no parameter has a gate.
        """
        shards = named_shards(model)
        self._names = {shard.parameter: name for name, shard in shards.items()}
        self._shards = {shard.parameter: shard for shard in shards.values()}
        self._check_gated()

    def gates(self) -> dict[Tensor, Tensor]:
        """Return the gate, 0-dimensional, of each parameter that has one. Initialise the gates if that is not yet done.

        Raises:
            ValueError: If α₀ of a matrix would be 0, infinite or NaN, or a loaded state does not have the same gates.
        """
        self._start()
        return {p: self.state[p]["gate"] for p in self._parameters() if "gate" in self.state.get(p, ())}

    def held(self) -> list[str]:
        """Return the names of the parameters whose gate was ever held at its lower bound. The host waits for this."""
        parameters = list(self.gates())
        if not parameters:
            return []
        least, floor = (torch.stack([self.state[p][key] for p in parameters]) for key in ("gate_least", "gate_floor"))
        return [self._name(p) for p, held in zip(parameters, (least < floor).tolist(), strict=True) if held]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does. The next call of `gates` or `step` checks that the state has the right gates."""
        super().load_state_dict(state_dict)
        self.loaded = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._start()
        ranks = dist.get_world_size()
        sharded = ranks > 1 and any(self._shard(p).replicas < ranks for p in self._parameters())
        blocks = []
        for group in self.param_groups:
            # If parameters are sharded, a rank may have no gradient of a parameter, while other ranks have one.
            moved = [p for p in group["params"] if p in self.state and (sharded or p.grad is not None)]
            for gated in (True, False):
                members = [p for p in moved if ("gate" in self.state[p]) == gated]
                if members:
                    blocks.append(_Block(group, list(map(self._shard, members)), [self.state[p] for p in members]))
        if not blocks:
            return loss

        rows = [block.terms(clipped=self.max_norm is not None, sharded=sharded) for block in blocks]
        sums = torch.cat([torch.stack(row) for row in itertools.chain(*rows)])
        if sharded:
            dist.all_reduce(sums)
        parts = iter(sums.double().split([len(row) for row in itertools.chain(*rows)]))
        for block, row in zip(blocks, rows, strict=True):
            block.sums = list(itertools.islice(parts, len(row)))
        self.clipping = torch.ones_like(sums[0])
        if self.max_norm is not None:
            norm = torch.stack([block.squared_norm() for block in blocks]).sum().sqrt()
            self.clipping = (self.max_norm / (norm + 1e-6)).clamp(max=1)  # as in torch.nn.utils.clip_grad_norm_
        for block in blocks:
            block.move(self.clipping, self.fused)
        return loss

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _shard(self, parameter: Tensor) -> Shard:
        return self._shards.get(parameter) or self._shards.setdefault(parameter, shard_of(parameter))

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(parameter, f"a parameter of shape {tuple(self._shard(parameter).shape)}")

    def has_gate(self, parameter: Tensor) -> bool:
        """Return whether the parameter has a gate, or will have one when the gates are initialised.

        Raises:
            ValueError: If `gated` is an expression and the optimizer does not know the parameter's name.
        """
        if self._pattern is None:
            return len(self._shard(parameter).shape) >= 2
        if parameter not in self._names:
            raise ValueError(
                f"optimizer.gated: {self._pattern.pattern!r} needs the names of the parameters; pass "
                "model.named_parameters() to the optimizer, or call its bind(model)."
            )
        return self._pattern.search(self._names[parameter]) is not None

    def _check_gated(self) -> None:
        trained = self._trained()
        if not any(map(self.has_gate, trained)):
            fits = "the default" if self._pattern is None else repr(self._pattern.pattern)
            names = ", ".join(map(self._name, trained[:8])) + (", …" if len(trained) > 8 else "")
            raise ValueError(
                f"optimizer.gated: {fits} matches no trained parameter; use an expression that matches some of {names}."
            )

    @torch.no_grad()
    def _start(self) -> None:
        """Create the state of each trained parameter that has none, with the gate α₀ = rms(V₀)/σ."""
        if self.loaded:
            self._complete_loaded_state()
            self.loaded = False
        new = [parameter for parameter in self._trained() if parameter not in self.state]
        if not new:
            return
        _check_dtypes(new)
        self._check_gated()
        gated = [parameter for parameter in new if self.has_gate(parameter)]
        starts: dict[Tensor, float] = {}
        if gated:
            parts = [local(parameter) for parameter in gated]
            sizes = torch.tensor([part.numel() for part in parts], dtype=torch.float64, device=parts[0].device)
            sums = torch.stack([torch.stack(squares(parts)).double(), sizes])
            if dist.get_world_size() > 1:
                dist.all_reduce(sums)  # replicated entries are counted several times, but equally in both sums
            starts = dict(zip(gated, (sums[0] / sums[1]).sqrt().div(self.sigma).tolist(), strict=True))
        if wrong := {self._name(parameter): gate for parameter, gate in starts.items() if not 0 < gate < math.inf}:
            listed = "; ".join(f"{name}: {gate:g}" for name, gate in itertools.islice(wrong.items(), 8))
            fix = "initialise the matrix, or set optimizer.gated to an expression that does not match it"
            if all(".lora_B." in name for name in wrong):
                fix = "set optimizer.gated: lora_A, so that LoRA's B, which starts at 0, has no gate"
            raise ValueError(
                f"wesar_adamw: {len(wrong)} initial gates rms(V)/σ cannot be trained ({listed}"
                f"{'; …' if len(wrong) > 8 else ''}); {fix}."
            )
        for parameter in new:
            gate = starts.get(parameter)
            self.state[parameter] = _state(
                parameter, 0.0, None if gate is None else (gate, 0.0, 0.0, FLOOR * gate, gate)
            )

    def _complete_loaded_state(self) -> None:
        """Check a loaded state, and add the states that FSDP1 has loaded on other ranks only.

        FSDP1 loads no state of a parameter on a rank that holds no part of the parameter.

        Raises:
            ValueError: If the state was saved by another optimizer, or with gates for other parameters.
        """
        trained = self._trained()
        for parameter in trained:
            state = self.state.get(parameter)
            if state and ("gate" in state) != self.has_gate(parameter):
                has = "a" if "gate" in state else "no"
                raise ValueError(
                    f"optimizer: the checkpoint has {has} gate for {self._name(parameter)}. It was saved by another "
                    "optimizer, or with another value of optimizer.gated. To initialise the gates from its weights, "
                    "set load_weights_only: true."
                )
        if not any(shard.unit for shard in self._shards.values()):
            return
        rows = torch.zeros(len(trained), 2 + len(_GATE), dtype=torch.float64, device=local(trained[0]).device)
        for row, parameter in zip(rows, trained, strict=True):
            if state := self.state.get(parameter):
                keys = ("step", *_GATE) if "gate" in state else ("step",)
                row[: 1 + len(keys)] = torch.stack([torch.ones_like(state["step"]), *(state[key] for key in keys)])
        dist.all_reduce(rows)
        for (ranks, step, *gate), parameter in zip(rows.tolist(), trained, strict=True):
            if ranks > 0 and parameter not in self.state:
                values = tuple(value / ranks for value in gate) if self.has_gate(parameter) else None
                self.state[parameter] = _state(parameter, step / ranks, values)


# The state of a gate: its value, its two moments, its lower bound, and the least value before the bound was applied.
_GATE = ("gate", "gate_exp_avg", "gate_exp_avg_sq", "gate_floor", "gate_least")


def _state(parameter: Tensor, step: float, gate: tuple[float, ...] | None) -> dict[str, Tensor]:
    """Return the state of a parameter, with moments of 0.

    Each number is a 0-dimensional tensor, as `step` is in AdamW, because all kinds of checkpoints can save these.
    """
    numbers = {"step": torch.full((), step, dtype=torch.float32, device=parameter.device)}
    for key, value in zip(_GATE, gate or (), strict=gate is not None):
        numbers[key] = torch.full((), value, dtype=parameter.dtype, device=parameter.device)
    moments = {
        key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
    }
    return numbers | moments


def _check_dtypes(parameters: Iterable[Tensor]) -> None:
    """Refuse trained parameters in half precision."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"wesar_adamw: small updates of {parameter.dtype} parameters are lost by rounding; keep parameters in "
                "float32 (model.master_weights_dtype: null) and compute in bfloat16 (precision: amp_bf16)."
            )


class _Block:
    """Parameters of one group that all have a gate, or all have none.

    Vectors have one entry for each parameter. They are float64, because in float32 1 - βᵗ is inexact for small t.
    """

    def __init__(self, group: dict[str, Any], shards: list[Shard], states: list[dict[str, Tensor]]):
        self.group, self.shards, self.states = group, shards, states
        self.gated = "gate" in states[0]
        self.grads = [shard.parameter.grad for shard in shards]
        if any(grad is not None and grad.is_sparse for grad in self.grads):
            raise RuntimeError("wesar_adamw does not support sparse gradients; set sparse: false in the embedding.")
        self.grads = [None if grad is None else local(grad) for grad in self.grads]
        # The results of `terms`, summed over all ranks.
        self.sums: list[Tensor] = []

    def terms(self, clipped: bool, sharded: bool) -> list[list[Tensor]]:
        """Return this rank's addends to the number of ranks with a gradient, ‖G‖² if clipped, and ⟨G, V⟩ if gated."""
        zero, one = self.shards[0].local.new_zeros(()), self.shards[0].local.new_ones(())
        rows = []
        if clipped:
            rows.append(squares([zero if grad is None else grad for grad in self.grads]))
        if self.gated:
            pairs = zip(self.grads, self.shards, strict=True)
            rows.append([zero if grad is None else _inner(grad, shard.local) for grad, shard in pairs])
        if sharded:
            shares = [1 / shard.replicas for shard in self.shards]
            rows = [list(torch._foreach_mul(row, shares)) for row in rows]  # pyright: ignore[reportPrivateImportUsage]
        return [[zero if grad is None else one for grad in self.grads], *rows]

    def squared_norm(self) -> Tensor:
        """Return the sum of the squared gradients: of W and α if there are gates, else of the parameters."""
        if not self.gated:
            return self.sums[1].sum()
        gate = self._read("gate")
        return (gate.square() * self.sums[1] + (self.sums[-1] / gate).square()).sum()

    def move(self, clipping: Tensor, fused: bool | None) -> None:
        """Update the gates, then the parameters."""
        lr, (beta1, beta2), eps = self.group["lr"], self.group["betas"], self.group["eps"]
        self.present = self.sums[0] > 0
        step = self._write("step", self._read("step") + 1)
        root = (1 - beta2**step).rsqrt()
        size = lr / (1 - beta1**step)
        shrink = torch.ones_like(size) * (1 - lr * self.group["weight_decay"])
        scale = clipping.expand_as(size)
        if self.gated:
            gate = self._read("gate")
            grad = self.sums[-1] / gate * clipping
            exp_avg = self._write("gate_exp_avg", self._read("gate_exp_avg").lerp(grad, 1 - beta1))
            exp_avg_sq = self._read("gate_exp_avg_sq").lerp(grad.square(), 1 - beta2)
            exp_avg_sq = self._write("gate_exp_avg_sq", exp_avg_sq)
            target = gate - size * exp_avg / (exp_avg_sq.sqrt() * root + eps)
            self._write("gate_least", torch.minimum(self._read("gate_least"), target))
            after = self._write("gate", torch.maximum(target, self._read("gate_floor")))
            shrink, scale, size = shrink * after / gate, scale * gate, size * after
        shrink = torch.where(self.present, shrink, 1.0)
        numbers = torch.stack([scale, shrink, size, root]).to(self.states[0]["exp_avg"].dtype).unbind(1)
        moved = []
        for shard, state, grad, four in zip(self.shards, self.states, self.grads, numbers, strict=True):
            if grad is None:
                shard.local.mul_(four[1])
            else:
                moved.append((shard.local, grad, local(state["exp_avg"]), local(state["exp_avg_sq"]), four))
        if moved:
            compiled = moved[0][0].is_cuda if fused is None else fused
            update = compiled_foreach_adamw_ if compiled else foreach_adamw_
            update(*map(list, zip(*moved, strict=True)), betas=(beta1, beta2), eps=eps)

    def _read(self, key: str) -> Tensor:
        return torch.stack([state[key] for state in self.states]).double()

    def _write(self, key: str, values: Tensor) -> Tensor:
        """Set an entry of the states whose parameters have a gradient. Return it for all states, rounded as stored."""
        old = [state[key] for state in self.states]
        new = torch.where(self.present, values, torch.stack(old)).to(old[0].dtype)
        torch._foreach_copy_(old, list(new.unbind()))  # pyright: ignore[reportPrivateImportUsage]
        return new.double()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩, 0-dimensional. On a CPU the dot product of BLAS has larger rounding errors than torch's sum."""
    return torch.dot(a.flatten(), b.flatten()) if a.is_cuda else (a * b).sum()


def optimizer_gates(optimizers: Iterable[torch.optim.Optimizer]) -> dict[Tensor, Shard]:
    """Return the gates that optimizers keep, by parameter. Every rank has all of them."""
    ranks = dist.get_world_size()
    return {
        parameter: Shard(gate, gate.shape, ranks, None)
        for optimizer in optimizers
        if isinstance(optimizer, WeSaRAdamW)
        for parameter, gate in optimizer.gates().items()
    }


def second_gate(layer: str) -> str:
    """Return the error message for a layer with a gate that would get another one from the optimizer."""
    return (
        f"optimizer.name: wesar_adamw would give {layer} a second gate; set optimizer.name: adamw, or, to have plain "
        "layers, variables.method: wesar_adamw."
    )
