"""Load exported folders with a current transformers, which foundry's pin keeps out of the test environment.

It is installed in a folder of its own, and a separate process puts that folder before the environment's packages:

    pip install --no-deps --target PREFIX/transformers5 -r tests/requirements-transformers5.txt

where PREFIX is the environment (`sys.prefix`).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = Path(sys.prefix) / "transformers5"


def load_in_transformers5(folders: dict[str, Path], prompts: torch.Tensor, text: str, out: Path) -> dict[str, Any]:
    """Load each exported model there and compute with it.

    Args:
        folders: Name → folder.
        prompts: (B, S), token ids.
        text: A text for the tokenizers in the folders.
        out: A file to write.

    Returns:
        For each folder `class`, `dtype`, `unexpected` and `missing` keys of its files, `logits` of the prompts in
        float32, the `greedy` continuations of the prompts `cached` and `uncached`, and the `ids` of the text.
    """
    folders_as_text = {name: str(path) for name, path in folders.items()}
    return _run({"task": "load", "folders": folders_as_text, "prompts": prompts, "text": text}, out)


def fine_tune_in_transformers5(folder: Path, ids: torch.Tensor, steps: int, out: Path) -> list[float]:
    """Train an exported folder with peft's LoRA, as docs/tools.md says, and save the merged model.

    Args:
        folder: A folder that `export` has written.
        ids: (B, S), the tokens of the text.
        steps: Number of steps of AdamW.
        out: A folder to write.

    Returns:
        The loss before each step, and that of the merged model: steps + 1 values.
    """
    job = {"task": "fine_tune", "folder": str(folder), "ids": ids, "steps": steps, "out": str(out)}
    return _run(job, out.with_suffix(".pt"))["losses"]


def _run(job: dict[str, Any], file: Path) -> dict[str, Any]:
    assert PACKAGES.is_dir(), f"{PACKAGES} is missing; make it with `make` or as {__file__} says"
    torch.save(job, file)
    process = subprocess.run(
        [sys.executable, __file__, file],
        env={**os.environ, "PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return torch.load(file)


def _fine_tune(job: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(job["folder"])
    model = get_peft_model(plain, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(job["steps"]):
        loss = model(job["ids"], labels=job["ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    merged = model.merge_and_unload()
    merged.save_pretrained(job["out"])
    AutoTokenizer.from_pretrained(job["folder"]).save_pretrained(job["out"])
    with torch.no_grad():
        losses.append(merged(job["ids"], labels=job["ids"]).loss.item())
    return {"losses": losses}


def _load(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = {}
    for name, folder in job["folders"].items():
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            logits = model(job["prompts"]).logits.float()
        results[name] = {
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "dtype": model.dtype,
            "unexpected": sorted(loading["unexpected_keys"]),
            "missing": sorted(loading["missing_keys"]),
            "logits": logits,
            "cached": model.generate(job["prompts"][:, :8], use_cache=True, **greedy),
            "uncached": model.generate(job["prompts"][:, :8], use_cache=False, **greedy),
            "ids": AutoTokenizer.from_pretrained(folder)(job["text"]).input_ids,
        }
    return results


def _main(file: str) -> None:
    import transformers

    assert int(transformers.__version__.split(".")[0]) >= 5, transformers.__version__
    job = torch.load(file)
    torch.save({"load": _load, "fine_tune": _fine_tune}[job["task"]](job), file)


if __name__ == "__main__":
    _main(sys.argv[1])
