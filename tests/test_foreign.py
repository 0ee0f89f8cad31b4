"""fastMRI's and MONAI's own networks, pruned as they are: the right widths, and equal to the zeroed teacher."""

import copy
import math

import pytest
import torch
from foreign import load, relative_error, widths, zeroed
from torch import nn

import spade

RATIO = 0.4


def test_load_gives_the_same_module_again_and_names_a_missing_one():
    assert load("torchvision") is load("torchvision")
    assert load("torchvision.ops").nms.__module__.startswith("torchvision"), (
        "its functions exist; those compiled do not run"
    )
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        load("no_such_package")


def monai(name, *arguments, **settings):
    return getattr(load("monai.networks.nets"), name)(*arguments, **settings)


def image(channels=1, *shape):
    return torch.rand(1, channels, *(shape or (32, 32)))


def dynunet(**settings):
    return monai("DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], **settings)


# name: (network, input, output layers, at least this factor of the multiply-accumulates)
CNNS = {
    "fastMRI Unet": lambda: (load("fastmri.models").Unet(1, 1, chans=8, num_pool_layers=3), image(), ["up_conv.2.1"]),
    "fastMRI Unet, odd": lambda: (
        load("fastmri.models").Unet(2, 2, chans=8, num_pool_layers=2),
        image(2, 33, 45),
        ["up_conv.1.1"],
    ),
    "BasicUNet": lambda: (monai("BasicUNet", 2, 1, 2, (5, 5, 8, 8, 10, 5)), image(), ["final_conv"]),
    "BasicUNet of volumes": lambda: (
        monai("BasicUNet", 3, 1, 2, (5, 5, 5, 5, 8, 5)),
        image(1, 32, 32, 32),
        ["final_conv"],
    ),
    "BasicUNet, pixel shuffle": lambda: (
        monai("BasicUNet", 2, 1, 2, (5, 5, 8, 8, 10, 5), upsample="pixelshuffle"),
        image(),
        ["final_conv"],
    ),
    "UNet": lambda: (monai("UNet", 2, 1, 2, (8, 16, 32), (2, 2)), image(), ["model.2*"]),
    "UNet, residual": lambda: (monai("UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), image(), ["model.2.1*"]),
    "UNet, batch norm": lambda: (
        monai("UNet", 2, 1, 2, (8, 16, 32), (2, 2), norm="batch", act="relu"),
        image(),
        ["model.2*"],
    ),
    "AttentionUnet": lambda: (monai("AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)), image(), ["model.2*"]),
    "DynUNet": lambda: (dynunet(), image(), ["output_block"]),
    "DynUNet, residual": lambda: (dynunet(res_block=True), image(), ["output_block"]),
    "SegResNet": lambda: (
        monai("SegResNet", 2, 8, 1, 2, norm=("group", {"num_groups": 4})),
        image(),
        ["conv_final.2*"],
    ),
    "SegResNet, batch norm": lambda: (monai("SegResNet", 2, 8, 1, 2, norm="batch"), image(), ["conv_final.2*"]),
}
NORM_GROUPS = {"SegResNet": 4}  # a width must be a multiple of the groups of its norm


def build(name):
    """The network with random weights and running statistics, and its input."""
    torch.manual_seed(0)
    model, x, ignored = CNNS[name]()
    for m in model.modules():
        if getattr(m, "running_mean", None) is not None:
            nn.init.normal_(m.running_mean, std=0.1)
    return model.eval(), x, ignored


def expected_width(width, groups=1):
    """floor(width (1 - ratio)), rounded to whole groups of a norm."""
    return math.floor(width * (1 - RATIO) / groups + 1e-9) * groups


def without_group_norms(model):
    """A copy without norms over channels, which also count channels that are zero."""
    copied = copy.deepcopy(model)
    for parent in [*copied.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    return copied


@pytest.mark.parametrize("name", CNNS)
def test_a_cnn_of_others_is_pruned_exactly(name):
    teacher, x, ignored = build(name)
    before = copy.deepcopy(teacher.state_dict())
    student = spade.prune(teacher, RATIO, priors=[(teacher, x, ignored)]).eval()
    report = student.pruning_report
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert {group.after for group in report.groups} == {
        expected_width(group.before, NORM_GROUPS.get(name, 1)) for group in report.groups
    }
    for (_, old), (_, new) in zip(widths(teacher), widths(student), strict=True):
        assert new in (old, expected_width(old, NORM_GROUPS.get(name, 1)))
    oracle = zeroed(teacher, student)
    with torch.no_grad():
        assert student(x).shape == teacher(x).shape
        assert relative_error(oracle(x), teacher(x)) > 1e-3, "the removed filters did something"
        assert relative_error(without_group_norms(student)(x), without_group_norms(oracle)(x)) < 1e-4
    assert set(report.kept) <= set(dict(teacher.named_modules()))
    assert report.macs_before / report.macs_after > 2.2


# Networks with physics


def multicoil(coils=3, height=24, width=20):
    """Measured k-space of fastMRI's and MONAI's shape (1, coils, H, W, 2) and its mask (1, 1, 1, W, 1)."""
    kspace = torch.randn(1, coils, height, width, 2, generator=torch.Generator().manual_seed(0))
    columns = torch.zeros(width, dtype=torch.bool)
    columns[::3] = columns[width // 2 - 3 : width // 2 + 3] = True
    mask = columns.view(1, 1, 1, width, 1)
    return kspace * mask, mask


def fastmri_varnet():
    return load("fastmri.models").VarNet(num_cascades=2, sens_chans=4, sens_pools=2, chans=6, pools=2), "sens_net"


def monai_varnet():
    nets = "monai.apps.reconstruction.networks.nets."
    part = lambda features: load(nets + "complex_unet").ComplexUnet(2, features, pad_factor=16)
    sensitivity = load(nets + "coil_sensitivity_model").CoilSensitivityModel(2, (4, 4, 4, 4, 4, 4))
    refinement = part((5, 5, 8, 8, 10, 5))
    return load(nets + "varnet").VariationalNetworkModel(
        sensitivity, refinement, num_cascades=2
    ), "coil_sensitivity_model"


VARNETS = {"fastMRI VarNet": fastmri_varnet, "MONAI VariationalNetworkModel": monai_varnet}


def last_convolution(cnn):
    return [m for m in cnn.modules() if isinstance(m, nn.Conv2d)][-1]


@pytest.mark.parametrize("name", VARNETS)
def test_a_variational_network_of_others_is_pruned_exactly(name):
    torch.manual_seed(0)
    teacher, estimator = VARNETS[name]()
    teacher.eval()
    cnns = {id(c.model.unet): c.model.unet for c in teacher.cascades}.values()  # MONAI's cascades may share one
    priors = [(cnn, torch.zeros(1, 2, 32, 32), [last_convolution(cnn)]) for cnn in cnns]
    student = spade.prune(teacher, RATIO, priors=priors).eval()
    inputs = multicoil()
    with torch.no_grad():
        assert relative_error(student(*inputs), zeroed(teacher, student)(*inputs)) < 1e-4
        assert relative_error(student(*inputs), teacher(*inputs)) > 1e-3
    kept = set(teacher.get_submodule(estimator).modules())  # as in the paper
    found = spade.prune(teacher, RATIO, priors=[p for p in spade.find_priors(teacher, inputs) if p[0] not in kept])
    assert widths(found) == widths(student)
    assert widths(teacher.get_submodule(estimator)) == widths(student.get_submodule(estimator))
    for old, new in zip(teacher.cascades, student.cascades):
        outputs = [(a, b) for (_, a), (_, b) in zip(widths(old), widths(new), strict=True)]
        assert outputs.count((2, 2)) == 1 and all(b == expected_width(a) for a, b in outputs if a != 2)
        assert torch.equal(old.dc_weight, new.dc_weight)
    assert student.pruning_report.parameters_after == sum(p.numel() for p in student.parameters())


def test_a_network_of_fastmri_is_fine_tuned_with_its_own_loss():
    """SSIMLoss(x_hat, x, data_range) of fastMRI, and batches of its shape."""
    torch.manual_seed(0)
    teacher, _ = fastmri_varnet()
    priors = [(c.model.unet, torch.zeros(1, 2, 32, 32), [last_convolution(c.model.unet)]) for c in teacher.cascades]
    student = spade.prune(teacher, RATIO, priors=priors)
    inputs, ssim = multicoil(), load("fastmri.losses").SSIMLoss()
    with torch.no_grad():
        target = teacher.eval()(*inputs)

    def loss(model, batch):
        return ssim(model(*batch["inputs"])[:, None], batch["target"][:, None], batch["target"].amax().view(1))

    data = [{"inputs": inputs, "target": target}]
    log = spade.finetune(student, data, loss=loss, steps=6, learning_rate=1e-3, progress=False)
    assert log.losses[-1] < log.losses[0]
