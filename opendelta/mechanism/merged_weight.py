"""Parameters of the backbone with deltas folded into them, and what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import is_shard
from opendelta.exceptions import InsertionError, nearest
from opendelta.ground.names import dotted
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.slot import ParameterSlot


class Fold(NamedTuple):
    """One insertion of a delta, folded into its host, and the parameters that it changed."""

    delta: Any
    insertion: Insertion
    names: tuple[str, ...] = ()

    def values(self, twin: nn.Module) -> dict[str, Tensor]:
        """What the parameters of `twin`, its host without it, become.

        Raises:
            InsertionError: if the method names one that the host lacks, or of another shape.
        """
        view = copy.copy(self.insertion)
        view.host = twin
        if not view.of_method:  # which knows nothing of it
            return {view.name: view.content.detach().clone()}
        made: dict[str, Tensor] = self.delta.folds(view)
        if not isinstance(made, dict) or not made:
            raise InsertionError(
                f"{type(self.delta).__name__}.folds returned {made!r:.80}; expected a dict that "
                "maps names of the host's parameters to their new values. Nothing was merged."
            )
        there = {n: tuple(p.shape) for n, p in twin._parameters.items() if p is not None}
        for name, value in made.items():
            if name not in there:
                raise InsertionError(
                    f"The backbone has no parameter {dotted(self.insertion.host_name, name)} of "
                    "its own to merge into: one that the delta added would be a key that the "
                    "model's class does not load, and a parametrized one is not stored."
                    + nearest(name, there)
                    + " Keep the delta, or leave such modules out with exclude_modules. Nothing "
                    "was merged."
                )
            if there[name] != value.shape:
                raise InsertionError(
                    f"{type(self.delta).__name__}.folds gives {name!r} of "
                    f"{self.insertion.host_name!r} the shape {tuple(value.shape)}; it has "
                    f"{there[name]}. Nothing was merged."
                )
        return made


class MergedWeight:
    """A parameter of the backbone that deltas are folded into, or that was untied for that.

    Args:
        host: the module that holds it; `name`: its name there; `full_name`: in the backbone.
        slot: its `ParameterSlot`, if deltas may stand in its place.

    Attributes:
        original: the values without any delta. They are kept, for no subtraction restores bytes.
        tied: the shared parameter that stood here before merging untied it.

    Raises:
        InsertionError: if it is no plain parameter.
    """

    def __init__(
        self, host: nn.Module, name: str, full_name: str, slot: ParameterSlot | None
    ) -> None:
        self.host, self.name, self.full_name, self.slot = host, name, full_name, slot
        self.tied: nn.Parameter | None = None
        parameter = cast(nn.Parameter, self.parameter)
        if not is_plain(parameter):
            raise InsertionError(
                f"{full_name} is a {type(parameter).__name__} of {parameter.dtype} on "
                f"{parameter.device}: a delta is merged into plain floating-point parameters only, "
                "not into quantised or sharded ones or those on the meta device. Nothing was "
                "merged."
            )
        self.original: Tensor = parameter.data

    @property
    def parameter(self) -> nn.Parameter | None:
        """The backbone's own parameter, in its place or set aside by a delta that stands there."""
        if self.slot is None:
            return self.host._parameters.get(self.name)
        self.slot.look()
        return self.slot.original

    @property
    def bare(self) -> Tensor:
        """What a backbone without deltas has here."""
        return self.original if self.tied is None else self.tied

    def wide(self) -> nn.Parameter:
        """The original in float32 or wider, where the parameter is now (it may have moved)."""
        parameter = cast(nn.Parameter, self.parameter)
        if parameter.shape != self.original.shape:
            raise InsertionError(
                f"{self.full_name} has had its shape changed from {tuple(self.original.shape)} to "
                f"{tuple(parameter.shape)} since a delta was merged into it, so it cannot be what "
                "it was without the delta. merge_and_remove() leaves it as it is now."
            )
        values = self.original.to(parameter.device, parameter.dtype)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return nn.Parameter(values.to(dtype), requires_grad=False)

    def untie(self, changes: Changes) -> None:
        """Give the host a parameter of its own."""
        shared = cast(nn.Parameter, self.parameter)
        self.tied, self.original = shared, self.original.clone()
        own = nn.Parameter(self.original, shared.requires_grad)
        changes.of(self.host._parameters)[self.name] = own


def is_plain(p: Tensor) -> bool:
    """Whether a parameter is stored as it is: not quantised, sharded or on the meta device."""
    return not (
        type(p) is not nn.Parameter  # a quantised or sharded one is of another class
        or is_shard(p)
        or p.is_meta
        or not p.is_floating_point()
        or p.element_size() < 2
    )


class MergedHost:
    """A module of the backbone with deltas folded into its parameters.

    Args:
        module: the module; `name`: its name in the backbone.

    Attributes:
        folds: what is folded in, in the order of the deltas.
        weights: name of a parameter -> what it was; also where it was only untied.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.folds: list[Fold] = []
        self.weights: dict[str, MergedWeight] = {}

    def weights_here(self, slots: Mapping[str, ParameterSlot]) -> dict[str, MergedWeight]:
        """All plain parameters of the module, as if they were merged into."""
        weights = dict(self.weights)
        for name, p in self.module._parameters.items():
            full_name = dotted(self.name, name)
            slot = slots.get(full_name)
            own = p if slot is None else slot.original
            if name not in weights and own is not None and is_plain(own):
                weights[name] = MergedWeight(self.module, name, full_name, slot)
        return weights

    def computed(
        self,
        folds: Sequence[Fold],
        weights: Mapping[str, MergedWeight],
        check: Callable[[Fold, nn.Module, dict[str, Tensor]], None] = lambda *_: None,
    ) -> tuple[list[Fold], dict[str, Tensor]]:
        """`folds`, which parameters each changes, and those parameters, in their own dtypes.

        Args:
            folds: what is folded in, in order.
            weights: the parameters that may be changed.
            check: called with a fold, the module before it, and the parameters after it.
        """
        twin = copy.copy(self.module)
        twin._parameters = {**self.module._parameters}
        for name in self.module._parameters:
            twin._parameters[name] = None if name not in weights else weights[name].wide()
        for name, p in self.module._parameters.items():  # what cannot be merged into, as it is
            if twin._parameters[name] is None and p is not None and not is_plain(p):
                twin._parameters[name] = p
        named: list[Fold] = []
        for fold in folds:
            made = fold.values(twin)
            check(fold, twin, made)
            named.append(fold._replace(names=tuple(made)))
            twin = copy.copy(twin)
            own = {name: nn.Parameter(value, requires_grad=False) for name, value in made.items()}
            twin._parameters = {**twin._parameters, **own}
        changed = {name for fold in named for name in fold.names} | self.weights.keys()
        values = {}
        for name in changed:
            p = cast(nn.Parameter, weights[name].parameter)
            values[name] = cast(Tensor, twin._parameters[name]).detach().to(p.dtype)
        return named, values

    def put(self, changes: Changes, folds: list[Fold], values: Mapping[str, Tensor]) -> None:
        """Let the parameters have these values, of these folds."""
        changes.set(self, folds=folds)
        weights = changes.get(self, "weights")
        for name, value in values.items():
            slot = weights[name].slot
            own = changes.of(self.module._parameters)[name] if slot is None else slot.original
            changes.set_data(cast(nn.Parameter, own), value)

    def is_folded(self, changes: Changes, name: str) -> bool:
        """Whether a delta is, or is about to be, folded into a parameter."""
        return any(name in fold.names for fold in changes.get(self, "folds"))
