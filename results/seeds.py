"""(d) WeSaR spreads less over seeds than Small init (Table 6)."""

from scipy import stats

from llmfoundry_wesar.figures import COLOURS
from results.evidence import MAIN, MAIN_SEEDS, Evidence, Series, Verdict, decide
from results.pictures import dots, panels

SERIES = (Series(MAIN, MAIN_SEEDS),)


def report(evidence: Evidence) -> Verdict:
    """Judge the claim by its rule."""
    small, wesar = (evidence.losses(method, MAIN_SEEDS) for method in MAIN)
    n, quotient = len(MAIN_SEEDS), small.var(ddof=1) / wesar.var(ddof=1)
    bound = stats.f.ppf(0.95, n - 1, n - 1)
    picture, (axis,) = panels(1, height=1.8)
    dots(axis, dict(zip(MAIN, (small - small.mean(), wesar - wesar.mean()), strict=True)), COLOURS)
    axis.set_xlabel("held-out loss − mean of its method (nats)")
    return Verdict(
        decide(quotient > bound, 1 / quotient > bound),
        f"Held-out loss: Small {small.mean():.3f} ± {small.std(ddof=1):.4f} (n = {n}), WeSaR {wesar.mean():.3f} ± "
        f"{wesar.std(ddof=1):.4f} (n = {n}). The variances' quotient is {quotient:.2f}; it has to exceed {bound:.2f}.",
        picture,
    )
