"""(f) How much of WeSaR's early lead is its larger relative step (an experiment that the paper lacks)."""

import math

from llmfoundry_wesar.runs.plot import COLOURS
from results.evidence import LEARNING_RATE, SEEDS, Evidence, Lacking, Series, Verdict, interval, paired
from results.learning_rates import median_update_ratio
from results.pictures import dots, panels

# Where the learning rates were searched; it counts for nothing else.
SEARCH_SEED = 99
SEARCH = ("4.0e-3", "8.0e-3")
# What `equal_rate` gave, to two digits.
EQUAL = {"small_init": "9.4e-3", "he_init": "1.2e-2"}
METHODS = tuple(EQUAL)
SERIES = (
    Series((*METHODS, "wesar"), (SEARCH_SEED,)),
    Series(METHODS, (SEARCH_SEED,), {"optimizer.lr": SEARCH}),
    Series((*METHODS, "wesar")),
    *(Series((method,), SEEDS, {"optimizer.lr": (rate,)}) for method, rate in EQUAL.items()),
)


def equal_rate(evidence: Evidence, method: str) -> float:
    """The learning rate at which a method's median update ratio is WeSaR's at 1e-3, from the runs of the search.

    A line through the two nearest runs, of the logarithms of both.
    """
    target = median_update_ratio(evidence.curves(evidence.find("wesar", (SEARCH_SEED,), 1)[SEARCH_SEED]))
    rates = [LEARNING_RATE, *map(float, SEARCH)]
    found = [evidence.find(method, (SEARCH_SEED,), 1, learning_rate=rate)[SEARCH_SEED] for rate in rates]
    ratios = [median_update_ratio(evidence.curves(row)) for row in found]
    nearest = sorted(sorted(range(len(rates)), key=lambda i: abs(math.log(ratios[i] / target)))[:2])
    (x0, x1), (y0, y1) = ([math.log(values[i]) for i in nearest] for values in (ratios, rates))
    return math.exp(y0 + (y1 - y0) * (math.log(target) - x0) / (x1 - x0))


def _ratios(evidence: Evidence, method: str, **vary: float) -> dict[int, float]:
    """Seed → median update ratio; as for `Evidence.find`."""
    return {seed: median_update_ratio(evidence.curves(row)) for seed, row in evidence.find(method, **vary).items()}


def report(evidence: Evidence) -> Verdict:
    """Judges the claim by its rule."""
    wesar = evidence.losses("wesar")
    sentences, lines, groups, statuses = [], [], {"wesar, 1e-3": wesar}, []
    lines.append(
        [
            "method",
            "equal rate",
            "median update ratio there ÷ WeSaR's",
            "loss at 1e-3",
            "loss at that rate",
            "− WeSaR",
            "share of the lead that goes",
        ]
    )
    ratio = _ratios(evidence, "wesar")
    for method, digits in EQUAL.items():
        rate = float(digits)
        if not math.isclose(searched := equal_rate(evidence, method), rate, rel_tol=0.05):
            raise Lacking(f"the search for {method} gives {searched:.2g}, the runs have {rate:.2g}")
        base, equal = evidence.losses(method), evidence.losses(method, learning_rate=rate)
        there = _ratios(evidence, method, learning_rate=rate)
        seeds = sorted(base.keys() & equal.keys() & wesar.keys())
        share = interval((base[seed] - equal[seed]) / (base[seed] - wesar[seed]) for seed in seeds)
        left = paired(equal, wesar)
        groups |= {f"{method}, {rate:g}": equal, f"{method}, 1e-3": base}
        quotient = interval(there[seed] / ratio[seed] for seed in seeds)
        lines.append(
            [
                method,
                f"{rate:g}",
                str(quotient),
                str(interval(base.values())),
                str(interval(equal.values())),
                str(left),
                str(share),
            ]
        )
        sentences.append(
            f"{method}: {share} of the lead goes at {rate:g}, where its median update ratio is {quotient} of WeSaR's,"
            f" and {left} nats are left (n = {share.n})."
        )
        statuses.append(left)
    picture, (axis,) = panels(1, height=2.4)
    dots(
        axis,
        {name: list(values.values()) for name, values in groups.items()},
        [COLOURS[1], COLOURS[0], COLOURS[0], COLOURS[2], COLOURS[2]],
    )
    axis.set_xlabel("held-out loss (nats)")
    decided = all(left.low > 0 or left.high < 0 for left in statuses)
    return Verdict("measured" if decided else "not decided", " ".join(sentences), picture, lines)
