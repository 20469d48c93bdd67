"""(g) A loss spike changes the update ratio of W_d, but not its gradient norm (Figure 8)."""

import numpy as np

from llmfoundry_wesar.runs.summary import SPIKE_WINDOW, spike_steps
from results.evidence import Evidence, Lacking, Series, Verdict, by_role, decide, interval, jumped

# This claim has no runs of its own. It looks for spikes in the runs of all other claims.
SERIES: tuple[Series, ...] = ()
STEPS = 50


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule."""
    changes: dict[str, list[float]] = {"update_ratio": [], "grad_norm": []}
    runs = [row for row in evidence.rows if int(row["spikes"])]
    for row in runs:
        scalars = evidence.curves(row)
        first = spike_steps(scalars["loss/train/loss"][1])[0]
        for family, found in changes.items():
            steps, values = by_role([scalars], family)["W_d"]
            after = values[..., (steps > first) & (steps <= first + STEPS)]
            before = values[..., (steps < first) & (steps >= first - STEPS)]
            if after.size and before.size:
                found.append(np.log(after.mean() / before.mean()))
    counted = (
        f"{len(runs)} of {len(evidence.rows)} runs had a spike by the rule of `summary.spikes`, which judges no step"
        f" before the {SPIKE_WINDOW}th; {sum(map(jumped, evidence.rows))} jumped by more than 1 nat"
    )
    if len(runs) < 2:
        raise Lacking(counted)
    if (seen := len(changes["update_ratio"])) < 2:
        raise Lacking(
            f"{counted}. The two sides cannot be compared, because the kept curves have values of W_d both in the"
            f" {STEPS} steps before the spike and in the {STEPS} after it in {seen} of them"
        )
    ratio, norm = (interval(np.array(found)) for found in changes.values())
    bar, close = np.log(0.8), np.log(1.25)
    return Verdict(
        decide(
            ratio.high < bar and -close < norm.low and norm.high < close,
            ratio.low > bar and (norm.low > close or norm.high < -close),
        ),
        f"{counted}. Log of the mean of W_d over {STEPS} steps after ÷ before the first spike: update ratio {ratio},"
        f" gradient norm {norm}.",
    )
