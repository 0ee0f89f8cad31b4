"""Execute library notebooks and compare their outputs with the stored ones.

`python tests/execute_notebooks.py [NOTEBOOK ...]`: each notebook runs once, two at a time. An error in a cell fails.
So does an output whose text differs from the stored one when numbers are masked, or another number of pictures: the
stored outputs are then stale. Cells marked `#| slow` are not run. Standard error is not compared.
"""

import difflib
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
sys.path.insert(0, str(NOTEBOOKS.parent / "workflow" / "scripts"))
from run_notebook import own_sockets  # noqa: E402

SETTINGS = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def library_notebooks() -> list[Path]:
    """All notebooks but the experiments and checkpoints of Jupyter, the largest first."""
    found = [p for p in NOTEBOOKS.rglob("*.ipynb") if not {"experiments", ".ipynb_checkpoints"} & set(p.parts)]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def masked(text: str) -> str:
    """Text without what may differ between machines: numbers, hashes, addresses, temporary folders, spaces, rules."""
    text = re.sub(r"\x1b\[[\d;]*m|0x[0-9a-f]+|/tmp/\w+|\b(?=[a-f]*\d)[0-9a-f]{8,}\b", "#", text)
    text = re.sub(
        r"(?<![\w.])[-+−–]?(?:\d+(?:[,_]\d{3})*|\.\d)(?:\.?\d+)*\.?(?:e[-+]?\d+)?j?|\b(?:nan|inf)\b", "#", text
    )
    return re.sub(r"[ \t]+", " ", re.sub(r"[-─═]{3,}", "---", text)).strip()


def outputs_of(cell: nbformat.NotebookNode) -> tuple[str, int]:
    """The masked text of a cell's outputs (streams joined, no standard error) and the number of its pictures."""
    texts, pictures = [], 0
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(output.text if output.name == "stdout" else "")
        elif "image/png" in (data := output.get("data", {})):
            pictures += 1
        else:
            texts.append(data.get("text/markdown") or data.get("text/plain", ""))
    return masked("".join(texts)), pictures


def differences(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """One entry for each cell whose stored outputs are stale."""
    found = []
    for number, (before, after) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        (old, old_pictures), (new, new_pictures) = outputs_of(before), outputs_of(after)
        if old_pictures != new_pictures:
            found.append(f"cell {number}: {old_pictures} pictures are stored, {new_pictures} are fresh")
        if old != new:
            lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "stored", "fresh", lineterm="", n=0))
            found.append(f"cell {number}:\n    " + "\n    ".join(lines[:12]))
    return found


def check(path: Path) -> tuple[Path, float, list[str]]:
    """Execute a copy of a notebook in its folder; returns the seconds and what is wrong."""
    start, stored = time.perf_counter(), nbformat.read(path, as_version=4)
    slow = {i for i, cell in enumerate(stored.cells) if re.match(r"#\| *slow", cell.source)}
    fresh = nbformat.from_dict(stored)
    for i, cell in enumerate(fresh.cells):
        if i in slow:
            cell.cell_type = "raw"
        elif cell.cell_type == "code":
            cell.outputs = []
    os.environ.update(SETTINGS)
    os.environ.pop("MPLBACKEND", None)  # the kernel chooses the backend that shows pictures
    client = NotebookClient(
        fresh,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        config=own_sockets(),
    )
    try:
        client.execute()
    except (CellExecutionError, RuntimeError, TimeoutError) as error:  # a cell's error, a dead kernel, a time limit
        return path, time.perf_counter() - start, [re.sub(r"\x1b\[[\d;]*m", "", str(error))[-2000:]]
    return path, time.perf_counter() - start, differences(stored, fresh)


def main(names: list[str]) -> int:
    """Check the notebooks, all if none is named; returns how many failed."""
    start, failed = time.perf_counter(), 0
    paths = [Path(name).resolve() for name in names] or library_notebooks()
    with ProcessPoolExecutor(2) as pool:
        for path, seconds, problems in pool.map(check, paths):
            failed += bool(problems)
            print(
                f"{'FAILED' if problems else 'ok':6} {seconds:6.1f} s  {path.name}", *problems, sep="\n  ", flush=True
            )
    print(f"{len(paths)} notebooks, {failed} failed, {time.perf_counter() - start:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
