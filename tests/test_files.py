"""A result survives a full disk and a kill; damaged files are named."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spade.basics import content_key
from spade.data.fastmri import find_files
from spade.data.phantom import simulate
from spade.files import atomic_write, project_root, read_json, resolve, write_json
from spade.runs import provenance

WRITES_FOREVER = """
import sys, time
from spade.files import atomic_write

def write(part):
    with open(part, "w") as file:
        file.write('{"psnr": ')
        file.flush()
        print("half-way", flush=True)
        time.sleep(60)

atomic_write(sys.argv[1], write)
"""


def test_a_full_disk_leaves_the_old_result(tmp_path):
    path = write_json(tmp_path / "result.json", {"psnr": 30})

    def fill(part: Path) -> None:
        part.write_text('{"psnr": ', encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, fill)
    assert read_json(path) == {"psnr": 30}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_leaves_the_old_result(tmp_path):
    path = write_json(tmp_path / "result.json", {"psnr": 30})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITES_FOREVER, str(path)], stdout=subprocess.PIPE, encoding="utf-8", env=environment
    ) as process:
        assert process.stdout.readline() == "half-way\n"
        process.kill()
        assert process.wait(timeout=300) == -signal.SIGKILL
    assert read_json(path) == {"psnr": 30}
    assert list(tmp_path.glob("*.json")) == [path]  # what the killed process left is not taken for a result
    write_json(path, {"psnr": 31})
    assert read_json(path) == {"psnr": 31}


def test_a_keyboard_interrupt_leaves_no_rest(tmp_path):
    def interrupt(part: Path) -> None:
        part.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "new.txt", interrupt)
    assert not list(tmp_path.iterdir())


def test_readers_see_the_old_or_the_new_file_while_it_is_written(tmp_path):
    path = atomic_write(tmp_path / "a.txt", lambda part: part.write_text("old", encoding="utf-8"))

    def write(part: Path) -> None:
        part.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old" and part.suffix == ".txt"

    atomic_write(path, write)
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("content", (b"", b'{"psnr": 3', b"\xff\xfe\x00"))
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        read_json(path)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        read_json(tmp_path / "none.json")


def test_a_writer_that_writes_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="write must create the file that it receives for .*a.txt, got no file"):
        atomic_write(tmp_path / "a.txt", lambda part: None)
    assert not list(tmp_path.iterdir())


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    path = write_json(tmp_path / "result.json", {"seed": 7})
    with pytest.raises(TypeError, match="value must be JSON, a path, an array or a tensor, got <class 'object'>"):
        write_json(path, {"model": object})
    assert read_json(path) == {"seed": 7}


def test_keys_depend_on_type_shape_content_and_order():
    keys = [
        content_key(*parts)
        for parts in ((1, 2), (2, 1), ("12",), (b"12",), (torch.zeros(4),), (torch.zeros(2, 2),), ())
    ]
    assert len(set(keys)) == len(keys) and all(len(key) == 16 for key in keys)
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        content_key(Path("a"))
    z = torch.tensor([1 + 2j])
    assert content_key(z.conj()) == content_key(torch.tensor([1 - 2j]))


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    """safetensors writes files that only their owner may read."""
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    made = atomic_write(tmp_path / "made", lambda part: (part.touch(0o600), part.chmod(0o600)))
    assert made.stat().st_mode == ordinary.stat().st_mode


def test_paths_of_a_configuration_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/data") == tmp_path / "data" and resolve("~") == tmp_path
    assert resolve("data") == project_root() / "data" and resolve(tmp_path) == tmp_path
    made = simulate("~/data", 1, 1, shape=(32, 32), num_coils=2, progress=False)
    assert made == find_files("~/data") == [tmp_path / "data" / "demo_0000.h5"]


def test_a_new_result_is_no_change_of_the_code(tmp_path, monkeypatch):
    """A batch replaces committed figures while its later runs begin."""
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
    )
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    (tmp_path / "outputs").mkdir()
    for name in ("settings.ini", "outputs/figure.png", "code.py"):
        (tmp_path / name).write_text("[DEFAULT]\nlib_name = spade\n", encoding="utf-8")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "all")
    monkeypatch.setattr("spade.runs.project_root", lambda: tmp_path)
    clean = provenance()["commit"]
    (tmp_path / "outputs" / "figure.png").write_text("new", encoding="utf-8")
    assert len(clean) == 12 and provenance()["commit"] == clean
    (tmp_path / "code.py").write_text("new", encoding="utf-8")
    assert provenance()["commit"] == f"{clean}+changes"
