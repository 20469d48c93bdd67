"""Find out how far a run came whose end nobody saw, because `compare` or the trainer was killed."""

import shutil
from pathlib import Path

import numpy as np
from composer.core import Time, TimeUnit

from llmfoundry_wesar.export.checkpoints import read_timestamp
from llmfoundry_wesar.runs.scalars import Scalars


def is_complete(scalars: Scalars, held_out: str, max_duration: str | int) -> bool:
    """Return whether a run was trained to its end and evaluated there, by its log.

    Composer logs `time/batch` and the other times once more after the last checkpoint, and evaluates after that.

    Args:
        scalars: As from `read_scalars`.
        held_out: Metric key of the held-out loss.
        max_duration: As in the training YAML.
    """
    duration = Time.from_input(max_duration, TimeUnit.EPOCH)
    time = f"time/{duration.unit.name.lower()}"
    if not {held_out, time, "time/batch"} <= scalars.keys():
        return False
    # TensorBoard keeps float32 values.
    trained = scalars[time][1][-1] >= np.float32(duration.value)
    return bool(trained and scalars[held_out][0][-1] == scalars["time/batch"][0][-1])


def discard_end(save_folder: Path, max_duration: str | int) -> None:
    """Remove a checkpoint of the end of training, from which Composer refuses to continue.

    Use this if the run was killed before it was evaluated. It continues from the checkpoint before, if there is one,
    else from the beginning.

    Args:
        save_folder: The folder of the run's checkpoints.
        max_duration: As in the training YAML.

    Raises:
        ValueError: As in `read_timestamp`.
    """
    duration = Time.from_input(max_duration, TimeUnit.EPOCH)
    for link in (save_folder / "latest-rank0.pt", save_folder / "latest-sharded-rank0"):
        if not link.exists() or read_timestamp(link)[duration.unit.name.lower()] < duration.value:
            continue
        last = link.resolve()
        siblings = last.parent.glob("*.pt" if last.is_file() else "*/.metadata")
        checkpoints = {path if last.is_file() else path.parent for path in siblings if not path.is_symlink()}
        earlier = sorted(checkpoints - {last}, key=lambda path: path.stat().st_mtime)
        link.unlink()
        if earlier:
            link.symlink_to(earlier[-1].relative_to(save_folder.resolve()))
        shutil.rmtree(last) if last.is_dir() else last.unlink()
