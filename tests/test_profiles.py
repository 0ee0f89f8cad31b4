"""Profiles: names are refused by name, precedence is file < override, and every key is read by some code."""
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from spade.basics import choose
from spade.config import PHOTO_NETWORKS, Data, Equivariance, Latency, NetworkSettings, Photos, Profile, Sampling, Simulation, Training, commit, load_profile, profile_names, provenance, versions
from spade.files import project_root

ROOT = Path(__file__).resolve().parents[1]
PARTS = (Profile, Data, Photos, Simulation, Sampling, NetworkSettings, Training, Equivariance, Latency)


def write_profile(folder: Path, **changes) -> Path:
    """The smoke profile with top-level keys changed, in a file of its own."""
    settings = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def test_the_four_profiles_of_the_paper_ship():
    assert {"smoke", "demo", "gpu", "paper"} <= set(profile_names())


@pytest.mark.parametrize("name", ["smoke", "demo", "gpu", "paper"])
def test_every_profile_reads_and_serves_every_network_and_strategy(name):
    profile = load_profile(name)
    assert set(profile.networks) == {"deq", "varnet", "e2e-varnet", "usrnet"}
    assert all(set(settings.finetuning) == {"supervised", "school", "self-supervised"} for settings in profile.networks.values())


def test_profiles_of_certain_data_serve_the_networks_of_their_problem():
    siat, cbsd68 = load_profile("siat"), load_profile("cbsd68")
    assert set(siat.networks) == {"deq", "varnet", "e2e-varnet"} and siat.photos is None
    assert set(cbsd68.networks) == set(PHOTO_NETWORKS) and cbsd68.data is None and cbsd68.photos.scales == (2, 3, 4)
    assert "school" in cbsd68.networks["usrnet"].finetuning and cbsd68.networks["usrnet"].published


def test_the_papers_profile_is_the_papers_setting():
    paper = load_profile("paper")
    assert paper.data.subjects == (145, 10, 10) and paper.ratios == (0.05, 0.10, 0.20, 0.40) and paper.sampling.acs_fraction == 0.10
    for network in paper.networks.values():
        assert not network.arguments, "no arguments means the paper's size"
        assert {network.pretraining.learning_rate, *(t.learning_rate for t in network.finetuning.values())} == {1e-5}


def test_unknown_profile_names_the_known():
    with pytest.raises(ValueError, match="unknown profile 'dmeo': choose one of cbsd68, demo, gpu, paper, siat, smoke"):
        load_profile("dmeo")


@pytest.mark.parametrize("changes, message", [
    ({"worker": 2}, "'worker'.*workers"),
    ({"data": {"folder": "x", "subjects": [1, 1, 1], "shape": [8, 8]}}, r"changed.yaml.data: 'shape'"),
    ({"data": {"folder": "x"}}, "lacks subjects"),
    ({"data": {"folder": "x", "subjects": [1, 1]}}, "data.subjects"),
    ({"sampling": {"exact": "yes please"}}, "sampling.exact is 'yes please'"),
    ({"networks": {"unet": {}}}, "unknown network 'unet': choose one of deq"),
    ({"networks": {"varnet": {"finetuning": {"scool": {"steps": 1}}}}}, "unknown strategy 'scool'"),
    ({"networks": {"varnet": {"pretraining": {"steps": 1, "schedule": "warm"}}}}, "unknown schedule 'warm'"),
    ({"networks": {"varnet": {"transfer": {"acceleration": 6, "training": {"steps": 1, "schedule": "warm"}}}}}, "unknown schedule 'warm'"),
    ({"networks": {"varnet": {"transfer": {"acceleration": 6}}}}, "networks.varnet.transfer lacks training"),
    ({"networks": {"varnet": {"transfer": {"acceleration": 0, "training": {"steps": 1}}}}}, "transfer.acceleration is 0; expected at least 1"),
    ({"networks": {"usrnet": {"transfer": {"acceleration": 6, "training": {"steps": 1}}}}}, "super-resolution does not have"),
    ({"random_start": {"supervised": [0.10]}}, "expected ratios out of changed.yaml.ratios"),
    ({"device": "tpu"}, "unknown device 'tpu'"),
    ({"workers": None}, "workers is None"),
])
def test_what_does_not_fit_is_refused_by_its_full_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_profile(write_profile(tmp_path, **changes))


@pytest.mark.parametrize("key, value, expected", [
    ("ratios", [0.4, 1.0], r"smoke.yaml.ratios\[1\] is 1.0; expected a pre-defined ratio between 0 and 1"),
    ("ratios", [], "smoke.yaml.ratios is empty"),
    ("seeds", [], "smoke.yaml.seeds is empty"),
    ("workers", 0, "smoke.yaml.workers is 0; expected at least 1"),
    ("threads", -1, "smoke.yaml.threads is -1"),
    ("data.subjects", [2, 0, 1], r"smoke.yaml.data.subjects\[1\] is 0; expected at least 1"),
    ("data.simulation.snr", 0.0, "smoke.yaml.data.simulation.snr is 0.0; expected a positive number"),
    ("data.simulation.shape", [64, 8], r"smoke.yaml.data.simulation.shape\[1\] is 8; expected at least 16 pixels"),
    ("sampling.acs_fraction", 1.5, "smoke.yaml.sampling.acs_fraction is 1.5; expected above 0 and at most 1"),
    ("networks.deq.pretraining.steps", 0, "smoke.yaml.networks.deq.pretraining.steps is 0; expected at least 1"),
    ("networks.deq.pretraining.learning_rate", -1e-3, "networks.deq.pretraining.learning_rate is -0.001; expected a positive number"),
    ("networks.deq.pretraining.learning_rate", float("inf"), "networks.deq.pretraining.learning_rate is inf"),
    ("networks.deq.finetuning.school.clip", 0.0, "networks.deq.finetuning.school.clip is 0.0"),
    ("networks.deq.finetuning.school.loss", "l2", "unknown loss 'l2': choose one of .*smooth_l1, ssim"),
    ("networks.deq.finetuning.school.batch_size", 0, "networks.deq.finetuning.school.batch_size is 0"),
    ("networks.deq.finetuning.school.steps_at", {"0.4": 0}, "networks.deq.finetuning.school.steps_at.0.4 is 0"),
    ("ratios", [0.4, 0.4], "smoke.yaml.ratios is .0.4, 0.4.; expected each once"),
    ("seeds", [0, 0], "smoke.yaml.seeds is .0, 0.; expected each once"),
    ("networks.deq.finetuning.school.steps_at", {"forty": 9}, "networks.deq.finetuning.school.steps_at has the key 'forty'"),
    ("random_start.supervised", [0.0], r"smoke.yaml.random_start.supervised\[0\] is 0.0"),
    ("self_supervised.weight", -1.0, "smoke.yaml.self_supervised.weight is -1.0; expected at least 0"),
    ("latency.repeats", 0, "smoke.yaml.latency.repeats is 0"),
    ("latency.size", "full", "unknown latency.size 'full'"),
    ("photos.scales", [2, 0], r"smoke.yaml.photos.scales\[1\] is 0"),
    ("photos.scales", [2, 2], "smoke.yaml.photos.scales is .2, 2.; expected at least one scale, each once"),
    ("photos.noise", 10.0, "smoke.yaml.photos.noise is 10.0; expected at least 0 and below 1"),
    ("photos.pairing", "both", "unknown photos.pairing 'both': choose one of turn, all"),
    ("photos.tile", 8, "smoke.yaml.photos.tile is 8; expected at least 16 pixels"),
    ("photos.validation_limit", 0, "smoke.yaml.photos.validation_limit is 0"),
    ("photos", None, "smoke.yaml lacks the section photos, which networks.usrnet needs"),
    ("data", None, "smoke.yaml lacks the section data, which networks.deq needs"),
])
def test_a_number_out_of_range_is_refused_in_one_sentence_with_its_key(key, value, expected):
    with pytest.raises(ValueError, match=expected) as raised:
        load_profile("smoke", {key: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_a_network_may_have_an_equivariance_of_its_own():
    profile = load_profile("smoke", {"networks.usrnet.self_supervised": {"rotations": "right", "weight": 0.5}})
    assert profile.networks["usrnet"].self_supervised.weight == 0.5 and profile.self_supervised.weight == 1.0
    with pytest.raises(ValueError, match="unknown rotations 'left'"):
        load_profile("smoke", {"networks.usrnet.self_supervised": {"rotations": "left"}})


def test_overrides_beat_the_file_and_are_checked_alike():
    profile = load_profile("smoke", {"networks.varnet.finetuning.school.steps": 17, "data.seed": 5})
    assert profile.networks["varnet"].finetuning["school"].steps == 17 and profile.data.seed == 5
    assert load_profile("smoke").data.seed == 0
    with pytest.raises(ValueError, match="'seeed'"):
        load_profile("smoke", {"data.seeed": 5})


def test_no_key_is_read_by_nobody():
    """The authors' configurations had 18 of 80 keys that no line reads; each field here is an attribute, or a setting passed on whole."""
    code = "\n".join(path.read_text() for path in sorted((ROOT / "spade").rglob("*.py")) if path.name != "profiles.py")
    code += "\n".join(path.read_text() for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")))
    passed_on_whole = {Training: r"vars\(training\)", Equivariance: r"as_plain\(profile\.networks\[run\.network\]\.self_supervised or profile\.self_supervised\)"}
    unread = []
    for part in PARTS:
        if part in passed_on_whole:
            assert re.search(passed_on_whole[part], code)
            continue
        unread += [f"{part.__name__}.{field.name}" for field in fields(part) if not re.search(rf"\.{field.name}\b|\['{field.name}'\]", code)]
    assert not unread


def test_what_is_passed_on_whole_is_what_the_loop_takes():
    """`train` and the strategy know every field of `Training` and `Equivariance`, so none can be without effect."""
    import inspect

    from spade.losses import SelfSupervised
    from spade.training import Settings
    assert {field.name for field in fields(Training)} <= {field.name for field in fields(Settings)} | {"loss", "steps_at", "learning_rate_at"}, "the loss goes to the strategy, the others to Training.at"
    assert {field.name for field in fields(Equivariance)} <= set(inspect.signature(SelfSupervised).parameters)


def test_constructor_arguments_are_known_to_the_networks():
    from spade.runs import build_network
    for name in ("smoke", "demo"):
        profile = load_profile(name)
        for network in profile.networks:
            built = build_network(network, profile).config()
            plain = lambda settings: {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
            assert all(plain(built)[name] == value for name, value in plain(profile.networks[network].arguments).items())


def test_profiles_are_immutable():
    profile = load_profile("smoke")
    assert all(is_dataclass(part) for part in (profile, profile.data, profile.latency))
    with pytest.raises(AttributeError):
        profile.data.seed = 3


def test_provenance_names_commit_versions_and_device_but_no_path_of_this_machine():
    record = provenance(load_profile("smoke"), seed=3)
    assert {"seed", "commit", "versions", "device", "profile"} <= set(record)
    assert versions()["torch"].startswith("2.") and commit()
    assert str(ROOT) not in str(record) and str(Path.home()) + "/" not in str(record)


def test_choose_returns_what_is_known():
    assert choose("network", "deq", ["deq", "varnet"]) == "deq" and project_root() == ROOT
