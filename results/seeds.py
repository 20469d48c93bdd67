"""(d) WeSaR spreads less over seeds than Small init (Table 6)."""

import numpy as np
from scipy import stats

from llmfoundry_wesar.runs.plot import COLOURS
from results.evidence import MAIN, MAIN_SEEDS, Evidence, Series, Verdict, decide
from results.pictures import dots, panels

SERIES = (Series(MAIN, MAIN_SEEDS),)


def report(evidence: Evidence) -> Verdict:
    """Judges the claim by its rule."""
    losses = {method: list(evidence.losses(method, MAIN_SEEDS).values()) for method in MAIN}
    small, wesar = (np.array(values) for values in losses.values())
    quotient = small.var(ddof=1) / wesar.var(ddof=1)
    bar = stats.f.ppf(0.95, len(small) - 1, len(wesar) - 1)
    opposite = 1 / quotient > stats.f.ppf(0.95, len(wesar) - 1, len(small) - 1)
    picture, (axis,) = panels(1, height=1.8)
    dots(axis, {method: [value - np.mean(values) for value in values] for method, values in losses.items()}, COLOURS)
    axis.set_xlabel("held-out loss − mean of its method (nats)")
    return Verdict(
        decide(quotient > bar, opposite),
        f"Held-out loss: Small {small.mean():.3f} ± {small.std(ddof=1):.4f} (n = {len(small)}), WeSaR "
        f"{wesar.mean():.3f} ± {wesar.std(ddof=1):.4f} (n = {len(wesar)}). "
        f"The variances' quotient is {quotient:.2f}; the bar is {bar:.2f}.",
        picture,
    )
