"""Repair: exact where pruning removed nothing, better where it did, for all four networks; refusals."""

import copy

import pytest
import torch
from torch import nn

from spade.basics import Batch, evaluating
from spade.data.kernels import test_kernels as twelve_kernels
from spade.examples import brain
from spade.models import DEQ, E2EVarNet, USRNet, VarNet
from spade.operators import BlurDownsample
from spade.pruning import prune
from spade.repairing import repair


def networks() -> dict:
    torch.manual_seed(0)
    return {
        "varnet": VarNet(num_cascades=2, channels=6, num_pools=2),
        "e2e-varnet": E2EVarNet(num_cascades=2, channels=6, num_pools=2, sens_channels=2, sens_num_pools=2),
        "deq": DEQ(features=8, num_blocks=2),
        "usrnet": USRNet(iterations=2, widths=[8, 8, 16, 16], blocks=1),
    }


def measurement(name: str) -> Batch:
    if name == "usrnet":
        A = BlurDownsample(torch.as_tensor(twelve_kernels(seed=0)[0]).float(), 2)
        x = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        return Batch(A(x), A, x, {})
    y, A, x = brain(acceleration=4)
    return Batch(y, A, x, {})


def reconstruct(network: nn.Module, batch: Batch) -> torch.Tensor:
    with evaluating(network), torch.no_grad():
        return network(batch.y, batch.A)


@pytest.mark.parametrize("name", networks())
def test_the_student_comes_closer_to_the_teacher_and_inputs_are_not_modified(name):
    teacher, batch = networks()[name], measurement(name)
    student = prune(teacher, 0.4)
    states = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    repaired = repair(student, teacher, [batch._replace(x=None)])
    for network, state in zip((teacher, student), states):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert teacher.training and student.training and repaired.training
    report = repaired.repair_report
    assert len(report) > 3 and (report["after"] <= report["before"] + 1e-6).all()
    assert report["after"].mean() < 0.9 * report["before"].mean()
    target = reconstruct(teacher, batch)
    errors = [(reconstruct(network, batch) - target).abs().square().mean().item() for network in (student, repaired)]
    assert errors[1] < errors[0]
    assert [p.shape for p in repaired.parameters()] == [p.shape for p in student.parameters()]


@pytest.mark.parametrize("name", networks())
def test_a_student_that_equals_its_teacher_stays_as_it_is(name):
    """A copy stands for a network whose removed filters are zero."""
    teacher, batch = networks()[name], measurement(name)
    repaired = repair(copy.deepcopy(teacher), teacher, [batch])
    assert repaired.repair_report["before"].max() < 1e-5  # single precision of the layers, double of the fit
    for a, b in zip(repaired.parameters(), teacher.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_several_images_of_a_batch_and_several_measurements_count_alike():
    teacher = networks()["deq"]
    student, batch = prune(teacher, 0.2), measurement("deq")
    two = Batch(batch.y.repeat(2, 1, 1, 1), batch.A, None, {})
    once, twice = (repair(student, teacher, [data], pixels=10**6) for data in (batch, two))
    for a, b in zip(once.parameters(), twice.parameters()):
        assert torch.allclose(a, b, atol=1e-4)
    assert (twice.repair_report["rows"] == 2 * once.repair_report["rows"]).all()


def test_a_foreign_cnn_is_repaired_by_its_priors():
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(12), nn.PReLU(), nn.Conv2d(12, 2, 3)
    )

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn

        def forward(self, y, A):
            return self.cnn(y)

    teacher = Network()
    priors = [(teacher.cnn, torch.rand(1, 2, 16, 16), [teacher.cnn[3]])]
    student = prune(teacher, 0.25, priors=priors)
    data = [Batch(torch.rand(1, 2, 16, 16), nn.Identity(), None, {}) for _ in range(3)]
    report = repair(student, teacher, data, priors=priors).repair_report
    assert report["layer"].tolist() == ["cnn.0", "cnn.3"] and report["unknowns"].tolist() == [19, 82]
    assert report["before"][0] < 1e-6 and report["after"][1] < report["before"][1]


def test_refusals():
    teacher, batch = networks()["deq"], measurement("deq")
    student = prune(teacher, 0.4)
    trained = copy.deepcopy(student)
    with torch.no_grad():
        next(p for p in trained.parameters() if p.ndim == 4).add_(0.1)
    with pytest.raises(ValueError, match="must be those of the teacher"):
        repair(trained, teacher, [batch])
    with pytest.raises(ValueError, match="at least one batch"):
        repair(student, teacher, [])
    with pytest.raises(ValueError, match="must be pruned from teacher"):
        repair(networks()["varnet"], teacher, [batch])
