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
