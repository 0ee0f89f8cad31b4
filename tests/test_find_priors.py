"""`find_priors` names the CNNs, their inputs and the layers that must stay, and leaves the model as it is."""

import codecs
import copy
import locale
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from foreign import load
from small_networks import Net
from torch import nn

from spade import find_priors, prune
from spade.basics import Batch
from spade.examples import brain
from spade.models import DEQ, E2EVarNet, USRNet, VarNet
from spade.operators import BlurDownsample

W = 8
conv = lambda a, b, size=3: nn.Conv2d(a, b, size, padding=size // 2)
cnn = lambda a=1, b=1: nn.Sequential(conv(a, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, b))
image = lambda channels=1, size=8: torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def named(model, inputs):
    """What is found, by names: {cnn: the layers that stay}."""
    names = {m: name for name, m in model.named_modules()}
    return {names[c]: [names[m] for m in stay] for c, _, stay in find_priors(model, inputs)}


def state(model):
    """All that a call could change."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return tensors, modes, grads, torch.get_rng_state(), [set(vars(m)) for m in model.modules()]


# The networks of the paper


@pytest.mark.parametrize("build", [lambda: DEQ(W, 2, max_iterations=4, tolerance=0.5), lambda: VarNet(2, 4, 2)])
def test_our_networks_name_the_same(build):
    y, A, _ = brain()
    model = build()
    found = {c: set(stay) for c, _, stay in find_priors(model, (y, A))}
    assert found == {c: set(stay) for c, _, stay in model.priors()}


def test_usrnet():
    model = USRNet(2, (4, 8, 8, 8), 1, 8)
    found = find_priors(model, (image(3), BlurDownsample(torch.ones(3, 3) / 9, 2, 0.1)))
    assert {c: set(stay) for c, _, stay in found} == {c: set(stay) for c, _, stay in model.priors()}
    assert [tuple(example[0].shape) for _, example, _ in found] == [(1, 4, 16, 16), (1, 2, 1, 1)]


def test_the_coil_maps_of_e2e_varnet_are_listed_for_the_user_to_delete():
    y, A, _ = brain()
    model = E2EVarNet(2, 4, 2, 4, 2)
    found = find_priors(model, (y, A))
    assert [found.names[c] for c, _, _ in found][-1] == "sens_net.norm_unet.unet"
    del found[-1]
    assert "sens_net" not in repr(found)
    assert {c: set(stay) for c, _, stay in found} == {c: set(stay) for c, _, stay in model.priors()}


# What stays as it is


def test_nothing_of_the_model_changes():
    y, A, _ = brain()
    model = VarNet(2, 4, 2)
    model.cascades[0].eval()
    model.cascades[1].requires_grad_(False)
    model.extra = nn.BatchNorm2d(2)
    before, given = state(model), y.clone()
    find_priors(model, (y, A))
    after = state(model)
    assert torch.equal(y, given) and torch.equal(before[3], after[3]) and before[1:3] == after[1:3]
    assert before[4] == after[4] and all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_norm_and_dropout_are_in_evaluation_mode():
    model = nn.Sequential(conv(1, W), nn.BatchNorm2d(W), nn.Dropout(0.5), conv(W, 1))
    find_priors(model, image())
    assert model[1].num_batches_tracked == 0 and model.training


def test_an_input_that_is_changed_in_place_is_recorded_before():
    model = Net(
        lambda net, x: net.body(x.mul_(0)),
        body=Net(lambda net, x: net.b(net.a(x.add_(1)).relu()), a=conv(1, W), b=conv(W, 1)),
    )
    x = image()
    ((_, example, _),) = find_priors(model, x)
    assert torch.equal(x, image()) and torch.equal(example[0], image())


# What is found


def test_a_tied_cnn_is_one_entry():
    model = Net(lambda net, x: net.cnn(torch.fft.fft2(net.cnn(x)).real), cnn=cnn())
    found = find_priors(model, image())
    assert named(model, image()) == {"cnn": ["cnn.4"]} and found.to_frame().calls.tolist() == [2]


def test_all_shapes_of_the_inputs_are_listed():
    model = Net(lambda net, x: torch.fft.fft2(net.cnn(F.interpolate(net.cnn(x), scale_factor=2))).real, cnn=cnn())
    (shapes,) = find_priors(model, image()).to_frame().inputs
    assert shapes == "1×1×8×8; 1×1×16×16"


@pytest.mark.parametrize(
    "call, inputs",
    [
        (lambda net, x: net.cnn(x, 0.1), "1×2×8×8, 0.1"),
        (lambda net, x: net.cnn(x, sigma=None), "x=1×2×8×8, sigma=None"),
        (lambda net, x: net.cnn(sigma=torch.tensor(0.1), x=x), "sigma=scalar, x=1×2×8×8"),
        (lambda net, x: net.cnn(x, torch.full((1,), 0.1)), "1×2×8×8, 1"),
    ],
)
def test_floats_none_and_keywords(call, inputs):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = cnn(2, 2)

        def forward(self, x, sigma=None):
            return x + self.body(x) * (0 if sigma is None else sigma)

    model = Net(lambda net, x: torch.view_as_complex(call(net, x).movedim(1, 3).contiguous()), cnn=Denoiser())
    found = find_priors(model, image(2))
    assert found.to_frame().inputs.tolist() == [inputs]
    assert prune(model, 0.4, found).cnn.body[0].out_channels == 4


def test_an_unrolled_network_with_its_operator_inside():
    def forward(net, y):
        x = torch.fft.ifft2(y)
        for stage in net.stages:
            z = torch.cat([x.real, x.imag], 1)
            x = torch.complex(*(z + stage(z)).chunk(2, 1))
            x = torch.fft.ifft2(torch.where(net.mask, y, torch.fft.fft2(x)))
        return x

    model = Net(forward, stages=nn.ModuleList(cnn(2, 2) for _ in range(2)), mask=torch.arange(8) % 2 == 0)
    assert named(model, torch.fft.fft2(image())) == {"stages.0": ["stages.0.4"], "stages.1": ["stages.1.4"]}


def test_a_network_is_not_opened_at_its_blocks():
    body = nn.Sequential(*[Net(lambda net, x: x + net.body(x), body=cnn(W, W)) for _ in range(3)])
    model = nn.Sequential(conv(1, W), body, conv(W, 1))
    assert named(model, image()) == {"": ["2"]}


def test_layers_that_are_called_from_outside_open_a_cnn():
    pair = nn.Sequential(cnn(1, W), cnn(W, 1))
    model = Net(lambda net, x: net.pair(x) + torch.fft.fft2(net.pair[0](x).mean(1, True)).real, pair=pair)
    assert named(model, image()) == {"": ["pair.0.4", "pair.1.4"]}


def test_two_outputs_and_a_skip_connection():
    forward = lambda net, x: {"image": x + net.a(h := net.body(x)), "error": [net.b(h).exp(), None]}
    model = Net(forward, body=cnn(1, W), a=conv(W, 1), b=conv(W, 2))
    assert named(model, image()) == {"": ["a", "b"]}


def test_a_weight_that_is_used_without_its_layer():
    forward = lambda net, x: F.conv2d(net.body(x), net.tail.weight + net.side.weight)
    model = Net(forward, body=cnn(1, W), tail=nn.Conv2d(W, 1, 1), side=nn.Conv2d(W, 1, 1))
    assert named(model, image()) == {"": ["tail", "side"]}


def test_a_network_that_needs_gradients():
    def forward(net, x):
        x = x.requires_grad_()
        return x - torch.autograd.grad(net.cnn(x).sum(), x)[0]

    x = image()
    assert named(Net(forward, cnn=cnn()), x) == {"cnn": ["cnn.4"]} and not x.requires_grad


# Wrapped models


ASCII = codecs.lookup(locale.getencoding()).name == "ascii"


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.skipif(ASCII, reason="torch's compiler reads its own templates, which are UTF-8, in the locale's encoding")
def test_frozen_compiled_and_parallel_models():
    frozen = cnn().requires_grad_(False)
    assert named(frozen, image()) == {"": ["4"]} and not any(p.requires_grad for p in frozen.parameters())
    assert named(torch.compile(cnn()), image()) == {"_orig_mod": ["_orig_mod.4"]}
    assert named(nn.DataParallel(cnn()), image()) == {"module": ["module.4"]}
    assert named(Net(lambda net, x: net.g(x).abs(), g=torch.compile(cnn())), image()) == {"": ["g._orig_mod.4"]}
    inplace = cnn()
    inplace.compile()
    assert named(inplace, image()) == {"": ["4"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(cnn(1, W), cnn(W, 1)).to(dtype)
    ((_, example, stay),) = found = find_priors(model, image().to(dtype))
    assert example[0].dtype == dtype and stay == [model[1][4]]
    assert prune(model, 0.4, found)[0][0].out_channels == 4


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(True)
        model = cnn()
        prepared = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(model)
        ((found, _, stay),) = find_priors(prepared, image())
        assert found is prepared and stay == [model[4]]
        student, zeros = prune(prepared, 0.4, inputs=image()), copy.deepcopy(model.state_dict())
        with torch.no_grad():
            student[4].weight.zero_()
            assert (student(image()) - student[4].bias).abs().max() < 1e-3  # its own weights, not those of the teacher
        assert all(torch.equal(v, zeros[k]) for k, v in model.state_dict().items())
    accelerate.state.AcceleratorState._reset_state(True)


# Refusals


lone = Net(lambda net, x, o: net.b(net.a(x)), a=conv(1, W), b=conv(W, 1))
none = "must hold a CNN of two layers or more, got none: "


@pytest.mark.parametrize(
    "model, inputs, message",
    [
        (nn.Sequential(conv(1, 4)), image(), rf"Sequential {none}'0' \(a single layer outside of CNNs\)"),
        (nn.ReLU(), image(), f"ReLU {none}it has no weighted layers"),
        (cnn(2), image(), r"Sequential must run with inputs, got RuntimeError: Given groups=1"),
        (cnn(), (image(), 3), r"Sequential must run with inputs, got TypeError"),
        (Net(lambda net, x: net.a(x), a=conv(1, 1), b=cnn()), image(), r"'b.0' \(not called\)"),
        (Net(lambda net, x: net.a(x) + net.b(x), a=conv(1, W), b=conv(1, W)), image(), r"'a' \(its output leaves"),
        (Net(lambda net, *x: net.cnn(*x), cnn=lone), (image(), pytest), r"'cnn.a' \(in a module that takes a module\)"),
    ],
)
def test_one_sentence(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        find_priors(model, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model_is_refused():
    for model in (torch.jit.script(cnn()), torch.jit.trace(cnn(), image())):
        with pytest.raises(ValueError, match="compiled by torch.jit|must be copyable"):
            find_priors(model, image())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keyword", [False, True])
def test_inputs_are_converted_to_the_precision_of_the_weights(dtype, keyword):
    model, x = Net(lambda net, x, level=0.5: net.cnn(x * level), cnn=cnn()).to(dtype), image()
    student = prune(model, 0.4, inputs={"x": x, "level": 0.5} if keyword else x)
    assert student.cnn[0].out_channels == 4 and student(x.to(dtype)).dtype == dtype


def test_prune_finds_the_cnns_itself():
    y, A, x = brain()
    model = VarNet(2, 4, 2)
    a, b = prune(model, 0.4, inputs=(y, A)), prune(model, 0.4)
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
    batch = Batch(y, A, x, {})
    assert torch.equal(a(batch.y, batch.A), b(batch.y, batch.A))


# The real packages


def package(name):
    """A module of another package; the test is skipped where it is missing."""
    try:
        return load(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def mri():
    """k-space as fastMRI and MONAI want it, and the mask."""
    lines = torch.arange(-16, 16).view(1, 1, 1, 32, 1)
    return torch.randn(1, 3, 32, 32, 2), (lines % 3 < 1) | (lines.abs() < 4)


def test_fastmri(mri):
    models = package("fastmri.models")
    assert named(models.Unet(1, 1, 8, 2), image(1, 17)) == {"": ["up_conv.1.1"]}
    found = named(models.VarNet(2, 4, 2, 4, 2), mri)
    assert list(found) == ["sens_net.norm_unet", "cascades.0.model", "cascades.1.model"]
    assert all(stay == [f"{name}.unet.up_conv.1.1"] for name, stay in found.items())


def test_monai(mri):
    nets = package("monai.networks.nets")
    assert named(nets.BasicUNet(2, 1, 1, (8, 8, 16, 16, 16, 8)), image(1, 32)) == {"": ["final_conv"]}
    assert named(nets.SegResNet(2, 8, 1, 1), image(1, 16)) == {"": ["conv_final.2.conv"]}
    parts = package("monai.apps.reconstruction.networks.nets.varnet")
    complex_unet = package("monai.apps.reconstruction.networks.nets.complex_unet").ComplexUnet(2, (8, 8, 8, 8, 8, 8))
    coils = package("monai.apps.reconstruction.networks.nets.coil_sensitivity_model")
    model = parts.VariationalNetworkModel(coils.CoilSensitivityModel(2, (8, 8, 8, 8, 8, 8)), complex_unet, 2)
    assert list(named(model, mri)) == ["coil_sensitivity_model.conv_net", "cascades.0.model", "cascades.1.model"]


def test_deepinv():
    d = package("deepinv")
    physics = d.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular")
    denoiser = lambda: d.models.DnCNN(1, 1, 3, nf=W, pretrained=None)
    y = physics.A(image(1, 16))
    for algorithm in ("PGD", "HQS", "ADMM"):
        parameters = {"stepsize": [0.5] * 2, "g_param": [0.1] * 2, "lambda": [1.0] * 2}
        model = d.unfolded.unfolded_builder(
            algorithm,
            params_algo=parameters,
            data_fidelity=d.optim.L2(),
            max_iter=2,
            prior=d.optim.PnP(denoiser=denoiser()),
        )
        ((_, stay),) = named(model, (y, physics)).items()
        assert stay[0].endswith("denoiser.out_conv") and len(stay) == 1
    model = d.models.ArtifactRemoval(denoiser(), "adjoint")
    assert named(model, (y, physics)) == {"backbone_net": ["backbone_net.out_conv"]}
    mask = (torch.rand(1, 1, 16, 16) > 0.5).float()
    physics = d.physics.MRI(mask=mask, img_size=(2, 16, 16))
    y = physics.A(torch.randn(1, 2, 16, 16))
    two = d.models.DnCNN(2, 2, 3, nf=W, pretrained=None)
    for model in (d.models.MoDL(two, 2), d.models.VarNet(two, num_cascades=2)):
        ((_, stay),) = named(model, (y, physics)).items()
        assert stay[0].endswith("out_conv") and len(stay) == 1


def test_a_cnn_that_is_ignored_as_a_whole_stays_and_the_others_are_cut():
    y, A, _ = brain()
    model = E2EVarNet(num_cascades=1, channels=4, num_pools=1, sens_channels=2, sens_num_pools=1).eval()
    report = prune(model, 0.4, inputs=(y, A), ignored_layers=["sens_net.*"]).pruning_report
    assert report.groups and all(group.name.startswith("cascades.0") for group in report.groups)
    assert any(name.startswith("sens_net") for name in report.kept)
    with pytest.raises(ValueError, match="in ignored_layers"):
        prune(model, 0.4, inputs=(y, A), ignored_layers=["*"])


# Several outputs, of which `output` picks those that count


class Several(nn.Module):
    """Three convolutions: `how` returns the image beside the features before it and the output of another head."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c, self.head = how, conv(1, 10), conv(10, 10), conv(10, 2), conv(10, 4)

    def forward(self, x):
        features = self.b(self.a(x).relu()).relu()
        return self.how(self.c(features), features, self.head(features))


Named = namedtuple("Named", "image features head")


@dataclass
class Result:
    image: torch.Tensor
    features: torch.Tensor
    head: torch.Tensor


WAYS = {
    "dictionary": (lambda *t: dict(zip(Named._fields, t)), "image"),
    "tuple": (lambda *t: t, 0),
    "from the end": (lambda *t: t[::-1], -1),
    "named tuple": (Named, "image"),
    "dataclass": (Result, "image"),
    "nested": (lambda *t: {"first": t[:1], "rest": t[1:]}, lambda value: value["first"][0]),
    "number beside it": (lambda *t: {"image": t[0], "level": 0.5, "more": t[1:]}, "image"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", ["inputs", "priors"])
def test_output_picks_what_must_stay(way, given):
    """The features lose the channels that the rule says; the image is that of zeroed filters, the head keeps four."""
    how, output = WAYS[way]
    torch.manual_seed(0)
    model, x = Several(how), image()
    asked = {"inputs": x} if given == "inputs" else {"priors": [(model, x, [])]}
    student = prune(model, 0.4, output=output, **asked)
    assert [m.out_channels for m in (student.a, student.b, student.c, student.head)] == [6, 6, 2, 4]
    removed = {group.name: list(group.removed) for group in student.pruning_report.groups}
    plain = Several(lambda *t: t)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("a", "b"):
            for parameter in getattr(plain, name).parameters():
                parameter[removed[name]] = 0
        student.how = plain.how
        expected, found = plain(x), student(x)
    kept = [k for k in range(10) if k not in removed["b"]]
    for a, b in zip(found, (expected[0], expected[1][:, kept], expected[2])):
        torch.testing.assert_close(a, b)
    assert "output_to_keep" not in vars(student) and "output_to_keep" not in vars(model)


def test_without_output_all_of_them_stay():
    student = prune(Several(Named), 0.4, inputs=image())
    assert [m.out_channels for m in (student.a, student.b, student.c, student.head)] == [6, 10, 2, 4]
    assert student.pruning_report.kept["b"] == "in ignored_layers"


def test_output_of_a_cnn_inside_an_unrolled_network():
    y, A, _ = brain()
    inner = Several(lambda *t: {"image": t[0], "features": t[1]})
    inner.a = conv(2, 10)
    real = lambda x: torch.view_as_real(x[:, 0]).movedim(-1, 1)
    step = lambda net, y, A: (
        A.adjoint(y) + torch.view_as_complex(net.cnn(real(A.adjoint(y)))["image"].movedim(1, -1).contiguous())[:, None]
    )
    model = Net(step, cnn=inner)
    student = prune(model, 0.4, inputs=(y, A), output="image")
    assert student.cnn.b.out_channels == 6 and student(y, A).shape == model(y, A).shape


@pytest.mark.parametrize(
    "how, output, message",
    [
        (
            WAYS["dictionary"][0],
            "picture",
            "output must be one of 'image', 'features', 'head' in the dict that Several",
        ),
        (lambda *t: t, 3, r"output must be one of 0, 1, 2 in the tuple that Several returns, got 3 \(IndexError"),
        (Result, "picture", "output must be an attribute of the Result that Several returns, got 'picture'"),
        (lambda *t: t, lambda value: value["image"], "output must be a function of the tuple that Several returns"),
        (lambda *t: {"image": t[0], "level": 2}, "level", "output must pick a tensor from the dict .*, got int"),
        (lambda *t: t[0], "image", "output must be left out where each CNN returns one tensor, got 'image'"),
    ],
)
@pytest.mark.parametrize("given", ["inputs", "priors"])
def test_one_sentence_for_an_output_that_is_not_there(how, output, message, given):
    model, x = Several(how), image()
    with pytest.raises(ValueError, match=message):
        prune(model, 0.4, output=output, **({"inputs": x} if given == "inputs" else {"priors": [(model, x, [])]}))
