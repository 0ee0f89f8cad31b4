"""The website: builds without a warning, its links lead somewhere, and each page is shown without an error."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

COUNTS = r"""() => {
  const text = (element) => [...element.childNodes].filter((n) => n.nodeType == 3).map((n) => n.data).join("");
  const prose = [...document.querySelectorAll("article p, article li, article td")];
  return [
    document.querySelectorAll("mjx-merror").length,
    [...document.images].filter((image) => image.complete && !image.naturalWidth).length,
    prose.filter((element) => /\$[^$]+\$/.test(text(element))).length,
  ];
}"""


CUT_CODE = """() => [...document.querySelectorAll("div.cell_input pre")]
  .filter((code) => code.scrollWidth > code.clientWidth + 1).length"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The website as `make docs` builds it, warnings being errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", ".", folder]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    finally:
        shutil.rmtree(ROOT / "docs" / "api", ignore_errors=True)  # written by the build
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


class Page(HTMLParser):
    """The targets (tag, address) and the anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.targets += [(tag, found[key]) for key in ("href", "src") if found.get(key)]


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


def test_every_link_leads_to_a_file_and_an_anchor(site, pages):
    broken, count = [], 0
    for path, page in pages.items():
        for _, address in page.targets:
            url = urlparse(address)
            if url.scheme or url.netloc:
                continue
            count += 1
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {address}")
    assert count > 5000 and not broken, sorted(set(broken))[:20]


def test_no_page_loads_anything_from_another_site(site, pages):
    loaded = {
        (tag, address) for page in pages.values() for tag, address in page.targets
        if tag in ("script", "link", "img", "iframe") and urlparse(address).scheme in ("http", "https")
    }  # fmt: skip
    assert not loaded
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import )['\"]?https?:", styles)


def test_each_notebook_and_module_has_a_page_and_directives_are_not_shown(site):
    notebooks = [
        path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(path)
    ]
    assert not [path for path in notebooks if not (site / path).with_suffix(".html").is_file()]
    modules = [path.stem for path in (ROOT / "spade").glob("*.py") if not path.stem.startswith("_")]
    assert not [name for name in modules if not (site / "docs" / "api" / f"spade.{name}.html").is_file()]
    text = (site / "nbs" / "06_pruning.html").read_text(encoding="utf-8")
    assert "#| export" not in text and "default_exp" not in text and "tag_exported" in text


def test_a_function_is_documented_with_the_comments_beside_its_parameters(site):
    text = (site / "docs" / "api" / "spade.pruning.html").read_text(encoding="utf-8")
    assert "pre-defined ratio in (0, 1)" in text and "not modified" in text
    listed = (site / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    assert ">spade.__main__</a>" in listed and ">Notebooks in order</a>" in listed, "names as they are written"


def test_every_page_is_shown_without_an_error_on_a_screen_and_on_a_phone(site):
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        assert not os.environ.get("CI"), "CI must have chromium (.ci/run installs it) and playwright"
        pytest.skip("needs chromium (apt-get install chromium) and playwright (pip install playwright)")
    from playwright.sync_api import sync_playwright

    faults, shown = [], sorted(path for path in site.rglob("*.html") if path.parent != site)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for path in shown:
            name, errors = str(path.relative_to(site)), []
            listener = lambda error, errors=errors: errors.append(str(error)[:200])  # noqa: E731
            page.on("pageerror", listener)
            page.goto(f"file://{path}", wait_until="load")
            page.evaluate("async () => { if (window.MathJax && MathJax.startup) await MathJax.startup.promise }")
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                faults += [f"{name}: {wider} pixels wider than {width}"] if wider > 0 else []
                cut = page.evaluate(CUT_CODE) if width == 1280 else 0
                faults += [f"{name}: {cut} code cells are cut off at {width} pixels"] if cut else []
            faults += [f"{name}: {error}" for error in errors]
            page.remove_listener("pageerror", listener)
            found = page.evaluate(COUNTS)
            faults += [
                f"{name}: {count} {what}"
                for count, what in zip(found, ("math errors", "broken pictures", "raw formulas"))
                if count
            ]
        browser.close()
    assert len(shown) > 60 and not faults, faults[:30]
