"""The training loop: kills, interruptions, bit-exact resuming, the folder of another run, non-finite losses, data."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset

import spade.finetuning
from spade.basics import own_randomness
from spade.finetuning import finetune, native_precision, train
from spade.losses import Strategy, l1, make_strategy, ssim_l1_loss
from spade.models import DEQ, DivergenceError, E2EVarNet, VarNet
from spade.operators import MultiCoilMRI, normalize_maps
from spade.pruning import prune
from spade.training import FrozenSettings, Training, epoch_batches, read_settings


class Batch(NamedTuple):
    y: torch.Tensor
    A: nn.Module
    x: Any
    info: dict


def item(seed: int, width: int = 16) -> dict:
    g = torch.Generator().manual_seed(seed)
    maps = normalize_maps(torch.randn(1, 2, 16, width, dtype=torch.complex64, generator=g))[0]
    return dict(
        x=torch.randn(1, 16, width, dtype=torch.complex64, generator=g),
        maps=maps,
        mask=(torch.arange(width) + 2) % 3 < 2,
        number=seed,
    )


def collate(items: list[dict]) -> Batch:
    A = MultiCoilMRI(items[0]["mask"], torch.stack([i["maps"] for i in items]))
    x = torch.stack([i["x"] for i in items])
    return Batch(A(x), A, x, {"number": [i["number"] for i in items]})


def batches(count: int = 3) -> list[Batch]:
    return [collate([item(seed)]) for seed in range(count)]


class Slices(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return item(i)


class TinyCNN(nn.Module):
    """Zero-filled image plus a learned correction, with dropout: the loop must make that repeatable, too."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(8, 2, 3, padding=1)
        )

    def forward(self, y, A):
        z = A.adjoint(y)
        out = self.cnn(torch.cat([z.real, z.imag], 1)).float()
        return z + torch.complex(out[:, :1], out[:, 1:])


def tiny(seed: int = 0) -> TinyCNN:
    torch.manual_seed(seed)
    return TinyCNN()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fit(model, steps, strategy="supervised", data=None, **settings):
    settings = dict(learning_rate=1e-3, progress=False) | settings
    return train(
        model, batches() if data is None else data, make_strategy(strategy, teacher=tiny(1)), steps=steps, **settings
    )


def fitted(steps, **settings):
    model = tiny()
    fit(model, steps, **settings)
    return weights(model)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(strategy="school"),
        dict(strategy="self-supervised"),
        dict(accumulate=2),
        dict(clip=0.1),
        dict(mixed_precision="bf16"),
        dict(validate=lambda m: -weights(m).norm().item(), validate_every=2, keep_best=True),
    ],
)
def test_resumed_run_ends_with_the_same_weights_bit_by_bit(tmp_path, settings):
    undisturbed = fitted(8, folder=tmp_path / "a", **settings)
    fitted(5, folder=tmp_path / "b", **settings)
    assert torch.equal(fitted(8, folder=tmp_path / "b", **settings), undisturbed)
    assert torch.equal(fitted(8, **settings), undisturbed)  # with no folder at all


@pytest.mark.parametrize("gpu, gives", ((None, None), ((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "no")))
@pytest.mark.parametrize("found, expected", (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512_f", "no")))
def test_auto_is_bfloat16_where_the_device_has_instructions_for_it(monkeypatch, gpu, gives, found, expected):
    """A GPU, of this compute capability, counts before the processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {found: True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    assert native_precision() == (gives or expected)


def test_auto_is_single_precision_with_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_precision() == "no"


def test_auto_trains_as_the_precision_that_it_names(monkeypatch):
    results = {name: fitted(3, mixed_precision=name) for name in ("no", "bf16")}
    assert not torch.equal(*results.values())
    for name, expected in results.items():
        monkeypatch.setattr(spade.finetuning, "native_precision", lambda name=name: name)
        assert torch.equal(fitted(3, mixed_precision="auto"), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resumed_run_reads_a_data_loader_in_the_same_order(tmp_path, shuffle):
    def loader():
        return DataLoader(Slices(), batch_size=2, shuffle=shuffle, collate_fn=collate)

    undisturbed = fitted(8, data=loader())
    fitted(4, data=loader(), folder=tmp_path)
    torch.manual_seed(99)  # the caller's generator decides nothing
    assert torch.equal(fitted(8, data=loader(), folder=tmp_path), undisturbed)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, **shard):
        with own_randomness():
            return [
                b.info["number"]
                for b in epoch_batches(
                    DataLoader(Slices(), batch_size=1, shuffle=True, collate_fn=collate), seed, epoch, **shard
                )
            ]

    assert order(0, 0) == order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 0, start=2) == order(0, 0)[2:]
    assert order(0, 0, rank=1, world=2) == order(0, 0)[1::2]


def test_every_process_gets_as_many_batches_of_a_plain_list():
    with own_randomness():
        shares = [list(epoch_batches([1, 2, 3, 4, 5], seed=0, epoch=0, rank=rank, world=2)) for rank in (0, 1)]
        rest = list(epoch_batches([1, 2, 3, 4, 5], seed=0, epoch=0, start=1, rank=1, world=2))
    assert shares == [[1, 3], [2, 4]] and rest == [4]


@pytest.mark.parametrize("data", ["brain.h5", ["brain.h5"], [Path("brain.h5")]])
def test_file_names_in_place_of_data(data):
    with pytest.raises(TypeError, match="data must be a dataset .* got .*brain.h5"):
        train(nn.Linear(1, 1), data, make_strategy("supervised"), steps=1)


def test_callers_generator_is_left_alone():
    model, strategy, data = tiny(), make_strategy("supervised"), batches()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    train(model, data, strategy, steps=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_training as t
def slow(batch):
    import time; time.sleep({pause}); return batch
class Slowly(list):
    def __iter__(self):
        return (slow(b) for b in super().__iter__())
model = t.tiny()
t.fit(model, 12, data=Slowly(t.batches()), folder={folder!r}, checkpoint_every=2)
torch.save(t.weights(model), {folder!r} + "/end.pt")
"""


def start(folder: Path, pause: float) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), pause=pause)
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "training.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def steps_done(folder: Path) -> int:
    with safe_open(str(folder / "training.safetensors"), framework="pt") as file:
        return len(json.loads(file.metadata()["training"])["log"]["losses"])


def test_killed_run_goes_on_bit_by_bit(tmp_path):
    process = start(tmp_path, pause=0.2)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < steps_done(tmp_path) < 12 and not (tmp_path / "end.pt").exists()
    second = start(tmp_path, pause=0)
    assert second.wait(300) == 0, second.stderr.read()
    second.stderr.close()
    assert torch.equal(torch.load(tmp_path / "end.pt", weights_only=True), fitted(12))


def test_interrupted_run_leaves_a_checkpoint_of_the_step_it_finished(tmp_path):
    process = start(tmp_path, pause=0.3)
    wait_for_checkpoint(tmp_path, process)
    time.sleep(0.35)  # past a checkpointed step
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0 and "KeyboardInterrupt: stopped after step" in error
    done = steps_done(tmp_path)
    assert f"after step {done} of 12" in error
    assert torch.equal(fitted(12, folder=tmp_path), fitted(12))


def test_finished_run_is_not_trained_further(tmp_path):
    first = fitted(4, folder=tmp_path)
    model = tiny()
    log = fit(model, 4, folder=tmp_path)
    assert log.resumed_at == 4 and len(log.losses) == 4 and torch.equal(weights(model), first) and not model.training


def test_interrupted_model_itself_can_go_on(tmp_path):
    model = tiny()
    fit(model, 3, folder=tmp_path)  # now holds the weights of the checkpoint, not those of the start
    fit(model, 6, folder=tmp_path)
    assert torch.equal(weights(model), fitted(6))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(learning_rate=2e-3), "learning_rate was 0.001 and is now 0.002"),
        (dict(strategy="school"), "strategy was"),
        (dict(seed=1), "seed was 0 and is now 1"),
        (dict(data=batches(2)), "batches_per_epoch was 3 and is now 2"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, said):
    fitted(2, folder=tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    with pytest.raises(ValueError, match=said):
        fitted(4, folder=tmp_path, **change)
    assert (tmp_path / "training.safetensors").read_bytes() == before


def test_other_network_weights_and_teacher_are_refused(tmp_path):
    fitted(2, folder=tmp_path)
    with pytest.raises(ValueError, match="network was 'TinyCNN' and is now 'VarNet'"):
        fit(VarNet(num_cascades=1, channels=2, num_pools=1), 4, folder=tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        fit(tiny(7), 4, folder=tmp_path)
    fitted(2, folder=tmp_path / "school", strategy="school")
    with pytest.raises(ValueError, match="teacher.weights was"):
        train(
            tiny(),
            batches(),
            make_strategy("school", teacher=tiny(8)),
            steps=4,
            learning_rate=1e-3,
            folder=tmp_path / "school",
            progress=False,
        )


def test_damaged_checkpoint_is_named(tmp_path):
    fitted(2, folder=tmp_path)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="training.safetensors is damaged or not a training state"):
        fitted(4, folder=tmp_path)


def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    fitted(2, folder=tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spade.finetuning, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fitted(4, folder=tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "training.safetensors"]


class Poisoned(Strategy):
    """Finite until call `at`; then the loss or only its gradient is not finite, or a DEQ diverges."""

    name, needs_ground_truth = "poisoned", True

    def __init__(self, at: int, kind: str):
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, model, batch, generator):
        self.calls += 1
        loss = model(batch.y, batch.A).abs().square().mean()
        if self.calls < self.at:
            return loss
        if self.kind == "diverges":
            raise DivergenceError("ran away")
        if self.kind == "loss":
            return loss * math.nan
        zero = sum(p.sum() for p in model.parameters()) * 0
        return loss + torch.sqrt(zero.clamp_min(0)) * 0  # value finite, derivative of the root at 0 is not


@pytest.mark.parametrize("kind", ["loss", "gradient", "diverges"])
def test_non_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path, kind):
    model = tiny()
    with pytest.raises(FloatingPointError, match="in step 5 at learning rate 0.001"):
        train(
            model,
            batches(),
            Poisoned(5, kind),
            steps=9,
            learning_rate=1e-3,
            folder=tmp_path,
            checkpoint_every=2,
            progress=False,
        )
    good = tiny()
    train(
        good, batches(), Poisoned(99, kind), steps=3, learning_rate=1e-3, progress=False
    )  # the fourth loss was finite: its weights had three updates
    assert torch.equal(weights(model), weights(good))
    assert steps_done(tmp_path) == 4


def test_exploding_learning_rate_is_stopped():
    model = tiny()
    with pytest.raises(FloatingPointError, match=r"at learning rate 1e\+30. The .* lower learning_rate or set clip"):
        fit(model, 20, learning_rate=1e30)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("network", [DEQ, VarNet, E2EVarNet])
@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
@pytest.mark.filterwarnings("ignore:relative step of the DEQ")  # few iterations
def test_every_network_with_every_strategy_and_precision(network, strategy, precision):
    torch.manual_seed(0)
    arguments = (
        dict(features=6, num_blocks=1, max_iterations=6)
        if network is DEQ
        else dict(num_cascades=1, channels=4, num_pools=1)
    )
    arguments |= dict(sens_channels=2, sens_num_pools=1) if network is E2EVarNet else {}
    teacher = network(**arguments)
    student = prune(teacher, 0.40)
    before = weights(student).clone()
    log = finetune(student, batches(2), strategy, teacher=teacher, steps=2, mixed_precision=precision, progress=False)
    assert all(math.isfinite(loss) for loss in log.losses) and not torch.equal(weights(student), before)


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    from spade.data.fastmri import MultiCoilSlices
    from spade.data.phantom import simulate

    folder = tmp_path_factory.mktemp("scans")
    files = simulate(folder, num_subjects=2, slices_per_subject=2, shape=(64, 64), num_coils=4, seed=0, progress=False)
    return MultiCoilSlices(files, acceleration=4, acs_fraction=0.2)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_datasets_of_the_package_resume_bit_by_bit(tmp_path, slices, batch_size):
    undisturbed = fitted(6, data=slices, batch_size=batch_size)
    for steps in (3, 6):
        resumed = fitted(steps, data=slices, batch_size=batch_size, folder=tmp_path)
    assert torch.equal(undisturbed, resumed)
    assert not torch.equal(undisturbed, fitted(6, data=slices, batch_size=batch_size, seed=1))


def test_measurements_without_ground_truth_are_enough_for_school_and_self_supervised(slices):
    for strategy in ("school", "self-supervised"):
        assert torch.equal(
            fitted(3, data=slices.measurements(), strategy=strategy), fitted(3, data=slices, strategy=strategy)
        )
    with pytest.raises(ValueError, match="batch.x must be the ground truth"):
        fitted(3, data=slices.measurements())


def test_foreign_datasets_come_as_data_loaders():
    with pytest.raises(TypeError, match=r"with bucket\(\) and collate\(\), a DataLoader .* got <test_training.Slices"):
        fit(tiny(), 1, data=Slices())


PARALLEL = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_training as t
model = t.tiny()
model.cnn[2].p = 0.0  # dropout draws apart in each process
t.fit(model, 4, data=t.batches(4), folder={folder!r})
torch.save(t.weights(model), {folder!r} + f"/end-{{sys.argv[1]}}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = PARALLEL.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    shared_env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], env={**shared_env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    assert [p.wait(120) for p in processes] == [0, 0]
    ends = [torch.load(tmp_path / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = tiny()
    alone.cnn[2].p = 0.0
    fit(alone, 4, data=batches(4), accumulate=2)
    assert torch.equal(*ends) and torch.allclose(ends[0], weights(alone), atol=1e-6)
    assert not torch.allclose(ends[0], weights(tiny()), atol=1e-4)


LAUNCHED = """
import json, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_training as t
model = t.tiny()
model.cnn[2].p = 0.0  # dropout draws apart in each process
log = t.fit(model, 6, data=t.batches(8), learning_rate=1e-2)
rank = torch.distributed.get_rank()
assert (torch.distributed.get_backend(), torch.distributed.get_world_size()) == ("gloo", 2)
open({folder!r} + f"/curve-{{rank}}.json", "w").write(json.dumps(log.losses))
torch.distributed.destroy_process_group()
"""


def test_accelerate_launch_on_two_processes_gives_the_loss_curve_of_one_with_the_doubled_batch(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(port),
        str(script),
    ]
    # With this variable the processes of the launcher compute on the CPU and use gloo (`--cpu` would need MPI).
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = [json.loads((tmp_path / f"curve-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    alone = tiny()
    alone.cnn[2].p = 0.0
    doubled = [collate([item(2 * pair), item(2 * pair + 1)]) for pair in range(4)]
    single = fit(alone, 6, data=doubled, learning_rate=1e-2).losses
    assert curves[0] == curves[1] and curves[0] == pytest.approx(single, rel=1e-5)
    assert len(single) == 6 and single[4] < 0.99 * single[0], "a curve that moves; step 5 sees the data of step 1 again"


def test_frozen_parameters_stay_and_all_frozen_is_refused():
    model = tiny()
    model.cnn[0].requires_grad_(False)
    before = model.cnn[0].weight.clone()
    fit(model, 2)
    assert torch.equal(model.cnn[0].weight, before) and not torch.equal(model.cnn[3].weight, tiny().cnn[3].weight)
    with pytest.raises(ValueError, match="model must have a trainable parameter, got a TinyCNN"):
        fit(model.requires_grad_(False), 2)


def test_validation_keeps_the_best_and_never_trains_on_it():
    scores = iter([1.0, 3.0, 2.0])
    model, seen = tiny(), []

    def validate(m):
        assert not m.training and not torch.is_grad_enabled()
        seen.append(weights(m).clone())
        return next(scores)

    log = fit(model, 6, validate=validate, validate_every=2, keep_best=True)
    assert log.validation == [(2, 1.0), (4, 3.0), (6, 2.0)] and log.best_step == 4
    assert torch.equal(weights(model), seen[1]) and torch.equal(seen[2], fitted(6))


def test_epochs_and_the_log():
    model = tiny()
    log = train(
        model,
        batches(3),
        make_strategy("supervised"),
        epochs=2,
        learning_rate=1e-3,
        schedule="cosine",
        warmup=2,
        progress=False,
    )
    frame = log.to_frame()
    assert (
        log.steps == 6
        and list(frame.columns) == ["loss", "learning_rate", "seconds", "validation"]
        and frame["learning_rate"].idxmax() == 3
    )


def test_exhausted_iterator_is_named():
    with pytest.raises(ValueError, match="data must yield batches each time they are read, got none in epoch 1"):
        fit(tiny(), 2, data=iter([]))
    with pytest.raises(ValueError, match="each time they are read, got none in epoch 2"):
        fit(tiny(), 4, data=iter(batches(2)))


@pytest.mark.parametrize("length", [dict(), dict(epochs=3), dict(steps=2)])
@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_no_data_is_no_training(strategy, length):
    "An empty log would look like ten epochs that went well."
    model, before = tiny(), weights(tiny())
    with pytest.raises(ValueError, match="data must hold at least one batch for each of 1 processes, got 0"):
        finetune(model, [], strategy, teacher=tiny(1), progress=False, **length)
    assert torch.equal(weights(model), before)


def test_fewer_batches_than_processes(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(ValueError, match="at least one batch for each of 4 processes, got 3"):
        finetune(tiny(), batches(3), "supervised", progress=False)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(steps=2, epochs=2), "either steps or epochs must be given, got steps=2, epochs=2"),
        (dict(), "either steps or epochs must be given"),
        (dict(steps=1, lr=1), "unknown setting 'lr': choose one of steps, learning_rate"),
        (dict(steps=1, loss="l1"), "unknown setting 'loss'"),
        (dict(steps=1, steps_at={0.4: 2}), "unknown setting 'steps_at'"),
        (dict(steps=1, schedule="linear"), "schedule must be 'constant' or 'cosine', got 'linear'"),
        (dict(steps=1, learning_rate=0), "learning_rate must be greater than 0, got 0"),
        (dict(steps=1, learning_rate="fast"), "learning_rate must be a valid number, got 'fast'"),
        (dict(steps=1, learning_rate=True), "learning_rate must be a number, got True"),
        (dict(steps=1.5), "steps must be a valid integer, got 1.5"),
        (dict(steps=True), "steps must be a number, got True"),
        (dict(epochs="3"), "epochs must be a whole number of at least 1, got '3'"),
        (dict(epochs=0), "epochs must be a whole number of at least 1, got 0"),
        (dict(steps=1, clip=-1.0), "clip must be greater than 0, got -1.0"),
        (dict(steps=1, clip=math.nan), "clip must be a finite number, got nan"),
        (dict(steps=1, warmup=-1), "warmup must be greater than or equal to 0, got -1"),
        (dict(steps=1, batch_size=0), "batch_size must be greater than or equal to 1, got 0"),
        (dict(steps=1, mixed_precision="fp8"), "unknown mixed_precision 'fp8': choose one of no, bf16, fp16, auto"),
        (dict(steps=0), "^steps must be greater than or equal to 1, got 0.$"),
        (dict(steps=-1), "^steps must be greater than or equal to 1, got -1.$"),
        (dict(epochs=0), "^epochs must be a whole number of at least 1, got 0.$"),
        (dict(steps=1, num_workers=-1), "^num_workers must be a whole number of at least 0, got -1.$"),
        (dict(steps=1, folder=""), "^folder must name a file or folder, got ''.$"),
        (dict(steps=1, folder="q" * 300), "^folder must have file names of at most 255 bytes, got 300: qqq"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        train(tiny(), batches(), make_strategy("supervised"), **settings)
    if settings and "loss" not in settings:  # without steps, ten epochs; the loss is a setting of finetune
        with pytest.raises(ValueError, match=said):
            finetune(tiny(), batches(), "supervised", **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(folder=3), "^folder must be a str or Path, got 3.$"),
        (dict(folder=["runs"]), "^folder must be a str or Path, got \\['runs'\\].$"),
        (dict(validate="psnr"), "^validate must be a function or None, got 'psnr'.$"),
        (dict(callback=3), "^callback must be a function or None, got 3.$"),
    ],
)
def test_arguments_of_another_type(settings, said):
    with pytest.raises(TypeError, match=said):
        train(tiny(), batches(), make_strategy("supervised"), steps=1, **settings)


def test_a_file_in_place_of_the_folder_of_a_run(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError, match="path must lie in a folder, got .*curve.csv in the file .*run.$"):
        train(tiny(), batches(), make_strategy("supervised"), steps=1, folder=tmp_path / "run", progress=False)


def test_settings_read_numbers_as_yaml_gives_them():
    text = dict(steps="150", learning_rate="1e-3", steps_at={"0.4": "500"}, learning_rate_at={0.4: "2e-3"})
    training = read_settings(Training, text)
    assert training == Training(steps=150, learning_rate=1e-3, steps_at={0.4: 500}, learning_rate_at={0.4: 2e-3})
    assert (training.at(0.40).steps, training.at(0.40).learning_rate) == (500, 2e-3)
    assert (training.at(0.05).steps, training.at(0.05).learning_rate) == (150, 1e-3)
    with pytest.raises(ValueError, match="frozen"):
        training.steps = 3


class Nested(FrozenSettings):
    pretraining: Training


def test_every_wrong_setting_is_named_in_full():
    values = dict(pretraining=dict(steps=0, loss="l7", steps_at={2: 3}))
    with pytest.raises(ValueError) as raised:
        read_settings(Nested, values, name="demo.yaml")
    message = str(raised.value)
    assert "demo.yaml.pretraining.steps must be greater than or equal to 1, got 0." in message
    assert "demo.yaml.pretraining.loss: unknown loss 'l7': choose one of smooth_l1" in message
    assert "demo.yaml.pretraining.steps_at.2" in message and "must be less than 1, got 2." in message
    with pytest.raises(
        ValueError, match="demo.yaml.pretraining: unknown key 'step': choose one of steps, .*did you mean steps"
    ):
        read_settings(Nested, dict(pretraining=dict(step=1)), name="demo.yaml")
    with pytest.raises(ValueError, match="demo.yaml.pretraining.steps is missing"):
        read_settings(Nested, dict(pretraining=dict()), name="demo.yaml")
    with pytest.raises(ValueError, match="demo.yaml.pretraining is missing"):
        read_settings(Nested, dict(), name="demo.yaml")


def test_bad_strategy():
    with pytest.raises(ValueError, match="unknown strategy 'homework': choose one of"):
        finetune(tiny(), batches(), "homework")
    with pytest.raises(TypeError, match="teacher must be the network before pruning"):
        finetune(tiny(), batches(), "school")


def test_finetune_hands_every_setting_to_the_strategy_and_refuses_those_of_another(tmp_path):
    def kept(**settings):
        folder = tmp_path / "-".join(settings)
        finetune(
            tiny(),
            batches(2),
            "self-supervised",
            steps=1,
            learning_rate=1e-3,
            folder=folder,
            progress=False,
            **settings,
        )
        with safe_open(str(folder / "training.safetensors"), framework="pt") as file:
            return json.loads(file.metadata()["training"])["settings"]

    choices = dict(rotations="right", rotate_maps=True, weight=0.5, detach=True, flips=True)
    assert {name: kept(**choices)[name] for name in choices} == choices and "flips" not in kept(rotations="right")
    with pytest.raises(ValueError, match="unknown loss of strategy self-supervised 'l1': choose one of fidelity"):
        finetune(tiny(), batches(2), "self-supervised", loss="l1", steps=1)
    with pytest.raises(
        ValueError, match="unknown setting of strategy school 'rotations': choose one of loss, remember"
    ):
        finetune(tiny(), batches(2), "school", teacher=tiny(1), rotations="right", steps=1)


class Own(Slices):
    """A dataset with what spade.basics.loader asks for, and no more."""

    def bucket(self, i):
        return (16,)

    def collate(self, items):
        return collate(items)


def test_a_dataset_that_the_loader_accepts_can_be_trained_on():
    from spade.basics import loader

    assert len(list(loader(Own(), batch_size=2))) == 3
    assert len(fit(tiny(), 3, data=Own(), batch_size=2).losses) == 3
    assert torch.equal(fitted(6, data=Own()), fitted(6, data=Own()))


def test_four_plain_values_are_a_batch():
    plain = [tuple(b) for b in batches()]
    assert torch.equal(fitted(3, data=plain), fitted(3)) and torch.equal(
        fitted(3, data=plain, strategy="school"), fitted(3, strategy="school")
    )


@pytest.mark.parametrize(
    "data, said",
    [
        (
            lambda: [tuple(batches(1)[0])[:3]],
            r"data must yield Batch\(y, A, x, info\) or pairs .*, got a tuple of length 3",
        ),
        (lambda: [batches(1)[0].y], "got a Tensor"),
        (lambda: [batches(1)[0]._asdict()], "got a dict"),
        (lambda: tuple(batches(1)[0]), "got a Tensor"),
        (lambda: batches(1)[0], r"data must be a dataset .* or a list of batches, got Batch\(y="),
        (lambda: None, "data must be a dataset .* a DataLoader or a list of batches, got None"),
        (lambda: 3, "data must be a dataset .* a DataLoader or a list of batches, got 3"),
    ],
)
@pytest.mark.parametrize("strategy", ["supervised", "self-supervised"])
def test_what_is_no_batch_is_named(data, said, strategy):
    with pytest.raises(TypeError, match=said):
        finetune(tiny(), data(), strategy, steps=1, progress=False)


def test_paths_in_place_of_networks():
    with pytest.raises(TypeError, match="teacher must be the network before pruning .* got 'teacher.safetensors'"):
        finetune(tiny(), batches(), "school", teacher="teacher.safetensors", steps=1)
    with pytest.raises(TypeError, match="model must be a network, .* got 'student.safetensors'"):
        finetune("student.safetensors", batches(), "supervised", steps=1)


@pytest.mark.parametrize(
    "strategy, field, said",
    [
        ("supervised", "y", "measurement y"),
        ("self-supervised", "y", "measurement y"),
        ("school", "y", "measurement y"),
        ("supervised", "x", "reference x"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite_are_blamed_and_not_the_learning_rate(strategy, field, said, value):
    bad = batches()
    bad[1] = bad[1]._replace(**{field: bad[1]._asdict()[field].clone()})
    bad[1]._asdict()[field][0, 0, 3, 3] = value
    model = tiny()
    with pytest.raises(
        ValueError,
        match=rf"{said} must be finite, got NaN or infinity in .*, in a batch of step 2, info .*'number': \[1\]",
    ) as raised:
        fit(model, 3, data=bad, strategy=strategy)
    assert "learning_rate" not in str(raised.value) and torch.equal(
        weights(model), weights(tiny())
    )  # those of the last finite loss


def test_a_batch_stays_where_it_is_when_it_is_moved():
    from spade.basics import move

    batch = batches(1)[0]
    moved = move(batch, torch.device("meta"))
    assert moved.y.is_meta and moved.A.maps.is_meta and moved.A is not batch.A and moved.info == batch.info
    assert (
        not batch.y.is_meta
        and not batch.A.maps.is_meta
        and not batch.A.mask.is_meta
        and torch.equal(batch.A(batch.x), batch.y)
    )
    assert move(batch, torch.device("cpu")).A is batch.A


def test_order_of_a_loader_with_workers_is_the_seeds():
    def order(caller):
        torch.manual_seed(caller)
        with own_randomness():
            return [
                batch.info["number"]
                for batch in epoch_batches(DataLoader(Slices(), shuffle=True, collate_fn=collate, num_workers=1), 0, 0)
            ]

    assert order(1) == order(99) and sorted(map(tuple, order(1))) == [(number,) for number in range(5)]


class Noisy(Slices):
    """A dataset with bucket and collate, whose items draw from torch's generator."""

    def __getitem__(self, i):
        return item(i) | {"x": torch.randn(1, 16, 16, dtype=torch.complex64)}

    def bucket(self, i):
        return (16, 16)

    def collate(self, items):
        return collate(items)


def test_items_that_draw_resume_bit_by_bit(tmp_path):
    undisturbed = fitted(8, data=Noisy())
    fitted(3, data=Noisy(), folder=tmp_path)
    torch.manual_seed(99)
    assert torch.equal(fitted(8, data=Noisy(), folder=tmp_path), undisturbed)


class Unmeasured:
    """Batches that can be read again and again, of unknown number."""

    def __iter__(self):
        return iter(batches(3))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(batches(3))


@pytest.mark.parametrize("data", [Unmeasured(), DataLoader(Endless(), batch_size=None)])
def test_data_without_a_length_resume_past_their_first_pass(tmp_path, data):
    undisturbed = fitted(9, data=data)
    fitted(7, data=data, folder=tmp_path)
    assert torch.equal(fitted(9, data=data, folder=tmp_path), undisturbed)
    with pytest.raises(ValueError, match="data must have a known length if epochs is given"):
        fit(tiny(), None, data=data, epochs=2)


def test_the_same_call_again_returns_the_best_weights_again(tmp_path):
    def run(model, steps):
        scores = iter([1.0, 3.0, 2.0, 1.0])
        log = fit(model, steps, folder=tmp_path, validate=lambda m: next(scores), validate_every=1, keep_best=True)
        return log, weights(model)

    model = tiny()
    log, best = run(model, 3)
    assert log.best_step == 2 and not torch.equal(best, fitted(3))
    again, same = run(model, 3)
    assert again.resumed_at == 3 and torch.equal(same, best)
    assert run(model, 4)[0].steps == 4


def test_settings_of_the_network_itself_belong_to_the_run(tmp_path):
    def deq(**settings):
        torch.manual_seed(0)
        return DEQ(features=4, num_blocks=1, **settings)

    fit(deq(max_iterations=3), 1, folder=tmp_path)
    with pytest.raises(ValueError, match="network.max_iterations was 3 and is now 2"):
        fit(deq(max_iterations=2), 2, folder=tmp_path)
    fit(deq(max_iterations=3), 2, folder=tmp_path)


def plain_error(a, b):
    return (a - b).abs().mean()


@pytest.mark.parametrize("loss", [partial(ssim_l1_loss, weight=0.5), lambda a, b: (a - b).abs().mean(), nn.MSELoss()])
def test_a_loss_without_a_name_cannot_be_resumed(tmp_path, loss):
    if not isinstance(loss, nn.Module):  # nn.MSELoss takes no complex image
        assert finetune(tiny(), batches(), "supervised", loss=loss, steps=1, progress=False).steps == 1
    with pytest.raises(ValueError, match="loss must be a function with a name if folder is given, got"):
        finetune(tiny(), batches(), "supervised", loss=loss, steps=1, folder=tmp_path, progress=False)


def test_another_loss_is_another_run(tmp_path):
    def run(loss, steps):
        return finetune(tiny(), batches(), "supervised", loss=loss, steps=steps, folder=tmp_path, progress=False)

    run(plain_error, 1)
    with pytest.raises(ValueError, match="loss was 'plain_error' and is now 'l1'"):
        run(l1, 2)
    assert run(plain_error, 2).resumed_at == 1


def test_fewer_steps_than_were_done_are_refused(tmp_path):
    fit(tiny(), 6, folder=tmp_path)
    with pytest.raises(ValueError, match="steps must be at least 6, as many as .*training.safetensors holds, got 3"):
        fit(tiny(), 3, folder=tmp_path)


def test_a_score_there_is_none_of():
    with pytest.raises(ValueError, match="validate must be a function .* for keep_best and patience, got None"):
        fit(tiny(), 2, keep_best=True)
    with pytest.raises(ValueError, match="validate must return a number, got NaN after step 1"):
        fit(tiny(), 2, validate=lambda model: math.nan, validate_every=1)


class Normed(TinyCNN):
    def __init__(self):
        super().__init__()
        self.cnn.insert(1, nn.BatchNorm2d(8))


def test_statistics_come_back_with_the_weights():
    good, bad = batches(2)
    model = Normed()
    with pytest.raises(ValueError, match="measurement y must be finite"):
        fit(model, 2, data=[good, bad._replace(y=bad.y * math.nan)])
    assert (
        not model.training
        and all(buffer.isfinite().all() for buffer in model.buffers())
        and model(good.y, good.A).isfinite().all()
    )


@pytest.mark.parametrize("gradient", ["implicit", "jacobian-free"])
def test_a_reference_that_is_not_finite_is_blamed_by_every_gradient(gradient):
    (batch,) = batches(1)
    broken = batch.x.clone()
    broken[0, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="reference x must be finite"):
        fit(DEQ(features=4, num_blocks=1, max_iterations=3, gradient=gradient), 1, data=[batch._replace(x=broken)])


@pytest.mark.parametrize(
    "length, settings, expected",
    [(3, {}, [3, 6, 7]), (3, dict(accumulate=2), [1, 2, 3, 4, 5, 6, 7]), (3, dict(checkpoint_every=5), [5, 7])],
)
def test_a_state_is_saved_every_epoch_unless_asked_otherwise(monkeypatch, tmp_path, length, settings, expected):
    saved = []
    monkeypatch.setattr(spade.finetuning.TrainingRun, "save", lambda run: saved.append(run.log.steps))
    fit(tiny(), 7, data=batches(length), folder=tmp_path, **settings)
    assert saved == expected


def test_a_state_is_saved_every_200_updates_of_a_long_epoch(monkeypatch, tmp_path):
    class Long(Unmeasured):
        def __len__(self):
            return 5000

    saved = []
    monkeypatch.setattr(spade.finetuning.TrainingRun, "save", lambda run: saved.append(run.log.steps))
    monkeypatch.setattr(spade.finetuning.Loop, "update", lambda *_: 0.0)
    monkeypatch.setattr(spade.finetuning, "batch_stream", lambda *_: iter(int, 1))
    for data in (Long(), Unmeasured()):
        fit(tiny(), 410, data=data, folder=tmp_path)
    assert saved == [200, 400, 410] * 2


# Data that do not fit


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda x: x[0], r"complex \(1, 16, 16\)"),
        (lambda x: x[:1], r"complex \(1, 1, 16, 16\)"),
        (lambda x: x.expand(-1, 2, -1, -1), r"complex \(2, 2, 16, 16\)"),
        (lambda x: x.abs(), r"real \(2, 1, 16, 16\)"),
    ],
)
@pytest.mark.parametrize("loss", ["smooth_l1", "ssim", plain_error])
def test_a_reference_that_would_be_broadcast_is_refused_before_any_update(change, found, loss):
    batch, model = collate([item(0), item(1)]), tiny()
    said = rf"reference x must have shape and kind of the reconstruction, complex \(2, 1, 16, 16\), got {found}"
    with pytest.raises(ValueError, match=said):
        data = [batch._replace(x=change(batch.x))]
        finetune(model, data, "supervised", loss=loss, steps=1, learning_rate=1e-3, progress=False)
    assert torch.equal(weights(model), weights(tiny()))


class Scaled(TinyCNN):
    """Scales its measurement, as many networks do, and so divides by zero for an empty one."""

    def forward(self, y, A):
        level = y.abs().amax(dim=(1, 2, 3), keepdim=True)
        return super().forward(y / level, A) * level


@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_an_empty_measurement_is_blamed_and_not_the_learning_rate(strategy):
    torch.manual_seed(0)
    model, good, bad = Scaled(), *(collate([item(n), item(n + 1)]) for n in (0, 2))
    bad.y[1] = 0
    before = weights(model)
    said = r"measurement y must not be zero everywhere, got such an image, in a batch of step 1, info .*\[2, 3\]"
    with pytest.raises(ValueError, match=said) as raised:
        fit(model, 2, data=[bad, good], strategy=strategy)
    assert "learning_rate" not in str(raised.value) and torch.equal(weights(model), before)


@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
@pytest.mark.parametrize("network", [DEQ, VarNet, TinyCNN])
def test_maps_that_are_not_finite_are_blamed_and_not_the_learning_rate(strategy, network):
    torch.manual_seed(0)
    sizes = {
        DEQ: dict(features=4, num_blocks=1, max_iterations=3),
        VarNet: dict(num_cascades=1, channels=2, num_pools=1),
    }
    good, bad = batches(2)
    bad.A.maps[0, 0, 3, 3] = math.nan
    said = "A.maps must be finite, got NaN or infinity in 1 of 512 values, in a batch of step 2"
    with pytest.raises(ValueError, match=said) as raised:
        fit(network(**sizes.get(network, {})), 2, data=[good, bad], strategy=strategy)
    assert "learning_rate" not in str(raised.value)


# Networks of others


def plain_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 3, padding=1))


def pairs(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 2, 16, 16, generator=g), torch.randn(1, 2, 16, 16, generator=g)) for _ in range(count)]


def tune(model, data, *arguments, steps=3, **settings):
    return finetune(model, data, *arguments, steps=steps, learning_rate=1e-3, progress=False, **settings)


def test_the_cnn_of_the_readme_is_fine_tuned_as_it_is():
    cnn = plain_cnn()
    student = prune(cnn, ratio=0.40, priors=[(cnn, torch.randn(1, 2, 64, 64), [cnn[2]])])
    x = torch.randn(1, 2, 64, 64)
    school = tune(student, [(x, nn.Identity(), x, {})], "school", teacher=cnn, steps=10)
    assert school.losses[-1] < school.losses[0]
    supervised = tune(student, DataLoader(torch.utils.data.TensorDataset(x, x)), "supervised", steps=10)
    assert supervised.losses[-1] < supervised.losses[0]
    assert torch.equal(weights(cnn), weights(plain_cnn()))


def by_hand(model, steps, loss, data):
    "The same updates, written with torch alone."
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for step in range(steps):
        adam.zero_grad()
        values.append(loss(model, data[step % len(data)]))
        values[-1].backward()
        adam.step()
    return [value.item() for value in values]


def test_pairs_give_the_updates_of_plain_torch():
    model, other = plain_cnn(), plain_cnn()
    log = tune(model, pairs(), "supervised", steps=5, loss="squared_error")
    values = by_hand(other, 5, lambda m, pair: nn.functional.mse_loss(m(pair[0]), pair[1]), pairs())
    assert log.losses == values and torch.equal(weights(model), weights(other))


class Conditioned(nn.Module):
    """A denoiser of image and noise level."""

    def __init__(self):
        super().__init__()
        self.cnn = plain_cnn()

    def forward(self, x, sigma):
        return x - sigma * self.cnn(x)


def residual(model, batch):
    return model(*batch.y) if isinstance(batch.y, tuple) else model(batch.y, batch.info["sigma"])


def test_a_network_of_image_and_noise_level_by_a_tuple_a_dictionary_or_call():
    as_tuple = [((y, 0.1), x) for y, x in pairs()]
    as_dict = [({"x": y, "sigma": 0.1}, x) for y, x in pairs()]
    as_info = [(y, nn.Identity(), x, {"sigma": 0.1}) for y, x in pairs()]
    ends = []
    for data, call in ((as_tuple, None), (as_dict, None), (as_info, residual), (as_tuple, residual)):
        for strategy in ("supervised", "school"):
            model, teacher = Conditioned(), Conditioned()
            teacher.cnn[2].weight.data.mul_(2)
            tune(model, data, strategy, teacher=teacher, call=call)
            ends.append(weights(model))
    assert all(torch.equal(end, ends[i % 2]) for i, end in enumerate(ends)) and not torch.equal(*ends[:2])


def test_the_teacher_is_called_as_the_student_is():
    teacher, levels = Conditioned(), [0.1, 0.2]
    y = pairs()[0][0]
    data = [(y, nn.Identity(), None, {"sigma": sigma}) for sigma in levels]  # one image, two levels
    strategy = make_strategy("school", teacher=teacher, call=residual)
    answers = [strategy.answer(Batch(*batch)) for batch in data]
    assert all(torch.equal(answer, teacher(y, sigma)) for answer, sigma in zip(answers, levels))
    assert not torch.equal(*answers) and len(strategy.answers) == 2


@pytest.mark.parametrize("network", [VarNet, E2EVarNet])
@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_call_that_changes_nothing_gives_the_same_weights(network, strategy):
    def run(**settings):
        torch.manual_seed(0)
        sizes = dict(num_cascades=1, channels=4, num_pools=1)
        sizes |= dict(sens_channels=2, sens_num_pools=1) if network is E2EVarNet else {}
        model, teacher = network(**sizes), network(**sizes)
        tune(model, batches(2), strategy, teacher=teacher, **settings)
        return weights(model)

    assert torch.equal(run(), run(call=lambda model, batch: model(batch.y, batch.A)))


def weighted_error(model, batch):
    return (batch["weight"] * (model(batch["input"]) - batch["target"]).square()).mean()


def test_any_loss_of_network_and_batch_on_batches_of_any_kind():
    data = [{"input": y, "target": x, "weight": torch.ones(()), "name": ["a"]} for y, x in pairs()]
    model, other = plain_cnn(), plain_cnn()
    log = tune(model, data, loss=weighted_error, steps=5)
    assert log.losses == by_hand(other, 5, weighted_error, data) and torch.equal(weights(model), weights(other))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(loss=weighted_error, call=residual), "call must be a function .*, or None with loss.model, batch., got"),
        (dict(strategy="supervised", call=3), "call must be a function .*, got 3"),
        (dict(strategy="self-supervised"), "batch.A must be the operator for strategy 'self-supervised', got None"),
        (dict(loss=lambda model, batch: 1.0), "the loss must be a real scalar with a gradient, got 1.0"),
        (dict(loss=lambda model, batch: model(batch[0])), "the loss must be a real scalar with a gradient, got tensor"),
        (dict(loss=lambda m, batch: batch[0].mean()), "the loss must be a real scalar with a gradient, got tensor"),
        (dict(loss="l1"), "teacher must be the network before pruning for strategy 'school', got None"),
    ],
)
def test_what_does_not_make_a_loss(arguments, said):
    with pytest.raises(TypeError, match=said):
        tune(plain_cnn(), pairs(), **arguments)
    with pytest.raises(ValueError, match="unknown setting of strategy own 'remember': choose one of loss"):
        tune(plain_cnn(), pairs(), loss=weighted_error, remember=3)


def test_a_network_that_takes_something_else_asks_for_call():
    said = r"call must be a function \(model, batch\) for Conditioned.forward\(x, sigma\), got None"
    with pytest.raises(TypeError, match=said):
        tune(Conditioned(), pairs(), "supervised")


@pytest.mark.parametrize("strategy", ["supervised", "school"])
def test_accumulated_batches_are_one_large_batch(strategy):
    single, (y, x) = pairs(4), map(torch.cat, zip(*pairs(4)))
    ends = []
    for data, accumulate in ((single, 4), ([(y[:2], x[:2]), (y[2:], x[2:])], 2), ([(y, x)], 1)):
        model = plain_cnn()
        log = tune(model, data, strategy, teacher=plain_cnn(1), accumulate=accumulate, steps=5)
        ends.append((weights(model), torch.tensor(log.losses)))
    for end, losses in ends[1:]:
        assert torch.allclose(end, ends[0][0], atol=2e-6) and torch.allclose(losses, ends[0][1], rtol=1e-5)
    assert not torch.allclose(ends[0][0], weights(plain_cnn()), atol=1e-3)


# Records, patience, damaged states


def curve(folder: Path) -> list[list[str]]:
    return [line.split(",") for line in (folder / "curve.csv").read_text(encoding="utf-8").splitlines()]


def test_the_curve_grows_with_every_update(tmp_path):
    lines, rows = [], []

    def watch(row):
        rows.append(row)
        lines.append(curve(tmp_path)[-1])

    log = fit(tiny(), 4, folder=tmp_path, validate=lambda m: 1.5, validate_every=2, callback=watch)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == [int(line[0]) for line in lines]
    assert [row["loss"] for row in rows] == log.losses == [float(line[1]) for line in lines]
    assert [row["learning_rate"] for row in rows] == log.learning_rates
    assert [row["validation"] for row in rows] == [None, 1.5, None, 1.5]
    assert [line[4] for line in lines] == ["", "1.5", "", "1.5"]
    assert curve(tmp_path)[0] == ["step", "loss", "learning_rate", "seconds", "validation"]
    assert len(curve(tmp_path)) == 5


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    fit(tiny(), 2, callback=rows.append)
    assert len(rows) == 2 and not list(tmp_path.iterdir())


def test_a_killed_run_leaves_each_step_once_in_the_curve(tmp_path):
    process = start(tmp_path, pause=0.2)
    wait_for_checkpoint(tmp_path, process)
    time.sleep(0.3)  # past a checkpointed step
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with (tmp_path / "curve.csv").open("a", encoding="utf-8") as file:
        file.write("99,0.1")  # a line that was cut short
    log = fit(tiny(), 12, folder=tmp_path)
    lines = curve(tmp_path)[1:]
    assert [int(line[0]) for line in lines] == list(range(1, 13)) and 0 < log.resumed_at < 12
    assert [float(line[1]) for line in lines] == log.losses


def events(folder: Path, name: str) -> dict[int, float]:
    """The scalars of a TensorBoard folder, read as TensorBoard does; a step given twice is a fault."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "training")).Reload().Scalars(name)
    assert len({event.step for event in found}) == len(found)
    return {event.step: event.value for event in found}


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 5:
            raise Killed

    settings = dict(folder=tmp_path, log_with="tensorboard", checkpoint_every=3, validate=lambda m: 2.0)
    with pytest.raises(Killed):  # two steps after the last state
        fit(tiny(), 8, validate_every=2, callback=kill, **settings)
    assert list(events(tmp_path, "loss")) == [1, 2, 3, 4, 5]
    model = tiny()
    log = fit(model, 8, validate_every=2, **settings)
    assert log.resumed_at == 3 and torch.equal(weights(model), fitted(8))
    assert events(tmp_path, "loss") == pytest.approx(dict(enumerate(log.losses, 1)))
    assert list(events(tmp_path, "validation")) == [2, 4, 6, 8] and len(events(tmp_path, "learning_rate")) == 8


def test_a_tracker_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"log_with must be an installed tracker, here .*, got 'tensorbord' and folder="
    ):
        fit(tiny(), 1, log_with="tensorbord", folder=tmp_path)
    with pytest.raises(ValueError, match=r"with a folder for files, got 'tensorboard' and folder=None"):
        fit(tiny(), 1, log_with="tensorboard")


def scored(model, steps, scores, **settings):
    given = iter(scores)
    return fit(model, steps, validate=lambda m: next(given), validate_every=1, **settings)


def test_patience_ends_the_training_when_validation_is_no_longer_better():
    model = tiny()
    log = scored(model, 20, [1.0, 3.0, 3.0, 2.0, 9.0], patience=2)  # equal is not better
    assert log.steps == 4 and torch.equal(weights(model), fitted(4))
    best = tiny()
    log = scored(best, 20, [1.0, 3.0, 2.5, 2.0, 9.0], patience=2, keep_best=True)
    assert log.steps == 4 and log.best_step == 2 and torch.equal(weights(best), fitted(2))
    assert scored(tiny(), 5, [1.0, 2.0, 3.0, 4.0, 5.0], patience=1).steps == 5
    with pytest.raises(ValueError, match="validate must be a function .* for keep_best and patience, got None"):
        fit(tiny(), 2, patience=1)
    with pytest.raises(ValueError, match="patience must be greater than or equal to 1, got 0"):
        fit(tiny(), 2, patience=0)


def test_patience_belongs_to_the_run_and_what_it_ended_stays_ended(tmp_path):
    scored(tiny(), 2, [1.0, 3.0], patience=2, folder=tmp_path)
    log = scored(tiny(), 20, [2.0, 2.5, 9.0], patience=2, folder=tmp_path)
    assert (log.resumed_at, log.steps) == (2, 4)
    model = tiny()
    again = scored(model, 20, [], patience=2, folder=tmp_path)
    assert (again.resumed_at, again.steps) == (4, 4) and torch.equal(weights(model), fitted(4))
    with pytest.raises(ValueError, match="patience was 2 and is now 3"):
        scored(tiny(), 20, [9.0], patience=3, folder=tmp_path)
    with pytest.raises(ValueError, match="validate_every was 1 and is now 2"):
        fit(tiny(), 20, validate=lambda m: 1.0, validate_every=2, patience=2, folder=tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        dict(call=lambda: residual, strategy="supervised"),
        dict(call=lambda: residual, strategy="school"),
        dict(loss=lambda: own_loss),
        dict(loss=lambda: own_loss, accumulate=2, clip=0.1),
    ],
)
def test_networks_of_others_resume_bit_by_bit(tmp_path, settings):
    def run(steps, folder):
        model, chosen = Conditioned(), {k: v() if callable(v) else v for k, v in settings.items()}
        school = chosen.get("strategy") == "school"
        tune(model, data, teacher=Conditioned() if school else None, folder=folder, steps=steps, **chosen)
        return weights(model)

    data = [((y, 0.1), x) for y, x in pairs()]
    undisturbed = run(7, tmp_path / "a")
    run(4, tmp_path / "b")
    assert torch.equal(run(7, tmp_path / "b"), undisturbed)


def own_loss(model, batch):
    (x, sigma), target = batch
    return (model(x, sigma) - target).abs().mean()


def test_call_and_loss_belong_to_the_run(tmp_path):
    data = [((y, 0.1), x) for y, x in pairs()]
    tune(Conditioned(), data, "supervised", folder=tmp_path / "call", call=residual)
    with pytest.raises(ValueError, match="call was 'residual' and is now None"):
        tune(Conditioned(), data, "supervised", folder=tmp_path / "call")
    with pytest.raises(ValueError, match="call must be a function with a name if folder is given, got"):
        tune(Conditioned(), data, "supervised", folder=tmp_path, call=lambda model, batch: model(*batch.y))
    tune(Conditioned(), data, folder=tmp_path / "own", loss=own_loss)
    with pytest.raises(ValueError, match="strategy was 'own' and is now 'supervised'"):
        tune(Conditioned(), data, "supervised", folder=tmp_path / "own")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    fitted(2, folder=tmp_path)
    file = tmp_path / "training.safetensors"
    content = file.read_bytes()
    g = torch.Generator().manual_seed(0)
    bits = [*range(0, 8 * 400, 7), *torch.randint(8 * len(content), (300,), generator=g).tolist()]
    for bit in bits:
        flip(file, bit)
        with pytest.raises(ValueError, match="training.safetensors is damaged or not a training state .* Remove it"):
            spade.finetuning.read_state(file)
        file.write_bytes(content)
    assert spade.finetuning.read_state(file)[1]["log"]["losses"]


def test_a_damaged_state_gives_way_to_the_one_before_it(tmp_path):
    fitted(4, folder=tmp_path, checkpoint_every=2)
    file, previous = tmp_path / "training.safetensors", tmp_path / "training.previous.safetensors"
    flip(file, -4000)
    with pytest.warns(UserWarning, match="training.safetensors is damaged .* training.previous.safetensors, is used"):
        assert torch.equal(fitted(8, folder=tmp_path, checkpoint_every=3), fitted(8))
    assert steps_done(tmp_path) == 8 and len(spade.finetuning.read_state(previous)[1]["log"]["losses"]) == 6
    file.unlink()  # a kill between two renamings
    assert torch.equal(fitted(9, folder=tmp_path), fitted(9))
    flip(file, -4000)
    flip(previous, -4000)
    with pytest.raises(ValueError, match="previous.safetensors is damaged or not a training state"):
        fitted(9, folder=tmp_path)


def test_a_damaged_state_never_replaces_the_one_before_it(tmp_path, monkeypatch):
    fitted(4, folder=tmp_path, checkpoint_every=2)
    flip(tmp_path / "training.safetensors", -4000)
    monkeypatch.setattr(spade.finetuning.Loop, "update", lambda *_: 0.0)
    with pytest.warns(UserWarning, match="is damaged"):
        fitted(5, folder=tmp_path, checkpoint_every=5)
    assert len(spade.finetuning.read_state(tmp_path / "training.previous.safetensors")[1]["log"]["losses"]) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\3\4 something else", bytes(1000)])
def test_another_file_is_not_a_training_state(tmp_path, content):
    (tmp_path / "training.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="training.safetensors is damaged or not a training state"):
        fitted(2, folder=tmp_path)


def test_a_network_file_is_not_a_training_state(tmp_path):
    from safetensors.torch import save_file

    save_file(tiny().state_dict(), tmp_path / "training.safetensors", metadata={"training": "{}"})
    with pytest.raises(ValueError, match="training.safetensors is damaged or not a training state"):
        fitted(2, folder=tmp_path)


# Data that a network of others cannot take


@pytest.mark.parametrize(
    "change, kind, said",
    [
        (
            lambda y, x: (y.double(), x),
            TypeError,
            "measurement y must have the precision .*torch.float32, got torch.float64",
        ),
        (
            lambda y, x: (y[:0], x[:0]),
            ValueError,
            r"measurement y must hold at least one image, got shape \(0, 2, 16, 16",
        ),
        (lambda y, x: (y, x[:0]), ValueError, r"reference x must hold at least one image, got shape \(0, 2, 16, 16"),
        (lambda y, x: (y * 1e30, x), ValueError, "measurement y must be scaled to a maximum near 1"),
        (lambda y, x: (y, x[0]), ValueError, "reference x must have shape and kind of the reconstruction"),
        (lambda y, x: (y, x[:, :1]), ValueError, "reference x must have shape and kind of the reconstruction"),
        (lambda y, x: (y / 0, x), ValueError, "measurement y must be finite, got NaN or infinity in 512 of 512"),
        (lambda y, x: (y, x * math.nan), ValueError, "reference x must be finite, got NaN or infinity in 512 of 512"),
    ],
)
@pytest.mark.parametrize("loss", ["squared_error", "ssim"])
def test_data_that_do_not_fit_are_named(change, kind, said, loss):
    model = plain_cnn()
    with pytest.raises(kind, match=said) as raised:
        tune(model, [change(*pairs()[0])], "supervised", loss=loss)
    assert "learning_rate" not in str(raised.value) and torch.equal(weights(model), weights(plain_cnn()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_are_not_trained(dtype):
    said = f"model must have float32 or float64 weights to be trained, got {dtype}: use model.float"
    with pytest.raises(TypeError, match=said):
        tune(plain_cnn().to(dtype), [(y.to(dtype), x.to(dtype)) for y, x in pairs()], "supervised")


def test_double_networks_and_double_data():
    model = plain_cnn().double()
    log = tune(model, [(y.double(), x.double()) for y, x in pairs()], "supervised", loss="squared_error")
    single = tune(plain_cnn(), pairs(), "supervised", loss="squared_error")
    assert log.losses == pytest.approx(single.losses, rel=1e-5) and model[0].weight.dtype == torch.float64
    double = tune(plain_cnn(), [(y, x.double()) for y, x in pairs()], "supervised", loss="squared_error")
    assert double.losses == pytest.approx(single.losses, rel=1e-5)  # a reference may have another precision


def test_a_measurement_too_small_for_its_precision_is_named():
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, y):
            return self.gain * y.square()

    with pytest.raises(ValueError, match="measurement y must be scaled to a maximum near 1, .* got a maximum of"):
        tune(Power(), [(1e-30 * y, 0 * x) for y, x in pairs()], "supervised")


@pytest.mark.parametrize("strategy", ["supervised", "school", "self-supervised"])
def test_a_measurement_that_does_not_fit_its_operator_is_refused(strategy):
    batch, single = collate([item(0), item(1)]), collate([item(2)])
    for y in (batch.y[:1], batch.y[:, :1], batch.y[..., :-1], batch.y[0]):
        with pytest.raises(ValueError, match="must have shape .* to fit the operator, got"):
            fit(tiny(), 1, data=[batch._replace(y=y)], strategy=strategy)
    with pytest.raises(ValueError, match="must have shape .* to fit the operator, got"):
        fit(tiny(), 1, data=[batch._replace(A=single.A.with_maps(single.A.maps[:, :1]))], strategy=strategy)


def test_another_fault_is_not_blamed_on_the_precision():
    with pytest.raises(ValueError, match="reference x must have shape and kind of the reconstruction"):
        tune(plain_cnn(), [(y, x[:, :1].double()) for y, x in pairs()], "supervised")


def test_no_strategy_no_teacher_and_no_loss():
    with pytest.raises(TypeError, match="teacher must be the network before pruning for strategy 'school', got None"):
        tune(plain_cnn(), pairs())
    assert torch.equal(*(weights(end) for end in (school("school"), school(None))))


def school(strategy):
    model = plain_cnn()
    tune(model, pairs(), strategy, teacher=plain_cnn(1))
    return model
