"""Tables and figures from result files: missing runs show as missing, files are whole, the paper's numbers are the printed ones."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")

from spade import figures  # noqa: E402
from spade.basics import Batch
from spade.runs import Run, write_csv, write_images
from spade.files import read_json, write_json
from spade.losses import STRATEGIES
from spade.paper import NAMED_RATIO
from spade.figures import evolution, evolutions, figure_1, figure_2, figure_caption, index_page, write_index
from spade.config import as_plain, load_profile
from spade.tables import MRI_NETWORKS, caption_1, caption_3, caption_4, comparisons, comparisons_4, detail_window, each_seed, figure_3, figure_5, figure_7, figure_steps, for_print, image_psnr, lost_over_seeds, mean_over_images, pick, printed_sizes, read_curve, read_images, read_metrics, read_runs, report_name, setting_4, table_1, table_3, table_4, to_latex, to_markdown, white_level, with_differences, won_back, write_figure, write_table


def write_run(out: Path, run: Run, psnr: float, seed_shift: float = 0.0, seeds: tuple[int, ...] = (0,)) -> None:
    """A run of CS-MRI with two images; `seeds` are those that its profile asks for."""
    folder = run.folder(out)
    facts = dict(model=run.network, acceleration=run.acceleration, criterion="", ratio=run.ratio, strategy=run.strategy, start=run.start, seed=run.seed)
    rows = [{**facts, "image": f"a/{i}", "metric": metric, "value": value} for i in (0, 1)
            for metric, value in (("psnr", psnr + seed_shift + 2 * i - 1), ("ssim", 0.95))]
    write_csv(folder / "metrics.csv", pd.DataFrame(rows))
    truth = np.random.default_rng(0).random((32, 40))
    write_images(folder / "images.npz", {"student": 0.9 * truth} if run.strategy else {"ground truth": truth, "zero-filled": 0.5 * truth, "CG-SENSE": 0.7 * truth, "teacher": 0.95 * truth})
    write_json(folder / "result.json", {"parameters": 100, "sampling_rate": 0.25, "device": "CPU", "seconds": 1.0, "profile": {"name": "p", "description": "d", "seeds": list(seeds)},
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
    assert printed.loc[4, "PSNR school"] == "38.00 (37.36, +0.64)" and printed.loc[4, "PSNR supervised"] == "– (38.12)" and printed.loc[0, "PSNR school"] == ""


def test_an_unfinished_run_does_not_count(out):
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 39.0)
    (Run("varnet", 6, 0.40, "supervised").folder(out) / "result.json").unlink()
    assert len(read_runs(out)) == 2 and table_1(out, ["varnet"])["PSNR supervised"].notna().sum() == 1


def test_seeds_are_averaged_after_images(out):
    write_run(out, Run("varnet", 6, 0.40, "school", seed=1), 38.0, seed_shift=1.0)
    means = mean_over_images(read_metrics(out))
    row = means[(means["ratio"] == 0.40) & (means["metric"] == "psnr")].iloc[0]
    assert (row["mean"], row["count"]) == (38.5, 2) and row["std"] == pytest.approx(np.sqrt(0.5))


def test_several_seeds_are_printed_as_mean_and_deviation(out, tmp_path):
    assert not [column for column in table_1(out, ["varnet"]) if "std" in column], "one seed has no deviation"
    write_run(out, Run("varnet", 6, 0.40, "school", seed=1), 38.0, seed_shift=1.0)
    table = table_1(out, ["varnet"])
    assert table["PSNR school (std)"].notna().sum() == 1 and "PSNR supervised (std)" not in table
    printed = for_print(table)
    assert printed.loc[4, "PSNR school"] == "38.50 ± 0.71 (37.36, +1.14)" and not [column for column in printed if "std" in column]
    assert r"38.50 $\pm$ 0.71" in to_latex(printed, "") and len(pd.read_csv(write_table(table, "", tmp_path / "t")[0])) == 5


# Three seeds

@pytest.fixture
def three_seeds(tmp_path) -> Path:
    """VarNet's teacher, and supervised at 65 % from pruned and from random weights, for three seeds, each a dB above the one before; the students lose 1, 1 and 4 dB."""
    for seed, lost in enumerate((1.0, 1.0, 4.0)):
        for run, psnr in ((Run("varnet", seed=seed), 40.0), (Run("varnet", 6, 0.40, "supervised", seed=seed), 40.0 - lost), (Run("varnet", 6, 0.40, "supervised", "random", seed), 30.0)):
            write_run(tmp_path, run, psnr, seed_shift=seed, seeds=(0, 1, 2))
    return tmp_path


def test_table_3_has_the_deviation_over_seeds_and_takes_gains_seed_by_seed(three_seeds):
    table = table_3(three_seeds, ["varnet"], ["supervised"])
    row, printed = table.iloc[-1], for_print(table).iloc[-1]
    assert row["PSNR SPADE"] == pytest.approx(39.0) and row["PSNR SPADE (std)"] == pytest.approx(np.std([39, 40, 38], ddof=1))
    assert row["PSNR random (std)"] == pytest.approx(1.0) and row["PSNR Δ (std)"] == pytest.approx(np.std([9, 9, 6], ddof=1))
    assert printed["PSNR SPADE"] == "39.00 ± 1.00 (38.12, +0.88)" and printed["PSNR random"].startswith("31.00 ± 1.00 (") and printed["PSNR Δ"].startswith("8.00 ± 1.73 (")
    assert not [column for column in table if "seeds" in column], "none is missing"


def test_figure_3_has_bars_of_the_deviation_over_seeds(three_seeds):
    lost = lost_over_seeds(each_seed(read_metrics(three_seeds)), "varnet", 6, "supervised")
    each = [100 / 40, 100 / 41, 400 / 42]        # each student against the teacher of its seed
    assert lost.loc["65 %"].tolist() == pytest.approx([np.mean(each), np.std(each, ddof=1)]) and lost.loc["10 %"].isna().all()
    axis = figure_3(three_seeds, ["varnet"]).axes[0]
    low, high = axis.collections[0].get_segments()[-1][:, 1]
    assert len(axis.collections) == 1 and (low, high) == pytest.approx((np.mean(each) - np.std(each, ddof=1), np.mean(each) + np.std(each, ddof=1)))
    matplotlib.pyplot.close("all")


def test_figure_3_has_no_bars_with_one_seed(tmp_path):
    write_run(tmp_path, Run("varnet"), 40.0)
    write_run(tmp_path, Run("varnet", 6, 0.40, "supervised"), 38.0)
    assert not figure_3(tmp_path, ["varnet"]).axes[0].collections
    matplotlib.pyplot.close("all")


def test_a_missing_seed_is_told_in_the_cell_and_in_the_caption(three_seeds, tmp_path):
    assert "3 seeds, CPU" in caption_1(three_seeds, ["varnet"], 6) and "(seeds)" not in " ".join(table_1(three_seeds, ["varnet"]))
    shutil.rmtree(Run("varnet", 6, 0.40, "supervised", "random", 1).folder(three_seeds))
    shutil.rmtree(Run("varnet", 6, 0.40, "supervised", seed=2).folder(three_seeds))
    table = table_1(three_seeds, ["varnet"])
    assert for_print(table).loc[4, "PSNR supervised"] == "39.50 ± 0.71 (2 of 3 seeds) (38.12, +1.38)" and "seeds" not in for_print(table).loc[0, "PSNR supervised"]
    caption = caption_1(three_seeds, ["varnet"], 6)
    assert "3 seeds, in places fewer, CPU" in caption and "fewer seeds than the profile asks for says how many" in caption
    third = for_print(table_3(three_seeds, ["varnet"], ["supervised"])).iloc[-1]
    assert "(2 of 3 seeds)" in third["PSNR SPADE"] and "(2 of 3 seeds)" in third["SSIM random"] and third["PSNR Δ"].startswith("9.00 (1 of 3 seeds) (")
    csv, markdown, latex = write_table(table, caption, tmp_path / "t")
    assert pd.read_csv(csv)["PSNR supervised (seeds)"].tolist()[-1] == "2 of 3" and all("(2 of 3 seeds)" in path.read_text() for path in (markdown, latex))


def test_one_seed_of_three_is_told_too(tmp_path):
    write_run(tmp_path, Run("varnet"), 40.0, seeds=(0, 1, 2))
    assert for_print(table_1(tmp_path, ["varnet"])).loc[0, "PSNR supervised"] == "40.00 (1 of 3 seeds) (39.25, +0.75)"
    assert "1 of 3 seeds, CPU" in caption_1(tmp_path, ["varnet"], 6)


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


def test_results_are_plain_json(out):
    assert all(isinstance(json.loads(path.read_text()), dict) for path in out.glob("runs/*/result.json"))


# Super-resolution

def write_photo_run(out: Path, run: Run, psnr: float, before: float | None = None, images: int = 2) -> None:
    """A run of USRNet: `images` photographs at three scales; before fine-tuning only the first of them was evaluated."""
    folder, rows = run.folder(out), []
    for model, strategy, level, count in ((run.network, run.strategy, psnr, images), (run.network, "none", before, 1), ("bicubic", "", None if run.strategy else 24.0, images)):
        for scale in (2, 3, 4):
            rows += [dict(model=model, scale=scale, criterion="", ratio=run.ratio, strategy=strategy, start=run.start, seed=run.seed, image=f"{i}/{i}", metric=metric, value=value)
                     for i in range(count if level is not None else 0) for metric, value in (("psnr", level - scale + 2 + 4 * i), ("ssim", 0.8))]
    write_csv(folder / "metrics.csv", pd.DataFrame(rows))
    write_csv(folder / "curve.csv", pd.DataFrame({"step": [0, 1, 2], "loss": [np.nan, 1.0, 0.5], "validation": [20.0, np.nan, psnr]}))
    photo = np.random.default_rng(0).random((3, 48, 60))
    write_images(folder / "images.npz", {"student": 0.9 * photo} if run.strategy else {"ground truth": photo, "bicubic": 0.5 * photo, "teacher": 0.95 * photo})
    facts = dict(scales=[2, 3, 4], kernels=12, kernels_from="kernels_12.mat", noise=0.0, pairing="turn", tile=None, photographs=images, measurements=3 * images)
    write_json(folder / "result.json", {"parameters": 100, "device": "CPU", "seconds": 1.0, "profile": {"name": "p", "description": "d"}, "validation_psnr": 30.0, **facts,
                                        "loaded": "" if run.strategy else "usrnet_tiny.pth",
                                        "run": {"network": run.network, "acceleration": 1, "ratio": run.ratio, "strategy": run.strategy, "seed": run.seed}})


@pytest.fixture
def photo_out(out) -> Path:
    """CS-MRI and super-resolution in one folder, as in outputs/demo."""
    write_photo_run(out, Run("usrnet"), 30.0)
    write_photo_run(out, Run("usrnet", ratio=0.40, strategy="school"), 29.0, before=20.0)
    return out


def test_table_4_has_a_block_per_scale_with_what_is_kept(photo_out):
    table = table_4(photo_out)
    assert table["Scale"].tolist() == ["×2"] * 5 + ["×3"] * 5
    assert table["PSNR"][0] == pytest.approx(32.0) and table["PSNR"][5] == pytest.approx(31.0) and table["PSNR"].notna().sum() == 4
    assert table["PSNR kept %"][4] == pytest.approx(100 * 31 / 32) and table["SSIM kept %"][4] == pytest.approx(100)
    assert table["PSNR kept % (paper)"].tolist() == [100.0, 99.5, 99.5, 99.5, 99.1] * 2 and table["# Params (paper)"][4] == 6_094_762
    assert table["# Params trained"].tolist()[:5] == pytest.approx([100, np.nan, np.nan, np.nan, 100], nan_ok=True)
    printed = for_print(table)
    assert printed.loc[4, "PSNR"] == "31.00 (29.70, +1.30)" and printed.loc[1, "PSNR"] == "– (29.81)" and printed.loc[4, "PSNR kept %"] == "96.9 (99.1, −2.2)"
    assert table_4(photo_out, [4])["Time (ms) (paper)"].tolist() == [272.2, 262.8, 248.9, 241.8, 150.3]
    with pytest.raises(ValueError, match="scale is 5; the paper has tables for 2, 3, 4"):
        table_4(photo_out, [5])


def test_both_sizes_that_were_timed_stand_in_table_4(photo_out):
    rows = lambda milliseconds, parameters: [{"network": "usrnet", "ratio": ratio, "milliseconds": milliseconds, "speed_up": 1.0, "parameters": parameters, "macs": 1} for ratio in NAMED_RATIO]
    latency = {"rows": rows(900.0, 17_016_016), "profile_rows": rows(30.0, 590_332), "device": "CPU", "measured_on": "a CPU, 2 threads; y 1",
               "profile": {"latency": {"size": "both", "photo_shape": [96, 144], "scale": 3}}}
    write_json(photo_out / "latency" / "usrnet.json", latency)
    table, caption = table_4(photo_out), caption_4(photo_out, [2, 3])
    assert set(table["Time (ms)"]) == {900.0} and set(table["Time (ms) trained"]) == {30.0} and set(table["# Params"]) == {17_016_016}
    assert "the paper's network, 96×144 at ×3, a CPU, 2 threads" in caption and "Trained: the profile's network" in caption


def test_results_of_one_problem_do_not_leak_into_the_other(photo_out):
    metrics = read_metrics(photo_out)
    assert set(metrics[metrics["model"] == "varnet"]["scale"]) == {0} and set(metrics[metrics["model"] == "usrnet"]["acceleration"]) == {0}
    assert table_1(photo_out, ["varnet"])["PSNR school"].notna().sum() == 1 and "bicubic" not in set(comparisons(photo_out, "varnet")["method"])
    assert not {"varnet", "zero-filled"} & set(comparisons_4(photo_out)["method"])


def test_results_from_before_there_were_scales_still_read(out):
    assert "scale" not in pd.read_csv(Run("varnet").folder(out) / "metrics.csv") and set(read_metrics(out)["scale"]) == {0}
    assert table_1(out, ["varnet"])["PSNR supervised"][0] == pytest.approx(40.0)


def test_what_is_won_back_is_told_on_the_images_that_were_evaluated_before(photo_out):
    """Before fine-tuning one photograph of two: the teacher has 30 there, the pruned network 20, the student 29; over both photographs the means are 2 dB higher."""
    assert won_back(read_metrics(photo_out), 0.40, "school", 2) == pytest.approx(90.0)
    beside = comparisons_4(photo_out).set_index(["scale", "method"])
    assert beside.loc[(2, "no fine-tuning"), "images"] == 1 and beside.loc[(2, "school"), "images"] == 2
    assert beside.loc[(3, "school"), "won back %"] == pytest.approx(90.0) and np.isnan(beside.loc[(3, "bicubic"), "won back %"])
    assert np.isnan(won_back(read_metrics(photo_out), 0.20, "school", 2))


def test_the_caption_says_how_the_numbers_of_super_resolution_were_made(photo_out, tmp_path):
    caption = caption_4(photo_out, [2, 3])
    for said in ("RGB", "data range 1", "without cutting a border", "mean over images and kernels", "One network", "2 test photographs", "one blur kernel in turn",
                 "the 12 of kernels_12.mat", "noise σ = 0", "usrnet_tiny.pth", "Time was not measured", "×2 and ×3"):
        assert said in caption, said
    assert setting_4(tmp_path / "nothing") == "No complete run."


def test_figures_of_super_resolution_draw_with_missing_runs(photo_out, tmp_path):
    for number, figure in enumerate((figure_5(photo_out), figure_steps(photo_out), figure_steps(tmp_path / "nothing"))):
        assert all(path.stat().st_size > 1000 for path in write_figure(figure, tmp_path / f"photo_{number}"))
        matplotlib.pyplot.close(figure)
    with pytest.raises(FileNotFoundError, match="usrnet-teacher-seed0.*pretrain"):
        figure_5(tmp_path / "nothing")


def test_figure_5_tells_psnr_its_change_and_the_error_of_every_crop(photo_out):
    figure = figure_5(photo_out)
    crops, errors, bar = figure.axes[1:8], figure.axes[9:16], figure.axes[8].child_axes[0]
    assert [axis.get_title() for axis in crops] == ["ground truth", "bicubic", "0 %", "10 %: missing", "20 %: missing", "35 %: missing", "65 %"]
    images = read_images(Run("usrnet").folder(photo_out)) | read_images(Run("usrnet", ratio=0.40, strategy="school").folder(photo_out))
    teacher, student = (image_psnr(images[name], images["ground truth"]) for name in ("teacher", "student"))
    assert [text.get_text() for text in crops[-1].texts] == [f"{student:.2f} dB", f"−{100 - 100 * student / teacher:.1f} %"] and len(crops[2].texts) == 1
    assert [text.get_position()[1] > 0.5 for text in crops[-1].texts] == [True, False] and crops[-1].texts[0].get_position()[0] < 0.1
    shown = [axis.images[0] for axis in errors if axis.images]
    window = detail_window(images["teacher"], 0.33, square=True)
    assert len(shown) == 3 and len({image.get_clim() for image in shown}) == 1 and "error" in bar.get_xlabel()
    np.testing.assert_allclose(shown[-1].get_array(), np.abs(images["student"] - images["ground truth"]).mean(axis=2)[window])
    matplotlib.pyplot.close("all")


def test_pictures_can_be_read_in_print(photo_out, tmp_path):
    evolving = pd.DataFrame({"network": ["deq", "usrnet"] * 2, "ratio": [0.0, 0.0, 0.4, 0.4], "iteration": 1, "seconds": [0.1, 0.2, 0.05, 0.1], "residual": 0.1, "psnr": 30.0})
    for name, figure in (("1", figures.figure_1()), ("2", figures.figure_2(evolving)), ("3", figure_3(photo_out, MRI_NETWORKS)), ("steps", figure_steps(photo_out)),
                         ("5", figure_5(photo_out)), ("7", figure_7(photo_out, "varnet"))):
        figure.canvas.draw()
        assert figure.get_figwidth() <= 7, name
        assert len(printed_sizes(figure, 6.5)) > 10 and min(printed_sizes(figure, 6.5)) >= 6
        assert all(path.stat().st_size < 2e6 for path in write_figure(figure, tmp_path / name))
    matplotlib.pyplot.close("all")


def test_the_enlarged_window_lies_in_the_middle_of_the_object():
    """A ring of fat has the strongest edges; what is looked for is inside."""
    grid = np.hypot(*np.mgrid[-1:1:100j, -1:1:100j])
    image = 0.4 * (grid < 0.8) + 2.0 * (abs(grid - 0.7) < 0.015)
    image[48:52, 45:55] += 0.3
    rows, columns = detail_window(image, 0.16, square=True, inner=0.45)
    assert rows.stop - rows.start == 16 and rows.start <= 48 and rows.stop >= 52 and 30 <= columns.start and columns.stop <= 70
    assert image[detail_window(image, 0.16)].max() == pytest.approx(2.4), "anywhere: the ring"
    corner = np.zeros((64, 48))
    corner[60:, 44:] = 1.0
    assert all(part.stop <= side for part, side in zip(detail_window(corner, 0.16, square=True, inner=0.45), corner.shape)) and detail_window(np.zeros((64, 48)), inner=0.45)
    assert white_level(image) < 2 and white_level(np.zeros((4, 4))) == 1.0


def test_a_figure_is_told_what_it_shows_and_what_it_was_made_on(out):
    for name in ("figure_1", "figure_2", "figure_3", "figure_4", "figure_5", "figure_6", "figure_7", "figure_8", "figure_steps"):
        assert len(figures.figure_caption(out, name)) > 100
    assert "R = 6, effective sampling rate" in figures.figure_caption(out, "figure_7") and "No complete run" in figures.figure_caption(out, "figure_4")


def test_colours_are_stored_with_8_bits_and_curves_give_their_scores(photo_out):
    folder = Run("usrnet").folder(photo_out)
    images = read_images(folder)
    assert images["teacher"].shape == (48, 60, 3) and 0.9 < images["teacher"].max() <= 1 and abs(images["teacher"] - 0.95 * images["ground truth"]).max() < 0.005
    assert read_curve(folder)["step"].tolist() == [0, 2] and read_curve(photo_out / "nowhere").empty and read_curve(Run("varnet").folder(photo_out)).empty


# The difference, Table 3, Figures 1 and 2, the index page

def test_the_difference_to_the_paper_stands_in_the_numbers_and_in_print(out, tmp_path):
    table = table_1(out, ["varnet"])
    told = with_differences(table)
    assert told.loc[4, "PSNR school (difference)"] == pytest.approx(38.0 - 37.36) and np.isnan(told.loc[4, "PSNR supervised (difference)"])
    for column in (name for name in told if name.endswith(" (paper)")):
        assert (told[column.replace("paper", "difference")] == told[column.removesuffix(" (paper)")] - told[column]).sum() == table[[column, column.removesuffix(" (paper)")]].notna().all(axis=1).sum()
    assert list(pd.read_csv(write_table(table, "", tmp_path / "t")[0])) == list(told) and "−" in for_print(told).loc[4, "SSIM school"]


def test_table_3_sets_random_starts_beside_pruned_ones(out):
    write_run(out, Run("varnet", 6, 0.40, "supervised"), 39.0)
    write_run(out, Run("varnet", 6, 0.40, "supervised", "random"), 36.0)
    table = table_3(out)
    assert len(table) == 20 and table["Network, strategy"].unique().tolist() == [f"{name}, {strategy}" for strategy in ("self-supervised", "supervised") for name in ("E2E-VarNet", "VarNet")]
    row = table.iloc[-1]
    assert (row["PSNR SPADE"], row["PSNR random"], row["PSNR Δ"]) == pytest.approx((39.0, 36.0, 3.0)) and row["PSNR Δ (paper)"] == 2.45
    assert table["PSNR Δ"].notna().sum() == 1 and table["PSNR SPADE"].notna().sum() == 3, "the teacher stands in both of VarNet's blocks"
    assert for_print(table).iloc[-1]["PSNR Δ"] == "3.00 (2.45, +0.55)" and for_print(table).iloc[-2]["PSNR random"] == "– (38.03)"
    assert r"\Delta" in to_latex(for_print(table), caption_3(out, ["varnet"]))


def test_figures_1_and_2_draw_with_and_without_results(tmp_path):
    rows = [dict(network="deq", ratio=ratio, iteration=k, seconds=0.01 * k, residual=0.1 / k, psnr=30 + k) for ratio in (0.0, 0.40) for k in (1, 2, 3)]
    table = pd.DataFrame(rows)
    for number, figure in enumerate((figure_1(), figure_2(table), figure_2(table.iloc[:0]))):
        assert all(path.stat().st_size > 1000 for path in write_figure(figure, tmp_path / f"figure_{number}"))
        matplotlib.pyplot.close(figure)


def test_whole_tables_have_the_papers_names_and_parts_say_of_what():
    assert report_name("table_2", ["deq", "varnet", "e2e-varnet"], 8) == "table_2" and report_name("table_2", ["deq", "varnet"], 8) == "table_2_deq_varnet_R8"


def test_the_index_shows_what_is_there_and_names_what_is_missing(out):
    write_table(table_1(out, ["varnet"]), "the caption", out / "table_1_varnet_R6")
    (out / "figure_7_varnet_R6.png").touch()
    page = write_index(out).read_text()
    assert "the caption" in page and "](figure_7_varnet_R6.png)" in page and "2 complete runs (VarNet 2), 1 seed" in page
    missing = next(line for line in page.splitlines() if "Missing" in line)
    assert "Table 2" in missing and "Table 1" not in missing and "Figure 7" not in missing and str(out.parent) not in page


def test_the_index_tells_what_is_there_in_part_only(out):
    """VarNet's teacher and one student have 4 numbers of 41, as nothing was timed; other networks have none."""
    write_table(table_1(out, ["varnet"]), "the caption", out / "table_1_varnet_R6")
    for name in ("figure_3_varnet_R6.png", "figure_7_varnet_R6.png", "figure_2.png"):
        (out / name).touch()
    write_csv(out / "figure_2.csv", pd.DataFrame([dict(network=network, ratio=ratio) for network in ("deq", "usrnet") for ratio in NAMED_RATIO if (network, ratio) != ("deq", 0.2)]))
    part = next(line for line in index_page(out).splitlines() if line.startswith("- In part"))
    assert "Table 1 (no DEQ; VarNet without 37 of 41 numbers; no E2E-VarNet)" in part
    assert "Figure 3 (no DEQ; VarNet without 11 of 13 numbers; no E2E-VarNet)" in part and "Figure 7 (11 students missing)" in part and "Figure 2 (no DEQ at 35 %)" in part
    assert "Nothing of the paper is missing" not in index_page(out)


def test_the_index_tells_of_fewer_seeds(three_seeds):
    shutil.rmtree(Run("varnet", 6, 0.40, "supervised", seed=2).folder(three_seeds))
    write_table(table_1(three_seeds, ["varnet"]), "", three_seeds / "table_1_varnet_R6")
    assert "VarNet with fewer seeds in 2 numbers" in index_page(three_seeds)


def test_the_index_calls_complete_what_is_complete(tmp_path):
    """Every run of the paper, and every file; then one run less."""
    students = [(ratio, strategy) for ratio in NAMED_RATIO if ratio for strategy in STRATEGIES]
    for network in ("deq", "varnet", "e2e-varnet"):
        for acceleration in (6, 8, 10):
            for run in (Run(network, acceleration), *(Run(network, acceleration, *which) for which in students)):
                write_run(tmp_path, run, 40.0)
        for ratio, strategy in students:
            if network != "deq" and strategy != "school":
                write_run(tmp_path, Run(network, 6, ratio, strategy, "random"), 30.0)
        write_json(tmp_path / "latency" / f"{network}.json", {"rows": [dict(ratio=ratio, milliseconds=1.0, speed_up=1.0, parameters=1) for ratio in NAMED_RATIO]})
    for run in (Run("usrnet"), *(Run("usrnet", ratio=ratio, strategy="school") for ratio in NAMED_RATIO if ratio)):
        write_photo_run(tmp_path, run, 30.0)
    write_json(tmp_path / "latency" / "usrnet.json", {"rows": [dict(ratio=ratio, milliseconds=1.0, speed_up=1.0, parameters=1) for ratio in NAMED_RATIO]})
    for number, table in {1: table_1(tmp_path), 2: table_1(tmp_path, acceleration=8), 5: table_1(tmp_path, acceleration=10), 3: table_3(tmp_path)}.items():
        write_table(table, "", tmp_path / f"table_{number}")
    write_table(table_4(tmp_path), "", tmp_path / "table_4_usrnet")
    write_table(table_4(tmp_path, [4]), "", tmp_path / "table_6_usrnet")
    write_csv(tmp_path / "figure_2.csv", pd.DataFrame([dict(network=network, ratio=ratio) for network in ("deq", "usrnet") for ratio in NAMED_RATIO]))
    for name in ("figure_1", "figure_2", "figure_3", "figure_4", "figure_5_usrnet", "figure_6_deq_R6", "figure_7_varnet_R6", "figure_8_e2e-varnet_R6"):
        (tmp_path / f"{name}.png").touch()
    page = index_page(tmp_path)
    assert "Nothing of the paper is missing" in page and "In part" not in page and "Missing here" not in page
    shutil.rmtree(Run("usrnet", ratio=0.40, strategy="school").folder(tmp_path))
    write_table(table_4(tmp_path), "", tmp_path / "table_4_usrnet")
    page = index_page(tmp_path)
    assert "In part: Table 4 (×2 without 4 of 35 numbers; ×3 without 4 of 35 numbers), Figure 5 (1 student missing)." in page and "Nothing of the paper" not in page


@pytest.mark.parametrize("arguments, told", [({"max_iterations": 4, "tolerance": 0.01}, "a relative distance of 0.01, or after 4 iterations; it was trained with 4."),
                                             ({"max_iterations": 9, "tolerance": 0.1, "train_iterations": 5}, "a relative distance of 0.1, or after 9 iterations; it was trained with 5.")])
def test_a_caption_tells_iterations_where_a_profile_leaves_them_to_the_network(tmp_path, arguments, told):
    write_run(tmp_path, Run("deq"), 30.0)
    path = Run("deq").folder(tmp_path) / "result.json"
    result = read_json(path)
    write_json(path, {**result, "profile": {**result["profile"], "networks": {"deq": {"arguments": arguments}}}})
    assert told in figure_caption(tmp_path, "figure_2")


@pytest.mark.parametrize("profile", ["smoke", "demo", "gpu", "paper"])
def test_every_profile_of_the_paper_has_captions(tmp_path, profile):
    write_run(tmp_path, Run("deq"), 30.0)
    path = Run("deq").folder(tmp_path) / "result.json"
    write_json(path, {**read_json(path), "profile": as_plain(load_profile(profile))})
    assert all(figure_caption(tmp_path, stem) for stem in ("figure_2", "figure_3", "figure_5"))


# Figure 2 where there is no GPU, no folder of photographs, or an iteration more in one turn

def test_figure_2_needs_no_device_where_there_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "use_device", lambda profile: pytest.fail("no weights are there"))
    assert evolutions(load_profile("gpu"), tmp_path).empty


def test_figure_2_gives_the_folder_of_acquisitions_to_csmri_only(tmp_path, monkeypatch):
    profile, given = load_profile("smoke"), {}
    monkeypatch.setattr(figures, "stored_networks", lambda *_: {0.0: tmp_path, 0.40: tmp_path})
    monkeypatch.setattr(figures, "datasets", lambda profile, run, data, progress: given.update({run.network: data}) or {"test": None})
    monkeypatch.setattr(figures, "picture_batches", lambda *_: [torch.zeros(1)])
    monkeypatch.setattr(figures, "load_teacher", lambda path: torch.nn.Identity())
    monkeypatch.setattr(figures, "move", lambda batch, device: batch)
    monkeypatch.setattr(figures, "evolution", lambda *_: pd.DataFrame({"ratio": [0.0]}))
    assert set(evolutions(profile, tmp_path, data="acquisitions")["network"]) == {"deq", "usrnet"} and given == {"deq": "acquisitions", "usrnet": ""}


def test_figure_2_survives_turns_of_different_length():
    class Solver(torch.nn.Module):
        """Needs four iterations when it is followed, then three, four and five."""
        lengths = [4, 3, 4, 5]

        def solve(self, y, A, record=False):
            count = self.lengths.pop(0)
            image = torch.ones(1, 1, 4, 4)
            return image, SimpleNamespace(residuals=[torch.ones(1)] * count, seconds=[1.0] * count, images=[image] * count if record else None)

    batch = Batch(torch.zeros(1), None, 2 * torch.ones(1, 1, 4, 4), {})
    table = evolution({0.0: Solver()}, batch, repeats=3)
    assert table["iteration"].tolist() == [1, 2, 3] and table["seconds"].tolist() == [1.0, 2.0, 3.0]
