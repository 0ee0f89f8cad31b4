"""Properties of every operator, and regressions for the faults of the code released with the paper."""
from collections.abc import Callable

import numpy as np
import pytest
import torch

from spade.operators import (LinearOperator, MultiCoilMRI, adjoint_error, fft2c, gradient_error, linearity_error,
                             normalize_maps, operator_norm)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    """Complex normal numbers from a seed."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mri(batch: int, coils: int, size: tuple[int, int], mask_shape: tuple[int, ...]) -> tuple[LinearOperator, ...]:
    """A multi-coil operator with an element of its domain and one of its range."""
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., size[1] // 2] = True
    A = MultiCoilMRI(mask, normalize_maps(random_complex(batch, coils, *size)))
    return A, random_complex(batch, 1, *size, seed=2), random_complex(batch, coils, *size, seed=3)


def mri_cases() -> dict[str, Callable[[], tuple]]:
    """Batches 1, 2, 3; 1, 4 and 12 coils; odd and non-square sizes; the three shapes of a mask."""
    cases = {}
    for batch in (1, 2, 3):
        for coils in (1, 4, 12):
            for size in ((6, 6), (5, 7), (16, 12)):
                for kind, shape in (("line", (size[1],)), ("lines", (batch, 1, 1, size[1])), ("plane", (batch, 1, *size))):
                    name = f"mri-{batch}-{coils}coils-{size[0]}x{size[1]}-{kind}"
                    cases[name] = lambda b=batch, c=coils, s=size, m=shape: mri(b, c, s, m)
    return cases


# Another operator joins by adding its cases: a name and a function that returns (A, x, y)
CASES = mri_cases()
every_operator = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_operator
def test_adjoint(case):
    A, x, y = case()
    assert adjoint_error(A, x, y) < 1e-10


@every_operator
def test_linear(case):
    A, x, y = case()
    assert linearity_error(A, x, x.flip(-1)) < 1e-10
    assert linearity_error(A.adjoint, y, y.flip(-1)) < 1e-10


@every_operator
def test_gradient_is_the_adjoint(case):
    A, x, y = case()
    assert gradient_error(A, x, y) < 1e-10


@every_operator
def test_norm_and_normal(case):
    A, x, _ = case()
    assert operator_norm(A, x) <= 1 + 1e-10
    assert torch.equal(A.normal(x), A.adjoint(A(x)))


def test_the_properties_notice_a_wrong_adjoint():
    class Wrong(MultiCoilMRI):
        def adjoint(self, y):
            return super().adjoint(y) * 192 # off by the number of pixels

    A, x, y = mri(1, 12, (16, 12), (12,))
    wrong = Wrong(A.mask, A.maps)
    assert adjoint_error(wrong, x, y) > 0.1 and gradient_error(wrong, x, y) > 0.1


def test_dense_matrix_on_a_4x4_image():
    maps, mask = normalize_maps(random_complex(1, 3, 4, 4)), torch.tensor([True, False, True, True])
    position = np.arange(4) - 2
    dft = np.exp(-2j * np.pi * np.outer(position, position) / 4) / 2
    rows = [np.diag(np.tile(mask.numpy(), 4)) @ np.kron(dft, dft) @ np.diag(coil.flatten()) for coil in maps[0].numpy()]
    matrix = torch.from_numpy(np.concatenate(rows))
    A, x, y = MultiCoilMRI(mask, maps), random_complex(1, 1, 4, 4), random_complex(1, 3, 4, 4)
    assert torch.allclose(A(x).flatten(), matrix @ x.flatten(), atol=1e-12)
    assert torch.allclose(A.adjoint(y).flatten(), matrix.mH @ y.flatten(), atol=1e-12)


@pytest.mark.parametrize("coils", (1, 11, 12, 13))
def test_the_fourier_convention_does_not_depend_on_the_number_of_coils(coils):
    """The released code took another convention, and a wrong adjoint, at 12 coils."""
    image = random_complex(1, 1, 16, 12)
    A = MultiCoilMRI(torch.ones(12, dtype=torch.bool), torch.full((1, coils, 16, 12), coils**-0.5, dtype=torch.complex128))
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image.numpy(), (-2, -1)), norm="ortho"), (-2, -1)) * coils**-0.5
    assert np.allclose(A(image).numpy(), np.broadcast_to(expected, (1, coils, 16, 12)), atol=1e-12)
    assert torch.allclose(A.normal(image), image, atol=1e-12)


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_the_mask_does_not_depend_on_the_batch_size(batch):
    """The released code tested the length of the batch where it meant the number of axes."""
    A, x, y = mri(batch, 4, (6, 8), (batch, 1, 1, 8))
    for index in range(batch):
        alone = MultiCoilMRI(A.mask[index:index + 1], A.maps[index:index + 1])
        assert torch.allclose(A(x)[index:index + 1], alone(x[index:index + 1]), atol=1e-14)
        assert torch.allclose(A.adjoint(y)[index:index + 1], alone.adjoint(y[index:index + 1]), atol=1e-14)


def test_one_operator_serves_a_batch():
    A, _, _ = mri(1, 2, (6, 8), (8,))
    x, y = random_complex(3, 1, 6, 8), random_complex(3, 2, 6, 8)
    assert A(x).shape == y.shape and adjoint_error(A, x, y) < 1e-10


def test_the_three_shapes_of_a_mask_agree():
    A, x, _ = mri(2, 2, (6, 8), (8,))
    line = A.mask[0, 0, 0]
    for mask in (line.expand(2, 1, 1, 8), line.expand(2, 1, 6, 8)):
        assert torch.equal(A.with_mask(mask)(x), A(x))
        assert A.with_mask(mask).sampling_rate == pytest.approx(line.double().mean().item())


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_precision_follows_the_maps(dtype):
    A = MultiCoilMRI(torch.ones(8, dtype=torch.bool), normalize_maps(random_complex(1, 2, 6, 8, dtype=dtype)))
    x = random_complex(1, 1, 6, 8, dtype=dtype)
    assert A(x).dtype == dtype and A.adjoint(A(x)).dtype == dtype
    assert torch.allclose(A.normal(x), x, atol=1e-5)


@pytest.mark.parametrize("device", ("meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))))
def test_to_moves_mask_and_maps(device):
    A, x, _ = mri(1, 2, (6, 8), (8,))
    moved = A.to(device)
    assert moved.mask.device.type == moved.maps.device.type == device
    assert moved(x.to(device)).device.type == device


def test_transformed_maps_are_normalised_and_the_operator_is_left_alone():
    A, x, y = mri(2, 4, (8, 8), (8,))
    before = A.maps.clone()
    moved = A.transformed(lambda maps: (maps + maps.roll(1, -1)) / 2)
    assert torch.equal(A.maps, before) and torch.equal(moved.mask, A.mask)
    power = moved.maps.abs().square().sum(dim=1)
    assert torch.allclose(power, torch.ones_like(power)) and adjoint_error(moved, x, y) < 1e-10


def test_normalised_zero_maps_have_a_finite_gradient():
    maps = torch.zeros(1, 2, 3, 3, dtype=torch.complex64, requires_grad=True)
    normalize_maps(maps).abs().square().sum().backward()
    assert torch.isfinite(torch.view_as_real(maps.grad)).all()


def test_fft_keeps_the_norm():
    image = random_complex(2, 15, 12)
    assert fft2c(image).norm() == pytest.approx(image.norm())


LINE, MAPS = torch.ones(8, dtype=torch.bool), normalize_maps(random_complex(1, 2, 6, 8))


@pytest.mark.parametrize("mask, maps, message", (
    (torch.ones(7, dtype=torch.bool), MAPS, "mask is 7 columns wide, but the maps are 8"),
    (torch.ones(1, 1, 5, 8, dtype=torch.bool), MAPS, "mask has 5 rows, but the maps have 6"),
    (torch.ones(3, 1, 1, 8, dtype=torch.bool), MAPS.expand(2, 2, 6, 8), "mask is for a batch of 3, but the maps are for 2"),
    (torch.ones(6, 8, dtype=torch.bool), MAPS, r"mask must have shape .* found \(6, 8\)"),
    (LINE, MAPS[0], r"maps must have shape .* found \(2, 6, 8\)"),
))
def test_what_does_not_fit_together_is_refused(mask, maps, message):
    with pytest.raises(ValueError, match=message):
        MultiCoilMRI(mask, maps)


@pytest.mark.parametrize("mask, maps, message", (
    (LINE.float(), MAPS, "mask must be boolean .* found torch.float32"),
    (LINE, MAPS.real, "maps must be complex64 or complex128, found torch.float64"),
))
def test_wrong_types_are_refused(mask, maps, message):
    with pytest.raises(TypeError, match=message):
        MultiCoilMRI(mask, maps)


@pytest.mark.parametrize("name, call, shape", (
    ("image", "forward", (1, 1, 6, 7)), ("image", "forward", (1, 2, 6, 8)), ("image", "expand", (6, 8)),
    ("k-space", "adjoint", (1, 3, 6, 8)), ("k-space", "adjoint", (1, 2, 5, 8)), ("coil images", "reduce", (1, 1, 6, 8)),
))
def test_inputs_that_do_not_fit_are_refused(name, call, shape):
    A = MultiCoilMRI(LINE, MAPS)
    with pytest.raises(ValueError, match=f"{name} must have shape .* found") as caught:
        getattr(A, call)(torch.zeros(shape, dtype=torch.complex128))
    assert str(shape) in str(caught.value)


def test_a_batch_of_another_length_is_refused():
    A = MultiCoilMRI(torch.ones(3, 1, 1, 8, dtype=torch.bool), MAPS)
    with pytest.raises(ValueError, match=r"image must have shape \(3, 1, 6, 8\)"):
        A(torch.zeros(2, 1, 6, 8, dtype=torch.complex128))
