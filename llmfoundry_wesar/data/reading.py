"""Read text files and JSON Lines, plain or compressed, by their specifications."""

import bz2
import codecs
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow

# Limits on memory, in bytes.
TXT_BYTES = 1_000_000  # a longer .txt file is cut into documents of this size
PIECE_BYTES = 65_536  # read from a compressed file at a time

FILE_NAME = re.compile(r"\.(txt|jsonl|raw|tokens)(\.(xz|zst|gz|bz2))?$")
FILE_NAMES = "*.txt, *.jsonl, or *.raw and *.tokens as WikiText has them, plain or with .xz, .zst, .gz or .bz2"
HEADING = re.compile(r"= [^=].* =", re.DOTALL)  # a first-level heading of WikiText, without the blanks around it
# What JSON calls the Python types of its values.
KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
KINDS[type(None)] = "null"
Value = TypeVar("Value")


class Text(NamedTuple):
    """A text of a file, None if the row has null instead.

    Attributes:
        text: The text.
        where: The file and line.
        position: The number of bytes of the file that have been read so far.
    """

    text: str | None
    where: str
    position: int


class _Pieces(io.RawIOBase):
    """Make a file of an iterable of bytes."""

    def __init__(self, pieces: Iterable[bytes]):
        self._pieces, self._rest = iter(pieces), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _members(raw: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress all members (streams) of a file, which `new` makes a decompressor for.

    The readers of bz2 and lzma take a damaged later member for the end, and that of gzip an empty file for a whole one.
    """
    decompressor = new()
    while piece := raw.read(PIECE_BYTES):
        while piece:
            if decompressor.eof:
                piece = piece.lstrip(b"\0")  # padding between members
                if not piece:
                    break
                decompressor = new()
            yield decompressor.decompress(piece)
            piece = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("its end is missing")


# Suffix → what makes a decompressor. The window of 31 bits makes zlib read gzip's header and check its sum.
_DECOMPRESSORS = {".gz": lambda: zlib.decompressobj(31), ".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file. Yield it and a file of its decompressed bytes, which is the same one if its name has no suffix.

    Raises:
        ValueError: The file is empty, cannot be opened or read, or is damaged (here or while it is read).
    """
    try:
        with path.open("rb") as raw:
            if path.suffix not in (*_DECOMPRESSORS, ".zst"):
                yield raw, raw
                return
            if not raw.peek(1):
                raise ValueError(
                    f"{path} is empty, so it is not in the {path.suffix} format; remove it or get it again"
                )
            if path.suffix == ".zst":
                yield raw, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
            else:
                yield raw, io.BufferedReader(_Pieces(_members(raw, _DECOMPRESSORS[path.suffix])))
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        # The errors of the operating system have a number, those of pyarrow and bz2 have none.
        damaged = getattr(error, "errno", None) is None
        why = f"is damaged, or not in the {path.suffix} format: {error}; get it again"
        raise ValueError(f"{path} {why if damaged else f'cannot be read: {error}'}") from error


def read_texts(path: Path, text_key: str) -> Iterator[Text]:
    r"""Yield each text of a file, as UTF-8 without a byte order mark at the start.

    A line of JSON Lines ends at \n, and no other character ends one.

    Raises:
        ValueError: The file is damaged or not UTF-8; a .jsonl, .raw or .tokens file has no text; or a line of a .jsonl
            file is not a JSON object with text or null under `text_key`.
    """
    name = FILE_NAME.search(path.name)
    kind = name[1] if name else "py"  # no match: a .py file of the standard library
    with unpacked(path) as (raw, stream):
        if kind in ("txt", "py"):
            text = "" if kind == "txt" else None
            for text in decoded(str(path), _cuts(stream)):
                yield Text(text, str(path), raw.tell())
            if text == "":
                yield Text(text, str(path), raw.tell())
            return
        lines = decoded(str(path), stream)
        empty = True
        if kind == "jsonl":
            for where, row in read_json_lines(str(path), lines):
                empty = False
                yield Text(text_of(row, text_key, where), where, raw.tell())
        else:
            for text in _articles(lines):
                if text.strip():
                    empty = False
                    yield Text(text, str(path), raw.tell())
        if empty:
            raise ValueError(f"{path} is empty; remove it or get it again")


def _cuts(stream: BinaryIO) -> Iterator[bytes]:
    """Yield pieces of about `TXT_BYTES` that end at line ends."""
    return iter(lambda: b"".join(stream.readlines(TXT_BYTES)), b"")


def decoded(name: str, pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode pieces of a file that end at line ends. Remove a byte order mark at the start."""
    offset = 0
    for data in pieces:
        mark = len(codecs.BOM_UTF8) if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0
        try:
            text = data[mark:].decode()
        except UnicodeDecodeError as error:
            place = mark + error.start
            raise ValueError(
                f"{name} is not UTF-8: byte 0x{data[place]:02x} at offset {offset + place} of the text; convert it "
                "first"
            ) from None
        offset += len(data)
        if text:
            yield text


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of each article of WikiText, as EleutherAI/wikitext_document_level on the Hub does."""
    article = []
    for line in lines:
        if HEADING.fullmatch(line.strip()):
            yield "".join(article).removesuffix("\n")
            article = []
        article.append(line)
    yield "".join(article)


def read_json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield the place (file and line) and the value of each line of JSON Lines that is not blank.

    Args:
        name: The name of the file.
        lines: Its lines.

    Raises:
        ValueError: A line is not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip(" \t\r\n"):
            where = f"{name}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: broken JSON: {error}; correct or remove the line") from error
            yield where, value


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"of the type {type(value).__name__}")


def entry(row: Any, key: str, kind: type[Value], where: str) -> Value:
    """Return the value of a key of a JSON object.

    Args:
        row: The object.
        key: The key.
        kind: The type that the value must have.
        where: File and line, for the error message.

    Raises:
        ValueError: `row` is not an object, or has no value of this type under the key.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {_kind(row)} where an object with the key {key!r} is needed")
    if key not in row:
        raise ValueError(f"{where}: the key {key!r} is missing; the keys are {', '.join(map(repr, row)) or 'none'}")
    value = row[key]
    if type(value) is not kind:
        raise ValueError(f"{where}: {key!r} is {_kind(value)}, not {KINDS[kind]}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise ValueError(
                f"{where}: {key!r} has {half!a}, half of a surrogate pair; UTF-8 cannot encode it"
            ) from None
    return value


def text_of(row: Any, text_key: str, where: str) -> str | None:
    """Return the text of a row, or None if it is null."""
    if isinstance(row, Mapping) and row.get(text_key, "") is None:
        return None
    try:
        return entry(row, text_key, str, where)
    except ValueError as error:
        raise ValueError(f"{error}; change the file, or set text_key to the key with the text") from None
