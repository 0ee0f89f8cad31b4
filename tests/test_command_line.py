"""The command line: each verb from an empty folder, JSON alone on standard output, exit codes, wrong choices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click.testing
import pytest
import torch

import spade
import spade.__main__ as command_line
from spade.data.phantom import simulate
from spade.hub import save_folder
from spade.models import VarNet

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
SCANS = ("--data", "scans", "--acceleration", 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a small VarNet and two simulated scans."""
    path = tmp_path_factory.mktemp("command line")
    torch.manual_seed(0)
    spade.save(VarNet(num_cascades=1, channels=4, num_pools=1), path / "teacher")
    simulate(path / "scans", 2, 1, shape=(64, 128), num_coils=4, progress=False)
    return path


@pytest.fixture
def folder(made, monkeypatch) -> Path:
    """That folder, which has no project around it, as the current one."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "100")
    return made


def call(*arguments: object) -> click.testing.Result:
    """One command in this process: a new one would load torch again."""
    done = click.testing.CliRunner().invoke(command_line.main, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_each_verb_runs_from_a_folder_without_a_project(folder):
    cut = call("prune", "teacher.safetensors", "--ratio", "0.4", "--out", "student", "--json")
    facts = json.loads(cut.stdout)
    assert cut.exit_code == 0 and facts["parameters_after"] < facts["parameters_before"], cut.stderr
    words = ("finetune", "student.safetensors", *SCANS, "--teacher", "teacher.safetensors", "--steps", 3, "--json")
    tuned = call(*words, "--out", "tuned")
    assert tuned.exit_code == 0 and json.loads(tuned.stdout)["steps"] == 3, tuned.stderr
    again = json.loads(call(*words).stdout)
    assert again == json.loads(tuned.stdout) | {"file": "student-tuned.safetensors"}
    rows = json.loads(call("evaluate", "teacher.safetensors", "tuned", *SCANS, "--json").stdout)["networks"]
    assert [row["images"] for row in rows] == [2, 2] and all(5 < row["psnr"] < 60 for row in rows)
    images = call("reconstruct", "tuned.safetensors", *SCANS, "--out", "images", "--png", "--json")
    assert len(json.loads(images.stdout)["files"]) == 2 and len(list((folder / "images").glob("*.png"))) == 2
    card = call("info", "tuned.safetensors")
    assert card.exit_code == 0 and "VarNet" in card.stdout and "school" in card.stdout
    there = call("convert", "scans/demo_0001.h5", "--out", "there.cfl", "--json")
    assert json.loads(there.stdout)["coils"] == 4, there.stderr
    back = call("convert", "there.cfl", "--out", "new/back.h5", "--oversampling", 2, "--acquisition", "AXT1", "--json")
    facts = {"acquisition": "AXT1", "slices": 1, "coils": 4, "rows": 128, "columns": 128, "mask": False}
    assert json.loads(back.stdout) == {"file": "new/back.h5", **facts}
    assert not (folder / "config").exists() and not (folder / "outputs").exists()


@pytest.mark.parametrize(
    "wishes, expected",
    (
        (("--target-params", 0.5), dict(target_params=0.5)),
        (("--target-macs", 0.5, "--round-to", 2), dict(target_macs=0.5, round_to=2)),
        (("--ratio", 0.5, "--scope", "global", "--importance", "fpgm"),
         dict(ratio=0.5, scope="global", importance="fpgm")),
    ),
)  # fmt: skip
def test_pruning_to_a_target_is_the_librarys_and_its_plan_writes_nothing(folder, wishes, expected):
    before = sorted(path.name for path in folder.iterdir())
    preview = json.loads(call("prune", "teacher", *wishes, "--plan", "--json").stdout)
    assert sorted(path.name for path in folder.iterdir()) == before
    cut = json.loads(call("prune", "teacher", *wishes, "--out", "aimed", "--json").stdout)
    student = spade.prune(spade.load("teacher"), **expected)
    saved = spade.load(folder / cut["file"]).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())
    numbers = ("ratio", "parameters_before", "parameters_after", "macs_before", "macs_after", "asked")
    assert {name: cut[name] for name in numbers} == {name: preview[name] for name in numbers}
    assert cut["achieved"] == student.pruning_report.achieved
    widths = {group["group"]: group["after"] for group in preview["groups"] if group["removed"]}
    assert widths == {group.name: group.after for group in student.pruning_report.groups}
    assert "parameters 1," in call("prune", "teacher", *wishes, "--plan").stdout


def test_a_speed_up_and_taylors_ranking_are_measured_on_the_data(folder, monkeypatch):
    from spade import targets

    shapes = []

    def timed(before, after, inputs, device, repeats=5):
        shapes.append(inputs[0].shape)
        return 1 / (1 - sum(p.numel() for p in after.parameters()) / sum(p.numel() for p in before.parameters()) / 2)

    monkeypatch.setattr(targets, "speed_up", lambda *a, **k: 3 - timed(*a, **k))
    done = call("prune", "teacher", "--target-speedup", 1.3, *SCANS, "--out", "fast", "--json")
    facts = json.loads(done.stdout)
    assert facts["asked"]["target_speedup"] == 1.3 <= facts["achieved"]["target_speedup"]
    assert {tuple(shape) for shape in shapes} == {(1, 4, 64, 128)}
    ranked = call("prune", "teacher", "--ratio", 0.4, "--importance", "taylor", *SCANS, "--out", "ranked", "--json")
    assert json.loads(ranked.stdout)["parameters_after"] < facts["parameters_before"], ranked.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        (("prnue",), "Did you mean 'prune'?"),
        (("prune", "teacher.safetensors", "--rati", "0.4"), ", '--ratio'?)"),
        (("prune", "teacher.safetensors", "--ratio", "4", "--out", "x"), "ratio must be a number between 0 and 1"),
        (("prune", "missing", "--ratio", "0.4", "--out", "x"), "'missing' does not exist"),
        (
            ("prune", "teacher", "--ratio", "0.4"),
            "--out must be the file of the student unless --plan is given, got none.",
        ),
        (
            ("prune", "teacher", "--out", "x"),
            "one of --ratio, --target-params, --target-macs, --target-speedup, got none.",
        ),
        (
            ("prune", "teacher", "--ratio", "0.4", "--target-macs", "0.4", "--out", "x"),
            "got --ratio and --target-macs.",
        ),
        (("prune", "teacher", "--target-speedup", "2", "--out", "x"), "--data must be a folder for --target-speedup"),
        (("prune", "teacher", "--ratio", "0.4", "--importance", "taylor", "--plan"), "--data must be a folder"),
        (("prune", "teacher", "--ratio", "0.4", "--importance", "tailor", "--plan"), "(did you mean taylor?)"),
        (("prune", "teacher", "--ratio", "0.4", "--scope", "globl", "--plan"), "(did you mean global?)"),
        (("prune", "teacher", "--ratio", "0.4", "--round-to", "0", "--out", "x"), "round_to must be a whole number"),
        (("prune", "teacher", "--ratio", "0.4", "--round-to", "64", "--out", "x"), "round_to must be at most 8"),
        (("prune", "teacher", "--ratio", "0.4", "--round-to", "2.5", "--out", "x"), "'2.5' is not a valid integer"),
        (("prune", "teacher", "--target-macs", "1.5", "--out", "x"), "target_macs must be a number between 0 and 1"),
        (("prune", "teacher", "--target-macs", "0.999", "--out", "x"), "target_macs must be at most 0."),
        (("prune", "teacher", "--target-mac", "0.4", "--out", "x"), "(Did you mean one of: '--target-macs',"),
        (("plan", "--ratio", "0.4"), "No such option '--ratio'"),
        (("prune", "hub:missing", "--ratio", "0.4", "--out", "x"), "repo must be owner/name"),
        (("info", "scans/demo_0001.h5"), "demo_0001.h5"),
        (("finetune", "teacher.safetensors", "--data", "scans", "--strategy", "shool", "--out", "x"), "school"),
        (("evaluate", "teacher.safetensors", "--data", "."), "h5"),
        (("reconstruct", "teacher.safetensors", "--data", "scans", "--out", "scans"), "out must be another folder"),
        (("convert", "scans/demo_0001.h5", "--out", "x.npy"), "out must end in .h5"),
        (("demo", "--network", "varnt"), "varnet"),
        (("plan", "--config", "dmeo"), "demo"),
        (("index", "missing"), "'missing' does not exist"),
    ),
)
def test_a_wrong_choice_ends_with_one_sentence_and_exit_code_2(folder, arguments, sentence):
    done = call(*arguments)
    assert done.exit_code == 2 and done.stdout == "", done.stderr
    assert sentence in done.stderr and done.stderr.splitlines()[-1].startswith("Error: "), done.stderr
    assert not (folder / "x.safetensors").exists()


@pytest.mark.parametrize("option", ("--rat", "--ou", "--js"))
def test_shortened_options_are_refused(folder, option):
    done = call("prune", "teacher", "--ratio", "0.4", "--out", "x", option, "1")
    assert done.exit_code == 2 and f"No such option '{option}'" in done.stderr


def test_a_file_is_named_without_ending_a_folder_too_and_what_it_holds_decides(folder):
    assert json.loads(call("info", "teacher", "--json").stdout)["model"] == "VarNet"
    save_folder(spade.load("teacher"), "published", strategy="school")
    assert "school" in call("info", "published").stdout
    weights = {"state_dict": VarNet(num_cascades=1, channels=4, num_pools=1).state_dict()}
    torch.save(weights, folder / "published.bin")  # under fastMRI's names
    assert call("prune", "published.bin", "--ratio", "0.4", "--out", "small", "--json").exit_code == 0
    torch.save({"a": torch.ones(1)}, folder / "other.weights")
    wrong = call("prune", "other.weights", "--ratio", "0.4", "--out", "x")
    assert wrong.exit_code == 2 and "must hold weights of fastMRI's VarNet or of USRNet" in wrong.stderr


def test_a_failed_job_ends_with_exit_code_1_and_one_sentence(folder):
    """A folder stands where the result belongs."""
    (folder / "taken.safetensors").mkdir()
    done = call("prune", "teacher.safetensors", "--ratio", "0.4", "--out", "taken", "--json")
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.startswith("Error: "), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_with_exit_code_130(folder):
    words = (
        "finetune teacher --data scans --acceleration 4 --strategy self-supervised --steps 100000 --out long".split()
    )
    command, curve = [sys.executable, "-m", "spade", *words], folder / "long-training" / "curve.csv"
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            while not (curve.is_file() and len(curve.read_text(encoding="utf-8").splitlines()) > 2):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            message = process.stderr.read()
        finally:
            process.send_signal(signal.SIGKILL) if process.poll() is None and sys.exc_info()[0] else None
    assert process.returncode == 130 and "Traceback" not in message, message


def test_the_workflow_is_called_and_a_failed_job_is_exit_code_1(folder, monkeypatch):
    calls, code = [], 3
    finished = lambda command, **settings: calls.append(command) or subprocess.CompletedProcess(command, code)
    monkeypatch.setattr(subprocess, "run", finished)
    monkeypatch.chdir(ROOT)
    done = call("demo", "--network", "deq", "--cores", "2", "--json")
    assert done.exit_code == 1 and done.stdout == "" and "a job of demo_deq failed" in done.stderr
    (command,) = calls
    assert command[1:3] == ["-m", "snakemake"] and "demo_deq" in command
    assert command[command.index("--cores") + 1] == "2"
    assert Path(command[command.index("--configfile") + 1]) == ROOT / "config" / "demo.yaml"
    monkeypatch.chdir(folder)
    shutil.copy(ROOT / "config" / "demo.yaml", "mine.yaml")
    call("demo", "--network", "deq", "--config", "mine.yaml")  # outside of a checkout
    assert Path(calls[1][calls[1].index("--configfile") + 1]) == (folder / "mine.yaml").resolve()
    assert Path(calls[1][calls[1].index("--snakefile") + 1]) == ROOT / "workflow" / "Snakefile"


def test_plan_and_index_print_one_object(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    facts = json.loads(call("plan", "--config", "smoke", "--out", tmp_path, "--json").stdout)
    assert facts["config"] == "smoke" and f"{len(facts['runs'])} runs to do" in facts["estimate"]
    copy = shutil.copytree(ROOT / "outputs" / "demo", tmp_path / "demo")
    (copy / "index.md").unlink()
    assert json.loads(call("index", copy, "--json").stdout) == {"file": str(copy / "index.md")}
    assert "Table 1" in (copy / "index.md").read_text(encoding="utf-8")


def test_help_has_an_example_and_does_not_load_torch():
    for verb in command_line.main.commands:
        text = call(verb, "--help").stdout
        assert f"Example: spade {verb}" in " ".join(text.split())
    code = (
        "import sys, click.testing, spade.__main__ as m\n"
        "click.testing.CliRunner().invoke(m.main, ['prune', '--help'])\n"
        "print({'torch', 'h5py', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "set()", done.stderr
