"""(a) Small init moves W_d and W_o faster than the other matrices, WeSaR moves all alike (Figures 1, 4, 5, 9-12)."""

import numpy as np

from llmfoundry_wesar.figures import COLOURS
from results.evidence import LONG, MAIN, MAIN_SEEDS, Evidence, Series, Verdict, by_role, decide
from results.pictures import band, panels

SERIES = (Series(MAIN, MAIN_SEEDS), *(Series(MAIN, size=size) for size in LONG))
PART = 0.1


def _ratios(evidence: Evidence, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return role → (steps, update ratios), the median over blocks, with the shape (seeds, steps)."""
    runs = [evidence.curves(row) for row in evidence.find(method, evidence.size.main_seeds)]
    # Leave out the first step: its learning rate is 0.
    return {
        role: (steps[1:], np.median(values, axis=1)[:, 1:])
        for role, (steps, values) in by_role(runs, "update_ratio").items()
    }


def _parts(steps: np.ndarray, last: bool) -> dict[str, np.ndarray]:
    """Return the steps of the first tenth of training, and of the last one if it is asked for."""
    parts = {"first": steps < PART * steps[-1], "last": steps > (1 - PART) * steps[-1]}
    return parts if last else {"first": parts["first"]}


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule: by the first tenth of training, in long runs by the last one as well."""
    long, n = bool(evidence.size.length), len(evidence.size.main_seeds)
    passed: dict[str, dict[str, np.ndarray]] = {}
    texts: dict[str, dict[str, tuple[str, str, str]]] = {}
    picture, axes = panels(2, sharey=True)
    for axis, method in zip(axes, MAIN, strict=True):
        ratios = _ratios(evidence, method)
        for part in _parts(ratios["W_d"][0], long):
            means = {
                role: values[:, _parts(steps, long)[part]].mean(axis=1) for role, (steps, values) in ratios.items()
            }
            each = np.array(list(means.values()))
            dense = np.array([values for role, values in means.items() if role != "W_e"])
            highest = [list(means)[index] for index in each.argmax(axis=0)]
            spread = each.max(axis=0) / each.min(axis=0)
            small = method == "small_init"
            bar = (spread > 2) & np.isin(highest, ("W_d", "W_o")) if small else spread <= 2
            passed.setdefault(part, {})[method] = bar
            without = _figures(dense.max(axis=0) / dense.min(axis=0))
            texts.setdefault(part, {})[method] = (_figures(spread), without, " or ".join(sorted(set(highest))))
        axis.set_title(method)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        for colour, (role, (steps, values)) in zip(COLOURS, ratios.items(), strict=False):
            band(axis, steps, values, colour, f"${role[0]}_{role[2]}$", linewidth=1.3)
    axes[0].set_ylabel(r"update ratio $\|\Delta W\| / \|W\|$, median over blocks")
    axes[1].legend(ncols=4, loc="lower left", frameon=False, handlelength=1, columnspacing=1)
    sentences = []
    for part, found in texts.items():
        (small, small_dense, fastest), (wesar, wesar_dense, _) = (found[method] for method in MAIN)
        small_bar, wesar_bar = (passed[part][method] for method in MAIN)
        sentences.append(
            f"Largest ÷ smallest update ratio of a role in the {part} tenth of training, median (range) of {n} seeds: "
            f"Small {small}, WeSaR {wesar}. Under Small {fastest} moves fastest. Small passes its bar in "
            f"{sum(small_bar)} of {n} seeds, WeSaR in {sum(wesar_bar)}. Without the embedding, whose rows move only "
            f"when their token occurs: Small {small_dense}, WeSaR {wesar_dense}."
        )
    all_pass = all(bar.all() for bars in passed.values() for bar in bars.values())
    none_pass = [[not bars[method].any() for method in MAIN] for bars in passed.values()]
    opposite = any(wesar for _, wesar in none_pass) if long else all(none_pass[0])
    return Verdict(decide(all_pass, opposite), " ".join(sentences), picture)


def _figures(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f}–{values.max():.2f})"
