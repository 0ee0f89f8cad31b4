"""The shape of the project: reading order, equations, sizes, names, types and format."""

import ast
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import execute_notebooks
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb") if "experiments" not in path.parts)
MODULES = sorted(path for path in (ROOT / "spade").rglob("*.py") if path.name != "_modidx.py")
METHOD = [path for path in NOTEBOOKS if int(path.name[:2]) <= 14]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_method_notebook = pytest.mark.parametrize("path", METHOD, ids=lambda path: path.stem)

# Notebooks of the method with fewer than 50 cells, and why
SMALL = {
    "00_quickstart": "four calls on one slice",
    "01_basics": "tools, no method of the paper",
    "03_examples": "one function",
    "11_models": "a registry",
    "12_latency": "one measurement",
    "13_random_baseline": "one row of Table 3",
}
EQUATIONS = {1: "02_operators", 2: "04_deq", 3: "04_deq", 4: "04_deq", 6: "06_pruning"} | dict.fromkeys(
    (5, 7, 8, 9), "07_losses"
)


@cache
def cells(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a notebook."""
    return [
        (cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]


def number(path: Path) -> int:
    """A notebook's place in the reading order."""
    return int(path.name[:2])


def export_of(source: str) -> str | None:
    """The module after `#| export`, "" for the notebook's own, None for a cell that is not exported."""
    found = re.search(r"(?m)^#\| *exports?\b *([\w.]*)", source)
    return found and found[1].removesuffix(".__init__")


def tree_of(source: str) -> ast.Module:
    """The syntax tree of a cell, magics and shell lines left out."""
    return ast.parse("\n".join(line for line in source.split("\n") if not re.match(r"\s*[%!]", line)))


def defined_names(tree: ast.Module) -> set[str]:
    """Functions, classes and variables at the top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names


@cache
def definitions() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[tuple[str, str], tuple[str, str]]]:
    """Notebook number of each module and of each (module, name), and what exported cells import, by the same pair."""
    modules, names, imports = {}, {}, {}
    for path in NOTEBOOKS:
        source = "\n".join(text for kind, text in cells(path) if kind == "code")
        own = re.search(r"(?m)^#\| *default_exp +([\w.]+)", source)
        own = own[1].removesuffix(".__init__") if own else ""
        modules.setdefault(own, number(path))
        for kind, text in cells(path):
            if kind == "code" and (export := export_of(text)) is not None:
                module, tree = export or own, tree_of(text)
                names |= {(module, name): number(path) for name in defined_names(tree)}
                for target, name in imported(tree):
                    imports[module, name] = (target, name)
    return modules, names, imports


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of each `from spade.module import name`, (module, "") of `import spade.module`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spade."):
            found += [(node.module.removeprefix("spade."), alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "spade":
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name.removeprefix("spade."), "") for a in node.names if a.name.startswith("spade.")]
    return found


def defining_notebook(module: str, name: str) -> int | None:
    """The notebook that defines a name, through re-exports; of a module, the notebook that begins it."""
    modules, names, imports = definitions()
    if not name or f"{module}.{name}" in modules:
        return modules.get(f"{module}.{name}" if name else module)
    if (module, name) in names:
        return names[module, name]
    assert (module, name) in imports, f"spade.{module} has no {name}"
    return defining_notebook(*imports[module, name])


# Reading order


@every_notebook
def test_a_notebook_imports_only_from_notebooks_before_it(path):
    if path.stem == "00_quickstart":  # it shows the finished library
        return
    later = []
    for i, (kind, source) in enumerate(cells(path)):
        for module, name in imported(tree_of(source)) if kind == "code" else []:
            place = defining_notebook(module, name)
            if place is not None and place > number(path):
                later.append(f"cell {i}: spade.{module} {name} is of notebook {place}")
    assert not later, later


def test_numbers_of_notebooks_are_unique():
    assert not [n for n, count in Counter(map(number, NOTEBOOKS)).items() if count > 1]


def test_each_equation_of_the_paper_is_displayed_once_where_it_is_implemented():
    found = {}
    for path in NOTEBOOKS:
        for kind, source in cells(path):
            if kind == "markdown":
                for tag in re.findall(r"\\tag\{(\d+)\}", source):
                    found.setdefault(int(tag), []).append(path.stem)
    assert found == {equation: [notebook] for equation, notebook in EQUATIONS.items()}


def test_equation_6_comes_within_350_cells():
    before = 0
    for path in sorted(METHOD, key=number):
        for kind, source in cells(path):
            before += 1
            if kind == "markdown" and r"\tag{6}" in source:
                assert before <= 350
                return
    pytest.fail("equation 6 is not displayed")


# Notebooks


@every_method_notebook
def test_a_method_notebook_has_50_to_95_cells(path):
    least = 1 if path.stem in SMALL else 50
    assert least <= len(cells(path)) <= (50 if path.stem in ("00_quickstart", "01_basics", "03_examples") else 95)


@every_method_notebook
def test_definitions_are_checked_within_three_cells(path):
    listed = cells(path)
    defining = [
        i for i, (kind, text) in enumerate(listed)
        if kind == "code" and export_of(text) is not None and re.search(r"(?m)^(def|class|@)", text)
    ]  # fmt: skip
    check = re.compile(r"\b(assert|refused\(|test_\w+\()")
    checked = [
        any(kind == "code" and export_of(text) is None and check.search(text) for kind, text in listed[i + 1 : i + 4])
        for i in defining
    ]
    assert sum(checked) >= 0.8 * len(checked), [i for i, fine in zip(defining, checked) if not fine]


@every_method_notebook
def test_bad_input_is_shown_once_and_without_try_blocks(path):
    examples = [text for kind, text in cells(path) if kind == "code" and export_of(text) is None]
    assert sum(bool(re.search(r"(?m)^\s*refused\(", text)) for text in examples) <= 1
    assert not [text for text in examples if re.search(r"(?m)^\s*except\b", text)]


@every_method_notebook
def test_a_notebook_begins_with_its_place_in_the_paper(path):
    assert re.match(r"# \S.*\n\n> \S", cells(path)[0][1])
    text = "\n".join(text for kind, text in cells(path)[:3] if kind == "markdown")
    assert len(text.split()) > 40 and re.search(r"(?i)section|equation|eq\.|table|figure|paper", text)


def test_library_notebooks_of_the_paper_have_at_most_1650_cells():
    """Notebooks 15 to 19 are of the second paper, and from 40 on beyond both."""
    sizes = {path.stem: len(cells(path)) for path in NOTEBOOKS if number(path) < 15 or 20 <= number(path) < 40}
    assert sum(sizes.values()) <= 1650, sizes


def long_lines(text: str, limit: int) -> list[str]:
    """Lines of Markdown over the limit, but tables, headings, code, formulas and links that cannot be broken."""
    found, verbatim = [], False
    for line in text.split("\n"):
        verbatim ^= line.strip().startswith("```") or line.count("$$") % 2 == 1
        if len(line) > limit and not verbatim and "$$" not in line and not re.match(r"\s*([|#<]|!\[)", line):
            if " " in re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`|\$[^$]*\$", "", line.strip()):
                found.append(line)
    return found


def test_prose_has_100_columns():
    texts = {path.stem: "\n".join(text for kind, text in cells(path) if kind == "markdown") for path in every_source()}
    texts |= {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"))
    }
    assert not {name: long for name, text in texts.items() if (long := long_lines(text, 100))}


def every_source() -> list[Path]:
    """All notebooks that people write: library, index and experiments."""
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.mark.parametrize("arguments", (["format", "--check"], ["check", "--output-format", "concise"]))
def test_ruff_is_content_with_notebooks_and_tests(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "nbs", "tests"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# Modules


def functions_of(path: Path) -> list[ast.FunctionDef]:
    """All functions of a module, methods and nested ones included."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def test_no_function_has_more_than_40_lines():
    """The released `main.py` is one function of 487 lines."""
    sizes = {f"{path.stem}.{f.name}": f.end_lineno - f.lineno + 1 for path in MODULES for f in functions_of(path)}
    assert not {name: size for name, size in sizes.items() if size > 40}


def test_the_package_stays_small():
    """Lines by notebook: 15 to 19 are of the second paper; from 40 on they go beyond both."""
    sizes = Counter()
    for path in MODULES:
        notebook = "none"
        for line in path.read_text(encoding="utf-8").splitlines():
            notebook = found[1] if (found := re.match(r"# %% .*/(\d\d)_\w+\.ipynb", line)) else notebook
            sizes[notebook] += 1
    beyond = sum(count for name, count in sizes.items() if name.isdigit() and (int(name) >= 40 or 15 <= int(name) < 20))
    assert sum(sizes.values()) - beyond <= 8960 and beyond <= 4620, sizes


def test_text_files_are_utf_8_in_every_locale():
    """Without an argument `encoding`, Python takes that of the locale: ASCII for LC_ALL=C."""
    unspecified = []
    for path in (*MODULES, *(ROOT / "tests").glob("*.py"), *(ROOT / "workflow").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(call.func, "attr", "") if isinstance(call, ast.Call) else ""
            keywords = {keyword.arg for keyword in call.keywords} if isinstance(call, ast.Call) else {}
            given = len(call.args) > (name == "write_text") if name in ("read_text", "write_text") else True
            decoded = name in ("run", "Popen") and "text" in keywords and path.parent.name == "tests"
            if decoded or not (given or "encoding" in keywords):
                unspecified.append(f"{path.name}:{call.lineno}")
    assert not unspecified


def module_name(path: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def top_level_imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports at its top level."""
    known = {module_name(path): path for path in MODULES}
    graph = {}
    for name, path in known.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        graph[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*base, *filter(None, [node.module])])
                targets = [inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names]
            else:
                continue
            graph[name] |= {target for target in targets if target in known and target != name}
    return graph


def test_no_circle_of_imports():
    graph = {name: set(targets) for name, targets in top_level_imports().items()}
    assert sum(map(len, graph.values())) > 30, "the imports were read"
    while free := [name for name, targets in graph.items() if not targets]:
        for name in free:
            del graph[name]
        for targets in graph.values():
            targets.difference_update(free)
    assert not graph, f"these import each other: {graph}"


def test_public_functions_and_classes_have_unique_names():
    owners = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                owners.setdefault(node.name, []).append(module_name(path))
    assert not {name: modules for name, modules in owners.items() if len(modules) > 1}


def test_prune_imports_torch_and_nothing_heavy():
    script = "import json, sys, spade; spade.prune; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    heavy = {"pandas", "h5py", "scipy", "skimage", "accelerate", "papermill", "seaborn", "matplotlib.pyplot", "yaml"}
    assert "torch" in loaded and not loaded & heavy
    of_spade = {name for name in loaded if name.startswith("spade.")}
    assert of_spade == {"spade.installation", "spade.basics", "spade.pruning"}


def test_a_job_of_the_batch_loads_scipy_only_when_it_is_used():
    """Each job begins with these imports; SciPy's statistics and files would take a quarter of their time."""
    script = "import json, sys, spade.config, spade.runs, spade.fmp_runs; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    slow = {"scipy.stats", "scipy.io", "scipy.ndimage", "scipy.sparse", "scipy.special", "matplotlib.pyplot", "seaborn"}
    assert not set(json.loads(done.stdout)) & slow


def test_importing_prune_takes_little_longer_than_torch_and_torch_pruning():
    """Processor time, the least of three imports each; measured: 1.05."""
    seconds = {"import torch, torch_pruning": [], "import spade; spade.prune": []}
    for _ in range(3):
        for script, found in seconds.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    torch, ours = map(min, seconds.values())
    assert ours <= 1.15 * torch, seconds


def test_everything_public_is_typed():
    untyped = []
    for path in MODULES:
        for function in functions_of(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            arguments += [a for a in (function.args.vararg, function.args.kwarg) if a]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (function.returns is None and function.name != "__init__"):
                untyped.append(f"{module_name(path)}.{function.name}({', '.join(bare)})")
    assert not untyped


def test_docstrings_begin_with_a_line_of_at_most_100_characters():
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                first = text.split("\n")[0]
                if len(first) > 100:
                    found.append(f"{module_name(path)}.{node.name}: {first}")
    assert not found


def test_public_functions_and_classes_have_docstrings():
    missing = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node):
                missing.append(f"{module_name(path)}.{node.name}")
    assert not missing


# The check of stored outputs


def notebook(path: Path, source: str, stored: str) -> Path:
    """A notebook of one cell with a stored output."""
    cell = nbformat.v4.new_code_cell(source)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=stored)]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


@pytest.mark.parametrize(
    "source, stored, problem",
    (
        ("print('loss', 0.25)", "loss 1.3e-5", None),
        ("print('loss', 0.25)", "error 0.25", "error"),
        (
            "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()\nprint(1)",
            "1",
            "0 pictures are stored, 1 are fresh",
        ),
        ("raise ValueError('broken')", "", "broken"),
    ),
)
def test_a_stale_output_is_found(tmp_path, source, stored, problem):
    _, _, problems = execute_notebooks.check(notebook(tmp_path / "a.ipynb", source, stored))
    assert problem in problems[0] if problem else not problems
