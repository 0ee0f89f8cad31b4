"""The reader of fastMRI files: items, what they may depend on, splits, batches, faults."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spade.basics import BucketSampler, loader
from spade.data.fastmri import MultiCoilSlices, find_files, measurement_scale, split_subjects, stack_slices
from spade.data.phantom import simulate
from spade.operators import MultiCoilMRI

TENSORS = ("y", "mask", "maps")

pytestmark = pytest.mark.filterwarnings("ignore:.*coil maps cover")  # 7 ACS lines of 72 are too few


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return simulate(
        tmp_path_factory.mktemp("data"),
        num_subjects=3,
        slices_per_subject=2,
        shape=(64, 72),
        num_coils=4,
        progress=False,
    )


def change(source: Path, target: Path, edit) -> Path:
    "A copy of a file, edited by `edit(file)`."
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        edit(file)
        file.attrs.pop("spade_digest", None)  # edited on purpose
    return target


def replace(file: h5py.File, name: str, value: np.ndarray) -> None:
    del file[name]
    file[name] = value


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in TENSORS) and one["scale"] == other["scale"]


def test_item(files):
    dataset = MultiCoilSlices(files, acceleration=4)
    assert len(dataset) == 6 and dataset.shape(5) == (4, 64, 72)
    item = dataset[3]
    assert item["file"] == files[1].name and item["slice"] == 1 and item["subject"] == "demo-0-0001"
    assert (
        item["y"].shape == item["maps"].shape == (4, 64, 72)
        and item["x"].shape == (1, 64, 72)
        and item["mask"].shape == (1, 1, 72)
    )
    assert all(item[name].dtype == torch.complex64 for name in ("y", "maps", "x")) and item["mask"].dtype == torch.bool
    assert not item["y"][..., ~item["mask"][0, 0]].any() and item["y"][..., item["mask"][0, 0]].abs().min() > 0


def test_reference_is_consistent_with_the_measurement(files):
    for batch in loader(MultiCoilSlices(files, acceleration=4, acs_fraction=0.2), batch_size=2):
        assert (batch.A(batch.x) - batch.y).norm() / batch.y.norm() < 0.25
        assert 0.8 < batch.x.abs().max() < 6  # the scale brings images to the order of 1


def test_unit_of_the_file_drops_out(files, tmp_path):
    scaled = change(
        files[0], tmp_path / "scaled.h5", lambda file: replace(file, "kspace", file["kspace"][()] * np.float32(2**-20))
    )
    one, other = MultiCoilSlices(files[:1])[0], MultiCoilSlices([scaled])[0]
    assert torch.allclose(one["y"], other["y"], rtol=1e-4, atol=1e-6) and torch.allclose(
        one["x"], other["x"], atol=2e-3
    )
    assert other["scale"] / one["scale"] == pytest.approx(2**-20, rel=1e-5)


def test_file_of_measured_lines_gives_the_same_items_bit_by_bit(files, tmp_path):
    dataset = MultiCoilSlices(files[:1], maps_folder=False)

    def strip(file):
        mask = dataset[0]["mask"][0, 0].numpy()
        replace(file, "kspace", np.where(mask, file["kspace"][()], 0).astype(np.complex64))
        del file["reconstruction_rss"]
        file["mask"] = mask

    measured = change(files[0], tmp_path / files[0].name, strip)
    prospective, view = MultiCoilSlices([measured], maps_folder=False), dataset.measurements()
    for i in range(len(dataset)):
        assert "x" in dataset[i] and "x" not in view[i] and "x" not in prospective[i]
        assert equal(view[i], prospective[i]) and equal(view[i], dataset[i])


@pytest.mark.filterwarnings("ignore:.*its energy")
def test_measurement_does_not_depend_on_unmeasured_columns(files, tmp_path):
    mask = MultiCoilSlices(files)[0]["mask"][0, 0].numpy()
    noise = np.random.default_rng(0).normal(size=(2, 4, 128, 72)) * 1e6
    other = change(
        files[0],
        tmp_path / "other.h5",
        lambda file: replace(file, "kspace", np.where(mask, file["kspace"][()], noise).astype(np.complex64)),
    )
    assert equal(MultiCoilSlices(files)[0], MultiCoilSlices([other], maps_folder=False)[0])


def test_masks_belong_to_subject_and_seed(files):
    mask = lambda i, **settings: MultiCoilSlices(files, **settings)[i]["mask"]
    assert torch.equal(mask(0), mask(1))  # one scan, one mask
    masks = {tuple(mask(0, seed=seed).flatten().tolist()) for seed in range(12)}
    assert len(masks) > 3
    assert mask(0, acceleration=8).sum() < mask(0, acceleration=4).sum()
    assert mask(0, acceleration=6, exact=True).sum() == 72 // 6


def test_encoding_limits_are_respected(files, tmp_path):
    def partial(file):
        header = file["ismrmrd_header"][()].decode()
        replace(
            file,
            "ismrmrd_header",
            header.replace("<maximum>71</maximum><center>36</center>", "<maximum>61</maximum><center>26</center>"),
        )

    mask = MultiCoilSlices([change(files[0], tmp_path / "partial.h5", partial)], acceleration=2)[0]["mask"][0, 0]
    assert not mask[:10].any() and mask[10:].float().mean() > 0.4


def test_crop(files):
    assert MultiCoilSlices(files, crop=48, acs_fraction=0.25)[0]["x"].shape == (1, 48, 72)
    full, cut = MultiCoilSlices(files, crop=64, maps_folder=False)[0], MultiCoilSlices(files, maps_folder=False)[0]
    assert equal(full, cut)
    with pytest.raises(ValueError, match="crop must lie between 1 and the 128 rows"):
        MultiCoilSlices(files, crop=129)


# Maps


def test_several_workers_make_the_same_files_and_maps(tmp_path):
    made = {
        workers: simulate(tmp_path / str(workers), 3, 2, (64, 48), 3, progress=False, workers=workers)
        for workers in (1, 3)
    }
    for workers, paths in made.items():
        MultiCoilSlices(paths, acs_fraction=0.25).prepare(progress=False, workers=workers)
    one, three = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("1", "3"))
    assert len(one) == 9 and [path.name for path in one] == [path.name for path in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three))


def test_maps_are_cached_under_what_made_them(files, tmp_path):
    dataset = MultiCoilSlices(files, maps_folder=tmp_path).prepare(progress=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 6
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    dataset.prepare(progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    MultiCoilSlices(files, maps_folder=tmp_path, espirit_settings={"crop": 0.8})[0]
    assert len(list(tmp_path.iterdir())) == 7
    MultiCoilSlices(files, maps_folder=tmp_path, acs_fraction=0.2)[0]
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: np.save(path, np.zeros((4, 3, 3), np.complex64)),
    ],
)
def test_damaged_cache_is_made_again(files, tmp_path, damage):
    dataset = MultiCoilSlices(files[:1], maps_folder=tmp_path)
    maps = dataset[0]["maps"]
    damage(next(tmp_path.iterdir()))
    assert torch.equal(dataset[0]["maps"], maps)


def test_cached_and_fresh_maps_are_equal_and_workers_agree(files, tmp_path):
    fresh = list(loader(MultiCoilSlices(files, maps_folder=False), batch_size=2))
    workers = list(loader(MultiCoilSlices(files, maps_folder=tmp_path), batch_size=2, num_workers=2))
    cached = list(loader(MultiCoilSlices(files, maps_folder=tmp_path), batch_size=2))
    for one, two, three in zip(fresh, workers, cached, strict=True):
        assert (
            torch.equal(one.A.maps, two.A.maps) and torch.equal(two.A.maps, three.A.maps) and torch.equal(one.x, two.x)
        )


# Splits


def test_items_kept_in_memory_are_those_of_the_files(files, tmp_path):
    own = [Path(shutil.copy(path, tmp_path)) for path in files]
    fresh = MultiCoilSlices(files)
    size = sum(value.nbytes for value in fresh[0].values() if isinstance(value, torch.Tensor))
    keeping = MultiCoilSlices(own, memory=2 * size + 1)
    for _ in range(2):
        assert all(
            equal(keeping[i], fresh[i]) and torch.equal(keeping[i]["x"], fresh[i]["x"]) for i in range(len(fresh))
        )
    assert sorted(keeping.kept) == [0, 1] and 0 <= keeping.memory < size  # not more than there is room for
    assert "x" not in keeping.measurements()[0] and "x" in keeping[0]
    keeping[0].pop("x")
    assert "x" in keeping[0]  # what a caller does to an item stays with the caller
    for path in own:
        path.unlink()
    assert equal(keeping[1], fresh[1])
    with pytest.raises(FileNotFoundError):
        keeping[2]


def test_measurements_of_a_keeping_dataset_are_kept_apart(files):
    keeping = MultiCoilSlices(files, memory=1 << 30)
    items, measured = [keeping[i] for i in range(3)], keeping.measurements()
    assert not measured.kept and all("x" not in measured[i] and equal(measured[i], items[i]) for i in range(3))
    assert len(measured.kept) == 3 and all("x" in keeping[i] for i in range(3))
    once = [batch.y for batch in loader(keeping, num_workers=2)]
    assert all(torch.equal(y[0], keeping[i]["y"]) for i, y in enumerate(once))


def test_a_subject_is_never_in_two_splits(files, tmp_path):
    "The original code splits by slice; here even two scans of one person stay together."
    twice = [change(path, tmp_path / f"{path.stem}_{scan}.h5", lambda file: None) for path in files for scan in "ab"]
    for seed in range(10):
        split = split_subjects(twice, (1, 1, 1), seed)
        subjects = {part: {MultiCoilSlices([path])[0]["subject"] for path in paths} for part, paths in split.items()}
        assert all(len(paths) == 2 for paths in split.values()) and len(set().union(*subjects.values())) == 3


def test_split_depends_on_the_seed_and_not_on_the_order(files):
    splits = {tuple(map(tuple, split_subjects(files, (1, 1, 1), seed).values())) for seed in range(12)}
    assert len(splits) > 2
    assert split_subjects(files[::-1], (1, 1, 1)) == split_subjects(files, (1, 1, 1))
    with pytest.raises(ValueError, match=r"145 \+ 10 \+ 10 subjects needs 165, but the 3 files hold 3"):
        split_subjects(files)


# Batches


def test_volumes_unlike_their_neighbours_are_batched_apart(files, tmp_path):
    other = simulate(tmp_path, 1, 3, shape=(48, 64), num_coils=2, progress=False, name="other")
    batches = list(loader(MultiCoilSlices([files[0], *other, files[1]], acs_fraction=0.2), batch_size=2))
    assert [tuple(batch.y.shape) for batch in batches] == [(2, 4, 64, 72)] * 2 + [(2, 2, 48, 64), (1, 2, 48, 64)]


def test_order_is_a_function_of_seed_and_epoch():
    sampler = BucketSampler([(1,)] * 20, 3, shuffle=True, seed=1)
    first = list(sampler)
    assert list(sampler) == first and len(first) == len(sampler) == 7
    sampler.set_epoch(1)
    second = list(sampler)
    again = BucketSampler([(1,)] * 20, 3, shuffle=True, seed=1)
    again.set_epoch(1)
    assert second != first and list(again) == second
    assert list(BucketSampler([(1,)] * 5, 2)) == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        BucketSampler([(1,)], 0)


def test_batch_equals_its_items_one_by_one(files):
    dataset = MultiCoilSlices(files)
    batch = stack_slices([dataset[0], dataset[4]])
    for i, number in enumerate((0, 4)):
        single = stack_slices([dataset[number]])
        assert torch.allclose(batch.A(batch.x)[i], single.A(single.x)[0], atol=1e-6) and torch.equal(
            batch.A.mask[i], single.A.mask[0]
        )


# Faults


def refuse(path: Path, error: type[Exception], sentence: str, **settings) -> None:
    with pytest.raises(error, match=sentence) as raised:
        MultiCoilSlices([path], maps_folder=False, **settings)[0]
    assert path.name in str(raised.value) and "\n" not in str(raised.value)


def test_absent_truncated_and_foreign_files(files, tmp_path):
    refuse(tmp_path / "absent.h5", FileNotFoundError, "does not exist")
    (tmp_path / "short.h5").write_bytes(files[0].read_bytes()[:5000])
    refuse(tmp_path / "short.h5", ValueError, "not a readable HDF5 file, or was cut short")
    (tmp_path / "text.h5").write_text("hello", encoding="utf-8")
    refuse(tmp_path / "text.h5", ValueError, "not a readable HDF5 file")


def test_kspace_missing_or_of_another_kind(files, tmp_path):
    edits = {
        "missing.h5": (lambda file: file.__delitem__("kspace"), "no dataset 'kspace'"),
        "single.h5": (
            lambda file: replace(file, "kspace", file["kspace"][:, 0]),
            r"shape \(2, 128, 72\); expected complex \(slices, coils, rows, columns\)",
        ),
        "real.h5": (lambda file: replace(file, "kspace", np.abs(file["kspace"][()])), "is float32"),
        "header.h5": (lambda file: replace(file, "ismrmrd_header", "<xml"), "ismrmrd_header .* not valid XML"),
    }
    for name, (edit, sentence) in edits.items():
        refuse(change(files[0], tmp_path / name, edit), ValueError, sentence)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_kspace_that_is_not_finite_names_file_and_slice(files, tmp_path, value):
    def spoil(file):
        file["kspace"][1, 0, 3, 5] = value

    with pytest.raises(ValueError, match=r"slice 1 in .*spoilt.h5 holds NaN or infinite"):
        dataset = MultiCoilSlices([change(files[0], tmp_path / "spoilt.h5", spoil)])
        dataset[1]


def test_empty_slice_is_left_out_with_a_warning(files, tmp_path):
    def empty(file):
        file["kspace"][0] = 0

    path = change(files[0], tmp_path / "empty.h5", empty)
    with pytest.warns(UserWarning, match=r"empty.h5: slice 0 is zero everywhere"):
        dataset = MultiCoilSlices([path])
    assert len(dataset) == 1 and dataset[0]["slice"] == 1


def test_masks_that_do_not_fit(files, tmp_path):
    for name, mask, sentence in [
        ("width.h5", np.ones(70, bool), "must have 72 columns, got shape \\(70,\\)"),
        ("rows.h5", np.ones((10, 72), bool), "has 10 rows"),
        ("readout.h5", np.ones((64, 72), bool), "remove the oversampling first"),
    ]:
        refuse(change(files[0], tmp_path / name, lambda file: file.__setitem__("mask", mask)), ValueError, sentence)


def test_too_few_acs_lines(files, tmp_path):
    refuse(files[0], ValueError, "ESPIRiT .* needs at least 6 calibration rows and ACS lines", acs_fraction=0.05)
    refuse(
        change(files[0], tmp_path / "none.h5", lambda file: file.__setitem__("mask", np.arange(72) % 4 == 1)),
        ValueError,
        "0 ACS lines",
    )


def test_maps_and_kspace_that_disagree(files):
    item = MultiCoilSlices(files)[0]
    with pytest.raises(ValueError, match="coils|shape"):
        stack_slices([item | {"maps": item["maps"][:3]}]).A.adjoint(item["y"][None])
    with pytest.raises(ValueError, match="mask must have the 71 columns of the maps, got 72"):
        MultiCoilMRI(item["mask"][None], item["maps"][None, ..., :-1])


def test_folders_without_files(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no HDF5 file"):
        find_files(tmp_path)
    assert find_files(files[0].parent) == files
    with pytest.raises(FileNotFoundError, match="no HDF5 file of 3, the first .*, has acquisition 'AXT1', got 'AXT2'"):
        find_files(files[0].parent, "AXT1")
    with pytest.raises(ValueError, match="no HDF5 file of 3, the first .*, has acquisition 'AXT1', got 'AXT2'"):
        MultiCoilSlices(files, acquisition="AXT1")


def test_scale_uses_the_acs_block_alone(files):
    kspace, acs = (
        torch.randn(4, 16, 20, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),
        slice(8, 12),
    )
    other = kspace.clone()
    other[..., :8] = 99
    assert measurement_scale(kspace, acs) == measurement_scale(other, acs)


def test_attributes_stored_as_bytes_are_text(files, tmp_path):
    "HDF5 strings of fixed length come as bytes."

    def as_bytes(file):
        file.attrs["acquisition"], file.attrs["patient_id"] = np.bytes_("AXT2"), np.bytes_("s\u00e9bastien".encode())

    path = change(files[0], tmp_path / "bytes.h5", as_bytes)
    (volume,) = MultiCoilSlices([path]).volumes
    assert (volume.acquisition, volume.subject) == ("AXT2", "s\u00e9bastien") and find_files(tmp_path) == [path]
    other = change(
        files[1], tmp_path / "other.h5", lambda file: file.attrs.__setitem__("acquisition", np.bytes_("AXFLAIR"))
    )
    assert (
        find_files(tmp_path) == [path]
        and find_files(tmp_path, "AXFLAIR") == [other]
        and find_files(tmp_path, None) == [path, other]
    )
    with pytest.raises(FileNotFoundError, match="has acquisition 'AXT1', got 'AXFLAIR', 'AXT2'"):
        find_files(tmp_path, "AXT1")


@pytest.mark.parametrize(
    "settings, error, sentence",
    [
        (dict(acceleration=0), ValueError, "acceleration must be a whole number from 1 to the width 72, got 0"),
        (dict(acs_fraction=10), ValueError, "acs_fraction must lie between 0 and 1 .*, got 10"),
        (dict(acceleration=16, exact=True), ValueError, "acceleration must allow the 7 ACS lines.*, got 16"),
        (
            dict(espirit_settings={"treshold": 0.1}),
            ValueError,
            "unknown ESPIRiT setting 'treshold': choose one of kernel_width, calib_width, threshold, crop",
        ),
        (dict(espirit_settings={"acs": slice(3, 9)}), ValueError, "unknown ESPIRiT setting 'acs'"),
        (dict(crop=32.0), TypeError, "crop must be a whole number of rows, got 32.0"),
    ],
)
def test_settings_are_refused_when_the_dataset_is_made(files, settings, error, sentence):
    with pytest.raises(error, match=sentence) as raised:
        MultiCoilSlices(files, **settings)
    assert "\n" not in str(raised.value)


def test_no_files_is_no_dataset(files):
    with pytest.raises(ValueError, match="files must name at least one HDF5 file, got 0 files"):
        MultiCoilSlices([])
    assert len(MultiCoilSlices(path for path in files)) == len(MultiCoilSlices(files))


def test_a_file_with_its_own_mask_does_not_ask_for_sampling_settings(files, tmp_path):
    own = change(files[0], tmp_path / "own.h5", lambda file: file.__setitem__("mask", np.abs(np.arange(72) - 36) < 12))
    assert MultiCoilSlices([own], acceleration=0, maps_folder=False)[0]["mask"].sum() == 23


@pytest.mark.parametrize("counts", [(1,), (1, 1), (1, 1, 1, 0), (1.0, 1, 1), (2, -1, 1), (True, 1, 1)])
def test_counts_that_make_no_split(files, counts):
    with pytest.raises(ValueError, match="counts must be three whole numbers \\(training, validation, test\\), got"):
        split_subjects(files, counts)
    assert list(map(len, split_subjects(files, (2, 0, 1)).values())) == [2, 0, 1]
