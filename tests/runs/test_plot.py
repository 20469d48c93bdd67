import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.runs.plot import FIGURES, draw, plot, shown, table
from llmfoundry_wesar.runs.scalars import Scalars, load_runs, role_ranges, write_csv
from tests.logged_runs import MATRICES, TOKENS_PER_STEP, pretraining, record

Logged = dict[str, dict[str, dict[int, float]]]
BLOCK = "model.transformer.blocks"


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorboard")


@pytest.fixture(scope="module")
def logged(log_dir: Path) -> Logged:
    """Log a plain and a gated run of different depth and length, each in several event files."""
    return {
        "small_init": record(log_dir, "small_init", pretraining(gated=False), flush_interval=4),
        "wesar": record(log_dir, "wesar", pretraining(gated=True, blocks=5, steps=17, glu=True), flush_interval=4),
    }


@pytest.fixture(scope="module")
def runs(log_dir: Path, logged: Logged) -> dict[str, Scalars]:
    return load_runs([log_dir / name for name in logged])


def lines(figure: Figure) -> dict[str, Line2D]:
    """Return the curves by label. The points behind a smoothed curve have no label."""
    return {str(line.get_label()): line for axis in figure.axes for line in axis.lines if line.get_label()[0] != "_"}


def expected_metrics(figure: str) -> dict[str, list[str]]:
    """Return the metrics that a figure shows, written out.

    The last block is 2 in the plain run and 4 in the gated one.
    """
    small, wesar = f"{BLOCK}.2", f"{BLOCK}.4"
    both = ("ffn.down_proj", "ffn.up_proj")
    gated = (*MATRICES, "ffn.gate_proj")
    return {
        "1": {
            "small_init": ["loss/train/total", *(f"update_ratio/{small}.{name}" for name in both)],
            "wesar": ["loss/train/loss", *(f"update_ratio/{wesar}.{name}" for name in both)],
        },
        "2": {"small_init": ["loss/train/total"], "wesar": ["loss/train/loss"]},
        "3": {
            "small_init": [f"weight_norm/{small}.{name}" for name in both],
            "wesar": [f"{prefix}weight_norm/{wesar}.{name}" for prefix in ("", "virtual_") for name in both],
        },
        "8": {
            "small_init": [f"grad_norm/{small}.{name}" for name in MATRICES],
            "wesar": [f"grad_norm/{wesar}.{name}" for name in gated],
        },
        "9": {
            "small_init": [f"update_ratio/{small}.{name}" for name in MATRICES],
            "wesar": [f"update_ratio/{wesar}.{name}" for name in gated],
        },
        "gates": {
            "wesar": [
                "gate/model.transformer.wte",
                "gate/model.lm_head",
                *(f"gate/{BLOCK}.{block}.{name}" for block in range(5) for name in gated),
            ]
        },
    }[figure]


OF_NETWORK = ("roles", "heat")
OF_METRICS = [figure for figure in FIGURES if figure not in OF_NETWORK]


@pytest.mark.parametrize("figure", OF_METRICS)
def test_each_figure_draws_exactly_what_was_logged(figure: str, runs: dict[str, Scalars], logged: Logged):
    """A figure has all its curves and no other, at the logged values, which TensorBoard rounds to float32."""
    expected = expected_metrics(figure)
    drawn = lines(draw(figure, {run: runs[run] for run in expected}))
    assert drawn.keys() == {f"{run} {metric}" for run, metrics in expected.items() for metric in metrics}
    for run, metrics in expected.items():
        for metric in metrics:
            points = [(step, np.float32(value)) for step, value in logged[run][metric].items()]
            np.testing.assert_array_equal(drawn[f"{run} {metric}"].get_xydata(), points)


def test_figure_1_has_a_colour_for_each_run_and_dashes_for_w_u(runs: dict[str, Scalars]):
    figure = draw("1", runs)
    loss, ratios = figure.axes
    assert (loss.get_yscale(), ratios.get_yscale()) == ("linear", "log")
    assert loss.get_position().y0 > ratios.get_position().y1, "the loss is on top"
    drawn = lines(figure)
    colours = {run: {line.get_color() for label, line in drawn.items() if label.startswith(run)} for run in runs}
    assert all(len(found) == 1 for found in colours.values()) and colours["small_init"] != colours["wesar"]
    for label, line in drawn.items():
        assert line.get_linestyle() == ("--" if label.endswith("up_proj") else "-")
        assert line.axes is (loss if "loss" in label else ratios)
    names = {text.get_text(): text.get_color() for text in loss.texts}
    assert {run: {colour} for run, colour in names.items()} == colours


def test_figures_8_and_9_have_a_panel_for_each_run_and_the_same_scale(runs: dict[str, Scalars]):
    for name in ("8", "9"):
        figure = draw(name, runs)
        assert [axis.get_title() for axis in figure.axes] == list(runs)
        assert {axis.get_yscale() for axis in figure.axes} == {"log"}
        assert len({axis.get_ylim() for axis in figure.axes}) == 1
        for axis in figure.axes:
            curves = [line for line in axis.lines if line.get_label()[0] != "_"]
            assert {str(line.get_label()).split()[0] for line in curves} == {axis.get_title()}
            # Each role's name has the colour of its curve, and the colour is the same in both panels.
            named = {text.get_text(): text.get_color() for text in axis.texts}
            assert named["$W_{d}$"] == lines(figure)[str(curves[-1].get_label())].get_color()
            assert len(set(named.values())) == len(curves) == len(named)
        shared = [{text.get_text(): text.get_color() for text in axis.texts} for axis in figure.axes]
        assert shared[0].items() <= shared[1].items()


def test_gates_have_a_panel_for_each_role_and_darken_with_depth(runs: dict[str, Scalars]):
    figure = draw("gates", {"wesar": runs["wesar"]})
    assert [axis.get_title() for axis in figure.axes] == [
        f"$W_{{{role}}}$" for role in ("e", "q", "k", "v", "o", "g", "u", "d", "p")
    ]
    assert not any(axis.texts for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wesar"]
    drawn = lines(figure)
    opacity = [drawn[f"wesar gate/{BLOCK}.{block}.ffn.down_proj"].get_alpha() for block in range(5)]
    assert opacity == sorted(set(opacity)) and opacity[-1] == 1


ROLES = {"W_q": "attn.Wq", "W_o": "attn.out_proj", "W_u": "ffn.up_proj", "W_d": "ffn.down_proj"}


@pytest.mark.parametrize("figure", OF_NETWORK)
def test_roles_have_the_median_and_the_range_of_all_blocks(figure: str, runs: dict[str, Scalars], logged: Logged):
    picture, drawn = draw(figure, runs), {}
    bands = {axis: list(axis.collections) for axis in picture.axes}
    for label, line in lines(picture).items():
        outline = bands[line.axes].pop(0).get_paths()[0].vertices  # in the order of the lines
        ends = [outline[outline[:, 0] == step, 1] for step in line.get_xdata()]
        drawn[label] = line, [(end.min(), end.max()) for end in ends]
    assert len(drawn) == 8 + 9, "the gated run has a GLU"
    for run, blocks in (("small_init", 3), ("wesar", 5)):
        for role, name in ROLES.items():
            line, band = drawn[f"{run} role_update_ratio/{role}/median"]
            series = [logged[run][f"update_ratio/{BLOCK}.{block}.{name}"] for block in range(blocks)]
            values = np.float32([list(points.values()) for points in series])
            np.testing.assert_array_equal(line.get_xdata(), list(series[0]))
            np.testing.assert_array_equal(line.get_ydata(), values[blocks // 2])
            np.testing.assert_allclose(band, np.array([values[0], values[-1]]).T, rtol=1e-12)


def test_roles_are_drawn_alike_from_their_own_metrics(runs: dict[str, Scalars]):
    """The metrics of the roles suffice for `roles`, and have other keys only if they were logged."""
    ranges = role_ranges(runs["wesar"])
    metrics = {
        f"role_update_ratio/{role}/{name}": (steps, row)
        for role, (steps, values) in ranges.items()
        for name, row in zip(("min", "median", "max"), values, strict=True)
    }
    from_matrices, from_roles = (lines(draw("roles", {"run": scalars})) for scalars in (runs["wesar"], metrics))
    assert from_matrices.keys() == from_roles.keys()
    for label, line in from_roles.items():
        np.testing.assert_array_equal(line.get_xydata(), from_matrices[label].get_xydata())
    with pytest.raises(ValueError, match="run 'run' has no update_ratio metrics, which figure heat shows"):
        draw("heat", {"run": metrics})


def test_roles_have_a_panel_each_and_the_names_of_runs_beside_the_last(runs: dict[str, Scalars]):
    picture = draw("roles", runs)
    assert [axis.get_title() for axis in picture.axes] == [
        f"$W_{{{role}}}$" for role in ("e", "q", "k", "v", "o", "g", "u", "d", "p")
    ]
    assert len({axis.get_ylim() for axis in picture.axes}) == 1
    named = {axis.get_title(): {text.get_text() for text in axis.texts} for axis in picture.axes if axis.texts}
    assert named == {"$W_{v}$": set(runs), "$W_{d}$": set(runs), "$W_{p}$": set(runs)}


def test_a_heat_map_has_every_matrix_in_its_place(runs: dict[str, Scalars], logged: Logged):
    picture = draw("heat", runs)
    maps = [axis for axis in picture.axes if axis.images]
    scales = {(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in maps}
    assert len(scales) == 1 and len({axis.get_ylim() for axis in picture.axes if axis.lines}) == 1
    for axis, (run, blocks) in zip(maps, (("small_init", 3), ("wesar", 5)), strict=True):
        rows = [text.get_text() for text in axis.get_yticklabels()]
        cells = axis.images[0].get_array()
        assert cells.shape == (len(rows), blocks)
        assert axis.get_title() == f"{run}: update ratio at step {15 if blocks == 5 else 9}"
        last = {metric: list(points.values())[-1] for metric, points in logged[run].items()}
        for role, name in ROLES.items():
            expected = np.float32([last[f"update_ratio/{BLOCK}.{block}.{name}"] for block in range(blocks)])
            np.testing.assert_array_equal(cells[rows.index(f"$W_{{{role[2:]}}}$")], expected)
        assert set(cells[0]) == {np.float32(last["update_ratio/model.transformer.wte"])}


def test_virtual_norms_are_thin(runs: dict[str, Scalars]):
    drawn = lines(draw("3", runs))
    for name in ("up_proj", "down_proj"):
        actual, virtual = (drawn[f"wesar {p}weight_norm/{BLOCK}.4.ffn.{name}"] for p in ("", "virtual_"))
        assert virtual.get_linewidth() < actual.get_linewidth()
        assert (virtual.get_color(), virtual.get_linestyle()) == (actual.get_color(), actual.get_linestyle())


@pytest.mark.parametrize("figure", ["1", "3", "8", "9", "gates"])
def test_layer_is_the_index_in_the_metric_key(figure: str, runs: dict[str, Scalars]):
    drawn = lines(draw(figure, {"wesar": runs["wesar"]}, layer=1))
    assert drawn and all(f"{BLOCK}.1." in label for label in drawn if "loss" not in label)


def test_tokens_are_those_logged_at_the_steps(runs: dict[str, Scalars]):
    for label, line in lines(draw("1", runs, x="tokens")).items():
        run, metric = label.split()
        np.testing.assert_array_equal(line.get_xdata(), runs[run][metric][0] * TOKENS_PER_STEP)


def test_tokens_between_two_logged_counts_are_interpolated(tmp_path: Path):
    """An update ratio is logged at the number of finished steps, where a run that logs rarely has no token count."""
    metrics = {0: {"time/token": 0.0}, 1: {"loss/train/total": 3.0}, 4: {"time/token": 400.0}}
    record(tmp_path, "run", metrics)
    (line,) = lines(draw("2", load_runs([tmp_path]), x="tokens")).values()
    assert line.get_xdata().tolist() == [100]


def test_smoothing_is_a_trailing_mean_before_the_points_themselves(tmp_path: Path):
    values = [6.0, 3.0, float("nan"), 5.0, 1.0]
    record(tmp_path, "run", {step: {"loss/train/total": value} for step, value in enumerate(values)})
    (axis,) = draw("2", load_runs([tmp_path]), smooth=3).axes
    points, mean = axis.lines
    np.testing.assert_array_equal(points.get_ydata(), values)
    # By hand, without the NaN: 6/1, 9/2, 9/2, 8/2, 6/2. All are exact in binary.
    assert mean.get_ydata().tolist() == [6, 4.5, 4.5, 4, 3]
    assert points.get_alpha() < 0.5 and mean.get_label() == "run loss/train/total"


@pytest.mark.parametrize("x", ["step", "tokens"])
@pytest.mark.parametrize("figure", FIGURES)
def test_csv_of_a_figure_draws_it_again(figure: str, x: str, tmp_path: Path, runs: dict[str, Scalars]):
    runs = runs if figure in OF_NETWORK else {run: runs[run] for run in expected_metrics(figure)}
    before = draw(figure, runs, x=x)
    write_csv(tmp_path / "curves.csv", shown(figure, runs, x=x))
    again = load_runs([tmp_path / "curves.csv"])
    after = draw(figure, again, x=x)
    assert lines(before).keys() == lines(after).keys()
    for label, line in lines(before).items():
        np.testing.assert_array_equal(lines(after)[label].get_xydata(), line.get_xydata())
        assert lines(after)[label].get_color() == line.get_color()
    keys = {f"{run} {metric}" for run, scalars in again.items() for metric in scalars}
    expected = set(lines(before))
    if figure in OF_NETWORK:
        expected = {
            f"{run} {key}" for run, scalars in runs.items() for key in scalars if key.startswith("update_ratio/")
        }
    assert keys - {f"{run} time/token" for run in runs} == expected, "nothing but what the figure shows"


@pytest.mark.parametrize("count", [8, 13])
def test_many_runs_stay_apart(count: int, tmp_path: Path):
    """Runs that end at the same loss have different colours, and their names do not overlap."""
    for index in range(count):
        record(tmp_path, f"run{index}", {0: {"loss/train/total": 9.0}, 1: {"loss/train/total": 3.0 + index / 1e4}})
    figure = draw("2", load_runs([tmp_path]))
    assert len({tuple(np.atleast_1d(line.get_color())) for line in lines(figure).values()}) == count
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == count
    # The boxes may overlap by the height of a descender, a quarter of a line.
    assert all(above.y0 > below.y1 - 0.25 * below.height for below, above in pairwise(boxes))
    assert boxes[0].x0 >= axis.bbox.x1 and boxes[-1].y1 < figure.bbox.y1


def test_values_that_have_no_place_on_the_axis_leave_gaps(tmp_path: Path):
    """A skipped step has ratio 0, a zero matrix inf, a diverged run NaN. Only the other values set the limits."""
    ratios = [1e-3, 0.0, float("inf"), float("nan"), 4e-3]
    metrics = {
        step: {
            "loss/train/total": float("nan") if step == 3 else 5.0 - step,
            f"update_ratio/{BLOCK}.0.ffn.up_proj": ratio,
            f"update_ratio/{BLOCK}.0.ffn.down_proj": 2 * ratio,
        }
        for step, ratio in enumerate(ratios)
    }
    record(tmp_path, "run", metrics)
    plot([tmp_path], tmp_path / "figure.png")
    loss, update_ratios = draw("1", load_runs([tmp_path])).axes
    low, high = update_ratios.get_ylim()
    assert 3e-4 < low < 1e-3 and 8e-3 < high < 3e-2
    assert not np.isfinite(update_ratios.transScale.transform((0, 0.0))[1]), "0 is drawn somewhere"
    assert [text.get_text() for text in loss.texts] == ["run"]


def test_a_run_without_any_number_has_no_name_in_the_picture(tmp_path: Path):
    for name, loss in (("diverged", float("nan")), ("trained", 3.0)):
        record(tmp_path, name, {step: {"loss/train/total": loss} for step in range(2)})
    (axis,) = draw("2", load_runs([tmp_path])).axes
    assert [text.get_text() for text in axis.texts] == ["trained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"figure": "12"}, r"unknown figure '12'; the figures are: 1 .*; 9 \(.*10 to 12\); gates \(all gates\)"),
        (
            {"figure": "gates"},
            "run 'small_init' has no gate metrics, which figure gates shows: .*callbacks: {gate_monitor: {by_matrix",
        ),
        ({"figure": "9", "layer": 3}, "run 'small_init' has no update_ratio metrics of block 3: .* blocks are 0, 1, 2"),
        ({"figure": "1", "layer": -1}, "no update_ratio metrics of block -1: --layer counts from 0"),
        ({"figure": "2", "layer": 0}, "figure 2 shows only the loss: leave out --layer"),
        ({"figure": "heat", "layer": 0}, "figure heat shows all blocks: leave out --layer"),
        ({"figure": "2", "x": "epoch"}, "--x epoch: must be step or tokens"),
        ({"figure": "2", "smooth": 0}, "--smooth 0: must be at least 1"),
    ],
)
def test_wrong_requests_are_refused(arguments: dict, message: str, runs: dict[str, Scalars]):
    with pytest.raises(ValueError, match=message):
        draw(runs=runs, **arguments)


def test_options_are_checked_before_runs_are_read(tmp_path: Path):
    for options, message in (
        ({"figure": "12"}, "unknown figure '12'"),
        ({"figure": "2", "layer": 0}, "leave out --layer"),
        ({"x": "epoch"}, "--x epoch: must be step or tokens"),
        ({"smooth": 0}, "--smooth 0"),
        ({"labels": ["ok $10", "$x^$"]}, r"--label \$x\^\$: matplotlib cannot read its formula \(.*\); for a \$ write"),
    ):
        with pytest.raises(ValueError, match=message):
            plot([tmp_path / "none"], tmp_path / "out.png", **options)  # type: ignore[arg-type]


def test_a_name_is_drawn_as_it_is_if_it_is_no_formula(tmp_path: Path):
    names = ["lr $x^$", r"$\alpha$", "a $5"]
    for name in names:
        record(tmp_path, name, pretraining(gated=True))
    runs = load_runs([tmp_path])
    (axis,) = draw("2", runs).axes
    assert {text.get_text() for text in axis.texts} == {r"lr \$x^\$", r"$\alpha$", "a $5"}
    for figure in ("9", "gates"):
        draw(figure, runs).draw_without_rendering()


def test_a_run_without_the_metrics_is_told_what_logs_them(runs: dict[str, Scalars]):
    def without(part: str) -> dict[str, Scalars]:
        return {"run": {metric: series for metric, series in runs["wesar"].items() if part not in metric}}

    monitor = "`callbacks: {update_ratio_monitor: {"
    for figure, part, message in (
        ("1", "update_ratio", f"no update_ratio metrics of W_d and W_u, .* {monitor}by_matrix: true}}}}` in the YAML"),
        ("1", "down_proj", f"no update_ratio metrics of W_d, .* {monitor}by_matrix: true}}}}` in the YAML"),
        ("2", "loss/", "no loss metrics, .* `loggers: {tensorboard: "),
        ("3", "weight_norm", f"no weight_norm metrics of W_d and W_u, .* {monitor}metrics: .update_ratio, weight_norm"),
        ("8", "grad_norm", f"no grad_norm metrics, .* {monitor}metrics: .update_ratio, grad_norm"),
    ):
        with pytest.raises(ValueError, match=f"run 'run' has {message}"):
            draw(figure, without(part))
    with pytest.raises(ValueError, match=r"run 'run' has no time/token metric.*; use --x step"):
        draw("2", without("time/token"), x="tokens")
    assert len(lines(draw("3", without("virtual_")))) == 2, "virtual norms are drawn only where logged"


def test_pictures_are_of_the_type_of_their_suffix_and_old_ones_outlive_errors(
    log_dir: Path, logged: Logged, tmp_path: Path
):
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        out = tmp_path / "pictures" / f"figure{suffix}"
        plot([log_dir], out)
        old = out.read_bytes()
        assert old.startswith(start)
        with pytest.raises(ValueError, match="unknown figure"):
            plot([log_dir], out, figure="4")
        assert out.read_bytes() == old
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    ElementTree.parse(tmp_path / "pictures" / "figure.svg")
    with pytest.raises(ValueError, match=r"figure\.jpg: the suffix must be \.pdf or \.png or \.svg"):
        plot([log_dir], tmp_path / "figure.jpg")
    with pytest.raises(ValueError, match=r"curves\.txt: the suffix must be \.csv"):
        plot([log_dir], tmp_path / "figure.png", csv=tmp_path / "curves.txt")


def test_command_passes_its_options_on(log_dir: Path, logged: Logged, tmp_path: Path):
    paths = [str(log_dir / name) for name in logged]
    options = ["--layer", "0", "--label", "Small init", "--label", "WeSaR", "--smooth", "2", "--x", "tokens"]
    csv, command, library = (tmp_path / name for name in ("curves.csv", "command.png", "library.png"))
    result = CliRunner().invoke(
        app, ["plot", *paths, "--out", str(command), "--figure", "9", *options, "--csv", str(csv)]
    )
    assert result.exit_code == 0, result.output
    plot(paths, library, "9", 0, ["Small init", "WeSaR"], 2, "tokens")
    assert command.read_bytes() == library.read_bytes()
    plot([csv], tmp_path / "again.png", "9", 0, smooth=2, x="tokens")
    assert command.read_bytes() == (tmp_path / "again.png").read_bytes()


def test_table_has_the_losses_and_the_quotient_from_logs_and_from_its_csv(
    log_dir: Path, logged: Logged, tmp_path: Path
):
    """In these logs W_d's ratio is 1 + block/7 + 5/61, under small_init 4 times that, and W_u's 1 + block/7 + 4/61."""
    options = ["--out", str(tmp_path / "figure.png"), "--table"]
    result = CliRunner().invoke(app, ["plot", str(log_dir), *options, "--csv", str(tmp_path / "kept.csv")])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["plot", str(tmp_path / "kept.csv"), *options]).output == result.output
    _, _, small, wesar = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.strip().splitlines()
    )
    for row, run, metric, quotient in (
        (small, "small_init", "loss/train/total", 4 * (8 / 7 + 5 / 61) / (8 / 7 + 4 / 61)),
        (wesar, "wesar", "loss/train/loss", (9 / 7 + 5 / 61) / (9 / 7 + 4 / 61)),
    ):
        final = np.mean(list(logged[run][metric].values())[-10:])
        # The plain run was not evaluated.
        held_out = [f"{loss:.3f}" for loss in logged[run].get("metrics/eval/LanguageCrossEntropy", {}).values()]
        assert row == [run, f"{final:.3f}", (held_out or ["–"])[-1], f"{quotient:.2f}"]


def test_a_table_has_a_dash_for_what_was_not_logged_and_needs_a_loss(tmp_path: Path):
    """Without update ratios, or with those of other matrices only, there is no quotient of W_d and W_u."""
    one = np.array([0]), np.float32([1])
    ratios = ["update_ratio/model.transformer.h.0.attn.c_attn", "role_update_ratio/W_d/median"]
    others = {"none": {"loss/train/total": one}, "others": dict.fromkeys(["loss/train/total", *ratios], one)}
    for row in table(others).splitlines()[2:]:
        assert [cell.strip() for cell in row.split("|")[2:-1]] == ["1.000", "–", "–"]
    write_csv(tmp_path / "one.csv", {"one": {"update_ratio/a": one}})
    options = ["--out", str(tmp_path / "2.png"), "--csv", str(tmp_path / "2.csv"), "--figure", "heat", "--table"]
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "one.csv"), *options])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert "run 'one' has no loss metrics" in line and line.endswith(", or leave out --table")
    assert list(tmp_path.iterdir()) == [tmp_path / "one.csv"]
    with pytest.raises(ValueError, match=r"run 'none' has no loss metrics: .* --table"):
        table({"none": {}})


def test_command_says_errors_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(app, ["plot", str(tmp_path), "--out", str(tmp_path / "figure.png")])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert str(tmp_path) in line and "no TensorBoard event files" in line
