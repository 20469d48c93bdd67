"""Log runs with Composer's own TensorBoard logger, for the tests of the code that reads logs."""

import math
from collections.abc import Mapping
from pathlib import Path

from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import Logger, TensorboardLogger
from torch import nn

TOKENS_PER_STEP = 4096
MATRICES = ("attn.Wq", "attn.Wk", "attn.Wv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj")


def record(
    log_dir: Path, run: str, steps: Mapping[int, Mapping[str, float]], flush_interval: int = 100
) -> dict[str, dict[int, float]]:
    """Log metrics at steps as the trainer does, and return metric → step → value."""
    state = State(model=nn.Linear(1, 1), rank_zero_seed=0, run_name=run, device=DeviceCPU())
    tensorboard = TensorboardLogger(log_dir=str(log_dir), flush_interval=flush_interval)
    logger = Logger(state, destinations=[tensorboard])
    tensorboard.init(state, logger)
    logged: dict[str, dict[int, float]] = {}
    for step, metrics in steps.items():
        state.timestamp = state.timestamp.copy(batch=step)
        logger.log_metrics(dict(metrics))
        state.timestamp = state.timestamp.copy(batch=step + 1)
        tensorboard.batch_end(state, logger)
        for metric, value in metrics.items():
            logged.setdefault(metric, {})[step] = value
    tensorboard.close(state, logger)
    return logged


def pretraining(
    gated: bool, blocks: int = 3, steps: int = 12, interval: int = 3, glu: bool = False
) -> dict[int, dict[str, float]]:
    """Return the metrics of a run, plain as under Small init or gated. All values differ from each other."""
    logged: dict[int, dict[str, float]] = {}
    for step in range(steps):
        loss = 4.0 + 5.0 * math.exp(-step / 4) + 0.01 * math.sin(9 * step)
        metrics = {"loss/train/total": loss, "time/token": float(step * TOKENS_PER_STEP), "time/batch": float(step)}
        if gated:
            metrics |= {"loss/train/loss": loss - 0.5, "loss/train/z_loss": 0.5}
            if step % interval == 0:
                metrics["metrics/eval/LanguageCrossEntropy"] = loss - 0.4
        if step % interval == 0:
            modules = [
                (f"model.transformer.blocks.{block}.{matrix}", 1 + block / 7 + place / 61)
                for block in range(blocks)
                for place, matrix in enumerate(MATRICES + (("ffn.gate_proj",) if glu else ()))
            ]
            for module, size in [("model.transformer.wte", 0.9), *modules, ("model.lm_head", 0.95)]:
                small = not gated and module.endswith(("out_proj", "down_proj"))
                metrics[f"update_ratio/{module}"] = 1e-3 * size * (4 if small else 1) / (1 + step)
                metrics[f"weight_norm/{module}"] = (1.6 if gated else 4.0 if small else 14.0) * size * (1 + step / 50)
                metrics[f"grad_norm/{module}"] = 0.05 * size / (1 + step / 3)
                if gated:
                    metrics[f"gate/{module}"] = 158.0 if module.endswith("wte") else 5.6 * size + 0.01 * step
                    metrics[f"virtual_weight_norm/{module}"] = 9.0 * size * (1 + step / 40)
        logged[step] = metrics
    return logged
