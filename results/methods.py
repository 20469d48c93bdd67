"""(c) The order of methods in Table 6 and of the ablations in Table 7."""

from llmfoundry_wesar.plot import COLOURS
from results.evidence import SEEDS, Evidence, Lacking, Series, Verdict, interval, paired
from results.pictures import dots, panels

# All of them have higher perplexities than `wesar` in Tables 6 and 7.
OTHERS = (
    "small_init",
    "weight_norm",
    "sigma_reparam",
    "sigma_reparam_post_ln",
    "residual_scaling_he",
    "residual_scaling_small",
    "he_init",
    "wesar_small",
    "wesar_fixed",
)
METHODS = ("wesar", *OTHERS)
SERIES = (
    Series(METHODS),
    Series(METHODS, SEEDS[:1], size="130m"),
    Series(("small_init", "wesar"), SEEDS[1:3], size="130m"),
)


def report(evidence: Evidence) -> Verdict:
    """Judges the claim by its rule."""
    losses, lines, lacking = {}, [], []
    for method in METHODS:
        try:
            losses[method] = evidence.losses(method)
        except Lacking as missing:
            lacking.append(str(missing))
    agreed = opposed = 0
    for other in OTHERS:
        if "wesar" in losses and other in losses:
            difference = paired(losses[other], losses["wesar"])
            order = "as in the paper" if difference.low > 0 else "opposite" if difference.high < 0 else "no difference"
            agreed, opposed = agreed + (difference.low > 0), opposed + (difference.high < 0)
            lines.append([other, str(interval(losses[other].values())), str(difference), str(difference.n), order])
    if not lines:
        raise Lacking("; ".join(lacking))
    picture, (axis,) = panels(1, height=0.35 * len(losses) + 0.8)
    ordered = sorted(losses, key=lambda method: sum(losses[method].values()) / len(losses[method]))
    dots(axis, {method: list(losses[method].values()) for method in ordered}, COLOURS * 2)
    axis.set_xlabel("held-out loss at 1e-3 (nats)")
    status = "confirmed" if agreed == len(OTHERS) else "not confirmed" if opposed else "not decided"
    return Verdict(
        status,
        f"At 1e-3 WeSaR's held-out loss is {interval(losses['wesar'].values())}; of {len(lines)} pairs with it {agreed}"
        f" are in the paper's order, {opposed} in the opposite one, {len(lines) - agreed - opposed} do not differ."
        + (f" Not run: {'; '.join(lacking)}." if lacking else "")
        + " Each method's own best learning rate was not searched.",
        picture,
        [["method", "held-out loss", "− WeSaR", "n", "order"], *lines],
    )
