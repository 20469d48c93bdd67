"""README and docs agree with the repository: links and anchors, names in tables, and ratios with an interval."""

import csv
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.main import get_command

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.methods import names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md", ROOT / "results/README.md"]
# [text](target), for images too. Targets on other sites are not checked.
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks, because `#` and brackets in them are not Markdown."""
    return re.sub(r"^```[\s\S]*?^```$|^ {4}.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a text.

    GitHub removes the markup, writes letters in lower case, drops everything but word characters, spaces and hyphens,
    and turns a space into a hyphen. A repeated heading gets -1, -2 and so on.
    """
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        copies = (f"{slug}-{n}" if n else slug for n in range(len(found) + 1))
        found.add(next(copy for copy in copies if copy not in found))
    return found


def broken_links(page: Path) -> list[str]:
    """Return the links of a page into this repository that lead to no file or no anchor."""
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(prose(file)))):
            broken.append(target)
    return broken


def first_cells(page: str, heading: str) -> list[str]:
    """Return the names in backticks in the first cells of the tables below a heading; of `data OUT` the first word."""
    text = f"\n{(ROOT / page).read_text(encoding='utf-8')}"
    section = text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| *((?:`[^`]*`,? *)+)\|", section.replace(r"\|", ""), re.MULTILINE)
    return [name.split()[0] for cell in cells for name in re.findall("`([^`]*)`", cell)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_anchors(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    """`broken_links` finds each kind of broken link and ignores code blocks.

    Otherwise the test above would prove nothing.
    """
    (tmp_path / "b.md").write_text("# It's `a_b` (c)\n\n## Twice\n\n## Twice\n\n```\n# Code\n```\n")
    good = "[x](b.md) ![y](b.md#its-a_b-c) [z](b.md#twice-1) [w](https://example.com/#no) [v](#here)"
    bad = ["no.md", "b.md#code", "b.md#twice-2", "b.md#its-ab-c", "#there"]
    text = f"# Here\n\n{good}\n\n" + "".join(f"[x]({target})\n" for target in bad) + "\n```\n[x](no.md)\n```\n"
    (tmp_path / "a.md").write_text(text)
    assert broken_links(tmp_path / "a.md") == bad


def test_the_readme_is_read_once():
    """README.md has at most 130 lines. Details belong in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Methods"), ("docs/methods.md", "## The methods")])
def test_the_tables_of_methods_have_each_one_once(page, heading):
    assert sorted(first_cells(page, heading)) == names("method")


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Tools"), ("docs/tools.md", "# Tools")])
def test_the_tables_of_tools_have_each_command_once(page, heading):
    assert sorted(first_cells(page, heading)) == sorted(get_command(app).commands)  # type: ignore[attr-defined]


def test_ratios_with_an_interval_were_measured():
    """A ratio that is printed with its interval is a row of results/benchmarks.csv, rounded to as many digits."""
    with (ROOT / "results/benchmarks.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio_low"]]
    measured = {tuple(f"{float(row[key]):.3f}" for key in ("ratio", "ratio_low", "ratio_high")) for row in rows}
    pages = ("README.md", "docs/speed.md", "benchmarks/README.md")
    quoted = [
        (page, match)
        for page in pages
        for match in re.findall(r"(\d\.\d{3}) \((\d\.\d{3})–(\d\.\d{3})\)", (ROOT / page).read_text())
    ]
    assert len(quoted) > 20
    assert [(page, match) for page, match in quoted if match not in measured] == []
