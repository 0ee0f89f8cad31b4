"""Pins, metadata, the licence and what a newcomer types."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings() -> dict:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "every line is name==version, without a local suffix such as +cpu"
    )
    return {canonical(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_within_its_range(settings, pins):
    for text in " ".join(settings[key] for key in settings if key.endswith("requirements")).split():
        requirement = Requirement(text)
        assert canonical(requirement.name) in pins, f"{requirement.name} is missing in constraints.txt"
        assert pins[canonical(requirement.name)] in requirement.specifier, text


def test_nbdev_stays_below_three_and_keeps_papermills_tag(settings):
    assert "nbdev>=2.4,<3" in settings["dev_requirements"].split()
    assert settings["allowed_cell_metadata_keys"].split() == ["tags"]


def test_developers_have_what_slurm_needs(settings):
    assert set(settings["slurm_requirements"].split()) <= set(settings["dev_requirements"].split())


def test_conda_gives_the_same_pins(settings, pins):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python == f"python={settings['min_python']}"
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-c constraints.txt" in pip and "-e .[dev]" in pip
    named = [Requirement(line) for line in pip if "==" in line]
    assert named and all(pins[canonical(entry.name)] in entry.specifier for entry in named)


def test_the_running_environment_is_the_pinned_one(pins):
    from importlib.metadata import version

    for name in ("torch", "nbdev", "torch-pruning", "papermill", "scikit-image", "snakemake"):
        assert Version(version(name)).public == pins[name].public


def test_versions_agree(settings):
    import spade

    assert spade.__version__ == settings["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["version"] and "2311.02003" in citation["preferred-citation"]["journal"]


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_public_names():
    import spade

    assert {"prune", "finetune", "save", "load"} <= set(spade.__all__)
    assert all(callable(getattr(spade, name)) for name in spade.__all__)


def test_each_module_is_there_after_import_spade():
    """Imported when it is first used, and not before: `import spade` loads no torch."""
    names = {path.stem for path in (ROOT / "spade").glob("*.py") if not path.stem.startswith("_")} | {"models"}
    code = (
        "import sys, spade; assert 'torch' not in sys.modules\n"
        f"assert {names} <= set(dir(spade))\n"
        f"[getattr(spade, name) for name in {sorted(names)}]\n"
        "print(spade.prune.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "spade.pruning\n", done.stderr


def test_import_touches_no_network_and_no_project_file(tmp_path):
    """In an empty folder, with sockets forbidden."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import spade, spade.workflow, spade.tables, spade.paper\n"
        "print(spade.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_carries_the_modules_the_tissue_maps_and_the_notice(tmp_path):
    """Built from a copy: setuptools leaves build/ in the source, and puts what lies there into later wheels."""
    shutil.copytree(ROOT / "spade", tmp_path / "source" / "spade", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "source")], capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr or "setuptools.build_meta" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "spade").rglob("*") if "__pycache__" not in path.parts}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {name for name in expected if (ROOT / name).is_file()} and "spade/assets/NOTICE" in packed


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Each page's Python is executed as it is printed."""
    monkeypatch.chdir(tmp_path)
    assert blocks(page, "python")
    exec("\n".join(blocks(page, "python")), {"__name__": "page"})


def test_the_commands_of_the_pages_exist():
    text = "\n".join(blocks("README.md", "bash") + blocks("CONTRIBUTING.md", "bash"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake (\w+)", text))
    assert {"demo", "paper", "test", "lab", "plan"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "data/README.md", "outputs/README.md"])
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_and_speaks_of_configurations():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100 and "PROFILE" not in text


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert (
        os.access(script, os.X_OK)
        and "make test" in script.read_text(encoding="utf-8")
        and "set -euo pipefail" in script.read_text(encoding="utf-8")
    )
