"""What the trainer has to do for `wesar_adamw`."""

import warnings

from composer.algorithms import GradientClipping
from composer.core import State, Time
from composer.loggers import Logger

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.optimizer import WeSaRAdamW, second_gate
from llmfoundry_wesar.sharded import reparameterized_layers


class OptimizerGates(IntervalCallback):
    """Prepares `WeSaRAdamW` for training, and warns when a gate was held at its floor.

    A config with ``optimizer.name: wesar_adamw`` gets this callback without naming it. It tells the optimizer the names
    and shards of the parameters, refuses what cannot train with it, and starts the gates before the first step.

    Args:
        interval: How often to look for held gates, in Composer's time strings. A look waits for the device once.

    Raises:
        ValueError: Before training, if gradients would be clipped twice, if layers have gates of their own, if no
            parameter has a gate, if a matrix is all 0, or if a run is resumed without the optimizer's state.
    """

    def __init__(self, interval: str | Time = "100ba"):
        super().__init__(interval)
        self._held: set[str] = set()

    def before_load(self, state: State, logger: Logger) -> None:
        """Check the run, and give the optimizer the names that its state is loaded by."""
        for optimizer in _optimizers(state):
            clipping = any(isinstance(algorithm, GradientClipping) for algorithm in state.algorithms)
            if clipping and optimizer.max_norm is not None:
                raise ValueError(
                    f"algorithms.gradient_clipping: wesar_adamw clips by optimizer.max_norm: {optimizer.max_norm} "
                    "already; remove gradient_clipping from algorithms."
                )
            if layers := list(reparameterized_layers(state.model)):
                raise ValueError(second_gate(layers[0]))
            optimizer.bind(state.model)

    def after_load(self, state: State, logger: Logger) -> None:
        """Look at the model again, since loading may have wrapped it, and start the gates that were not loaded."""
        for optimizer in _optimizers(state):
            optimizer.bind(state.model)
            if state.timestamp.batch.value > 0 and not optimizer.state:
                raise ValueError(
                    f"load_path: the checkpoint has done {state.timestamp.batch.value} steps with another optimizer "
                    "than wesar_adamw; set load_weights_only: true to start the gates from its weights."
                )
            optimizer.gates()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.due(state):
            self._warn(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._warn(state)

    def _warn(self, state: State) -> None:
        held = {name for optimizer in _optimizers(state) for name in optimizer.held()} - self._held
        self._held |= held
        if held:
            warnings.warn(
                f"wesar_adamw: the gates of {', '.join(sorted(held))} were held at 1% of their initial values; a lower "
                "optimizer.lr moves them less.",
                stacklevel=2,
            )


def _optimizers(state: State) -> list[WeSaRAdamW]:
    return [optimizer for optimizer in state.optimizers if isinstance(optimizer, WeSaRAdamW)]
