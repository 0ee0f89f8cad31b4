"""Photographs: kinds of files, measurements that agree with their operator, crops as functions of (seed, i)."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve

import spade.data.kernels
from spade.basics import loader, seeded
from spade.data.photos import (
    MeasurementCrops,
    PhotoCrops,
    Photographs,
    collate_photos,
    degrade,
    embedded_photos,
    find_photos,
    photo_size,
    preimage,
    read_photo,
)
from spade.operators import Bicubic, BlurDownsample
from spade.y_channel import matlab_resize, reduced_batch

KERNELS = spade.data.kernels.test_kernels(size=9)


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture()
def folder(tmp_path) -> Path:
    for number, (height, width) in enumerate(((40, 50), (50, 40), (40, 50), (41, 53))):
        Image.fromarray(picture(height, width, number)).save(tmp_path / f"photo{number}.png")
    return tmp_path


# Files


def test_rgb_is_its_pixels(tmp_path):
    pixels = picture(7, 9)
    for name in ("a.png", "a.bmp", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        photo = read_photo(tmp_path / name)
        assert photo.dtype == torch.float32 and photo.is_contiguous() and photo_size(tmp_path / name) == (7, 9)
        assert np.array_equal((photo * 255).round().permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    "mode, suffix",
    (
        ("L", "png"),
        ("1", "png"),
        ("P", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("L", "jpg"),
        ("YCbCr", "jpg"),
    ),
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (12, 10), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    photo = read_photo(tmp_path / f"a.{suffix}")
    assert photo.shape == (3, 10, 12) and photo.min() > 0.98


def test_sixteen_bits_keep_their_levels(tmp_path):
    levels = np.arange(0, 65536, 257 * 5 + 1, dtype=np.uint16).reshape(1, -1).repeat(3, 0)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.allclose(read_photo(tmp_path / name)[1].numpy(), levels / 65535, atol=1e-6)


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.concatenate([picture(6, 6), np.full((6, 6, 1), 255, np.uint8)], -1)
    pixels[0, 0], pixels[0, 1] = (10, 20, 30, 0), (0, 0, 0, 102)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert photo[:, 0, 0].tolist() == [1, 1, 1] and photo[:, 0, 1].tolist() == pytest.approx([0.6] * 3, abs=0.004)
    assert np.array_equal((photo * 255).round().permute(1, 2, 0).numpy()[1:], pixels[1:, :, :3])


@pytest.mark.parametrize("suffix", ("png", "jpg", "bmp", "tif", "webp"))
def test_a_file_cut_short_is_named(tmp_path, suffix):
    Image.fromarray(picture(60, 60)).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    for length in (0, 3, 20, len(content) // 2):
        (tmp_path / f"cut.{suffix}").write_bytes(content[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of a TIFF's missing end before it raises
            with pytest.raises(ValueError, match=f"cut.{suffix}"):
                read_photo(tmp_path / f"cut.{suffix}")


def test_a_broken_checksum_is_named(tmp_path):
    Image.fromarray(picture(60, 60)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png must be a complete image file"):
        read_photo(tmp_path / "a.png")


def test_values_without_a_white_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "wide.tif")
    for name, word in (("float.tif", "float32"), ("wide.tif", "int32")):
        with pytest.raises(ValueError, match=f"{name} must have 8 or 16 bits, got {word} values"):
            read_photo(tmp_path / name)


def test_folders(folder):
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "sub.png").mkdir()
    assert [path.name for path in find_photos(folder)] == [f"photo{number}.png" for number in range(4)]
    for bad, message in (
        (folder / "absent", "got none"),
        (folder / "notes.txt", "got a file"),
        (folder / "sub.png", "must hold an image"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_photos(bad)
    with pytest.raises(FileNotFoundError, match="absent.png must be an image file, got none"):
        read_photo(folder / "absent.png")
    with pytest.raises(FileNotFoundError, match="must be an image file, got a folder"):
        read_photo(folder)
    with pytest.raises(ValueError, match="notes.txt must be a complete image file"):
        read_photo(folder / "notes.txt")


def test_embedded_photographs_are_in_the_wheel_and_apart():
    from importlib.metadata import files

    shipped = {os.path.realpath(path.locate()) for path in files("scikit-image")}
    parts = embedded_photos()
    assert list(parts) == ["train", "test"] and not set(parts["train"]) & set(parts["test"])
    assert all(os.path.realpath(path) in shipped for paths in parts.values() for path in paths)
    assert not any("motorcycle" in path.name for path in parts["test"])  # a stereo pair, both of it in training
    assert all(read_photo(path).std(dim=0).max() > 0.05 for paths in parts.values() for path in paths)  # colour


# Photographs


@pytest.mark.parametrize("scale", (1, 2, 3, 4))
def test_a_measurement_is_scipys_and_the_operators(folder, scale):
    data = Photographs(find_photos(folder), (scale,), KERNELS[8:11])
    for i in range(len(data)):
        item = data[i]
        kernel = KERNELS[8 + item["slice"]].numpy()
        expected = np.stack([convolve(channel, kernel, mode="wrap")[::scale, ::scale] for channel in item["x"].numpy()])
        assert np.allclose(item["y"], expected, atol=1e-5) and item["y"].shape == data.shape(i)
        batch = collate_photos([item])
        assert torch.allclose(batch.A(batch.x), batch.y, atol=1e-6) and batch.A.scale == scale


def test_pairing_scales_and_limit(folder):
    files = find_photos(folder)
    cyclic = Photographs(files, (2, 3), KERNELS[:3])
    assert [(item["subject"], item["slice"], item["scale"]) for item in cyclic] == [
        (f"photo{i}", i % 3, s) for s in (2, 3) for i in range(4)
    ]
    assert len(Photographs(files, (2, 3), KERNELS, pairing="all")) == 4 * 2 * 12
    assert len(Photographs(files, (2,), KERNELS, pairing="all", limit=2)) == 24
    assert Photographs(files).kernels.shape == (12, 25, 25)


def test_references_are_the_photographs(folder):
    files = find_photos(folder)
    item = Photographs(files, (4,), KERNELS)[3]  # 41 × 53
    assert (
        item["x"].shape == (3, 40, 52)
        and torch.equal(item["x"], read_photo(files[3])[:, :40, :52])
        and item["file"] == "photo3.png"
    )
    tile = Photographs(files, (2,), KERNELS, tile=20)[3]
    assert torch.equal(tile["x"], read_photo(files[3])[:, 10:30, 16:36])


def test_one_kernel_is_a_stack_of_one_and_one_scale_a_list_of_one(folder):
    files = find_photos(folder)
    for settings in (dict(), dict(pairing="all")):
        one, stack = Photographs(files, 2.0, KERNELS[0], **settings), Photographs(files, (2,), KERNELS[:1], **settings)
        assert len(one) == len(stack) == len(files) and one.scales == (2,)
        assert all(
            torch.equal(one[i]["y"], stack[i]["y"]) and torch.equal(one[i]["kernel"], stack[i]["kernel"])
            for i in range(len(one))
        )
    one, stack = (PhotoCrops(files, 4, crop=32, scales=2, kernels=kernels) for kernels in (KERNELS[0], KERNELS[:1]))
    assert all(torch.equal(one[i]["y"], stack[i]["y"]) for i in range(4))


def test_noise_belongs_to_the_measurement(folder):
    files = find_photos(folder)
    clean, noisy = Photographs(files, (2,), KERNELS), Photographs(files, (2,), KERNELS, noise=0.1)
    assert (noisy[1]["y"] - clean[1]["y"]).std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(
        noisy[1]["y"], Photographs(files, (3, 2), KERNELS, noise=0.1)[5]["y"]
    )  # whatever else is measured
    assert not torch.equal(noisy[1]["y"], Photographs(files, (2,), KERNELS, noise=0.1, seed=1)[1]["y"])
    assert collate_photos([noisy[0], noisy[2]]).A.noise.flatten().tolist() == pytest.approx([0.1, 0.1])


def test_measurements_never_hold_a_reference(folder):
    data = Photographs(find_photos(folder), (2,), KERNELS)
    blind = data.measurements()
    assert (
        "x" in data[0]
        and "x" not in blind[0]
        and torch.equal(blind[0]["y"], data[0]["y"])
        and collate_photos([blind[0]]).x is None
    )
    assert "x" not in Photographs(find_photos(folder), (2,), KERNELS, ground_truth=False)[0]


def test_batches_share_scale_and_shape(folder):
    data = Photographs(find_photos(folder), (2, 3), KERNELS, pairing="all")
    batches = list(loader(data, batch_size=5, shuffle=True, seed=1))
    assert sorted(zip(*[sum((b.info[n] for b in batches), []) for n in ("scale", "subject", "slice")])) == sorted(
        (s, f"photo{i}", k) for s in (2, 3) for i in range(4) for k in range(12)
    )
    for batch in batches:
        assert set(batch.info["scale"]) == {batch.A.scale} and len(batch.A.kernel) == len(batch.y)
        assert torch.allclose(batch.A(batch.x), batch.y, atol=1e-6)
    with pytest.raises(ValueError, match="items must have one scale, .* got 2, 3"):
        collate_photos([data[0], data[len(data) - 1]])


def test_workers_change_nothing(folder):
    data = Photographs(find_photos(folder), (2,), KERNELS, noise=0.01)
    for one, other in zip(loader(data, 2), loader(data, 2, num_workers=1), strict=True):
        assert torch.equal(one.y, other.y) and torch.equal(one.A.kernel, other.A.kernel) and one.info == other.info


@pytest.mark.parametrize(
    "make, error, message",
    (
        (lambda files: Photographs(files[0]), TypeError, "files must be a list of image files"),
        (lambda files: Photographs([]), ValueError, "at least one image file"),
        (lambda files: Photographs(iter([])), ValueError, "at least one image file"),
        (
            lambda files: Photographs(files, (2,), spade.data.kernels.test_kernels(size=51)),
            ValueError,
            "photo0.png must hold the 52×52 pixels of the kernel and a block of ×2, got 40×50",
        ),
        (
            lambda files: Photographs(files, tile=45),
            ValueError,
            "photo0.png must hold the 45×45 pixels of the tile, got 40×50",
        ),
        (
            lambda files: Photographs(files, tile=20),
            ValueError,
            "tile must be an integer of at least 26 pixels, the kernel and a block of ×2, got 20",
        ),
        (
            lambda files: Photographs(files, tile=32.0),
            ValueError,
            "tile must be an integer of at least 26 pixels, .* got 32.0",
        ),
        (
            lambda files: Photographs(files, noise=(0, 0.1)),
            ValueError,
            r"noise must be one standard deviation of at least 0, got \(0, 0.1\)",
        ),
        (
            lambda files: Photographs(files, scales=2.5),
            ValueError,
            r"scales must be whole numbers of at least 1, got \(2.5,\)",
        ),
        (
            lambda files: Photographs(files, kernels=torch.ones(1, 1, 3, 3) / 9),
            ValueError,
            r"kernels must have shape \(K, h, w\), or \(h, w\) for one, got \(1, 1, 3, 3\)",
        ),
        (lambda files: PhotoCrops(files, 4, crop=32, noise=(0, 0.1, 0.2)), ValueError, "noise must be a range"),
        (lambda files: Photographs(files, (0,)), ValueError, "scales must be whole numbers of at least 1"),
        (lambda files: Photographs(files, ()), ValueError, "scales must be whole numbers of at least 1"),
        (
            lambda files: Photographs(files, pairing="some"),
            ValueError,
            "unknown pairing 'some': choose one of cyclic, all",
        ),
        (lambda files: Photographs(files, noise=-1), ValueError, "noise must be one standard deviation"),
        (lambda files: Photographs(files, limit=0), ValueError, "limit must be at least 1"),
        (lambda files: Photographs(files, (2,), 2 * KERNELS), ValueError, "kernel must sum to one"),
        (
            lambda files: PhotoCrops(files, 4, crop=48),
            ValueError,
            "photo0.png must hold the 48×48 pixels of the crop, got 40×50",
        ),
        (
            lambda files: PhotoCrops(files, 4, crop=26),
            ValueError,
            "crop at least the kernel of 25 pixels, got 4 and 26, which leaves 24",
        ),
        (
            lambda files: PhotoCrops(files, 0, crop=32),
            ValueError,
            "length must be at least 1 and crop at least the kernel of 25 pixels, got 0 and 32",
        ),
        (lambda files: PhotoCrops(files, 4, crop=32, noise=(0.2, 0.1)), ValueError, "noise must be a range"),
        (
            lambda files: PhotoCrops(files, 4, crop=32, noise=0.1, degradation="bicubic"),
            ValueError,
            r'degradation must be "blur" if kernels or noise are given, got "bicubic" with noise \(0.1, 0.1\)',
        ),
        (
            lambda files: Photographs(files, kernels=KERNELS, degradation="bicubic"),
            ValueError,
            'got "bicubic" with kernels',
        ),
        (
            lambda files: Photographs(files, degradation="cubic"),
            ValueError,
            "unknown degradation 'cubic': choose one of blur, bicubic",
        ),
        (
            lambda files: MeasurementCrops(Photographs(files, degradation="bicubic"), 4),
            ValueError,
            'photographs must be blurred, got degradation="bicubic"',
        ),
        (
            lambda files: MeasurementCrops(Photographs(files, (2,), KERNELS), 4, crop=48),
            ValueError,
            "photo0.png must hold the 48×48 pixels of the crop, got 40×50",
        ),
        (
            lambda files: MeasurementCrops(Photographs(files, (2,), KERNELS), 4, crop=8),
            ValueError,
            "crop at least the kernel of 9 pixels, got 4 and 8",
        ),
    ),
)
def test_settings_that_are_refused(folder, make, error, message):
    with pytest.raises(error, match=message):
        make(find_photos(folder))


def test_a_damaged_file_stops_before_training(folder):
    (folder / "photo2.png").write_text("no image", encoding="utf-8")
    for make in (lambda files: Photographs(files, (2,), KERNELS), lambda files: PhotoCrops(files, 4, crop=32)):
        with pytest.raises(ValueError, match="photo2.png must be a complete image file"):
            make(find_photos(folder))


# Crops


def test_photo_crops_are_functions_of_seed_and_number(folder):
    files = find_photos(folder)
    forward, backward = PhotoCrops(files, 40, crop=36), PhotoCrops(files, 40, crop=36, remember=0)
    items = [forward[i] for i in range(40)]
    for i in reversed(range(40)):
        again = backward[i]
        assert (
            torch.equal(again["y"], items[i]["y"])
            and torch.equal(again["x"], items[i]["x"])
            and again["noise"] == items[i]["noise"]
        )
        assert (
            items[i]["y"].shape == (3, *2 * (36 // (1, 2, 3, 4)[i % 4],))
            and forward.bucket(i)[0] == items[i]["scale"] == (1, 2, 3, 4)[i % 4]
        )
    assert len({item["noise"] for item in items}) == 40 and {item["subject"] for item in items} == {
        f"photo{n}" for n in range(4)
    }
    assert not torch.equal(PhotoCrops(files, 40, crop=36, seed=1)[0]["x"], items[0]["x"])
    with pytest.raises(IndexError):
        forward[40]


def test_photo_crops_agree_with_their_operator(folder):
    for batch in loader(PhotoCrops(find_photos(folder), 16, crop=36, noise=0.0, kernels=KERNELS), batch_size=3):
        assert torch.allclose(batch.A(batch.x), batch.y, atol=1e-6) and batch.x.min() >= 0 and batch.x.max() <= 1
        assert all(any(torch.equal(kernel[0], known) for known in KERNELS) for kernel in batch.A.kernel)


def test_crops_take_every_orientation(tmp_path):
    Image.fromarray(picture(32, 32)).save(tmp_path / "a.png")
    crops = PhotoCrops([tmp_path / "a.png"], 100, crop=32, scales=(1,), kernels=KERNELS)
    assert len({crops[i]["x"].numpy().tobytes() for i in range(100)}) == 8


def test_a_preimage_is_measured_as_its_measurement():
    x = torch.rand(2, 3, 36, 48)
    for scale in (1, 2, 3):
        A = BlurDownsample(KERNELS[0], scale)
        y = A(x)
        image = preimage(y, A)
        assert image.shape == x.shape and (A(image) - y).abs().mean() < 2e-3
        assert torch.allclose(A(preimage(y, A, weight=1e-8)), y, atol=1e-3)


def test_measurement_crops_show_parts_of_measurements(folder):
    """Away from the rim, half a kernel wide, a crop is a window of the whole measurement; with it, circular."""
    data = Photographs(find_photos(folder), (2, 3), KERNELS)
    crops = MeasurementCrops(data, 32, crop=24)
    for i in range(32):
        item, whole = crops[i], data[i % 8]
        scale, rim = item["scale"], -(-(KERNELS.shape[-1] // 2) // item["scale"])
        side = 24 // scale
        assert "x" not in item and item["y"].shape == (3, side, side) and crops.bucket(i) == (scale, 24)
        windows = whole["y"].unfold(1, side, 1).unfold(2, side, 1)
        inside = (windows - item["y"][:, None, None])[..., rim:-rim, rim:-rim].abs().amax(dim=(0, 3, 4))
        assert inside.min() < 0.01
        A = BlurDownsample(item["kernel"][None], scale)
        assert (A(preimage(item["y"][None], A)) - item["y"]).abs().mean() < 1e-3
    assert torch.equal(crops[9]["y"], MeasurementCrops(data, 32, crop=24, remember=0)[9]["y"])
    assert len({crops[i]["y"].numpy().tobytes() for i in range(0, 32, 8)}) > 1 and crops.measurements() is crops


def test_measurement_crops_keep_the_noise(folder):
    data, clean = (Photographs(find_photos(folder), (2,), KERNELS, noise=noise) for noise in (0.02, 0.0))
    noisy, still = (torch.stack([MeasurementCrops(of, 32, crop=24)[i]["y"] for i in range(32)]) for of in (data, clean))
    assert 0.01 < (noisy - still).std() < 0.03 and all(
        MeasurementCrops(data, 4, crop=24)[i]["noise"] == 0.02 for i in range(4)
    )


def test_training_accepts_the_three(folder):
    from spade.training import as_loader

    files = find_photos(folder)
    for data in (
        Photographs(files, (2,), KERNELS),
        PhotoCrops(files, 4, crop=36),
        MeasurementCrops(Photographs(files, (2,), KERNELS), 4, crop=20),
    ):
        assert next(iter(as_loader(data))).y.shape[1] == 3


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_bicubic_measurements_are_matlabs_8_bits(folder, scale):
    """Photographs are cut to a multiple of the scale, reduced and rounded, with `Bicubic` as operator."""
    data = Photographs(find_photos(folder), (scale,), degradation="bicubic")
    crops = PhotoCrops(find_photos(folder), 6, crop=25, scales=scale, degradation="bicubic")
    for part, size in ((data, 1), (crops, 3)):
        for batch in loader(part, size):
            assert isinstance(batch.A, Bicubic) and batch.A.scale == scale
            for y, x in zip(batch.y, batch.x):
                rim = slice(None) if part is data else slice(2, -2)  # a crop's edges are not the photograph's
                image = (255 * x).round().to(torch.uint8)
                difference = (matlab_resize(image, 1 / scale) / 255 - y)[:, rim, rim].abs().max()
                assert difference <= (0 if part is data else 1.01 / 255)  # turned: columns are reduced before rows
    sides = [data.shape(i)[1:] for i in range(len(data))]
    assert sides == [tuple(side // scale for side in read_photo(path).shape[1:]) for path in find_photos(folder)]
    again = PhotoCrops(find_photos(folder), 6, crop=25, scales=scale, degradation="bicubic")
    assert torch.equal(crops[5]["y"], again[5]["y"]) and "x" not in data.measurements()[0]


def oriented(image, orientation):
    mirrored, turns = divmod(orientation, 4)
    turned = torch.rot90(image, turns, dims=(-2, -1))
    return turned.flip(-1) if mirrored else turned


@pytest.mark.parametrize("scale, crop", ((2, 26), (3, 25), (4, 40)))
def test_a_bicubic_crop_is_a_window_of_the_whole_reduced_photograph(folder, scale, crop):
    """Its edges are mirrored only where they are those of the photograph; `x` is the window at the same place."""
    crops, side = PhotoCrops(find_photos(folder), 40, crop, scale, degradation="bicubic"), crop // scale * scale
    edges = set()
    for item in crops:
        photo = read_photo(folder / item["file"])
        whole = reduced_batch(photo, scale).y[0]
        rows, columns = (range(0, extent // scale * scale - side + 1, scale) for extent in photo.shape[1:])
        found = [
            (top, left, orientation)
            for top in rows
            for left in columns
            for orientation in range(8)
            if torch.equal(oriented(photo[:, top : top + side, left : left + side], orientation), item["x"])
        ]
        ((top, left, orientation),) = found
        low = [slice(start // scale, (start + side) // scale) for start in (top, left)]
        assert torch.equal(oriented(whole[:, low[0], low[1]], orientation), item["y"])
        edges |= {("top", top == 0), ("bottom", top == rows[-1]), ("left", left == 0), ("right", left == columns[-1])}
    assert len(edges) == 8, "crops at each edge of a photograph, and away from it"


def test_crops_with_kernels_and_noise_are_those_of_usrnets_training(folder):
    """To the last bit: file, place, orientation, kernel, noise level and noise are drawn in this order."""
    files = find_photos(folder)
    for i, item in enumerate(PhotoCrops(files, 40, crop=36, seed=3)):
        draw, scale = seeded("crop", 3, i), (1, 2, 3, 4)[i % 4]
        side, below = 36 // scale * scale, lambda stop: int(torch.randint(stop, (), generator=draw))
        photo = read_photo(files[below(len(files))])
        top, left = below(photo.shape[1] - side + 1), below(photo.shape[2] - side + 1)
        x = oriented(photo[:, top : top + side, left : left + side], below(8)).contiguous()
        kernel, noise = spade.data.kernels.random_kernel(draw), 0.02 * torch.rand((), generator=draw).item()
        assert torch.equal(item["x"], x) and torch.equal(item["kernel"][0], kernel) and item["noise"] == noise
        assert torch.equal(item["y"], degrade(x, kernel, scale, noise, draw)) and item["x"].is_contiguous()


def test_measuring_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    PhotoCrops(find_photos(folder), 4, crop=36)[1], Photographs(find_photos(folder), (2,), KERNELS, noise=0.1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert degrade(torch.ones(3, 18, 18), KERNELS[0], 2, 0.0, torch.Generator()).sub(1).abs().max() < 1e-5


# Real photographs


@pytest.mark.parametrize("name, count", (("CBSD68", 68), ("Set5", 5), ("BSDS500_train", 200), ("BSDS500_test", 200)))
def test_the_folders_by_name(shared, name, count):
    files = find_photos(shared / "natural" / name)
    assert len(files) == count and read_photo(files[-1]).shape[0] == 3


def test_cbsd68_with_the_published_kernels(shared):
    kernels = spade.data.kernels.read_kernels(shared / "kernels" / "kernels_12.mat")
    data = Photographs(find_photos(shared / "natural" / "CBSD68"), (2, 3, 4), kernels)
    assert len(data) == 3 * 68 and {data.bucket(i)[0] for i in range(len(data))} == {2, 3, 4}
    item = data[20]
    expected = np.stack([convolve(channel, kernels[8].numpy(), mode="wrap")[::2, ::2] for channel in item["x"].numpy()])
    assert (
        item["slice"] == 8
        and item["x"].shape[-2:] in ((480, 320), (320, 480))
        and np.allclose(item["y"], expected, atol=1e-5)
    )
