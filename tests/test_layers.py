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

# What still points upward, each of them to go.
ALLOWED: set[tuple[str, str]] = {
    ("opendelta.backends.bmt", "opendelta.mechanism.insertion"),
    ("opendelta.basemodel", "opendelta.arguments"),
    ("opendelta.basemodel", "opendelta.combining"),
    ("opendelta.basemodel", "opendelta.freezing"),
    ("opendelta.basemodel", "opendelta.merging"),
    ("opendelta.center.card", "opendelta.delta_configs"),
    ("opendelta.center.publish", "opendelta.basemodel"),
    ("opendelta.delta_configs", "opendelta.auto_delta"),
    ("opendelta.delta_models.adapter", "opendelta.auto_delta"),
    ("opendelta.delta_models.attention_widths", "opendelta.sizes"),
    ("opendelta.delta_models.bitfit", "opendelta.auto_delta"),
    ("opendelta.delta_models.compacter", "opendelta.auto_delta"),
    ("opendelta.delta_models.dora", "opendelta.auto_delta"),
    ("opendelta.delta_models.fused_slices", "opendelta.sizes"),
    ("opendelta.delta_models.ia3", "opendelta.auto_delta"),
    ("opendelta.delta_models.lora", "opendelta.auto_delta"),
    ("opendelta.delta_models.low_rank", "opendelta.construction"),
    ("opendelta.delta_models.low_rank_adapter", "opendelta.auto_delta"),
    ("opendelta.delta_models.parallel_adapter", "opendelta.auto_delta"),
    ("opendelta.delta_models.peft_form", "opendelta.freezing"),
    ("opendelta.delta_models.prefix", "opendelta.auto_delta"),
    ("opendelta.delta_models.soft_prompt", "opendelta.auto_delta"),
    ("opendelta.mechanism.backbone_state", "opendelta.basemodel"),
    ("opendelta.mechanism.backbone_state", "opendelta.merging"),
    ("opendelta.routing", "opendelta.construction"),
    ("opendelta.saving.backbone_check", "opendelta.delta_configs"),
    ("opendelta.saving.checkpoint", "opendelta.auto_delta"),
    ("opendelta.saving.checkpoint", "opendelta.basemodel"),
    ("opendelta.saving.checkpoint", "opendelta.construction"),
    ("opendelta.saving.checkpoint", "opendelta.delta_configs"),
    ("opendelta.saving.checkpoint", "opendelta.freezing"),
    ("opendelta.saving.checkpoint", "opendelta.sizes"),
    ("opendelta.saving.conversion", "opendelta.auto_delta"),
    ("opendelta.saving.conversion", "opendelta.delta_configs"),
}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_towards_the_ground(module: str) -> None:
    upward = {target for target in GRAPH[module] if height(target) > height(module)}
    allowed = {target for source, target in ALLOWED if source == module}
    assert upward == allowed, f"{module} imports from above: {sorted(upward - allowed)}"


# Rooms whose files still need each other.
IN_CIRCLES = {"center", "delta_models"}


def test_no_files_import_each_other_in_a_circle() -> None:
    reach = {n: {t for t in ts if (n, t) not in ALLOWED} for n, ts in GRAPH.items()}
    for through, beyond in reach.items():  # Warshall's closure
        for targets in reach.values():
            if through in targets:
                targets |= beyond
    circles = sorted(name for name, targets in reach.items() if name in targets)
    assert {room(name) for name in circles} <= IN_CIRCLES, f"these need each other: {circles}"
