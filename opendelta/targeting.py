"""Which modules of a backbone a delta goes on: the part of `DeltaBase` that addresses them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.addressing.patterns import REGEX_MARK, as_patterns, matches
from opendelta.addressing.targets import (
    common_name_hint,
    excluded_modules,
    find_targets,
    offer_names,
    own_name_hint,
)
from opendelta.exceptions import AddressingError, InsertionError
from opendelta.ground.names import lineage
from opendelta.ground.walk import child_of, unblocked, uncompiled
from opendelta.mechanism.ownership import own_modules


class Targeting(nn.Module):
    """The part of `DeltaBase` that knows its backbone's modules by their names."""

    default_modified_modules: ClassVar[list[str]]

    backbone_model: nn.Module
    exclude_modules: list[str]
    common_structure: bool
    uses_defaults: bool
    _excluded: set[str]
    _own: list[tuple[str, nn.Module]]
    _module_names: dict[int, str]
    _structure: CommonStructureMap | None

    def names_of(self, name: str) -> Iterator[str]:
        """The names by which a module or parameter of the backbone can be addressed.

        Its own, and under common structure its common names.
        """
        yield name
        if self.common_structure:
            yield from self.common_names_of(name)

    def common_names_of(self, name: str) -> Iterator[str]:
        """The common names of a module or parameter of the backbone."""
        known = self.structure.addresses
        yield from known.get(name, ())
        module, _, leaf = name.rpartition(".")
        for common in known.get(module, ()):
            yield f"{common}.{leaf}"

    @property
    def structure(self) -> CommonStructureMap:
        """The backbone's common structure, made when it is first asked for."""
        if self._structure is None:
            self._structure = CommonStructureMap(self.backbone_model, strict=False)
        return self._structure

    def find_key(self, key: str, target_list: Sequence[str]) -> bool:
        """Whether some pattern of `target_list` addresses the module called `key`.

        Args:
            key: a module's name in the backbone.
            target_list: patterns, plain or ``[r]``; a string is a list of one.
        """
        patterns = as_patterns(target_list, "target_list")
        names = self.common_names_of(key) if self.common_structure else (key,)
        return any(matches(name, pattern) for name in names for pattern in patterns)

    def find_module(self, root_module: nn.Module, key: str) -> tuple[nn.Module, str, nn.Module]:
        """(parent, the child's name in it, child) of the module called `key`.

        Raises:
            AddressingError: if there is none.
        """
        *path, child_name = key.split(".")
        parent = child_of(root_module, *path)
        child = None if parent is None else child_of(parent, child_name)
        if parent is None or child is None:
            raise AddressingError(f"{type(root_module).__name__} has no module {key!r}.")
        return parent, child_name, child

    def find_targets(self, patterns: Sequence[str]) -> list[list[str]]:
        """Names of the modules that each pattern addresses, exclusions taken out.

        A module that is registered twice may be addressed by either name; the first is returned.
        """
        known_as = {name: self._module_names[id(module)] for name, module in self._own}

        def by_name(pattern: str) -> list[str]:
            return [name for name in known_as if name and matches(name, pattern)]

        if self.uses_defaults:
            found = self.default_targets(self._recognised())
        elif self.common_structure:
            structure = self._recognised()
            commons = [common for known in structure.addresses.values() for common in known]
            towers = [f"{tower}.{role}" for tower in structure.towers for role in structure.roles()]
            found = find_targets(
                patterns,
                structure.addressed,
                [*towers, *commons],
                lambda pattern: own_name_hint(by_name(pattern)) + structure.offer(),
            )
        else:
            names = [name for name in known_as if name]
            found = find_targets(
                patterns,
                by_name,
                names,
                lambda pattern: (
                    common_name_hint(self.structure.addressed(pattern)) + offer_names(names)
                ),
            )

        def by_any_name(pattern: str) -> list[str]:
            common = self.structure.addressed(pattern) if self.common_structure else []
            return [*by_name(pattern), *common]

        excluded = excluded_modules(self.exclude_modules, by_any_name, [*known_as])
        self._excluded = {known_as[name] for name in excluded}
        kept = [
            list(dict.fromkeys(n for hit in hits if not self.is_excluded(n := known_as[hit])))
            for hits in found
        ]
        if not any(kept):
            raise AddressingError(
                f"exclude_modules={self.exclude_modules} leaves nothing of what "
                f"modified_modules={list(patterns)} addresses."
            )
        return kept

    def _recognised(self) -> CommonStructureMap:
        if not self.structure.addresses:
            CommonStructureMap(self.backbone_model)  # raises, saying what it found and what to do
        return self.structure

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """The modules that are modified where the user names none, for each default role.

        Raises:
            AddressingError: if the backbone has none of the roles.
        """
        found = [structure.addressed(role) for role in self.default_modified_modules]
        return self._some_of(found)

    def _some_of(self, found: list[list[str]]) -> list[list[str]]:
        """`found`, if there is anything in it."""
        if any(found):
            return found
        raise AddressingError(
            f"{type(self.backbone_model).__name__} has none of the default places of "
            f"{type(self).__name__}, {', '.join(map(repr, self.default_modified_modules))}. "
            f"{self.structure.offer()} Name the modules to modify with modified_modules=[...]."
        )

    def is_excluded(self, name: str) -> bool:
        """Whether `exclude_modules` addresses the module called `name` or one around it."""
        return bool(self._excluded) and any(a in self._excluded for a in lineage(name))

    def named_inside(self, key: str) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the module called `key` and of the backbone's own inside it."""
        for relative, module in own_modules(self.backbone_model.get_submodule(key)):
            yield f"{key}.{relative}" if relative else key, module

    def patterns_for(self, names: Sequence[str]) -> list[str]:
        """Patterns that address exactly the modules called `names`, clicked on the web page."""
        known = [known for known, _ in own_modules(self.backbone_model)]
        longer = {name for name in names if any(other.endswith("." + name) for other in known)}
        return [f"{REGEX_MARK}^{re.escape(n)}" if n in longer else n for n in names]

    def name_of(self, module: nn.Module) -> str:
        """The name of one of the backbone's own modules.

        Raises:
            InsertionError: if it is none of them.
        """
        module = unblocked(uncompiled(module))
        name = self._module_names.get(id(module))
        if name is None or not self._is_at(name, module):
            self._module_names = {id(m): n for n, m in own_modules(self.backbone_model)}
            name = self._module_names.get(id(module))
        if name is None:
            raise InsertionError(
                f"This {type(module).__name__} is no module of the backbone "
                f"{type(self.backbone_model).__name__}."
            )
        return name

    def _is_at(self, name: str, module: nn.Module) -> bool:
        return child_of(self.backbone_model, *filter(None, name.split("."))) is module
