"""Targets of pruning: exact widths, reached targets, what stays correct, and one sentence for each impossible wish."""

import copy
import math

import pytest
import torch
from small_networks import Net
from torch import nn

import spade.targets
from spade.examples import brain
from spade.models import DEQ, USRNet, VarNet
from spade.models.sr import UpEDSR
from spade.pruning import count_macs, count_parameters, prune
from spade.targets import plan


def image(channels: int = 2) -> torch.Tensor:
    return torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))


def chain(*widths: int) -> tuple[nn.Sequential, list]:
    """Convolutions of these widths with activations between them, and its priors."""
    torch.manual_seed(0)
    ends = [2, *widths, 2]
    layers = [layer for a, b in zip(ends, ends[1:]) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())][:-1]
    net = nn.Sequential(*layers)
    return net, [(net, image(), [net[-1]])]


def out_channels(net: nn.Module) -> list[int]:
    return [m.out_channels for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


def zeroed(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher with zeros where the report says that channels were removed."""
    copied = copy.deepcopy(teacher)
    for group in student.pruning_report.groups:
        prefix = group.name.rsplit(dict(group.layers) and group.layers[0][0], 1)[0]
        for name, side in group.layers:
            layer = copied.get_submodule(prefix + name)
            if side in ("out", "both") and group.before == layer.weight.shape[0]:
                for tensor in filter(lambda t: t is not None, (layer.weight, layer.bias)):
                    tensor.data[list(group.removed)] = 0
    return copied


# Multiples


@pytest.mark.parametrize(
    "ratio, round_to, widths",
    [
        (0.40, 1, [38, 57, 3]),
        (0.40, 8, [40, 56, 3]),
        (0.40, 16, [32, 64, 3]),
        (0.20, 8, [48, 80, 4]),  # 51 and 76, halfway between 72 and 80: upwards
        (0.10, 16, [64, 80, 5]),  # 57 and 86
        (0.85, 8, [8, 16, 6]),  # 9 and 14; the paper's rule leaves none of 6
    ],
)
def test_nearest_multiples_and_narrow_groups_by_the_papers_rule(ratio, round_to, widths):
    net, priors = chain(64, 96, 6)
    student = prune(net, ratio, priors, round_to=round_to) if round_to > 1 else prune(net, ratio, priors)
    assert out_channels(student) == [*widths, 2]
    report, notes = student.pruning_report, [g.note for g in student.pruning_report.groups]
    if (ratio, round_to) == (0.40, 8):
        assert notes == ["40 instead of 38 for multiples of 8", "56 instead of 57 for multiples of 8", ""]
        assert report.asked == {"round_to": 8} and "round_to=8" in str(report)
    if (ratio, round_to) == (0.10, 16):
        assert report.kept["0"] == "its nearest multiple of 16 is its width, 64"


def test_every_width_of_the_networks_is_a_multiple():
    torch.manual_seed(0)
    for network in (
        VarNet(num_cascades=1, channels=16, num_pools=2),
        DEQ(features=32, num_blocks=1),
        USRNet(iterations=1, widths=(16, 32, 32, 64), blocks=1),
    ):
        student = prune(network, 0.40, round_to=8)
        inner = [g for g in student.pruning_report.groups]
        assert len(inner) >= 2 and all(g.after % 8 == 0 for g in inner), network
        assert {type(m) for m in student.modules()} == {type(m) for m in network.modules()}


def test_widths_of_the_papers_varnet():
    """18, 36, 72, 144, 288 at the four ratios; of 16, the narrowest group becomes 16."""
    networks = VarNet(num_cascades=1)
    found = {(r, n): sorted({*plan(networks, r, round_to=n).widths.values()}) for r in (0.05, 0.40) for n in (8, 16)}
    assert found[0.40, 8] == [8, 24, 40, 88, 176] and found[0.40, 16] == [16, 48, 80, 176]
    assert found[0.05, 8] == [16, 32, 136, 272]  # 68 of 72 is halfway and stays 72


def test_group_norm_divides_the_multiple():
    net = nn.Sequential(nn.Conv2d(2, 48, 1), nn.GroupNorm(6, 48), nn.Conv2d(48, 2, 1))
    student = prune(net, 0.40, [(net, image(), [net[2]])], round_to=8)
    assert student[1].num_channels == 24  # 28 by the rule; 24 and 48 are multiples of 8 and 6
    net = nn.Sequential(nn.Conv2d(2, 32, 1), nn.GroupNorm(4, 32), nn.Conv2d(32, 2, 1))
    assert prune(net, 0.40, [(net, image(), [net[2]])], round_to=8)[1].num_channels == 16


def test_depthwise_and_grouped_convolutions():
    net = nn.Sequential(nn.Conv2d(2, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 2, 1))
    student = prune(net, 0.40, [(net, image(), [net[3]])], round_to=8)
    assert (student[0].out_channels, student[1].groups, student[3].in_channels) == (16, 16, 16)
    net = nn.Sequential(nn.Conv2d(2, 32, 1), nn.Conv2d(32, 32, 1, groups=8), nn.ReLU(), nn.Conv2d(32, 2, 1))
    student = prune(net, 0.20, [(net, image(), [net[3]])], round_to=8)
    assert (student[0].out_channels, student[1].groups, student[1].out_channels) == (24, 6, 24)  # 6 blocks of 4


def test_multiples_before_and_behind_a_pixel_shuffle():
    torch.manual_seed(0)
    teacher = UpEDSR(scale=2, features=24, num_blocks=1)
    student = prune(teacher, 0.40, round_to=8)
    widths = {g.name: (g.before, g.after) for g in student.pruning_report.groups}
    assert set(widths.values()) == {(24, 16), (96, 64)}


@pytest.mark.parametrize("wishes", [dict(ratio=0.4, round_to=8), dict(target_macs=0.5), dict(target_params=0.5)])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_students_equal_the_teacher_with_zero_filters(wishes, scope):
    net, priors = chain(24, 40, 16)
    student = prune(net, priors=priors, scope=scope, **wishes)
    assert count_parameters(student) < count_parameters(net)
    assert torch.allclose(student(image()), zeroed(net, student)(image()), atol=1e-6)


# Targets


@pytest.mark.parametrize("name", ["target_params", "target_macs"])
@pytest.mark.parametrize("more", [{}, {"round_to": 4}, {"scope": "global"}])
def test_the_least_ratio_that_reaches_a_target(name, more):
    net, priors = chain(24, 40, 16)
    report = (student := prune(net, priors=priors, **{name: 0.6}, **more)).pruning_report
    removed = {
        "target_params": 1 - count_parameters(student) / count_parameters(net),
        "target_macs": 1 - count_macs(student, image()) / count_macs(net, image()),
    }
    assert report.asked[name] == 0.6 and report.achieved[name] == pytest.approx(removed[name]) and removed[name] >= 0.6
    assert f"{name}=0.6 asked, {removed[name]:.4g} achieved" in str(report)
    if not more:
        less = prune(net, report.ratio - 0.0002, priors).pruning_report
        counts = (
            (less.parameters_before, less.parameters_after) if "params" in name else (less.macs_before, less.macs_after)
        )
        assert 1 - counts[1] / counts[0] < 0.6
        assert out_channels(student) == out_channels(prune(net, report.ratio, priors))


def test_a_found_ratio_keeps_the_ratios_of_some_layers():
    net, priors = chain(32, 32, 32)
    student = prune(net, priors=priors, target_macs=0.5, ratios={"2": 0.125})
    assert student[2].out_channels == 28 and student[0].out_channels == student[4].out_channels < 20


def test_speed_up_by_the_costs_of_a_block_machine(monkeypatch):
    """A machine that computes channels in blocks of 16: the time grows with the rounded widths."""

    def seconds(net):
        width = [math.ceil(w / 16) for w in [2, *out_channels(net)]]
        return sum(a * b for a, b in zip(width, width[1:]))

    calls = []

    def fake(before, after, inputs, device, repeats=5):
        calls.append(out_channels(after))
        return seconds(before) / seconds(after)

    monkeypatch.setattr(spade.targets, "speed_up", fake)
    net, priors = chain(64, 64, 64)
    student = prune(net, priors=priors, target_speedup=2.0, inputs=image())
    report = student.pruning_report
    assert out_channels(student) == [32, 32, 32, 2] or report.achieved["target_speedup"] >= 2
    assert report.achieved["target_speedup"] == seconds(net) / seconds(student) >= 2.0
    assert len({tuple(c) for c in calls}) > 4, "several ratios and roundings were measured"
    aligned = prune(net, priors=priors, target_speedup=2.0, inputs=image(), round_to=16)
    assert out_channels(aligned) == [32, 32, 32, 2]  # 48: 40 / 24 blocks; 32: 40 / 12
    with pytest.raises(ValueError, match=r"target_speedup must be at most 10.00 on this machine, .*, got 100\."):
        prune(net, priors=priors, target_speedup=100.0, inputs=image())


def test_a_speed_up_is_measured_and_reported():
    net, priors = chain(96, 96, 96)
    student = prune(net, priors=priors, target_speedup=1.2, inputs=torch.rand(1, 2, 64, 64), repeats=3)
    report = student.pruning_report
    assert report.asked["target_speedup"] == 1.2 and 0 < report.achieved["target_speedup"] < math.inf
    assert "target_speedup=1.2 asked" in str(report) and count_parameters(student) < count_parameters(net)


def test_a_network_without_priors_is_measured_on_the_inputs_that_find_its_cnns():
    net, _ = chain(16, 16)
    student = prune(net, inputs=image(), target_macs=0.5)
    assert student.pruning_report.achieved["target_macs"] >= 0.5 and student(image()).shape == image().shape


# Global ranking and floors


def test_global_ranking_removes_the_smallest_relative_scores():
    net, priors = chain(8, 8)
    with torch.no_grad():
        net[0].weight[:5] *= 1e-3
        net[2].weight[:, :5] *= 1e-3
    student = prune(net, 0.25, priors, scope="global", floor=0.0)  # 4 of 16 units
    assert out_channels(student) == [4, 8, 2] and student.pruning_report.groups[0].removed[-1] < 5
    assert student.pruning_report.kept["2"] == "nothing of it is removed"
    assert out_channels(prune(net, 0.25, priors)) == [6, 6, 2]


def test_a_floor_protects_each_group():
    net, priors = chain(8, 8)
    with torch.no_grad():
        net[0].weight *= 1e-3
        net[0].weight[0] *= 1e3  # relative scores of all others are small
        net[2].weight[:, 1:] *= 1e-3
    assert out_channels(prune(net, 0.45, priors, scope="global", floor=0.0))[0] == 1
    assert out_channels(prune(net, 0.45, priors, scope="global", floor=0.5))[0] == 4
    assert out_channels(prune(net, 0.75, priors, floor=0.5)) == [4, 4, 2]


def test_a_cnn_that_a_global_ranking_leaves_whole():
    pair = nn.ModuleDict({"a": chain(8)[0], "b": chain(8)[0]})
    pair.forward = None  # not called as a whole
    with torch.no_grad():
        pair["a"][0].weight[:4] *= 1e-3
        pair["a"][2].weight[:, :4] *= 1e-3
    priors = [(pair[name], image(), [pair[name][2]]) for name in pair]
    report = prune(pair, 0.25, priors, scope="global").pruning_report
    assert [g.name for g in report.groups] == ["a.0"] and report.kept["b.0"] == "nothing of it is removed"
    assert report.macs_before - report.macs_after == 4 * 256 * 9 * 4  # of "a" alone


# Previews, exact widths and steps


def test_a_preview_is_what_prune_does_and_cuts_nothing():
    net, priors = chain(24, 40, 16)
    before = copy.deepcopy(net.state_dict())
    for wishes in (dict(ratio=0.4), dict(ratio=0.4, round_to=8), dict(target_macs=0.7, scope="global")):
        preview, student = plan(net, priors=priors, **wishes), prune(net, priors=priors, **wishes)
        assert [preview.widths[name] for name in ("0", "2", "4")] == out_channels(student)[:3]
        assert preview.parameters == count_parameters(student) and preview.macs == count_macs(student, image())
        assert out_channels(prune(net, priors=priors, widths=preview.widths)) == out_channels(student)
        assert f"{preview.parameters:,}" in repr(preview)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    frame = plan(net, 0.4, priors, ignored_layers=["4"], round_to=8).to_frame()
    assert list(frame.columns) == ["group", "before", "after", "removed", "note"] and frame["after"].tolist()[:2] == [
        16,
        24,
    ]


def test_steps_end_at_the_widths_of_one_cut_with_the_teachers_weights():
    net, priors = chain(24, 40, 16)
    seen = []
    student = prune(net, 0.4, priors, steps=3, finetune=lambda network: seen.append(out_channels(network)))
    once = prune(net, 0.4, priors)
    assert out_channels(student) == out_channels(once) == [14, 24, 9, 2]
    assert seen == [[21, 35, 14, 2], [17, 29, 11, 2]]
    report = student.pruning_report
    assert report.parameters_before == count_parameters(net) and report.parameters_after == count_parameters(once)
    assert (report.macs_before, report.macs_after) == (count_macs(net, image()), count_macs(once, image()))
    kept = [k for k in range(24) if k not in report.groups[0].removed]
    assert torch.equal(student[0].weight, net[0].weight[kept])
    assert torch.allclose(student(image()), zeroed(net, student)(image()), atol=1e-6)


def test_fine_tuning_between_steps_changes_the_ranking():
    net, priors = chain(8)

    def finetune(network):
        with torch.no_grad():
            network[0].weight[-1] = network[2].weight[:, -1] = 0

    last = prune(net, 0.5, priors, steps=2, finetune=finetune).pruning_report.groups[0].removed
    assert (max(last) == 7) or 7 in prune(net, 0.25, priors).pruning_report.groups[0].removed
    assert len(last) == 4


# Refusals


@pytest.mark.parametrize(
    "wishes, message",
    [
        (dict(ratio=0.4, round_to=0), r"round_to must be a whole number of at least 1, got 0\."),
        (dict(ratio=0.4, round_to=2.5), r"round_to must be a whole number of at least 1, got 2\.5\."),
        (dict(ratio=0.4, round_to=True), r"round_to must be a whole number of at least 1, got True\."),
        (dict(ratio=0.4, round_to=64), r"round_to must be at most 40, the width of the widest group, got 64\."),
        (dict(ratio=0.4, target_macs=0.5), r"the target must be one of .*, got ratio and target_macs\."),
        (dict(target_params=0.4, target_macs=0.5), r"the target must be .*, got target_params and target_macs\."),
        (dict(round_to=8), r"the target must be one of .*, got none\."),
        (dict(target_speedup=2.0), r"inputs must be those of one call of the network .*, got None\."),
        (dict(target_speedup=1.0, inputs=0), r"target_speedup must be a number above 1, got 1\.0\."),
        (dict(target_macs=1.0), r"target_macs must be a number between 0 and 1, both excluded, got 1\.0\."),
        (dict(target_params="half"), r"target_params must be a number between 0 and 1, both excluded, got 'half'\."),
        (
            dict(target_macs=0.9999),
            r"target_macs must be at most 0\.9\d+, the most that can be had with floor=0\.1, got",
        ),
        (dict(ratio=0.4, scope="all"), r"unknown scope 'all': choose one of local, global\."),
        (dict(ratio=0.4, scope="global", floor=1), r"floor must be a number of at least 0 and below 1, got 1\."),
        (dict(ratio=0.4, rounded=8), r"unknown argument 'rounded': choose one of round_to, .*"),
        (dict(ratio=0.4, steps=0), r"steps must be a whole number of at least 1, got 0\."),
        (dict(ratio=0.4, steps=2), r"finetune must be a function of the network if steps is 2, got None\."),
        (dict(widths={"1": 8}), r"unknown group '1': choose one of 0, 2, 4"),
        (dict(widths={"0": 0}), r"the width of '0' must be a multiple of 1 from 1 to 24, got 0\."),
        (dict(widths={"0": 25}), r"the width of '0' must be a multiple of 1 from 1 to 24, got 25\."),
        (dict(ratio=0.05, round_to=40, floor=0.99), r"the plan must cut at least one group, got none"),
    ],
)
def test_an_impossible_wish_is_one_sentence_and_changes_nothing(wishes, message):
    net, priors = chain(24, 40, 16)
    before = copy.deepcopy(net.state_dict())
    for call in (prune, plan):
        with pytest.raises(ValueError, match=message) as raised:
            call(net, priors=priors, **wishes)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 330
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not hasattr(net, "pruning_report")


def test_a_device_that_is_not_there():
    net, priors = chain(8)
    absent = "cuda:7" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=rf"device must be one of this machine \(cpu.*\), got '{absent}'\."):
        prune(net, priors=priors, target_speedup=1.5, inputs=image(), device=absent)


def test_a_function_network_with_a_concatenation():
    """Skips: the reader of a concatenation has multiples of both groups."""
    torch.manual_seed(0)
    net = Net(
        lambda n, x: n.tail(torch.cat([n.a(x), n.b(x)], 1)),
        a=nn.Conv2d(2, 24, 1), b=nn.Conv2d(2, 20, 1), tail=nn.Conv2d(44, 2, 1),
    )  # fmt: skip
    student = prune(net, 0.40, [(net, image(), [net.tail])], round_to=8)
    assert (student.a.out_channels, student.b.out_channels, student.tail.in_channels) == (16, 16, 32)


def test_the_output_that_stays_is_passed_on():
    torch.manual_seed(0)
    net = Net(
        lambda n, x: (n.tail(h := n.head(x)), h), head=nn.Conv2d(2, 24, 1), tail=nn.Conv2d(24, 2, 1)
    )  # fmt: skip
    priors = [(net, image(), [net.tail])]
    with pytest.raises(ValueError):
        prune(net, 0.40, priors, round_to=8)  # all outputs stay
    assert prune(net, 0.40, priors, round_to=8, output=0).head.out_channels == 16
    assert plan(net, priors=priors, target_macs=0.5, output=0).widths["head"] == 12  # half of the operations
    assert prune(net, 0.40, priors, steps=2, finetune=lambda network: None, output=0).head.out_channels == 14


def test_a_speed_up_is_the_ratio_of_medians_without_the_first_call(monkeypatch):
    slow, fast = chain(8)[0], chain(8)[0]
    clock = iter([100.0, 1.0, 3.0, 2.0, 4.0, 1.0, 50.0, 2.0])  # taking turns: slow, fast, slow, ...
    order = []

    def seconds_of(call, device):
        order.append(call())
        return next(clock)

    monkeypatch.setattr(spade.targets, "seconds_of", seconds_of)
    assert spade.targets.speed_up(slow, fast, image(), torch.device("cpu"), repeats=3) == 4.0 / 2.0
    assert len(order) == 8 and slow.training and fast.training


def test_a_fixed_point_network_is_timed_for_one_iteration():
    calls, network = [], DEQ(features=8, num_blocks=1)
    network.step = lambda x, y, A: calls.append(1)
    y, A, _ = brain()
    spade.targets.call_of(network, (y, A))()
    assert len(calls) == 1


def test_a_plan_without_a_cut_is_no_speed_up(monkeypatch):
    """A noisy clock must not find a speed-up where the rounding leaves every width."""
    monkeypatch.setattr(spade.targets, "speed_up", lambda *arguments: 1.5)
    net, priors = chain(64, 64)
    student = prune(net, priors=priors, target_speedup=1.4, inputs=image(), round_to=16)
    assert out_channels(student) == [48, 48, 2]  # the first ratio at which the nearest multiple of 16 is not 64
