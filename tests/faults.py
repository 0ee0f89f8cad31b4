"""Damage every kind of file that the batch writes, and kill the batch: is anything wrong in silence?

    python tests/faults.py --seed 1 --faults 100            bits, cuts and zeros in files: a table in Markdown
    python tests/faults.py --seed 1 --kills 20              SIGKILL at random points of a batch that is started again

A fault is *noticed* if reading raises an error that names the file (or the file is made again), *unnamed* if it raises
another error or ends the process, *harmless* if all that is read is the same to the last bit, *silent* if not. Each is
read in a process of its own, and *hangs* if that takes more than 20 s of processor time, or 10 minutes. The files are
examples in a temporary folder.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from made_up_results import write_latency, write_photo_run, write_run
from safetensors.torch import load_file

from spade import checkpoint
from spade.basics import Batch, content_key, seed_of
from spade.convert import RawScan, write_scan
from spade.data.fastmri import MultiCoilSlices, load_maps
from spade.data.phantom import open_hdf5, simulate
from spade.examples import brain
from spade.finetuning import read_state, train
from spade.losses import make_strategy
from spade.models import VarNet
from spade.operators import equispaced_mask
from spade.pruning import prune
from spade.reconstruction import write_volume
from spade.runs import Run, data_checksum, read_record, write_csv
from spade.tables import collect, read_results

ROOT = Path(__file__).resolve().parents[1]
RUNS = (Run("varnet"), Run("varnet", 6, 0.40, "school"), Run("usrnet"))


# Files


@dataclass(frozen=True)
class Kind:
    """A kind of file: an example, and all that the package reads from it."""

    name: str
    path: Path
    read: Callable[[], Any]


def digest(value: Any) -> str:
    """Of everything in a value, to the last bit."""
    if isinstance(value, pd.DataFrame):
        value = [list(value), [[repr(cell) for cell in row] for row in value.itertuples(index=False)]]
    if isinstance(value, (dict, list, tuple)):
        items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
        return content_key([[str(key), digest(item)] for key, item in items])
    return content_key(value if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value))


def weights(path: Path) -> list:
    """All that is read from a saved network."""
    model = checkpoint.load(path)
    return [model.state_dict(), model.config(), str(model)]


def cached_maps(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Coil maps of the cache; `ValueError` where they are made again."""
    if (maps := load_maps(path, shape)) is None:
        raise ValueError(f"{path} is made again")
    return maps


def read_volume(path: Path) -> np.ndarray:
    """A reconstruction, as its users read it."""
    with open_hdf5(path) as file:
        return file["reconstruction"][()]


def made_files(folder: Path) -> Iterator[Kind]:
    """Acquisition, coil maps, network and training state, made by the package."""
    (acquisition,) = simulate(folder / "data", 1, 2, shape=(64, 128), num_coils=4, progress=False)
    items = lambda **more: list(MultiCoilSlices([acquisition], **more))
    expected = items(maps_folder=folder / "maps")
    yield Kind("acquisition", acquisition, lambda: items(maps_folder=False))
    with open_hdf5(acquisition) as file:
        kspace, images, header = (file[name][()] for name in ("kspace", "reconstruction_rss", "ismrmrd_header"))
    lines = equispaced_mask(128, 4, 0.2).numpy()
    converted = write_scan(folder / "converted.h5", RawScan(kspace * lines, lines, header.decode(), "AXT2", "a"))
    yield Kind("converted", converted, lambda: list(MultiCoilSlices([converted], maps_folder=False)))
    volume = write_volume(folder / "volume.h5", images)
    yield Kind("reconstruction", volume, lambda: read_volume(volume))
    maps = min((folder / "maps").iterdir())
    yield Kind("coil maps", maps, lambda: cached_maps(maps, expected[0]["maps"].shape))
    teacher = VarNet(num_cascades=1, channels=4, num_pools=1).eval()
    network = checkpoint.save(prune(teacher, 0.40), folder / "network", seed=0)
    yield Kind("network", network, lambda: weights(network))
    train(teacher, [Batch(*brain(), {})], make_strategy("supervised"), steps=2, folder=folder / "state", progress=False)
    state = folder / "state" / "training.safetensors"
    yield Kind("training state", state, lambda: read_state(state))
    with patch.dict(os.environ, {"SPADE_CACHE": str(folder)}):
        data_checksum(acquisition, large=0)
    (kept,) = (folder / "checksums").iterdir()
    yield Kind("checksum", kept, lambda: read_record(kept))


def results_of(folder: Path) -> Path:
    """A small folder of results as the batch leaves it, with its tidy files."""
    for run in RUNS[:2]:
        write_run(folder, run, 30.0)
    write_photo_run(folder, RUNS[2], 30.0)
    write_latency(folder, "varnet")
    write_csv(folder / "evolution.csv.gz", pd.DataFrame({"network": ["deq"] * 9, "ratio": 0.1, "psnr": range(9)}))
    collect(folder)
    return folder


def everything(out: Path, made: bool) -> list:
    """All that tables and figures read from a folder of results."""
    found = read_results(out, made)
    return [found.runs, found.metrics, found.curves, found.latency, found.evolution, *map(found.pictures, RUNS)]


def result_files(folder: Path) -> Iterator[Kind]:
    """The files of a run and of a measurement of time, and the tidy files."""
    of_run, out = RUNS[2].folder(folder).relative_to(folder), results_of(folder)
    for name in (*(f"{of_run}/{file}" for file in ("result.json", "metrics.csv", "curve.csv", "images.npz")),
                 "latency/varnet.csv", "latency/varnet.json"):  # fmt: skip
        yield Kind(Path(name).name, out / name, lambda: everything(out, True))
    for name in ("runs.jsonl", "metrics.csv.gz", "curves.csv.gz", "latency.csv", "evolution.csv.gz", "pictures.h5",
                 "checksums.json"):  # fmt: skip
        yield Kind(f"tidy {name}", out / name, lambda: everything(out, False))


# Faults


def flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit changed."""
    position = draw.randrange(8 * len(content))
    byte = bytes([content[position // 8] ^ 1 << position % 8])
    return content[: position // 8] + byte + content[position // 8 + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end lost."""
    return content[: draw.randrange(len(content))]


def zeroed(content: bytes, draw: random.Random) -> bytes:
    """A stretch of up to half of the file, or one of 512 bytes, set to zero."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([512, 1 + draw.randrange(1 + len(content) // 2)]))
    return content[:start] + bytes(stop - start) + content[stop:]


FAULTS = (flipped, cut, zeroed)
COLUMNS = ("noticed", "unnamed", "harmless", "silent", "hangs")


def outcome(kind: Kind, expected: str) -> str:
    """What reading the damaged file ends in, here: noticed, unnamed, harmless or silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = digest(kind.read())
        except (ValueError, FileNotFoundError) as error:
            return "noticed" if kind.path.name in str(error) else f"unnamed: {error!r:.200}"
        except Exception as error:  # any other kind is a fault of the package, too
            return f"unnamed: {error!r:.200}"
    return "harmless" if found == expected else "silent"


def timed_outcome(kind: Kind, expected: str, processor: int = 20, clock: float = 600.0) -> str:
    """As `outcome`, in a child process: "hangs" if it needs more seconds than these, "unnamed" if it dies."""
    context = multiprocessing.get_context("fork")  # a loop in a C library ends by a signal only
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 1))
        sender.send(outcome(kind, expected))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(clock) else "hangs"
    except EOFError:
        process.join()
        return "hangs" if process.exitcode == -signal.SIGXCPU else f"unnamed: the process ended: {process.exitcode}"
    finally:
        process.kill()
        process.join()


def damage(kind: Kind, seed: int, faults: int) -> dict[str, Counter]:
    """Outcomes by fault, `faults` of each; the file is as before at the end."""
    expected, content = digest(kind.read()), kind.path.read_bytes()
    found = {fault.__name__: Counter() for fault in FAULTS}
    try:
        for fault in FAULTS:
            for number in range(faults):
                damaged = fault(content, random.Random(seed_of("fault", seed, kind.name, fault.__name__, number)))
                kind.path.write_bytes(damaged)
                ended = timed_outcome(kind, expected) if damaged != content else "harmless"
                found[fault.__name__][ended.partition(":")[0]] += 1
                if not ended.startswith(("noticed", "harmless")):
                    print(f"{kind.name}, {fault.__name__} {number}: {ended}", file=sys.stderr)
    finally:
        kind.path.write_bytes(content)
    return found


def all_kinds(folder: Path) -> list[Kind]:
    """An example of every kind of file."""
    return [*made_files(folder / "made"), *result_files(folder / "results")]


def table(found: dict[str, dict[str, Counter]]) -> pd.DataFrame:
    """A row per kind of file: faults tried, and what they ended in."""
    rows = []
    for kind, outcomes in found.items():
        total = sum(outcomes.values(), Counter())
        tried = {"file": kind, "tried": total.total()}
        rows.append(tried | {name: total[name] for name in COLUMNS})
    return pd.DataFrame(rows)


# Kills


def kill_family(process: subprocess.Popen) -> None:
    """End a process and all that it started at once, as a power failure does."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def kill_one(process: subprocess.Popen, name: str) -> None:
    """SIGKILL of the first process of a batch whose command line has this name, if there is one."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                return child.kill()


def copy_project(folder: Path, names: tuple[str, ...] = ("config", "nbs", "workflow")) -> Path:
    """A copy of what the batch reads."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "settings.ini", folder)  # by which a checkout is recognised
    return folder


def longer_smoke(project: Path) -> None:
    """More steps for VarNet and a state after each few, so that kills meet trainings."""
    path = project / "config" / "smoke.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    varnet = settings["networks"]["varnet"]
    varnet["pretraining"] = {"steps": 150, "learning_rate": 1e-3, "checkpoint_every": 5}
    varnet["finetuning"] = {name: {"steps": 60, "checkpoint_every": 5} for name in varnet["finetuning"]}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


def batch(project: Path, out: str, *more: str) -> subprocess.Popen:
    """Table 1 and the figures of VarNet in the smoke configuration, as a process in `project`."""
    settings = ["--config", f"results={out}", "acquisitions=acquisitions"]
    command = ["demo_varnet", "--configfile", "config/smoke.yaml", *settings, "--cores", "1", "--nocolor", *more]
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, "-m", "snakemake", *command], cwd=project, env=environment, **output)


def finish(project: Path, out: str) -> None:
    """The batch without a kill."""
    batch(project, out, "--unlock").communicate()
    process = batch(project, out)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]


def same_runs(project: Path, left: str, right: str) -> list[str]:
    """Names of what differs between the runs of two batches: weights, metrics, pictures, curves without seconds."""
    different = []
    for folder in sorted((project / left / "runs").iterdir()):
        other = project / right / "runs" / folder.name
        curves = [pd.read_csv(path / "curve.csv").drop(columns="seconds") for path in (folder, other)]
        parts = {
            "weights": [load_file(path / "network.safetensors") for path in (folder, other)],
            "metrics": [(path / "metrics.csv").read_bytes() for path in (folder, other)],
            "pictures": [dict(np.load(path / "images.npz")) for path in (folder, other)],
            "curve": curves,
        }
        different += [f"{folder.name}: {name}" for name, (one, two) in parts.items() if digest(one) != digest(two)]
    return different


def kills(seed: int, number: int, longest: float = 60.0) -> int:
    """Kill a batch `number` times at random, in as many chains as that takes; the number of differences at the end."""
    draw, differences, chain, killed = random.Random(seed), [], 0, Counter()
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder), ("config", "nbs", "workflow", "spade"))
        longer_smoke(project)
        finish(project, "whole")
        while killed.total() < number:
            chain, done = chain + 1, False
            while killed.total() < number and not done:
                batch(project, f"chain{chain}", "--unlock").communicate()
                process, whom = batch(project, f"chain{chain}"), draw.choice(["all", "all", "snakemake", "kernel"])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=draw.uniform(3, longest))
                if done := process.poll() is not None:
                    break
                killed[whom] += 1
                if whom == "kernel":
                    kill_one(process, "ipykernel")
                    process.communicate()
                elif whom == "snakemake":
                    process.kill()
                    process.communicate()
                else:
                    kill_family(process)
                runs = sorted((project / f"chain{chain}").glob("runs/*/done"))
                print(f"chain {chain}, kill {killed.total()} of {whom}: {len(runs)} runs done", file=sys.stderr)
            finish(project, f"chain{chain}")
            differences += (found := same_runs(project, "whole", f"chain{chain}"))
            equal = "equal to the batch without kills, bit for bit"
            print(f"chain {chain}: {', '.join(found) or equal}", file=sys.stderr)
    print(f"{killed.total()} kills in {chain} chains ({dict(killed)}): {len(differences)} differences")
    return len(differences)


def main() -> int:
    """The command line; 1 if anything was silent or different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100, help="of each of three sorts for each kind of file")
    parser.add_argument("--kind", default="", help="only kinds with this in their name")
    parser.add_argument("--kills", type=int, default=0, help="instead: kills of a batch")
    given = parser.parse_args()
    if given.kills:
        return int(kills(given.seed, given.kills) > 0)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [kind for kind in all_kinds(Path(folder)) if given.kind in kind.name]
        found = table({kind.name: damage(kind, given.seed, given.faults) for kind in chosen})
    print(found.to_markdown(index=False))
    return int(found[["unnamed", "silent", "hangs"]].to_numpy().sum() > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
