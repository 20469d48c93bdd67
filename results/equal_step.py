"""(h) WeSaR's gates prevent spikes (the paper's title), at an equal relative step (not in the paper)."""

from results.evidence import (
    LONG_SEARCH_SEED,
    SPIKE_SEARCH_SEED,
    Evidence,
    Lacking,
    Series,
    Verdict,
    median_update_ratio,
)

RATES = ("8.0e-3", "1.6e-2", "3.2e-2")
# A larger β₂ and a rate that stays at its highest value after the warm-up make spikes more likely.
BETAS, FINAL_RATE = "[0.9,0.99]", "1.0"
_VARY = {"optimizer.betas": (BETAS,), "scheduler.alpha_f": (FINAL_RATE,), "optimizer.lr": RATES}
# The same where the plain model spikes: its rates in the search, its lowest rate with a spike, and the rates of `wesar`
# that were tried for an equal step, the last of which is that step's.
SPIKE_RATES, SPIKING, TRIED = ("1.0e-2", "2.0e-2", "4.0e-2"), "2.0e-2", ("5.0e-3",)
SERIES = (
    Series(("small_init",), (LONG_SEARCH_SEED,), _VARY, "2m-1500"),
    Series(("small_init",), (SPIKE_SEARCH_SEED,), {"optimizer.lr": SPIKE_RATES}, "spike"),
    Series(("wesar",), (SPIKE_SEARCH_SEED,), {"optimizer.lr": TRIED}, "spike"),
    Series(("small_init",), vary={"optimizer.lr": (SPIKING,)}, size="spike"),
    Series(("wesar",), vary={"optimizer.lr": (TRIED[-1], SPIKING)}, size="spike"),
)


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule. If `small_init` does not spike in the search, the rule asks for no more runs."""
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
