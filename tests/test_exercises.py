"""The answers of the exercises at the end of the method notebooks: folded, and their code runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("02_operators", "models/04_deq", "models/05_varnet", "07_losses", "09_metrics")


def exercises(name: str) -> str:
    """The last cell of a notebook."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(cells[-1]["source"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_exercise_has_a_folded_answer(name):
    text = exercises(name)
    numbers = re.findall(r"(?m)^\*\*(\d)\.\*\*", text)
    assert text.startswith("## Exercises") and numbers == ["1", "2", "3"]
    folded = re.findall(r"(?s)<details>\n<summary>Answer</summary>\n\n.+?\n\n</details>", text)
    assert len(folded) == 3 == text.count("<details>") == text.count("</details>")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_code_of_the_answers_runs(name):
    blocks = re.findall(r"(?s)```python\n(.+?)```", exercises(name))
    assert blocks and all("assert" in block for block in blocks)
    for block in blocks:
        exec(compile(block, f"an answer of {name}", "exec"), {})
