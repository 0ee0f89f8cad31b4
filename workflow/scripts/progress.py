"""What a batch prints: one line when it starts, one per started and finished job, one when it ends.

    [5/12] varnet-R6-0.20-school-seed0  49 s  29.92 dB

The Snakefile adds `Lines` to Snakemake's log. `python workflow/scripts/progress.py table_1.csv ...` prints tables of a
batch in at most 100 columns; the files hold more.
"""

import csv
import json
import logging
import re
import sys
import time
from pathlib import Path

RUNS = ("pretrain", "finetune", "finetune_longest", "fmp_run", "fmp_longest")  # rules with a notebook per run
LATER = 3600  # seconds after which durations are given in hours


def duration(seconds: float) -> str:
    """`49 s`, `3:05 min` or `1:12 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    whole, part, unit = (seconds, 60, "min") if seconds < LATER else (seconds // 60, 60, "h")
    return f"{whole // part}:{whole % part:02d} {unit}"


def quality(record: Path) -> str:
    """The mean PSNR of a run on its test images, `29.92 dB`; empty without a record."""
    try:
        result = json.loads(record.read_text(encoding="utf-8"))
        if "scores" in result:  # of the second paper: a row per picture
            found = [row["psnr"] for row in result["scores"]]
        else:
            run = result["run"]
            name = re.escape(f"{run['network']} {run['strategy']}".strip())
            found = [value for key, value in result["means"].items() if re.fullmatch(rf"{name}( x\d+)? psnr", key)]
        return f"{sum(found) / len(found):.2f} dB"
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return ""


def is_fault(record: logging.LogRecord) -> bool:
    """Whether Snakemake reports a warning or an error."""
    event = str(getattr(record, "event", "") or "").lower()
    return record.levelno >= logging.WARNING or event in ("job_error", "group_error", "error")


class Lines(logging.Handler):
    """Prints Snakemake's events as lines on standard error; `active()` is False in a dry run."""

    def __init__(self, out, about="", estimate=lambda trainings, rules: "", active=lambda: True, stream=None):
        super().__init__()
        self.out, self.about, self.estimate, self.active = Path(out), about, estimate, active
        self.stream, self.start, self.jobs, self.finished = stream or sys.stderr, time.time(), {}, []
        self.count, self.rules, self.manager = 0, set(), None

    def attach(self, manager, quiet: bool) -> None:
        """Listen to Snakemake's log in place of an earlier batch; `quiet`: its own text is faults alone."""
        logger = manager.logger
        logger.handlers[:] = [self, *(h for h in logger.handlers if not isinstance(h, Lines))]
        self.manager = manager if quiet else None

    def mute(self) -> None:
        """Let Snakemake's terminal handlers, made after its first record, show faults alone."""
        if listener := getattr(self.manager, "queue_listener", None):
            for handler in listener.handlers:
                if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                    handler.addFilter(lambda record: not self.active() or is_fault(record))
            self.manager = None

    def say(self, *parts: str) -> None:
        self.stream.write("  ".join(filter(None, parts)) + "\n")  # print writes the end of the line apart
        self.stream.flush()

    def emit(self, record: logging.LogRecord) -> None:
        self.mute()
        event = str(getattr(record, "event", "") or "").lower()
        action = getattr(self, f"on_{event}", None)
        if action and self.active():
            action(record)

    def on_run_info(self, record: logging.LogRecord) -> None:
        """Before the first job: what will be made and where."""
        stats = {rule: int(count) for rule, count in record.stats.items() if rule != "total"}
        self.rules = set(stats)
        trainings = sum(stats.get(rule, 0) for rule in RUNS)
        reports = sum(1 for rule in self.rules if re.search(r"(table|figure)_[a-z0-9]+$", rule))
        what = f"{self.about}: trainings {trainings}, tables and figures {reports}, in {self.out}."
        self.say(what, self.estimate(trainings, self.rules))

    def on_job_info(self, record: logging.LogRecord) -> None:
        wildcards = record.wildcards or {}
        run = wildcards.get("run") or wildcards.get("fmp")
        name = run or " ".join([record.rule_name, *map(str, wildcards.values())])
        known = record.jobid in self.jobs  # a second try
        folder = self.out / "fmp" if "fmp" in wildcards.keys() else self.out
        self.jobs[record.jobid] = (name, time.time(), folder / "runs" / name / "result.json" if run else None)
        self.say("start", name, "again" if known else "")

    def on_job_finished(self, record: logging.LogRecord) -> None:
        self.finished.append(record.job_id)

    def on_progress(self, record: logging.LogRecord) -> None:
        """After each finished job: its line."""
        for job in self.finished:
            self.count += 1
            name, start, result = self.jobs.get(job, (f"job {job}", time.time(), None))
            found = quality(result) if result else ""
            self.say(f"[{self.count}/{record.total}] {name}", duration(time.time() - start), found)
        self.finished = []

    def on_job_error(self, record: logging.LogRecord) -> None:
        name = self.jobs.get(record.jobid, (f"job {record.jobid}",))[0]
        self.say("failed", name)

    def demo(self) -> str:
        """The target demo_<network> of this batch; empty for others."""
        found = sorted((rule for rule in self.rules if rule.startswith("demo_")), key=len)
        return re.split("_(?:table|figure)_", found[0])[0] if found and "index" not in self.rules else ""

    def last(self, success: bool) -> None:
        """After the last job: the time, the file to open and what comes next."""
        took = duration(time.time() - self.start)
        if not success:
            self.say(f"Stopped after {took}: a job failed. The same command continues from here.")
            return
        folder = self.out / self.demo()
        tables = sorted(folder.glob("table_*.md"))
        page = folder / "index.md" if "index" in self.rules else tables[0] if tables else folder
        page = self.out / "fmp.md" if "fmp_page" in self.rules else page
        following = "make docs shows them as a website." if "index" in self.rules else "Next: make paper CONFIG=demo."
        self.say(f"Done in {took}.", f"Open {page}.", following)


def narrow(path: Path, width: int = 100) -> str:
    """A table's own PSNR, speed-up and kept shares as text of at most `width` columns, from its .csv file."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    ours = [i for i, name in enumerate(header) if "(paper)" not in name]
    wanted = ours[:2] + [i for i in ours[2:] if re.match(r"PSNR|Speed-up|Δ|Kept", header[i])]
    text = lambda value: f"{float(value):.2f}" if re.fullmatch(r"-?\d+\.\d{3,}", value) else value
    cells = [[text(row[i]) if i < len(row) else "" for i in wanted] for row in rows]
    heads = [["PSNR", header[i][5:]] if header[i].startswith("PSNR ") else ["", header[i]] for i in wanted]
    sizes = [max(map(len, [*head, *(row[k] for row in cells)])) for k, head in enumerate(heads)]
    while sum(sizes) + 2 * (len(sizes) - 1) > width:
        sizes.pop()
    line = lambda values: "  ".join(
        v.ljust(n) if k == 0 else v.rjust(n) for k, (v, n) in enumerate(zip(values, sizes))
    ).rstrip()
    lines = [line([head[level] for head in heads]) for level in (0, 1)]
    return "\n".join([path.stem.replace("_", " ").capitalize() + " (PSNR in dB)", *lines, *map(line, cells)])


if __name__ == "__main__":
    for table in filter(Path.is_file, map(Path, sys.argv[1:])):
        print(f"\n{narrow(table)}")
