"""What methods are compared with PEFT by: numbers made of sines, tiny layers, five steps.

Entry i of a filled tensor, from 0 and row by row, is ``scale * sin((i + 1)² + k)``, so that a value
noted here can be computed again by any other library.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn


def wave(shape: Any, k: float = 0.0, scale: float = 0.5) -> Tensor:
    """A tensor of such numbers."""
    count = torch.Size(shape).numel()
    values = scale * torch.sin(torch.arange(1, count + 1, dtype=torch.float64) ** 2 + k)
    return values.reshape(shape).float()


@torch.no_grad()
def fill(parameter: Tensor, k: float = 0.0, scale: float = 0.5) -> None:
    parameter.copy_(wave(parameter.shape, k, scale))


class Net(nn.Module):
    """One linear of 6 inputs and 4 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)
        fill(self.lin.weight, 1)
        fill(self.lin.bias, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def rows() -> Tensor:
    """Two rows for `Net`."""
    return wave((2, 6), 7, 1.0)


class Opaque(nn.Module):
    """Stands for a quantised linear: int8 codes with a scale a row, and no weight to look at."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def dense(self) -> nn.Linear:
        """A plain linear that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, dtype=self.scale.dtype)
        linear.load_state_dict({"weight": self.codes * self.scale, "bias": self.bias})
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes * self.scale, self.bias)


class Two(nn.Module):
    """Two layers with a non-linearity between, called `first` and `last`."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def random_net(seed: int, kinds: list[str]) -> tuple[Two, Tensor]:
    """Two layers of a random kind, of random sizes, and an input for them."""
    torch.manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, ()))

    kind, wide = kinds[seed % len(kinds)], some(3, 9)
    sizes, bias = (some(2, 9), wide, some(2, 9)), bool(some(0, 2))
    if kind == "linear":
        layers: list[nn.Module] = [
            nn.Linear(*pair, bias=bias) for pair in itertools.pairwise(sizes)
        ]
        x = torch.randn(some(1, 40), sizes[0])
    elif kind == "Conv1D":
        one_d = transformers.pytorch_utils.Conv1D
        layers = [one_d(out, width) for width, out in itertools.pairwise(sizes)]
        x = torch.randn(2, some(1, 20), sizes[0])
    else:
        dimensions = int(kind[4])
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        layers = [
            convolution(width, out, some(1, 4), some(1, 3), some(0, 3), bias=bias)
            for width, out in itertools.pairwise(sizes)
        ]
        x = torch.randn(2, sizes[0], *(some(9, 12) for _ in range(dimensions)))
    net = Two(*layers)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.5)
    return net, x


@torch.no_grad()
def same_values(pairs: list[tuple[Tensor, Tensor]], seed: int) -> None:
    """Give each pair of a parameter of ours and PEFT's the same random values."""
    torch.manual_seed(seed)
    for ours, theirs in pairs:
        values = ours + 0.3 * torch.randn(ours.shape).to(ours)
        ours.copy_(values)
        theirs.copy_(values.view(theirs.shape))


def compare(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    pairs: list[tuple[nn.Parameter, nn.Parameter]],
    x: Tensor,
    tolerance: float = 1e-5,
) -> None:
    """Equal outputs and gradients in each of five steps of an optimizer."""
    optimizers = [torch.optim.Adam(side, lr=1e-2) for side in zip(*pairs, strict=True)]
    for _ in range(5):
        results = []
        for function, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            out = function(given)
            (out * wave(out.shape, 3, 1.0).to(out)).sum().backward()
            results.append((out, given.grad))
        close(results[0][0], results[1][0], tolerance)
        close(results[0][1], results[1][1], tolerance)
        for p, q in pairs:
            assert p.grad is not None and q.grad is not None
            close(p.grad, q.grad.view(p.shape), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in pairs:
        close(p, q.view(p.shape), tolerance)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to within a share of the largest value, which is what float32 rounds by."""
    largest = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


@torch.no_grad()
def folded(delta: Any) -> nn.Module:
    """The backbone without the delta, its parameters as `folds` says."""
    twin = copy.deepcopy(delta.backbone_model)
    import opendelta

    (other,) = opendelta.deltas(twin)
    values = {
        f"{i.host_name}.{name}": value
        for i in other.insertions
        for name, value in other.folds(i).items()
    }
    other.remove()
    for name, value in values.items():
        assert value.shape == twin.get_parameter(name).shape
        twin.get_parameter(name).copy_(value)
    return twin


def randomise(delta: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.3 * torch.randn(p.shape).to(p))
