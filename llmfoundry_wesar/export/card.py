"""Write the model card, which is the README.md of an exported folder."""

from typing import Any

from omegaconf import OmegaConf
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils.generic import flatten_dict

from llmfoundry_wesar import methods
from llmfoundry_wesar.export import clients
from llmfoundry_wesar.export.checkpoints import Progress
from llmfoundry_wesar.export.conversion import is_arcee

_LOAD = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # {version}

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
""",
    "gguf": """    llama-cli -m model.gguf -p "Once upon a time"      # llama.cpp
    echo "FROM ./model.gguf" > Modelfile && ollama create NAME -f Modelfile
""",
}


def method_of(config: dict[str, Any]) -> str | None:
    """Return the method whose `model` section is part of a config, or None. Of several, take the one with most keys."""
    leaves, found = flatten_dict(config).items(), []
    for name in methods.names("method"):
        section = OmegaConf.to_container(methods.load("method", name).model, resolve=True)
        wanted = flatten_dict(section).items()  # type: ignore[arg-type]
        if wanted <= leaves:
            found.append((len(wanted), name))
    return max(found)[1] if found else None


def model_card(
    name: str,
    config: LlamaConfig,
    parameters: int,
    trained: dict[str, Any],
    progress: Progress,
    format: str,
    dtype: str,
) -> str:
    """Return the text of a model card.

    Args:
        name: Name of the model.
        config: Config of the exported model.
        parameters: Number of parameters of the exported model.
        trained: Config with which the model was trained.
        progress: How far it was trained.
        format: `hf` or `gguf`.
        dtype: Type of the exported weights.
    """
    rows = {
        "method": f"`{method}` of llmfoundry_wesar" if (method := method_of(trained)) else None,
        "parameters": f"{parameters:,}",
        "layers, width, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} "
        f"({config.num_key_value_heads} of keys and values)",
        "feed-forward layer": f"{config.intermediate_size}, {config.hidden_act}",
        "context": f"{config.max_position_embeddings} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "weights": dtype,
        "trained on": f"{progress.tokens:,} tokens, {progress.batches:,} batches" if progress.tokens else None,
        **{f"`{key}`": f"{value:.4f}" for key, value in progress.metrics.items()},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    verdicts = "\n".join(f"| {key} | {value} |" for key, value in clients.clients(config, format).items())
    version = "4.53 or later" if is_arcee(config) else "any version"
    library = {"hf": "transformers", "gguf": "gguf"}[format]
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---

# {name}

A causal language model trained with llm-foundry and llmfoundry_wesar. Its gates, scales and multipliers are merged into
the weights, so you need neither package to use it.

| | |
|---|---|
{table}

## How to load it

{_LOAD[format].format(version=version)}
| program | |
|---|---|
{verdicts}

Tested with {clients.TRIED}.
"""
