"""What may be folded into a backbone: what computes the same then, beside all that acts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from opendelta.delta.delta import Delta
from opendelta.delta.registry import every_method
from opendelta.delta.switching import is_merged
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import hidden_of
from opendelta.ground.examples import example_input
from opendelta.ground.names import dotted
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.hosts import require_hosts
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.merged_weight import Fold, MergedWeight

_SMALL = 1 << 22  # hosts of up to so many values are tried in float64


def _can_be_merged(method: type[Delta]) -> bool:
    return method.folds is not Delta.folds or method.merges_into is not None


def require_mergeable(delta: Delta) -> None:
    name = type(delta).__name__
    if not _can_be_merged(type(delta)):
        raise InsertionError(
            f"{name} cannot be merged: what it computes is no change of the backbone's weights. "
            f"{', '.join(m.__name__ for m in every_method().values() if _can_be_merged(m))} can be."
        )
    if is_merged(delta):
        raise InsertionError(
            f"This {name} is merged into its backbone's weights: unmerge() it first."
        )
    if not all(i.attached for i in delta.insertions if i.content is not None):
        raise InsertionError(
            f"This {name} is not attached, or only in part: attach() it, then merge."
        )
    require_hosts(delta.backbone_model, delta.insertions)
    _require_reached(delta)
    computed = [i for i in delta.insertions if i.content is not None and is_parametrized(i.host)]
    if computed:
        raise InsertionError(
            f"{computed[0].host_name!r} is parametrized (weight norm and the like): its weight is "
            "computed anew from other parameters whenever it is used, so there is none to merge "
            "into. Keep the delta, or leave such modules out with exclude_modules. Nothing was "
            "merged."
        )


def _require_reached(delta: Delta) -> None:
    """Refuse modules that no forward called, while others of the delta were.

    Raises:
        InsertionError: naming them.
    """
    seen = [i for i in delta.insertions if i.reached is not None]
    never = list(dict.fromkeys(i.host_name for i in seen if not i.reached))
    if not never or len(never) == len({i.host_name for i in seen}):
        return
    shown = ", ".join(map(repr, never[:5])) + f" and {len(never) - 5} more" * (len(never) > 5)
    raise InsertionError(
        f"Forwards called other modules of this {type(delta).__name__} and never {shown}. Where "
        "the model reads such weights past the modules, the delta has had no effect, and merging "
        "would give it one. Run a forward that calls them (in eval mode, where no layer is skipped "
        "by chance), or construct the delta with exclude_modules for them. Nothing was merged."
    )


def _require_same(fold: Fold, host: nn.Module, made: dict[str, Tensor]) -> None:
    """Refuse a fold after which the host does not compute what it does with the delta.

    Args:
        fold: what is folded in.
        host: the twin of its host before it; `made`: its parameters after it.

    Raises:
        InsertionError: if it computes something else, or that cannot be told.
    """
    if not all(bool(value.isfinite().all()) for value in made.values()):
        return  # which shows nothing, and is the business of `safe`
    insertion = fold.insertion
    if insertion.module is None and all(
        name == insertion.name and torch.equal(value.to(insertion.content), insertion.content)
        for name, value in made.items()
    ):
        return  # the very parameter that acts
    reason = "would not compute what the delta does"
    small = sum(p.numel() for p in host._parameters.values() if p is not None) < _SMALL
    dtype = torch.float64 if small else torch.float32
    before = _in_dtype(host, host._parameters, dtype)
    after = _in_dtype(host, {**host._parameters, **made}, dtype)
    x = None if getattr(host, "max_norm", None) is not None else example_input(before, dtype)
    if x is not None and insertion.module is not None:
        try:
            bare = hidden_of(type(host).forward(before, x))
            expected = hidden_of(insertion.output_on(before, x, dtype))
            folded = hidden_of(type(host).forward(after, x))
        except Exception as error:  # a host that takes other inputs, whatever it says of this one
            reason = f"cannot be tried on an example ({type(error).__name__}: {error!s:.80})"
        else:
            added = (expected - bare).abs().max()
            slack = 1e-3 * added + (1e-10 if small else 1e-5) * bare.abs().max()
            if bool((folded - expected).abs().max() <= slack):
                return
    raise InsertionError(
        f"{insertion.host_name!r} ({type(insertion.host).__name__}) {reason} with the parameters "
        f"{', '.join(made)} that {type(fold.delta).__name__}.folds gives: either the layer does "
        "more to its input than its kind does, or the method folds wrongly. The delta can be "
        "detached and saved, but not merged. Nothing was merged."
    )


class Check:
    """What is asked of each fold of a host while `delta` is folded in."""

    def __init__(
        self, delta: Delta, state: BackboneState, candidates: Mapping[str, MergedWeight]
    ) -> None:
        self.delta, self.state, self.candidates = delta, state, candidates

    def __call__(self, fold: Fold, twin: nn.Module, made: dict[str, Tensor]) -> None:
        for name in made.keys() - self.candidates.keys():
            full_name = dotted(fold.insertion.host_name, name)
            MergedWeight(twin, name, full_name, self.state.slots.get(full_name))  # it refuses
        if fold.delta is self.delta:
            _require_same(fold, twin, made)


def _in_dtype(host: nn.Module, parameters: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A twin of a host with parameters and buffers of a dtype, where they are floats."""
    twin = copy.copy(host)

    def cast_(tensor: Any) -> Any:
        return tensor if tensor is None or not tensor.is_floating_point() else tensor.to(dtype)

    twin._parameters = {
        name: None if p is None else nn.Parameter(cast_(p.detach()), requires_grad=False)
        for name, p in parameters.items()
    }
    twin._buffers = {name: cast_(buffer) for name, buffer in host._buffers.items()}
    return twin


def require_neutral(delta: Delta, state: BackboneState) -> None:
    """Refuse to fold a delta in, or out, where it or another one then acts otherwise than before.

    Whether others are attached does not matter, for they may be attached later.

    Raises:
        InsertionError: naming what acts and what is merged.
    """
    order = {id(insertion): number for number, insertion in enumerate(state.insertions)}
    folds = [fold for host in state.merged.values() for fold in host.folds]
    folded = [fold.insertion for fold in folds if fold.delta is not delta]
    mine = [insertion for insertion in delta.insertions if insertion.folds]
    apart = {id(insertion) for insertion in (*folded, *delta.insertions)}
    others = [insertion for insertion in state.insertions if id(insertion) not in apart]
    for around, merged, reads in ((others, mine, True), (mine, folded, False)):
        on: dict[int, list[Insertion]] = defaultdict(list)
        for insertion in merged:
            on[id(insertion.host)].append(insertion)
        for acts, other in ((a, m) for a in around for m in on[id(a.host)]):
            differs = acts.differs_beside(other, order[id(acts)] < order[id(other)])
            if differs or (reads and acts.reads_host and other.module is not None):
                raise _not_beside(acts, other)
    for fold in folds:
        for insertion in mine if fold.delta is not delta else ():
            require_uncovered(fold, insertion)


def require_uncovered(fold: Fold, acts: Insertion) -> None:
    """Refuse where what acts stands in the place of a parameter that another fold changes."""
    apart = acts.slot is None or fold.insertion.slot is acts.slot
    if not apart and acts.name in fold.names and fold.insertion.host in acts.places:
        raise _not_beside(acts, fold.insertion)


def _not_beside(acts: Insertion, merged: Insertion) -> InsertionError:
    return InsertionError(
        f"{dotted(acts.host_name, acts.name)} does not act beside a merged {merged.name!r} as it "
        "does where that acts by itself. Merge what acts nearer to the module (a parameter, "
        "then what was put on earlier) first and unmerge it last; where that is refused too, "
        "remove() one of them, or construct them in the other order. Nothing was changed."
    )
