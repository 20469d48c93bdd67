"""Arrange metrics in the loggers that can: in TensorBoard's tab Custom Scalars, and in wandb's summary."""

from collections.abc import Iterable, Mapping
from typing import Any

from composer.loggers import Logger, TensorboardLogger, WandBLogger
from composer.utils import dist
from google.protobuf.json_format import ParseDict
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard.summary import custom_scalars


def add_charts(logger: Logger, roles: Mapping[str, Iterable[str]]) -> None:
    """Add charts to a run in TensorBoard, under the tab Custom Scalars. Other loggers stay as they are.

    There is a chart of each quantity, with a curve and a band for each role, and one of the terms of the loss. Charts
    can be added only once to a run.

    Args:
        logger: The trainer's logger.
        roles: Quantity → names of the roles that are logged.
    """
    for destination in logger.destinations if dist.get_global_rank() == 0 else ():
        if isinstance(destination, TensorboardLogger) and destination.writer is not None:
            # `SummaryWriter.add_custom_scalars` takes only one band for each chart, so its layout is replaced here.
            summary: Any = custom_scalars({})
            summary.value[0].tensor.string_val[:] = [_layout(roles)]
            destination.writer._get_file_writer().add_summary(summary)


def leave_out_of_summary(logger: Logger, keys: Iterable[str]) -> None:
    """Leave metrics out of the summary of a run in wandb. Call this before they are logged."""
    for destination in logger.destinations if dist.get_global_rank() == 0 else ():
        if isinstance(destination, WandBLogger):
            import wandb

            # Not by a pattern: wandb takes a dot for nesting unless it is escaped, and forgets that for a pattern.
            for key in keys:
                wandb.define_metric(key.replace(".", r"\."), summary="none")


def _layout(roles: Mapping[str, Iterable[str]]) -> bytes:
    """Return the layout of the Custom Scalars tab as its serialised protocol buffer."""
    categories = []
    for quantity, names in roles.items():
        title, keys = quantity.replace("_", " "), [f"role_{quantity}/{name}" for name in names]
        bands = [{"value": f"{key}/median", "lower": f"{key}/min", "upper": f"{key}/max"} for key in keys]
        chart = {"title": title, "margin": {"series": bands}}
        categories.append({"title": f"{title} of each role: median and range of the blocks", "chart": [chart]})
    loss = {"title": "loss", "multiline": {"tag": ["loss/train/"]}}
    categories.append({"title": "terms of the loss", "chart": [loss]})
    # Each chart is a category of its own, because TensorBoard changes the order of the charts of one category.
    layout: Any = layout_pb2.Layout()
    return ParseDict({"category": categories}, layout).SerializeToString()
