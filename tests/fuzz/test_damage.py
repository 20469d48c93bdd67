"""A run folder or a checkpoint with random damage gives the right result, or an error: never another result."""

import logging
import logging.handlers
import queue
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file

from llmfoundry_wesar.export.conversion import merge
from llmfoundry_wesar.export.files import _save_composer, load
from llmfoundry_wesar.model import ComposerWeSaRMPTCausalLM, WeSaRMPTForCausalLM
from llmfoundry_wesar.runs.scalars import read_scalars
from tests.fuzz.profile import examples
from tests.logged_runs import record
from tests.tiny import model_config

PLACE = st.floats(0, 1, exclude_max=True)
FLIP = st.none() | st.integers(0, 7)


def damage(file: Path, place: float, flip: int | None) -> None:
    """Cut a file off at a place, or flip a bit there."""
    data = file.read_bytes()
    at = int(place * len(data))
    file.write_bytes(data[:at] if flip is None else data[:at] + bytes([data[at] ^ 1 << flip]) + data[at + 1 :])


def record_ends(data: bytes) -> set[int]:
    """Return the places between two records of an event file. A file that is cut there looks whole."""
    ends = {0}
    while (end := max(ends)) < len(data):
        ends.add(end + 16 + int.from_bytes(data[end : end + 8], "little"))
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run's event file, a gated checkpoint, and the folder of a plain model."""
    folder = tmp_path_factory.mktemp("whole")
    record(folder / "runs", "run", {step: {"loss": 4 - step / 7, "time/batch": float(step)} for step in range(8)})
    section = OmegaConf.create(model_config("wesar", d_model=8, n_heads=2, n_layers=1, vocab_size=16, max_seq_len=8))
    model = ComposerWeSaRMPTCausalLM(**OmegaConf.to_container(section)).model  # type: ignore[arg-type]
    assert isinstance(model, WeSaRMPTForCausalLM)
    _save_composer(model, None, folder / "checkpoint.pt")
    (folder / "plain").mkdir()
    plain = merge(model)
    plain.config.save_pretrained(folder / "plain")
    save_file(
        {name: weight.contiguous() for name, weight in plain.state_dict().items()}, folder / "plain/model.safetensors"
    )
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load(path)[0].state_dict()


@examples(40)
@given(place=PLACE, flip=FLIP)
def test_event_files_lose_points_only_with_a_warning(
    place: float, flip: int | None, folder: Path, tmp_path: Path
) -> None:
    whole = read_scalars(folder / "runs")
    copy = shutil.copytree(folder / "runs", tmp_path / "runs", dirs_exist_ok=True)
    file = next(copy.rglob("*tfevents*"))
    assume(flip is not None or int(place * file.stat().st_size) not in record_ends(file.read_bytes()))
    damage(file, place, flip)
    said: queue.SimpleQueue = queue.SimpleQueue()
    handler, logger = logging.handlers.QueueHandler(said), logging.getLogger("llmfoundry_wesar")
    logger.addHandler(handler)
    try:
        read = read_scalars(copy)
    except ValueError:
        return
    finally:
        logger.removeHandler(handler)
    right = {(key, step, value) for key, points in whole.items() for step, value in zip(*points, strict=True)}
    found = {(key, step, value) for key, points in read.items() for step, value in zip(*points, strict=True)}
    assert found <= right
    assert found == right or not said.empty()


@examples(40)
@given(place=PLACE, flip=FLIP)
@example(place=0.6056631238813739, flip=0)  # a name in the archive that is not UTF-8
def test_checkpoints_give_the_same_weights_or_an_error(
    place: float, flip: int | None, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoint.pt"
    shutil.copy(folder / "checkpoint.pt", copy)
    damage(copy, place, flip)
    try:
        read = weights(copy)
    except (ValueError, FileNotFoundError) as error:
        assert str(copy) in str(error) and "\n" not in str(error)
        return
    torch.testing.assert_close(read, weights(folder / "checkpoint.pt"), rtol=0, atol=0)


@examples(20)
@given(place=PLACE, file=st.sampled_from(["model.safetensors", "config.json"]), swap=st.booleans())
def test_model_folders_give_the_same_weights_or_an_error(
    place: float, file: str, swap: bool, folder: Path, tmp_path: Path
) -> None:
    """Cut files, and weights of another model. Neither file has a checksum, so nothing can tell a flipped bit."""
    copy = shutil.copytree(folder / "plain", tmp_path / "plain", dirs_exist_ok=True)
    if swap:
        save_file({"transformer.wte.weight": torch.zeros(2, 2)}, copy / "model.safetensors")
    else:
        damage(copy / file, place, None)
    try:
        read = weights(copy)
    except (ValueError, FileNotFoundError) as error:
        assert str(copy) in str(error) and "\n" not in str(error)
        return
    torch.testing.assert_close(read, weights(folder / "plain"), rtol=0, atol=0)  # only the line end was cut off
