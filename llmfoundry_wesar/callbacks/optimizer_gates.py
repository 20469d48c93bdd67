"""Prepare `wesar_adamw` for training, and watch its gates."""

import warnings

from composer.algorithms import GradientClipping
from composer.core import State, Time
from composer.loggers import Logger

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.optimizer import WeSaRAdamW, second_gate
from llmfoundry_wesar.sharded import reparameterized_layers


class OptimizerGates(IntervalCallback):
    """Prepare `WeSaRAdamW` for training, and warn if a gate was held at its lower bound.

    The plugin adds this callback to every config with ``optimizer.name: wesar_adamw``. The callback gives the optimizer
    the names and shards of the parameters, refuses wrong configs, and initialises the gates before the first step.

    Args:
        interval: How often to check for held gates, as a Composer time string. Each check waits for the device.

    Raises:
        ValueError: Before training, if gradients would be clipped twice, if layers have gates of their own, if no
            parameter has a gate, if a matrix is all 0, or if a run is resumed without the optimizer's state.
    """

    def __init__(self, interval: str | Time = "100ba"):
        super().__init__(interval)
        self._held: set[str] = set()
        self._untrained: list[WeSaRAdamW] = []

    def before_load(self, state: State, logger: Logger) -> None:
        """Check the config, and give the optimizer the names of the parameters, by which its state is loaded."""
        self._untrained = [optimizer for optimizer in _optimizers(state) if not optimizer.state]
        for optimizer in _optimizers(state):
            clipping = any(isinstance(algorithm, GradientClipping) for algorithm in state.algorithms)
            if clipping and optimizer.max_norm is not None:
                raise ValueError(
                    f"algorithms.gradient_clipping: gradients are already clipped by optimizer.max_norm: "
                    f"{optimizer.max_norm}; remove gradient_clipping from algorithms."
                )
            if layers := list(reparameterized_layers(state.model)):
                raise ValueError(second_gate(layers[0]))
            optimizer.bind(state.model)

    def after_load(self, state: State, logger: Logger) -> None:
        """Bind the optimizer again, because loading may wrap the model. Initialise the gates that were not loaded."""
        for optimizer in _optimizers(state):
            optimizer.bind(state.model)
            if not optimizer.loaded and state.timestamp.batch.value > 0:
                raise ValueError(
                    f"load_path: the checkpoint has {state.timestamp.batch.value} steps, but no state of wesar_adamw: "
                    "it is of another optimizer, or load_ignore_keys leaves the state out. Set load_weights_only: true "
                    "to initialise the gates from the weights."
                )
            if not optimizer.loaded and optimizer in self._untrained:
                # To learn the state's keys, the load of a sharded checkpoint made a step with the initial weights.
                optimizer.state.clear()
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
                f"wesar_adamw: the gates of {', '.join(sorted(held))} were held at 1% of their initial values. If this "
                "is unwanted, lower optimizer.lr.",
                stacklevel=2,
            )


def _optimizers(state: State) -> list[WeSaRAdamW]:
    return [optimizer for optimizer in state.optimizers if isinstance(optimizer, WeSaRAdamW)]
