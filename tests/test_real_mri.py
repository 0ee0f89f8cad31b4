"""Measured multi-coil files through ESPIRiT, the operator and CG-SENSE; skipped where they are absent."""
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spade.baselines import cg_sense, zero_filled
from spade.data import MultiCoilSlices, collate
from spade.metrics import psnr
from spade.operators import fft2c, ifft2c

FULLY_SAMPLED = {"brain_t1_4ch_ge": 4, "brain_t1_4ch_mprage": 4, "brain_16ch_96": 16}


@pytest.fixture
def multicoil(shared) -> Path:
    folder = shared / "mri" / "multicoil"
    if not folder.is_dir():
        pytest.skip(f"no measured files at {folder}")
    return folder


def as_fastmri(source: Path, target: Path, rows_to_columns: bool = False) -> Path:
    "Write one measured slice `(coils, row, column)` as a fastMRI volume of one slice, undersampled along columns."
    with h5py.File(source) as file, h5py.File(target, "w") as volume:
        kspace, mask = file["kspace"][()], file["mask_rows"][()] if "mask_rows" in file else None
        volume["kspace"] = (kspace.swapaxes(1, 2) if rows_to_columns else kspace)[None]
        if mask is not None:
            volume["mask"] = mask.astype(bool)
        volume.attrs.update(acquisition="AXT2", patient_id=source.stem)
    return target


@pytest.mark.parametrize("name", FULLY_SAMPLED)
def test_retrospective_undersampling_against_a_real_reference(multicoil, tmp_path, name):
    path = as_fastmri(multicoil / f"{name}.h5", tmp_path / f"{name}.h5")
    item = MultiCoilSlices([path], acceleration=3, acs_fraction=0.15)[0]
    batch = collate([item])
    assert batch.y.shape[1] == FULLY_SAMPLED[name]
    start, x_hat = zero_filled(batch.y, batch.A), cg_sense(batch.y, batch.A, 3e-3, 15)
    before, after = psnr(start[0], batch.x[0]), psnr(x_hat[0], batch.x[0])
    assert before > 18 and after > before + 2
    # The single set of maps explains the fully sampled measurement inside the object
    full = MultiCoilSlices([path])[0]
    coil_images = fft2c(full["maps"] * full["x"])
    assert (coil_images * item["mask"] - full["y"] * item["mask"]).norm() < 1.0 * full["y"].norm()


def test_maps_are_unit_inside_and_zero_outside(multicoil, tmp_path):
    item = MultiCoilSlices([as_fastmri(multicoil / "brain_t1_4ch_ge.h5", tmp_path / "ge.h5")], acs_fraction=0.15)[0]
    power = item["maps"].abs().square().sum(dim=0)
    assert torch.all((power < 1e-6) | ((power - 1).abs() < 1e-4)) and 0.1 < (power > 0.5).float().mean() < 0.9


def test_real_accelerated_acquisition_without_reference(multicoil, tmp_path):
    source = multicoil / "brain_t2_12ch_accel.h5"
    path = as_fastmri(source, tmp_path / "accel.h5", rows_to_columns=True) # phase encoding runs along its rows
    dataset = MultiCoilSlices([path])
    item = dataset[0]
    with h5py.File(source) as file:
        measured = file["mask_rows"][()].astype(bool)
    assert "x" not in item and item["y"].shape == (12, 256, 256) and item["mask"].sum() == measured.sum() == 107
    batch = collate([item])
    start, x_hat = zero_filled(batch.y, batch.A), cg_sense(batch.y, batch.A, 3e-3, 15)
    residual = lambda x: ((batch.A(x) - batch.y).norm() / batch.y.norm()).item()
    assert residual(x_hat) < 0.85 * residual(start) and residual(x_hat) < 0.15 # most energy lies in the ACS lines of both


def test_file_with_a_mask_over_rows_and_columns(multicoil, tmp_path):
    source, path = multicoil / "brain_8ch_undersampled.h5", tmp_path / "poisson.h5"
    with h5py.File(source) as file, h5py.File(path, "w") as volume:
        volume["kspace"], volume["mask"] = file["kspace"][()][None], file["mask"][()].astype(bool)
        volume.attrs["acquisition"] = "AXT1"
    # Its calibration region is a block, not a set of full columns, which this reader says rather than guess
    with pytest.raises(ValueError, match="slice 0 of .*poisson.h5: ESPIRiT .* needs at least 6 calibration rows and ACS lines"):
        MultiCoilSlices([path], acquisition=None)[0]


def test_images_and_kspace_of_the_files_follow_our_convention(multicoil):
    with h5py.File(multicoil / "brain_dwi_4ch_csm.h5") as file:
        image, maps, kspace = (torch.from_numpy(np.asarray(file[name])) for name in ("image", "csm", "kspace"))
    error = (ifft2c(kspace) - maps * image).norm() / (maps * image).norm()
    assert error < 1e-4
