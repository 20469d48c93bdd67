import itertools
import lzma
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import DataSpec, Trainer
from composer.loggers import InMemoryLogger, TensorboardLogger
from composer.models import ComposerModel
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from torch import nn

from llmfoundry_wesar.callbacks.update_ratio_monitor import UpdateRatioMonitor
from llmfoundry_wesar.runs.scalars import (
    Scalars,
    find_curves,
    load_runs,
    median_update_ratio_quotient,
    read_runs,
    read_scalars,
    replacing,
    write_csv,
)
from tests.logged_runs import pretraining, record

HEADER = b"run,metric,step,value\n"


def assert_holds(read: Scalars, logged: dict[str, dict[int, float]]) -> None:
    """Check all metrics, steps and values. TensorBoard rounds values to float32, so after rounding they are equal."""
    assert read.keys() == logged.keys()
    for metric, (steps, values) in read.items():
        assert steps.tolist() == sorted(logged[metric])
        np.testing.assert_array_equal(values, np.float32([logged[metric][step] for step in steps]))


class TwoMatrices(ComposerModel):
    """A feed-forward part with MPT's module names, and a loss in two parts."""

    def __init__(self) -> None:
        super().__init__()
        ffn = nn.ModuleDict({"up_proj": nn.Linear(4, 16, bias=False), "down_proj": nn.Linear(16, 4, bias=False)})
        self.model = nn.ModuleDict(
            {"transformer": nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"ffn": ffn})])})}
        )
        self.ffn = [ffn]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.ffn[0]["down_proj"](self.ffn[0]["up_proj"](batch).relu())

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, z_loss = (outputs - batch).square().mean(), 1e-2 * outputs.square().mean()
        return {"total": loss + z_loss, "loss": loss, "z_loss": z_loss}

    def eval_forward(self, batch: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
        return self(batch)


def test_reads_what_a_trainer_logged(tmp_path: Path):
    """Every scalar that Composer's in-memory logger has of a real run with evaluations, and no other."""
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    loader = DataSpec(torch.utils.data.DataLoader(data, batch_size=4), get_num_tokens_in_batch=lambda batch: 8)
    memory, model = InMemoryLogger(), TwoMatrices()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration="6ba",
        eval_interval="2ba",
        callbacks=[UpdateRatioMonitor(interval="2ba", picture_interval=None)],
        loggers=[memory, TensorboardLogger(log_dir=str(tmp_path), flush_interval=1)],
        run_name="real",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    kept = {}
    for metric, entries in memory.data.items():
        points = {stamp.batch.value: float(value) for stamp, value in entries if not isinstance(value, str)}
        if points:
            kept[metric] = points
    assert (tmp_path / "real" / "real").is_dir(), "the evaluations left no folder of hyperparameters to skip"
    runs = read_runs(tmp_path)
    assert list(runs) == ["real"]
    assert_holds(runs["real"], kept)
    assert {"loss/train/loss", "update_ratio/model.transformer.blocks.0.ffn.down_proj"} <= kept.keys()
    assert runs["real"]["time/token"][1].tolist() == [0, 8, 16, 24, 32, 40, 48]

    ratios = {
        matrix: np.array(list(kept[f"update_ratio/model.transformer.blocks.0.ffn.{matrix}"].values()))
        for matrix in ("down_proj", "up_proj")
    }
    # 1e-6: the logged values are float32.
    assert median_update_ratio_quotient(runs["real"]) == pytest.approx(
        np.median(ratios["down_proj"] / ratios["up_proj"]), rel=1e-6
    )


def test_of_two_writes_at_a_step_the_later_wins_whatever_the_files_are_called(tmp_path: Path):
    for index in range(3):
        record(tmp_path, "run", {0: {"loss/train/total": float(index)}})
        (file,) = (tmp_path / "run").glob("events*")
        # File names contain a second and a counter without leading zeros, so they can sort in this order.
        file.rename(file.with_name(f"{9 - index}.{file.name}"))
    assert read_scalars(tmp_path)["loss/train/total"][1].tolist() == [2]


def test_resumed_run_is_one_curve_with_the_second_attempt_where_both_logged(tmp_path: Path):
    metric = "loss/train/total"
    record(tmp_path, "run", {step: {metric: float(step)} for step in range(8)}, flush_interval=3)
    record(tmp_path, "run", {step: {metric: 100.0 + step} for step in range(5, 10)}, flush_interval=3)
    steps, values = read_scalars(tmp_path / "run")[metric]
    assert steps.tolist() == list(range(10))
    assert values.tolist() == [0, 1, 2, 3, 4, 105, 106, 107, 108, 109]


def test_run_that_went_back_to_a_checkpoint_ends_where_the_last_attempt_did(tmp_path: Path):
    """It went from step 7 back to the checkpoint of step 3, and then from 5 to 4. What step 3 had logged stays."""

    def steps(first: int, last: int, value: float) -> dict[int, dict[str, float]]:
        often = {step: {"time/batch": step, "loss/train/total": value} for step in range(first, last)}
        return {**often, last: {"metrics/eval/LanguageCrossEntropy": value}}

    record(tmp_path, "run", {**steps(0, 3, 1), 3: {"gate/a": 1}})
    record(tmp_path, "run", steps(3, 7, 2))
    record(tmp_path, "run", steps(3, 5, 3))
    record(tmp_path, "run", steps(4, 5, 4))
    read = {
        metric: dict(zip(*map(np.ndarray.tolist, points), strict=True))
        for metric, points in read_scalars(tmp_path).items()
    }
    assert read == {
        "time/batch": {step: step for step in range(5)},
        "loss/train/total": {0: 1, 1: 1, 2: 1, 3: 3, 4: 4},
        "metrics/eval/LanguageCrossEntropy": {5: 4},
        "gate/a": {3: 1},
    }


def test_no_point_of_a_long_run_is_dropped(tmp_path: Path):
    """TensorBoard by default keeps a sample of 10,000 points."""
    logged = record(tmp_path, "run", {step: {"loss/train/total": step / 7} for step in range(10_050)}, 20_000)
    assert_holds(read_scalars(tmp_path), logged)


def test_run_that_was_killed_while_writing_is_read_up_to_there(tmp_path: Path):
    logged = record(tmp_path, "run", pretraining(gated=True))
    (file,) = (tmp_path / "run").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    steps, values = read_scalars(tmp_path)["loss/train/total"]
    assert 2 < len(steps) < len(logged["loss/train/total"])
    np.testing.assert_array_equal(values, np.float32(list(logged["loss/train/total"].values())[: len(steps)]))


def test_runs_are_named_after_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = record(tmp_path / "logs", "small_init", pretraining(gated=False))
    wesar = record(tmp_path / "logs", "wesar", pretraining(gated=True))
    runs = read_runs(tmp_path / "logs")
    assert list(runs) == ["small_init", "wesar"]
    assert_holds(runs["small_init"], small)
    assert_holds(runs["wesar"], wesar)
    monkeypatch.chdir(tmp_path / "logs" / "wesar")
    assert list(read_runs(".")) == ["wesar"]
    with pytest.raises(ValueError, match="several runs, name one of small_init, wesar"):
        read_scalars(tmp_path / "logs")


def test_load_runs_keeps_the_order_and_takes_labels(tmp_path: Path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        record(tmp_path, name, {0: {"loss/train/total": value}})
    paths = [tmp_path / "b", tmp_path / "a"]
    assert list(load_runs(paths)) == ["b", "a"]
    labelled = load_runs(paths, ["WeSaR", "Small init"])
    assert {name: run["loss/train/total"][1].item() for name, run in labelled.items()} == {"WeSaR": 2, "Small init": 1}
    assert list(load_runs([tmp_path], ["x", "y"])) == ["x", "y"]
    with pytest.raises(ValueError, match="1 labels for 2 runs: b, a"):
        load_runs(paths, ["WeSaR"])
    with pytest.raises(ValueError, match=r"2 runs are called 'a': give every run its own --label"):
        load_runs([tmp_path / "a", tmp_path / "a"])


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.xz"])
def test_csv_gives_back_the_same_bits(tmp_path: Path, name: str):
    rng = np.random.default_rng(0)
    # Finite float32 values of all exponents, and the values that a diverged run logs.
    values = rng.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    values[:3] = np.nan, np.inf, -np.inf
    steps = np.sort(rng.choice(10**7, 4000, replace=False))
    runs = {
        'a, "quoted" run': {"loss/train/total": (steps, values)},
        "b": {"gate/model.lm_head": (steps[:1], values[5:6])},
    }
    write_csv(tmp_path / name, runs)
    read = read_runs(tmp_path / name)
    assert read.keys() == runs.keys()
    for run, metrics in runs.items():
        for metric, (expected_steps, expected_values) in metrics.items():
            np.testing.assert_array_equal(read[run][metric][0], expected_steps)
            np.testing.assert_array_equal(read[run][metric][1], expected_values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line must be run,metric,step,value"),
        (b"step,value\n0,1.0\n", "the first line must be run,metric,step,value"),
        (HEADER, "no rows below the header"),
        (HEADER + b"a,loss/train/total,0,1.5\na,loss/train/total,one,1.5\n", "line 3"),
        (HEADER + b"a,loss/train/total,0\n", "line 2"),
        (HEADER + b"a,loss/train/total,12345678901234567890,1.5\n", r"line 2: .* below 2\*\*63 as step"),
        (HEADER + b"\xff,loss/train/total,0,1.5\n", r"damaged \(.*byte 0xff"),
        (HEADER + b"a" * 200_000, r"damaged \(field larger"),
    ],
)
def test_csv_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "curves.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"curves.csv.*{message}"):
        read_runs(tmp_path / "curves.csv")


@pytest.mark.parametrize("content", [HEADER, lzma.compress(HEADER)[:-20], b""])
def test_compressed_csv_that_is_not_xz_or_cut_off_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "curves.csv.xz").write_bytes(content)
    with pytest.raises(ValueError, match=r"curves.csv.xz: damaged \("):
        read_runs(tmp_path / "curves.csv.xz")


def test_paths_without_logs_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder or file"):
        read_runs(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no TensorBoard event files .*log_dir>/<run_name>"):
        read_runs(tmp_path)
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ValueError, match=r"run\.yaml: neither a TensorBoard folder nor a \.csv or \.csv\.xz file"):
        read_runs(tmp_path / "run.yaml")
    (tmp_path / "events.out.tfevents.1.host").touch()
    with pytest.raises(ValueError, match="no metrics in its 1 TensorBoard event files"):
        read_runs(tmp_path)


def test_curves_know_their_matrix():
    """Curves are sorted by role, then by block as a number.

    A vector gate has its mean, other matrices their own name.
    """
    one = (np.array([0]), np.float32([1]))
    keys = (
        "gate/model.lm_head",
        "gate/model.transformer.blocks.10.ffn.down_proj",
        "gate/model.transformer.blocks.2.ffn.down_proj",
        "gate/model.transformer.blocks.2.attn.Wq/mean",
        "gate/model.transformer.blocks.2.attn.Wq/min",
        "gate/model.transformer.blocks.2.attn.Wq/max",
        "gate/model.transformer.wpe",
        "gate/model.transformer.wte",
        "gate/model.layers.3.self_attn.o_proj",
        "gate/model.adapter",
        "update_ratio/model.lm_head",
    )
    found = find_curves("run", dict.fromkeys(keys, one), "gate")
    assert [(curve.role, curve.block, curve.metric) for curve in found] == [
        ("W_e", None, "gate/model.transformer.wte"),
        ("W_pos", None, "gate/model.transformer.wpe"),
        ("W_q", 2, "gate/model.transformer.blocks.2.attn.Wq/mean"),
        ("W_o", 3, "gate/model.layers.3.self_attn.o_proj"),
        ("W_d", 2, "gate/model.transformer.blocks.2.ffn.down_proj"),
        ("W_d", 10, "gate/model.transformer.blocks.10.ffn.down_proj"),
        ("W_p", None, "gate/model.lm_head"),
        ("adapter", None, "gate/model.adapter"),
    ]


def test_median_quotient_by_hand():
    """The quotients are 4, 2 and 8 at the steps that both have logged. 0/0, x/0 and NaN do not count."""

    def series(points: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        return np.array(list(points)), np.float32(list(points.values()))

    path = "update_ratio/model.transformer.blocks"
    run = {
        f"{path}.0.ffn.down_proj": series({0: 4, 10: 2, 20: 0, 30: 5, 40: np.nan, 50: 1000}),
        f"{path}.0.ffn.up_proj": series({0: 1, 10: 1, 20: 0, 30: 0, 40: 1}),
        f"{path}.1.ffn.down_proj": series({0: 24}),
        f"{path}.1.ffn.up_proj": series({0: 3}),
        f"{path}.2.ffn.down_proj": series({0: 1000}),
    }
    assert median_update_ratio_quotient(run) == 4
    assert math.isnan(median_update_ratio_quotient({f"{path}.2.ffn.down_proj": series({0: 1000})}))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "new folder" / "curves.csv"
    with replacing(target) as partial:
        partial.write_text("old")
    with pytest.raises(KeyError), replacing(target) as partial:
        partial.write_text("half of the n")
        raise KeyError
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_of_two_runs_in_a_folder_the_newest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The older run was longer, and resumed once. The newer one evaluates before its first step, and is resumed too."""

    def steps(first: int, last: int, value: float) -> dict[int, dict[str, float]]:
        return {step: {"time/batch": step, "loss/train/total": value} for step in range(first, last)}

    record(tmp_path, "run", steps(0, 8, 1))
    record(tmp_path, "run", steps(6, 12, 2))
    assert len(read_scalars(tmp_path)["loss/train/total"][0]) == 12 and not caplog.messages
    record(tmp_path, "run", {0: {"metrics/eval/LanguageCrossEntropy": 3}})
    record(tmp_path, "run", steps(0, 5, 3))
    record(tmp_path, "run", steps(4, 7, 4))
    read = read_scalars(tmp_path)
    assert read["loss/train/total"][1].tolist() == [3, 3, 3, 3, 4, 4, 4]
    assert read["metrics/eval/LanguageCrossEntropy"][1].tolist() == [3]
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'run'}: 2 runs that began at step 0; only the newest is read, which began at"
    )


def test_what_is_cut_from_a_damaged_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One flipped bit anywhere in a record, or a cut, leaves the steps before it and names the last of them."""
    metric = "loss/train/total"
    record(tmp_path, "run", {step: {metric: float(step)} for step in range(6)})
    (file,) = (tmp_path / "run").iterdir()
    content = file.read_bytes()
    ends = list(itertools.accumulate(len(data) + 16 for data in RawEventFileLoader(str(file)).Load()))
    assert ends[-1] == len(content)
    for step in (0, 3):
        start, end = ends[step], ends[step + 1]  # the first record has the version of the file
        for offset in range(end - start):
            damaged = bytearray(content)
            damaged[start + offset] ^= 64
            caplog.clear()
            file.write_bytes(damaged)
            if step == 0:
                with pytest.raises(ValueError, match="no metrics in its 1 TensorBoard event files"):
                    read_scalars(tmp_path)
            else:
                assert read_scalars(tmp_path)[metric][1].tolist() == [0, 1, 2]
            (message,) = caplog.messages
            after = "after step 2" if step else "before any metric"
            assert f"{file}: damaged {after}, at byte {start} of {len(content)}" in message
            caplog.clear()
            file.write_bytes(content[: start + offset])
            with pytest.raises(ValueError) if step == 0 else nullcontext():
                read_scalars(tmp_path)
            assert len(caplog.messages) == (offset > 0)
            assert all(f"{file}: ends within a record, {after}" in message for message in caplog.messages)
