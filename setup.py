"""Packaging from settings.ini, nbdev's one place for the project's facts."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
EXTRAS = {"mri": ["mri"], "paper": ["mri", "paper"], "batch": ["mri", "paper", "batch"]}  # each with its parts
EXTRAS |= {name: [name] for name in ("deepinv", "export", "ismrmrd", "docs")}
EXTRAS["all"] = list(dict.fromkeys(part for parts in EXTRAS.values() for part in parts if part != "docs"))
EXTRAS["dev"] = [*EXTRAS["all"], "docs", "dev"]
# Outside of a checkout these are read from spade/assets
SHIPPED = ["config/**/*", "nbs/experiments/*.ipynb", "workflow/**/*"]


def requirements(*keys: str) -> list[str]:
    """The space-separated entries of settings.ini as pip wants them."""
    return [entry for key in keys for entry in cfg[key].split()]


def long_description(text: str, url: str) -> str:
    """README.md with absolute links to the repository; without its address, links are text and pictures are left out."""
    file, raw = rf"\1[\2]({url}/blob/{cfg['branch']}/\3)", rf"![\1]({url}/raw/{cfg['branch']}/\2)\n"
    text = re.sub(r"!\[([^]]*)\]\((?!\w+:)([^)]+)\)\n", raw if url else "", text)
    return re.sub(r"(^|[^!])\[([^]]*)\]\((?!\w+:|#)([^)]+)\)", file if url else r"\1\2", text)


class Build(build_py):
    """Copies what a checkout has beside the package into its assets."""

    def run(self) -> None:
        if not self.editable_mode:  # an older build/ would put removed modules into the wheel
            shutil.rmtree(Path(self.build_lib, "spade"), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for path in sorted({path for pattern in SHIPPED for path in ROOT.glob(pattern) if path.is_file()}):
                target = Path(self.build_lib, "spade", "assets", path.relative_to(ROOT))
                if "__pycache__" not in path.parts:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


setup(
    name=cfg["dist_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license_expression="Apache-2.0",
    license_files=["LICENSE", "spade/assets/NOTICE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in cfg["python_versions"].split()),
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    project_urls={"Source": cfg["git_url"]} if cfg["git_url"] else {},
    packages=find_packages(include=["spade", "spade.*"]),
    package_data={"spade": ["py.typed", "assets/**/*", "assets/*"]},
    cmdclass={"build_py": Build},
    install_requires=requirements("requirements"),
    entry_points={"console_scripts": ["spade=spade.__main__:main"]},
    extras_require={name: requirements(*(f"{part}_requirements" for part in parts)) for name, parts in EXTRAS.items()},
    python_requires=f">={cfg['min_python']}",
    long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), cfg["git_url"]),
    long_description_content_type="text/markdown",
    zip_safe=False,
)
