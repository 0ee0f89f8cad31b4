"""Table 3's baseline: the widths of a student, the weights of a network that was never trained."""

import math

import pytest
import torch
from torch import nn

from spade.models import DEQ, USRNet, VarNet
from spade.pruning import prune
from spade.random_baseline import randomize

RATIOS = (0.05, 0.10, 0.20, 0.40)


class Two(nn.Module):
    """Two convolutions."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(2, 10, 3, padding=1), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        return self.tail(torch.relu(self.head(x)))


def test_random_start_has_the_widths_and_the_initial_scalars():
    student = prune(DEQ(features=16, num_blocks=1), 0.40)
    with torch.no_grad():
        student.alpha.fill_(9)
    state = torch.random.get_rng_state()
    fresh = randomize(student, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in student.parameters()]
    assert fresh.alpha == DEQ().alpha and student.alpha == 9
    assert not torch.equal(fresh.denoiser.head.weight, student.denoiser.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), randomize(student, seed=3).parameters()))
    assert not torch.equal(fresh.denoiser.head.weight, randomize(student, seed=4).denoiser.head.weight)


def distance_to_damping(model: DEQ) -> float:
    """How far the prior is from its promised start, 0.8 times the identity."""
    noise = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ((model.denoiser(noise) - 0.8 * noise).norm() / noise.norm()).item()


@pytest.mark.parametrize("ratio", RATIOS)
def test_random_start_of_deq_is_a_damped_identity(ratio):
    student = prune(DEQ(), ratio)
    fresh = [randomize(student, seed) for seed in range(3)]
    assert all(distance_to_damping(model) < 0.15 for model in fresh)
    features = fresh[0].denoiser.body[-1].weight  # a tenth of what PyTorch draws for this very width, and no bias
    assert 0.098 < features.abs().max() * math.sqrt(9 * features.shape[1]) <= 0.1 * (1 + 1e-5)
    assert not fresh[0].denoiser.body[-1].bias.any() and not torch.equal(features, fresh[1].denoiser.body[-1].weight)


@pytest.mark.parametrize("ratio", RATIOS)
def test_random_start_of_usrnet_is_near_the_identity(ratio):
    student = prune(USRNet(iterations=4, widths=(32, 32, 32, 32), blocks=1), ratio)
    image = torch.rand(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        fresh = randomize(student, seed)
        with torch.no_grad():
            deviation = ((fresh.p(image) - image[:, :3]).norm() / image[:, :3].norm()).item()
            alphas, _ = fresh.h(torch.tensor([0.01, 2.0])[None, :, None, None]).flatten().chunk(2)
        assert deviation < 0.2 and (alphas > 0.005).all() and (alphas < 0.03).all(), (deviation, alphas)


def test_random_start_of_a_varnet_is_cut_and_scaled():
    "It has no reset_parameters: the leading channels of a new draw, times sqrt(fan-in before / after), bit for bit."
    student = prune(VarNet(num_cascades=2, channels=5, num_pools=2), 0.40)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = VarNet(num_cascades=2, channels=5, num_pools=2).state_dict()
    for name, value in randomize(student, 3).state_dict().items():
        expected = drawn[name][tuple(slice(n) for n in value.shape)]
        if value.ndim == 4:
            expected = expected * math.sqrt(drawn[name][0].numel() / value[0].numel())
        elif "up_conv.1.1.bias" in name:  # the only layer with a bias: its scale is that of its weight
            weight = name.removesuffix("bias") + "weight"
            expected = expected * math.sqrt(drawn[weight][0].numel() / student.state_dict()[weight][0].numel())
        assert torch.equal(value, expected), name


def test_random_start_of_a_foreign_model():
    net = Two().eval()
    student = prune(net, 0.40, [(net, torch.randn(1, 2, 8, 8), [net.tail])])
    assert randomize(student, 0, build=Two).head.out_channels == 6
    with pytest.raises(TypeError, match="build must be a function"):
        randomize(student, 0)
