"""DeepInverse: adapters of operators and networks, its networks pruned exactly, its losses and its trainer."""

import copy

import pytest
import torch
from foreign import load, relative_error, widths, zeroed
from torch import nn

deepinv = load("deepinv")

import spade  # noqa: E402
from spade.basics import Batch, seeded  # noqa: E402
from spade.deepinv import (  # noqa: E402
    ForDeepInverse,
    FromDeepInverse,
    OperatorPhysics,
    PhysicsOperator,
    as_channels,
    as_operator,
    as_physics,
    from_channels,
)
from spade.examples import brain  # noqa: E402
from spade.losses import data_fidelity  # noqa: E402
from spade.models import VarNet  # noqa: E402
from spade.operators import BlurDownsample, LinearOperator, MultiCoilMRI, adjoint_error  # noqa: E402

NOISE = deepinv.physics.GaussianNoise(0.3)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=seeded("deepinv", *shape))


def mri_mask(batch=1, height=12, width=10):
    columns = torch.rand(batch, 1, 1, width, generator=seeded("mask")) < 0.5
    return columns.expand(batch, 2, height, width).float()


def coil_maps(batch=1, coils=3, height=12, width=10):
    return random(batch, coils, height, width, dtype=torch.complex64)


def small_dncnn():
    torch.manual_seed(0)
    return deepinv.models.DnCNN(2, 2, depth=4, nf=10, pretrained=None)


# Numbers


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_channels_hold_real_and_imaginary_part(dtype):
    x, y = random(2, 1, 4, 5, dtype=dtype), random(2, 3, 4, 5, dtype=dtype)
    channels, kspace = as_channels(x), as_channels(y.conj(), coils=True)
    assert torch.equal(channels[:, 0], x[:, 0].real) and torch.equal(channels[:, 1], x[:, 0].imag)
    assert kspace.shape == (2, 2, 3, 4, 5) and torch.equal(kspace[:, 1], -y.imag)
    assert torch.equal(from_channels(channels), x) and torch.equal(from_channels(kspace), y.conj())
    assert from_channels(as_channels(y[:, :1], coils=True)).shape == (2, 1, 4, 5)


# Physics as operator


PHYSICS = {
    "MultiCoilMRI": lambda: (deepinv.physics.MultiCoilMRI(mri_mask(), coil_maps()), (2, 2, 12, 10)),
    "MultiCoilMRI of two": lambda: (deepinv.physics.MultiCoilMRI(mri_mask(2), coil_maps(2)), (2, 2, 12, 10)),
    "MRI": lambda: (deepinv.physics.MRI(mri_mask()), (3, 2, 12, 10)),
    "MRI with weights": lambda: (deepinv.physics.MRI(mri_mask() * 0.5), (1, 2, 12, 10)),
    "MRI of volumes": lambda: (deepinv.physics.MRI(torch.ones(1, 2, 3, 6, 5), three_d=True), (1, 2, 3, 6, 5)),
    "Inpainting": lambda: (deepinv.physics.Inpainting((1, 12, 10), mask=0.6), (2, 1, 12, 10)),
    "BlurFFT": lambda: (deepinv.physics.BlurFFT((1, 12, 10), torch.rand(1, 1, 3, 3) / 9), (1, 1, 12, 10)),
    "Blur": lambda: (deepinv.physics.Blur(torch.rand(1, 1, 3, 3) / 9, padding="circular"), (1, 1, 12, 10)),
    "Downsampling": lambda: (deepinv.physics.Downsampling((3, 12, 12), filter="gaussian", factor=2), (1, 3, 12, 12)),
    "Tomography": lambda: (deepinv.physics.Tomography(8, 16, normalize=True), (1, 1, 16, 16)),
    "BlurDownsample": lambda: (as_physics(BlurDownsample(torch.full((3, 3), 1 / 9), 2)), (2, 3, 12, 10)),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_both_directions_are_adjoint_and_without_noise(name):
    physics, shape = PHYSICS[name]()
    physics.set_noise_model(NOISE)
    image = random(*shape)
    A = as_operator(physics)
    is_complex = isinstance(A, MultiCoilMRI)
    assert is_complex == (name in ("MultiCoilMRI", "MultiCoilMRI of two", "MRI"))
    x = from_channels(image) if is_complex else image
    y = A(x)
    clean = physics.A(image)
    assert relative_error(as_channels(y, coils=clean.ndim == 5) if is_complex else y, clean) < 1e-6
    assert adjoint_error(A, x, random(*y.shape, dtype=y.dtype)) < 1e-6
    back = as_physics(A)
    channels = as_channels(y, coils=True) if is_complex else y
    assert relative_error(back.A(image), channels) < 1e-6
    assert relative_error(back.A_adjoint(channels), as_channels(A.adjoint(y)) if is_complex else A.adjoint(y)) < 1e-6
    assert adjoint_error(PhysicsOperator(back), image, random(*back.A(image).shape)) < 1e-6


@pytest.mark.parametrize("name", PHYSICS)
def test_the_truth_fits_its_measurement_exactly(name):
    """`physics(x)` adds noise: eq. 9's data fidelity of the truth was 0.16 to 0.27."""
    physics, shape = PHYSICS[name]()
    physics.set_noise_model(NOISE)
    A, image = as_operator(physics), random(*shape)
    x = from_channels(image) if isinstance(A, MultiCoilMRI) else image
    assert data_fidelity(x, A(x), A) == 0
    if name != "BlurDownsample":  # as operator that of this package, which has no noise
        for operator in (physics, PhysicsOperator(physics)):
            assert data_fidelity(image, physics.A(image), operator) == 0
        assert not torch.equal(physics(image), physics.A(image))


@pytest.mark.parametrize("name", ["Inpainting", "MultiCoilMRI", "MRI"])
def test_data_fidelity_is_the_mean_over_measured_points(name):
    physics, shape = PHYSICS[name]()
    image = random(*shape)
    A, y = PhysicsOperator(physics), physics.A(image)
    mask = physics.mask.unsqueeze(2).expand_as(y) if y.ndim == 5 else physics.mask.expand_as(y)
    measured = mask.bool()
    assert torch.allclose(data_fidelity(image, torch.zeros_like(y), A), y[measured].abs().mean())
    assert PhysicsOperator(PHYSICS["Blur"]()[0]).mask is None


def test_a_nonlinear_physics_is_refused():
    for convert in (PhysicsOperator, as_operator):
        with pytest.raises(TypeError, match="physics must be a LinearPhysics of deepinv, got a Haze."):
            convert(deepinv.physics.Haze())


# Operator as physics


class Phase(LinearOperator):
    """A complex operator of two measurements: a phase, and the sum of the rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.polar(torch.ones(6, 5), random(6, 5)))

    def forward(self, x):
        return torch.cat([self.phase * x, 1j * x], dim=1)

    def adjoint(self, y):
        return self.phase.conj() * y[:, :1] - 1j * y[:, 1:]


def test_a_complex_operator_becomes_a_physics_of_two_channels():
    A, x = Phase(), random(2, 1, 6, 5, dtype=torch.complex64)
    physics = as_physics(A, two_channels=True, noise_model=NOISE)
    image = as_channels(x)
    assert torch.equal(from_channels(physics.A(image)), A(x))
    assert abs(physics.adjointness_test(image)) / image.norm() ** 2 < 1e-6
    assert as_operator(physics) is A and as_physics(physics) is physics and isinstance(physics, OperatorPhysics)
    assert not torch.equal(physics(image), physics.A(image)), "the noise of the settings is added"
    assert "operator.phase" in physics.state_dict(), "the operator moves with the physics"
    step = physics.prox_l2(torch.zeros_like(image), physics.A(image), gamma=1.0)  # here A^H A = 2, so 2 x / (2 + 1)
    assert relative_error(step, image * 2 / 3) < 1e-3


def test_maps_mask_and_settings_of_an_mri_operator_are_those_of_the_physics():
    y, A, x = brain()
    physics = as_physics(A, noise_model=NOISE)
    assert isinstance(physics, deepinv.physics.MultiCoilMRI) and physics.noise_model is NOISE
    assert torch.equal(physics.coil_maps, A.maps) and physics.mask.shape == (1, 2, 96, 96)
    assert torch.equal(physics.mask[:, :1].bool(), A.mask.expand(1, 1, 96, 96))
    double = as_physics(MultiCoilMRI(A.mask, A.maps.to(torch.complex128)))
    assert double.mask.dtype == torch.float64 and double.A(as_channels(x).double()).dtype == torch.float64


# Networks of DeepInverse


def unfolded(algorithm="PGD", **settings):
    prior = [deepinv.optim.PnP(small_dncnn()) for _ in range(settings.pop("priors", 1))]
    return getattr(deepinv.optim, algorithm)(
        data_fidelity=deepinv.optim.L2(),
        prior=prior if len(prior) > 1 else prior[0],
        stepsize=0.5,
        max_iter=3,
        trainable_params=["stepsize"],
        **settings,
    )


NETWORKS = {
    "PGD": lambda: unfolded(unfold=True),
    "PGD, one prior per iteration": lambda: unfolded(unfold=True, priors=3),
    "HQS": lambda: unfolded("HQS", unfold=True),
    "ADMM": lambda: unfolded("ADMM", unfold=True, beta=1.0),
    "DRS": lambda: unfolded("DRS", unfold=True, beta=1.0),
    "deep equilibrium": lambda: unfolded(DEQ=True),
    "MoDL": lambda: deepinv.models.MoDL(small_dncnn(), num_iter=2),
    "VarNet": lambda: deepinv.models.VarNet(small_dncnn(), num_cascades=2),
    "E2E-VarNet": lambda: deepinv.models.VarNet(small_dncnn(), num_cascades=2, mode="e2e-varnet"),
    "artifact removal": lambda: deepinv.models.ArtifactRemoval(
        deepinv.models.UNet(2, 2, scales=2, batch_norm=False, channels_per_scale=[10, 20]), mode="adjoint"
    ),
}


def priors_of(model):
    """(cnn, example, output layers) of each denoiser of `model`."""
    found = [m for m in model.modules() if isinstance(m, (deepinv.models.DnCNN, deepinv.models.UNet))]
    last = lambda m: m.out_conv if hasattr(m, "out_conv") else [n for n in m.modules() if isinstance(n, nn.Conv2d)][-1]
    return [(m, torch.zeros(1, 2, 16, 16), [last(m)]) for m in found]


@pytest.fixture(scope="module")
def small():
    """(y, A, x) of 24 × 20 pixels and three coils."""
    A = MultiCoilMRI(mri_mask(1, 24, 20)[0, 0, 0].bool(), coil_maps(1, 3, 24, 20) / 3)
    x = random(1, 1, 24, 20, dtype=torch.complex64)
    return A(x), A, x


@pytest.mark.parametrize("name", NETWORKS)
def test_its_networks_are_pruned_exactly(name, small):
    y, A, x = small
    network = NETWORKS[name]()
    teacher = FromDeepInverse(network).eval()
    with torch.no_grad():
        expected = network(as_channels(y, coils=True), as_physics(A))
        assert torch.equal(teacher(y, A), from_channels(expected)), "the wrapper changes nothing"
    student = spade.prune(teacher, 0.4, inputs=(y, A)).eval()
    named = spade.prune(teacher, 0.4, priors=priors_of(teacher))
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), named.state_dict().values(), strict=True)
    )
    expected = {2: 2, 10: 6, 20: 12, 30: 18}  # floor(0.6 width); the image keeps its two channels
    assert widths(student) == [(expected[a], expected[b]) for a, b in widths(teacher)] and 6 in sum(widths(student), ())
    with torch.no_grad():
        assert relative_error(student(y, A), zeroed(teacher, student)(y, A)) < 1e-4
        assert relative_error(student(y, A), teacher(y, A)) > 1e-4


def test_a_student_is_saved_and_loaded(tmp_path, small):
    y, A, x = small
    student = spade.prune(FromDeepInverse(unfolded(unfold=True)), 0.4, inputs=(y, A)).eval()
    spade.save(student, tmp_path / "student")
    loaded = spade.load(tmp_path / "student", build=lambda: FromDeepInverse(unfolded(unfold=True))).eval()
    with torch.no_grad():
        assert widths(loaded) == widths(student) and torch.equal(loaded(y, A), student(y, A))


def test_a_network_of_real_images_keeps_its_physics():
    physics = deepinv.physics.Inpainting((1, 16, 16), mask=0.6, noise_model=NOISE)
    network = deepinv.models.ArtifactRemoval(deepinv.models.DnCNN(1, 1, depth=3, nf=8, pretrained=None), mode="adjoint")
    y = physics(random(2, 1, 16, 16))
    model = FromDeepInverse(network)
    with torch.no_grad():
        assert torch.equal(model(y, as_operator(physics)), network(y, physics))


@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_all_strategies_train_a_pruned_network(strategy, small):
    y, A, x = small
    teacher = FromDeepInverse(unfolded(unfold=True))
    student = spade.prune(teacher, 0.4, priors=priors_of(teacher))
    before = copy.deepcopy(student.state_dict())
    data = [Batch(y, A, x if strategy == "supervised" else None, {"subject": ["a"]})]
    log = spade.finetune(
        student, data, strategy, teacher if strategy == "school" else None, steps=8, learning_rate=1e-3, progress=False
    )
    assert log.losses[-1] < log.losses[0]
    assert [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]


def test_its_losses_train_a_student(small):
    y, A, x = small
    teacher = FromDeepInverse(unfolded(unfold=True))
    student = spade.prune(teacher, 0.4, priors=priors_of(teacher))
    consistency = deepinv.loss.MCLoss()
    equivariance = deepinv.loss.EILoss(deepinv.transform.Shift(), apply_noise=False)

    def loss(model, batch):
        kspace, physics = as_channels(batch.y, coils=True), as_physics(batch.A)
        x_net = model.model(kspace, physics)
        term = equivariance(x_net=x_net, physics=physics, model=model.model)
        return consistency(y=kspace, x_net=x_net, physics=physics) + term

    data, settings = [Batch(y, A, x, {"subject": ["a"]})], dict(steps=8, learning_rate=1e-2, progress=False)
    log = spade.finetune(student, data, loss=loss, **settings)
    assert log.losses[-1] < log.losses[0]
    log = spade.finetune(student, data, "supervised", loss=deepinv.loss.SupLoss(nn.L1Loss()), **settings)
    assert log.losses[-1] < log.losses[0]


def trainer(model, physics, pairs, epochs):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    quiet = dict(verbose=False, show_progress_bar=False, save_path=None, non_blocking_transfers=False, device="cpu")
    return deepinv.Trainer(model, physics, optimizer, torch.utils.data.DataLoader(pairs), epochs=epochs, **quiet)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_its_trainer_trains_a_student(whose, small):
    y, A, x = small
    torch.manual_seed(0)
    if whose == "ours":
        student = spade.prune(VarNet(num_cascades=1, channels=4, num_pools=2), 0.4)
        model = ForDeepInverse(student)
    else:
        teacher = unfolded(unfold=True)
        model = student = spade.prune(teacher, 0.4, priors=priors_of(teacher))
    image, kspace, physics = as_channels(x), as_channels(y, coils=True), as_physics(A)
    error = lambda: (model(kspace, physics) - image).square().mean().item()
    before, sizes = error(), widths(student)
    trainer(model, physics, [{"x": image[0], "y": kspace[0]}], epochs=8).train()
    assert error() < before and widths(student) == sizes


def test_our_network_is_the_same_in_deepinverse(small):
    y, A, x = small
    torch.manual_seed(0)
    model = VarNet(num_cascades=1, channels=4, num_pools=2).eval()
    with torch.no_grad():
        expected = model(y, A)
        assert (
            relative_error(from_channels(ForDeepInverse(model)(as_channels(y, coils=True), as_physics(A))), expected)
            < 1e-6
        )
        one = deepinv.physics.MRI(mri_mask(1, 24, 20))
        kspace = one.A(as_channels(x))
        assert ForDeepInverse(model)(kspace, one).shape == (1, 2, 24, 20)
    blur = BlurDownsample(torch.full((3, 3), 1 / 9), 2)
    photo = random(1, 3, 12, 12)
    assert torch.equal(
        ForDeepInverse(lambda y, A: A.adjoint(y))(blur(photo), as_physics(blur)), blur.adjoint(blur(photo))
    )
