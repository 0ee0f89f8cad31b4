"""Plug-and-play and RED: closed-form fixed points, pruning inside the iteration, a published denoiser."""

import copy
import re
from pathlib import Path

import pytest
import torch
from foreign import relative_error, widths, zeroed
from torch import nn

import spade
from spade.basics import Batch, seeded
from spade.data.photos import read_photo
from spade.losses import l1
from spade.metrics import psnr
from spade.operators import BlurDownsample
from spade.plug_and_play import DnCNN, PlugAndPlay
from spade.repairing import repair

SIGMA = 25 / 255  # the noise for which the published denoiser was trained


def gaussian(width=1.0, radius=3):
    axis = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * width**2))
    return kernel / kernel.sum()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=seeded("noise", seed))


@pytest.fixture()
def blurred():
    """(y, A, x): a random image, blurred, with noise."""
    A, x = BlurDownsample(gaussian(), 1), torch.rand(1, 1, 16, 16, generator=seeded("image"))
    return A(x) + 0.01 * noise(1, 1, 16, 16), A, x


def small(features=10, depth=4):
    torch.manual_seed(0)
    return DnCNN(features=features, depth=depth)


class Scaled(nn.Module):
    """The linear denoiser D(x) = c x."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x):
        return self.c * x


@pytest.mark.parametrize("c", [0.5, 0.9])
@pytest.mark.parametrize("step_size", [0.5, 1.0])
def test_a_linear_denoiser_gives_the_regularized_least_squares_solution(blurred, c, step_size):
    """PnP: (AᵀA + (1 − c)/(c γ)) x = Aᵀy. RED: (AᵀA + τ (1 − c)) x = Aᵀy."""
    y, A, x = blurred
    pnp = PlugAndPlay(Scaled(c), "pnp", step_size, iterations=800)(y, A)
    assert relative_error(pnp, A.proximal(torch.zeros_like(x), y, (1 - c) / (c * step_size))) < 1e-4
    red = PlugAndPlay(Scaled(c), "red", step_size, strength=0.7, iterations=800)(y, A)
    assert relative_error(red, A.proximal(torch.zeros_like(x), y, 0.7 * (1 - c))) < 1e-4


def test_strength_interpolates_between_no_denoising_and_the_denoiser(blurred):
    y, A, x = blurred
    step = lambda strength, c=0.5: PlugAndPlay(Scaled(c), strength=strength).step(x, y, A)
    assert torch.allclose(step(0.25), 0.75 * step(0.0) + 0.25 * step(1.0))
    assert torch.equal(step(0.0), x - A.adjoint(A(x) - y))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'admm': choose one of pnp, red."):
        PlugAndPlay(small(), "admm")


@pytest.mark.parametrize("method", ["pnp", "red"])
def test_the_denoiser_is_pruned_exactly_inside_the_iteration(blurred, method):
    y, A, x = blurred
    teacher = PlugAndPlay(small(), method, strength=0.5, iterations=4).eval()
    student = spade.prune(teacher, 0.4).eval()
    assert widths(student) == [(1, 6), (6, 6), (6, 6), (6, 1)] and widths(teacher)[1] == (10, 10)
    with torch.no_grad():
        assert relative_error(student(y, A), zeroed(teacher, student)(y, A)) < 1e-4
        assert relative_error(student(y, A), teacher(y, A)) > 1e-4
    assert (student.method, student.strength, student.iterations) == (method, 0.5, 4)


def test_the_school_works_through_the_iteration(blurred):
    y, A, x = blurred
    teacher = PlugAndPlay(small(), strength=0.5, iterations=3)
    student = spade.prune(teacher, 0.4)
    data = [Batch(y, A, None, {"subject": ["a"]})]
    log = spade.finetune(student, data, "school", teacher, steps=12, learning_rate=1e-3, progress=False)
    assert log.losses[-1] < log.losses[0]


def test_a_student_is_saved_and_loaded(tmp_path, blurred):
    y, A, x = blurred
    student = spade.prune(PlugAndPlay(small(), iterations=3), 0.4).eval()
    spade.save(student, tmp_path / "student.safetensors")
    loaded = spade.load(tmp_path / "student.safetensors", build=lambda: PlugAndPlay(small(), iterations=3)).eval()
    assert torch.equal(loaded(y, A), student(y, A))


@pytest.mark.parametrize("channels, features, depth", [(1, 64, 17), (3, 5, 3)])
def test_published_weights_give_their_own_architecture(tmp_path, channels, features, depth):
    denoiser = DnCNN(channels, features, depth)
    torch.save(denoiser.state_dict(), tmp_path / "dncnn.pth")
    loaded = DnCNN.from_published(tmp_path / "dncnn.pth")
    image = torch.rand(1, channels, 8, 8)
    assert widths(loaded) == widths(denoiser) and torch.equal(loaded(image), denoiser(image))
    assert not loaded.training


def test_other_weights_are_refused(tmp_path):
    expected = "DnCNN.from_published expects the weights of a DnCNN without batch norm"
    for weights, found in (
        ({"head.weight": torch.zeros(2)}, "got 1 names, first 'head.weight'"),
        (
            {"model.0.weight": torch.zeros(4, 1, 3, 3), "model.1.running_mean": torch.zeros(4)},
            "got 2 tensors that do not",
        ),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(expected)}.*{found}"):
            DnCNN.from_published(weights)
    torch.save(DnCNN().state_dict(), tmp_path / "dncnn_25.pth")
    with pytest.raises(ValueError, match="dncnn_25.pth must have the published SHA-256 0451a70d"):
        DnCNN.from_published(tmp_path / "dncnn_25.pth")


# The published denoiser of github.com/cszn/KAIR on real photographs


class Denoise(nn.Module):
    """A denoiser as network of (y, A), where y is the noisy image."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, y, A):
        return self.denoiser(y)

    def priors(self):
        return self.denoiser.priors()


def grey(path, top=0, left=0, size=96):
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    return (weights * read_photo(path)).sum(0)[None, None, top : top + size, left : left + size]


@pytest.fixture(scope="module")
def published(shared):
    path = shared / "weights" / "dncnn_25.pth"
    if not path.exists():
        pytest.skip(f"no published denoiser at {path}")
    return Denoise(DnCNN.from_published(path)).eval()


@pytest.fixture(scope="module")
def patches(shared):
    """(noisy, clean) training patches of the Berkeley photographs that are no test images."""
    clean = [grey(p, 100, 100, 40) for p in sorted((shared / "natural" / "BSDS500_train").glob("*.jpg"))[:40]]
    pairs = zip(*[iter(clean)] * 2, strict=True)
    return [(torch.cat(pair) + SIGMA * noise(2, 1, 40, 40, seed=i), torch.cat(pair)) for i, pair in enumerate(pairs)]


def score(image, x):
    return psnr(image[0], x[0], data_range=1.0)


def test_published_denoiser_before_and_after_pruning(shared, published, patches):
    """Noise of 25/255: pruning 20 % by eq. 6 destroys the denoiser; a few steps of the school begin to recover it."""
    assert sum(p.numel() for p in published.parameters()) == 555_137
    x = grey(shared / "natural" / "Set5" / "butterfly.bmp", 60, 60)
    noisy = x + SIGMA * noise(*x.shape)
    results = {"noisy": score(noisy, x)}
    student = spade.prune(published, 0.2)
    assert {b for pair in widths(student) for b in pair} == {1, 51}
    school = copy.deepcopy(student)
    settings = dict(loss=l1, learning_rate=3e-4, progress=False)
    spade.finetune(school.denoiser, patches, "school", published.denoiser, steps=20, **settings)
    repaired = repair(student, published, [Batch(y, None, None, {}) for y, _ in patches[:4]], pixels=1024)
    both = copy.deepcopy(repaired)
    spade.finetune(both.denoiser, patches, "school", published.denoiser, steps=20, **settings | {"learning_rate": 5e-5})
    networks = dict(teacher=published, pruned=student, school=school, repaired=repaired, both=both)
    with torch.no_grad():
        results |= {name: score(network.eval()(noisy, None), x) for name, network in networks.items()}
    print({name: round(value, 2) for name, value in results.items()})
    assert results["teacher"] > 28.5 and results["noisy"] < 20.5
    assert results["pruned"] < results["noisy"] + 1
    assert results["school"] > results["pruned"] + 0.1
    assert results["repaired"] > results["pruned"] + 3 and results["both"] > results["repaired"] + 0.3


def test_published_denoiser_inside_the_iteration(shared, published, patches):
    """Deblurring a photograph: the iteration gains with the denoiser, loses with the pruned, recovers with repair."""
    path = Path(shared / "natural" / "CBSD68" / "101085.png")
    x, A = grey(path, 120, 60, 56), BlurDownsample(gaussian(1.6, 7), 1)
    y = A(x) + 0.02 * noise(*x.shape)
    for method in ("pnp", "red"):
        teacher = PlugAndPlay(published.denoiser, method, strength=0.2, iterations=8)
        student = spade.prune(teacher, 0.2)
        repaired = repair(student, teacher, [Batch(y, A, None, {})], pixels=1024, calls=4)
        with torch.no_grad():
            quality = [score(n.eval()(y, A), x) for n in (teacher, student, repaired)]
        print(method, [round(q, 2) for q in (score(y, x), *quality)])
        assert quality[0] > score(y, x) + 0.5
        assert quality[1] < quality[0] - 0.3 and quality[2] > quality[1]
