"""Private names that the library leans on, one test for each; and what an import costs."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import opendelta
from opendelta.ground import seams
from opendelta.ground.bytecode import children_read

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

# --- private names of torch and transformers ------------------------------------------------------


def test_forward_hooks() -> None:
    """The tables are those that torch's own functions fill."""

    def hook(*_: Any) -> None: ...

    module = nn.Linear(1, 1)
    after, keywords, always = seams.forward_hooks(module, before=False)
    handle = module.register_forward_hook(hook, with_kwargs=True, always_call=True)
    assert after == {handle.id: hook} and isinstance(after, OrderedDict)
    assert keywords == always == {handle.id: True}
    assert [ref() for ref in handle.extra_dict_ref] == [keywords, always]
    before, keywords = seams.forward_hooks(module, before=True)
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    assert before == {handle.id: hook} and keywords == {handle.id: True}
    assert len(after) == 1
    tables = {name for name in vars(module) if name.startswith(("_forward_hooks", "_forward_pre_"))}
    assert tables == {  # a further one would have to be filled too
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }


def test_as_state_dict_hook() -> None:
    calls: list[Any] = []

    def make() -> Any:
        def hook(*given: Any) -> None:
            calls.append(given)

        return hook

    ours, theirs = nn.Linear(1, 1), nn.Linear(1, 1)
    mine = seams.as_state_dict_hook(make())
    ours._state_dict_hooks[0] = mine
    theirs.register_state_dict_post_hook(make())
    (registered,) = theirs._state_dict_hooks.values()
    assert vars(mine) == vars(registered)
    for module in (ours, theirs):
        assert set(module.state_dict(prefix="p.")) == {"p.weight", "p.bias"}
    (first, *ours_given), (second, *theirs_given) = calls
    assert (first, second) == (ours, theirs)
    assert ours_given[1:] == theirs_given[1:] == ["p.", {"version": 1}]


def test_as_load_state_dict_hook() -> None:
    calls: list[Any] = []
    ours, theirs = nn.Linear(1, 1), nn.Linear(1, 1)

    def hook(module: Any, state_dict: Any, prefix: str, *more: Any) -> None:
        calls.append((prefix, len(more)))
        assert module in (ours, theirs)

    wrapped = seams.as_load_state_dict_hook(hook, ours)
    ours._load_state_dict_pre_hooks[0] = wrapped
    theirs.register_load_state_dict_pre_hook(hook)
    (registered,) = theirs._load_state_dict_pre_hooks.values()
    assert type(registered) is type(wrapped) and vars(registered).keys() == vars(wrapped).keys()
    for module in (ours, theirs):
        module.load_state_dict(module.state_dict())
    assert len(calls) == 2 and calls[0] == calls[1]


def test_active_ddp(tmp_path: Path) -> None:
    seen: list[Any] = []
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        module = nn.Linear(1, 1)
        module.register_forward_hook(lambda *_: seen.append(seams.active_ddp()))
        wrapped = nn.parallel.DistributedDataParallel(module)
        wrapped(torch.ones(1, 1))
        module(torch.ones(1, 1))
        assert seen == [wrapped, None] and seams.active_ddp() is None
        assert {id(p) for p in wrapped._module_parameters} == {id(p) for p in module.parameters()}
    finally:
        torch.distributed.destroy_process_group()


def test_is_plainly_differentiated() -> None:
    told: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        told.append(seams.is_plainly_differentiated())
        return x.sum()

    x = torch.ones(2, requires_grad=True)
    ask(x).backward()
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x.detach())
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    ask(x)
    assert told == [True, False, False, False, True]


def test_runs_backward() -> None:
    told = [seams.runs_backward()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: told.append(seams.runs_backward()))
    loss = x.sum()
    told.append(seams.runs_backward())
    loss.backward()
    told.append(seams.runs_backward())
    assert told == [False, False, True, False]


def test_is_running() -> None:
    def generate() -> bool:
        return inner()

    def inner() -> bool:
        return seams.is_running("generate")

    assert generate() and not inner() and not seams.is_running("generate")

    def work(module: str) -> bool:
        return seams.is_running("work", module)

    assert work(__name__) and not work("torch")


def test_prefill_is_cut() -> None:
    model, seen = backbones.build("llama"), list[bool]()
    ids = torch.tensor([[5, 9, 3]])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(ids, return_dict_in_generate=True, **options)
    handle = model.register_forward_pre_hook(lambda *_: seen.append(seams.prefill_is_cut()))
    model(ids)
    model.generate(ids, **options)
    model.generate(ids, prefill_chunk_size=2, **options)
    assert not any(seen)
    seen.clear()
    whole = torch.cat([first.sequences, ids], 1)
    model.generate(whole, past_key_values=first.past_key_values, **options)
    assert seen == [True, False, False]
    handle.remove()


def test_forward_of() -> None:
    found: list[Any] = []

    class Inner(nn.Module):
        def forward(self, x: int) -> int:
            found.append(seams.forward_of(outer))
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: int) -> int:
            return self.inner(x)

    outer = Outer()
    outer(3), outer.forward(4), outer.inner(5)
    assert [frame and frame.f_locals["x"] for frame in found] == [3, 4, None]


def test_is_for_a_model_folder(tmp_path: Path) -> None:
    """A model is saved by its user, by a Trainer when that is asked to, and as a checkpoint."""
    told: list[bool] = []
    model = BertForSequenceClassification(BertConfig(vocab_size=9, **SMALL))
    model.register_state_dict_post_hook(lambda *_: told.append(seams.is_for_a_model_folder()))

    def save_model() -> bool:
        model.state_dict()
        return told.pop()

    rows = [{"input_ids": torch.arange(5), "labels": torch.tensor(0)}] * 8
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    assert told == [False] and (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    trainer.save_model()
    model.save_pretrained(tmp_path)
    assert told[1:] == [True, True]
    assert not save_model() and not seams.is_for_a_model_folder()


def test_names_in_model(tmp_path: Path) -> None:
    """They are what ``from_pretrained`` finds, also for tensors that only we know."""
    sizes = {"image_size": 4, "patch_size": 2, **SMALL}
    made = ViTModel(ViTConfig(**sizes))
    assert made.get_submodule("layers.0.attention.q_proj")
    made.layers[0].attention.q_proj.register_parameter("more", nn.Parameter(torch.ones(1)))
    made.save_pretrained(tmp_path)
    (tmp_path / "plain").mkdir()
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "plain")
    names = {*load_file(tmp_path / "model.safetensors")}
    assert len(names - {*made.state_dict()}) > 20  # all of the layers
    read = ViTModel.from_pretrained(tmp_path / "plain")
    for model in (made, read):
        found = seams.names_in_model(model, names)
        assert found.keys() == names and {*found.values()} == {*made.state_dict()}
        assert seams.names_in_model(model, found.values()) == {n: n for n in found.values()}
    assert seams.names_in_model(nn.Linear(1, 1), names) == {name: name for name in names}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_cache_of(family: str) -> None:
    """What ``generate`` hands on is found, whichever name it has."""
    model, held = backbones.build(family), []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        held.append(seams.cache_of(kwargs).get_seq_length())

    decoder = model.get_decoder() if family == "t5" else model
    decoder.register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.tensor([[5, 9, 3]])
    model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert held == ([0, 1, 2] if family == "t5" else [0, 3, 4])
    for name in ("cache", "past_key_values", "cache_params"):
        assert seams.cache_of({"cache": None, name: 1, "input_ids": 2}) == 1
    assert seams.cache_of({"cache": True, "input_ids": 1}) is None


def test_untried_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    newest = seams.NEWEST_TRANSFORMERS
    for release, told in ((newest, False), ((newest[0], newest[1] + 1), True), ((4, 99), False)):
        version = "{}.{}.1".format(*release)
        monkeypatch.setattr(transformers, "__version__", version)
        seams.untried_transformers.cache_clear()
        assert seams.untried_transformers() == (version if told else None)
    monkeypatch.undo()
    seams.untried_transformers.cache_clear()


def test_frame_of_module_call() -> None:
    """It is that of the innermost module, and its end is the call's."""
    frames: list[Any] = []
    model = nn.Sequential(nn.Linear(1, 1))

    def note(*_: Any) -> None:
        frames.append(seams.frame_of_module_call())
        assert not any(map(seams.has_ended, frames))

    model.register_forward_pre_hook(note)
    model[0].register_forward_pre_hook(note)
    model(torch.ones(1, 1))
    outer, inner = frames
    assert outer.f_locals["self"] is model and inner.f_locals["self"] is model[0]
    assert outer.f_code is inner.f_code
    assert seams.frame_of_module_call() is None


def test_has_ended() -> None:
    def work() -> Any:
        frame = inspect.currentframe()
        assert frame is not None and not seams.has_ended(frame)
        return frame

    frame = work()
    here = inspect.currentframe()
    assert here is not None and seams.has_ended(frame) and not seams.has_ended(here)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_regions(use_reentrant: bool) -> None:
    told: list[Any] = []
    x = torch.ones(2, requires_grad=True)

    def inner(x: Tensor) -> Tensor:
        told.append([*seams.checkpointed_regions(None)])
        return x.sin().exp()

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x.cos(), use_reentrant=use_reentrant).sin()

    inner(x)
    loss = checkpoint(outer, x, use_reentrant=use_reentrant).sum()
    loss.backward()
    # Inside out. When the outer region runs again, the inner one is entered anew, then runs again.
    assert told[0] == []
    assert told[1] == [(inner, False), (outer, False)]
    assert told[2] == [(inner, False), (outer, True)]
    assert told[3][0] == (inner, True) and len(told) == 4
    assert [*seams.checkpointed_regions(None)] == []
    here = inspect.currentframe()

    def bounded(x: Tensor) -> Tensor:
        assert [f for f, _ in seams.checkpointed_regions(here)] == [bounded]
        assert not [*seams.checkpointed_regions(inspect.currentframe())]
        return x

    checkpoint(bounded, x, use_reentrant=use_reentrant)


def test_forget_compiled_code() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    for _ in range(2):
        function(torch.ones(2))
    assert len(compiled) == 1
    seams.forget_compiled_code()
    function(torch.ones(2))
    assert len(compiled) == 2
    torch._dynamo.reset()


def test_compiled_graphs() -> None:
    before = seams.compiled_graphs()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert seams.compiled_graphs() == before + 1
    torch._dynamo.reset()


def test_reentrant_checkpoint() -> None:
    told: list[Any] = []

    def note(x: Tensor) -> Tensor:
        told.append(seams.reentrant_checkpoint())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    note(x)
    checkpoint(note, x, use_reentrant=False)
    assert told == [None, None]
    two = [checkpoint(note, x, use_reentrant=True).sum() for _ in range(2)]
    sum(two).backward()  # type: ignore[union-attr]
    first, second = told[2:4]
    assert first is not second and set(map(id, told[4:])) == {id(first), id(second)}
    first.noted = 1


def test_at_end_of_backward() -> None:
    told: list[str] = []

    def note(grad: Tensor) -> None:
        seams.at_end_of_backward(lambda: told.append("the end"))
        told.append("a node")

    x = torch.ones(2, requires_grad=True)
    middle = x.sin()
    middle.register_hook(note)
    x.register_hook(lambda grad: told.append("another"))
    middle.sum().backward()
    assert told == ["a node", "another", "the end"]


def test_each_has_its_test() -> None:
    own = [
        name
        for name, value in vars(seams).items()
        if isinstance(value, types.FunctionType) and value.__module__ == seams.__name__
    ]
    assert len(own) > 8
    assert [name for name in own if f"test_{name}" not in globals()] == []


# --- byte code ------------------------------------------------------------------------------------

CHILDREN = """
    called handed read fact method_read inside_lambda inside_list by_property past_hooks given
    only_in_init never_used called_by_subclass aliased nested_call bias_alone
""".split()


class Reading(nn.Module):
    """Uses each of its children in the way that its name says."""

    def __init__(self) -> None:
        super().__init__()
        for name in CHILDREN:
            self.add_module(name, nn.Linear(3, 3))
        self.beside = self.handed
        nn.init.zeros_(self.only_in_init.weight)

    def forward(self, x: Any, y: Any) -> Any:
        x = self.called(x) @ self.called.weight
        z = y @ self.read.weight.t() + self.read.bias
        z = z.to(self.fact.weight.dtype).view(self.fact.weight.shape)
        x, y = y, x
        x = x @ self.handed.weight
        z = [i @ self.inside_list.weight for i in z]
        z = (lambda of: of @ self.inside_lambda.weight)(z[0])
        z = self.past_hooks.forward(z) @ self.past_hooks.weight
        z = nn.functional.linear(z, self.given.weight, self.given.bias)
        alias = self.aliased
        z = z @ self.aliased.weight @ alias.weight
        z = z @ self.called_by_subclass.weight + self.bias_alone.bias
        return self.other(z, x) + self.by_property_too

    def other(self, x: Any, y: Any) -> Any:
        def nested(of: Any) -> Any:
            return self.nested_call(of) @ self.nested_call.weight

        return nested(x) @ self.method_read.weight, y

    @property
    def by_property_too(self) -> Any:
        return self.by_property.weight + 1

    def unused(self) -> Any:
        return self.never_used.weight + 1


class Calling(Reading):
    def more(self, x: Any) -> Any:
        return self.called_by_subclass(x)


READ = {
    "read",
    "method_read",
    "inside_lambda",
    "inside_list",
    "by_property",
    "given",
    "called_by_subclass",
}


def test_children_read() -> None:
    """Those whose values the forward takes, and which no code calls or hands on."""
    assert children_read(Reading()) == READ
    assert children_read(Calling()) == READ - {"called_by_subclass"}
    assert children_read(nn.MultiheadAttention(4, 2)) == {"out_proj"}
    assert children_read(nn.TransformerEncoderLayer(4, 2)) == frozenset()
    assert children_read(nn.Linear(2, 2)) == children_read(nn.ModuleList()) == frozenset()
    assert children_read(torch.jit.trace(nn.Linear(2, 2), torch.ones(2))) == frozenset()


def test_children_read_where_the_forward_is_wrapped() -> None:
    """As Accelerate's hooks wrap it: what is wrapped says so."""
    model = Reading()
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args: inner(*args))  # type: ignore[method-assign]
    assert children_read(model) == READ


# --- importing ------------------------------------------------------------------------------------


def run(source: str, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints."""
    root = Path(opendelta.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=cwd or root,
        env={"PYTHONPATH": str(root), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_alone_brings_no_torch() -> None:
    heavy = ("torch", "transformers", "flask", "rich", "numpy", "xxhash")
    heavy += ("safetensors", "huggingface_hub")
    looks = "import sys, opendelta; opendelta.__version__, dir(opendelta)"
    assert run(f"{looks}; print([n for n in {heavy} if n in sys.modules])") == "[]"


def test_everything_public_by_a_star() -> None:
    namespace: dict[str, Any] = {}
    exec("from opendelta import *", namespace)
    assert {*namespace} - {"__builtins__"} == {*opendelta.__all__}


def test_names_are_listed_and_found() -> None:
    assert {*opendelta.__all__} <= {*dir(opendelta)} and dir(opendelta) == sorted(dir(opendelta))
    assert len({*opendelta.__all__}) == len(opendelta.__all__)
    for name in opendelta.__all__:
        assert getattr(opendelta, name) is not None
    assert opendelta.LoraModel.__module__ == "opendelta.delta_models.lora"
    with pytest.raises(AttributeError, match="'opendelta' has no attribute 'LoarModel'"):
        opendelta.LoarModel  # noqa: B018
    with pytest.raises(ImportError, match="LoarModel"):
        exec("from opendelta import LoarModel")
    assert not hasattr(opendelta, "torch") and not hasattr(opendelta, "__path")


def test_the_names_for_type_checkers_are_the_same() -> None:
    source = inspect.getsource(opendelta).partition("if TYPE_CHECKING:\n")[2]
    namespace: dict[str, Any] = {}
    exec(inspect.cleandoc(source), namespace)
    assert {name for name in namespace if name != "__builtins__"} == {*opendelta.__all__}
    assert all(namespace[name] is getattr(opendelta, name) for name in opendelta.__all__)


OUTSIDE = '''
"""A method in a module of its own, with the import paths of 1.0."""
from opendelta import BaseDeltaConfig, DeltaBase, register
from opendelta.dispatch import AfterDispatcher, BeforeDispatcher, Dispatcher, after, before, onto
from opendelta.center.names import check_name
from opendelta.web import interactive
import torch


def doubled(delta, host, args, kwargs, output):
    return output * delta.factor


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))


class OutsideConfig(BaseDeltaConfig):
    pass


@register
class OutsideModel(DeltaBase):
    delta_type = "outside"
    config_class = OutsideConfig

    def __init__(self, backbone_model, modified_modules=None):
        self._construct(locals())

    def update_module(self, module, key):
        target = module.get_submodule(key)
        self.insert_action(target, Layer(), "outside", AfterDispatcher, doubled)
'''


def test_a_method_in_a_module_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    use = (
        "import outside, copy, pickle, torch, opendelta as o\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "x = torch.ones(1, 2); bare = model(x)\n"
        "config = {'delta_type': 'outside', 'modified_modules': ['0']}\n"
        "made = o.AutoDeltaModel.from_config(config, model)\n"
        "assert type(made) is outside.OutsideModel\n"
        "for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):\n"
        "    assert torch.equal(m(x), 2 * bare), m\n"
        "print(len(o.deltas(pickle.loads(pickle.dumps(model)))))"
    )
    assert run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{use}", tmp_path) == "1"
