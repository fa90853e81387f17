"""BitFit: biases that are there, biases that are added, and what becomes of them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import backbones
import pytest
import torch
import weights
from cases import built, output, put, randomise
from pieces import BF16, dtypes, hook_counts
from placed import trainable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import opendelta
from opendelta import BitFitModel
from opendelta.exceptions import InsertionError

# --- biases that are there and that are added ----------------------------------------------------


X = weights.uniform("x", (2, 3, 6), 1.0)


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


# --- casts and shards ----------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["detach", "remove"])
@pytest.mark.parametrize("backbone", ["bert", "t5"])
def test_a_backbone_cast_under_bitfit_is_cast_whole(off: str, backbone: str) -> None:
    """The biases that BitFit set aside follow a cast made meanwhile."""
    model, delta = built("BitFitModel", backbone)
    plain = backbones.build(backbone).to(BF16)
    randomise(delta)
    model.to(BF16)
    getattr(delta, off)()
    assert dtypes(model) == {BF16}
    assert torch.equal(backbones.run(model, backbone), backbones.run(plain, backbone))


def test_bitfit_follows_a_cast_made_while_detached() -> None:
    """Attached again, its biases have the dtype that the backbone got meanwhile."""
    model, delta = built("BitFitModel", "bert")
    other, _ = built("BitFitModel", "bert")
    for each in opendelta.deltas(model) + opendelta.deltas(other):
        randomise(each)
    delta.detach()
    model.to(BF16)
    delta.attach()
    assert dtypes(model) == dtypes(delta) == {BF16}
    assert torch.equal(backbones.run(model, "bert"), backbones.run(other.to(BF16), "bert"))


def test_bitfit_on_shards() -> None:
    """Sharded, its biases are the model's parameters and train; switching them is refused."""
    model = backbones.build("mlp")
    delta = put("BitFitModel", "mlp", model)
    randomise(delta)
    expected = backbones.run(model, "mlp")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        delta.freeze_module()
        for _ in range(2):
            biases = {name: id(p) for name, p in delta.named_parameters()}
            assert biases == {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
            assert torch.equal(backbones.run(model, "mlp"), expected)
        with pytest.raises(InsertionError, match=r"bias of 'first|bias of 'last"):
            delta.detach()
        assert torch.equal(backbones.run(model, "mlp"), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_bitfit_attaches_and_detaches() -> None:
    """0.3.2 could not."""
    delta = BitFitModel(backbones.build("gpt2"), modified_modules=["attn", "mlp"])
    bare = backbones.run(delta.backbone_model, "gpt2")
    randomise(delta)
    changed = backbones.run(delta.backbone_model, "gpt2")
    delta.detach()
    assert torch.equal(backbones.run(delta.backbone_model, "gpt2"), bare)
    delta.attach()
    assert torch.equal(backbones.run(delta.backbone_model, "gpt2"), changed)
    assert not torch.equal(changed, bare)


# --- in float32 on a backbone in 16 bits ----------------------------------------------------------


class Sum(nn.Module):
    """Attention of torch's own, which reads the bias of its projection without calling that."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.attn(x, x, x)[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_in_float32_act_rounded(dtype: torch.dtype) -> None:
    """As the biases in 16 bits do, to the bit; the gradients are those of the rounded ones."""
    torch.manual_seed(0)
    model = Sum().to(dtype)
    delta = BitFitModel(model, modified_modules=["attn", "norm", "conv"])
    assert dict(delta.named_parameters()).keys() == {
        "attn.out_proj.bias",
        "norm.bias",
        "conv.bias",
    }
    randomise(delta)
    x = X.to(dtype)
    expected = model(x)
    wanted = torch.autograd.grad(expected.float().square().sum(), [*delta.parameters()])
    delta.float()
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(p.abs() * 2.0**-14)  # less than half a digit of either
    assert torch.equal(model(x), expected)
    actual = torch.autograd.grad(model(x).float().square().sum(), [*delta.parameters()])
    for ours, rounded in zip(actual, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours.to(dtype), rounded)
    assert all("bias" not in vars(module) for module in model.modules())


def test_masters_go_with_copies_and_with_the_delta() -> None:
    model, delta = built("BitFitModel", "bert")
    model.to(torch.bfloat16)
    bare = backbones.run(backbones.build("bert").to(torch.bfloat16), "bert")
    randomise(delta)
    hooks = hook_counts(model)
    expected = backbones.run(model, "bert")
    delta.float()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(backbones.run(one, "bert"), expected)
        (theirs,) = opendelta.deltas(one)
        assert {p.dtype for p in theirs.parameters()} == {torch.float32}
        theirs.merge_and_remove()
        assert torch.equal(backbones.run(one, "bert"), expected)
    delta.to(torch.bfloat16)
    assert hook_counts(model) == hooks
    assert torch.equal(backbones.run(model, "bert"), expected)
    delta.float()
    delta.remove()
    assert torch.equal(backbones.run(model, "bert"), bare)


def test_a_forward_that_broke_off_leaves_no_cast_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    bare = model(x)
    delta = BitFitModel(model, modified_modules=["0"])
    randomise(delta)
    expected = model(x)
    delta.float()
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_: Any, error: Any = error) -> None:
            raise error

        handle = model[0].register_forward_hook(fail)
        with pytest.raises(error):
            model(x)
        handle.remove()
        delta.detach()
        assert torch.equal(model(x), bare)
        delta.attach()
        assert torch.equal(model(x), expected)
    with pytest.raises(KeyboardInterrupt):
        handle = model[0].register_forward_hook(fail)
        model(x)
    handle.remove()
    delta.remove()
    assert torch.equal(model(x), bare)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_masters_through_checkpointing_and_the_compiler() -> None:
    model, delta = built("BitFitModel", "bert")
    model.to(torch.bfloat16)
    randomise(delta)
    delta.float()
    delta.freeze_module()
    model.train()

    def gradients(run: Any) -> list[Tensor]:
        delta.zero_grad()
        output(run, "bert").square().mean().backward()
        return [p.grad.clone() for p in delta.parameters() if p.grad is not None]

    expected = gradients(model)
    torch.compiler.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found in (compiled, gradients(model)):
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-2)
    torch.compiler.reset()


def test_shards_keep_the_dtype_of_their_backbone() -> None:
    model = backbones.build("mlp")
    delta = put("BitFitModel", "mlp", model)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(InsertionError, match="before the engine shards it"):
            delta.half()
        assert {p.dtype for p in delta.parameters()} == {torch.float32}
    finally:
        torch.distributed.destroy_process_group()
