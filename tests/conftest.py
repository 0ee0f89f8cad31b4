"""What several test files share: where optional real data lies, and one thread for repeatable numbers."""

import os
import tempfile
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    """Where the home cannot be written, what programs keep there is in a folder that is removed at the end."""
    if not os.access(Path.home(), os.W_OK):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        for name in ("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
            os.environ.setdefault(name, folder.name)


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    """Reductions over several threads may sum in another order; one thread makes a run repeatable."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of what the batch reads, so that a test can change it; the present folder, with a blank in its path."""
    from batches import project_copy  # it imports notebooks' libraries, which other tests do without

    return project_copy(tmp_path, monkeypatch)
