"""WikiText and LAMBADA perplexity of the merged models.

perplexity.csv  run, task, kind (as `evaluate` names it), value; it is only ever appended to
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from llmfoundry_wesar.evaluate import evaluate
from llmfoundry_wesar.export.files import export
from results.evidence import MAIN, SEEDS, Evidence, Lacking, Verdict, append, interval, paired

TASKS = ("wikitext", "lambada")


def _scores(folder: Path) -> dict[tuple[str, str, str], float]:
    path = folder / "perplexity.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["run"], row["task"], row["kind"]): float(row["value"]) for row in csv.DictReader(file)}


def score(evidence: Evidence, work: Path, data: Path | None) -> Iterator[str]:
    """Scores the merged models of the two main methods at 1e-3 that are not scored yet.

    Args:
        evidence: With the runs.
        work: The folder of `compare` that has their checkpoints; a run without one is left out.
        data: As for `evaluate`.

    Yields:
        What was scored.
    """
    scored = {run for run, _, _ in _scores(evidence.folder)}
    rows = [row for method in MAIN for row in evidence.find(method, fewest=0).values()]
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        checkpoint = work / "checkpoints" / row["run"]
        if row["run"] in scored or not checkpoint.exists():
            continue
        with TemporaryDirectory() as folder:
            export(str(checkpoint), f"{folder}/model", "hf")
            evaluation = evaluate(f"{folder}/model", ",".join(TASKS), data)
        lines = [
            {"run": row["run"], "task": task, "kind": kind, "value": value}
            for task, scores in evaluation.scores.items()
            for kind, value in scores.items()
        ]
        append(evidence.folder / "perplexity.csv", lines[0], lines)
        yield f"{row['run']}: {evaluation.scores}"


def report(evidence: Evidence) -> Verdict:
    """The table of all scores, and what the perplexities per token say."""
    scores = _scores(evidence.folder)
    runs = {method: {seed: row["run"] for seed, row in evidence.find(method, SEEDS).items()} for method in MAIN}
    if lacking := [
        run for found in runs.values() for run in found.values() if (run, "wikitext", "per token") not in scores
    ]:
        raise Lacking(f"{len(lacking)} of {sum(map(len, runs.values()))} runs are not scored")
    kinds = list(dict.fromkeys((task, kind) for _, task, kind in scores))
    lines = [["task", "kind", *MAIN, "Small − WeSaR"]]
    for task, kind in kinds:
        found = {method: {seed: scores[run, task, kind] for seed, run in runs[method].items()} for method in MAIN}
        intervals = [*(interval(values.values()) for values in found.values()), paired(*found.values())]
        lines.append([task, kind, *(f"{mean:.4g} [{low:.4g}, {high:.4g}]" for mean, low, high, _ in intervals)])
    return Verdict("measured", f"Merged models of {len(runs['wesar'])} seeds at 1e-3.", None, lines)
