"""A parameter of a delta in the place of one of the backbone's, or of none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.quantised import compute_dtype, is_offloaded
from opendelta.backends.sharding import assign, full, is_shard
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs, map_hidden
from opendelta.ground.names import dotted
from opendelta.ground.seams import forget_compiled_code
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.hooks import add_forward_hook, take_off
from opendelta.mechanism.insertion import Insertion, acts_on_whole_batches
from opendelta.mechanism.ownership import twin_of
from opendelta.mechanism.places import Place, follow


class ParameterSlot:
    """A place for a parameter on a module, with its original content and those laid over it.

    The content is that of the attached insertion that was inserted last, else the original one.
    Tied parameters have several places.

    Args:
        places: the modules that hold the parameter.
        name: its name there, e.g. ``"bias"``.

    Attributes:
        original: the backbone's own content, None where there was none.
        layers: the insertions that may stand here, in order.
        held_bare: by how many routes the original is held in its place.
        sharded: whether the parameter in place was seen as a shard.
        casts: the hooks that let modules read the content in the dtype that they compute in.
    """

    def __init__(self, places: list[nn.Module], name: str) -> None:
        self.places, self.name = places, name
        self.existed = [name in place._parameters for place in places]
        self.original = places[0]._parameters.get(name)
        self.layers: list[ParameterInsertion] = []
        self.held_bare = 0
        self.handle: RemovableHandle | None = None
        self.casts: list[RemovableHandle] = []
        self.left_at: Place | None = None  # where the original was set aside
        self.sharded = False

    @property
    def top(self) -> ParameterInsertion | None:
        """The insertion that acts now."""
        if self.held_bare:
            return None
        return next((layer for layer in reversed(self.layers) if layer.is_on), None)

    def _acting(self, changes: Changes) -> ParameterInsertion | None:
        layers = changes.get(self, "layers")
        on = [layer for layer in layers if changes.get(layer, "is_on")]
        return on[-1] if on and not changes.get(self, "held_bare") else None

    def look(self) -> None:
        """Take up the parameter that is in place now: loading with ``assign`` puts a new one."""
        current, top = self.places[0]._parameters.get(self.name), self.top
        self.sharded = self.sharded or is_shard(current)
        if top is None:
            self.original = current
        elif current is not None:
            top.parameter = current

    def switch(self, changes: Changes, layer: ParameterInsertion, on: bool) -> None:
        """Let one of the layers be attached, or not."""
        if changes.get(layer, "is_on") != on:
            self.look()
            self._change(changes, layer, is_on=on)

    def hold_bare(self, changes: Changes, more: int) -> None:
        """Let one route more (1) or less (-1) hold the original in its place.

        Attaching and detaching meanwhile say what acts afterwards.
        """
        self._change(changes, self, held_bare=changes.get(self, "held_bare") + more)

    def _change(self, changes: Changes, owner: Any, **values: Any) -> None:
        """Change what says which content acts, and let that one act."""
        before = self._acting(changes)
        changes.set(owner, **values)
        if not self.sharded:
            changes.set(before or self, left_at=self.place)
            self._settle(changes)
        elif before is not (after := self._acting(changes)):
            if (self.original if after is None else after.parameter) is None:
                raise InsertionError(
                    f"The {self.name} of {self.layers[0].host_name!r} is one that the delta adds, "
                    "and the backbone is sharded: it can be neither added nor taken away now."
                )
            changes.do_first(self._switch_values, before, after)

    def _settle(self, changes: Changes) -> None:
        """Put what is to act into every place, moved to where that is now."""
        top = self._acting(changes)
        content = self.original if top is None else top.parameter
        if content is not None:
            new = follow([content], changes.get(top or self, "left_at"), self.place)
            if new is not None:
                changes.set_data(content, changes.data(content).to(device=new[0], dtype=new[1]))
        for place, existed in zip(self.places, self.existed, strict=True):
            table = changes.of(place._parameters)
            if content is None and not existed:
                table.pop(self.name, None)
            else:
                table[self.name] = content

    @property
    def place(self) -> Place | None:
        """Where the places' other tensors are."""
        for place in self.places:
            for name, p in place._parameters.items():
                if name != self.name and p is not None and p.is_floating_point():
                    return p.device, p.dtype
        return None

    def settle_casts(self, changes: Changes, readers: Iterable[tuple[nn.Module, str]]) -> None:
        """Have what is kept in another dtype than its places compute in read as a cast copy.

        Args:
            changes: what the hooks come in, or go, with.
            readers: for each place the module whose call reads it, and the name there of the place.
        """
        self.end_casts(changes)
        wanted = _dtype_beside(self.places[0], self.name)
        if all(wanted in (None, layer.parameter.dtype) for layer in self.layers):
            return
        made = []
        for reader, path in readers:
            lend, take = (partial(act, path, self.name) for act in (lend_cast, take_back))
            made.append(add_forward_hook(changes, reader, lend, before=True))
            made.append(add_forward_hook(changes, reader, take, always_call=True))
        changes.set(self, casts=made)
        changes.do_first(forget_compiled_code)

    def end_casts(self, changes: Changes) -> None:
        """Have the content read as it is."""
        for handle in self.casts:
            take_off(changes, handle)
        if self.casts:  # a forward that Ctrl-C ended took nothing back
            for place in self.places:
                changes.do(place.__dict__.pop, self.name, None)
            changes.do_first(forget_compiled_code)
            changes.set(self, casts=[])

    def _switch_values(
        self, before: ParameterInsertion | None, after: ParameterInsertion | None
    ) -> None:
        """On shards: the engine holds on to the parameter, so that contents act by their values."""
        held: Any = self.places[0]._parameters[self.name]
        content: Any = self.original if after is None else after.parameter
        aside = nn.Parameter(full(held).clone(), held.requires_grad)
        with torch.no_grad():
            assign(held, content.detach())
        held.requires_grad_(content.requires_grad)
        held._is_delta = after is not None  # see `label`
        for one, now in ((before, aside), (after, held)):
            if one is None:
                self.original = now
            else:
                one.parameter = now


class ParameterInsertion(Insertion):
    """A parameter of a delta in a slot.

    Args:
        slot: where it goes.
        host_name: the first place's name in the backbone.
        parameter: what acts while attached.
        ignored: whether the host's forward ignores a parameter of that name (``bias``), so that a
            hook has to add it to the output.
        saved: whether files hold it.
    """

    table = "_parameters"
    is_named_as_own = True

    def __init__(
        self,
        slot: ParameterSlot,
        host_name: str,
        parameter: nn.Parameter,
        ignored: bool = False,
        saved: bool = True,
    ) -> None:
        self.slot, self.host_name = slot, host_name
        self.parameter, self.ignored, self.saved = parameter, ignored, saved
        self.host, self.name = slot.places[0], slot.name
        self.full_name = dotted(host_name, slot.name)
        self.trains = parameter.requires_grad
        self.is_on = False
        self.left_at: Place | None = None

    @property
    def attached(self) -> bool:
        return self.is_on

    @property
    def content(self) -> nn.Parameter:
        return self.parameter

    @property
    def places(self) -> list[nn.Module]:
        return self.slot.places

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        if self.ignored and changes.get(self.slot, "handle") is None:
            handle = add_forward_hook(changes, self.host, add_bias, first=True, with_kwargs=True)
            changes.set(self.slot, handle=handle)
            changes.do_first(forget_compiled_code)
        changes.set(self.slot, layers=[*changes.get(self.slot, "layers"), self])
        self.attach(changes)

    def attach(self, changes: Changes) -> None:
        self.slot.switch(changes, self, True)

    def detach(self, changes: Changes) -> None:
        self.slot.switch(changes, self, False)

    def leave(self, changes: Changes) -> None:
        self.detach(changes)
        left = [layer for layer in changes.get(self.slot, "layers") if layer is not self]
        changes.set(self.slot, layers=left)
        if not left:
            take_off(changes, self.slot.handle)
            changes.set(self.slot, handle=None)
            self.slot.end_casts(changes)

    def differs_beside(self, merged: Insertion, is_earlier: bool) -> bool:
        return merged.slot is self.slot and is_earlier  # which it would uncover

    def known_to_engine(self) -> bool:
        return self.slot.sharded or super().known_to_engine()  # then it acts by its values

    def look(self) -> bool:
        if self.is_on:
            self.slot.look()
        return self.is_on

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
        raise acts_on_whole_batches(self)

    @property
    def is_away(self) -> bool:
        return is_offloaded(self.host)

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((self.full_name, self.parameter),)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        return self.named_parameters() if self.saved else ()

    def constants(self) -> Iterable[Tensor]:
        return () if self.trains else (self.parameter,)


class CarriedParameter(ParameterInsertion):
    """A parameter of the backbone as a file carried it, in the place of the backbone's own.

    Args:
        place: as for any `ParameterInsertion`.
        aside: where what stands in the place becomes the delta's own parameter, since an optimizer
            may hold it: a copy of what it was, for the backbone.
    """

    of_method = False

    def __init__(self, *place: Any, aside: nn.Parameter | None = None) -> None:
        super().__init__(*place)
        self.trains, self.aside = True, aside

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module]:
        if not all(map(is_called, self.slot.places)):
            raise acts_on_whole_batches(self)
        return self.slot.places

    def stand_in(self, place: nn.Module) -> nn.Module:
        """`place`, or a twin of it, with this parameter: it computes in its stead."""
        return twin_of(place, _parameters={**place._parameters, self.name: self.parameter})

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        if self.aside is None:
            super().enter(changes, later)
            return
        layers = [*changes.get(self.slot, "layers"), self]
        changes.set(self.slot, layers=layers, original=self.aside, sharded=is_shard(self.parameter))
        changes.set(self, is_on=True, aside=None)


def add_bias(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> object:
    """Hook of a module whose forward ignores ``bias``: add the parameter of that name, if any."""
    bias = getattr(module, "bias", None)  # an attribute, not a parameter, on a replica
    if bias is None and module._parameters.get("bias") is not None:
        bias = module.__getattr__("bias")  # there is an attribute too, which says None
    if bias is None:
        return output
    return map_hidden(output, lambda hidden: hidden + bias.to(hidden.dtype))


# An attribute of the module itself hides its parameter of the same name: so the parameter, which
# trains in its own dtype, stays in its place, and for one call its cast copy is read.


def lend_cast(path: str, name: str, reader: nn.Module, args: Args) -> None:
    """Hook before a call that reads a parameter: have a copy in the dtype of its neighbours."""
    place = reader.get_submodule(path)
    own = place._parameters.get(name)
    if own is None:  # none, or that of a replica, which is an attribute and stays cast
        own = place.__dict__.get(name)
    else:
        place.__dict__.pop(name, None)
    dtype = _dtype_beside(place, name)
    if own is not None and dtype not in (None, own.dtype):
        place.__dict__[name] = own.to(dtype)


def take_back(path: str, name: str, reader: nn.Module, args: Args, output: object) -> None:
    """Hook after such a call, also after an error."""
    place = reader.get_submodule(path)
    if place._parameters.get(name) is not None:
        place.__dict__.pop(name, None)


def _dtype_beside(place: nn.Module, name: str) -> torch.dtype | None:
    """What a module computes in, by its other parameters; None if they do not tell."""
    held = place._parameters or place.__dict__.get("_former_parameters", {})  # a replica's
    beside = (p for other, p in held.items() if other != name and p is not None)
    dtypes = (p.dtype for p in beside if p.is_floating_point() and p.element_size() > 1)
    return compute_dtype(place) or next(dtypes, None)
