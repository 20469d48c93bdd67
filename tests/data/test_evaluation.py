import json

import pytest

from llmfoundry_wesar.data.evaluation import rows
from llmfoundry_wesar.evaluate import TASKS, _harness_tasks
from tests.evaluation_files import ANSWERS, LAMBADA, WIKITEXT, write


@pytest.mark.parametrize("packed", [False, True])
def test_the_harness_asks_what_the_files_say(packed, tmp_path):
    """Prompt and right answer of each SuperGLUE task.

    With a wrong order of labels the harness would score the opposite.
    """
    tasks, missing = _harness_tasks(list(TASKS), write(tmp_path / "data", packed))
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
    tasks, missing = _harness_tasks(["cb", "record"], write(tmp_path / "data", packed, without=("ReCoRD",)))
    assert list(tasks) == ["cb"]
    assert list(missing) == ["record"] and "ReCoRD/train.jsonl" in missing["record"]


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "data", packed=False)
    (folder / "superglue/CB/val.jsonl").write_text(json.dumps({"premise": "no label"}))
    with pytest.raises(ValueError, match="the data of cb cannot be read"):
        rows(folder, "cb")
    (folder / "lambada_test.jsonl.xz").write_bytes(b"not xz")
    with pytest.raises(ValueError, match="the data of lambada_openai cannot be read"):
        rows(folder, "lambada_openai")
