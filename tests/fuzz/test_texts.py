"""Text sources with random characters, line ends, members and damage give the right documents, or an error."""

import bz2
import gzip
import json
import lzma
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmfoundry_wesar.data.reading import read_texts
from tests.fuzz.profile import examples

# Characters that end lines somewhere, or that are special in JSON or UTF-8, more often than others.
TEXT = st.text(st.sampled_from('\n\r\u2028\u2029\x85\x0b\x0c\x1c\x00\ufeff"\\a é漢😀') | st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "other"]), inner, max_size=2),
    max_leaves=4,
)
PACKERS = {".gz": lambda data: gzip.compress(data, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}


def read(name: str, data: bytes) -> list[str | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        return [text for text, _, _ in read_texts(path, "text")]


def packed(suffix: str, data: bytes, cuts: list[int]) -> list[bytes]:
    """Compress the parts between cuts as a member each."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    return [PACKERS[suffix](data[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@examples(100)
@given(
    rows=st.lists(VALUES | st.fixed_dictionaries({"text": TEXT | st.none()}), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\n\n", " \r\n\t\n"]),
    mark=st.booleans(),
    ascii_only=st.booleans(),
    suffix=st.sampled_from(["", *PACKERS]),
    cuts=st.lists(st.integers(0, 200), max_size=3),
)
def test_json_lines_give_their_texts_or_the_place_of_the_first_bad_row(rows, end, mark, ascii_only, suffix, cuts):
    data = ("\ufeff" * mark + end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)).encode()
    if suffix:
        data = b"".join(packed(suffix, data, cuts))
    right = [isinstance(row, dict) and isinstance(row.get("text", 0), str | None) for row in rows]
    if not all(right):
        line = 1 + right.index(False) * end.count("\n")
        with pytest.raises(ValueError, match=rf"a\.jsonl{re.escape(suffix)}, line {line}: "):
            read(f"a.jsonl{suffix}", data)
    else:
        assert read(f"a.jsonl{suffix}", data) == [row["text"] for row in rows]


@examples(100)
@given(data=st.binary(max_size=60) | st.lists(TEXT, max_size=5).map(lambda parts: "".join(parts).encode()))
def test_bytes_are_the_text_or_an_error_that_names_the_byte(data):
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        with pytest.raises(ValueError, match=r"a.txt is not UTF-8: byte 0x.. at offset"):
            read("a.txt", data)
        return
    assert "".join(read("a.txt", data)) == text


@examples(150)
@given(
    lines=st.lists(TEXT, min_size=1, max_size=4),
    suffix=st.sampled_from([*PACKERS]),
    cuts=st.lists(st.integers(0, 200), max_size=2),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.none() | st.integers(0, 7),
)
def test_damage_in_a_compressed_file_is_an_error_or_changes_nothing(lines, suffix, cuts, place, flip):
    """Cut off the end, or flip one bit. A cut between two members leaves a whole file, which nothing can tell."""
    rows = [{"text": line} for line in lines]
    members = packed(suffix, "\n".join(json.dumps(row) for row in rows).encode(), cuts)
    data = b"".join(members)
    position = int(place * len(data))
    if flip is None:
        assume(position not in {sum(map(len, members[:i])) for i in range(len(members))})
        damaged = data[:position]
    else:
        damaged = data[:position] + bytes([data[position] ^ 1 << flip]) + data[position + 1 :]
    try:
        found = read(f"a.jsonl{suffix}", damaged)
    except ValueError as error:
        assert f"a.jsonl{suffix}" in str(error)
        return
    assert found == lines
