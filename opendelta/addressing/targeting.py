"""Which modules of a backbone patterns stand for, and by which names a module is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

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
from opendelta.ground.names import dotted, lineage
from opendelta.ground.walk import child_of, unblocked, uncompiled
from opendelta.mechanism.hosts import require_hookable
from opendelta.mechanism.ownership import own_modules

Defaults = Callable[[CommonStructureMap], list[list[str]]]


class Targeting:
    """The modules of one backbone by name.

    Args:
        backbone: the model.
        common_structure: whether patterns are common names (``attn.q``).
        exclude: patterns of modules to leave alone, with all inside them.
    """

    def __init__(
        self, backbone: nn.Module, common_structure: bool, exclude: Sequence[str] = ()
    ) -> None:
        self.backbone, self.common_structure, self.exclude = backbone, common_structure, exclude
        self.own = list(own_modules(backbone, remove_duplicate=False))
        self.first_names: dict[int, str] = {}
        for name, module in self.own:
            self.first_names.setdefault(id(module), name)
        self._excluded: set[str] = set()
        self._structure: CommonStructureMap | None = None

    @property
    def structure(self) -> CommonStructureMap:
        """The backbone's common structure, made when it is first asked for."""
        if self._structure is None:
            self._structure = CommonStructureMap(self.backbone, strict=False)
        return self._structure

    # --- names ------------------------------------------------------------------------------

    def names_of(self, name: str) -> Iterator[str]:
        """The names by which a module or parameter can be addressed.

        Its own, and under common structure its common names.
        """
        yield name
        if self.common_structure:
            yield from self.common_names_of(name)

    def common_names_of(self, name: str) -> Iterator[str]:
        """The common names of a module or parameter."""
        known = self.structure.addresses
        yield from known.get(name, ())
        module, _, leaf = name.rpartition(".")
        for common in known.get(module, ()):
            yield f"{common}.{leaf}"

    def name_of(self, module: nn.Module) -> str:
        """The name of one of the backbone's own modules.

        Raises:
            InsertionError: if it is none of them.
        """
        module = unblocked(uncompiled(module))
        name = self.first_names.get(id(module))
        if name is None or child_of(self.backbone, *filter(None, name.split("."))) is not module:
            self.first_names = {id(m): n for n, m in own_modules(self.backbone)}
            name = self.first_names.get(id(module))
        if name is None:
            raise InsertionError(
                f"This {type(module).__name__} is no module of the backbone "
                f"{type(self.backbone).__name__}."
            )
        return name

    def named_inside(self, key: str) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the module called `key` and of the backbone's own inside it."""
        for relative, module in own_modules(self.backbone.get_submodule(key)):
            yield dotted(key, relative), module

    def patterns_for(self, names: Sequence[str]) -> list[str]:
        """Patterns that address exactly the modules called `names`."""
        longer = {n for n in names if any(other.endswith("." + n) for other, _ in self.own)}
        return [f"{REGEX_MARK}^{re.escape(n)}" if n in longer else n for n in names]

    # --- patterns ---------------------------------------------------------------------------

    def find_key(self, key: str, patterns: Sequence[str]) -> bool:
        """Whether some of `patterns` addresses the module called `key`."""
        names = [*self.common_names_of(key)] if self.common_structure else [key]
        listed = as_patterns(patterns, "target_list")
        return any(matches(name, pattern) for name in names for pattern in listed)

    def find(self, patterns: Sequence[str], defaults: Defaults | None = None) -> list[list[str]]:
        """Names of the modules that each pattern addresses, exclusions taken out.

        A module that is registered twice may be addressed by either name; the first is returned.

        Args:
            patterns: what to look for.
            defaults: finds the places in the common structure instead.

        Raises:
            AddressingError: if a pattern addresses nothing, or exclusions leave nothing.
        """
        known_as = {name: self.first_names[id(module)] for name, module in self.own}

        def by_name(pattern: str) -> list[str]:
            return [name for name in known_as if name and matches(name, pattern)]

        if defaults is not None:
            found = defaults(self.recognised())
        elif self.common_structure:
            structure = self.recognised()
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
                lambda pattern: by_name(pattern) or self._none_but_aside(pattern),
                names,
                lambda pattern: (
                    common_name_hint(self.structure.addressed(pattern)) + offer_names(names)
                ),
            )

        def by_any_name(pattern: str) -> list[str]:
            common = self.structure.addressed(pattern) if self.common_structure else []
            return [*by_name(pattern), *common]

        excluded = excluded_modules(self.exclude, by_any_name, [*known_as])
        self._excluded = {known_as[name] for name in excluded}
        kept = [
            list(dict.fromkeys(n for hit in hits if not self.is_excluded(n := known_as[hit])))
            for hits in found
        ]
        if any(found) and not any(kept):
            raise AddressingError(
                f"exclude_modules={[*self.exclude]} leaves nothing of what "
                f"modified_modules={list(patterns)} addresses."
            )
        modules = dict(self.own)
        for hits in kept:
            for name in hits:
                require_hookable(modules[name], name)
        return kept

    def _none_but_aside(self, pattern: str) -> list[str]:
        """No names, if `pattern` does not address a module that stands aside for a delta's own.

        Raises:
            AddressingError: if it does.
        """
        every = own_modules(self.backbone, remove_duplicate=False, originals=True)
        here = {name for name, _ in self.own}
        aside = next((n for n, _ in every if n not in here and matches(n, pattern)), None)
        if aside is not None:
            raise AddressingError(
                f"{pattern!r} names {aside!r}, in whose place a module of another delta's own "
                "stands: a delta on the backbone's would not act. Name other modules, or remove() "
                "that delta."
            )
        return []

    def recognised(self) -> CommonStructureMap:
        """The common structure of a backbone that has one.

        Raises:
            AddressingError: saying what was found and what to do.
        """
        if not self.structure.addresses:
            CommonStructureMap(self.backbone)
        return self.structure

    def is_excluded(self, name: str) -> bool:
        """Whether `exclude` addresses the module called `name` or one around it."""
        return bool(self._excluded) and any(a in self._excluded for a in lineage(name))
