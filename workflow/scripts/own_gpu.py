"""Execute a command on a GPU that no other job of this user holds: python own_gpu.py COMMAND ...

Snakemake counts GPUs (--resources gpu=2) but does not number them. The command replaces this process and inherits a
file lock, which the operating system releases when the command ends, however it ends. No import of torch.
JOBS_PER_GPU=4 in the environment lets four jobs share each GPU (--resources gpu=8 for two GPUs).
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return re.findall(r"UUID: (MIG-[^)]+)", listed) or re.findall(r"UUID: (GPU-[^)]+)", listed)


def own_gpu(gpus: list[str], folder: str = "", pause: float = 1.0, sharing: int = 1) -> str:
    """Wait for one of the `sharing` places of a GPU and hold it until this process ends; GPUs fill evenly.

    Returns "" if there is no GPU, or if Slurm assigned just one.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not gpus or (job and len(gpus) == 1):
        return ""
    while True:
        for place, name in [(place, name) for place in range(sharing) for name in gpus]:
            path = Path(folder or tempfile.gettempdir()) / f"spade-gpu-{os.getuid()}-{job}-{name}-{place}.lock"
            lock = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            os.set_inheritable(lock, True)
            return name
        time.sleep(pause)


if __name__ == "__main__":
    if not re.fullmatch("[1-9][0-9]*", jobs := os.environ.get("JOBS_PER_GPU", "1")):
        sys.exit(f"JOBS_PER_GPU must be a whole number of at least 1, got {jobs!r}.")
    if name := own_gpu(visible_gpus(), sharing=int(jobs)):
        os.environ["CUDA_VISIBLE_DEVICES"] = name
    os.execvp(sys.argv[1], sys.argv[1:])
