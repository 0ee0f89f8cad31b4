"""The website: `make docs` builds _site/ from nbs/, outputs/ and the modules, each read where it lies."""

import json
import re
import shutil
import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # for jupyter_anchor, which Sphinx stores by name
facts = ConfigParser(delimiters=["="], interpolation=None)
facts.read(ROOT / "settings.ini", encoding="utf-8")
project, author, copyright, version = (facts["DEFAULT"][key] for key in ("title", "author", "copyright", "version"))

root_doc = "docs/index"
shown = ["finetune", "table_1", "figure_7"]  # executed experiment notebooks that the repository holds
include_patterns = ["docs/**", "nbs/**", "outputs/README.md", "outputs/*/index.md", "data/README.md", "CONTRIBUTING.md"]
include_patterns += ["outputs/bench/*.md", "outputs/measured/table.md", "outputs/demo/fmp.md"]
include_patterns += [f"outputs/demo/notebooks/{name}.ipynb" for name in shown]
exclude_patterns = ["**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design"]
nb_execution_mode = "off"  # pages show the committed outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
myst_heading_slug_func = "conf.jupyter_anchor"
suppress_warnings = ["myst.xref_missing", "toc.not_included", "mystnb.mime_priority", "config.cache"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"{project} {version}"
html_favicon = "favicon.svg"
html_static_path = ["static"]
html_css_files = ["spade.css"]
html_show_sourcelink = False
html_copy_source = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
mathjax_path = "mathjax/tex-chtml-full.js"  # copied below: no page loads a file of another site


def jupyter_anchor(title):
    """The anchor of a heading as Jupyter makes it and as the notebooks' links spell it."""
    return title.replace(" ", "-")


def cells_for_readers(app, docname, source):
    """Remove hidden cells and nbdev's directives, mark exported cells, and name the module below the title."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    notebook, module, kept = json.loads(source[0]), "", []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            marks = re.findall(r"(?m)^#\| *(\w+)", text)
            module = next(iter(re.findall(r"(?m)^#\| *default_exp +(\S+)", text)), module)
            if {"hide", "default_exp"} & set(marks):
                continue
            cell["metadata"].setdefault("tags", []).extend(["exported"] * ("export" in marks))
            cell["source"] = re.sub(r"(?m)^#\|.*\n?", "", text)
        kept.append(cell)
    notebook["cells"] = kept
    if module not in ("", "__init__"):
        name = f"spade.{module}".removesuffix(".__init__")
        line = (
            f"Module [`{name}`](/docs/api/{name}.md) · {{download}}`{path.name}` · a bar marks the cells of the module."
        )
        kept.insert(1, {"cell_type": "markdown", "id": "module", "metadata": {}, "source": line})
    source[0] = json.dumps(notebook)


def comments_of_parameters(app, what, name, obj, options, lines):
    """Document each parameter by the comment beside it; Markdown's single backticks become code."""
    from fastcore.docments import docments

    try:
        found = docments(obj, returns=True) if what in ("function", "method", "class") else {}
    except Exception:  # a builtin without a source file
        found = {}
    comments = {key: " ".join(text.split()) for key, text in found.items() if text and key != "self"}
    result = comments.pop("return", "")
    lines += [
        "",
        *(f":param {key}: {text}" for key, text in comments.items()),
        *([f":returns: {result}"] * bool(result)),
    ]
    code = [re.sub(r"(?<![`:])`([^`\n]+)`(?!`)", r"``\1``", line) for line in lines]
    code = [re.sub(r"(?<!\$)\$([^$\n]+)\$(?!\$)", r":math:`\1`", line) for line in code]
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in code]  # |x| is a norm, no substitution


def write_api(app):
    """One page for each module, and their list."""
    folder = ROOT / "docs" / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = [path for path in sorted((ROOT / "spade").rglob("*.py")) if path.name != "_modidx.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    names = [name for name in names if name not in ("spade", "spade.data")]
    for name in names:
        directive = f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :show-inheritance:\n```\n"
        title = name.replace("__", r"\_\_")  # which Markdown would take for bold letters
        (folder / f"{name}.md").write_text(f"# {title}\n\n{directive}", encoding="utf-8")
    listed = "\n".join(names)
    text = f"# Functions and classes\n\nOne page for each module.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    (folder / "index.md").write_text(text, encoding="utf-8")


def copy_mathjax(app, error):
    """Copy the part of MathJax that the pages use, 1.8 of 24 MB."""
    source = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0]) / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    if error is None and app.builder.format == "html":
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "tex-chtml-full.js", target)
        shutil.copytree(source / "output/chtml/fonts", target / "output/chtml/fonts", dirs_exist_ok=True)


def setup(app):
    app.connect("builder-inited", write_api)
    app.connect("source-read", cells_for_readers)
    app.connect("autodoc-process-docstring", comments_of_parameters)
    app.connect("build-finished", copy_mathjax)
