"""Blur kernels: what each must be, and files that are not what they seem."""

import math

import numpy as np
import pytest
import torch
from scipy.io import savemat

import spade.data.kernels
from spade.data.kernels import (
    camera_path,
    centre_of_mass,
    centred_grid,
    draw_path,
    gaussian_kernel,
    kernel_widths,
    motion_kernel,
    random_kernel,
    read_kernels,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", (1, 2, 5, 24, 25))
@pytest.mark.parametrize("widths, angle", (((1.0, 1.0), 0), ((0.6, 3.0), 33), (2.0, 0), ((4, 1), -70)))
def test_a_gaussian_is_its_formula(size, widths, angle):
    first, second = widths if isinstance(widths, tuple) else (widths, widths)
    turn = np.radians(angle)
    R = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = np.linalg.inv(R @ np.diag([first**2, second**2]) @ R.T)
    expected = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            r = np.array([column - size // 2, size // 2 - row])  # x to the right, y upwards
            expected[row, column] = np.exp(-r @ inverse @ r / 2)
    kernel = gaussian_kernel(size, widths, angle)
    assert kernel.dtype == torch.float32 and np.allclose(kernel, expected / expected.sum(), atol=1e-7)


@pytest.mark.parametrize("seed", range(30))
def test_a_motion_kernel_is_a_connected_path_about_the_centre(seed):
    from skimage.measure import label

    kernel = motion_kernel(25, seed)
    assert kernel.shape == (25, 25) and kernel.min() >= 0 and abs(kernel.double().sum() - 1) < 1e-6
    assert max(map(abs, centre_of_mass(kernel))) < 1e-5
    assert label(kernel.numpy() > 0, connectivity=2).max() == 1
    small, large = kernel_widths(kernel)
    assert 0 < small <= large < 12 and large > 1


@pytest.mark.parametrize("size", (3, 4, 9, 15, 24))
def test_a_motion_kernel_of_any_size_stays_inside(size):
    for seed in range(20):
        assert motion_kernel(size, seed).sum() == pytest.approx(1, abs=1e-5)


def test_a_path_conserves_light_and_place():
    path = camera_path(7.5, generator(), points=100)
    kernel = draw_path(path, 17)
    rows, columns = centred_grid(17)
    assert kernel.sum() == pytest.approx(1) and path.abs().max() == pytest.approx(7.5)
    assert torch.allclose(torch.stack([(kernel * rows).sum(), (kernel * columns).sum()]), path.mean(dim=0), atol=1e-12)


def test_the_seed_decides():
    state = torch.get_rng_state()
    assert torch.equal(motion_kernel(25, 3), motion_kernel(25, generator(3))) and not torch.equal(
        motion_kernel(25, 3), motion_kernel(25, 4)
    )
    assert torch.equal(random_kernel(generator(5)), random_kernel(generator(5)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_random_kernels_are_of_both_kinds():
    g = generator()
    kernels = [random_kernel(g) for _ in range(200)]
    symmetric = sum(
        torch.allclose(kernel, kernel.rot90(2), atol=1e-6) for kernel in kernels
    )  # Gaussians are, paths are not
    isotropic = sum(
        torch.allclose(kernel, kernel.T, atol=1e-6) and torch.allclose(kernel, kernel.flip(0), atol=1e-6)
        for kernel in kernels
    )
    assert 75 < symmetric < 125 and 30 < isotropic < 75
    assert all(abs(kernel.sum() - 1) < 1e-5 and kernel.min() >= 0 for kernel in kernels)


def test_twelve_to_test_with():
    kernels = spade.data.kernels.test_kernels()
    assert kernels.shape == (12, 25, 25) and torch.equal(kernels, spade.data.kernels.test_kernels(0))
    for kernel in kernels[:4]:
        small, large = kernel_widths(kernel)
        assert small == pytest.approx(large, abs=1e-4)
    assert all(kernel_widths(kernel)[1] > 1.2 * kernel_widths(kernel)[0] for kernel in kernels[4:8])
    assert not any(torch.allclose(kernel, kernel.rot90(2), atol=1e-4) for kernel in kernels[8:])


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: gaussian_kernel(0), "size must be a whole number of at least 1, got 0"),
        (lambda: gaussian_kernel(2.5), "size must be a whole number of at least 1, got 2.5"),
        (lambda: gaussian_kernel(25, (0, 1)), "widths must be two positive numbers of pixels, got 0 and 1"),
        (lambda: gaussian_kernel(25, math.nan), "widths must be two positive numbers"),
        (lambda: motion_kernel(2), "size must be a whole number of at least 3 pixels, got 2"),
    ),
)
def test_kernels_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def cells(*matrices: np.ndarray) -> dict:
    cell = np.empty((1, len(matrices)), dtype=object)
    cell[0, :] = matrices
    return {"kernels": cell}


def test_kernels_come_back_from_a_file(tmp_path):
    kernels = spade.data.kernels.test_kernels()
    savemat(tmp_path / "cell.mat", cells(*kernels.double().numpy()))
    savemat(tmp_path / "array.mat", {"kernels": kernels.double().numpy()})
    for name in ("cell.mat", "array.mat"):
        found = read_kernels(tmp_path / name)
        assert found.dtype == torch.float32 and torch.allclose(found, kernels, atol=1e-7)


@pytest.mark.parametrize(
    "content, message",
    (
        ({"k": np.eye(3)}, r"must hold a variable 'kernels', got k."),
        (cells(np.eye(3)), "kernel 0 of .* must sum to one, got 3."),
        (cells(np.full((3, 3), np.nan)), "kernel 0 of .* must sum to one, got nan."),
        (cells(np.eye(3) / 3, np.eye(4) / 4), "must hold kernels of one size, got 3×3, 4×4."),
        (
            cells(np.eye(3) / 3, np.eye(3) / 3 + 0j + np.eye(3) * 1j),
            "kernel 1 of .* must be a matrix of real numbers, got complex128 .3, 3.",
        ),
    ),
)
def test_files_that_hold_something_else(tmp_path, content, message):
    savemat(tmp_path / "x.mat", content)
    with pytest.raises(ValueError, match=message):
        read_kernels(tmp_path / "x.mat")


@pytest.mark.parametrize(
    "damage",
    (
        b"",
        b"\x00" * 200,
        b"MATLAB 5.0 MAT-file" + b"\x00" * 300,
        b"not MATLAB" * 40,
        b"\x89HDF\r\n\x1a\n" + b"\x00" * 600,
    ),
)
def test_damaged_files_are_named(tmp_path, damage):
    (tmp_path / "x.mat").write_bytes(damage)
    with pytest.raises(ValueError, match="x.mat"):
        read_kernels(tmp_path / "x.mat")


def test_a_file_cut_short_is_named(tmp_path):
    savemat(tmp_path / "x.mat", cells(*spade.data.kernels.test_kernels().double().numpy()))
    whole = (tmp_path / "x.mat").read_bytes()
    for length in (130, 200, 1000, len(whole) // 2, len(whole) - 5):
        (tmp_path / "x.mat").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.mat"):
            read_kernels(tmp_path / "x.mat")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.mat does not exist"):
        read_kernels(tmp_path / "absent.mat")


def test_the_published_twelve(shared):
    """Four isotropic and four anisotropic Gaussians and four paths; ours have the widths of their Gaussians."""
    kernels, ours = read_kernels(shared / "kernels" / "kernels_12.mat"), spade.data.kernels.test_kernels()
    assert kernels.shape == (12, 25, 25) and torch.allclose(kernels.sum(dim=(1, 2)), torch.ones(12))
    for kernel, own in zip(kernels[:8], ours):
        assert (
            kernel_widths(own) == pytest.approx(kernel_widths(kernel), abs=0.15)
            and max(map(abs, centre_of_mass(kernel))) < 1e-3
        )
    assert torch.allclose(kernels[:4], ours[:4], atol=5e-3)
    moments = [
        (kernel * centred_grid(25)[0] * centred_grid(25)[1]).sum().item() for kernel in (*kernels[4:8], *ours[4:8])
    ]
    assert [round(m) > 0 for m in moments[:4]] == [round(m) > 0 for m in moments[4:]]  # the same slant
    assert all(1 < math.hypot(*centre_of_mass(kernel)) < 2.6 for kernel in kernels[8:])  # theirs are not quite centred
    assert read_kernels(shared / "kernels" / "kernels_bicubicx234.mat").shape == (3, 25, 25)
