"""What a batch prints: lines instead of bars, the quality of each run, the file to open, narrow tables, silent make."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))
from progress import Lines, duration, narrow, quality  # noqa: E402


def record(event: str, **facts) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, None, (), None)
    made.__dict__.update(event=event, **facts)
    return made


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder with the record of one run."""
    folder = tmp_path / "runs" / "varnet-R6-0.20-school-seed0"
    folder.mkdir(parents=True)
    means = {"varnet school psnr": 29.921, "varnet school ssim": 0.9, "varnet pruned only psnr": 20.0}
    result = {"run": {"network": "varnet", "strategy": "school"}, "means": means}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return tmp_path


def test_a_line_per_finished_job_and_a_first_and_a_last_one(out, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("progress.time.time", lambda: clock.now)
    lines = Lines(out, "demo", lambda trainings, rules: f"about {2 * trainings} minutes", stream=io.StringIO())
    stats = {"finetune": 3, "demo_varnet_table_1": 1, "demo_varnet": 1, "total": 5}
    lines.emit(record("RUN_INFO", stats=stats))
    for job, run in enumerate(("varnet-R6-0.20-school-seed0", "varnet-R6-0.10-school-seed0")):
        lines.emit(record("JOB_INFO", jobid=job, rule_name="finetune", wildcards={"run": run}))
    for job, seconds in ((0, 49), (1, 3651)):
        clock.now = 1000 + seconds
        lines.emit(record("JOB_FINISHED", job_id=job))
        lines.emit(record("PROGRESS", done=job + 1, total=5))
    lines.emit(record("JOB_INFO", jobid=2, rule_name="latency", wildcards={"network": "varnet"}))
    lines.emit(record("JOB_ERROR", jobid=2))
    lines.emit(record("JOB_INFO", jobid=2, rule_name="latency", wildcards={"network": "varnet"}))
    (out / "demo_varnet").mkdir()
    (out / "demo_varnet" / "table_1.md").touch()
    lines.last(True)
    assert lines.stream.getvalue().splitlines() == [
        f"demo: trainings 3, tables and figures 1, in {out}.  about 6 minutes",
        "start  varnet-R6-0.20-school-seed0",
        "start  varnet-R6-0.10-school-seed0",
        "[1/5] varnet-R6-0.20-school-seed0  49 s  29.92 dB",
        "[2/5] varnet-R6-0.10-school-seed0  1:00 h",
        "start  latency varnet",
        "failed  latency varnet",
        "start  latency varnet  again",
        f"Done in 1:00 h.  Open {out / 'demo_varnet' / 'table_1.md'}.  Next: make paper CONFIG=demo.",
    ]


def test_a_failed_and_a_dry_batch(out):
    lines = Lines(out, active=lambda: False, stream=io.StringIO())
    lines.emit(record("RUN_INFO", stats={"all": 1, "total": 1}))
    assert lines.stream.getvalue() == ""
    lines.last(False)
    assert "a job failed. The same command continues from here." in lines.stream.getvalue()


@pytest.mark.parametrize("seconds, text", ((0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (4350, "1:12 h")))
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_quality_of_a_run(out):
    record_of = out / "runs" / "varnet-R6-0.20-school-seed0" / "result.json"
    assert quality(record_of) == "29.92 dB" and quality(out / "missing.json") == ""
    means = {f"usrnet school x{s} psnr": value for s, value in ((2, 29.0), (3, 28.0), (4, 26.0))}
    usrnet = {"run": {"network": "usrnet", "strategy": "school"}, "means": means}
    record_of.write_text(json.dumps(usrnet), encoding="utf-8")
    assert quality(record_of) == "27.67 dB"
    record_of.write_text("{", encoding="utf-8")
    assert quality(record_of) == ""


def test_a_batch_of_the_second_paper(tmp_path):
    """Its runs are in fmp/runs; their records have a row per picture, and the page is fmp.md."""
    folder = tmp_path / "fmp" / "runs" / "l1-0.40-seed0"
    folder.mkdir(parents=True)
    scores = [{"image": name, "psnr": value} for name, value in (("a", 33.0), ("b", 34.5))]
    (folder / "result.json").write_text(json.dumps({"method": "l1", "scores": scores}), encoding="utf-8")
    lines = Lines(tmp_path, "demo", stream=io.StringIO())
    stats = {"fmp_run": 2, "fmp_table_3": 1, "fmp_page": 1, "demo_edsr-sr": 1, "total": 5}
    lines.emit(record("RUN_INFO", stats=stats))
    lines.emit(record("JOB_INFO", jobid=0, rule_name="fmp_run", wildcards={"fmp": "l1-0.40-seed0"}))
    lines.emit(record("JOB_FINISHED", job_id=0))
    lines.emit(record("PROGRESS", done=1, total=5))
    lines.last(True)
    assert lines.stream.getvalue().splitlines() == [
        f"demo: trainings 2, tables and figures 1, in {tmp_path}.",
        "start  l1-0.40-seed0",
        "[1/5] l1-0.40-seed0  0 s  33.75 dB",
        f"Done in 0 s.  Open {tmp_path / 'fmp.md'}.  Next: make paper CONFIG=demo.",
    ]


def test_a_table_of_the_second_paper_shows_quality_and_size(tmp_path):
    head = "part,network,steps,PSNR Set5,SSIM Set5,PSNR bicubic Set5,Kept %,Kept dense %"
    path = tmp_path / "fmp_table_3.csv"
    path.write_text(
        f'{head}\nmethods,"FMP 40 % total, flops",2000,33.20716,0.93,32.02,59.8712,70.1\n', encoding="utf-8"
    )
    *_, row = narrow(path).splitlines()
    assert re.split("  +", row) == ["methods", "FMP 40 % total, flops", "33.21", "32.02", "59.87", "70.1"]


TABLES = sorted((ROOT / "outputs" / "demo").glob("table_*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_printed_table_fits_100_columns(path):
    lines = narrow(path).splitlines()
    assert max(map(len, lines)) <= 100 and "(paper)" not in "".join(lines)
    assert len(lines) == 3 + len(path.read_text(encoding="utf-8").strip().splitlines()) - 1


SNAKEFILE = """
import sys
sys.path.insert(0, {scripts!r})
from progress import Lines
from snakemake.logging import logger_manager
LINES = Lines("out", "small")
LINES.attach(logger_manager, True)
onsuccess: LINES.last(True)
onerror: LINES.last(False)
rule all:
    input: "out/runs/a/done"
rule finetune:
    output: touch("out/runs/{{run}}/done")
    shell: "exit {code}"
"""


@pytest.mark.parametrize("code", (0, 3))
def test_snakemakes_events_arrive(tmp_path, code):
    text = SNAKEFILE.format(scripts=str(ROOT / "workflow" / "scripts"), code=code)
    (tmp_path / "Snakefile").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "rules"],
        cwd=tmp_path, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert "small: trainings 1, tables and figures 0, in out." in lines and "start  a" in lines
    if code:
        assert done.returncode == 1 and "failed  a" in lines and any("Stopped after" in line for line in lines)
        assert "exit 3" in done.stderr, "Snakemake's own message"
    else:
        assert done.returncode == 0 and any(line.startswith("[1/2] a  0 s") for line in lines), done.stderr
        assert lines[-1].startswith("Done in ") and "jobid" not in done.stderr and "steps" not in done.stderr


def test_make_echoes_no_recipe():
    done = subprocess.run(
        ["make", "--no-print-directory", "--eval", "shown:; echo 1 + 1", "shown"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env=None,
    )
    assert done.stdout == "1 + 1\n", done.stderr
