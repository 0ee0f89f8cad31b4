"""Rankings of filters: values by hand, what they leave untouched, and one sentence for each wrong one."""

import copy

import pytest
import torch
from torch import nn

from spade.basics import Batch
from spade.examples import brain
from spade.importance import IMPORTANCES, LAMP, Random, Taylor, filter_rows, fpgm, l2
from spade.losses import default_loss
from spade.models import DEQ, VarNet
from spade.models.sr import UpEDSR
from spade.pruning import group_l1, label_channels, layer_groups, prune
from spade.targets import plan


def small() -> tuple[nn.Sequential, list]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3))
    return net, [(net, torch.rand(1, 2, 8, 8), [net[3]])]


def group_of(net: nn.Module, number: int = 0):
    groups = [g for g in layer_groups(label_channels(net, (torch.rand(1, 2, 8, 8),))) if not g[2]]
    return groups[number][:2]


def test_values_by_hand():
    net, _ = small()
    members, n = group_of(net)
    rows = [net[0].weight.flatten(1), net[1].weight[:, None], net[3].weight.flatten(1)]  # out, both, in (axes swapped)
    rows = [r.detach().double() for r in rows]
    assert {(m.name, m.side) for m in members} == {("0", "out"), ("1", "both"), ("3", "in")}
    assert torch.allclose(l2(members, n), sum(r.norm(dim=1) for r in rows) / 3)
    pairs = [torch.stack([(r - r[k]).norm(dim=1).sum() for k in range(8)]) for r in rows]
    assert torch.allclose(fpgm(members, n), sum(pairs) / 3)
    squares = sum(r.square().sum(1) for r in rows) / 3
    lamp = [float(s / squares[squares >= s].sum()) for s in squares]
    assert torch.allclose(LAMP()(members, n), torch.tensor(lamp, dtype=torch.float64))


def test_fpgm_removes_the_double_and_l1_the_small():
    net, priors = small()
    with torch.no_grad():
        net[0].weight[3] = net[0].weight[5] = net[0].weight.mean(0) * 1.5  # two large, equal filters amid the others
        net[3].weight[3] = net[3].weight[5] = net[3].weight.mean(0) * 1.5
    removed = prune(net, 0.25, priors, importance="fpgm").pruning_report.groups[0].removed
    assert set(removed) == {3, 5}


def test_filters_of_grouped_and_transposed_convolutions():
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 1)
    )
    members, n = group_of(net)
    assert n == 4
    by_name = {(m.name, m.side): filter_rows(m).abs().sum(1) for m in members}
    assert torch.allclose(by_name["1", "both"], net[1].weight.double().abs().sum((1, 2, 3)))
    blocks = net[2].weight.double().abs().unflatten(0, (4, 2)).sum((1, 3, 4)).flatten()
    assert torch.allclose(by_name["2", "both"], blocks)
    for name, importance in IMPORTANCES.items():
        student = prune(net, 0.5, [(net, torch.rand(1, 2, 8, 8), [net[3]])], importance=importance)
        assert (student[1].groups, student[2].groups) == (2, 2), name


def test_the_filters_before_a_shuffle_count_with_their_mean():
    torch.manual_seed(0)
    network = UpEDSR(scale=2, features=8, num_blocks=1)
    groups = [g for g in layer_groups(label_channels(network.layers, (torch.rand(1, 3, 8, 8),))) if not g[2]]
    (members, n) = next(g[:2] for g in groups if any(len(m.channels) == 4 * g[1] for m in g[0]))
    made, read = members[0], next(m for m in members if m.side == "in")
    assert len(made.channels) == 32 and n == 8
    l1 = made.module.weight.double().abs().sum((1, 2, 3)).view(8, 4).mean(1)
    assert torch.allclose(group_l1(members, n), (l1 + read.module.weight.double().abs().sum((0, 2, 3))) / 2)


@pytest.mark.parametrize("strategy", ["supervised", "self-supervised"])
@pytest.mark.parametrize("network", ["deq", "varnet"])
def test_taylor_leaves_the_network_as_it_was(network, strategy):
    torch.manual_seed(0)
    y, A, x = brain()
    y, A, x = y[..., 16:-16, :], A, x  # the same mask on fewer rows
    A = type(A)(A.mask, A.maps[..., 16:-16, :])
    x = x[..., 16:-16, :]
    net = {
        "deq": lambda: DEQ(features=8, num_blocks=1, max_iterations=3, tolerance=0.0, gradient="jacobian-free"),
        "varnet": lambda: VarNet(num_cascades=1, channels=8, num_pools=1),
    }[network]()
    net.train()
    next(net.parameters()).requires_grad_(False)
    state, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    generator = torch.random.get_rng_state()
    batch = Batch(A(x), A, x if strategy == "supervised" else None, {})
    student = prune(net, 0.4, importance=Taylor([batch], strategy))
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items()) and net.training
    assert [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [p.requires_grad for p in student.parameters()] == flags
    scores = [s for g in student.pruning_report.groups for s in g.scores]
    assert min(scores) >= 0 and max(scores) > 0
    again = prune(net, 0.4, importance=Taylor([batch], strategy)).pruning_report.groups
    assert [g.removed for g in again] == [g.removed for g in student.pruning_report.groups]


def test_taylor_is_the_mean_square_over_measurements():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()[0].eval()

        def forward(self, y, A):
            return self.net(y)

        def priors(self):
            yield self.net, torch.rand(1, 2, 8, 8), [self.net[3]]

    model, batches = (
        Plain().eval(),
        [Batch(torch.rand(1, 2, 8, 8), nn.Identity(), torch.rand(1, 2, 8, 8), {}) for _ in "12"],
    )
    members, n = group_of(model.net)
    expected = torch.zeros(8, dtype=torch.float64)
    for batch in batches:
        loss = default_loss(model)(model(batch.y, batch.A), batch.x)
        weights = [model.net[0].weight, model.net[1].weight, model.net[3].weight]
        terms = [(w * g).double() for w, g in zip(weights, torch.autograd.grad(loss, weights))]
        expected += (terms[0].sum((1, 2, 3)).square() + terms[1].square() + terms[2].sum((1, 2, 3)).square()) / 3 / 2
    assert torch.allclose(Taylor(batches).prepare(model)(members, n), expected, rtol=1e-5)


def test_comparable_scores_are_not_rescaled_in_a_global_ranking():
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    priors = [(net, torch.rand(1, 2, 8, 8), [net[4]])]

    class Scale:
        def __init__(self, comparable):
            self.comparable = comparable

        def __call__(self, members, num_units):
            return torch.arange(1.0, num_units + 1) * (1 if members[0].name == "0" else 100)

    widths = {
        c: list(plan(net, 0.375, priors, importance=Scale(c), scope="global", floor=0.0).widths.values())
        for c in (True, False)
    }
    assert widths == {True: [2], False: [5, 5]}  # 6 of 16: all of the first group, or three of each


def test_random_depends_on_seed_and_layer_only():
    net, priors = small()
    first, again, other = (prune(net, 0.5, priors, importance=Random(s)).pruning_report.groups for s in (0, 0, 5))
    assert first == again != other
    twins = VarNet(num_cascades=2, channels=8, num_pools=1)
    groups = {g.name: g.removed for g in prune(twins, 0.5, importance="random").pruning_report.groups}
    assert len({removed for name, removed in groups.items() if name.endswith("down_sample_layers.0.layers.0")}) == 2


@pytest.mark.parametrize(
    "importance, message",
    [
        ("l3", r"unknown importance 'l3': choose one of l1, l2, lamp, fpgm, random"),
        ("taylor", r"importance 'taylor' needs measurements: use importance=spade\.importance\.Taylor\(batches\)\."),
        (3, r"importance must be a function or one of l1, .*, got 3\."),
        (lambda members, n: torch.ones(n + 1), r"importance must return 8 finite scores .* '0', got shape \(9,\)\."),
        (lambda members, n: torch.ones(n, 1), r"must return 8 finite scores for the group '0', got shape \(8, 1\)\."),
        (lambda members, n: [1.0] * n, r"must return 8 finite scores for the group '0', got \[1\.0, .*\."),
        (lambda members, n: torch.full((n,), torch.nan), r"got shape \(8,\) with NaN or infinity\."),
    ],
)
def test_a_wrong_importance_is_one_sentence_and_nothing_is_cut(importance, message):
    net, priors = small()
    before = copy.deepcopy(net.state_dict())
    for call in (prune, plan):
        with pytest.raises((ValueError, TypeError), match=message) as raised:
            call(net, 0.4, priors, importance=importance)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_taylor_without_measurements():
    with pytest.raises(ValueError, match="batches must hold at least one measurement, got none"):
        Taylor([])
    with pytest.raises(ValueError, match="unknown strategy 'school'"):
        Taylor([1], "school")
    with pytest.raises(TypeError, match="must be prepared"):
        Taylor([1])(*group_of(small()[0]))
