import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tests.leaks  # noqa: F401

# These start first, so that no process of `pytest -n` runs a long file alone at the end.
LONGEST = ["trained", *(f"tests/{name}.py" for name in ("runs/test_compare", "test_training", "test_step"))]
LONGEST += ["tests/test_quickstart.py", "tests/test_results.py"]


def group(test: str) -> str:
    """Return the file of a test, or one name for all files with tests of the models of `trained` and `sharded`."""
    file = test.partition("::")[0]
    trained = ("tests/export/", "tests/callbacks/test_merged_hf_checkpointer", "tests/test_evaluate")
    return "trained" if file.startswith(trained) else file


def pytest_configure(config: pytest.Config) -> None:
    """Keep the processes of `pytest -n` from using the same names of shared memory.

    streaming takes the first free number for a name, so two trainers that start at the same moment can take the same
    one. It skips numbers that have a lock file in the temporary folder, so this makes lock files for the numbers of the
    other processes.
    """
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is None:
        return
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name
    for number in range(1000):
        if number % int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) != int(worker.removeprefix("gw")):
            Path(folder.name, f"{number:06}_barrier_filelock").touch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = [group(item.nodeid) for item in items]
    order = LONGEST + [name for name in dict.fromkeys(groups) if name not in LONGEST]
    items.sort(key=lambda item: order.index(group(item.nodeid)))


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Keep bytes out of a test's name: gzip's hold the time, and `pytest -n` needs equal names in all processes."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group of tests to one process of `pytest -n`, so that shared fixtures are made only once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


def write_split(folder: Path, sequences: np.ndarray) -> None:
    """Write token shards for foundry's text loader, one sequence a row."""
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:int32"}) as writer:
        for sequence in sequences:
            writer.write({"tokens": sequence})


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write in small what `llmfoundry-wesar data` writes: 97 tokens, 64 training and 8 validation sequences of 16.

    Each sequence counts up from a random token, so that a model can learn it.
    """
    folder = tmp_path_factory.mktemp("dataset")
    vocabulary = {f"t{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    starts = np.random.default_rng(0).integers(0, 96, size=72)
    sequences = ((starts[:, None] + np.arange(16)) % 96).astype(np.int32)
    write_split(folder / "train", sequences[:64])
    write_split(folder / "val", sequences[64:])
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenize real text with `llmfoundry-wesar data`."""
    from tests.trained import prepare_text

    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def trained(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Train every case of `tests.trained`: by name a checkpoint, merged models, and the logits of the model."""
    from tests.trained import train_cases

    return train_cases(text_data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def sharded(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Train some cases of `tests.trained` on two FSDP2 processes, with sharded checkpoints and merged models."""
    from tests.distributed import launch
    from tests.trained import train_sharded

    return launch(train_sharded, text_data, tmp_path_factory.mktemp("sharded"))[0]
