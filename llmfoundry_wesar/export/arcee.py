"""Define `ArceeForCausalLM` for the version of transformers that foundry needs; versions from 4.53 on have it.

Arcee is Llama with an ungated feed-forward layer. With GELU it is the architecture of the paper. Config keys and
parameter names are those of transformers ≥ 4.53, which loads the saved model without code of ours. `clients` says
which other programs load it.
"""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.nemotron.modeling_nemotron import NemotronMLP


class ArceeConfig(LlamaConfig):
    """`LlamaConfig` under Arcee's name."""

    model_type = "arcee"


class ArceeForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` whose feed-forward layers are down_proj(act(up_proj(x)))."""

    config_class = ArceeConfig

    def __init__(self, config: ArceeConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = NemotronMLP(config)
