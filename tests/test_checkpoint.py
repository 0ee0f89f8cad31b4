"""Checkpoints: bit-identical round trips, pruned widths, foreign networks, kills, full disks, and damaged files."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

import spade.checkpoint
from spade.checkpoint import MARK, digest_of, layer_sizes, load, read_checkpoint, save
from spade.models import DEQ, E2EVarNet, USRNet, VarNet
from spade.operators import MultiCoilMRI, normalize_maps
from spade.pruning import count_parameters, prune
from spade.random_baseline import randomize

pytestmark = pytest.mark.filterwarnings("ignore:relative step of the DEQ")  # untrained, with four iterations

NETWORKS = {
    "DEQ": lambda: DEQ(features=10, num_blocks=1, max_iterations=4, alpha=0.3),
    "VarNet": lambda: VarNet(num_cascades=2, channels=5, num_pools=2),
    "E2EVarNet": lambda: E2EVarNet(num_cascades=1, channels=5, num_pools=2, sens_channels=3, sens_num_pools=2),
}


def widths(model: nn.Module) -> dict:
    """The sizes of all layers; not those of the network itself, such as the iterations of the last search."""
    return {name: sizes for name, sizes in layer_sizes(model).items() if name}


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
        and widths(back) == widths(model)
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


def test_one_file_holds_everything(tmp_path):
    save(prune(make("VarNet"), 0.40), tmp_path / "m", seed=3, data={"train": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    header = read_checkpoint(tmp_path / "m")[1]
    assert header.model == "VarNet" and header.provenance == {"seed": 3, "data": {"train": 5}}
    assert header.config["num_cascades"] == 2


def test_shipped_teachers_hold_their_description():
    for path in sorted((Path(spade.checkpoint.__file__).parent / "assets" / "teachers").iterdir()):
        assert path.suffix == ".safetensors"
        assert {"commit", "versions", "device", "run"} <= set(read_checkpoint(path)[1].provenance)
        assert sum(p.numel() for p in load(path).parameters()) == read_checkpoint(path)[1].parameters


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
    back = load(tmp_path / "m", build=lambda: skeleton)
    assert torch.equal(back(x), thin(x)) and back.d.groups == 4 and skeleton.d.groups == 8
    with pytest.raises(
        ValueError, match="holds a Foreign from outside spade.models .DEQ, VarNet, E2EVarNet.*pass build="
    ):
        load(tmp_path / "m")
    with pytest.raises(ValueError, match="must fit the architecture of this Foreign, got a difference in 'c"):
        load(tmp_path / "m", build=lambda: Foreign(extra=True))
    with pytest.raises(ValueError, match="build must make a Foreign, as in .*m.safetensors, got a DEQ"):
        load(tmp_path / "m", build=lambda: make("DEQ"))


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
    back, fresh = load(tmp_path / "m", build=Shared), randomize(thin, 0, build=Shared).eval()
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
        load(tmp_path / "m", build=Shared)
    save(Shared(), tmp_path / "n")
    x, apart = (
        torch.randn(1, 2, 9, 9),
        load(tmp_path / "n", build=lambda: Shared(shared=False)),
    )  # the other way round nothing is lost
    assert torch.equal(apart(x), load(tmp_path / "n", build=Shared)(x))


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
        back = load(tmp_path / "m", build=make_network)
        assert back[1].weight.shape == (after,) and torch.equal(back(x), thin(x))
        assert read_checkpoint(tmp_path / "m")[1].sizes == layer_sizes(back)
    assert layer_sizes(nn.Sequential(nn.LayerNorm((3, 5)))) == {"0": {"normalized_shape": [3, 5]}}


def test_another_architecture(tmp_path):
    save(make("VarNet"), tmp_path / "m")
    with pytest.raises(ValueError, match="must fit the architecture of this VarNet"):
        load(tmp_path / "m", build=lambda: VarNet(num_cascades=3, channels=5, num_pools=2))


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
    assert path == tmp_path / "m.safetensors" and read_checkpoint(path)[1].provenance == expected
    assert isinstance(load(path), DEQ)
    with pytest.raises(TypeError, match="value must be JSON, a path, an array or a tensor, got {"):
        save(make("DEQ"), tmp_path / "n", source={1})
    assert not (tmp_path / "n.safetensors").exists()


def test_weights_alone_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be an nn.Module, got a OrderedDict"):
        save(make("DEQ").state_dict(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


NO_NAMES = {
    "None": (None, TypeError, "must be a str or Path, got None."),
    "number": (3, TypeError, "must be a str or Path, got 3."),
    "list": (["m"], TypeError, "must be a str or Path, got ['m']."),
    "bytes": (b"m", TypeError, "must be a str or Path, got b'm'."),
    "empty": ("", ValueError, "must name a file or folder, got ''."),
    "zero byte": ("a\0b", ValueError, r"must name a file or folder, got 'a\x00b'."),
    "long name": ("a" * 300, ValueError, "must have file names of at most 255 bytes, got 300: aaa"),
    "long with its ending": ("a" * 250, ValueError, "must have file names of at most 255 bytes, got 262: aaa"),
    "long path": ("b" * 200 + "/b" * 2000, ValueError, "must have at most 4000 bytes, got 4200: bbb"),
}


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_can_be_no_file_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, error, sentence = NO_NAMES[name]
    for call in (load, spade.export.describe, lambda path: save(make("DEQ"), path)):
        with pytest.raises(error, match=re.escape(f"path {sentence}")):
            call(path)
    if "ending" not in name:
        with pytest.raises(error, match=re.escape(f"folder {sentence}"[:40])):
            spade.hub.save_folder(make("DEQ"), path)
        for argument in ("raw", "out"):
            with pytest.raises(error, match=re.escape(f"{argument} {sentence}"[:40])):
                spade.convert.convert(**{"raw": "raw.h5", "out": "out.h5", argument: path})
        with pytest.raises(error, match=re.escape(f"out {sentence}"[:40])):
            spade.reconstruct(make("DEQ"), ["scan.h5"], path)
        if name != "list":  # which is one of files
            with pytest.raises(error, match="files must "):
                spade.reconstruct(make("DEQ"), path, "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "ended.safetensors").mkdir()
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    for path in (f"{tmp_path}/folder/", "missing/", ".", "..", f"{tmp_path}/ended", Path()):
        with pytest.raises(IsADirectoryError, match="^path must be a file, got the folder .*[.d/]"):
            save(make("DEQ"), path)
    sentence = "^path must lie in a folder, got .*.safetensors in the file .*file.$"
    with pytest.raises(NotADirectoryError, match=sentence):
        save(make("DEQ"), tmp_path / "file" / "m")
    with pytest.raises(NotADirectoryError, match=sentence):
        spade.hub.save_folder(make("DEQ"), tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="^out must be a folder, got the file .*file.$"):
        spade.reconstruct(make("DEQ"), ["scan.h5"], tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="^no checkpoint at .*folder/model.safetensors.$"):
        load(tmp_path / "folder")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text(encoding="utf-8") == "kept"


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


# Files that were damaged, and files that lie: their digest is right


def forge(path: Path, change, tensors=None) -> None:
    """Write `path` again with a changed description, or text in its place, changed tensors, and the right digest."""
    old, description = read_checkpoint(path)
    values = description.model_dump() | {"sha256": "0" * 64}
    changed = change(values)
    text = changed if isinstance(changed, str) else json.dumps(values, separators=(",", ":"))
    save_file(old if tensors is None else tensors(old), str(path), metadata={"spade": text})
    content = bytearray(path.read_bytes())
    if MARK in content:
        start, digest = digest_of(content)
        content[start : start + 64] = digest.encode()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def thin_varnet():
    return prune(make("VarNet"), 0.40)


@pytest.fixture
def saved(tmp_path, thin_varnet):
    return save(thin_varnet, tmp_path / "m", seed=1)


def refused(path: Path, build=None) -> str:
    """The one sentence of `load`; it takes less than 3 s of computing and less than 50 MB."""
    process, began = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    with pytest.raises(ValueError) as caught:
        load(path, build)
    assert time.process_time() - began < 3 and process.memory_info().rss - before < 50e6
    message = str(caught.value)
    assert type(caught.value) is ValueError and "m.safetensors" in message and message.endswith(".")
    assert "\n" not in message and len(message) < 500
    return message


def test_a_forged_file_without_a_change_loads(saved):
    forge(saved, lambda d: None)
    assert isinstance(load(saved), VarNet)


def test_a_description_without_a_place_for_the_digest_is_refused(saved):
    """With blanks after the colons, as json.dumps writes by default, the digest stands nowhere."""
    forge(saved, lambda values: json.dumps(values))
    assert "must have the SHA-256 in its header" in refused(saved)


def test_every_single_bit_fault_is_noticed(tmp_path):
    path = save(DEQ(features=2, num_blocks=1), tmp_path / "m", note="Z\u00fcrich")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(int(os.environ.get("SPADE_FAULT_SEED", "0")))
    stretches = ((8 * 200, 8 * header), (8 * header, 8 * len(content)))
    bits = {*range(8 * 200)}.union(*(generator.integers(*stretch, 1000).tolist() for stretch in stretches))
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="m.safetensors"):
            load(path)
    path.write_bytes(content)
    assert isinstance(load(path), DEQ)


def put(*keys, value):
    """A change of the description: the value at these keys."""

    def change(description):
        for key in keys[:-1]:
            description = description[key]
        description[keys[-1]] = value

    return change


HEAD = ("sizes", "cascades.0.model.unet.conv.layers.0")
LIES = {
    "num_cascades": (put("config", "num_cascades", value=10**9), "config.num_cascades.*number up to 1,000,000"),
    "num_cascades below a million": (put("config", "num_cascades", value=10**6), "num_cascades=1000000"),
    "many cascades": (put("config", "num_cascades", value=30), "more than .* parameters"),
    "num_pools": (put("config", "num_pools", value=60), "num_pools=60"),
    "wide": (put("config", "channels", value=10**6), "channels .* of .*, which has"),
    "negative": (put("config", "channels", value=-5), "negative"),
    "fractional": (put("config", "num_pools", value=1.5), "float"),
    "unknown argument": (put("config", "colour", value=1), "colour"),
    "NaN": (put("config", "num_pools", value=float("nan")), "number up to"),
    "nested argument": (put("config", "num_pools", value=[[1]]), "number up to"),
    "other argument": (put("config", "num_cascades", value=1), "difference in 'cascades.1"),
    "no arguments": (put("config", value=None), "pass build="),
    "arguments that are a list": (put("config", value=[1, 2]), "config must be a valid dict"),
    "missing config": (lambda d: d.pop("config") and None, "config is missing"),
    "missing sizes": (lambda d: d.pop("sizes") and None, "sizes is missing"),
    "missing model": (lambda d: d.pop("model") and None, "model is missing"),
    "another key": (put("code", value="import os"), "unknown key 'code'"),
    "missing argument": (lambda d: d["config"].pop("num_pools") and None, "none for num_pools|difference in"),
    "unknown class": (put("model", value="ResNet"), "holds a ResNet from outside spade.models"),
    "a class that is code": (put("model", value="os.system('ls')"), "model"),
    "another class": (put("model", value="DEQ"), "config must build a DEQ"),
    "older version": (put("format", value="spade-1"), "must have format 'spade-2', got 'spade-1'"),
    "newer version": (put("format", value="spade-3"), "must have format 'spade-2', got 'spade-3'"),
    "no version": (lambda d: d.pop("format") and None, "must have format 'spade-2', got None"),
    "list": (lambda d: "[1, 2]", "must have format 'spade-2', got a list"),
    "no JSON": (lambda d: "widths", "must hold its description as JSON"),
    "deep": (lambda d: "[" * 100_000, "must hold its description as JSON, got recursion"),
    "negative width": (put(*HEAD, "out_channels", value=-3), "out_channels -3 of .*, which has 20"),
    "fractional width": (put(*HEAD, "out_channels", value=3.5), "out_channels.* must be a valid integer, got 3.5"),
    "zero width": (put(*HEAD, "out_channels", value=0), "out_channels 0"),
    "wide layer": (put(*HEAD, "out_channels", value=10**9), "out_channels 1000000000"),
    "width of other tensors": (put(*HEAD, "out_channels", value=11), "whose sizes give .11"),
    "groups": (put(*HEAD, "groups", value=3), "groups 3"),
    "stride": (put(*HEAD, "stride", value=[2, 2]), "stride .2, 2. of .*, which has .1, 1."),
    "absent width": (lambda d: d["sizes"][HEAD[1]].pop("out_channels") and None, "'out_channels' among the sizes"),
    "absent layer": (lambda d: d["sizes"].pop(HEAD[1]) and None, "among the sizes"),
    "unknown layer": (put("sizes", "nowhere", value={"a": 1}), "difference in 'nowhere'"),
    "forward": (put(*HEAD, "forward", value=1), "'forward' among the sizes"),
    "method of the network": (put("sizes", "", value={"refine": 1}), "'refine' among the sizes"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_description_that_lies_is_refused(saved, name):
    change, message = LIES[name]
    forge(saved, change)
    assert re.search(message, found := refused(saved)), found


FIRST = "cascades.0.model.unet.conv.layers.0.weight"
TENSORS = {
    "NaN": (
        lambda t: t | {FIRST: t[FIRST] * float("nan")},
        "weight' in .* must be finite, got NaN or infinity in 648 of 648",
    ),
    "one infinity": (
        lambda t: t | {"cascades.1.dc_weight": torch.tensor([float("inf")])},
        "dc_weight' in .* must be finite, got NaN or infinity in 1 of 1 ",
    ),
    "integers": (lambda t: t | {FIRST: t[FIRST].int()}, "got 'casc.*int32 .* for float32"),
    "complex": (lambda t: t | {FIRST: t[FIRST].to(torch.complex64)}, "complex64 .* for float32"),
    "narrower": (lambda t: t | {FIRST: t[FIRST][:-1].clone()}, "weight .* whose sizes give"),
    "flat": (lambda t: t | {FIRST: t[FIRST].flatten()}, "weight .* whose sizes give"),
    "longer": (lambda t: t | {"cascades.1.dc_weight": torch.ones(5)}, r"float32 \[5\] for float32 \[1\]"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != FIRST}, "difference in 'cascades.0"),
    "more": (lambda t: t | {"a/../../b": torch.ones(1)}, "difference in 'a/../../b'"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_network_are_refused(saved, name):
    change, message = TENSORS[name]
    forge(saved, lambda d: None, change)
    assert re.search(message, found := refused(saved)), found


@pytest.mark.parametrize("name", NETWORKS | {"USRNet": 0})
def test_no_argument_of_a_network_makes_loading_slow(tmp_path, name):
    model = USRNet(iterations=2, widths=[4, 4, 4, 4], blocks=1, hypanet_channels=4) if name == "USRNet" else make(name)
    for key, old in model.config().items():
        for value in (10**6, [10**6] * 4 if isinstance(old, list) else 10**5):
            path = save(model, tmp_path / "m")
            forge(path, put("config", key, value=value))
            began = time.process_time()
            try:  # accepted where it is no size, such as max_iterations
                assert sum(p.numel() for p in load(path).parameters()) == sum(p.numel() for p in model.parameters())
            except ValueError as error:
                assert str(path) in str(error)
            assert time.process_time() - began < 3, key


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = make("DEQ")
    with torch.no_grad():
        model.denoiser.head.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'denoiser.head.weight' of DEQ must be finite, got NaN or infinity in 1 of "):
        save(model, tmp_path / "m")
    model = Foreign()
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))  # of attention, for example
    assert load(save(model, tmp_path / "m"), build=lambda: copy.deepcopy(model)).mask[1] == -float("inf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_loaded_network_does_not_depend_on_its_file(saved):
    model = load(saved)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with saved.open("r+b") as file:  # in place, then shorter
        file.write(b"\0" * saved.stat().st_size)
        file.truncate(10)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(*measurement())


def test_a_link_out_of_the_folder_is_refused(saved):
    folder = saved.parent / "downloaded"
    folder.mkdir()
    (folder / "m.safetensors").symlink_to(saved)
    with pytest.raises(ValueError, match="must be a file in its folder, got a link to .*m.safetensors; pass that path"):
        load(folder / "m")
    (saved.parent / "latest.safetensors").symlink_to(saved)  # inside its folder
    assert isinstance(load(saved.parent / "latest"), VarNet)
    with pytest.raises(FileNotFoundError):
        load(folder)


class Split(nn.Module):
    """Sizes outside PyTorch's layers: parts of a split, channels of a view, a bare parameter, a counter."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2 * width, 1), nn.Conv2d(width, 1, 1)
        self.parts, self.width, self.calls = (width, width), width, 0
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x):
        self.calls += 1
        a, b = self.first(x).split(self.parts, dim=1)
        return self.last((a * b).view(len(x), self.width, *x.shape[2:]) * self.scale)


def thin_split() -> Split:
    thin = Split()
    thin.first, thin.last, thin.parts, thin.width = nn.Conv2d(1, 10, 1), nn.Conv2d(5, 1, 1), (5, 5), 5
    thin.scale = nn.Parameter(torch.rand(1, 5, 1, 1))
    return thin


def test_sizes_of_own_modules_are_applied(tmp_path):
    thin, x = thin_split(), torch.randn(2, 1, 6, 6)
    thin(x)  # counts
    back = load(save(thin, tmp_path / "m"), build=Split)
    assert back.parts == (5, 5) and back.width == 5 and back.calls == 0 and torch.equal(back(x), thin(x))


def test_a_class_of_the_same_name_is_not_that_of_the_package(tmp_path):
    other = type("DEQ", (Foreign,), {})
    save(other(), tmp_path / "m")
    assert "holds a DEQ from outside spade.models" in refused(tmp_path / "m.safetensors")
    assert type(load(tmp_path / "m", build=other)) is other


@pytest.mark.parametrize("build", [Foreign(), 3, lambda: None, lambda: Foreign().state_dict()])
def test_build_must_be_a_function_that_makes_a_network(tmp_path, build):
    save(Foreign(), tmp_path / "m")
    with pytest.raises(TypeError, match="build must be a function that makes an unpruned Foreign, got"):
        load(tmp_path / "m", build=build)


def test_building_keeps_the_random_numbers_of_the_caller(tmp_path):
    save(Foreign(), tmp_path / "m")
    state = torch.random.get_rng_state()
    load(tmp_path / "m", build=Foreign)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_state_of_the_networks_is_in_their_state_dict():
    for name in NETWORKS:  # `load` builds them without memory
        model = make(name)
        assert {n for n, _ in (*model.named_parameters(), *model.named_buffers())} == set(model.state_dict())


ZOO = [
    "U-Net, group(4) norm",
    "WDSR x2 (weight norm)",
    "IMDN (split by stored sizes)",
    "NAFNet",
    "ShuffleNet (channel shuffle)",
    "ResNeXt (grouped convolutions)",
    "time embedding by a table",
    "FNO (complex spectral weights)",
    "LSTM over frames",
    "SwinIR (window attention)",
    "Transformer encoder (ViT)",
    "unrolled cascade (untied)",
]


@pytest.mark.parametrize("name", ZOO)
def test_everything_that_prune_changes_is_saved(tmp_path, name):
    build = zoo.ZOO[name][0]
    torch.manual_seed(0)
    model, inputs = build()
    thin = prune(model.eval(), 0.40, inputs=inputs).eval()
    back = load(save(thin, tmp_path / "m"), build=lambda: build()[0])
    for expected, found in zip(zoo.outputs(thin, inputs), zoo.outputs(back, inputs), strict=True):
        assert torch.equal(expected, found)
    assert widths(back) == widths(thin) and count_parameters(back) < count_parameters(model)
