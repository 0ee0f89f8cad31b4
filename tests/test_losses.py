"""The losses: zero at the optimum, gradients, no use of the ground truth, the operator of each network."""

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from spade.config import load_config
from spade.data.fastmri import read_volume_header, split_subjects
from spade.data.phantom import simulate
from spade.finetuning import train
from spade.losses import (
    ALLOWED_SETTINGS,
    SELF_SUPERVISED,
    STRATEGIES,
    check_reference,
    data_fidelity,
    default_loss,
    draw_rotation,
    equivariance,
    hold_out,
    l1,
    make_strategy,
    rotate,
    rotate_right,
    self_supervised_loss,
    smooth_l1,
    split_lines,
    split_loss,
    squared_error,
    ssim_l1_loss,
    ssim_loss,
    strip,
)
from spade.models import DEQ, E2EVarNet, VarNet
from spade.operators import BlurDownsample, MultiCoilMRI, acs_lines, normalize_maps


class Batch(NamedTuple):
    y: torch.Tensor
    A: nn.Module
    x: Any
    info: dict


def make_batch(
    seed: int = 0, size: tuple[int, int] = (32, 32), batch: int = 1, dtype: torch.dtype = torch.complex64
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    A = MultiCoilMRI(
        torch.arange(size[1]) % 3 < 2, normalize_maps(torch.randn(batch, 3, *size, dtype=dtype, generator=g))
    )
    x = torch.randn(batch, 1, *size, dtype=dtype, generator=g)
    return Batch(A(x), A, x, {})


def small(network: type) -> nn.Module:
    torch.manual_seed(0)
    if network is DEQ:
        return DEQ(features=4, num_blocks=1, max_iterations=8, gradient="jacobian-free")
    sensitivity = dict(sens_channels=2, sens_num_pools=2) if network is E2EVarNet else {}
    return network(num_cascades=1, channels=4, num_pools=2, **sensitivity)


class Zero(nn.Module):
    """Answers with the zero-filled image."""

    def forward(self, y, A):
        return A.adjoint(y)


class Image(nn.Module):
    """Answers with the image it holds."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(image.clone())

    def forward(self, y, A):
        return self.image


@pytest.mark.parametrize("loss", [smooth_l1, squared_error, l1, ssim_loss])
def test_zero_at_the_optimum_and_positive_elsewhere(loss):
    x = make_batch(dtype=torch.complex128).x
    assert loss(x, x).abs() < 1e-12 and loss(1.1 * x, x) > 1e-4


@pytest.mark.parametrize("loss", [smooth_l1, squared_error, ssim_loss])
def test_gradient_is_zero_at_the_optimum(loss):
    x = make_batch(dtype=torch.complex128).x
    guess = x.clone().requires_grad_()
    loss(guess, x).backward()
    assert guess.grad.abs().max() < 1e-10


@pytest.mark.parametrize("loss", [smooth_l1, squared_error, l1, ssim_loss])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
def test_gradients_against_finite_differences(loss, dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 1, 8, 9, dtype=dtype, generator=g) for _ in range(2))
    assert torch.autograd.gradcheck(lambda t: loss(t, b), a.requires_grad_())


@pytest.mark.parametrize("shape", [(2, 1, 20, 33), (3, 1, 7, 8)])
def test_ssim_agrees_with_scikit_image(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.complex128, generator=g)
    x_hat = x + 0.3 * torch.randn(shape, dtype=torch.complex128, generator=g)
    expected = [
        structural_similarity(a.abs().numpy()[0], b.abs().numpy()[0], data_range=b.abs().max().item(), win_size=7)
        for a, b in zip(x_hat, x)
    ]
    assert 1 - ssim_loss(x_hat, x).item() == pytest.approx(sum(expected) / len(expected), abs=1e-10)


def test_ssim_of_colour_images_agrees_with_scikit_image():
    g = torch.Generator().manual_seed(0)
    x, x_hat = (torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=g) for _ in range(2))
    expected = structural_similarity(x_hat[0].numpy(), x[0].numpy(), data_range=x.max().item(), channel_axis=0)
    assert 1 - ssim_loss(x_hat, x).item() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_an_empty_slice_and_of_a_tiny_image():
    zero = torch.zeros(1, 1, 8, 8, dtype=torch.complex64)
    assert ssim_loss(zero, zero) == 0 and ssim_loss(zero + 1, zero).isfinite()
    for start in (zero, zero + 1):
        guess = start.clone().requires_grad_()
        ssim_loss(guess, zero).backward()  # in single precision, too
        assert guess.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least 7×7 pixels for the SSIM, got \\(6, 8\\)"):
        ssim_loss(zero[..., :6, :], zero[..., :6, :])


def test_default_losses():
    assert [default_loss(small(n)).__name__ for n in (DEQ, VarNet, E2EVarNet)] == [
        "smooth_l1",
        "ssim_loss",
        "ssim_loss",
    ]


def test_data_fidelity_counts_measured_points_only():
    y, A, x, _ = make_batch(batch=2)
    assert data_fidelity(x, y, A) < 1e-7
    shifted = torch.where(A.mask.expand(y.shape), y + (0.5 - 0.25j), y)
    assert data_fidelity(x, shifted, A).item() == pytest.approx(0.375, rel=1e-5)
    assert torch.equal(shifted[~A.mask.expand(y.shape)], y[~A.mask.expand(y.shape)])


@pytest.mark.parametrize("size", [(12, 12), (11, 11), (12, 20)])
def test_rotations(size):
    x = make_batch(size=size, batch=3).x
    assert torch.allclose(rotate(x, torch.full((3,), 180.0)), x.flip(-2, -1), atol=1e-5)
    assert torch.allclose(
        rotate(x, torch.tensor([0.0, 360.0, 180.0])), torch.stack([x[0], x[1], x[2].flip(-2, -1)]), atol=1e-4
    )
    if size[0] == size[1]:
        quarters = torch.tensor([1, 2, 3])
        assert torch.allclose(rotate(x, 90.0 * quarters), rotate_right(x, quarters), atol=1e-5)
        assert draw_rotation("right", x, torch.Generator().manual_seed(0))(x).shape == x.shape
    else:
        assert torch.equal(draw_rotation("right", x, torch.Generator())(x), x.flip(-2, -1))


def test_rotation_is_differentiable():
    x = make_batch(size=(5, 6), dtype=torch.complex128).x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotate(t, torch.tensor([33.0])), x)


def test_equivariant_term_moves_the_maps_only_if_asked():
    y, A, x, _ = make_batch(size=(16, 16))
    seen = []

    class Spy(Image):
        def forward(self, y, A):
            seen.append((y, A))
            return self.image

    phi = draw_rotation("right", x, torch.Generator().manual_seed(0))
    for rotate_maps in (False, True):
        equivariance(Spy(x), x, A, phi, rotate_maps=rotate_maps)
    assert seen[0][1] is A and torch.equal(seen[0][0], A(phi(x)))
    assert torch.allclose(seen[1][1].maps, phi(A.maps), atol=1e-6) and torch.equal(seen[1][1].mask, A.mask)


def test_detach_stops_the_gradient_through_the_turned_image():
    y, A, x, _ = make_batch()
    gradients = []
    for detach in (False, True):
        model = small(VarNet)
        x_hat = x.clone().requires_grad_()
        equivariance(
            model, x_hat, A, draw_rotation("right", x, torch.Generator().manual_seed(0)), detach=detach
        ).backward()
        gradients.append(x_hat.grad)
    assert gradients[0].abs().max() > 0 and gradients[1] is None


def test_e2e_varnet_is_judged_with_the_maps_it_estimated():
    y, A, x, _ = make_batch()
    model = small(E2EVarNet)
    nonsense = A.with_maps(
        normalize_maps(torch.roll(A.maps, 7, dims=-1))
    )  # E2E-VarNet ignores these maps: the loss must not change
    losses = [self_supervised_loss(model, y, B, torch.Generator().manual_seed(0)) for B in (A, nonsense)]
    assert torch.allclose(*losses, rtol=1e-6)
    estimated = model.effective_operator(y, A)
    expected = data_fidelity(model(y, A), y, estimated)
    assert torch.allclose(self_supervised_loss(model, y, A, torch.Generator(), weight=0.0), expected)


@pytest.mark.parametrize("network", [DEQ, VarNet, E2EVarNet])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:relative step of the DEQ")  # few iterations
def test_every_strategy_gives_every_network_finite_gradients(network, strategy):
    model, batch = small(network).train(), make_batch()
    loss = (
        make_strategy(strategy, teacher=small(network))(model, batch, torch.Generator().manual_seed(0))
        if strategy != "school"
        else make_strategy(strategy, teacher=DEQ(features=2, num_blocks=1, max_iterations=3))(
            model, batch, torch.Generator()
        )
    )
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert (
        loss > 0
        and gradients
        and all(g.isfinite().all() for g in gradients)
        and max(g.abs().max() for g in gradients) > 0
    )


@pytest.mark.parametrize("strategy", ["school", *SELF_SUPERVISED])
@pytest.mark.parametrize("network", [VarNet, E2EVarNet, DEQ])
def test_school_and_self_supervised_never_see_the_ground_truth(strategy, network):
    chosen = {"name": "self-supervised", "loss": strategy} if strategy in SELF_SUPERVISED else {"name": strategy}
    batches = [make_batch(seed) for seed in range(2)]
    truths = {
        "truth": lambda x: x,
        "NaN": lambda x: torch.full_like(x, math.nan),
        "None": lambda x: None,
        "other": lambda x: -x,
    }
    weights = {}
    for name, change in truths.items():
        model = small(network)
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.2)
        train(
            model,
            [b._replace(x=change(b.x)) for b in batches],
            make_strategy(**chosen, teacher=teacher),
            steps=4,
            learning_rate=1e-3,
            progress=False,
        )
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.equal(weights["truth"], torch.cat([p.detach().flatten() for p in small(network).parameters()]))
    assert all(torch.equal(w, weights["truth"]) for w in weights.values())


def test_supervised_does_see_the_ground_truth():
    batch, model = make_batch(), small(VarNet)
    losses = [
        make_strategy("supervised")(model, b, torch.Generator()).item() for b in (batch, batch._replace(x=-batch.x))
    ]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="batch.x must be the ground truth for strategy 'supervised', got None"):
        make_strategy("supervised")(model, batch._replace(x=None), torch.Generator())


def test_school_leaves_the_teacher_alone_and_remembers():
    teacher, batch = small(VarNet).train(), make_batch()
    strategy = make_strategy("school", teacher=teacher, remember=1)
    calls = []
    strategy.teacher.register_forward_hook(lambda *_: calls.append(1))
    first = strategy(small(VarNet), batch, torch.Generator())
    assert strategy(small(VarNet), batch, torch.Generator()) == first and len(calls) == 1
    strategy(small(VarNet), make_batch(1), torch.Generator())
    strategy(small(VarNet), batch, torch.Generator())
    assert len(calls) == 3 and len(strategy.answers) == 1  # only one answer is kept
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_school_tells_equal_measurements_of_different_maps_apart():
    y, A, x, _ = make_batch()
    strategy = make_strategy("school", teacher=small(VarNet))
    other = A.with_maps(A.maps.flip(1))
    assert not torch.equal(*(strategy.answer(Batch(y, each, None, {})) for each in (A, other)))


def test_bad_choices():
    with pytest.raises(
        ValueError, match="unknown strategy 'homework': choose one of supervised, school, self-supervised"
    ):
        make_strategy("homework")
    with pytest.raises(TypeError, match="teacher must be the network before pruning for strategy 'school', got None"):
        make_strategy("school")
    with pytest.raises(ValueError, match="unknown loss 'l7'"):
        make_strategy("supervised", loss="l7")
    with pytest.raises(ValueError, match="unknown rotations 'left': choose one of any, right"):
        make_strategy("self-supervised", rotations="left")
    with pytest.raises(TypeError, match="A must have the method transformed if rotate_maps=True, got a Identity"):
        equivariance(Image(make_batch().x), make_batch().x, nn.Identity(), lambda t: t, rotate_maps=True)


# Photographs


class Enlarge(nn.Module):
    """A network for photographs: one weight times the adjoint."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, y, A):
        return self.weight * A.adjoint(y)


def photo_batch(size: tuple[int, int] = (12, 18), batch: int = 2, scale: int = 2) -> Batch:
    g = torch.Generator().manual_seed(0)
    x, kernel = (
        torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((batch, 3, *size), (batch, 1, 5, 5))
    )
    A = BlurDownsample(kernel / kernel.sum(dim=(-2, -1), keepdim=True), scale)
    return Batch(A(x), A, x, {})


@pytest.mark.parametrize("size", [(12, 12), (12, 18)])
@pytest.mark.parametrize("rotations", ["any", "right"])
@pytest.mark.parametrize("flips", [None, False, True])
def test_self_supervision_of_photographs(size, rotations, flips):
    y, A, x, info = photo_batch(size)
    model = Enlarge()
    for seed in range(4):
        loss = self_supervised_loss(model, y, A, torch.Generator().manual_seed(seed), rotations, flips=flips)
        (gradient,) = torch.autograd.grad(loss, model.weight)
        assert loss > 0 and gradient.isfinite() and gradient != 0


def test_right_angles_and_flips_move_pixels_of_a_photograph_and_nothing_else():
    x = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = set()
    for seed in range(60):
        turned = draw_rotation("right", x, torch.Generator().manual_seed(seed), flips=True)(x)
        assert turned.shape[-2:] in ((4, 6), (6, 4)) and torch.equal(
            turned.flatten(1).sort().values, x.flatten(1).sort().values
        )
        found.add(turned[0].numpy().tobytes() + bytes(turned.shape))
    assert len(found) == 6  # three turns, mirrored or not
    square = photo_batch((6, 6), batch=8).x
    turned = draw_rotation("right", square, torch.Generator().manual_seed(0))(square)
    assert not any(torch.equal(a, b) for a, b in zip(turned, square))


def test_flips_are_for_photographs_unless_asked(monkeypatch):
    import spade.losses

    def watched(kind, x, generator, flips):
        seen.extend([x.is_complex()] if flips else [])
        return draw_rotation(kind, x, generator, flips)

    seen = []
    monkeypatch.setattr(spade.losses, "draw_rotation", watched)
    for flips, expected in ((None, [False]), (True, [True, False]), (False, [])):
        seen.clear()
        for model, batch in ((small(VarNet), make_batch(size=(16, 16))), (Enlarge(), photo_batch())):
            self_supervised_loss(model, batch.y, batch.A, torch.Generator().manual_seed(0), flips=flips)
        assert seen == expected


def test_rotations_of_mri_are_those_of_before():
    x = make_batch(size=(12, 12), batch=3).x
    degrees = 360 * torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_rotation("any", x, torch.Generator().manual_seed(5))(x), rotate(x, degrees))
    assert "flips" not in make_strategy("self-supervised").choices  # so a run that was interrupted can go on
    assert make_strategy("self-supervised", flips=True).choices["flips"] is True


def test_school_tells_scales_apart():
    "One measurement, one kernel, two scales: the teacher's answers have different sizes."
    y, A, *_ = photo_batch()
    strategy = make_strategy("school", teacher=Enlarge(), loss="l1")
    operators = [BlurDownsample(A.kernel, scale) for scale in (2, 3, 2)]
    sizes = [strategy.answer(Batch(y, each, None, {})).shape[-1] for each in operators]
    assert sizes == [18, 27, 18] and len(strategy.answers) == 2
    assert strategy(Enlarge(), Batch(y, A, None, {}), torch.Generator()) == 0


def test_the_default_loss_of_usrnet_is_l1():
    assert default_loss(type("USRNet", (Enlarge,), {})()) is l1


@pytest.mark.parametrize("rotations", ["any", "right"])
def test_one_set_of_maps_turns_with_each_image_of_a_batch(rotations):
    "As if there were a copy of the maps for each of the three images, and as if they came one by one."
    y, A, x, _ = make_batch(batch=3, size=(16, 16), dtype=torch.complex128)
    shared, model = MultiCoilMRI(A.mask, A.maps[:1]), Zero()
    copies = MultiCoilMRI(A.mask, A.maps[:1].repeat(3, 1, 1, 1))
    phi = draw_rotation(rotations, x, torch.Generator().manual_seed(4))
    together = equivariance(model, x, shared, phi, rotate_maps=True)
    assert together == equivariance(model, x, copies, phi, rotate_maps=True) > 0
    alone = []
    for i in range(3):  # each image by itself, and the maps turned as the i-th
        turned = lambda t, i=i: phi(t.expand(3, -1, -1, -1))[i : i + 1]
        alone.append(equivariance(model, x[i : i + 1], shared, turned, rotate_maps=True))
    assert torch.isclose(together, torch.stack(alone).mean())
    losses = [
        self_supervised_loss(model, shared(x), B, torch.Generator().manual_seed(1), rotations, rotate_maps=True)
        for B in (shared, copies)
    ]
    assert losses[0] == losses[1]


def test_fewer_turns_than_images_are_refused():
    with pytest.raises(ValueError, match="zip"):
        rotate_right(torch.zeros(3, 1, 4, 4), torch.tensor([1]))


def test_both_terms_of_ssim_and_l1_see_a_real_image_as_it_is():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 9, 10, generator=g)
    x_hat = x - 0.4
    assert (x_hat < 0).any()
    assert torch.isclose(ssim_l1_loss(x_hat, x) - ssim_loss(x_hat, x), torch.tensor(4 * 0.4))
    turned = make_batch().x
    assert ssim_l1_loss(1j * turned, turned) < 1e-4  # a complex image: magnitudes alone
    expected = ssim_loss(0.9 * turned, turned) + 4.0 * ((0.9 * turned).abs() - turned.abs()).abs().mean()
    assert ssim_l1_loss(0.9 * turned, turned) == expected


@pytest.mark.parametrize(
    "strategy, setting",
    [
        ("self-supervised", "remember"),
        ("supervised", "remember"),
        *(
            (name, setting)
            for name in ("supervised", "school")
            for setting in ("rotations", "rotate_maps", "weight", "detach", "flips")
        ),
    ],
)
def test_a_setting_of_another_strategy_is_refused_by_name(strategy, setting):
    value = {"loss": "l1", "rotations": "right", "weight": 0.5, "remember": 3}.get(setting, True)
    with pytest.raises(
        ValueError,
        match=f"unknown setting of strategy {strategy} '{setting}': choose one of {ALLOWED_SETTINGS[strategy][0]}",
    ):
        make_strategy(strategy, teacher=small(VarNet), **{setting: value})


@pytest.mark.parametrize("loss, setting", [("split", "rotations"), ("equivariant", "share"), ("fidelity", "weight")])
def test_a_setting_of_another_loss_without_ground_truth_is_refused(loss, setting):
    with pytest.raises(
        ValueError, match=f"unknown setting of strategy self-supervised '{setting}': choose one of loss"
    ):
        make_strategy("self-supervised", loss=loss, **{setting: 0.5})


def test_every_strategy_takes_all_of_its_settings():
    values = {"remember": 3, "rotations": "right", "rotate_maps": True, "weight": 0.5, "detach": True, "flips": True}
    values |= {"share": 0.2, "rows": 16}
    for name, settings in ALLOWED_SETTINGS.items():
        for loss, own in SELF_SUPERVISED.items() if name == "self-supervised" else [("l1", settings[1:])]:
            chosen = {setting: values[setting] for setting in {*own, "rows"}}
            strategy = make_strategy(name, teacher=small(VarNet), loss=loss, **chosen)
            assert strategy.rows == 16
            if name == "self-supervised":
                assert strategy.choices == {"loss": loss, **chosen}
            else:
                assert strategy.loss is l1 and getattr(strategy, "remember", 3) == 3
    assert set(ALLOWED_SETTINGS["self-supervised"]) == {"loss", "rows"} | {
        s for own in SELF_SUPERVISED.values() for s in own
    }
    assert make_strategy("supervised").loss is make_strategy("school", teacher=small(VarNet)).loss is smooth_l1


def test_a_teacher_is_a_network_and_a_loss_a_function():
    with pytest.raises(
        TypeError, match="teacher must be the network before pruning for strategy 'school', got 'teacher.safetensors'"
    ):
        make_strategy("school", teacher="teacher.safetensors")
    with pytest.raises(TypeError, match="loss must be a function of two images or one of smooth_l1, ssim"):
        make_strategy("supervised", loss=3)


# References that do not fit


BAD_REFERENCES = {
    "without the axis of the batch": (lambda x: x[0], r"got complex \(1, 32, 32\)"),
    "without the axis of the channel": (lambda x: x[:, 0], r"got complex \(2, 32, 32\)"),
    "of one image": (lambda x: x[:1], r"got complex \(1, 1, 32, 32\)"),
    "of coil images": (lambda x: x.expand(-1, 3, -1, -1), r"got complex \(2, 3, 32, 32\)"),
    "of magnitudes": (lambda x: x.abs(), r"got real \(2, 1, 32, 32\)"),
    "with a last axis of 2": (torch.view_as_real, r"got real \(2, 1, 32, 32, 2\)"),
}


@pytest.mark.parametrize(
    "loss", ["smooth_l1", "ssim", "ssim+l1", "l1", "squared_error", lambda a, b: (a - b).abs().sum()]
)
@pytest.mark.parametrize("bad", BAD_REFERENCES)
def test_a_reference_that_would_be_broadcast_is_refused_by_every_distance(loss, bad):
    batch, (change, said) = make_batch(batch=2), BAD_REFERENCES[bad]
    expected = r"reference x must have shape and kind of the reconstruction, complex \(2, 1, 32, 32\), "
    with pytest.raises(ValueError, match=expected + said):
        make_strategy("supervised", loss=loss)(Zero(), batch._replace(x=change(batch.x)), torch.Generator())


def test_a_teacher_that_answers_with_another_shape_is_refused():
    batch = make_batch(batch=2)
    strategy = make_strategy("school", teacher=Image(batch.x[:1]), loss="ssim")
    with pytest.raises(ValueError, match=r"reconstruction, complex \(2, 1, 32, 32\), got complex \(1, 1, 32, 32\)"):
        strategy(Zero(), batch, torch.Generator())


def test_a_reference_of_another_precision_is_taken():
    x = make_batch().x
    assert check_reference(x, x.to(torch.complex128)).dtype == torch.complex128


class Noisy(nn.Module):
    """A physics that adds noise when it is called, as DeepInverse's do; `A` is the noise-free one."""

    def __init__(self, A, mask=None):
        super().__init__()
        self.operator, self.mask = A, mask

    def A(self, x):
        return self.operator(x)

    def forward(self, x):
        return self.A(x) + torch.randn_like(self.A(x))


def test_eq_9_measures_without_the_noise_of_a_physics():
    y, A, x, _ = make_batch()
    noisy = Noisy(A)
    assert data_fidelity(x, A(x), noisy) == 0
    model = Image(x)
    values = [equivariance(model, x, each, lambda image: image.flip(-1)) for each in (A, noisy)]
    assert values[0] == values[1]
    values = [self_supervised_loss(Zero(), y, B, torch.Generator().manual_seed(0), rotate_maps=False)
              for B in (A, Adjoint(A))]  # fmt: skip
    assert torch.equal(*values)


class Adjoint(Noisy):
    def adjoint(self, y):
        return self.operator.adjoint(y)

    def __init__(self, A):
        super().__init__(A, A.mask)


def test_data_fidelity_takes_a_mask_without_an_axis_of_coils_and_no_measurement_of_another_shape():
    y = torch.ones(1, 2, 3, 4, 4)  # real and imaginary part of three coils
    mask = torch.zeros(1, 2, 4, 4)
    mask[..., :2] = 1
    zero = Noisy(lambda x: torch.zeros(1, 2, 3, 4, 4), mask)
    assert data_fidelity(y, y * mask.unsqueeze(2), zero) == 1
    with pytest.raises(ValueError, match=r"measurement y must have the shape of A\(x_hat\), \(1, 2, 3, 4, 4\), got"):
        data_fidelity(y, y[:, :, :1], zero)


# Without ground truth: parts of the lines, frozen parameters, strips of rows


class Seeing(nn.Module):
    """A network that stores what it gets."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(1.0)), []

    def forward(self, y, A):
        self.seen.append((y, A))
        return self.weight * A.adjoint(y)


@pytest.mark.parametrize("rows", [1, 32])
def test_split_lines_are_two_parts_of_the_mask(rows):
    y, A, x, _ = make_batch(batch=2)
    masks = (torch.arange(32) % 3 < 2).repeat(2, 1, rows, 1)
    masks[1, :, :, 3] = False
    A = A.with_mask(masks)
    held_shares = []
    for seed in range(40):
        given, held = split_lines(A, 0.3, torch.Generator().manual_seed(seed))
        assert torch.equal(given | held, A.mask) and not (given & held).any()
        assert given[..., acs_lines(A.mask)].all(), "the ACS lines are never held out"
        assert (held.all(dim=-2) == held.any(dim=-2)).all(), "whole lines"
        held_shares.append(held.double().sum().item() / (A.mask.sum() - 2 * rows * 2).item())
    assert sum(held_shares) / 40 == pytest.approx(0.3, abs=0.05)


def test_lines_are_split_only_where_there_is_a_mask():
    with pytest.raises(TypeError, match="A must have a mask of lines to be split, got a Identity"):
        split_lines(nn.Identity(), 0.3, torch.Generator())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_split_loss_by_hand_and_its_network_sees_the_given_lines_only(share):
    y, A, x, _ = make_batch(batch=2)
    model = Seeing()
    loss = split_loss(model, y, A, torch.Generator().manual_seed(5), share)
    given, held = split_lines(A, share, torch.Generator().manual_seed(5))
    ((part, A_given),) = model.seen
    assert torch.equal(A_given.mask, given) and torch.equal(part, y * given)
    x_hat = A_given.adjoint(part)
    k = A.with_mask(torch.ones_like(A.mask))(x_hat)
    means = [
        (torch.view_as_real(k - y).abs() * lines[..., None]).sum() / (2 * lines.expand(y.shape).sum()).clamp_min(1)
        for lines in (given, held)
    ]
    assert loss.item() == pytest.approx(sum(means).item(), rel=1e-5)
    changed = split_loss(Seeing(), y + held, A, torch.Generator().manual_seed(5), share)
    assert (changed != loss) == bool(held.any()), "the held-out lines count in the loss"


def test_fidelity_alone_is_eq_9_without_its_second_term():
    y, A, x, _ = make_batch()
    model = small(VarNet)
    found = make_strategy("self-supervised", loss="fidelity")(model, Batch(y, A, None, {}), torch.Generator())
    assert torch.equal(found, data_fidelity(model(y, A), y, A))


def test_the_loss_of_a_split_of_e2e_varnet_uses_the_maps_of_the_given_lines():
    y, A, x, _ = make_batch()
    model = small(E2EVarNet)
    loss = split_loss(model, y, A, torch.Generator().manual_seed(1))
    given, held = split_lines(A, 0.3, torch.Generator().manual_seed(1))
    A_model = model.effective_operator(y * given, A.with_mask(given))
    x_hat = model(y * given, A.with_mask(given))
    expected = data_fidelity(x_hat, y * given, A_model) + data_fidelity(x_hat, y * held, A_model.with_mask(held))
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("loss", SELF_SUPERVISED)
def test_the_map_estimator_is_frozen_without_ground_truth_and_free_again_afterwards(loss):
    model = small(E2EVarNet)
    model.cascades[0].dc_weight.requires_grad_(False)  # frozen by the user: stays so
    before = copy.deepcopy(model.state_dict())
    train(model, [make_batch()._replace(x=None)], make_strategy("self-supervised", loss=loss),
          steps=2, learning_rate=1e-2, progress=False)  # fmt: skip
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not [name for name in changed if name.startswith("sens_net")]
    assert "cascades.0.dc_weight" not in changed and not model.cascades[0].dc_weight.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.sens_net.parameters())


def test_the_map_estimator_is_trained_with_a_reference_and_free_after_an_error():
    model, batch = small(E2EVarNet), make_batch()
    before = copy.deepcopy(model.sens_net.state_dict())
    train(model, [batch], make_strategy("supervised"), steps=1, learning_rate=1e-2, progress=False)
    assert any(not torch.equal(value, before[name]) for name, value in model.sens_net.state_dict().items())
    strategy = make_strategy("self-supervised")
    with pytest.raises(KeyboardInterrupt), strategy.freeze(model):
        assert not any(p.requires_grad for p in model.sens_net.parameters())
        raise KeyboardInterrupt
    assert all(p.requires_grad for p in model.sens_net.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_the_operator_of_a_strip_is_exact(seed):
    """The readout is fully sampled: A and its adjoint of a strip are the rows of those of the whole image."""
    y, A, x, info = batch = make_batch(seed, (32, 24), 2, torch.complex128)
    part = strip(batch, 10, torch.Generator().manual_seed(seed))
    first = int(torch.randint(23, (), generator=torch.Generator().manual_seed(seed)))
    rows = slice(first, first + 10)
    assert torch.equal(part.x, x[..., rows, :]) and part.y.shape == (2, 3, 10, 24) and part.info is info
    torch.testing.assert_close(part.A(part.x), part.y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(part.A.adjoint(part.y), A.adjoint(y)[..., rows, :], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(part.A.normal(part.x), A.normal(x)[..., rows, :], rtol=1e-10, atol=1e-12)


def test_strips_move_and_no_strip_is_the_whole():
    batch = make_batch()._replace(x=None)
    assert strip(batch, None, torch.Generator()) is batch and strip(batch, 32, torch.Generator()) is batch
    generator = torch.Generator().manual_seed(0)
    assert len({strip(batch, 8, generator).y.sum().item() for _ in range(20)}) > 5
    assert strip(batch, 8, generator).x is None
    with pytest.raises(ValueError, match="mask must have 1 or 8 rows"):
        strip(batch._replace(A=batch.A.with_mask(batch.A.mask.expand(1, 1, 32, 32))), 8, generator)
    with pytest.raises(TypeError, match="batch.A must be a MultiCoilMRI if rows is given, got a Identity"):
        strip(batch._replace(A=nn.Identity()), 8, generator)


def test_strategies_train_on_strips_and_the_teacher_sees_the_whole_slice():
    batch, teacher = make_batch(), Seeing()
    school, model = make_strategy("school", teacher=teacher, rows=8), Seeing()
    school(model, batch, torch.Generator().manual_seed(0))
    assert school.teacher.seen[0][0].shape[-2] == 32 and model.seen[0][0].shape[-2] == 8
    x = strip(batch._replace(x=batch.A.adjoint(batch.y)), 8, torch.Generator().manual_seed(0)).x
    assert school(model, batch, torch.Generator().manual_seed(0)) < 1e-10, "the zero-filled strip is that of the slice"
    torch.testing.assert_close(x, model.seen[0][1].adjoint(model.seen[0][0]))
    for strategy in (make_strategy("supervised", rows=8), make_strategy("self-supervised", loss="split", rows=8)):
        strategy(model, batch, torch.Generator().manual_seed(0))
        assert model.seen[-1][0].shape[-2] == 8
    with pytest.raises(ValueError, match="rows"):
        train(model, [batch], school, steps=1, rows=0, progress=False)


def test_a_network_may_add_its_own_terms_in_training_only():
    batch = make_batch()
    arguments = []

    class Own(Seeing):
        def stability(self, *given):
            arguments.append(given)
            return 10.0

    for name in ("supervised", "school", *SELF_SUPERVISED):
        chosen = {"name": "self-supervised", "loss": name} if name in SELF_SUPERVISED else {"name": name}
        strategy, model = make_strategy(**chosen, teacher=Seeing()), Own()
        with_terms = strategy(model.train(), batch, torch.Generator().manual_seed(0))
        plain = strategy(model.eval(), batch, torch.Generator().manual_seed(0))
        assert with_terms.item() == pytest.approx(plain.item() + 10 * (name != "split"))
    for x_hat, y, A, x, loss, generator in arguments:
        assert torch.equal(x_hat, A.adjoint(y)) and callable(loss)
    assert [given[3] is not None for given in arguments] == [True, True, False, False]


@pytest.mark.parametrize("name", ["supervised", "school", "self-supervised"])
def test_the_terms_of_deq_reach_eqs_7_to_9(name):
    batch = make_batch()
    losses = []
    for contraction in (None, 0.01):
        torch.manual_seed(0)
        model = DEQ(features=4, num_blocks=1, train_iterations=8, gradient="jacobian-free", contraction=contraction)
        strategy = make_strategy(name, teacher=DEQ(features=2, num_blocks=1))
        losses.append(strategy(model.train(), batch, torch.Generator().manual_seed(0)))
    losses[1].backward()
    assert losses[1] > losses[0] + 1e-4 and all(p.grad.isfinite().all() for p in model.parameters())


def test_held_out_lines_are_fixed_unseen_and_score_the_network():
    batches = [make_batch(seed) for seed in range(3)]
    given, score = hold_out(batches, share=0.4, seed=1)
    again, _ = hold_out(batches, share=0.4, seed=1)
    for batch, part, same in zip(batches, given, again):
        assert torch.equal(part.A.mask, same.A.mask) and part.x is None
        assert torch.equal(part.y, batch.y * part.A.mask) and part.A.mask.sum() < batch.A.mask.sum()
        assert not (part.A.mask & ~batch.A.mask).any()
    model = Seeing()
    found = score(model)
    assert all(torch.equal(y, part.y) and torch.equal(A.mask, part.A.mask) for (y, A), part in zip(model.seen, given))
    by_hand = []
    for batch, part in zip(batches, given):
        held = batch.A.with_mask(batch.A.mask & ~part.A.mask)
        by_hand.append(data_fidelity(part.A.adjoint(part.y), held.mask * batch.y, held).item())
    assert found == pytest.approx(-sum(by_hand) / 3)


def test_early_stopping_on_held_out_lines_keeps_the_best_weights():
    """A factor that starts right and is trained on noise gets worse: the held-out lines notice."""
    y, A, x, _ = batch = make_batch(size=(32, 32))
    given, score = hold_out([batch], share=0.5)
    network = Image(x + 0.1)
    noisy = [given[0]._replace(y=given[0].A.mask * (given[0].y + torch.randn_like(y)))]
    log = train(network, noisy, make_strategy("self-supervised", loss="fidelity"), validate=score, keep_best=True,
                steps=60, learning_rate=3e-2, validate_every=5, patience=3, progress=False)  # fmt: skip
    assert log.steps < 60 and log.best_step < log.steps
    assert score(network) == max(value for _, value in log.validation)


def test_tuning_subjects_are_not_those_of_the_experiments(tmp_path):
    """The settings of the demo were tuned on simulated subjects from number 50 on; the demo has those before."""
    config = load_config("demo")
    files = simulate(tmp_path, 56, 1, (32, 32), 2, seed=config.data.simulation.seed, progress=False)
    assert sum(config.data.subjects) == 50
    splits = split_subjects(files[:50], config.data.subjects, config.data.seed)
    subjects = {name: {read_volume_header(path).subject for path in paths} for name, paths in splits.items()}
    subjects["tune"] = {read_volume_header(path).subject for path in files[50:]}
    assert [len(part) for part in subjects.values()] == [*config.data.subjects, 6]
    assert len(set.union(*subjects.values())) == 56, "no subject is in two of the sets"
