"""The benchmark: every case is measured once, a run continues, a side that fails is noted, bad options are refused."""

import time
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from spade import bench
from spade.bench import Case, all_cases, bench_command, measure_case, run_bench, take_turns

CPU = torch.device("cpu")


def test_a_run_continues_after_the_last_case_and_measures_none_twice(tmp_path, monkeypatch, capsys):
    cases = [Case("pruned", "varnet", 0.40, 2), Case("precision", "usrnet")]
    monkeypatch.setattr(bench, "all_cases", lambda cuda: cases[:1])
    first = run_bench(tmp_path, CPU, 5, small=True, repeats=1)
    assert (
        first["side"].iloc[0] == "unpruned" and first["speed_up"].iloc[0] == 1 and (first["network"] == "varnet").all()
    )
    monkeypatch.setattr(bench, "all_cases", lambda cuda: cases)
    both = run_bench(tmp_path, CPU, 5, small=True, repeats=1)
    assert capsys.readouterr().out.count("varnet") == 1
    assert list(both["network"].unique()) == ["varnet", "usrnet"] and len(both) == len(first) + 2
    (table,) = tmp_path.glob("*.csv")
    assert len(pd.read_csv(table)) == len(both)
    page = table.with_suffix(".md").read_text(encoding="utf-8")
    assert "paper's widths" in page and "bfloat16" in page and table.with_suffix(".png").is_file()


def test_without_time_nothing_is_measured_and_nothing_written(tmp_path):
    assert run_bench(tmp_path, CPU, 0, small=True).empty and not list(tmp_path.iterdir())
    assert measure_case(Case("pruned", "varnet", 0.40, 2), CPU, True, 7, time.monotonic(), 1) == []


def test_a_side_that_raises_is_a_note_and_the_others_are_measured():
    def out_of_memory():
        raise RuntimeError("out of memory\nand a long trace")

    rows = take_turns(
        {"a": lambda: torch.ones(2), "b": out_of_memory}, CPU, 3, time.monotonic() + 60, time.process_time
    )
    assert rows[1]["note"] == "RuntimeError: out of memory" and "seconds" not in rows[1]
    assert rows[0]["repeats"] == 3 and rows[0]["difference"] == 0 and not rows[0]["note"]


@pytest.mark.parametrize("kind", ["peer", "espirit", "precision", "training"])
def test_every_kind_of_case_has_times(kind):
    network = {"espirit": "maps", "precision": "usrnet"}.get(kind, "e2e-varnet")
    case = Case(kind, network, 0.40 if kind == "training" else 0.0, 4 * (network != "usrnet"))
    rows = measure_case(case, CPU, True, 1, time.monotonic() + 300, 1)
    assert [row["seconds"] > 0 for row in rows if not row["note"]], rows
    if kind == "training":
        mb = {row["side"]: row["peak_mb"] for row in rows}
        assert list(mb)[::2] == ["unpruned", "paper's widths", "multiples of 8"]
        assert all(mb[f"{name}, checkpointing"] < mb[name] for name in list(mb)[::2])
        assert mb["paper's widths"] < mb["unpruned"] and rows[2]["parameters"] < rows[0]["parameters"]


def test_what_cannot_be_compiled_is_a_note_of_its_side(monkeypatch):
    def without_compiler(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(bench, "changed_priors", without_compiler)
    plain, compiled = measure_case(Case("compiled", "usrnet"), CPU, True, 1, time.monotonic() + 60, 1)
    assert plain["seconds"] > 0 and compiled["note"] == "RuntimeError: no C++ compiler"


def test_a_whole_reconstruction_is_not_recorded_without_a_gpu_and_is_noted():
    eager, *recorded = measure_case(Case("graph", "varnet", 0.40, 2), CPU, True, 1, time.monotonic() + 300, 1)
    assert eager["side"] == "unpruned" and eager["seconds"] > 0 and eager["macs"] > 0
    assert [row["side"] for row in recorded][:2] == ["unpruned, graph", "paper's widths, graph"]
    assert torch.cuda.is_available() or all(row["note"] and "seconds" not in row for row in recorded)


def test_a_missing_library_is_noted(monkeypatch):
    def without_fastmri(*_):
        raise ImportError("No module named 'fastmri'")

    monkeypatch.setitem(bench.SIDES, "peer", without_fastmri)
    (row,) = measure_case(Case("peer", "varnet", coils=2), CPU, True, 1, time.monotonic() + 60, 1)
    assert row["note"] == "ImportError: No module named 'fastmri'" and row["side"] == "none"


def test_a_deq_is_counted_for_one_iteration():
    rows = measure_case(Case("pruned", "deq", 0.40, 2), CPU, True, 1, time.monotonic() + 300, 1)
    pixels, (c, blocks) = 64 * 64, (16, 2)
    assert rows[0]["macs"] == 9 * pixels * (2 * c + (2 * blocks + 1) * c * c + 2 * c)
    assert rows[1]["macs"] < rows[0]["macs"] and rows[1]["parameters"] < rows[0]["parameters"]


def test_aligned_widths_have_no_more_parameters_than_the_papers():
    rows = measure_case(Case("pruned", "varnet", 0.40, 2), CPU, True, 1, time.monotonic() + 300, 1)
    parameters = {row["side"]: row["parameters"] for row in rows}
    assert parameters["multiples of 8"] <= parameters["paper's widths"] < parameters["unpruned"]


def test_cases_of_a_gpu_come_in_another_order_and_none_is_missing():
    on_cpu, on_gpu = all_cases(False), all_cases(True)
    kinds = lambda cases: {(case.kind, case.network, case.ratio) for case in cases}
    without_graphs = [case for case in on_gpu if case.kind != "graph"]
    assert kinds(on_cpu) == kinds(without_graphs) and on_cpu[0].kind == "pruned"
    assert {case.kind for case in on_gpu[:4]} == {"pruned"}
    assert {case.batch for case in on_gpu} == {1, 8} and len({tuple(asdict(c).values()) for c in on_gpu}) == len(on_gpu)


def test_missing_cases_are_listed_with_minutes_and_nothing_is_measured(tmp_path, capsys, monkeypatch):
    path = bench.table_path(tmp_path, CPU, False)
    rows = pd.DataFrame([asdict(Case("pruned", "varnet", 0.40, 8)) | {"side": "unpruned", "seconds": 24.0}])
    rows.to_csv(path, index=False)
    monkeypatch.setattr(bench, "run_bench", lambda *arguments: pytest.fail("measured"))
    bench_command(["--list", "--out", str(tmp_path), "--repeats", "4"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(all_cases(False)) - 1 and last.startswith(f"{len(lines)} cases, about ")
    assert not any(line.endswith("pruned varnet 0.4 8 1") for line in lines)
    (same,) = [line for line in lines if line.endswith("pruned varnet 0.05 8 1")]
    assert float(same.split()[0]) == pytest.approx(5 * 3 * 24 / 60, abs=0.05)  # as on this machine


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "cuda:7"], "device must be one of this machine"),
        (["--minutes", "-1"], "minutes, repeats and threads must be above 0, got -1.0, 7, 1"),
        (["--repeats", "0"], "must be above 0"),
    ],
)
def test_bad_options_are_one_sentence(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench_command([*options, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
