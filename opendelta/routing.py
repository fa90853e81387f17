"""Mixed batches: each row of a batch computed with a delta of its own.

While a route is in force, a module's dispatchers hand over to it. It runs for each named delta what
they would run, on that delta's rows alone, and puts the rows together again. A method that can do
several deltas at once says how, in a function `routed` of its delta module's class::

    routed(layers, rows, host, args, kwargs[, output]) -> what an action returns

where ``layers`` holds the module of each delta and `Rows` tells which row is whose. What a delta
puts in the place of a parameter needs that function too, and `sites`, see `BiasInsertion`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.sharding import full_shape
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import reads_without_calling
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.blocks import undone
from opendelta.ground.containers import Args, Kwargs, first_hidden
from opendelta.ground.seams import is_running, runs_backward
from opendelta.ground.walk import every_module, named_tensors, uncompiled
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.backbone_state import deltas as deltas_of
from opendelta.mechanism.calls import picking
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.dispatch import Dispatcher
from opendelta.mechanism.hooks import add_forward_hook, take_off
from opendelta.mechanism.insertion import acts_on_whole_batches
from opendelta.mechanism.ownership import STANDS_FOR, own_modules, twin_of
from opendelta.mechanism.rows import Rows, joined, selected

Entry = tuple[str, Callable[..., Any]]  # of a dispatcher
Step = tuple[Callable[..., Any], nn.Module]  # an action and the delta module that it runs


@contextmanager
def route(backbone: nn.Module, deltas: Sequence[DeltaBase | None]) -> Iterator[None]:
    """Compute each row of a batch with its own delta, for the time of a ``with`` block.

    The deltas that are named act on their rows, attached or not, and no others act. Forwards give
    what each row gives alone with its delta, gradients too. In ``generate``, where a row becomes
    several (beams, returned sequences), all of them have its delta. A route holds for the thread
    or task that enters it; an inner one takes the place of an outer one. Gradient checkpointing
    runs the forward again, so that then ``backward`` belongs inside the block. Compiled models run
    eagerly there.

    Rows are told by the first dimension. A module that is called with several entries for each
    row (tokens in line, windows of an image) must hold those of one row next to each other.

    Args:
        backbone: the model, or one that wraps it.
        deltas: for each row a delta of this backbone, or None for the bare backbone.

    Raises:
        ConfigError: on entry for an empty list, or an entry that is neither a delta nor None; in
            the forward if the batch is not as long as the list.
        InsertionError: on entry for a delta that is not on this backbone (any more) or does not
            act row by row, or if the rows would get different numbers of soft prompt tokens; in
            the forward if a module is called with something that does not consist of the rows, or
            in training if its buffers (running statistics) are other ones for some rows.

    Example:
        >>> with opendelta.route(model, [delta_zh, delta_fr, None, delta_zh]):
        ...     logits = model(**batch_of_four).logits
    """
    if any(isinstance(module, nn.DataParallel) for module in backbone.modules()):
        raise InsertionError(
            "route() does not reach the replicas of nn.DataParallel. Route on the model inside, or "
            "use one process for each device."
        )
    made = Route(uncompiled(backbone), _checked(deltas, deltas_of(backbone)))
    with undone(made.leave):
        made.enter()
        yield


def _checked(deltas: Sequence[DeltaBase | None], here: list[DeltaBase]) -> list[DeltaBase | None]:
    """The entries as a list, if all can be routed on the backbone whose deltas are `here`."""
    if not isinstance(deltas, (list, tuple)) or not deltas:
        raise ConfigError(
            f"route() takes a list with a delta, or None, for each row of the batch; "
            f"not {deltas!r:.80}."
        )
    for row, delta in enumerate(deltas):
        if delta is None:
            continue
        if any(delta is other for other in here):
            if delta.is_merged:
                raise InsertionError(
                    f"This {type(delta).__name__} is merged into its backbone's weights: "
                    "unmerge() it first."
                )
            continue
        what = f"deltas[{row}] is a {type(delta).__name__}"
        if not isinstance(delta, DeltaBase):
            raise ConfigError(f"{what}; expected a delta, or None for the bare backbone.")
        raise InsertionError(
            f"{what} that is not on this backbone, or was removed from it. "
            f"opendelta.deltas(backbone) lists the {len(here)} that are."
        )
    counts = [0 if delta is None else delta.added_positions for delta in deltas]
    if len(set(counts)) > 1:
        raise InsertionError(
            f"Soft prompts would make the rows of this batch longer by {counts} tokens. Rows of "
            "one batch are equally long: route soft prompts of one length together, on every row."
        )
    return list(deltas)


class Route:
    """One list of deltas for the rows of one backbone.

    Args:
        backbone: the model whose forwards get such batches.
        deltas: for each row its delta, or None.

    Raises:
        InsertionError: if one of the deltas does not act row by row.
    """

    def __init__(self, backbone: nn.Module, deltas: list[DeltaBase | None]) -> None:
        self.backbone, self.deltas = backbone, deltas
        self.names = {id(m): name for name, m in own_modules(backbone, originals=True)}
        self.modules: dict[int, dict[str, tuple[DeltaBase, nn.Module]]] = {}
        self.parameters: dict[nn.Module, dict[Any, dict[DeltaBase, Any]]] = {}
        self.stand_ins: dict[nn.Module, dict[DeltaBase | None, nn.Module]] = {}
        self.with_buffers: set[nn.Module] = set()  # modules whose buffers some of them moved
        self._rows: dict[tuple[DeltaBase | None, ...], Rows] = {}
        self.handles: list[RemovableHandle] = []
        self.bared: list[Callable[[Changes], None]] = []  # what puts back what stands aside
        for delta in dict.fromkeys(delta for delta in deltas if delta is not None):
            for insertion in delta.insertions:
                if insertion.fuses:
                    raise acts_on_whole_batches(insertion)
                sites = insertion.sites(self._is_called)
                if sites is None and insertion.module is not None:
                    insertion.follow_host()
                    on_host = self.modules.setdefault(id(insertion.host), {})
                    on_host[insertion.name] = delta, insertion.module
                for site in sites or ():
                    if insertion.of_method:
                        kinds = self.parameters.setdefault(site, {})
                        kinds.setdefault(_routed(insertion), {})[delta] = insertion
                    else:
                        known = self.stand_ins.setdefault(site, {})
                        known[delta] = insertion.stand_in(known.get(delta, site))
        for site, stand_ins in self.stand_ins.items():
            self._require_alike(site, stand_ins)

    def _require_alike(self, site: nn.Module, stand_ins: dict[DeltaBase | None, nn.Module]) -> None:
        """Refuse what cannot compute a share of the rows in the stead of a module.

        Raises:
            InsertionError: for modules of different sizes, naming two deltas, and for one whose
                parts run other deltas of this batch.
        """
        each = {delta: stand_ins.get(delta, site) for delta in dict.fromkeys(self.deltas)}
        shapes = {d: {n: full_shape(t) for n, t in named_tensors(m)} for d, m in each.items()}
        one, *others = each
        other = next((d for d in others if shapes[d] != shapes[one]), one)
        if other is not one:
            said = [
                "the bare backbone" if d is None else f"{type(d).__name__} {self.deltas.index(d)}"
                for d in (one, other)
            ]
            raise InsertionError(
                f"{self.name_of(site)!r} has other sizes in {said[0]} than in {said[1]} of this "
                "batch, so their rows cannot be put together: run them apart."
            )
        inside = {id(m) for own in stand_ins.values() for m in every_module(own)} - {id(site)}
        if inside & (self.modules.keys() | {id(m) for m in (*self.parameters, *self.stand_ins)}):
            raise InsertionError(
                f"{self.name_of(site)!r} holds modules that carry deltas of this batch, and a "
                "parameter of its own that one of them replaces: run the rows apart."
            )

    def _is_called(self, module: nn.Module) -> bool:
        """Whether a module's forward runs, rather than its parent reading its weight."""
        return not reads_without_calling(self.backbone, self.name_of(module))

    def name_of(self, module: nn.Module) -> str:
        """The name of a module of the backbone."""
        return self.names[id(module)]

    def __reduce__(self) -> NoReturn:
        raise InsertionError(
            "A backbone cannot be copied or pickled within route(): its hooks for this batch would "
            "go along. Leave the `with` block first."
        )

    def rows(self, deltas: Iterable[DeltaBase | None]) -> Rows:
        """Which of `deltas` acts on which row."""
        key = tuple(deltas)
        if key not in self._rows:
            numbers = {delta: number for number, delta in enumerate(key)}
            of_row = [numbers.get(delta, len(key)) for delta in self.deltas]
            self._rows[key] = Rows(of_row, len(key), self.name_of)
        return self._rows[key]

    # --- delta modules ----------------------------------------------------------------------

    def run(self, entries: list[Entry], host: nn.Module, state: Any) -> Any:
        """Run the entries of a dispatcher of `host`, each on its delta's rows.

        Args:
            state: ``(args, kwargs)`` before the forward, ``(args, kwargs, output)`` after it.

        Returns:
            The new state.
        """
        named = self.modules.get(id(host), {})
        kinds: dict[Any, dict[DeltaBase, list[Step]]] = {}
        for name, action in entries:
            if name in named:
                delta, module = named[name]
                chains = kinds.setdefault(_routed(module), {})
                chains.setdefault(delta, []).append((action, module))
        for routed, chains in kinds.items():
            rows = self.rows(chains)
            if rows.all_one:
                (steps,) = chains.values()
                state = _chained(steps, host, state)
            elif routed is None:
                state = self._apart(list(chains.values()), rows, host, state)
            else:
                layers = [module for ((_, module),) in chains.values()]
                state = _step(partial(routed, layers, rows), host, state)
        return state

    def _apart(self, chains: list[list[Step]], rows: Rows, host: nn.Module, state: Any) -> Any:
        """Run each delta's steps on its rows, and put the rows together again."""
        hidden = first_hidden(*state[:2])
        members, inverse = rows.members(hidden.device, rows.repeats(hidden, host))
        numbered = enumerate(zip(members, [*chains, []], strict=True))
        shares = [(number, m, steps) for number, (m, steps) in numbered if len(m)]
        before = [selected(state, m, len(hidden)) for _, m, _ in shares]
        after = []
        for part, (number, _, steps) in zip(before, shares, strict=True):
            with picking(partial(rows.share, number)):
                after.append(_chained(steps, host, part))
        try:
            return joined(state, before, after, [len(m) for _, m, _ in shares], inverse)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InsertionError(
                f"{self.name_of(host)!r}: what the deltas of this batch make of its rows is of "
                f"different kinds and cannot be put together ({error}). Run them apart."
            ) from error

    # --- the batch, and parameters ----------------------------------------------------------

    # Another thread may take these hooks off while one of torch's calls is about to run them, which
    # then hands them no keyword arguments.

    def enter(self) -> None:
        """Be in force in this thread: dispatchers and the hooks of this batch ask this route."""
        with one_at_a_time():
            changes = Changes()
            options = {"first": True, "with_kwargs": True}
            backbone, check, give = self.backbone, self._check_batch, self._give_parameters
            made = [add_forward_hook(changes, backbone, check, before=True, **options)]
            bared = []
            if all(other.backbone is not backbone for other in _IN_FORCE):
                bared = _hold_bare(changes, deltas_of(backbone))
                bared += _share_buffers(changes, backbone, [*dict.fromkeys(self.deltas)])
            self._give_buffers(changes)
            sites = dict.fromkeys((*self.parameters, *self.stand_ins))
            made += [add_forward_hook(changes, site, give, **options) for site in sites]
            changes.set(self, handles=made, bared=bared)
            if not _STANCES and "torch._dynamo" in sys.modules:  # compiled code does not ask
                _STANCES.append(torch.compiler.set_stance("force_eager"))
            changes.do(setattr, Dispatcher, "router", find)
            changes.do(_IN_FORCE.append, self)
            changes.carry_out()
        _ROUTES.set((*_ROUTES.get(), self))

    def leave(self) -> None:
        """Be in force no longer; may be called again."""
        _ROUTES.set(tuple(other for other in _ROUTES.get() if other is not self))
        with one_at_a_time():
            left = [other for other in _IN_FORCE if other is not self]
            if len(left) < len(_IN_FORCE):
                changes = Changes()
                for handle in self.handles:
                    take_off(changes, handle)
                heir = next((other for other in left if other.backbone is self.backbone), None)
                if heir is not None:
                    changes.set(heir, bared=[*heir.bared, *self.bared])
                else:
                    for put_back in self.bared:
                        put_back(changes)
                if not left:
                    changes.do(setattr, Dispatcher, "router", None)
                changes.do(_IN_FORCE.remove, self)
                changes.carry_out()
            if not _IN_FORCE and _STANCES:
                _STANCES.pop().__exit__(None, None, None)

    def _check_batch(self, module: nn.Module, args: Args, kwargs: Kwargs = {}) -> None:  # noqa: B006
        """Before the backbone: compare the batch with the list."""
        values = (*args, *kwargs.values())
        sizes = [len(v) for v in values if isinstance(v, Tensor) and v.dim() > 1]
        if self is not _innermost(lambda other: other.backbone is module) or not sizes:
            return
        count, given = len(self.deltas), sizes[0]
        if given != count and (given % count or not is_running("generate")):
            raise ConfigError(
                f"The batch has {given} rows and route() was given {count} deltas: name one for "
                "each row, None for the bare backbone."
            )

    def _give_parameters(
        self, host: nn.Module, args: Args, kwargs: Kwargs, output: Any = None
    ) -> Any:
        """After a module that deltas have replaced, or parameters of it: give each row its own."""
        if find(host) is not self:
            return None
        if host.training and host in self.with_buffers:
            raise InsertionError(
                f"{self.name_of(host)!r} ({type(host).__name__}) has other buffers for some rows "
                "of this batch than for others, and training would move them by all rows "
                "together: train one delta at a time, or set this module to eval()."
            )
        if host in self.stand_ins:
            stand_ins = self.stand_ins[host]
            rows, state = self.rows(stand_ins), (args, kwargs, output)
            chains: list[list[Step]] = [[(_instead, module)] for module in stand_ins.values()]
            if rows.all_one:
                output = _chained(chains[0], host, state)[2]
            else:
                output = self._apart(chains, rows, host, state)[2]
        for routed, insertions in self.parameters.get(host, {}).items():
            rows = self.rows(insertions)
            output = routed([*insertions.values()], rows, host, args, kwargs, output)
        return output

    def _give_buffers(self, changes: Changes) -> None:
        """Have stand-ins for modules whose buffers are other ones for some rows."""
        for state in BackboneState.within(self.backbone):
            for delta in dict.fromkeys(self.deltas):
                for module, twin in state.buffers.stand_ins(changes, delta).items():
                    known = self.stand_ins.setdefault(module, {})
                    if STANDS_FOR in known.get(delta, module).__dict__:
                        continue  # which has buffers of its own
                    known[delta] = twin_of(known.get(delta, module), _buffers=twin._buffers)
                    self.with_buffers.add(module)


def _routed(inserted: Any) -> Any:
    """How several of a kind act on a batch at once; None where each must on its rows alone."""
    return getattr(type(inserted), "routed", None)


def _instead(module: nn.Module, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """What a stand-in gives for what its host was given."""
    return module(*args, **kwargs)


def _step(action: Callable[..., Any], host: nn.Module, state: Any) -> Any:
    """The state after an action (without its delta): new arguments, or a new output."""
    result = action(host, *state)
    return result if len(state) == 2 else (*state[:2], result)


def _chained(steps: list[Step], host: nn.Module, state: Any) -> Any:
    for action, module in steps:
        state = _step(partial(action, module), host, state)
    return state


# --- what is in force -----------------------------------------------------------------------------

_ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("opendelta_routes", default=())
_IN_FORCE: list[Route] = []  # of all threads
_STANCES: list[Any] = []  # that of torch.compile, while a route is in force


def _innermost(holds: Callable[[Route], bool]) -> Route | None:
    """The route entered last, of those in force in this thread, for which `holds` is true."""
    routes: Sequence[Route] = _ROUTES.get()
    if not routes and runs_backward():
        routes = _IN_FORCE  # a backward that runs a forward again, in a thread of the engine's
    return next((made for made in reversed(routes) if holds(made)), None)


def find(host: nn.Module) -> Route | None:
    """The route that is in force for a module of a backbone."""
    return _innermost(lambda made: id(host) in made.names)


def _hold_bare(changes: Changes, deltas: list[DeltaBase]) -> list[Callable[[Changes], None]]:
    """Set aside what deltas have in the place of a backbone's parameters and modules.

    Returns:
        What puts it back.
    """
    insertions = [i for delta in deltas for i in delta.insertions]
    slots = {id(slot): slot for i in insertions if (slot := i.slot or i.child_slot)}.values()
    for slot in slots:
        slot.hold_bare(changes, 1)
    return [partial(slot.hold_bare, more=-1) for slot in slots]


def _share_buffers(
    changes: Changes, backbone: nn.Module, deltas: list[DeltaBase | None]
) -> list[Callable[[Changes], None]]:
    """Let what these deltas moved of the backbone's buffers stand in place, if it is the same.

    Returns:
        What puts back what stood there.
    """
    every = [state.buffers for state in BackboneState.within(backbone)]
    for buffers in every:
        buffers.share(changes, deltas)
    return [partial(buffers.hold, deltas=None) for buffers in every]
