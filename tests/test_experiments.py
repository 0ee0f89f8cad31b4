"""The experiment notebooks as papermill calls them, and the runs, data and teachers that they share."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from spade.config import load_config
from spade.data.photos import embedded_photos
from spade.metrics import evaluate
from spade.runs import (
    Run,
    acquisition_files,
    build_network,
    data_checksum,
    data_files,
    datasets,
    file_checksum,
    find_teacher,
    first_weights,
    is_complete,
    load_teacher,
    loop_settings,
    measurement_facts,
    photo_files,
    picture_batches,
    pre_finetune_set,
    run_inputs,
    run_key,
    shipped_teacher,
    strategy_settings,
    tidy,
    training_of,
    training_set,
)
from spade.workflow import run_parameters, students

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
VARNET, STUDENT, PHOTO_STUDENT = (
    Run("varnet"),
    Run("varnet", 6, 0.40, "school"),
    Run("usrnet", ratio=0.40, strategy="school"),
)
JUDGED = Run("usrnet", ratio=0.40, strategy="supervised")  # also evaluated before fine-tuning


def papermill(
    run: Run, out: Path, config: str = "smoke", data: str = "", **more: object
) -> subprocess.CompletedProcess:
    """The call of a run's notebook, as the workflow makes it."""
    parameters = yaml.safe_dump({**run_parameters(run, load_config(config), str(out), data), **more})
    executed, notebook = run.folder(out) / "run.ipynb", f"nbs/experiments/{run.notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "workflow/scripts/run_notebook.py", notebook, executed, "-y", parameters]
    command += ["--no-progress-bar"]
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")


def result_of(run: Run, out: Path) -> dict:
    return json.loads((run.folder(out) / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_has_its_parameters_cell_and_prose(path):
    cells = nbformat.read(path, as_version=4).cells
    parameters = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1 and 'config = "demo"' in " ".join(parameters[0].split())
    assert cells[0].source.startswith("# ") and "**Question.**" in cells[0].source
    assert cells[-1].source.startswith("## Interpretation")
    assert not any("#| export" in cell.source for cell in cells) and (path.parent / ".notest").is_file()


@pytest.mark.parametrize("notebook, parameters, choices", [
    ("pretrain", {"config": "smokee"}, "cbsd68, demo, gpu, paper, siat, smoke"),
    ("pretrain", {"network": "unet"}, "deq, varnet, e2e-varnet"),
    ("finetune", {"strategy": "selfsupervised"}, "supervised, school, self-supervised"),
    ("finetune", {"start": "cold"}, "pruned, random"),
    ("finetune", {"ratio": 1.5}, "between 0 and 1"),
    ("table_mri", {"networks": "varnet usrnnet"}, "deq, varnet, e2e-varnet"),
    ("table_mri", {"acceleration": 4}, "choose one of 6, 8, 10"),
    ("table_sr", {"scales": "5"}, "choose one of 2, 3, 4"),
    ("pretrain", {"ratio": 0.4}, "choose one of 0"),
])  # fmt: skip
def test_an_unknown_choice_fails_in_the_first_cell_and_names_the_choices(notebook, parameters, choices):
    cells = nbformat.read(ROOT / "nbs" / "experiments" / f"{notebook}.ipynb", as_version=4).cells
    given, first = [cell.source for cell in cells if cell.cell_type == "code"][:2]
    names: dict = {}
    exec(given, names)
    with pytest.raises(ValueError, match=choices):
        exec(first, names | parameters)


# A run of each problem through papermill


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the results of a teacher and a student of VarNet, and of USRNet."""
    folder = tmp_path_factory.mktemp("experiments")
    for run in (VARNET, STUDENT, PHOTO_STUDENT.teacher, PHOTO_STUDENT, JUDGED):
        done = papermill(run, folder, data=str(folder / "data"))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_training_sets_the_contraction_of_its_deq(tmp_path):
    student = Run("deq", 6, 0.40, "supervised")
    for run, section, contraction in ((student.teacher, "pretraining", 0.9), (student, "finetuning.supervised", 0.8)):
        changed = {f"networks.deq.{section}.contraction": contraction}
        done = papermill(run, tmp_path, data=str(tmp_path / "data"), overrides=changed)
        assert done.returncode == 0, done.stderr[-3000:]
        assert load_teacher(run.folder(tmp_path) / "network.safetensors").contraction == contraction


def test_a_teacher_leaves_a_complete_result(workplace):
    folder, result = VARNET.folder(workplace), result_of(VARNET, workplace)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.csv",
        "curve.csv",
        "images.npz",
        "network.safetensors",
        "run.ipynb",
        "result.json",
    }
    assert {"commit", "versions", "device", "config", "data", "seconds", "run_key", "sampling_rate"} <= set(result)
    split = result["data"]["split"]
    assert not set(split["train"]) & set(split["test"]) and not set(split["val"]) & set(split["test"])
    assert {"zero-filled psnr", "cg-sense psnr", "varnet psnr"} <= set(result["means"])
    assert str(ROOT) not in (folder / "result.json").read_text(encoding="utf-8") + (folder / "run.ipynb").read_text(
        encoding="utf-8"
    )
    assert result["run_key"] == run_key(VARNET, load_config("smoke"), str(workplace / "data"))


def test_a_student_by_school_is_trained_once(workplace):
    result, path = result_of(STUDENT, workplace), STUDENT.folder(workplace) / "result.json"
    assert (
        result["parameters"] < result_of(VARNET, workplace)["parameters"] and result["teacher"] == "network.safetensors"
    )
    made = path.stat().st_mtime_ns
    done = papermill(STUDENT, workplace, data=str(workplace / "data"))
    assert done.returncode == 0 and path.stat().st_mtime_ns == made, "its notebook ends once it finds its key"
    teacher = find_teacher(STUDENT, load_config("smoke"), workplace)
    inputs = run_inputs(STUDENT, load_config("smoke"), str(workplace / "data"), teacher)
    assert is_complete(STUDENT, workplace, inputs)
    assert not is_complete(STUDENT, workplace, inputs | {"teacher_checksum": "another"})


def test_usrnet_leaves_results_by_scale(workplace):
    run = PHOTO_STUDENT.teacher
    folder, result = run.folder(workplace), result_of(run, workplace)
    metrics = pd.read_csv(folder / "metrics.csv")
    assert {"bicubic x2 psnr", "usrnet x3 psnr", "usrnet x4 ssim"} <= set(
        result["means"]
    ) and "sampling_rate" not in result
    assert {"scales", "kernels", "noise", "pairing", "validation_psnr"} <= set(result) and result["scales"] == [2, 3, 4]
    assert (
        "acceleration" not in metrics
        and set(metrics["scale"]) == {2, 3, 4}
        and set(metrics["model"]) == {"usrnet", "bicubic"}
    )
    assert set(pd.read_csv(folder / "curve.csv").columns) == {"step", "loss", "learning_rate", "seconds", "validation"}
    with np.load(folder / "images.npz") as images:
        assert {"ground truth", "bicubic", "teacher", "ground truth 2"} <= set(images.files)
        assert images["teacher"].dtype == np.uint8 and images["teacher"].shape == (48, 48, 3)


def test_a_student_of_usrnet_serves_all_scales_and_is_validated_from_step_0(workplace):
    folder = JUDGED.folder(workplace)
    metrics, curve = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "curve.csv")
    psnr = metrics[metrics["metric"] == "psnr"]
    assert psnr.groupby("strategy")["scale"].nunique().to_dict() == {"none": 3, "repaired": 3, "supervised": 3}
    images = psnr.groupby("strategy")["image"].nunique().to_dict()
    assert images == {"none": 1, "repaired": 1, "supervised": 2}, "photos.pre_finetune_limit is 1"
    school = pd.read_csv(PHOTO_STUDENT.folder(workplace) / "metrics.csv")
    assert set(school["strategy"]) == {"school"}, "what pruning leaves is evaluated once"
    assert curve["step"].tolist() == [0, 1, 2, 3] and curve["validation"].notna().all() and np.isnan(curve["loss"][0])
    assert result_of(JUDGED, workplace)["before_measurements"] == 3


def test_a_run_of_the_gpu_configuration_on_a_cpu(tmp_path):
    """320 x 320 with 16 coils, as in the paper; two of VarNet's eight cascades, one step, one slice a split."""
    shorter = {
        "device": "cpu",
        "threads": 1,
        "data.subjects": [1, 1, 1],
        "data.simulation.slices": 1,
        "networks.varnet.arguments.num_cascades": 2,
        "networks.varnet.pretraining.steps": 1,
        "networks.varnet.pretraining.validate_every": 1,
    }
    assert not load_config("gpu").networks["varnet"].arguments, "the paper's"
    done = papermill(VARNET, tmp_path, "gpu", str(tmp_path / "data"), overrides=shorter)
    assert done.returncode == 0, done.stderr[-3000:]
    result, curve = result_of(VARNET, tmp_path), pd.read_csv(VARNET.folder(tmp_path) / "curve.csv")
    assert result["parameters"] == 19_634_712 / 8 * 2
    assert result["config"]["name"] == "gpu" and result["device"].startswith("CPU")
    assert len(curve) == 1 and np.isfinite(curve["loss"]).all() and np.isfinite(list(result["means"].values())).all()
    with h5py.File(next((tmp_path / "data").glob("*.h5"))) as file:
        assert file["kspace"].shape == (1, 16, 640, 320)


# Keys


def test_another_setting_makes_another_key():
    config = load_config("smoke")
    key = run_key(STUDENT, config)
    changed = lambda run, **settings: run_key(
        run, load_config("smoke", {name.replace("__", "."): value for name, value in settings.items()})
    )
    assert changed(STUDENT, networks__varnet__finetuning__school__steps=4) != key, "a setting of this run"
    assert changed(STUDENT, networks__varnet__finetuning__supervised__steps=4) == key, "a setting of another run"
    assert changed(STUDENT, latency__repeats=9, photos__noise=0.01) == key, "settings without influence on its numbers"
    runs = students(config, "varnet", 6)
    assert len({run_key(run, config) for run in runs}) == len(runs)
    key = run_key(PHOTO_STUDENT, config)
    assert (
        changed(PHOTO_STUDENT, photos__noise=0.01) != key
        and changed(PHOTO_STUDENT, data__seed=5, sampling__exact=True) == key
    )


def test_changed_data_make_another_input_and_another_place_does_not(tmp_path):
    config = load_config("smoke")
    (tmp_path / "here").mkdir()
    for name in ("a", "b"):
        (tmp_path / "here" / f"{name}.h5").write_bytes(name.encode() * 100)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    checksum = lambda folder: run_inputs(STUDENT, config, str(tmp_path / folder))["data_checksum"]
    first = checksum("here")
    assert first == checksum("there") != checksum("nowhere")
    (tmp_path / "there" / "b.h5").write_bytes(b"c" * 100)
    assert checksum("there") != first
    (tmp_path / "here" / "b.h5").rename(tmp_path / "here" / "c.h5")
    assert checksum("here") != first


def test_zeros_in_the_middle_of_a_data_file_make_another_input(tmp_path):
    path, content = tmp_path / "a.h5", bytearray(os.urandom(1 << 20))
    checksum = lambda: run_inputs(STUDENT, load_config("smoke"), str(tmp_path))["data_checksum"]
    path.write_bytes(content)
    first = checksum()
    content[1 << 18 : 1 << 19] = bytes(1 << 18)
    path.write_bytes(content)
    assert checksum() != first


def test_the_checksum_of_a_large_file_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPADE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.h5"
    path.write_bytes(b"a" * 1000)
    checksum = data_checksum(path, large=0)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    with monkeypatch.context() as patched:
        patched.setattr("spade.runs.file_checksum", lambda path: pytest.fail("read again"))
        assert data_checksum(path, large=0) == checksum
    kept.write_bytes(kept.read_bytes().replace(checksum[:2].encode(), b"zz"))
    assert data_checksum(path, large=0) == checksum, "a damaged record is not believed"
    path.write_bytes(b"b" * 1000)
    assert data_checksum(path, large=0) == file_checksum(path) != checksum


@pytest.mark.parametrize("name", ["result.json", "metrics.csv", "curve.csv", "images.npz", "network.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "cut", "flipped"])
def test_a_damaged_file_of_a_run_is_named_and_the_run_counts_as_not_made(workplace, tmp_path, name, damage):
    shutil.copytree(STUDENT.folder(workplace), STUDENT.folder(tmp_path))
    inputs = {"run_key": result_of(STUDENT, workplace)["run_key"]}
    path = STUDENT.folder(tmp_path) / name
    content = path.read_bytes()
    assert is_complete(STUDENT, tmp_path, inputs)
    if damage == "removed":
        path.unlink()
        expected = None if name == "result.json" else f"{name} must be as it was written, got no file"
    else:
        middle = len(content) // 2
        flip = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + (b"" if damage == "cut" else flip + content[middle + 1 :]))
        expected = rf"{name} (must be as it was written, got a changed or truncated file|is not valid JSON)"
    with pytest.warns(UserWarning, match=rf"{expected}.* {STUDENT.name} is made again") if expected else nullcontext():
        assert not is_complete(STUDENT, tmp_path, inputs)


def test_no_student_is_trained_from_a_damaged_teacher(workplace, tmp_path):
    shutil.copytree(VARNET.folder(workplace), VARNET.folder(tmp_path))
    path = VARNET.folder(tmp_path) / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-1001] ^= 1
    path.write_bytes(content)
    done = papermill(STUDENT, tmp_path, data=str(workplace / "data"))
    assert done.returncode == 1 and not (STUDENT.folder(tmp_path) / "curve.csv").exists()
    assert re.search(r"ValueError: \S+/varnet-R6-teacher-seed0/network.safetensors ", done.stderr), done.stderr[-2000:]


def test_other_weights_of_a_shipped_teacher_make_another_key(monkeypatch, tmp_path):
    demo, run = load_config("demo"), Run("varnet", 8)
    key = run_key(run, demo)
    (tmp_path / "teacher.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr("spade.runs.shipped_teacher", lambda run, config: tmp_path / "teacher.safetensors")
    assert run_key(run, demo) != key


# Teachers


def test_a_teacher_of_another_acceleration_starts_from_the_shipped_one():
    demo, eight = load_config("demo"), Run("varnet", 8)
    first = first_weights(eight, demo)
    assert first == shipped_teacher(VARNET, demo) and first_weights(VARNET, demo) is None
    assert training_of(demo, eight).steps < training_of(demo, VARNET).steps
    assert load_teacher(first).config() == build_network("varnet", demo).config()
    changed = load_config("demo", {"networks.varnet.warm_start.training.steps": 7})
    assert run_key(eight, changed) != run_key(eight, demo) and run_key(VARNET, changed) == run_key(VARNET, demo)
    smoke = load_config("smoke", {"networks.varnet.warm_start": {"acceleration": 6, "training": {"steps": 1}}})
    with pytest.raises(
        FileNotFoundError, match="must name an existing file of weights, got .*varnet_R6_smoke.safetensors"
    ):
        first_weights(eight, smoke)


def test_a_missing_teacher_is_named(tmp_path):
    smoke = load_config("smoke")
    with pytest.raises(FileNotFoundError, match="run pretrain.ipynb with config='smoke', network='varnet'"):
        find_teacher(STUDENT, smoke, tmp_path)
    with pytest.raises(
        FileNotFoundError, match="teacher must name an existing file of weights, got .*nowhere.safetensors"
    ):
        find_teacher(STUDENT, smoke, tmp_path, str(tmp_path / "nowhere.safetensors"))


def test_published_weights_are_loaded(tmp_path, shared):
    config = load_config("smoke", {"networks.usrnet.published": str(shared / "weights" / "usrnet_tiny.pth")})
    assert run_parameters(PHOTO_STUDENT.teacher, config, "out")["teacher"] == "published"
    assert find_teacher(PHOTO_STUDENT, config, tmp_path).name == "usrnet_tiny.pth"
    model = load_teacher(find_teacher(PHOTO_STUDENT, config, tmp_path, "published"))
    assert sum(p.numel() for p in model.parameters()) == 590_332 and model.config()["iterations"] == 6
    table = evaluate(model, picture_batches(datasets(config, PHOTO_STUDENT)["test"], PHOTO_STUDENT), progress=False)
    assert len(tidy(table, PHOTO_STUDENT)) == 4 and (table["psnr"] > 20).all()
    arguments = load_config("cbsd68").networks["usrnet"].arguments.items()
    assert all(list(np.ravel(model.config()[name])) == list(np.ravel(value)) for name, value in arguments), "as timed"


def test_missing_and_foreign_published_weights_are_named(tmp_path):
    config = load_config("smoke", {"networks.usrnet.published": "data/nowhere.pth"})
    with pytest.raises(FileNotFoundError, match="must name an existing file of weights, got data/nowhere.pth"):
        find_teacher(Run("usrnet"), config, tmp_path, "published")
    with pytest.raises(FileNotFoundError, match="networks.usrnet.published of config 'smoke' must name .*, got none"):
        find_teacher(Run("usrnet"), load_config("smoke"), tmp_path, "published")
    for content in ({"weight": torch.zeros(3)}, [1, 2], b"no checkpoint at all"):
        path = tmp_path / "other.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="other.pth must hold USRNet's weights"):
            load_teacher(path)


# Data


def test_a_configuration_may_name_a_users_own_images(tmp_path):
    """Images in place of the tissue maps: one acquisition per subject, as many subjects as the split asks for."""
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["image"] = np.random.default_rng(0).random((6, 70, 128)).astype(np.float32)
        file["subject"] = np.repeat(np.arange(3), 2)
    overrides = {"data.simulation.images": str(tmp_path / "mine.h5"), "data.subjects": [1, 1, 1]}
    config = load_config("smoke", overrides)
    files = acquisition_files(config, str(tmp_path / "out"), progress=False)
    assert len(files) == 3
    with h5py.File(files[0]) as file:
        assert file["kspace"].shape[:2] == (2, 4) and file["reconstruction_rss"].shape == (
            2,
            *config.data.simulation.shape,
        )


def test_simulated_acquisitions_do_not_go_among_measured_ones(tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"a scanner's")
    with pytest.raises(ValueError, match="scan.h5"):
        acquisition_files(load_config("smoke"), str(tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.h5"]


def test_photographs_of_train_validation_and_test_are_apart(tmp_path):
    files = photo_files(load_config("smoke").photos)
    assert not set(files["train"]) & set(files["test"]) and not set(files["val"]) & {*files["train"], *files["test"]}
    for path in embedded_photos()["test"]:
        shutil.copy(path, tmp_path / f"another_name_{path.name}")
    with pytest.raises(ValueError, match="another_name_"):
        photo_files(load_config("smoke", {"photos.train": str(tmp_path)}).photos)
    with pytest.raises(ValueError, match="photos.validation_limit"):
        photo_files(load_config("smoke", {"photos.validation_limit": 9}).photos)
    found = data_files(load_config("smoke"), Run("usrnet"), str(tmp_path))
    assert {path.parent for path in found if path.name.startswith("another")} == {tmp_path}
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        datasets(load_config("smoke", {"photos.test": str(tmp_path / "nothing_here")}), Run("usrnet"))


def test_what_a_strategy_sees_of_photographs():
    config = load_config("smoke", {"photos.measurement_crop": 32, "networks.usrnet.finetuning.school.batch_size": 2})
    splits = datasets(config, PHOTO_STUDENT)
    crops = training_set(splits, config, PHOTO_STUDENT)
    assert "x" not in crops[0] and crops[0]["y"].shape[-1] * crops[0]["scale"] <= 32
    assert {crops[i]["scale"] for i in range(len(crops))} == {2, 3, 4}
    assert "x" in training_set(splits, config, Run("usrnet", ratio=0.40, strategy="supervised"))[0]
    whole = training_set(splits, load_config("smoke"), PHOTO_STUDENT)
    assert len(whole) == len(splits["test"]) and "x" not in whole[0]
    few = pre_finetune_set(splits, config, PHOTO_STUDENT)
    assert len(few) == 3 < len(splits["test"]) and torch.equal(few[0]["y"], splits["test"][0]["y"]), (
        "the same measurement"
    )


def test_other_seeds_train_on_other_crops_and_test_on_the_same():
    config = load_config("smoke")
    first, second = (datasets(config, Run("usrnet", seed=seed)) for seed in (0, 1))
    assert torch.equal(first["test"][0]["y"], second["test"][0]["y"])
    assert not torch.equal(first["train"][0]["x"], second["train"][0]["x"])


def test_facts_and_pictures_of_photographs():
    config, run = load_config("smoke"), Run("usrnet")
    splits = datasets(config, run)
    facts = measurement_facts(splits, config, run)
    assert facts["kernels"] == 12 and facts["photographs"] == 2 and facts["measurements"] == 6
    pictures = picture_batches(splits["test"], run)
    assert [batch.info["scale"] for batch in pictures] == [[3], [3]] and len(
        {batch.info["file"][0] for batch in pictures}
    ) == 2


def test_a_run_of_super_resolution_has_no_acceleration():
    assert Run("usrnet", 6) == Run("usrnet", 8) and Run("usrnet").name == "usrnet-teacher-seed0"
    assert Run("usrnet", ratio=0.4, strategy="school", start="random", seed=2).name == "usrnet-0.40-school-random-seed2"
    assert "acceleration" not in run_parameters(Run("usrnet"), load_config("smoke"), "out")


def test_settings_of_strategy_and_loop():
    config = load_config("smoke")
    assert strategy_settings(config, Run("usrnet", ratio=0.4, strategy="self-supervised"))["rotations"] == "right"
    angles = load_config("smoke", {"self_supervised.rotations": "any"})
    assert strategy_settings(angles, Run("varnet", ratio=0.4, strategy="self-supervised"))["rotations"] == "any"
    with pytest.raises(ValueError, match="choose one of school"):
        strategy_settings(load_config("cbsd68"), Run("usrnet", ratio=0.4, strategy="supervised"))
    training = load_config("cbsd68").networks["usrnet"].finetuning["school"].at(0.05)
    assert loop_settings(training, Run("usrnet"), config)["validate_every"] == training.validate_every
