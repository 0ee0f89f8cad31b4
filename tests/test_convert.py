"""Raw data of scanners and of BART in fastMRI's layout: exact numbers there and back, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from spade.convert import convert, from_bart, read_cfl, to_bart, write_cfl
from spade.data.fastmri import MultiCoilSlices, read_volume_header
from spade.data.phantom import ismrmrd_header

ROOT = Path(__file__).resolve().parents[1]
HEADER = ismrmrd_header((8, 16), 2)  # readout of 16 samples, 16 lines


@pytest.fixture
def kspace() -> np.ndarray:
    """Random k-space of 3 slices, 2 coils, 16 x 16 samples."""
    parts = np.random.default_rng(0).standard_normal((2, 3, 2, 16, 16)).astype(np.float32)
    return parts[0] + 1j * parts[1]


def write_raw(path: Path, lines, header: str = HEADER, noise: bool = True) -> Path:
    """An ISMRMRD file, by its reference implementation, of (slice, step, samples, settings of the readout)."""
    with ismrmrd.Dataset(str(path)) as file:
        file.write_xml_header(header.encode())
        first = ismrmrd.Acquisition.from_array(np.full((2, 64), 7, np.complex64))
        first.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        if noise:
            file.append_acquisition(first)
        for number, step, samples, settings in lines:
            line = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples))
            line.center_sample = 8
            line.idx.slice, line.idx.kspace_encode_step_1 = number, step
            for name, value in settings.items():
                if name == "flag":
                    line.set_flag(value)
                else:
                    setattr(line.idx if hasattr(line.idx, name) else line, name, value)
            file.append_acquisition(line)
    return path


def every_line(kspace: np.ndarray, steps=range(16), **settings):
    return [(n, step, kspace[n, ..., step], settings) for n in range(len(kspace)) for step in steps]


def values(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file["kspace"][()]


def test_ismrmrd_to_fastmri_copies_every_number(tmp_path, kspace):
    lines = every_line(kspace)
    np.random.default_rng(1).shuffle(lines)
    made = convert(write_raw(tmp_path / "a.mrd", lines), tmp_path / "new" / "a.h5", "AXT2")
    assert np.array_equal(values(made), kspace)
    volume = read_volume_header(made)
    assert (volume.acquisition, volume.slices, volume.coils, volume.height) == ("AXT2", 3, 2, 8)
    with h5py.File(made) as file:
        assert not volume.has_mask and file["reconstruction_rss"].shape == (3, 8, 16)
        assert file.attrs["max"] == file["reconstruction_rss"][()].max()
        assert file["ismrmrd_header"][()].decode() == HEADER


def test_fastmri_to_bart_and_back_copies_every_number(tmp_path, kspace):
    made = convert(write_raw(tmp_path / "a.h5", every_line(kspace)), tmp_path / "b.h5")
    array = read_cfl(convert(made, tmp_path / "k.cfl"))
    assert array.shape == (16, 16, 1, 2, *[1] * 9, 3, 1, 1)
    assert array[3, 5, 0, 1, *[0] * 9, 2, 0, 0] == kspace[2, 1, 3, 5], "row, column, coil, slice"
    back = convert(tmp_path / "k.cfl", tmp_path / "c.h5", "AXT1", oversampling=2)
    assert np.array_equal(values(back), kspace) and read_volume_header(back).height == 8
    again = convert(back, tmp_path / "l.cfl")
    assert again.read_bytes() == (tmp_path / "k.cfl").read_bytes()


def test_a_cfl_holds_its_first_axis_fastest(tmp_path):
    """As BART's own: the second number of the file is the second along READ."""
    (tmp_path / "a.hdr").write_text(
        "# Dimensions\n2 3 1 1 1 1 1 1 1 1 1 1 1 1 1 1 \n# Command\nphantom \n", encoding="utf-8"
    )
    np.arange(6, dtype=np.complex64).tofile(tmp_path / "a.cfl")
    array = read_cfl(tmp_path / "a")[:, :, *[0] * 14]
    assert array.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert np.array_equal(read_cfl(write_cfl(tmp_path / "b.cfl", array)), read_cfl(tmp_path / "a.hdr"))


def test_lines_measured_twice_are_averaged_and_other_readouts_left_out(tmp_path, kspace):
    lines = every_line(kspace) + every_line(3 * kspace, [4, 9], average=1)
    for flag in (ismrmrd.ACQ_IS_NAVIGATION_DATA, ismrmrd.ACQ_IS_PHASECORR_DATA, ismrmrd.ACQ_IS_DUMMYSCAN_DATA):
        lines += every_line(100 * kspace, [8], flag=flag)
    lines += every_line(50 * kspace, [7], flag=ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)  # where an image line is
    expected = kspace.copy()
    expected[..., [4, 9]] *= 2
    assert np.allclose(values(convert(write_raw(tmp_path / "a.mrd", lines), tmp_path / "a.h5")), expected, rtol=1e-6)


def test_missing_lines_become_the_mask_and_calibration_lines_fill_it(tmp_path, kspace):
    lines = every_line(kspace, range(0, 16, 4)) + every_line(kspace, [7, 9], flag=ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
    made = convert(write_raw(tmp_path / "a.mrd", lines), tmp_path / "a.h5")
    with h5py.File(made) as file:
        assert np.flatnonzero(file["mask"][()]).tolist() == [0, 4, 7, 8, 9, 12]
        assert "reconstruction_rss" not in file and not file["kspace"][..., 1].any()
    back = convert(convert(made, tmp_path / "k.cfl"), tmp_path / "b.h5", oversampling=2)
    with h5py.File(back) as file:
        assert np.flatnonzero(file["mask"][()]).tolist() == [0, 4, 7, 8, 9, 12]
    assert np.array_equal(values(back), values(made))


def test_a_partial_encoding_and_an_asymmetric_echo_stand_at_their_place(tmp_path, kspace):
    """12 lines of 16, whose line 4 is the centre, and 14 samples of 16, whose sample 6 is."""
    header = HEADER.replace("<maximum>15<", "<maximum>11<").replace("<center>8<", "<center>4<")
    lines = [
        (n, step, kspace[n, :, 2:, step + 4], {"center_sample": 6, "discard_post": 1})
        for n in range(3) for step in range(12)
    ]  # fmt: skip
    made = convert(write_raw(tmp_path / "a.mrd", lines, header), tmp_path / "a.h5")
    expected = kspace.copy()
    expected[..., :4] = expected[:, :, :2] = expected[:, :, 15] = 0
    assert np.array_equal(values(made), expected)
    volume = read_volume_header(made)
    assert (volume.measured, volume.has_mask) == (slice(4, 16), False)


def test_names_of_persons_are_left_out(tmp_path, kspace):
    person = "<subjectInformation><patientName>Doe</patientName><patientID>D-1</patientID></subjectInformation>"
    study = "<studyInformation><studyDate>2020-01-01</studyDate></studyInformation>"
    protocol = "<measurementInformation><protocolName>AXFLAIR</protocolName></measurementInformation>"
    header = HEADER.replace("<acquisitionSystem", f"{person}\n{study}{protocol}<acquisitionSystem", 1)
    made = convert(write_raw(tmp_path / "a.mrd", every_line(kspace), header), tmp_path / "a.h5")
    content = made.read_bytes()
    assert b"Doe" not in content and b"D-1" not in content and b"2020" not in content
    volume = read_volume_header(made)
    assert volume.acquisition == "AXFLAIR" and len(volume.subject) == 16


def double_encoding(header: str) -> str:
    start, stop = header.index("<encoding>"), header.index("</encoding>") + len("</encoding>")
    return header[:stop] + header[start:stop] + header[stop:]


@pytest.mark.parametrize(
    "change, sentence",
    (
        (lambda h: h.replace("cartesian", "radial"), "must have a Cartesian trajectory, got 'radial'"),
        (lambda h: h.replace("<z>1</z>", "<z>4</z>"), "must be 2-D, got an encoded matrix of 16 x 16 x 4"),
        (double_encoding, "must have one encoding, got 2"),
        (lambda h: h[:-30], "must have an ISMRMRD header with matrix sizes"),
        (lambda h: h.replace("<x>16</x><y>16</y>", "<x>12</x><y>16</y>"), "must fit the 12 x 16 samples"),
    ),
)
def test_other_encodings_are_refused(tmp_path, kspace, change, sentence):
    raw = write_raw(tmp_path / "a.mrd", every_line(kspace), change(HEADER))
    with pytest.raises(ValueError, match=sentence):
        convert(raw, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    "lines, sentence",
    (
        (lambda k: [*every_line(k), *every_line(k, contrast=1)], "one value of contrast, got 2"),
        (lambda k: [*every_line(k), *every_line(k, kspace_encode_step_2=1)], "one value of kspace_encode_step_2"),
        (lambda k: [*every_line(k), *every_line(k, repetition=1)], "one value of repetition"),
        (lambda k: every_line(k, flag=ismrmrd.ACQ_IS_REVERSE), "readouts in one direction"),
        (lambda k: [*every_line(k[:2]), (2, 0, k[2, ..., 0], {})], "the same lines in each slice"),
        (lambda k: [*every_line(k), (0, 0, k[0, :, :8, 0], {})], "the same number_of_samples"),
        (lambda k: [(0, 20, k[0, ..., 0], {})], "lines up to column 20"),
        (lambda k: [], "must hold readouts of an image, got 1"),
    ),
)
def test_other_readouts_are_refused(tmp_path, kspace, lines, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(write_raw(tmp_path / "a.mrd", lines(kspace)), tmp_path / "a.h5")


@pytest.mark.parametrize(
    "sizes, sentence",
    (
        ((1, 64, 20, 4), "must be Cartesian, got an axis READ of 1"),
        ((8, 8, 4, 2), "must be 2-D, got 4 partitions"),
        ((8, 8, 1, 2, 1, 3), "got also TE"),
    ),
)
def test_other_arrays_of_bart_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_bart(np.ones(sizes + (1,) * (16 - len(sizes)), np.complex64), "k")


def test_wrong_files_are_refused(tmp_path, kspace):
    array = to_bart(kspace)
    scattered = array.copy()
    scattered[::2, ::2] = scattered[1::2, 1::2] = 0
    made = write_cfl(tmp_path / "k", array)
    with pytest.raises(ValueError, match="sampled in whole columns"):
        from_bart(scattered, "k")
    with pytest.raises(ValueError, match="oversampling must divide the 16 samples"):
        convert(made, tmp_path / "a.h5", oversampling=3)
    with pytest.raises(ValueError, match="out must end in .h5"):
        convert(made, tmp_path / "l.cfl")
    made.write_bytes(made.read_bytes()[:-8])
    with pytest.raises(ValueError, match="as many numbers as its .hdr says"):
        convert(made, tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError, match="no.hdr does not exist"):
        convert(tmp_path / "no.cfl", tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError, match="expected an ISMRMRD file"):
        convert(tmp_path / "no.mrd", tmp_path / "a.h5")
    good = convert(write_raw(tmp_path / "a.mrd", every_line(kspace)), tmp_path / "a.h5")
    with pytest.raises(ValueError, match="ISMRMRD file of one measurement, got 0"):
        convert(good, tmp_path / "b.h5")
    with pytest.raises(ValueError, match="out must be another file"):
        convert(good, good)
    (tmp_path / "half.mrd").write_bytes((tmp_path / "a.mrd").read_bytes()[:3000])
    with pytest.raises(ValueError, match="half.mrd"):
        convert(tmp_path / "half.mrd", tmp_path / "b.h5")


def test_the_result_is_reconstructed_as_any_other_file(tmp_path, kspace):
    kspace[..., 8, 8] = 100  # energy at the centre
    made = convert(write_raw(tmp_path / "a.mrd", every_line(kspace)), tmp_path / "a.h5")
    assert MultiCoilSlices([made], 2, acquisition=None, maps_folder=False).shape(0) == (2, 8, 16)


def test_the_command(tmp_path, kspace):
    write_raw(tmp_path / "a.mrd", every_line(kspace))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = lambda *words: subprocess.run(
        [sys.executable, "-m", "spade", "convert", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    made = call("a.mrd", "--out", "scans/a.h5", "--acquisition", "AXT2", "--json")
    assert json.loads(made.stdout) == {
        "file": "scans/a.h5", "acquisition": "AXT2", "slices": 3, "coils": 2, "rows": 16, "columns": 16, "mask": False
    }, made.stderr  # fmt: skip
    wrong = call("a.mrd", "--out", "a.npy")
    assert wrong.returncode == 2 and "out must end in .h5" in wrong.stderr and "Traceback" not in wrong.stderr
