"""Measure the effect of rounding the gates to bfloat16, as FSDP's mixed precision does: held-out loss of pairs of runs.

In both runs of a pair each parameter is cast to bfloat16 for its use, and its float32 original is trained, as in FSDP.
In one of the two the gates are not cast. The runs of a pair have the same seed, data and order.
"""

import copy
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmfoundry.utils.builders import build_optimizer
from scipy import stats
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.record import Recorder
from benchmarks.sizes import load, shape
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM

FLOAT32, BFLOAT16 = "gates in float32", "gates in bfloat16"
_STEPS, _FEWEST_PAIRS, _HELD_OUT = 100, 6, 64  # the last in sequences


def _factor(step: int) -> float:
    """Return the factor of the learning rate: warm-up over a tenth of the steps, then a cosine to 10%."""
    warmup = _STEPS // 10
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / (_STEPS - warmup)))


class _Training:
    """A model whose parameters are used in bfloat16, and its gates in `gate_dtype`."""

    def __init__(self, config: dict[str, Any], device: str, seed: int, gate_dtype: torch.dtype):
        torch.manual_seed(seed)
        model = {key: value for key, value in config["model"].items() if key != "name"} | {"init_device": device}
        self.model = ComposerWeSaRMPTCausalLM(**model).to(device).train()
        self.gate_dtype, self.device = gate_dtype, device
        self.clip = config["algorithms"]["gradient_clipping"]["clipping_threshold"]
        optimizer = copy.deepcopy(config["optimizer"])  # the builder changes it
        self.optimizer = build_optimizer(self.model, optimizer.pop("name"), optimizer)
        self.schedule = LambdaLR(self.optimizer, _factor)
        self.gates = {name: p for name, p in self.model.named_parameters() if name.endswith(".gate")}
        self.first = {name: gate.bfloat16() for name, gate in self.gates.items()}
        self.moved: set[str] = set()

    def loss(self, tokens: torch.Tensor, term: str) -> torch.Tensor:
        tokens = tokens.to(self.device)
        batch = {"input_ids": tokens, "labels": tokens.clone()}
        used = {
            name: p.to(self.gate_dtype if name in self.gates else torch.bfloat16)
            for name, p in self.model.named_parameters()
        }
        with torch.autocast(self.device, torch.bfloat16):
            return self.model.loss(functional_call(self.model, used, (batch,)), batch)[term]

    def step(self, tokens: torch.Tensor) -> None:
        self.loss(tokens, "total").backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.moved |= {name for name, gate in self.gates.items() if gate.bfloat16() != self.first[name]}

    @torch.no_grad()
    def held_out(self, tokens: torch.Tensor, microbatch: int) -> float:
        return float(np.mean([self.loss(part, "loss").item() for part in tokens.split(microbatch)]))


def _tokens(config: dict[str, Any], split: str) -> torch.Tensor | None:
    """Return the sequences that `llmfoundry-wesar data` wrote for a split, or None if there are none."""
    folder = Path(config["train_loader"]["dataset"]["local"])
    if not (folder / split / "index.json").exists():
        return None
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), split=split, batch_size=1)
    return torch.from_numpy(np.stack([dataset[i]["tokens"] for i in range(dataset.num_samples)])).long()


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size, eager. The batch is one microbatch."""
    if compiled:
        return
    config = load(size, "wesar")
    config["global_train_batch_size"] = batch = config["device_train_microbatch_size"]
    train, held_out = (_tokens(config, split) for split in ("train", "val"))
    source = config["train_loader"]["dataset"]["local"]
    if train is None or held_out is None:
        source = "random tokens"
        generator = torch.Generator().manual_seed(0)
        size_of = (_STEPS * batch + _HELD_OUT, config["max_seq_len"])
        tokens = torch.randint(config["model"]["vocab_size"], size_of, generator=generator)
        train, held_out = tokens[_HELD_OUT:], tokens[:_HELD_OUT]
    losses: dict[str, list[float]] = {FLOAT32: [], BFLOAT16: []}
    moved: dict[str, list[float]] = {FLOAT32: [], BFLOAT16: []}
    start = time.monotonic()
    for seed in itertools.count():
        if seed >= _FEWEST_PAIRS and time.monotonic() - start > seconds:
            break
        dtypes = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}
        pair = {variant: _Training(config, recorder.device, seed, dtype) for variant, dtype in dtypes.items()}
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        for i in tqdm(range(_STEPS), desc=f"precision {size}, pair {seed}", mininterval=5):
            rows = order[torch.arange(i * batch, (i + 1) * batch) % len(order)]
            for training in pair.values():
                training.step(train[rows])
        for variant, training in pair.items():
            losses[variant].append(training.held_out(held_out[:_HELD_OUT], batch))
            moved[variant].append(len(training.moved))
    note = f"{_STEPS} steps on {source}"
    recorder.about(suite="precision", name=size, dtype="bf16 parameters", shape=shape(config), compiled=False)
    for variant in losses:
        recorder.add(losses[variant], losses[FLOAT32], variant=variant, unit="held-out loss", note=note)
        unit = f"gates of {len(pair[variant].gates)} that changed in bfloat16"
        recorder.add(moved[variant], variant=variant, unit=unit, note=note)
    added = np.subtract(losses[BFLOAT16], losses[FLOAT32])
    low, high = stats.t.interval(0.95, len(added) - 1, added.mean(), stats.sem(added))
    interval = f"mean {added.mean():.5f}, 95% interval {low:.5f} to {high:.5f} by Student's t; {note}"
    recorder.add(added, variant=BFLOAT16, unit="held-out loss added by rounding", note=interval)
