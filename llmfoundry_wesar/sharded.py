"""Parameters under DDP and FSDP: plain names, the part that a rank holds, and sums over all ranks.

FSDP2 holds a parameter as a DTensor. FSDP1 (with `use_orig_params`) holds this rank's flat slice of it, which is often
empty. On one process and under DDP each rank holds the whole parameter.
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmfoundry_wesar.layers import Reparameterized

# The attributes in which FSDP1, activation checkpointing and torch.compile hold the module that they wrap.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, without copying it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Shard(NamedTuple):
    """A parameter of which this rank may hold only a part.

    Attributes:
        parameter: The parameter as the model holds it.
        shape: The shape of the whole parameter.
        replicas: The number of ranks that hold each of its elements.
        unit: The FSDP1 module that shards it, or None.
    """

    parameter: Tensor
    shape: torch.Size
    replicas: int
    unit: FSDP1 | None

    @property
    def local(self) -> Tensor:
        """The part that this rank holds, without copying it."""
        return local(self.parameter)

    @property
    def local_grad(self) -> Tensor:
        """The gradient of this rank's part; empty if there is none."""
        grad = self.parameter.grad
        if grad is None:
            return self.local.new_empty(0)
        return grad.coalesce().values() if grad.is_sparse else local(grad)


def shard_of(parameter: Tensor) -> Shard:
    """Return the `Shard` of a parameter that FSDP1 does not shard."""
    parts = 1
    if isinstance(parameter, DTensor):
        dimensions = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        parts = math.prod(size for placement, size in dimensions if placement.is_shard())
    return Shard(parameter, parameter.shape, dist.get_world_size() // parts, None)


def reshard(model: nn.Module) -> None:
    """Shard parameters that FSDP2 still holds whole after an evaluation. The optimizer knows only the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_shards(model: nn.Module) -> dict[str, Shard]:
    """Return all parameters and all untrained gates of a model, by their names on one process.

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
                "fsdp_config.use_orig_params: false merges all matrices into flat parameters; set it to true."
            )
        replicas = ranks // unit._handle.world_size if unit._handle.uses_sharded_strategy else ranks
        for parameter, shape in zip(merged._params, merged._shapes, strict=True):
            flat[parameter] = Shard(parameter, shape, replicas, unit)

    shards = {}
    for name, parameter in model.named_parameters():
        shards[plain_name(name)] = flat.get(parameter) or shard_of(parameter)
    for name, layer in reparameterized_layers(model).items():
        # A gate that is not trained is a buffer, whole on every rank.
        shards.setdefault(f"{name}.gate", Shard(layer.gate, layer.gate.shape, ranks, None))
    return shards


def module_path(parameter: str) -> str:
    """Return the name under which a parameter is logged: its module's if it is called ``weight``, else its own."""
    path, _, leaf = parameter.rpartition(".")
    return path if leaf == "weight" and path else parameter


def reparameterized_layers(model: nn.Module) -> dict[str, Reparameterized]:
    """Return the layers with a gate, by their names on one process."""
    modules = _unwrap(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, Reparameterized)}


class _VirtualWeight(nn.Module):
    """Return a layer's virtual weight in `forward`, so that `functional_call` can compute it from other parameters."""

    def __init__(self, layer: Reparameterized):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.virtual_weight()


@torch.no_grad()
def virtual_slices(layers: Sequence[tuple[Reparameterized, FSDP1 | None]]) -> list[Tensor]:
    """Return this rank's slice of each layer's virtual weight, flat and in float32 or wider.

    The slices of all ranks have about equal sizes. A layer with bfloat16 parameters would round the virtual weight, by
    about as much as a small update changes it.

    A virtual weight may depend on all of W, so each rank gathers the whole W and α: by one collective for each
    parameter under FSDP2, or for each FSDP1 module. Only the slices stay in memory.

    Args:
        layers: Each layer with the FSDP1 module that shards it, or None.
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
                    parameters[f"layer.{name}"] = whole.to(torch.promote_types(whole.dtype, torch.float32))
                virtual = torch.func.functional_call(_VirtualWeight(layer), parameters, ())
                slices.append(virtual.flatten().tensor_split(dist.get_world_size())[dist.get_global_rank()].clone())
    return slices


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """Return the sum of the squared elements of each tensor, 0-dimensional. It is summed in float32 or wider."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    return list(torch._foreach_mul(norms, norms))  # pyright: ignore[reportPrivateImportUsage]


def sum_over_ranks(parts: Mapping[str, Sequence[Tensor]], device: Device) -> dict[str, Tensor]:
    """Sum tensors over all ranks, with one all-reduce and one transfer to the host.

    Args:
        parts: This rank's addends by name, all of one shape.
        device: The device of the collectives.

    Returns:
        The sums by name, stacked along a new first dimension, in float64 and on the host.
    """
    addends = torch.stack([addend for part in parts.values() for addend in part])
    total = device.tensor_to_device(addends.double())
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(parts, total.cpu().split([len(part) for part in parts.values()]), strict=True))
