"""Kinds of layers: how each applies a low-rank pair, and what its weight is told to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft_reference import Opaque, close
from torch import Tensor, nn

import opendelta
from opendelta import LoraModel
from opendelta.backends import dense
from opendelta.delta_models.host_kinds import (
    Convolution,
    Embedding,
    Linear,
    host_kind,
    require_kind,
)
from opendelta.exceptions import InsertionError
from opendelta.ground.examples import example_input

Conv1D = transformers.pytorch_utils.Conv1D


class Foreign(nn.Module):
    """A linear of no known class, which says its widths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 5, 4
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.left @ self.right).t() + self.shift


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "linear": nn.Linear(5, 4),
        "without bias": nn.Linear(5, 4, bias=False),
        "Conv1D": Conv1D(4, 5),
        "quantised": Opaque(nn.Linear(5, 4)),
        "foreign": Foreign(),
        "embedding": nn.Embedding(7, 4, padding_idx=2),
        "line": nn.Conv1d(4, 6, 3, 2, 1),
        "plane": nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2),
        "circle": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", groups=2),
        "mirror": nn.Conv1d(4, 4, 4, 3, 2, padding_mode="reflect", groups=4),
        "space": nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 1, 2)),
    }
    with torch.no_grad():
        for layer in made.values():
            for p in layer.parameters():
                p.normal_()
    return made


KINDS = {
    "embedding": Embedding,
    **dict.fromkeys(("line", "plane", "circle", "mirror", "space"), Convolution),
}
CASES = [*layers()]
WITH_WEIGHT = [case for case in CASES if case not in ("quantised", "foreign")]


@pytest.mark.parametrize("case", CASES)
def test_kinds_are_told_by_attributes(case: str) -> None:
    host = layers()[case]
    assert type(host_kind(host)) is KINDS.get(case, Linear)
    assert type(host_kind(copy.deepcopy(host))) is KINDS.get(case, Linear)


@pytest.mark.parametrize("case", WITH_WEIGHT)
def test_the_pair_computes_what_its_update_does(case: str) -> None:
    host: Any = layers()[case]
    kind = host_kind(host)
    assert kind is not None
    a, b = (torch.randn(shape) for shape in kind.shapes(3))
    x = example_input(host)
    assert x is not None
    made = host(x)
    twin = copy.deepcopy(host)
    update = kind.update(a, b)
    assert update.shape == host.weight.shape
    with torch.no_grad():
        twin.weight += 1.5 * update
    close(kind.add(made, x, a, b, 1.5, 0.0), twin(x))
    assert made.shape[kind.channels] == kind.width_out


@pytest.mark.parametrize("case", WITH_WEIGHT)
def test_rows_are_what_leads_to_each_feature(case: str) -> None:
    host: Any = layers()[case]
    kind = host_kind(host)
    assert kind is not None
    if getattr(host, "bias", None) is not None:
        nn.init.zeros_(host.bias)
    x, factors = example_input(host), torch.arange(1.0, kind.width_out + 1)
    made = host(x).detach()
    with torch.no_grad():
        kind.rows(host.weight).mul_(factors.unsqueeze(1))
    close(host(x), made * kind.along_features(factors, made))


@pytest.mark.parametrize("case", [case for case in CASES if case != "embedding"])
@pytest.mark.parametrize("hooked", [False, True])
def test_products_and_weights_come_from_calls(case: str, hooked: bool) -> None:
    host: Any = layers()[case]
    if hooked:  # which are passed by
        host.register_forward_hook(lambda module, args, output: output * 7)
    known = {
        "quantised": lambda: host.codes * host.scale,
        "foreign": lambda: host.left @ host.right,
        "Conv1D": lambda: host.weight.t(),
    }
    weight = known.get(case, lambda: host.weight)().detach()
    shape = dense.kernel_shape(host)
    kernels = torch.randn(3, *shape)
    close(dense.product(host, kernels), kernels.flatten(1) @ weight.flatten(1).t())
    close(dense.dense_weight(host), weight)
    close(dense.row_squares(host), weight.flatten(1).square().sum(1))


def test_a_plain_weight_is_returned_itself() -> None:
    host = nn.Linear(5, 4)
    assert dense.dense_weight(host).data_ptr() == host.weight.data_ptr()


@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_a_wide_host_is_asked_by_parts(width: int) -> None:
    host = Opaque(nn.Linear(width, 3))
    seen = []
    host.forward = lambda x: seen.append(len(x)) or Opaque.forward(host, x)  # type: ignore[method-assign, func-returns-value]
    close(dense.dense_weight(host), host.codes * host.scale)
    assert max(seen) <= dense.CHUNK + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_host_is_called_in_its_dtype(dtype: torch.dtype) -> None:
    host = Foreign().to(dtype)
    made = dense.dense_weight(host)
    assert made.dtype == dtype
    torch.testing.assert_close(made, host.left @ host.right, rtol=2e-2, atol=2e-2)
    assert dense.row_squares(host).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.ConvTranspose1d(4, 4, 3), nn.Bilinear(2, 2, 2), nn.Identity()],
)
def test_other_layers_are_none_of_them(layer: nn.Module) -> None:
    assert host_kind(layer) is None
    with pytest.raises(InsertionError, match=f"'there' is a {type(layer).__name__}.*LoRA goes on"):
        require_kind(layer, "there", "LoRA")


@pytest.mark.parametrize("case", WITH_WEIGHT)
def test_folds_of_lora(case: str) -> None:
    host = layers()[case]
    model = nn.Sequential(host)
    delta = LoraModel(model, 2, modified_modules=["0"])
    with torch.no_grad():
        for p in delta.parameters():
            p.normal_()
    x = example_input(host)
    made = model(x)
    (insertion,) = delta.insertions
    folded = delta.folds(insertion)
    assert list(folded) == ["weight"]
    delta.detach()
    with torch.no_grad():
        host.weight.copy_(folded["weight"])
    close(model(x), made)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((3, 4)), nn.RMSNorm(5), nn.Linear(3, 2), nn.Embedding(2, 3)]
)
def test_example_inputs_can_be_computed_with(norm: nn.Module) -> None:
    x = example_input(norm)
    assert x is not None and norm(x).isfinite().all()
    assert example_input(nn.Identity()) is None


@pytest.mark.parametrize("case", ["embedding", "plane", "mirror", "Conv1D"])
def test_rows_of_a_batch(case: str) -> None:
    host = layers()[case]
    model = nn.Sequential(host)
    one, other = (LoraModel(model, r, modified_modules=["0"]) for r in (1, 3))
    with torch.no_grad():
        for p in (*one.parameters(), *other.parameters()):
            p.normal_()
    x: Any = example_input(host)
    x = x if case == "embedding" else torch.cat([x[:1] * k for k in (1, 2, -1, 3)])
    expected = []
    for row, delta in enumerate((other, None, one, other)):
        for each in (one, other):
            each.attach() if each is delta else each.detach()
        expected.append(model(x)[row])
    with opendelta.route(model, [other, None, one, other]):
        close(model(x), torch.stack(expected))
