"""The printed numbers of FMP, the settings of its experiments, and their runs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from spade.fmp import fmp_numbers
from spade.fmp_runs import (
    FmpRun,
    FmpSettings,
    criteria_runs,
    fmp_costs,
    fmp_files,
    fmp_milliseconds,
    fmp_network,
    fmp_run_folder,
    fmp_table,
    load_fmp,
    make_fmp_run,
    method_runs,
    read_fmp_runs,
    readable_fmp_table,
    uniform_width,
)
from spade.meta_pruning import CRITERIA
from spade.pruning import count_macs, count_parameters

ROOT = Path(__file__).resolve().parents[1]
TINY_STEPS = dict(steps=30, search_steps=10, check_every=2, batch_size=2, crop=12, targets=(0.3,), seeds=(0,))
TINY = FmpSettings(arguments=dict(features=12, num_blocks=1, tail="direct"), side=48, limit=1, **TINY_STEPS)


def test_printed_numbers_with_and_without_misprints():
    assert fmp_numbers(table=4, method="IMDN", scale=4, dataset="Set5", quantity="psnr")["corrected"].item() == 32.21
    assert fmp_numbers(table=4, method="LatticeNet", scale=4, dataset="B100")["corrected"].dropna().item() == 27.57
    unknown = fmp_numbers(table=4, method="FMP", scale=4, dataset="Set5", quantity="psnr").iloc[0]
    assert unknown["misprint"] and unknown["corrected"] != unknown["corrected"], "not a number: nobody knows it"
    assert set(fmp_numbers(table=3)["criterion"]) == set(CRITERIA)
    assert fmp_numbers(table=4, method="FMP", scale=2, dataset="Set5", quantity="psnr")["value"].item() == 38.17


def test_targets_of_20_percent_and_dhps_slack_explain_where_all_rows_of_table_3_stopped():
    """Just past 18 % (or 38 % in all) of the other metric than the printed one, or of both."""
    table = fmp_numbers(table=3).query("quantity != 'psnr'")
    shares = table.pivot(index=["metric", "criterion"], columns="quantity", values="value")
    for printed, unit in (("params", "flops"), ("flops", "params")):
        rows = shares.loc[printed]
        channels, weights = rows[f"channels_{unit}"], rows[f"weights_{unit}"]
        assert 18 <= channels["channel"] < 18.6 and 18 <= weights["weight"] < 18.3
        assert 18 <= weights["total-fixed"] < 18.4 and 18 <= channels["total-fixed"] < 20
        assert 38 <= channels["total"] + weights["total"] < 38.5


RESULTS = ROOT / "outputs" / "demo" / "fmp_runs.csv"


@pytest.mark.skipif(not RESULTS.is_file(), reason=f"{RESULTS} is missing: make demo NETWORK=edsr-sr writes it")
def test_the_committed_demo_is_as_good_as_asked_for():
    """Not better than other methods: there is no sure winner."""
    runs, slack = pd.read_csv(RESULTS), load_fmp("demo").slack
    runs = runs[(runs["method"] == "fmp") & (runs["criterion"] == "total") & (runs["steps"] == load_fmp("demo").steps)]
    assert (runs["psnr_bicubic scikit-image"] - 32.02).abs().max() < 0.005
    gain = runs["psnr scikit-image"] - runs["psnr_bicubic scikit-image"]
    reached = (runs["flops_c"] + runs["flops_w"]) / 100 - runs["target"] + slack
    for target, least in ((0.4, 1.0), (0.8, 0.8)):
        assert (runs["target"] == target).any() and gain[runs["target"] == target].min() >= least
    assert (runs["metric"] == "flops").all() and reached.between(0, 0.04).all()


@pytest.mark.parametrize("name", ("demo", "smoke", "sr", "gpu", "paper", "block"))
def test_every_configuration_builds_its_network_and_names_its_runs(name):
    settings = load_fmp(name)
    with torch.device("meta"):
        assert count_parameters(fmp_network(settings)) > 0
    runs = [*criteria_runs(settings), *method_runs(settings)]
    compared = criteria_runs(settings)
    assert {run.criterion for run in compared} == set(CRITERIA) and settings.search_steps < settings.steps
    assert {run.metric for run in compared} == {"params", "flops"} and len(compared) == (4 if name == "smoke" else 8)
    assert all(run.teacher is None or run.teacher in runs for run in runs)
    if name == "demo":
        assert [uniform_width(settings, target) for target in settings.targets] == [25, 14]


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: load_fmp("dmeo"), r"unknown config 'dmeo': choose one of block, demo, gpu, .*did you mean demo\?"),
        (lambda: FmpRun("dhp"), "unknown method 'dhp': choose one of unpruned, l1, small, channels, fmp"),
        (lambda: FmpRun(criterion="all"), "unknown criterion 'all': choose one of channel, weight"),
        (lambda: FmpRun(metric="macs"), "unknown metric 'macs': choose one of params, flops"),
    ),
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_is_made_once_and_again_for_other_settings(tmp_path):
    run = FmpRun("fmp", 0.3)
    record = make_fmp_run(run, TINY, tmp_path)
    assert make_fmp_run(run, TINY, tmp_path)["seconds"] == record["seconds"]
    shorter = TINY.model_copy(update={"steps": 20})
    assert make_fmp_run(run, shorter, tmp_path)["steps"] == 20
    assert [path.name for path in fmp_run_folder(run, tmp_path).iterdir() if path.is_dir()] == []
    json.dumps(record)


def test_l1_needs_its_unpruned_network_and_the_table_shows_both(tmp_path):
    run = FmpRun("l1", 0.3)
    with pytest.raises(FileNotFoundError, match="needs the network of unpruned-seed0: make that run first"):
        make_fmp_run(run, TINY, tmp_path)
    make_fmp_run(run.teacher, TINY, tmp_path)
    record = make_fmp_run(run, TINY, tmp_path)
    width = uniform_width(TINY, 0.3)
    assert record["params"] == record["params_dense"] == count_parameters(fmp_network(TINY, features=width))
    runs = read_fmp_runs(tmp_path)
    table = fmp_table(runs, [run.teacher, run, dataclasses.replace(run, method="small")])
    assert list(table["method"]) == ["unpruned", "l1"] and list(table["seeds"]) == [1, 1]
    assert table["psnr scikit-image"].notna().all() and (table["psnr_bicubic scikit-image"].nunique() == 1)


def test_non_zero_costs_are_counted_by_hand():
    torch.manual_seed(0)
    network = fmp_network(TINY.model_copy(update={"arguments": dict(features=8, num_blocks=1, tail="sub-pixel")}))
    first, last = network.layers[0], network.layers[-1]
    with torch.no_grad():
        first.weight[0], last.weight[:, 1] = 0, 0
    costs = fmp_costs(network, TINY)
    assert costs["params_dense"] - costs["params"] == 27 + 27
    assert costs["flops_dense"] == count_macs(network, torch.zeros(1, 3, 64, 64))
    assert costs["flops_dense"] - costs["flops"] == 27 * 64**2 + 27 * 128**2


@pytest.mark.parametrize("missing", ("BSDS500_train", "Set14", "B100"))
def test_a_missing_folder_is_named_with_its_place_before_the_first_step(tmp_path, missing, monkeypatch):
    """The profile `sr`, in a folder with the user's copies but one."""
    settings = load_fmp("sr")
    assert settings.train == "data/sr/BSDS500_train" and list(settings.test) == ["Set5", "Set14", "B100"]
    for name in {"BSDS500_train", "Set5", "Set14", "B100"} - {missing}:
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
    place = lambda folder: str(tmp_path / Path(folder).name)
    test = {name: tuple(map(place, folders)) for name, folders in settings.test.items()}
    settings = settings.model_copy(update=TINY_STEPS | {"train": place(settings.train), "test": test})
    sentence = f"{tmp_path / missing} must be a folder, got none: put or link your copy there (data/README.md)."
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(sentence)}$"):
        make_fmp_run(FmpRun("unpruned", 0.0), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / missing).mkdir()
    with pytest.raises(FileNotFoundError, match="must hold an image .*, got none: put or link your copy there"):
        fmp_files(settings)
    Image.new("RGB", (64, 64)).save(tmp_path / missing / "b.png")
    assert {name: len(files) for name, files in fmp_files(settings).items()} == {
        "": 1,
        "Set5": 1,
        "Set14": 1,
        "B100": 1,
    }


def test_times_are_measured_in_turns_and_tables_are_readable(tmp_path):
    runs = [FmpRun("unpruned", 0.0), FmpRun("fmp", 0.3)]
    for run in runs:
        make_fmp_run(run, TINY, tmp_path)
    found = read_fmp_runs(tmp_path)
    times = fmp_milliseconds(found, 2, tmp_path)
    assert list(found["run"]) == ["fmp-0.30-total-flops-seed0", "unpruned-seed0"] and len(times) == 2 and min(times) > 0
    table = fmp_table(found.assign(milliseconds=times), runs)
    shown = readable_fmp_table(table, TINY)
    assert list(shown["network"]) == ["bicubic", "unpruned", "FMP 30 % total, flops"] and "milliseconds" in shown
    assert shown.loc[1, ["Kept %", "Kept dense %"]].tolist() == [100, 100]
    assert shown.loc[2, "Kept %"] < shown.loc[2, "Kept dense %"] < 100
    assert 30 <= shown.loc[2, ["FLOPs γ_C %", "FLOPs γ_W %"]].sum() < 60
    for name in ("psnr", "ssim"):
        quality = shown[f"{name.upper()} scikit-image"].tolist()
        assert quality == [table[f"{name}_bicubic scikit-image"].mean(), *table[f"{name} scikit-image"]]


def dry_run(target: str, config: str) -> dict[str, str]:
    """The jobs of a target in an empty folder of results, by rule."""
    command = [sys.executable, "-m", "snakemake", target, "-n", "--quiet", "rules", "--cores", "1"]
    command += ["--configfile", f"config/{config}.yaml", "--config", "results=outputs/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(re.findall(r"(?m)^(\S+) +(\d+)$", done.stdout + done.stderr))


@pytest.mark.parametrize("target, config, count", (("demo_edsr-sr", "smoke", 8), ("fmp", "sr", 23)))
def test_the_workflow_plans_every_run(target, config, count):
    """The criteria in their metrics, and the methods; three tables, a figure and their page. `sr`: without its data."""
    jobs, settings = dry_run(target, config), load_fmp(config)
    runs = {run.name for run in [*criteria_runs(settings), *method_runs(settings)]}
    assert sum(int(jobs.get(rule, 0)) for rule in ("fmp_longest", "fmp_run")) == len(runs) == count
    reports = ("fmp_table_2", "fmp_table_3", "fmp_table_4", "fmp_figure_1", "fmp_page", target)
    assert all(jobs[name] == "1" for name in reports) and set(jobs) - {"fmp_longest", "fmp_run", "total"} == {*reports}
