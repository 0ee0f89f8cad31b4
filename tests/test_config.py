"""Configurations: wrong settings are refused by their full name, overrides beat the file, and every key is read."""

import re
from pathlib import Path

import pytest
import yaml

from spade.basics import choose
from spade.config import (
    PHOTO_NETWORKS,
    STARTS,
    Config,
    Data,
    Equivariance,
    Latency,
    NetworkSettings,
    Photos,
    Sampling,
    Simulation,
    WarmStart,
    config_names,
    load_config,
)
from spade.files import project_root
from spade.losses import STRATEGIES
from spade.training import Training

ROOT = Path(__file__).resolve().parents[1]
WARM = {"acceleration": 6, "training": {"steps": 1}}
PARTS = (Config, Data, Photos, Simulation, Sampling, NetworkSettings, WarmStart, Latency)


def write_config(folder: Path, **changes: object) -> Path:
    """The smoke configuration with top-level keys changed, in a file of its own."""
    settings = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}), encoding="utf-8")
    return path


def write_text(folder: Path, old: str, new: str) -> Path:
    """The text of the smoke configuration with one place changed."""
    text = (ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = folder / "changed.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_the_four_configurations_of_the_paper_ship():
    assert {"smoke", "demo", "gpu", "paper"} <= set(config_names())


@pytest.mark.parametrize("name", ["smoke", "demo", "gpu", "paper"])
def test_every_configuration_serves_every_network_and_strategy(name):
    config = load_config(name)
    assert set(config.networks) == {"deq", "varnet", "e2e-varnet", "usrnet"} and set(config.random_start) <= set(
        STRATEGIES
    )
    assert all(set(settings.finetuning) == set(STRATEGIES) for settings in config.networks.values())


def test_configurations_of_certain_data_serve_the_networks_of_their_problem():
    siat, cbsd68 = load_config("siat"), load_config("cbsd68")
    assert set(siat.networks) == {"deq", "varnet", "e2e-varnet"} and siat.photos is None
    assert (
        set(cbsd68.networks) == {"usrnet"} <= set(PHOTO_NETWORKS)
        and cbsd68.data is None
        and cbsd68.photos.scales == (2, 3, 4)
    )
    assert "school" in cbsd68.networks["usrnet"].finetuning and cbsd68.networks["usrnet"].published


def test_the_configuration_paper_is_the_setting_of_the_paper():
    paper = load_config("paper")
    assert paper.data.subjects == (145, 10, 10) and paper.ratios == (0.05, 0.10, 0.20, 0.40)
    assert paper.sampling.acs_fraction == 0.10
    for network in paper.networks.values():
        assert not network.arguments, "no arguments means the paper's size"
        assert {network.pretraining.learning_rate, *(t.learning_rate for t in network.finetuning.values())} == {1e-5}


def test_an_unknown_configuration_names_the_known():
    with pytest.raises(ValueError, match="unknown config 'dmeo': choose one of cbsd68, demo, gpu, paper, siat, smoke"):
        load_config("dmeo")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"worker": 2}, "changed.yaml: unknown key 'worker': choose one of name, .*threads"),
        (
            {"data": {"folder": "x", "subjects": [1, 1, 1], "shape": [8, 8]}},
            "changed.yaml.data: unknown key 'shape'.*subjects",
        ),
        ({"data": {"folder": "x"}}, "changed.yaml.data.subjects is missing"),
        ({"data": {"folder": "x", "subjects": [1, 1]}}, "data.subjects"),
        ({"data": []}, r"changed.yaml.data must be .*, got \[\]"),
        (
            {"sampling": {"exact": "yes please"}},
            "changed.yaml.sampling.exact must be a valid boolean, .*got 'yes please'",
        ),
        ({"networks": {"unet": {}}}, "unknown network 'unet': choose one of deq"),
        ({"networks": {"varnet": {"finetuning": {"scool": {"steps": 1}}}}}, "unknown strategy 'scool'"),
        (
            {"networks": {"varnet": {"pretraining": {"step": 1}}}},
            "networks.varnet.pretraining: unknown key 'step'.*steps",
        ),
        ({"networks": {"varnet": {"pretraining": {}}}}, "changed.yaml.networks.varnet.pretraining.steps is missing"),
        (
            {"networks": {"varnet": {"pretraining": {"steps": 1, "schedule": "warm"}}}},
            "networks.varnet.pretraining.schedule must be 'constant' or 'cosine', got 'warm'",
        ),
        (
            {"networks": {"varnet": {"warm_start": {"acceleration": 6, "training": {"steps": 1, "schedule": "warm"}}}}},
            "networks.varnet.warm_start.training.schedule must be",
        ),
        (
            {"networks": {"varnet": {"warm_start": {"acceleration": 6}}}},
            "networks.varnet.warm_start.training is missing",
        ),
        (
            {"networks": {"varnet": {"warm_start": {"acceleration": 0, "training": {"steps": 1}}}}},
            "warm_start.acceleration must be greater than or equal to 1, got 0",
        ),
        (
            {
                "networks": {
                    "varnet": {
                        "warm_start": {
                            "acceleration": 6,
                            "training": {"steps": 1},
                            "finetuning": {"school": {"steps": 1}},
                        }
                    }
                }
            },
            "unknown strategy of networks.varnet.warm_start.finetuning 'school'",
        ),
        (
            {"networks": {"varnet": {"warm_start": {**WARM, "training": {"steps": 1, "contraction": 0.9}}}}},
            "contraction must be missing in networks.varnet: only DEQ has one",
        ),
        (
            {"networks": {"usrnet": {"warm_start": WARM}}},
            "networks.usrnet.warm_start must be missing in super-resolution",
        ),
        ({"random_start": {"supervised": [0.10]}}, r"random_start.supervised must be a subset of ratios, \(0.4,\)"),
        ({"random_start": {"scool": [0.40]}}, "unknown strategy 'scool'"),
        ({"device": "tpu"}, "changed.yaml.device: .*pattern"),
        ({"mixed_precision": "fp8"}, "changed.yaml.mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        ({"threads": None}, "changed.yaml.threads must be a valid integer, got None"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_full_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("ratios", [0.4, 1.0], "ratios.1 must be less than 1, got 1.0"),
        ("ratios", [], r"ratios must be distinct values, at least one, got \[\]"),
        ("ratios", [0.4, 0.4], "ratios must be distinct values"),
        ("seeds", [], "seeds must be distinct values, at least one"),
        ("seeds", [0, 0], "seeds must be distinct values"),
        ("networks", {}, "networks"),
        ("threads", -1, "threads must be greater than or equal to 1, got -1"),
        ("threads", True, "threads must be a number, got True"),
        ("data.subjects", [2, 0, 1], "data.subjects.1 must be greater than or equal to 1, got 0"),
        ("data.simulation.snr", 0.0, "data.simulation.snr must be greater than 0, got 0.0"),
        ("data.simulation.shape", [64, 8], "data.simulation.shape.1 must be greater than or equal to 16, got 8"),
        ("sampling.acs_fraction", 1.5, "sampling.acs_fraction must be less than or equal to 1, got 1.5"),
        (
            "networks.deq.pretraining.steps",
            0,
            "networks.deq.pretraining.steps must be greater than or equal to 1, got 0",
        ),
        (
            "networks.deq.pretraining.steps",
            "many",
            "networks.deq.pretraining.steps must be a valid integer, got 'many'",
        ),
        ("networks.deq.pretraining.steps", 1.5, "networks.deq.pretraining.steps must be a valid integer, got 1.5"),
        (
            "networks.deq.pretraining.learning_rate",
            -1e-3,
            "pretraining.learning_rate must be greater than 0, got -0.001",
        ),
        (
            "networks.deq.pretraining.learning_rate",
            float("inf"),
            "pretraining.learning_rate must be a finite number, got inf",
        ),
        ("networks.deq.finetuning.school.clip", 0.0, "networks.deq.finetuning.school.clip must be greater than 0"),
        ("networks.deq.finetuning.school.loss", "l2", "unknown loss 'l2': choose one of .*smooth_l1, ssim"),
        ("networks.deq.finetuning.school.batch_size", 0, "networks.deq.finetuning.school.batch_size"),
        ("networks.deq.finetuning.school.steps_at", {"0.4": 0}, "networks.deq.finetuning.school.steps_at.0.4"),
        ("networks.deq.finetuning.school.steps_at", {"forty": 9}, "networks.deq.finetuning.school.steps_at.forty"),
        ("networks.deq.finetuning.school.learning_rate_at", {"1.4": 1e-3}, "finetuning.school.learning_rate_at.1.4"),
        ("random_start.supervised", [0.0], "random_start.supervised.0 must be greater than 0, got 0.0"),
        ("self_supervised.weight", -1.0, "self_supervised.weight must be greater than or equal to 0, got -1.0"),
        (
            "networks.usrnet.self_supervised",
            {"rotations": "left"},
            "self_supervised.rotations must be 'any' or 'right'",
        ),
        ("latency.repeats", 0, "latency.repeats must be greater than or equal to 1"),
        ("latency.size", "full", "latency.size must be 'paper', 'config' or 'both', got 'full'"),
        ("photos.scales", [2, 0], "photos.scales.1 must be greater than or equal to 1, got 0"),
        ("photos.scales", [2, 2], "photos.scales must be distinct values"),
        ("photos.noise", 10.0, "photos.noise must be less than 1, got 10.0"),
        ("photos.pairing", "both", "photos.pairing must be 'all' or '.*', got 'both'"),
        ("photos.tile", 8, "photos.tile must be greater than or equal to 16, got 8"),
        ("photos.validation_limit", 0, "photos.validation_limit must be greater than or equal to 1, got 0"),
        ("photos", None, "section photos is missing, which networks.usrnet needs"),
        ("data", None, "section data is missing, which networks.deq needs"),
        ("data.seeed", 5, "data: unknown key 'seeed'"),
        ("data.folder", "", "data.folder: String should have at least 1 character"),
        (
            "networks.varnet.arguments.cascades",
            2,
            "networks.varnet.arguments: unknown key 'cascades': choose one of num_cascades",
        ),
        ("networks.varnet.arguments.num_cascades", "2", "arguments.num_cascades must be a valid integer, got '2'"),
        ("networks.varnet.arguments.num_cascades", 0, "num_cascades must be greater than or equal to 1, got 0"),
        ("networks.varnet.arguments.num_cascades", 2.0, "num_cascades must be a valid integer, got 2.0"),
        ("networks.varnet.arguments.channels", True, "arguments.channels must be a number, got True"),
        ("networks.varnet.arguments.align", "no", "arguments.align must be a valid boolean, got 'no'"),
        ("networks.deq.arguments.alpha", "half", "networks.deq.arguments.alpha must be a valid number, got 'half'"),
        ("networks.usrnet.arguments.widths", [8, 8, "8", 8], "arguments.widths.2 must be a valid integer, got '8'"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence_with_its_key(key, value, expected):
    with pytest.raises(ValueError, match=f"smoke.yaml.*{expected}") as raised:
        load_config("smoke", {key: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_two_wrong_settings_are_named_together():
    with pytest.raises(ValueError, match="smoke.yaml.latency.repeats must be .* smoke.yaml.threads must be"):
        load_config("smoke", {"threads": 0, "latency.repeats": 0})


def test_a_duplicate_key_is_refused_with_its_line(tmp_path):
    path = write_text(tmp_path, "threads: 1", "threads: 1\nthreads: 2")
    line = 1 + path.read_text(encoding="utf-8").splitlines().index("threads: 2")
    with pytest.raises(ValueError, match=f"changed.yaml: line {line}: key 'threads' must occur once in its mapping"):
        load_config(path)
    with pytest.raises(ValueError, match="key 'steps' must occur once"):
        load_config(write_text(tmp_path, "&short {steps: 3,", "&short {steps: 3, steps: 4,"))


def test_merge_keys_anchors_and_numbers_without_a_point(tmp_path):
    old = "pretraining: &short {steps: 3, learning_rate: 0.001}"
    new = "pretraining: &short {<<: {steps: 3, clip: 2}, learning_rate: 1e-3, clip: 1E-1}"
    config = load_config(write_text(tmp_path, old, new))
    training = config.networks["deq"].pretraining
    assert (training.steps, training.learning_rate, training.clip) == (3, 0.001, 0.1)
    assert config.networks["varnet"].pretraining == training, "an alias"


SMOKE = (ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8")
LINES = len(SMOKE.splitlines())


def line(text: str) -> int:
    """The first line of the configuration smoke with this text, from 1."""
    return SMOKE[: SMOKE.index(text)].count("\n") + 1


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("- 1\n", r"must hold settings, 'key: value' from its first line on, got \[1\]"),
        ("hello\n", "must hold settings, .* got 'hello'"),
        ("", "must hold settings, .* got an empty file"),
        ("# a comment\n", "must hold settings, .* got an empty file"),
        ("a: [1", r"line 1: while parsing a flow sequence expected ',' or '\]'"),
        (
            SMOKE.replace("\nthreads", "\n\tthreads"),
            rf"line {line('threads')}: .* found character '\\t' .*; indent with spaces",
        ),
        (SMOKE.encode("utf-16"), "must be UTF-8 text, got a byte of another encoding in line 1"),
        (SMOKE.encode("utf-16-le"), "must be UTF-8 text, got a byte of another encoding in line 1"),
        (f"{SMOKE}# für".encode("latin-1"), f"must be UTF-8 text, got a byte of another encoding in line {LINES + 1}"),
        (f"{SMOKE}# \0", f"must be UTF-8 text, got a byte of another encoding in line {LINES + 1}"),
        (
            f"{SMOKE}---\n{SMOKE}",
            f"line {line('description')} to {LINES + 1}: expected a single document .* found another document",
        ),
        (
            SMOKE.replace("&short ", ""),
            f"line {line(': *short')}: found undefined alias 'short'; write its anchor, such as &name",
        ),
        (SMOKE + "cores: !include other.yaml\n", f"line {LINES + 1}: could not .* the tag '!include'"),
        ("!!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor for the tag"),
        ("? [1, 2]\n: 3\n", "line 1: while constructing a mapping found unhashable key"),
        ("[" * 3000 + "]" * 3000, "must be YAML, got brackets that are nested too deep"),
        (
            SMOKE.replace("threads: 1", "threads:1"),
            f"line {line('threads')} to {line('threads') + 1}: .* could not find expected ':'",
        ),
        (SMOKE.replace("threads: 1", "threads: 2024-01-01"), "threads must be a valid integer, got '2024-01-01'"),
        (SMOKE.replace("threads: 1", "threads: 1:30"), "threads must be a valid integer, got '1:30'"),
        (SMOKE.replace("threads: 1", "threads: yes"), "threads must be a number, got True"),
        (SMOKE.replace("threads: 1", "threads: 2000"), "threads must be less than or equal to 1024, got 2000"),
        (SMOKE.replace("threads: 1", "threads: 1" + 30 * "0"), "threads: Unable to parse .* exceeded maximum size"),
        (SMOKE.replace("threads: 1", "threads: 1" + 5000 * "0"), "threads must be a .* number, got inf"),
        (
            SMOKE.replace("arguments: {num_cascades: 2", "arguments: &a {z: *a, num_cascades: 2", 1),
            "networks.varnet.arguments: unknown key 'z': choose one of num_cascades",
        ),
        (f"{SMOKE}name: demo\n", "name must be the name of the file, 'odd', or missing, got 'demo'"),
        (f"{SMOKE}name:\n", "name must be the name of the file, 'odd', or missing, got None"),
    ],
)
def test_a_file_that_is_no_yaml_of_settings_is_refused_with_its_line(tmp_path, content, sentence):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^odd\.yaml[ :.]+{sentence}") as raised:
        load_config(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_a_byte_order_mark_a_date_and_a_leading_zero_are_read(tmp_path):
    text = SMOKE.replace("threads: 1", "threads: 010\nname: dated")
    text = re.sub("description: .*", "description: 2024-01-01", text)
    (tmp_path / "dated.yaml").write_text(text, encoding="utf-8-sig")
    config = load_config(tmp_path / "dated.yaml")
    assert (config.name, config.description, config.threads) == ("dated", "2024-01-01", 10)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, found in (("none.yaml", "no file"), ("folder.yaml", "a folder")):
        with pytest.raises(FileNotFoundError, match=f"{name} must be a YAML file of settings, got {found}"):
            load_config(tmp_path / name)


@pytest.mark.parametrize("overrides", (["threads=2"], [("threads", 2)], "threads=2", 3, (), {3: 4}, {None: 3}))
def test_overrides_that_are_no_dictionary_are_refused(overrides):
    with pytest.raises(TypeError, match="^overrides must be a dictionary with keys such as 'latency.repeats', got "):
        load_config("smoke", overrides)


@pytest.mark.parametrize("name", (None, 3, ["smoke"], b"smoke", "", "."))
def test_a_name_of_another_type_is_refused(name):
    with pytest.raises(ValueError, match="^unknown config .*: choose one of .*smoke"):
        load_config(name)


def test_a_file_name_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="^name must have file names of at most 255 bytes, got 305: aaa"):
        load_config("a" * 300 + ".yaml")


def test_no_override_sends_results_to_another_configuration():
    with pytest.raises(ValueError, match="smoke.yaml.name must be the name of the file, 'smoke', or missing"):
        load_config("smoke", {"name": "demo"})


def test_a_network_may_have_its_own_equivariance():
    config = load_config("smoke", {"networks.usrnet.self_supervised": {"rotations": "right", "weight": 0.5}})
    assert config.networks["usrnet"].self_supervised.weight == 0.5 and config.self_supervised.weight == 1.0


def test_overrides_beat_the_file_and_change_one_place():
    config = load_config("smoke", {"networks.varnet.finetuning.school.steps": 17, "data.seed": 5})
    assert config.networks["varnet"].finetuning["school"].steps == 17 and config.data.seed == 5
    assert config.networks["deq"].finetuning["school"].steps == 3, "the same alias in the file"
    assert load_config("smoke").data.seed == 0


def test_every_key_is_read():
    """18 of 80 keys of the authors' configurations are never read; here each is an attribute or passed on whole."""
    paths = [path for path in sorted((ROOT / "spade").rglob("*.py")) if path.name != "config.py"]
    paths += [*sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")), *ROOT.glob("workflow/Snakefile")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    code += (ROOT / "spade" / "config.py").read_text(encoding="utf-8").split("def warm_start_at")[1]
    assert re.search(r"config\.sampling\.model_dump\(\)", code)
    names = [name for part in PARTS if part is not Sampling for name in part.model_fields]
    assert not [
        name for name in names if not re.search(rf"\.{name}\b|\[\\?[\"']{name}\\?[\"']\]|get\(\"{name}\"", code)
    ]


def test_what_is_passed_on_whole_is_what_the_loop_and_the_strategy_take():
    import inspect

    from spade.data.fastmri import MultiCoilSlices
    from spade.losses import ALLOWED_SETTINGS

    apart = {"loss", "rows", "contraction", "steps_at", "learning_rate_at"}
    assert set(Training(steps=1).arguments()) | apart == set(Training.model_fields)
    Training(**Training(steps=1).arguments())
    assert set(Equivariance.model_fields) <= set(ALLOWED_SETTINGS["self-supervised"])
    assert set(Sampling.model_fields) <= set(inspect.signature(MultiCoilSlices).parameters)


def test_constructor_arguments_are_known_to_the_networks():
    from spade.runs import build_network

    def as_lists(settings: dict) -> dict:
        return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}

    for name in ("smoke", "demo"):
        config = load_config(name)
        for network in config.networks:
            built = as_lists(build_network(network, config).config())
            assert all(built[key] == value for key, value in as_lists(config.networks[network].arguments).items())


def test_configurations_are_immutable():
    config = load_config("smoke")
    for part in (config, config.data, config.latency, config.networks["varnet"].pretraining):
        with pytest.raises(ValueError, match="frozen"):
            part.seed = 3


def test_choose_returns_what_is_known():
    assert choose("network", "deq", ["deq", "varnet"]) == "deq" and project_root() == ROOT
    assert choose("start", "random", STARTS) == "random"
