"""Jobs that fail and batches that are killed: what is complete is kept, the rest is made again, bit for bit."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from batches import ENVIRONMENT, arguments, call, edit_config, plan, small_notebook, snakemake, started, wait_for
from faults import kill_family
from safetensors.torch import load_file

from spade.finetuning import read_state
from spade.runs import Run


def test_a_failing_job_names_notebook_parameters_and_cell_and_the_others_go_on(project):
    small_notebook("figure_7", "image = open('no such image')")
    small_notebook("figure_5", "from pathlib import Path\nPath(f'{target}.png').touch()")
    for name in ("pretrain", "finetune"):
        small_notebook(name, "pass")
    done = call(
        *("figure_6", "figure_5", "--set-threads", "finetune=1", "finetune_longest=1"),
        *(*arguments("out", results="out"), "--cores", "2"),
    )
    printed = done.stdout
    assert done.returncode == 1 and "run_notebook.py nbs/experiments/figure_7.ipynb" in printed, printed[-3000:]
    assert "config: smoke" in printed and "network: deq" in printed, "its parameters"
    assert 'Exception encountered at "In [3]"' in printed and "image = open('no such image')" in printed
    assert Path("out/figure_5.png").is_file() and not Path("out/figure_6.png").exists()
    assert Path("out/notebooks/figure_6.ipynb").is_file(), "the executed notebook of the failure is kept"


def test_a_notebook_cut_by_a_full_disk_ends_only_its_own_job(project):
    """A limit to the size of a file cuts the executed notebook as a full disk does."""
    small_notebook("figure_1", "from pathlib import Path\nPath(f'{target}.png').touch()\nprint('x' * 9_000_000)")
    small_notebook("latency", "from pathlib import Path\nPath(out, 'latency', f'{network}.csv').touch()")
    command = ["figure_1", "out/latency/varnet.csv", *arguments("out", results="out")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
    done = call(*command, preexec_fn=limit)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stdout, done.stdout[-3000:]
    assert Path("out/latency/varnet.csv").is_file() and not Path("out/notebooks/figure_1.done").exists()
    with pytest.raises(ValueError):
        json.loads(Path("out/notebooks/figure_1.ipynb").read_text(encoding="utf-8"))
    done = call("figure_1", *command[2:])
    assert done.returncode == 0 and Path("out/notebooks/figure_1.done").is_file(), done.stdout[-3000:]


def test_a_batch_killed_twice_ends_with_the_same_metrics_and_a_damaged_run_is_made_again(project):
    """SIGKILL of Snakemake, papermill and kernel: after some epochs of the teacher; after the student's `result.json`
    and before its `done`. Then a changed bit in the student's metrics."""
    edit_config("networks.varnet.pretraining", {"steps": 60, "learning_rate": 1e-3, "checkpoint_every": 4})
    runs = [Run("varnet"), Run("varnet", 6, 0.40, "school")]
    target = lambda out: (f"{out}/runs/{runs[1].name}/done", "--rerun-incomplete")
    command = lambda out: (*target(out), *arguments(out, acquisitions="acquisitions"))
    teacher, student = (project / "out" / "runs" / run.name for run in runs)

    batch = started(*command("out"))
    wait_for(batch, lambda: list(teacher.glob("state/*/training.safetensors")))
    kill_family(batch)
    (state,) = teacher.glob("state/*/training.safetensors")
    (teacher / "run.ipynb").write_text('{"cells": [', encoding="utf-8")
    made = read_state(state)[1]["log"]["seconds"]
    assert 4 <= len(made) < 60 and not (teacher / "done").exists() and not (teacher / "result.json").exists()

    assert snakemake("--unlock", *command("out")).endswith("ended with 0")
    batch = started(*command("out"))
    wait_for(batch, (student / "result.json").is_file)
    kill_family(batch)
    assert (teacher / "done").is_file() and not state.exists() and not (student / "done").exists()
    curve = pd.read_csv(teacher / "curve.csv")
    again = "not trained again"
    assert len(curve) == 60 and curve["seconds"][: len(made)].tolist() == pytest.approx(made, rel=1e-4), again

    written = {path: path.stat().st_mtime_ns for folder in (teacher, student) for path in folder.glob("*.[jns]*")}
    assert snakemake("--unlock", *command("out")).endswith("ended with 0")
    assert call(*command("out")).returncode == 0 and (student / "done").is_file()
    kept = {path for path in written if path.suffix != ".ipynb"}
    assert len(kept) >= 6 and all(path.stat().st_mtime_ns == written[path] for path in kept), again

    assert call(*command("whole")).returncode == 0
    for run in runs:
        metrics = [pd.read_csv(project / out / "runs" / run.name / "metrics.csv") for out in ("out", "whole")]
        pd.testing.assert_frame_equal(*metrics)
        cells = nbformat.read(project / "whole" / "runs" / run.name / "run.ipynb", as_version=4).cells
        printed = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
        assert printed and not any("\r" in text for text in printed), "no progress bar"

    metrics, weights = (student / "metrics.csv").read_bytes(), load_file(student / "network.safetensors")
    (student / "metrics.csv").write_bytes(metrics.replace(b"psnr", b"psns", 1))
    done = call(*command("out"))
    assert done.returncode == 0 and f"{student / 'metrics.csv'} must be as it was written" in done.stdout
    assert (student / "metrics.csv").read_bytes() == metrics, "made again"
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(student / "network.safetensors").items()
    )
    assert plan(*command("out")) == {}


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is Linux's")
def test_no_job_outlives_a_killed_snakemake(project):
    """SIGKILL of Snakemake alone: a job that trained on would do so beside the next batch."""
    small_notebook("figure_1", "from pathlib import Path; import time\nPath('begun').touch(); time.sleep(300)")
    command = [sys.executable, "-m", "snakemake", "figure_1", *arguments("out")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as batch:
        while not Path("begun").is_file():
            assert batch.poll() is None
            time.sleep(0.1)
        family = psutil.Process(batch.pid).children(recursive=True)
        assert any("ipykernel" in " ".join(process.cmdline()) for process in family)
        os.kill(batch.pid, signal.SIGKILL)
        left = psutil.wait_procs(family, timeout=20)[1]
        for process in left:
            process.kill()
    assert not left
