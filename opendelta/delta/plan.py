"""A plan: what a delta is about to put on a backbone, made, looked at, carried out, dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from opendelta.addressing.targeting import Targeting
from opendelta.backends.sharding import class_name, full, full_shape
from opendelta.delta.pseudo_input import measure_widths
from opendelta.delta.record import record_of
from opendelta.exceptions import DeltaWarning, InsertionError, warn
from opendelta.ground.blocks import undone
from opendelta.ground.bytecode import children_read
from opendelta.ground.names import dotted, numbered
from opendelta.ground.walk import child_of, unblocked
from opendelta.ground.widths import read_widths
from opendelta.inspection.statistics import num_total_parameters
from opendelta.inspection.table import Summary, summary
from opendelta.mechanism.backbone_state import BackboneState, own_parameters
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.child_slot import ChildSlot, Replacement
from opendelta.mechanism.dispatch import Dispatcher
from opendelta.mechanism.engines import join_engine
from opendelta.mechanism.hosts import require_hookable, require_made
from opendelta.mechanism.insertion import EndInsertion, Insertion, ModuleInsertion
from opendelta.mechanism.ownership import inserted_names, own_modules
from opendelta.mechanism.places import place_of
from opendelta.mechanism.slot import ParameterInsertion, ParameterSlot

# Plans that are made and not carried out, while somebody collects them.
_HELD: ContextVar[list[Plan] | None] = ContextVar("opendelta_held_plans", default=None)


@contextmanager
def held_back() -> Iterator[list[Plan]]:
    """Within a ``with`` block deltas are constructed without changing their backbones.

    Yields:
        The plans that they made, to be carried out later, or dropped.
    """
    plans: list[Plan] = []
    with undone(partial(_HELD.set, _HELD.get())):
        _HELD.set(plans)
        yield plans


class Plan:
    """What a delta is about to put on its backbone; nothing of it has been carried out.

    It prints as a table, in terminals and in notebooks.

    Args:
        delta: whose plan it is.

    Attributes:
        insertions: what is to be inserted, in order.
        targets: names of the modules that the patterns address.
    """

    def __init__(self, delta: nn.Module) -> None:
        self.delta = delta
        self.record = record_of(delta)
        require_hookable(self.backbone, type(self.backbone).__name__)
        self.targeting: Targeting = self.record.look_anew()
        require_made(self.targeting.own)
        self.targets: list[str] = []
        self.insertions: list[Insertion] = []
        self.left_out: list[str] = []  # default places on which nothing would act
        self._on: dict[int, list[Insertion]] = {}
        self._measured: dict[str, tuple[int, int]] = {}
        self.is_preview = self.is_noted = False

    # --- looking ----------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The model for which it is made."""
        return self.record.backbone

    @property
    def modules(self) -> list[str]:
        """Names of the modules that would carry something of the delta, in order."""
        brings = {i.place_name for i in self.insertions if i.content is not None}
        return [name for name, _ in own_modules(self.backbone) if name in brings]

    @property
    def num_parameters(self) -> int:
        """How many parameters would be added, or taken over."""
        added = {id(p): p.numel() for i in self.insertions for _, p in i.named_parameters()}
        return sum(added.values())

    @property
    def share(self) -> float:
        """`num_parameters` to the parameters of the backbone."""
        own = {id(p): p.numel() for _, p in own_parameters(self.backbone)}
        return self.num_parameters / max(1, sum(own.values()))

    def summary(self) -> Summary:
        """The table: what is added where."""
        entries = [
            (i.place_name, i.name, i.content) for i in self.insertions if i.content is not None
        ]
        return summary(entries, num_total_parameters(self.backbone))

    def __repr__(self) -> str:
        return repr(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # --- making -----------------------------------------------------------------------------

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """(input, output) width of a module, see `DeltaBase.widths`."""
        known = read_widths(module)
        if known is not None:
            return known
        name = self.targeting.name_of(module)
        if self.targeting.common_structure:
            known = self.targeting.structure.everywhere.unit_widths(name)
            if known is not None:
                return known
        if name not in self._measured:
            wanted = {
                other: target
                for other in dict.fromkeys([name, *self.targets])
                if read_widths(target := self.backbone.get_submodule(other)) is None
            }
            self._measured.update(measure_widths(self.backbone, wanted))
        return self._measured[name]

    def insert(
        self,
        module: nn.Module,
        delta_module: nn.Module,
        delta_name: str,
        side: type[Dispatcher],
        action: Callable[..., Any],
    ) -> None:
        """A delta module that a dispatcher of `module` calls, see `DeltaBase.insert_action`."""
        module = unblocked(module)
        host_name = self.targeting.name_of(module)
        if reads_without_calling(self.backbone, host_name):
            if self.record.uses_defaults:
                self.left_out.append(host_name)
                return
            parent = host_name.rpartition(".")[0]
            takes = self._takes(parent)
            raise InsertionError(
                f"{host_name!r} is read by its parent {parent!r}, never called, so a delta on it "
                "would not act. "
                + (f"Name {parent!r} instead." if takes else "Leave it out with exclude_modules.")
            )
        mine = [i for i in self.on(module) if i.module is not None]
        same = next((i for i in mine if i.module is delta_module), None)
        name = self._free_name(module, delta_name) if same is None else same.name
        taken = {i.file_name for i in mine}
        alone = next(n for n in numbered(delta_name) if n not in taken)
        lone_name = alone if same is None else same.file_name
        self.add(ModuleInsertion(module, host_name, delta_module, name, side, action, lone_name))

    def replace(
        self,
        parent: nn.Module,
        child_name: str,
        new_module: nn.Module,
        kind: type[Replacement] = Replacement,
    ) -> None:
        """A child swapped for a delta module, see `DeltaBase.replace_module`."""
        host_name = self.targeting.name_of(parent)
        state = BackboneState.of(self.backbone)
        known = {} if state is None else state.child_slots
        slot = known.get(dotted(host_name, child_name)) or ChildSlot(parent, child_name)
        self.add(kind(slot, host_name, new_module))

    def at_end(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """A hook that runs when a call of `module` ends, also by an error."""
        self.add(EndInsertion(module, self.targeting.name_of(module), hook))

    def put_parameter(
        self,
        places: list[tuple[str, nn.Module]],
        name: str,
        parameter: nn.Parameter,
        *,
        ignored: bool = False,
        saved: bool = True,
        kind: Callable[..., ParameterInsertion] = ParameterInsertion,
    ) -> None:
        """A parameter in the place of one that all `places` share, or of none."""
        host_name = places[0][0]
        state = BackboneState.of(self.backbone)
        slot = None if state is None else state.slots.get(dotted(host_name, name))
        for place_name, _ in places:
            merged = None if state is None else state.merged.get(place_name)
            weight = None if merged is None else merged.weights.get(name)
            if weight is not None and (slot is None or weight.slot is not slot):
                raise InsertionError(
                    f"{dotted(place_name, name)} has a delta merged into it, which a parameter in "
                    "its place would cover: unmerge() that one first."
                )
        if slot is None:
            slot = ParameterSlot([module for _, module in places], name)
        self.add(kind(slot, host_name, parameter, ignored, saved))

    def on(self, module: nn.Module) -> list[Insertion]:
        """This delta's insertions on a module, those of this plan included."""
        there = [i for i in self.record.insertions if any(p is module for p in i.places)]
        return there + self._on.get(id(module), [])

    def holders(self, name: str) -> dict[int, list[tuple[str, nn.Module]]]:
        """Id of each parameter called `name` on its module -> the modules that share it."""
        places: dict[int, list[tuple[str, nn.Module]]] = {}
        for module_name, module in own_modules(self.backbone):
            p = dict(module._parameters.items()).get(name)  # TorchScript's table has no get()
            if p is not None:
                places.setdefault(id(p), []).append((module_name, module))
        return places

    def add(self, insertion: Insertion) -> None:
        """Plan one insertion."""
        for place in insertion.places:
            require_hookable(place, insertion.host_name)
        self.insertions.append(insertion)
        for place in insertion.places:
            self._on.setdefault(id(place), []).append(insertion)

    def _takes(self, name: str) -> bool:
        """Whether the delta could be put on the module called `name`, of the backbone's own."""
        trial = Plan(self.delta)
        if not name:
            return False
        with undone(partial(setattr, self.record, "plan", self.record.plan)):
            self.record.plan = trial
            try:
                update: Any = self.delta.update_module
                update(self.backbone, name)
            except Exception:  # of whatever kind: what a method says of a module it does not take
                return False
        return bool(trial.insertions)

    def _free_name(self, host: nn.Module, base: str) -> str:
        """`base`, or `base_1`, ... if deltas of that name are on `host` already."""
        if not base.isidentifier():
            raise InsertionError(f"delta_name={base!r} is not a valid attribute name.")
        taken = set(inserted_names(host)) | {i.name for i in self.on(host)}
        state = BackboneState.of(self.backbone)
        for merged in () if state is None else state.merged.values():
            if merged.module is host:  # names that are taken again when they are unmerged
                taken |= {fold.insertion.name for fold in merged.folds}
        name = next(n for n in numbered(base) if n not in taken)
        if hasattr(host, name):
            raise InsertionError(
                f"A delta called {name!r} would shadow the attribute {name!r} of "
                f"{self.targeting.name_of(host)!r} ({type(host).__name__}): pass another "
                "delta_name."
            )
        return name

    # --- carrying out -----------------------------------------------------------------------

    def carry_out(self) -> None:
        """Put everything on the backbone, or, after an error, nothing."""
        held = _HELD.get()
        if self.left_out:
            shown, more = ", ".join(map(repr, self.left_out[:3])), len(self.left_out) - 3
            warn(
                f"{type(self.delta).__name__} left out {shown}"
                + f" and {more} more" * (more > 0)
                + ", which are among its default places: their weights are read by the modules "
                "around them, which never call them, so that a delta there would not act.",
                DeltaWarning,
            )
            self.left_out.clear()
        if self.is_preview:
            raise InsertionError(
                f"This is a preview: construct the {type(self.delta).__name__} to carry it out."
            )
        if held is not None:
            if self not in held:  # the delta, which nobody knows yet, holds it from now on
                held.append(self)
                if not self.is_noted:
                    changes = Changes()
                    self.note(changes)
                    changes.carry_out()
            return
        self.prepare()
        changes = Changes()
        if not self.is_noted:
            self.note(changes)
        self.enter(changes)
        changes.carry_out()

    def prepare(self) -> None:
        """Bring what is new to its host's device, dtype and train mode, and to its engine."""
        for insertion in self.insertions:
            if insertion.module is not None:
                self._follow_host(insertion)
        backend = self.record.base["backend"]
        join_engine(self.backbone, self.insertions, backend)
        if self.is_noted:  # BMTrain puts parameters of its own into the place of ours
            changes = Changes()
            hold(self.delta, changes, self.insertions)
            changes.carry_out()
            label(self.insertions)

    def note(self, changes: Changes) -> None:
        """Let the delta hold what it is about to put on its backbone."""
        hold(self.delta, changes, self.insertions)
        record = self.record
        known = changes.get(record, "insertions")
        changes.set(record, insertions=[*known, *self.insertions], plan=None)
        if record.config.backbone_class is None:
            changes.set(record.config, backbone_class=class_name(self.backbone))
        label(self.insertions)
        changes.set(self, is_noted=True)

    def enter(self, changes: Changes) -> None:
        """Let everything come in on the backbone, and in what is remembered of it."""
        for insertion in self.insertions:
            insertion.enter(changes)
        state = BackboneState.create(self.backbone, changes)
        state.enlist(changes, self.delta, self.record.moved, self.backbone, self.insertions)
        slots, child_slots = changes.of(state.slots), changes.of(state.child_slots)
        for insertion in self.insertions:
            name = dotted(insertion.host_name, insertion.name)
            if insertion.slot is not None:
                slots[name] = insertion.slot
            elif insertion.child_slot is not None:
                child_slots[name] = insertion.child_slot

    def _follow_host(self, insertion: Insertion) -> None:
        module, host = insertion.module, insertion.led_by
        assert module is not None
        device, dtype = place_of(host) or (None, None)
        if device is None or dtype is None:  # nothing there, or quantised weights alone
            whole = place_of(self.backbone) or (None, None)
            device, dtype = device or whole[0], dtype or whole[1]
        p = next(module.parameters(), None)
        there = None if p is None or p.is_meta else (p.device, p.dtype)  # no values to move
        if p is not None and there not in (None, (device or p.device, dtype or p.dtype)):
            module.to(device=device, dtype=dtype)


def reads_without_calling(backbone: nn.Module, name: str) -> bool:
    """Whether the module called `name` is one whose weight its parent reads, never calling it.

    As the output projection of `nn.MultiheadAttention` is, and the convolution of Mamba.
    """
    *path, child = name.split(".")
    parent = child_of(backbone, *path)
    return parent is not None and child in children_read(parent)


def hold(delta: nn.Module, changes: Changes, insertions: Sequence[Insertion]) -> None:
    """Have what was inserted under the name of its host in a delta."""
    held = {id(i.module) for i in record_of(delta).insertions if i.module is not None}
    for insertion in insertions:
        content = insertion.content
        if content is None or id(content) in held:
            continue  # a second host of one module does not hold it
        held.add(id(content))
        node = delta
        for part in filter(None, insertion.host_name.split(".")):
            children: Any = changes.of(node._modules)
            if children.get(part) is None:
                children[part] = nn.Module()
            node = children[part]
        changes.of(getattr(node, insertion.table))[insertion.file_name] = content


def label(insertions: list[Insertion]) -> None:
    """Mark the parameters of deltas, by which bigmodelvis colours them."""
    for insertion in insertions:
        for _, p in insertion.named_parameters():
            p._is_delta = True  # type: ignore[attr-defined]


def copied(p: nn.Parameter) -> nn.Parameter:
    """A parameter of a delta that starts as one of the backbone's."""
    if torch.empty(0).is_meta:  # it is looked at alone
        return nn.Parameter(torch.empty(full_shape(p), dtype=p.dtype))
    whole = full(p)
    is_looked_at = torch.get_default_device().type == "meta"  # in a preview
    return nn.Parameter(torch.empty_like(whole, device="meta") if is_looked_at else whole.clone())
