"""Common names for the modules of any backbone (specification 1.16).

Every architecture calls its parts otherwise. The common names are the same for all of them:
``embeddings``; ``encoder.block.3`` or ``decoder.block.3``, and in a block ``attn.{q,k,v,proj}``,
``crossattn.{q,k,v,proj}``, ``ff.{w1,w2,w3}`` and ``layer_norm``; ``lm_head.proj``. What stands
around them, and what has no common name, keeps its original name.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile

from torch import nn

from opendelta.addressing.graph import Graph
from opendelta.addressing.naming import Naming
from opendelta.addressing.patterns import matches_any
from opendelta.addressing.roles import FUSED
from opendelta.exceptions import AddressingError, DeltaWarning, nearest, warn
from opendelta.ground.names import dotted, innermost, leaf_of, lineage, parent_of
from opendelta.mechanism.ownership import own_modules

logger = logging.getLogger(__name__)


class CommonStructureMap:
    """The common names of a backbone's modules.

    ```python
    structure = CommonStructureMap(model)
    structure.transform("encoder.layer.0.attention.self.query")   # "encoder.block.0.attn.q"
    structure.matched_pairs        # {"encoder": "encoder", "encoder.layer": "encoder.block", ...}
    print(structure.explain())     # which module has which role, and why
    ```

    Six families have explicit trees (`opendelta.addressing.family_trees`); all else is inferred
    (`opendelta.addressing.inference`). Modules inside deltas are not seen.

    Args:
        backbone_model: any module, a transformers model or one that holds some or none.
        strict: raise if no block is recognised. Otherwise the map is then empty.
        warning: warn of blocks in which no attention or no feed-forward is recognised.
        visualize: log the table of `explain()` at level DEBUG. It is made only if that level is
            on.
        scope: which tower gets common names in a backbone that has several (vision and text,
            say): one of `towers`, or ``"all"``. By default the one that holds the input
            embeddings, with the encoder or decoder that belongs to it.

    Attributes:
        matched_pairs: original name -> common name of the modules that have one, in module order.
        towers: where each tower sits, by its short name (``vision``, ``text``).

    Raises:
        AddressingError: if no block is recognised and `strict` is set; if there is no tower called
            `scope`.
    """

    def __init__(
        self,
        backbone_model: nn.Module,
        strict: bool = True,
        warning: bool = False,
        visualize: bool = True,
        *,
        scope: str | None = None,
    ) -> None:
        self._backbone = backbone_model
        self._graph = Graph(backbone_model)
        self._naming = Naming(self._graph, scope)
        self._named, self.towers = self._naming.named, self._naming.towers
        self._scoped: dict[str, CommonStructureMap] = {}
        self.matched_pairs = {name: named.common for name, named in self._named.items()}
        if strict and not any(named.block for named in self._named.values()):
            raise AddressingError(self._nothing_found())
        if warning:
            self._warn_of_gaps()
        if visualize and logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "common structure of %s\n%s", type(backbone_model).__name__, self.explain()
            )

    # --- asking -----------------------------------------------------------------------------------

    def transform(self, org_key: str, strict: bool = True, warning: bool = False) -> str | None:
        """The common name of a module or parameter.

        Args:
            org_key: its name in the backbone.
            strict: accept only names that the backbone has, and answer only with common names.
                Otherwise the name of the nearest module around that has a common name is replaced
                and the rest is kept: ``encoder.layer.0.attention.self.dropout`` becomes
                ``encoder.block.0.attn.self.dropout``.
            warning: warn if there is no common name.

        Returns:
            The common name; None if there is none and `strict` is set. A parameter has one if its
            module has.

        Raises:
            AddressingError: if `strict` is set and the backbone has nothing called `org_key`.
        """
        is_module = org_key in self._graph.modules
        if strict and not is_module and not self._holds(org_key):
            raise AddressingError(
                f"{type(self._backbone).__name__} has no module or parameter {org_key!r}."
                + nearest(org_key, self._graph.modules)
            )
        if (org_key if is_module else parent_of(org_key)) not in self._named:
            if warning:
                warn(f"{org_key!r} has no common name.", DeltaWarning)
            if strict:
                return None
        return self._naming.around(org_key)

    def names(self, org_key: str) -> tuple[str, ...]:
        """All common names of a module: those of each role that a fused projection plays.

        GPT2's ``c_attn`` is called ``...attn.q``, ``...attn.k`` and ``...attn.v``. A module without
        a common name is called as `transform` calls it with ``strict=False``.
        """
        common = self.transform(org_key, strict=False) or ""
        if org_key not in self._named:
            return (common,)
        return _played(common)

    def roles(self) -> list[str]:
        """The roles that this backbone has: ``attn``, ``attn.q``, ``ff.w1``, ``embeddings`` ..."""
        found = {role for named in self._named.values() for role in _played(named.role)}
        return sorted(found - {""})

    def addressed(self, pattern: str) -> list[str]:
        """The modules that a pattern addresses by one of their common names, in module order.

        A pattern may begin with a tower's name, as in ``vision.attn.q``, or with ``all`` for every
        tower. OPT's ``fc1`` and ``fc2`` are ``ff.w1`` and ``ff.w2``, and no module is ``ff``: both
        answer to that name too.
        """
        structure, rest = self.scoped(pattern)
        return [name for name, known in structure.addresses.items() if matches_any(known, rest)]

    def offer(self) -> str:
        """What the backbone offers to patterns by common names."""
        towers = f", its towers are {', '.join(self.towers)} (as in vision.attn.q)"
        return (
            f"Its roles are {', '.join(self.roles())}{towers if self.towers else ''} "
            "(`print(opendelta.CommonStructureMap(model).explain())` shows which is which)."
        )

    def scoped(self, pattern: str) -> tuple[CommonStructureMap, str]:
        """What a pattern that begins with a tower's name stands for.

        Returns:
            The map of that tower and the rest of the pattern: ``vision.attn.q`` is ``attn.q`` in
            the map of ``vision``. For any other pattern, this map and the pattern as it is.
        """
        tower, _, rest = pattern.partition(".")
        if tower not in (*self.towers, "all") or "." not in pattern:
            return self, pattern
        if tower not in self._scoped:
            self._scoped[tower] = CommonStructureMap(self._backbone, strict=False, scope=tower)
        return self._scoped[tower], rest

    @property
    def everywhere(self) -> CommonStructureMap:
        """The map of all towers together."""
        return self.scoped("all.")[0] if self.towers else self

    @cached_property
    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Module -> the names by which patterns address it, for the modules that have some."""
        names = {name: self.names(name) for name in self.matched_pairs}
        taken = {common for known in names.values() for common in known} | {*self._graph.modules}

        def with_units(common: str) -> Iterator[str]:
            yield common
            yield from takewhile(lambda unit: unit not in taken, lineage(common)[1:])

        return {
            name: tuple(dict.fromkeys(unit for common in known for unit in with_units(common)))
            for name, known in names.items()
        }

    def blocks(self) -> dict[str, dict[str, list[str]]]:
        """Block -> role -> the modules that play it there, by common names."""
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, named in self._named.items():
            for role in _played(named.role) if named.block else ():
                found[named.block][role].append(name)
        return found

    def outputs(self, role: str) -> list[str]:
        """The modules whose output is the output of a role, wherever the backbone plays it.

        That is the output projection (``attn.proj``, ``ff.w2``), or the whole module where it has
        none (fused experts, `torch.nn.MultiheadAttention`), or the one projection that there is
        (a block that is a convolution).

        Args:
            role: ``"attn"``, ``"crossattn"`` or ``"ff"``.
        """
        ends = {f"{role}.proj", f"{role}.w2"}
        found = {name for name, named in self._named.items() if named.role in ends}
        wholes = [name for name, named in self._named.items() if named.role == role]
        parts: dict[str, set[str]] = {name: set() for name in wholes}
        for name, named in self._named.items():
            if named.role.startswith(role + ".") and not named.role.endswith("layer_norm"):
                owner = innermost(parent_of(name), parts)
                if owner is not None:
                    parts[owner].add(named.role)
        for root, roles in parts.items():
            # A feed-forward with parts but no way down is, as in BERT, the way up alone.
            if not (roles if role == "ff" else roles & ends):
                found.add(root)
        for played in self.blocks().values() if role == "attn" else ():
            if "attn" not in played and "attn.proj" not in played:
                found.update(played.get("attn.q", ())[-1:])
        return [name for name in self.matched_pairs if name in found]

    def unit_widths(self, name: str) -> tuple[int, int] | None:
        """(input, output) width of a whole attention or feed-forward, as its projections say.

        Args:
            name: a module. None is returned if it is no such unit, or not all that it is.
        """
        named = self._named.get(name)
        ends = {"attn": ("q", "proj"), "crossattn": ("q", "proj"), "ff": ("w1", "w2")}
        if named is None or named.role not in ends:
            return None
        first, last = (f"{named.role}.{end}" for end in ends[named.role])
        parts = [part for part in self._graph.inside_of(name) if part in self._named]
        firsts = [p for p in parts if first in _played(self._named[p].role)]
        lasts = [p for p in parts if self._named[p].role == last]
        linears = self._graph.linears
        if not firsts or not lasts or not {*firsts, *lasts} <= linears.keys():
            return None
        out = linears[lasts[-1]][1]
        # In a low-rank chain the role is the second factor's; the first one reads the input.
        reads_out = any(linears[n][0] == out for n in self._graph.linears_below(name))
        return (out if reads_out else linears[firsts[0]][0]), out

    def explain(self) -> Explanation:
        """A table of the modules that have common names: block, role, module, and why."""
        named = self._named.items()
        return Explanation([(n.block, n.role or n.common, name, n.why) for name, n in named])

    # --- telling ----------------------------------------------------------------------------------

    def _holds(self, key: str) -> bool:
        """Whether `key` is a parameter, a buffer, or another name of a shared module."""
        modules = dict(own_modules(self._backbone, remove_duplicate=False))
        owner, leaf = modules.get(parent_of(key)), leaf_of(key)
        inner = owner is not None and (leaf in owner._parameters or leaf in owner._buffers)
        return inner or key in modules

    def _nothing_found(self) -> str:
        linears = list(self._graph.linears)
        if linears:
            shown = ", ".join(linears[:6]) + (", ..." if len(linears) > 6 else "")
            found = f"{len(linears)} linear layers ({shown}), but no list of blocks that hold them"
        else:
            found = "no linear layer"
        example = [leaf_of(linears[0])] if linears else ["NAME"]
        return (
            f"{type(self._backbone).__name__} has no default modules for a delta: it has {found}. "
            "Available models with default configurations are BERT, RoBERTa, DeBERTa-v2, GPT2, OPT "
            "and T5, what is derived from them or wraps them, and every other model that is a list "
            "of blocks with attention or another mixer. Please manually add the delta by "
            "specifying 'modified_modules', based on the visualization of your model's structure: "
            "`opendelta.Visualization(model).structure_graph()` shows the names, and "
            f"modified_modules={example} addresses every module whose name ends so."
        )

    def _warn_of_gaps(self) -> None:
        for block, roles in self.blocks().items():
            units = {role.partition(".")[0] for role in roles}
            lacking = [] if units & {"attn", "crossattn"} else ["attention"]
            lacking += [] if "ff" in units else ["feed-forward"]
            if lacking:
                lack = " and no ".join(lacking)
                warn(f"No {lack} is recognised in {block}.", DeltaWarning)


def _played(role: str) -> tuple[str, ...]:
    """The roles that a module plays: ``attn.qkv`` is ``attn.q``, ``attn.k`` and ``attn.v``."""
    home, _, end = role.rpartition(".")
    return tuple(dotted(home, part) for part in FUSED.get(end, (end,)))


class Explanation:
    """The table that `CommonStructureMap.explain` returns; ``str()`` draws it.

    Attributes:
        rows: (block, role, module, why) each.
    """

    def __init__(self, rows: list[tuple[str, str, str, str]]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("block", "role", "module", "why")
        for row in self.rows:
            table.add_row(*row)
        console = Console(width=200, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get()

    __repr__ = __str__
