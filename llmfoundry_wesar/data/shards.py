"""Text → byte-level BPE tokenizer → MDS shards for llm-foundry's `text` loader.

    OUT/manifest.json     the arguments, the source files and their sizes: what a later run is compared with
    OUT/tokenizer/        for `tokenizer.name: OUT/tokenizer`
    OUT/train/, OUT/val/  for `dataset: {local: OUT, split: train}`: one column, `tokens`, an int32 array

Each part is written under `OUT/.partial` and renamed when whole, so a final name always holds a finished part.
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
from tqdm import tqdm
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.gpt2.tokenization_gpt2_fast import GPT2TokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmfoundry_wesar.data.corpus import HUB, Corpus, batches, find_files, open_hub, progress_bar, splits

__all__ = ["prepare"]

EOS = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 32_000
SMALLEST_VOCAB_SIZE = 256 + 1 + 1  # bytes, EOS, and a first merge
TOKENIZER_BYTES = 500_000_000  # of training text that a new tokenizer learns from: a minute on two cores
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
    """Write a tokenizer and token shards for llm-foundry's `text` loader, or finish an interrupted run of the same.

    A document is a line of a .jsonl file, a row of a Hugging Face data set, an article of a WikiText file, or a .txt
    file, one longer than 1 MB being cut at line ends; empty ones are skipped. It goes to val or train by a hash of seed
    and text, so equal documents are never in both. Within a split the documents' tokens, an EOS after each, are joined
    and cut into sequences; a last part shorter than a sequence is dropped. Special tokens that a document spells out
    are encoded as plain text, so that an EOS is always an end; those that a given tokenizer adds by itself (a BOS, for
    example) stay.

    WikiText comes as lines, of which most are paragraphs. With an EOS after each of them a model would be asked for an
    end that no document of its training has there, and no context would reach beyond it. So the articles are put
    together again, as EleutherAI/wikitext_document_level has them on the Hub (text key `page`).

    Memory does not grow with the amount of text. To mix sources in chosen proportions, prepare each with the same
    tokenizer and use foundry's `streams`.

    Args:
        out: New or empty folder, or that of an earlier run with the same arguments.
        sources: Each `stdlib` (the running Python's standard library without tests and `encodings`), a file
            (*.txt, *.jsonl, or WikiText's *.raw and *.tokens, plain or with .xz, .zst or .gz), a folder of such files,
            or `hf:NAME[:CONFIG][@SPLIT]`: a split, train by default, of a Hugging Face data set, or of a local folder
            that `datasets` loads, streamed.
        sequence_length: Tokens in a sequence.
        vocab_size: Exact size of the byte-level BPE vocabulary that is trained on the first 500 MB of the train
            split; None for 32,000. Only without `tokenizer`.
        tokenizer: Name or folder of a Hugging Face tokenizer to use instead, one that runs no code of its own. If its
            pad token is its EOS, a line on stderr says what to add to the training YAML.
        max_tokens: Tokens of the train split, rounded up to a whole sequence, after which to stop; None for all.
        val_fraction: Share of the documents to hold out, in [0, 1]; 0 writes no val split, 1 no train split, which
            is for text to evaluate on and needs a `tokenizer`.
        seed: Of the split and of the order.
        shuffle: Whether files (a Hugging Face data set's own, too) are read in random order and documents pass
            through a shuffle buffer of 128 MB; otherwise they stay in order, files before Hugging Face sources.
        text_key: Field of a .jsonl line or Hugging Face row that holds the text.

    Returns:
        The number of sequences in each split.

    Raises:
        ValueError: An argument is out of range or differs from the earlier run's, a source has no readable text, the
            tokenizer has no EOS, the text cannot fill the vocabulary, or a split cannot fill a sequence.
        FileNotFoundError: A source does not exist.
        FileExistsError: `out` holds something else.
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
        _say(f"{out} is complete: nothing to do")
        return {split: _sequences(out / split) for split in parts}

    kept = (out / "tokenizer").exists()
    given = None if tokenizer is None or kept else _load_tokenizer(tokenizer)
    rows = [open_hub(name, text_key) for name in hub]
    corpus = Corpus(list(files.values()), rows, text_key, seed, shuffle, val_fraction)
    manifest = manifest or {"arguments": arguments, "bytes": corpus.check(sequence_length)}
    sizes = {} if hub else manifest["bytes"]  # unknown for a stream
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    new = not out.exists()
    partial.mkdir(parents=True)
    try:
        if kept:
            _say("tokenizer: kept from the earlier run")
        else:
            made = given or _train_tokenizer(corpus, cast(int, vocab_size), sequence_length, sizes)
            made.save_pretrained(partial / "tokenizer")
            if not (out / MANIFEST).exists():
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
                (partial / MANIFEST).rename(out / MANIFEST)
            (partial / "tokenizer").rename(out / "tokenizer")
        used = _load_tokenizer(str(out / "tokenizer"))
        if used.pad_token_id == used.eos_token_id:
            # transformers' collator, which the `text` loader has, takes every such token for padding.
            _say(
                f"warning: the pad token of this tokenizer is its EOS, {used.eos_token}, so that in training no EOS is "
                "a target and no model learns to end a document; set tokenizer.kwargs.pad_token: null in the YAML"
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


def _check_ranges(
    tokenizer: str | None, vocab_size: int | None, sequence_length: int, max_tokens: int | None, val_fraction: float
) -> None:
    if vocab_size is not None and tokenizer is not None:
        raise ValueError(f"vocab_size: {vocab_size} does not apply to a given tokenizer, {tokenizer}; drop one of them")
    if vocab_size is not None and vocab_size < SMALLEST_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small: 256 bytes, {EOS} and a first merge are {SMALLEST_VOCAB_SIZE}"
        )
    if sequence_length < 1:
        raise ValueError(f"sequence_length: {sequence_length} must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} must be at least 1")
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction: {val_fraction} must be in [0, 1]")
    if val_fraction == 1 and tokenizer is None:
        raise ValueError("val_fraction: 1 leaves no text to train a tokenizer on; give tokenizer, that of the model")
    if val_fraction == 1 and max_tokens is not None:
        raise ValueError(f"max_tokens: {max_tokens} is of the train split, which val_fraction 1 leaves out; drop it")


def _earlier_run(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest that an earlier run left in `out`, None if `out` is new."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(path.name != PARTIAL for path in out.iterdir())):
            raise FileExistsError(f"{out} holds something else; give a new or an empty folder")
        return None
    manifest = json.loads((out / MANIFEST).read_text())
    for key, now in arguments.items():
        before = manifest["arguments"][key]
        if before != now:
            if key == "files":
                name = min(name for name in before | now if before.get(name) != now.get(name))
                key, before, now = f"bytes of {name}", before.get(name), now.get(name)
            raise ValueError(f"{out} was prepared with {key}: {before}, not {now}; give another folder or delete it")
    return manifest


def _sequences(split: Path) -> int:
    return sum(shard["samples"] for shard in json.loads((split / "index.json").read_text())["shards"])


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = f"cannot be loaded: {str(error).splitlines()[0]}"
        if "trust_remote_code" in why:
            why = "needs code of its own, which is not run; use one that needs none"
        raise ValueError(f"tokenizer {name} {why}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} has no EOS token to mark the end of a document; use one that has")
    return tokenizer


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
            f"vocab_size: {vocab_size} is too large: the text gives {bpe.get_vocab_size()}; ask for fewer or add text"
        )
    # GPT-2's class is byte-level BPE with this EOS, and is known to every tool that loads tokenizers.
    return GPT2TokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), model_max_length=sequence_length)


@dataclass
class _Packer:
    """Foundry's concat-tokens rule (`llmfoundry.data.data.ConcatTokensDataset`), many documents at a time."""

    writer: MDSWriter
    sequence_length: int
    limit: float
    sequences: int = 0
    rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def write(self, documents: Iterable[list[int]]) -> None:
        """Join the documents to what is left from before, and write the full sequences up to the limit."""
        tokens = np.concatenate([self.rest, np.fromiter(chain.from_iterable(documents), np.int32)])
        end = len(tokens) // self.sequence_length * self.sequence_length
        for sequence in tokens[:end].reshape(-1, self.sequence_length):
            if self.sequences < self.limit:
                self.writer.write({"tokens": sequence})
                self.sequences += 1
        self.rest = tokens[end:]


def _write_shards(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_tokens: int | None,
    sizes: dict[str, int],
) -> None:
    """Write every split to `folder`, in one pass, since a source that is streamed may take hours to read."""
    limit = math.inf if max_tokens is None else math.ceil(max_tokens / sequence_length)
    eos = tokenizer.eos_token_id
    end = [] if tokenizer("").input_ids[-1:] == [eos] else [eos]  # some tokenizers add it by themselves
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
            encoded = tokenizer(
                [document.text for document in batch],
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            ).input_ids
            for split, packer in packers.items():
                labelled = zip(batch, encoded, strict=True)
                packer.write(tokens + end for document, tokens in labelled if document.split == split)
            read += sum(document.size for document in batch)
            bar.update((read if max_tokens is None else packers["train"].sequences * sequence_length) - bar.n)
            if max_tokens is not None and packers["train"].sequences == limit:
                break
    for split, packer in packers.items():
        if packer.sequences == 0:
            raise ValueError(
                f"the {split} split has fewer tokens than one sequence, {sequence_length}: in another folder, "
                "add text, or change val_fraction or sequence_length"
            )
