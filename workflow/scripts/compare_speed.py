"""Quality against time of pruned networks: ratio x widths x precision x solver; resumable.

    python workflow/scripts/compare_speed.py --network varnet --steps 40

The demo's teacher is pruned by the paper's rule and to multiples of 8 with as few parameters. All students are
fine-tuned alike with ground truth and judged on slices of the test subjects. The time is that of the process on one
thread, the median over the slices after one to warm up. Rows are appended to OUT/speed_demo.csv and kept.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from compare_common import Comparison, Table, common_options

from spade.basics import evaluating
from spade.bench import with_widths
from spade.finetuning import finetune
from spade.metrics import psnr
from spade.pruning import count_macs, count_parameters, prune

COLUMNS = "network ratio widths precision solver psnr seconds iterations parameters macs steps"


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = common_options(__doc__, steps=40, learning_rate=1e-3, out="outputs/bench")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.40, 0.05, 0.20, 0.10])
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
    common = Comparison.prepare(options, ratio=0.40)
    teacher, test = common.teacher, common.test
    table = Table(options.out / "speed_demo.csv", COLUMNS)
    done = table.keys(3)
    more = {}
    if options.network == "deq":
        more["iterations_from"] = warm_starts(teacher, common.splits["test"], options.test)
        print(more["iterations_from"], flush=True)
    common.write_facts(options.out / f"speed_demo_{options.network}.json", __file__, **more)
    solvers = ("anderson", "safeguarded", "plain") if options.network == "deq" else ("",)
    for ratio, widths in [(0.0, "unpruned"), *((r, w) for r in options.ratios for w in ("paper", "multiples of 8"))]:
        if (options.network, str(ratio), widths) in done:
            continue
        student = teacher
        if ratio:
            student = prune(teacher, ratio, check=False) if widths == "paper" else with_widths(teacher, ratio, 8)
            if student is None:
                continue
            finetune(student, common.train, "supervised", steps=options.steps, progress=False, **common.settings)
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
        table.append(rows)


if __name__ == "__main__":
    main()
