"""USRNet: the authors' numbers, sizes of the paper, pruning, checkpoints, foreign and bad input.

`tests/data/usrnet_reference.npz` holds the output of the authors' own code, in double precision, for the inputs that
`CASES` describes: cszn/KAIR, `models/network_usrnet_v1.py` at commit f62dcdb with `models/basicblock.py` of cszn/USRNet
at 9808d46, which is their USRNet for current PyTorch, once with the published tiny weights (`tiny_0` ...) and once with
the weights of `small_weights` (`small_0` ...). It was run as
`USRNet(n_iter, h_nc, 4, 3, nc, nb).double()(y, kernel, scale, sigma)` on `inputs(case)` and stored in single precision.
`names` and `shapes` are those of the state dict of their full-size network. Their data step divides by alpha, which the
published weights make as small as 1e-6: in single precision their own results differ from these by up to 1e-2; ours by
less than 1e-5.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spade
from spade.models import HyPaNet, ResUNet, USRNet, build, network_name
from spade.operators import BlurDownsample, MultiCoilMRI, as_kernel
from spade.pruning import count_macs, count_parameters

REFERENCE = Path(__file__).parent / "data" / "usrnet_reference.npz"
PAPER = {0.05: 15_314_620, 0.10: 13_730_964, 0.20: 10_837_246, 0.40: 6_094_762}
SMALL = dict(iterations=2, widths=[6, 8, 10, 12], blocks=2, hypanet_channels=7)
CASES = [
    dict(batch=1, scale=1, shape=(13, 18), kernel=(5, 5), noise=[0.0]),
    dict(batch=1, scale=2, shape=(9, 11), kernel=(4, 7), noise=[0.01]),
    dict(batch=2, scale=3, shape=(9, 10), kernel=(25, 25), noise=[0.05, 0.0]),
    dict(batch=2, scale=4, shape=(5, 8), kernel=(15, 15), noise=[0.02, 0.03]),
]


def numbers(shape, seed: int) -> np.ndarray:
    "Uniform numbers in [0, 1) from a hash of their index, the same on every machine."
    h = np.arange(int(np.prod(shape)), dtype=np.uint64) * 2654435761 + 97 * seed + 1
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> shift)) * factor
    return ((h & 0xFFFFFFFF) / 2**32).reshape(shape)


def inputs(case: dict) -> tuple[Tensor, Tensor, Tensor]:
    "Measurement (B, 3, h, w), kernels (B, 1, kh, kw) and noise levels (B, 1, 1, 1) of a case, in double precision."
    batch, (height, width) = case["batch"], case["shape"]
    rows, columns, colours = np.arange(height)[:, None], np.arange(width), np.arange(batch * 3).reshape(batch, 3, 1, 1)
    y = 0.5 + 0.3 * np.cos(0.5 * rows + 0.3 * columns + colours) + 0.2 * (numbers((batch, 3, height, width), 1) - 0.5)
    kernel = numbers((batch, 1, *case["kernel"]), 2) ** 4
    return (
        torch.tensor(y),
        torch.tensor(kernel / kernel.sum(axis=(2, 3), keepdims=True)),
        torch.tensor(case["noise"]).double().reshape(-1, 1, 1, 1),
    )


def small_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    "Weights by formula, for a state dict with the names of `SMALL`, in double precision."
    return {
        name: torch.tensor((2 * numbers(tuple(value.shape), 10 + index) - 1) * value[0].numel() ** -0.5)
        for index, (name, value) in enumerate(state_dict.items())
    }


def small(**changes) -> USRNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return USRNet(**SMALL | changes)


@pytest.fixture(scope="module")
def full() -> USRNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return USRNet()


@pytest.fixture(scope="module")
def reference() -> dict:
    with np.load(REFERENCE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def published(shared) -> dict[str, Tensor]:
    path = shared / "weights" / "usrnet_tiny.pth"
    if not path.is_file():
        pytest.skip(f"no published weights at {path}")
    return torch.load(path, weights_only=True)


def problem(
    batch: int = 1, scale: int = 2, shape=(9, 11), noise=0.01, dtype=torch.float32
) -> tuple[Tensor, BlurDownsample]:
    y, kernel, _ = inputs(dict(batch=batch, shape=shape, kernel=(5, 7), noise=[0.0]))
    return y.to(dtype), BlurDownsample(kernel.to(dtype), scale, noise)


# --- the authors' numbers ---------------------------------------------------------------------------------------------


def compare(model: USRNet, expected: np.ndarray, case: dict) -> None:
    y, kernel, sigma = inputs(case)
    with torch.no_grad():
        double = copy.deepcopy(model).double()(y, BlurDownsample(kernel, case["scale"]), sigma)
        single = model.float()(y.float(), BlurDownsample(kernel.float(), case["scale"], torch.tensor(case["noise"])))
    assert double.shape == single.shape == expected.shape and single.dtype == torch.float32
    assert np.abs(double.numpy() - expected).max() < 1e-6 and np.abs(single.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("number", range(len(CASES)))
def test_same_numbers_as_the_authors_with_weights_by_formula(reference, number):
    model = small()
    model.load_state_dict(small_weights(model.state_dict()))
    compare(model, reference[f"small_{number}"], CASES[number])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_same_numbers_as_the_authors_with_the_published_weights(reference, published, number):
    compare(USRNet.from_published(published), reference[f"tiny_{number}"], CASES[number])


def test_names_and_shapes_are_those_of_the_published_full_size(reference, full):
    found = [(name, list(value.shape)) for name, value in full.state_dict().items()]
    assert found == list(zip(reference["names"].tolist(), json.loads(str(reference["shapes"]))))


def test_published_tiny_weights_load_strictly(published):
    model = USRNet.from_published(published)
    assert len(published) == 42 and count_parameters(model) == 590_332
    assert model.config() == dict(iterations=6, widths=[16, 32, 64, 64], blocks=2, hypanet_channels=32, channels=3)
    assert list(model.state_dict()) == list(published) and all(
        torch.equal(value, published[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "sizes",
    [SMALL, SMALL | dict(blocks=1, channels=1), dict(iterations=5, widths=[3, 5, 4, 7], blocks=3, hypanet_channels=2)],
)
def test_sizes_are_inferred(sizes):
    weights = USRNet(**sizes).state_dict()
    model = USRNet.from_published(weights)
    assert model.config() == dict(channels=3) | sizes and all(
        torch.equal(value, weights[name]) for name, value in model.state_dict().items()
    )


def test_sizes_of_the_full_network_are_inferred(full):
    assert USRNet.from_published(full.state_dict()).config() == full.config()


@pytest.mark.parametrize("wrong, found", [(None, "a NoneType"), (nn.ReLU(), "a ReLU")])
def test_what_is_no_dictionary_of_weights_is_named(wrong, found):
    with pytest.raises(TypeError, match=f"^USRNet.from_published: weights must be a dictionary .*, got {found}.$"):
        USRNet.from_published(wrong)


def test_the_published_file_is_known_by_its_digest(tmp_path, shared, published):
    path, original = tmp_path / "usrnet_tiny.pth", shared / "weights" / "usrnet_tiny.pth"
    assert USRNet.from_published(original).config()["iterations"] == 6
    content = bytearray(original.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="usrnet_tiny.pth must have the published SHA-256 d82929fc053d6bbe.*, got"):
        USRNet.from_published(path)
    torch.save(published, tmp_path / "mine.pth")  # a file of an unknown name
    model = USRNet.from_published(tmp_path / "mine.pth")
    assert all(torch.equal(value, published[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: {}, "got 0 names without"),
        (lambda weights: {"conv.weight": torch.ones(1)}, "'conv.weight'"),
        (lambda weights: weights | {"p.extra": torch.ones(1)}, "do not fit"),
        (lambda weights: weights | {"p.m_up2.0.weight": torch.ones(3, 3, 2, 2)}, "do not fit"),
        (
            lambda weights: {name: value for name, value in weights.items() if name != "p.m_up1.2.res.0.weight"},
            "do not fit",
        ),
    ],
)
def test_weights_of_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        USRNet.from_published(change(dict(small().state_dict())))
    assert "\n" not in str(raised.value) and "USRNet" in str(raised.value)


# --- sizes and pruning ------------------------------------------------------------------------------------------------


def test_paper_size_is_the_default(full):
    assert count_parameters(full) == 17_016_016 and count_parameters(full.h) == 5_392


@pytest.mark.parametrize("ratio", PAPER)
def test_pruned_sizes_of_the_paper(full, ratio):
    student = spade.prune(full, ratio)
    assert count_parameters(student) == PAPER[ratio] and count_parameters(full) == 17_016_016
    kept = lambda width: int(width * (1 - ratio) + 1e-9)
    assert (
        count_parameters(USRNet(widths=[kept(w) for w in (64, 128, 256, 512)], hypanet_channels=kept(64)))
        == PAPER[ratio]
    )
    assert (
        student.p.m_tail.out_channels == 3
        and student.h.mlp[4].out_channels == 16
        and len(student.pruning_report.groups) == 20
    )


def test_work_saved_at_the_largest_ratio(full):
    report = spade.prune(full, 0.40).pruning_report
    assert report.macs_before / report.macs_after == pytest.approx(2.81, abs=0.005)


def test_both_networks_are_offered_for_pruning():
    model = small()
    (prior, image, tail), (hypanet, settings, last) = model.priors()
    assert (
        isinstance(prior, ResUNet)
        and isinstance(hypanet, HyPaNet)
        and tail == [model.p.m_tail]
        and last == [model.h.mlp[4]]
    )
    assert prior(image).shape == (1, 3, 16, 16) and hypanet(settings).shape == (1, 4, 1, 1)
    assert count_parameters(prior) + count_parameters(hypanet) == count_parameters(model)
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())


def test_channels_without_weight_go_without_a_trace():
    model = small().double().eval()
    with (
        torch.no_grad()
    ):  # two of six features of the full size carry nothing: their filters are the least important ones
        for name, weight in model.p.named_parameters():
            if name.startswith(("m_head", "m_down1.0", "m_down1.1", "m_up1.1", "m_up1.2")):
                weight[4:] = 0
        model.p.m_down1[2].weight[:, 4:], model.p.m_up1[0].weight[:, 4:], model.p.m_tail.weight[:, 4:] = 0, 0, 0
        for block in (*model.p.m_down1[:2], *model.p.m_up1[1:]):
            block.res[0].weight[:, 4:], block.res[2].weight[:, 4:] = 0, 0
    others = [
        layer
        for name, layer in model.p.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        and not name.startswith(("m_head", "m_down1.0", "m_down1.1", "m_up1"))
    ]
    y, A = problem(dtype=torch.float64)
    student = spade.prune(model, 0.30, priors=[(model.p, torch.zeros(1, 4, 16, 16).double(), others)])
    assert student.p.m_head.out_channels == 4
    torch.testing.assert_close(student(y, A), model(y, A))


@pytest.mark.parametrize("ratio", PAPER)
def test_a_pruned_network_survives_its_checkpoint(tmp_path, ratio):
    student, (y, A) = spade.prune(small(), max(ratio, 0.17)).eval(), problem(2)
    again = spade.load(spade.save(student, tmp_path / "student"))
    assert isinstance(again, USRNet) and count_parameters(again) == count_parameters(student) < count_parameters(
        small()
    )
    with torch.no_grad():
        assert torch.equal(again(y, A), student(y, A))


@pytest.mark.parametrize("ratio", PAPER)
def test_the_published_network_can_be_pruned(published, tmp_path, ratio):
    teacher, (y, A) = USRNet.from_published(published).eval(), problem()
    student = spade.prune(teacher, ratio)
    kept = lambda width: int(width * (1 - ratio) + 1e-9)
    assert count_parameters(student) == count_parameters(USRNet(6, [kept(w) for w in (16, 32, 64, 64)], 2, kept(32)))
    with torch.no_grad():
        x_hat = student(y, A)
        assert x_hat.shape == (1, 3, 18, 22) and x_hat.isfinite().all()
        again = spade.load(spade.save(student, tmp_path / "tiny"))
        torch.testing.assert_close(
            again(y, A), x_hat, rtol=0, atol=1e-5
        )  # not bit by bit: the weights lie elsewhere in memory, and alpha is small
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(value, published[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("ratio", (None, 0.4))
def test_one_step_of_training_moves_every_weight(ratio):
    model = small() if ratio is None else spade.prune(small(), ratio)
    (y, A), before = problem(2), {name: value.clone() for name, value in model.state_dict().items()}
    target, optimizer = torch.full((2, 3, 18, 22), 0.5), torch.optim.Adam(model.parameters(), lr=1e-3)
    first = (model(y, A) - target).abs().mean()
    first.backward()
    optimizer.step()
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert (model(y, A) - target).abs().mean() < first and not still


# --- one calling convention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (1, 2, 3, 4))
@pytest.mark.parametrize("shape", ((9, 11), (8, 8), (7, 30), (16, 7)))
def test_any_size_and_scale_with_one_set_of_weights(scale, shape):
    y, A = problem(2, scale, shape)
    x_hat = small()(y, A)
    assert (
        x_hat.shape == (2, 3, scale * shape[0], scale * shape[1])
        and x_hat.dtype == torch.float32
        and x_hat.isfinite().all()
    )


def test_images_of_a_batch_do_not_mix():
    model, (y, A) = small().eval(), problem(3, noise=torch.tensor([0.0, 0.01, 0.1]))
    with torch.no_grad():
        together = model(y, A)
        for image in range(3):
            one = slice(image, image + 1)
            alone = model(y[one], BlurDownsample(A.kernel[one], 2, A.noise[one].flatten()))
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_one_kernel_serves_a_batch():
    model, (y, A) = small().eval(), problem(3)
    shared_kernel, same = (
        BlurDownsample(A.kernel[:1], 2, 0.01),
        BlurDownsample(A.kernel[:1].expand(3, -1, -1, -1), 2, 0.01),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(y, shared_kernel), model(y, same), rtol=1e-5, atol=1e-6)


def test_the_noise_level_comes_with_the_operator_or_by_hand():
    model, (y, A) = small().eval(), problem(2, noise=0.03)
    with torch.no_grad():
        expected = model(y, A)
        silent = BlurDownsample(A.kernel, 2)
        for sigma in (0.03, [0.03, 0.03], torch.tensor([0.03, 0.03]), torch.full((2, 1, 1, 1), 0.03)):
            assert torch.equal(model(y, silent, sigma), expected)
        assert not torch.equal(model(y, silent), expected) and not torch.equal(model(y, A, 0.1), expected)


def test_solve_shows_what_forward_does():
    model, (y, A) = small(iterations=5).eval(), problem(2)
    with torch.no_grad():
        expected = model(y, A)
    x_hat, trace = model.solve(y, A)
    assert torch.equal(x_hat, expected) and torch.equal(trace.images[-1], expected) and not x_hat.requires_grad
    assert trace.iterations == len(trace.images) == len(trace.seconds) == 5 and all(
        seconds > 0 for seconds in trace.seconds
    )
    assert all(residual.shape == (2,) for residual in trace.residuals)
    steps = [
        (after - before).flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1)
        for before, after in zip(trace.images, trace.images[1:])
    ]
    torch.testing.assert_close(torch.stack(trace.residuals[1:]), torch.stack(steps))
    assert model.solve(y, A, record=False)[1].images == [] and model.effective_operator(y, A) is A
    assert torch.equal(model.solve(y, A, sigma=0.1)[0], model(y, A, 0.1))


def test_mixed_precision_ends_at_the_physics(monkeypatch):
    model, (y, A) = small(), problem()
    seen, fft2, irfft2, hypanet = [], torch.fft.fft2, torch.fft.irfft2, []
    monkeypatch.setattr(torch.fft, "fft2", lambda x, *a, **k: (seen.append(x.dtype), fft2(x, *a, **k))[1])
    monkeypatch.setattr(torch.fft, "irfft2", lambda x, *a, **k: (seen.append(x.dtype), irfft2(x, *a, **k))[1])
    model.h.register_forward_hook(lambda module, inputs, output: hypanet.append(output.dtype))
    inner = []
    model.p.m_head.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = model(y, A)
    x_hat.square().sum().backward()
    assert (
        x_hat.dtype == torch.float32
        and x_hat.isfinite().all()
        and hypanet == [torch.float32]
        and set(inner) == {torch.bfloat16}
    )
    assert seen and set(seen) <= {torch.float32, torch.complex64}
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_copies_and_double_precision():
    model, (y, A) = small().eval(), problem(dtype=torch.float64)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        x_hat, x_double = model(y.float(), copy.deepcopy(A).float()), double(y, A)
    assert (
        x_hat.dtype == torch.float32
        and x_double.dtype == torch.float64
        and next(model.parameters()).dtype == torch.float32
    )
    torch.testing.assert_close(x_hat.double(), x_double, rtol=0, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    model, (y, A) = (
        small(iterations=1, widths=[3, 3, 3, 3], blocks=1).double(),
        problem(scale=2, shape=(4, 4), dtype=torch.float64),
    )
    A = (
        BlurDownsample(A.kernel[..., :4], 2, 0.01)
        if abs(A.kernel[..., :4].sum() - 1) < 1e-6
        else BlurDownsample(A.kernel[..., :4] / A.kernel[..., :4].sum(), 2, 0.01)
    )
    sigma = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y, sigma: model(y, A, sigma).square().sum(), (y.requires_grad_(), sigma), atol=1e-5
    )


def test_config_rebuilds_the_network():
    model, (y, A) = small().eval(), problem()
    other = build(network_name(model), **json.loads(json.dumps(model.config())))
    other.load_state_dict(model.state_dict())
    assert network_name(other) == "usrnet" and torch.equal(other.eval()(y, A), model(y, A))
    other.config()["widths"][0] = 1
    assert other.config() == model.config()


def test_greyscale_has_its_own_network():
    model, (y, A) = small(channels=1), problem(2)
    assert model(y[:, :1], A).shape == (2, 1, 18, 22)
    student = spade.prune(model, 0.4)
    assert student(y[:, :1], A).shape == (2, 1, 18, 22)


def test_the_prior_does_not_depend_on_brightness():
    prior, image = small().p.double(), torch.tensor(numbers((1, 4, 11, 13), 3))
    torch.testing.assert_close(prior(0.01 * image), 0.01 * prior(image), rtol=1e-10, atol=0)


def test_work_is_that_of_one_prior_for_each_iteration():
    model, (y, A) = small().eval(), problem(shape=(8, 8))
    one = count_macs(model.p, torch.zeros(1, 4, 16, 16))
    assert count_macs(model, y, A) == 2 * one + count_macs(model.h, torch.zeros(1, 2, 1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu():
    model, (y, A) = small().eval(), problem(2)
    with torch.no_grad():
        expected = model(y, A)
        found = copy.deepcopy(model).cuda()(y.cuda(), copy.deepcopy(A).cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------


def mri() -> MultiCoilMRI:
    return MultiCoilMRI(torch.ones(11, dtype=torch.bool), torch.ones(1, 3, 9, 11, dtype=torch.complex64))


@pytest.mark.parametrize(
    "act, error, fragments",
    [
        (lambda m, y, A: m(y, mri()), TypeError, ["BlurDownsample", "MultiCoilMRI"]),
        (lambda m, y, A: m(y, None), TypeError, ["BlurDownsample", "NoneType"]),
        (lambda m, y, A: m(y[:, :1], A), ValueError, ["(B, 3, H, W)", "(2, 1, 9, 11)"]),
        (lambda m, y, A: m(y[0], A), ValueError, ["(B, 3, H, W)", "(3, 9, 11)"]),
        (lambda m, y, A: m(y.to(torch.complex64), A), ValueError, ["real", "complex64"]),
        (lambda m, y, A: m((255 * y).byte(), A), ValueError, ["real", "uint8"]),
        (lambda m, y, A: m(y, A, 2.55), ValueError, ["2.55", "0 and 1", "divide grey levels by 255"]),
        (lambda m, y, A: m(y, A, -0.1), ValueError, ["-0.1", "0 and 1"]),
        (lambda m, y, A: m(y, A, float("nan")), ValueError, ["nan", "0 and 1"]),
        (lambda m, y, A: m(y, A, [0.1, 0.1, 0.1]), ValueError, ["batch of 2", "3 numbers"]),
        (lambda m, y, A: m(y[:1], A), ValueError, ["(2, ", "(1, 3, 9, 11)"]),
        (lambda m, y, A: USRNet(widths=(4, 4, 4)), ValueError, ["four sizes", "3"]),
        (lambda m, y, A: USRNet(iterations=0), ValueError, ["iterations", "0"]),
    ],
)
def test_bad_input_is_named_in_one_sentence(act, error, fragments):
    y, A = problem(2)
    with pytest.raises(error) as raised:
        act(small(), y, A)
    sentence = str(raised.value)
    assert all(fragment in sentence for fragment in fragments) and "\n" not in sentence and len(sentence) < 300, (
        sentence
    )


@pytest.mark.parametrize(
    "kernel, error, message",
    [
        (torch.ones(1, dtype=torch.int64), TypeError, "kernel must be real floating point, got torch.int64."),
        (torch.ones(1, 1, 1), ValueError, r"kernel must have shape \(h, w\) or \(B, 1, h, w\), got \(1, 1, 1\)."),
        (torch.ones(0, 3), ValueError, r"kernel must have shape .* got \(1, 1, 0, 3\)."),
    ],
)
def test_kernels_of_another_type_or_shape_are_refused(kernel, error, message):
    with pytest.raises(error, match=message):
        as_kernel(kernel)
