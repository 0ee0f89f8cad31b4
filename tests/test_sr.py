"""Super-resolution networks of the second paper: exact counts, published weights, pruning, bad input."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import spade
import spade.metrics
from spade.basics import Batch
from spade.models import CARN, ESRB, IMDN, NETWORKS, LatticeNet, UpEDSR, build, network_name
from spade.models.sr_peers import TABLE_2, peer_table
from spade.operators import Bicubic, adjoint_error, resize_matrix
from spade.pruning import count_macs, count_parameters
from spade.y_channel import cubic_enlarged, evaluate_luminance, matlab_resize, reduced_batch

WEIGHTS = Path(__file__).resolve().parents[1].parent / "shared/data/weights"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"published weights are missing: put them in {WEIGHTS}")


class Scale(nn.Module):
    """A stand-in for an operator: only its scale."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale


def photo(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Counts


@pytest.mark.parametrize(
    "network, settings, shape, parameters, macs",
    (
        (UpEDSR, dict(scale=2, features=128, num_blocks=8), (64, 64), 3_106_307, 12_754_354_176),
        (UpEDSR, dict(scale=3, features=128, num_blocks=8), (64, 64), 3_844_227, 15_845_031_936),
        (UpEDSR, dict(scale=4, features=128, num_blocks=8), (64, 64), 3_696_643, 22_587_899_904),
        (ESRB, dict(scale=2), (360, 640), 8_180_876, 1_877.7525e9),
        (ESRB, dict(scale=3), (240, 426), 8_215_451, 836.7834e9),
        (ESRB, dict(scale=4), (180, 320), 8_263_856, 474.2127e9),
        (UpEDSR, dict(scale=2, features=32, num_blocks=4, tail="direct"), (24, 24), 87_596, 87_264 * 24 * 24),
    ),
)
def test_counts_of_the_pruned_networks(network, settings, shape, parameters, macs):
    with torch.device("meta"):
        model = network(**settings)
        assert count_parameters(model) == parameters
        assert count_macs(model, torch.empty(1, 3, *shape)) == pytest.approx(macs, rel=1e-7)


COUNTS = {  # parameters and 10⁹ multiply-accumulates of Table 2 of FMP, four digits more than printed
    "SRCNN": {2: (57_184, 52.7008), 3: (57_184, 52.7008), 4: (57_184, 52.7008)},
    "FSRCNN": {2: (12_464, 6.0070), 3: (12_464, 4.9922), 4: (12_464, 4.6370)},
    "VDSR": {2: (664_704, 612.5912), 3: (664_704, 612.5912), 4: (664_704, 612.5912)},
    "DRCN": {2: (1_774_080, 17_974.2966), 3: (1_774_080, 17_974.2966), 4: (1_774_080, 17_974.2966)},
    "LapSRN": {2: (812_768, 29.8967), 4: (812_768, 149.3508)},
    "DRRN": {2: (297_216, 6_796.8958), 3: (297_216, 6_796.8958), 4: (297_216, 6_796.8958)},
    "MemNet": {2: (676_992, 2_662.3476), 3: (676_992, 2_662.3476), 4: (676_992, 2_662.3476)},
    "SelNet": {2: (974_208, 225.6519), 3: (1_158_528, 120.0488), 4: (1_416_576, 83.0878)},
    "CARN": {2: (1_591_939, 222.8208), 3: (1_591_939, 118.7906), 4: (1_591_939, 90.8734)},
    "BSRN": {2: (593_987, 1_666.7099), 3: (778_627, 761.1132), 4: (741_699, 451.8457)},
    "IMDN": {2: (694_404, 158.7659), 3: (703_059, 71.5032), 4: (715_176, 40.8859)},
    "LatticeNet": {2: (756_172, 169.5007), 3: (764_827, 76.2779), 4: (776_944, 43.5696)},
    "ASSLN": {2: (692_412, 159.1529), 3: (698_907, 71.2866), 4: (708_000, 40.6840)},
}


def test_the_38_rows_of_table_2():
    table = peer_table()
    found = {(row.network, row.scale): (row.parameters, round(row.macs / 1e9, 4)) for row in table.itertuples()}
    assert len(table) == 38 and found == {(n, s): values for n, rows in COUNTS.items() for s, values in rows.items()}


@pytest.mark.parametrize("network", TABLE_2, ids=lambda network: network.__name__)
def test_every_peer_is_called_like_the_networks_of_the_library(network):
    for scale in TABLE_2[network]:
        with torch.device("meta"):
            model, y = network(scale), torch.empty(2, 3, 15, 17)
        assert model(y, Scale(scale)).shape == (2, 3, 15 * scale, 17 * scale)
        assert model.config()["scale"] == scale and type(network(**model.config())) is network


# Registry and checkpoints


@pytest.mark.parametrize(
    "name, settings",
    (
        ("edsr-sr", dict(scale=2, features=8, num_blocks=2)),
        ("edsr-sr", dict(scale=3, features=8, num_blocks=1, tail="direct")),
        ("esrb", dict(scale=4, features=8, num_blocks=2, esa=4)),
    ),
)
def test_a_pruned_network_is_saved_and_loaded(tmp_path, name, settings):
    torch.manual_seed(0)
    teacher, y = build(name, **settings).eval(), photo(1, 3, 16, 18)
    assert NETWORKS[name] is type(teacher) and network_name(teacher) == name
    student = spade.prune(teacher, 0.25)
    assert count_parameters(student) < count_parameters(teacher)
    back = spade.load(spade.save(student, tmp_path / "small")).eval()
    assert torch.equal(back(y, Scale(settings["scale"])), student(y, Scale(settings["scale"])))


# Pruning across sub-pixel layers


@pytest.mark.parametrize("scale, enlarged", ((2, [48]), (3, [108]), (4, [48, 48])))
def test_channels_before_a_shuffle_go_with_the_channel_behind_it(scale, enlarged):
    torch.manual_seed(1)
    teacher = UpEDSR(scale=scale, features=16, num_blocks=2).eval()
    student = spade.prune(teacher, 0.25)
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, nn.Conv2d)}
    assert [layer.out_channels for layer in layers.values()] == [12] * 6 + enlarged + [3]
    zeroed = copy.deepcopy(teacher)
    for group in student.pruning_report.groups:
        for name, side in group.layers:
            layer = zeroed.get_submodule(name)
            if side == "out":
                layer.weight.data[list(group.removed)], layer.bias.data[list(group.removed)] = 0, 0
        block = group.before // 16  # 1, or s² for the layer before a shuffle by s
        lost = {k // block for k in group.removed}
        assert sorted(group.removed) == [k * block + i for k in sorted(lost) for i in range(block)] and len(lost) == 4
    y = photo(2, 3, 9, 11)
    assert (student(y) - zeroed(y)).abs().max() < 1e-6 < (student(y) - teacher(y)).abs().max()


def test_esrb_is_cut_along_its_attention():
    torch.manual_seed(2)
    teacher = ESRB(scale=2, features=16, num_blocks=2).eval()
    student = spade.prune(teacher, 0.25)  # compares with the zeroed teacher by itself
    assert student.layers[0].out_channels == 12 and student(photo(1, 3, 16, 16)).shape == (1, 3, 32, 32)


def test_training_changes_a_pruned_network():
    torch.manual_seed(3)
    student, x = spade.prune(UpEDSR(scale=2, features=8, num_blocks=1), 0.25), photo(2, 3, 24, 24)
    info = dict(file=["a", "b"], subject=["a", "b"], slice=[0, 0], scale=[2, 2])
    batch, before = Batch(x[..., ::2, ::2], Scale(2), x, info), copy.deepcopy(student)
    spade.finetune(student, [batch], strategy="supervised", steps=2)
    assert not torch.equal(student(batch.y), before(batch.y))


# Published weights


@needs_weights
@pytest.mark.parametrize("scale", (2, 3, 4))
def test_published_files_load_strictly(scale):
    imdn = IMDN.from_published(WEIGHTS / f"imdn_x{scale}.pth")
    lattice = LatticeNet.from_published(WEIGHTS / f"latticenet_x{scale}.pt")
    carn = CARN.from_published(WEIGHTS / "carn_m.pth", scale)
    assert carn.config() == dict(scale=scale, features=64, groups=4)
    assert imdn.config() == dict(scale=scale, features=64, num_blocks=6) and lattice.scale == scale
    y = photo(1, 3, 16, 20)
    smooth = torch.nn.functional.avg_pool2d(y, 5, 1, 2, count_include_pad=False)
    for model in (imdn, lattice, carn):
        with torch.no_grad():
            x_hat = model.eval()(smooth, Scale(scale))
        reduced = torch.nn.functional.avg_pool2d(x_hat, scale)
        assert (reduced - smooth).abs().mean() < 0.01, type(model)  # an image, near its measurement


@needs_weights
def test_a_file_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"IMDN.from_published expects the weights of IMDN, got 58 tensors without"):
        IMDN.from_published(WEIGHTS / "carn_m.pth")
    with pytest.raises(ValueError, match=r"CARN.from_published expects the weights of CARN, got 92 tensors without"):
        CARN.from_published(WEIGHTS / "imdn_x2.pth", 2)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = IMDN(2, features=16, num_blocks=1).state_dict()
    with pytest.raises(ValueError, match="'scale': 2, 'features': 16.*Missing key.*IMDB1.c1.weight"):
        IMDN.from_published({name: value for name, value in weights.items() if name != "IMDB1.c1.weight"})
    with pytest.raises(ValueError, match="unknown scale 5"):
        IMDN.from_published(weights | {"upsampler.0.weight": torch.zeros(75, 16, 3, 3)})
    with pytest.raises(FileNotFoundError, match="must be the published file of IMDN, got none"):
        IMDN.from_published(tmp_path / "imdn_x2.pth")
    torch.save(weights, tmp_path / "imdn_x2.pth")
    with pytest.raises(ValueError, match="must have the published SHA-256 740b39653592"):
        IMDN.from_published(tmp_path / "imdn_x2.pth")


# Bad input


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: UpEDSR(5), ValueError, "unknown scale 5: choose one of 2, 3, 4"),
        (lambda: UpEDSR(2, tail="bicubic"), ValueError, "unknown tail 'bicubic': choose one of sub-pixel, direct"),
        (lambda: TINY(photo(1, 3, 8, 8), Scale(3)), ValueError, "A.scale must be 2, that of the network, got 3"),
        (lambda: TINY(photo(1, 3, 8, 8), nn.Identity()), TypeError, "A must have a scale, .* got Identity"),
        (lambda: TINY(photo(1, 1, 8, 8), Scale(2)), ValueError, r"y must have shape \(any, 3, any, any\)"),
        (lambda: TINY(photo(1, 3, 8, 8).double(), Scale(2)), TypeError, "y must have the precision"),
        (
            lambda: ESRB(2, features=8, num_blocks=1, esa=4)(photo(1, 3, 14, 20), Scale(2)),
            ValueError,
            "y must have at least 15×15 pixels for ESRB, got 14×20",
        ),
    ),
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


TINY = UpEDSR(2, features=4, num_blocks=1)


def test_esrb_works_from_15_pixels_on():
    assert ESRB(2, features=8, num_blocks=1, esa=4)(photo(1, 3, 15, 15), Scale(2)).shape == (1, 3, 30, 30)


# Degradation and judgement

NATURAL, SET5_LR = (WEIGHTS.parent / folder for folder in ("natural/Set5", "sr/Set5_LR"))
needs_set5 = pytest.mark.skipif(not SET5_LR.is_dir(), reason=f"Set5 is missing: put it in {NATURAL} and {SET5_LR}")


def read_8_bit(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@needs_set5
@pytest.mark.parametrize("scale", (2, 3, 4))
def test_the_reduction_is_matlabs_to_the_last_bit(scale):
    for path in sorted(NATURAL.glob("*.bmp")):
        expected, x = read_8_bit(SET5_LR / f"{path.stem}x{scale}.bmp"), read_8_bit(path)
        height, width = (side // scale * scale for side in x.shape[-2:])
        assert torch.equal(matlab_resize(x[:, :height, :width], 1 / scale), expected), path.stem
        assert torch.equal((255 * reduced_batch(x / 255, scale).y[0]).round().byte(), expected)


SET5 = {  # PSNR and SSIM of Y, mean over the five pictures
    "bicubic": {2: (33.678, 0.9304), 3: (30.404, 0.8690), 4: (28.431, 0.8113)},
    "IMDN": {2: (37.996, 0.9605), 3: (34.360, 0.9270), 4: (32.210, 0.8948)},
    "LatticeNet": {2: (38.061, 0.9607), 3: (34.397, 0.9272), 4: (32.181, 0.8943)},
    "CARN-M": {2: (37.678, 0.9595), 3: (34.058, 0.9248), 4: (31.883, 0.8910)},
}


@needs_set5
@needs_weights
@pytest.mark.parametrize("scale", (2, 3, 4))
def test_published_networks_reach_their_published_scores_on_set5(scale):
    batches = [reduced_batch(read_8_bit(path) / 255, scale, path.stem) for path in sorted(NATURAL.glob("*.bmp"))]
    models = {
        "bicubic": cubic_enlarged,
        "IMDN": IMDN.from_published(WEIGHTS / f"imdn_x{scale}.pth"),
        "LatticeNet": LatticeNet.from_published(WEIGHTS / f"latticenet_x{scale}.pt"),
        "CARN-M": CARN.from_published(WEIGHTS / "carn_m.pth", scale),
    }
    for name, model in models.items():
        table, (decibel, similarity) = evaluate_luminance(model, batches), SET5[name][scale]
        assert table.psnr.mean() == pytest.approx(decibel, abs=0.005), name
        assert table.ssim.mean() == pytest.approx(similarity, abs=1e-4), name


def test_reduction_of_one_axis_by_hand():
    """Keys' kernel at distances 1/4, 3/4, 5/4 and 7/4 for a reduction by two, mirrored at the edge."""
    row = torch.tensor([-3.0, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    matrix = resize_matrix(12, 6)
    assert torch.equal(matrix[2, 1:9], row) and matrix[2].count_nonzero() == 8
    mirrored = row[3:].clone()  # pixels 0 to 4 of the first row; 2, 1, 0 fold back from -3, -2, -1
    mirrored[:3] += row[:3].flip(0)
    assert torch.allclose(matrix[0, :5], mirrored)


def test_enlarging_repeats_a_constant_and_keeps_8_bits():
    image = torch.full((3, 7, 9), 200, dtype=torch.uint8)
    assert torch.equal(matlab_resize(image, 3), torch.full((3, 21, 27), 200, dtype=torch.uint8))
    edge = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).expand(1, 16, 16)
    assert matlab_resize(edge, 2).min() == 0 and matlab_resize(edge, 2).max() == 255  # overshoot is clipped


def test_training_on_reduced_photographs():
    torch.manual_seed(4)
    model, batch = UpEDSR(2, features=8, num_blocks=1), reduced_batch(photo(3, 24, 30), 2, "noise")
    before = evaluate_luminance(model, [batch]).psnr[0]
    spade.finetune(model, [batch], strategy="supervised", steps=60, learning_rate=3e-3)
    assert evaluate_luminance(model, [batch]).psnr[0] > before + 3
    assert set(spade.metrics.evaluate(model, [batch], progress=False)) >= {"psnr", "ssim", "scale"}


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: Bicubic(2.5), ValueError, "scale must be a whole number of at least 1, got 2.5"),
        (lambda: Bicubic(3)(photo(1, 3, 9, 10)), ValueError, r"multiples of 3, got \(9, 10\)"),
        (lambda: Bicubic(3)(photo(3, 9, 9)), ValueError, "image must have shape"),
        (lambda: matlab_resize(photo(3, 8, 8), 0.5), TypeError, "image must be uint8, got torch.float32"),
        (lambda: matlab_resize(torch.zeros(8, 8, dtype=torch.uint8), 0), ValueError, "scale must be positive, got 0"),
        (lambda: UpEDSR(2)(photo(1, 3, 8, 8), Bicubic(3)), ValueError, "A.scale must be 2, that of the network, got 3"),
    ),
)
def test_bad_measurements_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_the_operator_is_linear_with_an_exact_adjoint_in_single_precision(scale):
    A, x, y = Bicubic(scale), photo(1, 3, 6 * scale, 5 * scale) - 0.5, photo(1, 3, 6, 5, seed=1) - 0.5
    assert adjoint_error(A, x, y) < 1e-5 and adjoint_error(A, x.double(), y.double()) < 1e-13


def test_fine_tuning_keeps_the_zeros_of_a_network_that_asks_for_it(tmp_path):
    torch.manual_seed(4)
    model, batch = UpEDSR(scale=2, features=8, num_blocks=1), reduced_batch(photo(3, 24, 24), 2)
    for p in [p for p in model.parameters() if p.ndim > 1]:
        p.data *= torch.rand(p.shape) < 0.7
    model.keep_zeros = True
    dead = [p == 0 for p in model.parameters()]
    student = spade.load(spade.save(model, tmp_path / "small"))
    assert student.keep_zeros and not hasattr(UpEDSR(2), "keep_zeros")
    spade.finetune(student, [batch], strategy="supervised", steps=3, learning_rate=1e-3, progress=False)
    for p, zero in zip(student.parameters(), dead):
        assert torch.equal(p == 0, zero) or p.ndim == 1
    plain = copy.deepcopy(model)
    del plain.keep_zeros
    spade.finetune(plain, [batch], strategy="supervised", steps=3, learning_rate=1e-3, progress=False)
    assert any((p[zero] != 0).any() for p, zero in zip(plain.parameters(), dead))
