"""Zero-filled and CG-SENSE: exact where exactness is known, tuned on what it is given."""

import pytest
import torch

from spade.basics import Batch
from spade.metrics import bicubic, cg_sense, sweep_cg_sense, tune_cg_sense, zero_filled
from spade.operators import BlurDownsample, MultiCoilMRI, normalize_maps


def problem(batch: int = 1, coils: int = 4, size=(6, 8), noise: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    draw = lambda channels: torch.randn(batch, channels, *size, generator=generator, dtype=torch.complex128)
    mask = torch.tensor([True, False, True, True, False, True, False, True])[: size[1]]
    A, x = MultiCoilMRI(mask, normalize_maps(draw(coils))), draw(1)
    y = A(x) + noise * mask * draw(coils)
    return Batch(y, A, x, {name: [0] * batch for name in ("file", "subject", "slice", "scale")})


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_cg_sense_solves_the_normal_equations(batch):
    y, A, *_ = problem(batch)
    x_hat = cg_sense(y, A, 0.05, 100)
    residual = A.normal(x_hat) + 0.05 * x_hat - A.adjoint(y)
    assert residual.abs().max() < 1e-10


def test_noise_free_and_determined_gives_the_object():
    y, A, x, _ = problem()
    assert torch.allclose(cg_sense(y, A, 0.0, 300), x, atol=1e-6)


def test_a_batch_is_its_images_one_by_one():
    y, A, *_ = problem(3)
    together = cg_sense(y, A, 0.01, 5)
    for i in range(3):
        assert torch.allclose(
            together[i : i + 1], cg_sense(y[i : i + 1], MultiCoilMRI(A.mask, A.maps[i : i + 1]), 0.01, 5)
        )


def test_zero_filled_is_the_adjoint_and_the_direction_of_the_first_step():
    y, A, *_ = problem()
    first, start = cg_sense(y, A, 0.01, 1), zero_filled(y, A)
    assert torch.equal(start, A.adjoint(y))
    ratio = first / start
    assert (ratio - ratio.mean()).abs().max() < 1e-10


def test_tuning_picks_the_best_of_the_sweep_and_prefers_damping_under_noise():
    noisy = problem(2, noise=0.5)
    sweep = sweep_cg_sense([noisy], regularizations=(1e-4, 1e-1), max_iterations=12)
    best = tune_cg_sense([noisy], regularizations=(1e-4, 1e-1), max_iterations=12)
    assert len(sweep) == 24 and best.psnr == sweep.psnr.max()
    clean = tune_cg_sense([problem(2)], regularizations=(1e-4, 1e-1), max_iterations=12)
    assert clean.regularization == 1e-4 and clean.iterations > best.iterations and clean.psnr > best.psnr


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ((-1.0, 3), "regularization"),
        ((float("inf"), 3), "regularization"),
        ((0.1, 0), "iterations"),
        ((0.1, 2.5), "iterations"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    y, A, *_ = problem()
    with pytest.raises(ValueError, match=sentence):
        cg_sense(y, A, *settings)


def test_no_validation_data():
    with pytest.raises(ValueError, match="must hold validation data"):
        tune_cg_sense([])


# Super-resolution


def cubic(t: float) -> float:
    "Keys' interpolation kernel with a = -3/4, PyTorch's."
    t, a = abs(t), -0.75
    return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t < 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bicubic_is_keys_interpolation_at_the_places_of_the_samples(scale):
    y = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = []
    for n in (5, 7):
        matrix = torch.zeros(n * scale, n, dtype=torch.float64)
        for p in range(n * scale):
            for i in range(-3, n + 3):
                matrix[p, min(max(i, 0), n - 1)] += cubic(p / scale - i)
        weights.append(matrix)
    expected = weights[0] @ y @ weights[1].T
    found = bicubic(y, BlurDownsample(torch.ones(1, 1), scale))
    assert found.dtype == torch.float64 and torch.allclose(found, expected, atol=1e-9)


def test_bicubic_needs_a_scale():
    y, A, *_ = problem()
    with pytest.raises(TypeError, match="A must have a scale, such as BlurDownsample, got MultiCoilMRI"):
        bicubic(y, A)
