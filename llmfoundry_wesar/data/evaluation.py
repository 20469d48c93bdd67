"""Read local copies of the paper's evaluation data, in the form in which lm-evaluation-harness gets them from the Hub.

    DIR/wikitext2_test.raw       raw test set of WikiText-2 (or 103); an article is a document
    DIR/lambada_test.jsonl       OpenAI's LAMBADA test set; each line has a field "text"
    DIR/superglue/TASK/*.jsonl   SuperGLUE as its authors publish it, with TASK one of BoolQ, CB, COPA, MultiRC, ReCoRD,
                                 RTE, WiC, WSC; val.jsonl is scored, train.jsonl gives the few-shot examples

The first two may be compressed, with .xz added to their names. `superglue` may be the archive `superglue.tar.xz`.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmfoundry_wesar.data.reading import decoded, entry, read_json_lines, read_texts, unpacked

Row = dict[str, Any]


def _strings(row: Row, keys: str, where: str) -> Row:
    return {key: entry(row, key, str, where) for key in keys.split()}


def _label(row: Row, where: str) -> int:
    label = row.get("label")
    if label not in (0, 1):  # also false and true
        raise ValueError(f"{where}: 'label' is {label!r}, not one of false, true, 0, 1")
    return int(label)


def _plain(keys: str) -> Callable[[Row, str], Iterator[Row]]:
    """Return the reader of a task whose row is an example, with strings under the keys and a boolean label."""
    return lambda row, where: iter([{**row, **_strings(row, keys, where), "label": _label(row, where)}])


def _named(keys: str, *labels: str) -> Callable[[Row, str], Iterator[Row]]:
    """As `_plain`, for a label that is one of several words."""

    def read(row: Row, where: str) -> Iterator[Row]:
        strings, label = _strings(row, keys, where), entry(row, "label", str, where)
        if label not in labels:
            raise ValueError(f"{where}: 'label' is {label!r}, not one of {', '.join(labels)}")
        yield {**row, **strings, "label": labels.index(label)}

    return read


def _multirc(row: Row, where: str) -> Iterator[Row]:
    passage = entry(row, "passage", dict, where)
    text = entry(passage, "text", str, where)
    for question in entry(passage, "questions", list, where):
        for answer in entry(question, "answers", list, where):
            yield {
                "idx": entry(row, "idx", int, where),
                "paragraph": text,
                "question": entry(question, "question", str, where),
                "answer": entry(answer, "text", str, where),
                "label": _label(answer, where),
            }


def _record(row: Row, where: str) -> Iterator[Row]:
    passage = entry(row, "passage", dict, where)
    text = entry(passage, "text", str, where)
    spans = [
        (entry(e, "start", int, where), entry(e, "end", int, where)) for e in entry(passage, "entities", list, where)
    ]
    for start, end in spans:
        if not 0 <= start <= end < len(text):
            raise ValueError(f"{where}: an entity is from {start} to {end}, but the text has {len(text)} characters")
    entities = sorted({text[start : end + 1] for start, end in spans})
    for question in entry(row, "qas", list, where):
        answers = sorted({entry(answer, "text", str, where) for answer in entry(question, "answers", list, where)})
        yield {
            "idx": entry(row, "idx", int, where),
            "passage": text,
            "query": entry(question, "query", str, where),
            "entities": entities,
            "answers": answers,
        }


def _wsc(row: Row, where: str) -> Iterator[Row]:
    """Correct spans that differ from the text, as the Hub's variant `wsc.fixed` does."""
    text, target = entry(row, "text", str, where), dict(entry(row, "target", dict, where))
    words = text.split()
    for span in ("span1", "span2"):
        first, written = entry(target, f"{span}_index", int, where), entry(target, f"{span}_text", str, where)
        if not 0 <= first < len(words):
            raise ValueError(f"{where}: '{span}_index' is {first}, but the text has {len(words)} words")
        if written not in text:
            target[f"{span}_text"] = " ".join(words[first : first + len(written.split())]).rstrip(".,;")
    yield {"idx": entry(row, "idx", int, where), "text": text, **target, "label": _label(row, where)}


# lm-evaluation-harness's name of a task → its folder, and the function that turns a line of its files into rows.
_SUPERGLUE: dict[str, tuple[str, Callable[[Row, str], Iterable[Row]]]] = {
    "boolq": ("BoolQ", _plain("question passage")),
    "cb": ("CB", _named("premise hypothesis", "entailment", "contradiction", "neutral")),
    "copa": ("COPA", _plain("premise choice1 choice2 question")),
    "multirc": ("MultiRC", _multirc),
    "record": ("ReCoRD", _record),
    "sglue_rte": ("RTE", _named("premise hypothesis", "entailment", "not_entailment")),
    "wic": ("WiC", _plain("word sentence1 sentence2")),
    "wsc": ("WSC", _wsc),
}


def _texts(path: Path) -> list[str]:
    for file in (path.with_name(f"{path.name}.xz"), path):
        if file.is_file():
            texts = []
            for text, where, _ in read_texts(file, "text"):
                if not text:
                    raise ValueError(
                        f"{where}: 'text' is {'null' if text is None else 'empty'}, but each line is scored"
                    )
                texts.append(text)
            return texts
    raise FileNotFoundError(f"{path}: no such file, and no {path.name}.xz either.")


def _superglue(folder: Path, name: str) -> list[tuple[str, Any]]:
    """Return the place and the JSON value of each line of a file of SuperGLUE."""
    archive = folder / "superglue.tar.xz"
    if archive.is_file():
        with unpacked(archive) as (_, stream):
            data = stream.read()  # the whole archive, because its checksums are at the end
        place = f"{archive}, superglue/{name}"
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as members:
                file = members.extractfile(f"superglue/{name}")
        except KeyError:
            raise FileNotFoundError(f"{archive}: has no file superglue/{name}.") from None
        except tarfile.TarError as error:
            raise ValueError(f"{archive} is not a tar archive: {error}; get it again") from error
        content = b"" if file is None else file.read()
    else:
        path = folder / "superglue" / name
        place, content = str(path), path.read_bytes()
    rows = list(read_json_lines(place, decoded(place, io.BytesIO(content))))
    if not rows:
        raise ValueError(f"{place} is empty; get it again")
    return rows


def rows(folder: str | Path, task: str) -> dict[str, list[Row]]:
    """Read the data of one task.

    Args:
        folder: DIR.
        task: lm-evaluation-harness's name: wikitext, lambada_openai, or one of SuperGLUE's.

    Returns:
        Split → rows. The splits are those that the harness asks for: `test`, or `train` and `validation`.

    Raises:
        FileNotFoundError: The folder has no data of the task.
        ValueError: A file is damaged, or a line has not the keys of its task. The message names the file and the line.
    """
    folder = Path(folder)
    if task == "wikitext":
        return {"test": [{"page": text} for text in _texts(folder / "wikitext2_test.raw")]}
    if task == "lambada_openai":
        return {"test": [{"text": text} for text in _texts(folder / "lambada_test.jsonl")]}
    name, rows_of = _SUPERGLUE[task]
    files = {"train": f"{name}/train.jsonl", "validation": f"{name}/val.jsonl"}
    return {
        split: [row for where, line in _superglue(folder, file) for row in rows_of(line, where)]
        for split, file in files.items()
    }
