"""The 130M model on a GPU: one run of each method. One seed decides nothing, so the figures are told as measured."""

import numpy as np

from results.evidence import MAIN, Evidence, Verdict, by_role, without_lacking
from results.methods import METHODS
from results.update_ratios import draw, ends, part_of, ratios_of

_HEADER = [
    "method",
    "held-out loss",
    "spikes",
    "r, first tenth",
    "r, last tenth",
    "‖W_d‖",
    "‖W_u‖",
    "α of W_d",
    "α of W_u",
]


def _growth(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Return the values at the end ÷ at the start, mean over blocks, of W_d and W_u; nothing if there are none."""
    ends = [curves[role][1][0, :, [0, -1]] for role in ("W_d", "W_u") if role in curves]
    return [f"{(end / start).mean():.3f}" for start, end in ends] or ["", ""]


def report(evidence: Evidence) -> Verdict:
    """Tell of each method that has run the held-out loss, (a)'s r, and (b)'s growth."""
    found = without_lacking(lambda method: evidence.find(method)[0], METHODS)
    ratios = {method: ratios_of(evidence, method) for method in found}
    lines = []
    for method, row in sorted(found.items(), key=lambda item: float(item[1]["held_out_loss"])):
        parts = ends(ratios[method]["W_d"][0]).values()
        spread = [f"{part_of(ratios[method], part, method).spread[0]:.2f}" for part in parts]
        curves = evidence.curves(row)
        growth = [cell for family in ("weight_norm", "gate") for cell in _growth(by_role([curves], family))]
        lines.append([method, f"{float(row['held_out_loss']):.3f}", row["spikes"], *spread, *growth])
    sentences = (
        "One seed, no verdict. r is the largest ÷ the smallest update ratio of a role; norms and gates are at the end "
        "÷ at the start, mean over blocks."
    )
    if lacking := [method for method in METHODS if method not in found]:
        sentences += f" Not run so far: {', '.join(lacking)}."
    both = {method: ratios[method] for method in MAIN if method in found}
    return Verdict("measured", sentences, draw(both) if len(both) == 2 else None, [_HEADER, *lines])
