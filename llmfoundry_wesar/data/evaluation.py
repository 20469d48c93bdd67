"""Read local copies of the paper's evaluation data, in the form in which lm-evaluation-harness gets them from the Hub.

    DIR/wikitext2_test.raw       raw test set of WikiText-2 (or 103); an article is a document
    DIR/lambada_test.jsonl       OpenAI's LAMBADA test set; each line has a field "text"
    DIR/superglue/TASK/*.jsonl   SuperGLUE as its authors publish it, with TASK one of BoolQ, CB, COPA, MultiRC, ReCoRD,
                                 RTE, WiC, WSC; val.jsonl is scored, train.jsonl gives the few-shot examples

The first two may be compressed, with .xz added to their names. `superglue` may be the archive `superglue.tar.xz`.
"""

import json
import lzma
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmfoundry_wesar.data.corpus import read_texts

Row = dict[str, Any]


def _plain(row: Row) -> Iterator[Row]:
    yield {**row, "label": int(row["label"])}


def _named(*labels: str) -> Callable[[Row], Iterator[Row]]:
    return lambda row: iter([{**row, "label": labels.index(row["label"])}])


def _multirc(row: Row) -> Iterator[Row]:
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "idx": row["idx"],
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": int(answer["label"]),
            }


def _record(row: Row) -> Iterator[Row]:
    text = row["passage"]["text"]
    entities = sorted({text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]})
    for question in row["qas"]:
        answers = sorted({answer["text"] for answer in question["answers"]})
        yield {
            "idx": row["idx"],
            "passage": text,
            "query": question["query"],
            "entities": entities,
            "answers": answers,
        }


def _wsc(row: Row) -> Iterator[Row]:
    """Correct spans that differ from the text, as the Hub's variant `wsc.fixed` does."""
    target, words = dict(row["target"]), row["text"].split()
    for span in ("span1", "span2"):
        length = len(target[f"{span}_text"].split())
        if target[f"{span}_text"] not in row["text"]:
            first = target[f"{span}_index"]
            target[f"{span}_text"] = " ".join(words[first : first + length]).rstrip(".,;")
    yield {"idx": row["idx"], "text": row["text"], **target, "label": int(row["label"])}


# lm-evaluation-harness's name of a task → its folder, and the function that turns a line of its files into rows.
_SUPERGLUE: dict[str, tuple[str, Callable[[Row], Iterable[Row]]]] = {
    "boolq": ("BoolQ", _plain),
    "cb": ("CB", _named("entailment", "contradiction", "neutral")),
    "copa": ("COPA", _plain),
    "multirc": ("MultiRC", _multirc),
    "record": ("ReCoRD", _record),
    "sglue_rte": ("RTE", _named("entailment", "not_entailment")),
    "wic": ("WiC", _plain),
    "wsc": ("WSC", _wsc),
}


def _texts(path: Path) -> list[str]:
    for file in (path.with_name(f"{path.name}.xz"), path):
        if file.is_file():
            return [text for text, _ in read_texts(file, "text")]
    raise FileNotFoundError(f"{path}: no such file, and no {path.name}.xz either.")


def _superglue(folder: Path, name: str) -> str:
    archive = folder / "superglue.tar.xz"
    if not archive.is_file():
        return (folder / "superglue" / name).read_text(encoding="utf-8")
    with tarfile.open(archive) as members:
        try:
            file = members.extractfile(f"superglue/{name}")
        except KeyError:
            raise FileNotFoundError(f"{archive}: has no file superglue/{name}.") from None
        assert file is not None
        return file.read().decode()


def rows(folder: str | Path, task: str) -> dict[str, list[Row]]:
    """Read the data of one task.

    Args:
        folder: DIR.
        task: lm-evaluation-harness's name: wikitext, lambada_openai, or one of SuperGLUE's.

    Returns:
        Split → rows. The splits are those that the harness asks for: `test`, or `train` and `validation`.

    Raises:
        FileNotFoundError: The folder has no data of the task.
        ValueError: The data cannot be read.
    """
    folder = Path(folder)
    try:
        if task == "wikitext":
            return {"test": [{"page": text} for text in _texts(folder / "wikitext2_test.raw")]}
        if task == "lambada_openai":
            return {"test": [{"text": text} for text in _texts(folder / "lambada_test.jsonl")]}
        name, rows_of = _SUPERGLUE[task]
        files = {"train": f"{name}/train.jsonl", "validation": f"{name}/val.jsonl"}
        return {
            split: [row for line in _superglue(folder, file).splitlines() for row in rows_of(json.loads(line))]
            for split, file in files.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"{folder}: the data of {task} cannot be read ({error!r}).") from error
