"""Execute a command on a GPU that no other job of this user holds: python own_gpu.py COMMAND ...

Snakemake counts GPUs (--resources gpu=2) but does not number them. The command replaces this process and inherits a
file lock, which the operating system releases when the command ends, however it ends. No import of torch.
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


def own_gpu(gpus: list[str], folder: str = "", pause: float = 1.0) -> str:
    """Wait for a free GPU and hold it until this process ends; "" if there is none, or if Slurm assigned just one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not gpus or (job and len(gpus) == 1):
        return ""
    while True:
        for name in gpus:
            path = Path(folder or tempfile.gettempdir()) / f"spade-gpu-{os.getuid()}-{job}-{name}.lock"
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
    if name := own_gpu(visible_gpus()):
        os.environ["CUDA_VISIBLE_DEVICES"] = name
    os.execvp(sys.argv[1], sys.argv[1:])
