"""Pruning: the paper's parameter counts, eq. 6 by hand, independence of teacher and batch, bad input."""

import copy
import math
import warnings

import numpy as np
import pytest
import scipy.sparse.csgraph
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from spade.checkpoint import load, save
from spade.models import DEQ, E2EVarNet, VarNet
from spade.operators import MultiCoilMRI
from spade.pruning import (
    PRUNABLE,
    connected_components,
    count_macs,
    count_parameters,
    group_l1,
    label_channels,
    layer_groups,
    prune,
    width_after,
)

RATIOS = (0.05, 0.10, 0.20, 0.40)
COUNTS = {
    DEQ: (999_428, 878_644, 793_159, 635_311, 353_328),
    VarNet: (19_634_712, 17_567_216, 15_772_920, 12_477_088, 6_988_752),
    E2EVarNet: (20_119_610, 18_052_114, 16_257_818, 12_961_986, 7_473_650),
}


class Skips(nn.Module):
    """Two additive skips, one concatenation, a transposed convolution and a depthwise one."""

    def __init__(self, width: int = 10):
        super().__init__()
        self.head = nn.Conv2d(2, width, 3, padding=1)
        self.inner = nn.Conv2d(width, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, width, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(width, 6, 2, stride=2)
        self.tail = nn.Conv2d(width + 6, 2, 1)

    def forward(self, x):
        h = torch.relu(self.head(x))
        h = h + self.outer(torch.relu(self.inner(h)))
        u = torch.relu(self.up(F.avg_pool2d(self.depthwise(h), 2)))
        return self.tail(torch.cat([u, h], dim=1))  # `up` first: the skip's channels are shifted by six


class Foreign(nn.Module):
    """A model of somebody else's: its physics may not be called while it is pruned."""

    def __init__(self):
        super().__init__()
        self.cnn, self.step = Skips(), nn.Parameter(torch.tensor(0.5))

    def forward(self, y, A):
        raise AssertionError("the physics was traced")


def priors(model):
    cnn = model if isinstance(model, Skips) else model.cnn
    return [(cnn, torch.randn(1, 2, 8, 8), [cnn.tail])]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Skips().eval()


@pytest.mark.parametrize("network", COUNTS)
def test_parameter_counts_of_the_paper(network):
    teacher = network()
    assert count_parameters(teacher) == COUNTS[network][0]
    for ratio, expected in zip(RATIOS, COUNTS[network][1:]):
        assert count_parameters(prune(teacher, ratio)) == expected


@pytest.mark.parametrize("network, expected", [(DEQ, 2.83), (VarNet, 2.90)])
def test_multiply_accumulate_ratio(network, expected):
    report = prune(network(), 0.40).pruning_report
    assert report.macs_before / report.macs_after == pytest.approx(expected, abs=0.02)


def test_estimator_of_the_maps_is_not_pruned():
    teacher = E2EVarNet(num_cascades=1)
    student = prune(teacher, 0.40)
    untouched = teacher.state_dict().keys() - {k for k in teacher.state_dict() if k.startswith("cascades.")}
    assert len(untouched) > 10
    assert all(torch.equal(student.state_dict()[k], teacher.state_dict()[k]) for k in untouched)


def test_eq_6_by_hand(net):
    student = prune(net, 0.40, priors(net))
    W = {name: p.detach().double().abs() for name, p in net.named_parameters() if name.endswith("weight")}
    skip = (
        W["head.weight"].sum((1, 2, 3))
        + W["inner.weight"].sum((0, 2, 3))
        + W["outer.weight"].sum((1, 2, 3))
        + W["depthwise.weight"].sum((1, 2, 3))
        + W["up.weight"].sum((1, 2, 3))
        + W["tail.weight"].sum((0, 2, 3))[6:]
    ) / 6
    inner = (W["inner.weight"].sum((1, 2, 3)) + W["outer.weight"].sum((0, 2, 3))) / 2
    up = (W["up.weight"].sum((0, 2, 3)) + W["tail.weight"].sum((0, 2, 3))[:6]) / 2
    kept = {
        width: sorted(alpha.argsort(descending=True)[:n].tolist())
        for width, alpha, n in ((10, skip, 6), (8, inner, 4), (6, up, 3))
    }
    by_width = {g.before: g for g in student.pruning_report.groups}
    for width, alpha in ((10, skip), (8, inner), (6, up)):
        assert torch.allclose(torch.tensor(by_width[width].scores, dtype=torch.float64), alpha, rtol=1e-12)
        assert sorted(set(range(width)) - set(by_width[width].removed)) == kept[width]
    assert torch.equal(student.head.weight, net.head.weight[kept[10]])
    assert torch.equal(student.outer.weight, net.outer.weight[kept[10]][:, kept[8]])
    assert torch.equal(student.depthwise.bias, net.depthwise.bias[kept[10]])
    assert torch.equal(student.up.weight, net.up.weight[kept[10]][:, kept[6]])
    assert torch.equal(student.tail.weight, net.tail.weight[:, kept[6] + [6 + k for k in kept[10]]])


def test_output_unchanged_when_zero_filters_go(net):
    with torch.no_grad():
        for layer, axis, zero in (
            ("head", 0, [1, 4, 7, 9]),
            ("outer", 0, [1, 4, 7, 9]),
            ("depthwise", 0, [1, 4, 7, 9]),
            ("inner", 0, [0, 2, 5, 6]),
            ("up", 1, [3, 4, 5]),
        ):
            module = getattr(net, layer)
            module.weight[(slice(None),) * axis + (zero,)] = 0
            if module.bias is not None:
                module.bias[zero] = 0
    student, x = prune(net, 0.40, priors(net)), torch.randn(2, 2, 12, 16)
    assert {g.removed for g in student.pruning_report.groups} == {(1, 4, 7, 9), (0, 2, 5, 6), (3, 4, 5)}
    assert torch.allclose(student(x), net(x), atol=1e-6)


def test_teacher_is_untouched_bit_for_bit(net):
    net.train()
    net.head.weight.requires_grad_(False)
    before, flags = copy.deepcopy(net.state_dict()), [(p.requires_grad, p.grad) for p in net.parameters()]
    with torch.no_grad():
        student = prune(net, 0.20, priors(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in net.parameters()]
    assert (
        net.training
        and student.training
        and not student.head.weight.requires_grad
        and student.tail.weight.requires_grad
    )
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in student.parameters()}


def test_training_mode_leaves_no_trace():
    "Neither the statistics of a batch norm nor the caller's random numbers may notice, and all modes come back."
    net = nn.Sequential(
        nn.Conv2d(2, 10, 3),
        nn.BatchNorm2d(10),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3),
        nn.BatchNorm2d(8).eval(),
        nn.Conv2d(8, 2, 3),
    )
    with torch.no_grad():
        net[1].running_mean.copy_(5 + torch.arange(10))
        net[5].running_var.copy_(2 + torch.arange(8))
    net[1].num_batches_tracked.fill_(7)
    modes, generator, before = (
        [m.training for m in net.modules()],
        torch.random.get_rng_state(),
        copy.deepcopy(net.state_dict()),
    )
    student = prune(net, 0.40, [(net, torch.full((2, 2, 12, 12), 9.0), [net[6]])])
    count_macs(net, torch.full((2, 2, 12, 12), 9.0))
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [m.training for m in net.modules()] == [m.training for m in student.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for group in student.pruning_report.groups:
        layer = {10: 1, 8: 5}[group.before]
        kept = [k for k in range(group.before) if k not in group.removed]
        for name, value in student[layer].named_buffers():
            teachers = getattr(net[layer], name)
            assert torch.equal(value, teachers[kept] if teachers.ndim else teachers), (layer, name)


def test_modes_come_back_after_a_failure(net):
    net.train()
    with pytest.raises(RuntimeError):
        count_macs(net, torch.zeros(1, 3, 8, 8))
    assert all(m.training for m in net.modules())


def test_two_prunings_do_not_interact(net):
    other = Skips(12)
    alone = prune(net, 0.30, priors(net))
    prune(other, 0.50, priors(other))
    prune(net, 0.10, priors(net))
    again = prune(net, 0.30, priors(net))
    assert alone.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in alone.state_dict().items())


def test_ranking_does_not_depend_on_the_example_or_its_batch(net):
    reports = [
        prune(net, 0.40, [(net, torch.randn(b, 2, n, n), [net.tail])]).pruning_report.groups
        for b, n in ((1, 8), (2, 8), (3, 16))
    ]
    assert reports[0] == reports[1] == reports[2]


def test_student_treats_images_of_a_batch_apart(net):
    student, x = prune(net, 0.40, priors(net)), torch.randn(3, 2, 8, 8)
    assert torch.allclose(student(x), torch.cat([student(x[i : i + 1]) for i in range(3)]), atol=1e-6)


def test_foreign_model_and_its_physics():
    model = Foreign()
    student = prune(model, 0.40, priors(model))
    assert student.cnn.head.out_channels == 6 and student.cnn.tail.out_channels == 2 and student.step == model.step
    assert count_parameters(model) > count_parameters(student)


def test_kept_layers_keep_their_width(net):
    student = prune(net, 0.40, [(net, torch.randn(1, 2, 8, 8), [net.tail, net.inner])])
    assert student.inner.out_channels == 8 and student.outer.in_channels == 8 and student.head.out_channels == 6


def test_a_prior_named_twice_is_pruned_once(net):
    assert prune(net, 0.40, priors(net) * 2).head.out_channels == 6


def test_width_is_the_floor_in_exact_arithmetic():
    assert all(width_after(c, i / 1000) == c * (1000 - i) // 1000 for c in range(1, 300) for i in range(1, 1000))
    assert width_after(10, 0.1 + 0.2) == 7  # 0.1 + 0.2 > 0.3 in floating point


def test_report(net):
    student = prune(net, 0.40, priors(net))
    report = student.pruning_report
    frame = report.to_frame()
    assert set(frame["before"]) == {10, 8, 6} and (frame["largest_removed"] <= frame["smallest_kept"]).all()
    assert (report.parameters_before, report.parameters_after) == (count_parameters(net), count_parameters(student))
    assert report.macs_before == count_macs(net, torch.zeros(1, 2, 8, 8)) > report.macs_after > 0
    assert "multiply-accumulates" in str(report)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan, "0.4", None])
def test_ratio_outside_0_1(net, ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        prune(net, ratio, priors(net))


def test_ratio_that_would_empty_a_layer(net):
    report = prune(net, 0.85, priors(net)).pruning_report  # 1 of 8 and of 10 channels stay, 0 of 6 would
    assert report.kept == {"tail": "in ignored_layers", "up": "ratio 0.85 leaves none of its 6 channels"}
    with pytest.raises(ValueError, match="'up': ratio 0.99 leaves none of its 6 channels"):
        prune(net, 0.99, priors(net))


def test_group_norm_that_does_not_divide():
    net = nn.Sequential(nn.Conv2d(2, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1))
    triple = [(net, torch.zeros(1, 2, 4, 4), [net[2]])]
    assert prune(net, 0.10, triple)[1].num_channels == 12  # 14 by the rule, which 4 groups do not divide
    assert prune(net, 0.25, triple)[1].num_channels == 12
    assert prune(net, 0.80, triple)[1].num_channels == 4  # 3 by the rule, and no smaller width is even
    single = nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(8, 8), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match="'0': GroupNorm.8, 8, .* has no smaller width that it can divide evenly"):
        prune(single, 0.40, [(single, torch.zeros(1, 2, 4, 4), [single[2]])])


def test_group_norm_behind_a_concatenation():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.tail = (
                nn.Conv2d(2, 6, 1),
                nn.Conv2d(2, 10, 1),
                nn.GroupNorm(2, 16),
                nn.Conv2d(16, 2, 1),
            )

        def forward(self, x):
            return self.tail(self.norm(torch.cat([self.a(x), self.b(x)], dim=1)))

    net = Joined()  # 6 and 10 channels: one alone may be odd, if only the sum is even
    student = prune(net, 0.50, [(net, torch.zeros(1, 2, 4, 4), [net.tail])])
    assert (student.a.out_channels, student.b.out_channels, student.norm.num_channels) == (3, 5, 8)
    student = prune(net, 0.30, [(net, torch.zeros(1, 2, 4, 4), [net.tail, net.a])])
    assert (student.a.out_channels, student.b.out_channels, student.norm.num_channels) == (6, 6, 12)  # not 7 and 13


def test_model_without_priors(net):
    with pytest.raises(TypeError, match="has no priors"):
        prune(net, 0.40)
    with pytest.raises(ValueError, match="empty"):
        prune(net, 0.40, [])
    with pytest.raises(ValueError, match="not part of"):
        prune(net, 0.40, priors(Skips()))


@pytest.mark.parametrize(
    "make_priors, error, message",
    [
        (lambda net, x: net, TypeError, "priors must be a list of triples .cnn, example, ignored_layers., got a Skips"),
        (lambda net, x: 3, TypeError, "priors must be a list of triples .*, got a int"),
        (lambda net, x: (net, x, net.tail), TypeError, "an entry of priors must be a triple .*, got a Skips"),
        (lambda net, x: [(net, x)], TypeError, "must be a triple .*, got a tuple of 2"),
        (lambda net, x: [(x, net, [net.tail])], TypeError, "must be a triple .*, got a tuple of 3"),
        (
            lambda net, x: [(net, (1, 2, 8, 8), [net.tail])],
            TypeError,
            r"example of a Skips .* such as torch.zeros.shape., got \(1, 2, 8, 8\)",
        ),
        (lambda net, x: [(net, None, [net.tail])], TypeError, "example of a Skips .* got None"),
        (lambda net, x: [(net, (), [net.tail])], TypeError, "example of a Skips"),
        (
            lambda net, x: [(net, x, ["tail", 3])],
            TypeError,
            "ignored_layers of a Skips .* must be a list of modules or of their names, got .'tail', 3.",
        ),
        (
            lambda net, x: [(net, x, x)],
            TypeError,
            "ignored_layers of a Skips .* must be a list of modules or.*, got tensor",
        ),
    ],
)
def test_mistyped_priors_are_one_sentence(net, make_priors, error, message):
    with pytest.raises(error, match=message) as raised:
        prune(net, 0.40, make_priors(net, torch.randn(1, 2, 8, 8)))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_single_layer_to_keep_needs_no_list(net):
    x = torch.randn(1, 2, 8, 8)
    plain, listed = prune(net, 0.40, [(net, x, net.tail)]), prune(net, 0.40, [[net, [x], [net.tail]]])
    assert (
        plain.pruning_report.groups
        == listed.pruning_report.groups
        == prune(net, 0.40, priors(net)).pruning_report.groups
    )


def test_a_container_to_keep_means_all_layers_in_it():
    chain = nn.Sequential(
        nn.Conv2d(2, 10, 1), nn.Sequential(nn.Conv2d(10, 9, 1), nn.ReLU(), nn.Conv2d(9, 8, 1), nn.Conv2d(8, 2, 1))
    )
    student = prune(chain, 0.50, [(chain, torch.zeros(1, 2, 4, 4), chain[1])])
    assert [m.out_channels for m in student.modules() if isinstance(m, nn.Conv2d)] == [5, 9, 8, 2]


def test_a_module_without_weights_is_no_cnn():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="a ReLU named in priors must be a CNN, got a module without weights"):
        prune(net, 0.40, [(net[0], torch.zeros(1, 2, 4, 4), [])])


def test_a_kept_layer_keeps_all_that_are_added_to_it(net):
    "`outer` is added to `head`, and what reads or follows the sum is tied to it: only the two other groups are cut."
    student = prune(net, 0.40, [(net, torch.randn(1, 2, 8, 8), [net.tail, net.outer])])
    assert (
        student.head.out_channels
        == student.outer.out_channels
        == student.depthwise.out_channels
        == student.inner.in_channels
        == student.up.in_channels
        == 10
    )
    assert torch.equal(student.head.weight, net.head.weight) and torch.equal(
        student.depthwise.weight, net.depthwise.weight
    )
    assert (
        student.inner.out_channels == 4
        and student.up.out_channels == 3
        and sorted(g.before for g in student.pruning_report.groups) == [6, 8]
    )


def test_a_forgotten_output_layer_keeps_its_width(net):
    student = prune(net, 0.40, [(net, torch.randn(1, 2, 8, 8), [])])
    assert student.pruning_report.kept == {"tail": "its channels are an output"}
    assert student.pruning_report.groups == prune(net, 0.40, priors(net)).pruning_report.groups


def test_in_place_activations_hide_nothing():
    def chain(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 10, 3),
            nn.InstanceNorm2d(10),
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(10, 10, 3),
            nn.InstanceNorm2d(10),
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(10, 2, 3),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        students = [prune(m, 0.40, [(m, torch.randn(1, 2, 16, 16), [m[6]])]) for m in (chain(False), chain(True))]
    assert students[1][2].inplace and [m.num_features for m in students[1] if isinstance(m, nn.InstanceNorm2d)] == [
        6,
        6,
    ]
    assert students[0].pruning_report.groups == students[1].pruning_report.groups


def chain(*between: nn.Module) -> tuple[nn.Sequential, list]:
    "A convolution, layers behind it, and a last convolution that is kept."
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *between, nn.Conv2d(8, 3, 3, padding=1)).eval()
    return cnn, [(cnn, torch.randn(1, 3, 16, 16), [cnn[-1]])]


def test_an_activation_with_one_weight_for_all_channels(tmp_path):
    cnn, named = chain(nn.PReLU())
    student = prune(cnn, 0.25, named)
    assert (student[0].out_channels, student[1].weight.numel()) == (6, 1)
    expected = (cnn[0].weight.double().abs().sum((1, 2, 3)) + cnn[2].weight.double().abs().sum((0, 2, 3))) / 2
    assert torch.allclose(
        torch.tensor(student.pruning_report.groups[0].scores), expected.float()
    )  # the activation is no filter
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(save(student, tmp_path / "student"), build=lambda: chain(nn.PReLU())[0])(x), student(x))


def test_depthwise_transposed_convolution():
    cnn, named = chain(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8))
    student = prune(cnn, 0.25, named)
    (group,) = student.pruning_report.groups
    stays = [k for k in range(8) if k not in group.removed]
    assert student[1].groups == student[1].out_channels == 6 and torch.equal(student[1].weight, cnn[1].weight[stays])
    sums = (
        cnn[0].weight.double().abs().sum((1, 2, 3)),
        cnn[1].weight.double().abs().sum((1, 2, 3)),
        cnn[2].weight.double().abs().sum((0, 2, 3)),
    )
    assert torch.allclose(torch.tensor(group.scores), (sum(sums) / 3).float())


def test_report_of_a_frozen_network(net):
    student = prune(net.requires_grad_(False), 0.40, priors(net))
    assert student.pruning_report.parameters_before == sum(p.numel() for p in net.parameters()) and "parameters" in str(
        student.pruning_report
    )


def test_cnns_that_share_layers_are_not_cut_twice(net):
    inside = nn.Sequential(net.inner, net.outer)
    net.inside = inside
    with pytest.raises(ValueError, match="share layers, which would be cut twice"):
        prune(net, 0.25, [*priors(net), (inside, torch.randn(1, 10, 8, 8), [inside[1]])])


def test_one_parameter_of_two_layers_is_not_parted():
    cnn, named = chain(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    cnn[4].weight = cnn[2].weight
    with pytest.raises(ValueError, match="'2': another layer has the same weights"):
        prune(cnn, 0.25, named)
    wide = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1), cnn)
    student = prune(wide, 0.25, [(wide, named[0][1], [cnn[-1]])])  # only those outside of them are cut
    assert student[4][2].weight is student[4][4].weight and student[0].out_channels == student[2].out_channels == 6
    used_twice = nn.Sequential(cnn[0], cnn[2], nn.ReLU(), cnn[2], cnn[6])
    student = prune(used_twice, 0.25, [(used_twice, named[0][1], [cnn[6]])])
    assert student[1] is student[3] and student[1].out_channels == 6


def test_a_cnn_of_several_outputs_keeps_them_all(net):
    class Pair(Skips):
        def forward(self, x):
            return x, super().forward(x)

    pair = Pair()
    student, (image, expected) = prune(pair, 0.25, priors(pair)), pair(torch.ones(1, 2, 8, 8))
    assert torch.equal(student(image)[0], image) and student(image)[1].shape == expected.shape


def test_what_breaks_by_the_cut_is_one_sentence():
    cnn, named = chain(nn.LayerNorm([8, 16, 16]))
    with pytest.raises(ValueError, match="no layer can be cut .'0': '1' normalises several axes"):
        prune(cnn, 0.25, named)


@pytest.mark.filterwarnings("ignore:relative step of the DEQ")  # three iterations
@pytest.mark.parametrize("network", [DEQ, VarNet, E2EVarNet])
def test_pruned_networks_reconstruct(tmp_path, network):
    arguments = (
        dict(features=10, num_blocks=1, max_iterations=3)
        if network is DEQ
        else dict(num_cascades=2, channels=5, num_pools=2)
    )
    student = prune(network(**arguments), 0.40).eval()
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 3, 32, 32, dtype=torch.complex64, generator=generator)
    A = MultiCoilMRI(torch.arange(32) % 2 < 1, maps / maps.abs().square().sum(1, keepdim=True).sqrt())
    y = A(torch.randn(1, 1, 32, 32, dtype=torch.complex64, generator=generator))
    with torch.no_grad():
        x_hat = student(y, A)
        assert (
            x_hat.shape == (1, 1, 32, 32)
            and x_hat.dtype == torch.complex64
            and x_hat.isfinite().all()
            and x_hat.abs().max() > 0
        )
        assert torch.equal(load(save(student, tmp_path / "student"))(y, A), x_hat)


@pytest.mark.parametrize(
    "network", [lambda: DEQ(features=16, num_blocks=3), lambda: VarNet(1, channels=6, num_pools=3)]
)
def test_groups_are_those_of_torch_pruning(network):
    """DepGraph of Torch-Pruning, which the paper uses, finds the same layers and the same eq. 6."""
    cnn, example, ignored = next(iter(network().priors()))
    channels = label_channels(cnn, (example,) if isinstance(example, torch.Tensor) else tuple(example))
    ours = {frozenset(m.name for m in members): members for members, _, why in layer_groups(channels) if not why}
    graph = tp.DependencyGraph().build_dependency(cnn, example)
    theirs = list(graph.get_all_groups(ignored_layers=list(ignored), root_module_types=list(PRUNABLE)))
    names, importance = dict(cnn.named_modules()), tp.importance.GroupMagnitudeImportance(p=1, normalizer=None)
    assert len(ours) == len(theirs) > 3
    for group in theirs:
        members = ours[frozenset(n for dep, _ in group if (n := graph._module2name.get(dep.target.module)) in names)]
        expected = importance(group).double().sort().values
        assert torch.allclose(group_l1(members, len(expected)).sort().values, expected, rtol=1e-4)


def test_layers_by_name_and_other_ratios(net):
    by_name = prune(net, 0.40, [(net, torch.randn(1, 2, 8, 8), ["ta*"])])
    assert by_name.pruning_report.groups == prune(net, 0.40, priors(net)).pruning_report.groups
    model = Foreign()
    student = prune(model, 0.40, priors(model), ignored_layers=["cnn.inn*"], ratios={"cnn.up": 0.5, "cnn.head": 0.2})
    assert (student.cnn.inner.out_channels, student.cnn.up.out_channels, student.cnn.head.out_channels) == (8, 3, 8)
    assert prune(model, 0.40, priors(model), ratios={"cnn": 0.2, "*.up": 0.1}).cnn.up.out_channels == 5  # the smaller
    for arguments in (dict(ignored_layers=["cnn.tial"]), dict(ratios={"cnn.tial": 0.2})):
        with pytest.raises(ValueError, match="a layer of Foreign must have a name such as .*, got 'cnn.tial'"):
            prune(model, 0.40, priors(model), **arguments)
    with pytest.raises(ValueError, match="between 0 and 1, both excluded, got 2"):
        prune(model, 0.40, priors(model), ratios={"cnn": 2})


@pytest.mark.parametrize("edges", (0, 1, 30, 400))
@pytest.mark.parametrize("chain", (False, True))
def test_connected_components_are_scipys(edges, chain):
    """Of random graphs, and of one long chain in random order, with the same numbers."""
    rng = np.random.default_rng(edges)
    a, b = rng.permutation(500)[None, : edges + 1].repeat(2, 0) if chain else rng.integers(500, size=(2, edges))
    a, b = (a[:-1], b[1:]) if chain else (a, b)
    graph = scipy.sparse.coo_array((np.ones(len(a)), (a, b)), shape=(500, 500))
    expected = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    assert connected_components(torch.from_numpy(np.stack([a, b])), 500).tolist() == expected.tolist()
