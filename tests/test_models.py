"""The MRI networks: sizes of the paper, one calling convention, what they offer for pruning, foreign and bad input."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from spade.models import (
    DEQ,
    EDSR,
    E2EVarNet,
    NormUnet,
    Unet,
    VarNet,
    build,
    channels_to_complex,
    complex_to_channels,
    network_name,
)
from spade.models.varnet import symmetric_centre
from spade.operators import MultiCoilMRI, ifft2c

PAPER = {"deq": 999_428, "varnet": 19_634_712, "e2e-varnet": 20_119_610}
SMALL = {
    "deq": dict(features=6, num_blocks=1),
    "varnet": dict(num_cascades=2, channels=4, num_pools=2),
    "e2e-varnet": dict(num_cascades=2, channels=4, num_pools=2, sens_channels=2, sens_num_pools=2),
}


def problem(batch=1, coils=3, height=15, width=17, dtype=torch.complex64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, 1, width, generator=generator) < 0.4
    mask[..., width // 2 - 2 : width // 2 + 3] = True
    maps = torch.randn(batch, coils, height, width, dtype=dtype, generator=generator)
    A = MultiCoilMRI(mask, maps / maps.abs().square().sum(dim=1, keepdim=True).sqrt())
    return A(torch.randn(batch, 1, height, width, dtype=dtype, generator=generator)), A


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **SMALL[name])


@pytest.mark.parametrize("name", PAPER)
def test_paper_size_is_the_default(name):
    assert sum(weight.numel() for weight in build(name).parameters()) == PAPER[name]


def test_sensitivity_network_size():
    assert sum(weight.numel() for weight in E2EVarNet().sens_net.parameters()) == 484_898


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("coils", [1, 12])
def test_one_calling_convention(name, batch, coils):
    y, A = problem(batch, coils)
    x_hat = small(name)(y, A)
    assert x_hat.shape == (batch, 1, 15, 17) and x_hat.dtype == torch.complex64 and x_hat.isfinite().all()


@pytest.mark.parametrize("name", PAPER)
def test_images_of_a_batch_do_not_mix(name):
    y, A = problem(3)
    model = small(name).eval()
    with torch.no_grad():
        together = model(y, A)
        for image in range(3):
            one = slice(image, image + 1)
            alone = model(y[one], MultiCoilMRI(A.mask[one], A.maps[one]))
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAPER)
def test_every_weight_learns(name):
    model = small(name)
    y, A = problem(2)
    model(y, A).abs().square().sum().backward()
    for weight_name, weight in model.named_parameters():
        if weight_name == "cascades.0.dc_weight":
            continue  # the first cascade starts from y itself, where the data term vanishes
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), weight_name


@pytest.mark.parametrize("name", PAPER)
def test_gradients_reach_the_measurement(name):
    y, A = problem()
    y.requires_grad_()
    small(name)(y, A).abs().square().sum().backward()
    assert y.grad.isfinite().all() and y.grad.any()


@pytest.mark.parametrize("name", PAPER)
def test_double_precision(name):
    y, A = problem(dtype=torch.complex128)
    x_hat = small(name).double()(y, A)
    assert x_hat.dtype == torch.complex128


@pytest.mark.parametrize("name", PAPER)
def test_mixed_precision_keeps_the_physics_in_complex64(name):
    y, A = problem()
    model = small(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = model(y, A)
    x_hat.abs().square().sum().backward()
    assert x_hat.dtype == torch.complex64 and x_hat.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", PAPER)
def test_gpu_agrees_with_cpu(name):
    y, A = problem(2)
    model = small(name).eval()
    with torch.no_grad():
        expected = model(y, A)
        found = copy.deepcopy(model).cuda()(y.cuda(), copy.deepcopy(A).cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PAPER)
def test_scale_of_an_empty_measurement(name):
    "An all-zero slice is answered by numbers, not NaN, and has a gradient."
    y, A = problem()
    model = small(name)
    x_hat = model(torch.zeros_like(y), A)
    x_hat.abs().square().sum().backward()
    assert x_hat.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", PAPER)
def test_config_rebuilds_the_network(name):
    import json

    model = small(name)
    other = build(name, **json.loads(json.dumps(model.config())))
    other.load_state_dict(model.state_dict())
    y, A = problem()
    assert torch.equal(other.eval()(y, A), model.eval()(y, A)) and network_name(other) == name


@pytest.mark.parametrize("name", PAPER)
def test_k_space_that_does_not_fit_is_refused(name):
    y, A = problem(coils=3)
    with pytest.raises(ValueError, match="shape"):
        small(name)(y[:, :2], A)


# --- what is offered for pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_priors_hold_all_weights_but_the_physics(name):
    model = build(name)
    offered = {id(weight) for module, _, _ in model.priors() for weight in module.parameters()}
    left = {weight_name for weight_name, weight in model.named_parameters() if id(weight) not in offered}
    expected = {
        "deq": lambda w: w in ("alpha", "gamma"),
        "varnet": lambda w: w.endswith("dc_weight"),
        "e2e-varnet": lambda w: w.endswith("dc_weight") or w.startswith("sens_net."),
    }[name]
    assert left and all(expected(weight_name) for weight_name in left)
    assert sum(not weight_name.startswith("sens_net.") for weight_name in left) == (2 if name == "deq" else 8)


@pytest.mark.parametrize("name", PAPER)
def test_priors_run_on_their_example_in_training_mode(name):
    "InstanceNorm refuses a single pixel in training mode, so the example must be large enough."
    for module, example, keep in small(name).train().priors():
        assert module(example).shape == (1, 2, *example.shape[-2:]) and not example.is_complex()
        assert all(any(layer is inner for inner in module.modules()) and layer.out_channels == 2 for layer in keep)


@pytest.mark.parametrize("name", PAPER)
def test_nothing_is_done_in_place(name):
    assert not any(getattr(layer, "inplace", False) for layer in build(name).modules())


# --- parts -----------------------------------------------------------------------------------------------------------


def test_converters_order_and_inverse():
    image = torch.tensor([1 + 2j, 3 + 4j]).reshape(1, 2, 1, 1)
    assert complex_to_channels(image).flatten().tolist() == [1, 3, 2, 4]
    assert torch.equal(channels_to_complex(complex_to_channels(image)), image)
    with pytest.raises(TypeError, match="must be complex, got torch.float32"):
        complex_to_channels(image.real)
    with pytest.raises(ValueError, match="even in number, got 3"):
        channels_to_complex(torch.zeros(1, 3, 4, 4))


def test_norm_unet_is_equivariant_to_scale():
    torch.manual_seed(0)
    net, image = NormUnet(4, 2).double(), torch.randn(2, 1, 15, 17, dtype=torch.complex128)
    torch.testing.assert_close(net(1e-6 * image), 1e-6 * net(image), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (9, 22)])
def test_unet_keeps_the_size(size):
    assert Unet(channels=3, num_pools=2)(torch.randn(1, 2, *size)).shape == (1, 2, *size)


def test_edsr_is_head_body_tail():
    torch.manual_seed(0)
    net, image = EDSR(features=3, num_blocks=1, residual_scale=0.5), torch.randn(1, 2, 7, 6)
    head, block, closing = net.head(image), net.body[0], net.body[1]
    inner = head + 0.5 * block.conv2(block.conv1(head).clamp_min(0))
    torch.testing.assert_close(net(image), net.tail(head + closing(inner)))


def test_receptive_field_of_edsr_is_29_pixels_each_way():
    """29 convolutions of 3×3 along the longest path; the gradient of one output pixel shows how far it looks."""
    torch.manual_seed(0)
    probe = torch.zeros(1, 2, 81, 81, requires_grad=True)
    EDSR(features=8)(probe)[0, 0, 40, 40].backward()
    rows = probe.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert (rows.min(), rows.max()) == (40 - 29, 40 + 29)


def test_one_cascade_by_hand():
    torch.manual_seed(0)
    y, A = problem(dtype=torch.complex128)
    cascade = small("varnet").double().cascades[0]
    cascade.dc_weight.data.fill_(0.3)
    kspace = torch.randn_like(y)
    full = A.with_mask(torch.ones_like(A.mask))
    expected = kspace - 0.3 * torch.where(A.mask, kspace - y, 0) - full(cascade.model(full.adjoint(kspace)))
    torch.testing.assert_close(cascade(kspace, y, A), expected)


def test_e2e_ignores_the_maps_it_is_given_and_shows_its_own():
    y, A = problem(2)
    model = small("e2e-varnet")
    assert torch.equal(model(y, A), model(y, A.with_maps(torch.ones_like(A.maps))))
    with pytest.raises(ValueError, match="shape"):
        model(y, A.with_maps(A.maps[:, :2]))  # ignored are their values, not how many coils and pixels they have
    estimated = model.effective_operator(y, A)
    assert estimated.mask is A.mask or torch.equal(estimated.mask, A.mask)
    torch.testing.assert_close(estimated.maps.abs().square().sum(dim=1), torch.ones(2, 15, 17))
    torch.testing.assert_close(VarNet.forward(model, y, A), model(y, A))


@pytest.mark.parametrize("name", ["deq", "varnet", "e2e-varnet"])
def test_images_are_zero_outside_the_support_of_the_given_maps(name):
    y, A = problem(2)
    inside = torch.zeros(15, 17, dtype=torch.bool)
    inside[4:12, 3:15] = True
    cut, model = A.with_maps(A.maps * inside), small(name)
    assert torch.equal(cut.support, inside.expand(2, 1, 15, 17))
    image = model(y, cut)
    assert not image[~cut.support].any() and image[cut.support].all()
    model.project = False
    free = model(y, cut)
    assert free[~cut.support].any() == (name != "varnet")  # VarNet combines the coils with these maps
    if name != "deq":
        torch.testing.assert_close(free * inside, image)
    again = type(model)(**model.config())
    assert again.project is False


def test_estimated_maps_measure_the_projected_image_as_the_cascades_do():
    y, A = problem(2)
    inside = (torch.arange(17) > 4).expand(15, 17)
    cut, model = A.with_maps(A.maps * inside), small("e2e-varnet")
    image, measured = model(y, cut), model.effective_operator(y, cut)
    torch.testing.assert_close(measured(image), model.cascade_operator(y, cut)(image))
    torch.testing.assert_close(measured.maps.abs().square().sum(dim=1), inside.expand(2, 15, 17).float())
    assert torch.equal(measured.support, cut.support)
    model.project = False
    assert torch.equal(model.effective_operator(y, cut).maps, model.cascade_operator(y, cut).maps)


def test_magnitudes_of_varnet_do_not_depend_on_the_phase_of_the_maps():
    y, A = problem(2)
    angles = 6 * torch.rand(2, 1, 15, 17, generator=torch.Generator().manual_seed(1))
    turn = torch.polar(torch.ones_like(angles), angles)
    turned, model = A.with_maps(A.maps * turn), small("varnet")
    torch.testing.assert_close(model(y, turned) * turn, model(y, A), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.cascade_operator(y, turned).maps, model.cascade_operator(y, A).maps)
    acs = model.cascade_operator(y, A).reduce(ifft2c(symmetric_centre(A.mask) * y))
    assert (acs.real > 0).all() and acs.imag.abs().max() < 1e-5
    model.align = False
    assert not torch.allclose(model(y, turned).abs(), model(y, A).abs(), rtol=1e-3, atol=1e-4)
    assert model.cascade_operator(y, A) is A


def test_varnet_measures_with_the_given_maps_and_saves_whether_it_aligns_them():
    y, A = problem()
    assert small("varnet").effective_operator(y, A) is A and small("varnet").config()["align"] is True
    assert "align" not in small("e2e-varnet").config()
    loaded = VarNet.from_fastmri(small("e2e-varnet").state_dict())
    assert loaded.config() == SMALL["varnet"] | {"align": False, "project": False}
    assert (small("varnet")(torch.zeros_like(y), A).abs() < 1e-10).all()  # no phase where the image is zero


def test_operator_parameters_are_those_of_the_estimator():
    model = small("e2e-varnet")
    assert [id(p) for p in model.operator_parameters()] == [id(p) for p in model.sens_net.parameters()]


def test_e2e_needs_the_centre():
    y, A = problem()
    mask = A.mask.clone()
    mask[..., 8] = False
    with pytest.raises(ValueError, match="column 8 of 17 was not measured"):
        small("e2e-varnet")(y, A.with_mask(mask))


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("rows", [1, 15])
def test_values_that_were_not_measured_do_not_reach_the_image(name, rows):
    """Nor do those of column 10, which the symmetric centre of ACS lines 6 to 9 contains for a width of 17."""
    y, A = problem(2)
    mask = torch.zeros(2, 1, rows, 17, dtype=torch.bool)
    mask[..., 6:10] = mask[..., ::4] = True
    mask[..., 0, 0] = False
    A, model = A.with_mask(mask), small(name).eval()
    y = A.mask * y
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(y + ~A.mask * noise, A), model(y, A)) and not torch.equal(model(y + noise, A), model(y, A))
    if name != "deq":
        assert torch.equal(model.predict_kspace(y + ~A.mask * noise, A), model.predict_kspace(y, A))


def test_two_dimensional_mask():
    y, A = problem()
    mask = A.mask.expand(1, 1, 15, 17).clone()
    for name in PAPER:
        model = small(name).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(y, A.with_mask(mask)), model(y, A))


# --- checkpoints of fastMRI -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_cascades=3, channels=2, num_pools=1, sens_channels=3, sens_num_pools=2),
        dict(num_cascades=12, channels=2, num_pools=2, sens_channels=2, sens_num_pools=1),
    ],
)
@pytest.mark.parametrize("lightning", [False, True])
def test_sizes_are_inferred(sizes, lightning):
    weights = E2EVarNet(**sizes).state_dict()
    checkpoint = (
        {"state_dict": {f"varnet.{name}": value for name, value in weights.items()} | {"loss.w": torch.ones(1)}}
        if lightning
        else weights
    )
    loaded = E2EVarNet.from_fastmri(checkpoint)
    assert loaded.config() == sizes | {"project": False} and all(
        torch.equal(loaded.state_dict()[name], value) for name, value in weights.items()
    )


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        (lambda: {}, "got no .* among 0 names, the first 'none'"),
        (lambda: DEQ(features=2, num_blocks=1).state_dict(), "got no 'cascades.0.model.unet.down_sample_layers.0"),
        (lambda: Unet(channels=2, num_pools=1).state_dict(), "got no 'cascades.0.model.unet.down_sample_layers.0"),
        (lambda: VarNet(1, 2, 1).state_dict(), "got no 'sens_net"),
        (lambda: E2EVarNet(1, 2, 1, 2, 1).state_dict() | {"cascades.0.dc_weight": torch.ones(2)}, "do not fit"),
        (lambda: E2EVarNet(1, 2, 1, 2, 1).state_dict() | {"cascades.0.extra": torch.ones(2)}, "do not fit"),
    ],
)
def test_another_architecture_is_one_sentence(checkpoint, message):
    with pytest.raises(ValueError, match=message) as caught:
        E2EVarNet.from_fastmri(checkpoint())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong, found", [(None, "a NoneType"), (nn.ReLU(), "a ReLU")])
@pytest.mark.parametrize("network", [VarNet, E2EVarNet])
def test_what_is_no_dictionary_of_weights_is_named(network, wrong, found):
    message = f"{network.__name__}.from_fastmri: weights must be a dictionary of tensors, got {found}.$"
    with pytest.raises(TypeError, match=message):
        network.from_fastmri(wrong)
    with pytest.raises(TypeError, match="'state_dict': weights must be a dictionary"):
        network.from_fastmri({"state_dict": wrong})
    with pytest.raises(TypeError, match="'state_dict': weights must be a dictionary of tensors, got a str"):
        network.from_fastmri({"state_dict": "brain.pt"})


class Code:
    """A pickle of it would run code."""

    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def test_a_file_of_weights_is_read_without_its_code_and_damage_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path = E2EVarNet(1, 2, 1, 2, 1), tmp_path / "brain.pt"
    torch.save(model.state_dict(), path)
    loaded = E2EVarNet.from_fastmri(path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    content = bytearray(path.read_bytes())
    weight = model.state_dict()["cascades.0.model.unet.conv.layers.0.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="brain.pt must be a whole file of tensors.*, got a wrong checksum"):
        E2EVarNet.from_fastmri(path)
    torch.save({"weight": Code()}, path)
    with pytest.raises(ValueError, match="brain.pt must be a whole file of tensors"):
        E2EVarNet.from_fastmri(path)
    assert not Path("was_run").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        VarNet.from_fastmri("nowhere.pt")
    wrong = model.state_dict() | {"cascades.0.dc_weight": torch.tensor([float("nan")])}
    with pytest.raises(ValueError, match="weight 'cascades.0.dc_weight' must be finite"):
        E2EVarNet.from_fastmri(wrong)


@pytest.mark.parametrize("name", PAPER)
def test_the_documentation_of_the_call_says_what_is_refused(name):
    assert "raises" in type(build(name, **SMALL[name])).forward.__doc__


def test_registry_names_its_choices():
    with pytest.raises(ValueError, match="deq, varnet, e2e-varnet"):
        build("resnet")
    foreign = type("VarNet", (nn.Module,), {})()  # the name of a class is not enough
    for model, found in ((nn.Linear(1, 1), "Linear"), (foreign, "VarNet")):
        with pytest.raises(ValueError, match=f"model must be one of DEQ, .* of spade.models, got .*{found}"):
            network_name(model)


# --- inference and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [VarNet, E2EVarNet])
def test_checkpointing_changes_no_gradient_and_no_checkpoint(cls):
    torch.manual_seed(0)
    plain = cls(num_cascades=2, channels=4, num_pools=2)
    again = copy.deepcopy(plain)
    again.checkpointing = True
    y, A = problem()
    for model in (plain, again):
        model(y, A).abs().square().sum().backward()
    for first, second in zip(plain.parameters(), again.parameters()):
        assert torch.equal(first.grad, second.grad)
    assert again.config() == plain.config() and list(again.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("size", [(7, 5), (16, 16)])
def test_instance_norm_without_gradients_is_that_of_pytorch(number, size):
    from spade.models.varnet import InstanceNorm

    features = 1e3 + torch.randn(number, 4, *size, dtype=torch.float64)
    features[0, 1] = 5.0  # a constant channel becomes zero
    with torch.no_grad():
        found, given = InstanceNorm(4)(features), features.clone()
    torch.testing.assert_close(found, nn.InstanceNorm2d(4)(features), rtol=1e-9, atol=1e-9)
    assert torch.equal(features, given) and not found[0, 1].any()
    with torch.no_grad(), pytest.raises(ValueError, match="more than 1 spatial element"):
        InstanceNorm(4)(torch.ones(2, 4, 1, 1))
