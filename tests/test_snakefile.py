"""The batch of the whole paper: which jobs a target needs, what a change makes again, how a failure is told, one job a GPU."""
import contextlib
import gc
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml

from spade.runs import known_code_key
from spade.workflow import estimate, job_resources, main, minutes_on, minutes_to_reserve, paper_pace, paper_reports, paper_runs, plan, report_key, resources_by_rule, tell_plan, write_resources
from spade.runs import Run, settings_key
from spade.files import write_json
from spade.jobs import main as run_job
from spade.jobs import own_gpu, visible_gpus
from spade.config import as_plain, load_profile
from spade.training import read_state

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("snakemake")


def arguments(out: Path, profile: str = "config/smoke.yaml", **config: str) -> list[str]:
    """Of Snakemake, for a profile and results in `out`."""
    settings = {"results": out, "acquisitions": f"{out}/acquisitions", **config}
    return [*(["--configfile", profile] if profile else []), "--config", *(f"{name}={value}" for name, value in settings.items()), "--cores", "1", "--nocolor"]


def snakemake(*what: str, out: Path | str = "out", profile: str = "config/smoke.yaml", **config: str) -> str:
    """What `snakemake` logs, in the present folder. In this process: importing torch for each call would take most of the time."""
    from snakemake import cli
    logger, handler = logging.getLogger("snakemake.logging"), logging.StreamHandler(io.StringIO())
    known_code_key.cache_clear()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.addHandler(handler)
        try:
            code = cli.main([*what, *arguments(out, profile, **config)])
        except SystemExit as end:
            code = end.code
        finally:
            logger.removeHandler(handler)
        gc.collect()        # a refused workflow leaves a temporary folder to the collector, which warns of it
    return f"{handler.stream.getvalue()}\nended with {int(code or 0)}"


def jobs(told: str) -> dict[str, int]:
    """Jobs by rule in what a dry run prints."""
    assert told.endswith("ended with 0"), told[-3000:]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", told, re.M)}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of what the batch reads, so that a test can change it."""
    for name in ("config", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "Snakefile", tmp_path / "Snakefile")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


# Which jobs

def test_a_target_needs_its_own_runs_and_no_others(project):
    found = jobs(snakemake("table_3", "-n", "--quiet", "rules", out=project / "out"))
    assert found == {"acquisitions": 1, "maps": 1, "pretrain": 2, "finetune": 6, "table_3": 1, "total": 11}, "two networks at R = 6: supervised, self-supervised, random start"


def test_every_table_and_figure_of_the_paper_is_a_target():
    reports = paper_reports(load_profile("gpu"))
    assert {f"table_{n}" for n in range(1, 7)} | {f"figure_{n}" for n in range(1, 9)} <= set(reports)
    assert all((ROOT / "nbs" / "experiments" / f"{name}.ipynb").is_file() for name in reports)
    files = [name for report in reports.values() for name in report.files]
    assert len(files) == len(set(files))


def test_the_gpu_profile_is_the_paper_with_three_seeds():
    profile = load_profile("gpu")
    runs = paper_runs(profile).values()
    assert profile.seeds == (0, 1, 2) and profile.ratios == (0.05, 0.10, 0.20, 0.40)
    for network in ("deq", "varnet", "e2e-varnet"):
        of_network = [run for run in runs if run.network == network]
        assert {run.acceleration for run in of_network} == {6, 8, 10} and sum(not run.strategy for run in of_network) == 9
        assert sum(bool(run.strategy) and run.start == "pruned" for run in of_network) == 3 * 3 * 4 * 3
        assert sum(run.start == "random" for run in of_network) == (0 if network == "deq" else 3 * 8), "Table 3 is of the two VarNets"


def test_a_partial_table_makes_no_run(project):
    found = jobs(snakemake("table_1", "figure_2", "-n", "--quiet", "rules", out=project / "out", partial="true"))
    assert found == {"table_1": 1, "figure_2": 1, "total": 2}


def test_the_short_command_needs_no_number_of_cores(project):
    """profiles/default says the rest."""
    shutil.copytree(ROOT / "profiles", project / "profiles")
    small_notebook(project / "nbs" / "experiments" / "figure_1.ipynb", "from pathlib import Path\nfor kind in ('png', 'pdf'): Path(out, f'figure_1.{kind}').touch()")
    command = [sys.executable, "-m", "snakemake", "figure_1", "--configfile", "config/smoke.yaml"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and (project / "outputs" / "smoke" / "figure_1.pdf").is_file(), done.stderr[-3000:]
    assert f"with {os.cpu_count()} side by side" in done.stderr and "smoke, figure_1: 1 jobs, 1 to do (report 1)" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_the_gpu_profile_is_refused_before_anything_is_simulated(project):
    told = snakemake("table_3", profile="config/gpu.yaml", out=project / "out")
    assert "the profile asks for device 'cuda', but this machine has no GPU" in told and told.endswith("ended with 1") and not (project / "out").exists()


def test_without_a_profile_the_batch_says_how_to_name_one(project):
    told = snakemake("-n", "all", profile="")
    assert told.endswith("ended with 1") and "--configfile config/demo.yaml" in told


def test_a_setting_that_would_be_ignored_is_refused(project):
    told = snakemake("-n", "all", out=project / "out", partail="true")
    assert told.endswith("ended with 1") and "unknown setting 'partail' in --config: choose one of results, acquisitions, partial" in told
    shutil.copy(project / "config" / "smoke.yaml", project / "mine.yaml")
    told = snakemake("-n", "all", out=project / "out", profile="mine.yaml")
    assert told.endswith("ended with 1") and "mine.yaml is not in" in told


def test_a_setting_of_the_profile_and_a_misspelt_partial_are_refused(project):
    told = snakemake("-n", "all", out=project / "out", seeds="[0,1]")
    assert told.endswith("ended with 1") and "unknown setting 'seeds' in --config" in told, "the smoke profile leaves its seeds to the default"
    told = snakemake("-n", "all", out=project / "out", ratios="[0.2]")
    assert told.endswith("ended with 1") and "--config cannot change 'ratios' of a profile, which the notebooks read themselves: change smoke.yaml" in told
    told = snakemake("-n", "all", out=project / "out", partial="1")
    assert told.endswith("ended with 1") and "--config partial is 1, expected true or false" in told


def test_a_profile_with_a_mistake_is_refused_in_one_sentence(project):
    text = (project / "config" / "smoke.yaml").read_text()
    (project / "config" / "smoke.yaml").write_text(text.replace("workers: 2", "workers: 0"))
    told = snakemake("-n", "all", out=project / "out")
    assert told.endswith("ended with 1") and "smoke.yaml.workers is 0; expected at least 1" in told


def test_the_batch_simulates_where_no_acquisitions_are_named(project):
    """Snakemake quotes an empty string as nothing, so the option must not stand alone."""
    command = [sys.executable, "-m", "snakemake", "out/data/R0.json", "--configfile", "config/smoke.yaml", "--config", "results=out", "--cores", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((project / "out" / "data" / "R0.json").read_text())["files"]) == len(list((project / "data" / "smoke").glob("*.h5"))) == 4


def test_acquisitions_of_the_user_are_not_taken_for_photographs(project):
    told = snakemake("out/runs/usrnet-teacher-seed0/result.json", "out/runs/deq-R6-teacher-seed0/result.json", "-n", "-p", out="out")
    photographs, acquisitions = (next(line for line in told.splitlines() if "spade.jobs" in line and f"network: {name}," in line) for name in ("usrnet", "deq"))
    assert "acquisitions" not in photographs and "data: out/acquisitions" in acquisitions


def test_the_gpu_profile_is_planned_whole(project):
    """Every job of it, with a GPU for what computes; nothing is made."""
    command = [sys.executable, "-m", "snakemake", "all", "-n", *arguments(project / "out", "config/gpu.yaml")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    of_rule = dict(re.findall(r"rule (\w+):\n((?:    .*\n)+)", done.stdout + done.stderr))
    assert {f"table_{n}" for n in range(1, 7)} | {f"figure_{n}" for n in range(1, 9)} <= set(of_rule)
    assert all("gpu=1" in of_rule[rule] for rule in ("pretrain", "finetune", "latency", "figure_2"))
    assert all("gpu=" not in of_rule[rule] for rule in ("table_1", "figure_5", "acquisitions", "index"))
    stats, runs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M)), paper_runs(load_profile("gpu")).values()
    assert int(stats["pretrain"]) == sum(not run.strategy for run in runs) and int(stats["finetune"]) == sum(bool(run.strategy) for run in runs)


# What a change makes again

def pretend(project: Path) -> Path:
    """All files that Figure 6 of the smoke profile needs, empty, and in Snakemake's books."""
    out, profile = project / "out", load_profile("smoke")
    runs = paper_reports(profile)["figure_6"].runs
    order = [out / "data" / "R0.json", out / "data" / "R6.json", *(run.folder(out) / name for run in runs for name in ("network.safetensors", "result.json", "metrics.csv", "images.npz")),
             *(out / name for name in (*paper_reports(profile)["figure_6"].files, "benchmarks/report/figure_6.tsv"))]
    for number, path in enumerate(order):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"run": as_plain(runs[0])}) if path.suffix == ".json" else "")
        os.utime(path, (time.time() - 1000 + number,) * 2)
    for run in runs:
        facts = {"run": {"network": "deq"}, "device": "CPU", "seconds": 1.0, "settings_key": settings_key(run, profile, f"{out}/acquisitions")}
        (run.folder(out) / "result.json").write_text(json.dumps(facts))
    assert snakemake("figure_6", "--touch", "--forceall", out=out).endswith("ended with 0")
    return out


def test_a_change_makes_again_what_depends_on_it_and_nothing_else(project):
    out = pretend(project)
    again = lambda: jobs(snakemake("figure_6", "-n", "--quiet", "rules", out=out))
    assert again() == {}, "everything is there"

    config = project / "config" / "smoke.yaml"
    before = config.read_text()
    settings = json.loads(json.dumps(yaml.safe_load(before)))       # an alias of YAML would change in all its places
    settings["networks"]["deq"]["finetuning"]["school"]["steps"] = 5
    settings["networks"]["varnet"]["pretraining"]["steps"] = 7
    settings["latency"]["repeats"] = 9
    config.write_text(yaml.safe_dump(settings))
    assert again() == {"finetune": 1, "figure_6": 1, "total": 2}, "one student has another number of steps"
    config.write_text(before)

    for name, expected in (("finetune", {"finetune": 3, "figure_6": 1, "total": 4}), ("figure_6", {"figure_6": 1, "total": 1}), ("table_1", {})):
        path = project / "nbs" / "experiments" / f"{name}.ipynb"
        text = path.read_text()
        notebook = json.loads(text)
        next(cell for cell in reversed(notebook["cells"]) if cell["cell_type"] == "code")["source"].append("\nprint('changed')")
        notebook["cells"][0]["source"].append("\nother words")
        path.write_text(json.dumps(notebook))
        assert again() == expected, name
        path.write_text(text)
        os.utime(path, (0, 0))
    assert again() == {}


def test_what_snakemake_did_not_make_is_made_again_if_its_settings_changed(project):
    """As after `make demo`: results and weights are there, but not in Snakemake's books."""
    out, again = pretend(project), lambda: jobs(snakemake("figure_6", "-n", "--quiet", "rules", out=project / "out"))
    shutil.rmtree(project / ".snakemake")
    assert again() == {}
    config = project / "config" / "smoke.yaml"
    settings = json.loads(json.dumps(yaml.safe_load(config.read_text())))
    settings["networks"]["deq"]["finetuning"]["school"]["steps"] = 5
    config.write_text(yaml.safe_dump(settings))
    assert again() == {"finetune": 1, "figure_6": 1, "total": 2}

    for path in out.glob("runs/*/network.safetensors"):
        path.unlink()           # as in a clone
    assert again() == {"pretrain": 1, "finetune": 3, "figure_6": 1, "total": 5}


def test_partial_leaves_a_figure_whose_pictures_are_not_there(project):
    out = pretend(project)
    partial = lambda: snakemake("figure_6", "-n", "--quiet", "rules", out=out, partial="true")
    assert partial().endswith("ended with 0")
    for path in out.glob("runs/*/images.npz"):
        path.unlink()
    assert partial().endswith("ended with 1"), "there is no rule that would remove it"
    (out / "figure_6_deq_R6.png").unlink()
    assert jobs(partial()) == {"figure_6": 1, "total": 1}


def test_another_comment_in_a_notebook_makes_nothing_again(project):
    report = paper_reports(load_profile("smoke"))["figure_1"]
    key = report_key(report)
    path = project / "nbs" / "experiments" / "figure_1.ipynb"
    path.write_text(path.read_text().replace("figure = figure_1()", "# another comment\\nfigure = figure_1()"))
    assert report_key(report) == key
    path.write_text(path.read_text().replace("figure = figure_1()", "figure = figure_1( )\\nfigure"))
    assert report_key(report) != key


def test_the_key_of_settings_does_not_wait_for_data_or_teacher():
    run, profile = Run("varnet", 6, 0.40, "school"), load_profile("paper")
    assert settings_key(run, profile) == settings_key(run, profile) != settings_key(Run("varnet", 8, 0.40, "school"), profile)
    assert settings_key(Run("usrnet"), profile), "photographs that are not there yet"


def test_other_weights_of_a_shipped_teacher_make_another_key(monkeypatch, tmp_path):
    demo, run = load_profile("demo"), Run("varnet", 8)
    key = settings_key(run, demo)
    changed = tmp_path / "teacher.safetensors"
    changed.write_bytes(b"other weights")
    monkeypatch.setattr("spade.runs.first_weights", lambda run, profile: changed)
    assert settings_key(run, demo) != key


# Failing and going on

def small_notebook(path: Path, cell: str) -> None:
    """A notebook with the parameters of a figure and one cell, without imports that take long."""
    cells = [nbformat.v4.new_code_cell("profile = ''\nout = ''\nseed = 0", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(cell)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def test_a_failing_job_names_notebook_parameters_and_cell_and_the_others_go_on(project):
    """With partial=true neither figure waits for runs."""
    out = project / "out"
    small_notebook(project / "nbs" / "experiments" / "figure_6.ipynb", "image = open('no such image')")
    small_notebook(project / "nbs" / "experiments" / "figure_1.ipynb", "from pathlib import Path\nfor kind in ('png', 'pdf'): Path(out, f'figure_1.{kind}').touch()")
    command = [sys.executable, "-m", "snakemake", "figure_6", "figure_1", "--keep-going", *arguments(out, partial="true")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode and "figure_6.ipynb (" in told and "profile='smoke'" in told and "FileNotFoundError: [Errno 2] No such file or directory: 'no such image'" in told, told[-3000:]
    assert "cell In [3]: image = open('no such image')" in told
    assert (out / "figure_1.png").is_file() and (out / "notebooks" / "figure_6.ipynb").is_file(), "the executed notebook of the failure is kept"
    assert not (out / "figure_6_deq_R6.png").exists()


def killed(process: subprocess.Popen) -> None:
    """End a process and all that it started at once, as a power failure does."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_a_batch_killed_in_mid_training_goes_on_from_its_last_epoch(project):
    out, folder = project / "out", project / "out" / "runs" / Run("varnet").name
    settings = yaml.safe_load((project / "config" / "smoke.yaml").read_text())
    settings["networks"] = {"varnet": {**settings["networks"]["varnet"], "pretraining": {"steps": 100, "learning_rate": 1e-3}}}
    (project / "config" / "smoke.yaml").write_text(yaml.safe_dump(settings))
    target = f"out/runs/{folder.name}/network.safetensors"
    command = [sys.executable, "-m", "snakemake", target, "--rerun-incomplete", *arguments(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    batch = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (states := list(folder.glob("state/*/training.safetensors"))):
        assert batch.poll() is None, batch.stderr.read()[-3000:]
        time.sleep(0.05)
    killed(batch)
    log = read_state(states[0])[1]["log"]
    assert 4 <= len(log["seconds"]) < 100, "an epoch is four slices"

    assert snakemake(target, "--unlock", out=out).endswith("ended with 0")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    curve = pd.read_csv(folder / "curve.csv")
    assert len(curve) == 100 and (folder / "result.json").is_file() and not states[0].exists()
    np.testing.assert_allclose(curve["seconds"][:len(log["seconds"])], log["seconds"], rtol=1e-4, err_msg="the first steps were not made again: their times are those of the killed run")


def gone(processes: list[psutil.Process], seconds: float = 20.0) -> list[psutil.Process]:
    """Those of the processes that are still there after so many seconds."""
    return psutil.wait_procs([process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE], timeout=seconds)[1]


@pytest.mark.parametrize("limit, looks_again", [([], False), (["--max-jobs-per-timespan", "50/1s"], True)])
def test_the_scheduler_sleeps_between_jobs(project, monkeypatch, limit, looks_again):
    """Snakemake's limit of jobs a second makes it look again and again, more often with each job that ended; it is lifted unless the user sets another."""
    from snakemake.scheduler import JobScheduler
    looks, look = [], JobScheduler._schedule_reevalutation
    monkeypatch.setattr(JobScheduler, "_schedule_reevalutation", lambda self, delay: looks.append(delay) or look(self, delay))
    small_notebook(project / "nbs" / "experiments" / "figure_6.ipynb", "from pathlib import Path; Path('begun').touch()")
    snakemake("figure_6", *limit, partial="true")
    assert (project / "begun").is_file() and bool(looks) == looks_again


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("victim", ["snakemake", "spade.jobs"])
def test_no_job_outlives_the_process_that_began_it(project, victim):
    """SIGKILL of one process alone: a job that trained on would do so beside the next batch."""
    small_notebook(project / "nbs" / "experiments" / "figure_6.ipynb", "from pathlib import Path; import time\nPath('begun').touch(); time.sleep(300)")
    command = [sys.executable, "-m", "snakemake", "figure_6", *arguments(project / "out", partial="true")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as batch:
        while not (project / "begun").is_file():
            assert batch.poll() is None
            time.sleep(0.1)
        family = psutil.Process(batch.pid).children(recursive=True)
        jobs_of_it = [process for process in family if "spade.jobs" in process.cmdline()]
        assert jobs_of_it and any("papermill" in " ".join(process.cmdline()) for process in family) and any("ipykernel" in " ".join(process.cmdline()) for process in family)
        os.kill(batch.pid if victim == "snakemake" else jobs_of_it[0].pid, signal.SIGKILL)
        left = gone(family)
        for process in left:
            process.kill()
    assert not left


def test_the_command_of_a_job_returns_1_on_failure(tmp_path, capsys):
    assert run_job(["--notebook", "nothing_like_it", "--output", str(tmp_path / "run.ipynb"), "--parameters", "{x: 1}"]) == 1
    told = capsys.readouterr().err
    assert "nothing_like_it.ipynb (x=1) failed" in told


# Time, memory, GPUs

def test_the_plan_counts_what_is_there_and_tells_an_estimate(tmp_path, capsys):
    profile = load_profile("smoke")
    table = plan(profile, tmp_path)
    assert table["jobs"].tolist() == [10, 32, 1, 3, 4, 15, 1] and not table["there"].any()
    run = Run("deq", 6, 0.40, "school")
    write_json(run.folder(tmp_path) / "result.json", {"run": as_plain(run), "device": "CPU", "seconds": 40.0, "training_seconds": 30.0, "peak_memory_mb": 500, "profile": as_plain(profile)})
    assert not plan(profile, tmp_path)["there"].any(), "a result without its weights"
    (run.folder(tmp_path) / "network.safetensors").touch()
    assert not plan(profile, tmp_path)["there"].any(), "a result of unknown settings"
    write_json(run.folder(tmp_path) / "result.json", json.loads((run.folder(tmp_path) / "result.json").read_text()) | {"settings_key": settings_key(run, profile)})
    assert plan(profile, tmp_path)["there"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert main(["plan", "--profile", "smoke", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "66 jobs, 65 to do" in told and "min with 2 side by side" in told and "of 65 from measured jobs" in told
    assert "on 1 GPU, " in tell_plan(load_profile("gpu"), tmp_path) and "on 16 GPUs" in tell_plan(load_profile("paper"), tmp_path)


def test_the_plan_of_a_target_is_of_what_it_needs_alone(tmp_path):
    profile = load_profile("smoke")
    table = plan(profile, tmp_path, targets=["table_4"])
    assert table["jobs"].to_dict() == {"pretrain": 1, "finetune": len(paper_reports(profile)["table_4"].runs) - 1, "acquisitions": 0, "maps": 0, "latency": 1, "report": 1, "index": 0}
    assert "smoke, table_4: " in tell_plan(profile, tmp_path, targets=["table_4"]) and "with 3 side by side" in tell_plan(profile, tmp_path, targets=["table_4"], places=3)
    assert plan(profile, tmp_path, targets=["all"])["jobs"].sum() == 66 == plan(profile, tmp_path, targets=["table_4", "out/table_1.md"])["jobs"].sum()


def test_other_jobs_are_planned_by_what_the_same_job_took(tmp_path):
    pd.DataFrame({"rule": ["latency", "report"], "job": ["usrnet", "table_4"], "wall (min)": [7.0, 0.5]}).to_csv(tmp_path / "resources.csv", index=False)
    table = plan(load_profile("smoke"), tmp_path / "nothing", tmp_path, targets=["table_4"])
    assert table["minutes"][["latency", "report"]].tolist() == [7.0, 0.5] and table["measured"].sum() == 2
    alone = minutes_on(table, 1) - minutes_on(table, 2)
    assert alone == pytest.approx((table["minutes"].sum() - 7.0) / 2) and minutes_on(table, 10**6) > 7.0, "time is measured alone"


def test_a_student_does_not_begin_before_its_teacher_has_ended():
    table = plan(load_profile("paper"), Path("nothing"))
    assert minutes_on(table, 10**6) == pytest.approx(table["longest"]["pretrain"] + table["longest"]["finetune"])
    slow = plan(load_profile("paper"), Path("nothing"), guess=paper_pace())
    assert 86400 * 7 / 250_000 == pytest.approx(paper_pace()["varnet"]) and slow["minutes"].sum() > 5 * table["minutes"].sum() and slow["longest"]["pretrain"] == pytest.approx(10 * 1440 + 1)


def test_every_job_of_the_gpu_profile_is_planned_below_8_minutes():
    profile = load_profile("gpu")
    assert max(estimate(run, profile, [])[0] for run in paper_runs(profile).values()) < 480


def test_a_loaded_teacher_takes_no_step():
    profile = load_profile("demo")
    assert estimate(Run("varnet"), profile, [], to_train=False)[0] < estimate(Run("varnet"), profile, [])[0]
    assert minutes_to_reserve(Run("varnet"), profile, []) > 10


def test_what_jobs_took_is_summed_by_rule(tmp_path):
    profile = as_plain(load_profile("smoke"))
    for run, seconds, memory in ((Run("deq"), 600.0, 900), (Run("deq", 6, 0.40, "school"), 60.0, 700), (Run("deq", 6, 0.40, "supervised"), 180.0, 800)):
        write_json(run.folder(tmp_path) / "result.json", {"run": as_plain(run), "device": "CPU", "seconds": seconds, "training_seconds": seconds / 2, "peak_memory_mb": memory, "profile": profile})
    benchmark = tmp_path / "benchmarks" / "latency" / "deq.tsv"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\th:m:s\tmax_rss\tcpu_time\n120.0\t0:02:00\t450.5\tNA\n")
    jobs_table = job_resources(tmp_path)
    by_rule = resources_by_rule(jobs_table)
    assert by_rule.loc["finetune"].tolist() == [2, 4.0, 3.0, 2.0, 800] and by_rule.loc["latency", "wall (min)"] == 2.0
    assert by_rule.loc["all", ["jobs", "wall (min)", "peak memory (MB)"]].tolist() == [4, 16.0, 900]
    text = write_resources(tmp_path).read_text()
    assert "| finetune | 2 | 4.0 |" in text and len(pd.read_csv(tmp_path / "resources.csv")) == 4 and "Made on: CPU." in text


def test_what_a_job_on_a_gpu_took(tmp_path):
    """Wall time by Snakemake, where it measured more than the run itself; the GPU is held all that time; two kinds of memory."""
    run, profile = Run("deq"), as_plain(load_profile("smoke"))
    write_json(run.folder(tmp_path) / "result.json", {"run": as_plain(run), "device": "NVIDIA X", "seconds": 600.0, "training_seconds": 300.0, "peak_memory_mb": 9000, "profile": profile})
    for rule, job, seconds, memory in (("pretrain", run.name, 630.0, 1500.0), ("latency", "deq", 120.0, 450.5), ("report", "figure_2", 60.0, 400.0), ("report", "table_1", 30.0, "NA"), ("finetune", "half", 9.0, 9.0)):
        path = tmp_path / "benchmarks" / rule / f"{job}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0\t{memory}\n")
    table = job_resources(tmp_path).set_index("job")
    assert set(table.index) == {run.name, "deq", "figure_2", "table_1"} and table["device (min)"].to_dict() == {run.name: 10.5, "deq": 2.0, "figure_2": 1.0, "table_1": 0.0}
    assert table.loc[run.name, ["wall (min)", "training (min)", "peak memory (MB)", "peak GPU memory (MB)"]].tolist() == [10.5, 5.0, 1500.0, 9000.0]
    assert "| all | 4 | 14.0 | 10.5 | 5.0 | 13.5 | 1500.0 | 9000.0 |" in write_resources(tmp_path).read_text()
    shutil.rmtree(tmp_path / "benchmarks")
    assert job_resources(tmp_path).set_index("job")["device (min)"].to_dict() == {run.name: 10.0, "deq": 2.0, "figure_2": 1.0, "table_1": 0.0}, "elsewhere, by resources.csv"


def test_two_jobs_never_hold_the_same_gpu(tmp_path, monkeypatch):
    code = "import sys; from spade.jobs import own_gpu\nwith own_gpu(['0', '1'], sys.argv[1], pause=0.05) as gpu: print(gpu, flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with own_gpu(["0", "1"], tmp_path) as first:
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert (first, other.stdout.readline().strip()) == ("0", "1")
        other.kill()        # the operating system opens the lock again
        other.communicate()
        with own_gpu(["0", "1"], tmp_path) as second:
            assert second == "1"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with own_gpu(["0"], tmp_path) as given, own_gpu(["0"], tmp_path) as the_same:
        assert given == the_same == "", "Slurm has given the job its GPU, which has the same number in every job"
    with own_gpu(["0", "1"], tmp_path) as given, own_gpu(["0", "1"], tmp_path) as other:
        assert (given, other) == ("0", "1"), "a batch within an allocation shares its GPUs out"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_the_slurm_profile_is_one_that_snakemake_reads():
    settings = yaml.safe_load((ROOT / "config" / "slurm" / "config.yaml").read_text())
    assert settings["executor"] == "slurm" and {"mem_mb", "runtime"} <= set(settings["default-resources"])
