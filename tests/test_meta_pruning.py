"""Flexible meta pruning: spaces, exact sizes, masks, criteria, resumed searches, bad input."""

import copy
import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import spade
import spade.meta_pruning
from spade.basics import Batch, seeded
from spade.losses import make_strategy
from spade.meta_pruning import (
    CRITERIA,
    MetaPruning,
    SearchLoop,
    SearchNetwork,
    check_alive,
    cost,
    find_spaces,
    frozen,
    is_reached,
    materialise,
    num_alive,
    ratios,
    shrink,
    shrinkages,
)
from spade.meta_search import largest_channel_ratio, meta_prune
from spade.models import DEQ, ESRB, UpEDSR, USRNet
from spade.operators import BlurDownsample
from spade.pruning import count_macs, count_parameters
from spade.training import read_settings
from spade.y_channel import reduced_batch

QUICK = dict(steps=40, learning_rate=2e-3, check_every=4, progress=False)


def photos(scale=2, side=48, count=3):
    draw = seeded("photos")
    smooth = nn.functional.interpolate(torch.rand(count, 3, 12, 12, generator=draw), size=(side, side), mode="bilinear")
    return [reduced_batch(x.clamp(0, 1), scale, str(i)) for i, x in enumerate(smooth)]


def small_edsr(scale=2, features=12, num_blocks=2, tail="direct"):
    torch.manual_seed(0)
    return UpEDSR(scale=scale, features=features, num_blocks=num_blocks, tail=tail)


# Spaces and sizes


@pytest.mark.parametrize(
    "make, spaces, fixed",
    (
        (lambda: ESRB(2, features=256), 13 * [256], 3 + 12),
        (lambda: UpEDSR(2, 128, 8, tail="direct"), 9 * [128], 3 + 12),
        (lambda: UpEDSR(2, 128, 8), 10 * [128], 3 + 3),
        (lambda: UpEDSR(4, 128, 8), 11 * [128], 3 + 3),
    ),
)
def test_spaces_of_the_networks_of_fmp(make, spaces, fixed):
    found = find_spaces(make())
    widths = [found.space.count(number) for number in range(len(found.names))]
    assert widths == spaces and found.space.count(-1) == fixed + 1
    assert set(found.space[: sum(widths)]) == set(range(len(spaces)))


def test_the_size_of_the_hypernetwork():
    with torch.device("meta"):
        shapes = [p.shape for p in UpEDSR(4, 128, 8).parameters() if p.ndim == 4]
    assert spade.meta_pruning.check_memory(shapes[:1]) == 3 * 128 * 107
    assert sum(107 * s[0] * s[1] for s in shapes) == 43_909_376


def test_too_little_memory_is_named_before_the_first_step(monkeypatch):
    monkeypatch.setattr(spade.meta_pruning.psutil, "virtual_memory", lambda: type("M", (), {"available": 2**20}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = r"memory must hold a hypernetwork of 1,038,\d+ parameters, 0.0 GiB with gradients and Adam, got 0.0 GiB"
    with pytest.raises(MemoryError, match=message.replace(r"1,038,\d+", r"[\d,]+")):
        meta_prune(small_edsr(features=32), photos(), target=0.4, **QUICK)


def test_indicators_start_as_normal_numbers_or_ones():
    for start, spread in (("normal", 1.0), ("ones", 0.0)):
        search = SearchNetwork(small_edsr(), MetaPruning(indicators=start))
        values = torch.cat([generator.indicators.detach().flatten() for generator in search.generators])
        assert values.std() == pytest.approx(spread, abs=0.03) and values.mean() == pytest.approx(1 - spread, abs=0.03)


def test_masks_at_the_end_alone_would_change_the_network():
    """As in DHP: the biases of the hypernetwork keep the kernels of dead channels away from zero."""
    search, _ = searched(small_edsr(), steps=40)
    y = torch.rand(1, 3, 20, 17, generator=seeded("y"))
    assert not search.alive.all() and (materialise(search)(y) - search(y)).abs().max() <= 1e-5
    unmasked = copy.deepcopy(search)
    unmasked.alive[:] = True
    assert (unmasked(y) - search(y)).abs().max() > 1e-3


def test_the_channels_before_a_shuffle_share_a_number():
    spaces = find_spaces(small_edsr(scale=3, tail="sub-pixel"))
    rows = spaces.axes["layers.2.weight"][0].tolist()
    assert rows == [number for number in sorted(set(rows)) for _ in range(9)] and len(rows) == 9 * 12
    assert spaces.axes["layers.2.bias"][0].tolist() == rows
    assert spaces.axes["layers.4.weight"][1].tolist() == sorted(set(rows))


# The search


def searched(model, scale=2, steps=40, **settings):
    """A search of some steps, with what is alive after each check."""
    chosen = read_settings(MetaPruning, dict(target=0.9, steps=40, learning_rate=2e-3, check_every=4) | settings)
    search = SearchNetwork(model, chosen, seed=1)
    loop = SearchLoop(search, make_strategy("supervised", loss="l1"), Accelerator(cpu=True), clip=1.0)
    batches, alive = photos(scale), []
    for step in range(steps):
        loop.update([batches[step % len(batches)]], step, chosen.learning_rate)
        if (step + 1) % 4 == 0:
            alive.append([search.alive.clone(), *(generator.alive.clone() for generator in search.generators)])
    return search, alive


@pytest.mark.parametrize(
    "make, scale",
    (
        (small_edsr, 2),
        (lambda: small_edsr(4, tail="sub-pixel"), 4),
        (lambda: small_edsr(3, tail="sub-pixel"), 3),
        (lambda: ESRB(2, num_blocks=2, features=12, esa=4), 2),
    ),
    ids=("direct", "two shuffles", "x3", "ESRB"),
)
def test_the_result_is_the_network_that_was_searched(make, scale, tmp_path):
    model = make()
    before = copy.deepcopy(model.state_dict())
    search, alive = searched(model, scale)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items()), "it is only read"
    small, y = materialise(search), torch.rand(2, 3, 20, 17, generator=seeded("y"))
    assert (small(y) - search(y)).abs().max() <= 1e-5
    for earlier, later in zip(alive, alive[1:]):
        assert all(not (b & ~a).any() for a, b in zip(earlier, later)), "the alive sets only shrink"
    assert min(num_alive(search)) >= 4 and 0 < search.alive.sum() < len(search.alive)
    example = torch.zeros(1, 3, 16, 16)
    assert cost(search, "params")[:2] == (count_parameters(model), count_parameters(small))
    assert cost(search, "flops")[:2] == (count_macs(model, example), count_macs(small, example))
    zeros = sum(int((small.get_parameter(name) == 0).sum()) for name in search.spaces.generated)
    assert count_parameters(small) - zeros == cost(search, "params")[2] and zeros > 0
    back = spade.load(spade.save(small, tmp_path / "small"))
    assert torch.equal(back(y), small(y)) and back.keep_zeros and type(back) is type(model)


def test_what_remains_is_one_minus_both_ratios():
    search, _ = searched(small_edsr(), steps=20)
    for metric in ("params", "flops"):
        before, kept, left = cost(search, metric)
        assert (before - kept) + (kept - left) + left == before and 0 < left < kept < before
        assert ratios(search, metric) == ((before - kept) / before, (kept - left) / before)


def test_the_proximal_step_is_soft_thresholding_and_stops_at_the_least_width():
    search = SearchNetwork(small_edsr(), MetaPruning(channel_shrinkage=2.0, weight_shrinkage=1.0))
    z, indicators = search.z.detach().clone(), search.generators[1].indicators.detach().clone()
    search.alive[4:12] = False  # the first space
    shrink(search, learning_rate=0.1)
    soft = lambda v, d: v.sign() * (v.abs() - d).clamp(min=0)
    assert torch.equal(search.z[:12], z[:12]) and torch.allclose(search.z[12:], soft(z[12:], 0.2))
    assert torch.allclose(search.generators[1].indicators, soft(indicators, 0.1))


def test_the_dead_stay_dead():
    search = SearchNetwork(small_edsr(), MetaPruning())
    search.z.data[:3], search.generators[0].indicators.data[0] = 1e-4, 1e-4
    check_alive(search, 20)
    search.z.data[:], search.generators[0].indicators.data[:] = 1.0, 1.0
    check_alive(search, 40)
    assert not search.alive[:3].any() and not search.generators[0].alive[0].any()
    assert (search.weights()["layers.0.weight"][:3] == 0).all() and (search.weights()["layers.0.bias"][:3] == 0).all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("metric", ("params", "flops"))
def test_a_search_ends_at_its_criterion(criterion, metric):
    target = 0.1 if criterion == "weight" else (0.2, 0.1)
    small = meta_prune(small_edsr(), photos(), target=target, criterion=criterion, metric=metric, **QUICK)
    path = small.meta_report.path()[["step", f"{metric}_c", f"{metric}_w"]].to_numpy()
    wanted = dict(channel=path[:, 1] >= 0.2, weight=path[:, 2] >= 0.1, total=path[:, 1] + path[:, 2] >= 0.3)
    wanted["total-fixed"] = wanted["channel"] & wanted["weight"]
    assert wanted[criterion][-1] and not wanted[criterion][:-1].any()
    assert small.meta_report.steps == path[-1, 0] and path[0, 0] == 4


def test_total_fixed_freezes_each_half_while_its_target_is_met():
    search = SearchNetwork(small_edsr(), MetaPruning(criterion="total-fixed", target=(0.2, 0.1)))
    for row, expected in (((0.1, 0.05), (False, False)), ((0.2, 0.05), (True, False)), ((0.3, 0.1), (True, True))):
        search.history = [[20.0, 0.0, 0.0, *row]]
        assert frozen(search) == expected and is_reached(search) == all(expected)
    search.history = [[20.0, 0.0, 0.0, 0.1, 0.2]]
    z, indicators = search.z.detach().clone(), search.generators[0].indicators.detach().clone()
    shrink(search, 1.0)
    assert not torch.equal(search.z, z) and torch.equal(search.generators[0].indicators, indicators)


def test_weights_do_not_die_without_shrinkage():
    """The baseline DHP: channels only."""
    small = meta_prune(small_edsr(), photos(), target=0.3, criterion="channel", weight_shrinkage=0.0, **QUICK)
    assert small.meta_report.params[1] == small.meta_report.params[2] < small.meta_report.params[0]


def test_same_seed_same_result_and_another_seed_another():
    run = lambda seed: meta_prune(small_edsr(), photos(), target=0.3, seed=seed, **QUICK)
    one, same, other = run(0), run(0), run(1)
    weights = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(one), weights(same)) and one.meta_report.history == same.meta_report.history
    assert one.meta_report.history != other.meta_report.history


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_a_stopped_search_continues_bit_for_bit(tmp_path, precision):
    model, data, settings = small_edsr(), photos(), QUICK | dict(mixed_precision=precision)
    whole = meta_prune(model, data, target=0.4, **settings)
    for most in (10, 21):
        with pytest.raises(RuntimeError, match=rf"the search ended after {most} steps at gamma_C = 0.\d+, gamma_W"):
            meta_prune(model, data, target=0.4, folder=tmp_path, max_steps=most, **settings)
    again = meta_prune(model, data, target=0.4, folder=tmp_path, **settings)
    assert again.meta_report.history == whole.meta_report.history
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))
    with pytest.raises(ValueError, match="belongs to another run: network.target was 0.4 and is now 0.5"):
        meta_prune(model, data, target=0.5, folder=tmp_path, **settings)


def test_fine_tuning_keeps_the_zeros():
    small = meta_prune(small_edsr(), photos(), target=0.4, **QUICK)
    zero = [p == 0 for p in small.parameters() if p.ndim > 1]
    spade.finetune(small, photos(), strategy="supervised", steps=5, learning_rate=1e-3, progress=False)
    assert all(torch.equal(p == 0, z) for p, z in zip([p for p in small.parameters() if p.ndim > 1], zero))
    assert any(z.any() for z in zero)


# Other networks


def usr_batch():
    x = photos(side=48, count=1)[0].x
    A = BlurDownsample(torch.ones(1, 1, 5, 5) / 25, 2, torch.tensor([0.01]))
    return Batch(A(x), A, x, dict(file=["a"], subject=["a"], slice=[0], scale=[2]))


def test_usrnet_is_searched_as_it_is():
    torch.manual_seed(0)
    model, batch = USRNet(iterations=2, widths=(8, 8, 8, 8), blocks=1), usr_batch()
    with pytest.warns(UserWarning, match="cut along, but their kernels are not generated: .*transposed"):
        small = meta_prune(model, [batch], target=0.3, **QUICK)
    assert type(small) is USRNet and 0.3 <= 1 - small.meta_report.flops[2] / small.meta_report.flops[0]
    assert small(batch.y, batch.A).shape == batch.x.shape


def test_the_prior_of_a_deq_is_searched():
    import spade.examples

    torch.manual_seed(0)
    batch = Batch(*spade.examples.brain(), dict(file=["brain"], subject=["brain"], slice=[0], scale=[1]))
    model = DEQ(features=8, num_blocks=2, max_iterations=3, tolerance=0, gradient="jacobian-free")
    search = SearchNetwork(model, MetaPruning(steps=10, check_every=2, learning_rate=2e-3, target=0.9))
    loop = SearchLoop(search, make_strategy("supervised", loss="l1"), Accelerator(cpu=True), clip=1.0)
    z = search.z.detach().clone()
    for step in range(4):
        loop.update([batch], step, 2e-3)
    small = materialise(search.eval())
    a, b = (network(batch.y, batch.A) for network in (search, small))
    assert (a - b).abs().max() <= 1e-4 * a.abs().max() and search.z.grad.any() and not torch.equal(z, search.z)


def test_grouped_and_transposed_layers_are_cut_along():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 1), nn.ConvTranspose2d(12, 12, 2, stride=2), nn.PReLU(12), nn.Conv2d(12, 3, 3, padding=1),
    )  # fmt: skip
    batches = [(batch.y, batch.x) for batch in photos()]
    example, longer = batches[0][0], QUICK | dict(max_steps=300)
    with pytest.warns(UserWarning, match=r"'1' \(grouped\), '5' \(transposed\)"):
        small = meta_prune(model, batches, priors=[(model, example, [])], target=0.4, **longer)
    widths = [layer.out_channels for layer in small if hasattr(layer, "out_channels")]
    assert widths[0] == widths[1] == small[2].num_features < 12 and widths[3] == small[6].num_parameters < 12
    assert small.eval()(example).shape == (1, 3, 48, 48)
    with warnings.catch_warnings(action="ignore"):
        found = meta_prune(model, batches, inputs=example, target=0.4, **longer)
    assert found.meta_report.history == small.meta_report.history


# Bad input


@pytest.mark.parametrize(
    "settings, error, message",
    (
        (dict(target=1.0), ValueError, "target must be a number between 0 and 1, or a pair of them, got 1.0"),
        (dict(target=True), ValueError, "target must be a number"),
        (dict(target=(0.2, 0.0)), ValueError, r"target must be a number between 0 and 1, or a pair of them, got \(0.2"),
        (
            dict(criterion="both"),
            ValueError,
            "unknown criterion 'both': choose one of channel, weight, total-fixed, total",
        ),
        (dict(metric="macs"), ValueError, "unknown metric 'macs': choose one of params, flops"),
        (dict(tagret=0.4), ValueError, r"unknown key 'tagret': .*did you mean target\?"),
        (dict(loss="l3"), ValueError, "unknown loss 'l3': choose one of"),
        (dict(min_channels=0), ValueError, "min_channels must be greater than or equal to 1, got 0"),
        (
            dict(target=0.95, criterion="channel"),
            ValueError,
            r"target must be at most 0.8\d+ for criterion 'channel' with 4 channels left in each space, got 0.95",
        ),
        (
            dict(target=0.2, criterion="weight", max_steps=80),
            RuntimeError,
            r"the search ended after 80 steps at gamma_C = 0.\d+, gamma_W = 0.0?\d+, short of weight 0.2 - 0; raise",
        ),
    ),
)
def test_bad_input_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        meta_prune(small_edsr(), photos(), **QUICK | settings)


def test_the_largest_channel_ratio_is_that_of_four_channels():
    search = SearchNetwork(small_edsr(), MetaPruning(metric="params"))
    narrow = count_parameters(small_edsr(features=4))
    assert largest_channel_ratio(search) == pytest.approx(1 - narrow / count_parameters(small_edsr()))


def test_shrinkage_is_chosen_for_the_target():
    for target in (0.1, 0.4, 0.8):
        settings = MetaPruning(target=target, steps=500, learning_rate=1e-3)
        channels, weights = shrinkages(settings)
        p = math.erf(500 * 1e-3 * channels / math.sqrt(2))
        assert channels == weights and 1 - (1 - p) ** 3 == pytest.approx(target, abs=1e-6)
    assert shrinkages(MetaPruning(channel_shrinkage=0.1, weight_shrinkage=0.2)) == (0.1, 0.2)
