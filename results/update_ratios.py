"""(a) Small init moves W_d and W_o faster than the other matrices, WeSaR moves all alike (Figures 1, 4, 5, 9-12)."""

import numpy as np

from llmfoundry_wesar.figures import COLOURS
from results.evidence import MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide
from results.pictures import band, panels

SERIES = (Series(MAIN, MAIN_SEEDS),)
FIRST = 0.1


def _ratios(evidence: Evidence, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return role → (steps, update ratios), the median over blocks, with the shape (seeds, steps)."""
    runs = [evidence.curves(row) for row in evidence.find(method, MAIN_SEEDS)]
    # Leave out the first step: its learning rate is 0.
    return {
        role: (steps[1:], np.median(values, axis=1)[:, 1:])
        for role, (steps, values) in by_role(runs, "update_ratio").items()
    }


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule."""
    highest, spread, without_embedding = {}, {}, {}
    picture, axes = panels(2, sharey=True)
    for axis, method in zip(axes, MAIN, strict=True):
        ratios = _ratios(evidence, method)
        early = {role: values[:, steps < FIRST * steps[-1]].mean(axis=1) for role, (steps, values) in ratios.items()}
        each = np.array(list(early.values()))
        dense = np.array([values for role, values in early.items() if role != "W_e"])
        highest[method] = [list(early)[index] for index in each.argmax(axis=0)]
        spread[method] = each.max(axis=0) / each.min(axis=0)
        without_embedding[method] = dense.max(axis=0) / dense.min(axis=0)
        axis.set_title(method)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        for colour, (role, (steps, values)) in zip(COLOURS, ratios.items(), strict=False):
            band(axis, steps, values, colour, f"${role[0]}_{role[2]}$", linewidth=1.3)
    axes[0].set_ylabel(r"update ratio $\|\Delta W\| / \|W\|$, median over blocks")
    axes[1].legend(ncols=4, loc="lower left", frameon=False, handlelength=1, columnspacing=1)
    small = (spread["small_init"] > 2) & np.isin(highest["small_init"], ("W_d", "W_o"))
    wesar = spread["wesar"] <= 2
    n = len(MAIN_SEEDS)

    def figures(values: np.ndarray) -> str:
        return f"{np.median(values):.2f} ({values.min():.2f}–{values.max():.2f})"

    return Verdict(
        decide(all(small) and all(wesar), not any(small) and not any(wesar)),
        f"Largest ÷ smallest update ratio of a role in the first tenth of training, median (range) of {n} seeds: Small "
        f"{figures(spread['small_init'])}, WeSaR {figures(spread['wesar'])}. Under Small "
        f"{' or '.join(sorted(set(highest['small_init'])))} moves fastest. Small passes its bar in {sum(small)} of "
        f"{n} seeds, WeSaR in {sum(wesar)}. Without the embedding, whose rows move only when their token occurs: Small "
        f"{figures(without_embedding['small_init'])}, WeSaR {figures(without_embedding['wesar'])}.",
        picture,
    )
