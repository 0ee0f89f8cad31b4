"""Properties of every operator, and regressions for the faults of the code released with the paper."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from spade.basics import on_device
from spade.operators import (
    BlurDownsample,
    LinearOperator,
    MultiCoilMRI,
    acs_block,
    acs_lines,
    adjoint_error,
    as_mask,
    check_shape,
    crop_readout,
    effective_rate,
    equispaced_mask,
    fft2c,
    fold,
    gradient_error,
    kernel_spectrum,
    linearity_error,
    normalize_maps,
    operator_norm,
)


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
                for kind, shape in (
                    ("line", (size[1],)),
                    ("lines", (batch, 1, 1, size[1])),
                    ("plane", (batch, 1, *size)),
                ):
                    name = f"mri-{batch}-{coils}coils-{size[0]}x{size[1]}-{kind}"
                    cases[name] = lambda b=batch, c=coils, s=size, m=shape: mri(b, c, s, m)
    return cases


def random_real(*shape: int, seed: int = 0) -> torch.Tensor:
    """Real normal numbers from a seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_kernel(*shape: int, seed: int = 0) -> torch.Tensor:
    """Positive kernels that sum to one, from a seed."""
    kernel = random_real(*shape, seed=seed).abs()
    return kernel / kernel.sum(dim=(-2, -1), keepdim=True)


def blur(
    batch: int, kernels: int, scale: int, kernel: tuple[int, int], small: tuple[int, int]
) -> tuple[LinearOperator, ...]:
    """An operator of super-resolution with an element of its domain and one of its range."""
    A = BlurDownsample(random_kernel(kernels, 1, *kernel), scale, 0.01)
    return A, random_real(batch, 3, small[0] * scale, small[1] * scale, seed=2), random_real(batch, 3, *small, seed=3)


def blur_cases() -> dict[str, Callable[[], tuple]]:
    """Scales 1 to 4; kernels even, odd, 25 × 25 and as large as the image; one kernel for all and one for each."""
    cases = {}
    for scale in (1, 2, 3, 4):
        for kernel, small in (
            ((1, 1), (3, 3)),
            ((5, 5), (5, 7)),
            ((4, 5), (8, 6)),
            ((25, 25), (27, 25)),
            ((7, 5), (7, 5)),
        ):
            for batch, kernels in ((1, 1), (3, 1), (2, 2)):
                name = f"blur-x{scale}-{kernel[0]}x{kernel[1]}-{small[0]}x{small[1]}-{kernels}of{batch}"
                cases[name] = lambda b=batch, n=kernels, s=scale, k=kernel, m=small: blur(b, n, s, k, m)
    return cases


# Another operator joins by adding its cases: a name and a function that returns (A, x, y)
CASES = mri_cases() | blur_cases()
BLURS = blur_cases()
every_blur = pytest.mark.parametrize("case", BLURS.values(), ids=BLURS.keys())
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
    torch.testing.assert_close(A.normal(x), A.adjoint(A(x)), rtol=1e-10, atol=1e-12)


def test_the_properties_notice_a_wrong_adjoint():
    class Wrong(MultiCoilMRI):
        def adjoint(self, y):
            return super().adjoint(y) * 192  # off by the number of pixels

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
    A = MultiCoilMRI(
        torch.ones(12, dtype=torch.bool), torch.full((1, coils, 16, 12), coils**-0.5, dtype=torch.complex128)
    )
    expected = (
        np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image.numpy(), (-2, -1)), norm="ortho"), (-2, -1)) * coils**-0.5
    )
    assert np.allclose(A(image).numpy(), np.broadcast_to(expected, (1, coils, 16, 12)), atol=1e-12)
    assert torch.allclose(A.normal(image), image, atol=1e-12)


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_the_mask_does_not_depend_on_the_batch_size(batch):
    """The released code tested the length of the batch where it meant the number of axes."""
    A, x, y = mri(batch, 4, (6, 8), (batch, 1, 1, 8))
    for index in range(batch):
        alone = MultiCoilMRI(A.mask[index : index + 1], A.maps[index : index + 1])
        assert torch.allclose(A(x)[index : index + 1], alone(x[index : index + 1]), atol=1e-14)
        assert torch.allclose(A.adjoint(y)[index : index + 1], alone.adjoint(y[index : index + 1]), atol=1e-14)


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
def test_precision_is_the_higher_of_maps_and_input(dtype):
    A = MultiCoilMRI(torch.ones(8, dtype=torch.bool), normalize_maps(random_complex(1, 2, 6, 8, dtype=dtype)))
    x = random_complex(1, 1, 6, 8, dtype=dtype)
    assert A(x).dtype == dtype and A.adjoint(A(x)).dtype == dtype
    assert A(x.to(torch.complex128)).dtype == torch.complex128 and A(x.to(torch.complex64)).dtype == dtype
    assert torch.allclose(A.normal(x), x, atol=1e-5)


@pytest.mark.parametrize(
    "device", ("meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")))
)
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


def test_one_set_of_maps_is_moved_with_each_image_of_a_batch():
    A, x, y = mri(1, 2, (8, 8), (8,))
    turns = lambda images: torch.stack(
        [image.rot90(k + 1, dims=(-2, -1)) for k, image in zip(range(3), images, strict=True)]
    )
    moved = A.transformed(turns, batch=3)
    assert moved.maps.shape == (3, 2, 8, 8)
    for k, maps in enumerate(moved.maps):
        assert torch.equal(maps, A.transformed(lambda image: image.rot90(k + 1, dims=(-2, -1))).maps[0])
    assert torch.equal(A.transformed(lambda image: image).maps, A.transformed(lambda image: image, batch=1).maps)


@pytest.mark.parametrize(
    "device", ("meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")))
)
def test_on_device_leaves_the_operator_where_it_is(device):
    class Within(torch.nn.Module):
        "An operator that holds another, a parameter and a table of results."

        def __init__(self):
            super().__init__()
            self.inside, self.weight = mri(1, 2, (6, 8), (8,))[0], torch.nn.Parameter(torch.ones(2))

    blurring = BlurDownsample(torch.full((3, 3), 1 / 9), 2)
    kept = blurring.spectrum((4, 6))
    for A in (mri(1, 2, (6, 8), (8,))[0], blurring, Within()):
        before = {name: (id(tensor), tensor.clone()) for name, tensor in (*A.named_parameters(), *A.named_buffers())}
        moved = on_device(A, torch.device(device))
        assert (
            moved is not A
            and type(moved) is type(A)
            and all(tensor.device.type == device for tensor in moved.state_dict().values())
        )
        for name, tensor in (*A.named_parameters(), *A.named_buffers()):
            assert (
                id(tensor) == before[name][0] and tensor.device.type == "cpu" and torch.equal(tensor, before[name][1])
            )
        assert on_device(A, "cpu") is A
    assert blurring.spectrum((4, 6)) is kept


def test_normalised_zero_maps_have_a_finite_gradient():
    maps = torch.zeros(1, 2, 3, 3, dtype=torch.complex64, requires_grad=True)
    normalize_maps(maps).abs().square().sum().backward()
    assert torch.isfinite(torch.view_as_real(maps.grad)).all()


def test_fft_keeps_the_norm():
    image = random_complex(2, 15, 12)
    assert fft2c(image).norm() == pytest.approx(image.norm())


LINE, MAPS = torch.ones(8, dtype=torch.bool), normalize_maps(random_complex(1, 2, 6, 8))


@pytest.mark.parametrize(
    "mask, maps, message",
    (
        (torch.ones(7, dtype=torch.bool), MAPS, "mask must have the 8 columns of the maps, got 7"),
        (torch.ones(1, 1, 5, 8, dtype=torch.bool), MAPS, "mask must have 1 or 6 rows to fit the maps, got 5"),
        (
            torch.ones(3, 1, 1, 8, dtype=torch.bool),
            MAPS.expand(2, 2, 6, 8),
            "mask must be for a batch of 1 or 2 to fit the maps, got 3",
        ),
        (torch.ones(6, 8, dtype=torch.bool), MAPS, r"mask must have shape .* got \(6, 8\)"),
        (LINE, MAPS[0], r"maps must have shape .* got \(2, 6, 8\)"),
    ),
)
def test_what_does_not_fit_together_is_refused(mask, maps, message):
    with pytest.raises(ValueError, match=message):
        MultiCoilMRI(mask, maps)


@pytest.mark.parametrize(
    "mask, maps, message",
    (
        (LINE.float(), MAPS, "mask must be boolean .* got torch.float32"),
        (LINE, MAPS.real, "maps must be complex64 or complex128, got torch.float64"),
    ),
)
def test_wrong_types_are_refused(mask, maps, message):
    with pytest.raises(TypeError, match=message):
        MultiCoilMRI(mask, maps)


@pytest.mark.parametrize(
    "name, call, shape",
    (
        ("image", "forward", (1, 1, 6, 7)),
        ("image", "forward", (1, 2, 6, 8)),
        ("image", "expand", (6, 8)),
        ("k-space", "adjoint", (1, 3, 6, 8)),
        ("k-space", "adjoint", (1, 2, 5, 8)),
        ("coil images", "reduce", (1, 1, 6, 8)),
    ),
)
def test_inputs_that_do_not_fit_are_refused(name, call, shape):
    A = MultiCoilMRI(LINE, MAPS)
    with pytest.raises(ValueError, match=f"{name} must have shape .* got") as caught:
        getattr(A, call)(torch.zeros(shape, dtype=torch.complex128))
    assert str(shape) in str(caught.value)


def test_a_batch_of_another_length_is_refused():
    A = MultiCoilMRI(torch.ones(3, 1, 1, 8, dtype=torch.bool), MAPS)
    with pytest.raises(ValueError, match=r"image must have shape \(3, 1, 6, 8\)"):
        A(torch.zeros(2, 1, 6, 8, dtype=torch.complex128))


@pytest.mark.parametrize(
    "bad, error",
    (
        (torch.ones(5), TypeError),
        (torch.ones(1, 5, dtype=torch.bool), ValueError),
        (torch.ones(1, 2, 1, 5, dtype=torch.bool), ValueError),
    ),
)
def test_a_mask_of_another_type_or_shape_is_refused(bad, error):
    with pytest.raises(error, match="mask must"):
        as_mask(bad)


def test_a_whole_acceleration_of_any_type_is_the_same():
    assert torch.equal(equispaced_mask(320, 6, offset=2), equispaced_mask(320, 6.0, offset=2))


def test_a_mask_for_three_serves_one_set_of_maps_and_a_batch_of_three_only():
    A = MultiCoilMRI(torch.ones(3, 1, 1, 8, dtype=torch.bool), MAPS)
    assert A(torch.ones(3, 1, 6, 8, dtype=torch.complex128)).shape == (3, 2, 6, 8)
    with pytest.raises(ValueError, match=r"image must have shape \(3, 1, 6, 8\)"):
        A(torch.ones(1, 1, 6, 8, dtype=torch.complex128))


def test_a_wrong_shape_is_named_with_both_shapes():
    with pytest.raises(
        ValueError, match=r"image must have shape \(any, 1, 4, 4\) to fit the operator, got \(2, 3, 4, 4\)"
    ):
        check_shape("image", torch.zeros(2, 3, 4, 4), (None, 1, 4, 4))


@pytest.mark.parametrize("rows", ((12, 6), (13, 6), (12, 5), (8, 8)))
def test_cropping_the_readout_crops_the_image(rows):
    image = random_complex(2, rows[0], 5)
    start = rows[0] // 2 - rows[1] // 2
    assert torch.allclose(crop_readout(fft2c(image), rows[1]), fft2c(image[:, start : start + rows[1]]), atol=1e-12)


# Sampling masks, against counts made by hand and against fastMRI's where it is installed


@pytest.mark.parametrize("width", (96, 128, 320, 367, 368))
@pytest.mark.parametrize("acceleration", (6, 8, 10))
def test_exact_rate_for_every_offset(width, acceleration):
    for offset in range(acceleration):
        mask = equispaced_mask(width, acceleration, offset=offset, exact=True)
        assert mask.dtype == torch.bool and mask.shape == (width,)
        assert mask.sum() == round(width / acceleration)


@pytest.mark.parametrize("acceleration", (6, 8, 10))
def test_nominal_rate_is_every_line_and_the_centre(acceleration):
    for offset in range(acceleration):
        mask = equispaced_mask(320, acceleration, offset=offset)
        expected = {*range(offset, 320, acceleration), *range(144, 176)}
        assert set(mask.nonzero().flatten().tolist()) == expected
        assert effective_rate(mask) == pytest.approx(len(expected) / 320)


def test_acs_lines_contain_the_block_and_the_centre():
    for width in (64, 101, 320):
        for offset in range(6):
            acs = acs_lines(equispaced_mask(width, 6, offset=offset))
            assert (
                acs.start <= width // 2 < acs.stop
                and round(width * 0.1) <= acs.stop - acs.start <= round(width * 0.1) + 2
            )


def test_a_generator_repeats_itself_and_draws_every_offset():
    def masks() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [equispaced_mask(128, 8, generator=generator) for _ in range(60)]

    assert all(map(torch.equal, masks(), masks()))
    assert len({tuple(mask.tolist()) for mask in masks()}) == 8


def test_the_global_generator_is_not_touched():
    state = torch.random.get_rng_state()
    equispaced_mask(128, 6), equispaced_mask(128, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_rate_and_the_acs_lines_of_a_batch_are_those_of_a_line():
    line = equispaced_mask(320, 8, offset=1)
    for mask in (line, line.expand(2, 1, 5, 320)):
        assert effective_rate(mask) == 68 / 320 and acs_lines(mask) == acs_block(320) == slice(144, 176)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ({"acceleration": 0}, "acceleration must be a whole number from 1 to the width 320, got 0"),
        ({"acceleration": 2.5}, "acceleration must be"),
        ({"acs_fraction": 1.5}, "acs_fraction must lie"),
        ({"acceleration": -6}, "acceleration must be"),
        ({"acceleration": 1.5}, "acceleration must be"),
        ({"acceleration": 321}, "got 321"),
        ({"acs_fraction": 0}, "acs_fraction must lie between 0 and 1"),
        ({"acs_fraction": 1}, "acs_fraction must lie"),
        ({"width": 8, "acs_fraction": 0.05}, "acs_fraction must lie between 0 and 1 and give a line out of 8"),
        ({"offset": 6}, r"offset must lie in \[0, 6\), got 6"),
        ({"offset": -1}, "got -1"),
        ({"acceleration": 12, "exact": True}, "must allow the 32 ACS lines at an exact rate, got 12: 27 lines"),
    ),
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        equispaced_mask(**({"width": 320, "acceleration": 6} | arguments))


def test_nominal_mask_is_fastmris():
    subsample = pytest.importorskip("fastmri.data.subsample")
    mask_function = subsample.EquiSpacedMaskFunc([0.10], [6])
    theirs, low = mask_function((1, 320, 2), offset=2)
    ours = equispaced_mask(320, 6, offset=2)
    assert low == 32 and np.array_equal(theirs.reshape(-1).numpy().astype(bool), ours.numpy())


# Super-resolution


@every_blur
def test_the_data_step_is_the_minimum(case):
    """The gradient of ||Ax - y||^2 + a ||x - z||^2 vanishes there, with a weight for each image."""
    A, z, y = case()
    weight = torch.linspace(0.01, 2, len(z), dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = A.proximal(z, y, weight)
    gradient = A.adjoint(A(x) - y) + weight * (x - z)
    assert gradient.norm() < 1e-10 * y.norm()


@pytest.mark.parametrize("scale", (1, 2, 3, 4))
def test_the_data_step_against_a_dense_solve(scale):
    A, z, y = blur(1, 1, scale, (3, 2), (3, 2))
    identity = torch.eye(z[0, 0].numel(), dtype=torch.float64).reshape(-1, 1, *z.shape[-2:])
    matrix = A(identity).flatten(1).T
    right = matrix.T @ y[0, 0].flatten() + 0.3 * z[0, 0].flatten()
    expected = torch.linalg.solve(matrix.T @ matrix + 0.3 * torch.eye(len(right), dtype=torch.float64), right)
    assert torch.allclose(A.proximal(z, y, 0.3)[0, 0].flatten(), expected, atol=1e-12)


def published_solution(kernel: np.ndarray, z: np.ndarray, y: np.ndarray, scale: int, weight: float) -> np.ndarray:
    """Equation 7 of Zhang, Van Gool and Timofte (CVPR 2020), in NumPy and as it is printed."""
    (height, width), (rows, columns) = z.shape, kernel.shape
    padded = np.zeros(z.shape)
    padded[:rows, :columns] = kernel
    K = np.fft.fft2(np.roll(padded, (-(rows // 2), -(columns // 2)), (0, 1)))
    raised = np.zeros(z.shape)
    raised[::scale, ::scale] = y
    d = K.conj() * np.fft.fft2(raised) + weight * np.fft.fft2(z)
    mean = lambda image: image.reshape(scale, height // scale, scale, width // scale).mean(axis=(0, 2))
    quotient = mean(K * d) / (mean(np.abs(K) ** 2) + weight)
    return np.fft.ifft2((d - K.conj() * np.tile(quotient, (scale, scale))) / weight).real


@pytest.mark.parametrize(
    "scale, kernel, small", ((1, (5, 5), (7, 8)), (2, (25, 25), (16, 21)), (3, (4, 7), (9, 5)), (4, (11, 3), (6, 6)))
)
def test_the_data_step_is_equation_7_of_usrnet(scale, kernel, small):
    A, z, y = blur(1, 1, scale, kernel, small)
    expected = published_solution(A.kernel[0, 0].numpy(), z[0, 0].numpy(), y[0, 0].numpy(), scale, 0.05)
    assert np.allclose(A.proximal(z, y, 0.05)[0, 0], expected, atol=1e-11)


def test_the_data_step_in_single_precision_stays_exact_where_the_weight_is_small():
    A, z, y = blur(1, 1, 3, (25, 25), (20, 17))
    expected = A.proximal(z, y, 1e-4)
    found = BlurDownsample(A.kernel.float(), 3).proximal(z.float(), y.float(), 1e-4)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 2e-4 * expected.abs().max()


def test_the_data_step_is_differentiable():
    A, z, y = blur(2, 2, 2, (3, 3), (2, 3))
    weight = torch.tensor([0.5, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(A.proximal, (z.requires_grad_(), y.requires_grad_(), weight))


@every_blur
def test_blur_is_scipys(case):
    A, x, _ = case()
    kernels = A.kernel.expand(len(x), -1, -1, -1)
    expected = np.stack(
        [
            [convolve(channel, kernel[0], mode="wrap") for channel in image]
            for image, kernel in zip(x.numpy(), kernels.numpy())
        ]
    )
    assert np.allclose(A(x), expected[..., :: A.scale, :: A.scale], atol=1e-12)


def test_the_published_kernels_do_not_turn_the_image_round(shared):
    """The motion kernels are not symmetric: correlation in place of convolution would show."""
    from scipy.io import loadmat

    kernel = loadmat(shared / "kernels" / "kernels_12.mat")["kernels"][0, 8].astype(np.float64)
    image = random_real(1, 1, 40, 50)
    found = BlurDownsample(torch.from_numpy(kernel / kernel.sum()), 2)(image)[0, 0].numpy()
    assert np.allclose(found, convolve(image[0, 0].numpy(), kernel / kernel.sum(), mode="wrap")[::2, ::2], atol=1e-12)
    assert not np.allclose(found, convolve(image[0, 0].numpy(), kernel[::-1, ::-1], mode="wrap")[::2, ::2], atol=1e-2)


def test_a_scale_of_one_and_a_point_change_nothing():
    x = random_real(1, 3, 7, 6)
    A = BlurDownsample(torch.ones(1, 1, dtype=torch.float64), 1)
    assert torch.allclose(A(x), x, atol=1e-14) and torch.allclose(A.adjoint(x), x, atol=1e-14)
    assert torch.equal(fold(x, 1), x)


def test_the_transform_of_the_kernel_is_computed_once(monkeypatch):
    A, x, y = blur(1, 1, 2, (3, 3), (4, 6))
    calls = []
    monkeypatch.setattr(
        "spade.operators.kernel_spectrum", lambda *given: calls.append(given) or kernel_spectrum(*given)
    )
    for _ in range(3):
        A(x), A.adjoint(y), A.proximal(x, y, 0.1), A.to("cpu").spectrum((8, 12))
    assert len(calls) == 1
    A(random_real(1, 3, 8, 8))
    assert len(calls) == 2
    A.float()(x.float())
    assert len(calls) == 3 and A.spectrum((8, 12))[0].dtype == torch.complex64


def test_what_was_computed_in_inference_serves_training():
    A, x, y = blur(1, 1, 2, (3, 3), (4, 6))
    with torch.inference_mode():
        A(x)
    image = x.clone().requires_grad_()
    A.proximal(image, y, 0.1).sum().backward()
    assert image.grad is not None


def test_the_spectrum_is_no_part_of_the_state():
    A, x, _ = blur(1, 1, 2, (3, 3), (4, 6))
    A(x)
    assert list(A.state_dict()) == ["kernel", "noise"] and not list(A.parameters())
    assert A.to("meta")(x.to("meta")).shape == (1, 3, 4, 6)


def test_half_precision_ends_at_the_operator():
    A = BlurDownsample(torch.full((3, 3), 1 / 9), 2)
    assert A(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_noise_is_one_number_or_one_for_each_image():
    kernel = torch.full((3, 3), 1 / 9)
    assert BlurDownsample(kernel, 2, 0.1).noise.shape == (1, 1, 1, 1)
    assert BlurDownsample(kernel, 2, torch.tensor([0.1, 0.2])).noise.flatten().tolist() == pytest.approx([0.1, 0.2])


SQUARE = torch.full((3, 3), 1 / 9)


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: BlurDownsample(2 * SQUARE, 2), "kernel must sum to one, got 2"),
        (lambda: BlurDownsample(SQUARE * torch.nan, 2), "kernel must sum to one, got nan"),
        (lambda: BlurDownsample(SQUARE[None], 2), r"kernel must have shape .* got \(1, 3, 3\)"),
        (lambda: BlurDownsample(SQUARE, 0), "scale must be a whole number of at least 1, got 0"),
        (lambda: BlurDownsample(SQUARE, -2), "scale must be a whole number of at least 1, got -2"),
        (lambda: BlurDownsample(SQUARE, 2.5), "scale must be a whole number of at least 1, got 2.5"),
        (lambda: BlurDownsample(SQUARE, 2, -0.1), "noise must be a standard deviation of at least 0, got -0.1"),
        (
            lambda: BlurDownsample(SQUARE.expand(3, 1, 3, 3), 2, torch.ones(2)),
            "noise must be one number or one per kernel \\(3\\), got 2",
        ),
        (
            lambda: BlurDownsample(SQUARE, 2)(torch.ones(1, 3, 2, 8)),
            "kernel must fit into the image of 2×8 pixels, got 3×3",
        ),
        (
            lambda: BlurDownsample(SQUARE, 2).adjoint(torch.ones(1, 3, 1, 8)),
            "kernel must fit into the image of 2×16 pixels, got 3×3",
        ),
        (
            lambda: BlurDownsample(SQUARE, 3)(torch.ones(1, 3, 9, 8)),
            "image must have sides that are multiples of the scale 3, got 9×8",
        ),
        (lambda: BlurDownsample(SQUARE, 2)(torch.ones(3, 8, 8)), r"image must have shape .* got \(3, 8, 8\)"),
        (
            lambda: BlurDownsample(SQUARE.expand(3, 1, 3, 3), 2)(torch.ones(2, 3, 8, 8)),
            r"image must have shape \(3, any, any, any\)",
        ),
        (
            lambda: BlurDownsample(SQUARE, 2).proximal(torch.ones(1, 3, 9, 8), torch.ones(1, 3, 4, 4), 1.0),
            r"image must have shape \(1, 3, 8, 8\)",
        ),
    ),
)
def test_super_resolution_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: BlurDownsample(SQUARE.to(torch.complex64), 2), "kernel must be real floating point"),
        (
            lambda: BlurDownsample(SQUARE, 2)(torch.ones(1, 3, 8, 8, dtype=torch.complex64)),
            "image must be real floating point",
        ),
    ),
)
def test_complex_super_resolution_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_kernel_that_is_loaded_in_place_is_used():
    x = torch.rand(1, 3, 12, 12)
    old, new = (BlurDownsample(kernel, 2) for kernel in (torch.full((3, 3), 1 / 9), torch.eye(3) / 3))
    old(x)
    old.load_state_dict(new.state_dict())
    assert torch.equal(old(x), new(x))
