"""The measures of one run, and the table and curves of many."""

import math
import statistics

import numpy as np
import pytest

from llmfoundry_wesar.runs.scalars import read_scalars
from llmfoundry_wesar.runs.summary import (
    COLUMNS,
    draw_curves,
    largest_jump,
    measure,
    read_rows,
    spikes,
    table,
    write_table,
)
from tests.logged_runs import record

NOISE = [1.0, 3.0] * 64  # mean 2, standard deviation 1


def row(method: str, seed: int, variation: str = "", status: str = "finished", **values: float) -> dict[str, str]:
    finished = {"parameters": 1234567, "tokens_per_second": 100.0, "largest_jump": 0.5, "spikes": 0, "tokens": 4096}
    finished |= {"final_loss": 4.0, "held_out_loss": 4.0, "held_out_perplexity": 54.6, "peak_memory_gb": 1.0, **values}
    known = {"run": f"{method}{variation}-{seed}", "method": method, "variation": variation, "seed": seed}
    known |= {"status": status, "commit": "abc", "hardware": "2 × CPU"}
    known |= finished if status == "finished" else {}
    return {column: str(known.get(column, "")) for column in COLUMNS}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]


@pytest.mark.parametrize(
    ("losses", "number"),
    [
        ([*NOISE, 8.0], 0),  # exactly 6 standard deviations
        ([*NOISE, 8.1], 1),
        ([*NOISE, -20.0], 0),  # downward
        ([*NOISE[1:], 50.0], 0),  # one step before the window is full
        ([2.0] * 128 + [50.0], 0),  # no spread
        ([*NOISE, math.nan], 0),
        ([], 0),
    ],
)
def test_spike_rule_by_hand(losses, number):
    assert spikes(np.array(losses, dtype=np.float32)) == number


def test_spikes_count_as_a_loop_over_steps_does():
    """A spike raises the mean and the deviation by which the following steps are judged."""
    losses = np.random.default_rng(0).normal(3.0, 0.05, 1000).astype(np.float32)
    losses[[150, 151, 152, 400, 800]] += [1.0, 1.0, 9.0, 0.5, 0.2]
    expected = 0
    for step in range(128, len(losses)):
        before = [float(loss) for loss in losses[step - 128 : step]]
        expected += float(losses[step]) > statistics.fmean(before) + 6 * statistics.pstdev(before)
    assert 3 <= expected <= 5
    assert spikes(losses) == expected


def test_largest_jump_by_hand():
    assert largest_jump(np.array([5.0] * 16 + [4.0, 7.0, 6.5], dtype=np.float32)) == 2.0
    # On a falling line the median of the previous 16 losses is 8.5 steps higher.
    assert largest_jump(np.arange(40.0)[::-1]) == -8.5
    assert math.isnan(largest_jump(np.array([5.0] * 16)))


def test_measures_are_those_of_the_logs(tmp_path):
    """The expected values are chosen here. The tolerance is for float32, in which TensorBoard keeps values."""
    metrics = {}
    for step in range(1, 13):
        metrics[step] = {
            "loss/train/loss": 6.0 - step / 4,
            "loss/train/total": 7.0,
            "time/token": 4096.0 * step,
            # The first batch takes 100 s, each later batch 2 s.
            "time/train": 98.0 + 2.0 * step,
            "memory/peak_allocated_mem": 3.0 if step == 7 else 2.0,
        }
    metrics[12] |= {"metrics/eval/lambada/LanguageCrossEntropy": 5.5, "metrics/eval/val/LanguageCrossEntropy": 4.5}
    record(tmp_path, "run", metrics)
    measured = measure(read_scalars(tmp_path), "metrics/eval/val/LanguageCrossEntropy")
    expected = {"tokens": 49152, "held_out_loss": 4.5, "held_out_perplexity": math.exp(4.5), "spikes": 0}
    expected |= {"final_loss": 6.0 - 7.5 / 4, "tokens_per_second": 2048.0, "peak_memory_gb": 3.0}
    assert math.isnan(measured.pop("largest_jump"))
    assert measured == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "missing", ["loss/train/total", "time/token", "time/train", "metrics/eval/LanguageCrossEntropy"]
)
def test_a_run_without_a_needed_metric_is_no_result(missing):
    keys = ["loss/train/total", "time/token", "time/train", "metrics/eval/LanguageCrossEntropy"]
    scalars = {key: (np.arange(3), np.ones(3, np.float32)) for key in keys if key != missing}
    with pytest.raises(ValueError, match="training loss" if "loss" in missing else missing):
        measure(scalars, "metrics/eval/LanguageCrossEntropy")


def test_rows_that_cannot_be_decoded_are_refused_with_the_name_of_their_file(tmp_path):
    (tmp_path / "runs.csv").write_bytes(",".join(COLUMNS).encode() + b"\nwesar\xff")
    with pytest.raises(ValueError, match=r"runs\.csv: damaged \(.*byte 0xff"):
        read_rows(tmp_path / "runs.csv")


def test_table_has_mean_sample_deviation_and_count_of_finished_runs():
    random = np.random.default_rng(0)
    losses = {method: random.normal(4.0, 0.1, 3) for method in ("small_init", "wesar")}
    speeds = {"small_init": [100.0, 120.0, 110.0], "wesar": [90.0, 100.0, 80.0]}
    rows = [
        row(method, seed, held_out_loss=losses[method][seed], tokens_per_second=speeds[method][seed])
        for seed in range(3)
        for method in losses
    ]
    rows += [row("wesar", 3, status="failed"), row("he_init", 0, status="failed")]
    head, _, *lines = cells(table(rows))
    best = min(losses, key=lambda method: losses[method].mean())
    for method, line in zip(losses, lines, strict=False):
        found = dict(zip(head, line, strict=True))
        assert found["method"] == method and found["n"] == "3"
        text = f"{np.mean(losses[method]):.3f} ± {np.std(losses[method], ddof=1):.3f}"
        assert found["held-out loss"] == (f"**{text}**" if method == best else text)
        time = 110.0 / np.array(speeds[method])
        assert found["time"] == f"{np.mean(time):.2f} ± {np.std(time, ddof=1):.2f}"
        assert found["training loss"] == "**4.000 ± 0.000**"  # a tie
        assert found["parameters"] == "1,234,567"
    assert lines[2][:2] == ["he_init", "0"] and set(lines[2][2:]) == {"–"}


def test_table_keeps_variations_apart_and_takes_time_relative_to_the_same_one():
    rows = [
        row(method, 1, f"optimizer.lr={lr}", tokens_per_second=speed, held_out_loss=loss)
        for method, lr, speed, loss in [
            ("small_init", "1e-3", 100.0, 4.0),
            ("small_init", "2e-3", 50.0, 3.9),
            ("wesar", "1e-3", 80.0, math.nan),
            ("wesar", "2e-3", 80.0, 3.8),
            ("wesar", "4e-3", 80.0, 3.95),
        ]
    ]
    head, _, *lines = cells(table(rows))
    found = [{key: line[head.index(key)] for key in ("variation", "held-out loss", "time", "n")} for line in lines]
    assert [line["time"] for line in found] == ["1.00", "1.00", "1.25", "0.62", "–"]
    assert [line["held-out loss"] for line in found] == ["4.000", "3.900", "nan", "**3.800**", "3.950"]
    assert found[4]["variation"] == "optimizer.lr=4e-3"


def test_the_written_table_names_conditions_and_failed_runs(tmp_path):
    write_table([row("wesar", 1), row("he_init", 1, status="failed")], tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(table([row("wesar", 1), row("he_init", 1, status="failed")]))
    for note in ("Failed: he_init-1", "Commit: abc", "Hardware: 2 × CPU", "Tokens: 4096"):
        assert f"\n- {note}.\n" in text


def test_curves_are_the_means_over_seeds_in_front_of_the_seeds(tmp_path):
    """The tolerance is for float32, in which TensorBoard keeps values."""
    losses = {(method, seed): np.linspace(8, 4 + seed, 30) for method in ("wesar", "he_init") for seed in (1, 2)}
    rows = []
    for (method, seed), values in losses.items():
        record(tmp_path, f"{method}-{seed}", {step: {"loss/train/total": v} for step, v in enumerate(values)})
        rows.append(row(method, seed))
    axis = draw_curves([*rows, row("wesar", 3, status="failed")], tmp_path).axes[0]
    for method in ("wesar", "he_init"):
        (mean,) = [line for line in axis.lines if line.get_label() == f"{method} loss/train/loss"]
        faint = [line for line in axis.lines if line.get_label() == f"{method} seed"]
        np.testing.assert_allclose(mean.get_ydata(), (losses[method, 1] + losses[method, 2]) / 2, rtol=1e-6)
        for seed, line in enumerate(faint, 1):
            np.testing.assert_allclose(line.get_ydata(), losses[method, seed], rtol=1e-6)
            assert line.get_color() == mean.get_color() and line.get_zorder() < mean.get_zorder()
        assert len(faint) == 2
