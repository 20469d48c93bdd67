"""Run the benchmarks on a CPU at a tiny size: their rows are complete and correct. No timing is tested."""

import csv
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from scipy.stats import binom

from benchmarks import data, precision, run, sizes, step, trainer
from benchmarks.monitor import DUE, IDLE, MONITORS, NONE, SPIKES
from benchmarks.record import COLUMNS, Recorder, ratio
from llmfoundry_wesar.runs import compare

MAY_BE_EMPTY = {"median", "p10", "p90", "ratio", "ratio_low", "ratio_high", "note"}
UNMEASURED_ON_CPU = {"GiB at peak", "host synchronisations in a step"}


def measure(path: Path, suite: str, **options: Any) -> list[dict[str, str]]:
    """Run one suite and return its rows, after a check that each of them is complete."""
    run.main(suite=suite, out=path / "rows.csv", seconds=0.02, commit="abc", **{"modes": "eager"} | options)
    with (path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert tuple(row) == COLUMNS
        empty = {key for key, value in row.items() if value == ""}
        assert empty <= MAY_BE_EMPTY, row
        if row["n"] == "0":
            assert row["note"] and "median" in empty, row
            assert row["unit"] in UNMEASURED_ON_CPU or row["variant"] in ("wesar_adamw", "wrong"), row
        else:
            assert float(row["p10"]) <= float(row["median"]) <= float(row["p90"]), row
        if row["ratio_low"]:
            assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"]), row
    return rows


def as_dict(value: Any) -> dict[str, Any]:
    """Return a section of a config as it is, and any other value as a dict with one entry."""
    return value if isinstance(value, dict) and value else {"": value}


def medians(rows: list[dict[str, str]], unit: str) -> dict[str, float]:
    return {row["variant"]: float(row["median"]) for row in rows if row["unit"] == unit and row["n"] != "0"}


def test_step_compares_all_methods_with_the_plain_one_eager_and_compiled(tmp_path, monkeypatch):
    """No module breaks the graph. Only dynamo compiles here, because inductor takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rows = measure(tmp_path, "step", modes="eager,compiled")
    for compiled in ("False", "True"):
        times = {row["variant"]: row for row in rows if row["unit"] == "ms" and row["compiled"] == compiled}
        assert tuple(times) == step.METHODS
        assert float(times["small_init"]["ratio"]) == 1
        assert all(float(row["median"]) > 0 and row["ratio_low"] for row in times.values())
    assert medians(rows, "graph breaks") == {"all": 0}


def test_trainer_goes_from_foundrys_configuration_to_the_yamls_one_key_at_a_time(tmp_path):
    """Each variant changes the given keys of the one before.

    The first is left out: it has another model class and its keys.
    """
    plain, wesar = (sizes.load("130m", method) for method in ("small_init", "wesar"))
    for config in (plain, wesar):
        for key in ("compile_config", "callbacks", "run_name", "save_folder"):
            config[key] = {"none": {}} if key == "callbacks" else {}
    del plain["compile_config"], wesar["compile_config"]
    steps = list(trainer.variants(plain, wesar).values())
    flat = [{(key, k): v for key in step for k, v in as_dict(step[key]).items()} for step in steps]
    changes = [{k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} for a, b in itertools.pairwise(flat[1:])]
    assert changes == [
        {("model", "z_loss")},
        {("optimizer", "name"), ("optimizer", "weight_decay"), ("optimizer", "fused")},
        {("model", "use_train_metrics")},
        {("model", "fused_loss")},
        {("compile_config", "")},
        {("model", "fc_type"), ("model", "init_config"), ("model", "embedding_scaling")},
        {("callbacks", "update_ratio_monitor"), ("callbacks", "gate_monitor")},
    ]
    assert steps[-1]["model"] == wesar["model"]


def test_trainer_computes_mfu_from_tokens_a_second(tmp_path, monkeypatch):
    """The MFU follows from the rate, with N, L, d and T of the tiny model computed by hand.

    The suite runs two variants and one that fails. The test is slow because each has a process of its own.
    """
    all_variants = trainer.variants

    def some(*configs: dict) -> dict[str, dict]:
        found = all_variants(*configs)
        wrong = {"model": found["stock"]["model"] | {"n_heads": 5}}
        return {"stock": found["stock"], "wrong": found["stock"] | wrong, "+ fused_loss": found["+ fused_loss"]}

    monkeypatch.setattr(trainer, "variants", some)
    rows = measure(tmp_path, "trainer")
    [failed] = [row for row in rows if row["variant"] == "wrong"]
    assert failed["n"] == "0" and failed["note"].startswith("failed: ")
    rows = [row for row in rows if row["variant"] != "wrong"]
    rates = medians(rows, "tokens/s")
    assert list(rates) == ["stock", "+ fused_loss"]
    d, layers, vocabulary, length = 32, 2, 97, 16
    parameters = layers * (12 * d * d + 2 * d) + d + vocabulary * d
    for unit, attention in {"MFU, 6N + 12·L·d·T": 12, "MFU, 6N + 6·L·d·T": 6}.items():
        flops = 6 * parameters + attention * layers * d * length
        expected = {variant: rate * flops / 989e12 for variant, rate in rates.items()}
        assert medians(rows, unit) == pytest.approx(expected, rel=1e-6)  # the CSV has eight digits
    # The ratio is that of the medians: the runs follow each other, so their batches are not pairs.
    for row in rows:
        if row["unit"] == "tokens/s":
            assert float(row["ratio"]) == pytest.approx(rates[row["variant"]] / rates["stock"], rel=1e-6)
            assert row["ratio_low"] == row["ratio_high"] == ""


def test_monitor_alternates_within_one_run_of_each_optimizer(tmp_path, monkeypatch):
    """All monitors have the same number of steps.

    The test computes the share of a 1M-token step from the readings itself.
    """
    readings = {}

    class Keeping(Recorder):
        def add(self, values, *args, **row):
            readings[(self.row | row)["name"], row["variant"], row["unit"]] = np.array(values)
            super().add(values, *args, **row)

    monkeypatch.setattr(run, "Recorder", Keeping)
    rows = measure(tmp_path, "monitor")
    for name in ("tiny, adamw, fused", "tiny, decoupled_adamw"):
        times = {row["variant"]: row for row in rows if row["name"] == name and row["unit"] == "ms"}
        assert times.keys() == MONITORS.keys()
        assert len({row["n"] for row in times.values()}) == 1
        none, due, idle, spikes = (readings[name, variant, "ms"] for variant in (NONE, DUE, IDLE, SPIKES))
        one_million = 2**20 / 64 * float(times[NONE]["median"])  # a step of this test has 4 sequences of 16 tokens
        shares = {
            "update_ratio_monitor, every step": 100 * (due - none) / one_million,
            "update_ratio_monitor, every 10th": 100 * (0.1 * due + 0.9 * idle - none) / one_million,
            "spike_recorder, every step": 100 * (spikes - none) / one_million,
        }
        derived = {row["variant"]: row for row in rows if row["name"] == name and row["unit"].startswith("%")}
        assert derived.keys() == shares.keys()
        for variant, percent in shares.items():
            for key, q in {"p10": 10, "median": 50, "p90": 90}.items():
                assert float(derived[variant][key]) == pytest.approx(np.percentile(percent, q), rel=1e-6)


def test_loss_has_a_row_for_every_form(tmp_path):
    rows = medians(measure(tmp_path, "loss"), "ms")
    assert list(rows) == ["plain formula", "cross_entropy", "linear_cross_entropy"]


def test_optimizer_has_a_row_for_every_form(tmp_path):
    rows = medians(measure(tmp_path, "optimizer"), "ms")
    assert [name for name in rows if name != "wesar_adamw"] == ["adamw, fused", "adamw, foreach"]


def test_data_counts_tokens_and_bytes_of_one_text(tmp_path, monkeypatch):
    """A token of this tokenizer has 1 to 8 bytes, and the time for 30B tokens follows from the rate."""
    monkeypatch.setattr(data, "_BYTES", 300_000)
    rates = {row["unit"]: float(row["median"]) for row in measure(tmp_path, "data")}
    assert 1 < rates["bytes/s a core"] / rates["tokens/s a core"] < 8
    assert rates["core hours for 30B tokens"] == pytest.approx(30e9 / rates["tokens/s a core"] / 3600, rel=1e-6)


def test_what_fails_leaves_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    """Three failures: a model that cannot be built, a suite without enough memory, and one that would end too late."""

    def load(size, method):
        config = sizes.load(size, method)
        return config | {"model": config["model"] | {"n_heads": 5}} if method == "wesar" else config

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "load", load)
    monkeypatch.setitem(run.SUITES, "gate", fail)
    options = {"sizes": "tiny", "modes": "eager", "seconds": 0.02, "commit": "abc", "out": tmp_path / "rows.csv"}
    with pytest.raises(typer.Exit):
        run.main(suite="gate,step", methods="small_init,wesar,weight_norm", **options)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["unit"] == "ms"]
    assert [(row["suite"], row["variant"], row["n"] != "0") for row in rows] == [
        ("gate", "all", False),
        ("step", "wesar", False),
        ("step", "small_init", True),
        ("step", "weight_norm", True),
    ]
    assert rows[0]["note"] == "out of memory" and rows[1]["note"].startswith("failed: ")
    run.main(suite="gate", minutes=0.0, **options)


def test_a_gpu_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(typer.BadParameter, match="no GPU"):
        run.main(device="cuda", out=tmp_path / "rows.csv", commit="abc")


def test_gate_measures_the_error_of_each_form_and_of_a_rounded_gate(tmp_path):
    """Products in bfloat16 (8 bits) have errors of about 2e-3, in float32 of about 1e-7.

    α = 1/σ = 158.11 is rounded to 158.
    """
    rows = measure(tmp_path, "gate")
    for dtype, low, high in (("amp_bf16", 1e-4, 2e-2), ("fp32", 1e-9, 1e-6)):
        errors = [float(row["median"]) for row in rows if "error of" in row["unit"] and row["dtype"] == dtype]
        assert len(errors) == 3 * 4
        assert all(low < error < high for error in errors)
    assert medians(rows, "relative error of αW")["W_e α=158.11"] == pytest.approx(1 - 158 * 4e-5**0.5, rel=1e-3)
    assert medians(rows, "spacing of α")["W_e α=158.11"] == 1


def test_precision_pairs_trainings_that_differ_in_the_gates_dtype_alone(tmp_path, monkeypatch):
    """Seed and data are the same, so the losses differ only by the rounding of 14 gates, by at most 2⁻⁹ each."""
    monkeypatch.setattr(precision, "_STEPS", 10)
    rows = measure(tmp_path, "precision")
    losses = {row["variant"]: row for row in rows if row["unit"] == "held-out loss"}
    assert losses.keys() == {precision.FLOAT32, precision.BFLOAT16}
    assert all(row["n"] == "6" and 3 < float(row["median"]) < 6 for row in losses.values())
    assert all("10 steps on random tokens" in row["note"] for row in rows)
    assert float(losses[precision.BFLOAT16]["ratio"]) == pytest.approx(1, abs=0.01)
    assert losses[precision.BFLOAT16]["ratio"] != "1"
    assert set(medians(rows, "gates of 14 that changed in bfloat16")) == losses.keys()


def test_a_drift_that_meets_both_variants_leaves_the_ratio_alone():
    """The clock becomes seven times slower, and one variant always takes 1% longer: the ratio is exactly 1.01."""
    plain = [1.0 + i for i in range(7)]
    assert ratio([1.01 * x for x in plain], plain) == pytest.approx([1.01] * 3, rel=1e-12)


def test_the_interval_is_the_narrowest_that_covers_the_median_with_95_percent():
    """The sorted ratios are their ranks, 1 to n. The binomial gives exactly how often the true median lies outside."""

    def coverage(n, low):
        return 1 - 2 * binom.cdf(low - 1, n, 0.5)

    for n in range(1, 101):
        median, *interval = ratio(list(range(1, n + 1)), [1.0] * n)
        assert median == (n + 1) / 2
        if n < 6:
            assert interval == [] and coverage(n, 1) < 0.95
        else:
            low, high = interval
            assert low + high == n + 1
            assert coverage(n, low) >= 0.95 > coverage(n, low + 1)


def test_variants_take_turns_forwards_and_backwards(tmp_path):
    calls = []
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc")
    recorder.about(suite="turns", name="turns", dtype="fp32", shape="", compiled=False)
    recorder.compare({name: functools.partial(calls.append, name) for name in "ABC"}, seconds=0)
    assert "".join(calls).endswith("ABCCBA" * 3)


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(typer.BadParameter, match="has other columns"):
        run.main(out=tmp_path / "rows.csv", commit="abc")
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n"


def test_a_result_without_a_commit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "llmfoundry_wesar" / "runs" / "compare.py"))
    with pytest.raises(typer.BadParameter, match="a result names its commit"):
        run.main(out=tmp_path / "rows.csv")


@pytest.mark.parametrize("option", [{"suite": "steps"}, {"sizes": "13b"}, {"modes": "eagre"}, {"device": "tpu"}])
def test_an_unknown_choice_is_named_with_the_known_ones(option, tmp_path):
    [value] = option.values()
    with pytest.raises(typer.BadParameter, match=f"^{value}: choose from"):
        run.main(out=tmp_path / "rows.csv", commit="abc", **option)


@pytest.mark.parametrize("size", sizes.SIZES)
def test_sizes_are_the_yamls(size):
    config = sizes.load(size, "wesar")
    assert config["model"]["fc_type"] == {"name": "wesar"}
    expected = {"1.3b": "d=2048 L=24 H=16 V=32000 S=2048 B=8", "13b-blocks": "d=5120 L=4 H=40 V=32000 S=2048 B=4"}
    assert sizes.shape(config).startswith(expected.get(size, "d="))
