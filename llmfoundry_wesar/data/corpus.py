"""Read text documents from files and the Hub, in a fixed order, and split them into train and val."""

import gzip
import hashlib
import io
import json
import lzma
import random
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow
from datasets import IterableDataset, load_dataset
from tqdm import tqdm

__all__ = ["HUB", "Corpus", "Document", "batches", "find_files", "open_hub", "progress_bar", "read_texts", "splits"]

# Limits on memory, in bytes of text. Encoding a document takes about 150 times its size.
TXT_BYTES = 1_000_000  # a longer .txt file is cut into documents of this size
SHUFFLE_BYTES = 128_000_000  # size of the shuffle buffer
BATCH_BYTES = 4_000_000  # documents encoded in one call, which uses all cores

FILE_NAME = re.compile(r"\.(txt|jsonl|raw|tokens)(\.(xz|zst|gz))?$")
FILE_NAMES = "*.txt, *.jsonl, or *.raw and *.tokens as WikiText has them, plain or with .xz, .zst or .gz"
HUB = "hf:NAME[:CONFIG][@SPLIT]"
HUB_NAME = re.compile(r"hf:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>\w+(\.\w+)*))?")
HEADING = re.compile(r"= [^=].* =", re.DOTALL)  # a first-level heading of WikiText, without the blanks around it
# Not read: tests (unusual text), `encodings` (tables of hexadecimal numbers) and installed packages.
NOT_STDLIB = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """A text, the split that it belongs to, and its size in bytes of UTF-8."""

    split: str
    text: str
    size: int


def splits(val_fraction: float) -> tuple[str, ...]:
    """Return the names of the splits that are not empty."""
    shares = {"train": 1 - val_fraction, "val": val_fraction}
    return tuple(split for split, share in shares.items() if share)


@dataclass(frozen=True)
class Corpus:
    """An iterable of documents, the same ones in the same order each time.

    Args:
        files: Paths from `find_files`.
        hub: Streams from `open_hub`, read after the files.
        text_key: Field of a .jsonl line or a row with the text.
        seed: Seed of the split and of the order.
        shuffle: Read the files in random order and pass the documents through a shuffle buffer.
        val_fraction: Share of the documents to hold out, in [0, 1].
    """

    files: Sequence[Path]
    hub: Sequence[IterableDataset]
    text_key: str
    seed: int
    shuffle: bool
    val_fraction: float

    @property
    def splits(self) -> tuple[str, ...]:
        return splits(self.val_fraction)

    def __iter__(self) -> Iterator[Document]:
        files, hub, rng = list(self.files), self.hub, random.Random(self.seed)
        if self.shuffle:
            rng.shuffle(files)
            # Shuffle only the files of the data set here. Its buffer counts documents, ours (`_shuffled`) counts bytes.
            hub = [rows.shuffle(seed=self.seed, buffer_size=1) for rows in hub]
        from_files = (text for path in files for text, _ in read_texts(path, self.text_key))
        from_hub = (row[self.text_key] for rows in hub for row in rows)
        documents = (self._document(text) for text in chain(from_files, from_hub) if text)
        return _shuffled(documents, rng) if self.shuffle else documents

    def _document(self, text: str) -> Document:
        """Choose the split by a hash of the text, so that equal texts are in the same split."""
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8, key=str(self.seed).encode()).digest()
        held_out = int.from_bytes(digest, "big") < self.val_fraction * 2**64
        return Document("val" if held_out else "train", text, len(data))

    def check(self, sequence_length: int) -> dict[str, int]:
        """Read every file once, to find a bad file before the long work starts. Return the bytes of text per split.

        Raises:
            ValueError: A file is damaged or not UTF-8, a .jsonl line has no text, or a split cannot fill a sequence.
        """
        count, size = Counter(), Counter()
        with progress_bar("checking files", sum(path.stat().st_size for path in self.files), "B") as bar:
            for path in self.files:
                before = 0
                for text, position in read_texts(path, self.text_key):
                    bar.update(position - before)
                    before = position
                    document = self._document(text)
                    count[document.split] += 1
                    size[document.split] += document.size
        for split in self.splits:
            # A document of n bytes has at most n tokens, plus EOS and up to two that the tokenizer adds.
            if not self.hub and size[split] + 3 * count[split] < sequence_length:
                raise ValueError(
                    f"the {split} split has {size[split]} bytes of text, too few for one sequence of {sequence_length} "
                    "tokens: add text, or change val_fraction or sequence_length"
                )
        return {split: size[split] for split in self.splits}


def _shuffled(documents: Iterable[Document], rng: random.Random) -> Iterator[Document]:
    held, size = [], 0
    for document in documents:
        held.append(document)
        size += document.size
        while size > SHUFFLE_BYTES:
            chosen = rng.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            size -= held[-1].size
            yield held.pop()
    rng.shuffle(held)
    yield from held


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into lists of at least `BATCH_BYTES`; the last list may be smaller."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def progress_bar(what: str, total: int | None, unit: str) -> tqdm:
    """Make a progress bar that is shown only if stderr is a terminal."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None)


def find_files(source: str) -> dict[str, Path]:
    """Find the files of a source (`stdlib`, a folder or a file). Return name → path, in a fixed order.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: The file, or every file in the folder, has a name that is not one of `FILE_NAMES`.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        modules = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
        return {f"stdlib/{name}": path for name, path in modules.items() if NOT_STDLIB.isdisjoint(name.parts)}
    path = Path(source).absolute()
    if not path.exists():
        raise FileNotFoundError(f"source {source}: no such file or folder; name one, or give stdlib or {HUB}")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = {str(file): file for file in found if file.is_file() and FILE_NAME.search(file.name)}
    if not files:
        raise ValueError(f"source {source} {'has no file' if path.is_dir() else 'is not'} named {FILE_NAMES}")
    return files


def open_hub(source: str, text_key: str) -> IterableDataset:
    """Open `hf:NAME[:CONFIG][@SPLIT]`, a split of a Hugging Face data set, as a stream; SPLIT is train by default.

    Raises:
        ValueError: `source` does not have this form, the config or split does not exist, or the first row has no text
            under `text_key`.
    """
    parts = HUB_NAME.fullmatch(source)
    if parts is None:
        raise ValueError(f"source {source} is not of the form {HUB}")
    split = parts["split"] or "train"
    try:
        rows = cast(IterableDataset, load_dataset(parts["name"], parts["config"], split=split, streaming=True))
    except ValueError as error:
        raise ValueError(f"source {source}: {error}; name one that exists, as in {HUB}") from error
    first = next(iter(rows), {})
    if not isinstance(first.get(text_key), str):
        raise ValueError(f"source {source} has no text under {text_key!r}; set text_key to another of {list(first)}")
    return rows


def _decompressed(raw: BinaryIO, suffix: str) -> Any:
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    return raw


def read_texts(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    """Yield each text of a file, and the number of bytes read from the file so far.

    Raises:
        ValueError: The file is damaged or not UTF-8, or a line of a .jsonl file has no text under `text_key`.
    """
    name = FILE_NAME.search(path.name)
    kind = name[1] if name else "txt"  # no match: a .py file of the standard library
    pieces = _decoded(path, by_line=kind != "txt")
    if kind == "jsonl":
        for number, (line, position) in enumerate(pieces, start=1):
            if line.strip():
                yield _field(line, text_key, f"{path}, line {number}"), position
    elif kind == "txt":
        yield from pieces
    else:
        yield from ((text, position) for text, position in _articles(pieces) if text.strip())


def _decoded(path: Path, by_line: bool) -> Iterator[tuple[str, int]]:
    """Yield the text of a file line by line, or in pieces of about `TXT_BYTES` that end at line ends."""
    offset = 0
    try:
        with path.open("rb") as raw, _decompressed(raw, path.suffix) as stream:
            for data in stream if by_line else iter(lambda: b"".join(stream.readlines(TXT_BYTES)), b""):
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
                        "of the text; convert it first"
                    ) from None
                offset += len(data)
                yield text, raw.tell()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _articles(lines: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Join the lines of each article of WikiText, as EleutherAI/wikitext_document_level on the Hub does."""
    article, position = [], 0
    for line, position in lines:
        if HEADING.fullmatch(line.strip()):
            yield "".join(article).removesuffix("\n"), position
            article = []
        article.append(line)
    yield "".join(article), position


def _field(line: str, text_key: str, where: str) -> str:
    try:
        text = json.loads(line)[text_key]
        text.encode()  # fails on half a surrogate pair, which JSON allows but UTF-8 cannot encode
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a JSON object with text under {text_key!r}; change it or text_key") from error
    return text
