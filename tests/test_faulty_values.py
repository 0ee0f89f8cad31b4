"""Data that a network cannot take: each is refused in one sentence that names it, also by `evaluate` and `finetune`."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spade
from spade.basics import Batch, check_values
from spade.metrics import bicubic, cg_sense, evaluate, sweep_cg_sense, zero_filled
from spade.models import DEQ, E2EVarNet, USRNet, VarNet
from spade.operators import Bicubic, BlurDownsample, MultiCoilMRI, equispaced_mask, normalize_maps

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deq": lambda: DEQ(features=4, num_blocks=1, max_iterations=8, gradient="jacobian-free"),
    "varnet": lambda: VarNet(1, 4, 1),
    "e2e-varnet": lambda: E2EVarNet(1, 4, 1, 4, 1),
    "usrnet": lambda: USRNet(iterations=1, widths=(4, 4, 4, 4), blocks=1, hypanet_channels=4),
}
MRI = ("deq", "varnet", "e2e-varnet")
pytestmark = pytest.mark.filterwarnings("ignore:relative step of the DEQ")  # of random weights
every_network = pytest.mark.parametrize("network", NETWORKS)
every_mri_network = pytest.mark.parametrize("network", MRI)


def problem(network: str, precision: torch.dtype = torch.float32) -> Batch:
    """Two images with their measurements."""
    torch.manual_seed(0)
    info = {name: ["a", "b"] for name in ("file", "subject", "slice", "scale")}
    if network == "usrnet":
        kernel = torch.rand(5, 5, dtype=precision)
        A, x = BlurDownsample(kernel / kernel.sum(), 2), torch.rand(2, 3, 16, 16, dtype=precision)
        return Batch(A(x), A, x, info)
    kind = precision.to_complex()
    A = MultiCoilMRI(equispaced_mask(16, 4, 0.25), normalize_maps(torch.randn(2, 3, 16, 16, dtype=kind)))
    x = torch.randn(2, 1, 16, 16, dtype=kind)
    return Batch(A(x), A, x, info)


def refuse(model: nn.Module, batch: Batch, error: type[Exception], sentence: str, *names: str) -> None:
    """Raise unless the calls of these names (all by default) raise this error."""
    calls = {
        "model": lambda: model(batch.y, batch.A),
        "evaluate": lambda: evaluate(model, [batch], progress=False),
        "supervised": lambda: spade.finetune(model, [batch], "supervised", steps=1, progress=False),
        "self-supervised": lambda: spade.finetune(model, [batch], "self-supervised", steps=1, progress=False),
        "school": lambda: spade.finetune(model, [batch], "school", copy.deepcopy(model), steps=1, progress=False),
    }
    for name in names or calls:
        with pytest.raises(error, match=sentence) as raised:
            calls[name]()
        assert "\n" not in str(raised.value), name


@every_network
def test_double_precision_is_refused_by_a_network_of_single_precision(network):
    model, batch, double = NETWORKS[network](), problem(network), problem(network, torch.float64)
    sentence = r"must have the precision of the network's weights, torch.float32, got torch\.(float64|complex128)"
    refuse(model, double, TypeError, f"(measurement|reference)? ?[xy] {sentence}")
    refuse(model, batch._replace(y=double.y), TypeError, f"y {sentence}")
    name = "A.kernel" if network == "usrnet" else "A.maps"
    refuse(model, batch._replace(A=double.A), TypeError, f"{name} {sentence}")
    refuse(model.double(), batch, TypeError, "y must have the precision of the network's weights, torch.float64")
    assert model(double.y, double.A).dtype == double.x.dtype
    assert evaluate(model, [double], progress=False).psnr.notna().all()


@every_network
@pytest.mark.parametrize("half", (torch.float16, torch.bfloat16))
def test_weights_in_half_precision_are_refused(network, half):
    model, batch, found = NETWORKS[network]().to(half), problem(network), f"got {half}: use "
    refuse(model, batch, TypeError, f"weights must be float32 or float64, {found}torch.autocast", "model", "evaluate")
    refuse(model, batch, TypeError, f"float32 or float64.*, {found}", "supervised", "self-supervised", "school")


@every_network
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_measurements_in_half_precision_are_refused(network):
    batch = problem(network)
    batch = batch._replace(y=batch.y.to(torch.float16 if network == "usrnet" else torch.complex32))
    sentence, calls = "y must have the precision of the network's weights, torch.float32", ("model", "evaluate")
    refuse(NETWORKS[network](), batch, TypeError, sentence, *calls, "supervised", "self-supervised")


@every_network
def test_an_empty_batch_is_refused(network):
    batch = problem(network)
    A = batch.A if network == "usrnet" else MultiCoilMRI(batch.A.mask, batch.A.maps[:1])
    empty = batch._replace(y=batch.y[:0], x=batch.x[:0], A=A, info={name: [] for name in batch.info})
    sentence = r"must have shape \(1 or more, .* to fit the operator, got \(0, 3"
    refuse(NETWORKS[network](), empty, ValueError, sentence, "model", "evaluate")
    refuse(
        NETWORKS[network](), empty, ValueError, r"must .* got .*\(0, [13]", "supervised", "self-supervised", "school"
    )


def test_the_baselines_refuse_an_empty_batch_and_real_kspace():
    y, A = problem("varnet")[:2]
    for baseline in (zero_filled, cg_sense):
        with pytest.raises(ValueError, match=r"k-space must have shape \(1 or more, 3, 16, 16\)"):
            baseline(y[:0], MultiCoilMRI(A.mask, A.maps[:1]))
        with pytest.raises(TypeError, match="k-space must be complex64 or complex128, got torch.float32"):
            baseline(y.abs(), A)
    with pytest.raises(ValueError, match=r"maps must have shape \(B, coils, H, W\), got \(0, 3, 16, 16\)"):
        MultiCoilMRI(A.mask, A.maps[:0])
    with pytest.raises(TypeError, match="image must be complex64 or complex128, got torch.float32"):
        A(torch.zeros(2, 1, 16, 16))


@every_mri_network
def test_real_kspace_is_refused(network):
    batch = problem(network)
    sentence = "k-space must be complex64 or complex128, got torch.float32"
    refuse(NETWORKS[network](), batch._replace(y=batch.y.abs()), TypeError, sentence)


@every_network
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_measurement_or_operator_that_is_not_finite_is_named(network, value):
    batch, name = problem(network), "kernel" if network == "usrnet" else "maps"
    calls = ("evaluate", "supervised", "self-supervised", "school")
    batch.y[1, 2, 3, 4] = value
    refuse(NETWORKS[network](), batch, ValueError, "measurement y must be finite, got NaN or infinity", *calls)
    batch = problem(network)
    getattr(batch.A, name)[0, 0, 2, 3] = value
    calls = calls[:1] if network == "e2e-varnet" else calls  # which estimates its own maps
    refuse(NETWORKS[network](), batch, ValueError, f"A.{name} must be finite, got NaN or infinity", *calls)


@every_network
@pytest.mark.parametrize("factor", (1e20, 1e10, 1e-10, 1e-20, 1e-30, 1e-42))
def test_a_measurement_far_from_one_must_be_scaled(network, factor):
    batch = problem(network)
    far = batch._replace(y=batch.y * factor, x=batch.x * factor)
    sentence = r"measurement y must be scaled to a maximum near 1, x with it, got a maximum of [\d.]+e[+-]"
    refuse(NETWORKS[network](), far, ValueError, sentence, *(["model"] if network == "deq" else []), "evaluate")
    refuse(NETWORKS[network](), far, ValueError, sentence, "supervised", "self-supervised", "school")
    one_far = torch.cat([batch.y[:1], far.y[1:]])
    refuse(NETWORKS[network](), batch._replace(y=one_far), ValueError, sentence, "evaluate", "self-supervised")
    check_values(batch.y * 1e6, batch.A)
    check_values(batch.y * 1e-6, batch.A)


@every_network
def test_a_measurement_of_zeros_is_not_blamed_on_the_learning_rate(network):
    """It is the measurement of a black image, which is reconstructed, and trained on if the loss allows it."""
    model, batch = NETWORKS[network]().eval(), problem(network)
    zeros = batch._replace(y=torch.zeros_like(batch.y))
    assert model(zeros.y, zeros.A).isfinite().all()
    for strategy in ("supervised", "self-supervised"):
        assert math.isfinite(spade.finetune(model, [zeros], strategy, steps=1, progress=False).losses[0])
    explode = lambda x_hat, x: x_hat.abs().sum() * math.inf
    with pytest.raises(ValueError, match="measurement y must not be zero everywhere, got such an image,? in a batch"):
        spade.finetune(model, [zeros], "supervised", loss=explode, steps=1, progress=False)


REFERENCES: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "without batch axis": lambda x, A: x[0],
    "without channel": lambda x, A: x[:, 0],
    "one image for two": lambda x, A: x[:1],
    "coil images": lambda x, A: A.maps * x,
    "real": lambda x, A: x.abs(),
}


@every_mri_network
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_reference_that_would_broadcast_is_refused(network, kind):
    batch = problem(network)
    wrong = batch._replace(x=REFERENCES[kind](batch.x, batch.A))
    expected = r"reference x must have shape and kind of the reconstruction, complex \(2, 1, 16, 16\), got"
    refuse(NETWORKS[network](), wrong, ValueError, expected, "evaluate", "supervised")


@pytest.mark.parametrize("wrong", (lambda x: x[0], lambda x: x[:1], lambda x: x[:, :1], lambda x: x[:, 0], torch.abs))
def test_a_photograph_that_would_broadcast_is_refused(wrong):
    batch = problem("usrnet")
    x = wrong(batch.x) if wrong is not torch.abs else batch.x + 0j
    expected = r"reference x must have shape and kind of the reconstruction, real \(2, 3, 16, 16\), got"
    refuse(NETWORKS["usrnet"](), batch._replace(x=x), ValueError, expected, "evaluate", "supervised")


FORMS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "array": (Tensor.numpy, "ndarray; torch.as_tensor makes one"),
    "list": (Tensor.tolist, "list; torch.as_tensor makes one"),
    "None": (lambda tensor: None, "NoneType"),
    "sparse": (Tensor.to_sparse, "torch.sparse_coo on cpu"),
    "meta": (lambda tensor: tensor.to("meta"), "torch.strided on meta"),
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_network
@every_form
def test_a_measurement_that_is_no_dense_tensor_is_refused(network, form):
    batch, (change, found) = problem(network), FORMS[form]
    wrong = batch._replace(y=change(batch.y))
    refuse(NETWORKS[network](), wrong, TypeError, rf"y must be a dense tensor with values, got {found}")


@every_network
@every_form
def test_a_reference_that_is_no_dense_tensor_is_refused(network, form):
    batch, (change, found) = problem(network), FORMS[form]
    if form != "None":  # which is a batch without reference
        wrong = batch._replace(x=change(batch.x))
        sentence = rf"reference x must be a dense tensor with values, got {found}"
        refuse(NETWORKS[network](), wrong, TypeError, sentence, "evaluate", "supervised")


@every_form
def test_operators_and_baselines_refuse_what_is_no_dense_tensor(form):
    (y, A, x, _), (y_photo, blur, photo, _) = problem("varnet"), problem("usrnet")
    change, found = FORMS[form]
    calls = {
        "k-space": [lambda: zero_filled(change(y), A), lambda: cg_sense(change(y), A), lambda: A.adjoint(change(y))],
        "image": [lambda: A(change(x)), lambda: blur(change(photo))],
        "measurement": [lambda: blur.adjoint(change(y_photo))],
    }
    if form != "meta":  # which gives the shape of the result
        calls["image"] += [lambda: Bicubic(2)(change(photo))]
        calls["measurement"] += [lambda: bicubic(change(y_photo), blur)]
    if form not in ("array", "list"):  # which operators convert
        calls["maps"] = [lambda: MultiCoilMRI(A.mask, change(A.maps))]
        calls["mask"] = [lambda: MultiCoilMRI(change(A.mask), A.maps)]
        calls["kernel"] = [lambda: BlurDownsample(change(blur.kernel), 2)]
    for name, refused in calls.items():
        for call in refused:
            with pytest.raises(TypeError, match=rf"{name}( y)? must be a dense tensor with values, got {found}\.$"):
                call()


def test_operators_take_arrays():
    (y, A, x, _), (_, blur, photo, _) = problem("varnet"), problem("usrnet")
    assert torch.equal(MultiCoilMRI(A.mask.numpy(), A.maps.numpy())(x), y)
    assert torch.equal(BlurDownsample(blur.kernel.numpy(), np.int64(2))(photo), blur(photo))


@pytest.mark.parametrize("wrong", (None, "A", 3, torch.zeros(2, 3, 16, 16), nn.Identity()))
def test_what_is_no_operator_is_refused(wrong):
    for network, sentence in {
        "deq": "A must be an operator with adjoint and normal, as MultiCoilMRI has, got ",
        "varnet": "A must be an operator with mask and maps, as MultiCoilMRI has, got ",
        "e2e-varnet": "A must be an operator with mask and maps, as MultiCoilMRI has, got ",
        "usrnet": "A must have a scale and an exact data step, as BlurDownsample has, got ",
    }.items():
        batch = problem(network)._replace(A=wrong)
        refuse(NETWORKS[network](), batch, TypeError, sentence + type(wrong).__name__, "model", "evaluate")
    for baseline, needed in ((zero_filled, "adjoint"), (cg_sense, "adjoint and normal")):
        with pytest.raises(TypeError, match=f"A must be an operator with {needed}, as MultiCoilMRI has, got "):
            baseline(problem("varnet").y, wrong)


@pytest.mark.parametrize("wrong", (None, 3, "scans", [None], ["scan.h5"], problem("varnet"), {"y": 1}))
def test_what_is_no_collection_of_batches_is_refused(wrong):
    model = NETWORKS["varnet"]()
    for name, call in {
        "batches": lambda: evaluate(model, wrong, progress=False),
        "(?:)batches": lambda: sweep_cg_sense(wrong),
        "measurements": lambda: spade.repair(model, model, wrong),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} must hold Batch\(y, A, x, info\), got \w+\.$"):
            call()


@pytest.mark.parametrize("wrong", (None, 3, "student", {}, NETWORKS["varnet"]().state_dict()), ids=lambda w: str(w)[:9])
def test_what_is_no_network_is_refused(wrong, tmp_path):
    model, batch = NETWORKS["varnet"](), problem("varnet")
    for name, call in {
        "teacher": lambda: spade.prune(wrong, 0.1),
        "(?:)teacher": lambda: spade.plan(wrong, 0.1),
        "(?:)(?:)teacher": lambda: spade.repair(model, wrong, [batch]),
        "student": lambda: spade.repair(wrong, model, [batch]),
        "model": lambda: spade.reconstruct(wrong, tmp_path, tmp_path / "out"),
        "(?:)model": lambda: spade.find_priors(wrong, (batch.y, batch.A)),
        "(?:)(?:)model": lambda: spade.meta_prune(wrong, [batch]),
        "(?:)(?:)(?:)model": lambda: spade.finetune(wrong, [batch], "supervised", steps=1),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} must be a network, such as spade.load\(path\) returns, got "):
            call()
    with pytest.raises(TypeError, match="^model must be a network or a function of y and A, got "):
        evaluate(wrong, [batch], progress=False)


@pytest.mark.parametrize("value", (None, "x", -1, math.nan, math.inf, True, [1]))
def test_numbers_out_of_range_are_refused(value):
    model, batch, photo = NETWORKS["varnet"](), problem("varnet"), problem("usrnet")
    calls = {
        "pixels must be a whole number of at least 1": lambda: spade.repair(model, model, [batch], pixels=value),
        "calls must be a whole number of at least 1": lambda: spade.repair(model, model, [batch], calls=value),
        "ridge must be a number of at least 0": lambda: spade.repair(model, model, [batch], ridge=value),
        "iterations must be a whole number of at least 1": lambda: cg_sense(batch.y, batch.A, iterations=value),
        "regularization must be a number of at least 0": lambda: cg_sense(batch.y, batch.A, value),
        "radii must be a whole number of at least 0": lambda: evaluate(model, [batch], False, radii=value),
        "scale must be a whole number of at least 1": lambda: BlurDownsample(photo.A.kernel, value),
        "scale must be a whole number of at least 1,": lambda: Bicubic(value),
    }
    for sentence, call in calls.items():
        with pytest.raises(ValueError, match=f"^{sentence}"):
            call()
    if value is not True:
        with pytest.raises(ValueError, match="acceleration must be a whole number from 1 to the width 16, got "):
            equispaced_mask(16, value)
