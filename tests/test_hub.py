"""Publishing a network: the network is replaced by a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

import spade
from spade.checkpoint import find_checkpoint
from spade.examples import brain
from spade.hub import save_folder
from spade.models import VarNet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """A folder in the place of the hub: a folder a repository, with what `huggingface_hub` would do."""
    folder = tmp_path / "server"

    class Api:
        def create_repo(self, repo, private, exist_ok):
            (folder / repo).mkdir(parents=True, exist_ok=exist_ok)
            (folder / repo / ".private").write_text(str(private), encoding="utf-8")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
            (folder / repo_id / ".message").write_text(commit_message, encoding="utf-8")

    def fetch(repo_id, filename, revision, local_dir):
        source = folder / (f"{repo_id}@{revision}" if revision else repo_id) / filename
        if not source.is_file():
            raise RuntimeError("404 Client Error.\nRepository Not Found")
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        return shutil.copy(source, local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setenv("SPADE_CACHE", str(tmp_path / "cache"))
    return folder


def a_student() -> torch.nn.Module:
    torch.manual_seed(0)
    return spade.prune(VarNet(num_cascades=1, channels=5, num_pools=2).eval(), 0.40)


def test_a_pushed_network_comes_back_to_the_last_bit(server, tmp_path):
    student, (y, A, _) = a_student(), brain()
    address = spade.push(student, "me/varnet-0.40", strategy="school", metrics={"psnr": 34.5})
    again = spade.load(address)
    with torch.no_grad():
        assert address == "hub:me/varnet-0.40" and torch.equal(again(y, A), student(y, A))
    assert sorted(path.name for path in (server / "me/varnet-0.40").iterdir() if path.name[0] != ".") == [
        "README.md",
        "model.safetensors",
    ]
    card = (server / "me/varnet-0.40/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: spade\n") and 'spade.load("hub:me/varnet-0.40")' in card
    assert "psnr" in card and "school" in card and "VarNet" in card
    assert (server / "me/varnet-0.40/.private").read_text(encoding="utf-8") == "False"
    assert find_checkpoint(address) == tmp_path / "cache/hub/me/varnet-0.40/model.safetensors"
    assert spade.describe(address).startswith("---\nlibrary_name: spade\n")


def test_a_revision_is_loaded_by_its_name(server):
    spade.push(a_student(), "me/net")
    shutil.copytree(server / "me/net", server / "me/net@v1")
    shutil.rmtree(server / "me/net")
    assert spade.load("hub:me/net@v1").training is False
    with pytest.raises(FileNotFoundError, match=r"^hub:me/net must be a repository with model.safetensors, got: 404"):
        spade.load("hub:me/net")


@pytest.mark.parametrize("name", ("me", "me/net/more", "../../etc/passwd", "", "me/net@", "https://hub/me/net"))
def test_a_wrong_name_is_refused(server, name):
    with pytest.raises(ValueError, match="^repo must be owner/name or owner/name@revision, got"):
        spade.load(f"hub:{name}")


def test_a_damaged_upload_is_refused(server):
    spade.push(a_student(), "me/net")
    file = server / "me/net/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="must have the SHA-256 in its header"):
        spade.load("hub:me/net")


def test_a_folder_is_loaded_by_its_name_and_a_file_of_the_same_name_first(tmp_path):
    student, other = a_student(), VarNet(num_cascades=2, channels=4, num_pools=1)
    assert save_folder(student, tmp_path / "net") == tmp_path / "net"
    assert len(spade.load(tmp_path / "net").cascades) == 1
    assert 'spade.load("net")' in (tmp_path / "net/README.md").read_text(encoding="utf-8")
    spade.save(other, tmp_path / "net")
    assert len(spade.load(tmp_path / "net").cascades) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        spade.load(tmp_path / "empty")


def test_the_command_line_takes_a_folder(tmp_path):
    save_folder(a_student(), tmp_path / "net", strategy="school")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = lambda *words: subprocess.run(
        [sys.executable, "-m", "spade", *words], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    shown = call("info", "net")
    assert shown.returncode == 0 and "school" in shown.stdout, shown.stderr
    wrong = call("info", "hub:nothing")
    assert wrong.returncode == 2 and "owner/name" in wrong.stderr and "Traceback" not in wrong.stderr
