"""The simulator: what it writes, who can read it, what it keeps, what it refuses."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spade.basics import seeded
from spade.data.fastmri import read_volume_header
from spade.data.phantom import (
    Scan,
    acquire,
    coil_maps,
    draw_subject,
    head_tissues,
    is_intact,
    load_tissue,
    object_level,
    open_images,
    pixel_grid,
    read_own_images,
    simulate,
    simulate_slices,
)
from spade.operators import crop_readout, ifft2c, root_sum_of_squares

TINY = dict(num_subjects=2, slices_per_subject=2, shape=(32, 40), num_coils=3, progress=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("phantom"), **TINY)


def contents(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file["kspace"][()]


def test_layout_is_fastmris(files):
    with h5py.File(files[0]) as file:
        assert file["kspace"].shape == (2, 3, 64, 40) and file["kspace"].dtype == np.complex64
        assert file["reconstruction_rss"].shape == (2, 32, 40) and file["reconstruction_rss"].dtype == np.float32
        assert file.attrs["acquisition"] == b"AXT2" and file.attrs["max"] == pytest.approx(
            file["reconstruction_rss"][()].max()
        )
        assert file.attrs["norm"] == pytest.approx(np.linalg.norm(file["reconstruction_rss"][()]))
        rss = root_sum_of_squares(crop_readout(torch.from_numpy(file["kspace"][()]), 32))
        assert torch.allclose(rss, torch.from_numpy(file["reconstruction_rss"][()]))


def test_fastmris_own_reader_opens_the_files(files):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pytest.importorskip(
            "fastmri.data", reason="fastmri 0.3.0 and what it imports are not installed", exc_type=ImportError
        )
    dataset = data.SliceDataset(files[0].parent, challenge="multicoil", use_dataset_cache=False)
    assert len(dataset) == 4
    kspace, mask, target, attributes, name, number = dataset[1]
    assert (
        kspace.shape == (3, 64, 40)
        and target.shape == (32, 40)
        and mask is None
        and (name, number) == (files[0].name, 1)
    )
    assert attributes["recon_size"] == (32, 40, 1) and attributes["encoding_size"] == (64, 40, 1)
    assert (attributes["padding_left"], attributes["padding_right"]) == (0, 40)


def test_same_seed_same_numbers_and_any_number_of_subjects(files, tmp_path):
    more = simulate(tmp_path, **TINY | {"num_subjects": 3})
    assert [np.array_equal(contents(a), contents(b)) for a, b in zip(files, more)] == [True, True]
    assert not np.array_equal(contents(more[0]), contents(more[1]))


def test_complete_files_are_kept_and_absent_or_other_ones_made(tmp_path):
    first, second = simulate(tmp_path, **TINY)
    stamp, whole = first.stat().st_mtime_ns, contents(second)
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(FileExistsError, match="was cut short .*; it is not replaced"):
        simulate(tmp_path, **TINY)
    second.unlink()
    simulate(tmp_path, **TINY)
    assert first.stat().st_mtime_ns == stamp and np.array_equal(contents(second), whole)
    simulate(tmp_path, **TINY | {"snr": 10.0})
    assert not np.array_equal(contents(second), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    first = simulate(tmp_path, **TINY)[0]
    before = first.read_bytes()
    monkeypatch.setattr("spade.data.phantom.ismrmrd_header", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulate(tmp_path, **TINY | {"seed": 1})
    assert first.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_subjects_differ_in_shape_and_contrast():
    tissue, signals, masks = load_tissue(), [], []
    for number in range(6):
        subject = draw_subject(0, number)
        signals.append(subject.signal["grey"] / subject.signal["white"])
        masks.append(sum(head_tissues(tissue, subject, 0.0, (64, 64), 3.6).values()) > 0.5)
    overlap = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, masks[1:])]
    assert np.std(signals) > 0.02 and max(overlap) < 0.97 and min(overlap) > 0.5


def test_noise_has_the_asked_level_and_is_complex_and_white():
    image, maps = torch.ones(64, 64, dtype=torch.complex64), coil_maps(4, (64, 64))
    noise = acquire(image, maps, Scan((64, 64), 4, snr=20.0), seeded("noise")) - acquire(
        image, maps, Scan((64, 64), 4, snr=1e12), seeded("noise")
    )
    level = object_level(maps.abs().square().sum(dim=0).sqrt())
    assert noise.abs().square().mean().sqrt().item() == pytest.approx(level / 20, rel=0.02)
    assert noise.real.std().item() == pytest.approx(noise.imag.std().item(), rel=0.05)
    images = ifft2c(crop_readout(noise, 64))
    assert images.abs().square().mean().sqrt().item() == pytest.approx(level / 20, rel=0.03)


@pytest.mark.parametrize("coils", [1, 4, 8, 12, 16])
def test_coils_are_smooth_and_different(coils):
    maps = coil_maps(coils, (33, 40))
    assert maps.shape == (coils, 33, 40) and maps.dtype == torch.complex64
    maps = maps * (pixel_grid((33, 40), 0.0, 230 / 33)[..., 1:].norm(dim=-1) < 105)  # where a head can be
    steps = maps.diff(dim=2)[(maps[:, :, 1:] != 0) & (maps[:, :, :-1] != 0)]
    assert steps.abs().max() < 0.4 * maps.abs().max()  # pixels of 7 mm
    gram = torch.einsum("ahw,bhw->ab", maps, maps.conj()).abs()
    norms = gram.diagonal().sqrt()
    assert (gram / norms[:, None] / norms - torch.eye(coils)).max() < 0.99


def test_odd_sizes_and_no_oversampling():
    kspace = next(simulate_slices(load_tissue(), 0, 0, 1, Scan((35, 47), 2, oversampling=1)))
    assert kspace.shape == (2, 35, 47) and torch.isfinite(torch.view_as_real(kspace)).all()


@pytest.mark.parametrize(
    "bad",
    [
        dict(shape=(4, 4)),
        dict(shape=(64,)),
        dict(num_coils=0),
        dict(snr=0.0),
        dict(snr=float("nan")),
        dict(oversampling=3),
    ],
)
def test_settings_that_make_no_scan(tmp_path, bad):
    with pytest.raises(ValueError, match="expected|must be"):
        simulate(tmp_path, **TINY | bad)


# Images of one's own


def write(path: Path, **datasets) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def picture(count: int = 4, shape: tuple[int, int] = (34, 27)) -> np.ndarray:
    rows, columns = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    return np.stack([(rows**2 + columns**2 < 0.7) * (1 + 0.3 * np.cos(3 * rows + i)) for i in range(count)])


@pytest.mark.parametrize("kind", ["complex", "channels", "uint8", "uint16", "float64"])
def test_images_of_every_kind_keep_their_magnitude(tmp_path, kind):
    values = picture() / 1.3
    phase = values * np.exp(1j)
    stored = {
        "complex": phase.astype(np.complex64),
        "channels": np.stack([phase.real, phase.imag], axis=1).__mul__(4095).astype(np.int16),
        "uint8": (255 * values).astype(np.uint8),
        "uint16": (60000 * values).astype(np.uint16),
        "float64": values,
    }[kind]
    path = write(tmp_path / "own.h5", pictures=stored, subject=np.array([0, 0, 1, 1]))
    files = simulate(tmp_path / "out", None, None, shape=None, num_coils=3, snr=1e6, images=path, progress=False)
    assert [file.name for file in files] == ["own_0.h5", "own_1.h5"]
    with h5py.File(files[1]) as file:
        assert file["kspace"].shape == (2, 3, 68, 27) and file.attrs["patient_id"] == b"1"
        found = torch.from_numpy(file["reconstruction_rss"][()])
    inside = torch.from_numpy(values[2:] > 0.5)
    sensitivity = found[inside] / torch.from_numpy(values[2:]).float()[inside]
    assert sensitivity.std() / sensitivity.mean() < 0.5  # smooth coils over the picture, nothing else
    assert found[~inside].mean() < 0.05 * found[inside].mean()


def test_magnitudes_get_a_phase_and_complex_images_keep_theirs(tmp_path):
    for name, values in {"complex": picture() * np.exp(0.5j), "magnitude": picture()}.items():
        path = write(tmp_path / f"{name}.h5", pictures=values, subject=np.zeros(4))
        (file,) = simulate(tmp_path / name, None, 1, shape=None, num_coils=1, snr=1e6, images=path, progress=False)
        image = ifft2c(crop_readout(torch.from_numpy(contents(file)), 34))[0, 0]
        coil_free = image / torch.where(image.abs() > 0.2 * image.abs().max(), image.abs(), torch.inf)
        spread = 1 - coil_free[coil_free != 0].mean().abs()
        if name == "complex":
            flat = spread
        else:
            assert spread > flat + 0.02


@pytest.mark.parametrize(
    "datasets, settings, sentence",
    [
        (dict(weight=np.zeros(4)), {}, "holds 0 datasets that could be images"),
        (dict(a=picture(), b=picture()), {}, "holds 2 datasets"),
        (dict(a=picture()), dict(dataset="b"), "no dataset 'b'"),
        (dict(a=np.zeros((4, 3, 8, 8))), {}, r"expected numbers \(N, H, W\)"),
        (dict(a=np.zeros(4)), dict(dataset="a"), r"expected numbers \(N, H, W\)"),
        (dict(a=picture()), {}, "subjects="),
        (dict(a=picture(), subject=np.zeros(3)), {}, "must hold one label per image, got 3 for 4 images"),
    ],
)
def test_image_files_that_are_refused(tmp_path, datasets, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_images(write(tmp_path / "own.h5", **datasets), **settings)


def test_image_values_that_are_refused(tmp_path):
    broken = picture()
    broken[1, 3, 3] = np.nan
    broken[2] = 0
    images = open_images(write(tmp_path / "own.h5", pictures=broken), subjects="each")
    assert list(images.subjects) == ["0000", "0001", "0002", "0003"]
    with pytest.raises(ValueError, match=r"image 1 in .*own.h5 is not finite"):
        read_own_images(images, [0, 1])
    with pytest.raises(ValueError, match=r"image 2 in .*own.h5 is zero everywhere"):
        read_own_images(images, [2, 3])
    with pytest.raises(ValueError, match="num_subjects must be at most 4 .* got 5"):
        simulate(tmp_path, 5, None, images=images, progress=False)
    (tmp_path / "text.h5").write_text("not HDF5", encoding="utf-8")
    with pytest.raises(ValueError, match="text.h5 is not a readable HDF5 file"):
        open_images(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError, match="absent.h5 does not exist"):
        open_images(tmp_path / "absent.h5")


def test_real_complex_images_of_an_even_by_even_and_a_resampled_size(shared, tmp_path):
    path = shared / "mri" / "siat_t2_brain_complex.h5"
    images = open_images(path)
    assert images.dataset == "/image_int16" and len(images.subjects) == 7
    (native,) = simulate(tmp_path / "native", 1, 2, shape=None, num_coils=4, images=path, progress=False)
    (small,) = simulate(tmp_path / "small", 1, 2, shape=(96, 96), num_coils=4, images=path, progress=False)
    with h5py.File(native) as file, h5py.File(small) as other:
        assert file["kspace"].shape == (2, 4, 540, 256) and other["kspace"].shape == (2, 4, 192, 96)
        ratio = (
            file["reconstruction_rss"][0].sum() / other["reconstruction_rss"][0].sum() * (96 / 270) ** 2
        )  # padded to 270 x 270
    assert ratio == pytest.approx(1, abs=0.1)  # brightness survives the change of size


def test_tissue_maps_are_found_from_an_empty_folder(tmp_path):
    code = (
        "from spade.data.phantom import simulate; print(simulate('out', 1, 1, (32,32), 2, progress=False)[0].is_file())"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_name_of_the_files_is_the_callers_with_own_images_too(tmp_path):
    path = write(tmp_path / "own.h5", pictures=picture(), subject=np.array([0, 0, 1, 1]))
    arguments = dict(num_subjects=None, slices_per_subject=1, shape=None, num_coils=2, images=path, progress=False)
    named, unnamed = simulate(tmp_path, name="heads", **arguments), simulate(tmp_path, **arguments)
    assert [file.name for file in named] == ["heads_0.h5", "heads_1.h5"] and [file.name for file in unnamed] == [
        "own_0.h5",
        "own_1.h5",
    ]
    for one, other in zip(named, unnamed):
        assert np.array_equal(contents(one), contents(other)), "a name changes no number"
    (drawn,) = simulate(tmp_path, 1, 1, shape=(32, 32), num_coils=2, progress=False)
    assert drawn.name == "demo_0000.h5"


def test_text_has_fixed_length_and_variable_length_is_read_too(files, tmp_path):
    """HDF5's heap of variable-length text has no checksum; files written with it are kept and read."""
    assert b"GCOL" not in files[0].read_bytes()
    older = Path(shutil.copy(files[0], tmp_path / "older.h5"))
    with h5py.File(older, "a") as file:
        header = file["ismrmrd_header"][()].decode()
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = header
        for name in ("acquisition", "patient_id", "spade_key", "spade_digest"):
            file.attrs[name] = file.attrs[name].decode()
        key = file.attrs["spade_key"]
    assert b"GCOL" in older.read_bytes() and is_intact(older, key)
    assert read_volume_header(older)._replace(path=files[0]) == read_volume_header(files[0])
