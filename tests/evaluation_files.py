"""Write a small folder of evaluation data in the files' own formats."""

import json
import lzma
import tarfile
from pathlib import Path

ARTICLE = """ \n = First = \n \n It was @-@ well – a text , and it said : " no " . \n
 = = Section = = \n \n More of it . \n"""
WIKITEXT = f"{ARTICLE} \n = Second ( article ) = \n \n The second one . \n "
LAMBADA = [
    f"The {word} sat on the mat, and nobody but the {word} sat on the other {word}" for word in ("cat", "dog", "owl")
]

# One line of each file, the end of the prompt that the harness makes of it, and the right answer.
BOOLQ = {"question": "is it so", "passage": "It -- It is so.", "idx": 0, "label": True}
CB = {"premise": "It is not so.", "hypothesis": "it is so", "label": "contradiction", "idx": 0}
COPA = {
    "premise": "It fell.",
    "choice1": "It rose.",
    "choice2": "It broke.",
    "question": "effect",
    "label": 1,
    "idx": 0,
}
MULTIRC = {
    "idx": 0,
    "version": 1.1,
    "passage": {
        "text": "It is here.",
        "questions": [
            {
                "question": "Where?",
                "answers": [{"text": "There", "idx": 0, "label": 0}, {"text": "Here", "idx": 1, "label": 1}],
            }
        ],
    },
}
RECORD = {
    "source": "news",
    "passage": {
        "text": "Ann met Bob.\n@highlight\nThey met",
        "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}],
    },
    "qas": [{"query": "@placeholder was met", "answers": [{"start": 8, "end": 10, "text": "Bob"}], "idx": 0}],
    "idx": 0,
}
RTE = {"premise": "It is so.", "hypothesis": "It is not so.", "label": "not_entailment", "idx": 0}
WIC = {
    "word": "way",
    "sentence1": "A way.",
    "sentence2": "No way!",
    "idx": 0,
    "label": False,
    "start1": 2,
    "start2": 3,
    "end1": 5,
    "end2": 6,
}
WSC = {
    "text": "We saw the bag as it was open.",
    "target": {"span2_index": 5, "span1_index": 2, "span1_text": "The bag", "span2_text": "it"},
    "idx": 0,
    "label": True,
}
LINES = {
    "BoolQ": BOOLQ,
    "CB": CB,
    "COPA": COPA,
    "MultiRC": MULTIRC,
    "ReCoRD": RECORD,
    "RTE": RTE,
    "WiC": WIC,
    "WSC": WSC,
}
ANSWERS = {
    "boolq": ("It -- It is so.\nQuestion: is it so?\nAnswer:", "yes"),
    "cb": ("It is not so.\nQuestion: it is so. True, False, or Neither?\nAnswer:", "False"),
    "copa": ("It fell therefore", " it broke."),
    # In its versions 1 and 2 the harness expects "yes" for an answer that the file marks as wrong, and "no" for a right
    # one.
    "multirc": ("It is here.\nQuestion: Where?\nAnswer:", "There\nIs the answer correct? yes"),
    "record": ("Ann met Bob.\n\n  - They met.\n", "  - Bob was met"),
    "rte": ("It is so.\nQuestion: It is not so. True or False?\nAnswer:", "False"),
    "wic": ("Question: Is the word 'way' used in the same way in the two sentences above?\nAnswer:", "no"),
    "wsc": (
        'as *it* was open.\nQuestion: In the passage above, does the pronoun "*it*" refer to "*the bag*"?\nAnswer:',
        "yes",
    ),
}


def write(folder: Path, packed: bool, without: tuple[str, ...] = ()) -> Path:
    """Write the folder, with plain or .xz files, and without some of SuperGLUE's tasks."""
    folder.mkdir()
    texts = {
        "wikitext2_test.raw": WIKITEXT,
        "lambada_test.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in LAMBADA),
    }
    for name, text in texts.items():
        if packed:
            with lzma.open(folder / f"{name}.xz", "wt", encoding="utf-8") as file:
                file.write(text)
        else:
            (folder / name).write_text(text, encoding="utf-8")
    for task, line in LINES.items():
        if task not in without:
            (folder / "superglue" / task).mkdir(parents=True)
            for split, numbers in {"train": range(1, 7), "val": range(2)}.items():
                lines = [json.dumps(line | {"idx": number}) for number in numbers]
                (folder / "superglue" / task / f"{split}.jsonl").write_text("\n".join(lines))
    if packed:
        with tarfile.open(folder / "superglue.tar.xz", "w:xz") as archive:
            archive.add(folder / "superglue", "superglue")
        for path in sorted((folder / "superglue").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (folder / "superglue").rmdir()
    return folder
