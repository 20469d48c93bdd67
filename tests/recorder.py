"""Record the tensors that a piece of code makes, and how often the host reads a value."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Records each operator that runs under it, forward and backward.

    Attributes:
        largest: Number of elements of the largest tensor that any operator returned, by dtype.
        reads: How often the host read a value of a tensor. On CUDA each read is a synchronisation.
    """

    def __init__(self):
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.largest[tensor.dtype] = max(tensor.numel(), self.largest.get(tensor.dtype, 0))
        return output
