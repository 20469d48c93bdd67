"""A small model with every kind of layer that the monitors distinguish, and a real trainer."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from composer import Callback, ComposerModel, DataSpec, Event, Logger, State, Trainer
from composer.loggers import InMemoryLogger, LoggerDestination
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from llmfoundry_wesar.layers import GatedEmbedding, GatedLinear, WeightNormLinear

BATCH, STEPS = 12, 4  # a batch for one, two, three or four processes
VOCABULARY, WIDTH = 11, 6

# The names that the monitors must give the trainable matrices of `Net`, on any number of processes.
MATRICES = {"net.embedding", *(f"net.blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")), "net.offset"}
MATRICES |= {"net.row", "net.norm", "net.head"}
SCALAR_GATED = {"net.embedding", "net.blocks.0.up", "net.blocks.1.up"}
VECTOR_GATED = {"net.row", "net.norm"}


class Block(nn.Module):
    def __init__(self, linear: type[nn.Linear] = GatedLinear):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = linear(WIDTH, 2 * WIDTH + 1, bias=False)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = GatedEmbedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.row = GatedLinear(WIDTH, WIDTH, gate_shape="row")
        self.norm = WeightNormLinear(WIDTH, WIDTH)
        self.offset = nn.Parameter(torch.randn(1, WIDTH))
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(gate := getattr(layer, "gate", None), nn.Parameter):
                    gate.uniform_(0.5, 2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.offset
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.row(x)))

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        return isinstance(module, Block)


class PlainNet(Net):
    """The same net without gates."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(nn.Linear), Block(nn.Linear)])
        self.row, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Regression(ComposerModel):
    """Mean squared error of a net's output, averaged over the batch."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs.float() - batch[1]).square().mean()


def regression(net: Callable[[], nn.Module] = Net) -> Regression:
    """Build a model with the same random weights at each call."""
    torch.manual_seed(0)
    return Regression(net())


def train(
    model: ComposerModel,
    optimizer: torch.optim.Optimizer,
    callbacks: list[Callback],
    steps_per_epoch: int = STEPS,
    **trainer: Any,
) -> dict[str, dict[int, float]]:
    """Train on batches that do not depend on the number of processes, by default for one epoch.

    Returns:
        What was logged: key → {number of finished steps: value}.
    """
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (steps_per_epoch * BATCH,), generator=random)
    data = TensorDataset(ids, torch.randn(len(ids), 3, generator=random))
    # Without shuffling each of n ranks takes every n-th sample, so together they have the batch of one process.
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=dist.get_sampler(data))
    batches = DataSpec(loader, get_num_tokens_in_batch=lambda batch: batch[0].numel())
    return fit(model, optimizer, callbacks, batches, **trainer)


def fit(
    model: ComposerModel, optimizer: torch.optim.Optimizer, callbacks: list[Callback], batches: DataSpec, **trainer: Any
) -> dict[str, dict[int, float]]:
    """Train on the CPU, by default for one epoch, and return what was logged as `train` does."""
    logger = InMemoryLogger()
    Trainer(
        model=model,
        optimizers=optimizer,
        train_dataloader=batches,
        callbacks=callbacks,
        loggers=[logger, *trainer.pop("loggers", ())],
        **{"max_duration": "1ep", "device": "cpu", "progress_bar": False, **trainer},
    ).fit()
    return {key: {time.batch.value: value for time, value in values} for key, values in logger.data.items()}


class Metrics(LoggerDestination):
    """A user's own logger, which has nothing but metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int | None, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.metrics[key][step] = value


class Pictures(LoggerDestination):
    """Keeps the pictures that are logged, which must have the given name."""

    def __init__(self, name: str = "update_ratios") -> None:
        self.name = name
        self.logged: dict[int | None, np.ndarray] = {}

    def log_images(self, images: Any, name: str = "", channels_last: bool = False, step: Any = None, *_: Any) -> None:
        assert (name, channels_last) == (self.name, True)
        self.logged[step] = images


class Watched(Callback):
    """Runs a callback and keeps the names of the operations that each of its events ran on this process's tensors."""

    def __init__(self, callback: Callback):
        self.callback = callback
        self.operations: dict[tuple[str, int], list[str]] = {}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        with _Recorder() as recorder:
            self.callback.run_event(event, state, logger)
        self.operations[event.value, state.timestamp.batch.value] = recorder.operations


def collectives(operations: list[str]) -> Counter[str]:
    """Count each kind of collective among the operations."""
    return Counter(name for name in operations if "c10d" in name and "wait" not in name)


def watch_steps(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Keep the names of the operations of each step on this process's tensors, without those of its closure."""
    steps: list[list[str]] = []
    recorder = _Recorder()

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs["closure"]  # Composer's forward and backward passes

        def watched() -> Any:
            loss = closure()
            recorder.operations = []
            recorder.__enter__()
            return loss

        return args, {"closure": watched}

    def leave(*_: Any) -> None:
        recorder.__exit__(None, None, None)
        steps.append(recorder.operations)

    optimizer.register_step_pre_hook(enter)
    optimizer.register_step_post_hook(leave)
    return steps


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into operations on local tensors, which arrive here again
        self.operations.append(func._schema.name)
        return func(*args, **(kwargs or {}))
