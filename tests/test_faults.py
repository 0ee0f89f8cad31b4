"""Every kind of file that we write, damaged in three ways: nothing may be wrong in silence. More: tests/faults.py."""

import os
import signal
import time

import pytest
from faults import Kind, all_kinds, damage, table, timed_outcome

FAULTS = int(os.environ.get("SPADE_FAULTS", 6))  # of each sort
SEED = int(os.environ.get("SPADE_FAULTS_SEED", 0))
NAMES = ("acquisition", "converted", "reconstruction", "coil maps", "network", "training state", "result.json")
NAMES += ("metrics.csv", "curve.csv", "images.npz", "varnet.csv", "varnet.json", "checksum", "tidy runs.jsonl")
NAMES += ("tidy metrics.csv.gz", "tidy curves.csv.gz", "tidy latency.csv", "tidy evolution.csv.gz", "tidy pictures.h5")
NAMES += ("tidy checksums.json",)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {kind.name: kind for kind in all_kinds(tmp_path_factory.mktemp("kinds"))}


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed_by_the_name_of_the_file_or_changes_nothing(kinds, name):
    found = table({name: damage(kinds[name], SEED, FAULTS)}).iloc[0]
    assert set(kinds) == set(NAMES)
    assert found[["silent", "unnamed", "hangs"]].sum() == 0 and found["noticed"] > FAULTS, found.to_dict()


def test_a_read_that_hangs_or_dies_is_counted(tmp_path):
    def busy():
        while True:
            pass

    assert timed_outcome(Kind("busy", tmp_path / "a", busy), "", processor=1) == "hangs"
    assert timed_outcome(Kind("asleep", tmp_path / "a", lambda: time.sleep(60)), "", clock=0.5) == "hangs"
    dead = Kind("dead", tmp_path / "a", lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert timed_outcome(dead, "") == f"unnamed: the process ended: {-signal.SIGKILL}"
