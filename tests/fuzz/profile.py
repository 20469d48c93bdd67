"""How many examples the property-based tests draw: few and always the same in CI, many and new ones by `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("FUZZ", "0"))


def examples(number: int) -> settings:
    """Return the settings of a test that draws `number` examples in CI, and FUZZ times as many if FUZZ is set."""
    return settings(
        max_examples=number * max(FACTOR, 1),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
