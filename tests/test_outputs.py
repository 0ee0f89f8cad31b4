"""What the committed demo results must show (its claims in README rest on them)."""
import json
from pathlib import Path

import pandas as pd
import pytest

from spade.workflow import paper_reports, paper_runs
from spade.runs import Run
from spade.config import load_profile

RUNS = Path(__file__).resolve().parents[1] / "outputs" / "demo" / "runs"
NETWORKS = [name for name in ("deq", "varnet", "e2e-varnet") if (RUNS / f"{name}-R6-teacher-seed0" / "result.json").is_file()]


def means(name: str) -> dict[str, float]:
    return json.loads((RUNS / name / "result.json").read_text())["means"]


def student(network: str, ratio: float, strategy: str, start: str = "") -> float:
    return means(f"{network}-R6-{ratio:.2f}-{strategy}{start}-seed0")[f"{network} {strategy} psnr"]


def test_the_demo_of_every_network_is_committed():
    assert len(NETWORKS) == 3 and (RUNS / "usrnet-teacher-seed0" / "result.json").is_file()


def test_the_demo_shows_every_table_and_figure_of_the_paper():
    demo, profile = RUNS.parent, load_profile("demo")
    missing = [name for report in paper_reports(profile).values() for name in report.files if not (demo / name).is_file()]
    assert not missing and (demo / "resources.md").is_file()
    assert "Nothing of the paper is missing" in (demo / "index.md").read_text(encoding="utf-8")


def test_one_batch_made_every_run_of_the_demo_and_no_other_is_there():
    found = {path.parent.name: json.loads(path.read_text()) for path in RUNS.glob("*/result.json")}
    assert set(found) == set(paper_runs(load_profile("demo"))) == {path.name for path in RUNS.iterdir()}
    assert len({run["commit"] for run in found.values()}) == 1 and not any("+" in run["commit"] for run in found.values())
    assert len({(run["device"], json.dumps(run["versions"]), json.dumps(run["profile"], sort_keys=True)) for run in found.values()}) == 1


def test_the_readmes_numbers_are_those_of_the_demo():
    text, demo = " ".join((RUNS.parents[2] / "README.md").read_text(encoding="utf-8").split()), RUNS.parent
    table = pd.read_csv(demo / "table_1.csv").query("Network == 'VarNet'").set_index("Pruning ratio")
    lost = {f"{name}{whose}": 100 - 100 * table.loc["65 %", f"PSNR {name}{whose}"] / table.loc["0 %", f"PSNR supervised{whose}"] for name in ("supervised", "school") for whose in ("", " (paper)")}
    assert f"*supervised* fine-tuning loses {lost['supervised']:.1f} % of the teacher's PSNR and *school* {lost['school']:.1f} %" in text
    assert f"(the paper: {lost['supervised (paper)']:.1f} % and {lost['school (paper)']:.1f} %)" in text
    assert f"runs {table.loc['65 %', 'Speed-up']:.1f} times faster on two CPU threads" in text
    worst = min(pd.read_csv(demo / f"table_{number}_usrnet.csv")["PSNR kept %"].min() for number in (4, 6))
    assert f"within {100 - worst:.1f} % of its teacher at every ratio" in text


@pytest.mark.parametrize("acceleration", [8, 10])
@pytest.mark.parametrize("network", NETWORKS)
def test_teachers_that_went_on_from_another_acceleration_beat_cg_sense(network, acceleration):
    found = json.loads((RUNS / f"{network}-R{acceleration}-teacher-seed0" / "result.json").read_text())
    assert found["begun_from"] == f"{network}_R6_demo.safetensors" and found["training_seconds"] > 0
    assert found["means"][f"{network} psnr"] >= found["means"]["cg-sense psnr"] + 1.5


@pytest.mark.parametrize("network", NETWORKS)
def test_the_teacher_beats_both_baselines(network):
    found = means(f"{network}-R6-teacher-seed0")
    assert found[f"{network} psnr"] >= found["zero-filled psnr"] + 6
    assert found[f"{network} psnr"] >= found["cg-sense psnr"] + 1


@pytest.mark.parametrize("network", NETWORKS)
def test_at_65_percent_the_papers_level_and_order(network):
    teacher = means(f"{network}-R6-teacher-seed0")[f"{network} psnr"]
    supervised, school, alone = (student(network, 0.40, strategy) for strategy in ("supervised", "school", "self-supervised"))
    assert supervised >= 0.96 * teacher and school >= 0.94 * teacher
    assert supervised >= school >= alone


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_psnr_falls_as_the_ratio_grows(network, strategy):
    """Within 0.01 dB: VarNet's supervised students at 10 % and 20 % are equal to 0.001 dB."""
    values = [student(network, ratio, strategy) for ratio in (0.05, 0.10, 0.20, 0.40)]
    assert all(later <= earlier + 0.01 for earlier, later in zip(values, values[1:])) and values[-1] < values[0] - 0.5


@pytest.mark.parametrize("network", [name for name in NETWORKS if Run(name, 6, 0.40, "supervised", "random").name in paper_runs(load_profile("demo"))])
def test_pruning_beats_the_random_start_under_the_same_budget(network):
    pruned, fresh = (json.loads((RUNS / f"{network}-R6-0.40-supervised{start}-seed0" / "result.json").read_text()) for start in ("", "-random"))
    assert pruned["means"][f"{network} supervised psnr"] > fresh["means"][f"{network} supervised psnr"] + 1
    assert pruned["parameters"] == fresh["parameters"] and pruned["profile"] == fresh["profile"]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_photographs_by_school(scale):
    """The teacher beats bicubic interpolation by far; its students keep 97 % at 35 %, and win back 80 % at 65 % of what pruning took."""
    teacher = means("usrnet-teacher-seed0")
    unpruned = teacher[f"usrnet x{scale} psnr"]
    assert unpruned >= teacher[f"bicubic x{scale} psnr"] + 1.5
    assert means("usrnet-0.20-school-seed0")[f"usrnet school x{scale} psnr"] >= 0.97 * unpruned
    most = means("usrnet-0.40-school-seed0")
    after, before = (most[f"usrnet {strategy} x{scale} psnr"] for strategy in ("school", "none"))
    assert after - before >= 0.8 * (unpruned - before)
