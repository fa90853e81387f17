"""Merging: a delta folded into the backbone's own weights, and taken out of them again.

A method that can be merged says into which parameter of its hosts (`merges_into`) and what that
becomes (`merged`); everything else about merging is here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import is_shard
from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.dispatch import ADDITIVE, forget_compiled_code
from opendelta.mechanism.insertion import (
    Insertion,
    ModuleInsertion,
    ParameterInsertion,
    ParameterSlot,
)
from opendelta.mechanism.ownership import own_modules
from opendelta.saving.checkpoint import SaveLoadMixin

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase


class Fold(NamedTuple):
    """One insertion of a delta, folded into a weight."""

    delta: DeltaBase
    insertion: Insertion

    def apply(self, weight: Tensor) -> Tensor:
        return self.delta.merged(self.insertion, weight)


class MergedWeight:
    """A parameter of the backbone with deltas folded into it.

    Args:
        host: the module that holds it; `name`: its name there; `full_name`: in the backbone.
        slot: its `ParameterSlot`, if deltas may stand in its place.

    Attributes:
        original: the values without any delta. They are kept, for no subtraction restores bytes.
        folds: what is folded in, in the order of the deltas; nothing where it was only untied.
        tied: the shared parameter that stood here before merging untied it.
    """

    def __init__(
        self, host: nn.Module, name: str, full_name: str, slot: ParameterSlot | None
    ) -> None:
        self.host, self.name, self.full_name, self.slot = host, name, full_name, slot
        self.folds: list[Fold] = []
        self.tied: nn.Parameter | None = None
        parameter = self.parameter
        if parameter is None:
            raise InsertionError(
                f"The backbone has no parameter {full_name} of its own to merge into: one that "
                "the delta added would be a key that the model's class does not load, and a "
                "parametrized one is not stored. Keep the delta, or leave such modules out with "
                "exclude_modules. Nothing was merged."
            )
        if (
            type(parameter) is not nn.Parameter  # a quantised or sharded one is of another class
            or is_shard(parameter)
            or parameter.is_meta
            or not parameter.is_floating_point()
            or parameter.element_size() < 2
        ):
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

    def computed(self, folds: list[Fold]) -> Tensor:
        """The original with `folds` in it, computed in float32 or wider, in the weight's dtype."""
        parameter = cast(nn.Parameter, self.parameter)
        weight = self.original.to(parameter.device, parameter.dtype)  # if it moved meanwhile
        if not folds:
            return weight
        weight = weight.to(torch.promote_types(parameter.dtype, torch.float32))
        for fold in folds:
            weight = fold.apply(weight)
        return weight.to(parameter.dtype)

    def put(self, folds: list[Fold], value: Tensor) -> None:
        self.folds = folds
        cast(nn.Parameter, self.parameter).data = value

    def untie(self) -> None:
        """Give the host a parameter of its own."""
        self.tied = cast(nn.Parameter, self.parameter)
        self.original = self.original.clone()
        self.host._parameters[self.name] = nn.Parameter(self.original, self.tied.requires_grad)


class MergeMixin(SaveLoadMixin):
    """The part of `DeltaBase` that merges.

    Class attributes:
        merges_into: the name of the parameter of each host that the method can be folded into;
            None for a method that cannot be merged.
    """

    merges_into: ClassVar[str | None] = None

    _removed: bool

    def merged(self, insertion: Insertion, weight: Tensor) -> Tensor:
        """What a host's parameter becomes with an insertion of this delta folded into it.

        A method that can be merged sets `merges_into` and defines this.

        Args:
            insertion: what is folded in; ``insertion.host`` is the modified module.
            weight: the host's parameter, in float32 or wider; not to be changed in place.

        Raises:
            InsertionError: if this insertion cannot be folded in.
        """
        raise NotImplementedError(f"{type(self).__name__} sets merges_into but defines no merged.")

    @property
    def is_merged(self) -> bool:
        """Whether this delta is folded into the backbone's weights, see `merge`."""
        return any(True for _ in self._merged_weights())

    def merge(self, safe: bool = False, untie: bool = False) -> None:
        """Fold this delta into the backbone's weights, so that it costs nothing at inference.

        Its hooks and its entries in the backbone's ``state_dict()`` are gone until `unmerge`. The
        delta keeps its parameters, can be saved as before, and the exact original weights are
        kept beside the merged ones. Meanwhile `attach` and `detach` raise, and other deltas act
        and are merged as if this one were attached. Dropout of the delta no longer acts. What is
        trained or loaded meanwhile into the merged weights themselves is lost at `unmerge`.

        Args:
            safe: refuse if a merged weight were not finite.
            untie: merge into a tied weight too, giving each module that shares it a copy of its
                own and setting ``tie_word_embeddings=False`` in the backbone's config.

        Raises:
            InsertionError: if the method cannot be merged, or the delta is merged already, not
                (wholly) attached or removed; if a weight is tied, quantised, sharded or on the
                meta device; if an earlier delta on the same module acts between the module and
                this one; if `safe` and a result is not finite. Nothing is changed then.
        """
        self._require_mergeable()
        state = BackboneState.create(self.backbone_model)
        planned: list[tuple[MergedWeight, list[Fold], Tensor, bool]] = []
        holders = self._holders(state)
        with torch.no_grad():
            for insertion in self.insertions:
                _require_innermost(insertion)
                weight = self._weight_of(insertion, state)
                tied = self._is_tied(weight, holders, untie)
                folds = [*weight.folds, Fold(cast("DeltaBase", self), insertion)]
                folds.sort(key=lambda fold: state.deltas.index(fold.delta))
                value = weight.computed(folds)
                if safe and not bool(value.isfinite().all()):
                    raise InsertionError(
                        f"{weight.full_name} would not be finite with this delta in it: look for "
                        "NaN or huge values among the delta's parameters on "
                        f"{insertion.host_name!r}. Nothing was merged (safe=True)."
                    )
                planned.append((weight, folds, value, tied))
        for insertion in reversed(self.insertions):
            insertion.detach()
            if isinstance(insertion, ModuleInsertion):
                insertion.leave_dispatcher()
        for weight, folds, value, tied in planned:
            if tied:
                weight.untie()
            weight.put(folds, value)
            state.merged[weight.full_name] = weight
        if any(tied for *_, tied in planned):
            self._untie_rest(state)
            self._untie_configs(state)
        state.held = None
        state.settle_hooks(self.backbone_model)
        forget_compiled_code()

    def unmerge(self) -> None:
        """Take this delta out of the backbone's weights and let it act as before `merge`.

        The weights get back their exact original bytes, or, where other deltas are still merged,
        what those alone make of the original. What `merge` untied is tied again once no delta is
        merged into any of it. Deltas may be unmerged in any order.

        Raises:
            InsertionError: if this delta is not merged.
        """
        self._require_merged()
        state = BackboneState.create(self.backbone_model)
        with torch.no_grad():
            for weight, mine in list(self._merged_weights()):
                left = [fold for fold in weight.folds if fold is not mine]
                weight.put(left, weight.computed(left))
        apart = {id(weight.tied) for weight in state.merged.values() if weight.folds} - {id(None)}
        for weight in list(state.merged.values()):
            if not weight.folds and id(weight.tied) not in apart:
                if weight.tied is not None:
                    weight.host._parameters[weight.name] = weight.tied
                del state.merged[weight.full_name]
        if all(weight.tied is None for weight in state.merged.values()):
            for config in state.untied_configs:
                config.tie_word_embeddings = True
            state.untied_configs.clear()
        order = [*state.insertions]
        for insertion in self.insertions:
            if isinstance(insertion, ModuleInsertion):
                insertion.enter_dispatcher(later=order[order.index(insertion) + 1 :])
            insertion.attach()
        state.settle_hooks(self.backbone_model)
        forget_compiled_code()

    def merge_for_good(self) -> None:
        """Let the backbone's own weights be what they are with this merged delta in them."""
        self._require_merged()
        state = BackboneState.create(self.backbone_model)
        with torch.no_grad():
            for weight, mine in list(self._merged_weights()):
                left = [fold for fold in weight.folds if fold is not mine]
                weight.original = weight.computed([mine])
                if weight.tied is not None:
                    self._untie_for_good(weight.tied, state)
                if left:
                    weight.put(left, weight.computed(left))
                else:
                    del state.merged[weight.full_name]

    # --- what may be merged -----------------------------------------------------------------

    def _merged_weights(self) -> Iterator[tuple[MergedWeight, Fold]]:
        """(weight, fold) of what is folded in of this delta."""
        state = BackboneState.of(self.backbone_model)
        for weight in state.merged.values() if state is not None else ():
            for fold in weight.folds:
                if fold.delta is self:
                    yield weight, fold

    def require_presence(self) -> None:
        """Refuse what a removed delta cannot do.

        Raises:
            InsertionError: if this delta was removed.
        """
        if self._removed:
            raise InsertionError(
                f"This {type(self).__name__} was removed from its backbone: construct a new one."
            )

    def _require_merged(self) -> None:
        self.require_presence()
        if not self.is_merged:
            raise InsertionError(f"This {type(self).__name__} is not merged.")

    def require_unmerged(self) -> None:
        """Refuse what a merged delta cannot do.

        Raises:
            InsertionError: if this delta is merged.
        """
        if self.is_merged:
            raise InsertionError(
                f"This {type(self).__name__} is merged into its backbone's weights: unmerge() it "
                "first."
            )

    def _require_mergeable(self) -> None:
        self.require_presence()
        if self.merges_into is None:
            raise InsertionError(
                f"{type(self).__name__} cannot be merged: what it computes is no change of the "
                "backbone's weights. LoRA and BitFit can be."
            )
        self.require_unmerged()
        if not all(insertion.attached for insertion in self.insertions):
            raise InsertionError(
                f"This {type(self).__name__} is not attached, or only in part: attach() it, then "
                "merge."
            )

    def _weight_of(self, insertion: Insertion, state: BackboneState) -> MergedWeight:
        """The weight that an insertion is folded into."""
        name = cast(str, self.merges_into)
        full_name = dotted(insertion.host_name, name)
        known = state.merged.get(full_name)
        if known is not None:
            return known
        return MergedWeight(insertion.host, name, full_name, state.slots.get(full_name))

    def _holders(self, state: BackboneState) -> dict[int, list[str]]:
        """Id of a parameter -> its names in the backbone, one per module that holds it."""
        holders: dict[int, list[str]] = defaultdict(list)
        for name, module in own_modules(self.backbone_model):
            for own_name, p in module._parameters.items():
                holders[id(p)].append(dotted(name, own_name))
        for weight in state.merged.values():  # which is tied again when that one is unmerged
            if weight.tied is not None:
                holders[id(weight.tied)].append(weight.full_name)
        return holders

    def _is_tied(self, weight: MergedWeight, holders: dict[int, list[str]], untie: bool) -> bool:
        """Whether merging has to untie a weight; places that a slot fills change together."""
        others = [name for name in holders[id(weight.parameter)] if name != weight.full_name]
        if not others or weight.slot is not None:
            return False
        if not untie:
            raise InsertionError(
                f"{weight.full_name} is tied to {', '.join(others)}, which merging would change "
                "too. merge(untie=True) gives each a copy of its own and sets "
                "tie_word_embeddings=False in the config; the model then needs memory, and room "
                "on disk, for all of them. Nothing was merged."
            )
        return True

    def _untie_rest(self, state: BackboneState) -> None:
        """Untie whatever is still tied to untied weights: the config unties all, when loaded."""
        tied = {id(weight.tied) for weight in state.merged.values()} - {id(None)}
        kept: set[int] = set()  # the first place of each keeps it
        for name, module in own_modules(self.backbone_model):
            for own_name, p in module._parameters.items():
                if id(p) in kept:
                    weight = MergedWeight(module, own_name, dotted(name, own_name), None)
                    weight.untie()
                    state.merged[weight.full_name] = weight
                elif id(p) in tied:
                    kept.add(id(p))

    def _untie_for_good(self, tied: nn.Parameter, state: BackboneState) -> None:
        """Let each place of what was tied keep what it has."""
        for weight in list(state.merged.values()):
            if weight.tied is tied:
                weight.tied = None
                if not weight.folds:
                    del state.merged[weight.full_name]
        state.untied_configs.clear()

    def _untie_configs(self, state: BackboneState) -> None:
        for _, module in own_modules(self.backbone_model):
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                state.untied_configs.append(config)


def _require_innermost(insertion: Insertion) -> None:
    """Refuse to merge what would change its place among earlier deltas: it becomes the first.

    Attached or not does not matter, for they may be attached later.
    """
    if isinstance(insertion, ParameterInsertion):
        if insertion.slot.layers[0] is not insertion:
            raise InsertionError(
                f"{insertion.full_name} carries an earlier delta's parameter below this one, which "
                "merging would uncover. remove() the earlier delta first. Nothing was merged."
            )
    elif isinstance(insertion, ModuleInsertion):
        for name, action in insertion.entries:
            if name == insertion.name:
                return
            if action not in ADDITIVE:
                raise InsertionError(
                    f"{dotted(insertion.host_name, name)} was put on earlier and acts on the "
                    f"module's output before {insertion.name!r} does; merged, that would act "
                    "first. remove() the earlier delta, or put it on after this one. Nothing was "
                    "merged."
                )
