"""How a delta gets on a module and off again.

An *insertion* is one change of the backbone that can be attached, detached and removed:
`ModuleInsertion` (a delta submodule called by a dispatcher, see `opendelta.dispatch`),
`Replacement` (a swapped child) and `ParameterInsertion` (a parameter put in the place of another:
BitFit's bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.quantised import compute_dtype, execution_device
from opendelta.backends.sharding import assign, full, is_shard
from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_module, every_parameter, named_parameters_of, named_tensors
from opendelta.mechanism.dispatch import Dispatcher, Seat, add_bias, forget_compiled_code
from opendelta.mechanism.ownership import STANDS_FOR, own_modules

Place = tuple[torch.device, torch.dtype | None]


def place_of(module: nn.Module) -> Place | None:
    """Where a host runs: the device of its first tensor, and the dtype that it computes in.

    The dtype is what a quantised layer says, else that of the first floating-point tensor of 16
    bits or more (a quantised weight is stored in another), None if there is no such tensor. The
    device of offloaded tensors is where they are brought to.
    """
    device = None
    for _, part in own_modules(module):
        computes_in = compute_dtype(part)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None:
                continue
            if device is None:
                device = (execution_device(part) if tensor.is_meta else None) or tensor.device
            if computes_in is not None:
                return device, computes_in
            if tensor.is_floating_point() and tensor.element_size() > 1:
                return device, tensor.dtype
    return None if device is None else (device, None)


def follow(tensors: Iterable[Tensor], old: Place | None, new: Place | None) -> Place | None:
    """Where tensors that were left at `old` belong now that their host is at `new`.

    Returns:
        The device, and the dtype if they shared the old one; None if nothing changed.
    """
    if old is None or new is None or old == new or new[0].type == "meta":
        return None
    shared = all(t.dtype == old[1] for t in tensors if t.is_floating_point())
    return new[0], new[1] if shared else None


class Insertion(Protocol):
    """One change of the backbone. `insert` is called once, then `detach` and `attach` at will."""

    host: nn.Module
    host_name: str

    @property
    def attached(self) -> bool: ...
    def insert(self) -> None: ...
    def attach(self) -> None: ...
    def detach(self) -> None: ...
    def remove(self) -> None: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name on the backbone while attached, parameter) of what was inserted."""

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name in a saved file, tensor) of what was inserted."""

    def constants(self) -> Iterable[Tensor]:
        """Buffers, and parameters that never train."""


def switch(insertions: Iterable[Insertion], attached: bool) -> None:
    """Attach or detach all of `insertions` in this order, or, where one cannot, none."""
    done: list[Insertion] = []
    try:
        for insertion in insertions:
            if insertion.attached != attached:
                insertion.attach() if attached else insertion.detach()
                done.append(insertion)
    except BaseException:
        switch(reversed(done), not attached)
        raise


def _untrained(module: nn.Module) -> set[str]:
    if all(p.requires_grad for p in every_parameter(module)):
        return set()
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def _constants(module: nn.Module, names: set[str]) -> Iterator[Tensor]:
    for part in every_module(module):
        yield from (buffer for buffer in part._buffers.values() if buffer is not None)
    if names:
        yield from (p for name, p in module.named_parameters() if name in names)


def _saved(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((dotted(prefix, name), tensor) for name, tensor in named_tensors(module))


class ModuleInsertion:
    """A delta submodule on a host, called by the host's dispatcher.

    Args:
        host: the modified module; `host_name`: its name in the backbone.
        module: the delta module.
        name: the name under which it is registered on the host.
        side: which dispatcher calls it; `action`: what that one does with it.
    """

    def __init__(
        self,
        host: nn.Module,
        host_name: str,
        module: nn.Module,
        name: str,
        side: type[Dispatcher],
        action: Callable[..., Any],
    ) -> None:
        self.host, self.host_name = host, host_name
        self.module, self.name = module, name
        self.seat = Seat.on(host, module)
        self.lone_name = name  # its name in files, where the delta is alone
        self.side, self.action = side, action
        self.constant_names = _untrained(module)
        self._left_at: Place | None = None
        self._followers: list[str] = []

    @property
    def attached(self) -> bool:
        return self.name in self.host._modules

    def insert(self) -> None:
        self.enter_dispatcher()
        self.host._modules[self.name] = self.seat

    def enter_dispatcher(self, later: Iterable[Insertion] = ()) -> None:
        """Let the host call the delta while attached, before those of `later` on the same host."""
        dispatcher = self.side.on(self.host)
        if dispatcher is None:
            dispatcher = self.side()
            dispatcher.register(self.host)
            forget_compiled_code()
        mine = (i for i in later if isinstance(i, ModuleInsertion) and i.host is self.host)
        names = [insertion.name for insertion in mine]
        self._followers += [name for name in names if name not in self._followers]
        dispatcher.add(self.name, self.action, names)

    def leave_dispatcher(self) -> None:
        dispatcher = self.side.on(self.host)
        if dispatcher is not None:
            dispatcher.discard(self.name)

    @property
    def entries(self) -> list[tuple[str, Callable[..., Any]]]:
        """What the host calls on this side: (name, action) in order of execution."""
        dispatcher = self.side.on(self.host)
        return [] if dispatcher is None else dispatcher.entries

    def detach(self) -> None:
        if self.attached:
            names = list(self.host._modules)
            self._followers = names[names.index(self.name) + 1 :]
            del self.host._modules[self.name]
            self._left_at = place_of(self.host)

    def attach(self) -> None:
        if self.attached:
            return
        self.follow_host()
        children = self.host._modules
        children[self.name] = self.seat
        for name in self._followers:  # the order of parameters, by which optimizers number them
            if name in children:
                children[name] = children.pop(name)

    def follow_host(self) -> None:
        """Bring a detached module to its host's device, dtype and train mode."""
        if self.attached:
            return
        now = place_of(self.host)
        new = follow(self.module.parameters(), self._left_at, now)
        if new is not None:
            self.module.to(device=new[0], dtype=new[1])
        self._left_at = now
        if self.module.training != self.host.training:
            self.module.train(self.host.training)

    @property
    def reached(self) -> bool:
        """Whether a forward called the host."""
        dispatcher = self.side.on(self.host)
        return dispatcher is not None and dispatcher.fired

    def remove(self) -> None:
        self.host._modules.pop(self.name, None)
        self.leave_dispatcher()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return named_parameters_of(self.module, dotted(self.host_name, self.name))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return _saved(self.module, dotted(self.host_name, self.lone_name))

    def constants(self) -> Iterator[Tensor]:
        return _constants(self.module, self.constant_names)


class Replacement:
    """A child of `host` swapped for a delta module; detaching puts the original back."""

    def __init__(self, host: nn.Module, host_name: str, child_name: str, module: nn.Module) -> None:
        self.host, self.host_name, self.name = host, host_name, child_name
        original = host._modules[child_name]
        assert original is not None
        self.original: nn.Module = original
        self.module = module
        self.constant_names = _untrained(module)
        self._left_at: Place | None = None
        module.__dict__[STANDS_FOR] = [original]  # how it is told from the backbone's own

    @property
    def attached(self) -> bool:
        return self.host._modules.get(self.name) is self.module

    def _swap(self, outgoing: nn.Module, incoming: nn.Module) -> None:
        now = place_of(outgoing)
        new = follow(incoming.parameters(), self._left_at, now)
        if new is not None:
            incoming.to(device=new[0], dtype=new[1])
        self._left_at = now
        self.host._modules[self.name] = incoming
        forget_compiled_code()

    def insert(self) -> None:
        if not self.attached:
            self._swap(self.original, self.module)

    attach = insert

    def detach(self) -> None:
        if self.attached:
            self._swap(self.module, self.original)

    remove = detach

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return named_parameters_of(self.module, dotted(self.host_name, self.name))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return _saved(self.module, dotted(self.host_name, self.name))

    def constants(self) -> Iterator[Tensor]:
        return _constants(self.module, self.constant_names)


class ParameterSlot:
    """A place for a parameter on a module, with its original content and those laid over it.

    The content is that of the attached insertion that was inserted last, else the original one.
    Tied parameters have several places.

    Args:
        places: the modules that hold the parameter.
        name: its name there, e.g. ``"bias"``.
    """

    def __init__(self, places: list[nn.Module], name: str) -> None:
        self.places, self.name = places, name
        self.existed = [name in place._parameters for place in places]
        self.original = places[0]._parameters.get(name)
        self.layers: list[ParameterInsertion] = []
        self.held_bare = 0  # by how many routes, see `hold_bare`
        self.handle: RemovableHandle | None = None
        self.left_at: Place | None = None  # where the original was set aside
        self.sharded = False  # whether the parameter in place was seen as a shard

    @property
    def top(self) -> ParameterInsertion | None:
        """The insertion that acts now."""
        attached = [layer for layer in self.layers if layer.attached]
        return attached[-1] if attached and not self.held_bare else None

    def look(self) -> None:
        """Take up the parameter that is in place now: loading with ``assign`` puts a new one."""
        current, top = self.places[0]._parameters.get(self.name), self.top
        self.sharded = self.sharded or is_shard(current)
        if top is None:
            self.original = current
        elif current is not None:
            top.parameter = current

    @contextmanager
    def hold_bare(self) -> Iterator[None]:
        """Within a ``with`` block the original acts; attach and detach say what does afterwards."""
        if not self.held_bare:
            attached = [layer for layer in self.layers if layer.attached]
            for layer in reversed(attached):
                layer.detach()
            for layer in attached:
                layer._attached = True
        self.held_bare += 1
        try:
            yield
        finally:
            self.held_bare -= 1
            if not self.held_bare:
                attached = [layer for layer in self.layers if layer.attached]
                for layer in attached:
                    layer._attached = False
                for layer in attached:
                    layer.attach()

    def settle(self) -> None:
        """Put what acts now into every place, moved to where that is now."""
        top = self.top
        content = self.original if top is None else top.parameter
        if content is not None:
            new = follow([content], (top or self).left_at, self.place)
            if new is not None:
                content.data = content.data.to(device=new[0], dtype=new[1])
        for place, existed in zip(self.places, self.existed, strict=True):
            if content is None and not existed:
                place._parameters.pop(self.name, None)
            else:
                place._parameters[self.name] = content

    @property
    def place(self) -> Place | None:
        """Where the places' other tensors are."""
        for place in self.places:
            for name, p in place._parameters.items():
                if name != self.name and p is not None and p.is_floating_point():
                    return p.device, p.dtype
        return None


class ParameterInsertion:
    """A parameter of a delta in the place of a parameter (or of none) of the backbone.

    Args:
        slot: where it goes.
        host_name: the first place's name in the backbone.
        parameter: what acts while attached.
        ignored: whether the host's forward ignores a parameter of that name, so that a hook
            has to add it to the output.
    """

    def __init__(
        self, slot: ParameterSlot, host_name: str, parameter: nn.Parameter, ignored: bool
    ) -> None:
        self.slot, self.host_name = slot, host_name
        self.parameter, self.ignored = parameter, ignored
        self.host, self.name = slot.places[0], slot.name
        self.full_name = dotted(host_name, slot.name)
        self._attached = False
        self.left_at: Place | None = None

    @property
    def attached(self) -> bool:
        return self._attached

    def insert(self) -> None:
        if self.ignored and self.slot.handle is None:
            self.slot.handle = self.host.register_forward_hook(
                add_bias, prepend=True, with_kwargs=True
            )
            forget_compiled_code()
        self.slot.layers.append(self)
        self.attach()

    def attach(self) -> None:
        self._switch(True)

    def detach(self) -> None:
        self._switch(False)

    def _switch(self, attached: bool) -> None:
        if self.slot.held_bare:
            self._attached = attached
        elif self._attached != attached:
            self.slot.look()
            if self.slot.sharded:
                self._switch_values(attached)
                return
            (self.slot.top or self.slot).left_at = self.slot.place
            self._attached = attached
            self.slot.settle()

    def _switch_values(self, attached: bool) -> None:
        """Let another content act by its values: the engine holds on to the parameter."""
        slot, before = self.slot, self.slot.top
        self._attached = attached
        held, after = self.host._parameters.get(self.name), slot.top
        content = slot.original if after is None else after.parameter
        if held is None or content is None:
            self._attached = not attached
            raise InsertionError(
                f"The bias of {self.host_name!r} is one that the delta adds, and the backbone is "
                "sharded: it can be neither added nor taken away now."
            )
        if before is after:
            return
        aside = nn.Parameter(full(held).clone(), held.requires_grad)
        with torch.no_grad():
            assign(held, content.detach())
        held.requires_grad_(content.requires_grad)
        held._is_delta = after is not None  # type: ignore[attr-defined]  # see `_label`
        for layer, now in ((before, aside), (after, held)):
            if layer is None:
                slot.original = now
            else:
                layer.parameter = now

    def remove(self) -> None:
        self.detach()
        if self in self.slot.layers:
            self.slot.layers.remove(self)
        if not self.slot.layers and self.slot.handle is not None:
            self.slot.handle.remove()
            self.slot.handle = None

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((self.full_name, self.parameter),)

    named_tensors = named_parameters

    def constants(self) -> Iterable[Tensor]:
        return ()
