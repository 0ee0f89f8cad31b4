"""The experiment notebooks as papermill calls them, and the batch that does so."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml

from spade.workflow import job_of, main, ready_teacher, report_jobs, students
from spade.runs import Run, acquisition_files, before_set, build_network, data_files, datasets, find_teacher, first_weights, is_complete, load_teacher, loop_settings, measurement_facts, photo_datasets, photo_files, picture_batches, run_key, shipped_teacher, strategy_settings, tidy, training_of, training_set
from spade.jobs import Job, failing_cell, run_job, run_jobs
from spade.metrics import evaluate
from spade.data.photos import embedded_photos
from spade.config import load_profile

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
    ("pretrain", {"profile": "smokee"}, "cbsd68, demo, gpu, paper, siat, smoke"),
    ("pretrain", {"network": "unet"}, "deq, varnet, e2e-varnet"),
    ("finetune", {"strategy": "selfsupervised"}, "supervised, school, self-supervised"),
    ("finetune", {"start": "cold"}, "pruned, random"),
    ("finetune", {"ratio": 1.5}, "between 0 and 1"),
    ("table_1", {"networks": "varnet usrnnet"}, "deq, varnet, e2e-varnet"),
    ("table_1", {"acceleration": 4}, "choose one of 6, 8, 10"),
    ("pretrain", {"ratio": 0.4}, "choose one of 0"),
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


def test_a_teacher_of_another_acceleration_goes_on_from_the_shipped_one():
    demo, six, eight = load_profile("demo"), Run("varnet", 6), Run("varnet", 8)
    first = first_weights(eight, demo)
    assert first == shipped_teacher(six, demo) and first_weights(six, demo) is None
    assert training_of(demo, eight).steps < training_of(demo, six).steps
    assert load_teacher(first).config() == build_network("varnet", demo).config()
    changed = load_profile("demo", {"networks.varnet.transfer.training.steps": 7})
    assert run_key(eight, changed) != run_key(eight, demo) and run_key(six, changed) == run_key(six, demo)


def test_a_teacher_cannot_go_on_from_one_that_does_not_ship():
    smoke = load_profile("smoke", {"networks.varnet.transfer": {"acceleration": 6, "training": {"steps": 1}}})
    with pytest.raises(FileNotFoundError, match="varnet_R6_smoke.safetensors of the package, which does not exist"):
        first_weights(Run("varnet", 8), smoke)


def test_changed_data_make_another_key_and_another_place_does_not(tmp_path):
    run, profile = Run("varnet", 6, 0.40, "school"), load_profile("smoke")
    for name in ("a", "b"):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / f"{name}.h5").write_bytes(name.encode() * 100)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    key = run_key(run, profile, data=str(tmp_path / "here"))
    assert key == run_key(run, profile, data=str(tmp_path / "there")) != run_key(run, profile, data=str(tmp_path / "nowhere"))
    (tmp_path / "there" / "b.h5").write_bytes(b"c" * 100)
    assert run_key(run, profile, data=str(tmp_path / "there")) != key
    (tmp_path / "here" / "b.h5").rename(tmp_path / "here" / "c.h5")
    assert run_key(run, profile, data=str(tmp_path / "here")) != key


def test_a_damaged_result_counts_as_missing(tmp_path):
    run = Run("varnet")
    run.folder(tmp_path).mkdir(parents=True)
    (run.folder(tmp_path) / "result.json").write_text('{"key": "abc"')
    assert not is_complete(run, tmp_path, "abc")


def test_a_student_without_a_teacher_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="run pretrain.ipynb with network='varnet'"):
        find_teacher(Run("varnet", 6, 0.40, "school"), load_profile("smoke"), tmp_path)


def small_notebook(path: Path, cell: str) -> Path:
    """A notebook with the parameter x and one cell more."""
    cells = [nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(cell)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_one_failing_job_does_not_stop_the_others(tmp_path, capfd):
    notebook = small_notebook(tmp_path / "small.ipynb", "assert x != 2, 'x must not be 2'")
    jobs = [Job(f"x={x}", notebook, tmp_path / f"{x}.ipynb", {"x": x}) for x in (1, 2, 3)]
    assert [outcome.state for outcome in run_jobs(jobs, workers=2)] == ["done", "failed", "done"]
    told = capfd.readouterr()
    assert "small.ipynb (x=2) failed" in told.out + told.err and "x must not be 2" in told.out + told.err
    assert failing_cell(tmp_path / "1.ipynb") == ""


@pytest.mark.parametrize("bad_starts", [1, 2])
def test_a_kernel_that_does_not_start_is_started_once_more(bad_starts, tmp_path, monkeypatch):
    starts = tmp_path / "starts"
    kernel = f"import runpy, sys; from pathlib import Path; log = Path({str(starts)!r}); n = len(log.read_text()) if log.exists() else 0; log.write_text('x' * (n + 1)); " \
             f"n < {bad_starts} and sys.exit(1); sys.argv.pop(0); runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)"
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [sys.executable, "-c", kernel, "-", "-f", "{connection_file}"], "display_name": "unsteady", "language": "python"}), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    outcome = run_job(Job("unsteady", small_notebook(tmp_path / "small.ipynb", "print(x)"), tmp_path / "out.ipynb"))
    assert starts.read_text() == "xx"
    assert outcome.state == ("done" if bad_starts == 1 else "failed")
    assert bad_starts == 1 or outcome.error.startswith("RuntimeError: Kernel died before replying")


def test_a_job_that_fails_in_a_cell_is_not_called_again(tmp_path):
    log = tmp_path / "calls"
    notebook = small_notebook(tmp_path / "failing.ipynb", f"open({str(log)!r}, 'a').write('x'); raise RuntimeError('Kernel died before replying')")
    assert run_job(Job("failing", notebook, tmp_path / "out.ipynb")).state == "failed" and log.read_text() == "x"


def test_a_kernel_that_was_killed_is_told_with_its_cell(tmp_path):
    outcome = run_job(Job("killed", small_notebook(tmp_path / "killed.ipynb", "import os\nos.kill(os.getpid(), 9)"), tmp_path / "out.ipynb"))
    assert outcome.state == "failed" and "]: import os" in outcome.error and "Kernel died" in outcome.error


def test_a_missing_notebook_is_reported_not_raised(tmp_path):
    outcome = run_job(Job("absent", tmp_path / "absent.ipynb", tmp_path / "out.ipynb"))
    assert outcome.state == "failed" and "absent.ipynb" in outcome.error


@pytest.mark.parametrize("arguments, message", [(["--network", "unet"], "deq, varnet, e2e-varnet"), (["--profile", "dmeo"], "demo, gpu"),
                                                (["--acceleration", "4"], "choose one of 6, 8, 10")])
def test_the_command_line_names_the_choices(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_helps():
    done = subprocess.run([sys.executable, "-m", "spade.workflow", "--help"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
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


def test_a_job_of_the_gpu_profile_runs_on_a_cpu(tmp_path):
    """The paper's VarNet at 320 x 320 with 16 coils; two steps of pretraining, and one subject a split with one slice."""
    shorter = {"device": "cpu", "threads": 2, "data.subjects": [1, 1, 1], "data.simulation.slices": 1, "networks.varnet.pretraining.steps": 2, "networks.varnet.pretraining.validate_every": 2}
    profile = load_profile("gpu", shorter)
    job = job_of(Run("varnet"), profile, tmp_path, str(tmp_path / "data"))
    outcome = run_job(replace(job, parameters={**job.parameters, "overrides": shorter}), threads=2)
    assert outcome.state == "done", outcome
    result = json.loads((Run("varnet").folder(tmp_path) / "result.json").read_text())
    assert result["parameters"] == 19_634_712 and result["profile"]["name"] == "gpu" and result["device"].startswith("CPU")
    curve = pd.read_csv(Run("varnet").folder(tmp_path) / "curve.csv")
    assert len(curve) == 2 and np.isfinite(curve["loss"]).all() and np.isfinite(list(result["means"].values())).all()
    with h5py.File(next((tmp_path / "data").glob("*.h5"))) as file:
        assert file["kspace"].shape == (1, 16, 640, 320)


# Super-resolution through the same notebooks

@pytest.fixture(scope="module")
def photo_teacher(workplace) -> Path:
    """USRNet pretrained in the smoke profile; returns the folder of results."""
    out = workplace / "photo_out"
    outcome = run_job(job_of(Run("usrnet"), load_profile("smoke"), out))
    assert outcome.state == "done", outcome
    return out


def test_pretraining_usrnet_leaves_results_by_scale(photo_teacher):
    folder = Run("usrnet").folder(photo_teacher)
    assert folder.name == "usrnet-teacher-seed0"
    result, metrics = json.loads((folder / "result.json").read_text()), pd.read_csv(folder / "metrics.csv")
    assert {"bicubic x2 psnr", "usrnet x3 psnr", "usrnet x4 ssim"} <= set(result["means"]) and "sampling_rate" not in result
    assert {"scales", "kernels", "noise", "pairing", "validation_psnr", "key"} <= set(result) and result["scales"] == [2, 3, 4]
    assert "acceleration" not in metrics and set(metrics["scale"]) == {2, 3, 4} and set(metrics["model"]) == {"usrnet", "bicubic"}
    assert set(pd.read_csv(folder / "curve.csv").columns) == {"step", "loss", "learning_rate", "seconds", "validation"}
    split = result["data"]["split"]
    assert not set(split["train"]) & set(split["test"]) and not set(split["val"]) & {*split["test"], *split["train"]}
    with np.load(folder / "images.npz") as images:
        assert {"ground truth", "bicubic", "teacher", "ground truth 2"} <= set(images.files) and images["teacher"].dtype == np.uint8 and images["teacher"].shape == (48, 48, 3)
    assert str(ROOT) not in (folder / "result.json").read_text() + (folder / "run.ipynb").read_text()


def test_a_student_of_usrnet_by_school_serves_all_scales_and_is_validated_from_step_0(photo_teacher):
    run = Run("usrnet", ratio=0.40, strategy="school")
    job = job_of(run, load_profile("smoke"), photo_teacher)
    assert run_job(job).state == "done" and run_job(job).state == "kept"
    metrics, curve = pd.read_csv(run.folder(photo_teacher) / "metrics.csv"), pd.read_csv(run.folder(photo_teacher) / "curve.csv")
    psnr = metrics[metrics["metric"] == "psnr"]
    assert psnr.groupby("strategy")["scale"].nunique().to_dict() == {"none": 3, "school": 3}
    assert psnr.groupby("strategy")["image"].nunique().to_dict() == {"none": 1, "school": 2}, "photos.before is 1 in this profile"
    assert curve["step"].tolist() == [0, 1, 2, 3] and curve["validation"].notna().all() and np.isnan(curve["loss"][0])
    assert json.loads((run.folder(photo_teacher) / "result.json").read_text())["before_measurements"] == 3


def test_the_reports_of_super_resolution_render(photo_teacher):
    jobs = {job.name: job for job in report_jobs("usrnet", 6, load_profile("smoke"), photo_teacher)}
    assert list(jobs) == ["table_4", "table_6", "figure_5", "figure_steps"]
    outcome = run_job(jobs["table_4"])
    assert outcome.state == "done", outcome
    text = (photo_teacher / "table_4_usrnet.md").read_text()
    assert "×2" in text and "×3" in text and "(29.96, " in text and "without cutting a border" in text


def test_reports_follow_the_scales_of_the_profile(tmp_path):
    names = lambda scales: [job.name for job in report_jobs("usrnet", 6, load_profile("smoke", {"photos.scales": scales}), tmp_path)]
    assert names([2, 3]) == ["table_4", "figure_5", "figure_steps"] and names([4]) == ["table_6", "figure_5", "figure_steps"]


def test_a_run_of_super_resolution_has_no_acceleration():
    assert Run("usrnet", 6) == Run("usrnet", 8) and Run("usrnet").name == "usrnet-teacher-seed0"
    assert Run("usrnet", ratio=0.4, strategy="school", start="random", seed=2).name == "usrnet-0.40-school-random-seed2"
    assert "acceleration" not in job_of(Run("usrnet"), load_profile("smoke"), ROOT / "outputs" / "smoke").parameters


def test_the_key_of_super_resolution_follows_photos_and_not_acquisitions():
    run, profile = Run("usrnet", ratio=0.40, strategy="school"), load_profile("smoke")
    key = run_key(run, profile)
    assert run_key(run, load_profile("smoke", {"photos.noise": 0.01})) != key
    assert run_key(run, load_profile("smoke", {"networks.usrnet.self_supervised.weight": 2.0})) != key
    assert run_key(run, load_profile("smoke", {"data.seed": 5, "sampling.exact": True})) == key
    mri = Run("varnet", 6, 0.40, "school")
    assert run_key(mri, profile, data="nowhere") == run_key(mri, load_profile("smoke", {"photos.noise": 0.01}), data="nowhere")


def test_photographs_of_train_validation_and_test_are_apart(tmp_path):
    files = photo_files(load_profile("smoke").photos)
    assert not set(files["train"]) & set(files["test"]) and not set(files["val"]) & {*files["train"], *files["test"]}
    for path in embedded_photos()["test"]:
        shutil.copy(path, tmp_path / f"another_name_{path.name}")
    with pytest.raises(ValueError, match="another_name_.* of the test photographs"):
        photo_files(load_profile("smoke", {"photos.train": str(tmp_path)}).photos)
    with pytest.raises(ValueError, match="photos.validation_limit is 9, which leaves no photograph"):
        photo_files(load_profile("smoke", {"photos.validation_limit": 9}).photos)
    assert {path.parent for path in data_files(load_profile("smoke"), Run("usrnet"), str(tmp_path)) if path.name.startswith("another")} == {tmp_path}


def test_a_missing_folder_of_photographs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        datasets(load_profile("smoke", {"photos.test": str(tmp_path / "nothing_here")}), Run("usrnet"))


def test_what_a_strategy_sees_of_photographs():
    profile = load_profile("smoke", {"photos.measurement_crop": 32, "networks.usrnet.finetuning.school.batch_size": 2})
    run = Run("usrnet", ratio=0.40, strategy="school")
    splits = datasets(profile, run)
    crops = training_set(splits, profile, run)
    assert "x" not in crops[0] and crops[0]["y"].shape[-1] * crops[0]["scale"] <= 32 and {crops[i]["scale"] for i in range(len(crops))} == {2, 3, 4}
    assert "x" in training_set(splits, profile, Run("usrnet", ratio=0.40, strategy="supervised"))[0]
    whole = training_set(splits, load_profile("smoke"), run)
    assert len(whole) == len(splits["test"]) and "x" not in whole[0]
    few = before_set(splits, profile, run)
    assert len(few) == 3 < len(splits["test"]) and {item["file"] for item in few} == {splits["test"][0]["file"]}
    assert torch.equal(few[0]["y"], splits["test"][0]["y"]), "the same measurement"


def test_other_seeds_train_on_other_crops_and_test_on_the_same():
    profile = load_profile("smoke")
    first, second = (photo_datasets(profile, Run("usrnet", seed=seed)) for seed in (0, 1))
    assert torch.equal(first["test"][0]["y"], second["test"][0]["y"])
    assert not torch.equal(first["train"][0]["x"], second["train"][0]["x"])


def test_facts_and_pictures_of_photographs():
    profile = load_profile("smoke")
    splits = datasets(profile, Run("usrnet"))
    facts = measurement_facts(splits, profile, Run("usrnet"))
    assert facts["kernels"] == 12 and facts["photographs"] == 2 and facts["measurements"] == 6 and facts["pairing"] == "turn"
    pictures = picture_batches(splits["test"], Run("usrnet"))
    assert [batch.info["scale"] for batch in pictures] == [[3], [3]] and len({batch.info["file"][0] for batch in pictures}) == 2


def test_settings_of_strategy_and_loop():
    profile = load_profile("smoke")
    assert strategy_settings(profile, Run("usrnet", ratio=0.4, strategy="self-supervised"))["rotations"] == "right"
    assert strategy_settings(profile, Run("varnet", ratio=0.4, strategy="self-supervised"))["rotations"] == "any"
    with pytest.raises(ValueError, match="unknown strategy of usrnet in the profile 'cbsd68': 'supervised': choose one of school"):
        strategy_settings(load_profile("cbsd68"), Run("usrnet", ratio=0.4, strategy="supervised"))
    training = load_profile("cbsd68").networks["usrnet"].finetuning["school"].at(0.05)
    assert loop_settings(training, Run("usrnet"), profile)["validate_every"] == training.validate_every


def test_published_weights_are_named_loaded_or_refused(tmp_path, shared):
    overrides = {"networks.usrnet.published": str(shared / "weights" / "usrnet_tiny.pth")}
    profile, run = load_profile("smoke", overrides), Run("usrnet", ratio=0.4, strategy="school")
    assert ready_teacher(run, profile) == "published" and find_teacher(run, profile, tmp_path).name == "usrnet_tiny.pth"
    model = load_teacher(find_teacher(run, profile, tmp_path, "published"))
    assert sum(p.numel() for p in model.parameters()) == 590_332 and model.config()["iterations"] == 6
    table = evaluate(model, [batch for batch in picture_batches(datasets(profile, run)["test"], run)], progress=False)
    assert len(tidy(table, run)) == 4 and (table["psnr"] > 20).all()


def test_missing_and_foreign_published_weights_are_named(tmp_path):
    profile = load_profile("smoke", {"networks.usrnet.published": "data/nowhere.pth"})
    with pytest.raises(FileNotFoundError, match="names the weights data/nowhere.pth in networks.usrnet.published, which does not exist"):
        find_teacher(Run("usrnet"), profile, tmp_path, "published")
    with pytest.raises(FileNotFoundError, match="has no key networks.usrnet.published"):
        find_teacher(Run("usrnet"), load_profile("smoke"), tmp_path, "published")
    for content in ({"weight": torch.zeros(3)}, [1, 2], None):
        if content is None:
            (tmp_path / "other.pth").write_bytes(b"no checkpoint at all")
        else:
            torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth holds no weights of USRNet"):
            load_teacher(tmp_path / "other.pth")


def test_the_published_size_is_that_of_the_profile(shared):
    """Time is measured on the profile's arguments, quality with the published weights: they must be one network."""
    cbsd68 = load_profile("cbsd68").networks["usrnet"]
    published = load_teacher(shared / "weights" / "usrnet_tiny.pth").config()
    assert all(list(np.ravel(published[name])) == list(np.ravel(value)) for name, value in cbsd68.arguments.items())


# Ending a batch

def sleeping(tmp_path: Path) -> Path:
    """A notebook that says it has begun and sleeps."""
    cells = [nbformat.v4.new_code_cell("began = ''", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import os, pathlib, time\npathlib.Path(began).write_text(str(os.getpid()))\ntime.sleep(900)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "sleep.ipynb")
    return tmp_path / "sleep.ipynb"


def test_interrupting_a_batch_ends_its_jobs_down_to_the_kernel(tmp_path):
    notebook, began = sleeping(tmp_path), [tmp_path / f"began_{i}" for i in range(2)]
    script = ("import signal, sys\nfrom pathlib import Path\nfrom spade.jobs import Job, run_jobs\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"       # a shell lets background jobs ignore it
              f"jobs = [Job(str(i), Path({str(notebook)!r}), Path({str(tmp_path)!r}) / f'{{i}}.ipynb', {{'began': {str(tmp_path)!r} + f'/began_{{i}}'}}) for i in range(3)]\n"
              "try:\n    run_jobs(jobs, workers=2)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n")
    batch = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 300
    while not all(path.is_file() and path.read_text() for path in began) and time.time() < deadline:
        time.sleep(0.2)
    kernels = [psutil.Process(int(path.read_text())) for path in began]
    family = psutil.Process(batch.pid).children(recursive=True)
    assert all(kernel in family for kernel in kernels) and len(family) >= 4, "two papermills, two kernels"
    batch.send_signal(signal.SIGINT)
    told, _ = batch.communicate(timeout=300)
    assert batch.returncode == 130, told
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and not (tmp_path / "began_2").exists() and "failed" not in told


def test_the_command_line_ends_with_130_when_it_is_terminated(tmp_path):
    """`python -m spade.workflow` itself, terminated while its first job runs; nothing of it is left."""
    profile = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    assert profile["workers"] == 2
    batch = subprocess.Popen([sys.executable, "-m", "spade.workflow", "demo", "--network", "usrnet", "--profile", "smoke", "--out", str(tmp_path / "out")], cwd=ROOT,
                             env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, family = time.time() + 300, []
    while len(family) < 2 and time.time() < deadline and batch.poll() is None:
        time.sleep(0.2)
        family = psutil.Process(batch.pid).children(recursive=True)
    batch.terminate()
    _, errors = batch.communicate(timeout=300)
    assert batch.returncode == 130 and "goes on from here" in errors, errors
    assert family and not psutil.wait_procs(family, timeout=10)[1]


def test_simulated_acquisitions_do_not_go_among_measured_ones(tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"a scanner's")
    with pytest.raises(ValueError, match=r"holds scan.h5, which is none of the acquisitions that the profile 'smoke' simulates; .* without data.simulation"):
        acquisition_files(load_profile("smoke"), str(tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.h5"]
