"""Give the documents of files and data sets of the Hub a fixed order, and split them into train and val."""

import hashlib
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, cast

from datasets import IterableDataset, load_dataset
from tqdm import tqdm

from llmfoundry_wesar.data.reading import FILE_NAME, FILE_NAMES, Text, read_texts, text_of

# Limits on memory, in bytes of text. Encoding a document takes about 150 times its size.
SHUFFLE_BYTES = 128_000_000  # size of the shuffle buffer
BATCH_BYTES = 4_000_000  # documents encoded in one call, which uses all cores

LOG_SECONDS = 60  # between two lines of progress if stderr is not a terminal
HUB = "hf:NAME[:CONFIG][@SPLIT]"
HUB_NAME = re.compile(r"hf:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>\w+(\.\w+)*))?")
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
        hub: Source → stream from `open_hub`, read after the files.
        text_key: Field of a .jsonl line or a row with the text.
        seed: Seed of the split and of the order.
        shuffle: Read the files in random order and pass the documents through a shuffle buffer.
        val_fraction: Share of the documents to hold out, in [0, 1].

    Attributes:
        skipped: For `null` and `empty`, the number of rows that the last iteration skipped, and where the first one is.
    """

    files: Sequence[Path]
    hub: Mapping[str, IterableDataset]
    text_key: str
    seed: int
    shuffle: bool
    val_fraction: float
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict, compare=False)

    @property
    def splits(self) -> tuple[str, ...]:
        return splits(self.val_fraction)

    def __iter__(self) -> Iterator[Document]:
        files, hub, rng = list(self.files), self.hub, random.Random(self.seed)
        if self.shuffle:
            rng.shuffle(files)
            # Shuffle only the files of the data set here. Its buffer counts documents, ours (`_shuffled`) counts bytes.
            hub = {name: rows.shuffle(seed=self.seed, buffer_size=1) for name, rows in hub.items()}
        from_files = (read_texts(path, self.text_key) for path in files)
        from_hub = (_hub_texts(name, rows, self.text_key) for name, rows in hub.items())
        documents = self._documents(chain.from_iterable(chain(from_files, from_hub)))
        return _shuffled(documents, rng) if self.shuffle else documents

    def _documents(self, texts: Iterable[Text]) -> Iterator[Document]:
        self.skipped.clear()
        for text, where, _ in texts:
            if text:
                yield self._document(text)
            else:
                kind = "null" if text is None else "empty"
                count, first = self.skipped.get(kind, (0, where))
                self.skipped[kind] = count + 1, first

    def _document(self, text: str) -> Document:
        """Choose the split by a hash of the text, so that equal texts are in the same split."""
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8, key=str(self.seed).encode()).digest()
        held_out = int.from_bytes(digest, "big") < self.val_fraction * 2**64
        return Document("val" if held_out else "train", text, len(data))

    def check(self, sequence_length: int) -> dict[str, int]:
        """Read every file once, to find a bad file before the long work starts. Return the bytes of text per split.

        Raises:
            ValueError: As in `read_texts`, or a split cannot fill a sequence.
        """
        count, size = Counter(), Counter()
        with progress_bar("checking files", sum(path.stat().st_size for path in self.files), "B") as bar:
            for path in self.files:
                before = 0
                for text, _, position in read_texts(path, self.text_key):
                    bar.update(position - before)
                    before = position
                    if not text:
                        continue
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


def say(text: str) -> None:
    """Write a line to stderr, beside a progress bar."""
    tqdm.write(text, file=sys.stderr)


def progress_bar(what: str, total: int | None, unit: str) -> tqdm:
    """Make a progress bar. If stderr is not a terminal, it is printed after a minute, and then once a minute."""
    times = {} if sys.stderr.isatty() else dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_SECONDS)
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, **times)


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
    # Without trust_remote_code: false, `datasets` would ask the user whether to run the script of a data set.
    options = {"split": split, "streaming": True, "trust_remote_code": False}
    try:
        rows = cast(IterableDataset, load_dataset(parts["name"], parts["config"], **options))
    except ValueError as error:
        raise ValueError(f"source {source}: {error}; name one that exists, as in {HUB}") from error
    for _ in _hub_texts(source, rows.take(1), text_key):
        return rows
    raise ValueError(f"source {source} has no rows; name another split or config, as in {HUB}")


def _hub_texts(source: str, rows: IterableDataset, text_key: str) -> Iterator[Text]:
    """Yield the text of each row of a Hugging Face data set.

    Raises:
        ValueError: A row has no text under `text_key`, or `datasets` cannot read the next row.
    """
    number, iterator = 0, iter(rows)
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of any class: each format has a reader of its own
            raise ValueError(f"source {source}, row {number} cannot be read: {error}") from error
        where = f"source {source}, row {number}"
        yield Text(text_of(row, text_key, where), where, 0)
