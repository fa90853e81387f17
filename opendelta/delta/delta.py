"""`Delta`: a module that stands on a backbone, with what its method says of itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.addressing.patterns import as_patterns
from opendelta.backends import check_backend
from opendelta.backends.sharding import agreeing, reshard
from opendelta.delta.arguments import (
    BASE,
    BASE_ARGUMENTS,
    checked,
    of_configuration,
    require_free_names,
)
from opendelta.delta.config import ConfigFields, fixed_since_construction
from opendelta.delta.inserting import Inserting
from opendelta.delta.own_modules import plan_own_modules
from opendelta.delta.plan import Plan, hold, label
from opendelta.delta.pseudo_input import random_state_kept_on_error
from opendelta.delta.record import KEY, Record, record_of
from opendelta.exceptions import AddressingError, ConfigError, InsertionError, nearest
from opendelta.ground.blocks import within
from opendelta.ground.walk import child_of, named_tensors, uncompiled
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.engines import require_open
from opendelta.mechanism.insertion import Insertion

INTERACTIVE_PORT = 8888


class Delta(Inserting):
    """A delta, as far as it is put on a backbone; `DeltaBase` adds what is done with it.

    The bookkeeping stands in a `Record` beside the module. The module itself holds the delta's
    modules and parameters, under the names of the backbone's modules that they sit on.
    """

    delta_type: ClassVar[str] = ""
    config_class: ClassVar[type[ConfigFields]] = ConfigFields
    default_modified_modules: ClassVar[list[str]] = []
    added_positions = 0
    merges_into: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            require_free_names(cls, Delta)
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]
        if cls.delta_type != cls.config_class.delta_type and "config_class" not in vars(cls):
            cls.config_class = cls.config_class.made_for(cls)
        if "config_class" in vars(cls) and cls.delta_type:
            cls.config_class.derive(cls.__init__, cls.delta_type, cls.__name__)

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = None,
        interactive_modify: bool | int | None = False,
        common_structure: bool | None = False,
        backend: str | None = "hf",
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        if not isinstance(backbone_model, nn.Module):
            raise ConfigError(
                f"backbone_model is a {type(backbone_model).__name__}; expected a torch nn.Module."
            )
        check_backend(backend)
        record: Record = self.__dict__.get(KEY) or Record({})
        nn.Module.__init__(self)
        self.__dict__[KEY] = record
        record.backbone = uncompiled(backbone_model)
        patterns = as_patterns(modified_modules, "modified_modules")
        if modified_modules is not None and not patterns:
            raise AddressingError(
                "modified_modules=[] names no module; leave it out for the method's defaults."
            )
        if interactive_modify and patterns:
            raise ValueError(
                "interactive_modify and modified_modules both choose the modules; give one."
            )
        port = INTERACTIVE_PORT if interactive_modify is True else interactive_modify
        record.port = port or None
        record.uses_defaults = not patterns and not interactive_modify
        record.base = {
            "modified_modules": patterns or list(self.default_modified_modules),
            "exclude_modules": as_patterns(exclude_modules, "exclude_modules"),
            "unfrozen_modules": as_patterns(unfrozen_modules, "unfrozen_modules"),
            "common_structure": bool(common_structure) or record.uses_defaults,
            "backend": backend,
            "own_modules": own_modules or [],
        }
        given, record.helpers = of_configuration(record.arguments)
        names = self.config_class.field_names()
        if not self.config_class.delta_type:  # the method has no config of its own
            given = {name: value for name, value in given.items() if name in names}
        if "backend" not in names:
            given.pop("backend", None)
        record.config = self.config_class(**given)
        if record.uses_defaults:
            record.config.common_structure = True

    def _construct(self, arguments: dict[str, Any] | None = None) -> None:
        """The body of a method's constructor: what it was given is put on the backbone.

        Args:
            arguments: as 1.0's ``self._construct(locals())`` passed them; they are known.
        """
        given = record_of(self).arguments
        base = {n: v for n, v in given.items() if n in BASE_ARGUMENTS and n != "self"}
        Delta.__init__(self, **base)
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)
        record_of(self).helpers = {}

    # --- the record, read-only ----------------------------------------------------------------

    @property
    def backbone_model(self) -> Any:
        """The model that the delta is on; it is not a part of the delta."""
        return record_of(self).backbone

    @property
    def config(self) -> Any:
        """What the delta was built by, and what a saved one says of itself."""
        return record_of(self).config

    @property
    def insertions(self) -> list[Insertion]:
        """What the delta has put on its backbone, in order."""
        return record_of(self).insertions

    @property
    def uses_defaults(self) -> bool:
        """Whether the user named no modules."""
        return record_of(self).uses_defaults

    def __getattr__(self, name: str) -> Any:
        record = self.__dict__.get(KEY)
        if record is not None:
            if name in BASE and record.base:
                return copy.copy(record.base[name])
            if name in self.config_class.method_fields:
                values = vars(record.config) if "config" in vars(record) else {}
                if name in values or name in record.arguments:
                    return values.get(name, record.arguments.get(name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        record = self.__dict__.get(KEY)
        is_base, is_own = name in BASE, name in self.config_class.method_fields
        if record is None or not (is_base or is_own):
            if isinstance(getattr(type(self), name, None), property):
                raise AttributeError(f"{type(self).__name__}.{name} is read-only.")
            super().__setattr__(name, value)
        elif record.is_made:
            raise fixed_since_construction(name, value, f"this {type(self).__name__}")
        elif is_base:
            record.base[name] = value
            if name in vars(record.config):
                record.config.put(**{name: value})
        else:
            record.config.put(**{name: value})

    def become(self, **values: Any) -> None:
        """For a method itself: let hyper-parameters be what training has made of them.

        Attribute, config and file say so from now on.

        Raises:
            ConfigError: for a name that is none of its hyper-parameters.
        """
        fields = self.config.method_fields
        strange = next((name for name in values if name not in fields), None)
        if strange is not None:
            raise ConfigError(
                f"{type(self).__name__} has no hyper-parameter {strange!r}."
                + nearest(strange, fields)
            )
        self.config.put(**values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        label(self.insertions)  # attributes of parameters do not survive a copy

    def forward(self, *args: Any, **kwargs: Any) -> RuntimeError:
        """Raise: a delta has no forward of its own; call the backbone's.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "A delta computes nothing by itself: call the backbone it is attached to, "
            f"{type(self.backbone_model).__name__}, as before."
        )

    # --- construction -----------------------------------------------------------------------

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
        record = record_of(self)
        require_open(backbone)
        reshard(backbone)
        if record.port is not None:
            modified_modules = self._select(record.port)
        with agreeing(backbone, InsertionError) as asked:  # planning may gather what is sharded
            asked.append(f"{type(self).__name__} {c.to_dict()}" for c in [record.config])
        with one_at_a_time(), random_state_kept_on_error():
            with agreeing(backbone, InsertionError) as notes:
                plan = self._planned(modified_modules)
                notes.append(
                    f"{name} {tuple(p.shape)}"
                    for i in plan.insertions
                    for name, p in i.named_parameters()
                )
            plan.carry_out()
        return backbone

    def _planned(self, patterns: list[str]) -> Plan:
        """The plan for the modules that `patterns` address."""
        record = record_of(self)
        record.plan = plan = Plan(self)
        try:
            self.plan_targets(plan, patterns)
            plan_own_modules(plan, record.base["own_modules"])
        finally:
            record.plan = None
        if not plan.insertions:
            raise InsertionError(
                f"Nothing in {patterns} is a module that {type(self).__name__} can modify."
            )
        return plan

    def _select(self, port: int) -> list[str]:
        """Patterns of the modules that the user clicks on the web page."""
        from opendelta.web import select_modules  # flask is loaded for those who ask for the page

        def count(names: list[str]) -> tuple[int, float]:
            with within(torch.random.fork_rng(devices=[])):
                plan = self._planned(self.patterns_for(names))
            return plan.num_parameters, plan.share

        record = record_of(self)
        record.base["common_structure"] = False  # what is clicked has the backbone's own name
        record.look_anew()
        chosen = select_modules(record.backbone, port, method=self.delta_type, count=count)
        patterns = self.patterns_for(chosen)
        record.base["modified_modules"] = patterns
        record.config.put(modified_modules=patterns, common_structure=False)
        return patterns

    # --- what a method says -----------------------------------------------------------------

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        """Plan what goes on the modules that `patterns` address: `update_module` for each."""
        addressed = {name for hits in self.find_targets(patterns) for name in hits}
        plan.targets = [n for n in plan.targeting.first_names.values() if n in addressed]
        for name in plan.targets:
            self.update_module(plan.backbone, name)

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

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """The modules that are modified where the user names none, for each default role."""
        return [structure.addressed(role) for role in self.default_modified_modules]

    def patterns_for(self, names: Sequence[str]) -> list[str]:
        """Patterns that put the delta on exactly the modules called `names`."""
        return record_of(self).targeting.patterns_for(names)

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under today's names; methods whose older files differ redefine it."""
        return tensors

    def loading_targets(
        self, tensors: dict[str, Tensor], changes: Changes
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a file is loaded into, by name, and the file's tensors under the same names.

        Args:
            tensors: what the file holds.
            changes: what the loaded values come in with, for a method that has to change more.
        """
        return dict(self.own_tensors()), self.translate_keys(tensors)

    def folds(self, insertion: Insertion) -> dict[str, Tensor]:
        """What the parameters of a host become with an insertion of this delta folded in.

        A method that can be merged defines it. The base checks on an example that the host then
        computes what the delta added, and refuses to merge otherwise.

        Args:
            insertion: what is folded in: ``insertion.module`` is the delta module, and
                ``insertion.host`` a twin of the modified module, whose parameters are float32 or
                wider and hold what was folded in before; they are not to be changed in place.

        Returns:
            Name of a parameter of the host -> its new value, of the same shape.
        """
        assert self.merges_into is not None  # in the style of 1.0
        weight = insertion.host._parameters.get(self.merges_into)
        if weight is None:
            return {self.merges_into: torch.empty(0)}  # which is refused, with what there is
        merged = getattr(self, "merged", None)
        if merged is None:
            raise NotImplementedError(
                f"{type(self).__name__} sets merges_into but defines neither folds nor merged."
            )
        return {self.merges_into: merged(insertion, weight.detach())}

    def on_step(self, step: int) -> None:
        """Act after a step of the optimizer, while gradients are there.

        `DeltaCallback` calls it, or a training loop: ``optimizer.step(); delta.on_step(step)``.
        Most methods do nothing.

        Args:
            step: how many steps have been taken, from 1.
        """

    def loss_term(self) -> Tensor | None:
        """What the method adds to the loss in training, a scalar with its graph; None for nothing.

        It is added to ``output.loss`` of the backbone in training, and counts once for a step of
        transformers' Trainer however many batches that accumulates. What computes the loss itself
        (a loop, a Trainer's ``compute_loss_func`` or label smoothing) adds it:
        ``loss = criterion(...) + delta.loss_term()``.
        """
        return None

    @property
    def adds_to_loss(self) -> bool:
        """Whether the method defines a `loss_term`."""
        return type(self).loss_term is not Delta.loss_term

    # --- addressing -------------------------------------------------------------------------

    def find_targets(self, patterns: Sequence[str]) -> list[list[str]]:
        """Names of the modules that each pattern addresses, exclusions taken out.

        Args:
            patterns: as `modified_modules`; where the user named none, the defaults are found.

        Raises:
            AddressingError: if a pattern addresses nothing, with the nearest names.
        """
        record = record_of(self)
        targeting = record.targeting if record.plan is not None else record.look_anew()
        found = targeting.find(patterns, self.default_targets if self.uses_defaults else None)
        if any(found):
            return found
        if not self.default_modified_modules:
            raise AddressingError(
                f"{type(self).__name__} has no default places: name the modules to modify with "
                f"modified_modules=[...]. {targeting.structure.offer()}"
            )
        raise AddressingError(
            f"{type(self.backbone_model).__name__} has none of the default places of "
            f"{type(self).__name__}, {', '.join(map(repr, self.default_modified_modules))}. "
            f"{targeting.structure.offer()} Name the modules to modify with modified_modules=[...]."
        )

    def find_key(self, key: str, target_list: Sequence[str]) -> bool:
        """Whether some pattern of `target_list` addresses the module called `key`.

        Args:
            key: a module's name in the backbone.
            target_list: patterns, plain or ``[r]``; a string is a list of one.
        """
        return record_of(self).targeting.find_key(key, target_list)

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

    # --- its tensors ------------------------------------------------------------------------

    def look_at_places(self) -> None:
        """Take up parameters that were put in the place of this delta's (``assign=True``)."""
        looked = [insertion for insertion in self.insertions if insertion.look()]
        if looked:
            label(looked)
            changes = Changes()
            hold(self, changes, looked)
            changes.carry_out()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """This delta's parameters by their names in files, see `nn.Module.named_parameters`."""
        self.look_at_places()
        return super().named_parameters(*args, **kwargs)

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a saved file, tensor) of all this delta holds, shared ones once."""
        self.look_at_places()
        seen: set[int] = set()
        unsaved = {id(i.content) for i in self.insertions if not i.saved}
        inserted = (pair for insertion in self.insertions for pair in insertion.named_tensors())
        for name, tensor in itertools.chain(inserted, named_tensors(self)):
            if id(tensor) not in seen and id(tensor) not in unsaved:
                seen.add(id(tensor))
                yield name, tensor
