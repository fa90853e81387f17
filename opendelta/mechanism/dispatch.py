"""What runs a delta: the permanent hooks of the modified modules, and what they do.

Each modified module carries at most two permanent hooks, a `Dispatcher` before its forward and one
after. A dispatcher knows *names*; on each call it looks them up among the children of the module
that it fires on and calls those that it finds. So attaching and detaching a delta only puts its
module in or out of the host's ``_modules``, and copies, replicas, shards and compiled graphs of a
backbone find their own deltas.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from opendelta.ground.containers import Args, Kwargs, first_hidden, locate_hidden, map_hidden
from opendelta.signature import names_in_code

# --- reading and writing the hidden state ------------------------------------------------------


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


# Actions that only add to the output, so that their order does not matter.
ADDITIVE: set[Callable[..., Any]] = {parallel, onto}

_OF_CHILDREN = {"children", "named_children", "_modules"}  # how a forward goes through them


class Seat(nn.Module):
    """Stands for a delta among the children of a module that runs its children: `nn.Sequential`.

    It holds the delta's parameters and children under the same names, and hands on what it is
    called with, so that the delta acts through the dispatcher alone, as elsewhere.
    """

    delta: nn.Module

    def __init__(self, delta: nn.Module) -> None:
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: delta.__dict__[name] for name in shared}, delta=delta)

    @classmethod
    def on(cls, host: nn.Module, delta: nn.Module) -> nn.Module:
        """What sits on `host` for `delta`: itself, or a seat where children are gone through."""
        runs_children = hasattr(type(host), "__iter__") or (
            _OF_CHILDREN & names_in_code(type(host).forward)
        )
        return cls(delta) if runs_children else delta

    def _replicate_for_data_parallel(self) -> Seat:
        """A replica, and that of the delta: what DataParallel sets on one is set on both."""
        delta = self.delta._replicate_for_data_parallel()
        replica = Seat.__new__(Seat)
        replica.__dict__ = delta.__dict__
        replica.__dict__["delta"] = delta
        return replica

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden

    def train(self, mode: bool = True) -> Seat:
        self.delta.train(mode)
        return super().train(mode)

    def _get_name(self) -> str:
        return self.delta._get_name()

    def extra_repr(self) -> str:
        return self.delta.extra_repr()


def _delta_on(module: nn.Module, name: str) -> nn.Module | None:
    """The delta called `name` on a module, None while it is detached."""
    child = module._modules.get(name)
    return child.delta if isinstance(child, Seat) else child


class Dispatcher:
    """The permanent hook of a module, one on each side of its forward.

    Attributes:
        entries: ``(name, action)`` in order of execution.
        handle: kept for `remove`, and in pickles, where it keeps torch's hook counter from
            handing out the same id again in another process.
        fired: whether its module was called since it was registered (outside compiled code).
        router: finds the route that is in force for a module, see `opendelta.routing`; None while
            there is none in any thread.
    """

    router: ClassVar[Callable[[nn.Module], Any] | None] = None

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

    def add(self, name: str, action: Callable[..., Any], later: Collection[str] = ()) -> None:
        """Enter a delta; `later` are the names of those that were inserted after it."""
        at = [name in later for name, _ in self.entries]
        self.entries.insert(at.index(True) if True in at else len(at), (name, action))

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

    def add(self, name: str, action: Callable[..., Any], later: Collection[str] = ()) -> None:
        at = [name in later for name, _ in self.entries]
        self.entries.insert(at.index(False) if False in at else len(at), (name, action))

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if not torch.compiler.is_compiling():
            self.fired = True
        if Dispatcher.router is not None and (route := Dispatcher.router(module)) is not None:
            args, kwargs = route.run(self.entries, module, (args, kwargs))
            return args, kwargs
        for name, action in self.entries:
            delta = _delta_on(module, name)
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
        if Dispatcher.router is not None and (route := Dispatcher.router(module)) is not None:
            return route.run(self.entries, module, (args, kwargs, output))[2]
        for name, action in self.entries:
            delta = _delta_on(module, name)
            if delta is not None:
                output = action(delta, module, args, kwargs, output)
        return output


def add_bias(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Hook of a module whose forward ignores ``bias``: add the parameter of that name, if any."""
    bias = getattr(module, "bias", None)  # an attribute, not a parameter, on a replica
    if bias is None and module._parameters.get("bias") is not None:
        bias = module.__getattr__("bias")  # there is an attribute too, which says None
    return output if bias is None else map_hidden(output, lambda hidden: hidden + bias)


def forget_compiled_code() -> None:
    """Make compiled models trace again: graphs are not guarded on the arrival of a new hook."""
    dynamo = sys.modules.get("torch._dynamo")  # a process that never compiled has no graphs
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        dynamo.reset()
