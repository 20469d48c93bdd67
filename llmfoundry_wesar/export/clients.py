"""Tell which programs load an exported model, as tested on 2026-11-26 with the versions below.

The test models were trained for some hundred steps. Each program's logits of all tokens of a prompt, and 30 greedy
tokens, were compared with those of transformers 5.17 in float32. `docs/tools.md` has the figures.
"""

from transformers.models.llama.configuration_llama import LlamaConfig

from llmfoundry_wesar.export.conversion import is_arcee

TRIED = "transformers 5.17, vLLM 0.32 on a CPU, llama.cpp of August 2026, CTranslate2 4.8; on 2026-11-26"
_LLAMA_CPP = "llama.cpp, Ollama, LM Studio"


def clients(config: LlamaConfig, format: str) -> dict[str, str]:
    """Return, for each program, whether and how it loads a model that was exported as `hf` or `gguf`."""
    if format == "gguf":
        return {_LLAMA_CPP: "load the .gguf file as it is"}
    use_gguf = "use --format gguf instead"
    if is_arcee(config):
        return {
            "transformers": "loads it natively from 4.53 on",
            "vLLM": "loads it from 0.32 on, through transformers; 0.17 to 0.28 refuse it without "
            "--model-impl transformers",
            _LLAMA_CPP: (
                "refuse it"
                if config.mlp_bias
                else "WRONG, without an error: they compute a squared ReLU, whatever the config says"
            )
            + ("" if config.hidden_act == "relu" else f"; {use_gguf}"),
            "CTranslate2": "refuses it",
        }
    if config.hidden_act == "silu":
        return {
            "transformers, vLLM, CTranslate2": "load it natively",
            _LLAMA_CPP: f"compute it correctly, but their converter refuses unknown tokenizers; {use_gguf}",
        }
    return {
        "transformers": "loads it natively",
        "vLLM": "refuses it without --model-impl transformers",
        f"{_LLAMA_CPP}, CTranslate2": f"WRONG, without an error: they compute silu instead of {config.hidden_act}; "
        "train with ffn_act_fn: {name: silu} if you need them",
    }


def table(config: LlamaConfig, format: str) -> str:
    """Return `clients` as lines of text, with the versions that were tested."""
    rows = clients(config, format)
    width = max(map(len, rows))
    return "\n".join([f"{name:{width}}  {verdict}" for name, verdict in rows.items()] + [f"(tested with {TRIED})"])
