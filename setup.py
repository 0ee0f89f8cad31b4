"""Packaging from settings.ini, nbdev's one place for the project's facts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    """The space-separated entries of settings.ini as pip wants them."""
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["spade", "spade.*"]),
    package_data={"spade": ["assets/**/*", "assets/*"]},
    install_requires=requirements("requirements"),
    entry_points={"console_scripts": ["spade=spade.__main__:main"]},
    extras_require={
        "slurm": requirements("slurm_requirements"),
        "deepinv": requirements("deepinv_requirements"),
        "export": requirements("export_requirements"),
        "docs": requirements("docs_requirements"),
        "dev": [name for key in ("dev", "deepinv", "export", "docs") for name in requirements(f"{key}_requirements")],
    },
    python_requires=f">={cfg['min_python']}",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    zip_safe=False,
)
