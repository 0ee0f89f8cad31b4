"""Acquisitions that are damaged, unusual or not what they seem: each is read right, warned of, or refused."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from faults import Kind, timed_outcome

from spade.basics import loader, seed_of
from spade.data.espirit import espirit
from spade.data.fastmri import MultiCoilSlices, check_coverage, find_files, kspace_doubt, load_maps, read_volume_header
from spade.data.phantom import simulate

FLIPS = int(os.environ.get("SPADE_FLIPS", 40))  # bit positions a file
SEED = int(os.environ.get("SPADE_FLIPS_SEED", 0))


@pytest.fixture(scope="module")
def acquisition(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("acquisition")
    return simulate(folder, 1, 2, shape=(64, 128), num_coils=4, progress=False)[0]


def rewrite(source: Path, target: Path, edit) -> Path:
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        kspace = file["kspace"][()]
        new = edit(kspace)
        file.attrs.pop("spade_digest", None)  # edited on purpose
        if new is not None:
            del file["kspace"]
            file["kspace"] = new
    return target


def flipped(path: Path, number: int) -> bytes:
    """The bytes of a file with one bit changed, at a position that the number determines."""
    content = bytearray(path.read_bytes())
    position = seed_of("flip", SEED, path.suffix, number) % (8 * len(content))
    content[position // 8] ^= 1 << position % 8
    return bytes(content)


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[name], right[name]) for name in ("y", "mask", "maps", "x"))


def test_plain_file_raises_no_warning(acquisition, recwarn):
    MultiCoilSlices([acquisition], maps_folder=False)[0]
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_pair_of_fields_and_last_axis_are_complex(acquisition, tmp_path):
    def fields(kspace):
        pair = np.zeros(kspace.shape, dtype=[("real", "f4"), ("imag", "f4")])
        pair["real"], pair["imag"] = kspace.real, kspace.imag
        return pair

    def reversed_fields(kspace):
        pair = np.zeros(kspace.shape, dtype=[("Imag", "f8"), ("Real", "f8")])
        pair["Real"], pair["Imag"] = kspace.real, kspace.imag
        return pair

    expected = MultiCoilSlices([acquisition], maps_folder=False)[1]
    edits = {"fields": fields, "reversed": reversed_fields, "axis": lambda k: np.stack([k.real, k.imag], axis=-1)}
    edits |= {"double": lambda k: edits["axis"](k.astype(np.complex128)), "endian": lambda k: k.astype(">c8")}
    for name, edit in edits.items():
        path = rewrite(acquisition, tmp_path / f"{name}.h5", edit)
        found = MultiCoilSlices([path], maps_folder=False)[1]
        assert same(found, expected) and found["scale"] == expected["scale"], name


def test_whole_numbers_are_kspace_in_their_unit(acquisition, tmp_path):
    edit = lambda k: np.rint(1e6 * np.stack([k.real, k.imag], axis=-1)).astype(np.int32)
    path = rewrite(acquisition, tmp_path / "whole.h5", edit)
    expected, found = (MultiCoilSlices([one], maps_folder=False)[1] for one in (acquisition, path))
    assert found["scale"] == pytest.approx(1e6 * expected["scale"], rel=1e-3)
    assert torch.allclose(found["y"], expected["y"], atol=1e-5)


def refuse(source: Path, folder: Path, edit, sentence: str) -> None:
    """Raise unless the reader refuses the edited copy in one sentence that begins with the file."""
    path = Path(shutil.copy(source, folder / "odd.h5"))
    with h5py.File(path, "r+") as file:
        file.attrs.pop("spade_digest", None)
        edit(file)
    with pytest.raises(ValueError, match=sentence) as raised:
        MultiCoilSlices([path], maps_folder=False)[0]
    assert "odd.h5" in str(raised.value) and "\n" not in str(raised.value)


def put(name: str, value) -> Callable[[h5py.File], None]:
    """The edit that writes a dataset or a link in place of `name`."""

    def edit(file: h5py.File) -> None:
        if file.get(name, getlink=True) is not None:
            del file[name]
        file[name] = value

    return edit


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 4, 8, 8), dtype=[("a", "f4"), ("b", "f4")]),
        np.zeros((2, 4, 8, 8), dtype=[("real", "S3"), ("imag", "S3")]),
        np.zeros((2, 4, 8, 8), dtype=[("real", "f4"), ("imag", "f4"), ("time", "f4")]),
        np.zeros((2, 2, 4, 8, 8), np.float32),
        np.zeros((0, 4, 8, 8), np.complex64),
        np.zeros((2, 0, 8, 8), np.complex64),
        np.zeros((2, 4, 8, 0), np.complex64),
        h5py.Empty("c8"),
        1j,
        np.array([b"text"]),
    ],
)
def test_kspace_of_another_kind_is_refused(acquisition, tmp_path, value):
    sentence = r"'kspace' in .* with shape .*; expected complex \(slices, coils, rows, columns\), not empty\."
    refuse(acquisition, tmp_path, put("kspace", value), sentence)


@pytest.mark.parametrize(
    "value, found",
    [
        (np.full(128, np.nan), "hold numbers, got array"),
        (np.zeros(128, dtype=[("a", "f4")]), "hold numbers, got array"),
        ("hello", "hold numbers, got b'hello'"),
        (h5py.Empty("f"), "hold numbers, got Empty"),
        (np.linspace(0, 1, 128), "hold 0 and one other number, got 127 others, such as 0.00787"),
        (np.arange(128) % 3 - 1, "hold 0 and one other number, got 2 others, such as -1"),
        (1, r"have 128 columns, got shape \(\)"),
        (np.ones((1, 1, 128)), r"have 128 columns, got shape \(1, 1, 128\)"),
    ],
)
def test_masks_of_another_kind_are_refused(acquisition, tmp_path, value, found):
    refuse(acquisition, tmp_path, put("mask", value), f"the mask in .*odd.h5 must {found}")


@pytest.mark.parametrize(
    "number, other", [("<x>64</x>", "<x>-5</x>"), ("<maximum>127<", "<maximum>-3<"), ("<center>64<", "<center>900<")]
)
def test_headers_that_contradict_the_file_are_refused(acquisition, tmp_path, number, other):
    with h5py.File(acquisition) as file:
        header = file["ismrmrd_header"][()].decode()
    assert number in header
    sentence = "odd.h5 holds 4 coils and 128 rows, but its header says"
    refuse(acquisition, tmp_path, put("ismrmrd_header", header.replace(number, other)), sentence)


@pytest.mark.parametrize("factor", (1e25, 1e-25))
def test_kspace_near_the_limits_of_single_precision_is_refused(acquisition, tmp_path, factor):
    """Its squares are infinite or 0, and so were its scale and its item, without an error."""
    with h5py.File(acquisition) as file:
        kspace = file["kspace"][()] * np.float64(factor)
    sentence = r"k-space of slice 1 in .*odd.h5 must be scaled to about 1, got up to 1\.68e"
    refuse(acquisition, tmp_path, put("kspace", kspace.astype(np.complex64)), sentence)
    refuse(acquisition, tmp_path, put("kspace", kspace * 1e200 * factor), "must be scaled|NaN or infinite|zero everyw")


def test_files_without_a_signal_are_refused(acquisition, tmp_path):
    path = rewrite(acquisition, tmp_path / "zeros.h5", lambda kspace: 0 * kspace)
    with pytest.warns(UserWarning, match="zeros.h5: slice 0, 1 is zero everywhere"):
        with pytest.raises(ValueError, match="files must hold a slice with a signal, got zeros in all 1 files"):
            MultiCoilSlices([path], maps_folder=False)


@pytest.mark.parametrize(
    "value, subject",
    [
        (5, "5"),
        (np.array([1, 2]), "[1 2]"),
        (np.bytes_(b"M\xfcller"), r"M\xfcller"),
        (h5py.Empty("S1"), "odd"),
        ("", "odd"),
    ],
)
def test_subjects_of_any_type_are_read(acquisition, tmp_path, value, subject):
    path = Path(shutil.copy(acquisition, tmp_path / "odd.h5"))
    with h5py.File(path, "r+") as file:
        file.attrs.pop("spade_digest")
        file.attrs["patient_id"] = value
    assert read_volume_header(path).subject == subject


def test_names_as_long_as_the_system_allows(acquisition, tmp_path, monkeypatch):
    letter = "ü" if sys.getfilesystemencoding() == "utf-8" else "u"  # not for LC_ALL=C with PYTHONUTF8=0
    for name in ("l" * 252 + ".h5", letter * 120 + ".h5"):
        path = Path(shutil.copy(acquisition, tmp_path / name))
        item = MultiCoilSlices([path])[0]
        assert torch.equal(item["maps"], MultiCoilSlices([acquisition], maps_folder=False)[0]["maps"])
    assert len(list((tmp_path / "maps").iterdir())) == 2
    settings = dict(num_subjects=1, slices_per_subject=1, shape=(32, 32), num_coils=2, progress=False)
    assert simulate(tmp_path, name="n" * 244, **settings)[0].is_file()
    with pytest.raises(ValueError, match="path must have file names of at most 255 bytes, got 308: nnn"):
        simulate(tmp_path, name="n" * 300, **settings)
    with pytest.raises(FileNotFoundError, match="lll.h5 does not exist; expected a fastMRI multi-coil HDF5 file"):
        read_volume_header(tmp_path / ("l" * 300 + ".h5"))


def test_undersampled_file_without_mask_has_no_reference(acquisition, tmp_path):
    mask = np.arange(128) % 4 == 1
    mask[57:71] = True
    path = rewrite(acquisition, tmp_path / "gaps.h5", lambda kspace: kspace * mask)
    with pytest.warns(UserWarning, match=r"gaps.h5 has no mask, but 42 of 128 columns hold a signal"):
        item = MultiCoilSlices([path], maps_folder=False)[0]
    assert "x" not in item and np.array_equal(item["mask"].numpy().ravel(), mask)


@pytest.mark.parametrize(
    "name, edit, sentence",
    [
        ("unshifted", lambda k: np.fft.ifftshift(k, axes=(-2, -1)), "not centred along rows and columns"),
        ("columns", lambda k: np.fft.ifftshift(k, axes=-1), "not centred along columns"),
        ("rows", lambda k: np.fft.ifftshift(k, axes=-2), "not centred along rows"),
        ("chopped", lambda k: k * (-1.0) ** np.arange(128), "multiplied by .-1.[\\^]n"),
        ("hybrid", lambda k: np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(k, -2), axis=-2), -2), "rows"),
        ("image", lambda k: np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(k, (-2, -1))), (-2, -1)), "energy"),
    ],
)
def test_kspace_that_is_not_centred_is_warned_of(acquisition, tmp_path, name, edit, sentence):
    path = rewrite(acquisition, tmp_path / f"{name}.h5", lambda k: edit(k).astype(np.complex64))
    with pytest.warns(UserWarning, match=f"{name}.h5: .*{sentence}"):
        MultiCoilSlices([path], maps_folder=False)


def test_coils_and_slices_in_each_others_place_are_refused(acquisition, tmp_path):
    path = rewrite(acquisition, tmp_path / "swapped.h5", lambda k: np.swapaxes(k, 0, 1))
    with pytest.raises(ValueError, match=r"swapped.h5 holds 2 coils .* header says"):
        read_volume_header(path)


def test_too_few_acs_lines_are_warned_of_and_refused(acquisition):
    with pytest.warns(UserWarning, match=r"demo_0000.h5: coil maps cover \d+% of the object, made from \d ACS lines"):
        item = MultiCoilSlices([acquisition], acs_fraction=8 / 128, maps_folder=False)[0]
    with pytest.raises(ValueError, match="slice: coil maps cover 0% of the object, made from 13 ACS lines; measure at"):
        check_coverage(torch.zeros_like(item["maps"]), item["y"], slice(57, 70), "slice")


@pytest.mark.parametrize("name", ("kspace", "mask", "ismrmrd_header"))
@pytest.mark.parametrize("value", (h5py.SoftLink("/nowhere"), h5py.ExternalLink("absent.h5", "kspace"), {}))
def test_groups_and_dead_links_are_refused(acquisition, tmp_path, name, value):
    def edit(file: h5py.File) -> None:
        put(name, 0)(file)
        del file[name]
        if value == {}:
            file.create_group(name)
        else:
            file[name] = value

    sentence = rf"odd.h5 has no dataset '{name}' \(found: a group or a dead link\); expected a fastMRI multi-coil file"
    refuse(acquisition, tmp_path, edit, sentence)


def test_reconstruction_size_of_zero_is_refused(acquisition, tmp_path):
    path = shutil.copy(acquisition, tmp_path / "zero.h5")
    with h5py.File(path, "r+") as file:
        file.attrs.pop("spade_digest")
        header = file["ismrmrd_header"][()].decode().replace("<matrixSize><x>64</x>", "<matrixSize><x>0</x>")
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = header
    with pytest.raises(ValueError, match="zero.h5 holds 4 coils and 128 rows, but its header says"):
        read_volume_header(path)


def test_file_in_use_names_the_lock(acquisition, tmp_path):
    path = shutil.copy(acquisition, tmp_path / acquisition.name)
    hold = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    environment = {k: v for k, v in os.environ.items() if k != "HDF5_USE_FILE_LOCKING"}
    sentence = f"{acquisition.name} is locked by another program: .* HDF5_USE_FILE_LOCKING=FALSE"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=-1, stdout=-1, encoding="utf-8", env=environment
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=sentence):
            read_volume_header(path)
        with pytest.raises(FileExistsError, match=f"{sentence}; it is not replaced"):
            simulate(tmp_path, 1, 2, shape=(64, 128), num_coils=4, progress=False)
        other.communicate("\n")


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_the_simulator_replaces_nothing_that_is_not_its_own(tmp_path, content):
    path = tmp_path / "demo_0000.h5"
    if content is None:
        with h5py.File(path, "w") as file:
            file["kspace"] = np.ones((1, 2, 4, 4), np.complex64)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(FileExistsError, match="demo_0000.h5 .* is not replaced"):
        simulate(tmp_path, 1, 1, shape=(32, 32), num_coils=2, progress=False)
    assert path.read_bytes() == content


def test_the_simulator_makes_a_damaged_file_of_its_own_again(tmp_path):
    settings = dict(num_subjects=1, slices_per_subject=1, shape=(32, 32), num_coils=2, progress=False)
    path = simulate(tmp_path, **settings)[0]
    with h5py.File(path) as file:
        expected = file["kspace"][()]
    good = path.read_bytes()
    for number in range(FLIPS):
        path.write_bytes(good)
        path.write_bytes(flipped(path, number))
        try:
            simulate(tmp_path, **settings)
        except FileExistsError:  # it cannot be opened any more, so nobody knows whose it was
            continue
        with h5py.File(path) as file:
            assert np.array_equal(file["kspace"][()], expected)


def test_a_flipped_bit_of_the_cache_is_noticed(acquisition, tmp_path):
    dataset = MultiCoilSlices([acquisition], maps_folder=tmp_path)
    maps = dataset[0]["maps"]
    file = next(tmp_path.glob("*.maps"))
    good = file.read_bytes()
    for number in range(FLIPS):
        file.write_bytes(good)
        file.write_bytes(flipped(file, number))
        assert load_maps(file, maps.shape) is None
    for wrong in (b"", good[:31], good[:100], b"PK" + good):
        file.write_bytes(wrong)
        assert load_maps(file, maps.shape) is None
    assert torch.equal(MultiCoilSlices([acquisition], maps_folder=tmp_path)[0]["maps"], maps)
    assert file.read_bytes() == good


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder and what it holds that this process cannot write, also where it is root's."""
    folder.chmod(0o555)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def data_folder(acquisition) -> Iterator[Path]:
    """A folder outside of pytest's, which only its owner can read, with an acquisition."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        (Path(name) / "data").mkdir()
        yield Path(shutil.copy(acquisition, Path(name) / "data")).parent


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users on this system")
def test_a_data_folder_that_cannot_be_written_is_read(data_folder, monkeypatch):
    maps = MultiCoilSlices(find_files(data_folder), maps_folder=False)[0]["maps"]
    cache = data_folder.parent / "cache"
    monkeypatch.setenv("SPADE_CACHE", str(cache))
    with read_only(data_folder):
        with pytest.warns(UserWarning, match=r"data/maps cannot be written \(.*\); coil maps are kept in .*cache/maps"):
            assert torch.equal(MultiCoilSlices(find_files(data_folder))[0]["maps"], maps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(MultiCoilSlices(find_files(data_folder))[0]["maps"], maps)
        files = [data_folder / "demo_0000.h5"]
        assert simulate(data_folder, 1, 2, shape=(64, 128), num_coils=4, progress=False) == files
        with pytest.raises(PermissionError, match="demo_0001"):
            simulate(data_folder, 2, 2, shape=(64, 128), num_coils=4, progress=False)
        monkeypatch.setenv("SPADE_CACHE", str(data_folder / "cache"))
        with pytest.warns(UserWarning, match="cannot be written .*; coil maps are not kept: set SPADE_CACHE"):
            assert torch.equal(MultiCoilSlices(find_files(data_folder))[0]["maps"], maps)
    assert [path.name for path in cache.rglob("*.maps")] == [path.name for path in cache.glob("maps/demo_0000_000_*")]
    assert [path.name for path in data_folder.iterdir()] == ["demo_0000.h5"]


def test_without_a_home_the_maps_are_kept_in_the_folder_for_temporary_files(data_folder, monkeypatch):
    for name in ("SPADE_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(data_folder))
    with pytest.warns(UserWarning, match=rf"coil maps are kept in {data_folder}/.cache/spade/maps"):
        MultiCoilSlices(find_files(data_folder), maps_folder=data_folder / "demo_0000.h5")[0]
    assert len(list(data_folder.glob(".cache/spade/maps/demo_0000_000_*.maps"))) == 1


def test_a_small_dev_shm_means_no_workers(acquisition, monkeypatch):
    """Batches of worker processes pass through it: where it is full, the workers fail or hang."""
    data = MultiCoilSlices([acquisition], maps_folder=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    with pytest.warns(UserWarning, match="num_workers is now 0: workers need 256 MB in /dev/shm, got 64"):
        batches = loader(data, num_workers=2)
    assert batches.num_workers == 0 and torch.equal(next(iter(batches)).y[0], data[0]["y"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**29, 0, 2**29))
    assert loader(data, num_workers=2).num_workers == 2


def test_a_flipped_bit_of_an_acquisition_changes_no_number_silently(acquisition, tmp_path):
    """Every flip is noticed when the file is read, or leaves all numbers as they were."""
    expected = [MultiCoilSlices([acquisition], maps_folder=False)[i] for i in range(2)]
    path, silent = tmp_path / acquisition.name, []
    for number in range(FLIPS):
        path.write_bytes(flipped(acquisition, number))
        try:
            dataset = MultiCoilSlices([path], maps_folder=False)
            found = [dataset[i] for i in range(len(dataset))]
        except (ValueError, OSError):
            continue
        if len(found) != 2 or not all(map(same, found, expected)):
            silent.append(number)
    assert not silent


def measured(shared: Path, name: str) -> torch.Tensor:
    """k-space `(coils, H, W)` of a scanner."""
    with h5py.File(shared / "mri" / "multicoil" / f"{name}.h5") as file:
        return torch.from_numpy(file["kspace"][()])


ACS_LINES = (6, 7, 8, 10, 12, 16)
COVERED = {  # share of the object with maps, for each number of ACS lines
    "brain_t1_4ch_ge": (0.00, 0.02, 0.10, 0.70, 1.00, 1.00),
    "brain_t1_4ch_mprage": (0.00, 0.01, 0.19, 0.89, 1.00, 1.00),
    "brain_16ch_96": (0.00, 0.02, 0.13, 0.49, 0.87, 1.00),
    "heart_cine_10ch": (0.00, 0.04, 0.21, 0.91, 0.97, 1.00),
    "brain_t1_8ch_alias": (0.00, 0.01, 0.09, 0.59, 1.00, 1.00),
}


@pytest.mark.parametrize("name", COVERED)
def test_the_acs_lines_that_measured_data_need(shared, name):
    kspace = measured(shared, name)
    first = kspace.shape[-1] // 2
    for lines, share in zip(ACS_LINES, COVERED[name], strict=True):
        acs = slice(first - lines // 2, first - lines // 2 + lines)
        maps = espirit(kspace[None], acs)[0]
        found = rf"slice: coil maps cover (\d+)% of the object, made from {lines} ACS lines; "
        if share < 0.05:
            with pytest.raises(ValueError, match=f"{found}measure at least 12") as raised:
                check_coverage(maps, kspace, acs, "slice")
            assert abs(int(re.search(found, str(raised.value))[1]) / 100 - share) < 0.015
        elif share < 0.8:
            with pytest.warns(UserWarning, match=f"{found}12 or more are needed"):
                assert abs(check_coverage(maps, kspace, acs, "slice") - share) < 0.015
        else:
            assert abs(check_coverage(maps, kspace, acs, "slice") - share) < 0.015  # a warning is an error


@pytest.mark.parametrize("name", COVERED)
def test_measured_kspace_in_another_layout_is_doubted(shared, name):
    kspace = measured(shared, name)
    assert not any(map(kspace_doubt, (kspace, kspace.conj(), kspace.flip(-2), kspace.roll(1, dims=-1))))
    for axes, words in (((-2, -1), "rows and columns"), ((-1,), "columns"), ((-2,), "rows")):
        doubt = kspace_doubt(torch.fft.ifftshift(kspace, dim=axes))
        assert doubt.endswith(f"k-space is not centred along {words} (no fftshift), or is no k-space."), doubt
        transformed = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(kspace, dim=axes), dim=axes), dim=axes)
        assert kspace_doubt(transformed).startswith("its energy peaks at row ")
    sign = lambda axis: (-1.0) ** torch.arange(kspace.shape[axis]).reshape([-1] + [1] * (-1 - axis))
    rows, columns = ("rows",), () if name == "brain_t1_8ch_alias" else ("columns",)  # folded, thus periodic
    chopped = {rows: sign(-2), columns: sign(-1), rows + columns: sign(-2) * sign(-1)}
    for words, signs in chopped.items():
        expected = f"its image is split at the edges of the {' and '.join(words)}: k-space is multiplied by (-1)^n"
        assert kspace_doubt(kspace * signs) == (f"{expected} along them?" if words else "")


@pytest.fixture(scope="module")
def foreign(acquisition, tmp_path_factory) -> Path:
    """The acquisition as fastMRI's files are written: an older format, text of variable length."""
    path = tmp_path_factory.mktemp("foreign") / "foreign.h5"
    with h5py.File(acquisition) as source, h5py.File(path, "w") as file:
        file["ismrmrd_header"], file["kspace"] = source["ismrmrd_header"][()].decode(), source["kspace"][()]
        file.attrs.update(acquisition="AXT2", patient_id="anna")
    return path


@pytest.mark.parametrize("object_number", (1, 2, 3))
def test_zeros_in_a_heap_of_text_do_not_stop_a_reader_for_ever(foreign, tmp_path, object_number):
    """libhdf5 2.0 and older ones loop at an object of size 0; the first object of this heap is the header."""
    content, number = foreign.read_bytes(), object_number.to_bytes(8, "little")
    heap = content.index(b"GCOL")
    place = heap + content[heap:].index(number, 16)
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(content[:place] + bytes(heap + 4096 - place) + content[heap + 4096 :])
    ended = timed_outcome(Kind("damaged", damaged, lambda: [*read_volume_header(damaged)]), "")
    assert ended == "noticed"
    with pytest.raises(ValueError, match=r"text in .*damaged.h5 is damaged: zeros in the heap of HDF5. Copy the file"):
        read_volume_header(damaged)


def written(path: Path, source: Path, write: Callable[[h5py.File, np.ndarray], object]) -> Path:
    """A file with the header of another one and the k-space that `write` makes of its k-space."""
    with h5py.File(source) as whole, h5py.File(path, "w") as file:
        file["ismrmrd_header"] = whole["ismrmrd_header"][()]
        file.attrs.update(acquisition="AXT2", patient_id="anna")
        write(file, whole["kspace"][()])
    return path


def test_kspace_that_lies_in_other_files_is_read_or_refused(acquisition, tmp_path):
    def one_file_a_coil(file, kspace):
        layout = h5py.VirtualLayout(kspace.shape, kspace.dtype)
        for coil in range(kspace.shape[1]):
            with h5py.File(tmp_path / f"coil{coil}.h5", "w") as part:
                part["k"] = kspace[:, coil]
            layout[:, coil] = h5py.VirtualSource(f"coil{coil}.h5", "k", shape=kspace[:, coil].shape)
        file.create_virtual_dataset("kspace", layout)

    def raw_numbers(file, kspace):
        (tmp_path / "kspace.raw").write_bytes(kspace.tobytes())
        place = [(str(tmp_path / "kspace.raw"), 0, kspace.nbytes)]
        file.create_dataset("kspace", kspace.shape, kspace.dtype, external=place)

    (folder := tmp_path / "odd").mkdir()
    for write, other in ((one_file_a_coil, "coil2.h5"), (raw_numbers, "kspace.raw")):
        path = written(tmp_path / "odd.h5", acquisition, write)
        read_volume_header(path)
        with h5py.File(path) as file, h5py.File(acquisition) as source:
            assert np.array_equal(file["kspace"][()], source["kspace"][()])
        content = (tmp_path / other).read_bytes()
        refusal = f"{other}, to which 'kspace' in .*odd.h5 refers, must exist in full: copy it, too"
        if other.endswith("raw"):
            (tmp_path / other).write_bytes(content[:-100])
            with pytest.raises(ValueError, match=refusal):
                read_volume_header(path)
        (tmp_path / other).rename(folder / other)
        with pytest.raises(ValueError, match=refusal):
            MultiCoilSlices([path], maps_folder=False)


def test_kspace_that_was_never_written_in_full_is_warned_of(acquisition, tmp_path):
    def three_coils(file, kspace):
        part = file.create_dataset("kspace", kspace.shape, kspace.dtype, chunks=(1, 1, *kspace.shape[2:]))
        part[:, :3] = kspace[:, :3]

    path = written(tmp_path / "odd.h5", acquisition, three_coils)
    with pytest.warns(UserWarning, match="odd.h5: a part of 'kspace' was never written and reads as zeros"):
        read_volume_header(path)
    compressed = lambda file, kspace: file.create_dataset("kspace", data=kspace, compression="gzip", shuffle=True)
    read_volume_header(written(path, acquisition, compressed))


def test_damaged_groups_of_foreign_files_are_refused_by_name(foreign, tmp_path):
    content, damaged = foreign.read_bytes(), tmp_path / "damaged.h5"
    for block in (b"TREE", b"SNOD", b"HEAP"):
        place = content.index(block)
        damaged.write_bytes(content[:place] + bytes(16) + content[place + 16 :])
        with pytest.raises(ValueError, match=r"damaged.h5 "):
            read_volume_header(damaged)
