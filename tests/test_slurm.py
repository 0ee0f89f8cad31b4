"""A part of the smoke batch on a real Slurm of one node on this machine, which the test starts and ends.

Skipped where Slurm is not installed (Debian: slurm-wlm and munge) or cannot be started.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest

from spade.runs import Run

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "srun")
PATHS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(what, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.5)
    return False


@pytest.fixture
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment in which `sbatch` finds a Slurm of one node."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATHS)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed here")
    if os.getuid():
        pytest.skip("Slurm's daemons start jobs in a user's name, which only root may")
    folder = tmp_path_factory.mktemp("slurm")
    for part in (folder, folder.parent):
        part.chmod(0o755)  # munge refuses a socket where others may not look
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(
        host=host,
        folder=folder,
        user="root",
        controller=free_port(),
        daemon=free_port(),
        cpus=os.cpu_count(),
        memory=psutil.virtual_memory().total // 2**20 - 500,
    )
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    # Snakemake's plugin empties SLURM_* in its jobs, because a cluster's configuration lies in /etc.
    # Here srun must get its place again.
    wrapper = folder / "bin" / "srun"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun", path=PATHS)} "$@"\n', encoding="utf-8"
    )
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{wrapper.parent}{os.pathsep}{PATHS}",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    munge = [
        f"--socket={folder}/munge.socket",
        f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munge.log",
        f"--seed-file={folder}/munge.seed",
    ]
    commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
    with contextlib.ExitStack() as started:
        for command in commands:
            log = started.enter_context((folder / f"{command[0]}.out").open("w", encoding="utf-8"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            started.callback(process.wait, 20)
            started.callback(process.terminate)
            time.sleep(1)
        idle = lambda: (
            "idle"
            in subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, encoding="utf-8"
            ).stdout
        )
        if not wait_for(idle):
            said = "\n".join(
                f"{path.name}: {path.read_text(encoding='utf-8')[-600:]}"
                for path in sorted(folder.glob("*.out")) + sorted(folder.glob("*.log"))
            )
            pytest.skip(f"Slurm did not start here:\n{said}")
        yield environment


def test_a_part_of_the_batch_runs_on_slurm(slurm, tmp_path):
    """A student of the smoke configuration, with the committed profile for Slurm: data, coil maps, teacher and student.

    Beside them a figure whose notebook fails, with its notebook, parameters and cell in Slurm's log, and a measurement
    of time on a node of its own. The second time the figure alone is left to do.
    """
    for name in ("config", "nbs", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    parameters = "config = out = target = ''\nmade = False"
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("image = open('no such image')"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "nbs" / "experiments" / "figure_1.ipynb")
    student = Run("deq", 6, 0.40, "school")
    targets = [f"out/runs/{student.name}/done", "out/latency/varnet.csv", "figure_1"]
    profile = ["--configfile", "config/smoke.yaml", "--config", "results=out"]
    profile += ["--workflow-profile", "workflow/profiles/slurm", "--latency-wait", "20", "--retries", "0"]
    resources = ["--default-resources", "slurm_partition=test", "mem_mb=500", "--set-threads", "latency=1"]
    resources += ["--set-resources", "latency:mem_mb=1500", "latency:slurm_extra=--exclusive", "--slurm-no-account"]
    waiting = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5"]
    waiting += ["--seconds-between-status-checks", "3"]
    command = [sys.executable, "-m", "snakemake", *targets, *profile, *resources, *waiting]
    done = subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, encoding="utf-8", timeout=900)
    printed = done.stdout + done.stderr
    submitted = re.findall(r"Job \d+ has been submitted with SLURM jobid", printed)
    assert done.returncode == 1 and len(submitted) == 6, printed[-4000:]
    logged = "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / ".snakemake" / "slurm_logs").rglob("*.log")
    )
    assert "run_notebook.py nbs/experiments/figure_1.ipynb" in logged and "config: smoke" in logged, logged[-2000:]
    assert "image = open('no such image')" in logged
    for run in (student.teacher, student):
        assert (tmp_path / "out" / "runs" / run.name / "done").is_file()
        result = json.loads((tmp_path / "out" / "runs" / run.name / "result.json").read_text(encoding="utf-8"))
        assert result["config"]["name"] == "smoke" and result["means"]
    assert "milliseconds" in (tmp_path / "out" / "latency" / "varnet.csv").read_text(encoding="utf-8")
    again = subprocess.run(
        [*command, "-n"], cwd=tmp_path, env=slurm, capture_output=True, encoding="utf-8", timeout=200
    )
    assert dict(re.findall(r"^(\w+) +(\d+)$", again.stdout + again.stderr, re.M)) == {"figure_1": "1", "total": "1"}
