"""(a) Small init moves W_d and W_o faster than the other matrices, WeSaR moves all alike (Figures 1, 4, 5, 9-12)."""

import numpy as np

from llmfoundry_wesar.runs.plot import COLOURS
from results.evidence import MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide
from results.pictures import over_steps, panels

SERIES = (Series(MAIN, MAIN_SEEDS),)
FIRST = 0.1


def _ratios(evidence: Evidence, method: str) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Seed → role → steps with an update, and the median over blocks of the update ratio."""
    found = {}
    for seed, row in evidence.find(method, MAIN_SEEDS).items():
        roles = by_role(evidence.curves(row), "update_ratio")
        # The learning rate of the first step is 0.
        found[seed] = {role: (steps[1:], np.median(values, axis=0)[1:]) for role, (steps, values) in roles.items()}
    return found


def report(evidence: Evidence) -> Verdict:
    """Judges the claim by its rule."""
    ratios = {method: _ratios(evidence, method) for method in MAIN}
    highest, spread, without_embedding = ({method: [] for method in MAIN} for _ in range(3))
    for method, seeds in ratios.items():
        for roles in seeds.values():
            early = {role: values[steps < FIRST * steps[-1]].mean() for role, (steps, values) in roles.items()}
            highest[method].append(max(early, key=early.__getitem__))
            spread[method].append(max(early.values()) / min(early.values()))
            dense = [value for role, value in early.items() if role != "W_e"]
            without_embedding[method].append(max(dense) / min(dense))
    n = len(spread["small_init"])
    small = [
        r > 2 and role in ("W_d", "W_o") for r, role in zip(spread["small_init"], highest["small_init"], strict=True)
    ]
    wesar = [r <= 2 for r in spread["wesar"]]
    picture, axes = panels(2, sharey=True)
    for axis, method in zip(axes, MAIN, strict=True):
        axis.set_title(method)
        axis.set_yscale("log")
        for colour, role in zip(COLOURS, next(iter(ratios[method].values())), strict=False):
            over_steps(axis, [roles[role] for roles in ratios[method].values()], colour, f"${role[0]}_{role[2]}$")
    axes[0].set_ylabel(r"update ratio $\|\Delta W\| / \|W\|$, median over blocks")
    axes[1].legend(ncols=4, loc="lower left", frameon=False, handlelength=1, columnspacing=1)

    def figures(values: dict[str, list[float]], method: str) -> str:
        return f"{np.median(values[method]):.2f} ({min(values[method]):.2f}–{max(values[method]):.2f})"

    return Verdict(
        decide(all(small) and all(wesar), not any(small) and not any(wesar)),
        f"Largest ÷ smallest update ratio of a role in the first tenth of training, median (range) of {n} seeds: Small "
        f"{figures(spread, 'small_init')}, WeSaR {figures(spread, 'wesar')}. Under Small "
        f"{' or '.join(sorted(set(highest['small_init'])))} moves fastest. Small passes its bar in {sum(small)} of "
        f"{n} seeds, WeSaR in {sum(wesar)}. Without the embedding, whose rows move only when their token occurs: Small "
        f"{figures(without_embedding, 'small_init')}, WeSaR {figures(without_embedding, 'wesar')}.",
        picture,
    )
