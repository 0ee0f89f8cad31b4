"""Pins, metadata, the licence, the wheel in an empty folder, and what a newcomer types."""

import configparser
import email
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings() -> dict:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "every line is name==version, without a local suffix such as +cpu"
    )
    return {canonical(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_within_its_range(settings, pins):
    for text in " ".join(settings[key] for key in settings if key.endswith("requirements")).split():
        requirement = Requirement(text)
        assert canonical(requirement.name) in pins, f"{requirement.name} is missing in constraints.txt"
        assert pins[canonical(requirement.name)] in requirement.specifier, text


def test_nbdev_stays_below_three_and_keeps_papermills_tag(settings):
    assert "nbdev>=2.4,<3" in settings["dev_requirements"].split()
    assert settings["allowed_cell_metadata_keys"].split() == ["tags"]


def test_extras_name_the_packages_of_the_settings(settings):
    """A message that names an extra sends nobody to an extra without the package."""
    from spade.installation import DISTRIBUTION, EXTRAS

    assert settings["dist_name"] == DISTRIBUTION
    for module, extra in EXTRAS.items():
        names = [canonical(Requirement(text).name) for text in settings[f"{extra}_requirements"].split()]
        assert {"skimage": "scikit-image", "PIL": "pillow"}.get(module, module) in names, module


def test_conda_gives_the_same_pins(settings, pins):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python == f"python={settings['min_python']}"
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-c constraints.txt" in pip and "-e .[dev]" in pip
    named = [Requirement(line) for line in pip if "==" in line]
    assert named and all(pins[canonical(entry.name)] in entry.specifier for entry in named)


def test_the_running_environment_is_the_pinned_one(pins):
    from importlib.metadata import version

    for name in ("torch", "nbdev", "torch-pruning", "papermill", "scikit-image", "snakemake"):
        assert Version(version(name)).public == pins[name].public


def test_versions_agree(settings):
    import spade

    assert spade.__version__ == settings["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["version"] and "2311.02003" in citation["preferred-citation"]["journal"]


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_public_names():
    import spade

    assert {"prune", "finetune", "save", "load"} <= set(spade.__all__)
    assert all(callable(getattr(spade, name)) for name in spade.__all__)


def test_each_module_is_there_after_import_spade():
    """Imported when it is first used, and not before: `import spade` loads no torch."""
    names = {path.stem for path in (ROOT / "spade").glob("*.py") if not path.stem.startswith("_")} | {"models"}
    code = (
        "import sys, spade; assert 'torch' not in sys.modules\n"
        f"assert {names} <= set(dir(spade))\n"
        f"[getattr(spade, name) for name in {sorted(names)}]\n"
        "print(spade.prune.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout == "spade.pruning\n", done.stderr


def test_import_touches_no_network_and_no_project_file(tmp_path):
    """In an empty folder, with sockets forbidden."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import spade, spade.workflow, spade.tables, spade.paper\n"
        "print(spade.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# The wheel

SOURCES = (".ci", "config", "data/README.md", "docs", "nbs", "outputs/README.md", "spade", "tests", "workflow")
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "api", "experiments_*")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it. The source is a copy: building leaves files."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
        else:
            (source / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(ROOT / name, source / name)
    for path in [path for path in ROOT.iterdir() if path.is_file()]:
        shutil.copy(path, source)
    for path in [*ROOT.glob("outputs/*/*.md"), *ROOT.glob("outputs/*/*.png")]:
        (source / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("spade_mbdl-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


def files_below(source: Path, *names: str) -> dict[str, bytes]:
    """The files of these folders of the source, by path."""
    paths = [path for name in names for path in sorted((source / name).rglob("*")) if path.is_file()]
    return {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in paths
        if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }


def test_the_wheel_carries_modules_configurations_experiments_and_the_workflow(built, wheel):
    """In step with the source, byte by byte."""
    packed = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    modules = files_below(built / "source", "spade")
    others = files_below(built / "source", "config", "nbs/experiments", "workflow")
    others = {f"spade/assets/{name}": text for name, text in others.items() if not name.endswith(".notest")}
    assert packed == modules | others
    assert {"spade/py.typed", "spade/assets/config/demo.yaml", "spade/assets/workflow/Snakefile"} <= set(packed)


def test_a_module_that_was_removed_is_not_in_the_next_build(built):
    """Setuptools takes what lies in build/ as it is."""
    removed = built / "library" / "spade" / "removed.py"
    removed.parent.mkdir(parents=True)
    removed.touch()
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(built / "library")]
    done = subprocess.run(command, cwd=built / "source", capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and (removed.parent / "pruning.py").is_file() and not removed.exists(), done.stderr


def test_the_sdist_holds_what_its_tests_need(built):
    (path,) = built.glob("spade_mbdl-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = built / "source"
    needed = set(files_below(source, "config", "workflow", "spade", ".ci"))
    needed |= {name for name in files_below(source, "nbs", "tests") if name.endswith((".ipynb", ".py"))}
    endings = (".md", ".txt", ".toml", ".py", ".ini", ".cff")
    needed |= {path.name for path in source.iterdir() if path.suffix in endings}
    needed |= {"LICENSE", "Makefile", "Dockerfile", "environment.yml", "outputs/README.md"}
    assert needed <= names, needed - names


def test_the_metadata_of_the_wheel(wheel, settings):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    facts = email.message_from_string(wheel.read(name).decode())
    assert facts["Name"] == "spade-mbdl" and facts["License-Expression"] == "Apache-2.0"
    assert set(facts.get_all("License-File")) == {"LICENSE", "spade/assets/NOTICE"}
    assert facts["Requires-Python"] == ">=3.11"
    versions = [f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")]
    assert {*versions, "Typing :: Typed"} <= set(facts.get_all("Classifier"))
    assert "3.11 to 3.13" in (ROOT / "README.md").read_text(encoding="utf-8")
    extras = {"mri", "paper", "batch", "deepinv", "export", "ismrmrd", "docs", "dev", "all"}
    assert set(facts.get_all("Provides-Extra")) == extras
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", facts.get_payload()), "a relative link leads nowhere outside"


def test_links_of_the_long_description_are_absolute_where_the_repository_has_an_address():
    import ast

    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "long_description")
    scope = {"re": re, "cfg": {"branch": "main"}}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), scope)
    text = "See [a](b/c.md), [d](https://e.org) and\n\n![f](g.png)\n\nh"
    absolute = scope["long_description"](text, "https://x.org/y")
    assert absolute == (
        "See [a](https://x.org/y/blob/main/b/c.md), [d](https://e.org) and\n\n![f](https://x.org/y/raw/main/g.png)\n\nh"
    )
    assert scope["long_description"](text, "") == "See a, [d](https://e.org) and\n\n\nh"


# An environment that holds only what an installation brings


def distributions(settings: dict, *parts: str) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that the core, and these extras, install here, with all that they need."""
    todo = [Requirement(text) for part in ("", *parts) for text in settings[f"{part}_requirements".strip("_")].split()]
    found, seen = {}, set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        distribution = importlib.metadata.distribution(requirement.name)
        found[canonical(requirement.name)] = distribution
        for other in map(Requirement, distribution.requires or []):
            contexts = [{"extra": extra} for extra in ("", *requirement.extras)]
            if other.marker is None or any(map(other.marker.evaluate, contexts)):
                todo.append(other)
    return found


def environment(folder: Path, wheel: zipfile.ZipFile, found: dict) -> dict[str, str]:
    """The variables of a Python, started by `python -S`, that sees the wheel and these distributions only."""
    wheel.extractall(folder)
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **kept,
        "PYTHONPATH": str(folder),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def run(code: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-W", "error::UserWarning:spade", "-c", code]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def core(wheel, settings, tmp_path_factory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("core"), wheel, distributions(settings))


def test_the_core_installs_at_most_30_packages(settings):
    found = distributions(settings)
    assert len(found) <= 30, sorted(found)
    assert not {"pandas", "h5py", "scipy", "scikit-image", "matplotlib", "ipykernel", "snakemake"} & set(found)


def test_the_core_prunes_fine_tunes_saves_and_loads(core, tmp_path):
    """The README's Python, in an empty folder; what the core cannot do names its extra."""
    code = "\n".join(blocks("README.md", "python"))
    code += """
from spade.models import VarNet
network = VarNet(num_cascades=2, channels=4, num_pools=2)
spade.save(spade.prune(network, 0.4), "varnet")
print(type(spade.load("varnet")).__name__, spade.find_priors(cnn, torch.randn(1, 2, 64, 64)))
for module in ("data.phantom", "metrics", "runs"):
    try:
        __import__(f"spade.{module}")
    except ModuleNotFoundError as error:
        print(error)
assert not {"pandas", "h5py", "scipy", "skimage"} & set(__import__("sys").modules)
"""
    done = run(code, tmp_path, core)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "VarNet" in done.stdout
    assert "spade.data.phantom needs h5py: pip install 'spade-mbdl[mri]'" in done.stdout
    assert "spade.metrics needs pandas: pip install 'spade-mbdl[mri]'" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "varnet.safetensors"}
    done = run("import runpy; runpy.run_module('spade', run_name='__main__')", tmp_path, core)
    assert "prune" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_outside_of_a_checkout_configurations_come_from_the_package_or_a_path(wheel, settings, tmp_path):
    """In a stranger's project with a folder config/ of its own, and a settings.ini of another library."""
    variables = environment(tmp_path / "site", wheel, distributions(settings, "mri", "paper"))
    project = tmp_path / "project"
    (project / "config").mkdir(parents=True)
    (project / "config" / "theirs.yaml").write_text("a: 1", encoding="utf-8")
    (project / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n", encoding="utf-8")
    shutil.copy(ROOT / "config" / "smoke.yaml", project / "mine.yaml")
    code = """
from pathlib import Path
from spade.config import config_names, load_config
from spade.files import notebook_path, project_file, resolve
from spade.workflow import paper_reports, report_key
from spade.runs import provenance
print(config_names())
assert load_config("demo").name == "demo" and load_config("mine.yaml").name == "mine"
assert resolve("outputs/mine") == Path("outputs/mine").resolve()
assert notebook_path("finetune").is_file() and project_file("workflow", "Snakefile").is_file()
assert all(report_key(report) for report in paper_reports(load_config("mine.yaml")).values())
assert provenance()["commit"] == "unknown"
"""
    done = run(code, project, variables)
    names = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
    assert done.stdout == f"{names}\n", done.stderr[-3000:]
    assert sorted(path.name for path in project.iterdir()) == ["config", "mine.yaml", "settings.ini"]


def test_another_distribution_named_spade_is_warned_of_once(core, tmp_path):
    (tmp_path / "site" / "spade-4.1.2.dist-info").mkdir(parents=True)
    variables = core | {"PYTHONPATH": os.pathsep.join([core["PYTHONPATH"], str(tmp_path / "site")])}
    command = [sys.executable, "-S", "-c", "import spade, spade.installation; import spade; print(spade.__version__)"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr.count("spade-4.1.2.dist-info is another distribution") == 1


@pytest.mark.parametrize("choice, expected", [("TORCH=cpu", "+cpu --extra-index-url"), ("TORCH=cuda", "==2.13.0 -e")])
def test_make_installs_the_chosen_build_of_torch(choice, expected, tmp_path):
    command = ["make", "-n", "install", choice, f"VENV={tmp_path / 'v'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and expected in done.stdout, done.stderr
    refused = subprocess.run([*command, "TORCH=gpu"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert "TORCH must be cpu, cuda or a build" in refused.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_make_installs_gits_hooks_for_notebooks_and_writes_nothing_else(tmp_path):
    """In a path with a blank: a merge goes through nbdev_merge, and what was pulled is trusted by nbdev_trust."""
    project, home = tmp_path / "a project", tmp_path / "home"
    (project / ".venv" / "bin").mkdir(parents=True)
    home.mkdir()
    for name in ("Makefile", "config", "constraints.txt", ".gitattributes"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, project / name)
    for name, ends in (("nbdev_merge", 'cat "$3" > "$2"'), ("nbdev_trust", "exit 0")):
        (project / ".venv/bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >>called\n{ends}\n', encoding="utf-8")
        (project / ".venv/bin" / name).chmod(0o755)
    variables = {**os.environ, "HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def command(*what: str) -> None:
        done = subprocess.run(what, cwd=project, env=variables, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, (what, done.stdout, done.stderr)

    def commit(text: str) -> None:
        (project / "a.ipynb").write_text(text, encoding="utf-8")
        command("git", "add", ".gitattributes", "a.ipynb")
        command("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", text)

    command("git", "init", "-qb", "main")
    commit("base")
    command("git", "checkout", "-qb", "theirs")
    commit("theirs")
    command("git", "checkout", "-q", "main")
    commit("ours")
    command("make", "-o", ".venv/.installed-dev", ".venv/.hooks")
    command("git", "-c", "user.name=a", "-c", "user.email=a@b", "merge", "-q", "--no-edit", "theirs")
    called = (project / "called").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in called] == ["nbdev_merge", "nbdev_trust"] and "a.ipynb" in called[0]
    assert (project / "a.ipynb").read_text(encoding="utf-8") == "theirs" and not list(home.iterdir())
    hook = project / ".git" / "hooks" / "post-merge"
    hook.write_text("of the user", encoding="utf-8")
    command("make", "-B", "-o", ".venv/.installed-dev", ".venv/.hooks")
    assert hook.read_text(encoding="utf-8") == "of the user"


def test_make_lab_serves_the_notebooks(tmp_path):
    """The page that the browser opens is the list of the notebooks, whose links lead to the results, too."""
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders["BROWSER"] = "true"  # a command that does nothing
    virtual = os.path.relpath(sys.prefix, ROOT)  # make takes no blank in it
    choices = [f"VENV={virtual}", "ARGUMENTS=--allow-root --ServerApp.port=0"]
    command = ["make", "-o", f"{virtual}/.hooks", "lab", *choices]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | folders, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not (found := list(tmp_path.glob("RUNTIME/jpserver-file-to-run-*-open.html"))):
            assert server.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        assert "/lab/tree/nbs/index.ipynb?token=" in found[0].read_text(encoding="utf-8")
        (file,) = tmp_path.glob("RUNTIME/jpserver-*.json")
        facts = json.loads(file.read_text(encoding="utf-8"))

        def fetch(path: str) -> bytes:
            while True:
                try:
                    return urllib.request.urlopen(f"{facts['url']}{path}?token={facts['token']}", timeout=300).read()
                except urllib.error.URLError as error:  # before it listens
                    assert server.poll() is None and isinstance(error.reason, ConnectionRefusedError), error
                    time.sleep(0.2)

        assert "started" in json.loads(fetch("api/status"))
        assert b"JupyterLab" in fetch("lab/tree/nbs/index.ipynb")
        cells = json.loads(fetch("api/contents/nbs/index.ipynb"))["content"]["cells"]
        assert "](../outputs/demo/table_1.md)" in "".join("".join(cell["source"]) for cell in cells)
        assert json.loads(fetch("api/contents/outputs/demo/table_1.md"))["type"] == "file"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=300)


def interpreters(settings: dict) -> dict[str, str]:
    """The other Pythons of the classifiers that are on this machine, by version."""
    found, here = {}, f"{sys.version_info.major} {sys.version_info.minor}"
    for version in settings["python_versions"].split():
        pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
        for path in filter(None, [shutil.which(f"python{version}"), *pyenv]):
            command = [str(path), "-c", "import sys; print(*sys.version_info[:2])"]
            printed = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()
            if printed == version.replace(".", " ") != here:
                found[version] = str(path)
    return found


def test_the_modules_compile_and_the_light_part_runs_on_each_python_of_this_machine(settings, tmp_path):
    """Without any package: the syntax of all modules, and `import spade`."""
    shutil.copytree(ROOT / "spade", tmp_path / "spade", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    code = """
import compileall, spade
assert compileall.compile_dir("spade", quiet=1, force=True) and "prune" in dir(spade)
try:
    spade.pruning
except ModuleNotFoundError as error:
    print(error)
"""
    for python in interpreters(settings).values():
        done = subprocess.run([python, "-S", "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.stdout == "No module named 'torch'\n", (python, done.stdout, done.stderr)


LITTLE_STUDENT = """
import torch, spade
from spade.basics import Batch
from spade.examples import brain
from spade.models import VarNet
torch.set_num_threads(1)
torch.manual_seed(0)
teacher, batch = VarNet(num_cascades=2, channels=4, num_pools=2), Batch(*brain(), {})
student = spade.prune(teacher, 0.4)
losses = spade.finetune(student, [batch], "school", teacher, steps=4, learning_rate=1e-3, progress=False).losses
again = spade.load(spade.save(student, "student")).eval()
with torch.no_grad():
    assert torch.equal(again(batch.y, batch.A), student.eval()(batch.y, batch.A))
print(*losses, sum(p.numel() for p in again.parameters()))
"""


def with_core(version: str, python: str, wheel: zipfile.ZipFile, folder: Path) -> str:
    """The Python of an environment with spade's core, as pip installs it; a skip where torch has no wheel for it.

    `SPADE_PYTHON_3_13=/path/to/bin/python` names one that holds the core's requirements already."""
    if named := os.environ.get(f"SPADE_PYTHON_{version.replace('.', '_')}"):
        return named
    (pin,) = re.findall(r"(?m)^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    install = ("-m", "pip", "install", "--quiet", "--no-compile", "--retries", "0", "--timeout", "20", f"{pin}+cpu")
    install += ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
    asked = ("--dry-run", "--no-deps", "--only-binary", ":all:", "--python-version", version, "--target", str(folder))
    found = subprocess.run([sys.executable, *install, *asked], capture_output=True, encoding="utf-8")
    if found.returncode:  # the package index has the build for CUDA only: 5 GB with its libraries
        reason = next((line for line in found.stderr.splitlines() if line.startswith("ERROR")), "")
        pytest.skip(f"no wheel of {pin}+cpu for Python {version} here. {reason}")
    subprocess.run([python, "-m", "venv", folder], check=True)
    pins = ("-c", str(ROOT / "constraints.txt"))
    command = [folder / "bin" / "python", *install, *pins, wheel.filename]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return str(folder / "bin" / "python")


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_core_prunes_fine_tunes_saves_and_loads_on_another_python(version, settings, wheel, tmp_path):
    """The losses are those of this Python, and the tests of the networks pass."""
    named = os.environ.get(f"SPADE_PYTHON_{version.replace('.', '_')}")
    if not (found := named or interpreters(settings).get(version)):
        pytest.skip(f"no Python {version} on this machine")
    python = with_core(version, found, wheel, tmp_path / "environment")
    tools = {}  # pytest and what it needs is pure Python
    for name in ("pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        tools[name] = importlib.metadata.distribution(name)
    variables = environment(tmp_path / "site", wheel, tools)
    run_with = lambda *what: subprocess.run(what, cwd=tmp_path, env=variables, capture_output=True, encoding="utf-8")
    printed = [run_with(each, "-W", "ignore", "-c", LITTLE_STUDENT) for each in (python, sys.executable)]
    assert not any(done.returncode for done in printed), [done.stderr[-2000:] for done in printed]
    theirs, ours = ([float(number) for number in done.stdout.split()] for done in printed)
    assert theirs == pytest.approx(ours, rel=1e-3) and len(ours) == 5
    done = run_with(
        python, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", ROOT / "tests/test_models.py"
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


# The container


def instructions(text: str) -> list[tuple[str, str]]:
    """Of a Dockerfile: their names and arguments, continued lines joined, comments left out."""
    lines = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def in_context(name: str, patterns: list[str]) -> bool:
    """Whether Docker sends this file of the checkout, by the patterns of .dockerignore that it may use here."""
    as_regex = lambda p: re.escape(p).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*") + "(/.*)?"
    return not any(re.fullmatch(as_regex(pattern), name) for pattern in patterns)


def test_the_dockerfile_copies_what_is_there_and_installs_what_make_knows(settings, tmp_path):
    """It cannot be built here: its instructions are read, and `make` is asked in the folder that it would send."""
    parsed = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert [name for name, _ in parsed] == ["FROM", "ARG", "RUN", "WORKDIR", "COPY", "RUN", "ENV", "CMD"]
    (base, argument, system, workdir, copied, install, variable, command) = (text for _, text in parsed)
    assert re.fullmatch(r"python:([\d.]+)-slim", base)[1] in settings["python_versions"].split()
    assert {"make", "util-linux"} <= set(
        system.split()
    ) and "rm -rf /var/lib/apt/lists" in system  # setpriv is of the latter
    assert copied == ". ." and variable == f"PATH={workdir}/.venv/bin:$PATH"

    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not any(pattern.startswith("!") for pattern in patterns)
    tracked = [path.relative_to(ROOT).as_posix() for name in SOURCES for path in (ROOT / name).rglob("*")]
    tracked += [path.name for path in ROOT.iterdir() if path.is_file()]
    tracked = [name for name in tracked if (ROOT / name).is_file() and "__pycache__" not in name]
    left_out = [name for name in tracked if not in_context(name, patterns)]
    assert not [name for name in left_out if not name.startswith((".git", "data/"))], left_out
    for name in tracked:
        if name.startswith("config/") or "/" not in name:
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(ROOT / name, tmp_path / name)

    default = argument.removeprefix("TORCH=")
    assert argument != default and install.startswith("make install TORCH=$TORCH &&")
    cuda = re.search(r"--build-arg TORCH=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))[1]
    for build in (default, cuda):
        done = subprocess.run(
            ["make", "-n", "install", f"TORCH={build}"], cwd=tmp_path, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0 and f"+{build} --extra-index-url" in done.stdout, done.stderr
        assert "'.[batch]'" in done.stdout and settings["batch_requirements"]
    target = re.fullmatch(r'\["make", "(\w+)"\]', command)[1]
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"))


# The pages


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Each page's Python is executed as it is printed."""
    monkeypatch.chdir(tmp_path)
    assert blocks(page, "python")
    exec("\n".join(blocks(page, "python")), {"__name__": "page"})


def test_the_commands_of_the_pages_exist():
    text = "\n".join(blocks("README.md", "bash") + blocks("CONTRIBUTING.md", "bash"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake (\w+)", text))
    assert {"demo", "paper", "test", "lab", "plan"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "data/README.md", "outputs/README.md"])
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_and_speaks_of_configurations():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100 and "PROFILE" not in text


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert (
        os.access(script, os.X_OK)
        and "make test" in script.read_text(encoding="utf-8")
        and "set -euo pipefail" in script.read_text(encoding="utf-8")
    )
