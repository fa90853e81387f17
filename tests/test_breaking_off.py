"""Ctrl-C at any line of the library, out-of-memory at any operation: wholly before or wholly after.

Nor does a delta act that `opendelta.deltas` does not list: removing all that are gives the bare
backbone again.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from cases import METHODS, randomise
from placed import digest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, LoraModel
from opendelta.dispatch import Dispatcher

MOST = int(os.environ.get("BREAKING_OFF_MOST", "300"))  # points in `make test-all`
PACKAGE = str(Path(opendelta.__file__).parent)


class Net(nn.Module):
    """As small as can be: two linears, two others that are tied, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.last(self.first(x).tanh())))


IDS = torch.tensor([[1, 2, 3], [4, 0, 1]])
ON_NET = {
    **{key: {"modified_modules": ["first", "last"]} for key in METHODS},
    "CompacterModel": {
        "modified_modules": ["first"],
        "reduction_factor": 2,
        "hypercomplex_division": 2,
    },
    "LowRankAdapterModel": {"modified_modules": ["first"], "reduction_factor": 2},
    "ParallelAdapterModel": {"modified_modules": ["first", "last"], "bottleneck_dim": 2},
}
ON_BERT = {  # what needs attention, or token ids
    "PrefixModel": {"prefix_token_num": 2, "embed_dim": 4, "mid_dim": 4},
    "SoftPromptModel": {"soft_token_num": 2, "trim_output": True},
}


def bare(method: str = "LoraModel") -> nn.Module:
    torch.manual_seed(0)
    if method not in ON_BERT:
        return Net().eval()
    config = BertConfig(
        vocab_size=5,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=8,
    )
    return BertModel(config).eval()


def new(method: str, model: nn.Module, make: Any = None, **more: Any) -> DeltaBase:
    torch.manual_seed(1)
    made = getattr(opendelta, method) if make is None else make
    delta: DeltaBase = made(model, **{**ON_NET, **ON_BERT}[method], **more)
    return delta


def owning(method: str, model: nn.Module) -> DeltaBase:
    return new(method, model, own_modules=["norm" if isinstance(model, Net) else "pooler"])


def placed(
    method: str, *acts: Callable[[DeltaBase], Any], make: Any = new
) -> tuple[nn.Module, DeltaBase]:
    model = bare(method)
    delta = make(method, model)
    randomise(delta)
    for act in acts:
        act(delta)
    return model, delta


def two(method: str, *acts: Callable[[DeltaBase], Any]) -> tuple[nn.Module, DeltaBase, DeltaBase]:
    model, first = placed(method)
    second = new(method, model)
    randomise(second, 0.5)
    for act in acts:
        act(first)
        act(second)
    return model, first, second


@cache
def saved(method: str, carries: bool = True) -> Path:
    """A file; one that `carries` a part of the backbone is refused by merged deltas."""
    folder = Path(tempfile.mkdtemp())
    model, delta = placed(method)
    if not carries:
        delta.freeze_module()
        delta.save_finetuned(folder)
        return folder
    others = ["norm"] if method not in ON_BERT else ["pooler"]
    delta.freeze_module(exclude=["deltas", *others])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if others[0] in name:
                p.add_(1)
    delta.save_finetuned(folder)
    return folder


# --- operations -----------------------------------------------------------------------------------

Made = tuple[Any, ...]
Operation = tuple[Callable[[], Made], Callable[..., Any]]  # what is there before, what is done


def in_block(name: str, model: nn.Module, delta: Any) -> None:
    with getattr(delta, name)():
        model(IDS)


def in_route(model: nn.Module, delta: DeltaBase, *_: Any) -> None:
    with opendelta.route(model, [delta, None]):
        model(IDS)


def merges(method: str) -> bool:
    _model, delta = placed(method)
    try:
        delta.merge()
    except opendelta.OpenDeltaError:
        return False
    return True


DETACH, MERGE = DeltaBase.detach, DeltaBase.merge
TIED = {"modified_modules": ["head"]}


def tied(*acts: Callable[[DeltaBase], Any]) -> tuple[nn.Module, DeltaBase]:
    model = bare()
    delta = LoraModel(model, modified_modules=["head"])
    randomise(delta)
    for act in acts:
        act(delta)
    return model, delta


def freeze(model: nn.Module, delta: DeltaBase) -> None:
    delta.freeze_module(exclude=["deltas", "norm" if isinstance(model, Net) else "pooler"])


def operations(method: str) -> dict[str, Operation]:
    on, cls = partial(placed, method), getattr(opendelta, method)
    folder = saved(method)
    kinds: dict[str, Operation] = {
        "construct": (lambda: (bare(method),), lambda m: new(method, m)),
        "construct a second": (on, lambda m, d: new(method, m)),
        "preview": (lambda: (bare(method),), lambda m: new(method, m, cls.preview)),
        "detach": (on, lambda m, d: d.detach()),
        "attach": (partial(on, DETACH), lambda m, d: d.attach()),
        "remove": (on, lambda m, d: d.remove()),
        "freeze": (on, freeze),
        "load": (lambda: (bare(method),), lambda m: AutoDeltaModel.from_finetuned(folder, m)),
        "load into": (
            partial(on, partial(freeze, bare(method))),
            lambda m, d: d.load_checkpoint(folder),
        ),
        "construct with its own": (lambda: (bare(method),), lambda m: owning(method, m)),
        "detach with its own": (partial(placed, method, make=owning), lambda m, d: d.detach()),
        "remove with its own": (partial(placed, method, make=owning), lambda m, d: d.remove()),
        "with detached": (on, partial(in_block, "detached")),
        "with attached": (partial(on, DETACH), partial(in_block, "attached")),
    }
    if method != "DoraModel":  # several of which do not add up
        kinds["combine"] = (
            partial(two, method),
            lambda m, a, b: opendelta.combine([a, b], weights=[1.0, 0.5]),
        )
    if method != "SoftPromptModel":  # whose rows are one longer
        kinds["route"] = (on, in_route)
    if merges(method):
        kinds |= {
            "merge": (on, lambda m, d: d.merge()),
            "unmerge": (partial(on, MERGE), lambda m, d: d.unmerge()),
            "remove a merged one": (partial(on, MERGE), lambda m, d: d.remove()),
            "merge for good": (on, lambda m, d: d.merge_and_remove()),
            "merge for good with its own": (
                partial(placed, method, make=owning),
                lambda m, d: d.merge_and_remove(),
            ),
            "load into a merged one": (
                partial(on, MERGE),
                lambda m, d: d.load_checkpoint(saved(method, carries=False)),
            ),
        }
        if method not in ("BitFitModel", "DoraModel"):  # of which two on one module cannot be
            kinds["unmerge one of two"] = (
                partial(two, method, MERGE),
                lambda m, a, b: b.unmerge(),
            )
    if method == "LoraModel":
        untie = partial(MERGE, untie=True)
        kinds["merge where it is tied"] = (tied, lambda m, d: d.merge(untie=True))
        kinds["unmerge where it was tied"] = (partial(tied, untie), lambda m, d: d.unmerge())
    return kinds


# --- faults ---------------------------------------------------------------------------------------


class Interrupt:
    """KeyboardInterrupt at the n-th line of the library that is run in its block."""

    def __init__(self, at: int) -> None:
        self.at, self.where = at, ""
        self.seen: list[str] = []  # which functions' lines

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            code = frame.f_code
            self.seen.append(code.co_name)
            if len(self.seen) == self.at:
                self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
                raise KeyboardInterrupt
        return self.line

    def __enter__(self) -> Interrupt:
        self.was = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.was)


class OutOfMemory(TorchDispatchMode):
    """OutOfMemoryError at the n-th tensor operation in its block."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.where = at, ""
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        if len(self.seen) == self.at:
            self.where = f"{func} (operation {self.at})"
            raise torch.OutOfMemoryError("tried")
        return func(*args, **(kwargs or {}))


# --- what is seen of a backbone -------------------------------------------------------------------


def seen(model: nn.Module) -> dict[str, Any]:
    """All but identities."""
    with torch.no_grad():
        out = model(IDS)
    output = out if isinstance(out, Tensor) else out.last_hidden_state
    named = [*model.named_parameters(remove_duplicate=False)]
    modules = [*model.named_modules(remove_duplicate=False)]
    return {
        "output": digest(output),
        "keys": [*model.state_dict()],
        "values": {name: digest(p) for name, p in named},
        "ties": [[n for n, q in named if q is p] for _, p in model.named_parameters()],
        "requires_grad": {name: p.requires_grad for name, p in named},
        "modules": {name: (type(m).__name__, m.training) for name, m in modules},
        "hooks": {
            name: {kind: len(table) for kind, table in vars(m).items() if kind.endswith("_hooks")}
            for name, m in modules
        },
        "deltas": [(d.delta_type, d.is_attached, d.is_merged) for d in opendelta.deltas(model)],
        "router": Dispatcher.router is None,
        "modes": (torch.is_grad_enabled(), torch.empty(0).device, len(warnings.filters)),
        "another delta": another(),
    }


def another() -> list[Any]:
    """What a delta does to another backbone."""
    model = nn.Sequential(nn.Linear(1, 1))
    with torch.random.fork_rng(devices=[]):
        LoraModel(model, 1, modified_modules=["0"])
    return [name for name, _ in model.named_parameters()]


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def torn_points(
    operation: Operation, fault: Any, most: int, of: Container[str] | None = None
) -> tuple[int, list[str]]:
    """At how many points an operation was broken off, and what was wrong after which.

    `most` of all points, spread evenly; or of the lines of the functions named in `of`.
    """
    setup, act = operation
    things = setup()
    bare_one = type(things[0]) is Net
    plain = seen(bare() if bare_one else bare("PrefixModel"))
    before = seen(things[0])
    with seeded():
        act(*things)
    after = seen(things[0])
    things = setup()
    with seeded(), fault(0) as counted:
        act(*things)
    numbered = enumerate(counted.seen, 1)
    points = [at for at, name in numbered if of is None or name in of]
    points = points[:: max(1, -(-len(points) // most))]
    torn = []
    for at in points:
        things = setup()
        model = things[0]
        with seeded():
            try:
                with fault(at) as broken:
                    act(*things)
            except (KeyboardInterrupt, torch.OutOfMemoryError, opendelta.OpenDeltaError):
                pass
        now = seen(model)
        if now not in (before, after):
            parts = [part for part in now if now[part] not in (before[part], after[part])]
            torn.append(f"{broken.where}: {parts or 'a mixture'}")
        if not act_is_final(before, after):
            for delta in opendelta.deltas(model):
                delta.remove()
            rest = seen(model)
            left = [part for part in rest if rest[part] != plain[part]]
            if left and not set(left) <= loaded(after, plain):
                torn.append(f"{broken.where}: removing all deltas leaves {left}")
    return len(points), torn


def act_is_final(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether it left its effect in the weights for good."""
    return bool(before["deltas"]) and not after["deltas"] and before["values"] != after["values"]


def loaded(after: dict[str, Any], plain: dict[str, Any]) -> set[str]:
    """What differs of a backbone whose own values a file carries."""
    own = {name: value for name, value in after["values"].items() if name in plain["values"]}
    return set() if own == plain["values"] else {"output", "values"}


FAULTS = pytest.mark.parametrize("fault", [Interrupt, OutOfMemory])
QUICK = {  # one operation of each kind
    **dict.fromkeys(("construct", "merge", "preview"), "DoraModel"),
    **dict.fromkeys(("construct a second", "unmerge", "unmerge one of two"), "IA3Model"),
    **dict.fromkeys(("load", "combine", "route", "remove"), "LoraModel"),
    **dict.fromkeys(("attach", "detach", "with detached", "freeze"), "BitFitModel"),
    **dict.fromkeys(("with attached",), "AdapterModel"),
    "merge where it is tied": "LoraModel",
    "merge for good": "LoraModel",
    "construct with its own": "LoraModel",
    "merge for good with its own": "LoraModel",
}


@FAULTS
@pytest.mark.parametrize("kind", QUICK)
def test_wholly_before_or_wholly_after(kind: str, fault: Any) -> None:
    points, torn = torn_points(operations(QUICK[kind])[kind], fault, most=60)
    assert points > 1 or fault is OutOfMemory
    assert not torn, "\n".join(dict.fromkeys(torn))


@pytest.mark.parametrize("kind", ["preview", "load", "combine", "merge", "route", "with attached"])
def test_at_every_line_where_a_block_is_entered_or_left(kind: str) -> None:
    """Few of them, and what one leaves open falls on the next delta, on any backbone."""
    sources = [path.read_text() for path in Path(PACKAGE).rglob("*.py")]
    blocks = {name for text in sources for name in re.findall(r"@contextmanager\s+def (\w+)", text)}
    points, torn = torn_points(operations("LoraModel")[kind], Interrupt, 200, blocks)
    assert points > 5 and not torn, "\n".join(dict.fromkeys(torn))


@pytest.mark.slow
@FAULTS
@pytest.mark.parametrize("method", METHODS)
def test_many_points_of_every_method(method: str, fault: Any) -> None:
    for kind, operation in operations(method).items():
        _, torn = torn_points(operation, fault, MOST)
        assert not torn, f"{kind}:\n" + "\n".join(dict.fromkeys(torn))
