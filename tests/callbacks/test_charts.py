"""How the monitors' metrics are arranged in real loggers."""

from pathlib import Path

import pytest
import torch
import wandb
from composer import Callback, Logger, State
from composer.loggers import TensorboardLogger, WandBLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from llmfoundry_wesar.callbacks import GateMonitor, UpdateRatioMonitor
from tests.callbacks.training import Metrics, regression, train


class Summary(Callback):
    """Keeps the keys of the summary of the run in wandb."""

    def fit_end(self, state: State, logger: Logger) -> None:
        assert wandb.run is not None
        self.keys = list(dict(wandb.run.summary))


def test_each_logger_gets_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard has one layout, whose curves and bands are logged. The summary of wandb has roles but no matrices."""
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    own = Metrics()
    loggers = [TensorboardLogger(str(tmp_path), flush_interval=1), WandBLogger(project="p"), own]
    summary = Summary()
    callbacks = [UpdateRatioMonitor("2ba"), GateMonitor("2ba"), summary]
    model = regression()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks, loggers=loggers, run_name="run")

    summary = {key.split("/")[0] for key in summary.keys}
    assert {"role_update_ratio", "role_gate", "loss"} <= summary
    assert not summary & {"update_ratio", "gate"}

    files = [EventAccumulator(str(file)).Reload() for file in (tmp_path / "run").glob("*tfevents*")]
    tags = {tag for file in files for tag in file.Tags()["scalars"]}
    assert tags == {key for key in own.metrics if "/" in key}
    [event] = [
        event
        for file in files
        if metadata.CONFIG_SUMMARY_TAG in file.Tags()["tensors"]
        for event in file.Tensors(metadata.CONFIG_SUMMARY_TAG)
    ]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    ratios, gates, loss = (chart for category in layout.category for chart in category.chart)
    for chart, quantity, count in ((ratios, "update_ratio", 7), (gates, "gate", 4)):
        shown = {tag for band in chart.margin.series for tag in (band.value, band.lower, band.upper)}
        assert shown == {tag for tag in tags if tag.startswith(f"role_{quantity}/")}
        assert len(chart.margin.series) == count
    assert any(tag.startswith(loss.multiline.tag[0]) for tag in tags)
