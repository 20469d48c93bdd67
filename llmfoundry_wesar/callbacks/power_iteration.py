"""Make one power iteration in each training step, for σReparam."""

from composer.core import Callback, State
from composer.loggers import Logger
from torch import nn

from llmfoundry_wesar.layers import NO_POWER_ITERATION, SpectrallyNormalized


class PowerIteration(Callback):
    """Make every σReparam layer update its singular vectors once a step (paper, appendix C.2; Miyato et al. 2018).

    The layer does this in the first forward pass of the step. There each rank has the whole weight, under FSDP too, so
    the update costs two matrix-vector products and no communication.

    Raises:
        ValueError: At the start of training, if the model has no such layer.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse a model without σReparam, for which the callback would do nothing."""
        check_power_iteration(state.model, True)

    def batch_start(self, state: State, logger: Logger) -> None:
        for module in state.model.modules():
            if isinstance(module, SpectrallyNormalized):
                module.iterate = True


def check_power_iteration(model: nn.Module, present: bool) -> None:
    """Check that a model with σReparam has the callback, and no other model has it.

    Raises:
        ValueError: If that is not so.
    """
    needed = any(isinstance(module, SpectrallyNormalized) for module in model.modules())
    if needed and not present:
        raise ValueError(NO_POWER_ITERATION)
    if present and not needed:
        raise ValueError(
            "callbacks.power_iteration: no layer of this model has σReparam, so it would do nothing; remove it, or set "
            "variables.method: sigma_reparam."
        )
