"""Networks of many families are pruned and proven by an oracle of their own; `python tests/zoo.py` runs all of them."""

import copy
import warnings

import pytest
import torch
import zoo
from torch import nn

from spade import find_priors, prune

PACKAGES = """deepinv DnCNN; deepinv UNet; deepinv DRUNet; deepinv unfolded PGD; deepinv MoDL; deepinv ArtifactRemoval;
monai UNet; monai AttentionUnet; monai BasicUNet; monai VariationalNetworkModel; fastMRI Unet; fastMRI VarNet"""
NAMES = [name for name, (_, package) in zoo.ZOO.items() if package in ("torch", "spade")]
NAMES += [" ".join(name.split()) for name in PACKAGES.split(";")]


@pytest.fixture(scope="module")
def rows():
    """The lines of the table for the networks that need only torch, and for some of other packages."""
    with warnings.catch_warnings(action="ignore"):
        return [zoo.judge(name) for name in NAMES]


def test_no_network_is_pruned_wrongly_or_crashes(rows):
    assert not [str(row) for row in rows if row.result in ("wrong", "crash", "broken")]


def test_at_least_85_percent_are_pruned(rows):
    ran = [row for row in rows if row.result != "absent"]
    assert len(ran) >= 40
    refused = [str(row) for row in ran if row.result != "proven"]
    assert len(refused) <= 0.15 * len(ran), refused


def test_a_refusal_is_one_sentence(rows):
    for row in (row for row in rows if row.result == "refused"):
        assert row.remark.endswith(".") and "\n" not in row.remark and len(row.remark) > 20


def test_the_table_has_one_line_per_network(rows):
    columns = zoo.HEAD.splitlines()[0].count("|")
    assert all(str(row).count("|") == columns for row in rows)
    assert zoo.summary(rows).startswith(f"{sum(row.result != 'absent' for row in rows)} networks: ")


# The oracle itself


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model, inputs = zoo.ZOO["U-Net, batch norm"][0]()
    zoo.randomise(model.eval())
    return model, prune(model, 0.4, find_priors(model, inputs)), inputs


def test_the_oracle_accepts_an_exact_student(pruned):
    error, change = zoo.difference(*pruned)
    assert error < 1e-12 and change > 0.01


@torch.no_grad()
def swap(layer):
    layer.weight[:2] = layer.weight[[1, 0]]


@pytest.mark.parametrize("layer", ["down.0.0", "up_blocks.1.3", "ups.0"])
def test_the_oracle_sees_another_function(pruned, layer):
    teacher, student, inputs = pruned
    swap(student.get_submodule(layer))
    error, change = zoo.difference(teacher, student, inputs)
    assert error > 10 * zoo.TOLERANCE
    student.get_submodule(layer).bias.data.mul_(1.1)
    with pytest.raises(AssertionError, match="not found"):
        zoo.difference(teacher, student, inputs)


def test_the_oracle_sees_channels_cut_at_the_wrong_place():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)).eval()
    student = copy.deepcopy(teacher)
    student[0].weight, student[0].bias = nn.Parameter(teacher[0].weight[:5]), nn.Parameter(teacher[0].bias[:5])
    student[2].weight = nn.Parameter(teacher[2].weight[:, :5])
    assert zoo.difference(teacher, student, torch.rand(1, 1, 9, 9))[0] < 1e-12
    student[2].weight = nn.Parameter(teacher[2].weight[:, 3:])
    assert zoo.difference(teacher, student, torch.rand(1, 1, 9, 9))[0] > 1e-2


def test_a_kept_part_is_found_by_its_values():
    numbers = torch.arange(24.0).view(4, 6)
    assert zoo.positions(numbers, numbers[[0, 3]][:, [1, 2, 5]]) == [[0, 3], [1, 2, 5]]
    assert zoo.positions(numbers[0], numbers[0, [1, 4]]) == [[1, 4]]
    with pytest.raises(AssertionError, match="is not found"):
        zoo.positions(numbers, numbers[:2] + 100)
