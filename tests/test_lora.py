"""LoRA's maths on every kind of layer, against hand-computed weights, and what it keeps."""

from __future__ import annotations

import itertools
from typing import Any

import backbones
import pytest
import torch
import transformers
from cases import built, loss, randomise
from pieces import BF16, Host, linears
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from opendelta import LoraModel
from opendelta.exceptions import AddressingError, InsertionError


def randomised(layer: nn.Module, **kwargs: Any) -> tuple[Host, LoraModel]:
    model = Host(layer)
    delta = LoraModel(model, modified_modules=["layer"], **kwargs)
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randn(p.shape))
    return model, delta


def factors(delta: LoraModel) -> tuple[torch.Tensor, torch.Tensor, float]:
    layer = delta.layer.lora
    return layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling


@pytest.mark.parametrize(
    "shape", [(7, 6), (2, 7, 6), (6,), (2, 3, 4, 6), (0, 6), (1, 1, 6), (40, 6), (3, 17, 6)]
)
def test_linear_equals_the_merged_weight(shape: tuple[int, ...]) -> None:
    model, delta = randomised(nn.Linear(6, 5), lora_r=3, lora_alpha=12)
    a, b, scaling = factors(delta)
    assert scaling == 4
    x = torch.randn(shape)
    merged = nn.functional.linear(x, model.layer.weight + scaling * b @ a, model.layer.bias)
    torch.testing.assert_close(model(x), merged)
    with torch.no_grad():
        torch.testing.assert_close(model(x), merged)


def test_transformers_conv1d_equals_the_merged_weight() -> None:
    model, delta = randomised(transformers.pytorch_utils.Conv1D(5, 6), lora_r=2)
    a, b, scaling = factors(delta)
    x = torch.randn(2, 3, 6)
    merged = x @ (model.layer.weight + scaling * (b @ a).t()) + model.layer.bias
    torch.testing.assert_close(model(x), merged)


CONVOLUTIONS = [
    (dimensions, groups, padding, mode, stride)
    for dimensions in (1, 2)
    for groups, padding, mode, stride in [
        (1, 0, "zeros", 1),
        (1, 1, "circular", 1),
        (2, "same", "zeros", 1),
        (4, 1, "reflect", 2),
    ]
]


@pytest.mark.parametrize(("dimensions", "groups", "padding", "mode", "stride"), CONVOLUTIONS)
def test_convolution_equals_the_merged_weight(
    dimensions: int, groups: int, padding: int | str, mode: str, stride: int
) -> None:
    convolution = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    layer = convolution(4, 8, 3, stride, padding, groups=groups, padding_mode=mode)
    model, delta = randomised(layer, lora_r=2, lora_alpha=6)
    a, b, scaling = factors(delta)
    merged = convolution(4, 8, 3, stride, padding, groups=groups, padding_mode=mode)
    with torch.no_grad():
        update = (b.flatten(1) @ a.flatten(1)).view(layer.weight.shape)
        merged.weight.copy_(layer.weight + scaling * update)
        merged.bias.copy_(layer.bias)
    x = torch.randn(2, 4, *(9,) * dimensions)
    torch.testing.assert_close(model(x), merged(x), rtol=1e-5, atol=1e-5)


def test_embedding_equals_the_merged_table() -> None:
    model, delta = randomised(nn.Embedding(11, 5, padding_idx=0), lora_r=2)
    a, b, scaling = factors(delta)
    ids = torch.tensor([[1, 5, 0], [10, 5, 2]])
    merged = nn.functional.embedding(ids, model.layer.weight + scaling * (b @ a).t())
    torch.testing.assert_close(model(ids), merged)
    model(ids).sum().backward()
    assert not delta.layer.lora.lora_A.grad[:, 0].any()


def test_a_container_stands_for_all_its_linears() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    delta = LoraModel(model, modified_modules=["0", "0.2"], lora_r=1)
    assert {n for n, _ in delta.named_parameters()} == {
        f"0.{i}.lora.lora_{x}" for i, x in itertools.product((0, 2), "AB")
    }


def test_patterns_of_ranks_and_alphas() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    delta = LoraModel(
        model,
        lora_r=2,
        modified_modules=["0", "1", "2"],
        rank_pattern={"[r][01]": 3},
        alpha_pattern={"1": 9},
    )
    layers = [getattr(delta, str(i)).lora for i in range(3)]
    assert [layer.r for layer in layers] == [3, 3, 2]
    assert [layer.scaling for layer in layers] == [16 / 3, 3, 8]
    assert delta.config.to_dict()["rank_pattern"] == {"[r][01]": 3}
    with pytest.raises(AddressingError, match="rank_pattern: '7'"):
        LoraModel(nn.Sequential(nn.Linear(4, 4)), modified_modules=["0"], rank_pattern={"7": 3})


def test_an_attention_that_reads_its_projection_is_refused_and_skipped() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(InsertionError, match="never called"):
        LoraModel(model, modified_modules=["0.out_proj"])
    with pytest.raises(InsertionError, match="holds no linear"):
        LoraModel(model, modified_modules=["0"])


# --- the fused node against plain operations ---------------------------------------------------


class Given(nn.Module):
    """A linear in name: it returns what it is given beside its input."""

    in_features, out_features = 5, 4

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output


SCALING = 1.5


def given(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """A host that adds a low-rank term of its first argument to its second."""
    model = nn.ModuleDict({"layer": Given()})
    LoraModel(model, 2, 3, dropout, modified_modules=["layer"]).to(dtype)
    nn.init.normal_(model["layer"].lora.lora_B)
    return model["layer"]


def is_fused(output: torch.Tensor) -> bool:
    """Whether a node written in Python made it."""
    return isinstance(output.grad_fn, torch.autograd.function.BackwardCFunction)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives(dropout: float) -> None:
    host = given(dropout=dropout)
    output = torch.randn(2, 17, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 17, 5, dtype=torch.float64, requires_grad=True)
    assert is_fused(host(x, output))

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same mask each time
        values = {"lora.lora_A": inputs[2], "lora.lora_B": inputs[3]}
        result: torch.Tensor = functional_call(host, values, inputs[:2])
        return result

    inputs = (x, output, host.lora.lora_A, host.lora.lora_B)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["many", "transposed", "broadcast", "no grad in", "few", "one", "none"]
)
def test_fused_equals_plain(factors: torch.dtype, kind: str) -> None:
    host = given(factors)
    layer = host.lora
    x = {
        "many": torch.randn(2, 17, 5),
        "transposed": torch.randn(2, 5, 17).transpose(1, 2),
        "broadcast": torch.randn(1, 1, 5).expand(2, 17, 5),
        "no grad in": torch.randn(2, 17, 5),
        "few": torch.randn(2, 3, 5),
        "one": torch.randn(1, 5),
        "none": torch.randn(0, 5),
    }[kind].detach()
    output = torch.randn(*x.shape[:-1], 4)
    results = []
    for fused in (True, False):
        xi = x.clone().requires_grad_(kind != "no grad in") if kind != "broadcast" else x
        base = output.clone().requires_grad_()
        layer.zero_grad()
        if fused:
            y = host(xi, base)
            assert is_fused(y) == (kind not in ("few", "one", "none"))
        else:
            term = xi.to(factors) @ layer.lora_A.t() @ layer.lora_B.t() * SCALING
            y = base + term.float()
        y.pow(2).sum().backward()
        results.append((y, base.grad, xi.grad, layer.lora_A.grad, layer.lora_B.grad))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_dropout_redraws_the_mask_of_the_forward() -> None:
    host = given(torch.float32, dropout=0.5)
    x, layer = torch.randn(64, 5, requires_grad=True), host.lora
    host(x, torch.zeros(64, 4)).sum().backward()
    # Where the mask dropped an input, its gradient is zero; elsewhere it is doubled.
    kept = x.grad != 0
    expected = 2 * (layer.lora_B.sum(0) @ layer.lora_A) * SCALING
    torch.testing.assert_close(x.grad, kept * expected.expand_as(x))
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(
        layer.lora_A.grad, SCALING * torch.outer(layer.lora_B.sum(0), (2 * kept * x).sum(0))
    )


@pytest.mark.parametrize("rows", [4, 64])
def test_the_output_may_be_changed_in_place(rows: int) -> None:
    """Some backbones scale their queries so."""
    host = given(torch.float32)
    base, x = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 5, requires_grad=True)
    (host(x, base) * 2).pow(2).sum().backward()
    expected = [base.grad, x.grad, *(p.grad for p in host.parameters())]
    base.grad = x.grad = None
    host.zero_grad()
    host(x, base).mul_(2).pow(2).sum().backward()
    actual = [base.grad, x.grad, *(p.grad for p in host.parameters())]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [1, 40])
def test_functional_transforms_use_plain_operations(rows: int) -> None:
    host = given(torch.float32)
    xs, base = torch.randn(6, rows, 5), torch.randn(6, rows, 4)
    values = dict(host.named_parameters())

    def squared(values: dict[str, torch.Tensor], o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = functional_call(host, values, (x, o))
        return result.pow(2).sum()

    per_row = vmap(grad(squared), in_dims=(None, 0, 0))(values, base, xs)
    squared(values, base, xs).backward()
    for name, p in host.named_parameters():
        torch.testing.assert_close(per_row[name].sum(0), p.grad)


@pytest.mark.parametrize("rows", [4, 40])
def test_autocast_agrees(rows: int) -> None:
    model, delta = randomised(nn.Linear(6, 5), lora_r=3)
    delta.freeze_module()
    x, layer = torch.randn(rows, 6), delta.layer.lora
    kept: list[torch.Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            low = model(x)
        assert is_fused(low) == (rows > 32)
        assert {t.dtype for t in kept if t.numel() == 3 * rows} == {torch.bfloat16}
        with torch.no_grad():
            torch.testing.assert_close(model(x), low)
    assert low.dtype == torch.bfloat16
    results = []
    for output in (low, model(x)):
        layer.zero_grad()
        output.float().pow(2).sum().backward()
        results.append((output.float(), layer.lora_A.grad, layer.lora_B.grad))
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_term_is_computed_in_the_dtype_of_its_factors(rows: int, dtype: torch.dtype) -> None:
    model, delta = randomised(nn.Linear(6, 5), lora_r=3, lora_alpha=5.1)  # no power of two
    model.layer.to(dtype)
    delta.to(torch.float32)
    delta.freeze_module()
    a, b, scaling = factors(delta)
    x, grad = torch.randn(rows, 6).to(dtype), torch.randn(rows, 5).to(dtype)
    model(x).backward(grad)
    layer = delta.layer.lora
    expected = scaling * grad.float().t() @ (x.float() @ a.t())
    torch.testing.assert_close(layer.lora_B.grad, expected, rtol=1e-5, atol=1e-5)
    expected = scaling * (grad.float() @ b).t() @ x.float()
    torch.testing.assert_close(layer.lora_A.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 64])
def test_a_term_that_is_finite_only_when_scaled(rows: int) -> None:
    model = Host(nn.Linear(64, 64, bias=False)).to(torch.float16)
    delta = LoraModel(model, modified_modules=["layer"], lora_r=16, lora_alpha=1)
    delta.to(torch.float32)
    with torch.no_grad():
        model.layer.weight.zero_()
        for p in delta.parameters():
            p.fill_(4)
        output = model(torch.full((rows, 64), 8, dtype=torch.float16))
    assert (output == 8192).all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_no_more_than_input_and_low_rank_activation(
    dropout: float, host_dtype: torch.dtype
) -> None:
    model = Host(nn.Linear(64, 64)).to(host_dtype)
    delta = LoraModel(model, modified_modules=["layer"], lora_r=4, lora_dropout=dropout)
    delta.to(torch.float32)
    delta.freeze_module()
    x = torch.randn(64, 64, dtype=host_dtype)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept.pop(x.data_ptr()) == x.nbytes
    assert sum(kept.values()) == 64 * 4 * 4  # z in float32


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_is_the_same_with_and_without_checkpointing() -> None:
    """One seed, one mask: a recomputed block drops what its first forward dropped."""
    model, delta = built("LoraModel", "bert", lora_dropout=0.3)
    randomise(delta)
    delta.freeze_module()
    model.train()
    seen: list[tuple[float, Tensor]] = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model.zero_grad()
        value = loss(model, "bert")
        value.backward()
        grads = [p.grad.flatten() for p in delta.parameters() if p.grad is not None]
        seen.append((value.item(), torch.cat(grads)))
    (plain, grad), *others = seen
    assert len(grad) == sum(p.numel() for p in delta.parameters())
    assert grad.abs().sum() > 0
    for value, other in others:
        assert value == plain
        assert torch.equal(other, grad)


def test_dropout_is_the_same_with_and_without_gradients() -> None:
    """Whether gradients are wanted does not change what a seed drops."""
    model = linears(1)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=0.5)
    randomise(delta)
    model.train()
    x = torch.randn(3, 8)
    outputs = []
    for enabled in (True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(enabled):
            outputs.append(model(x))
    assert torch.equal(*outputs)
    delta.eval()
    assert not torch.equal(outputs[0], model(x))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_in_half_precision_keeps_no_second_input(dropout: float, autocast: bool) -> None:
    """For backward it keeps the input that there is, no cast or dropped copy of that size."""
    model = linears(1, 64)
    if not autocast:
        model.to(BF16)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=dropout)
    delta.freeze_module()
    model.train()
    x = torch.randn(64, 64, 64, dtype=BF16, requires_grad=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", BF16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        model(x)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= x.numel() // 2}
    assert large == {x.untyped_storage().data_ptr()}


# --- fused projections ---------------------------------------------------------------------------


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
