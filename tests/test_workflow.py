"""The batch of the whole paper: which jobs a target needs, what a change runs again, one job a GPU."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from batches import (
    ENVIRONMENT,
    EXPERIMENTS,
    ROOT,
    arguments,
    call,
    edit_config,
    plan,
    project_copy,
    small_notebook,
    snakemake,
)
from made_up_results import write_latency, write_photo_run, write_run

from spade.config import config_names, load_config
from spade.fmp_runs import METHODS
from spade.losses import STRATEGIES
from spade.meta_pruning import CRITERIA
from spade.runs import Run, run_key
from spade.tables import collect, read_runs
from spade.workflow import damaged_files, demo_reports, estimate, forget_damaged, paper_reports, paper_runs

# Which jobs


def test_the_gpu_configuration_is_the_paper_with_three_seeds():
    config = load_config("gpu")
    reports, runs = paper_reports(config), paper_runs(config).values()
    assert {f"table_{n}" for n in range(1, 7)} | {f"figure_{n}" for n in range(1, 9)} <= set(reports)
    assert all((ROOT / EXPERIMENTS / f"{report.notebook}.ipynb").is_file() for report in reports.values())
    assert config.seeds == (0, 1, 2) and config.ratios == (0.05, 0.10, 0.20, 0.40)
    for network in ("deq", "varnet", "e2e-varnet"):
        of_network = [run for run in runs if run.network == network]
        assert {run.acceleration for run in of_network} == {6, 8, 10}
        assert sum(not run.strategy for run in of_network) == 9
        of_paper = [run for run in of_network if not run.loss]
        assert sum(bool(run.strategy) and run.start == "pruned" for run in of_paper) == 3 * 3 * 4 * 3
        assert sum(run.loss == "split" for run in of_network) == 3
        assert sum(run.start == "random" for run in of_network) == (0 if network == "deq" else 3 * 8)


def test_the_reports_of_super_resolution_follow_the_scales():
    names = lambda scales: list(demo_reports(load_config("smoke", {"photos.scales": scales}), "usrnet"))
    assert names([2, 3]) == ["table_4", "figure_5", "figure_steps"]
    assert names([4]) == ["table_6", "figure_5", "figure_steps"]


@pytest.mark.parametrize("config", config_names())
def test_every_configuration_is_planned_whole(project, config):
    runs, reports = paper_runs(load_config(config)).values(), paper_reports(load_config(config))
    found = plan("all", *arguments("out", config))
    assert found["finetune"] == sum(bool(run.strategy) for run in runs)
    assert found["pretrain"] == sum(not run.strategy for run in runs)
    assert all(found[name] == 1 for name in (*reports, "index", "all"))


def test_a_target_needs_its_own_runs_and_no_others(project):
    found = plan("table_3", *arguments("out"))
    assert found == {"acquisitions": 1, "maps": 1, "pretrain": 2, "finetune": 6, "table_3": 1, "total": 11}
    found = plan("demo_varnet", *arguments("out", acceleration="8"))
    one = (
        "acquisitions",
        "maps",
        "pretrain",
        "latency",
        "demo_varnet",
        *(f"demo_varnet_{name}" for name in ("table_2", "figure_4", "figure_7")),
    )
    assert found == {**dict.fromkeys(one, 1), "finetune": 3, "total": 11}


def test_the_smoke_batch_of_make_executes_every_notebook_every_network_and_every_strategy(project):
    printed = subprocess.run(
        ["make", "-n", "check-experiments"], cwd=ROOT, capture_output=True, encoding="utf-8"
    ).stdout
    targets = re.search(r"snakemake (.*?) --configfile config/smoke.yaml", printed)[1].split()
    calls = snakemake(*targets, "-n", "-p", *arguments("out"))
    done = set(re.findall(r"nbs/experiments/(\w+)\.ipynb", calls))
    assert done == {path.stem for path in (ROOT / EXPERIMENTS).glob("*.ipynb")} - {"measured"}, (
        "which needs a scanner's files"
    )
    named = {name: set(re.findall(rf"\b{name}: ([\w-]+)", calls)) for name in ("network", "strategy", "start", "loss")}
    assert named["network"] == set(load_config("smoke").networks) and named["start"] == {"pruned", "random"}
    assert named["strategy"] == set(STRATEGIES) and named["loss"] == {"split"}
    fmp = {name: set(re.findall(rf"\b{name}: ([\w-]+)", calls)) for name in ("method", "criterion", "metric")}
    assert fmp == {"method": set(METHODS), "criterion": set(CRITERIA), "metric": {"flops", "params"}}


def test_without_options_a_target_is_of_the_demo(project):
    small_notebook("figure_1", "from pathlib import Path\nPath(f'{target}.png').touch()")
    done = call("figure_1")
    assert done.returncode == 0 and (project / "outputs" / "demo" / "figure_1.png").is_file(), done.stdout[-3000:]
    assert "workflow specific profile" in done.stdout and "profiles/default" in done.stdout


def test_paths_may_have_blanks(project):
    """Of the project, as everywhere here, of the environment and of the results; by Snakemake itself and papermill."""
    small_notebook("figure_1", "from pathlib import Path\nPath(f'{target}.png').touch()")
    (python := project / "an environment").symlink_to(sys.prefix)
    done = call("figure_1", "my results/data/acquisitions", *arguments("my results"), python=python / "bin" / "python")
    assert done.returncode == 0 and (project / "my results" / "figure_1.png").is_file(), done.stdout[-3000:]
    assert list((project / "my results" / "acquisitions").glob("*.h5"))


@pytest.mark.parametrize("options, message", [
    ({"partail": "true"}, "unknown option of --config 'partail': choose one of results, acquisitions, acceleration"),
    ({"ratios": "[0.2]"}, "--config must not change the setting 'ratios' of smoke.yaml"),
    ({"acceleration": "4"}, "unknown acceleration 4: choose one of 6, 8, 10"),
])  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(project, options, message):
    printed = snakemake("all", "-n", *arguments("out", **options))
    assert message in printed and printed.endswith("ended with 1"), printed[-2000:]


def test_a_wrong_configuration_is_refused(project):
    shutil.copy("config/smoke.yaml", "mine.yaml")
    printed = snakemake("all", "-n", "--configfile", "mine.yaml", "--cores", "1")
    assert "--configfile must be a file in" in printed and printed.endswith("ended with 1")
    text = Path("config/smoke.yaml").read_text(encoding="utf-8").replace("threads: 1", "threads: 0", 1)
    Path("config/smoke.yaml").write_text(text, encoding="utf-8")
    printed = snakemake("all", "-n", *arguments("out"))
    assert "threads" in printed and printed.endswith("ended with 1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_the_gpu_configuration_is_refused_before_anything_is_simulated(project):
    printed = snakemake("table_3", *arguments("out", "gpu"))
    why = "torch finds no GPU" if torch.backends.cuda.is_built() else "is a build without CUDA"
    assert why in printed and printed.endswith("ended with 1") and not (project / "out" / "data").exists()


def test_acquisitions_of_the_user_are_not_taken_for_photographs(project):
    printed = snakemake(
        "out/runs/usrnet-teacher-seed0/done", "out/runs/deq-R6-teacher-seed0/done", "-n", "-p", *arguments("out")
    )
    calls = {
        name: next(line for line in printed.splitlines() if "run_notebook.py" in line and f"network: {name}," in line)
        for name in ("usrnet", "deq")
    }
    assert "acquisitions" not in calls["usrnet"] and "data: out/acquisitions" in calls["deq"]


# What a change runs again


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project with Figure 6, its runs and a measurement of time, as a batch leaves them."""
    with pytest.MonkeyPatch.context() as patch:
        folder, runs = (
            project_copy(tmp_path_factory.mktemp("made"), patch),
            paper_reports(load_config("smoke"))["figure_6"].runs,
        )
        for run in runs:
            write_run(Path("out"), run, 30.0)
        write_latency(Path("out"), "deq")
        done = [f"runs/{run.name}/done" for run in runs]
        files = ["data/acquisitions", "data/R6", *done, "figure_6.png", "notebooks/figure_6.done"]
        for number, path in enumerate(Path("out", file) for file in files):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (time.time() - 1000 + number,) * 2)
        assert snakemake("figure_6", *arguments("out"), "--touch", "--forceall").endswith("ended with 0")
    return folder


@pytest.fixture
def completed(made, tmp_path, monkeypatch) -> tuple[str, ...]:
    """A copy of it as the present folder, in which nothing is to do: the arguments that ask for Figure 6."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / made.name))
    return "figure_6", *arguments("out")


def test_a_complete_batch_has_nothing_to_do(completed):
    assert plan(*completed) == {}


@pytest.mark.parametrize("name, expected", [
    ("runs/deq-R6-0.40-school-seed0/metrics.csv", {"finetune": 1, "figure_6": 1}),
    ("runs/deq-R6-0.40-school-seed0/images.npz", {"finetune": 1, "figure_6": 1}),
    ("runs/deq-R6-teacher-seed0/result.json", {"pretrain": 1, "finetune": 3, "figure_6": 1}),
    ("latency/deq.csv", {}),
])  # fmt: skip
@pytest.mark.parametrize("damage", ["removed", "cut", "flipped"])
def test_what_is_damaged_is_named_and_made_again(completed, name, expected, damage):
    path = Path("out") / name
    content, middle = path.read_bytes(), path.stat().st_size // 2
    flip = bytes([content[middle] ^ 1])
    path.write_bytes(content[:middle] + (b"" if damage == "cut" else flip + content[middle + 1 :]))
    if damage == "removed":
        path.unlink()
    found = damaged_files(load_config("smoke"), "out")
    assert plan(*completed) == ({**expected, "total": sum(expected.values())} if expected else {})
    if damage == "removed" and name.startswith("latency"):  # Snakemake's own file
        assert found == {}
    else:
        (sentence,) = found.values()
        assert sentence.startswith(f"{path.resolve()} ")
    if name.startswith("latency"):
        assert plan("out/latency/deq.csv", *completed[1:]) == {"latency": 1, "total": 1}


def test_damaged_tidy_files_are_written_again(completed):
    """Figure 2 writes evolution.csv.gz; the last job of a batch writes the other ones."""
    out, smoke = Path("out").resolve(), load_config("smoke")
    collect("out")
    shutil.copy(ROOT / "outputs" / "demo" / "evolution.csv.gz", out)
    marks = [out / "notebooks" / f"{name}.done" for name in ("index", "figure_2", "figure_6")]
    for mark in marks:
        mark.touch()
    assert forget_damaged(smoke, "out") == [] and all(mark.is_file() for mark in marks)
    for name, kept in (("metrics.csv.gz", [False, True, True]), ("evolution.csv.gz", [False, False, True])):
        (out / name).write_bytes((out / name).read_bytes()[:-20])
        (sentence,) = forget_damaged(smoke, "out")
        assert sentence.startswith(f"{out / name} must be ") and [mark.is_file() for mark in marks] == kept
    assert not (out / "evolution.csv.gz").exists() and plan(*completed) == {}


def test_the_last_job_collects_the_results_and_writes_the_index(project):
    """With made-up runs; `make test` has a batch without this job."""
    out, smoke = Path("out"), load_config("smoke")
    for run in paper_runs(smoke).values():
        if run.super_resolution:
            write_photo_run(out, run, 30.0)
        else:
            write_run(out, run, 30.0)
    for network in smoke.networks:
        write_latency(out, network)
    files = [path for report in paper_reports(smoke).values() for path in report.files]
    done = [f"notebooks/{name}.done" for name in paper_reports(smoke)]
    done += [f"runs/{name}/done" for name in paper_runs(smoke)]
    for path in [out / name for name in (*files, *done, "data/acquisitions", *(f"data/R{R}" for R in (6, 8, 10)))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(ROOT / "outputs" / "demo" / "evolution.csv.gz", out)
    target = ("all", *arguments("out"))
    assert snakemake(*target, "--touch", "--forceall").endswith("ended with 0")
    (out / "notebooks" / "index.done").unlink(missing_ok=True)
    assert plan(*target) == {"index": 1, "all": 1, "total": 2}
    ended = call(*target)
    assert ended.returncode == 0 and plan(*target) == {}, ended.stdout[-3000:]
    assert "# Results" in (out / "index.md").read_text(encoding="utf-8")
    assert len(read_runs("out")) == len(paper_runs(smoke))


def test_a_change_runs_again_what_depends_on_it_and_nothing_else(completed):
    target = completed
    written = Path("config/smoke.yaml").read_text(encoding="utf-8")
    edit_config("networks.varnet.pretraining.steps", 7)
    edit_config("latency.repeats", 9)
    assert plan(*target) == {}, "settings of other networks and of the measurement of time"
    edit_config("networks.deq.finetuning.school.steps", 5)
    assert plan(*target) == {"finetune": 1, "figure_6": 1, "total": 2}, "one student has another number of steps"
    Path("config/smoke.yaml").write_text(written, encoding="utf-8")

    for name, expected in (("figure_7", {"figure_6": 1, "total": 1}), ("table_mri", {})):
        path = EXPERIMENTS / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = next(cell for cell in reversed(notebook["cells"]) if cell["cell_type"] == "code")
        for added, jobs in (("\n# another comment", {}), ("\nprint('changed')", expected)):
            cell["source"] = [*cell["source"], added]
            path.write_text(json.dumps(notebook), encoding="utf-8")
            assert plan(*target) == jobs, (name, added)
        shutil.copy(ROOT / path, path)
    assert plan(*target) == {}


def test_results_of_a_clone_are_shown_but_count_as_not_made(project):
    """The committed tables come with a clone; runs and `done` files do not."""
    shutil.copytree(ROOT / "outputs" / "demo", "outputs/demo", ignore=shutil.ignore_patterns("runs", "data", "demo_*"))
    assert len(read_runs("outputs/demo")) and not len(read_runs("outputs/demo", made=True))
    found = plan("table_4", "--cores", "1")
    assert found["pretrain"] == 1 and found["finetune"] == 12 and found["table_4"] == 1
    assert plan("all", "--cores", "1")["finetune"] == sum(
        bool(run.strategy) for run in paper_runs(load_config("demo")).values()
    )
    with pytest.raises(FileNotFoundError):
        collect("outputs/demo")


# Time, GPUs, make


def test_the_estimate_rests_on_earlier_runs(tmp_path):
    assert "none of them has been measured" in estimate("smoke", str(tmp_path))
    names = ("runs.jsonl", "metrics.csv.gz", "curves.csv.gz", "latency.csv", "pictures.h5", "checksums.json")
    for name in names:
        shutil.copy(ROOT / "outputs" / "demo" / name, tmp_path)
    count = len(paper_runs(load_config("demo")))
    printed = estimate("demo", str(tmp_path))
    assert f"demo: {count} runs to do, about " in printed and f"({count} measured)" in printed
    for run in (Run("deq"), Run("deq", 6, 0.40, "school")):
        run.folder(tmp_path).mkdir(parents=True)
        (run.folder(tmp_path) / "done").touch()
    assert f"{count - 2} runs to do, about" in estimate("demo", str(tmp_path))


def test_kernels_that_start_at_once_share_no_port_and_leave_no_file(tmp_path):
    """Jupyter's choice of a TCP port is free until the kernel binds it: two kernels may get the same one."""
    source = "from ipykernel import get_connection_info\nget_connection_info(unpack=True)['ip']"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    (folder := tmp_path / "temporary").mkdir()
    calls = [
        subprocess.Popen(
            [sys.executable, ROOT / "workflow/scripts/run_notebook.py", "in.ipynb", f"{number}.ipynb"]
            + ["--kernel", "python3", "--no-progress-bar"],
            cwd=tmp_path,
            env={**ENVIRONMENT, "TMPDIR": str(folder)},
        )
        for number in range(4)
    ]
    assert [call.wait() for call in calls] == [0] * 4
    executed = [nbformat.read(tmp_path / f"{number}.ipynb", as_version=4) for number in range(4)]
    names = {notebook.cells[-1].outputs[-1].data["text/plain"] for notebook in executed}
    assert len(names) == 4 and (sys.platform != "linux" or all("@spade-" in name for name in names)), names
    assert not list(folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{n}.ipynb" for n in range(4)),
        "in.ipynb",
        "temporary",
    ]


def test_two_jobs_never_hold_the_same_gpu(tmp_path, monkeypatch):
    path = ROOT / "workflow" / "scripts" / "own_gpu.py"
    spec = importlib.util.spec_from_file_location("own_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first = module.own_gpu(["0", "1"], str(tmp_path))
    shown = "os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules"
    script = f"import os, sys; print({shown}, flush=True); sys.stdin.read()"
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp_path)}
    other = subprocess.Popen(
        [sys.executable, path, sys.executable, "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert (first, other.stdout.readline().split()) == ("0", ["1", "False"])
    other.kill()  # the operating system releases the lock
    other.communicate()
    assert module.own_gpu(["0", "1"], str(tmp_path)) == "1"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert module.own_gpu(["0"], str(tmp_path)) == "", "Slurm has assigned the job its GPU"
    assert [module.own_gpu(["0", "1"], str(tmp_path)) for _ in range(2)] == ["0", "1"], "a batch within an allocation"
    shared = [module.own_gpu(["3", "5"], str(tmp_path), sharing=2) for _ in range(4)]
    assert shared == ["3", "5", "3", "5"], "two jobs share each GPU, and no GPU has two while another has none"
    for named, gpus in (("3,5", ["3", "5"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert module.visible_gpus() == gpus


@pytest.mark.parametrize("choice, message", [
    ("PROFILE=gpu", "PROFILE= is not an option: name a file of config/ with CONFIG=gpu"),
    ("CONFIG=dmeo", "CONFIG must be one of cbsd68 demo gpu paper siat smoke sr, got dmeo"),
    ("JOBS_PER_GPU=0", "JOBS_PER_GPU must be a whole number of at least 1, got 0"),
    ("JOBS_PER_GPU=two", "JOBS_PER_GPU must be a whole number of at least 1, got two"),
    ("NETWORK=resnet", "NETWORK must be one of varnet deq e2e-varnet usrnet edsr-sr, got resnet"),
    ("TARGETS=table_7", "TARGETS must be all, table_1 ... table_6, figure_1 ... figure_8, figure_steps"),
])  # fmt: skip
def test_make_refuses_an_unknown_choice(choice, message):
    done = subprocess.run(["make", "-n", "paper", choice], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and message in done.stderr


def test_the_key_of_a_run_does_not_wait_for_data_or_teacher(tmp_path):
    run, config = Run("varnet", 6, 0.40, "school"), load_config("paper")
    assert run_key(run, config) == run_key(run, config) != run_key(Run("varnet", 8, 0.40, "school"), config)
    assert run_key(run, config, str(tmp_path)) != run_key(run, config), "another folder of acquisitions"


def test_the_report_holds_table_1_with_caption_and_category(project):
    """`snakemake --report`: one file that needs no other."""
    report, target = paper_reports(load_config("smoke"))["table_1"], ("table_1", *arguments("out"))
    for run in report.runs:
        write_run(Path("out"), run, 30.0)
    for network in report.timed:
        write_latency(Path("out"), network)
    times = [f"latency/{network}.csv" for network in report.timed]
    done = [f"runs/{run.name}/done" for run in report.runs]
    files = ["data/acquisitions", "data/R6", *done, *times, *report.files, "notebooks/table_1.done"]
    for number, path in enumerate(Path("out", file) for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            path.write_text("| Network | PSNR |\n", encoding="utf-8")
        path.touch()
        os.utime(path, (time.time() - 1000 + number,) * 2)
    assert snakemake(*target, "--touch", "--forceall").endswith("ended with 0")
    assert snakemake(*target, "--report", "report.html").endswith("ended with 0")
    page = Path("report.html").read_text(encoding="utf-8")
    results = json.loads(re.search(r"var results = (\{.*\});", page)[1])
    categories = json.loads(re.search(r"var categories = (\{.*\});", page)[1])
    found = results["out/table_1.md"]
    assert "<p>Table 1 of <em>A Structured Pruning Algorithm" in found["caption"]
    assert base64.b64decode(found["data_uri"].partition("base64,")[2]).decode() == "| Network | PSNR |\n"
    assert categories == {"Tables": {"all networks": ["out/table_1.csv", "out/table_1.md"]}}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", page)
