"""The house has one direction: each file stands in one layer and imports from layers below it.

All imports are read: at the top of a file, inside functions, and those for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import opendelta

PACKAGE = Path(opendelta.__file__).parent

# From the ground up, the files and folders of each layer; what is not named is a face, on top.
LAYERS = {
    "ground": ["exceptions", "version", "signature", "ground"],
    "engines' facts": ["backends"],
    "mechanism": ["mechanism"],
    "addressing": ["addressing"],
    "seeing": ["inspection", "web"],
    "a delta": ["delta"],
    "verbs on one": ["verbs"],
    "where it lives": ["center", "saving"],
    "the class": ["delta_configs", "basemodel"],
    "over several": ["routing", "combining"],
    "methods": ["delta_models"],
    "any method": ["auto_delta"],
}
HEIGHT = {room: height for height, rooms in enumerate(LAYERS.values()) for room in rooms}

FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """``opendelta.addressing.graph`` -> addressing."""
    return module.split(".")[1] if "." in module else ""


def height(module: str) -> int:
    return HEIGHT.get(room(module), len(LAYERS))


def imported(path: Path) -> Iterator[str]:
    """The modules of the library that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "opendelta":
                yield name if name in FILES else name.rpartition(".")[0]


GRAPH = {name: set(imported(path)) - {name} for name, path in FILES.items()}


def test_every_layer_holds_something() -> None:
    assert set(HEIGHT) <= {room(name) for name in FILES}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_towards_the_ground(module: str) -> None:
    upward = {target for target in GRAPH[module] if height(target) > height(module)}
    assert not upward, f"{module} imports from above: {sorted(upward)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    reach = {name: set(targets) for name, targets in GRAPH.items()}
    for through, beyond in reach.items():  # Warshall's closure
        for targets in reach.values():
            if through in targets:
                targets |= beyond
    circles = sorted(name for name, targets in reach.items() if name in targets)
    assert not circles, f"these need each other: {circles}"
