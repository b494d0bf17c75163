"""The documentation does what it says: its Python runs as written, and every row of the README has a page."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name in ("README.md", "CONTRIBUTING.md")
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
]
ROWS = re.findall(r"^\| .*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
KEPT = ("advise", "demo", "hyper_cleaning", "memory", "plan", "speed")  # docs/results/NAME/*.csv


def test_there_are_examples():
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs_as_written(block, capsys):
    exec(compile(block, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("row", [row for row in ROWS if "---" not in row and row.strip("| ")])
def test_every_row_of_the_readme_has_a_command_and_a_page_with_a_picture(row):
    if row.startswith("| | figure"):
        return
    assert re.search(r"`(make|bilevel|python) [^`]+` *(\(.*\) *)?(, then .*|or .*)?\|$", row), (
        f"no command: {row}"
    )
    pages = re.findall(r"\]\((docs/[^)#]+\.md)", row)
    assert pages, f"no page: {row}"
    for page in pages:
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / page).read_text())
        assert pictures, f"{page} has no picture"
        for picture in pictures:
            assert (ROOT / page).parent.joinpath(picture).exists(), (
                f"{page} shows {picture}, which is not there"
            )


@pytest.mark.parametrize("name", KEPT)
def test_pages_show_the_figures_that_are_kept(name):
    page = ROOT / "docs" / ("choosing.md" if name == "advise" else f"results/{name}.md")
    shown = [re.split(r"[ |]+", line.strip("| ")) for line in page.read_text().splitlines()]
    files = sorted((ROOT / "docs" / "results" / name).glob("*.csv"))
    assert files
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                cells = re.split(r"[ |]+", " ".join(row).strip())
                assert cells in shown, f"{page.name} does not show the row {row} of {file.name}"
