"""`ArceeForCausalLM` for the transformers that foundry allows: later ones (≥ 4.53) have it themselves.

Llama with a feed-forward layer that is not gated: with GELU the architecture of the paper. Config and parameter names
are those of the later transformers, so that they load what is saved here, without code of ours. What other programs
make of it is in `clients`.
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
