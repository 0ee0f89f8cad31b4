"""Tables and figures from result files: missing runs show as missing, files are whole, the paper's numbers are the printed ones."""
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")

from spade.experiment import Run, write_csv, write_images  # noqa: E402
from spade.files import write_json  # noqa: E402
from spade.paper import NAMED_RATIO, paper_numbers, paper_value, recomputed_speed_ups  # noqa: E402
from spade.report import (caption_1, comparisons, figure_3, figure_7, for_print, mean_over_images, pick, read_metrics, read_runs, table_1,  # noqa: E402
                          to_latex, to_markdown, write_figure, write_table)


def write_run(out: Path, run: Run, psnr: float, seed_shift: float = 0.0) -> None:
    folder = run.folder(out)
    facts = dict(model=run.network, acceleration=run.acceleration, criterion="", ratio=run.ratio, strategy=run.strategy, start=run.start, seed=run.seed)
    rows = [{**facts, "image": f"a/{i}", "metric": metric, "value": value} for i in (0, 1)
            for metric, value in (("psnr", psnr + seed_shift + 2 * i - 1), ("ssim", 0.95))]
    write_csv(folder / "metrics.csv", pd.DataFrame(rows))
    truth = np.random.default_rng(0).random((32, 40))
    write_images(folder / "images.npz", {"student": 0.9 * truth} if run.strategy else {"ground truth": truth, "zero-filled": 0.5 * truth, "CG-SENSE": 0.7 * truth, "teacher": 0.95 * truth})
    write_json(folder / "result.json", {"parameters": 100, "sampling_rate": 0.25, "device": "CPU", "seconds": 1.0, "profile": {"name": "p", "description": "d"},
                                        "run": {"network": run.network, "acceleration": run.acceleration, "seed": run.seed}})


@pytest.fixture
def out(tmp_path) -> Path:
    write_run(tmp_path, Run("varnet"), 40.0)
    write_run(tmp_path, Run("varnet", 6, 0.40, "school"), 38.0)
    return tmp_path


def test_table_puts_ours_beside_the_papers_and_dashes_where_nothing_was_run(out):
    table = table_1(out, ["varnet", "deq"])
    assert len(table) == 10
    row = table[(table["Network"] == "VarNet") & (table["Pruning ratio"] == "65 %")].iloc[0]
    assert row["PSNR school"] == pytest.approx(38.0) and row["PSNR school (paper)"] == 37.36 and row["SSIM school"] == pytest.approx(95.0)
    assert np.isnan(row["PSNR supervised"]) and table[table["Network"] == "DEQ"]["PSNR supervised"].isna().all()
    printed = for_print(table)
    assert printed.loc[4, "PSNR school"] == "38.00 (37.36)" and printed.loc[4, "PSNR supervised"] == "– (38.12)" and printed.loc[0, "PSNR school"] == ""


def test_an_unfinished_run_does_not_count(out):
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 39.0)
    (Run("varnet", 6, 0.40, "supervised").folder(out) / "result.json").unlink()
    assert len(read_runs(out)) == 2 and table_1(out, ["varnet"])["PSNR supervised"].notna().sum() == 1


def test_seeds_are_averaged_after_images(out):
    write_run(out, Run("varnet", 6, 0.40, "school", seed=1), 38.0, seed_shift=1.0)
    means = mean_over_images(read_metrics(out))
    row = means[(means["ratio"] == 0.40) & (means["metric"] == "psnr")].iloc[0]
    assert (row["mean"], row["count"]) == (38.5, 2) and row["std"] == pytest.approx(np.sqrt(0.5))


def test_other_accelerations_do_not_leak_into_a_table(out):
    assert table_1(out, ["varnet"], 8)["PSNR supervised"].isna().all()
    with pytest.raises(ValueError, match="6, 8, 10"):
        table_1(out, ["varnet"], 7)


def test_three_forms_are_written_and_hold_the_same_rows(out, tmp_path):
    table, caption = table_1(out, ["varnet"]), caption_1(out, ["varnet"], 6)
    csv, markdown, latex = write_table(table, caption, tmp_path / "table_1_varnet")
    assert len(pd.read_csv(csv)) == 5 and markdown.read_text().count("VarNet |") == 5
    assert latex.read_text().count(r"\\") == 6 and r"\toprule" in latex.read_text() and "25.0" in caption and "profile p" in caption.lower()


def test_a_failing_write_keeps_the_old_table(out, tmp_path, monkeypatch):
    table = table_1(out, ["varnet"])
    before = write_table(table, "first", tmp_path / "t")[1].read_text()
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_table(table, "second", tmp_path / "t")
    assert (tmp_path / "t.md").read_text() == before


def test_latex_escapes_what_latex_would_read(out):
    printed = for_print(table_1(out, ["varnet"]))
    text = to_latex(printed, "100 % of a_b & c")
    assert r"100 \% of a\_b \& c" in text and r"\# Params" in text and "–" not in text
    assert to_markdown(printed, "caption").endswith("caption\n")


def test_figures_draw_with_missing_runs(out, tmp_path):
    for number, figure in enumerate((figure_3(out, ["varnet", "deq"]), figure_7(out, "varnet"))):
        assert all(path.stat().st_size > 1000 for path in write_figure(figure, tmp_path / f"figure_{number}"))
        matplotlib.pyplot.close(figure)


def test_figure_7_says_which_run_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="varnet-R6-teacher-seed0.*pretrain"):
        figure_7(tmp_path, "varnet")


def test_equal_figures_are_equal_files(out, tmp_path):
    first = write_figure(figure_3(out, ["varnet"]), tmp_path / "a")
    second = write_figure(figure_3(out, ["varnet"]), tmp_path / "b")
    matplotlib.pyplot.close("all")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second))


def test_comparisons_survive_an_empty_folder(tmp_path):
    assert comparisons(tmp_path, "varnet").empty and read_metrics(tmp_path).empty
    assert np.isnan(pick(mean_over_images(read_metrics(tmp_path)), metric="psnr"))


def test_paper_numbers_against_the_design():
    """The parameter counts of the paper's networks, and a few cells from each table read off the page a second time."""
    counts = {"deq": [999428, 878644, 793159, 635311, 353328], "varnet": [19634712, 17567216, 15772920, 12477088, 6988752],
              "e2e-varnet": [20119610, 18052114, 16257818, 12961986, 7473650]}
    for network, expected in counts.items():
        assert [paper_value(table=1, network=network, ratio=ratio, metric="parameters") for ratio in NAMED_RATIO] == expected
    assert [paper_value(table=4, setting=2, ratio=ratio, metric="parameters") for ratio in NAMED_RATIO] == [17016016, 15314620, 13730964, 10837246, 6094762]
    cells = {(1, "deq", 0.20, "self-supervised"): 36.14, (2, "varnet", 0.40, "school"): 34.07, (5, "e2e-varnet", 0.05, "supervised"): 37.95}
    for (table, network, ratio, strategy), value in cells.items():
        assert paper_value(table=table, network=network, ratio=ratio, strategy=strategy, metric="psnr") == value
    assert paper_value(table=3, network="varnet", ratio=0.20, strategy="self-supervised", start="random", metric="psnr") == 17.13
    assert len(paper_numbers()) == 3 * 123 + 104 + 70 + 35


def test_recomputed_speed_ups_find_the_one_that_is_off():
    table = recomputed_speed_ups()
    assert ((table["speed_up"] - table["recomputed"]).abs() > 0.005).sum() == 3


def test_results_are_plain_json(out):
    assert all(isinstance(json.loads(path.read_text()), dict) for path in out.glob("runs/*/result.json"))
