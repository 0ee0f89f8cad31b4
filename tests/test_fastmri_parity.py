"""The same weights give the same k-space and the same coil maps as fastmri 0.3.0, on even and odd sizes.

`pip install --no-deps fastmri==0.3.0` is enough; without it these tests are skipped.
"""

import warnings

import pytest
import torch

from spade.models import E2EVarNet, VarNet
from spade.operators import MultiCoilMRI

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what fastMRI's own imports deprecate is not ours to judge
    try:
        from fastmri.models import varnet as reference
    except ImportError:  # also when one of fastMRI's own requirements is missing
        reference = None

pytestmark = pytest.mark.skipif(reference is None, reason="fastmri is not installed or cannot be imported")
SIZES = [(32, 32), (15, 17), (19, 40), (33, 24)]


def acs_mask(width: int, num_low: int = 6, every: int = 4) -> torch.Tensor:
    mask = torch.zeros(width, dtype=torch.bool)
    mask[::every] = True
    mask[width // 2 - num_low // 2 : width // 2 + (num_low + 1) // 2] = True
    return mask


def measurement(
    batch: int, coils: int, height: int, width: int, scale: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([acs_mask(width, 5 + image) for image in range(batch)])[:, None, None]
    kspace = scale * torch.randn(batch, coils, height, width, dtype=torch.complex64, generator=generator)
    return mask * kspace, mask


def reference_kspace(net: torch.nn.Module, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "fastMRI's forward without its last line, the root sum of squares; k-space and maps."
    y, mask = torch.view_as_real(y), mask[..., None]
    maps = net.sens_net(y, mask)
    kspace = y.clone()
    for cascade in net.cascades:
        kspace = cascade(kspace, y, mask, maps)
    return torch.view_as_complex(kspace.contiguous()), torch.view_as_complex(maps.contiguous())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


def any_maps(y: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(y) / y.shape[1] ** 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coils", [1, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_same_kspace_and_maps(size, coils, scale):
    torch.manual_seed(0)
    peer = reference.VarNet(num_cascades=2, sens_chans=3, sens_pools=2, chans=4, pools=3).eval()
    for cascade in peer.cascades:
        cascade.dc_weight.data.fill_(0.7)
    y, mask = measurement(2, coils, *size, scale, seed=1)
    ours = E2EVarNet.from_fastmri(peer.state_dict()).eval()
    sizes = dict(num_cascades=2, channels=4, num_pools=3, sens_channels=3, sens_num_pools=2)
    assert ours.config() == sizes | {"project": False}  # fastMRI does not project
    with torch.no_grad():
        expected, expected_maps = reference_kspace(peer, y, mask)
        A = MultiCoilMRI(mask, any_maps(y))
        assert relative_error(ours.predict_kspace(y, A), expected) < 1e-5
        assert relative_error(ours.effective_operator(y, A).maps, expected_maps) < 1e-5


@pytest.mark.parametrize("size", [(48, 36), (47, 35)])
@pytest.mark.parametrize("num_cascades", [8, 12])
def test_published_depths(num_cascades, size):
    torch.manual_seed(1)
    peer = reference.VarNet(num_cascades=num_cascades, sens_chans=2, sens_pools=4, chans=2, pools=4).eval()
    y, mask = measurement(1, 4, *size, 1.0, seed=2)
    ours = E2EVarNet.from_fastmri(peer.state_dict())
    A = MultiCoilMRI(mask, any_maps(y))
    with torch.no_grad():
        expected, _ = reference_kspace(peer, y, mask)
    found = ours.predict_kspace(y, A)
    assert len(ours.cascades) == num_cascades and relative_error(found, expected) < (1e-5 if size[1] % 2 else 1e-7)
    with torch.no_grad():  # another layout, other rounding
        fast, exact = ours.predict_kspace(y, A), reference_kspace(peer.double(), y.to(torch.complex128), mask)[0]
        for image in (found, fast):  # about as far from the exact result as fastMRI is
            assert relative_error(image, exact) < 2 * relative_error(expected, exact) < 1e-4
        twin = ours.double().predict_kspace(y.to(torch.complex128), MultiCoilMRI(mask, A.maps.to(torch.complex128)))
    assert relative_error(twin, exact) < 1e-11


def test_root_sum_of_squares_is_fastmri_output():
    torch.manual_seed(2)
    peer = reference.VarNet(num_cascades=2, sens_chans=2, sens_pools=2, chans=2, pools=2).eval()
    y, mask = measurement(1, 3, 21, 18, 1.0, seed=3)
    from spade.operators import ifft2c

    with torch.no_grad():
        kspace = E2EVarNet.from_fastmri(peer.state_dict()).predict_kspace(y, MultiCoilMRI(mask, any_maps(y)))
        rss = ifft2c(kspace).abs().square().sum(dim=1).sqrt()
        assert relative_error(rss, peer(torch.view_as_real(y), mask[..., None])) < 1e-5


def test_given_maps_are_used_like_fastmri_uses_its_own():
    "`VarNet` with the maps that fastMRI estimates gives fastMRI's k-space."
    torch.manual_seed(3)
    peer = reference.VarNet(num_cascades=2, sens_chans=2, sens_pools=2, chans=4, pools=2).eval()
    y, mask = measurement(2, 3, 20, 26, 1.0, seed=4)
    with torch.no_grad():
        expected, maps = reference_kspace(peer, y, mask)
        found = VarNet.from_fastmri(peer.state_dict()).predict_kspace(y, MultiCoilMRI(mask, maps))
    assert relative_error(found, expected) < 1e-5


def test_gradients_agree():
    torch.manual_seed(4)
    peer = reference.VarNet(num_cascades=2, sens_chans=2, sens_pools=2, chans=2, pools=2).double()
    y, mask = measurement(1, 2, 18, 22, 1.0, seed=5)
    y = y.to(torch.complex128)
    ours = E2EVarNet.from_fastmri(peer.state_dict()).double()
    reference_kspace(peer, y, mask)[0].abs().square().sum().backward()
    ours.predict_kspace(y, MultiCoilMRI(mask, any_maps(y))).abs().square().sum().backward()
    expected = {name: weight.grad for name, weight in peer.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-6, atol=1e-8)


def test_names_are_those_of_fastmri():
    "At the published size: the same names and the same shapes, in both directions."
    peer = {name: tuple(value.shape) for name, value in reference.VarNet(num_cascades=12).state_dict().items()}
    assert peer == {name: tuple(value.shape) for name, value in E2EVarNet(num_cascades=12).state_dict().items()}
