"""Make one power iteration in each training step, for σReparam."""

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry_wesar.layers import SpectrallyNormalized


class PowerIteration(Callback):
    """Make every σReparam layer update its singular vectors once a step (paper, appendix C.2; Miyato et al. 2018).

    The layer does this in the first forward pass of the step. There each rank has the whole weight, under FSDP too, so
    the update costs two matrix-vector products and no communication. Models without such layers are not changed.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        for module in state.model.modules():
            if isinstance(module, SpectrallyNormalized):
                module.iterate = True
