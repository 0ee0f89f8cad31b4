"""The JSON schema beside the configurations: in step with the classes, and as strict as they are."""

import json
from pathlib import Path

import jsonschema
import pytest

from spade.config import Config, config_names, config_schema, load_config, read_yaml
from spade.training import read_settings

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "config" / "schema.json"
SCHEMA = json.loads(STORED.read_text(encoding="utf-8"))


def as_json(value):
    """YAML's mapping with keys of text, as JSON has them."""
    return json.loads(json.dumps(value))


def faults(settings) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(as_json(settings))]


def test_the_stored_schema_is_that_of_the_classes():
    """After a change: python -c 'import spade.config as c, spade.files as f; f.write_json("config/schema.json",
    c.config_schema())'"""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert as_json(config_schema()) == SCHEMA


@pytest.mark.parametrize("name", config_names())
def test_each_configuration_fits_and_names_the_schema(name):
    path = ROOT / "config" / f"{name}.yaml"
    assert not faults(read_yaml(path))
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def settings_of(schema):
    """Every setting's schema, by its path."""
    for owner, part in {"": schema, **schema["$defs"]}.items():
        for name, setting in part["properties"].items():
            yield f"{owner}.{name}", setting


def test_every_setting_has_a_description_or_a_section():
    bare = {name for name, setting in settings_of(SCHEMA) if "description" not in setting}
    texts = json.dumps(SCHEMA)
    assert "pre-defined (section 4)" in texts and "updates of Adam" in texts
    assert len(bare) < 0.4 * sum(1 for _ in settings_of(SCHEMA)), bare


@pytest.mark.parametrize(
    "key, value, sentence",
    (
        ("data.seeed", 5, "is not valid under any of the given schemas"),
        ("networks.varnet.pretraining.learning_rate", -1, "-1 is less than or equal to the minimum of 0"),
        ("networks.varnet.pretraining.steps", 0, "0 is less than the minimum of 1"),
        ("networks.varnet.pretraining.loss", "l2", "'l2' is not one of"),
        ("networks.varnet.finetuning.shool", {"steps": 3}, "'shool' is not one of"),
        ("networks.vranet", {}, "'vranet' is not one of"),
        ("ratios", [0.4, 1.0], "1.0 is greater than or equal to the maximum of 1"),
        ("device", "gpu", "'gpu' does not match"),
        ("mixed_precision", "fp8", "'fp8' is not one of"),
    ),
)
def test_what_the_classes_refuse_the_schema_refuses(key, value, sentence):
    settings = as_json(read_yaml(ROOT / "config" / "smoke.yaml"))
    place = settings
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    place[last] = value
    assert any(sentence in fault for fault in faults(settings)), faults(settings)
    with pytest.raises(ValueError):
        read_settings(Config, {**settings, "name": "smoke"})


def test_a_name_is_no_required_setting():
    assert "name" not in SCHEMA["required"] and load_config("smoke").name == "smoke"
