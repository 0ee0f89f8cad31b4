"""Tidy files and tables: missing runs show as missing; the committed files give the committed tables."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_results import add_photo_runs, made, write_latency, write_run

from spade.paper import NAMED_RATIO, paper_numbers
from spade.runs import Run
from spade.tables import (
    MRI_NETWORKS,
    beside_paper,
    caption_1,
    caption_3,
    caption_4,
    collect,
    comparisons,
    each_seed,
    over_seeds,
    printed_table,
    read_results,
    table_1,
    table_3,
    table_4,
    table_markdown,
    timing_line,
    write_table,
)

OUTPUTS = Path(__file__).resolve().parents[1] / "outputs"


@pytest.fixture
def out(tmp_path) -> Path:
    write_run(tmp_path, Run("varnet"), 40.0)
    write_run(tmp_path, Run("varnet", 6, 0.40, "school"), 38.0)
    return tmp_path


@pytest.fixture
def three_seeds(tmp_path) -> Path:
    """VarNet's teacher and *supervised* at 65 %, both starts, for three seeds; the students lose 1, 1 and 4 dB."""
    for seed, lost in enumerate((1.0, 1.0, 4.0)):
        levels = {
            Run("varnet", seed=seed): 40.0,
            Run("varnet", 6, 0.40, "supervised", seed=seed): 40.0 - lost,
            Run("varnet", 6, 0.40, "supervised", "random", seed): 30.0,
        }
        for run, psnr in levels.items():
            write_run(tmp_path, run, psnr, seed_shift=seed, seeds=(0, 1, 2))
    return tmp_path


@pytest.fixture
def photo_out(out) -> Path:
    """CS-MRI and super-resolution in one folder, as in outputs/demo."""
    return add_photo_runs(out)


# Committed results


def tables_of(results, name: str) -> dict[str, tuple[pd.DataFrame, str]]:
    """Table and caption of every table that is committed in a folder, by file name."""
    networks = [network for network in MRI_NETWORKS if network in set(results.runs["network"])]
    pair = [network for network in ("e2e-varnet", "varnet") if network in networks]
    every = {
        f"table_{number}": lambda R=R: (table_1(results, networks, R), caption_1(results, networks, R))
        for number, R in ((1, 6), (2, 8), (5, 10))
    }
    every["table_3"] = lambda: (table_3(results, pair), caption_3(results, pair))
    every |= {
        f"table_{number}": lambda scales=scales: (table_4(results, scales), caption_4(results, scales))
        for number, scales in ((4, [2, 3]), (6, [4]))
    }
    return {stem: make() for stem, make in every.items() if (OUTPUTS / name / f"{stem}.md").is_file()}


@pytest.mark.parametrize(("name", "number"), [("demo", 6), ("siat", 1), ("cbsd68", 2)])
def test_the_committed_files_give_the_committed_tables(name, number, tmp_path):
    for path in (OUTPUTS / name).glob("*.*"):
        if path.suffix in (".gz", ".jsonl", ".csv", ".json", ".h5") and not path.stem.startswith("table"):
            shutil.copy(path, tmp_path)
    tables = tables_of(read_results(tmp_path), name)
    assert len(tables) == number
    for stem, (table, caption) in tables.items():
        for path in write_table(table, caption, tmp_path / stem):
            assert path.read_text(encoding="utf-8") == (OUTPUTS / name / path.name).read_text(encoding="utf-8")


# Tidy files


def test_tidy_files_hold_the_same_as_the_runs(photo_out):
    write_latency(photo_out, "varnet")
    before = made(photo_out)
    pictured = [Run("varnet"), Run("usrnet"), Run("usrnet", ratio=0.40, strategy="school")]
    pictures = [before.pictures(run) for run in pictured]
    written = collect(photo_out)
    assert [path.name for path in written] == [
        "runs.jsonl",
        "metrics.csv.gz",
        "curves.csv.gz",
        "latency.csv",
        "pictures.h5",
        "checksums.json",
    ]
    shutil.rmtree(photo_out / "runs")
    shutil.rmtree(photo_out / "latency")
    after = read_results(photo_out)
    for kind in ("metrics", "curves", "latency"):
        pd.testing.assert_frame_equal(getattr(after, kind), getattr(before, kind), check_dtype=False)
    assert after.runs.set_index("name")["run_key"].equals(before.runs.set_index("name")["run_key"])
    assert table_markdown(table_4(after), caption_4(after, [2, 3])) == table_markdown(
        table_4(before), caption_4(before, [2, 3])
    )
    for run, images in zip(pictured, pictures):
        assert list(after.pictures(run)) == list(images) != []
        assert all(np.array_equal(after.pictures(run)[name], image) for name, image in images.items())


def test_collecting_twice_gives_equal_files(photo_out):
    first = {path.name: path.read_bytes() for path in collect(photo_out)}
    assert {path.name: path.read_bytes() for path in collect(photo_out)} == first


def test_only_named_runs_are_collected(out):
    collect(out, ["varnet-R6-teacher-seed0"])
    results = read_results(out)
    assert results.runs["name"].tolist() == ["varnet-R6-teacher-seed0"] and set(results.metrics["ratio"]) == {0.0}


def test_a_clone_without_runs_keeps_its_tidy_files(out):
    stored = collect(out)[0].read_bytes()
    shutil.rmtree(out / "runs")
    with pytest.raises(FileNotFoundError, match="complete run"):
        collect(out)
    assert (out / "runs.jsonl").read_bytes() == stored


def test_the_configuration_stands_once(three_seeds):
    collect(three_seeds)
    lines = (three_seeds / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10 and '"config"' in lines[0] and not any('"config"' in line for line in lines[1:])


def test_an_unfinished_run_does_not_count(out):
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 39.0)
    (Run("varnet", 6, 0.40, "supervised").folder(out) / "result.json").unlink()
    results = made(out)
    assert len(results.runs) == 2 and table_1(results, ["varnet"])["PSNR supervised"].notna().sum() == 1


def test_an_empty_folder_is_an_empty_result(tmp_path):
    results = made(tmp_path)
    assert results.metrics.empty and comparisons(results, "varnet").empty and not results.pictures(Run("varnet"))
    assert table_3(results)["PSNR SPADE"].isna().all() and caption_1(results, ["deq"], 6).startswith(
        "- Data: no complete run."
    )


# Tables 1, 2, 3 and 5


def test_our_numbers_stand_beside_the_papers(out):
    table = table_1(made(out), ["varnet", "deq"])
    assert len(table) == 10
    row = table[(table["Network"] == "VarNet") & (table["Pruning ratio"] == "65 %")].iloc[0]
    assert row["PSNR school"] == pytest.approx(38.0) and row["PSNR school (paper)"] == 37.36
    assert row["SSIM school"] == pytest.approx(95.0) and np.isnan(row["PSNR supervised"])
    assert table[table["Network"] == "DEQ"]["PSNR supervised"].isna().all()
    printed = printed_table(table)
    pairs = {name: printed.loc[4, [name, f"{name} (paper)"]].tolist() for name in ("PSNR school", "PSNR supervised")}
    assert pairs == {"PSNR school": ["38.00", "37.36"], "PSNR supervised": ["–", "38.12"]}
    assert printed.loc[0, "PSNR school"] == printed.loc[0, "PSNR school (paper)"] == ""


@pytest.mark.parametrize("number", range(1, 7))
def test_every_number_of_the_paper_is_in_its_table(number, tmp_path):
    results, scales = made(tmp_path), {4: [2, 3], 6: [4]}
    accelerations = {1: 6, 2: 8, 5: 10}
    if number in accelerations:
        table = table_1(results, acceleration=accelerations[number])
    else:
        table = table_3(results) if number == 3 else table_4(results, scales[number])
    shown = np.sort(table[[name for name in table if name.endswith("(paper)")]].to_numpy().ravel())
    expected = np.sort(paper_numbers(table=number)["value"].to_numpy())
    assert np.array_equal(shown[~np.isnan(shown)], expected)
    assert len(beside_paper(results, number)) == len(expected)


def test_no_column_compares_times_of_different_devices(out):
    write_latency(out, "varnet", milliseconds=900.0)
    table = table_1(made(out), ["varnet"])
    assert set(table["Time (ms)"]) == {900.0} and not [name for name in table if "difference" in name]


def test_seeds_are_averaged_after_images(out):
    write_run(out, Run("varnet", 6, 0.40, "school", seed=1), 38.0, seed_shift=1.0)
    means = over_seeds(each_seed(made(out).metrics))
    row = means[(means["ratio"] == 0.40) & (means["metric"] == "psnr")].iloc[0]
    assert row["value"] == 38.5 and row["std"] == pytest.approx(np.sqrt(0.5))


def test_several_seeds_are_printed_as_mean_and_deviation(out, tmp_path):
    assert not [name for name in table_1(made(out), ["varnet"]) if "std" in name], "one seed has no deviation"
    write_run(out, Run("varnet", 6, 0.40, "school", seed=1), 38.0, seed_shift=1.0)
    table = table_1(made(out), ["varnet"])
    assert table["PSNR school (std)"].notna().sum() == 1 and "PSNR supervised (std)" not in table
    printed = printed_table(table)
    assert printed.loc[4, "PSNR school"] == "38.50 ± 0.71" and not [name for name in printed if "std" in name]
    assert len(pd.read_csv(write_table(table, "", tmp_path / "t")[0])) == 5


def test_table_3_takes_gains_seed_by_seed(three_seeds):
    table = table_3(made(three_seeds), ["varnet"])
    row, printed = table.iloc[-1], printed_table(table).iloc[-1]
    assert row["PSNR SPADE"] == pytest.approx(39.0) and row["PSNR SPADE (std)"] == pytest.approx(
        np.std([39, 40, 38], ddof=1)
    )
    assert row["PSNR random (std)"] == pytest.approx(1.0) and row["PSNR Δ (std)"] == pytest.approx(
        np.std([9, 9, 6], ddof=1)
    )
    assert [printed[f"PSNR {name}"] for name in ("SPADE", "random", "Δ")] == [
        "39.00 ± 1.00",
        "31.00 ± 1.00",
        "8.00 ± 1.73",
    ]
    assert not [name for name in table if "seeds" in name], "none is missing"


def test_table_3_has_a_block_per_strategy_and_network(out):
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 39.0)
    write_run(out, Run("varnet", 6, 0.40, "supervised", "random"), 36.0)
    table = table_3(made(out))
    blocks = [
        f"{name}, {strategy}" for strategy in ("self-supervised", "supervised") for name in ("E2E-VarNet", "VarNet")
    ]
    assert len(table) == 20 and table["Network, strategy"].unique().tolist() == blocks
    row = table.iloc[-1]
    assert (row["PSNR SPADE"], row["PSNR random"], row["PSNR Δ"]) == pytest.approx((39.0, 36.0, 3.0))
    assert row["PSNR Δ (paper)"] == 2.45 and table["PSNR Δ"].notna().sum() == 1
    assert table["PSNR SPADE"].notna().sum() == 3, "the teacher stands in both of VarNet's blocks"
    assert printed_table(table).iloc[-2]["PSNR random"] == "–"


def test_a_missing_seed_is_named_in_the_cell_and_in_the_caption(three_seeds, tmp_path):
    results = made(three_seeds)
    assert "3 seeds; CPU" in caption_1(results, ["varnet"], 6) and "(seeds)" not in " ".join(
        table_1(results, ["varnet"])
    )
    shutil.rmtree(Run("varnet", 6, 0.40, "supervised", "random", 1).folder(three_seeds))
    shutil.rmtree(Run("varnet", 6, 0.40, "supervised", seed=2).folder(three_seeds))
    results = made(three_seeds)
    table, caption = table_1(results, ["varnet"]), caption_1(results, ["varnet"], 6)
    printed = printed_table(table)
    assert (
        printed.loc[4, "PSNR supervised"] == "39.50 ± 0.71 (2 of 3 seeds)"
        and "seeds" not in printed.loc[0, "PSNR supervised"]
    )
    assert "3 seeds (fewer for some runs); CPU" in caption and "(2 of 3 seeds): incomplete average" in caption
    third = printed_table(table_3(results, ["varnet"])).iloc[-1]
    assert "(2 of 3 seeds)" in third["PSNR SPADE"] and "(2 of 3 seeds)" in third["SSIM random"]
    assert third["PSNR Δ"] == "9.00 (1 of 3 seeds)"
    csv, markdown = write_table(table, caption, tmp_path / "t")
    assert pd.read_csv(csv)["PSNR supervised (seeds)"].tolist()[-1] == "2 of 3"
    assert "(2 of 3 seeds)" in markdown.read_text(encoding="utf-8")


def test_one_seed_of_three_is_named_too(tmp_path):
    write_run(tmp_path, Run("varnet"), 40.0, seeds=(0, 1, 2))
    results = made(tmp_path)
    assert printed_table(table_1(results, ["varnet"])).loc[0, "PSNR supervised"] == "40.00 (1 of 3 seeds)"
    assert "1 of 3 seeds; CPU" in caption_1(results, ["varnet"], 6)


def test_other_accelerations_do_not_leak_into_a_table(out):
    assert table_1(made(out), ["varnet"], 8)["PSNR supervised"].isna().all()
    with pytest.raises(ValueError, match="unknown acceleration 7: choose one of 6, 8, 10"):
        table_1(made(out), ["varnet"], 7)


def test_both_files_hold_the_same_rows(out, tmp_path):
    table, caption = table_1(made(out), ["varnet"]), caption_1(made(out), ["varnet"], 6)
    csv, markdown = write_table(table, caption, tmp_path / "table_1")
    text = markdown.read_text(encoding="utf-8")
    assert len(pd.read_csv(csv)) == 5 and text.count("| VarNet") == 15 and text.endswith(f"{caption}\n")
    assert "effective rate 25.0 %" in caption and "config p" in caption and "1 test subject;" in caption
    parts = dict(zip(("Quality", "Time and size", "The paper's numbers"), text.split("**")[2::2], strict=True))
    lines = {title: [line for line in part.splitlines() if line.startswith("|")] for title, part in parts.items()}
    assert all(len({line.count("|") for line in part}) == 1 for part in lines.values())
    assert lines["The paper's numbers"][0].count("|") == 2 + 9 + 1 and "42.13" not in text and "39.25" in text


def test_what_is_beyond_the_paper_has_columns_and_rows_of_its_own(out):
    before = {("none", "psnr"): 21.0, ("repaired", "psnr"): 24.0}
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 29.0, more=before)
    write_run(out, Run("varnet", 6, 0.40, "self-supervised", loss="split"), 27.0)
    table = table_1(made(out), ["varnet"])
    assert table["Network"].tolist() == ["VarNet"] * 5 + ["VarNet, loss=split"]
    assert table.loc[4, ["PSNR pruned only", "PSNR repaired"]].tolist() == [21.0, 24.0]
    assert table.loc[5, "PSNR self-supervised"] == 27.0 and np.isnan(table.loc[4, "PSNR self-supervised"])
    shown = printed_table(table)
    assert shown.loc[4, "PSNR self-supervised"] == "–" and shown.loc[5, "PSNR supervised"] == ""
    assert "loss=split" not in table_markdown(table, "").split("**The paper's numbers**")[1]


def test_the_share_of_converged_searches_is_one_number_for_all_students(out):
    for strategy, share in (("supervised", 1.0), ("school", 0.5)):
        write_run(
            out, Run("deq", 6, 0.40, strategy), 30.0, more={(strategy, "converged"): share, ("none", "converged"): 0}
        )
    assert table_1(made(out), ["deq"]).loc[4, "Converged %"] == 75.0


def test_the_time_of_deq_is_that_of_trained_networks(out):
    for size, milliseconds in (("paper", 4000.0), ("trained, anderson", 70.0), ("trained, plain", 90.0)):
        write_latency(out, "deq", size, milliseconds)
    table = table_1(made(out), ["deq"])
    assert set(table["Time (ms)"].dropna()) == {70.0} and set(table["Time plain (ms)"].dropna()) == {90.0}
    assert "trained networks" in timing_line(made(out), ["deq"])


def test_a_failing_write_keeps_the_old_table(out, tmp_path, monkeypatch):
    table = table_1(made(out), ["varnet"])
    before = write_table(table, "first", tmp_path / "t")[1].read_text(encoding="utf-8")
    monkeypatch.setattr(
        Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        write_table(table, "second", tmp_path / "t")
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == before


# Tables 4 and 6


def test_table_4_has_a_block_per_scale_with_what_is_kept(photo_out):
    results = made(photo_out)
    table = table_4(results)
    assert table["Scale"].tolist() == ["×2"] * 5 + ["×3"] * 5
    assert table["PSNR"][0] == pytest.approx(32.0) and table["PSNR"][5] == pytest.approx(31.0)
    assert table["PSNR"].notna().sum() == 4 and table["PSNR kept %"][4] == pytest.approx(100 * 31 / 32)
    assert table["SSIM kept %"][4] == pytest.approx(100)
    assert table["PSNR kept % (paper)"].tolist() == [100.0, 99.5, 99.5, 99.5, 99.1] * 2
    assert table["# Params (paper)"][4] == 6_094_762
    assert table["# Params trained"].tolist()[:5] == pytest.approx([100, np.nan, np.nan, np.nan, 100], nan_ok=True)
    printed = printed_table(table)
    assert printed.loc[4, ["PSNR", "PSNR (paper)", "PSNR kept %", "PSNR kept % (paper)"]].tolist() == [
        "31.00",
        "29.70",
        "96.9",
        "99.1",
    ]
    assert printed.loc[1, ["PSNR", "PSNR (paper)"]].tolist() == ["–", "29.81"]
    assert table_4(results, [4])["Time (ms) (paper)"].tolist() == [272.2, 262.8, 248.9, 241.8, 150.3]
    with pytest.raises(ValueError, match="unknown scale 5: choose one of 2, 3, 4"):
        table_4(results, [5])


def test_both_sizes_that_were_timed_stand_in_table_4(photo_out):
    write_latency(photo_out, "usrnet", "paper", 900.0, 17_016_016)
    write_latency(photo_out, "usrnet", "config", 30.0, 590_332)
    results = made(photo_out)
    table, caption = table_4(results), caption_4(results, [2, 3])
    assert set(table["Time (ms)"]) == {900.0} and set(table["Time (ms) trained"]) == {30.0}
    assert set(table["# Params"]) == {17_016_016}
    assert "the paper's size, 96×144 at ×3, a CPU, 2 threads" in caption and "trained: the network" in caption


def test_a_single_size_of_the_configuration_is_the_time(photo_out):
    write_latency(photo_out, "usrnet", "config", 30.0, 590_332)
    table = table_4(made(photo_out))
    assert set(table["Time (ms)"]) == {30.0} and "Time (ms) trained" not in table


def test_results_of_one_problem_do_not_leak_into_the_other(photo_out):
    results = made(photo_out)
    metrics = results.metrics
    assert set(metrics[metrics["model"] == "varnet"]["scale"]) == {0}
    assert set(metrics[metrics["model"] == "usrnet"]["acceleration"]) == {0}
    assert table_1(results, ["varnet"])["PSNR school"].notna().sum() == 1
    assert "bicubic" not in set(comparisons(results, "varnet")["method"])
    assert not {"varnet", "zero-filled"} & set(comparisons(results, "usrnet", 2)["method"])


def test_the_recovered_share_is_taken_on_the_images_that_were_evaluated_before(photo_out):
    """Before fine-tuning one photograph of two: the teacher has 30 there, the pruned network 20, the student 29."""
    results = made(photo_out)
    beside = comparisons(results, "usrnet", 2).set_index("method")
    assert beside.loc["pruned only", "images"] == 1 and beside.loc["school", "images"] == 2
    assert beside.loc["school", "recovered %"] == pytest.approx(90.0) and np.isnan(beside.loc["bicubic", "recovered %"])
    without = replace(results, metrics=results.metrics[results.metrics["strategy"] != "none"])
    assert comparisons(without, "usrnet", 2)["recovered %"].isna().all()


def test_the_caption_of_super_resolution_states_data_and_metric(photo_out, tmp_path):
    caption = caption_4(made(photo_out), [2, 3])
    expected = ("RGB", "data range 1", "without cropping", "mean over images and kernels", "One network")
    expected += ("2 test photographs", "one blur kernel in turn", "the 12 of kernels_12.mat", "noise σ = 0")
    for text in (*expected, "usrnet_tiny.pth", "Timing: not measured", "×2 and ×3"):
        assert text in caption, text
    assert "no complete run" in caption_4(made(tmp_path / "nothing"), [4])


def test_every_table_has_all_ratios(photo_out):
    for table in (table_1(made(photo_out)), table_3(made(photo_out)), table_4(made(photo_out), [4])):
        assert len(table) % len(NAMED_RATIO) == 0 and set(table["Pruning ratio"]) == {
            f"{n} %" for n in NAMED_RATIO.values()
        }
