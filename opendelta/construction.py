"""Putting a delta on a backbone: plan insertions, carry out all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from opendelta.backends import bmt
from opendelta.backends.sharding import agreeing, class_name, reshard
from opendelta.exceptions import InsertionError
from opendelta.ground.names import numbered
from opendelta.ground.walk import unblocked
from opendelta.ground.widths import read_widths
from opendelta.inspection import num_total_parameters
from opendelta.mechanism import dispatch as actions
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher, Dispatcher
from opendelta.mechanism.engines import join_engine, require_open
from opendelta.mechanism.insertion import (
    Insertion,
    ModuleInsertion,
    ParameterInsertion,
    Replacement,
    place_of,
)
from opendelta.mechanism.ownership import inserted_names, own_modules
from opendelta.sizes import measure_widths, random_state_kept_on_error
from opendelta.targeting import Targeting

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase
    from opendelta.delta_configs import BaseDeltaConfig


def _sides(method: str, delta: nn.Module) -> list[tuple[type[Dispatcher], Callable[..., Any]]]:
    """The dispatchers that call `delta` for a `method` of `insert_module`, and how."""
    pre, post = hasattr(delta, "pre_forward"), hasattr(delta, "post_forward")
    before = (BeforeDispatcher, actions.before)
    after = (AfterDispatcher, actions.after)
    table: dict[str, list[tuple[type[Dispatcher], Callable[..., Any]]]] = {
        "before": [before],
        "after": [after],
        "sequential": [before] * pre + [after] * (post or not pre),
        "parallel": [(AfterDispatcher, actions.parallel)],
        "onto": [(AfterDispatcher, actions.onto)],
    }
    if method not in table:
        raise InsertionError(f"method={method!r}: expected one of {', '.join(map(repr, table))}.")
    return table[method]


def reads_without_calling(backbone: nn.Module, name: str) -> bool:
    """Whether the module called `name` is one whose weight its parent reads, never calling it.

    That is the output projection of `nn.MultiheadAttention`.
    """
    parent_name, _, child = name.rpartition(".")
    if child != "out_proj":
        return False
    return hasattr(backbone.get_submodule(parent_name), "in_proj_weight")


def _places(insertion: Insertion) -> list[nn.Module]:
    """The modules that an insertion changes."""
    return insertion.slot.places if isinstance(insertion, ParameterInsertion) else [insertion.host]


class Construction(Targeting):
    """The part of `DeltaBase` that modifies the backbone.

    Between the start and the end of `add_all_delta_to_backbone` insertions are only planned;
    then the whole plan is carried out. Outside of it each insertion acts at once.
    """

    config_class: ClassVar[type[BaseDeltaConfig]]

    backend: str | None
    arguments: dict[str, Any]
    config: BaseDeltaConfig
    insertions: list[Insertion]
    interactive_port: int | None
    modified_modules: list[str]
    delta_type: ClassVar[str]
    _planned: list[Insertion] | None
    _planned_on: dict[int, list[Insertion]]
    _target_names: list[str]
    _measured: dict[str, tuple[int, int]]

    # --- building ---------------------------------------------------------------------------

    def add_all_delta_to_backbone(
        self, backbone: nn.Module, modified_modules: list[str]
    ) -> nn.Module:
        """Put the delta on every module that `modified_modules` addresses, or on none.

        Args:
            backbone: the model to modify, in place.
            modified_modules: patterns.

        Returns:
            The backbone.
        """
        self._own = list(own_modules(backbone, remove_duplicate=False))
        self._module_names = {}
        for name, module in self._own:
            self._module_names.setdefault(id(module), name)
        if self.interactive_port is not None:
            modified_modules = self._select_modules(backbone, self.interactive_port)
        require_open(backbone)
        reshard(backbone)
        self.__dict__.setdefault("arguments", {})
        with agreeing(backbone, InsertionError) as asked:  # planning may gather what is sharded
            asked.append([f"{type(self).__name__} {self.arguments}"])
        with random_state_kept_on_error():
            with agreeing(backbone, InsertionError) as plan:
                planned = self._planned_insertions(backbone, modified_modules)
                config = self.config_class(**self.arguments)
                plan.append(
                    f"{name} {tuple(p.shape)}" for i in planned for name, p in i.named_parameters()
                )
            self._carry_out(planned)
        self._own, self._target_names, self._measured = [], [], {}
        self.config = config
        if self.uses_defaults:
            self.config.common_structure = True
        self.config.backbone_class = class_name(backbone)
        return backbone

    def _planned_insertions(self, backbone: nn.Module, patterns: list[str]) -> list[Insertion]:
        """What the delta would put on the modules that `patterns` address, nothing carried out."""
        self._planned, self._planned_on = [], {}
        try:
            self.plan(backbone, patterns)
            planned = self._planned
        finally:
            self._planned, self._planned_on = None, {}
        if not planned:
            raise InsertionError(
                f"Nothing in {patterns} is a module that {type(self).__name__} can modify."
            )
        return planned

    def _select_modules(self, backbone: nn.Module, port: int) -> list[str]:
        """Patterns of the modules that the user clicks on the web page."""
        from opendelta.web import select_modules  # flask is loaded for those who ask for the page

        total = num_total_parameters(backbone)

        def count(names: list[str]) -> tuple[int, float]:
            with torch.random.fork_rng(devices=[]):
                planned = self._planned_insertions(backbone, self.patterns_for(names))
            added = {id(p): p.numel() for i in planned for _, p in i.named_parameters()}
            return sum(added.values()), sum(added.values()) / total

        self.common_structure = False  # what is clicked has the backbone's own name
        chosen = select_modules(backbone, port, method=self.delta_type, count=count)
        self.modified_modules = self.patterns_for(chosen)
        self.__dict__.setdefault("arguments", {}).update(
            modified_modules=self.modified_modules, common_structure=False
        )
        return self.modified_modules

    def plan(self, backbone: nn.Module, patterns: list[str]) -> None:
        """Call `update_module` for every target, in module order."""
        addressed = {name for hits in self.find_targets(patterns) for name in hits}
        self._target_names = [n for n in self._module_names.values() if n in addressed]
        for name in self._target_names:
            self.update_module(backbone, name)

    def update_module(self, module: nn.Module, key: str) -> None:
        """Modify the module called `key` inside `module`; each method defines how.

        Raises:
            NotImplementedError: in the base class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define update_module(module, key): it should build "
            "its layer for the module called `key` and insert it, for instance with "
            "self.insert_sequential_module(...)."
        )

    def modify_module(self, module: nn.Module) -> None:
        """Modify the parameters inside a module; methods that do so redefine it.

        Raises:
            NotImplementedError: in the base class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not modify parameters in place.")

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """(input, output) width of a module to be modified.

        Read off its attributes, or under common structure those of its projections, else measured
        by one forward for all targets together.

        Raises:
            InsertionError: if neither is possible.
        """
        known = read_widths(module)
        if known is not None:
            return known
        name = self.name_of(module)
        known = self.structure.everywhere.unit_widths(name) if self.common_structure else None
        if known is not None:
            return known
        if name not in self._measured:
            wanted = {
                other: target
                for other in dict.fromkeys([name, *self._target_names])
                if read_widths(target := self.backbone_model.get_submodule(other)) is None
            }
            self._measured.update(measure_widths(self.backbone_model, wanted))
        return self._measured[name]

    # --- inserting --------------------------------------------------------------------------

    def insert_module(
        self,
        module: nn.Module,
        method: str = "sequential",
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """Insert a delta module before, after, around or beside a module of the backbone.

        The module's own ``forward``, signature and docstring stay as they are.

        Args:
            module: the module to modify.
            method: ``"before"``: the input passes through ``delta_module`` first
                (``pre_forward(*args, **kwargs)`` if it has that); ``"after"``: the output does
                (``post_forward(output)``); ``"sequential"``: before if it has ``pre_forward``,
                after if it has ``post_forward`` or neither; ``"parallel"``:
                ``delta_module(*args, **kwargs)`` is added to the output; ``"onto"``: the output
                becomes ``delta_module(output, input)``.
            delta_module: what to insert.
            delta_name: the name under which it sits on `module`; ``_1``, ``_2`` are appended
                where deltas of that name are there already.
            strict: refuse a module that carries a delta already.
            _delta_info: a dict whose entries override the arguments of the same name.

        Raises:
            InsertionError: for an unknown method, a name that would shadow an attribute, a module
                that is not the backbone's, or (`strict`) one that is modified already.
        """
        info = {"method": method, "delta_module": delta_module, "delta_name": delta_name}
        info |= {key: value for key, value in (_delta_info or {}).items() if key in info}
        delta = info["delta_module"]
        if not isinstance(delta, nn.Module):
            raise InsertionError(
                f"delta_module is a {type(delta).__name__}; expected the nn.Module to insert."
            )
        if strict and inserted_names(module):
            raise InsertionError(
                f"{self.name_of(module)!r} carries {', '.join(inserted_names(module))} already, "
                "and strict=True allows one delta on a module."
            )
        for side, action in _sides(str(info["method"]), delta):
            self.insert_action(module, delta, str(info["delta_name"]), side, action)

    def insert_sequential_module(
        self,
        module: nn.Module,
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """`insert_module` with ``method="sequential"``: before or after the module."""
        self.insert_module(module, "sequential", delta_module, delta_name, strict, _delta_info)

    def insert_parallel_module(
        self,
        module: nn.Module,
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """`insert_module` with ``method="parallel"``: its result is added to the output."""
        self.insert_module(module, "parallel", delta_module, delta_name, strict, _delta_info)

    def insert_action(
        self,
        module: nn.Module,
        delta_module: nn.Module,
        delta_name: str,
        side: type[Dispatcher],
        action: Callable[..., Any],
        kind: type[ModuleInsertion] = ModuleInsertion,
    ) -> None:
        """Insert a delta module that a dispatcher of `module` calls through `action`.

        The general form of `insert_module`, for methods with an action of their own (a function
        of a module, so that it can be pickled).
        """
        module = unblocked(module)
        host_name = self.name_of(module)
        if reads_without_calling(self.backbone_model, host_name):
            raise InsertionError(
                f"{host_name!r} is read by its parent, never called, so a delta on it would not "
                f"act. Name its parent {host_name.rpartition('.')[0]!r} instead."
            )
        mine = next((i for i in self._mine_on(module) if i.module is delta_module), None)
        name = mine.name if mine is not None else self._free_name(module, delta_name)
        self._follow_host(module, delta_module)
        insertion = kind(module, host_name, delta_module, name, side, action)
        if mine is None:
            insertion.lone_name = self._lone_name(module, delta_name)
        self._insert(insertion)

    def replace_module(
        self,
        parent_module: nn.Module,
        child_name: str,
        child_module: nn.Module,
        new_module: nn.Module,
        delta_name: str | None = "delta",
    ) -> None:
        """Put `new_module` in the place of a child; detaching puts the original back.

        Args:
            parent_module: a module of the backbone.
            child_name: the child's name in it.
            child_module: the child that is replaced.
            new_module: the delta module.
            delta_name: a name for messages only.

        Raises:
            InsertionError: if the child is not there under that name.
        """
        if parent_module._modules.get(child_name) is not child_module:
            raise InsertionError(
                f"{type(parent_module).__name__} has no child {child_name!r} that is the given "
                f"{type(child_module).__name__} (for delta {delta_name!r})."
            )
        self._follow_host(child_module, new_module)
        parent_name = self.name_of(parent_module)
        self._insert(Replacement(parent_module, parent_name, child_name, new_module))

    def _here(self, module: nn.Module) -> list[Insertion]:
        """This delta's insertions on a module, planned ones included."""
        if self._planned is not None:
            return self._planned_on.get(id(module), [])
        return [i for i in self.insertions if any(module is place for place in _places(i))]

    def _mine_on(self, host: nn.Module) -> list[ModuleInsertion]:
        """This delta's modules on `host`, planned ones included."""
        return [i for i in self._here(host) if isinstance(i, ModuleInsertion)]

    def parameters_on(self, module: nn.Module) -> list[ParameterInsertion]:
        """This delta's own parameters in places of `module`, planned ones included."""
        return [i for i in self._here(module) if isinstance(i, ParameterInsertion)]

    def _insert(self, insertion: Insertion) -> None:
        """Plan an insertion, or carry it out at once outside of planning."""
        if self._planned is not None:
            self._planned.append(insertion)
            for place in _places(insertion):
                self._planned_on.setdefault(id(place), []).append(insertion)
        else:
            self._carry_out([insertion])

    def _carry_out(self, planned: Sequence[Insertion]) -> None:
        """Carry out all of a plan, or none of it."""
        if self.backend == "bmt":
            bmt.distribute(planned)
        done: list[Insertion] = []
        join_engine(self.backbone_model, planned)
        try:
            for insertion in planned:
                done.append(insertion)
                insertion.insert()
        except BaseException:
            for insertion in reversed(done):
                insertion.remove()
            raise
        held = {id(i.module) for i in self.insertions if isinstance(i, ModuleInsertion)}
        for insertion in planned:
            if isinstance(insertion, ParameterInsertion):
                self._node(insertion.host_name)._parameters[insertion.name] = insertion.parameter
            elif isinstance(insertion, Replacement):
                self._node(insertion.host_name)._modules[insertion.name] = insertion.module
            elif isinstance(insertion, ModuleInsertion) and id(insertion.module) not in held:
                held.add(id(insertion.module))  # a second host of one module does not hold it
                self._node(insertion.host_name)._modules[insertion.lone_name] = insertion.module
        self.insertions += planned
        self._label(planned)
        state = BackboneState.create(self.backbone_model)
        if not any(delta is self for delta in state.deltas):
            state.deltas.append(cast("DeltaBase", self))
        state.settle_hooks(self.backbone_model)
        state.watch_first_forward(self.backbone_model)
        state.watch_training(self.backbone_model)
        for insertion in planned:
            if isinstance(insertion, ParameterInsertion):
                state.slots[insertion.full_name] = insertion.slot

    def _node(self, host_name: str) -> nn.Module:
        """The module of this delta that stands for one of the backbone: ``encoder.layer.0...``."""
        node: nn.Module = self
        for part in host_name.split(".") if host_name else ():
            child = node._modules.get(part)
            if child is None:
                child = node._modules[part] = nn.Module()
            node = child
        return node

    def look_at_places(self) -> None:
        """Take up parameters that were put in the place of this delta's (``assign=True``)."""
        for insertion in self.insertions:
            if isinstance(insertion, ParameterInsertion) and insertion.attached:
                insertion.slot.look()
                self._label([insertion])
                self._node(insertion.host_name)._parameters[insertion.name] = insertion.parameter

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """This delta's parameters by their names in files, see `nn.Module.named_parameters`."""
        self.look_at_places()
        return super().named_parameters(*args, **kwargs)

    @staticmethod
    def _label(insertions: Sequence[Insertion]) -> None:
        for insertion in insertions:
            for _, p in insertion.named_parameters():
                p._is_delta = True  # type: ignore[attr-defined]  # bigmodelvis colours by it

    def _free_name(self, host: nn.Module, base: str) -> str:
        """`base`, or `base_1`, ... if deltas of that name are on `host` already."""
        if not base.isidentifier():
            raise InsertionError(f"delta_name={base!r} is not a valid attribute name.")
        taken = set(inserted_names(host))
        taken |= {i.name for i in self._mine_on(host)} | self._merged_names(host)
        name = next(n for n in numbered(base) if n not in taken)
        if hasattr(host, name):
            raise InsertionError(
                f"A delta called {name!r} would shadow the attribute {name!r} of "
                f"{self.name_of(host)!r} ({type(host).__name__}): pass another delta_name."
            )
        return name

    def _merged_names(self, host: nn.Module) -> set[str]:
        """Names on `host` that merged deltas take again when they are unmerged."""
        state = BackboneState.of(self.backbone_model)
        weights = state.merged.values() if state is not None else ()
        folds = (fold for weight in weights if weight.host is host for fold in weight.folds)
        return {i.name for _, i in folds if isinstance(i, ModuleInsertion)}

    def _lone_name(self, host: nn.Module, base: str) -> str:
        """The name that the delta module would have if this delta were alone on the backbone."""
        mine = {i.lone_name for i in self._mine_on(host)}
        return next(n for n in numbered(base) if n not in mine)

    def _follow_host(self, host: nn.Module, delta_module: nn.Module) -> None:
        """Bring a new delta module to its host's device, dtype and train mode."""
        device, dtype = place_of(host) or (None, None)
        if device is None or dtype is None:  # nothing there, or quantised weights alone
            whole = place_of(self.backbone_model) or (None, None)
            device, dtype = device or whole[0], dtype or whole[1]
        p = next(delta_module.parameters(), None)
        if p is not None and (p.device, p.dtype) != (device or p.device, dtype or p.dtype):
            delta_module.to(device=device, dtype=dtype)
        if delta_module.training != host.training:
            delta_module.train(host.training)
