"""PSNR and SSIM: against their definitions, and blind to tricks."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from spade.basics import Batch
from spade.metrics import evaluate, psnr, ssim
from spade.models.deq import Trace
from spade.operators import BlurDownsample, MultiCoilMRI


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 17, generator=generator, dtype=torch.complex64)
    x[..., :5] = 0  # air
    return x + 0.1 * torch.randn(1, 20, 17, generator=generator, dtype=torch.complex64), x


def batch_of(x: torch.Tensor) -> Batch:
    maps = torch.ones(len(x), 1, *x.shape[-2:], dtype=torch.complex64)
    A = MultiCoilMRI(torch.ones(x.shape[-1], dtype=torch.bool), maps)
    return Batch(A(x), A, x, {name: list(range(len(x))) for name in ("file", "subject", "slice", "scale")})


def test_psnr_is_its_definition(pair):
    x_hat, x = (image.to(torch.complex128).abs().numpy()[0] for image in pair)
    expected = 10 * math.log10(x.max() ** 2 / np.mean((x_hat - x) ** 2))
    assert psnr(*pair) == pytest.approx(expected, abs=1e-9)
    assert psnr(pair[0][0], pair[1][0]) == psnr(*pair) == psnr(pair[0].numpy(), pair[1].numpy())
    assert psnr(*pair, data_range=2 * x.max()) == pytest.approx(expected + 20 * math.log10(2))


def test_ssim_is_scikit_images(pair):
    x_hat, x = (image.to(torch.complex128).abs().numpy()[0] for image in pair)
    assert ssim(*pair) == pytest.approx(structural_similarity(x, x_hat, data_range=x.max()), abs=1e-12)
    assert ssim(pair[1], pair[1]) == 1


def test_unit_and_phase_do_not_matter_but_scale_of_the_reconstruction_does(pair):
    x_hat, x = pair
    assert psnr(7 * x_hat, 7 * x) == pytest.approx(psnr(x_hat, x), abs=1e-4) and ssim(
        7 * x_hat, 7 * x
    ) == pytest.approx(ssim(x_hat, x), abs=1e-5)
    assert psnr(1j * x_hat, x) == pytest.approx(psnr(x_hat, x), abs=1e-4)
    assert psnr(0.8 * x, x) < 25  # min-max scaling would call this perfect


def test_zeroing_outputs_where_the_reference_is_zero_would_raise_both_metrics_and_is_not_done(pair):
    "The original code zeroes predictions where the reference is zero; here the image is judged as the network gave it."
    x_hat, x = pair
    zeroed = torch.where(x == 0, 0, x_hat)
    assert psnr(zeroed, x) > psnr(x_hat, x) and ssim(zeroed, x) > ssim(x_hat, x)
    table = evaluate(lambda y, A: x_hat[None], [batch_of(x[None])], progress=False)
    assert table.psnr[0] == psnr(x_hat, x) and table.ssim[0] == ssim(x_hat, x)


def test_inputs_are_left_alone(pair):
    x_hat, x = (image.clone() for image in pair)
    psnr(*pair), ssim(*pair)
    assert torch.equal(x_hat, pair[0]) and torch.equal(x, pair[1])


def test_colour_has_range_one_and_channels():
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.rand(3, 16, 18, generator=generator)
    x_hat = x + 0.01
    assert psnr(x_hat, x) == pytest.approx(40, abs=1e-3)
    expected = structural_similarity(x.double().numpy(), x_hat.double().numpy(), data_range=1.0, channel_axis=0)
    assert ssim(x_hat, x) == pytest.approx(expected, abs=1e-12)


def test_colour_is_clipped_as_a_file_would():
    x = torch.rand(3, 16, 18, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    x_hat = x + 0.2
    assert psnr(x_hat, x) == psnr(x_hat.clamp(0, 1), x) > psnr(torch.zeros_like(x), x) and ssim(x_hat, x) == ssim(
        x_hat.clamp(0, 1), x
    )
    assert psnr(torch.where(x == 1, 7.0, x), x) == math.inf


@pytest.mark.parametrize(
    "x_hat, x, sentence",
    [
        (torch.ones(8, 8), torch.ones(8, 9), "x_hat must have the shape of the reference x"),
        (torch.ones(8, 8), torch.zeros(8, 8), "data_range must be positive"),
        (torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), "image must have shape"),
        (
            torch.ones(3, 8, 8),
            torch.full((3, 8, 8), 255.0),
            "a colour reference x must lie in \\[0, 1\\], got values from 255 to 255",
        ),
        (torch.ones(3, 8, 8), torch.full((3, 8, 8), -0.1), "a colour reference x must lie in"),
        (
            torch.ones(3, 8, 8, dtype=torch.complex64),
            torch.ones(3, 8, 8, dtype=torch.complex64),
            "image must have shape",
        ),
    ],
)
def test_what_cannot_be_compared(x_hat, x, sentence):
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=sentence):
            metric(x_hat, x)


class Counting(nn.Module):
    "A network with a parameter and the record of a search, as a DEQ has it."

    def __init__(self):
        super().__init__()
        self.weight, self.last_trace, self.seen = nn.Parameter(torch.ones(())), Trace(tolerance=1e-4), []

    def forward(self, y, A):
        last = torch.full((len(y),), 1e-5)
        self.last_trace.residuals = [last + 1] * len(self.seen) + [last if self.seen else last + 1]
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.weight * A.adjoint(y)


def test_evaluate_one_row_per_image_and_the_network_as_it_was():
    x = torch.randn(3, 1, 9, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    model = Counting().train()
    table = evaluate(model, [batch_of(x), batch_of(x[:1])], progress=False)
    names = ["subject", "file", "slice", "psnr", "ssim", "iterations", "relative_step", "converged"]
    assert isinstance(table, pd.DataFrame) and list(table) == names
    assert len(table) == 4 and table.iterations.tolist() == [1, 1, 1, 2] and (table.psnr > 100).all()
    assert table.converged.tolist() == [False] * 3 + [True] and table.relative_step.iloc[-1] == pytest.approx(1e-5)
    assert model.seen == [(False, False)] * 2 and model.training and torch.is_grad_enabled()


def test_evaluate_gives_the_spectral_radius_of_the_first_images():
    class Deq(Counting):
        def radius(self, y, A, x):
            assert x.shape == (1, 1, 9, 8) and y.shape[0] == 1
            return 0.9

    x = torch.randn(1, 1, 9, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    table = evaluate(Deq(), [batch_of(x)] * 3, progress=False, radii=2)
    assert table.spectral_radius.tolist()[:2] == [0.9, 0.9] and table.spectral_radius.isna().tolist() == [
        False,
        False,
        True,
    ]
    assert "spectral_radius" not in evaluate(Deq(), [batch_of(x)], progress=False)
    assert "iterations" not in evaluate(lambda y, A: A.adjoint(y), [batch_of(x)], progress=False, radii=2)


def test_evaluate_needs_a_reference():
    with pytest.raises(ValueError, match="must have a reference x"):
        evaluate(
            lambda y, A: A.adjoint(y),
            [batch_of(torch.ones(1, 1, 8, 8, dtype=torch.complex64))._replace(x=None)],
            progress=False,
        )


def test_evaluate_needs_an_image_for_each_reference():
    batch = batch_of(torch.ones(3, 1, 8, 8, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"reference x must have .* complex \(2, 1, 8, 8\), got complex \(3, 1, 8, 8\)"
    ):
        evaluate(lambda y, A: A.adjoint(y)[:2], [batch], progress=False)


@pytest.mark.parametrize("value", (math.nan, math.inf, complex(0, math.nan)))
def test_an_image_that_is_not_finite_is_refused_and_not_left_out_of_a_mean(pair, value):
    x_hat, x = pair[0].clone(), pair[1]
    x_hat[0, 3, 4] = value
    for metric in (psnr, ssim):
        for bad in (x_hat, x_hat.numpy()):
            with pytest.raises(ValueError, match="x_hat must be finite, got NaN or infinity in 1 of 340 values"):
                metric(bad, x)
        with pytest.raises(ValueError, match="the reference x must be finite"):
            metric(x, x_hat)
    good = iter([x[None], x_hat[None]])
    batch = batch_of(x[None])
    other = batch._replace(info=batch.info | {"subject": ["head"], "slice": [7]})
    with pytest.raises(ValueError, match="subject head, file 0, slice 7: x_hat must be finite"):
        evaluate(lambda y, A: next(good), [batch, other], progress=False)


def test_infinity_in_a_photograph_is_not_clipped_to_white():
    x = torch.ones(3, 8, 9)
    with pytest.raises(ValueError, match="x_hat must be finite"):
        psnr(torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1, math.inf, x), x)


def test_evaluate_leaves_the_batch_where_it_is():
    class Elsewhere(nn.Module):
        "A network on another device, which gives its answer on this one."

        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones((), device="meta")), []

        def forward(self, y, A):
            self.seen.append((y.is_meta, A.maps.is_meta, A))
            return batch.x

    batch, model = (
        batch_of(torch.randn(1, 1, 9, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))),
        Elsewhere(),
    )
    evaluate(model, [batch], progress=False)
    assert model.seen[0][:2] == (True, True) and model.seen[0][2] is not batch.A
    assert not batch.A.maps.is_meta and not batch.A.mask.is_meta and torch.equal(batch.A(batch.x), batch.y)


def test_evaluate_says_the_scale_of_photographs():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for scale in (2, 3):
        x = torch.rand(2, 3, 12, 18, generator=generator)
        A = BlurDownsample(torch.full((3, 3), 1 / 9), scale)
        info = {"file": ["a.png", "b.png"], "subject": ["a", "b"], "slice": [4, 7], "scale": [scale] * 2}
        batches.append(Batch(A(x), A, x, info))
    table = evaluate(lambda y, A: 2 * A.adjoint(y), batches, progress=False)
    assert (
        list(table) == ["subject", "file", "slice", "scale", "psnr", "ssim"]
        and table.scale.tolist() == [2, 2, 3, 3]
        and table.slice.tolist() == [4, 7, 4, 7]
    )
    for row, (batch, i) in zip(table.itertuples(), ((b, i) for b in batches for i in (0, 1))):
        x_hat, x = (2 * batch.A.adjoint(batch.y))[i].double().clamp(0, 1).numpy(), batch.x[i].double().numpy()
        assert row.psnr == pytest.approx(peak_signal_noise_ratio(x, x_hat, data_range=1), abs=1e-6)
        assert row.ssim == pytest.approx(structural_similarity(x, x_hat, data_range=1, channel_axis=0), abs=1e-9)


def test_evaluate_puts_back_the_mode_of_each_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(1).eval(), nn.Dropout()

        def forward(self, y, A):
            assert not (self.training or self.drop.training)
            return A.adjoint(y)

    net = Net()
    evaluate(net, [batch_of(torch.randn(1, 1, 9, 8, dtype=torch.complex64))], progress=False)
    assert net.training and net.drop.training and not net.norm.training
