"""The base class of the monitors: it logs a quantity of every matrix, and its range over the blocks for every role."""

from collections.abc import Mapping
from typing import ClassVar

from composer.core import Time

from llmfoundry_wesar.callbacks.interval import IntervalCallback
from llmfoundry_wesar.roles import by_role


class RoleMonitor(IntervalCallback):
    """Log a quantity by matrix, by role, or both.

    Attributes:
        name: The callback's key in a YAML.
        quantity: What it measures of each matrix, the first part of the keys.

    Args:
        interval: A Composer time string: with "10ba" the steps 0, 10, 20, … are due.
        by_role: Whether to log `role_QUANTITY/ROLE/STATISTIC`: the least, median and greatest value of each role.
        by_matrix: Whether to log `QUANTITY/MODULE`, a key for each matrix.

    Raises:
        ValueError: If nothing is left to log, or `interval` is not a positive time.
    """

    name: ClassVar[str]
    quantity: ClassVar[str]

    def __init__(self, interval: str | Time = "10ba", by_role: bool = True, by_matrix: bool = True):
        super().__init__(interval)
        if not by_role and not by_matrix:
            raise ValueError(
                f"callbacks.{self.name}: by_role: false and by_matrix: false leave nothing to log; set one to true, or "
                "remove the callback."
            )
        self.by_role, self.by_matrix = by_role, by_matrix

    def role_metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the roles by key, without keys if `by_role` is false.

        Args:
            values: Module path → value of the matrix.
        """
        return {
            f"role_{self.quantity}/{role}/{statistic}": value
            for role, statistics in (by_role(values) if self.by_role else {}).items()
            for statistic, value in statistics.items()
        }
