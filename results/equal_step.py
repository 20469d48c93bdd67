"""(h) WeSaR's gates prevent spikes (the paper's title), at an equal relative step (not in the paper)."""

import numpy as np
from scipy import stats

from llmfoundry_wesar.figures import COLOURS
from llmfoundry_wesar.runs.summary import Row
from results.evidence import (
    LONG_SEARCH_SEED,
    SPIKE_SEARCH_SEED,
    Evidence,
    Lacking,
    Series,
    Verdict,
    decide,
    jumped,
    median_update_ratio,
    without_lacking,
)
from results.pictures import dots, panels

RATES = ("8.0e-3", "1.6e-2", "3.2e-2")
# A larger β₂ and a rate that stays at its highest value after the warm-up make spikes more likely.
BETAS, FINAL_RATE = "[0.9,0.99]", "1.0"
_VARY = {"optimizer.betas": (BETAS,), "scheduler.alpha_f": (FINAL_RATE,), "optimizer.lr": RATES}
# The same where the plain model spikes: its rates in the search, the lowest of them with a spike, and the rates of
# `wesar` that were tried for an equal step, the last of which gave it.
SPIKE_RATES, SPIKING, TRIED = ("1.0e-2", "2.0e-2"), "1.0e-2", ("2.0e-3", "4.0e-4", "5.8e-4", "7.5e-4")
SERIES = (
    Series(("small_init",), (LONG_SEARCH_SEED,), _VARY, "2m-1500"),
    Series(("small_init",), (SPIKE_SEARCH_SEED,), {"optimizer.lr": SPIKE_RATES}, "spike"),
    Series(("wesar",), (SPIKE_SEARCH_SEED,), {"optimizer.lr": TRIED}, "spike"),
    Series(("small_init",), vary={"optimizer.lr": (SPIKING,)}, size="spike"),
    Series(("wesar",), vary={"optimizer.lr": (TRIED[-1], SPIKING)}, size="spike"),
)


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule: by a search for spikes in long runs, or by counting them where there are some."""
    return _search(evidence) if evidence.size.length else _count(evidence)


def _search(evidence: Evidence) -> Verdict:
    """If `small_init` does not spike in the search, the rule asks for no more runs."""
    lines = [["learning rate", "held-out loss", "median update ratio", "largest jump", "spikes"]]
    for text in RATES:
        rate, stress = float(text), {"betas": BETAS, "final_rate": float(FINAL_RATE)}
        [row] = evidence.find("small_init", (LONG_SEARCH_SEED,), learning_rate=rate, **stress)
        ratio = median_update_ratio(evidence.curves(row))
        loss, jump = (f"{float(row[column]):.3f}" for column in ("held_out_loss", "largest_jump"))
        lines.append([f"{rate:g}", loss, f"{ratio:.5f}", jump, row["spikes"]])
    if spiked := [line[0] for line in lines[1:] if int(line[-1])]:
        raise Lacking(f"0 of 8 runs of each method at the step of small_init at {spiked[0]}, where it spikes")
    return Verdict(
        "not decided",
        f"With β₂ = 0.99 and a constant rate, small_init has no spike at {', '.join(line[0] for line in lines[1:])} "
        f"(seed {LONG_SEARCH_SEED}), so there is nothing that gates could prevent.",
        table=lines,
    )


def _count(evidence: Evidence) -> Verdict:
    """Compare the numbers of runs whose loss jumps, by Fisher's exact test."""
    n = len(evidence.size.seeds)
    *compared, beside = (("small_init", SPIKING), ("wesar", TRIED[-1]), ("wesar", SPIKING))

    def find(group: tuple[str, str]) -> list[Row]:
        method, rate = group
        return evidence.find(method, learning_rate=float(rate))

    groups = {group: find(group) for group in compared}
    small, wesar = (sum(map(jumped, rows)) for rows in groups.values())
    table = [[small, n - small], [wesar, n - wesar]]
    fewer, more = (stats.fisher_exact(table, alternative=side).pvalue for side in ("greater", "less"))
    groups |= without_lacking(find, [beside])
    ratios = {
        group: np.median([median_update_ratio(evidence.curves(row)) for row in rows]) for group, rows in groups.items()
    }
    jumps = {group: np.array([float(row["largest_jump"]) for row in rows]) for group, rows in groups.items()}
    lines = [
        [
            *group,
            f"{ratios[group]:.5f}",
            f"{sum(map(jumped, rows))} of {n}",
            f"{np.median(jumps[group]):.2f}",
            f"{sum(int(row['spikes']) > 0 for row in rows)} of {n}",
            f"{np.median([float(row['final_loss']) for row in rows]):.3f}",
        ]
        for group, rows in groups.items()
    ]
    header = [
        "method",
        "rate",
        "median update ratio",
        "runs that jump",
        "largest jump",
        "runs with a spike by the score",
        "final loss",
    ]
    picture, [axis] = panels(1, height=0.35 * len(groups) + 0.8)
    dots(axis, {", ".join(group): values for group, values in jumps.items()}, COLOURS)
    axis.axvline(1, color="0.6", linewidth=1, zorder=0)
    axis.set_xlabel("largest jump of the loss (nats)")
    steps = ", ".join(f"{ratios[group]:.5f}" for group in compared)
    return Verdict(
        decide(fewer < 0.05, more < 0.05),
        f"The loss of {small} of {n} runs of small_init jumps by more than 1 nat, and that of {wesar} of {n} of wesar "
        f"at an equal step (median update ratios {steps}). Fisher's exact test: p = {fewer:.3f} for fewer under wesar, "
        f"{more:.3f} for more.",
        picture,
        [header, *lines],
    )
