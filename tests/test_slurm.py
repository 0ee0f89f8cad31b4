"""A part of the smoke batch on a real Slurm, of one node on this machine, that the test starts and ends. Skipped where Slurm is not installed (Debian: slurm-wlm and munge) or cannot be started."""
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
        part.chmod(0o755)           # munge refuses a socket where others may not look
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(host=host, folder=folder, user="root", controller=free_port(), daemon=free_port(), cpus=os.cpu_count(), memory=psutil.virtual_memory().total // 2**20 - 500)
    (folder / "slurm.conf").write_text(conf)
    # Snakemake's plugin empties SLURM_* in its jobs, as a cluster's configuration lies in /etc; here srun must be told again where it is.
    wrapper = folder / "bin" / "srun"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which('srun', path=PATHS)} \"$@\"\n")
    wrapper.chmod(0o755)
    environment = {**os.environ, "PATH": f"{wrapper.parent}{os.pathsep}{PATHS}", "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    munge = [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
    with contextlib.ExitStack() as started:
        for command in commands:
            log = started.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            started.callback(process.wait, 20)
            started.callback(process.terminate)
            time.sleep(1)
        idle = lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout
        if not wait_for(idle):
            said = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in sorted(folder.glob("*.out")) + sorted(folder.glob("*.log")))
            pytest.skip(f"Slurm did not start here:\n{said}")
        yield environment


def test_a_part_of_the_batch_runs_on_slurm(slurm, tmp_path):
    """A student of the smoke profile's DEQ, with the committed profile for Slurm: acquisitions, coil maps, teacher and student, a job each, and a measurement of time, which has a node of its own.

    A figure whose notebook fails names notebook, parameters and cell in Slurm's log, and the others go on. The second time that figure alone is left to do.
    """
    for name in ("config", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "Snakefile", tmp_path / "Snakefile")
    cells = [nbformat.v4.new_code_cell("profile = ''\nout = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("image = open('no such image')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "nbs" / "experiments" / "figure_1.ipynb")
    student = Run("deq", 6, 0.40, "school")
    folders = [Path("out") / "runs" / run.name for run in (student.teacher, student)]
    command = [sys.executable, "-m", "snakemake", str(folders[1] / "result.json"), "out/latency/deq.json", "figure_1", "--configfile", "config/smoke.yaml", "--config", "results=out", "--workflow-profile", "config/slurm", "--latency-wait", "20",
               "--default-resources", "slurm_partition=test", "mem_mb=500", "--set-resources", "latency:mem_mb=1500", "--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=900)
    submitted = re.findall(r"Job \d+ has been submitted with SLURM jobid", done.stdout + done.stderr)
    assert done.returncode == 1 and len(submitted) == 6, (done.stdout + done.stderr)[-4000:]
    logged = "".join(path.read_text() for path in (tmp_path / ".snakemake" / "slurm_logs").rglob("*.log"))
    assert "figure_1.ipynb (" in logged and "profile='smoke'" in logged and "cell In [3]: image = open('no such image')" in logged, logged[-2000:]
    for folder in folders:
        result = json.loads((tmp_path / folder / "result.json").read_text())
        assert result["profile"]["name"] == "smoke" and (tmp_path / folder / "network.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "latency" / "deq.json").read_text())["rows"][0]["milliseconds"] > 0
    assert result["means"]["deq school psnr"] > 0 and len(list((tmp_path / "data" / "smoke").glob("*.h5"))) == 4
    again = subprocess.run([*command, "-n"], cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=200)
    assert dict(re.findall(r"^(\w+) +(\d+)$", again.stdout + again.stderr, re.M)) == {"figure_1": "1", "total": "1"}
