"""(a) Small init moves W_d and W_o faster than the other matrices, WeSaR moves all alike (Figures 1, 4, 5, 9-12)."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from llmfoundry_wesar.figures import COLOURS
from results.evidence import LONG, MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide
from results.pictures import band, panels

SERIES = (Series(MAIN, MAIN_SEEDS), *(Series(MAIN, size=size) for size in LONG))
PART = 0.1


def ratios_of(evidence: Evidence, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return role → (steps, update ratios), the median over blocks, with the shape (seeds, steps)."""
    runs = [evidence.curves(row) for row in evidence.find(method, evidence.size.main_seeds)]
    # Leave out the first step: its learning rate is 0.
    return {
        role: (steps[1:], np.median(values, axis=1)[:, 1:])
        for role, (steps, values) in by_role(runs, "update_ratio").items()
    }


class Part(NamedTuple):
    """What a method did in a part of training, with a value for each seed.

    Attributes:
        spread: Largest ÷ smallest update ratio of a role.
        dense: The same without the embedding.
        fastest: The role with the largest one.
        middle: The median update ratio of the roles.
        passed: Whether the method does as the rule expects of it.
    """

    spread: np.ndarray
    dense: np.ndarray
    fastest: list[str]
    middle: np.ndarray
    passed: np.ndarray


def ends(steps: np.ndarray) -> dict[str, np.ndarray]:
    """Return masks of the first and the last tenth of training."""
    return {"first": steps < PART * steps[-1], "last": steps > (1 - PART) * steps[-1]}


def part_of(ratios: dict[str, tuple[np.ndarray, np.ndarray]], steps: np.ndarray, method: str) -> Part:
    """Return what a method did in the given steps, a mask."""
    means = {role: values[:, steps].mean(axis=1) for role, (_, values) in ratios.items()}
    each = np.array(list(means.values()))
    dense = np.array([values for role, values in means.items() if role != "W_e"])
    fastest = [list(means)[index] for index in each.argmax(axis=0)]
    spread = each.max(axis=0) / each.min(axis=0)
    passed = (spread > 2) & np.isin(fastest, ("W_d", "W_o")) if method == "small_init" else spread <= 2
    return Part(spread, dense.max(axis=0) / dense.min(axis=0), fastest, np.median(each, axis=0), passed)


def draw(ratios: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Draw the update ratios of two methods beside each other, given as method → what `ratios_of` returns."""
    picture, axes = panels(2, sharey=True)
    for axis, (method, roles) in zip(axes, ratios.items(), strict=True):
        axis.set_title(method)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        for colour, (role, (steps, values)) in zip(COLOURS, roles.items(), strict=False):
            band(axis, steps, values, colour, f"${role[0]}_{role[2]}$", linewidth=1.3)
    axes[0].set_ylabel(r"update ratio $\|\Delta W\| / \|W\|$, median over blocks")
    axes[1].legend(ncols=4, loc="lower left", frameon=False, handlelength=1, columnspacing=1)
    return picture


def _figures(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f}–{values.max():.2f})"


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule: by the first tenth of training, in long runs by the last one as well."""
    long, n = bool(evidence.size.length), len(evidence.size.main_seeds)
    ratios = {method: ratios_of(evidence, method) for method in MAIN}
    parts = ends(ratios["wesar"]["W_d"][0])
    if not long:
        del parts["last"]
    found = {name: [part_of(ratios[method], part, method) for method in MAIN] for name, part in parts.items()}
    sentences = [
        f"Largest ÷ smallest update ratio of a role in the {name} tenth of training, median (range) of {n} seeds: "
        f"Small {_figures(small.spread)}, WeSaR {_figures(wesar.spread)}. Under Small "
        f"{' or '.join(sorted(set(small.fastest)))} moves fastest. Small's is above 2, and W_d or W_o fastest, in"
        f" {sum(small.passed)} of {n} seeds; WeSaR's is at most 2 in {sum(wesar.passed)}. Without the embedding, whose"
        f" rows move only when their token occurs: Small {_figures(small.dense)}, WeSaR {_figures(wesar.dense)}. The"
        f" median role moves {_figures(wesar.middle / small.middle)} times as fast under WeSaR as under Small."
        for name, (small, wesar) in found.items()
    ]
    confirmed = all(each.passed.all() for both in found.values() for each in both)
    small_fails, wesar_fails = zip(*([not each.passed.any() for each in both] for both in found.values()), strict=True)
    opposite = any(wesar_fails) if long else small_fails[0] and wesar_fails[0]
    return Verdict(decide(confirmed, opposite), " ".join(sentences), draw(ratios))
