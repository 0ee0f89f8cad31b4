"""What compare_importance.py and compare_speed.py share: the options, the demo's teacher and slices, the table."""

import argparse
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spade import checkpoint
from spade.config import load_config
from spade.files import write_json
from spade.runs import Run, datasets, file_checksum, find_teacher, provenance, training_of


def common_options(description: str, steps: int, learning_rate: float, out: str) -> argparse.ArgumentParser:
    """A parser with the options of both scripts and the defaults of one."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--network", default="varnet")
    parser.add_argument("--steps", type=int, default=steps, help="updates of Adam per student")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--train", type=int, default=24, help="training slices")
    parser.add_argument("--test", type=int, default=12, help="test slices")
    parser.add_argument("--data", default="", help="folder of the demo's acquisitions")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def evenly(dataset, count: int) -> list:
    """`count` batches of one slice, evenly spread over a dataset."""
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().int().tolist()
    return [dataset.collate([dataset[i]]) for i in chosen]


@dataclass
class Comparison:
    """The demo's teacher of a network, slices to fine-tune and to judge on, and settings of the fine-tuning."""

    teacher: Any
    splits: Any
    train: list
    test: list
    settings: dict[str, Any]
    facts: dict[str, Any]  # for the file beside the table

    @classmethod
    def prepare(cls, options: argparse.Namespace, ratio: float) -> "Comparison":
        """Read the teacher and the slices; uses one thread from here on."""
        torch.set_num_threads(1)
        config, run = load_config("demo"), Run(options.network, 6, ratio, "supervised")
        source = find_teacher(run, config, teacher="shipped")
        splits = datasets(config, run, options.data, progress=False)
        train, test = evenly(splits["train"], options.train), evenly(splits["test"], options.test)
        settings = dict(learning_rate=options.learning_rate, schedule="cosine", warmup=4, clip=1.0)
        settings |= dict(loss=training_of(config, run).loss)
        facts = dict(network=options.network, steps=options.steps, train_slices=len(train), test_slices=len(test))
        facts |= dict(teacher=source.name, teacher_sha256=file_checksum(source))
        return cls(checkpoint.load(source), splits, train, test, settings, facts)

    def write_facts(self, path: Path, script: str, **more: Any) -> None:
        """Write the facts, settings and provenance."""
        write_json(path, self.facts | dict(settings=self.settings) | more | provenance(script=Path(script).name))


class Table:
    """A CSV file that grows by rows."""

    def __init__(self, path: Path, columns: str):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(columns.split()) + "\n", encoding="utf-8")

    def keys(self, count: int) -> set[tuple[str, ...]]:
        """The first `count` values of each row."""
        return {tuple(row[:count]) for row in csv.reader(self.path.open(encoding="utf-8"))}

    def append(self, rows: Iterable[Iterable]) -> None:
        """Add rows."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
