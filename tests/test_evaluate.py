import copy
import json
import math
import re
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from streaming import StreamingDataset
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.data.evaluation import rows
from llmfoundry_wesar.data.shards import prepare
from llmfoundry_wesar.evaluate import _CHUNK, TASKS, Evaluation, evaluate, round_weights, token_perplexity
from llmfoundry_wesar.export.files import export, load
from llmfoundry_wesar.runs.compare import plan, run_series
from llmfoundry_wesar.runs.scalars import read_scalars
from tests.distributed import REPOSITORY
from tests.evaluation_files import LAMBADA, write
from tests.recorder import Recorder
from tests.trained import LENGTH, TEXT, VOCABULARY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("evaluation") / "data", packed=True)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "wesar"
    export(trained["wesar"].folder, folder)
    return folder


@pytest.fixture(scope="module")
def scored(exported, data) -> Evaluation:
    return evaluate(exported, data=data, batch_size=2)


def test_the_perplexity_per_token_is_its_definition(trained):
    """The reference predicts one token at a time, in windows of 64 tokens that begin without context.

    1e-5, because the losses are float32 sums of a thousand terms.
    """
    model, tokenizer = load(trained["wesar"].folder)
    documents = [TEXT[:1000], TEXT[1000:1900]]
    ids = [token for text in documents for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    losses = []
    for start in range(0, len(ids), LENGTH):
        window = torch.tensor([ids[start : start + LENGTH]])
        for i in range(1, window.size(1)):
            losses.append(F.cross_entropy(model(window[:, :i]).logits[0, -1:], window[:, i]).item())
    expected = math.exp(sum(losses) / len(losses))
    assert token_perplexity(model, tokenizer, documents, LENGTH, batch_size=3) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="there is no text"):
        token_perplexity(model, tokenizer, [], LENGTH)


class Bigrams(nn.Module):
    """Logits of the next token that depend on the last one only, in bfloat16."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.scores = nn.Embedding.from_pretrained(torch.randn(vocabulary, vocabulary, dtype=torch.bfloat16))
        self.before = lambda: None

    def forward(self, ids: torch.Tensor) -> CausalLMOutput:
        assert self.before() is None, "the logits of the batch before are still in memory"
        logits = self.scores(ids)
        self.before = weakref.ref(logits)
        return CausalLMOutput(logits=logits)


def test_the_perplexity_per_token_needs_no_second_tensor_of_all_logits(monkeypatch):
    """In float32, whose tensors are counted here, there is at most a chunk of positions of one window."""
    torch.manual_seed(0)
    vocabulary, context = 30, 2 * _CHUNK + 9
    ids, model = torch.randint(0, vocabulary, (5 * context + _CHUNK,)), Bigrams(vocabulary)
    monkeypatch.setattr("llmfoundry_wesar.evaluate.encode", lambda tokenizer, texts: [ids.tolist()])
    with Recorder() as recorder:
        perplexity = token_perplexity(model, None, ["text"], context, batch_size=2)  # type: ignore[arg-type]
    assert recorder.largest[torch.bfloat16] == 2 * context * vocabulary
    assert recorder.largest[torch.float32] == _CHUNK * vocabulary
    losses = [
        F.cross_entropy(model.scores(window[:-1]).double(), window[1:], reduction="none")
        for window in ids.split(context)
    ]
    assert perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-6)


def test_an_error_per_token_comes_before_the_harness(exported, data, monkeypatch):
    """All scores of the harness come at its end. Hours of work would be lost if another score failed after it."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("llmfoundry_wesar.evaluate.token_perplexity", out_of_memory)
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: pytest.fail("the harness has run"))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(exported, "copa,wikitext", data)


def with_special_tokens(tokenizer, start: bool, end: bool):
    """A tokenizer that puts a BOS before each text, or an EOS after it."""
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "Q"  # a token of the vocabulary
    parts = ["Q"] * start + ["$A"] + [changed.eos_token] * end
    known = [(token, changed.convert_tokens_to_ids(token)) for token in ("Q", changed.eos_token)]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=parts, special_tokens=known)
    return changed


@pytest.mark.parametrize("start, end", [(False, False), (True, False), (False, True), (True, True)])
def test_text_is_scored_as_training_sees_it(start, end, trained, tmp_path):
    """Tokens by hand, which `data` writes with the same tokenizer, and the loss on their windows."""
    model, plain = load(trained["wesar"].folder)
    tokenizer = with_special_tokens(plain, start, end)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    documents = [TEXT[:2000], TEXT[2000:3000]]
    ids = []
    for text in documents:
        ids += [tokenizer.bos_token_id] * start + plain(text).input_ids + [plain.eos_token_id]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options = {"val_fraction": 1, "shuffle": False, "tokenizer": str(tmp_path / "tokenizer")}
    prepare(tmp_path / "shards", [tmp_path / "text.jsonl"], sequence_length=LENGTH, **options)
    written = StreamingDataset(local=str(tmp_path / "shards"), split="val", shuffle=False, batch_size=1)
    assert [token for row in written for token in row["tokens"].tolist()] == ids[: len(ids) // LENGTH * LENGTH]
    losses = []
    for i in range(0, len(ids), LENGTH):
        window = torch.tensor([ids[i : i + LENGTH]])
        losses.append(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    assert token_perplexity(model, tokenizer, documents, LENGTH) == pytest.approx(expected, rel=1e-5)


def test_the_harness_sees_the_bos_and_no_eos_before_the_answer(exported, data, tmp_path):
    """LAMBADA's score by hand, of a model whose tokenizer adds both."""
    model, plain = load(exported)
    shutil.copytree(exported, tmp_path / "model")
    tokenizer = with_special_tokens(plain, start=True, end=True)
    tokenizer.save_pretrained(tmp_path / "model")
    losses = []
    for text in LAMBADA:
        context, _, word = text.rpartition(" ")
        prompt = [tokenizer.bos_token_id, *plain(context).input_ids]
        target = plain(" " + word).input_ids
        logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(target), reduction="sum").item())
    scores = evaluate(tmp_path / "model", "lambada", data).scores["lambada"]
    assert scores["of the last word"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_the_harness_scores_the_model_that_was_given(scored, exported):
    """The scores of LAMBADA's last words agree with those computed here from the logits."""
    model, tokenizer = load(exported)
    log_probabilities, hits = [], []
    for text in LAMBADA:
        context, _, word = text.rpartition(" ")
        prompt, target = tokenizer(context).input_ids, tokenizer(" " + word).input_ids
        logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probabilities.append(logits[range(len(target)), target].sum().item())
        hits.append(logits.argmax(-1).tolist() == target)
    expected = math.exp(-sum(log_probabilities) / len(LAMBADA))
    assert scored.scores["lambada"]["of the last word"] == pytest.approx(expected, rel=1e-4)
    assert scored.scores["lambada"]["ACC"] == sum(hits) / len(LAMBADA)


def test_all_columns_of_the_tables_are_printed(scored):
    assert scored.scores.keys() == TASKS.keys() and not scored.missing
    assert scored.context == LENGTH
    assert scored.examples["multirc"] == 4 and scored.examples["boolq"] == 2
    perplexities, superglue = str(scored).split("\n\n")[1:3]
    assert perplexities.splitlines()[0].split()[-2:] == ["WikiText", "LAMBADA"]
    assert f"per token, all text, in windows of {LENGTH} tokens" in perplexities
    assert "per word, as lm-evaluation-harness reports it" in perplexities
    head, *metrics = [line.split() for line in superglue.splitlines()]
    assert head[-9:] == ["BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC", "Total"]
    assert [line[0] for line in metrics] == ["ACC", "EM", "F1"]
    assert [line[1:].count("–") for line in metrics] == [1, 7, 6]


def test_a_checkpoint_scores_what_its_export_does(scored, trained, data):
    """The gated model and the merged one have the same scores.

    Their logits differ by at most 1e-5, perplexities by 1e-4.
    """
    gated = evaluate(trained["wesar"].folder, data=data)
    for task, scores in scored.scores.items():
        assert gated.scores[task] == pytest.approx(scores, rel=1e-4), task


def test_low_precision_is_that_of_the_exported_weights(trained, tmp_path):
    """The rounded weights are the exported ones to the bit. RoPE's frequencies are not rounded, as in transformers."""
    export(trained["wesar"].folder, tmp_path / "mpt", format="mpt", dtype="bfloat16")
    written = torch.load(tmp_path / "mpt" / "checkpoint.pt")["state"]["model"]
    model, _ = load(trained["wesar"].folder)
    frequencies = dict(model.named_buffers())
    assert [name for name in frequencies if name.endswith("inv_freq")]
    rounded = round_weights(model, torch.bfloat16)
    torch.testing.assert_close(rounded.state_dict(prefix="model."), written, rtol=0, atol=0)
    torch.testing.assert_close(dict(rounded.named_buffers()), frequencies, rtol=0, atol=0)


def test_a_model_without_a_plain_form_is_scored_too(trained, data):
    """The model has Post-LN, as in some rows of Table 6.

    Its score per token is that of the logits, with an EOS per article.

    Rounding to bfloat16 changes each weight by at most 0.4%, and the perplexity by less than 5%.
    """
    folder = trained["sigma_reparam_post_ln"].folder
    pages = [row["page"] for row in rows(data, "wikitext")["test"]]
    model, tokenizer = load(folder)
    expected = token_perplexity(model, tokenizer, pages, LENGTH)
    scores = evaluate(folder, "wikitext", data).scores["wikitext"]
    assert scores["per token"] == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(scores["per word"])
    rounded = token_perplexity(round_weights(model, torch.bfloat16), tokenizer, pages, LENGTH)
    assert rounded == pytest.approx(expected, rel=5e-2) and rounded != expected


def test_totals_are_those_of_the_papers_table():
    """Row WeSaR of Table 8: only a mean over all examples gives its totals 57.73, 76.68 and 77.16."""
    accuracies = {"boolq": 61.62, "copa": 76.00, "multirc": 56.81, "rte": 50.54, "wic": 48.75, "wsc": 44.23}
    scores = {task: {"ACC": value} for task, value in accuracies.items()}
    scores |= {"cb": {"ACC": 41.07, "F1": 38.54}, "record": {"EM": 76.68, "F1": 77.37}}
    examples = {
        "boolq": 3270,
        "cb": 56,
        "copa": 100,
        "multirc": 4848,
        "rte": 277,
        "wic": 638,
        "wsc": 104,
        "record": 10000,
    }
    evaluation = Evaluation("", 2048, scores, examples, {})
    totals = [evaluation.total(metric) for metric in ("ACC", "EM", "F1")]
    assert totals == pytest.approx([57.73, 76.68, 77.16], abs=0.01)  # the table gives its values to 0.01


def test_a_missing_task_is_said_and_not_averaged_away(exported, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # not a repository of git
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the command does, which comes too late for an imported tqdm
    folder = write(tmp_path / "data", packed=False, without=("ReCoRD",))
    arguments = [
        "evaluate",
        str(exported),
        "--data",
        str(folder),
        "--limit",
        "1",
        "--out",
        str(tmp_path / "scores.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Running loglikelihood" not in result.stderr and "fatal" not in capfd.readouterr().err
    assert "ReCoRD was not scored: " in result.stdout
    assert "Only the first 1 examples of each task were scored: do not compare" in result.stdout
    written = json.loads((tmp_path / "scores.json").read_text())
    assert "record" not in written["scores"]
    assert written["superglue_total"]["EM"] is written["superglue_total"]["F1"] is None
    assert written["superglue_total"]["ACC"] is not None
    assert set(written["examples"].values()) == {1}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tasks", "record"], "ReCoRD/train.jsonl"),
        (["--tasks", "hellaswag"], "'hellaswag' is not paper or one of wikitext, lambada,"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--data", "nowhere"], "nowhere/wikitext2_test.raw: no such file"),
        (["--data", "nowhere", "--device", "gpu"], "--device gpu: "),
    ],
)
def test_what_cannot_be_scored_is_one_line(options, words, exported, tmp_path):
    folder = write(tmp_path / "data", packed=False, without=("ReCoRD",))
    result = CliRunner().invoke(app, ["evaluate", str(exported), "--data", str(folder), *options])
    assert result.exit_code == 1 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert words in line


def test_a_model_is_looked_for_before_data_are_downloaded(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "none")])
    assert result.exit_code == 1 and result.stderr.endswith("none: no such file or folder.\n")


# Make the paper's 130M YAML small enough for two CPU cores: two blocks, d = 32.
SHRUNK = [f"max_seq_len={LENGTH}", "max_duration=4ba", "global_train_batch_size=8", "device_train_microbatch_size=4"]
SHRUNK += ["device_eval_batch_size=4", "precision=fp32", "model.init_device=cpu", f"model.vocab_size={VOCABULARY}"]
SHRUNK += ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "scheduler.t_warmup=2ba", "optimizer.lr=2e-2"]
SHRUNK += ["train_loader.num_workers=1", "eval_interval=1dur", "save_folder=checkpoints", "save_interval=1dur"]
SHRUNK += ["compile_config=null"]  # code generation for a CPU takes a minute


def test_the_papers_yaml_logs_the_perplexities_that_evaluate_gives(tmp_path):
    """The YAML has three labelled loaders. The first one gives the held-out loss of `compare`.

    Loader and `evaluate` measure the same per token: the same documents, each followed by an EOS, in the same windows.
    But a loader drops a shorter last window, so the texts here fill whole windows. 1e-5 allows for float32 sums in
    another order.
    """
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.split("\n\n")))
    prepare(tmp_path / "data", [source], sequence_length=LENGTH, vocab_size=VOCABULARY, val_fraction=0.1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data/tokenizer")
    folder = write(tmp_path / "files", packed=False)
    variables = [f"variables.data={tmp_path / 'data'}"]
    for task, name, key in (("wikitext", "wikitext2_test.raw", "page"), ("lambada", "lambada_test.jsonl", "text")):
        # Add an x to a word, which adds one token, until the last window is full.
        while sum(len(tokenizer(row[key]).input_ids) + 1 for row in rows(folder, TASKS[task].name)["test"]) % LENGTH:
            (folder / name).write_text(re.sub("(mat|well)", r"\1x", (folder / name).read_text(), count=1))
        command = ["data", str(tmp_path / task), "--source", str(folder / name), "--tokenizer"]
        command += [str(tmp_path / "data/tokenizer"), "--sequence-length", str(LENGTH), "--val-fraction", "1"]
        assert CliRunner().invoke(app, [*command, "--no-shuffle"]).exit_code == 0
        variables.append(f"variables.{task}={tmp_path / task}")
    out = tmp_path / "series"
    [run] = plan(str(REPOSITORY / "yamls/130m.yaml"), ["wesar"], [1], out, overrides=[*SHRUNK, *variables])
    [row] = run_series([run], out)
    assert row["status"] == "finished", (out / "logs" / f"{run.name}.txt").read_text()[-4000:]
    logged = read_scalars(out / "tensorboard" / run.name)
    losses = {k: logged[f"metrics/eval/{k}/LanguageCrossEntropy"][1][-1] for k in ("val", "wikitext", "lambada")}
    assert float(row["held_out_loss"]) == losses["val"] and len(set(losses.values())) == 3
    scores = evaluate(out / "checkpoints" / run.name, "wikitext,lambada", folder).scores
    for task in ("wikitext", "lambada"):
        assert logged[f"metrics/eval/{task}/LanguagePerplexity"][1][-1] == pytest.approx(
            scores[task]["per token"], rel=1e-5
        )
