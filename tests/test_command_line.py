"""The command line: each verb from an empty folder, JSON alone on standard output, exit codes, wrong choices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spade
from spade.data.phantom import simulate
from spade.models import VarNet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small VarNet and two simulated scans."""
    path = tmp_path_factory.mktemp("command line")
    torch.manual_seed(0)
    spade.save(VarNet(num_cascades=1, channels=4, num_pools=1), path / "teacher")
    simulate(path / "scans", 2, 1, shape=(64, 128), num_coils=4, progress=False)
    return path


def call(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "spade", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_each_verb_runs_from_a_folder_without_a_project(folder):
    made = call(folder, "prune", "teacher.safetensors", "--ratio", "0.4", "--out", "student", "--json")
    facts = json.loads(made.stdout)
    assert made.returncode == 0 and facts["parameters_after"] < facts["parameters_before"], made.stderr
    arguments = ("--data", "scans", "--acceleration", 4)
    tuned = call(
        folder, "finetune", "student.safetensors", *arguments, "--teacher", "teacher.safetensors",
        "--steps", 3, "--out", "tuned", "--json",
    )  # fmt: skip
    assert tuned.returncode == 0 and json.loads(tuned.stdout)["steps"] == 3, tuned.stderr
    again = call(
        folder, "finetune", "student.safetensors", *arguments, "--teacher", "teacher.safetensors",
        "--steps", 3, "--out", "again", "--json",
    )  # fmt: skip
    assert json.loads(again.stdout)["loss"] == json.loads(tuned.stdout)["loss"]
    judged = call(folder, "evaluate", "teacher.safetensors", "tuned.safetensors", *arguments, "--json")
    rows = json.loads(judged.stdout)["networks"]
    assert [row["images"] for row in rows] == [2, 2] and all(5 < row["psnr"] < 60 for row in rows)
    images = call(folder, "reconstruct", "tuned.safetensors", *arguments, "--out", "images", "--png", "--json")
    assert len(json.loads(images.stdout)["files"]) == 2 and len(list((folder / "images").glob("*.png"))) == 2
    card = call(folder, "info", "tuned.safetensors")
    assert card.returncode == 0 and "VarNet" in card.stdout and "school" in card.stdout
    assert not (folder / "config").exists() and not (folder / "outputs").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        (("prnue",), "Did you mean 'prune'?"),
        (("prune", "teacher.safetensors", "--rati", "0.4"), "Did you mean '--ratio'?"),
        (("prune", "teacher.safetensors", "--ratio", "4", "--out", "x"), "ratio must be a number between 0 and 1"),
        (("prune", "missing", "--ratio", "0.4", "--out", "x"), "'missing' does not exist"),
        (("info", "scans/demo_0001.h5"), "demo_0001.h5"),
        (("finetune", "teacher.safetensors", "--data", "scans", "--strategy", "shool", "--out", "x"), "school"),
        (("evaluate", "teacher.safetensors", "--data", "."), "h5"),
        (("reconstruct", "teacher.safetensors", "--data", "scans", "--out", "scans"), "out must be another folder"),
    ),
)
def test_a_wrong_choice_ends_with_one_sentence_and_exit_code_2(folder, arguments, sentence):
    done = call(folder, *arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert sentence in done.stderr and not (folder / "x.safetensors").exists()


def test_help_has_an_example_and_does_not_load_torch(folder):
    for verb in ("prune", "finetune", "evaluate", "reconstruct", "info"):
        text = call(folder, verb, "--help").stdout
        assert f"Example: spade {verb}" in " ".join(text.split())
    code = (
        "import sys, click.testing, spade.__main__ as m\n"
        "click.testing.CliRunner().invoke(m.main, ['prune', '--help'])\n"
        "print({'torch', 'h5py', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
