"""Parameters under DDP and FSDP: plain names, the part that a rank holds, and sums over all ranks.

FSDP2 keeps a parameter as a DTensor; FSDP1 (with `use_orig_params`) as this rank's flat slice of it, often an empty
one; on one process and under DDP each rank holds all of it.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from composer.devices import Device
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmfoundry_wesar.layers import Reparameterized

# The names under which FSDP1, activation checkpointing and torch.compile hold the module that they wrap.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Shard(NamedTuple):
    """A parameter of which this rank may hold only a part.

    Attributes:
        parameter: As the model holds it.
        shape: Of the whole parameter.
        replicas: The number of ranks that hold each of its elements.
        unit: The FSDP1 module that shards it, if one does.
    """

    parameter: Tensor
    shape: torch.Size
    replicas: int
    unit: FSDP1 | None

    @property
    def local(self) -> Tensor:
        """The part that this rank holds, not copied."""
        return local(self.parameter)

    @property
    def local_grad(self) -> Tensor:
        """The gradient of that part, empty if there is none."""
        grad = self.parameter.grad
        if grad is None:
            return self.local.new_empty(0)
        return grad.coalesce().values() if grad.is_sparse else local(grad)


def shard_of(parameter: Tensor) -> Shard:
    """How a parameter that FSDP1 does not shard lies on the ranks."""
    parts = 1
    if isinstance(parameter, DTensor):
        dimensions = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        parts = math.prod(size for placement, size in dimensions if placement.is_shard())
    return Shard(parameter, parameter.shape, dist.get_world_size() // parts, None)


def named_shards(model: nn.Module) -> dict[str, Shard]:
    """All parameters of a model, and its untrained gates, by the name that they have on one process.

    Raises:
        ValueError: If FSDP1 has merged parameters into flat ones, which have neither names nor shapes.
    """
    model = _unwrap(model)
    ranks = dist.get_world_size()
    flat: dict[nn.Parameter, Shard] = {}
    for unit in FSDP1.fsdp_modules(model):
        if unit._handle is None:  # it has no parameters
            continue
        merged = unit._handle.flat_param
        if merged._params is None:
            raise ValueError(
                "fsdp_config.use_orig_params: false leaves no matrices to watch; set it to true or remove the monitors."
            )
        replicas = ranks // unit._handle.world_size if unit._handle.uses_sharded_strategy else ranks
        for parameter, shape in zip(merged._params, merged._shapes, strict=True):
            flat[parameter] = Shard(parameter, shape, replicas, unit)

    shards = {}
    for name, parameter in model.named_parameters():
        shards[_plain(name)] = flat.get(parameter) or shard_of(parameter)
    for name, layer in reparameterized_layers(model).items():
        # A gate that is not trained is a buffer, whole on every rank.
        shards.setdefault(f"{name}.gate", Shard(layer.gate, layer.gate.shape, ranks, None))
    return shards


def module_path(parameter: str) -> str:
    """The name under which a parameter is logged: that of its module if it is called ``weight``, else its own."""
    path, _, leaf = parameter.rpartition(".")
    return path if leaf == "weight" and path else parameter


def reparameterized_layers(model: nn.Module) -> dict[str, Reparameterized]:
    """The layers with a gate, by the name that they have on one process."""
    modules = _unwrap(model).named_modules()
    return {_plain(name): module for name, module in modules if isinstance(module, Reparameterized)}


class _VirtualWeight(nn.Module):
    """Has a layer's virtual weight as its output, so that `functional_call` can evaluate it on other parameters."""

    def __init__(self, layer: Reparameterized):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.virtual_weight()


@torch.no_grad()
def virtual_slices(layers: Sequence[tuple[Reparameterized, FSDP1 | None]]) -> list[Tensor]:
    """This rank's equal part of each layer's virtual weight, flat.

    A virtual weight may depend on all of W, so each rank gathers W and α whole: with one collective for each parameter
    under FSDP2, for each FSDP unit under FSDP1. Only the slices outlive the call.

    Args:
        layers: Each layer with the FSDP1 module that shards it, if one does.
    """
    slices = []
    for unit, group in itertools.groupby(layers, key=lambda pair: pair[1]):
        gathered = contextlib.nullcontext()
        if unit is not None:
            gathered = FSDP1.summon_full_params(unit, recurse=False, writeback=False)
        with gathered:
            for layer, _ in group:
                parameters = {}
                for name in ("weight", "gate"):
                    parameter = getattr(layer, name)
                    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                    parameters[f"layer.{name}"] = whole
                virtual = torch.func.functional_call(_VirtualWeight(layer), parameters, ())
                slices.append(virtual.flatten().tensor_split(dist.get_world_size())[dist.get_global_rank()].clone())
    return slices


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of the squared elements of each tensor, 0-dimensional; accumulated in float32 or wider."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    return list(torch._foreach_mul(norms, norms))  # pyright: ignore[reportPrivateImportUsage]


def sum_over_ranks(parts: Mapping[str, Sequence[Tensor]], device: Device) -> dict[str, Tensor]:
    """Add scalars up over all ranks, with one all-reduce for all of them and one transfer to the host.

    Args:
        parts: This rank's addends by name, 0-dimensional.
        device: Where collectives run.

    Returns:
        The sums by name, 1-D, in float64 and on the host.
    """
    addends = torch.stack([scalar for part in parts.values() for scalar in part])
    total = device.tensor_to_device(addends.double())
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(parts, total.cpu().split([len(part) for part in parts.values()]), strict=True))
