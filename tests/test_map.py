"""The map of the paper in nbs/index.ipynb: every link, section, function and result file exists."""

import importlib
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"


def markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def map_rows() -> list[list[str]]:
    text = markdown(NBS / "index.ipynb").split("## The map of the paper")[1].split("\n## ")[0]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(((?:[^()\s]|\([^()]*\))+)\)", text)


def test_every_link_of_the_index_leads_to_a_file_and_a_section():
    for target in links(markdown(NBS / "index.ipynb")):
        file, _, anchor = target.partition("#")
        assert (NBS / file).is_file(), target
        headings = re.findall(r"(?m)^#+ +(.+?) *$", markdown(NBS / file)) if anchor else []
        assert not anchor or anchor in [heading.replace(" ", "-") for heading in headings], target


def test_every_notebook_is_in_the_index():
    listed = {(NBS / target.partition("#")[0]).resolve() for target in links(markdown(NBS / "index.ipynb"))}
    assert {path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts} - {
        NBS / "index.ipynb"
    } <= listed


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0])
def test_a_row_names_a_function_that_its_notebook_or_its_table_uses(row):
    item, where, function, results = row
    module, _, name = function.strip("`").rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
    notebook = NBS / links(where)[0].partition("#")[0]
    assert name in notebook.read_text(encoding="utf-8") or item.startswith(("Table 3", "Tables"))
    equation = re.match(r"eq\. (\d), ", item)
    assert not equation or equation[1] == "1" or rf"\tag{{{equation[1]}}}" in markdown(notebook)
    assert all((NBS / target).is_file() for target in links(results))


def test_every_equation_table_and_figure_is_in_the_map():
    text = " ".join(row[0] for row in map_rows())
    numbers = {kind: set() for kind in ("eq.", "Table", "Figure")}
    for kind, found in re.findall(r"(eq\.|Table|Figure)s? ((?:\d(?:, )?)+)", text):
        numbers[kind] |= {int(digit) for digit in re.findall(r"\d", found)}
    assert numbers == {"eq.": set(range(1, 10)), "Table": set(range(1, 7)), "Figure": set(range(1, 9))}
