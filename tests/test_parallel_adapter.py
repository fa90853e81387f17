"""ParallelAdapter: one module under two hosts."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import backbones
import pytest
import torch
import torch.nn.functional as F
import weights
from cases import built, put, randomise
from placed import unchanged
from torch import Tensor, nn

from opendelta import DeltaBase, ParallelAdapterModel
from opendelta.exceptions import AddressingError, InsertionError

# --- pairs ---------------------------------------------------------------------------------------


X = weights.uniform("x", (2, 3, 6), 1.0)


def branch(delta: DeltaBase, name: str, x: Tensor, scaled: float = 1.0) -> Tensor:
    """What the adapter registered under `name` adds, computed by hand (gelu_new)."""
    p = dict(delta.named_parameters())
    down = F.linear(
        x, p[f"{name}.modulelist.down_proj.weight"], p[f"{name}.modulelist.down_proj.bias"]
    )
    hidden = F.gelu(down, approximate="tanh")
    up = F.linear(
        hidden, p[f"{name}.modulelist.up_proj.weight"], p[f"{name}.modulelist.up_proj.bias"]
    )
    return scaled * up


@pytest.mark.parametrize("scaled", [1.0, 4, 0.5])
def test_it_reads_the_first_modules_input_and_adds_to_the_seconds_output(scaled: float) -> None:
    model = backbones.build("mlp")
    x = backbones.inputs("mlp")["x"]
    bare = model(x)
    delta = ParallelAdapterModel(
        model, bottleneck_dim=3, scaled=scaled, modified_modules=["first", "last.1"]
    )
    assert delta.scaled == delta.config.scaled == scaled
    randomise(delta)
    expected = bare + branch(delta, "first.parallel_adapter", x, scaled)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert {tuple(p.shape) for p in delta.parameters()} == {(3, 6), (3,), (3, 3)}


def test_one_module_named_twice() -> None:
    model: Any = backbones.build("mlp")
    x = backbones.inputs("mlp")["x"]
    delta = ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["first", "first"])
    randomise(delta)
    first = F.linear(x, model.first.weight, model.first.bias) + branch(
        delta, "first.parallel_adapter", x
    )
    assert torch.allclose(model(x), model.last(model.act(first)), atol=1e-6)


class PairedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_pairs_are_formed_in_module_order() -> None:
    """The i-th first module goes with the i-th second one, whatever the patterns' order."""
    model = nn.Sequential(PairedBlock(), PairedBlock(), PairedBlock())
    delta = ParallelAdapterModel(
        model, bottleneck_dim=2, modified_modules=["[r][12].a", "[r][12].b", "0.a", "0.b"]
    )
    assert [name.split(".")[0] for name, _ in delta.named_parameters()] == list("000011112222")
    randomise(delta)
    expected = X
    for i, block in enumerate(model):
        plain = F.linear(
            F.linear(expected, block.a.weight, block.a.bias), block.b.weight, block.b.bias
        )
        expected = plain + branch(delta, f"{i}.a.parallel_adapter", expected)
    assert torch.allclose(model(X), expected, atol=1e-5)


@pytest.mark.parametrize("backbone", ["opt", "bart"])
def test_modules_called_by_keyword_only(backbone: str) -> None:
    """0.3.2 raised IndexError on these attentions."""
    model = backbones.build(backbone)
    bare = backbones.run(model, backbone)
    delta = ParallelAdapterModel(model, modified_modules=["self_attn", "self_attn"])
    for name, p in delta.named_parameters():
        if "up_proj" in name:
            nn.init.zeros_(p)
    assert torch.equal(backbones.run(model, backbone), bare)
    randomise(delta)
    assert not torch.allclose(backbones.run(model, backbone), bare)


def test_patterns_must_pair_up() -> None:
    model = nn.Sequential(PairedBlock(), PairedBlock())
    for patterns, words in (
        (["a"], "pairs"),
        (["a", "b", "a"], "pairs"),
        (["a", "0.b"], "2.*1"),
    ):
        with unchanged(model), pytest.raises(AddressingError, match=words):
            ParallelAdapterModel(model, modified_modules=patterns)


def test_the_second_before_the_first_is_an_error_that_says_so() -> None:
    model = backbones.build("mlp")
    ParallelAdapterModel(model, bottleneck_dim=2, modified_modules=["last.1", "first"])
    with pytest.raises(InsertionError, match="order"):
        model(backbones.inputs("mlp")["x"])


@pytest.mark.parametrize("fails", [False, True])
def test_no_activation_is_kept_after_a_forward(fails: bool) -> None:
    """Nor after one that failed between the two modules."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fails:
                raise KeyError("on the way")
            return x

    model = nn.Sequential(OrderedDict(a=nn.Linear(6, 6), middle=Failing(), b=nn.Linear(6, 6)))
    ParallelAdapterModel(model, bottleneck_dim=2, modified_modules=["a", "b"])
    x = X.clone()
    gone = weakref.ref(x)
    with torch.no_grad():
        try:
            model(x)
        except KeyError:
            assert fails
    del x
    gc.collect()
    assert gone() is None


def test_a_detached_parallel_adapter_keeps_nothing_either() -> None:
    model = backbones.build("mlp")
    delta = ParallelAdapterModel(model, bottleneck_dim=2, modified_modules=["first", "last.1"])
    delta.detach()
    x = backbones.inputs("mlp")["x"].clone()
    gone = weakref.ref(x)
    with torch.no_grad():
        model(x)
    del x
    gc.collect()
    assert gone() is None


# --- threads and halves --------------------------------------------------------------------------


def test_a_parallel_adapter_serves_several_threads() -> None:
    """What one thread's forward holds back is not taken up by another's."""
    model, delta = built("ParallelAdapterModel", "bert")
    randomise(delta)
    batches = [torch.randint(1, 128, (4, 16)) for _ in range(4)]
    with torch.no_grad():
        expected = [model(ids)[0] for ids in batches]

    def run(k: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(batches[k])[0], expected[k]) for _ in range(15))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [True] * 4


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pair_is_detached_with_the_other_half(half: int) -> None:
    """A ParallelAdapter acts on both its modules or on none of them."""
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = put("ParallelAdapterModel", "mlp", model)
    randomise(delta)
    expected = backbones.run(model, "mlp")
    host = model.get_submodule(["first", "last.1"][half])
    delta.detach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), expected)
