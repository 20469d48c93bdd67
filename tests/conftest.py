from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llmfoundry-wesar data` writes, in small: 97 tokens, 64 training and 8 validation sequences of 16.

    Each sequence counts up from a random token, so that there is something to learn.
    """
    folder = tmp_path_factory.mktemp("dataset")
    vocabulary = {f"t{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    starts = np.random.default_rng(0).integers(0, 96, size=72)
    for split, rows in {"train": starts[:64], "val": starts[64:]}.items():
        with MDSWriter(out=str(folder / split), columns={"tokens": "ndarray:int32"}) as writer:
            for start in rows:
                writer.write({"tokens": ((start + np.arange(16)) % 96).astype(np.int32)})
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text as tokens, by the project's own tool."""
    from tests.trained import prepare_text

    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def trained(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every case of `tests.trained`, by name: a checkpoint, merged models, and what its model computes."""
    from tests.trained import train_cases

    return train_cases(text_data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def sharded(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Some cases of `tests.trained` by two FSDP2 processes, with sharded checkpoints and merged models."""
    from tests.distributed import launch
    from tests.trained import train_sharded

    return launch(train_sharded, text_data, tmp_path_factory.mktemp("sharded"))[0]
