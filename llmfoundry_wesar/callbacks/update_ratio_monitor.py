"""Log the update ratio of every matrix, measured on the real optimizer step."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from composer.core import State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, ensure_tuple

from llmfoundry_wesar.callbacks.interval import Interval
from llmfoundry_wesar.callbacks.measurement import METRICS, StepMeasurement, trainable_matrices
from llmfoundry_wesar.callbacks.role_monitor import RoleMonitor
from llmfoundry_wesar.figures import Network, draw_heat, pixels
from llmfoundry_wesar.roles import by_role
from llmfoundry_wesar.sharded import sum_over_ranks


class UpdateRatioMonitor(RoleMonitor):
    """Log how much an optimizer step changes each matrix, relative to the matrix.

    It measures every trainable parameter of two or more dimensions, in any model. W is the parameter before the real
    step and W' after it, so clipping, schedule, parameter groups and loss scaling are included. V is the virtual weight
    (αW if there is a gate) before it is rounded to the type of the parameters, and ‖·‖ the Euclidean norm of all
    elements. If `WeSaRAdamW` keeps the gate, the parameter is V, and W = V/α.

    +-----------------------------------+-----------------------------------------------------------------+
    | Key                               | Logged data                                                     |
    +===================================+=================================================================+
    | ``update_ratio/MODULE``           | ‖W' - W‖ / ‖W‖; 0 if W' = W, inf if W was 0 and changed         |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``virtual_update_ratio/MODULE``   | ‖V' - V‖ / ‖V‖; 0 if V' = V, inf if V was 0 and changed         |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``weight_norm/MODULE``            | ‖W‖                                                             |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``virtual_weight_norm/MODULE``    | ‖V‖                                                             |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``grad_norm/MODULE``              | ‖∂L/∂W‖ after clipping; 0 if there is no gradient               |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``role_update_ratio/ROLE/min``    | the least update ratio of the matrices of a role, in all blocks |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``role_update_ratio/ROLE/median`` | the median of these update ratios                               |
    +-----------------------------------+-----------------------------------------------------------------+
    | ``role_update_ratio/ROLE/max``    | the greatest of these update ratios                             |
    +-----------------------------------+-----------------------------------------------------------------+

    MODULE is the plain module path, such as ``model.transformer.blocks.11.ffn.down_proj``. It is the same under DDP and
    FSDP. If the parameter is not called ``weight``, its name is added. ROLE is the paper's name of the matrix, such as
    ``W_d``, also in the decoders of transformers (`roles.ROLES`), or the last part of the path of a module without one.
    Layers that are not reparameterised have no virtual metrics. A value is logged at the number of steps done, so the
    first is at 1.

    A due step costs one all-reduce, one transfer to the host and, for the update ratios, a copy of this rank's part of
    the matrices during the optimizer step. If a layer's virtual weight is not αW with a single α, its virtual metrics
    gather the matrix on each rank, before and after the step (`virtual_slices`). Other steps cost nothing.

    Args:
        interval: A Composer time string: with "10ba" the steps 0, 10, 20, … are due.
        metrics: Which of the five quantities of a matrix to measure. The roles need ``update_ratio``.
        include: A regular expression. Only modules whose path contains a match are measured.
        exclude: A regular expression. Modules whose path contains a match are not measured.
        by_role: Whether to log the last three rows of the table.
        by_matrix: Whether to log the other rows.
        picture_interval: A Composer time string. At this interval and at the end of training, a picture is drawn on
            rank 0 and logged as ``update_ratios``: a heat map of the last update ratios of all matrices, and the curves
            of the roles since this process started. It needs ``update_ratio`` and a logger that takes pictures. None:
            no pictures.

    Raises:
        ValueError: If an argument is invalid; at the start of training, if an expression matches no matrix or no matrix
            is left.
    """

    quantity = "update_ratio"

    def __init__(
        self,
        interval: str | Time = "10ba",
        metrics: str | Sequence[str] = "update_ratio",
        include: str | None = None,
        exclude: str | None = None,
        by_role: bool = True,
        by_matrix: bool = True,
        picture_interval: str | Time | None = "0.1dur",
    ):
        super().__init__(interval, by_role, by_matrix)
        self.metrics = ensure_tuple(metrics)
        if not self.metrics or not all(metric in METRICS for metric in self.metrics):
            raise ValueError(
                f"{self.key('metrics')}: {metrics!r} is not a list of one or more of {', '.join(METRICS)}."
            )
        if not by_matrix and self.metrics != ("update_ratio",):
            raise ValueError(
                f"{self.key('metrics')}: {list(self.metrics)} needs by_matrix: true, because roles have only their "
                "update_ratio; set that, or metrics: update_ratio."
            )
        self.include = _compile(self.key("include"), include)
        self.exclude = _compile(self.key("exclude"), exclude)
        self._measurement: StepMeasurement | None = None
        self._pictures = None
        if picture_interval is not None:
            self._pictures = Interval(picture_interval, self.key("picture_interval"), "to draw nothing, set it to null")
        self._history = _History()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check the expressions against the model, and add charts to the run."""
        self.check([matrix.name for matrix in trainable_matrices(state)])
        super().fit_start(state, logger)

    def check(self, names: Sequence[str]) -> None:
        """Check the expressions against the module paths of a model's trainable matrices.

        Raises:
            ValueError: If an expression matches none, or none is left.
        """
        for key, pattern in (("include", self.include), ("exclude", self.exclude)):
            if pattern is not None and not any(map(pattern.search, names)):
                raise ValueError(
                    f"{self.key(key)}: {pattern.pattern!r} matches none of the matrices {', '.join(names)}."
                )
        if not any(map(self._selects, names)):
            raise ValueError(f"{self.key('include')}, exclude: no trainable matrix is left; change one of them.")

    def matrices(self, state: State) -> list[str]:
        """Return the module paths of the matrices whose update ratio is logged."""
        selected = [matrix.name for matrix in trainable_matrices(state) if self._selects(matrix.name)]
        return selected if "update_ratio" in self.metrics else []

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Record the values before a due step. Algorithms have clipped the gradients by now."""
        if self._pictures is not None and self._pictures.due(state):
            self._log_picture(state, logger)
        if self.due(state):
            matrices = [matrix for matrix in trainable_matrices(state) if self._selects(matrix.name)]
            self._measurement = StepMeasurement(matrices, self.metrics, state.optimizers) if matrices else None

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure and log the step."""
        if self._measurement is None:
            return
        self._measurement.finish()
        metrics = self._measurement.metrics(sum_over_ranks(self._measurement.addends, state.device))
        self._measurement = None
        prefix = "update_ratio/"
        ratios = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        roles = by_role(ratios)
        self.log(logger, metrics, roles)
        if self._pictures is not None and dist.get_global_rank() == 0:
            self._history.add(state.timestamp.batch.value, ratios, roles)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the picture of the whole training."""
        if self._pictures is not None:
            self._log_picture(state, logger)

    def _log_picture(self, state: State, logger: Logger) -> None:
        """Draw and log a picture on rank 0, if there is something to show, and a logger that takes pictures."""
        takers = [type(each).log_images is not LoggerDestination.log_images for each in logger.destinations]
        if self._history.ratios and any(takers):
            picture = draw_heat({state.run_name: self._history.network()})
            logger.log_images(pixels(picture), "update_ratios", channels_last=True, use_table=False)

    def _selects(self, name: str) -> bool:
        included = self.include is None or self.include.search(name) is not None
        return included and (self.exclude is None or self.exclude.search(name) is None)


class _History:
    """What the picture shows: the last update ratios, and the ranges of the roles so far."""

    def __init__(self):
        self.ratios: dict[str, float] = {}  # by module path
        self.roles: list[str] = []
        self.steps: list[int] = []
        self.ranges: list[np.ndarray] = []  # of each step, with the shape (roles, 3)

    def add(self, step: int, ratios: dict[str, float], roles: Mapping[str, Mapping[str, float]]) -> None:
        """Add what was measured at a step. The curves start again if other matrices are trained than before."""
        if list(roles) != self.roles:
            self.roles, self.steps, self.ranges = list(roles), [], []
        self.ratios = ratios
        self.steps.append(step)
        self.ranges.append(np.array([list(statistics.values()) for statistics in roles.values()], dtype=np.float32))

    def network(self) -> Network:
        """Return what `draw_heat` needs."""
        steps, ranges = np.array(self.steps), np.stack(self.ranges, axis=-1)
        title = f"update ratio at step {self.steps[-1]}"
        return Network(title, self.ratios, {role: (steps, ranges[i]) for i, role in enumerate(self.roles)})


def _compile(key: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error
