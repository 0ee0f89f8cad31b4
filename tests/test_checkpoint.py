"""Checkpoints: bit-identical round trips, pruned widths, foreign networks, kills, full disks, and damaged files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spade.checkpoint
from spade.checkpoint import describe, layer_widths, load, read_checkpoint, save
from spade.models import DEQ, E2EVarNet, VarNet
from spade.operators import MultiCoilMRI, normalize_maps
from spade.pruning import prune
from spade.random_baseline import randomize

NETWORKS = {
    "DEQ": lambda: DEQ(features=10, num_blocks=1, max_iterations=4, alpha=0.3),
    "VarNet": lambda: VarNet(num_cascades=2, channels=5, num_pools=2),
    "E2EVarNet": lambda: E2EVarNet(num_cascades=1, channels=5, num_pools=2, sens_channels=3, sens_num_pools=2),
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().eval()


def measurement():
    g = torch.Generator().manual_seed(0)
    A = MultiCoilMRI(
        torch.arange(32) % 3 < 2, normalize_maps(torch.randn(2, 3, 32, 32, dtype=torch.complex64, generator=g))
    )
    return A(torch.randn(2, 1, 32, 32, dtype=torch.complex64, generator=g)), A


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ratio", [None, 0.10, 0.40])
def test_round_trip_is_bit_identical(tmp_path, name, ratio):
    model = make(name) if ratio is None else prune(make(name), ratio)
    save(model, tmp_path / "m")
    state = torch.random.get_rng_state()
    back = load(tmp_path / "m.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (
        type(back) is type(model)
        and back.config() == model.config()
        and layer_widths(back) == layer_widths(model)
        and not back.training
    )
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(model.state_dict().values(), back.state_dict().values())
    )
    with torch.no_grad():
        assert torch.equal(model(*measurement()), back(*measurement()))


@pytest.mark.parametrize("name", NETWORKS)
def test_prune_save_load_prune_again(tmp_path, name):
    student = prune(make(name), 0.20)
    save(student, tmp_path / "m")
    a, b = prune(student, 0.40), prune(load(tmp_path / "m"), 0.40)
    assert a.pruning_report.groups == b.pruning_report.groups
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_loaded_network_trains_and_can_start_at_random(tmp_path):
    save(prune(make("DEQ"), 0.40), tmp_path / "m")
    back = load(tmp_path / "m")
    back(*measurement()).abs().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in back.denoiser.parameters())
    assert randomize(back, 0).denoiser.head.out_channels == back.denoiser.head.out_channels


def test_one_file_holds_everything_and_describe_prints_it(tmp_path, capsys):
    save(prune(make("VarNet"), 0.40), tmp_path / "m", seed=3, data={"train": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    header = read_checkpoint(tmp_path / "m")[1]
    assert header["model"] == "VarNet" and header["provenance"] == {"seed": 3, "data": {"train": 5}}
    assert header["config"]["num_cascades"] == 2
    describe(tmp_path / "m")
    printed = capsys.readouterr().out
    name, widths = next(iter(header["widths"].items()))
    assert f"{name} " + " ".join(f"{key}={value}" for key, value in widths.items()) in printed.splitlines()
    assert json.loads(printed[: printed.index(f"\n{name} ")]) == {k: v for k, v in header.items() if k != "widths"}


def test_shipped_teachers_hold_their_description():
    for path in sorted((Path(spade.checkpoint.__file__).parent / "assets" / "teachers").iterdir()):
        assert path.suffix == ".safetensors"
        assert {"commit", "versions", "device", "run"} <= set(read_checkpoint(path)[1]["provenance"])
        assert sum(p.numel() for p in load(path).parameters()) == read_checkpoint(path)[1]["parameters"]


def test_double_precision_and_a_dot_in_the_name(tmp_path):
    save(make("DEQ").double(), tmp_path / "run-0.40")
    assert (tmp_path / "run-0.40.safetensors").exists() and load(tmp_path / "run-0.40").alpha.dtype == torch.float64


class Foreign(nn.Module):
    def __init__(self, width=8, extra=False):
        super().__init__()
        self.a, self.n, self.d, self.b = (
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, groups=width),
            nn.ConvTranspose2d(width, 1, 2),
        )
        if extra:
            self.c = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.b(self.d(torch.relu(self.n(self.a(x)))))


def test_foreign_network(tmp_path):
    model, x = Foreign(), torch.randn(2, 1, 12, 12)
    model(x)  # moves the running mean
    thin = prune(model.eval(), 0.50, priors=[(model, x, [model.b])])
    save(thin, tmp_path / "m")
    skeleton = Foreign()
    back = load(tmp_path / "m", model=skeleton)
    assert torch.equal(back(x), thin(x)) and back.d.groups == 4 and skeleton.d.groups == 8
    with pytest.raises(ValueError, match="holds a Foreign, none of DEQ, VarNet, E2EVarNet.*pass model="):
        load(tmp_path / "m")
    with pytest.raises(ValueError, match="must hold the architecture of this Foreign, got a difference in 'c"):
        load(tmp_path / "m", model=Foreign(extra=True))
    with pytest.raises(ValueError, match="model must be a Foreign, as in .*m.safetensors, got a DEQ"):
        load(tmp_path / "m", model=make("DEQ"))


class Shared(nn.Module):
    """One convolution in two places, and two layers with one bias between them."""

    def __init__(self, width=10, shared=True):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head, self.tail, self.last = nn.Conv2d(2, width, 1), nn.Conv2d(width, 2, 1), nn.Conv2d(2, 2, 1)
        self.blocks = nn.ModuleList(
            [block, block if shared else nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))]
        )
        if shared:
            self.last.bias = self.tail.bias

    def forward(self, x):
        x = self.head(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.last(self.tail(x))


def test_shared_layers_and_parameters_stay_shared(tmp_path):
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(1, 2, 9, 9)
    thin = prune(model, 0.40, priors=[(model, x, [model.tail, model.last])])
    save(thin, tmp_path / "m")
    back, fresh = load(tmp_path / "m", model=Shared()), randomize(thin, 0, build=Shared).eval()
    assert torch.equal(back(x), thin(x)) and fresh(x).shape == x.shape and not torch.equal(fresh(x), thin(x))
    for network in (thin, back, fresh):
        assert network.blocks[0] is network.blocks[1] and network.blocks[0][0].out_channels == 6
        assert network.blocks[1][0].weight.shape == (6, 6, 3, 3) and network.blocks[1][1].running_mean.shape == (6,)
        assert network.last.bias is network.tail.bias
        assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in thin.parameters())


def test_a_shared_layer_does_not_take_two_different_ones(tmp_path):
    torch.manual_seed(0)
    save(Shared(shared=False), tmp_path / "m")
    with pytest.raises(
        ValueError, match="must hold equal values for '(blocks|last).*' and '.*', one parameter of this Shared"
    ):
        load(tmp_path / "m", model=Shared())
    save(Shared(), tmp_path / "n")
    x, apart = (
        torch.randn(1, 2, 9, 9),
        load(tmp_path / "n", model=Shared(shared=False)),
    )  # the other way round nothing is lost
    assert torch.equal(apart(x), load(tmp_path / "n", model=Shared())(x))


def test_layer_norm_and_group_norm(tmp_path):
    torch.manual_seed(0)
    for make_network, x, after in (
        (lambda: nn.Sequential(nn.Linear(3, 10), nn.LayerNorm(10), nn.Linear(10, 2)), torch.randn(4, 3), 6),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 1, 1)),
            torch.randn(2, 1, 6, 6),
            8,
        ),
    ):
        model = make_network().eval()
        thin = prune(model, 1 - after / model[0].weight.shape[0], priors=[(model, x, [model[2]])])
        save(thin, tmp_path / "m")
        back = load(tmp_path / "m", model=make_network())
        assert back[1].weight.shape == (after,) and torch.equal(back(x), thin(x))
        assert read_checkpoint(tmp_path / "m")[1]["widths"] == layer_widths(back)
    assert layer_widths(nn.Sequential(nn.LayerNorm((3, 5)))) == {"0": {"normalized_shape": [3, 5]}}


def test_another_architecture(tmp_path):
    save(make("VarNet"), tmp_path / "m")
    with pytest.raises(ValueError, match="must hold the architecture of this VarNet"):
        load(tmp_path / "m", model=VarNet(num_cascades=3, channels=5, num_pools=2))


def test_provenance_may_hold_paths_arrays_and_any_name(tmp_path):
    path = save(
        make("DEQ"),
        tmp_path / "m",
        source=Path("data/a.h5"),
        scores=torch.tensor([1.5, 2.0]),
        model="teacher",
        path="elsewhere",
    )
    expected = {"source": str(Path("data/a.h5")), "scores": [1.5, 2.0], "model": "teacher", "path": "elsewhere"}
    assert path == tmp_path / "m.safetensors" and read_checkpoint(path)[1]["provenance"] == expected
    assert isinstance(load(path), DEQ)
    with pytest.raises(TypeError, match="value must be JSON, a path, an array or a tensor, got {"):
        save(make("DEQ"), tmp_path / "n", source={1})
    assert not (tmp_path / "n.safetensors").exists()


def test_weights_alone_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be an nn.Module, got a OrderedDict"):
        save(make("DEQ").state_dict(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_another_format_is_refused_and_a_missing_one_is_not(tmp_path):
    save(make("DEQ"), tmp_path / "m")
    tensors, description = read_checkpoint(tmp_path / "m")
    save_file(
        tensors, str(tmp_path / "new.safetensors"), metadata={"spade": json.dumps(description | {"format": "spade-2"})}
    )
    with pytest.raises(ValueError, match="new.safetensors must have format 'spade-1', got 'spade-2'"):
        load(tmp_path / "new")
    del description["format"]
    save_file(tensors, str(tmp_path / "old.safetensors"), metadata={"spade": json.dumps(description)})
    assert isinstance(load(tmp_path / "old"), DEQ)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.safetensors"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_file(tmp_path, length):
    save(make("DEQ"), tmp_path / "m")
    file = tmp_path / "m.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(tmp_path / "m")


def test_file_without_a_description(tmp_path):
    save_file({"w": torch.zeros(1)}, str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="got a header without a description"):
        load(tmp_path / "m")
    torch.save(make("DEQ").state_dict(), tmp_path / "p.safetensors")  # a pickle is never opened
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(tmp_path / "p")


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    old = make("DEQ")
    save(old, tmp_path / "m")

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spade.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(make("DEQ", seed=1), tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").denoiser.head.weight, old.denoiser.head.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


SCRIPT = """
import sys, time
import spade.checkpoint as c
from spade.models import DEQ
def slowly(tensors, path, metadata):
    open(path, "wb").write(b"half of it"); open({started!r}, "w").close(); time.sleep(600)
c.save_file = slowly
c.save(DEQ(features=4, num_blocks=1), {path!r})
"""


def test_kill_while_saving_keeps_the_old_checkpoint(tmp_path):
    old = make("DEQ")
    save(old, tmp_path / "m")
    code = SCRIPT.format(started=str(tmp_path / "started"), path=str(tmp_path / "m"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.equal(load(tmp_path / "m").denoiser.head.weight, old.denoiser.head.weight)
