"""Profiles: names are refused by name, precedence is file < override, and every key is read by some code."""
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from spade.profiles import (Data, Equivariance, Latency, NetworkSettings, Profile, Sampling, Simulation, Training, choose, commit, load_profile,
                            profile_names, project_root, provenance, versions)

ROOT = Path(__file__).resolve().parents[1]
PARTS = (Profile, Data, Simulation, Sampling, NetworkSettings, Training, Equivariance, Latency)


def write_profile(folder: Path, **changes) -> Path:
    """The smoke profile with top-level keys changed, in a file of its own."""
    settings = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def test_the_four_profiles_of_the_paper_ship():
    assert {"smoke", "demo", "gpu", "paper"} <= set(profile_names())


@pytest.mark.parametrize("name", ["smoke", "demo", "gpu", "paper", "siat"])
def test_every_profile_reads_and_serves_every_network_and_strategy(name):
    profile = load_profile(name)
    assert set(profile.networks) == {"deq", "varnet", "e2e-varnet"}
    assert all(set(settings.finetuning) == {"supervised", "school", "self-supervised"} for settings in profile.networks.values())


def test_the_papers_profile_is_the_papers_setting():
    paper = load_profile("paper")
    assert paper.data.subjects == (145, 10, 10) and paper.ratios == (0.05, 0.10, 0.20, 0.40) and paper.sampling.acs_fraction == 0.10
    for network in paper.networks.values():
        assert not network.arguments, "no arguments means the paper's size"
        assert {network.pretraining.learning_rate, *(t.learning_rate for t in network.finetuning.values())} == {1e-5}


def test_unknown_profile_names_the_known():
    with pytest.raises(ValueError, match="unknown profile 'dmeo': choose one of demo, gpu, paper"):
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
    ({"device": "tpu"}, "unknown device 'tpu'"),
    ({"workers": None}, "workers is None"),
])
def test_what_does_not_fit_is_refused_by_its_full_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_profile(write_profile(tmp_path, **changes))


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
    passed_on_whole = {Training: r"vars\(training\)", Equivariance: r"as_plain\(settings\.self_supervised\)"}
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
    assert {field.name for field in fields(Training)} <= {field.name for field in fields(Settings)} | {"loss", "steps_at"}, "the loss goes to the strategy, steps_at to Training.at"
    assert {field.name for field in fields(Equivariance)} <= set(inspect.signature(SelfSupervised).parameters)


def test_constructor_arguments_are_known_to_the_networks():
    from spade.experiment import build_network
    for name in ("smoke", "demo"):
        profile = load_profile(name)
        for network in profile.networks:
            built = build_network(network, profile).config()
            assert profile.networks[network].arguments.items() <= built.items()


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
