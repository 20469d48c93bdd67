"""Reading, order and split of the documents. test_shards.py tests the later steps."""

import bz2
import gzip
import json
import lzma
from itertools import pairwise

import pyarrow
import pytest

from llmfoundry_wesar.data import corpus as corpus_module
from llmfoundry_wesar.data import reading
from llmfoundry_wesar.data.corpus import Corpus, find_files, open_hub
from tests.evaluation_files import WIKITEXT

TEXTS = [f"document {number}: naïve Δ 漢字\n" + "words " * (number % 7) for number in range(2000)]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts)


def corpus_of(path, text_key="text", seed=17, shuffle=False, val_fraction=0.1):
    return Corpus(list(find_files(str(path)).values()), {}, text_key, seed, shuffle, val_fraction)


def zstd(path, data):
    # Two frames, as parallel compressors write them.
    with path.open("wb") as file:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            with pyarrow.CompressedOutputStream(pyarrow.PythonFile(file, mode="w"), "zstd") as frame:
                frame.write(part)
            file = path.open("ab")


WRITERS = {
    "": lambda path, data: path.write_bytes(data),
    # Two members each.
    ".gz": lambda path, data: path.write_bytes(gzip.compress(data[:99]) + gzip.compress(data[99:])),
    ".xz": lambda path, data: path.write_bytes(lzma.compress(data[:99]) + lzma.compress(data[99:])),
    ".bz2": lambda path, data: path.write_bytes(bz2.compress(data[:99]) + bz2.compress(data[99:])),
    ".zst": zstd,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_packing_of_both_formats_gives_the_texts_exactly(tmp_path, suffix):
    """Line ends and characters beyond ASCII are kept.

    A .txt file is one document, and so is a line of a .jsonl file.
    """
    text = "first\r\nsecond\n\n漢字\n"
    WRITERS[suffix](tmp_path / f"a.jsonl{suffix}", (jsonl(TEXTS) + "\n\n").encode())
    WRITERS[suffix](tmp_path / f"b.txt{suffix}", text.encode())
    assert [document.text for document in corpus_of(tmp_path)] == [*TEXTS, text]


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.test.tokens.gz"])
def test_wikitext_is_cut_into_articles_and_nothing_else(tmp_path, name):
    """The file is cut at headings of the first level, without the line end before them. Sections are not cut."""
    WRITERS[(tmp_path / name).suffix if name.endswith("gz") else ""](tmp_path / name, WIKITEXT.encode())
    texts = [document.text for document in corpus_of(tmp_path)]
    assert [text.splitlines()[0] for text in texts] == [" = First = ", " = Second ( article ) = "]
    # The blank line before the first heading belongs to no article.
    assert "\n".join([" ", *texts]) == WIKITEXT


def test_long_txt_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    """The documents have a bounded size and join to the file, so that one large file has a val split too."""
    monkeypatch.setattr(reading, "TXT_BYTES", 1_000)
    text = "".join(text + "\n" for text in TEXTS)
    (tmp_path / "a.txt").write_text(text)
    cuts = [document.text for document in corpus_of(tmp_path)]
    assert "".join(cuts) == text and len(cuts) > 50
    assert all(cut.endswith("\n") and len(cut.encode()) < 1_100 for cut in cuts)
    assert corpus_of(tmp_path).check(sequence_length=16)["val"] > 1_000
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(text.encode())} "):
        corpus_of(tmp_path).check(sequence_length=16)


def test_split_depends_on_text_and_seed_alone(tmp_path):
    """Equal texts are never in both splits, with any other texts around them. The share is binomial: within 4 sd."""
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    (tmp_path / "b.jsonl").write_text(jsonl(reversed(TEXTS)))
    val = [document.text for document in corpus_of(tmp_path) if document.split == "val"]
    train = [document.text for document in corpus_of(tmp_path) if document.split == "train"]
    assert sorted(val + train) == sorted(TEXTS * 2)
    assert not set(val) & set(train)
    assert abs(len(set(val)) / len(TEXTS) - 0.1) < 4 * (0.1 * 0.9 / len(TEXTS)) ** 0.5
    other_seed = {document.text for document in corpus_of(tmp_path, seed=18) if document.split == "val"}
    assert len(other_seed & set(val)) < len(val) / 4


def test_shuffle_keeps_every_document_within_the_memory_bound(tmp_path, monkeypatch):
    """With a buffer much smaller than the text: the same documents in another order, which the seed determines."""
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    monkeypatch.setattr(corpus_module, "SHUFFLE_BYTES", 10_000)
    order = [TEXTS.index(document.text) for document in corpus_of(tmp_path, shuffle=True)]
    assert sorted(order) == list(range(len(TEXTS)))
    assert order == [TEXTS.index(document.text) for document in corpus_of(tmp_path, shuffle=True)]
    assert order != [TEXTS.index(document.text) for document in corpus_of(tmp_path, shuffle=True, seed=18)]
    adjacent = sum(after - before == 1 for before, after in pairwise(order))
    assert adjacent < len(order) / 50
    # 10,000 bytes are at most 250 of these documents, so no document can move forward by more than that.
    assert all(number - place < 250 for place, number in enumerate(order))


@pytest.mark.parametrize("hub", [False, True])
def test_shuffle_mixes_the_order_of_files(tmp_path, monkeypatch, hub):
    """The files of a Hugging Face data set too, so that a token budget does not go only into the first files."""
    monkeypatch.setattr(corpus_module, "SHUFFLE_BYTES", 0)
    for name in range(20):
        (tmp_path / f"{name:02}.jsonl").write_text(jsonl([str(name)]))
    files = [] if hub else list(find_files(str(tmp_path)).values())
    rows = {"hf": open_hub(f"hf:{tmp_path}", "text")} if hub else {}
    plain, mixed = ([document.text for document in Corpus(files, rows, "text", 17, mix, 0.1)] for mix in (False, True))
    assert plain == [str(name) for name in range(20)]
    assert mixed != plain and sorted(mixed) == sorted(plain)


def test_hugging_face_source_names_configuration_and_split(tmp_path):
    """`datasets` reads a local folder with a card's header in the same way as one on the Hub."""
    card = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}_train.jsonl}}\n"
        f"  - {{split: test, path: {name}_test.jsonl}}\n"
        for name in ("default", "en")
    )
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    for part in ("default_train", "default_test", "en_train", "en_test"):
        (tmp_path / f"{part}.jsonl").write_text(jsonl([part]))
    for end, part in {"": "default_train", "@test": "default_test", ":en": "en_train", ":en@test": "en_test"}.items():
        assert [row["text"] for row in open_hub(f"hf:{tmp_path}{end}", "text")] == [part]


def test_the_script_of_a_data_set_is_not_run(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        open_hub(f"hf:{tmp_path}", "text")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("@val", r": Bad split: val. Available splits: \['train'\]; name one that exists, as in hf:NAME"),
        (":de", r": .*'de' not found. Available: \['default'\]; name one that exists, as in hf:NAME"),
        (":en@", r" is not of the form hf:NAME\[:CONFIG\]\[@SPLIT\]"),
        ("@test:en", " is not of the form"),
        (":", " is not of the form"),
    ],
)
def test_wrong_hugging_face_source_is_refused(tmp_path, end, message):
    (tmp_path / "a.jsonl").write_text(jsonl(["a"]))
    with pytest.raises(ValueError, match=f"^source hf:{tmp_path}{end}{message}"):
        open_hub(f"hf:{tmp_path}{end}", "text")


def test_stdlib_is_library_modules_only():
    names = find_files("stdlib")
    assert "stdlib/json/decoder.py" in names and "stdlib/argparse.py" in names
    assert not any(part in name for name in names for part in ("/test/", "/tests/", "-packages/", "/encodings/"))


def test_a_line_of_json_lines_ends_at_a_line_feed_alone(tmp_path):
    """Other programs write these characters in strings as they are. A mark at the start is no part of the text."""
    texts = ["a\u2028b\u2029c\x85d\x7fe", "f", "\ufeffg"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{lines}".encode())
    (tmp_path / "b.txt").write_bytes("\ufefffirst\x0b\x0c\x1c\rsecond".encode())
    assert [document.text for document in corpus_of(tmp_path)] == [*texts, "first\x0b\x0c\x1c\rsecond"]


@pytest.mark.parametrize("hub", [False, True])
def test_rows_without_text_are_skipped_and_counted(tmp_path, hub):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n{"text": null}\n')
    corpus = corpus_of(tmp_path)
    where = f"{tmp_path / 'a.jsonl'}, line "
    if hub:
        corpus = Corpus([], {"hf:x": open_hub(f"hf:{tmp_path}", "text")}, "text", 17, False, 0.1)
        where = "source hf:x, row "
    assert [document.text for document in corpus] == ["a"]
    assert corpus.skipped == {"null": (2, f"{where}1"), "empty": (1, f"{where}3")}


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"body": "x"}],
            "row 1: the key 'text' is missing; the keys are 'body'; .* text_key to the key with the text",
        ),
        ([{"text": ["x"]}], "row 1: 'text' is an array, not a string"),
    ],
)
def test_what_is_wrong_with_a_hugging_face_row_is_said(tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        open_hub(f"hf:{tmp_path}", "text")


JSON_X = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"good \xff bad", r"a.txt is not UTF-8: byte 0xff at offset 5 "),
        ("a.txt", b"\xef\xbb\xbfgood \xff bad", r"a.txt is not UTF-8: byte 0xff at offset 8 "),
        ("a.jsonl", JSON_X + b'{"text": "\xe4"}\n', r"a.jsonl is not UTF-8: byte 0xe4 at offset 24 "),
        ("a.jsonl.gz", gzip.compress(JSON_X + b'{"text": "\xe4"}\n', mtime=0), r"gz is not UTF-8.* offset 24 "),
        (
            "a.jsonl",
            JSON_X + b'\n{"body": "y"}\n',
            r"a.jsonl, line 3: the key 'text' is missing; .* are 'body'; .*text_key",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl, line 1: 'text' is a number, not a string"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl, line 1: an array where an object with the key 'text' is needed"),
        ("a.jsonl", b"null\n", r"a.jsonl, line 1: null where an object"),
        ("a.jsonl", b'{"text": "x"\n', r"a.jsonl, line 1: broken JSON: Expecting ',' delimiter"),
        ("a.jsonl", JSON_X[:-1] + b"\r" + JSON_X, r"a.jsonl, line 1: broken JSON: Extra data"),
        ("a.jsonl", b"[" * 99_999, r"a.jsonl, line 1: broken JSON: maximum recursion depth"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl, line 1: 'text' has '\\ud800', half of a surrogate pair"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a.txt.gz is damaged, .*: its end is missing"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"a.txt.xz is damaged, .*: its end is missing"),
        ("a.txt.xz", lzma.compress(b"text") + b"damaged", r"a.txt.xz is damaged, "),
        ("a.txt.bz2", bz2.compress(b"text") + b"damaged", r"a.txt.bz2 is damaged, "),
        ("a.txt.gz", gzip.compress(b"text", mtime=0) + b"damaged", r"a.txt.gz is damaged, "),
        ("a.txt.xz", b"no xz at all", r"a.txt.xz is damaged, or not in the .xz format"),
        ("a.txt.zst", b"no zstd at all", r"a.txt.zst is damaged, or not in the .zst format"),
        *((f"a.txt{suffix}", b"", rf"a.txt{suffix} is empty, so") for suffix in WRITERS if suffix),
        ("a.jsonl", b"", r"a.jsonl is empty; remove it or get it again"),
        ("a.raw", b" \n", r"a.raw is empty"),
        ("a.txt", b"", r"the train split has 0 bytes"),
    ],
)
def test_check_names_the_file_and_the_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        corpus_of(tmp_path).check(sequence_length=16)


@pytest.mark.parametrize("name, message", [("notes.md", "notes.md is not named"), (".", "has no file named")])
def test_sources_without_readable_files_are_refused(tmp_path, name, message):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=message):
        find_files(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="missing"):
        find_files(str(tmp_path / "missing"))
