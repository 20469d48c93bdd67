import json
import lzma
import tarfile

import pytest

from llmfoundry_wesar.data.evaluation import rows
from llmfoundry_wesar.evaluate import TASKS, _harness_tasks, _task_manager
from tests.evaluation_files import ANSWERS, BOOLQ, LAMBADA, LINES, WIKITEXT, WSC, write


@pytest.mark.parametrize("packed", [False, True])
def test_the_harness_asks_what_the_files_say(packed, tmp_path):
    """Prompt and right answer of each SuperGLUE task.

    With a wrong order of labels the harness would score the opposite.
    """
    tasks, missing = _harness_tasks(_task_manager(), list(TASKS), write(tmp_path / "data", packed))
    assert not missing and list(tasks) == list(TASKS)
    for name, (prompt, answer) in ANSWERS.items():
        task = tasks[name]
        document = next(iter(task.eval_docs))
        assert task.doc_to_text(document).endswith(prompt), name
        choices = task.doc_to_choice(document)
        target = task.doc_to_target(document)
        assert (target if isinstance(target, str) else choices[target]) == answer, name
        assert task.config.num_fewshot == 3 and task.has_training_docs(), name
    assert [document["text"] for document in tasks["lambada"].eval_docs] == LAMBADA
    # Articles are tested in test_corpus.
    assert "\n".join([" ", *(document["page"] for document in tasks["wikitext"].eval_docs)]) == WIKITEXT
    assert tasks["wikitext"].config.num_fewshot == tasks["lambada"].config.num_fewshot == 0


def test_every_answer_of_a_multirc_question_is_an_example(tmp_path):
    examples = rows(write(tmp_path / "data", packed=False), "multirc")["validation"]
    assert [(row["answer"], row["label"]) for row in examples] == 2 * [("There", 0), ("Here", 1)]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_missing_is_named(packed, tmp_path):
    tasks, missing = _harness_tasks(
        _task_manager(), ["cb", "record"], write(tmp_path / "data", packed, without=("ReCoRD",))
    )
    assert list(tasks) == ["cb"]
    assert list(missing) == ["record"] and "ReCoRD/train.jsonl" in missing["record"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_ends_at_a_line_feed_alone_and_a_mark_is_no_text(packed, tmp_path):
    """As in test_corpus. These characters are in the text of BoolQ's passages as other programs write them."""
    passage = "It\u2028is\x85so.\x0b"
    lines = [json.dumps(BOOLQ | {"passage": passage, "idx": i}, ensure_ascii=False) for i in range(3)]
    data = ("\ufeff" + "\r\n".join(lines)).encode()
    folder = write(tmp_path / "data", packed=False)
    (folder / "superglue/BoolQ/val.jsonl").write_bytes(data)
    if packed:
        with tarfile.open(folder / "superglue.tar.xz", "w:xz") as archive:
            archive.add(folder / "superglue", "superglue")
    assert [row["passage"] for row in rows(folder, "boolq")["validation"]] == [passage] * 3


@pytest.mark.parametrize(
    ("task", "file", "row", "message"),
    [
        ("cb", "CB", {"label": None}, "val.jsonl, line 1: 'label' is null, not a string"),
        ("cb", "CB", {"label": "yes"}, "line 1: 'label' is 'yes', not one of entailment, contradiction, neutral"),
        ("boolq", "BoolQ", {"label": 2}, "line 1: 'label' is 2, not one of false, true, 0, 1"),
        ("boolq", "BoolQ", {"passage": None}, "line 1: 'passage' is null, not a string"),
        (
            "multirc",
            "MultiRC",
            {"passage": {"text": "x", "questions": [5]}},
            "a number where an object with",
        ),
        ("record", "ReCoRD", {"passage": {"text": "x"}}, "line 1: the key 'entities' is missing; the keys are 'text'"),
        (
            "wsc",
            "WSC",
            {"target": {**WSC["target"], "span1_index": 99}},
            "'span1_index' is 99, but the text has 8",
        ),
    ],
)
def test_a_wrong_row_is_named_by_file_line_and_key(task, file, row, message, tmp_path):
    folder = write(tmp_path / "data", packed=False)
    (folder / f"superglue/{file}/val.jsonl").write_text(json.dumps(LINES[file] | row))
    with pytest.raises(ValueError, match=message):
        rows(folder, task)


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "data", packed=False)
    val, lambada = folder / "superglue/CB/val.jsonl", folder / "lambada_test.jsonl"
    for file, data, task, message in (
        (val, b"", "cb", "val.jsonl is empty"),
        (val, b"[]", "cb", "val.jsonl, line 1: an array where an object with the key 'premise' is needed"),
        (val, b"{}", "cb", "val.jsonl, line 1: the key 'premise' is missing; the keys are none"),
        (val, b"\xff", "cb", "val.jsonl is not UTF-8"),
        (val, b"{", "cb", "val.jsonl, line 1: broken JSON"),
        (lambada, b'{"text": null}', "lambada_openai", "line 1: 'text' is null, but each line is scored"),
        (folder / "lambada_test.jsonl.xz", b"not xz", "lambada_openai", "lambada_test.jsonl.xz is damaged"),
        (folder / "superglue.tar.xz", lzma.compress(b"not tar"), "cb", "superglue.tar.xz is not a tar archive"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            rows(folder, task)


def test_damage_behind_the_file_that_is_read_is_found(tmp_path):
    """The checksum of a member of an .xz file is at its end."""
    archive = write(tmp_path / "data", packed=True) / "superglue.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"superglue.tar.xz is damaged, or not in the .xz format: its end is missing"):
        rows(tmp_path / "data", "boolq")
