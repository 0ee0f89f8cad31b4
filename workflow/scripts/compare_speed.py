"""Quality against time of pruned networks: ratio x widths x precision x solver; resumable.

    python workflow/scripts/compare_speed.py --network varnet --steps 40

The demo's teacher is pruned by the paper's rule and to multiples of 8 with as few parameters. All students are
fine-tuned alike with ground truth and judged on slices of the test subjects. The time is that of the process on one
thread, the median over the slices after one to warm up. Rows are appended to OUT/speed_demo.csv and kept.
"""

import argparse
import csv
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from compare_importance import evenly

from spade import checkpoint
from spade.basics import evaluating
from spade.bench import with_widths
from spade.config import load_config
from spade.files import write_json
from spade.finetuning import finetune
from spade.metrics import psnr
from spade.pruning import count_macs, count_parameters, prune
from spade.runs import Run, datasets, file_checksum, find_teacher, provenance, training_of

COLUMNS = "network ratio widths precision solver psnr seconds iterations parameters macs steps".split()


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="varnet")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.40, 0.05, 0.20, 0.10])
    parser.add_argument("--steps", type=int, default=40, help="updates of Adam per student")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--train", type=int, default=24, help="training slices")
    parser.add_argument("--test", type=int, default=12, help="test slices")
    parser.add_argument("--data", default="", help="folder of the demo's acquisitions")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    return parser.parse_args()


def judged(network, test: list, precision: str) -> dict[str, float]:
    """Mean PSNR, median seconds and mean iterations over the test slices."""
    half = precision == "bfloat16"
    values, seconds, iterations = [], [], []
    with evaluating(network), torch.inference_mode():
        for batch in [test[0], *test]:
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                x_hat = network(batch.y, batch.A)
            seconds.append(time.process_time() - began)
            values.append(psnr(x_hat[0], batch.x[0]))
            iterations.append(getattr(network, "last_iterations", 0))
    mean = lambda numbers: sum(numbers[1:]) / len(test)
    return {"psnr": mean(values), "seconds": statistics.median(seconds[1:]), "iterations": mean(iterations)}


def warm_starts(network, dataset, count: int) -> dict[str, list[int]]:
    """Iterations for neighbouring slices of the first test subject: each alone, and started from the one before."""
    infos = [dataset.collate([dataset[i]]) for i in range(min(count, len(dataset)))]
    batches = [batch for batch in infos if batch.info["subject"] == infos[0].info["subject"]]
    found: dict[str, list[int]] = {"zero-filled": [], "previous slice": []}
    before = None
    with evaluating(network):
        for batch in batches:
            found["zero-filled"].append(network.solve(batch.y, batch.A, record=False)[1].iterations)
            before, trace = network.solve(batch.y, batch.A, record=False, start=before)
            found["previous slice"].append(trace.iterations)
    return found


def main() -> None:
    """Make every student that has no row yet, and judge it in each precision and by each solver."""
    options = arguments()
    torch.set_num_threads(1)
    config, run = load_config("demo"), Run(options.network, 6, 0.40, "supervised")
    source = find_teacher(run, config, teacher="shipped")
    teacher, splits = checkpoint.load(source), datasets(config, run, options.data, progress=False)
    train, test = evenly(splits["train"], options.train), evenly(splits["test"], options.test)
    settings = dict(learning_rate=options.learning_rate, schedule="cosine", warmup=4, clip=1.0)
    settings |= dict(loss=training_of(config, run).loss)
    path = options.out / "speed_demo.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = {tuple(row[:3]) for row in csv.reader(path.open(encoding="utf-8"))}
    facts = dict(network=options.network, steps=options.steps, train_slices=len(train), test_slices=len(test),
                 settings=settings, teacher=source.name, teacher_sha256=file_checksum(source))  # fmt: skip
    if options.network == "deq":
        facts["iterations_from"] = warm_starts(teacher, splits["test"], options.test)
        print(facts["iterations_from"], flush=True)
    write_json(options.out / f"speed_demo_{options.network}.json", facts | provenance(script=Path(__file__).name))
    solvers = ("anderson", "safeguarded", "plain") if options.network == "deq" else ("",)
    for ratio, widths in [(0.0, "unpruned"), *((r, w) for r in options.ratios for w in ("paper", "multiples of 8"))]:
        if (options.network, str(ratio), widths) in done:
            continue
        student = teacher
        if ratio:
            student = prune(teacher, ratio, check=False) if widths == "paper" else with_widths(teacher, ratio, 8)
            if student is None:
                continue
            finetune(student, train, "supervised", steps=options.steps, progress=False, **settings)
        rows = []
        for solver in solvers:
            for precision in ("float32", "bfloat16"):
                if solver:
                    student.solver = solver
                found = judged(student, test, precision)
                counts = (count_parameters(student), count_macs(student, test[0].y, test[0].A))
                values = (f"{found[name]:.4f}" for name in ("psnr", "seconds", "iterations"))
                rows.append([options.network, ratio, widths, precision, solver, *values, *counts, options.steps])
                print(*rows[-1], flush=True)
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
