"""Train a byte-level BPE tokenizer on text, and write MDS shards for llm-foundry's `text` loader.

    OUT/manifest.json     the arguments, the source files and their sizes, to compare a later run with
    OUT/tokenizer/        for `tokenizer.name: OUT/tokenizer`
    OUT/train/, OUT/val/  for `dataset: {local: OUT, split: train}`: one column, `tokens`, an int32 array

Each part is written to `OUT/.partial` and renamed when it is complete. So tokenizer, train and val are never partial.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from streaming import MDSWriter
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.gpt2.tokenization_gpt2_fast import GPT2TokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.data.corpus import HUB, Corpus, batches, find_files, open_hub, progress_bar, say, splits
from llmfoundry_wesar.keys import is_number

EOS = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 32_000
SMALLEST_VOCAB_SIZE = 256 + 1 + 1  # bytes, EOS and one merge
TOKENIZER_BYTES = 500_000_000  # size of the text that a new tokenizer is trained on; takes a minute on two cores
MANIFEST, PARTIAL = "manifest.json", ".partial"


def prepare(
    out: str | Path,
    sources: Sequence[str | Path],
    *,
    sequence_length: int = 2048,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    val_fraction: float = 0.01,
    seed: int = 17,
    shuffle: bool = True,
    text_key: str = "text",
) -> dict[str, int]:
    """Write a tokenizer and token shards for llm-foundry's `text` loader. Continue an earlier run that was interrupted.

    A document is a line of a .jsonl file, a row of a Hugging Face data set, an article of a WikiText file, or a .txt
    file; a .txt file of more than 1 MB is cut at line ends. Rows with null instead of a text and empty documents are
    skipped, and a line on stderr says how many. A hash of seed and text sends
    a document to val or train, so equal documents are in the same split. Within a split the tokens of all documents,
    with an EOS after each document, are joined and cut into sequences. A last part shorter than a sequence is dropped.
    A special token that is written in the text is encoded as plain text, so that an EOS always means an end. Special
    tokens that a given tokenizer adds itself, such as a BOS, stay.

    The lines of WikiText are joined into articles, as in EleutherAI/wikitext_document_level on the Hub (text key
    `page`). A line is one paragraph. As a document it would have no context, and an EOS where training text has none.

    Memory does not grow with the amount of text. To mix sources in chosen proportions, prepare each with the same
    tokenizer and use foundry's `streams`.

    Args:
        out: New or empty folder, or that of an earlier run with the same arguments.
        sources: Each is `stdlib` (this Python's standard library without tests and `encodings`), a file
            (*.txt, *.jsonl, or WikiText's *.raw and *.tokens, plain or with .xz, .zst, .gz or .bz2), a folder of such
            files, or `hf:NAME[:CONFIG][@SPLIT]`: a split (train by default) of a Hugging Face data set, or of a local
            folder that `datasets` can load. The data set is streamed.
        sequence_length: Tokens in a sequence.
        vocab_size: Exact size of the byte-level BPE vocabulary that is trained on the first 500 MB of the train
            split; None for 32,000. Only without `tokenizer`.
        tokenizer: Name or folder of a Hugging Face tokenizer to use instead. It must not need code of its own. If its
            pad token is its EOS, a warning on stderr says what to add to the training YAML.
        max_tokens: Stop after this number of tokens of the train split, rounded up to a whole sequence; None for all.
        val_fraction: Share of the documents in val, in [0, 1]. 0 writes no val split. 1 writes no train split; this
            is for evaluation data and needs a `tokenizer`.
        seed: Seed of the split and of the order.
        shuffle: Whether to read files (also those of a Hugging Face data set) in random order and to pass documents
            through a shuffle buffer of 128 MB. Otherwise they stay in order, files before Hugging Face sources.
        text_key: Field of a .jsonl line or Hugging Face row with the text.

    Returns:
        The number of sequences in each split.

    Raises:
        ValueError: An argument is out of range or differs from the earlier run's, a source has no readable text, the
            tokenizer has no EOS, the text is too short for the vocabulary, a split cannot fill a sequence, or the disk
            has too little space.
        FileNotFoundError: A source does not exist.
        FileExistsError: `out` contains something else.
    """
    if tokenizer is None and vocab_size is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    arguments = {key: value for key, value in locals().items() if key not in ("out", "sources")}
    _check_ranges(tokenizer, vocab_size, sequence_length, max_tokens, val_fraction)
    out, names = Path(out), [str(source) for source in sources]
    hub = [name for name in names if name.startswith("hf:")]
    files = {key: path for name in names if name not in hub for key, path in find_files(name).items()}
    files = {key: path for key, path in files.items() if not path.is_relative_to(out.absolute())}
    if not hub and not files:
        raise ValueError(f"no sources: give stdlib, files, folders or {HUB}")
    arguments |= {"hub": hub, "files": {key: path.stat().st_size for key, path in files.items()}}
    manifest = _earlier_run(out, arguments)
    parts = splits(val_fraction)
    if manifest and all((out / part).exists() for part in ("tokenizer", *parts)):
        say(f"{out} is complete: nothing to do")
        return {split: _sequences(out / split) for split in parts}

    kept = (out / "tokenizer").exists()
    given = None if tokenizer is None or kept else _load_tokenizer(tokenizer)
    rows = {name: open_hub(name, text_key) for name in hub}
    corpus = Corpus(list(files.values()), rows, text_key, seed, shuffle, val_fraction)
    manifest = manifest or {"arguments": arguments, "bytes": corpus.check(sequence_length)}
    sizes = {} if hub else manifest["bytes"]  # unknown for a stream
    _check_space(out, max_tokens, val_fraction, sizes)
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    new = not out.exists()
    partial.mkdir(parents=True)
    try:
        if kept:
            say("tokenizer: kept from the earlier run")
        else:
            made = given or _train_tokenizer(corpus, cast(int, vocab_size), sequence_length, sizes)
            _save(made, partial / "tokenizer")
            if not (out / MANIFEST).exists():
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
                (partial / MANIFEST).rename(out / MANIFEST)
            (partial / "tokenizer").rename(out / "tokenizer")
        used = _load_tokenizer(str(out / "tokenizer"))
        if used.pad_token_id == used.eos_token_id:
            # The `text` loader uses transformers' collator, which masks every pad token in the labels.
            say(
                f"warning: the pad token of this tokenizer is its EOS, {used.eos_token}, so training masks every EOS "
                "and the model does not learn to end a document; set tokenizer.kwargs.pad_token: null in the YAML"
            )
        _write_shards(partial, corpus, used, sequence_length, max_tokens, sizes)
        for split in parts:
            if not (out / split).exists():
                (partial / split).rename(out / split)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if new and not any(out.iterdir()):
            out.rmdir()
    return {split: _sequences(out / split) for split in parts}


def check_prepared(folder: Path, max_seq_len: Any, tokenizer: str) -> None:
    """Check that what `prepare` wrote fits a training config. A folder without its manifest is not checked.

    Longer sequences than `max_seq_len` are no error: the loader cuts them.

    Args:
        folder: `dataset.local`.
        max_seq_len: `dataset.max_seq_len`. If it is no number, it is not compared.
        tokenizer: `tokenizer.name`. If it is no folder, its vocabulary is not compared.

    Raises:
        ValueError: The sequences are shorter than `max_seq_len`, so that a batch would have fewer tokens than the
            config says; or they were made with another vocabulary.
    """
    try:
        length = json.loads((folder / MANIFEST).read_text())["arguments"]["sequence_length"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is a file of another program
        return
    if is_number(max_seq_len) and length < max_seq_len:
        raise ValueError(
            f"{folder} has sequences of {length} tokens, but max_seq_len is {max_seq_len}; prepare the text again, in "
            f"another folder, with --sequence-length {max_seq_len}, or set max_seq_len: {length}"
        )
    files = [Path(path, "tokenizer.json") for path in (folder / "tokenizer", tokenizer)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (file.read_bytes() for file in files)
    # Two files can have one vocabulary, because transformers rewrites a file that it saves. Most are equal, and reading
    # JSON takes longer than comparing bytes.
    if ours != theirs and _vocabulary(ours) != _vocabulary(theirs):
        raise ValueError(
            f"{folder} was prepared with another tokenizer than {tokenizer}; prepare it again, in another folder, with "
            f"--tokenizer {tokenizer}"
        )


def _vocabulary(tokenizer: bytes) -> Any:
    return json.loads(tokenizer)["model"]["vocab"]


def _check_ranges(
    tokenizer: str | None, vocab_size: int | None, sequence_length: int, max_tokens: int | None, val_fraction: float
) -> None:
    if vocab_size is not None and tokenizer is not None:
        raise ValueError(f"vocab_size: {vocab_size} does not apply to a given tokenizer, {tokenizer}; drop one of them")
    if vocab_size is not None and vocab_size < SMALLEST_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small; it must be at least {SMALLEST_VOCAB_SIZE} "
            f"(256 bytes, {EOS} and one merge)"
        )
    if sequence_length < 1:
        raise ValueError(f"sequence_length: {sequence_length} must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} must be at least 1")
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction: {val_fraction} must be in [0, 1]")
    if val_fraction == 1 and tokenizer is None:
        raise ValueError("val_fraction: 1 leaves no text to train a tokenizer on; give the model's tokenizer")
    if val_fraction == 1 and max_tokens is not None:
        raise ValueError(f"max_tokens: {max_tokens} limits the train split, but val_fraction: 1 writes none; drop it")


def _check_space(out: Path, max_tokens: int | None, val_fraction: float, sizes: dict[str, int]) -> None:
    """Refuse a disk that would be full after hours. A token takes 4 bytes, about as many as its text."""
    limits = [sum(sizes.values())] if sizes else []
    limits += [] if max_tokens is None else [4 * max_tokens / (1 - val_fraction)]
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if limits and min(limits) > free:
        raise ValueError(
            f"{out}: the tokens need about {min(limits) / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free; give a "
            "folder on another disk, or a smaller max_tokens"
        )


def _earlier_run(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier run in `out`, or None if `out` is new."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(path.name != PARTIAL for path in out.iterdir())):
            raise FileExistsError(f"{out} holds something else; give a new or empty folder")
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        earlier = {key: manifest["arguments"][key] for key in arguments}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out / MANIFEST} is not what data has written; give another folder or delete {out}"
        ) from error
    for key, now in arguments.items():
        before = earlier[key]
        if before != now:
            if key == "files":
                name = min(name for name in before | now if before.get(name) != now.get(name))
                key, before, now = f"bytes of {name}", before.get(name), now.get(name)
            raise ValueError(f"{out} was prepared with {key}: {before}, not {now}; give another folder or delete it")
    return manifest


def _sequences(split: Path) -> int:
    return sum(shard["samples"] for shard in json.loads((split / "index.json").read_text())["shards"])


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the package tokenizers raises plain Exceptions
        why = f"cannot be loaded: {str(error).splitlines()[0]}"
        if "trust_remote_code" in why:
            why = "needs code of its own, which is not run; use one that needs none"
        raise ValueError(f"tokenizer {name} {why}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} has no EOS token to mark the end of a document; use one that has")
    return tokenizer


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the class that tokenizers raises, for example if the disk is full
        raise OSError(f"{folder}: the tokenizer cannot be written: {error}") from error


def _train_tokenizer(
    corpus: Corpus, vocab_size: int, sequence_length: int, sizes: dict[str, int]
) -> PreTrainedTokenizerBase:
    def texts() -> Iterator[str]:
        read, total = 0, min(sizes["train"], TOKENIZER_BYTES) if sizes else None
        with progress_bar("tokenizer", total, "B") as bar:
            for document in corpus:
                if read >= TOKENIZER_BYTES:
                    return
                if document.split == "train":
                    yield document.text
                    bar.update(document.size)
                    read += document.size

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(), vocab_size, special_tokens=[EOS], show_progress=sys.stderr.isatty())
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size: {vocab_size} is too large: the text gives {bpe.get_vocab_size()}; reduce it or add text"
        )
    # GPT-2's class is byte-level BPE with this EOS, and all tools know it.
    return GPT2TokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), model_max_length=sequence_length)


@dataclass
class _Packer:
    """Packs documents as foundry's `llmfoundry.data.data.ConcatTokensDataset` does, many at a time."""

    writer: MDSWriter
    sequence_length: int
    limit: float
    sequences: int = 0
    rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def write(self, documents: Iterable[list[int]]) -> None:
        """Append the documents to the remaining tokens, and write the full sequences up to the limit."""
        tokens = np.concatenate([self.rest, np.fromiter(chain.from_iterable(documents), np.int32)])
        end = len(tokens) // self.sequence_length * self.sequence_length
        for sequence in tokens[:end].reshape(-1, self.sequence_length):
            if self.sequences < self.limit:
                self.writer.write({"tokens": sequence})
                self.sequences += 1
        self.rest = tokens[end:]


def adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts its EOS at the end of each text."""
    return tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each document: those that the tokenizer gives, such as a BOS, and an EOS at the end.

    The text of a special token in a document is encoded as text.
    """
    end = [] if adds_eos(tokenizer) else [tokenizer.eos_token_id]
    encoded = tokenizer(
        texts, split_special_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [tokens + end for tokens in encoded.input_ids]


def _write_shards(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_tokens: int | None,
    sizes: dict[str, int],
) -> None:
    """Write all splits to `folder` in one pass over the documents, because a streamed source may take hours to read."""
    limit = math.inf if max_tokens is None else math.ceil(max_tokens / sequence_length)
    read = 0
    with ExitStack() as stack:
        packers = {}
        for split in corpus.splits:
            writer = stack.enter_context(MDSWriter(out=str(folder / split), columns={"tokens": "ndarray:int32"}))
            packers[split] = _Packer(writer, sequence_length, limit if split == "train" else math.inf)
        if max_tokens is None:
            bar = progress_bar("shards", sum(sizes.values()) or None, "B")
        else:
            bar = progress_bar("shards", max_tokens, "token")
        stack.enter_context(bar)
        for batch in batches(corpus):
            encoded = encode(tokenizer, [document.text for document in batch])
            for split, packer in packers.items():
                labelled = zip(batch, encoded, strict=True)
                packer.write(tokens for document, tokens in labelled if document.split == split)
            read += sum(document.size for document in batch)
            bar.update((read if max_tokens is None else packers["train"].sequences * sequence_length) - bar.n)
            if max_tokens is not None and packers["train"].sequences == limit:
                break
    for kind, (number, first) in corpus.skipped.items():
        say(f"skipped {number:,} {kind} document{'s' * (number > 1)}, first in {first}")
    for split, packer in packers.items():
        if packer.sequences == 0:
            raise ValueError(
                f"the {split} split has fewer tokens than one sequence, {sequence_length}: add text, or change "
                "val_fraction or sequence_length, and give another folder"
            )
