"""WikiText and LAMBADA perplexity of the merged models.

perplexity.csv  run, task, kind (as `evaluate` names it), value; rows are only ever appended
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmfoundry_wesar.evaluate import evaluate
from llmfoundry_wesar.export.files import export
from llmfoundry_wesar.runs.summary import append_rows
from results.evidence import MAIN, SEEDS, Evidence, Lacking, Verdict, interval

TASKS = ("wikitext", "lambada")


def _scores(folder: Path) -> dict[tuple[str, str, str], float]:
    path = folder / "perplexity.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["run"], row["task"], row["kind"]): float(row["value"]) for row in csv.DictReader(file)}


def _runs(evidence: Evidence) -> dict[str, list[str]]:
    return {method: [row["run"] for row in evidence.find(method)] for method in MAIN}


def score(evidence: Evidence, work: Path, data: Path | None) -> Iterator[str]:
    """Score the merged models of the two main methods at 1e-3 that are not scored yet.

    Args:
        evidence: The runs.
        work: The folder of `compare` with their checkpoints. A run without a checkpoint is left out.
        data: As for `evaluate`.

    Yields:
        Name and scores of each model.
    """
    scored = {run for run, _, _ in _scores(evidence.folder)}
    for run in (run for runs in _runs(evidence).values() for run in runs):
        checkpoint = work / "checkpoints" / run
        if run in scored or not checkpoint.exists():
            continue
        with TemporaryDirectory() as folder:
            export(str(checkpoint), f"{folder}/model", "hf")
            evaluation = evaluate(f"{folder}/model", ",".join(TASKS), data)
        rows = [
            {"run": run, "task": task, "kind": kind, "value": value}
            for task, scores in evaluation.scores.items()
            for kind, value in scores.items()
        ]
        append_rows(evidence.folder / "perplexity.csv", rows, rows[0])
        yield f"{run}: {evaluation.scores}"


def report(evidence: Evidence) -> Verdict:
    """Tabulate all scores."""
    scores, runs = _scores(evidence.folder), _runs(evidence)
    scored = {run for run, _, _ in scores}
    if lacking := [run for found in runs.values() for run in found if run not in scored]:
        raise Lacking(f"{len(lacking)} of {sum(map(len, runs.values()))} runs are not scored")
    lines = [["task", "kind", *MAIN, "Small − WeSaR"]]
    for task, kind in dict.fromkeys((task, kind) for _, task, kind in scores):
        small, wesar = (np.array([scores[run, task, kind] for run in runs[method]]) for method in MAIN)
        intervals = map(interval, (small, wesar, small - wesar))
        lines.append([task, kind, *(f"{mean:.4g} [{low:.4g}, {high:.4g}]" for mean, low, high in intervals)])
    return Verdict("measured", f"Merged models of {len(SEEDS)} seeds at 1e-3.", None, lines)
