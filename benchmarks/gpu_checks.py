"""Compare for `benchmarks.gpu`: a resumed run, an exported model, and FSDP on one GPU. A difference raises an error."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import DataSpec, Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from llmfoundry.utils.builders import build_optimizer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.sizes import load
from llmfoundry_wesar.export import arcee, files
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM
from llmfoundry_wesar.runs.scalars import read_scalars

_STEPS = 6


def same(whole: str, resumed: str, device: str) -> None:
    """Compare the losses that two runs logged at the steps that both have: the whole run and its resumed end.

    The first is equal to the bit, because it is computed before an update. On a CPU all are. On a GPU attention's
    backward pass adds in any order, so that no two runs are the same: the later losses agree within 1e-3.
    """
    (steps, losses), (later, again) = (read_scalars(Path(path))["loss/train/total"] for path in (whole, resumed))
    there = np.isin(steps, later)
    difference = np.abs(losses[there] / again - 1)
    print(f"{len(later)} losses; relative difference: the first {difference[0]:g}, the largest {difference.max():.1e}")
    assert len(difference) == len(again) > 1
    assert difference[0] == 0 and difference.max() <= (0 if device == "cpu" else 1e-3)


@torch.no_grad()
def logits(checkpoint: str, plain: str) -> None:
    """Check that an exported model has the trained one's logits in float32, within 1e-5 of the largest logit."""
    ours, theirs = files.load(checkpoint)[0].eval(), arcee.ArceeForCausalLM.from_pretrained(plain).eval()
    ids = torch.randint(
        ours.config.vocab_size, (2, ours.config.max_seq_len), generator=torch.Generator().manual_seed(0)
    )
    ours, theirs = ours(ids).logits.float(), theirs(ids).logits.float()
    difference = (ours - theirs).abs().max() / ours.abs().max()
    print(f"largest difference, relative to the largest logit: {difference:.2e}")
    assert difference < 1e-5


def _run(device: str, version: str | None) -> tuple[list[float], dict[str, float], dict[str, torch.Tensor]]:
    """Train a few steps with Composer's trainer, with a version of FSDP or none; return losses, gates and buffers."""
    config = load("tiny" if device == "cpu" else "130m", "wesar")
    os.environ["FSDP_VERSION"] = version or "1"
    torch.manual_seed(0)
    section = {key: value for key, value in config["model"].items() if key != "name"} | {"init_device": "cpu"}
    model = ComposerWeSaRMPTCausalLM(**section)
    optimizer = dict(config["optimizer"])
    sequences = config["device_train_microbatch_size"]
    shape = (_STEPS * sequences, config["max_seq_len"])
    ids = torch.randint(section["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        model=model,
        optimizers=build_optimizer(model, optimizer.pop("name"), optimizer),
        train_dataloader=DataSpec(DataLoader(batches, batch_size=sequences), get_num_samples_in_batch=len_of),  # type: ignore
        max_duration=f"{_STEPS}ba",
        precision="fp32" if device == "cpu" else "amp_bf16",
        device="cpu" if device == "cpu" else "gpu",
        parallelism_config=None if version is None else {"fsdp": fsdp_config(config, device)},
        loggers=[logger := InMemoryLogger()],
        progress_bar=False,
    )
    trainer.fit()
    gates = {}
    for name, parameter in trainer.state.model.named_parameters():
        if name.endswith(".gate"):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            gates[name.replace("_fsdp_wrapped_module.", "")] = whole.item()
    buffers = {n.replace("_fsdp_wrapped_module.", ""): b.cpu() for n, b in trainer.state.model.named_buffers()}
    losses = [float(value) for _, value in logger.data["loss/train/total"]]
    trainer.close()
    return losses, gates, buffers


def len_of(batch: dict[str, torch.Tensor]) -> int:
    """Return the number of sequences in a batch."""
    return len(batch["input_ids"])


def fsdp_config(config: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the YAML's `fsdp_config`, with parameters in float32 on a CPU."""
    fsdp = {**config["fsdp_config"], "state_dict_type": "full"}
    if device == "cpu":
        fsdp["mixed_precision"] = {**fsdp["mixed_precision"], "param_dtype": "fp32"}
    return fsdp


def fsdp(device: str) -> None:
    """Compare both versions of Composer's FSDP on one device with training without FSDP.

    Buffers are equal to the bit. Losses and gates agree within 1%, because FSDP rounds each parameter to bfloat16, by
    up to 2⁻⁹ of its value.
    """
    warnings.filterwarnings("ignore")
    dist.initialize_dist("cpu" if device == "cpu" else "gpu")
    losses, gates, buffers = _run(device, None)
    print("no FSDP:", losses)
    # Composer's FSDP1 needs CUDA.
    for version in ("2",) if device == "cpu" else ("2", "1"):
        found, found_gates, found_buffers = _run(device, version)
        print(f"FSDP{version}:", found)
        torch.testing.assert_close(found, losses, rtol=0.01, atol=0)
        torch.testing.assert_close(found_gates, gates, rtol=0.01, atol=0)
        torch.testing.assert_close(found_buffers, buffers, rtol=0, atol=0)


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    {"same": same, "logits": logits, "fsdp": fsdp}[check](*arguments)
