"""Figures from tidy files: missing runs show as missing, files are equal and small, and notebooks show all figures."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from execute_notebooks import own_sockets
from made_up_results import add_photo_runs, made, write_latency, write_photo_run, write_run
from nbclient import NotebookClient
from PIL import Image

matplotlib.use("agg")

from spade import figures  # noqa: E402
from spade.basics import Batch  # noqa: E402
from spade.config import load_config  # noqa: E402
from spade.figures import (  # noqa: E402
    CONTENTS,
    MOST_BYTES,
    detail_window,
    evolution,
    figure_2,
    figure_3,
    figure_5,
    figure_7,
    figure_caption,
    image_psnr,
    index_page,
    lost_over_seeds,
    white_level,
    write_evolution,
    write_figure,
    write_index,
)
from spade.losses import STRATEGIES  # noqa: E402
from spade.paper import NAMED_RATIO  # noqa: E402
from spade.runs import Run  # noqa: E402
from spade.tables import MRI_NETWORKS, each_seed, read_results, table_1, table_3, table_4, write_csv, write_table  # noqa: E402

OUTPUTS = Path(__file__).resolve().parents[1] / "outputs"
EXPERIMENTS = OUTPUTS.parent / "nbs" / "experiments"


def drawn_by(notebook: str, results=None):
    """The figure that an experiment draws in its own cells; of some results in place of a folder's."""
    names = {"seed": 0, "results": results}
    for cell in nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", as_version=4).cells:
        reads_or_writes = any(word in cell.source for word in ("target", "folder ="))
        if cell.cell_type == "code" and not reads_or_writes:
            exec(cell.source.replace("results = read_results(folder, made)", ""), names)
    return names["figure"]


def figure_1():
    return drawn_by("figure_1")


def figure_steps(results):
    return drawn_by("figure_steps", results)


FIGURES = {
    "figure_1": lambda results: figure_1(),
    "figure_2": lambda results: figure_2(results.evolution),
    "figure_3": lambda results: figure_3(results),
    "figure_4": lambda results: figure_3(results, acceleration=8),
    "figure_5": figure_5,
    "figure_6": lambda results: figure_7(results, "deq"),
    "figure_7": lambda results: figure_7(results, "varnet"),
    "figure_8": lambda results: figure_7(results, "e2e-varnet"),
    "figure_steps": figure_steps,
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def out(tmp_path) -> Path:
    write_run(tmp_path, Run("varnet"), 40.0)
    write_run(tmp_path, Run("varnet", 6, 0.40, "school"), 38.0)
    return tmp_path


@pytest.fixture
def photo_out(out) -> Path:
    return add_photo_runs(out)


# Files


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tidy files of outputs/demo alone."""
    folder = tmp_path_factory.mktemp("demo")
    for name in (
        "runs.jsonl",
        "metrics.csv.gz",
        "curves.csv.gz",
        "latency.csv",
        "evolution.csv.gz",
        "pictures.h5",
        "checksums.json",
    ):
        shutil.copy(OUTPUTS / "demo" / name, folder)
    return folder


@pytest.mark.parametrize("stem", FIGURES)
def test_the_committed_files_give_the_committed_figures(stem, clone):
    """The same size in pixels; pixels may differ by the version of matplotlib."""
    path = write_figure(FIGURES[stem](read_results(clone)), clone / stem)
    with Image.open(path) as ours, Image.open(OUTPUTS / "demo" / path.name) as committed:
        assert ours.size == committed.size
        difference = np.abs(np.asarray(ours.convert("L"), float) - np.asarray(committed.convert("L"), float))
    assert difference.mean() < 2 and path.stat().st_size <= MOST_BYTES


def test_committed_figures_are_small():
    assert all(path.stat().st_size <= MOST_BYTES for path in OUTPUTS.glob("*/*.png"))


@pytest.mark.parametrize("draw", [lambda results: figure_3(results, ["varnet"]), figure_7, figure_5])
def test_equal_figures_are_equal_files(draw, photo_out, tmp_path):
    """Also where the figure was displayed before, which lays it out at another resolution."""
    first = write_figure(draw(made(photo_out)), tmp_path / "a")
    displayed = draw(made(photo_out))
    for dpi in (72, 100):
        displayed.savefig(tmp_path / "display.png", dpi=dpi)
    assert write_figure(displayed, tmp_path / "b").read_bytes() == first.read_bytes()


def test_all_figures_of_a_notebook_are_shown(tmp_path):
    """A figure in a style of its own must not turn the display of later figures off, whichever is the first plot."""
    cells = [
        "from spade.figures import figure_2, figure_3\nfrom spade.tables import read_results\n"
        f"results = read_results({str(OUTPUTS / 'demo')!r})",
        "figure = figure_3(results)",
        "figure = figure_2(results.evolution)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    environment = {key: value for key, value in figures_environment().items() if key != "MPLBACKEND"}
    resources = {"metadata": {"path": str(OUTPUTS.parent)}}
    NotebookClient(notebook, timeout=300, resources=resources, config=own_sockets()).execute(env=environment)
    pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in notebook.cells]
    assert pictures == [0, 1, 1, 1]


def figures_environment() -> dict[str, str]:
    """This process's environment, with this checkout first on the path."""
    import os

    return {**os.environ, "PYTHONPATH": str(OUTPUTS.parent), "OMP_NUM_THREADS": "1"}


# Figures 3 and 4


def test_figure_3_has_bars_of_the_deviation_over_seeds(tmp_path):
    for seed, lost in enumerate((1.0, 1.0, 4.0)):
        write_run(tmp_path, Run("varnet", seed=seed), 40.0, seed_shift=seed, seeds=(0, 1, 2))
        student = Run("varnet", 6, 0.40, "supervised", seed=seed)
        write_run(tmp_path, student, 40.0 - lost, seed_shift=seed, seeds=(0, 1, 2))
    results = made(tmp_path)
    lost = lost_over_seeds(each_seed(results.metrics), "varnet", 6, "supervised")
    each = [100 / 40, 100 / 41, 400 / 42]  # each student against the teacher of its seed
    mean, std = np.mean(each), np.std(each, ddof=1)
    assert lost.loc["65 %"].tolist() == pytest.approx([mean, std]) and lost.loc["10 %"].isna().all()
    axis = figure_3(results, ["varnet"]).axes[0]
    low, high = axis.collections[0].get_segments()[-1][:, 1]
    assert len(axis.collections) == 1 and (low, high) == pytest.approx((mean - std, mean + std))


def test_figure_3_has_no_bars_with_one_seed(out):
    assert not figure_3(made(out), ["varnet"]).axes[0].collections


# Pictures


def test_figures_draw_with_missing_runs(photo_out, tmp_path):
    results, nothing = made(photo_out), made(tmp_path / "nothing")
    drawn = [figure_3(results, ["varnet", "deq"]), figure_7(results, "varnet"), figure_5(results)]
    drawn += [figure_steps(results), figure_steps(nothing), figure_2(nothing.evolution), figure_3(nothing)]
    for number, figure in enumerate(drawn):
        assert write_figure(figure, tmp_path / f"figure_{number}").stat().st_size > 1000


@pytest.mark.parametrize(("draw", "name"), [(figure_7, "varnet-R6-teacher-seed0"), (figure_5, "usrnet-teacher-seed0")])
def test_a_figure_without_its_teacher_names_the_run(draw, name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name}.*pretrain"):
        draw(made(tmp_path))


def test_figure_5_has_psnr_its_change_and_the_error_of_every_crop(photo_out):
    results = made(photo_out)
    figure = figure_5(results)
    crops, errors, bar = figure.axes[1:8], figure.axes[9:16], figure.axes[8].child_axes[0]
    titles = ["ground truth", "bicubic", "0 %", "10 %: missing", "20 %: missing", "35 %: missing", "65 %"]
    assert [axis.get_title() for axis in crops] == titles
    images = results.pictures(Run("usrnet")) | results.pictures(Run("usrnet", ratio=0.40, strategy="school"))
    teacher, student = (image_psnr(images[name], images["ground truth"]) for name in ("teacher", "student"))
    change = f"−{100 - 100 * student / teacher:.1f} %"
    assert [text.get_text() for text in crops[-1].texts] == [f"{student:.2f} dB", change] and len(crops[2].texts) == 1
    assert [text.get_position()[1] > 0.5 for text in crops[-1].texts] == [True, False]
    shown = [axis.images[0] for axis in errors if axis.images]
    window = detail_window(images["teacher"], 0.33)
    assert len(shown) == 3 and len({image.get_clim() for image in shown}) == 1 and "error" in bar.get_xlabel()
    expected = np.abs(images["student"] - images["ground truth"]).mean(axis=2)[window]
    np.testing.assert_allclose(shown[-1].get_array(), expected)


def test_colours_are_stored_with_8_bits(photo_out):
    images = made(photo_out).pictures(Run("usrnet"))
    assert images["teacher"].shape == (48, 60, 3) and 0.9 < images["teacher"].max() <= 1
    assert abs(images["teacher"] - 0.95 * images["ground truth"]).max() < 0.005


def test_text_can_be_read_in_print(photo_out):
    """At least 6 points where the figure is printed 6.5 inches wide."""
    rows = {
        "network": ["deq", "usrnet"] * 2,
        "ratio": [0.0, 0.0, 0.4, 0.4],
        "iteration": 1,
        "residual": 0.1,
        "psnr": 30.0,
    }
    results = made(photo_out)
    drawn = {"1": figure_1(), "2": figure_2(pd.DataFrame({**rows, "seconds": [0.1, 0.2, 0.05, 0.1]}))}
    drawn |= {"3": figure_3(results, MRI_NETWORKS), "steps": figure_steps(results), "5": figure_5(results)}
    drawn["7"] = figure_7(results, "varnet")
    for name, figure in drawn.items():
        figure.canvas.draw()
        visible = figure.findobj(lambda artist: isinstance(artist, matplotlib.text.Text) and artist.get_visible())
        sizes = [text.get_fontsize() * 6.5 / figure.get_figwidth() for text in visible if text.get_text().strip()]
        assert figure.get_figwidth() <= 7 and len(sizes) > 10 and min(sizes) >= 6, name


def test_the_enlarged_window_lies_in_the_middle_of_the_object():
    """A ring of fat has the strongest edges; the window is to be inside."""
    grid = np.hypot(*np.mgrid[-1:1:100j, -1:1:100j])
    image = 0.4 * (grid < 0.8) + 2.0 * (abs(grid - 0.7) < 0.015)
    image[48:52, 45:55] += 0.3
    rows, columns = detail_window(image, 0.16, inner=0.45)
    assert rows.stop - rows.start == 16 and rows.start <= 48 and rows.stop >= 52
    assert 30 <= columns.start and columns.stop <= 70
    assert image[detail_window(image, 0.16)].max() == pytest.approx(2.4), "anywhere: the ring"
    corner = np.zeros((64, 48))
    corner[60:, 44:] = 1.0
    window = detail_window(corner, 0.16, inner=0.45)
    assert all(part.stop <= side for part, side in zip(window, corner.shape))
    assert detail_window(np.zeros((64, 48)), 0.25, inner=0.45)
    assert white_level(image) < 2 and white_level(np.zeros((4, 4))) == 1.0


def test_a_curve_has_the_steps_that_were_validated(photo_out):
    lines = figure_steps(made(photo_out)).axes[0].get_lines()
    assert lines[-2].get_xdata().tolist() == [0, 2] and lines[-1].get_linestyle() == "--"


# Captions and the index page


def test_captions_state_what_is_shown_and_its_data(out):
    results = made(out)
    for stem in FIGURES:
        caption = figure_caption(results, stem)
        assert len(caption) > 60 and all(line.startswith("- ") for line in caption.splitlines())
    assert "R = 6, effective rate" in figure_caption(results, "figure_7")
    assert "no complete run" in figure_caption(results, "figure_4")


def test_the_index_shows_what_exists_and_names_what_is_missing(out):
    write_table(table_1(made(out), ["varnet"]), "the caption", out / "table_1")
    (out / "figure_7.png").touch()
    page = write_index(out, made=True).read_text(encoding="utf-8")
    assert "the caption" in page and "](figure_7.png)" in page and "2 complete runs (VarNet 2), 1 seed" in page
    missing = next(line for line in page.splitlines() if "Missing" in line)
    assert (
        "Table 2" in missing and "Table 1" not in missing and "Figure 7" not in missing and str(out.parent) not in page
    )


def test_the_index_names_what_is_incomplete(out):
    """VarNet's teacher and one student have 4 numbers of 41, as nothing was timed; other networks have none."""
    write_table(table_1(made(out), ["varnet"]), "the caption", out / "table_1")
    for name in ("figure_3.png", "figure_7.png", "figure_2.png"):
        (out / name).touch()
    rows = [{"network": network, "ratio": ratio} for network in ("deq", "usrnet") for ratio in NAMED_RATIO]
    write_csv(out / "evolution.csv.gz", pd.DataFrame([row for row in rows if row != {"network": "deq", "ratio": 0.2}]))
    part = next(line for line in index_page(out, made=True).splitlines() if line.startswith("- Incomplete"))
    assert "Table 1 (no DEQ; VarNet without 37 of 41 numbers; no E2E-VarNet)" in part
    assert "Figure 3 (no DEQ; VarNet without 11 of 13 numbers; no E2E-VarNet)" in part
    assert "Figure 7 (no supervised; school without 3 of 4 students; no self-supervised)" in part
    assert "Figure 2 (no DEQ at 35 %)" in part
    assert "Nothing of the paper is missing" not in index_page(out, made=True)


def test_the_index_names_incomplete_averages(tmp_path):
    for seed in range(2):
        write_run(tmp_path, Run("varnet", seed=seed), 40.0, seeds=(0, 1))
    write_run(tmp_path, Run("varnet", 6, 0.40, "supervised"), 39.0, seeds=(0, 1))
    write_table(table_1(made(tmp_path), ["varnet"]), "", tmp_path / "table_1")
    assert "VarNet with fewer seeds in 2 numbers" in index_page(tmp_path, made=True)


@pytest.fixture
def complete(tmp_path) -> Path:
    """Every run of the paper, and every file."""
    students = [(ratio, strategy) for ratio in NAMED_RATIO if ratio for strategy in STRATEGIES]
    for network in MRI_NETWORKS:
        for acceleration in (6, 8, 10):
            runs = [Run(network, acceleration), *(Run(network, acceleration, *which) for which in students)]
            for run in runs:
                write_run(tmp_path, run, 40.0)
        for ratio, strategy in students:
            if network != "deq" and strategy != "school":
                write_run(tmp_path, Run(network, 6, ratio, strategy, "random"), 30.0)
    for run in (Run("usrnet"), *(Run("usrnet", ratio=ratio, strategy="school") for ratio in NAMED_RATIO if ratio)):
        write_photo_run(tmp_path, run, 30.0)
    for network in (*MRI_NETWORKS, "usrnet"):
        write_latency(tmp_path, network)
    rows = [{"network": network, "ratio": ratio} for network in ("deq", "usrnet") for ratio in NAMED_RATIO]
    write_csv(tmp_path / "evolution.csv.gz", pd.DataFrame(rows))
    for name in CONTENTS:
        (tmp_path / f"{name}{'.md' if name.startswith('table') else '.png'}").touch()
    return tmp_path


def test_the_index_calls_complete_what_is_complete(complete):
    results = made(complete)
    tables = {1: table_1(results), 2: table_1(results, acceleration=8), 5: table_1(results, acceleration=10)}
    for number, table in {**tables, 3: table_3(results), 4: table_4(results), 6: table_4(results, [4])}.items():
        write_table(table, "", complete / f"table_{number}")
    page = index_page(complete, made=True)
    assert "Nothing of the paper is missing" in page and "Incomplete" not in page and "Missing" not in page
    shutil.rmtree(Run("usrnet", ratio=0.40, strategy="school").folder(complete))
    write_table(table_4(made(complete)), "", complete / "table_4")
    page = index_page(complete, made=True)
    gaps = "Table 4 (×2 without 4 of 35 numbers; ×3 without 4 of 35 numbers), Figure 5 (school without 1 of 4 students)"
    assert gaps in page and "Nothing of the paper" not in page


# Figure 2 where there is no GPU, no folder of photographs, or an iteration more in one turn


def test_figure_2_needs_no_device_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "use_device", lambda config: pytest.fail("no weights are stored"))
    assert write_evolution(load_config("gpu"), tmp_path).empty


def test_a_stored_evolution_stays_without_weights(tmp_path):
    path = write_csv(tmp_path / "evolution.csv.gz", pd.DataFrame({"network": ["deq"]}))
    before = path.read_bytes()
    assert write_evolution(load_config("smoke"), tmp_path).empty and path.read_bytes() == before


def test_figure_2_gives_the_folder_of_acquisitions_to_csmri_only(tmp_path, monkeypatch):
    config, given = load_config("smoke"), {}
    monkeypatch.setattr(figures, "stored_networks", lambda *_: {0.0: tmp_path, 0.40: tmp_path})
    monkeypatch.setattr(
        figures, "datasets", lambda config, run, data, progress: given.update({run.network: data}) or {"test": None}
    )
    monkeypatch.setattr(figures, "picture_batches", lambda *_: [torch.zeros(1)])
    monkeypatch.setattr(figures, "load_teacher", lambda path: torch.nn.Identity())
    monkeypatch.setattr(figures, "move", lambda batch, device: batch)
    monkeypatch.setattr(figures, "evolution", lambda *_: pd.DataFrame({"ratio": [0.0]}))
    assert set(write_evolution(config, tmp_path, data="acquisitions")["network"]) == {"deq", "usrnet"}
    assert given == {"deq": "acquisitions", "usrnet": ""}


def test_figure_2_keeps_the_iterations_that_all_turns_have():
    class Solver(torch.nn.Module):
        """Needs four iterations when it is recorded, then three, four and five."""

        lengths = [4, 3, 4, 5]

        def solve(self, y, A, record=False):
            count = self.lengths.pop(0)
            image = torch.ones(1, 1, 4, 4)
            images = [image] * count if record else None
            return image, SimpleNamespace(residuals=[torch.ones(1)] * count, seconds=[1.0] * count, images=images)

    batch = Batch(torch.zeros(1), None, 2 * torch.ones(1, 1, 4, 4), {})
    table = evolution({0.0: Solver()}, batch, repeats=3)
    assert table["iteration"].tolist() == [1, 2, 3] and table["seconds"].tolist() == [1.0, 2.0, 3.0]
