"""Timing: turns, modes, threads, equal tolerance, the paper's inputs."""

import time

import pytest
import torch
from torch import nn

from spade.latency import (
    check_tolerances,
    growth,
    measure_latency,
    num_threads,
    one_iteration,
    paper_inputs,
    peak_memory,
    photo_inputs,
    seconds_of,
    synchronize,
    time_split,
)
from spade.models import DEQ, VarNet
from spade.pruning import prune


class Recorder(nn.Module):
    """Writes down when it is called, and in what state."""

    def __init__(self, name: str, calls: list, seconds: float = 0.0):
        super().__init__()
        self.name, self.calls, self.seconds, self.inner = name, calls, seconds, nn.Dropout()

    def forward(self, y, A):
        self.calls.append(
            (
                self.name,
                self.training or self.inner.training,
                torch.is_inference_mode_enabled(),
                torch.get_num_threads(),
            )
        )
        time.sleep(self.seconds)


def test_models_take_turns_in_eval_mode_and_are_put_back():
    calls = []
    models = {name: Recorder(name, calls) for name in "ab"}
    models["b"].eval()
    measure_latency(models, torch.zeros(1), nn.Identity(), repeats=2, warmup=1, threads=1)
    assert [c[0] for c in calls] == ["a", "b"] * 3
    assert all(c[1:] == (False, True, 1) for c in calls)
    assert models["a"].training and models["a"].inner.training and not models["b"].training


def test_warmup_is_not_counted_and_numbers_are_those_of_the_clock():
    calls = []

    class WarmsUp(Recorder):
        def forward(self, y, A):
            time.sleep(0.3 if len(self.calls) < 1 else 0.01)
            self.calls.append(1)

    frame = measure_latency(
        {"slow": Recorder("slow", [], 0.04), "warm": WarmsUp("warm", calls)},
        torch.zeros(1),
        nn.Identity(),
        repeats=5,
        warmup=1,
    )
    assert (
        list(frame.columns) == ["seconds", "lower_quartile", "upper_quartile", "speed_up", "iterations"]
        and frame.index.name == "model"
    )
    assert (
        0.04 <= frame.loc["slow", "seconds"] < 0.2 and 0.01 <= frame.loc["warm", "seconds"] < 0.2
    )  # bounds for a busy machine
    assert frame.loc["slow", "speed_up"] == 1 < frame.loc["warm", "speed_up"] < 4.5
    assert "median of 5" in frame.attrs["measured_on"]


def test_modes_are_put_back_after_an_error():
    class Fails(nn.Module):
        def forward(self, y, A):
            raise RuntimeError("out of memory")

    model, threads = Fails(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_latency({"m": model}, torch.zeros(1), nn.Identity(), threads=2)
    assert model.training and torch.get_num_threads() == threads


def test_unequal_tolerance_is_refused():
    loose, strict = (DEQ(features=4, num_blocks=1, tolerance=t) for t in (4e-3, 1e-4))
    with pytest.raises(
        ValueError,
        match="must have equal tolerance, .*strict: tolerance 0.0001, .*loose: tolerance 0.004, max_iterations 100",
    ):
        measure_latency({"strict": strict, "loose": loose}, *paper_inputs((16, 16), 2))


@pytest.mark.parametrize("other", [dict(solver="plain"), dict(memory=3)])
def test_another_solver_is_refused(other):
    one, two = DEQ(features=4, num_blocks=1), DEQ(features=4, num_blocks=1, **other)
    with pytest.raises(
        ValueError,
        match="equal .*solver.*one: .*solver anderson, memory 5; two: .*"
        + ("solver plain" if "solver" in other else "memory 3"),
    ):
        measure_latency({"one": one, "two": two}, *paper_inputs((16, 16), 2))
    check_tolerances({"one": one, "pruned": prune(one, 0.40), "varnet": VarNet(1, 4, 1)})


def test_a_gpu_is_waited_for_before_the_clock_starts_and_before_it_stops(monkeypatch):
    """A GPU queues the work: a clock that does not wait measures how fast it is queued."""
    events, clock = [], time.perf_counter
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(("wait", device)))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or clock())
    gpu = torch.device("cuda", 0)
    assert 0 <= seconds_of(lambda: events.append("call"), gpu) < 1
    assert events == [("wait", gpu), "clock", "call", ("wait", gpu), "clock"]
    events.clear()
    synchronize(gpu), synchronize(torch.device("cpu"))
    assert events == [("wait", gpu)]
    seconds_of(lambda: events.append("call"), torch.device("cpu"))
    assert events[1:] == ["clock", "call", "clock"]


def test_iterations_of_a_deq_are_reported():
    torch.manual_seed(0)
    deq = DEQ(features=4, num_blocks=1, max_iterations=3, tolerance=0.0)
    frame = measure_latency(
        {"deq": deq, "pruned": prune(deq, 0.40), "varnet": VarNet(1, 4, 1)},
        *paper_inputs((16, 16), 2),
        repeats=1,
        warmup=0,
    )
    assert frame["iterations"].tolist()[:2] == [3, 3] and frame["iterations"].isna().tolist() == [False, False, True]


def test_one_iteration():
    deq, (y, A) = DEQ(features=4, num_blocks=1), paper_inputs((16, 16), 2)
    assert torch.equal(one_iteration(deq)(y, A), deq.step(A.adjoint(y), y, A))
    with pytest.raises(TypeError, match=r"must be a fixed-point network with step\(x, y, A\), got VarNet"):
        one_iteration(VarNet(1, 4, 1))


def test_paper_inputs():
    y, A = paper_inputs(batch_size=2)
    assert y.shape == (2, 16, 320, 320) and y.dtype == torch.complex64
    assert torch.allclose(A.maps.abs().square().sum(1), torch.ones(()), atol=1e-5)
    assert torch.equal(y, paper_inputs(batch_size=2)[0]) and not torch.equal(y, paper_inputs(batch_size=2, seed=1)[0])
    assert A.mask.reshape(-1, 320)[0, 160] and 1 / 6 < A.sampling_rate < 0.3


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with num_threads(2) as used:
        assert used == torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("arguments", [dict(models={}), dict(repeats=0), dict(warmup=-1)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="models, repeats and warmup must be at least 1, 1 and 0, got"):
        measure_latency(**(dict(models={"a": nn.Identity()}, y=torch.zeros(1), A=nn.Identity()) | arguments))


def test_photo_inputs():
    y, A = photo_inputs(batch_size=2)
    assert y.shape == (2, 3, 107, 160) and A.adjoint(y).shape == (2, 3, 321, 480)
    assert torch.equal(y, photo_inputs(batch_size=2)[0]) and not torch.equal(y, photo_inputs(batch_size=2, seed=1)[0])
    with pytest.raises(ValueError, match="image must have sides that are multiples of the scale 3, got 320×480"):
        photo_inputs((320, 480))


def test_parts_of_the_time_are_of_the_cnn_the_transforms_and_the_rest():
    y, A = paper_inputs((32, 32), 3)
    network = VarNet(num_cascades=1, channels=4, num_pools=1).train()

    def slow(*_):
        time.sleep(0.05)

    (unet, *_), *_ = network.priors()
    unet.down_sample_layers[0].register_forward_hook(slow)
    parts = time_split(network, y, A, repeats=1, threads=1)
    assert list(parts) == ["CNN", "FFT", "rest"] and parts["CNN"] > 0.05 > parts["FFT"] > 0 and network.training
    assert time_split(network, y, A, 1, 1, time.process_time)["CNN"] < 0.05  # sleep is no computation
    hooks = [m for m in unet.modules() if m._forward_pre_hooks]
    assert not hooks and len(unet._forward_hooks) == 0


def test_hooks_are_removed_if_the_network_raises():
    network = VarNet(num_cascades=1, channels=2, num_pools=1)
    with pytest.raises(ValueError):
        time_split(network, torch.zeros(1, 2, 8, 8, dtype=torch.complex64), paper_inputs((16, 16), 2)[1], repeats=1)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_peak_memory_counts_what_exists_at_once():
    big = torch.ones(1000, dtype=torch.float64)
    one_after_the_other = lambda: [(big + i).sum() for i in range(5)]
    all_at_once = lambda: [big + i for i in range(5)]
    one, many = (peak_memory(call, torch.device("cpu")) for call in (one_after_the_other, all_at_once))
    assert 8000 <= one < 17000 and 40000 <= many < 40100  # and the numbers that are added


def test_peak_memory_counts_gradients_and_not_the_weights_and_moments_that_exist():
    cpu, layer, image = torch.device("cpu"), nn.Linear(1000, 1000, bias=False), torch.ones(1, 1000)
    adam = torch.optim.Adam(layer.parameters(), foreach=False)
    with torch.no_grad():
        assert 4000 <= peak_memory(lambda: layer(image), cpu) < 10_000  # one vector; the weights have 4 MB

    def step():
        adam.zero_grad()
        layer(image).sum().backward()
        adam.step()

    step()
    assert 4e6 <= peak_memory(step, cpu) < 13e6  # the gradient and two temporary tensors of Adam


def test_growth_finds_the_power_and_a_process_clock_ignores_waiting():
    now = [0.0]
    calls = {n: lambda n=n: now.append(now.pop() + n**3) for n in (1, 2, 4)}
    frame = growth(calls, torch.device("cpu"), repeats=3, clock=lambda: now[0])
    assert abs(frame.attrs["exponent"] - 3) < 1e-9 and frame["seconds"].tolist() == [1, 8, 64]
    waited = measure_latency(
        {"sleep": lambda y, A: time.sleep(0.05)}, torch.zeros(1), nn.Identity(), 2, 1, clock=time.process_time
    )
    assert waited["seconds"].item() < 0.02
