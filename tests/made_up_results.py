"""Folders of results as the batch leaves them, for the tests of tables and figures."""

from pathlib import Path

import numpy as np
import pandas as pd

from spade.runs import Run, write_csv, write_images, write_record
from spade.tables import Results, read_results


def write_run(
    out: Path,
    run: Run,
    psnr: float,
    seed_shift: float = 0.0,
    seeds: tuple[int, ...] = (0,),
    more: dict[tuple[str, str], float] | None = None,
) -> None:
    """A run of CS-MRI with two images; `seeds`: its configuration's; `more`: values by strategy and metric."""
    folder = run.folder(out)
    facts = {key: value for key, value in vars(run).items() if key not in ("network", "loss")}
    rows = [
        {"model": run.model, "criterion": "", **facts, "image": f"a/{i}", "metric": metric, "value": value}
        for i in (0, 1)
        for metric, value in (("psnr", psnr + seed_shift + 2 * i - 1), ("ssim", 0.95))
    ]
    rows += [
        {**rows[0], "strategy": strategy, "metric": metric, "value": value}
        for (strategy, metric), value in (more or {}).items()
    ]
    write_csv(folder / "metrics.csv", pd.DataFrame(rows))
    truth = np.random.default_rng(0).random((32, 40))
    references = {"ground truth": truth, "zero-filled": 0.5 * truth, "CG-SENSE": 0.7 * truth, "teacher": 0.95 * truth}
    write_images(folder / "images.npz", {"student": 0.9 * truth} if run.strategy else references)
    facts = {"parameters": 100, "sampling_rate": 0.25, "device": "CPU", "seconds": 1.0, "commit": "abc"}
    config = {"name": "p", "description": "d", "seeds": list(seeds)}
    data = {"checksum": "x", "split": {"test": ["a.h5"]}}
    record = {"run": vars(run), "run_key": run.name, **facts, "config": config, "data": data}
    write_record(folder / "result.json", record, [folder / "metrics.csv", folder / "images.npz"])


def write_photo_run(out: Path, run: Run, psnr: float, before: float | None = None, images: int = 2) -> None:
    """A run of USRNet: `images` photographs at three scales; before fine-tuning only the first was evaluated."""
    folder, rows = run.folder(out), []
    bicubic = ("bicubic", "", None if run.strategy else 24.0, images)
    for model, strategy, level, count in (
        (run.network, run.strategy, psnr, images),
        (run.network, "none", before, 1),
        bicubic,
    ):
        facts = {"model": model, "criterion": "", "ratio": run.ratio, "strategy": strategy, "start": run.start}
        for scale in (2, 3, 4):
            for i in range(count if level is not None else 0):
                item = {**facts, "scale": scale, "seed": run.seed, "image": f"{i}/{i}"}
                rows.append({**item, "metric": "psnr", "value": level - scale + 2 + 4 * i})
                rows.append({**item, "metric": "ssim", "value": 0.8})
    write_csv(folder / "metrics.csv", pd.DataFrame(rows))
    curve = {"step": [0, 1, 2], "loss": [np.nan, 1.0, 0.5], "validation": [20.0, np.nan, psnr]}
    write_csv(folder / "curve.csv", pd.DataFrame(curve))
    photo = np.random.default_rng(0).random((3, 48, 60))
    references = {"ground truth": photo, "bicubic": 0.5 * photo, "teacher": 0.95 * photo}
    write_images(folder / "images.npz", {"student": 0.9 * photo} if run.strategy else references)
    facts = {"scales": [2, 3, 4], "kernels": 12, "kernels_from": "kernels_12.mat", "noise": 0.0, "pairing": "cyclic"}
    facts |= {"tile": None, "photographs": images, "measurements": 3 * images, "validation_psnr": 30.0, "commit": "abc"}
    facts |= {"parameters": 100, "device": "CPU", "seconds": 1.0, "loaded": "" if run.strategy else "usrnet_tiny.pth"}
    config = {"name": "p", "description": "d"}
    files = [folder / name for name in ("metrics.csv", "curve.csv", "images.npz")]
    write_record(folder / "result.json", {"run": vars(run), "run_key": run.name, **facts, "config": config}, files)


def write_latency(out: Path, network: str, size: str = "paper", milliseconds: float = 1.0, parameters: int = 1) -> None:
    """Times of one size of a network, added to those that are stored."""
    path = out / "latency" / f"{network}.csv"
    facts = {
        "speed_up": 1.0,
        "parameters": parameters,
        "macs": 1,
        "input": "96×144 at ×3",
        "device": "a CPU, 2 threads",
    }
    rows = [
        {"network": network, "size": size, "ratio": ratio, "milliseconds": milliseconds, **facts}
        for ratio in (0.0, 0.05, 0.10, 0.20, 0.40)
    ]
    stored = [pd.read_csv(path)] if path.is_file() else []
    write_csv(path, pd.concat([*stored, pd.DataFrame(rows)]))
    write_record(path.with_suffix(".json"), {"latency_key": network}, [path])


def add_photo_runs(out: Path) -> Path:
    """A teacher and a student of super-resolution beside the runs of CS-MRI, as in outputs/demo."""
    write_photo_run(out, Run("usrnet"), 30.0)
    write_photo_run(out, Run("usrnet", ratio=0.40, strategy="school"), 29.0, before=20.0)
    return out


def made(out: Path) -> Results:
    """The results of a folder, from its runs."""
    return read_results(out, made=True)
