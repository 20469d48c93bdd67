"""One power iteration a training step for σReparam."""

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry_wesar.layers import SpectrallyNormalized


class PowerIteration(Callback):
    """Let every σReparam layer move its singular vectors once a step (paper, appendix C.2; Miyato et al. 2018).

    The layer iterates in its first forward pass of the step, where the weight is whole also under FSDP, so this costs
    two products of a matrix with a vector and no communication. Models without such layers are left alone.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        for module in state.model.modules():
            if isinstance(module, SpectrallyNormalized):
                module.iterate = True
