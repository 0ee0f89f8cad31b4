"""What the committed demo results must show (its claims in README rest on them)."""
import json
from pathlib import Path

import pytest

RUNS = Path(__file__).resolve().parents[1] / "outputs" / "demo" / "runs"
NETWORKS = [name for name in ("deq", "varnet", "e2e-varnet") if (RUNS / f"{name}-R6-teacher-seed0" / "result.json").is_file()]


def means(name: str) -> dict[str, float]:
    return json.loads((RUNS / name / "result.json").read_text())["means"]


def student(network: str, ratio: float, strategy: str, start: str = "") -> float:
    return means(f"{network}-R6-{ratio:.2f}-{strategy}{start}-seed0")[f"{network} {strategy} psnr"]


def test_the_demo_of_varnet_is_committed():
    assert "varnet" in NETWORKS


@pytest.mark.parametrize("network", NETWORKS)
def test_the_teacher_beats_both_baselines(network):
    found = means(f"{network}-R6-teacher-seed0")
    assert found[f"{network} psnr"] >= found["zero-filled psnr"] + 6
    assert found[f"{network} psnr"] >= found["cg-sense psnr"] + 1


def test_varnet_at_65_percent_keeps_the_papers_level_and_order():
    teacher = means("varnet-R6-teacher-seed0")["varnet psnr"]
    supervised, school, alone = (student("varnet", 0.40, strategy) for strategy in ("supervised", "school", "self-supervised"))
    assert supervised >= 0.96 * teacher and school >= 0.94 * teacher
    assert supervised >= school >= alone


@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_psnr_falls_as_the_ratio_grows(strategy):
    """Within 0.01 dB: supervised at 10 % and 20 % are equal to 0.001 dB."""
    values = [student("varnet", ratio, strategy) for ratio in (0.05, 0.10, 0.20, 0.40)]
    assert all(later <= earlier + 0.01 for earlier, later in zip(values, values[1:])) and values[-1] < values[0] - 0.5


def test_pruning_beats_the_random_start_under_the_same_budget():
    pruned, fresh = (json.loads((RUNS / f"varnet-R6-0.40-supervised{start}-seed0" / "result.json").read_text()) for start in ("", "-random"))
    assert pruned["means"]["varnet supervised psnr"] > fresh["means"]["varnet supervised psnr"] + 1
    assert pruned["parameters"] == fresh["parameters"] and pruned["profile"] == fresh["profile"]
