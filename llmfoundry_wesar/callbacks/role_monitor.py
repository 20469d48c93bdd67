"""The base class of the monitors: it logs a quantity of every matrix, and its range over the blocks for every role."""

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar

from composer.core import State, Time
from composer.loggers import Logger

from llmfoundry_wesar.callbacks.charts import add_charts, leave_out_of_summary
from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.roles import role_name, role_order
from llmfoundry_wesar.sharded import reshard


class RoleMonitor(IntervalCallback):
    """Log a quantity by matrix, by role, or both.

    Attributes:
        quantity: What it measures of each matrix, the first part of the keys.

    Args:
        interval: A Composer time string: with "10ba" the steps 0, 10, 20, … are due.
        by_role: Whether to log `role_QUANTITY/ROLE/STATISTIC`: the least, median and greatest value of each role.
        by_matrix: Whether to log `QUANTITY/MODULE`, a key for each matrix.

    Raises:
        ValueError: If nothing is left to log, or `interval` is not a positive time.
    """

    quantity: ClassVar[str]

    def __init__(self, interval: str | Time = "10ba", by_role: bool = True, by_matrix: bool = True):
        super().__init__(interval)
        for option, value in (("by_role", by_role), ("by_matrix", by_matrix)):
            if not isinstance(value, bool):
                raise ValueError(f"{self.key(option)}: {value!r} is not one of true, false.")
        if not by_role and not by_matrix:
            raise ValueError(
                f"callbacks.{self.name()}: by_role: false and by_matrix: false leave nothing to log; set one to true, "
                "or remove the callback."
            )
        self.by_role, self.by_matrix = by_role, by_matrix
        self._logged = False
        self._found_nan = False

    def matrices(self, state: State) -> list[str]:
        """Return the module paths of what it measures."""
        raise NotImplementedError

    def fit_start(self, state: State, logger: Logger) -> None:
        """Add charts to the run. The first monitor does this for all, because it can be done only once."""
        reshard(state.model)  # with `eval_first` an evaluation came before
        monitors = [callback for callback in state.callbacks if isinstance(callback, RoleMonitor)]
        if monitors[:1] == [self]:
            names = {each.quantity: set(map(role_name, each.matrices(state))) for each in monitors if each.by_role}
            add_charts(logger, {quantity: sorted(roles, key=role_order) for quantity, roles in names.items() if roles})

    def log(self, logger: Logger, metrics: Mapping[str, float], roles: Mapping[str, Mapping[str, float]]) -> None:
        """Log metrics of the matrices, and the range of the quantity over the matrices of each role.

        The first time that a metric is NaN, warn which.

        Args:
            logger: The trainer's logger.
            metrics: Key → value, of the matrices.
            roles: As from `roles.by_role`.
        """
        broken = [key for key, value in metrics.items() if math.isnan(value)]
        if broken and not self._found_nan:
            self._found_nan = True
            others = f" and {len(broken) - 3} others" if len(broken) > 3 else ""
            warnings.warn(
                f"callbacks.{self.name()}: NaN for the first time, in {', '.join(broken[:3])}{others} of "
                f"{len(metrics)} logged values: the run has diverged.",
                stacklevel=2,
            )
        if self.by_matrix and not self._logged:
            leave_out_of_summary(logger, metrics)
            self._logged = True
        ranges = {
            f"role_{self.quantity}/{role}/{statistic}": value
            for role, statistics in roles.items()
            for statistic, value in statistics.items()
        }
        logger.log_metrics((dict(metrics) if self.by_matrix else {}) | (ranges if self.by_role else {}))
