"""The experiment notebooks as papermill calls them, and the batch that does so."""
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest

from spade.batch import Job, failing_cell, job_of, main, run_job, run_jobs, students
from spade.experiment import Run, acquisition_files, find_teacher, is_complete, run_key
from spade.profiles import load_profile

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def teacher(workplace) -> Path:
    """A teacher pretrained in the smoke profile; returns the folder of results."""
    out = workplace / "out"
    outcome = run_job(job_of(Run("varnet"), load_profile("smoke"), out, str(workplace / "data")))
    assert outcome.state == "done", outcome
    return out


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_has_its_parameters_cell_and_prose(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert cells[0].source.startswith("# ") and "**Question.**" in cells[0].source
    assert "what not" in cells[-1].source
    assert not any("#| export" in cell.source for cell in cells)


def test_nothing_is_exported_from_experiments():
    assert (ROOT / "nbs" / "experiments" / ".notest").is_file()


@pytest.mark.parametrize("notebook, parameters, choices", [
    ("pretrain", {"profile": "smokee"}, "demo, gpu, paper, siat, smoke"),
    ("pretrain", {"network": "unet"}, "deq, varnet, e2e-varnet"),
    ("finetune", {"strategy": "selfsupervised"}, "supervised, school, self-supervised"),
    ("finetune", {"start": "cold"}, "pruned, random"),
    ("finetune", {"ratio": 1.5}, "between 0 and 1"),
    ("table_1", {"networks": "varnet usrnnet"}, "deq, varnet, e2e-varnet"),
])
def test_an_unknown_choice_fails_in_the_first_cell_and_names_the_choices(tmp_path, notebook, parameters, choices):
    job = Job("wrong", ROOT / "nbs" / "experiments" / f"{notebook}.ipynb", tmp_path / "run.ipynb", {"profile": "smoke", "out": str(tmp_path), **parameters})
    outcome = run_job(job)
    executed = nbformat.read(job.output, as_version=4).cells
    code = [cell for cell in executed if cell.cell_type == "code" and not {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))]
    ran = [cell for cell in code if cell.execution_count]
    assert outcome.state == "failed" and "ValueError" in outcome.error and choices in outcome.error
    assert len(ran) == 1, "no cell after the first ran"


def test_pretraining_leaves_a_complete_result(teacher):
    folder = Run("varnet").folder(teacher)
    result = json.loads((folder / "result.json").read_text())
    assert {"metrics.csv", "curve.csv", "images.npz", "network.safetensors", "network.json", "run.ipynb"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "state").exists()
    assert {"commit", "versions", "device", "profile", "data", "seconds", "key", "sampling_rate"} <= set(result)
    split = result["data"]["split"]
    assert not set(split["train"]) & set(split["test"]) and not set(split["val"]) & set(split["test"])
    assert {"zero-filled psnr", "cg-sense psnr", "varnet psnr"} <= set(result["means"])
    assert str(ROOT) not in (folder / "result.json").read_text() + (folder / "run.ipynb").read_text()


def test_a_student_by_school_without_ground_truth_then_only_once(teacher, workplace):
    profile, run = load_profile("smoke"), Run("varnet", 6, 0.40, "school")
    job = job_of(run, profile, teacher, str(workplace / "data"))
    assert run_job(job).state == "done"
    made = (run.folder(teacher) / "result.json").stat().st_mtime_ns
    assert run_job(job).state == "kept" and (run.folder(teacher) / "result.json").stat().st_mtime_ns == made
    result = json.loads((run.folder(teacher) / "result.json").read_text())
    assert result["parameters"] < json.loads((Run("varnet").folder(teacher) / "result.json").read_text())["parameters"]
    assert result["teacher"]["file"] == "network.safetensors"


def test_another_setting_makes_another_key():
    profile, run = load_profile("smoke"), Run("varnet", 6, 0.40, "school")
    key = run_key(run, profile)
    steps = {"networks.varnet.finetuning.school.steps": 4}
    assert run_key(run, load_profile("smoke", steps)) != key, "a setting of this run"
    assert run_key(run, load_profile("smoke", {"networks.varnet.finetuning.supervised.steps": 4})) == key, "a setting of another run"
    assert run_key(run, load_profile("smoke", {"latency.repeats": 9, "workers": 3})) == key, "settings without influence on numbers"
    assert len({run_key(other, profile) for other in students(profile, "varnet", 6)}) == len(students(profile, "varnet", 6))


def test_a_damaged_result_counts_as_missing(tmp_path):
    run = Run("varnet")
    run.folder(tmp_path).mkdir(parents=True)
    (run.folder(tmp_path) / "result.json").write_text('{"key": "abc"')
    assert not is_complete(run, tmp_path, "abc")


def test_a_student_without_a_teacher_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="run pretrain.ipynb with network='varnet'"):
        find_teacher(Run("varnet", 6, 0.40, "school"), load_profile("smoke"), tmp_path)


def test_one_failing_job_does_not_stop_the_others(tmp_path, capfd):
    cells = [nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("assert x != 2, 'x must not be 2'")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "small.ipynb")
    jobs = [Job(f"x={x}", tmp_path / "small.ipynb", tmp_path / f"{x}.ipynb", {"x": x}) for x in (1, 2, 3)]
    assert [outcome.state for outcome in run_jobs(jobs, workers=2)] == ["done", "failed", "done"]
    told = capfd.readouterr()
    assert "small.ipynb (x=2) failed" in told.out + told.err and "x must not be 2" in told.out + told.err
    assert failing_cell(tmp_path / "1.ipynb") == ""


def test_a_missing_notebook_is_reported_not_raised(tmp_path):
    outcome = run_job(Job("absent", tmp_path / "absent.ipynb", tmp_path / "out.ipynb"))
    assert outcome.state == "failed" and "absent.ipynb" in outcome.error


@pytest.mark.parametrize("arguments, message", [(["--network", "unet"], "deq, varnet, e2e-varnet"), (["--profile", "dmeo"], "demo, gpu")])
def test_the_command_line_names_the_choices(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_helps():
    done = subprocess.run([sys.executable, "-m", "spade.batch", "--help"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0 and "--network" in done.stdout


def test_a_profile_may_name_a_users_own_images(tmp_path):
    """Images in place of the tissue maps: one acquisition per subject, as many subjects as the split asks for."""
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["image"] = np.random.default_rng(0).random((6, 70, 96)).astype(np.float32)
        file["subject"] = np.repeat(np.arange(3), 2)
    overrides = {"data.simulation.images": str(tmp_path / "mine.h5"), "data.subjects": [1, 1, 1]}
    files = acquisition_files(load_profile("smoke", overrides), str(tmp_path / "out"), progress=False)
    assert len(files) == 3
    with h5py.File(files[0]) as file:
        assert file["kspace"].shape[:2] == (2, 4) and file["reconstruction_rss"].shape == (2, 64, 96)


def test_a_named_teacher_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="parameter teacher names .*nowhere.safetensors"):
        find_teacher(Run("varnet", 6, 0.40, "school"), load_profile("smoke"), tmp_path, str(tmp_path / "nowhere.safetensors"))
