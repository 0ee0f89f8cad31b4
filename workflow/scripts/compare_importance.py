"""Compare the rankings of spade.importance at equal operations and equal fine-tuning; resumable.

    python workflow/scripts/compare_importance.py --network varnet --steps 24 --out outputs/importance

The demo's teacher is pruned to the multiply-accumulates that ratio 0.40 of the paper leaves, fine-tuned with ground
truth, and judged on slices of the test subjects. Results are appended to OUT/importance.csv, one row per student and
stage ("before" or "after" fine-tuning); settings and provenance are in OUT/NETWORK-STEPS.json. Existing rows are kept.
"""

import argparse
import copy
import time

import torch
from compare_common import Comparison, Table, common_options

from spade.finetuning import finetune
from spade.importance import Random, Taylor
from spade.metrics import evaluate
from spade.pruning import prune

METHODS = [  # importance, scope, cuts
    *[(name, "local", 1) for name in ("l1", "random", "taylor", "l2", "fpgm")],
    *[(name, "global", 1) for name in ("l1", "taylor", "lamp")],
    ("l1", "local", 2),
]
COLUMNS = "network importance scope cuts updates seed stage psnr ssim parameters macs seconds"


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = common_options(__doc__, steps=24, learning_rate=2e-3, out="outputs/importance")
    parser.add_argument("--ratio", type=float, default=0.40)
    parser.add_argument("--rows", type=int, default=None, help="image rows that a step sees")
    parser.add_argument("--only", nargs="*", help="some methods, such as l1-local-1 lamp-global-1")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def pruned(teacher, name: str, scope: str, cuts: int, seed: int, train: list, options, removed: float, tune):
    """The student of one method; its widths are the paper's, or those of a global ranking at equal operations."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    importance = {"taylor": Taylor([train[i] for i in order[:4]]), "random": Random(seed)}.get(name, name)
    asked = dict(ratio=options.ratio) if scope == "local" else dict(target_macs=removed, scope="global")
    more = dict(steps=cuts, finetune=tune) if cuts > 1 else {}
    return prune(teacher, importance=importance, check=False, **asked, **more)


def main() -> None:
    """Run all students that have no row yet, seed by seed."""
    options, began = arguments(), time.time()
    common = Comparison.prepare(options, options.ratio)
    teacher, train, test, settings = common.teacher, common.train, common.test, common.settings
    settings |= dict(rows=options.rows) if options.rows else {}
    table = Table(options.out / "importance.csv", COLUMNS)
    done = table.keys(7)
    score = lambda network: evaluate(network, test, progress=False)[["psnr", "ssim"]].mean()

    def note(key: tuple, stage: str, network, macs: int, seconds: float) -> None:
        psnr, ssim = score(network)
        row = [*key, stage, f"{psnr:.4f}", f"{ssim:.5f}", sum(p.numel() for p in network.parameters()), macs]
        row.append(f"{seconds:.1f}")
        table.append([row])
        print(f"{time.time() - began:.0f} s", *row, flush=True)

    student = prune(teacher, options.ratio, check=False)
    removed = 1 - student.pruning_report.macs_after / student.pruning_report.macs_before
    report = student.pruning_report
    counts = dict(macs_before=report.macs_before, macs_removed=removed)
    common.write_facts(options.out / f"{options.network}-{options.steps}.json", __file__, ratio=options.ratio, **counts)
    if (options.network, "teacher", "", "0", "0", "0", "after") not in done:
        note((options.network, "teacher", "", 0, 0, 0), "after", teacher, student.pruning_report.macs_before, 0.0)
    for seed in range(options.seeds):
        for name, scope, cuts in [m for m in METHODS if not options.only or f"{m[0]}-{m[1]}-{m[2]}" in options.only]:
            key = (options.network, name, scope, cuts, options.steps, seed)
            if tuple(map(str, (*key, "after"))) in done:
                continue
            began_student = time.process_time()
            tune = lambda network, steps=options.steps // cuts, seed=seed: finetune(
                network, train, "supervised", steps=steps, seed=seed, progress=False, **settings
            )
            student = pruned(teacher, name, scope, cuts, seed, train, options, removed, tune)
            macs = student.pruning_report.macs_after
            if seed == 0 or name in ("random", "taylor") or cuts > 1:
                note(key, "before", copy.deepcopy(student).eval(), macs, 0.0)
            tune(student)
            note(key, "after", student, macs, time.process_time() - began_student)


if __name__ == "__main__":
    main()
