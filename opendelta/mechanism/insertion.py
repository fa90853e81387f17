"""How a delta gets on a module and off again.

An *insertion* is one change of the backbone that can be attached, detached and taken off. It only
*prepares* that, see `opendelta.mechanism.changes`. What others need to know of it they ask; a new
kind answers, and nobody asks what kind it is. Here: `ModuleInsertion` (a delta submodule called by
a dispatcher) and `EndInsertion` (a hook that always runs last); in `opendelta.mechanism.slot` a
parameter put in the place of another, in `opendelta.mechanism.child_slot` a module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.quantised import is_offloaded
from opendelta.backends.sharding import is_shard
from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_module, every_parameter, named_parameters_of, named_tensors
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.dispatch import ADDITIVE, FUSING, Dispatcher, Entry, Seat, after
from opendelta.mechanism.hooks import add_forward_hook, take_off
from opendelta.mechanism.places import Place, follow, place_of


class Insertion:
    """One change of the backbone; this base changes nothing and answers for what holds nothing.

    Attributes:
        host: the module that it sits on; `host_name`: its name in the backbone.
        name: under which it stands there.
        module: the delta module that it brings, None for none.
        slot: the place of a parameter in which it stands, None if in none; `child_slot`: likewise,
            of a module.
        table: which of the host's tables it stands in.
        is_additive: whether it only adds to what the host gives.
        fuses: whether it is handed the deltas before it on its host.
        passes_on: whether it only sees to what goes through its host, which no call need reach.
        reads_host: whether it depends on more of the host than what that is given and gives.
        saved: whether it goes into files.
        of_method: whether the method put it there; else it is a parameter that the file carried.
        is_named_as_own: whether patterns for the backbone name it itself (BitFit's ``bias``).
        trained: names of its parameters that the last freeze left trainable.
    """

    host: nn.Module
    host_name: str
    name: str = ""
    module: nn.Module | None = None
    slot: Any = None
    child_slot: Any = None
    table: ClassVar[str] = "_modules"
    is_additive: bool = False
    fuses: bool = False
    passes_on: bool = False
    reads_host: bool = False
    saved: bool = True
    of_method: ClassVar[bool] = True
    is_named_as_own: ClassVar[bool] = False
    trained: frozenset[str] = frozenset()

    # --- on and off -------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether it acts now."""
        return False

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        """Be there, and attached; `later` are insertions that came after it on the backbone."""
        self.attach(changes)

    def attach(self, changes: Changes) -> None:
        """Act again."""

    def detach(self, changes: Changes) -> None:
        """Act no longer, ready to be attached."""

    def leave(self, changes: Changes) -> None:
        """Go for good."""
        self.detach(changes)

    def follow_host(self) -> None:
        """While detached: be where the host is now."""

    # --- what it is -------------------------------------------------------------------------

    @property
    def content(self) -> Any:
        """The module or parameter that it brings."""
        return self.module

    @property
    def brought(self) -> list[nn.Module]:
        """The modules that come onto the backbone with it."""
        return []

    @property
    def led_by(self) -> nn.Module:
        """The module whose device, dtype and mode its own module takes."""
        return self.host

    @property
    def place_name(self) -> str:
        """The name of the place in the backbone that tables show."""
        return self.host_name

    @property
    def places(self) -> list[nn.Module]:
        """The modules that it changes."""
        return [self.host]

    @property
    def file_name(self) -> str:
        """Its name on its host where the delta is alone, as in files."""
        return self.name

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name on the backbone while attached, parameter) of what was inserted."""
        return ()

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name in a saved file, tensor) of what was inserted."""
        return ()

    def constants(self) -> Iterable[Tensor]:
        """Buffers, and parameters that never train."""
        return ()

    # --- what others ask --------------------------------------------------------------------

    def misfit(self) -> str | None:
        """Which size its host has, and which it is made for, where they differ."""
        return None

    def grow(self, changes: Changes) -> bool:
        """Let it have the size of a host that has grown; whether it can."""
        return False

    @property
    def reached(self) -> bool | None:
        """Whether its host was called since it is there; None if that is not known or needed."""
        return None

    @property
    def dispatcher(self) -> Dispatcher | None:
        """What calls it."""
        return None

    @property
    def is_away(self) -> bool:
        """Whether Accelerate offloaded it, not the backbone below it alone."""
        return False

    def step_aside(self, changes: Changes) -> None:
        """Leave the host's own forward as it is without this delta, for `step_back`."""
        self.detach(changes)

    def step_back(self, changes: Changes, later: Iterable[Insertion]) -> None:
        """Undo `step_aside`."""
        self.attach(changes)

    @property
    def folds(self) -> bool:
        """Whether it is folded into its host's parameters where its delta is merged."""
        return self.content is not None

    def keep(self, changes: Changes) -> None:
        """Be the backbone's own from now on, if it is not folded in."""

    @property
    def fold_rank(self) -> int:
        """When it is folded in: parameters, then what acts on the output, then on the input."""
        return 0

    def differs_beside(self, merged: Insertion, is_earlier: bool) -> bool:
        """Whether it acts otherwise once another one of its host is folded in.

        Args:
            merged: the other one.
            is_earlier: whether this one came before it, so that it acts nearer to the host.
        """
        return False

    def output_on(self, host: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        """What `host`, in the place of its own, gives for `x` with this in evaluation."""
        raise NotImplementedError

    def known_to_engine(self) -> bool:
        """Whether the engine of the backbone, if there is one, has its parameters already."""
        parameters = [p for _, p in self.named_parameters()]
        return not parameters or any(is_shard(p) or hasattr(p, "_hp_mapping") for p in parameters)

    def look(self) -> bool:
        """Take up what was put in its place by others; whether that may have happened."""
        return False

    def stand_in(self, place: nn.Module) -> nn.Module:
        """What computes in the stead of one of its sites, for what no method put there."""
        return place

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
        """In a mixed batch: the modules to whose output it is added row by row.

        None if it is a module that its dispatcher runs on the rows of its delta.

        Args:
            is_called: whether a module's forward runs, rather than its weight being read.

        Raises:
            InsertionError: if it acts on a whole batch alone.
        """
        return None


class WithModule(Insertion):
    """An insertion that brings a delta module."""

    module: nn.Module

    def __init__(self, host: nn.Module, host_name: str, name: str, module: nn.Module) -> None:
        self.host, self.host_name, self.name, self.module = host, host_name, name, module
        self.left_at: Place | None = None  # where its host was when it was set aside
        parameters = module.named_parameters()
        trains = all(p.requires_grad for p in every_parameter(module))
        self.constant_names = set() if trains else {n for n, p in parameters if not p.requires_grad}

    @property
    def is_away(self) -> bool:
        return any(map(is_offloaded, self.module.modules()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return named_parameters_of(self.module, dotted(self.host_name, self.name))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        prefix = dotted(self.host_name, self.file_name)
        return ((dotted(prefix, name), tensor) for name, tensor in named_tensors(self.module))

    def constants(self) -> Iterator[Tensor]:
        for part in every_module(self.module):
            yield from (buffer for buffer in part._buffers.values() if buffer is not None)
        if self.constant_names:
            named = self.module.named_parameters()
            yield from (p for name, p in named if name in self.constant_names)


class ModuleInsertion(WithModule):
    """A delta submodule on a host, called by the host's dispatcher.

    Args:
        host: the modified module; `host_name`: its name in the backbone.
        module: the delta module.
        name: the name under which it is registered on the host.
        side: which dispatcher calls it; `action`: what that one does with it.
        lone_name: its name in files, where the delta is alone.
    """

    def __init__(
        self,
        host: nn.Module,
        host_name: str,
        module: nn.Module,
        name: str,
        side: type[Dispatcher],
        action: Callable[..., Any],
        lone_name: str,
    ) -> None:
        super().__init__(host, host_name, name, module)
        self.lone_name = lone_name
        self.seat = Seat.on(host, module)
        self.side, self.action = side, action
        self.is_additive = action in ADDITIVE and getattr(module, "is_additive", True)
        self.fuses = action in FUSING
        self.passes_on = getattr(module, "passes_on", False)
        self.reads_host = self.fuses or getattr(module, "reads_host", False)
        self.followers: list[str] = []

    @property
    def attached(self) -> bool:
        return self.name in self.host._modules

    @property
    def file_name(self) -> str:
        return self.lone_name

    @property
    def dispatcher(self) -> Dispatcher | None:
        return self.side.on(self.host)

    @property
    def reached(self) -> bool | None:
        if self.dispatcher is None or self.passes_on:
            return None
        return self.dispatcher.reached(self.name)

    def misfit(self) -> str | None:
        asked: Any = getattr(self.module, "misfit", None)
        said: str | None = None if asked is None else asked(self.host)
        return said

    def grow(self, changes: Changes) -> bool:
        asked: Any = getattr(self.module, "grow", None)
        if asked is None or not asked(self.host, changes):
            return False
        for name, p in self.named_parameters():
            if name in self.trained:  # transformers freezes it with the embedding that it resizes
                changes.do(p.requires_grad_, True)
        return True

    @property
    def brought(self) -> list[nn.Module]:
        return [self.module, self.seat]

    @property
    def entries(self) -> list[Entry]:
        """What the host calls on this side: (name, action) in order of execution."""
        return [] if self.dispatcher is None else self.dispatcher.entries

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        names = [i.name for i in later if i.host is self.host]
        self.side.enter(changes, self.host, (self.name, self.action), names)
        known = changes.get(self, "followers")
        changes.set(self, followers=[*known, *(name for name in names if name not in known)])
        self.attach(changes)

    def attach(self, changes: Changes) -> None:
        children = changes.of(self.host._modules)
        if self.name in children:
            return
        self.follow_host()
        children[self.name] = self.seat
        for name in changes.get(self, "followers"):  # optimizers number parameters by their order
            if name in children:
                children[name] = children.pop(name)

    def detach(self, changes: Changes) -> None:
        children = changes.of(self.host._modules)
        if self.name in children:
            names = [*children]
            followers = names[names.index(self.name) + 1 :]
            changes.set(self, followers=followers, left_at=place_of(self.host))
            del children[self.name]

    def leave(self, changes: Changes) -> None:
        self.detach(changes)
        self.side.leave(changes, self.host, self.name)

    step_aside = leave

    def step_back(self, changes: Changes, later: Iterable[Insertion]) -> None:
        self.enter(changes, later)

    def follow_host(self) -> None:
        """Bring a detached module to its host's device, dtype and train mode."""
        if self.attached:
            return
        if self.left_at is not None:  # else it has not been set aside
            now = place_of(self.host)
            new = follow(self.module.parameters(), self.left_at, now)
            if new is not None:
                self.module.to(device=new[0], dtype=new[1])
            self.left_at = now
        if self.module.training != self.host.training:
            self.module.train(self.host.training)

    @property
    def fold_rank(self) -> int:
        return 2 if self.side.before else 1

    def differs_beside(self, merged: Insertion, is_earlier: bool) -> bool:
        if self.fold_rank != merged.fold_rank:  # what is given to the host, what it gives
            return self.fold_rank < merged.fold_rank and self.action is not after
        return is_earlier and not (self.is_additive and merged.is_additive)

    def output_on(self, host: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        module = copy.deepcopy(self.module).to(dtype).eval()
        if self.side.before:
            args, kwargs = self.action(module, host, (x,), {})
            return type(host).forward(host, *args, **kwargs)
        return self.action(module, host, (x,), {}, type(host).forward(host, x))


class EndInsertion(Insertion):
    """A hook that runs when a call of the host ends, also by an error; it acts on no value.

    Args:
        host: the module; `host_name`: its name in the backbone.
        hook: called with (module, arguments, output or None).
    """

    passes_on = True

    def __init__(self, host: nn.Module, host_name: str, hook: Callable[..., None]) -> None:
        self.host, self.host_name, self.hook = host, host_name, hook
        self.handle: RemovableHandle | None = None

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        handle = add_forward_hook(changes, self.host, self.hook, always_call=True)
        changes.set(self, handle=handle)

    def leave(self, changes: Changes) -> None:
        take_off(changes, self.handle)

    def step_aside(self, changes: Changes) -> None:
        """It may stay: it acts on no value."""


def switch(changes: Changes, insertions: Iterable[Insertion], attached: bool) -> None:
    """Attach or detach all of `insertions`, in this order."""
    for insertion in insertions:
        if attached:
            insertion.attach(changes)
        else:
            insertion.detach(changes)


def acts_on_whole_batches(insertion: Insertion) -> InsertionError:
    """The refusal to route what cannot act row by row."""
    name, host_name = insertion.name, insertion.host_name
    what = f"puts in the place of {name!r} in {host_name!r}"
    if insertion.fuses:
        what = f"makes by {name!r} of the others on {host_name!r}"
    return InsertionError(
        f"What this delta {what} acts on a whole batch, not row by row: such a delta cannot be "
        "routed. Construct it with exclude_modules for that module."
    )
