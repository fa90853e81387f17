"""What runs a delta: the permanent hooks of the modified modules, and what they do.

Each modified module carries at most two permanent hooks, a `Dispatcher` before its forward and one
after. A dispatcher knows *names*; on each call it looks them up among the children of the module
that it fires on and calls those that it finds. So attaching and detaching a delta only puts its
module in or out of the host's ``_modules``, and copies, replicas, shards and compiled graphs of a
backbone find their own deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.exceptions import InsertionError
from opendelta.ground.containers import (
    Args,
    Kwargs,
    by_row,
    first_hidden,
    hidden_of,
    locate_hidden,
    map_hidden,
)
from opendelta.ground.seams import compiled_graphs, forget_compiled_code
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.hooks import add_forward_hook, take_off
from opendelta.signature import names_in_code

if TYPE_CHECKING:
    from typing import Self

Entry = tuple[str, Callable[..., Any]]  # the name of a delta, and what is done with it

# --- what a dispatcher does with one delta module -------------------------------------------------
# An action before the forward maps (delta, host, args, kwargs) to new arguments; one after it maps
# (delta, host, args, kwargs, output) to the new output.


def before(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Pass the input through the delta (``delta.pre_forward`` where there is one)."""
    if hasattr(delta, "pre_forward"):
        new_args, new_kwargs = delta.pre_forward(*args, **kwargs)
        return new_args, new_kwargs
    where = locate_hidden(args, kwargs)
    changed = by_row(delta, first_hidden(args, kwargs))
    if isinstance(where, int):
        return (*args[:where], changed, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: changed}


def after(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Pass the output through the delta (``delta.post_forward`` where there is one)."""
    if hasattr(delta, "post_forward"):
        return delta.post_forward(output)
    return map_hidden(output, partial(by_row, delta))


def parallel(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Add to the output what the delta makes of the module's own arguments."""
    return map_hidden(output, lambda hidden: hidden + delta(*args, **kwargs))


def onto(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Let the delta add onto the output itself: ``delta(hidden output, hidden input)``."""
    source = first_hidden(args, kwargs)
    return map_hidden(output, lambda hidden: by_row(delta, hidden, source))


def fuse(
    delta: Any,
    host: nn.Module,
    args: Args,
    kwargs: Kwargs,
    output: Any,
    others: Mapping[str, Callable[[Any], Any]],
) -> Any:
    """Let the delta make one output of what the deltas before it make of the module's.

    ``delta(hidden, others)`` gets the module's hidden output and, by the names of the deltas
    before it on this module, what each makes of a hidden output. They do not act by themselves.
    """

    def of_hidden(run: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        def made(hidden: Tensor) -> Tensor:
            return hidden_of(run(map_hidden(output, lambda _: hidden)))

        return made

    callables = {name: of_hidden(run) for name, run in others.items()}
    return map_hidden(output, lambda hidden: delta(hidden, callables))


# Actions that only add to the output, so that their order does not matter.
ADDITIVE: set[Callable[..., Any]] = {parallel, onto}
# Actions that are handed the deltas before them on their module, which then do not act themselves.
FUSING: set[Callable[..., Any]] = {fuse}

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
        handle: kept for taking the hook off, and in pickles, where it keeps torch's hook counter
            from handing out the same id again in another process.
        fuses: whether one of the entries is handed those before it.
        names: of its deltas, attached or not.
        fired: those that were here when the module was called last (outside compiled code).
        graphs: how many graphs were compiled before it, to tell whether there are new ones.
        router: finds the route that is in force for a module, see `opendelta.routing`; None while
            there is none in any thread.
    """

    router: ClassVar[Callable[[nn.Module], Any] | None] = None
    before: ClassVar[bool]

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.handle: RemovableHandle | None = None
        self.fuses = False
        self.names: frozenset[str] = frozenset()
        self.fired: frozenset[str] = frozenset()
        self.graphs = compiled_graphs()

    @classmethod
    def on(cls, module: nn.Module, changes: Changes | None = None) -> Self | None:
        """The dispatcher of this class that `module` has, or is about to have."""
        hooks: Any = module._forward_pre_hooks if cls.before else module._forward_hooks
        for hook in (hooks if changes is None else changes.of(hooks)).values():
            if type(hook) is cls:
                return hook
        return None

    @classmethod
    def enter(
        cls, changes: Changes, module: nn.Module, entry: Entry, later: Collection[str] = ()
    ) -> None:
        """Let `module` call a delta; `later` are the names of those that were inserted after it."""
        dispatcher = cls.on(module, changes)
        if dispatcher is None:
            dispatcher = cls()
            dispatcher.handle = add_forward_hook(
                changes, module, dispatcher, before=cls.before, first=True, with_kwargs=True
            )
            changes.do_first(forget_compiled_code)
        entries = [*changes.get(dispatcher, "entries")]
        # Before the forward the last one inserted runs first.
        places = [(name in later) != cls.before for name, _ in entries]
        entries.insert(places.index(True) if True in places else len(places), entry)
        dispatcher._let(changes, entries)

    @classmethod
    def leave(cls, changes: Changes, module: nn.Module, name: str) -> None:
        """Let `module` call the delta called `name` no more; the last one takes the hook along."""
        dispatcher = cls.on(module, changes)
        if dispatcher is not None:
            left = [entry for entry in changes.get(dispatcher, "entries") if entry[0] != name]
            dispatcher._let(changes, left)
            if not left:
                take_off(changes, dispatcher.handle)

    def reached(self, name: str) -> bool | None:
        """Whether a call has reached a delta since it came; None if code that notes none may."""
        unseen = None if compiled_graphs() != self.graphs else False
        return name in self.fired or unseen

    def _taken_along(self, module: nn.Module) -> InsertionError:
        """The refusal to run on a module that took over the hooks of another, not its deltas.

        The one that does so (torch's quantisation, its fusing of modules) hands hooks no keywords.
        """
        names = ", ".join(repr(name) for name, _ in self.entries)
        return InsertionError(
            f"A {type(module).__name__} was put in the place of a module that carries {names}, and "
            "took over its hooks without the delta. Quantise or fuse the model before the delta is "
            "constructed, or after delta.merge_and_remove()."
        )

    def _let(self, changes: Changes, entries: list[Entry]) -> None:
        fuses = any(action in FUSING for _, action in entries)
        names = frozenset(name for name, _ in entries)
        fired = changes.get(self, "fired") & names
        changes.set(self, entries=entries, fuses=fuses, names=names, fired=fired)


class BeforeDispatcher(Dispatcher):
    """Runs the attached deltas before the forward, the last one inserted first."""

    before = True

    def __call__(
        self, module: nn.Module, args: Args, kwargs: Kwargs | None = None
    ) -> tuple[Args, Kwargs]:
        if kwargs is None:
            raise self._taken_along(module)
        if not torch.compiler.is_compiling():
            self.fired = self.names
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

    before = False

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, *given: Any) -> Any:
        if not given:
            raise self._taken_along(module)
        (output,) = given
        if not torch.compiler.is_compiling():
            self.fired = self.names
        if Dispatcher.router is not None and (route := Dispatcher.router(module)) is not None:
            return route.run(self.entries, module, (args, kwargs, output))[2]
        if self.fuses:
            return self._fused(module, args, kwargs, output)
        for name, action in self.entries:
            delta = _delta_on(module, name)
            if delta is not None:
                output = action(delta, module, args, kwargs, output)
        return output

    def _fused(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """As the call, where a delta is handed those before it."""
        bare, before = output, dict[str, Callable[..., Any]]()
        for name, action in self.entries:
            delta = _delta_on(module, name)
            if delta is not None:
                run = partial(action, delta, module, args, kwargs)
                output = run(bare, before) if action in FUSING else run(output)
                before[name] = run
        return output
