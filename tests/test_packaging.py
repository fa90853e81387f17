"""What users install: built offline from a copy of the checkout, so that nothing stale gets in."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import opendelta

ROOT = Path(opendelta.__file__).parent.parent
PACKAGING = ["setup.py", "requirements.txt", "pyproject.toml", "MANIFEST.in", "README.md"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "opendelta", copy / "opendelta", ignore=ignored)
    for name in [*PACKAGING, "LICENSE", "CHANGELOG.md"]:
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(source: Path, into: Path) -> zipfile.ZipFile:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(into)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = into.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_wheel_holds_every_file_of_the_package(checkout: Path, tmp_path: Path) -> None:
    files = [path for path in (checkout / "opendelta").rglob("*") if path.is_file()]
    expected = {path.relative_to(checkout).as_posix() for path in files}
    assert "opendelta/py.typed" in expected
    assert any(name.startswith("opendelta/web/") and name.endswith(".html") for name in expected)
    with build_wheel(checkout, tmp_path) as wheel:
        names = set(wheel.namelist())
        [metadata_name] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(metadata_name))
        license_name = metadata_name.replace("METADATA", "licenses/LICENSE")
        license_text = wheel.read(license_name).decode()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert metadata["Name"] == "opendelta"
    assert metadata["Version"] == opendelta.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache License" in license_text
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert required == (ROOT / "requirements.txt").read_text().splitlines()
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "test",
        "docs",
        "bmt",
        "browser",
        "engines",
        "accelerate",
        "examples",
        "storage",
    }


def test_source_distribution_is_enough_to_build_from(checkout: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "-d", str(tmp_path)],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        top = f"opendelta-{opendelta.__version__}/"
        packed = {name.removeprefix(top) for name in tar.getnames()}
    files = [p.relative_to(checkout) for p in (checkout / "opendelta").rglob("*") if p.is_file()]
    assert {*PACKAGING, "LICENSE", "CHANGELOG.md"} <= packed
    assert {path.as_posix() for path in files} <= packed
    with build_wheel(archive, tmp_path) as wheel:
        assert "opendelta/py.typed" in wheel.namelist()


def test_constraints_fit_the_stated_ranges() -> None:
    """Each requirement is pinned, for the running Python, to a release that its range admits."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                assert canonicalize_name(pin.name) not in pins, line
                pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
