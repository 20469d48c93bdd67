"""Score a model as in the paper: perplexities on WikiText and LAMBADA (Table 5), SuperGLUE 3-shot (Table 8).

All scores except the perplexity per token come from EleutherAI's lm-evaluation-harness. The harness gets foundry's MPT
as an object, so it can also score models that transformers does not support, such as Post-LN ones.
"""

import copy
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from llmfoundry_wesar.attention import sdpa_or_stock_attention
from llmfoundry_wesar.data import evaluation as evaluation_data
from llmfoundry_wesar.data.shards import adds_eos, encode
from llmfoundry_wesar.export.conversion import merge
from llmfoundry_wesar.export.files import find_model, load
from llmfoundry_wesar.model import WeSaRMPTForCausalLM

SHOTS = 3  # paper, section 5.4
_FEWSHOT_SEED = 1234  # the default of lm-evaluation-harness
_CHUNK = 256  # positions; with 128,256 tokens in the vocabulary a chunk in float32 has 131 MB


@dataclass(frozen=True)
class Task:
    """A task of the paper.

    Attributes:
        title: Its name in the paper.
        name: Its name in lm-evaluation-harness.
        metrics: Maps the paper's name of a metric (or ours, if the paper has none) to the harness's name.
    """

    title: str
    name: str
    metrics: dict[str, str]


TASKS = {
    "wikitext": Task("WikiText", "wikitext", {"per word": "word_perplexity", "per byte": "byte_perplexity"}),
    "lambada": Task("LAMBADA", "lambada_openai", {"of the last word": "perplexity", "ACC": "acc"}),
    "boolq": Task("BoolQ", "boolq", {"ACC": "acc"}),
    "cb": Task("CB", "cb", {"ACC": "acc", "F1": "f1"}),
    "copa": Task("COPA", "copa", {"ACC": "acc"}),
    "multirc": Task("MultiRC", "multirc", {"ACC": "acc"}),
    "record": Task("ReCoRD", "record", {"EM": "em", "F1": "f1"}),
    "rte": Task("RTE", "sglue_rte", {"ACC": "acc"}),
    "wic": Task("WiC", "wic", {"ACC": "acc"}),
    "wsc": Task("WSC", "wsc", {"ACC": "acc"}),
}
PERPLEXITIES = ("wikitext", "lambada")
SUPERGLUE = tuple(task for task in TASKS if task not in PERPLEXITIES)


@dataclass(frozen=True)
class Evaluation:
    """Scores by task.

    Attributes:
        model: The path of the model.
        context: The model's context length in tokens.
        scores: task -> metric -> value, with the paper's names of metrics, and `per token`.
        examples: Number of examples of each task.
        missing: Requested tasks without data, and the reason.
        limit: Number of examples for each task, or None for all.
    """

    model: str
    context: int
    scores: dict[str, dict[str, float]]
    examples: dict[str, int]
    missing: dict[str, str]
    limit: int | None = None

    def total(self, metric: str) -> float | None:
        """Return the mean of a metric over the examples of all SuperGLUE tasks that have it; None if a task is missing.

        Tasks are weighted by their number of examples, which reproduces the totals of Table 8.
        """
        tasks = [task for task in SUPERGLUE if metric in TASKS[task].metrics]
        if any(task not in self.scores for task in tasks):
            return None
        total = sum(self.scores[task][metric] * self.examples[task] for task in tasks)
        return total / sum(self.examples[task] for task in tasks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the totals, for JSON."""
        return {**asdict(self), "superglue_total": {metric: self.total(metric) for metric in ("ACC", "EM", "F1")}}

    def __str__(self) -> str:
        lines = [self.model, ""]
        perplexities = [task for task in PERPLEXITIES if task in self.scores]
        if perplexities:
            kinds = {
                "per token": f"per token, all text, in windows of {self.context} tokens",
                "per word": "per word, as lm-evaluation-harness reports it",
                "of the last word": "of the last word, as lm-evaluation-harness reports it",
            }
            cells = [["Perplexity (Table 5)", *(TASKS[task].title for task in perplexities)]]
            cells += [
                [text, *(_number(self.scores[task].get(kind)) for task in perplexities)] for kind, text in kinds.items()
            ]
            if "lambada" in perplexities:
                accuracy = _number(self.scores["lambada"]["ACC"], 100)
                cells.append(
                    ["accuracy of the last word, %", *("–" if t == "wikitext" else accuracy for t in perplexities)]
                )
            lines += [*_columns(cells), ""]
        scored = [task for task in SUPERGLUE if task in self.scores]
        if scored:
            cells = [[f"{SHOTS}-shot, % (Table 8)", *(TASKS[task].title for task in SUPERGLUE), "Total"]]
            for metric in ("ACC", "EM", "F1"):
                values = [self.scores.get(task, {}).get(metric) for task in SUPERGLUE]
                cells.append([metric, *(_number(value, 100) for value in (*values, self.total(metric)))])
            lines += [*_columns(cells), ""]
        lines += [f"{TASKS[task].title} was not scored: {reason}" for task, reason in self.missing.items()]
        if self.limit is not None:
            lines.append(f"Only the first {self.limit} examples of each task were scored: do not compare the scores.")
        return "\n".join(lines).rstrip()


def _number(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else f"{value * factor:.2f}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))])
        for row in rows
    ]


def _summed_loss(logits: Tensor, ids: Tensor) -> float:
    """Sum the cross-entropy of all tokens but the first of each window: logits (B, S, V), ids (B, S).

    Only one chunk of positions is copied at a time. With a large vocabulary all logits can fill half of a GPU's memory.
    """
    loss = 0.0
    for scores, window in zip(logits, ids, strict=True):
        for chunk, targets in zip(scores[:-1].split(_CHUNK), window[1:].split(_CHUNK), strict=True):
            loss += F.cross_entropy(chunk.float(), targets, reduction="sum").item()
    return loss


@torch.no_grad()
def token_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context: int,
    batch_size: int = 8,
) -> float:
    r"""Compute the perplexity per token, :math:`\exp(-\frac1n\sum\log p(x_t \mid x_{<t}))`, as in training.

    The tokens of the documents, as `encode` gives them, are joined and cut into windows of `context` tokens, as
    `llmfoundry-wesar data` does. The first token of a window is not predicted. The last window may be shorter.

    Args:
        model: A causal Hugging Face model.
        tokenizer: Its tokenizer.
        documents: The text.
        context: Tokens in a window.
        batch_size: Windows in a batch.

    Raises:
        ValueError: If there is no text.
    """
    texts = [text for text in documents if text]
    if not texts:
        raise ValueError("perplexity per token: there is no text.")
    ids = torch.tensor([token for tokens in encode(tokenizer, texts) for token in tokens])
    whole = len(ids) // context * context
    batches: list[Tensor] = [*ids[:whole].view(-1, context).split(batch_size), ids[whole:].view(1, -1)]
    device = next(model.parameters()).device
    loss, count = 0.0, 0
    for batch in batches:
        if batch.size(0) > 0 and batch.size(1) > 1:
            batch = batch.to(device)
            # No variable holds these logits while the model computes those of the next batch.
            loss += _summed_loss(model(batch).logits, batch)
            count += batch[:, 1:].numel()
    return math.exp(loss / count)


def _without_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that adds no EOS, because the harness would put it between a prompt and the answer.

    A BOS stays, as in the training data.
    """
    if not adds_eos(tokenizer) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    added = ids[: ids.index(text[0])]
    start = tokenizer.convert_ids_to_tokens(added)
    copied = copy.deepcopy(tokenizer)
    special = list(zip(start, added, strict=True))
    post_processor = TemplateProcessing(single=[*start, "$A"], pair=None, special_tokens=special)
    copied.backend_tokenizer.post_processor = post_processor  # type: ignore[assignment]
    return copied


def round_weights(model: WeSaRMPTForCausalLM, dtype: torch.dtype) -> MPTForCausalLM:
    """Round the weights as `export` does: merge W and α, then round the product once.

    If the model has no plain form, W and α are rounded separately. The frequencies of RoPE stay in float32: in bfloat16
    the phases at position 2000 would be wrong by up to 0.9 rad, for a head of width 64.

    Args:
        model: The trained model. It may be changed.
        dtype: A floating-point type.
    """
    plain: MPTForCausalLM = model
    with suppress(ValueError):
        plain = merge(model)
    plain.load_state_dict({name: weight.to(dtype) for name, weight in plain.state_dict().items()}, assign=True)
    return plain


def _task_manager() -> Any:
    """Return the harness's index of the paper's tasks. The index of all of its tasks takes ten seconds to make."""
    from lm_eval import tasks as harness

    folders: list[str | Path] = [Path(harness.__file__).parent / name for name in ("wikitext", "lambada", "super_glue")]
    return harness.TaskManager(include_defaults=False, include_path=folders)


def _harness_tasks(manager: Any, tasks: Sequence[str], data: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the harness's tasks by our names, and for each task without data the reason."""
    from datasets import Dataset, DatasetDict

    members, missing = {}, {}
    for task in tasks:
        name = TASKS[task].name
        members[task] = {"task": name, "num_fewshot": SHOTS if task in SUPERGLUE else 0}
        if data is not None:
            try:
                splits = evaluation_data.rows(data, name)
            except FileNotFoundError as error:
                missing[task] = str(error)
                del members[task]
                continue
            dataset = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
            members[task]["custom_dataset"] = lambda dataset=dataset, **_: dataset
            if task == "wikitext":
                members[task] |= {"training_split": None, "validation_split": None}
    loaded = manager.load([{"group": "paper", "task": list(members.values())}])["tasks"]
    return {task: loaded[TASKS[task].name] for task in members}, missing


def evaluate(
    path: str | Path,
    tasks: str = "paper",
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "float32",
) -> Evaluation:
    """Score a model.

    Args:
        path: A folder that `export` wrote, or a checkpoint, as for `files.load`.
        tasks: `paper` for all, or names of `TASKS` separated by commas.
        data: Local copies of the data (see `evaluation_data`); None for the Hugging Face Hub.
        limit: Number of examples to score for each task, the first ones.
        batch_size: Sequences in a batch.
        device: A torch device. By default the first GPU, or the CPU.
        dtype: float32, bfloat16 or float16. For the last two, `round_weights` rounds the weights.

    Raises:
        FileNotFoundError: If there is no model, no data at all, or no data for a task that was named.
        ValueError: If the model cannot be loaded or has no tokenizer, or an option is unknown or cannot be used here.
        RuntimeError: If lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.evaluator import evaluate as score
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError("lm-evaluation-harness is missing: pip install lm-eval.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = list(TASKS) if tasks == "paper" else tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"--tasks {tasks}: {unknown[0]!r} is not paper or one of {', '.join(TASKS)}.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: use one of float32, bfloat16, float16.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    find_model(path)  # before data are downloaded
    manager = _task_manager()
    harness_tasks, missing = _harness_tasks(manager, names, None if data is None else Path(data))
    if missing and (tasks != "paper" or not harness_tasks):
        raise FileNotFoundError(next(iter(missing.values())))
    trained, tokenizer = load(path)
    if tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer, which scoring needs.")
    model = trained if dtype == "float32" else round_weights(trained, getattr(torch, dtype))
    for module in model.modules():
        if hasattr(module, "attn_fn"):
            module.attn_fn = sdpa_or_stock_attention  # type: ignore[assignment]
    model.to(device)  # type: ignore[arg-type]
    context = model.config.max_seq_len
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": context, "softmax_dtype": "float32"}
    lm: Any = HFLM(pretrained=model, tokenizer=_without_eos(tokenizer), **options)  # type: ignore[arg-type]
    if not sys.stderr.isatty():  # no progress bars in a log; loglikelihood_rolling would still show one
        for method in ("loglikelihood", "loglikelihood_rolling"):
            setattr(lm, method, partial(getattr(lm, method), disable_tqdm=True))
        score_tokens = lm._loglikelihood_tokens
        lm._loglikelihood_tokens = lambda *args, **kwargs: score_tokens(*args, **kwargs | {"disable_tqdm": True})
    # As the harness's simple_evaluate does, which would also call git and list the packages.
    selected: Any = manager.load(list(harness_tasks.values()))
    for task in harness_tasks.values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    scores: dict[str, dict[str, float]] = {name: {} for name in harness_tasks}
    # Before the harness, which takes longer: an error here must not lose the scores of the harness.
    for name, task in harness_tasks.items():
        if name in PERPLEXITIES:
            documents = (row["page" if name == "wikitext" else "text"] for row in task.test_docs())
            perplexity = token_perplexity(model, tokenizer, islice(documents, limit), context, batch_size)
            scores[name]["per token"] = perplexity
    results: Any = score(lm, selected, limit=limit, bootstrap_iters=0, log_samples=False)
    for name in harness_tasks:
        values = results["results"][TASKS[name].name]
        scores[name] |= {metric: float(values[f"{key},none"]) for metric, key in TASKS[name].metrics.items()}
    examples = {name: results["n-samples"][TASKS[name].name]["effective"] for name in harness_tasks}
    return Evaluation(str(path), context, scores, examples, missing, limit)
