import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from llmfoundry_wesar.figures import Network, draw_heat, label_ends, pixels

BLOCKS = "model.transformer.blocks"


def ranges(*roles: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {role: (np.array([1, 6]), np.array([[1e-3, 1e-3], [2e-3, 1e-3], [3e-3, 1e-3]])) for role in roles}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_update_ratio_that_has_no_colour_is_grey(value: float):
    """Also if no matrix has another one, as at the first step of a warm-up."""
    ratios = {f"{BLOCKS}.0.attn.Wq": 1e-3, f"{BLOCKS}.1.attn.Wq": value}
    for shown in (ratios, dict.fromkeys(ratios, value)):
        picture = draw_heat({"run": Network("", shown, ranges("W_q"))})
        image = picture.axes[0].images[0]
        colours = image.cmap(image.norm(np.ma.masked_invalid(image.get_array())))
        assert np.allclose(colours[0, 1], [0xBB / 255] * 3 + [1]) and pixels(picture).shape == (360, 1000, 3)


def test_a_small_difference_has_a_small_difference_of_colour():
    """Between the least and the greatest colour there is at least a factor of 10."""
    ratios = {f"{BLOCKS}.{block}.attn.Wq": ratio for block, ratio in enumerate([1e-3, 1.1e-3])}
    norm = draw_heat({"run": Network("", ratios, ranges("W_q"))}).axes[0].images[0].norm
    assert norm.vmax / norm.vmin == pytest.approx(10) and norm(1e-3) + norm(1.1e-3) == pytest.approx(1)


def test_several_matrices_in_a_cell_have_their_median():
    ratios = {f"{BLOCKS}.0.ffn.experts.{expert}.w1": ratio for expert, ratio in enumerate([1e-3, 9e-3, 2e-3])}
    image = draw_heat({"run": Network("", ratios, ranges("W_g"))}).axes[0].images[0]
    assert image.get_array().tolist() == [[2e-3]]


@pytest.mark.parametrize(
    ("ends", "heights"),
    [
        ([0.1, 0.5, 0.52], [0.1, 0.46, 0.56]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.0, 0.0, 0.9], [0.0, 0.1, 0.9]),
        ([1.0, 1.0, 0.99], [0.9, 1.0, 0.8]),
    ],
)
def test_names_of_lines_are_moved_no_further_than_needed(ends: list[float], heights: list[float]):
    """By hand: names that overlap keep their mean height, unless they would leave the axis."""
    axis = Figure().add_subplot(ylim=(0, 1))
    label_ends(axis, [(str(end), axis.plot([0, 1], [0, end])[0]) for end in ends], gap=0.1)
    at = sorted(zip(heights, ends, strict=True))
    assert [(text.xy[1], text.get_text()) for text in axis.texts] == [(pytest.approx(y), str(end)) for y, end in at]
