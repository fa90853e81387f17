"""`DeltaBase`: the life of a delta, from patterns to a saved file (specification 1.20.2)."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from opendelta.addressing.patterns import as_patterns
from opendelta.arguments import checked
from opendelta.backends import check_backend
from opendelta.backends.sharding import reshard
from opendelta.combining import require_equal_hyperparameters, weighted_sums
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import (
    AddressingError,
    ConfigError,
    InsertionError,
    UnmatchedPatternWarning,
)
from opendelta.freezing import EVERY_DELTA, freeze
from opendelta.ground.walk import uncompiled
from opendelta.inspection import Summary, num_total_parameters, print_log, summary
from opendelta.mechanism.backbone_state import BackboneState, SubmoduleTrim
from opendelta.mechanism.engines import join_engine
from opendelta.mechanism.insertion import Insertion, ModuleInsertion, ParameterInsertion, switch
from opendelta.merging import MergeMixin
from opendelta.saving.backbone_check import check_backbone

INTERACTIVE_PORT = 8888


class DeltaBase(MergeMixin):
    """Base class of all deltas: small trainable modules on a backbone that is otherwise frozen.

    A delta is an `nn.Module` whose parameters are those it added (or took over), under the names
    of the modules that they sit on; the backbone is not part of it. Constructing a method's class
    modifies the backbone in place, wholly or, after an error, not at all.

    Class attributes:
        delta_type: the method's name in configs.
        config_class: the method's config.
        default_modified_modules: common names that are modified if the user names none.
        added_positions: how many positions each text gets longer by (soft prompts).

    Args:
        backbone_model: the model to modify.
        modified_modules: patterns of modules to modify; None for `default_modified_modules`
            by common names. Each pattern must address some module.
        exclude_modules: patterns of modules to leave alone, with all inside them.
        unfrozen_modules: what `freeze_module` leaves trainable; None for ``["deltas"]``.
        interactive_modify: choose modules on a web page; an int is the page's port.
        common_structure: whether the patterns are common names (``attn.q``) rather than the
            backbone's own.
        backend: the engine: ``"hf"`` for transformers and any other torch module, or ``"bmt"`` for
            BMTrain and ModelCenter, which must be initialised. A delta on a backbone whose
            parameters are BMTrain's joins it in either case.

    Raises:
        AddressingError: if a pattern addresses nothing.
        InsertionError: if an addressed module cannot take this delta.
        ConfigError: for an argument of the wrong type or value.
        ValueError: if `interactive_modify` is given together with `modified_modules`.
    """

    delta_type: ClassVar[str] = ""
    config_class: ClassVar[type[BaseDeltaConfig]] = BaseDeltaConfig
    default_modified_modules: ClassVar[list[str]] = []
    added_positions = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]
        if "config_class" in vars(cls):
            cls.config_class.derive(cls)

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = None,
        interactive_modify: bool | int | None = False,
        common_structure: bool | None = False,
        backend: str | None = "hf",
    ) -> None:
        if not isinstance(backbone_model, nn.Module):
            raise ConfigError(
                f"backbone_model is a {type(backbone_model).__name__}; expected a torch nn.Module."
            )
        check_backend(backend)
        nn.Module.__init__(self)
        self.__dict__["backbone_model"] = uncompiled(backbone_model)  # not a submodule of the delta
        self.backend = backend
        self.insertions = []
        self.left_trainable: list[str] | None = None
        self._removed = False
        self.from_file = False
        self._planned, self._planned_on = None, {}
        self._excluded = set()
        self._own, self._module_names, self._target_names, self._measured = [], {}, [], {}

        patterns = as_patterns(modified_modules, "modified_modules")
        if modified_modules is not None and not patterns:
            raise AddressingError(
                "modified_modules=[] names no module; leave it out for the method's defaults."
            )
        self.exclude_modules = as_patterns(exclude_modules, "exclude_modules")
        self.unfrozen_modules = as_patterns(unfrozen_modules, "unfrozen_modules")
        if interactive_modify and patterns:
            raise ValueError(
                "interactive_modify and modified_modules both choose the modules; give one."
            )
        port = INTERACTIVE_PORT if interactive_modify is True else interactive_modify
        self.interactive_port = port or None
        self.uses_defaults = not patterns and not interactive_modify
        self.modified_modules = patterns or list(self.default_modified_modules)
        self.common_structure = bool(common_structure) or self.uses_defaults
        self._structure = None
        self.config: BaseDeltaConfig = self.config_class()

    def _construct(self, arguments: dict[str, Any]) -> None:
        """The body of a method's constructor: ``self._construct(locals())``.

        Base arguments go to `DeltaBase.__init__`, the method's own become attributes, and the
        delta is put on the backbone.
        """
        base = "backbone_model modified_modules exclude_modules unfrozen_modules interactive_modify"
        base_names = {*base.split(), "common_structure", "backend"}
        given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        DeltaBase.__init__(self, **{k: v for k, v in given.items() if k in base_names})
        for name, value in given.items():
            if name not in base_names:
                setattr(self, name, copy.copy(value))
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def forward(self, *args: Any, **kwargs: Any) -> RuntimeError:
        """Raise: a delta has no forward of its own; call the backbone's.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "A delta computes nothing by itself: call the backbone it is attached to, "
            f"{type(self.backbone_model).__name__}, as before."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module_names": {}}  # ids mean nothing to a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._label(self.insertions)  # attributes of parameters do not survive a copy

    # --- from configs -----------------------------------------------------------------------

    @classmethod
    def config_from(
        cls, config: BaseDeltaConfig | dict[str, Any], **kwargs: Any
    ) -> BaseDeltaConfig:
        """A config of this class from an object or dict, with fields overridden by `kwargs`.

        Raises:
            ConfigError: if it is the config of another method.
        """
        values = config.to_dict() if isinstance(config, BaseDeltaConfig) else config
        made = cls.config_class.from_dict(values, **kwargs)
        made.from_file = getattr(config, "from_file", False)
        return made

    @classmethod
    def from_config(
        cls,
        config: BaseDeltaConfig | dict[str, Any],
        backbone_model: nn.Module,
        check_hash: bool | str = True,
        **kwargs: Any,
    ) -> DeltaBase:
        """Put an untrained delta on a backbone as a config says.

        Args:
            config: the config, or a dict of its fields.
            backbone_model: modified in place.
            check_hash: whether a hash in the config is compared with the backbone's; ``"full"``
                reads the whole backbone for it.
            kwargs: fields that override the config's, and `interactive_modify`.

        Raises:
            ConfigError: for the config of another method, or an unknown field.

        Warns:
            BackboneMismatchWarning: if the hash differs.
        """
        model_class = cls._class_for(config)
        made = model_class.config_from(config, **kwargs)
        check_backbone(made, backbone_model, check_hash)
        names = model_class.constructor_fields()
        fields = {name: getattr(made, name) for name in names if hasattr(made, name)}
        if made.from_file and "backend" not in kwargs:
            fields.pop("backend", None)  # what it was trained on; this backbone says where it is
        if "interactive_modify" in kwargs:
            fields["interactive_modify"] = kwargs["interactive_modify"]
        with warnings.catch_warnings():
            if made.from_file:  # patterns that were checked when the delta was made
                warnings.simplefilter("ignore", UnmatchedPatternWarning)
            delta = model_class(backbone_model, **fields)
        delta.from_file = made.from_file
        for name in ("backbone_hash", "backbone_hash_excludes", "backbone_class"):
            setattr(delta.config, name, getattr(made, name))
        delta.config.backbone_checkpoint_name = made.backbone_checkpoint_name
        return delta

    @classmethod
    def constructor_fields(cls) -> list[str]:
        """Fields of the config that are arguments of the constructor."""
        parameters = inspect.signature(cls.__init__).parameters
        return [name for name in cls.config_class.field_names() if name in parameters]

    # --- what trains ------------------------------------------------------------------------

    def freeze_module(
        self,
        module: nn.Module | None = None,
        exclude: Sequence[str | DeltaBase] | str | DeltaBase | None = None,
        set_state_dict: bool | None = True,
        prefix: str = "",
    ) -> None:
        """Freeze the backbone's parameters but those that `exclude` names.

        May be called again, with another `exclude`: what it names gets back the state that it
        had before the first freeze.

        Args:
            module: the part of the backbone to freeze; None for all of it.
            exclude: patterns of what stays trainable, with all inside it; ``"deltas"`` is every
                delta on the backbone, a delta object that delta alone, and a pattern may also
                name what is inside a delta (``"lora_A"``). None for this delta's
                `unfrozen_modules`, else ``["deltas"]``.
            set_state_dict: whether ``state_dict()`` is reduced to what trains.
            prefix: the name of `module`, if that is not to be looked up.

        Warns:
            UnmatchedPatternWarning: for a pattern that names nothing.
            DeltaWarning: if nothing is left to train.
        """
        self.require_presence()
        if module is not None and not isinstance(module, nn.Module):
            raise ConfigError(
                f"freeze_module: the first argument, module={module!r:.80}, is a part of the "
                "backbone; what stays trainable is named by exclude=[...]."
            )
        backbone = self.backbone_model
        module = None if module is None else uncompiled(module)
        part = prefix or ("" if module is None or module is backbone else self.name_of(module))
        chosen: Any = exclude if exclude is not None else (self.unfrozen_modules or [EVERY_DELTA])
        declared = freeze(
            BackboneState.create(backbone),
            backbone,
            part,
            chosen if isinstance(chosen, (list, tuple)) else [chosen],
            names_of=self.names_of,
            inside_deltas=exclude is not None,
            warn_unmatched=exclude is not None or not self.from_file,
        )
        under = part + "." if part else ""
        elsewhere = [n for n in self.left_trainable or () if part and not n.startswith(under)]
        self.left_trainable = [*elsewhere, *declared]
        if set_state_dict:
            self.set_active_state_dict(backbone if module is None else module)

    def set_active_state_dict(self, module: nn.Module) -> None:
        """Reduce ``module.state_dict()`` to what trains (and constants of deltas).

        It is full again while all deltas are detached. ``load_state_dict`` takes both kinds.

        Args:
            module: the backbone or a part of it.
        """
        state = BackboneState.create(self.backbone_model)
        module = uncompiled(module)
        if module is self.backbone_model:
            state.trimmed, state.held = True, None
            return
        self.name_of(module)  # raises for a module of another model
        if not any(type(hook) is SubmoduleTrim for hook in module._state_dict_hooks.values()):
            SubmoduleTrim(state).register(module)

    # --- on and off -------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether any part of this delta is attached; a merged delta is not, though it acts."""
        return any(insertion.attached for insertion in self.insertions)

    def attach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Let the delta act again after `detach`, in its old place among other deltas.

        Args:
            module: only the part of the delta that sits inside this module.
            reset_state_dict: whether ``state_dict()`` follows (reduced after `freeze_module`).

        Raises:
            InsertionError: if the delta is merged or was removed.
        """
        state = self._switching(reset_state_dict)
        self._put_on(self._inside(module))
        state.held = None if reset_state_dict else state.held

    def detach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Let the backbone compute without the delta, which is kept for `attach`.

        Args:
            module: only the part of the delta that sits inside this module.
            reset_state_dict: whether ``state_dict()`` follows (full, once no delta is attached).

        Raises:
            InsertionError: if the delta is merged or was removed.
        """
        state = self._switching(reset_state_dict)
        switch(reversed(self._inside(module)), False)
        state.held = None if reset_state_dict else state.held

    def _put_on(self, insertions: Sequence[Insertion]) -> None:
        """Let insertions act again, on whichever engine the backbone has got meanwhile."""
        join_engine(self.backbone_model, insertions)
        switch(insertions, True)
        BackboneState.create(self.backbone_model).watch_training(self.backbone_model)

    def _switching(self, reset_state_dict: bool) -> BackboneState:
        self.require_presence()
        self.require_unmerged()
        reshard(self.backbone_model)
        state = BackboneState.create(self.backbone_model)
        if not reset_state_dict:
            state.held = state.trims
        return state

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Within a ``with`` block the backbone computes without this delta."""
        before = [i for i in self.insertions if i.attached]
        self.detach()
        try:
            yield
        finally:
            if not self._removed:
                reshard(self.backbone_model)
                self._put_on(before)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within a ``with`` block this delta acts, wholly."""
        before = [i for i in self.insertions if not i.attached]
        self.attach()
        try:
            yield
        finally:
            reshard(self.backbone_model)
            switch(reversed(before), False)

    def _inside(self, module: nn.Module | None) -> list[Insertion]:
        if module is None or uncompiled(module) is self.backbone_model:
            return self.insertions
        name = self.name_of(module)
        inside = [i for i in self.insertions if (i.host_name + ".").startswith(name + ".")]
        parts = {id(i.module) for i in inside if isinstance(i, ModuleInsertion)}
        inside = [  # a module under two hosts acts on both or on none
            i
            for i in self.insertions
            if i in inside or (isinstance(i, ModuleInsertion) and id(i.module) in parts)
        ]
        if not inside:
            raise InsertionError(f"No part of this {type(self).__name__} sits inside {name!r}.")
        return inside

    def remove(self) -> None:
        """Take the delta off for good; with the last one the backbone is as before construction.

        A merged delta is unmerged first; `merge_and_remove` leaves its effect in the weights.
        """
        if self.is_merged:
            self.unmerge()
        state = self._switching(True)
        switch(reversed(self.insertions), False)
        for insertion in reversed(self.insertions):
            insertion.remove()
        state.forget(self, self.backbone_model)
        self._removed = True

    def merge_and_remove(self, safe: bool = False, untie: bool = False) -> nn.Module:
        """Leave this delta's effect in the backbone's weights for good, and take the delta off.

        With the last delta gone the backbone is a plain model, whose ``save_pretrained`` writes
        what loads without this library. The original weights are let go.

        Args:
            safe, untie: see `merge`, which is called unless the delta is merged already.

        Returns:
            The backbone.

        Raises:
            InsertionError: see `merge`. Nothing is changed then.
        """
        if not self.is_merged:
            self.merge(safe, untie)
        self.merge_for_good()
        self.remove()
        return self.backbone_model

    # --- arithmetic -------------------------------------------------------------------------

    def combined_config(self, deltas: Sequence[DeltaBase]) -> BaseDeltaConfig:
        """The config of a sum of deltas of this method, of which this is the first, see `combine`.

        Raises:
            ConfigError: if they do not fit together.
        """
        require_equal_hyperparameters(deltas)
        return self.config

    def combined_tensors(
        self, deltas: Sequence[DeltaBase], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """What a weighted sum of deltas of this method holds, as by `own_tensors`.

        Raises:
            ConfigError: if they do not fit together.
        """
        return weighted_sums(deltas, weights)

    # --- looking ----------------------------------------------------------------------------

    def summary(self) -> Summary:
        """A table of what this delta added, which prints itself in terminals and notebooks."""
        entries = [
            (i.host_name, i.name, i.module if isinstance(i, ModuleInsertion) else i.parameter)
            for i in self.insertions
            if isinstance(i, (ModuleInsertion, ParameterInsertion))
        ]
        return summary(entries, num_total_parameters(self.backbone_model))

    def log(
        self,
        module: nn.Module | None = None,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> None:
        """Print the backbone's tree and how much of it the delta is.

        Args:
            module: the part to show; None for the whole backbone.
            delta_ratio: the share of delta parameters.
            trainable_ratio: the share of trainable parameters.
            visualization: the tree.
            cuda_memory: memory in use.
        """
        print_log(
            self.backbone_model if module is None else module,
            delta_ratio=delta_ratio,
            trainable_ratio=trainable_ratio,
            visualization=visualization,
            cuda_memory=cuda_memory,
        )
