"""What the committed demo results must show; the claims of README.md rest on them."""

import subprocess
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from spade.config import load_config
from spade.figures import index_page
from spade.runs import Run
from spade.tables import MRI_NETWORKS, is_pictured, read_results
from spade.workflow import paper_runs

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "outputs" / "demo"
RESULTS = read_results(DEMO)
RUNS = RESULTS.runs.set_index("name")


def mean_psnr(
    model: str, ratio: float = 0.0, strategy: str = "", start: str = "pruned", acceleration: int = 6, scale: int = 0
) -> float:
    """Mean PSNR in dB over the test images."""
    where = {"model": model, "ratio": ratio, "strategy": strategy, "start": start, "metric": "psnr", "scale": scale}
    metrics = RESULTS.metrics
    for column, value in {**where, "acceleration": 0 if scale else acceleration}.items():
        metrics = metrics[metrics[column] == value]
    assert len(metrics), where
    return metrics["value"].mean()


def test_the_demo_shows_every_table_and_figure_of_the_paper():
    names = [f"table_{number}.md" for number in range(1, 7)] + [f"figure_{number}.png" for number in range(1, 9)]
    assert not [name for name in names if not (DEMO / name).is_file()]
    page = (DEMO / "index.md").read_text(encoding="utf-8")
    assert "Nothing of the paper is missing" in page and page == index_page(DEMO)


def test_one_batch_made_every_run_of_the_demo_and_no_other_is_there():
    assert set(RUNS.index) == set(paper_runs(load_config("demo")))
    lines = (DEMO / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    shared = ("config", "device", "versions")
    assert all(f'"{key}"' in lines[0] for key in shared)
    assert not any(f'"{key}"' in line for line in lines[1:] for key in shared)
    # Runs that began after the first new figure say "+changes": committed figures differed by then.
    assert len({commit.removesuffix("+changes") for commit in RUNS["commit"]}) == 1


def test_every_picture_is_of_a_run_that_is_shown():
    for name, run in RUNS.iterrows():
        pictures = RESULTS.pictures(
            Run(*run[["network", "acceleration", "ratio", "strategy", "start", "seed", "loss"]])
        )
        assert bool(pictures) == is_pictured(run.to_dict()), name


def test_outputs_and_the_tracked_tree_stay_small():
    """8 MB for outputs/ and 25 MB for all tracked files, and nothing that the batch makes again."""
    listed = subprocess.run("git ls-files -z", shell=True, cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    outputs = [path for path in paths if path.is_relative_to(ROOT / "outputs")]
    assert sum(path.stat().st_size for path in outputs) < 8e6 and sum(path.stat().st_size for path in paths) < 25e6
    assert {path.suffix for path in outputs} <= {".md", ".csv", ".gz", ".jsonl", ".png", ".h5", ".ipynb", ".json"}
    assert len([path for path in outputs if path.suffix == ".ipynb"]) <= 3


def test_the_readmes_numbers_are_those_of_the_demo():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    table = pd.read_csv(DEMO / "table_1.csv").query("Network == 'VarNet'").set_index("Pruning ratio")
    lost = {
        f"{name}{whose}": 100
        - 100 * table.loc["65 %", f"PSNR {name}{whose}"] / table.loc["0 %", f"PSNR supervised{whose}"]
        for name in ("supervised", "school")
        for whose in ("", " (paper)")
    }
    expected = [f"*supervised* loses {lost['supervised']:.1f} % of the teacher's PSNR"]
    expected += [f"*school* {lost['school']:.1f} %"]
    expected += [f"(the paper: {lost['supervised (paper)']:.1f} % and {lost['school (paper)']:.1f} %)"]
    expected += [f"runs {table.loc['65 %', 'Speed-up']:.1f} times faster on two CPU threads"]
    assert [sentence for sentence in expected if sentence not in text] == []


@pytest.mark.parametrize("acceleration", [8, 10])
@pytest.mark.parametrize("network", MRI_NETWORKS)
def test_teachers_that_started_from_another_acceleration_beat_cg_sense(network, acceleration):
    run = RUNS.loc[f"{network}-R{acceleration}-teacher-seed0"]
    assert run["begun_from"] == f"{network}_R6_demo.safetensors" and run["training_seconds"] > 0
    ours, baseline = (mean_psnr(model, acceleration=acceleration) for model in (network, "cg-sense"))
    assert ours >= baseline + 1.5


@pytest.mark.parametrize("network", MRI_NETWORKS)
def test_the_teacher_beats_both_baselines(network):
    metrics = RESULTS.metrics.query("acceleration == 6 and metric == 'psnr'")
    images = set(metrics[metrics["model"] == network]["image"])
    assert set(metrics[metrics["model"] == "cg-sense"]["image"]) == images
    assert mean_psnr(network) >= mean_psnr("zero-filled") + 6 and mean_psnr(network) >= mean_psnr("cg-sense") + 1


@pytest.mark.parametrize("network", MRI_NETWORKS)
def test_at_65_percent_the_papers_level_and_order(network):
    teacher = mean_psnr(network)
    supervised, school, alone = (mean_psnr(network, 0.40, name) for name in ("supervised", "school", "self-supervised"))
    kept = (0.97, 0.95) if network == "deq" else (0.96, 0.94)
    assert supervised >= kept[0] * teacher and school >= kept[1] * teacher and alone < school


RATIOS = (0.05, 0.10, 0.20, 0.40)
ACCELERATIONS = (6, 8, 10)
# Students at a larger ratio take more steps at a larger rate: one of them is better than that of the ratio before.
RISES = {("varnet", 8, "self-supervised", 0.10)}


def test_psnr_falls_as_the_ratio_grows():
    """Within 0.01 dB but for one rise. Supervised students alone may pass the teacher: see outputs/README.md."""
    found = set()
    for network, acceleration in product(MRI_NETWORKS, ACCELERATIONS):
        teacher = mean_psnr(network, acceleration=acceleration)
        for strategy in ("supervised", "school", "self-supervised"):
            values = [mean_psnr(network, ratio, strategy, acceleration=acceleration) for ratio in RATIOS]
            assert values[-1] < min(values[0] - 0.2, teacher) and (max(values) < teacher or strategy == "supervised")
            steps = zip(RATIOS[1:], values, values[1:])
            found |= {(network, acceleration, strategy, ratio) for ratio, a, b in steps if b > a + 0.01}
    assert found == RISES


@pytest.mark.parametrize("network", MRI_NETWORKS)
@pytest.mark.parametrize("acceleration", ACCELERATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_strategies_are_in_order_and_above_pruning_alone(network, acceleration, ratio):
    strategies = ("supervised", "school", "self-supervised", "none")
    values = [mean_psnr(network, ratio, name, acceleration=acceleration) for name in strategies]
    assert values == sorted(values, reverse=True) and values[2] > values[3] + 0.3


@pytest.mark.parametrize(
    "acceleration, share, limit, radius", [(6, 1.0, 50, 0.975), (8, 0.9, 60, 0.975), (10, 0.9, 60, 0.975)]
)
def test_searches_of_the_deq_converge(acceleration, share, limit, radius):
    metrics = RESULTS.metrics.query("model == 'deq' and acceleration == @acceleration")
    tuned = metrics[~metrics["strategy"].isin(["none", "repaired"])]
    for _, run in tuned.fillna({"strategy": "teacher"}).groupby(["ratio", "strategy"]):
        values = run.groupby("metric")["value"]
        assert values.mean()["converged"] >= share and values.median()["iterations"] <= limit
        assert values.max()["spectral_radius"] <= radius


@pytest.mark.parametrize("network", ["varnet", "e2e-varnet"])
def test_pruning_beats_the_random_start_under_the_same_budget(network):
    pruned, fresh = (RUNS.loc[f"{network}-R6-0.40-supervised{start}-seed0"] for start in ("", "-random"))
    assert mean_psnr(network, 0.40, "supervised") > mean_psnr(network, 0.40, "supervised", "random") + 1
    assert pruned["parameters"] == fresh["parameters"] and pruned["config"] == fresh["config"]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_photographs_by_school(scale):
    """The teacher beats bicubic interpolation; students keep 97 % at 35 % and recover 80 % of the loss at 65 %."""
    unpruned = mean_psnr("usrnet", scale=scale)
    assert unpruned >= mean_psnr("bicubic", scale=scale) + 1.5
    assert mean_psnr("usrnet", 0.20, "school", scale=scale) >= 0.97 * unpruned
    after, before = (mean_psnr("usrnet", 0.40, strategy, scale=scale) for strategy in ("school", "none"))
    assert after - before >= 0.8 * (unpruned - before)


def test_students_that_adapt_to_measured_kspace_beat_pruning_alone():
    """By the error of hidden lines, and in PSNR on at least three of the four files."""
    table = pd.read_csv(ROOT / "outputs" / "measured" / "table.csv").set_index(["method", "file"])["psnr"]
    hidden = pd.read_csv(ROOT / "outputs" / "measured" / "hidden_lines.csv", index_col="method")["hidden_error"]
    for network in MRI_NETWORKS:
        before, after = (f"{network}, {how} 0.4" for how in ("pruned", "self-supervised"))
        assert hidden[after] < hidden[before] < 1.5
        gain = table[after] - table[before]
        assert len(gain) == 4 and (gain > 0).sum() >= 3, gain
