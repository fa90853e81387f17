"""What single methods do beyond the recorded cases: biases, pairs, containers of outputs, sizes."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import backbones
import pytest
import torch
import torch.nn.functional as F
import weights
from cases import randomise
from placed import place, trainable, unchanged
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    DeltaWarning,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)
from opendelta.exceptions import AddressingError, InsertionError

X = weights.uniform("x", (2, 3, 6), 1.0)

# --- LoRA on a fused projection -------------------------------------------------------------------


def test_a_fused_projection_gets_one_lora_over_its_whole_output() -> None:
    """GPT2's c_attn is reached by both of LoRA's default roles."""
    model: Any = backbones.build("gpt2")
    delta = LoraModel(model)
    assert {n: tuple(p.shape) for n, p in delta.named_parameters()} == {
        f"transformer.h.{i}.attn.c_attn.lora.{name}": shape
        for i in range(2)
        for name, shape in (("lora_A", (8, 64)), ("lora_B", (192, 8)))
    }
    again = LoraModel(backbones.build("gpt2"), modified_modules=["attn.v"], common_structure=True)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in delta.named_parameters()]


# --- BitFit ---------------------------------------------------------------------------------------


def without_bias() -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Modules without a bias, an input, and the width of the bias that they can have."""
    image, sound = weights.uniform("i", (2, 3, 5, 5), 1.0), weights.uniform("s", (2, 3, 5), 1.0)
    return {
        "linear": (nn.Linear(6, 4, bias=False), X, 4),
        "layer norm": (nn.LayerNorm(6, bias=False), X, 6),
        "rms norm": (nn.RMSNorm(6), X, 6),
        "t5 norm": (T5LayerNorm(6), X, 6),
        "conv1d": (nn.Conv1d(3, 4, 3, bias=False), sound, 4),
        "conv2d": (nn.Conv2d(3, 4, 3, bias=False), image, 4),
    }


@pytest.mark.parametrize("kind", without_bias())
def test_an_added_bias_starts_at_zero_and_is_added_to_the_output(kind: str) -> None:
    module, x, width = without_bias()[kind]
    model: Any = nn.Sequential(OrderedDict(part=module))
    bare = model(x)
    delta = BitFitModel(model, modified_modules=["part"])
    assert {n: tuple(p.shape) for n, p in delta.named_parameters()} == {"part.bias": (width,)}
    assert not model.part.bias.any()
    assert torch.equal(model(x), bare)
    randomise(delta)
    bias = model.part.bias.detach()
    expected = bare + (bias.view(-1, *[1] * (bare.dim() - 2)) if "conv" in kind else bias)
    assert torch.allclose(model(x), expected, atol=1e-6)
    delta.detach()
    assert torch.equal(model(x), bare)
    delta.remove()
    assert dict(model.named_parameters()).keys() == {n for n, _ in model.named_parameters()}
    assert "part.bias" not in dict(model.named_parameters())


def test_a_bias_that_is_there_keeps_its_value_and_trains() -> None:
    for module in (nn.Linear(6, 6), nn.LayerNorm(6), Conv1D(6, 6)):
        nn.init.uniform_(module.bias)
        model: Any = nn.Sequential(OrderedDict(part=module))
        own = model.part.bias
        bare = model(X)
        delta = BitFitModel(model, modified_modules=["part"])
        assert torch.equal(model(X), bare)
        assert torch.equal(model.part.bias, own)
        delta.freeze_module()
        assert trainable(model) == {"part.bias"}
        randomise(delta)
        assert torch.allclose(model(X), bare - own + model.part.bias, atol=1e-6)
        delta.detach()
        assert model.part.bias is own
        assert torch.equal(model(X), bare)


def test_all_inside_a_module_takes_part() -> None:
    """T5: every linear of an attention or feed-forward, and its norms, none of which has a bias."""
    model: Any = backbones.build("t5")
    bare = backbones.run(model, "t5")
    delta = BitFitModel(model, modified_modules=["encoder.block"])
    wanted = {
        f"{name}.bias"
        for name, module in model.named_modules()
        if name.startswith("encoder.block") and isinstance(module, (nn.Linear, T5LayerNorm))
    }
    assert {name for name, _ in delta.named_parameters()} == wanted
    assert len(wanted) == 2 * (4 + 1 + 2 + 1)
    assert torch.equal(backbones.run(model, "t5"), bare)


@pytest.mark.parametrize("backbone", ["opt", "gpt2"])
def test_the_head_is_a_default_target(backbone: str) -> None:
    """0.3.2's default exclusion hid it. The head's weight is tied, its added bias is not."""
    model: Any = backbones.build(backbone)
    bare = backbones.run(model, backbone)
    delta = BitFitModel(model)
    assert "lm_head.bias" in dict(delta.named_parameters())
    assert torch.equal(backbones.run(model, backbone), bare)
    with torch.no_grad():
        model.lm_head.bias.fill_(0.5)
    assert torch.allclose(backbones.run(model, backbone), bare + 0.5)


def test_the_default_on_t5_freezes_and_trains() -> None:
    model: Any = backbones.build("t5")
    bare = backbones.run(model, "t5")
    delta = BitFitModel(model)
    delta.freeze_module()
    own = {name for name, _ in delta.named_parameters()}
    assert trainable(model) == own == set(model.state_dict())
    for part in ("SelfAttention.q", "SelfAttention.o", "DenseReluDense.wi", "layer_norm"):
        assert any(f"{part}.bias" in name for name in own), part
    assert torch.equal(backbones.run(model, "t5"), bare)


def test_no_bias_for_embeddings_and_activations() -> None:
    model = nn.ModuleDict({"part": nn.Sequential(nn.Embedding(4, 6), nn.ReLU(), nn.Linear(6, 2))})
    delta = BitFitModel(model, modified_modules=["part"])
    assert [name for name, _ in delta.named_parameters()] == ["part.2.bias"]


def test_add_bias_by_hand() -> None:
    """0.3.2's building block: a bias is trained, or added to a known type, else nothing happens."""
    model: Any = nn.ModuleDict(
        {"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2), "c": nn.ReLU()}
    )

    class Chosen(BitFitModel):
        def update_module(self, module: nn.Module, key: str) -> None:
            for part in (model["a"], model["b"], model["c"]):
                self.add_bias_to_modules_have_bias_or_known_type(part)

    delta = Chosen(model, modified_modules=["a"])
    assert {name for name, _ in delta.named_parameters()} == {"a.bias", "b.bias"}


def test_a_bias_of_two_modules_is_one() -> None:
    """A module under two names, or a tied bias, has one bias in the delta and stays tied."""
    shared = nn.Linear(6, 6)
    model: Any = nn.Sequential(OrderedDict(a=shared, b=shared, c=nn.Linear(6, 6)))
    model.c.bias = shared.bias
    delta = BitFitModel(model, modified_modules=["a", "c"])
    assert [name for name, _ in delta.named_parameters()] == ["a.bias"]
    assert model.a.bias is model.c.bias is next(delta.parameters())
    own = shared.bias
    delta.detach()
    assert model.a.bias is model.c.bias is not own


def test_two_bitfits_on_one_module_are_independent() -> None:
    model: Any = nn.Sequential(OrderedDict(part=nn.Linear(6, 6)))
    own, bare = model.part.bias, model(X)
    first = BitFitModel(model, modified_modules=["part"])
    randomise(first)
    with_first = model(X)
    second = BitFitModel(model, modified_modules=["part"])
    assert torch.equal(model(X), with_first)
    randomise(second, 0.1)
    with_second = model(X)
    second.detach()
    assert torch.equal(model(X), with_first)
    first.detach()
    assert torch.equal(model(X), bare) and model.part.bias is own
    second.attach()
    assert torch.equal(model(X), with_second)
    first.attach()
    assert torch.equal(model(X), with_second)  # the one inserted last acts


# --- ParallelAdapter ------------------------------------------------------------------------------


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_pairs_are_formed_in_module_order() -> None:
    """The i-th first module goes with the i-th second one, whatever the patterns' order."""
    model = nn.Sequential(Block(), Block(), Block())
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
    model = nn.Sequential(Block(), Block())
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


# --- what a modified module may return ------------------------------------------------------------


class Pair(NamedTuple):
    hidden: Tensor
    other: str


class Returning(nn.Module):
    """Gives its input doubled, in a container of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = 2 * x
        made: dict[str, Any] = {
            "tensor": y,
            "tuple": (y, "other", None),
            "list": [y, "other"],
            "namedtuple": Pair(y, "other"),
            "dict": {"ids": torch.tensor([1]), "hidden": y, "other": "other"},
            "model output": BaseModelOutput(last_hidden_state=y, hidden_states=(x,)),
        }
        self.made = made[self.kind]
        return self.made


def hidden_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())
    first: Tensor = output[0]
    return first


KINDS = ["tensor", "tuple", "list", "namedtuple", "dict", "model output"]
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapter": (AdapterModel, {"bottleneck_dim": 2}),
    "low_rank_adapter": (LowRankAdapterModel, {"reduction_factor": 2}),
    "compactor": (CompacterModel, {"reduction_factor": 3, "hypercomplex_division": 2}),
    "parallel_adapter": (ParallelAdapterModel, {"bottleneck_dim": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_of_every_kind(name: str, kind: str) -> None:
    cls, arguments = LAYERS[name]
    model: Any = nn.Sequential(OrderedDict(part=Returning(kind)))
    model.dummy_inputs = {"input": X}
    part = ["part"] * (2 if name == "parallel_adapter" else 1)
    delta = cls(model, modified_modules=part, **arguments)
    randomise(delta)
    layer = model.part._modules[name]
    output = model(X)
    expected = 2 * X + layer(X) if name == "parallel_adapter" else layer(2 * X)
    assert torch.allclose(hidden_of(output), expected, atol=1e-6)
    assert not torch.allclose(hidden_of(output), 2 * X)
    made = model.part.made
    assert type(output) is type(made)
    if kind != "tensor":
        assert torch.equal(hidden_of(made), 2 * X)  # the module's own container is not changed
        assert len(output) == len(made)
    if kind in ("tuple", "list", "namedtuple"):
        assert output[1] == "other"
    if kind == "dict":
        assert list(output) == ["ids", "hidden", "other"] and output["other"] == "other"
    if kind == "model output":
        assert output.last_hidden_state is output[0] and torch.equal(output.hidden_states[0], X)


@pytest.mark.parametrize("given", ["text", None, 3, (), {"a": "text"}])
def test_an_output_without_hidden_state_is_refused_at_construction(given: Any) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return given

    model: Any = nn.Sequential(OrderedDict(part=Odd(), end=nn.Identity()))
    model.dummy_inputs = (X,)
    with unchanged(model), pytest.raises(InsertionError):
        AdapterModel(model, modified_modules=["part"])


# --- hyper-parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("relu", F.relu),
        ("tanh", torch.tanh),
        ("swish", F.silu),
        ("gelu_new", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_orig", F.gelu),
        ("leakyrelu", F.leaky_relu),
        ("gelu", F.gelu),
        ("silu", F.silu),
        ("GELU", F.gelu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("mish", F.mish),
    ],
)
def test_activations(name: str, reference: Any) -> None:
    model: Any = nn.Sequential(OrderedDict(part=nn.Identity(), end=nn.Linear(6, 1)))
    model.dummy_inputs = (X,)
    delta = AdapterModel(model, 3, name, modified_modules=["part"])
    randomise(delta, 1.0)
    layer = model.part.adapter.modulelist
    hidden = reference(F.linear(X, layer.down_proj.weight, layer.down_proj.bias))
    expected = X + F.linear(hidden, layer.up_proj.weight, layer.up_proj.bias)
    assert torch.allclose(model.part(X), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_adapters_of_any_rank(rank: int) -> None:
    """0.3.2 multiplied the factors element by element, which failed above one."""
    model: Any = nn.Sequential(OrderedDict(part=nn.Linear(6, 6)))
    delta = LowRankAdapterModel(
        model,
        reduction_factor=2,
        low_rank_rank=rank,
        non_linearity="relu",
        modified_modules=["part"],
    )
    randomise(delta, 1.0)
    p = {name.removeprefix("part.low_rank_adapter."): q for name, q in delta.named_parameters()}
    y = F.linear(X, model.part.weight, model.part.bias)
    down = F.relu(y @ (p["down_sampler.W_left"] @ p["down_sampler.W_right"]) + p["down_sampler.b"])
    up = down @ (p["up_sampler.W_left"] @ p["up_sampler.W_right"]) + p["up_sampler.b"]
    assert p["down_sampler.W_left"].shape == (6, rank)
    assert torch.allclose(model(X), y + up, atol=1e-5)


FLAGS: list[dict[str, Any]] = [
    {},
    {"learn_phm": False},
    {"shared_phm_rule": True},
    {"factorized_phm": False},
    {"shared_W_phm": True},
    {"factorized_phm_rule": True},
    {"kronecker_prod": True},
    {"use_bias_up_sampler": False},
    {"use_bias_down_sampler": False},
    {"shared_phm_rule": True, "factorized_phm_rule": True},
    {"shared_W_phm": True, "factorized_phm": False},
    {"factorized_phm": False, "phm_rank": 2},
    {"phm_rank": 2},
    {"hypercomplex_nonlinearity": "normal", "phm_init_range": 0.1},
    {"phm_c_init": "uniform"},
]


def kronecker(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x @ sum_i kron(rule_i, W_i) + b with torch.kron."""
    rule = p["phm_rule"] if "phm_rule" in p else p["phm_rule_left"] @ p["phm_rule_right"]
    weight = p["W"] if "W" in p else p["W_left"] @ p["W_right"]
    whole = sum(
        torch.kron(r.contiguous(), w.contiguous()) for r, w in zip(rule, weight, strict=True)
    )
    return x @ whole + p.get("b", torch.zeros(()))  # type: ignore[operator]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "default")
def test_every_flag_of_compacter_computes_and_trains(flags: dict[str, Any]) -> None:
    model: Any = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    delta = CompacterModel(
        model, modified_modules=["a", "b"], reduction_factor=2, non_linearity="tanh", **flags
    )
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(weights.uniform(name, p.shape, 1.0))
    x = weights.uniform("c", (5, 8), 1.0)
    expected = x
    for part in (model.a, model.b):
        expected = F.linear(expected, part.weight, part.bias)
        named = dict(part.compactor.named_parameters(remove_duplicate=False))
        down, up = (
            {n.split(".")[1]: p for n, p in named.items() if n.startswith(side)}
            for side in ("down", "up")
        )
        expected = expected + kronecker(up, torch.tanh(kronecker(down, expected)))
    assert torch.allclose(model(x), expected, atol=1e-4)

    delta.freeze_module()
    model(x).square().sum().backward()
    for name, p in delta.named_parameters():
        constant = flags.get("learn_phm") is False and "phm_rule" in name
        assert p.requires_grad is not constant
        assert (p.grad is None) if constant else (p.grad is not None and bool(p.grad.any())), name
    rules = {id(m.phm_rule) for m in model.modules() if hasattr(m, "phm_rule")}
    if flags == {"shared_phm_rule": True}:
        assert len(rules) == 1
    if flags == {}:
        assert len(rules) == 4
    if flags == {"shared_W_phm": True}:
        assert model.a.compactor.up_sampler.W_left is model.b.compactor.up_sampler.W_left


# --- pseudo input ---------------------------------------------------------------------------------


class Inner(nn.Module):
    """A module whose width is nowhere written."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """Takes what `check` lets through; has dropout, batch statistics and a counter."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5)
        self.part = Inner()
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.dimensions = dimensions
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        if ids.dim() != self.dimensions:
            raise ValueError(f"expected {self.dimensions} dimensions")
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        x = self.dropout(self.part(self.embedding(ids)))
        y: Tensor = self.norm(x.reshape(-1, 5)) * scale * torch.rand(())
        return y


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_automatic_pseudo_input(dimensions: int, training: bool) -> None:
    """tensor([[0, 0, 0]]), else tensor([0, 0, 0]); the model is as if it had not run."""
    model = Net(dimensions).train(training)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    modes = {name: m.training for name, m in model.named_modules()}
    delta = LowRankAdapterModel(
        model, modified_modules=["part"], reduction_factor=1, low_rank_w_init="normal"
    )
    assert next(p for n, p in delta.named_parameters() if n.endswith("W_left")).shape == (5, 1)
    assert model.seen == [(False, False)]
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    expected = torch.Generator()
    expected.set_state(random_state)
    for _, p in delta.named_parameters():  # the draws of the new layers alone
        if p.dim() > 1:
            torch.empty(p.shape).normal_(std=0.01, generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


@pytest.mark.parametrize(
    "own",
    [
        {"ids": torch.tensor([[[1, 2]]]), "scale": 2.0},
        (torch.tensor([[[1, 2]]]),),
        [torch.tensor([[[1, 2]]]), 3.0],
        torch.tensor([[[1, 2]]]),
    ],
    ids=["dict", "tuple", "list", "tensor"],
)
def test_a_pseudo_input_of_ones_own(own: Any) -> None:
    model: Any = Net(3)
    with unchanged(model), pytest.raises(InsertionError, match="dummy_inputs"):
        AdapterModel(model, modified_modules=["part"])
    model.dummy_inputs = own
    AdapterModel(model, modified_modules=["part"], bottleneck_dim=2)
    assert model.part.adapter.modulelist.down_proj.weight.shape == (2, 5)


def test_the_models_own_error_is_told() -> None:
    """0.3.2 swallowed it and left the delta without parameters."""
    model: Any = Net(3)
    with unchanged(model), pytest.raises(InsertionError, match="expected 3 dimensions") as caught:
        AdapterModel(model, modified_modules=["part"])
    assert isinstance(caught.value.__cause__, ValueError)
    model.dummy_inputs = {"ids": torch.tensor([0])}
    with unchanged(model), pytest.raises(InsertionError, match="expected 3 dimensions"):
        AdapterModel(model, modified_modules=["part"])


def test_the_pseudo_input_follows_the_models_dtype() -> None:
    model: Any = nn.Sequential(OrderedDict(part=Inner())).to(torch.bfloat16)
    model.dummy_inputs = (torch.zeros(1, 5),)
    delta = AdapterModel(model, modified_modules=["part"])
    assert {p.dtype for p in delta.parameters()} == {torch.bfloat16}


def test_no_pseudo_input_is_needed_where_sizes_are_written() -> None:
    """LoRA and BitFit never run the model, and adapters on linears need not."""

    class Untouchable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(6, 4)

        def forward(self) -> None:
            raise AssertionError("the model ran")

    for cls in (LoraModel, BitFitModel, AdapterModel, LowRankAdapterModel, CompacterModel):
        cls(Untouchable(), modified_modules=["part"])
    ParallelAdapterModel(Untouchable(), modified_modules=["part", "part"])


def test_pixels_and_wrapped_models() -> None:
    """A transformers model states the form of its input; one inside a wrapper does so too."""
    model: Any = backbones.build("vit")
    AdapterModel(model, modified_modules=["[r]layers\\.\\d+"])
    assert model.layers[0].adapter.modulelist.down_proj.in_features == 64
    wrapped: Any = backbones.build("bert_wrapped")
    AdapterModel(wrapped, modified_modules=["attention"])
    layer = wrapped.net.bert.encoder.layer[1].attention
    assert layer.adapter.modulelist.up_proj.out_features == 64


def test_a_module_that_is_never_called_is_refused() -> None:
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(InsertionError, match="'encoder.layer'"):
        AdapterModel(model, modified_modules=["encoder.layer"])


def test_the_pseudo_forward_is_no_first_forward() -> None:
    """It may take another way than the user's inputs, and tells nothing about earlier deltas."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Inner(6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            y: Tensor = self.a(x)
            return self.b(y) if both else y

    for both in (True, False):
        model: Any = Ways()
        model.dummy_inputs = (X,)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LoraModel(model, modified_modules=["b"])
            AdapterModel(model, modified_modules=["a"])
            if both:
                model(X, both=True)
                continue
        with pytest.warns(DeltaWarning, match=r"b\.lora"):
            model(X)


def test_one_forward_serves_all_modules() -> None:
    model: Any = backbones.build("bert")
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    place("AdapterModel", "bert_cls", model, modified_modules=["attention", "encoder.layer.0"])
    handle.remove()
    assert len(runs) == 1
