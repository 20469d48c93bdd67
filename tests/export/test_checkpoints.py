"""What is read from a checkpoint and what is refused. No code in a checkpoint is run."""

import os
import pickle
import shutil
import zipfile
from enum import Enum
from pathlib import Path

import pytest
import torch
from composer.core import Time, Timestamp
from llmfoundry.callbacks.curriculum_learning_callback import CurriculumLearningState
from llmfoundry.callbacks.dataset_swap_callback import DatasetSwapStateDict

from llmfoundry_wesar.export.checkpoints import Progress, find_checkpoint, read_checkpoint, read_timestamp
from llmfoundry_wesar.export.files import load
from llmfoundry_wesar.runs.leftovers import discard_end
from tests.trained import LENGTH, SHARDED, VOCABULARY, assert_same_logits, logits


@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_checkpoint_is_the_model_that_was_trained(case, sharded):
    """Two FSDP2 processes wrote it, and one process without torch.distributed reads it.

    1e-5, because the two processes multiply matrices gathered from shards, with sums in another order.
    """
    model, tokenizer = load(sharded[case].folder)
    assert read_checkpoint(sharded[case].folder).progress == Progress("tiny", 4, 4 * 8 * LENGTH)
    assert len(tokenizer) == VOCABULARY
    assert_same_logits(logits(model, sharded[case].ids), sharded[case].logits, 1e-5)


def test_a_whole_checkpoint_is_the_model_that_was_trained(trained):
    """The parameters are equal to the bit."""
    checkpoint = read_checkpoint(trained["wesar"].folder)
    assert checkpoint.config["fc_type"]["name"] == "wesar"
    assert checkpoint.progress == Progress("tiny", 4, 4 * 8 * LENGTH)
    assert len(checkpoint.tokenizer) == VOCABULARY
    model, _ = load(trained["wesar"].folder)
    assert torch.equal(logits(model, trained["wesar"].ids), trained["wesar"].logits)


def test_the_states_of_composers_and_foundrys_callbacks_are_read(trained, tmp_path):
    """All of foundry's that are more than numbers and names, and Composer's times."""
    state = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    schedule = [{"duration": Time(3, "tok"), "dataset": {"local": "x"}}]
    state["state"]["callbacks"] = {
        "CurriculumLearning": {"state": CurriculumLearningState(schedule, 1)},
        "DatasetSwap": {"callback_state": DatasetSwapStateDict(0, schedule)},
        "Timed": {"last": Timestamp(batch=3), "share": Time(0.5, "dur")},
    }
    torch.save(state, tmp_path / "latest.pt")
    assert read_checkpoint(tmp_path / "latest.pt").progress.batches == 4


class _Attribute:
    def __reduce__(self):
        return getattr, (torch.Size, "numel")


def test_enums_are_read_as_python_3_11_2_writes_them(trained, sharded, tmp_path, monkeypatch):
    """Debian 12 has this Python. It pickles a member of an enum as `getattr(enum, name)`. Other uses are refused."""
    state = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    state["state"]["callbacks"] = {"Timed": {"last": Time(3, "tok")}}
    folder = shutil.copytree(sharded["wesar"].folder / "ep0-ba4", tmp_path / "sharded")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda member, protocol: (getattr, (type(member), member.name)))
    torch.save(state, tmp_path / "whole.pt")
    (folder / ".metadata").write_bytes(pickled := pickle.dumps(metadata))
    assert b"getattr" in pickled
    for path in (tmp_path / "whole.pt", folder):
        assert read_checkpoint(path).progress.batches == 4
    (folder / ".metadata").write_bytes(pickle.dumps(_Attribute()))
    with pytest.raises(ValueError, match=r"builtins\.getattr could run code"):
        read_checkpoint(folder)
    torch.save({"state": {"model": _Attribute()}}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt: not a checkpoint"):
        read_checkpoint(tmp_path / "hostile.pt")


def test_a_folder_means_its_latest_checkpoint(trained, sharded, tmp_path):
    whole, folder = trained["wesar"].folder, sharded["wesar"].folder
    assert find_checkpoint(whole).name == "ep0-ba4-rank0.pt"
    assert find_checkpoint(folder).name == "ep0-ba4"
    assert find_checkpoint(folder / "ep0-ba2") == folder / "ep0-ba2"
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_checkpoint(tmp_path / "none")
    for name in ("a.pt", "ep0-ba9-rank0.pt", "ep0-ba10-rank0.pt"):
        shutil.copy(find_checkpoint(whole), tmp_path / name)
    with pytest.raises(
        ValueError, match=r"3 checkpoints and no link to the latest; name one, such as .*ba10-rank0\.pt"
    ):
        find_checkpoint(tmp_path)
    for name in ("ep0-ba9-rank0.pt", "ep0-ba10-rank0.pt"):
        (tmp_path / name).unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "a.pt"
    (tmp_path / "latest-rank0.pt").symlink_to("a.pt")
    assert find_checkpoint(tmp_path) == tmp_path / "a.pt"
    (tmp_path / "latest-sharded-rank0").symlink_to(folder / "ep0-ba4")
    with pytest.raises(ValueError, match=rf"links to two latest checkpoints, .*a\.pt and {folder}/ep0-ba4; name one"):
        find_checkpoint(tmp_path)


def test_the_end_of_a_sharded_run_can_be_discarded(sharded, tmp_path):
    """`latest` then means the checkpoint before. `tests/runs/test_compare.py` continues from a whole one."""
    folder = shutil.copytree(sharded["wesar"].folder, tmp_path / "run", symlinks=True)
    for _ in range(2):
        assert read_timestamp(folder)["token"] in (4 * 8 * LENGTH, 2 * 8 * LENGTH)
        discard_end(folder, f"{4 * 8 * LENGTH}tok")
        assert find_checkpoint(folder).name == "ep0-ba2" and not (folder / "ep0-ba4").exists()


class _Code:
    """Code in a hostile checkpoint: unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_whole_checkpoint_is_refused_by_name(tmp_path):
    torch.save({"state": {"model": _Code(tmp_path / "ran")}}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"refused, because loading (posix|nt)\.mkdir could run code"):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
def test_code_in_a_sharded_checkpoint_is_refused(part, sharded, tmp_path):
    """Once in the metadata, and once in a value that is stored beside the tensors."""
    folder = shutil.copytree(sharded["wesar"].folder / "ep0-ba4", tmp_path / "hostile")
    if part == ".metadata":
        (folder / part).write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index = next(i for i in metadata.storage_data if i.fqn.startswith("state.integrations"))
        info = metadata.storage_data[index]
        info.offset = (folder / info.relative_path).stat().st_size
        with open(folder / info.relative_path, "ab") as file:
            torch.save(_Code(tmp_path / "ran"), file)
        info.length = (folder / info.relative_path).stat().st_size - info.offset
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"(posix|nt)\.mkdir|Unsupported global|Weights only load failed"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_file_outside_its_folder_is_refused(trained, tmp_path):
    checkpoint = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    tokenizer = checkpoint["state"]["integrations"]["huggingface"]["tokenizer"]
    tokenizer[f"../{tmp_path.name}.txt"] = {"file_extension": ".txt", "content": ["text"]}
    torch.save(checkpoint, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"its tokenizer has a file outside of its folder"):
        read_checkpoint(tmp_path / "hostile.pt")


def test_a_tokenizer_with_code_is_refused_and_its_code_is_not_run(trained, tmp_path):
    checkpoint = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    tokenizer = checkpoint["state"]["integrations"]["huggingface"]["tokenizer"]
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    tokenizer["tokenizer_config.json"]["content"] |= own
    tokenizer["own.py"] = {"file_extension": ".py", "content": [f"open({str(tmp_path / 'ran')!r}, 'w')"]}
    torch.save(checkpoint, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt: its tokenizer cannot be loaded \("):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_named(trained, tmp_path):
    checkpoint = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    del checkpoint["state"]["integrations"]["huggingface"]["tokenizer"]["tokenizer.json"]["content"]["model"]
    torch.save(checkpoint, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=r"damaged\.pt: its tokenizer cannot be loaded \("):
        read_checkpoint(tmp_path / "damaged.pt")


def _flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_whole_checkpoint_is_refused(trained, tmp_path):
    """A file that is cut short, one with a flipped bit in a weight, and one of another kind."""
    path = shutil.copy(find_checkpoint(trained["wesar"].folder), tmp_path / "damaged.pt")
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda info: info.file_size)
    _flip(path, tensor.header_offset + 200 + tensor.file_size // 2)
    with pytest.raises(ValueError, match=rf"damaged \({tensor.filename} has a wrong checksum"):
        read_checkpoint(path)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(ValueError, match="not a checkpoint, or cut short"):
        read_checkpoint(path)
    path.write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="not a checkpoint, or cut short"):
        read_checkpoint(path)


_NO_TENSOR = {"model": {"a": 1}, "integrations": {"huggingface": {"model": {"config": {"content": {}}}}}}


@pytest.mark.parametrize("content", [{"model": {}}, {"state": {"model": {}}}, {"state": _NO_TENSOR}, [torch.zeros(1)]])
def test_a_foreign_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not a Composer checkpoint of a Hugging Face model"):
        read_checkpoint(tmp_path / "foreign.pt")


@pytest.fixture
def copied(sharded, tmp_path) -> Path:
    return shutil.copytree(sharded["wesar"].folder / "ep0-ba4", tmp_path / "copied")


def test_a_damaged_sharded_checkpoint_is_refused(copied):
    """One flipped bit in a weight, and metadata that is cut short."""
    storage = pickle.loads((copied / ".metadata").read_bytes()).storage_data
    part = next(info for index, info in storage.items() if index.fqn == "state.model.model.transformer.wte.weight")
    _flip(copied / part.relative_path, part.offset + part.length // 2)
    with pytest.raises(ValueError, match=rf"{part.relative_path}: damaged \(archive/data/0 has a wrong checksum"):
        read_checkpoint(copied)
    os.truncate(copied / ".metadata", 1000)
    with pytest.raises(ValueError, match=r"\.metadata: refused or damaged"):
        read_checkpoint(copied)


def test_a_sharded_checkpoint_without_one_of_its_parts_is_refused(copied):
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp: a part of this checkpoint is missing"):
        read_checkpoint(copied)
