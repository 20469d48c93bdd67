"""Measure time and peak memory of a training step of the compared methods, relative to the plain model's."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from llmfoundry.utils.builders import build_optimizer

from benchmarks.record import Recorder, reason
from benchmarks.sizes import load, shape
from llmfoundry_wesar.layers import SpectrallyNormalized
from llmfoundry_wesar.methods import names
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM

KNOWN = tuple(names("method"))
METHODS = ("small_init", "wesar", "weight_norm", "sigma_reparam", "residual_scaling_he")


class _Training:
    """A model, its optimizer and one microbatch. A call is one training step."""

    def __init__(self, recorder: Recorder, config: dict[str, Any], compiled: bool):
        before = recorder.allocated()
        model = {**config["model"], "init_device": recorder.device}
        del model["name"]
        self.model = ComposerWeSaRMPTCausalLM(**model).to(recorder.device).train()
        self.spectral = [module for module in self.model.modules() if isinstance(module, SpectrallyNormalized)]
        # The model need not learn. A small rate keeps weights at ordinary values, which a GPU's power draw depends on.
        optimizer = {**config["optimizer"], "lr": 1e-6, "fused": True}
        self.optimizer = build_optimizer(self.model, optimizer.pop("name"), optimizer)
        tokens = (config["device_train_microbatch_size"], config["max_seq_len"])
        ids = torch.randint(model["vocab_size"], tokens, device=recorder.device)
        self.batch = {"input_ids": ids, "labels": ids.clone()}
        self.autocast = torch.autocast(recorder.device, torch.bfloat16, enabled=recorder.dtype == "amp_bf16")
        if compiled:
            # Compile module by module, so that all blocks share one compilation. A whole model would take minutes a
            # method.
            transformer, head = self.model.model.transformer, self.model.model.lm_head
            for module in (transformer.wte, *transformer.blocks, transformer.norm_f, head):
                module.compile()
        self()
        self.held = recorder.allocated() - before

    def __call__(self) -> None:
        for module in self.spectral:
            module.iterate = True  # the callback power_iteration does the same
        with self.autocast:
            loss = self.model.loss(self.model(self.batch), self.batch)["total"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(recorder: Recorder, size: str, compiled: bool, seconds: float, methods: Sequence[str] = METHODS) -> None:
    """Measure one size, eager or compiled, on the YAML's microbatch; ratios are to the first of the methods.

    All models and their optimizers stay on the GPU. If memory is too small for that, the microbatch is halved.
    """
    batch = load(size, methods[0])["device_train_microbatch_size"]
    try:
        return _measure(recorder, size, batch, compiled, seconds, methods)
    except torch.OutOfMemoryError:
        print(f"step {size}: out of memory, once more with {batch // 2} sequences", flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    _measure(recorder, size, batch // 2, compiled, seconds, methods)


# Otherwise dynamo would fall back to eager execution without a message.
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def _measure(recorder: Recorder, size: str, batch: int, compiled: bool, seconds: float, methods: Sequence[str]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    batches = {"device_train_microbatch_size": batch, "global_train_batch_size": batch}
    configs = {method: load(size, method) | batches for method in methods}
    recorder.about(suite="step", name=size, dtype=recorder.dtype, shape=shape(configs[methods[0]]), compiled=compiled)
    trainings = {}
    for method, config in configs.items():
        try:
            trainings[method] = _Training(recorder, config, compiled)
        except torch.OutOfMemoryError:
            raise  # retried for all methods with half the batch
        except Exception as error:
            recorder.add([], variant=method, unit="ms", note=reason(error))
    recorder.compare(trainings, seconds, held={method: training.held for method, training in trainings.items()})
    if compiled:
        note = "; ".join(" ".join(reason.split()) for reason in counters["graph_break"])
        recorder.add([sum(counters["graph_break"].values())], variant="all", unit="graph breaks", note=note)
