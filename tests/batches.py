"""Calls of Snakemake on a copy of the project, for the tests of the batch."""

import contextlib
import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from faults import copy_project

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
EXPERIMENTS = Path("nbs") / "experiments"


def arguments(out: Path | str, config: str = "smoke", **options: str) -> list[str]:
    """Of Snakemake, for a configuration and results in `out`."""
    settings = {"results": out, "acquisitions": f"{out}/acquisitions", **options}
    named = [f"{name}={value}" for name, value in settings.items()]
    return ["--configfile", f"config/{config}.yaml", "--config", *named, "--cores", "1", "--nocolor"]


def snakemake(*what: str) -> str:
    """What `snakemake` prints. In this process, because importing torch would take most of the time."""
    from snakemake import cli

    logger, handler = logging.getLogger("snakemake.logging"), logging.StreamHandler(io.StringIO())
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.addHandler(handler)
        try:
            code = cli.main(list(what))
        except SystemExit as end:
            code = end.code
        finally:
            logger.removeHandler(handler)
        gc.collect()  # a refused workflow leaves a temporary folder to the collector, which warns of it
    return f"{handler.stream.getvalue()}\nended with {int(code or 0)}"


def plan(*what: str) -> dict[str, int]:
    """Jobs by rule of a dry run; students are of two rules, of which one starts first, and counted together."""
    printed = snakemake(*what, "-n", "--quiet", "rules")
    assert printed.endswith("ended with 0"), printed[-3000:]
    found = Counter()
    for rule, count in dict(re.findall(r"^(\w[\w-]*) +(\d+)$", printed, re.M)).items():  # printed twice
        found[rule.removesuffix("_longest")] += int(count)
    return dict(found)


def call(*what: str, python: Path | str = sys.executable, **settings: object) -> subprocess.CompletedProcess:
    """`snakemake` in a process of its own."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run([python, "-m", "snakemake", *what], env=ENVIRONMENT, **output, **settings)


def started(*what: str) -> subprocess.Popen:
    """`snakemake` in a process of its own, which a test kills."""
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, "-m", "snakemake", *what], env=ENVIRONMENT, **pipe)


def wait_for(batch: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Return as soon as something has happened, which it must before the batch ends."""
    while not happened():
        assert batch.poll() is None, batch.stderr.read()[-3000:]
        time.sleep(0.01)


def small_notebook(name: str, cell: str) -> None:
    """Replace an experiment by a notebook with the same parameters and one cell, without imports that take long."""
    cells = nbformat.read(EXPERIMENTS / f"{name}.ipynb", as_version=4).cells
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(cell)], metadata=kernel)
    nbformat.write(notebook, EXPERIMENTS / f"{name}.ipynb")


def project_copy(parent: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the batch reads, so that a test can change it; the present folder, with a blank in its path."""
    copy_project(folder := parent / "a project")
    monkeypatch.chdir(folder)
    return folder


def edit_config(key: str, value: object, name: str = "smoke") -> None:
    """Change one setting of a configuration of the present project."""
    path = Path("config") / f"{name}.yaml"
    settings = json.loads(
        json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")))
    )  # an alias of YAML would change everywhere
    *parents, last = key.split(".")
    section = settings
    for part in parents:
        section = section.setdefault(part, {})
    section[last] = value
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
