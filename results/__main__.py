"""`python -m results`: train the runs of a claim, or judge and draw all claims from the runs that are kept."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

from typer import Argument, Option, Typer, echo

from llmfoundry_wesar.cli import one_line_errors
from llmfoundry_wesar.runs.scalars import replacing
from llmfoundry_wesar.runs.summary import markdown
from results import (
    equal_step,
    large,
    learning_rates,
    methods,
    norms,
    perplexity,
    relative_step,
    seeds,
    spikes,
    update_ratios,
)
from results.evidence import FOLDER, LONG, SIZES, Evidence, Lacking, Verdict, run

CLAIMS: dict[str, ModuleType] = {
    "update_ratios": update_ratios,
    "norms": norms,
    "methods": methods,
    "seeds": seeds,
    "learning_rates": learning_rates,
    "relative_step": relative_step,
    "spikes": spikes,
    "equal_step": equal_step,
}
_HEADINGS = {"2m": "200 steps", "spike": "Where plain weights spike", "130m": "130M parameters on a GPU"}
LETTERS = dict(zip(CLAIMS, "abcdefgh", strict=True))
WORK = Path("runs/claims")
app = Typer(help="The evidence for the claims in results/README.md.", no_args_is_help=True)


def judge(claim: ModuleType, evidence: Evidence) -> Verdict:
    """Return the verdict of a claim. If runs are missing, it is not decided and says which."""
    try:
        return claim.report(evidence)
    except Lacking as lacking:
        return Verdict("not decided", f"{str(lacking)[0].upper()}{str(lacking)[1:]}.")


@app.command("run")
def run_claim(
    claim: Annotated[str, Argument(help=f"One of {', '.join(CLAIMS)}.")],
    size: Annotated[str, Option(help=f"Size and length, one of {', '.join(SIZES)}; 130m needs a GPU.")] = "2m",
    work: Annotated[Path, Option(help="Folder for logs, event files and checkpoints.")] = WORK,
) -> None:
    """Train the runs of a claim that are not kept yet. After an interruption, the same command continues."""
    with one_line_errors():
        if claim not in CLAIMS:
            raise ValueError(f"{claim} is not a claim; name one of {', '.join(CLAIMS)}")
        series = [each for each in CLAIMS[claim].SERIES if each.size == size]
        if not series:
            raise ValueError(f"{claim} has no runs of its own at size {size}")
        failed = run(series, work)
    echo(f"{failed} runs failed; the same command tries them again" if failed else "all runs are kept")


@app.command()
def score(
    data: Annotated[Path | None, Option(help="As for llmfoundry-wesar evaluate.")] = None,
    work: Annotated[Path, Option(help="The folder of run.")] = WORK,
) -> None:
    """Score the merged models of Small init and WeSaR at 1e-3 on WikiText and LAMBADA."""
    with one_line_errors():
        for line in perplexity.score(Evidence(), work, data):
            echo(line)


@app.command()
def report(out: Annotated[Path, Option(help="Folder for verdicts.md and the pictures.")] = FOLDER) -> None:
    """Write verdicts.md and its pictures from runs.csv, curves and perplexity.csv. Nothing is trained."""
    text = "# What came out\n\nWritten by `python -m results report`; README.md beside it has the claims and rules.\n\n"
    text += "Intervals are 95%, over seeds.\n\n"
    for size in ("2m", *LONG, "spike", "130m"):
        evidence, (_, dash, steps) = Evidence(size=size), size.partition("-")
        heading = _HEADINGS.get(size) or f"{int(steps):,} steps"
        suffix = f", {heading[0].lower()}{heading[1:]}" if size in (*LONG, "spike") else ""
        text += f"# {heading}\n\n"
        if not evidence.rows:
            text += "Not run so far.\n\n"
            continue
        text += f"{len(evidence.rows)} runs finished, {len(evidence.failed)} failed.\n\n"
        # (g) has no runs of its own, and looks at those of each length.
        sections = {
            f"({letter}) {name}": CLAIMS[name]
            for name, letter in LETTERS.items()
            if (name == "spikes" and size != "spike") or any(each.size == size for each in CLAIMS[name].SERIES)
        }
        if size == "2m":
            sections["perplexity"] = perplexity
        if size == "130m":
            sections = {"all methods, one seed": large}
        for name, claim in sections.items():
            title, verdict = name.replace("_", " ") + suffix, judge(claim, evidence)
            sentence = f"{title}: {verdict.status}. {verdict.sentences}"
            echo(sentence)
            text += f"## {title}\n\n{sentence}\n\n"
            if verdict.table:
                header, *lines = verdict.table
                text += markdown([header]) + "|---" * len(header) + "|\n" + markdown(lines) + "\n"
            if verdict.picture:
                picture = f"{claim.__name__.rpartition('.')[2]}{dash}{steps}.png"
                # Without the version of matplotlib in it, equal pictures are equal files.
                with replacing(out / picture) as partial:
                    verdict.picture.savefig(partial, dpi=160, metadata={"Software": None})
                text += f"![{title}]({picture})\n\n"
    with replacing(out / "verdicts.md") as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
