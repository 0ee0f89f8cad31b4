"""SPADE in an hour: short, with sliders in Jupyter and pictures elsewhere."""

import json
import re
from pathlib import Path

import ipywidgets
import pytest

PATH = Path(__file__).resolve().parents[1] / "nbs" / "beyond" / "51_in_an_hour.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_has_at_most_40_cells_and_stores_pictures_but_no_widget():
    kinds = [kind for cell in CELLS for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert len(CELLS) <= 40 and kinds.count("image/png") >= 8
    assert not [kind for kind in kinds if "widget" in kind]


def test_ratio_strategy_and_acceleration_have_sliders():
    calls = re.findall(r"(?m)^explore\((.+)\)$", "\n".join(CODE))
    sliders = {name for call in calls for name in re.findall(r"(\w+)=\[", call)}
    assert {"ratio", "strategy", "acceleration"} <= sliders and len(calls) >= 4


@pytest.mark.parametrize("jupyter", (True, False))
def test_explore_makes_sliders_in_jupyter_and_the_first_picture_elsewhere(monkeypatch, jupyter):
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook") if jupyter else monkeypatch.delenv("JPY_SESSION_NAME", False)
    (source,) = [text for text in CODE if "def explore" in text]
    shown, calls = [], []
    names = {"os": __import__("os"), "display": shown.append, "np": None, "plt": None}
    exec(compile(source, "explore", "exec"), names)
    names["explore"](lambda ratio, strategy: calls.append((ratio, strategy)), ratio=[0.4, 0.2], strategy=["school"])
    if jupyter:
        (box,) = shown
        assert isinstance(box, ipywidgets.interactive) and [w.description for w in box.children[:2]] == [
            "ratio",
            "strategy",
        ]
        box.children[0].value = 0.2
        assert box.children[0].options == (0.4, 0.2) and (0.2, "school") in calls
    else:
        assert not shown and calls == [(0.4, "school")]
