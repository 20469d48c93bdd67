"""Measure an optimizer step over all parameters of a plain model, without the forward and backward passes."""

import copy
from typing import Any

import torch
from llmfoundry import registry
from llmfoundry.utils.builders import build_optimizer

from benchmarks.record import Recorder
from benchmarks.sizes import load, shape
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw, fused": {"name": "adamw", "fused": True},
    "adamw, foreach": {"name": "adamw", "fused": False, "foreach": True},
    "wesar_adamw": {"name": "wesar_adamw"},
}


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size. All optimizers move the same model, in turn."""
    if compiled:
        return
    config = load(size, "small_init")
    model = {key: value for key, value in config["model"].items() if key != "name"} | {"init_device": recorder.device}
    model = ComposerWeSaRMPTCausalLM(**model).to(recorder.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    recorder.about(shape=shape(config), dtype="fp32", compiled=False)
    steps = {}
    for variant, form in OPTIMIZERS.items():
        # Each optimizer needs a copy, because the builder changes the parameter groups.
        options = copy.deepcopy({k: v for k, v in config["optimizer"].items() if k not in ("fused", "name")})
        options |= form | {"lr": 1e-6}
        if (name := options.pop("name")) not in registry.optimizers:
            recorder.add([], variant=variant, unit="ms", note="is not installed")
            continue
        steps[variant] = build_optimizer(model, name, options).step
    recorder.compare(steps, seconds)
