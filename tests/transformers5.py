"""Load exported folders with a current transformers, which foundry's pin keeps out of the test environment.

It is installed beside that environment's packages and put in front of them in a process of its own:

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
    """What each exported model is and computes there.

    Args:
        folders: By name.
        prompts: (B, S), token ids.
        text: To be tokenized by the tokenizers in the folders.
        out: A file to write.

    Returns:
        For each folder `class`, `dtype`, `unexpected` and `missing` keys of its files, `logits` of the prompts in
        float32, what `greedy` generation adds to the prompts `cached` and `uncached`, and the `ids` of the text.
    """
    assert PACKAGES.is_dir(), f"{PACKAGES} is missing; make it with `make` or as {__file__} says"
    torch.save({"folders": {name: str(path) for name, path in folders.items()}, "prompts": prompts, "text": text}, out)
    job = subprocess.run(
        [sys.executable, __file__, out],
        env={**os.environ, "PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.returncode == 0, job.stdout
    return torch.load(out)


def _main(file: str) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert int(transformers.__version__.split(".")[0]) >= 5, transformers.__version__
    job, results = torch.load(file), {}
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
    torch.save(results, file)


if __name__ == "__main__":
    _main(sys.argv[1])
