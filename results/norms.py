"""(b) ‖W_d‖ and ‖W_u‖ grow under Small init and stay under WeSaR, whose gates carry the change (Figure 3)."""

import numpy as np

from llmfoundry_wesar.figures import COLOURS
from results.evidence import LONG, MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide, interval
from results.pictures import band, panels

SERIES = (Series(MAIN, MAIN_SEEDS), *(Series(MAIN, size=size) for size in LONG))


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule."""
    seeds = evidence.size.main_seeds
    runs = {method: [evidence.curves(row) for row in evidence.find(method, seeds)] for method in MAIN}
    small_norms, wesar_norms = (by_role(runs[method], "weight_norm") for method in MAIN)
    gates = by_role(runs["wesar"], "gate")
    more, carried, lines, by_block = [], [], [], []
    picture, axes = panels(2, sharey=True)
    for axis, role in zip(axes, ("W_d", "W_u"), strict=True):
        growth = []
        for colour, label, line, curves in (
            (COLOURS[0], r"small_init $\|W\|$", "-", small_norms),
            (COLOURS[1], r"wesar $\|W\|$", "-", wesar_norms),
            (COLOURS[2], r"wesar $\alpha$", "--", gates),
        ):
            steps, values = curves[role]
            relative = (values / values[..., :1]).mean(axis=1)
            growth.append(relative[:, -1])
            band(axis, steps, relative, colour, label, linewidth=1.3, linestyle=line)
        small, wesar, gate = growth
        more.append(interval(small - wesar))
        carried.append(interval(abs(np.log(gate)) - abs(np.log(wesar))))
        lines.append([role, *(str(interval(values)) for values in growth), str(more[-1]), str(carried[-1])])
        # The mean over blocks hides that the gates of early and late blocks move in opposite directions.
        _, values = gates[role]
        ends = values[..., -1] / values[..., 0]
        by_block.append(f"{role} {ends.min():.2f} to {ends.max():.2f}")
        axis.set_title(f"$W_{role[2]}$")
        axis.set_xlabel("step")
    axes[0].set_ylabel("relative to the start, mean over blocks")
    axes[1].legend(loc="center right", frameon=False)
    bars = [*more, *carried]
    return Verdict(
        decide(all(bar.low > 0 for bar in bars), all(bar.high < 0 for bar in bars)),
        f"‖W‖ at the end ÷ at the start, mean of {len(seeds)} seeds, 95% interval. Small grows more than WeSaR in "
        f"{sum(bar.low > 0 for bar in more)} of the 2 matrices, less in {sum(bar.high < 0 for bar in more)}; under"
        f" WeSaR the gate carries more of the change than the norm in {sum(bar.low > 0 for bar in carried)}, less in "
        f"{sum(bar.high < 0 for bar in carried)}. In single blocks and seeds the gates end at these shares of their"
        f" start: {', '.join(by_block)}.",
        picture,
        [["matrix", "Small: ‖W‖", "WeSaR: ‖W‖", "α, block mean", "Small − WeSaR", "|log α| − |log ‖W‖|"], *lines],
    )
