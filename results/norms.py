"""(b) ‖W_d‖ and ‖W_u‖ grow under Small init and stay under WeSaR, whose gates carry the change (Figure 3)."""

import math

import numpy as np

from llmfoundry_wesar.runs.plot import COLOURS
from results.evidence import MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide, interval, paired
from results.pictures import over_steps, panels

SERIES = (Series(MAIN, MAIN_SEEDS),)


def report(evidence: Evidence) -> Verdict:
    """Judges the claim by its rule."""
    growth: dict[tuple[str, str, str], dict[int, float]] = {}
    curves: dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for method, family in (("small_init", "weight_norm"), ("wesar", "weight_norm"), ("wesar", "gate")):
        for seed, row in evidence.find(method, MAIN_SEEDS).items():
            for role, (steps, values) in by_role(evidence.curves(row), family).items():
                relative = (values / values[:, :1]).mean(axis=0)
                growth.setdefault((method, family, role), {})[seed] = relative[-1]
                curves.setdefault((method, family, role), []).append((steps, relative))
    more, carried, lines = [], [], []
    for role in ("W_d", "W_u"):
        small, wesar, gate = (
            growth[key, family, role]
            for key, family in (("small_init", "weight_norm"), ("wesar", "weight_norm"), ("wesar", "gate"))
        )
        difference = paired(small, wesar)
        by_gate = paired(
            {seed: abs(math.log(value)) for seed, value in gate.items()},
            {seed: abs(math.log(value)) for seed, value in wesar.items()},
        )
        more.append(difference)
        carried.append(by_gate)
        lines.append(
            [role, *(str(interval(values.values())) for values in (small, wesar, gate)), str(difference), str(by_gate)]
        )
    picture, axes = panels(2, sharey=True)
    for axis, role in zip(axes, ("W_d", "W_u"), strict=True):
        axis.set_title(f"$W_{role[2]}$")
        over_steps(axis, curves["small_init", "weight_norm", role], COLOURS[0], r"small_init $\|W\|$")
        over_steps(axis, curves["wesar", "weight_norm", role], COLOURS[1], r"wesar $\|W\|$")
        over_steps(axis, curves["wesar", "gate", role], COLOURS[2], r"wesar $\alpha$", linestyle="--")
    axes[0].set_ylabel("relative to the start, mean over blocks")
    axes[1].legend(loc="center right", frameon=False)
    bars = [*more, *carried]
    return Verdict(
        decide(all(bar.low > 0 for bar in bars), all(bar.high < 0 for bar in bars)),
        f"‖W‖ at the end ÷ at the start, mean of {more[0].n} seeds, 95% interval. Small grows more than WeSaR in "
        f"{sum(bar.low > 0 for bar in more)} of the 2 matrices, less in {sum(bar.high < 0 for bar in more)}; under"
        f" WeSaR the gate carries more of the change than the norm in {sum(bar.low > 0 for bar in carried)}, less in "
        f"{sum(bar.high < 0 for bar in carried)}.",
        picture,
        [["matrix", "Small: ‖W‖", "WeSaR: ‖W‖", "WeSaR: α", "Small − WeSaR", "\\|log α\\| − \\|log ‖W‖\\|"], *lines],
    )
