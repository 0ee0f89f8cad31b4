"""Measured multi-coil files through the reader, ESPIRiT, CG-SENSE and the networks; skipped where they are absent."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import spade
from spade.basics import Batch, loader
from spade.data.fastmri import MultiCoilSlices, header_numbers, measured_columns, stack_slices
from spade.data.phantom import ismrmrd_header
from spade.losses import self_supervised_loss
from spade.metrics import cg_sense, evaluate, psnr, zero_filled
from spade.models import DEQ, E2EVarNet, VarNet
from spade.operators import MultiCoilMRI, fft2c, ifft2c

FULLY_SAMPLED = {"brain_t1_4ch_ge": 4, "brain_t1_4ch_mprage": 4, "brain_16ch_96": 16, "heart_cine_10ch": 10}
NETWORKS = {
    "deq": lambda: DEQ(features=8, num_blocks=1, max_iterations=20, tolerance=0.001, gradient="jacobian-free"),
    "varnet": lambda: VarNet(2, 6, 2),
    "e2e-varnet": lambda: E2EVarNet(2, 6, 2, 4, 2),
}
LOSS = {"deq": "l1", "varnet": "ssim+l1", "e2e-varnet": "ssim+l1"}  # the phase of the VarNets is free
every_network = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture
def multicoil(shared) -> Path:
    folder = shared / "mri" / "multicoil"
    if not folder.is_dir():
        pytest.skip(f"no measured files at {folder}")
    return folder


def as_fastmri(source: Path, target: Path, rows_to_columns: bool = False, measured: slice | None = None) -> Path:
    "Write one measured slice `(coils, row, column)` as a fastMRI volume of one slice, undersampled along columns."
    with h5py.File(source) as file, h5py.File(target, "w") as volume:
        kspace, mask = file["kspace"][()], file["mask_rows"][()] if "mask_rows" in file else None
        volume["kspace"] = (kspace.swapaxes(1, 2) if rows_to_columns else kspace)[None]
        if mask is not None:
            volume["mask"] = mask.astype(bool)
        if measured is not None:  # the scanner's limits of phase encoding: it filled the other columns with zeros
            coils, height, width = kspace.shape
            whole = f"<maximum>{width - 1}</maximum><center>{width // 2}</center>"
            limits = (
                f"<maximum>{measured.stop - measured.start - 1}</maximum><center>{width // 2 - measured.start}</center>"
            )
            volume["ismrmrd_header"] = ismrmrd_header((height, width), coils, oversampling=1).replace(whole, limits)
        volume.attrs.update(acquisition="AXT2", patient_id=source.stem)
    return target


def fresh(network: str) -> torch.nn.Module:
    "A small network, the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[network]().eval()


@torch.no_grad()
def residual(model: Callable, batch: Batch) -> float:
    "Relative distance of a reconstruction from the measured lines, with the maps that the network itself believes in."
    A = model.effective_operator(batch.y, batch.A) if hasattr(model, "effective_operator") else batch.A
    return ((A(model(batch.y, batch.A)) - batch.y).norm() / batch.y.norm()).item()


def mean_psnr(model: Callable, batches: list[Batch]) -> float:
    return evaluate(model, batches, progress=False).psnr.mean()


# The measurement side


@pytest.mark.parametrize("name", FULLY_SAMPLED)
def test_retrospective_undersampling_against_a_real_reference(multicoil, tmp_path, name):
    path = as_fastmri(multicoil / f"{name}.h5", tmp_path / f"{name}.h5")
    item = MultiCoilSlices([path], acceleration=3, acs_fraction=0.15)[0]
    batch = stack_slices([item])
    assert batch.y.shape[1] == FULLY_SAMPLED[name]
    start, x_hat = zero_filled(batch.y, batch.A), cg_sense(batch.y, batch.A, 3e-3, 15)
    before, after = psnr(start[0], batch.x[0]), psnr(x_hat[0], batch.x[0])
    assert before > 18 and after > before + 2
    # The single set of maps explains the fully sampled measurement inside the object
    full = MultiCoilSlices([path], acs_fraction=0.15)[0]
    coil_images = fft2c(full["maps"] * full["x"])
    assert (coil_images * item["mask"] - full["y"] * item["mask"]).norm() < 1.0 * full["y"].norm()


def test_maps_are_unit_inside_and_zero_outside(multicoil, tmp_path):
    item = MultiCoilSlices([as_fastmri(multicoil / "brain_t1_4ch_ge.h5", tmp_path / "ge.h5")], acs_fraction=0.15)[0]
    power = item["maps"].abs().square().sum(dim=0)
    assert torch.all((power < 1e-6) | ((power - 1).abs() < 1e-4)) and 0.1 < (power > 0.5).float().mean() < 0.9


@pytest.mark.parametrize("mask_name", ("mask_R4", "mask_R6"))
def test_maps_and_masks_of_the_source(multicoil, tmp_path, mask_name):
    "The heart's file brings maps and masks of its own: ours agree, and either set reconstructs."
    source = multicoil / "heart_cine_10ch.h5"
    with h5py.File(source) as file:
        kspace, csm = (torch.from_numpy(file[name][()])[None] for name in ("kspace", "csm"))
        mask = torch.from_numpy(file[mask_name][()] != 0)
    ours = MultiCoilSlices([as_fastmri(source, tmp_path / "heart.h5")], acs_fraction=0.2)[0]["maps"][None]
    csm = csm / csm.abs().square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    inside = (ours.abs().sum(dim=1) > 0) & (csm.abs().sum(dim=1) > 0)
    agreement = (ours.conj() * csm).sum(dim=1).abs()[inside]
    assert inside.float().mean() > 0.2 and agreement.mean() > 0.95
    for maps in (ours, csm):
        A = MultiCoilMRI(mask, maps)
        y, x = kspace * mask, MultiCoilMRI(torch.ones_like(mask), maps).adjoint(kspace)
        assert psnr(cg_sense(y, A, 1e-2, 20)[0], x[0]) > psnr(zero_filled(y, A)[0], x[0]) + 1


def test_columns_that_the_scanner_filled_with_zeros(multicoil, tmp_path):
    "The file with a wrapped field of view holds 168 measured columns of 256; the others are never counted as measured."
    measured = slice(44, 212)
    source = multicoil / "brain_t1_8ch_alias.h5"
    with h5py.File(source) as file:
        filled = np.abs(file["kspace"][()]).sum(axis=(0, 1)) > 0
    assert filled[measured].all() and filled.sum() == 168
    path = as_fastmri(source, tmp_path / "alias.h5", measured=measured)
    with h5py.File(path) as file:
        assert measured_columns(256, header_numbers(file["ismrmrd_header"][()])) == measured
    batch = next(iter(loader(MultiCoilSlices([path], acceleration=2, acs_fraction=0.15))))
    mask = batch.A.mask[0, 0, 0]
    assert not mask[:44].any() and not mask[212:].any() and 0.4 < mask[measured].float().mean() < 0.7
    # Where the head wraps, a pixel needs two maps: one set leaves a third of the measurement unexplained
    x_hat = cg_sense(batch.y, batch.A, 1e-2, 5)
    assert 0.25 < residual(lambda y, A: x_hat, batch) < residual(zero_filled, batch) < 0.4
    assert psnr(x_hat[0], batch.x[0]) > psnr(zero_filled(batch.y, batch.A)[0], batch.x[0]) + 2


def test_real_accelerated_acquisition_without_reference(multicoil, tmp_path):
    source = multicoil / "brain_t2_12ch_accel.h5"
    path = as_fastmri(source, tmp_path / "accel.h5", rows_to_columns=True)  # phase encoding runs along its rows
    dataset = MultiCoilSlices([path])
    item = dataset[0]
    with h5py.File(source) as file:
        measured = file["mask_rows"][()].astype(bool)
    assert "x" not in item and item["y"].shape == (12, 256, 256) and item["mask"].sum() == measured.sum() == 107
    batch = stack_slices([item])
    x_hat = cg_sense(batch.y, batch.A, 3e-3, 15)
    after = residual(lambda y, A: x_hat, batch)
    assert after < 0.85 * residual(zero_filled, batch) and after < 0.15  # most energy lies in the ACS lines of both


def test_file_with_a_mask_over_rows_and_columns(multicoil, tmp_path):
    source, path = multicoil / "brain_8ch_undersampled.h5", tmp_path / "poisson.h5"
    with h5py.File(source) as file, h5py.File(path, "w") as volume:
        volume["kspace"], volume["mask"] = file["kspace"][()][None], file["mask"][()].astype(bool)
        volume.attrs["acquisition"] = "AXT1"
    # Its calibration region is a block, not a set of full columns, which this reader says rather than guess
    with pytest.raises(
        ValueError, match="slice 0 of .*poisson.h5: ESPIRiT .* needs at least 6 calibration rows and ACS lines"
    ):
        MultiCoilSlices([path], acquisition=None)[0]


def test_images_and_kspace_of_the_files_follow_our_convention(multicoil):
    with h5py.File(multicoil / "brain_dwi_4ch_csm.h5") as file:
        image, maps, kspace = (torch.from_numpy(np.asarray(file[name])) for name in ("image", "csm", "kspace"))
    error = (ifft2c(kspace) - maps * image).norm() / (maps * image).norm()
    assert error < 1e-4


# The networks


@every_network
@pytest.mark.parametrize("name", [*FULLY_SAMPLED, "brain_t1_8ch_alias"])
def test_pruned_networks_learn_from_a_real_reference(multicoil, tmp_path, name, network):
    """Each file goes through each network; a few supervised steps bring it nearer to the reference."""
    measured = slice(44, 212) if name == "brain_t1_8ch_alias" else None
    path = as_fastmri(multicoil / f"{name}.h5", tmp_path / f"{name}.h5", measured=measured)
    batches = list(
        loader(MultiCoilSlices([path], acceleration=3, acs_fraction=0.15, crop=64))
    )  # 64 rows: seconds, not minutes
    student = spade.prune(fresh(network), 0.4)
    with torch.no_grad():
        x_hat = student(batches[0].y, batches[0].A)
    assert x_hat.shape == batches[0].x.shape and x_hat.dtype == torch.complex64 and x_hat.isfinite().all()
    before = mean_psnr(student, batches)
    log = spade.finetune(
        student, batches, "supervised", loss=LOSS[network], steps=8, learning_rate=2e-3, progress=False
    )
    assert log.losses[-1] < 0.9 * log.losses[0] and mean_psnr(student, batches) > before + 0.5


@every_network
def test_school_on_real_measurements(multicoil, tmp_path, network):
    "A teacher made with the reference, a pruned student that sees nothing but the measurement and its teacher."
    dataset = MultiCoilSlices(
        [as_fastmri(multicoil / "brain_16ch_96.h5", tmp_path / "brain.h5")], acceleration=3, acs_fraction=0.15, crop=64
    )
    teacher, batches = fresh(network), list(loader(dataset))
    spade.finetune(teacher, batches, "supervised", loss=LOSS[network], steps=20, learning_rate=3e-3, progress=False)
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = spade.prune(teacher, 0.4)
    taught, before = mean_psnr(teacher, batches), mean_psnr(student, batches)
    view = dataset.measurements()
    assert all(batch.x is None for batch in loader(view))
    log = spade.finetune(
        student, view, "school", teacher=teacher, loss=LOSS[network], steps=8, learning_rate=2e-3, progress=False
    )
    assert log.losses[-1] < 0.9 * log.losses[0] and before < taught and mean_psnr(student, batches) > before + 0.5
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


@every_network
def test_self_supervision_on_a_real_accelerated_acquisition(multicoil, tmp_path, network):
    """From a T1 slice to a T2 slice of another scanner without ground truth: loss and misfit fall."""
    teacher = fresh(network)
    others = MultiCoilSlices(
        [as_fastmri(multicoil / "brain_t1_4ch_ge.h5", tmp_path / "ge.h5")], acceleration=3, acs_fraction=0.15, crop=64
    )
    spade.finetune(teacher, others, "supervised", loss=LOSS[network], steps=15, learning_rate=3e-3, progress=False)
    student = spade.prune(teacher, 0.2)
    if network == "e2e-varnet":  # eq. 9 holds the estimated maps fixed, so the estimator must not move under it
        student.sens_net.requires_grad_(False)
    dataset = MultiCoilSlices(
        [as_fastmri(multicoil / "brain_t2_12ch_accel.h5", tmp_path / "accel.h5", rows_to_columns=True)], crop=48
    )
    batch = next(iter(loader(dataset)))
    assert batch.x is None and "x" not in dataset[0]

    @torch.no_grad()
    def loss() -> float:  # eq. 9 with the same rotation before and after
        return self_supervised_loss(student, batch.y, batch.A, torch.Generator().manual_seed(3)).item()

    loss_before, misfit_before = loss(), residual(student, batch)
    log = spade.finetune(student, dataset, "self-supervised", steps=8, learning_rate=2e-3, progress=False)
    assert log.steps == 8 and np.isfinite(log.losses).all()
    fixed_maps = network == "e2e-varnet"  # whose misfit is bounded by the maps that it keeps
    assert loss() < 0.97 * loss_before and residual(student, batch) < (1 if fixed_maps else 0.97) * misfit_before
    with pytest.raises(ValueError, match="batch.x must be the ground truth"):
        spade.finetune(student, dataset, "supervised", steps=1, progress=False)
