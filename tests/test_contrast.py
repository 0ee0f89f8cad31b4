"""The faults of the authors' released code that are not caught elsewhere, and bad input.

An error names the place, what was found and what was expected, in one sentence. Caught beside what they concern: the
adjoint at batch 1 and the convention at 12 coils (test_operators), the split by slice (test_data), zeroed predictions
and min-max scaling (test_metrics), timing at unequal tolerance (test_latency), keys that nobody reads (test_config),
ground truth in losses (test_losses).
"""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import spade
from spade.basics import choose, loader
from spade.config import STARTS, Data, Latency, NetworkSettings, Photos, Sampling, Simulation, config_names, load_config
from spade.data.fastmri import MultiCoilSlices, split_subjects
from spade.data.phantom import simulate
from spade.finetuning import train
from spade.losses import LOSSES, make_strategy
from spade.metrics import evaluate
from spade.models import DEQ, VarNet
from spade.operators import MultiCoilMRI
from spade.runs import Run, datasets, loop_settings

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "spade").rglob("*.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return simulate(
        tmp_path_factory.mktemp("contrast"),
        num_subjects=3,
        slices_per_subject=2,
        shape=(32, 40),
        num_coils=3,
        progress=False,
    )


def varnet(channels: int = 4) -> VarNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VarNet(1, channels, 1)


def slices(files: list[Path], **settings) -> MultiCoilSlices:
    return MultiCoilSlices(files, acceleration=2, acs_fraction=0.3, maps_folder=False, **settings)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files under version control; skipped outside a checkout."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


# Settings: a word that no code knows, and a number that code overwrites


@pytest.mark.parametrize("strategy", ("selfsupervised", "testdc", "Supervised", ""))
def test_a_strategy_that_no_code_knows_stops_at_once(files, strategy):
    student = varnet()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"unknown strategy '{strategy}': choose one of supervised, school, self-supervised"
    ):
        spade.finetune(student, slices(files), strategy, teacher=varnet(), steps=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_every_word_of_every_shipped_profile_is_known():
    for name in config_names():
        config = load_config(name)
        for network, settings in config.networks.items():
            for strategy, training in settings.finetuning.items():
                assert not training.loss or training.loss in LOSSES, f"{name}: {network}.{strategy}.loss"
                make_strategy(strategy, teacher=varnet())
        assert all(strategy in make_strategy.__globals__["STRATEGIES"] for strategy in config.random_start)
    assert choose("start", "random", STARTS) == "random"


def test_code_overwrites_no_number_of_steps(files):
    data = slices(files[:2])
    for settings, steps in (
        ({"steps": 3}, 3),
        ({"epochs": 2}, 8),
        ({"epochs": 2, "batch_size": 2}, 4),
        ({"steps": 1}, 1),
    ):
        log = spade.finetune(varnet(), data, "self-supervised", learning_rate=3e-4, progress=False, **settings)
        assert log.steps == steps and set(log.learning_rates) == {3e-4}
    for name in config_names():
        config = load_config(name)
        for network, settings in config.networks.items():
            for training in (settings.pretraining, *settings.finetuning.values()):
                arguments = loop_settings(training, Run(network), config)
                assert arguments["steps"] == training.steps and arguments["learning_rate"] == training.learning_rate


@pytest.mark.parametrize(
    "part, owners",
    [
        (Data, "data"),
        (Simulation, "simulation"),
        (Sampling, "sampling"),
        (Latency, "latency|timing"),
        (Photos, "photos"),
        (NetworkSettings, r"network|networks\[.+?\]|settings|self"),
    ],
)
def test_each_key_is_read_from_its_own_part(part, owners):
    """`seed` of one part must not pass for read because another part has a `seed`."""
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in [*MODULES, *(ROOT / "nbs" / "experiments").glob("*.ipynb")]
    )
    code = code.replace('\\"', '"')
    if re.search(rf"\*\*(?:config\.)?(?:{owners})\.model_dump\(\)", code):  # all as keywords of one call
        return
    unread = [
        field
        for field in part.model_fields
        if not re.search(rf"\b(?:{owners})(?:\.{field}\b|\[[\"']{field}[\"']\])", code)
    ]
    assert not unread


# Evaluation: who is tested, and on what


def test_training_data_never_stand_in_for_test_data(files):
    split = split_subjects(files, (1, 1, 1))
    train_set, test_set = slices(split["train"]), slices(split["test"])
    subjects = lambda table: set(table["subject"])
    assert subjects(evaluate(varnet(), loader(test_set), progress=False)) == {item["subject"] for item in test_set}
    assert not {item["subject"] for item in train_set} & {item["subject"] for item in test_set}
    with pytest.raises(ValueError, match="reference"):  # without ground truth nothing else is evaluated in its place
        evaluate(varnet(), loader(test_set.measurements()), progress=False)
    with pytest.raises(ValueError, match="ground truth"):
        train(varnet(), test_set.measurements(), make_strategy("supervised"), steps=1, progress=False)


def test_the_split_of_an_experiment_is_by_subject_for_every_seed(tmp_path):
    changes = {
        "data.simulation.shape": [32, 40],
        "data.simulation.coils": 3,
        "data.simulation.slices": 2,
        "data.subjects": [2, 1, 1],
        "sampling.acs_fraction": 0.3,
    }
    for seed in (0, 1):
        splits = datasets(
            load_config("smoke", changes | {"data.seed": seed}), Run("varnet", 4), str(tmp_path), progress=False
        )
        subjects = [{volume.subject for volume in part.volumes} for part in splits.values()]
        assert list(map(len, subjects)) == [2, 1, 1] and len(set().union(*subjects)) == 4
        assert all(len(part) == 2 * len(part.volumes) for part in splits.values()), (
            "all slices of a subject stay with it"
        )


def test_the_background_counts_in_every_loss():
    """The released code zeroes the output where the ground truth is zero before it compares."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.complex64)
    x[..., 4:12, 4:12] = 1 + 0.5j
    painted = x.clone()
    painted[..., :3, :3] = 0.5
    for name, loss in LOSSES.items():
        assert loss(painted, x) > loss(x, x) + 1e-4, name


@pytest.mark.filterwarnings("ignore:.*its energy peaks at")  # the noise is stronger than the centre of k-space
@pytest.mark.parametrize("strategy", ("school", "self-supervised"))
def test_fine_tuning_on_test_measurements_is_blind_to_their_ground_truth(files, tmp_path, strategy):
    """Unmeasured samples become noise a million times as strong: the student's weights are the same bit by bit."""
    test_set = slices(files[:1])
    mask = test_set.mask(test_set.volumes[0]).numpy()
    path = Path(shutil.copy(files[0], tmp_path / files[0].name))
    with h5py.File(path, "r+") as file:
        noise = 1e6 * np.random.default_rng(0).normal(size=file["kspace"].shape)
        replace(file, np.where(mask, file["kspace"][()], noise).astype(np.complex64))
        del file["reconstruction_rss"]
    students = []
    for data in (test_set.measurements(), slices([path]).measurements()):
        students.append(spade.prune(varnet(8), 0.25))
        spade.finetune(
            students[-1],
            data,
            strategy,
            teacher=varnet(8) if strategy == "school" else None,
            steps=3,
            learning_rate=1e-3,
            progress=False,
        )
    start, one, other = spade.prune(varnet(8), 0.25).state_dict(), *(student.state_dict() for student in students)
    assert all(torch.equal(one[name], other[name]) for name in one) and not all(
        torch.equal(one[name], start[name]) for name in one
    )


# The reader


def test_no_read_takes_more_than_a_slice(files, monkeypatch):
    sizes, getitem = [], h5py.Dataset.__getitem__

    def recording(dataset, *arguments):
        value = getitem(dataset, *arguments)
        if dataset.name == "/kspace":
            sizes.append((value.size, dataset.size // dataset.shape[0]))
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", recording)
    batches = list(loader(slices(files)))
    assert len(batches) == 6 and sizes and all(size <= slice_size for size, slice_size in sizes)


def test_volumes_unlike_their_neighbours_go_through_training_and_evaluation(files, tmp_path):
    """Another coil count and another matrix size: handled, not refused."""
    other = simulate(tmp_path, 1, 2, shape=(24, 36), num_coils=5, progress=False, name="other")
    data, model = slices([*files[:1], *other]), varnet()
    log = train(model, data, make_strategy("supervised"), epochs=1, batch_size=2, progress=False)
    table = evaluate(model, loader(data, batch_size=2), progress=False)
    assert log.steps == 2 and len(table) == 4 and table.psnr.notna().all()


# Bad input: one sentence that names the place, what was found and what was expected


def changed(files: list[Path], folder: Path, name: str, edit: Callable[[h5py.File], object]) -> MultiCoilSlices:
    path = shutil.copy(files[0], folder / name)
    with h5py.File(path, "r+") as file:
        edit(file)
    return slices([path])


def replace(file: h5py.File, value: np.ndarray) -> None:
    del file["kspace"]
    file["kspace"] = value


def truncated(files: list[Path], folder: Path) -> MultiCoilSlices:
    (folder / "short.h5").write_bytes(files[0].read_bytes()[:3000])
    return slices([folder / "short.h5"])


def operator(coils: int = 3, width: int = 8) -> MultiCoilMRI:
    return MultiCoilMRI(torch.ones(width, dtype=torch.bool), torch.ones(1, coils, 6, 8, dtype=torch.complex64))


def other_architecture(files: list[Path], folder: Path) -> object:
    spade.save(DEQ(features=4, num_blocks=1), folder / "teacher")
    return spade.load(folder / "teacher", build=varnet)


FAULTS = {
    "truncated file": (truncated, ["short.h5", "not a readable HDF5 file", "cut short"]),
    "missing kspace": (
        lambda files, folder: changed(files, folder, "empty.h5", lambda file: file.__delitem__("kspace")),
        ["empty.h5", "'kspace'", "found: ", "expected"],
    ),
    "number of dimensions": (
        lambda files, folder: changed(files, folder, "flat.h5", lambda file: replace(file, file["kspace"][:, 0])),
        ["flat.h5", "(2, 64, 40)", "expected complex (slices, coils, rows, columns)"],
    ),
    "NaN": (
        lambda files, folder: changed(
            files, folder, "nan.h5", lambda file: file["kspace"].__setitem__((0, 0, 0, 0), np.nan)
        )[0],
        ["nan.h5", "slice 0", "NaN"],
    ),
    "no file": (lambda files, folder: len(slices([])), ["0 files"]),
    "width of the mask": (
        lambda files, folder: changed(
            files, folder, "mask.h5", lambda file: file.__setitem__("mask", np.ones(39, bool))
        )[0],
        ["mask.h5", "(39,)", "40 columns"],
    ),
    "width of the operator's mask": (
        lambda files, folder: operator(width=9),
        ["mask must have the 8 columns", "got 9"],
    ),
    "too few ACS lines": (
        lambda files, folder: MultiCoilSlices(files, acceleration=4, acs_fraction=0.1, maps_folder=False)[0],
        [".h5", "slice 0", "needs at least 6", "got", "4 ACS lines"],
    ),
    "maps and k-space": (
        lambda files, folder: operator().adjoint(torch.ones(1, 4, 6, 8, dtype=torch.complex64)),
        ["k-space", "(1, 4, 6, 8)", "3"],
    ),
    "checkpoint": (other_architecture, ["teacher.safetensors", "must make a DEQ", "VarNet"]),
    "config": (lambda files, folder: load_config("demoo"), ["config 'demoo'", "demo, gpu, paper"]),
    "network": (lambda files, folder: Run("usnet"), ["network 'usnet'", "deq, varnet, e2e-varnet"]),
    "strategy": (
        lambda files, folder: Run("deq", 6, 0.4, "selfsupervised"),
        ["strategy 'selfsupervised'", "supervised, school, self-supervised"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_named_in_one_sentence(files, tmp_path, fault):
    act, fragments = FAULTS[fault]
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as raised:
        act(files, tmp_path)
    sentence = str(raised.value)
    assert all(fragment in sentence for fragment in fragments), sentence
    assert "\n" not in sentence and len(sentence) < 400 and not re.search(r"[.!?] [A-Z]", sentence), sentence


# The repository


def test_import_opens_no_file_but_code_and_no_socket(tmp_path):
    """The released code reads a spreadsheet while being imported; an audit hook sees every open file."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch_pruning, accelerate, pandas, matplotlib.pyplot, seaborn, skimage.metrics, h5py, papermill, nbformat
import yaml, tqdm.auto, pydantic, torch._dynamo
seen = []
def hook(event, arguments):
    if event == "open" or event.startswith("socket."):
        seen.append(f"{{event}} {{arguments[0]}}")
sys.addaudithook(hook)
import importlib, pathlib
for path in sorted(pathlib.Path({str(ROOT / "spade")!r}).rglob("*.py")):
    parts = path.relative_to({str(ROOT)!r}).with_suffix("").parts
    importlib.import_module(".".join(parts).removesuffix(".__init__"))
print(*seen, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-B", "-c", script], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    events = [line.split(" ", 1) for line in done.stdout.splitlines()]
    python = tuple(
        {
            str(Path(sys.prefix)),
            str(Path(sys.prefix).resolve()),
            sys.base_prefix,
            "/proc/",
            "/sys/",
            "/dev/",
            "/etc/",
            "/usr/",
            "/lib",
        }
    )
    ours = [name for event, name in events if event == "open" and not name.startswith(python) and not name.isdigit()]
    ours = [
        name for name in ours if ".egg-info/" not in name
    ]  # other packages look for plugins in the metadata of every distribution
    assert not [name for event, name in events if event != "open"], "a socket was opened"
    assert ours and not [
        name for name in ours if not re.fullmatch(rf"{re.escape(str(ROOT / 'spade'))}/.*\.pyc?(\.\d+)?", name)
    ]


def test_no_litter_is_under_version_control(tracked):
    litter = re.compile(
        r"\.py[cod]$|__pycache__|\.ipynb_checkpoints|\.DS_Store|(^|[/_])(BK|del_|JustInCase|backup|old|copy)|~$|\.(orig|rej|swp|pth|pt|pkl|npy)$",
        re.I,
    )
    assert not [name for name in tracked if litter.search(name)]
    assert (ROOT / ".gitignore").is_file()
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    assert all(size < 5_000_000 for size in sizes.values()), max(sizes, key=sizes.get)
    assert sum(size for name, size in sizes.items() if name.endswith(".safetensors")) <= 5_000_000


def test_no_path_of_this_machine_is_under_version_control(tracked):
    suffixes = {".py", ".ipynb", ".md", ".yaml", ".yml", ".json", ".ini", ".toml", ".txt", ".csv", ".cff"}
    home = re.compile(rf"{re.escape(str(ROOT))}\b|/(?:home|Users)/\w+|/root/\w|[A-Z]:\\\\Users")
    found = [
        name
        for name in tracked
        if Path(name).suffix in suffixes
        and name != "tests/test_contrast.py"
        and home.search((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert not found


def test_no_network_and_no_function_exists_twice():
    """Two divergent copies of the VarNet and twelve look-alike datasets were how the released code grew."""
    bodies, classes = {}, {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 3:
                key = "\n".join(map(ast.unparse, node.body))
                assert key not in bodies, f"{node.name} in {path.name} is {bodies[key]}"
                bodies[key] = f"{node.name} in {path.name}"
            if isinstance(node, ast.ClassDef) and any(
                "Module" in ast.unparse(base) or "Dataset" in ast.unparse(base) for base in node.bases
            ):
                assert node.name not in classes, f"{node.name} in {path.name} and {classes[node.name]}"
                classes[node.name] = path.name


def test_the_readme_names_what_exists():
    """The released README names configurations that do not exist, and its three checkpoints are one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for config in re.findall(r"(?:PROFILE=|-p config |config/)(\w+)", text):
        assert config in config_names() or (ROOT / "config" / config / "config.yaml").is_file(), (
            config
        )  # or a config of Snakemake's
    for network in re.findall(r"(?:NETWORK=|-p network )([\w-]+)", text):
        assert Run(network).network == network
    for strategy in re.findall(r"-p strategy ([\w-]+)", text):
        assert make_strategy(strategy, teacher=varnet()).name == strategy
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(images) == len(set(images))


def test_checkpoints_that_ship_are_different_and_load():
    teachers = sorted((ROOT / "spade" / "assets").rglob("*.safetensors"))
    if not teachers:
        pytest.skip("no teacher ships with this checkout")
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in teachers}) == len(teachers)
    for path in teachers:
        network, _, config = re.fullmatch(r"([^_]+)_(?:R(\d+)_)?(\w+)", path.stem).groups()
        expected = type(load_network(network, config)).__name__
        assert type(spade.load(path)).__name__ == expected, f"{path.name} holds another network"


def load_network(network: str, config: str) -> torch.nn.Module:
    from spade.runs import build_network

    return build_network(network, load_config(config))
