"""How a delta gets on a module and off again.

Each modified module carries at most two permanent hooks, a `Dispatcher` before its forward and one
after. A dispatcher knows *names*; on each call it looks them up among the children of the module
that it fires on and calls those that it finds. So attaching and detaching a delta only puts its
module in or out of the host's ``_modules``, and copies, replicas, shards and compiled graphs of a
backbone find their own deltas.

An *insertion* is one change of the backbone that can be attached, detached and removed:
`ModuleInsertion` (a delta submodule called by a dispatcher), `Replacement` (a swapped child) and
`ParameterInsertion` (a parameter put in the place of another: BitFit's bias).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.exceptions import InsertionError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# --- reading and writing the hidden state ------------------------------------------------------


def locate_hidden(args: Args, kwargs: Kwargs) -> int | str:
    """Where the hidden state is among a module's arguments: a position or a keyword.

    It is the first argument, ``hidden_states``, the first float tensor, or the first tensor.

    Raises:
        InsertionError: if no argument is a tensor.
    """
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(where, value) for where, value in named if isinstance(value, Tensor)]
    if not tensors:
        raise InsertionError("The modified module is called without any tensor: there is no input.")
    return next((where for where, v in tensors if v.is_floating_point()), tensors[0][0])


def first_hidden(args: Args, kwargs: Kwargs) -> Tensor:
    """The hidden state among a module's arguments, see `locate_hidden`."""
    where = locate_hidden(args, kwargs)
    found: Tensor = args[where] if isinstance(where, int) else kwargs[where]
    return found


def map_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its hidden state replaced by ``change(hidden)``.

    The hidden state is the output itself, the first element of a tuple or list, or the first
    floating-point tensor of a dict or ``ModelOutput``. The caller's containers are not changed.

    Raises:
        InsertionError: if there is no tensor at these places.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        changed = [change(output[0]), *output[1:]]
        if hasattr(output, "_fields"):  # a namedtuple takes its fields one by one
            return type(output)(*changed)
        return type(output)(changed)
    if isinstance(output, Mapping):
        for key, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                changed_items = {**output, key: change(value)}
                if all(isinstance(name, str) for name in changed_items):
                    return type(output)(**changed_items)  # a ModelOutput takes keywords alone
                return type(output)(changed_items)  # type: ignore[call-arg]
    raise InsertionError(
        f"The modified module returned a {type(output).__name__}; expected a tensor, or a tuple, "
        "list, dict or ModelOutput whose first tensor is the hidden state."
    )


# --- what a dispatcher does with one delta module -------------------------------------------------
# An action before the forward maps (delta, host, args, kwargs) to new arguments; one after it maps
# (delta, host, args, kwargs, output) to the new output.


def before(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Pass the input through the delta (``delta.pre_forward`` where there is one)."""
    if hasattr(delta, "pre_forward"):
        new_args, new_kwargs = delta.pre_forward(*args, **kwargs)
        return new_args, new_kwargs
    where = locate_hidden(args, kwargs)
    changed = delta(first_hidden(args, kwargs))
    if isinstance(where, int):
        return (*args[:where], changed, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: changed}


def after(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Pass the output through the delta (``delta.post_forward`` where there is one)."""
    if hasattr(delta, "post_forward"):
        return delta.post_forward(output)
    return map_hidden(output, delta)


def parallel(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Add to the output what the delta makes of the module's own arguments."""
    return map_hidden(output, lambda hidden: hidden + delta(*args, **kwargs))


def onto(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Let the delta add onto the output itself: ``delta(hidden output, hidden input)``."""
    source = first_hidden(args, kwargs)
    return map_hidden(output, lambda hidden: delta(hidden, source))


class Dispatcher:
    """The permanent hook of a module, one on each side of its forward.

    Attributes:
        entries: ``(name, action)`` in order of execution.
        handle: kept for `remove`, and in pickles, where it keeps torch's hook counter from
            handing out the same id again in another process.
        fired: whether its module was called since it was registered (outside compiled code).
    """

    def __init__(self) -> None:
        self.entries: list[tuple[str, Callable[..., Any]]] = []
        self.handle: RemovableHandle | None = None
        self.fired = False

    @classmethod
    def on(cls, module: nn.Module) -> Dispatcher | None:
        """The dispatcher of this class on `module`, if it has one."""
        for hook in cls.hooks(module).values():
            if type(hook) is cls:
                return hook
        return None

    @staticmethod
    def hooks(module: nn.Module) -> dict[int, Any]:
        raise NotImplementedError

    def register(self, module: nn.Module) -> None:
        raise NotImplementedError

    def add(self, name: str, action: Callable[..., Any]) -> None:
        self.entries.append((name, action))

    def discard(self, name: str) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != name]
        if not self.entries and self.handle is not None:
            self.handle.remove()


class BeforeDispatcher(Dispatcher):
    """Runs the attached deltas before the forward, the last one inserted first."""

    @staticmethod
    def hooks(module: nn.Module) -> dict[int, Any]:
        return module._forward_pre_hooks

    def register(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def add(self, name: str, action: Callable[..., Any]) -> None:
        self.entries.insert(0, (name, action))

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if not torch.compiler.is_compiling():
            self.fired = True
        for name, action in self.entries:
            delta = module._modules.get(name)
            if delta is not None:
                args, kwargs = action(delta, module, args, kwargs)
        return args, kwargs


class AfterDispatcher(Dispatcher):
    """Runs the attached deltas after the forward, in order of insertion.

    Its hook comes first, so that those of others, such as transformers' capture of hidden states,
    see the module's output with the deltas.
    """

    @staticmethod
    def hooks(module: nn.Module) -> dict[int, Any]:
        return module._forward_hooks

    def register(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.fired = True
        for name, action in self.entries:
            delta = module._modules.get(name)
            if delta is not None:
                output = action(delta, module, args, kwargs, output)
        return output


def add_bias(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Hook of a module whose forward ignores ``bias``: add the parameter of that name, if any."""
    bias = getattr(module, "bias", None)  # an attribute, not a parameter, on a replica
    return output if bias is None else map_hidden(output, lambda hidden: hidden + bias)


# --- telling deltas from the backbone's own modules ---------------------------------------------

STANDS_FOR = "_stands_for"  # attribute of a delta module that replaced one of the backbone's


def inserted_names(module: nn.Module) -> tuple[str, ...]:
    """Names under which deltas sit on `module`, attached or not, in order of execution."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return ()
    dispatchers = (BeforeDispatcher.on(module), AfterDispatcher.on(module))
    entries = [entry for dispatcher in dispatchers if dispatcher for entry in dispatcher.entries]
    return tuple(dict.fromkeys(name for name, _ in entries))


def inserted_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of this module's direct parameters that belong to a delta (BitFit's ``bias``)."""
    return tuple(name for name, p in module._parameters.items() if getattr(p, "_is_delta", False))


def own_modules(
    root: nn.Module, remove_duplicate: bool = True, originals: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` of the backbone alone: nothing that sits inside a delta.

    Args:
        root: the backbone or a part of it.
        remove_duplicate: whether a module with several names comes once, under the first.
        originals: whether a replaced module comes in the place of what replaced it, rather than
            being left out.
    """
    seen: set[int] = set()
    stack = [("", root)]
    while stack:
        name, module = stack.pop()
        if remove_duplicate and id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        for child_name, child in reversed(own_children(module, originals)):
            stack.append((f"{name}.{child_name}" if name else child_name, child))


def own_children(module: nn.Module, originals: bool = False) -> list[tuple[str, nn.Module]]:
    """(name, child) of a module's children that are the backbone's own, see `own_modules`."""
    if not module._modules:
        return []
    deltas = inserted_names(module)
    children = []
    for name, child in module._modules.items():
        if child is None or name in deltas:
            continue
        if STANDS_FOR in child.__dict__:
            if not originals:
                continue
            (child,) = child.__dict__[STANDS_FOR]
        children.append((name, child))
    return children


def forget_compiled_code() -> None:
    """Make compiled models trace again: graphs are not guarded on the arrival of a new hook."""
    dynamo = sys.modules.get("torch._dynamo")  # a process that never compiled has no graphs
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        dynamo.reset()


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returned; any other module itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


# --- insertions -----------------------------------------------------------------------------------


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


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of one of the backbone's modules and its own below it."""
    for _, part in own_modules(module):
        yield from (p for p in part._parameters.values() if p is not None)
        yield from (b for b in part._buffers.values() if b is not None)


Place = tuple[torch.device, torch.dtype | None]


def place_of(module: nn.Module) -> Place | None:
    """Where a host lives: the device of its first tensor, and the dtype that it computes in.

    The dtype is that of its first floating-point tensor of 16 bits or more (a quantised weight
    is stored in another), None if it has no such tensor.
    """
    device = None
    for tensor in own_tensors(module):
        device = tensor.device if device is None else device
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


def dotted(*parts: str) -> str:
    """The dotted name of `parts`, empty ones left out."""
    return ".".join(part for part in parts if part)


def _untrained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def _constants(module: nn.Module, names: set[str]) -> Iterator[Tensor]:
    yield from module.buffers()
    if names:
        yield from (p for name, p in module.named_parameters() if name in names)


def _saved(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    return iter(module.state_dict(prefix=prefix + ".", keep_vars=True).items())


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
        self.lone_name = name  # its name in files, where the delta is alone
        self.side, self.action = side, action
        self.constant_names = _untrained(module)
        self._left_at: Place | None = None
        self._followers: list[str] = []

    @property
    def attached(self) -> bool:
        return self.name in self.host._modules

    def insert(self) -> None:
        dispatcher = self.side.on(self.host)
        if dispatcher is None:
            dispatcher = self.side()
            dispatcher.register(self.host)
            forget_compiled_code()
        dispatcher.add(self.name, self.action)
        self.host._modules[self.name] = self.module

    def detach(self) -> None:
        if self.attached:
            names = list(self.host._modules)
            self._followers = names[names.index(self.name) + 1 :]
            del self.host._modules[self.name]
            self._left_at = place_of(self.host)

    def attach(self) -> None:
        if self.attached:
            return
        new = follow(self.module.parameters(), self._left_at, place_of(self.host))
        if new is not None:
            self.module.to(device=new[0], dtype=new[1])
        if self.module.training != self.host.training:
            self.module.train(self.host.training)
        children = self.host._modules
        children[self.name] = self.module
        for name in self._followers:  # the order of parameters, by which optimizers number them
            if name in children:
                children[name] = children.pop(name)

    @property
    def reached(self) -> bool:
        """Whether a forward called the host."""
        dispatcher = self.side.on(self.host)
        return dispatcher is not None and dispatcher.fired

    def remove(self) -> None:
        self.host._modules.pop(self.name, None)
        dispatcher = self.side.on(self.host)
        if dispatcher is not None:
            dispatcher.discard(self.name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(prefix=dotted(self.host_name, self.name))

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
        return self.module.named_parameters(prefix=dotted(self.host_name, self.name))

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
        self.handle: RemovableHandle | None = None
        self.left_at: Place | None = None  # where the original was set aside
        self.sharded = False  # whether the parameter in place was seen as a shard

    @property
    def top(self) -> ParameterInsertion | None:
        """The insertion that acts now."""
        attached = [layer for layer in self.layers if layer.attached]
        return attached[-1] if attached else None

    def look(self) -> None:
        """Take up the parameter that is in place now: loading with ``assign`` puts a new one."""
        current, top = self.places[0]._parameters.get(self.name), self.top
        self.sharded = self.sharded or hasattr(current, "placements")
        if top is None:
            self.original = current
        elif current is not None:
            top.parameter = current

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
        if self._attached != attached:
            self.slot.look()
            if self.slot.sharded:
                raise InsertionError(
                    f"The {self.name} of {self.host_name!r} is sharded: BitFit's biases cannot be "
                    "switched on a sharded backbone."
                )
            (self.slot.top or self.slot).left_at = self.slot.place
            self._attached = attached
            self.slot.settle()

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
