"""`python -m results`: does the runs of a claim, or draws and judges all claims from what is kept."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

from typer import Argument, Option, Typer, echo

from llmfoundry_wesar.cli import one_line_errors
from llmfoundry_wesar.runs.scalars import replacing
from llmfoundry_wesar.runs.summary import table
from results import learning_rates, methods, norms, perplexity, relative_step, seeds, spikes, update_ratios
from results.evidence import FOLDER, SIZES, Evidence, Lacking, Verdict, run, save

CLAIMS: dict[str, ModuleType] = {
    "update_ratios": update_ratios,
    "norms": norms,
    "methods": methods,
    "seeds": seeds,
    "learning_rates": learning_rates,
    "relative_step": relative_step,
    "spikes": spikes,
}
app = Typer(help="The evidence for the claims in results/README.md.", no_args_is_help=True)


def judge(claim: ModuleType, evidence: Evidence) -> Verdict:
    """A claim's verdict; not decided, with what lacks, if its runs are not there."""
    try:
        return claim.report(evidence)
    except Lacking as lacking:
        return Verdict("not decided", f"{str(lacking)[0].upper()}{str(lacking)[1:]}.")


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(lines[0]) + "|\n", *rows[1:]]) + "\n"


@app.command("run")
def run_claim(
    claim: Annotated[str, Argument(help=f"One of {', '.join(CLAIMS)}.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value for all runs, as for the trainer.")] = None,
    size: Annotated[str, Option(help=f"One of {', '.join(SIZES)}; the latter is for a GPU.")] = "2m",
    minutes: Annotated[float, Option(help="Start no run that would not end within so many.")] = 9,
    work: Annotated[Path, Option(help="Logs, event files and checkpoints.")] = Path("runs/claims"),
    folder: Annotated[Path, Option(help="Of runs.csv and curves.")] = FOLDER,
) -> None:
    """Do the runs of a claim that are not kept yet; the same command goes on."""
    with one_line_errors():
        if claim not in CLAIMS:
            raise ValueError(f"{claim} is no claim; name one of {', '.join(CLAIMS)}")
        series = [each for each in CLAIMS[claim].SERIES if each.size == size]
        if not series:
            raise ValueError(f"{claim} has no runs of its own at size {size}")
        left = run(series, minutes, work, folder, overrides or ())
    echo(f"{left} runs left; the same command goes on" if left else "all runs are kept")


@app.command()
def score(
    data: Annotated[Path | None, Option(help="As for llmfoundry-wesar evaluate.")] = None,
    work: Annotated[Path, Option(help="As for run.")] = Path("runs/claims"),
    folder: Annotated[Path, Option(help="As for run; perplexity.csv goes there.")] = FOLDER,
) -> None:
    """Score the merged models of Small init and WeSaR at 1e-3 on WikiText and LAMBADA."""
    with one_line_errors():
        for line in perplexity.score(Evidence(folder), work, data):
            echo(line)


@app.command()
def report(
    folder: Annotated[Path, Option(help="Of runs.csv and curves.")] = FOLDER,
    out: Annotated[Path, Option(help="For verdicts.md and the pictures.")] = FOLDER,
) -> None:
    """Write verdicts.md and its pictures, from runs.csv and curves alone."""
    evidence = Evidence(folder)
    text = "# What came out\n\nWritten by `python -m results report`; README.md beside it has the claims and rules.\n\n"
    text += f"{len(evidence.rows)} runs finished, {len(evidence.failed)} failed. Intervals are 95%, over seeds.\n\n"
    sections = {f"({letter}) {name}": claim for letter, (name, claim) in zip("abcdefg", CLAIMS.items(), strict=True)}
    for title, claim in {**sections, "perplexity": perplexity}.items():
        verdict = judge(claim, evidence)
        sentence = f"{title.replace('_', ' ')}: {verdict.status}. {verdict.sentences}"
        echo(sentence)
        text += f"## {title.replace('_', ' ')}\n\n{sentence}\n\n"
        if verdict.table:
            text += _table(verdict.table)
        if verdict.picture:
            picture = f"{claim.__name__.rpartition('.')[2]}.png"
            save(verdict.picture, out / picture)
            text += f"![{title.replace('_', ' ')}]({picture})\n\n"
    if large := Evidence(folder, "130m").rows:
        text += f"## 130M\n\n{table(large)}\n"
    with replacing(out / "verdicts.md") as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
