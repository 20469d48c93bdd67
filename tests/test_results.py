"""The evidence: runs are kept once and completely, claims are judged by their rules, and the published text follows."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from llmfoundry_wesar.runs.plot import table as quickstart_table
from llmfoundry_wesar.runs.scalars import Scalars, load_runs
from llmfoundry_wesar.runs.summary import COLUMNS, read_rows, spike_steps, table
from results import equal_step, large, learning_rates, methods, norms, relative_step, seeds, spikes, update_ratios
from results.__main__ import CLAIMS, app
from results.evidence import (
    FOLDER,
    LONG_SEARCH_SEED,
    LONG_SEEDS,
    MAIN_SEEDS,
    SEEDS,
    Evidence,
    Lacking,
    Series,
    interval,
    keep,
    run,
)

DENSE = ("attn.Wq", "attn.out_proj", "ffn.up_proj", "ffn.down_proj")


def scalars(loss: Callable[[int], float], **families: Callable[[str, int], float]) -> Scalars:
    """Make a run of 40 steps with two blocks and both embeddings. Each family has a function of matrix and step."""
    modules = [f"model.transformer.blocks.{block}.{matrix}" for block in range(2) for matrix in DENSE]
    metrics = {"loss/train/loss": [loss(step) for step in range(40)]}
    for family, function in families.items():
        for module in ("model.transformer.wte", *modules, "model.lm_head"):
            metrics[f"{family}/{module}"] = [function(module, step) for step in range(40)]
    return {metric: (np.arange(40), np.array(values, dtype=np.float32)) for metric, values in metrics.items()}


def add(
    folder: Path,
    method: str,
    seed: int,
    held_out: float,
    logged: Scalars,
    variation: str = "",
    spikes: int = 0,
    parameters: float = 2229888,
    jump: float = 0,
):
    name = f"{method}-{variation}-{seed}"
    row = {column: "" for column in COLUMNS} | {
        "run": name,
        "method": method,
        "variation": variation,
        "seed": str(seed),
    }
    row |= {"status": "finished", "held_out_loss": str(held_out), "final_loss": str(held_out), "spikes": str(spikes)}
    row["largest_jump"] = str(jump)
    keep(row | {"parameters": str(parameters)}, logged, folder)


def test_each_run_is_trained_once_and_kept_whole(tmp_path: Path, dataset: Path):
    tiny = [f"variables.data={dataset}", f"eval_loader.dataset.local={dataset}", "eval_loader.dataset.split=val"]
    tiny += [
        "max_seq_len=16",
        "max_duration=3ba",
        "scheduler.t_warmup=1ba",
        "callbacks.update_ratio_monitor.interval=1ba",
        "callbacks.update_ratio_monitor.picture_interval=null",
    ]
    tiny += ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=97"]
    series, work, folder = [Series(("wesar",), (1,))], tmp_path / "work", tmp_path / "kept"
    folder.mkdir()
    assert run(series, work, folder, tiny) == 0
    rows, before = read_rows(folder / "runs.csv"), (folder / "runs.csv").read_bytes()
    [row] = rows
    assert (row["method"], row["status"]) == ("wesar", "finished")
    kept = Evidence(folder).curves(row)
    matrices = {metric.partition("/")[2] for metric in kept if metric.startswith("update_ratio/")}
    assert len(matrices) == 2 * 6 + 2
    families = ("weight_norm", "grad_norm", "gate")
    feed_forward = {name for name in matrices if "ffn" in name}
    assert {f"{family}/{name}" for family in families for name in feed_forward} <= kept.keys()
    # The curves keep five digits. The row has the mean of all three losses.
    losses = kept["loss/train/loss"][1]
    assert len(losses) == 3 and math.isclose(losses.mean(), float(row["final_loss"]), rel_tol=1e-4)
    assert run(series, work, folder, tiny) == 0
    assert (folder / "runs.csv").read_bytes() == before
    # A run that fails is kept as failed, and counted.
    assert run([Series(("wesar",), (2,))], work, folder, [*tiny, f"load_path={tmp_path / 'nowhere.pt'}"]) == 1
    assert [row["status"] for row in read_rows(folder / "runs.csv")] == ["finished", "failed"]


def test_intervals_are_those_of_the_t_test():
    first, second = np.array([5.0, 5.3, 5.1]), np.array([4.9, 5.0, 5.05])
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose(interval(first - second), [0.15, expected.low, expected.high], rtol=1e-12)


def test_of_two_equal_runs_the_later_counts_and_failed_ones_never(tmp_path: Path):
    logged = scalars(lambda step: 8.0)
    for held_out in (5.0, 4.0):
        add(tmp_path, "wesar", 11, held_out, logged)
    keep({column: "" for column in COLUMNS} | {"run": "x", "status": "failed", "parameters": "2229888"}, {}, tmp_path)
    evidence = Evidence(tmp_path)
    assert [row["held_out_loss"] for row in evidence.find("wesar", (11,))] == ["4.0"]
    assert len(evidence.failed) == 1
    with pytest.raises(Lacking, match="1 of 5 runs of wesar"):
        evidence.find("wesar")
    with pytest.raises(Lacking, match=r"0 of 5 runs of wesar learning_rate 0\.002"):
        evidence.find("wesar", learning_rate=2e-3)


@pytest.mark.parametrize(
    ("small", "wesar", "status"),
    [(4, 1, "confirmed"), (1, 4, "not confirmed"), (4, 4, "not decided"), (1, 1, "not decided")],
)
def test_update_ratios_are_judged_by_the_largest_over_the_smallest_role(tmp_path: Path, small, wesar, status):
    for seed in MAIN_SEEDS:
        for method, factor in (("small_init", small), ("wesar", wesar)):
            fast = lambda name, step, factor=factor: 1e-3 * step * (factor if name.endswith("down_proj") else 1)  # noqa: E731
            add(tmp_path, method, seed, 5.0, scalars(lambda step: 8.0, update_ratio=fast))
    verdict = update_ratios.report(Evidence(tmp_path))
    assert verdict.status == status
    assert f"Small {small:.2f} ({small:.2f}–{small:.2f}), WeSaR {wesar:.2f}" in verdict.sentences
    assert "The median role moves 1.00 (1.00–1.00) times as fast under WeSaR" in verdict.sentences


LONG = "max_duration=1500ba"


def test_runs_of_another_length_are_other_evidence(tmp_path: Path):
    logged = scalars(lambda step: 8.0)
    for held_out, variation in (
        (5.0, ""),
        (4.0, LONG),
        (3.5, f"{LONG} optimizer.lr=2.0e-3"),
        (3.0, LONG[:-6] + "5000ba"),
    ):
        add(tmp_path, "wesar", 21, held_out, logged, variation)
    found = {size: Evidence(tmp_path, size) for size in ("2m", "2m-1500", "2m-5000")}
    losses = {size: float(each.losses("wesar", (21,))[0]) for size, each in found.items()}
    assert losses == {"2m": 5.0, "2m-1500": 4.0, "2m-5000": 3.0}
    assert found["2m-1500"].losses("wesar", (21,), learning_rate=2e-3) == [3.5]
    with pytest.raises(Lacking, match="1 of 3 runs of wesar"):
        found["2m-1500"].find("wesar")


@pytest.mark.parametrize(
    ("first", "last", "status"),
    # By how much W_d moves faster than the other matrices, in the first half of training and in the second.
    [((4, 1), (4, 1), "confirmed"), ((4, 1), (4, 3), "not confirmed"), ((1, 1), (4, 1), "not decided")],
)
def test_long_runs_are_judged_by_both_ends(tmp_path: Path, first: tuple, last: tuple, status: str):
    for seed in LONG_SEEDS:
        for method, *factors in zip(("small_init", "wesar"), first, last, strict=True):
            fast = lambda name, step, factors=factors: (  # noqa: E731
                1e-3 * (factors[step > 20] if name.endswith("down_proj") else 1)
            )
            add(tmp_path, method, seed, 5.0, scalars(lambda step: 8.0, update_ratio=fast), LONG)
    verdict = update_ratios.report(Evidence(tmp_path, "2m-1500"))
    assert verdict.status == status
    small, wesar = last
    assert f"last tenth of training, median (range) of 3 seeds: Small {small:.2f}" in verdict.sentences
    assert f"WeSaR {wesar:.2f}" in verdict.sentences.partition("last tenth")[2]


@pytest.mark.parametrize(("grows", "status"), [("small_init", "confirmed"), ("wesar", "not confirmed")])
def test_norms_are_judged_by_growth_and_by_what_the_gate_carries(tmp_path: Path, grows: str, status: str):
    rng = np.random.default_rng(0)
    for seed in MAIN_SEEDS:
        for method in ("small_init", "wesar"):
            rate = (0.01 if method == grows else 0.001) * (1 + 0.1 * rng.random())
            norm = lambda name, step, rate=rate: 3 * (1 + rate * step)  # noqa: E731
            gate = lambda name, step: 5 * (1 - 0.004 * step)  # noqa: E731
            families = {"weight_norm": norm} | ({"gate": gate} if method == "wesar" else {})
            add(tmp_path, method, seed, 5.0, scalars(lambda step: 8.0, **families))
    verdict = norms.report(Evidence(tmp_path))
    assert verdict.status == status
    assert verdict.table[1][3].startswith("0.844")  # 1 − 0.004 · 39


@pytest.mark.parametrize(
    ("slopes", "status"),
    # By how many tenths of a nat the loss of WeSaR, and of the others, grows if the rate doubles.
    [((1, 1), "confirmed"), ((1, -1), "confirmed"), ((1, -4), "not confirmed"), ((1, -2.5), "not decided")],
)
def test_methods_are_judged_at_one_rate_and_at_the_best_of_each(
    tmp_path: Path, slopes: tuple[float, float], status: str
):
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        for method in methods.METHODS:
            start, slope = (5.0, slopes[0]) if method == "wesar" else (5.4, slopes[1])
            for rate in ("1e-3", methods.NEXT, methods.LOWER if slope > 0 else methods.HIGHER):
                held_out = start + 0.1 * slope * math.log2(float(rate) / 1e-3) + 0.01 * rng.random()
                variation = "" if rate == "1e-3" else f"optimizer.lr={rate}"
                add(tmp_path, method, seed, held_out, scalars(lambda step: 8.0), variation)
    evidence = Evidence(tmp_path)
    assert methods.best_rate(evidence, "wesar")[0] == 5e-4
    assert methods.best_rate(evidence, "he_init")[0] == (5e-4 if slopes[1] > 0 else 4e-3)
    verdict = methods.report(evidence)
    assert verdict.status == status
    # 5.4 + 0.2·slope at 4e-3, or 5.3 at 5e-4, minus WeSaR's 4.9, up to the noise of 0.01.
    left = 0.4 if slopes[1] > 0 else 0.5 + 0.2 * slopes[1]
    assert abs(float(verdict.table[1][6].split()[0]) - left) < 0.011


@pytest.mark.parametrize(
    ("lead", "dropped", "status"),
    [(0.4, (), "confirmed"), (0.4, ("he_init",), "not decided"), (-0.2, ("he_init",), "not confirmed")],
)
def test_long_runs_take_the_rate_that_the_search_chose(tmp_path: Path, lead: float, dropped: tuple, status: str):
    rng, logged = np.random.default_rng(0), scalars(lambda step: 8.0)
    for method in (*methods.METHODS, methods.EXTRA):
        loss = 4.0 if method in ("wesar", methods.EXTRA) else 4.0 + lead
        for rate in ("", *methods.SEARCH):
            variation = f"{LONG} optimizer.lr={rate}" if rate else LONG
            gain = 0.1 if rate == "2.0e-3" else 0.0
            add(tmp_path, method, LONG_SEARCH_SEED, loss - gain, logged, variation)
            for seed in LONG_SEEDS if method not in dropped and rate != "4.0e-3" else ():
                add(tmp_path, method, seed, loss - gain + 0.001 * rng.random(), logged, variation)
    evidence = Evidence(tmp_path, "2m-1500")
    assert methods.best_rate(evidence, "wesar")[0] == 2e-3
    verdict = methods.report(evidence)
    assert verdict.status == status
    assert ("Not run at 1e-3 so far: he_init." in verdict.sentences) == bool(dropped)
    # Its loss is that of `wesar`, but it is no pair of the paper.
    assert verdict.table[-1][0] == methods.EXTRA
    count = len(methods.OTHERS) - len(dropped)
    assert f"of {count} pairs with it {count if lead > 0 else 0} are in the paper's order" in verdict.sentences


def test_a_method_without_its_best_rate_keeps_its_row_in_the_picture(tmp_path: Path):
    logged = scalars(lambda step: 8.0)
    for rate in ("", *methods.SEARCH):
        variation = f"{LONG} optimizer.lr={rate}" if rate else LONG
        add(tmp_path, "wesar", LONG_SEARCH_SEED, 4.0, logged, variation)
    for method, loss in (("wesar", 4.0), ("he_init", 3.0), ("sigma_reparam", 4.6)):
        for seed in LONG_SEEDS:
            add(tmp_path, method, seed, loss + 0.001 * seed, logged, LONG)
    picture = methods.report(Evidence(tmp_path, "2m-1500")).picture
    assert picture is not None
    left, right = picture.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["he_init", "wesar", "sigma_reparam"]
    assert [text.get_text() for text in left.texts] == ["4.62 →"]  # too far from the others for dots
    drawn = [list(np.asarray(line.get_ydata())) for line in right.lines]
    assert drawn == [[], [1, 1, 1], [1], []]  # a dot for each seed of `wesar`, and the bar


@pytest.mark.parametrize("spiked", [False, True])
def test_gates_are_tested_at_an_equal_step_only_if_the_plain_model_spikes(tmp_path: Path, spiked: bool):
    for rate in equal_step.RATES:
        variation = f"{LONG} optimizer.betas=[0.9,0.99] scheduler.alpha_f=1.0 optimizer.lr={rate}"
        add(tmp_path, "small_init", LONG_SEARCH_SEED, 5.0, _ratio(0.01), variation, int(spiked))
    evidence = Evidence(tmp_path, "2m-1500")
    if spiked:
        with pytest.raises(Lacking, match=r"small_init at 0\.008, where it spikes"):
            equal_step.report(evidence)
    else:
        verdict = equal_step.report(evidence)
        assert verdict.status == "not decided" and [line[4] for line in verdict.table[1:]] == ["0"] * 3


@pytest.mark.parametrize(
    ("small", "wesar", "status"),
    # Numbers of 8 runs whose loss jumps. Fisher's p of 8 and 4 is C(8, 4) / C(16, 4) = 0.038, of 8 and 5 it is 0.1.
    [(8, 4, "confirmed"), (8, 5, "not decided"), (4, 8, "not confirmed")],
)
def test_gates_are_counted_where_the_plain_model_spikes(tmp_path: Path, small: int, wesar: int, status: str):
    for method, rate, count in (("small_init", equal_step.SPIKING, small), ("wesar", equal_step.TRIED[-1], wesar)):
        for number in range(8):
            variation, jump = f"optimizer.lr={rate}", 1.01 if number < count else 0.99
            add(tmp_path, method, 41 + number, 5.0, _ratio(0.01), variation, parameters=7e5, jump=jump)
    verdict = equal_step.report(Evidence(tmp_path, "spike"))
    assert verdict.status == status
    assert [line[3] for line in verdict.table[1:]] == [f"{small} of 8", f"{wesar} of 8"]
    assert ("p = 0.038 for fewer" in verdict.sentences) == (status == "confirmed")


@pytest.mark.parametrize(("factor", "status"), [(10, "confirmed"), (0.1, "not confirmed"), (1, "not decided")])
def test_spread_over_seeds_is_judged_by_the_f_test(tmp_path: Path, factor: float, status: str):
    for seed in MAIN_SEEDS:
        add(tmp_path, "small_init", seed, 6 + 0.01 * factor * (-1) ** seed, scalars(lambda step: 8.0))
        add(tmp_path, "wesar", seed, 5 + 0.01 * (-1) ** seed, scalars(lambda step: 8.0))
    verdict = seeds.report(Evidence(tmp_path))
    assert verdict.status == status
    # The table value of F(0.95; 7, 7).
    assert f"quotient is {factor**2:.2f}; it has to exceed 3.79" in verdict.sentences


def _ratio(rate: float) -> Scalars:
    return scalars(lambda step: 8.0, update_ratio=lambda name, step: rate)


def test_sensitivity_is_the_mean_excess_over_the_best_capped_at_the_first_loss(tmp_path: Path):
    # One learning rate ends above the first loss of 8: it counts as 8 and as a bad rate. Another has a spike.
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        for method, best in (("small_init", 6.0), ("wesar", 5.0)):
            for rate in learning_rates.SWEEP:
                diverged, spiked = rate == 1.6e-2 and method == "small_init", rate == 6.4e-2 and method == "wesar"
                loss = 9.0 if diverged else 7.0 if spiked else best + 0.01 * rng.random()
                variation = "" if rate == 1e-3 else f"optimizer.lr={rate:g}"
                add(tmp_path, method, seed, loss, _ratio(rate), variation, int(spiked))
        for sigma in learning_rates.SIGMAS.values():
            add(tmp_path, "wesar", seed, 5.0, _ratio(1e-3), f"model.init_config.sigma={sigma}")
    verdict = learning_rates.report(Evidence(tmp_path))
    # (8 − 6) / 7 and (7 − 5) / 7, up to the noise of 0.01.
    assert (
        abs(float(verdict.table[1][1].split()[0]) - 2 / 7) < 0.01
        and abs(float(verdict.table[2][1].split()[0]) - 2 / 7) < 0.01
    )
    assert "log2 of WeSaR's ÷ Small's: 2.000" in verdict.sentences
    assert [line[4] for line in verdict.table[1:3]] == ["5 of 35", "5 of 35"]


def test_the_equal_rate_is_where_the_update_ratios_meet_and_the_share_is_of_the_lead(tmp_path: Path):
    rng = np.random.default_rng(0)
    for seed in (relative_step.SEARCH_SEED, *SEEDS):
        add(tmp_path, "wesar", seed, 5.0 + 0.01 * rng.random(), _ratio(0.01))
        for method, equal in relative_step.EQUAL.items():
            for rate in ("1e-3", *((equal,) if seed in SEEDS else relative_step.SEARCH)):
                # The update ratio is proportional to the learning rate, and half of the lead of 1 nat goes.
                held_out, variation = (6.0, "") if rate == "1e-3" else (5.5, f"optimizer.lr={rate}")
                add(tmp_path, method, seed, held_out, _ratio(0.01 * float(rate) / float(equal)), variation)
    evidence = Evidence(tmp_path)
    for method, equal in relative_step.EQUAL.items():
        assert math.isclose(relative_step.equal_rate(evidence, method), float(equal), rel_tol=1e-4)
    for line in relative_step.report(evidence).table[1:]:
        assert line[2].startswith("1.000") and abs(float(line[6].split()[0]) - 0.5) < 0.01


def test_spikes_compare_before_and_after_the_first_one(tmp_path: Path):
    steps = np.arange(200)
    losses = 5 + 0.01 * np.sin(steps)
    losses[150] = 9.0
    assert list(spike_steps(losses)) == [150]
    for seed, factor in ((11, 0.49), (12, 0.51), (13, 0.5)):
        logged = {
            "loss/train/loss": (steps, losses.astype(np.float32)),
            "update_ratio/blocks.0.ffn.down_proj": (steps, np.where(steps > 150, factor, 1.0).astype(np.float32)),
            "grad_norm/blocks.0.ffn.down_proj": (steps, np.where(steps > 150, 1.01, 1.0).astype(np.float32)),
        }
        add(tmp_path, "small_init", seed, 5.0, logged, spikes=1)
    verdict = spikes.report(Evidence(tmp_path))
    assert verdict.status == "confirmed" and "update ratio -0.69" in verdict.sentences


def test_spikes_between_two_measured_steps_are_not_compared(tmp_path: Path):
    """W_d is measured every 100 steps, and 50 before and after the spike at 140 are looked at: only 100 is there."""
    losses = np.where(np.arange(300) == 140, 9.0, 5 + 0.01 * np.sin(np.arange(300))).astype(np.float32)
    rare = (np.arange(0, 300, 100), np.ones(3, dtype=np.float32))
    families = ("update_ratio", "grad_norm")
    logged = {"loss/train/loss": (np.arange(300), losses)} | {f"{f}/blocks.0.ffn.down_proj": rare for f in families}
    for seed in (11, 12):
        add(tmp_path, "small_init", seed, 5.0, logged, spikes=1)
    with pytest.raises(
        Lacking,
        match=r"2 of 2 runs had a spike .* in the 50 steps before the spike and in the 50 after it in 0 of them",
    ):
        spikes.report(Evidence(tmp_path))


def test_the_large_model_is_told_as_measured(tmp_path: Path):
    """W_d moves three times as fast as the others; norms grow by 39 %, and only wesar has gates, which fall to 0.61."""
    fast = lambda name, step: 3e-3 if name.endswith("down_proj") else 1e-3  # noqa: E731
    norm = lambda name, step: 1 + 0.01 * step  # noqa: E731
    gate = lambda name, step: 5 - 0.05 * step  # noqa: E731
    for method, held_out in (("small_init", 4.9), ("wesar", 4.8)):
        families = {"update_ratio": fast, "weight_norm": norm} | ({"gate": gate} if method == "wesar" else {})
        add(tmp_path, method, 31, held_out, scalars(lambda step: 8.0, **families), parameters=134e6)
    verdict = large.report(Evidence(tmp_path, "130m"))
    assert verdict.status == "measured" and "Not run so far: weight_norm, " in verdict.sentences
    assert verdict.table[1:] == [
        ["wesar", "4.800", "0", "3.00", "3.00", "1.390", "1.390", "0.610", "0.610"],
        ["small_init", "4.900", "0", "3.00", "3.00", "1.390", "1.390", "", ""],
    ]


def test_what_is_published_follows_from_what_is_kept(tmp_path: Path):
    result = CliRunner().invoke(app, ["report", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "verdicts.md").read_text(encoding="utf-8")
    assert text == (FOLDER / "verdicts.md").read_text(encoding="utf-8")
    for picture in re.findall(r"\((\w+\.png)\)", text):
        assert (FOLDER / picture).exists() and (tmp_path / picture).stat().st_size > 10_000
    page = (FOLDER.parent / "docs/reproduction.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (\([a-h]\) .*)$", page, re.MULTILINE)
    assert "".join(line[1] for line in quoted) == "abcdefg" + "aabbccgg" + "h" + "h"
    assert all(line in text for line in quoted)
    # Its table of claims and lengths.
    rows = re.findall(r"^\| (\([a-h]\) [\w ]+) \| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \| [\w ]+ \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for claim, *verdicts in rows:
        for length, verdict in zip(("", ", 1,500 steps", ", 5,000 steps"), verdicts, strict=True):
            assert (f"\n{claim}{length}: {verdict}. " in text) or verdict in ("not run", "not asked")
    # The quickstart's table, as `plot --table` prints it.
    printed = quickstart_table(load_runs([FOLDER / "quickstart.csv"])).splitlines()[2:]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    expected = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]
    assert [[f"quickstart-{method}", *figures] for method, *figures in rows] == expected
    # The page's table of compare: method, n, held-out loss and training loss.
    compared = table(read_rows(FOLDER / "quickstart-compare/runs.csv"))
    summed = {line.split(" | ")[0]: line.split(" | ") for line in compared.splitlines()}
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| (.*?) \| (.*?) \| ", page, re.MULTILINE)
    assert len(rows) == len(summed) - 2
    for method, n, held_out, training in rows:
        assert [n, training, held_out] == summed[f"| {method}"][1:4]


def test_an_unknown_claim_is_refused():
    result = CliRunner().invoke(app, ["run", "speed"])
    assert result.exit_code == 1 and all(name in result.output for name in CLAIMS)
