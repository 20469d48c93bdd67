"""(f) How much of WeSaR's early lead comes from its larger relative step (an experiment that the paper lacks)."""

import math

import numpy as np

from llmfoundry_wesar.figures import COLOURS
from results.evidence import LEARNING_RATE, SEEDS, Evidence, Lacking, Series, Verdict, interval, median_update_ratio
from results.pictures import dots, panels

# The seed of the search for the learning rates. It is not among the SEEDS that are judged.
SEARCH_SEED = 99
SEARCH = ("4.0e-3", "8.0e-3")
# The results of `equal_rate`, to two digits.
EQUAL = {"small_init": "9.4e-3", "he_init": "1.2e-2"}
METHODS = tuple(EQUAL)
SERIES = (
    Series((*METHODS, "wesar"), (SEARCH_SEED,)),
    Series(METHODS, (SEARCH_SEED,), {"optimizer.lr": SEARCH}),
    Series((*METHODS, "wesar")),
    *(Series((method,), SEEDS, {"optimizer.lr": (rate,)}) for method, rate in EQUAL.items()),
)


def _ratios(evidence: Evidence, method: str, seeds: tuple[int, ...] = SEEDS, **varied: float) -> np.ndarray:
    """Return the median update ratio for each of the seeds; arguments as for `Evidence.find`."""
    return np.array([median_update_ratio(evidence.curves(row)) for row in evidence.find(method, seeds, **varied)])


def equal_rate(evidence: Evidence, method: str) -> float:
    """Estimate the learning rate at which a method's median update ratio is that of WeSaR at 1e-3.

    Take the two runs of the search whose ratios are nearest to WeSaR's. The estimate lies on the line through their
    points (log ratio, log rate).
    """
    target = math.log(_ratios(evidence, "wesar", (SEARCH_SEED,))[0])
    rates = np.array([LEARNING_RATE, *map(float, SEARCH)])
    ratios = np.log([_ratios(evidence, method, (SEARCH_SEED,), learning_rate=rate)[0] for rate in rates])
    nearest = np.argsort(abs(ratios - target))[:2]
    return math.exp(np.polyval(np.polyfit(ratios[nearest], np.log(rates[nearest]), 1), target))


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule."""
    wesar, ratios = evidence.losses("wesar"), _ratios(evidence, "wesar")
    sentences, lines, groups, differences = [], [], {"wesar, 1e-3": wesar}, []
    for method, digits in EQUAL.items():
        rate = float(digits)
        if not math.isclose(searched := equal_rate(evidence, method), rate, rel_tol=0.05):
            raise Lacking(f"the search for {method} gives {searched:.2g}, the runs have {rate:.2g}")
        base, equal = evidence.losses(method), evidence.losses(method, learning_rate=rate)
        groups |= {f"{method}, {rate:g}": equal, f"{method}, 1e-3": base}
        quotient = interval(_ratios(evidence, method, learning_rate=rate) / ratios)
        share, left = interval((base - equal) / (base - wesar)), interval(equal - wesar)
        figures = (quotient, interval(base), interval(equal), left, share)
        lines.append([method, f"{rate:g}", *map(str, figures)])
        sentences.append(
            f"{method}: {share} of the lead goes at {rate:g}, where its median update ratio is {quotient} of WeSaR's,"
            f" and {left} nats are left (n = {len(SEEDS)})."
        )
        differences.append(left)
    picture, (axis,) = panels(1, height=2.4)
    dots(axis, groups, [COLOURS[1], COLOURS[0], COLOURS[0], COLOURS[2], COLOURS[2]])
    axis.set_xlabel("held-out loss (nats)")
    decided = all(left.low > 0 or left.high < 0 for left in differences)
    header = ["method", "equal rate", "median update ratio there ÷ WeSaR's", "loss at 1e-3", "loss at that rate"]
    header += ["− WeSaR", "share of the lead that goes"]
    return Verdict("measured" if decided else "not decided", " ".join(sentences), picture, [header, *lines])
