"""INTERIM by the lead so that imports work; helper 1: overwrite this file with yours."""

from __future__ import annotations

from torch import nn

from opendelta.addressing.family_trees import family_at
from opendelta.addressing.graph import Graph
from opendelta.exceptions import AddressingError


class CommonStructureMap:
    def __init__(
        self, backbone_model: nn.Module, strict: bool = True, warning: bool = False,
        visualize: bool = True, *, scope: str = "default",
    ) -> None:
        graph = Graph(backbone_model)
        self.matched_pairs: dict[str, str] = {}
        for path in graph.modules:
            found = family_at(graph, path)
            if found:
                self.matched_pairs.update(found[1])
        if not self.matched_pairs:
            raise AddressingError("no recognised structure")

    def names(self, org_key: str) -> tuple[str, ...]:
        common = self.matched_pairs.get(org_key)
        if common is None:
            return (org_key,)
        base, _, leaf = common.rpartition(".")
        return tuple(f"{base}.{x}" for x in leaf) if leaf in ("qkv", "kv") else (common,)
