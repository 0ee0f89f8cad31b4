"""Every kind of file that we write, damaged in three ways: nothing may be wrong in silence. More: tests/faults.py."""

import os

import pytest
from faults import all_kinds, damage, table

FAULTS = int(os.environ.get("SPADE_FAULTS", 6))  # of each sort
SEED = int(os.environ.get("SPADE_FAULTS_SEED", 0))
NAMES = ("acquisition", "coil maps", "network", "training state", "result.json", "metrics.csv", "curve.csv")
NAMES += ("images.npz", "varnet.csv", "varnet.json", "checksum", "tidy runs.jsonl", "tidy metrics.csv.gz")
NAMES += ("tidy curves.csv.gz", "tidy latency.csv", "tidy evolution.csv.gz", "tidy pictures.h5", "tidy checksums.json")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {kind.name: kind for kind in all_kinds(tmp_path_factory.mktemp("kinds"))}


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed_by_the_name_of_the_file_or_changes_nothing(kinds, name):
    found = table({name: damage(kinds[name], SEED, FAULTS)}).iloc[0]
    assert set(kinds) == set(NAMES)
    assert found["silent"] == 0 and found["unnamed"] == 0 and found["noticed"] > FAULTS, found.to_dict()
