"""How a method puts its modules and parameters on a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opendelta.delta.plan import Plan
from opendelta.delta.record import record_of
from opendelta.exceptions import InsertionError
from opendelta.mechanism import dispatch
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher, Dispatcher
from opendelta.mechanism.ownership import inserted_names


def _sides(method: str, delta: nn.Module) -> list[tuple[type[Dispatcher], Callable[..., Any]]]:
    """The dispatchers that call `delta` for a `method` of `insert_module`, and how."""
    pre, post = hasattr(delta, "pre_forward"), hasattr(delta, "post_forward")
    before = (BeforeDispatcher, dispatch.before)
    after = (AfterDispatcher, dispatch.after)
    table: dict[str, list[tuple[type[Dispatcher], Callable[..., Any]]]] = {
        "before": [before],
        "after": [after],
        "sequential": [before] * pre + [after] * (post or not pre),
        "parallel": [(AfterDispatcher, dispatch.parallel)],
        "onto": [(AfterDispatcher, dispatch.onto)],
        "fuse": [(AfterDispatcher, dispatch.fuse)],
    }
    if method not in table:
        raise InsertionError(f"method={method!r}: expected one of {', '.join(map(repr, table))}.")
    return table[method]


class Inserting(nn.Module):
    """The part of a delta that inserts: what is not planned with others is carried out at once."""

    @property
    def plan(self) -> Plan:
        """What the delta is about to do; a new one while nothing is planned."""
        made: Plan = record_of(self).plan or Plan(self)
        return made

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """(input, output) width of a module to be modified.

        Read off its attributes, or under common structure those of its projections, else measured
        by one forward for all targets together.

        Raises:
            InsertionError: if neither is possible.
        """
        return self.plan.widths(module)

    def insert_module(
        self,
        module: nn.Module,
        method: str = "sequential",
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """Insert a delta module before, after, around or beside a module of the backbone.

        The module's own ``forward``, signature and docstring stay as they are.

        Args:
            module: the module to modify.
            method: ``"before"``: the input passes through ``delta_module`` first
                (``pre_forward(*args, **kwargs)`` if it has that); ``"after"``: the output does
                (``post_forward(output)``); ``"sequential"``: before if it has ``pre_forward``,
                after if it has ``post_forward`` or neither; ``"parallel"``:
                ``delta_module(*args, **kwargs)`` is added to the output; ``"onto"``: the output
                becomes ``delta_module(output, input)``, a mere addition unless the module says
                ``is_additive = False``; ``"fuse"``: it becomes
                ``delta_module(output, others)``, where ``others`` maps the names of the deltas
                before it on the module to callables of what they make of an output.
            delta_module: what to insert.
            delta_name: the name under which it sits on `module`; ``_1``, ``_2`` are appended
                where deltas of that name are there already.
            strict: refuse a module that carries a delta already.
            _delta_info: a dict whose entries override the arguments of the same name.

        Raises:
            InsertionError: for an unknown method, a name that would shadow an attribute, a module
                that is not the backbone's, or (`strict`) one that is modified already.
        """
        info = {"method": method, "delta_module": delta_module, "delta_name": delta_name}
        info |= {key: value for key, value in (_delta_info or {}).items() if key in info}
        delta = info["delta_module"]
        if not isinstance(delta, nn.Module):
            raise InsertionError(
                f"delta_module is a {type(delta).__name__}; expected the nn.Module to insert."
            )
        if strict and inserted_names(module):
            raise InsertionError(
                f"{record_of(self).targeting.name_of(module)!r} carries "
                f"{', '.join(inserted_names(module))} already, and strict=True allows one delta on "
                "a module."
            )
        with self.planning() as plan:
            for side, action in _sides(str(info["method"]), delta):
                plan.insert(module, delta, str(info["delta_name"]), side, action)

    def insert_sequential_module(
        self,
        module: nn.Module,
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """`insert_module` with ``method="sequential"``: before or after the module."""
        self.insert_module(module, "sequential", delta_module, delta_name, strict, _delta_info)

    def insert_parallel_module(
        self,
        module: nn.Module,
        delta_module: nn.Module | None = None,
        delta_name: str = "delta",
        strict: bool = False,
        _delta_info: dict[str, Any] | None = None,
    ) -> None:
        """`insert_module` with ``method="parallel"``: its result is added to the output."""
        self.insert_module(module, "parallel", delta_module, delta_name, strict, _delta_info)

    def insert_action(
        self,
        module: nn.Module,
        delta_module: nn.Module,
        delta_name: str,
        side: type[Dispatcher],
        action: Callable[..., Any],
    ) -> None:
        """Insert a delta module that a dispatcher of `module` calls through `action`.

        The general form of `insert_module`, for methods with an action of their own (a function
        of a module, so that it can be pickled).
        """
        with self.planning() as plan:
            plan.insert(module, delta_module, delta_name, side, action)

    def insert_parameter(
        self,
        module: nn.Module,
        name: str,
        value: Tensor | None = None,
        trains: bool = True,
        saved: bool = True,
    ) -> None:
        """Put a parameter of the delta in the place of one of a module's.

        It acts while the delta is attached; detaching puts the module's own back. Where modules
        share the parameter, all of them get it. Keys stay ``<module>.<name>``.

        Args:
            module: a module of the backbone.
            name: which of its parameters, such as ``"weight"``.
            value: what it starts as, of the same shape; None for a copy of the module's own.
            trains: whether it is trained.
            saved: whether files hold it.

        Raises:
            InsertionError: if the module has no such parameter, or one of another shape.
        """
        with self.planning() as plan:
            own = module._parameters.get(name)
            host_name = plan.targeting.name_of(module)
            if own is None:
                there = [n for n, p in module._parameters.items() if p is not None]
                raise InsertionError(
                    f"{host_name!r} ({type(module).__name__}) has no parameter {name!r} whose "
                    f"place another could take; it has {there}."
                )
            if value is not None and value.shape != own.shape:
                raise InsertionError(
                    f"A parameter of shape {tuple(value.shape)} cannot take the place of {name!r} "
                    f"of {host_name!r}, whose shape is {tuple(own.shape)}."
                )
            start = own.detach().clone() if value is None else value.detach().to(own)
            places = plan.holders(name)[id(own)]
            plan.put_parameter(places, name, nn.Parameter(start, trains), saved=saved)

    def replace_module(
        self,
        parent_module: nn.Module,
        child_name: str,
        child_module: nn.Module,
        new_module: nn.Module,
        delta_name: str | None = "delta",
    ) -> None:
        """Put `new_module` in the place of a child; detaching puts the original back.

        Args:
            parent_module: a module of the backbone.
            child_name: the child's name in it.
            child_module: the child that is replaced.
            new_module: the delta module.
            delta_name: a name for messages only.

        Raises:
            InsertionError: if the child is not there under that name.
        """
        if parent_module._modules.get(child_name) is not child_module:
            raise InsertionError(
                f"{type(parent_module).__name__} has no child {child_name!r} that is the given "
                f"{type(child_module).__name__} (for delta {delta_name!r})."
            )
        with self.planning() as plan:
            plan.replace(parent_module, child_name, new_module)

    def planning(self) -> Planning:
        """A ``with`` block that adds to the plan being made, or carries one out at its end."""
        return Planning(self)


class Planning:
    """The ``with`` block of `Delta.planning`."""

    def __init__(self, delta: nn.Module) -> None:
        self.delta = delta

    def __enter__(self) -> Plan:
        running = record_of(self.delta).plan
        self.own = None if running is not None else Plan(self.delta)
        return running or self.own  # type: ignore[return-value]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.own is not None and kind is None:
            self.own.carry_out()
