"""How each kind of layer applies a low-rank pair, so that a method's maths is written once.

A pair is ``A``, which leads from the layer's input to r channels, and ``B``, which leads from those
to its output. A kind knows their shapes, how to apply them, and what they come to as a weight.
Kinds are told by attributes, never by class, and hold numbers alone: no layer, no tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendelta.addressing.feed_forward import about_experts
from opendelta.backends import dense
from opendelta.backends.sharding import full_shape, is_dtensor, is_flattened
from opendelta.delta.plan import Plan, reads_without_calling
from opendelta.delta_models.low_rank_add import low_rank_add
from opendelta.exceptions import InsertionError
from opendelta.ground.widths import read_widths
from opendelta.mechanism.engines import split_by
from opendelta.mechanism.ownership import own_children

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class HostKind:
    """A kind of layer that adds a bias, or nothing, to what is linear in its weight.

    Attributes:
        width_in, width_out: how many features the layer takes and returns.
        channels: the dimension of the output that holds the features.
        by_rows: whether each row of a batch may have factors of its own, in one batched product
            of matrices.
    """

    width_in: int
    width_out: int
    channels = -1
    by_rows = False

    def shapes(self, r: int) -> Shapes:
        """The shapes of A and B for rank `r`."""
        raise NotImplementedError

    @staticmethod
    def widths(host: Any) -> tuple[int, int] | None:
        """How many features a layer takes and returns by now, None if it does not say."""
        return read_widths(host)

    def start(self, a: Tensor) -> None:
        """Fill A with its first values."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def down(self, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        """A applied to an input of the layer, of which a share is dropped."""
        raise NotImplementedError

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        """B applied to what `down` returns."""
        raise NotImplementedError

    def add(
        self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        """`output` and ``scaling * B A x``, in the dtype of `output`."""
        term = self.up(self.down(x, a, dropout) * scaling, b)
        return output + term.to(output.dtype)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in the layout of the layer's weight."""
        raise NotImplementedError

    def rows(self, weight: Tensor) -> Tensor:
        """A view (out, ...) of a weight in the layer's layout: what leads to each feature."""
        return weight.flatten(1)

    def along_features(self, vector: Tensor, output: Tensor) -> Tensor:
        """A vector (out,), seen so that it goes along the features of an output."""
        return vector

    # Of the layer's weight W as this process holds it: of all its rows, or of a slice of them.

    def products(self, host: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``A W^T`` (r, out) by a call of the layer itself, ``A A^T`` (r, r), and its bias."""
        cross, bias = dense.product_and_bias(host, a)
        return cross, a.flatten(1) @ a.flatten(1).t(), bias

    def row_squares(self, host: nn.Module) -> Tensor:
        """The squared length of each row of W, (out,)."""
        return dense.row_squares(host)

    def held(self, b: Tensor) -> Tensor:
        """The rows of B that belong to these rows of W, (out, r)."""
        return b.flatten(1)


class Linear(HostKind):
    """A linear of any class, and transformers' `Conv1D`, whose weight is (in, out).

    A is (r, in) and starts Kaiming-uniform, B (out, r).
    """

    by_rows = True

    def __init__(self, width_in: int, width_out: int, transposed: bool = False) -> None:
        self.width_in, self.width_out, self.transposed = width_in, width_out, transposed

    def shapes(self, r: int) -> Shapes:
        return (r, self.width_in), (self.width_out, r)

    def add(
        self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        return low_rank_add(output, x, a, b, scaling, dropout)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).t() if self.transposed else b @ a

    def rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight


class Convolution(HostKind):
    """A convolution: A is one of rank r with its kernel, B a pointwise one.

    A is (r, in / groups, *kernel), the same for each group; B is (out, r, 1, ...). Groups,
    dilation and every mode of padding are the layer's.
    """

    channels = 1

    def __init__(self, host: Any) -> None:
        self.kernel = (host.in_channels // host.groups, *host.kernel_size)
        self.width_in, self.width_out, self.groups = (
            host.in_channels,
            host.out_channels,
            host.groups,
        )
        self.options = {"stride": host.stride, "padding": host.padding, "dilation": host.dilation}
        self.pad_mode = host.padding_mode
        self.pad = tuple(getattr(host, "_reversed_padding_repeated_twice", ()))

    def shapes(self, r: int) -> Shapes:
        return (r, *self.kernel), (self.width_out, r, *(1 for _ in self.kernel[1:]))

    def convolve(self, x: Tensor, kernel: Tensor, **options: Any) -> Tensor:
        function: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.dim()]
        made: Tensor = function(x, kernel, groups=self.groups, **options)
        return made

    def down(self, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        x, options = F.dropout(x.to(a.dtype), dropout), dict(self.options)
        if self.pad_mode != "zeros":
            x, options["padding"] = F.pad(x, self.pad, mode=self.pad_mode), 0
        # Each group has the same A: r channels of every group's input.
        return self.convolve(x, a.repeat(self.groups, *(1 for _ in self.kernel)), **options)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return self.convolve(z, b)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        return (b.flatten(1) @ a.flatten(1)).unflatten(1, self.kernel)

    def along_features(self, vector: Tensor, output: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.kernel[1:]))


def vocabulary(host: Any) -> int:
    """How many rows an embedding has: in its weight, for ties grow without the attribute."""
    weight = host._parameters.get("weight")
    plain = type(weight) is nn.Parameter and weight.dim() == 2 and not is_flattened(weight)
    rows: int = full_shape(weight)[0] if plain else host.num_embeddings
    return rows


class Embedding(HostKind):
    """An embedding: ``B A[:, ids]``.

    A is (r, vocabulary) from N(0, 1/3), the size that a linear's low-rank activation has for inputs
    of unit variance; B is (width, r).
    """

    def __init__(self, host: Any) -> None:
        self.width_in, self.width_out = self.widths(host)
        self.padding_idx = host.padding_idx

    @staticmethod
    def widths(host: Any) -> tuple[int, int]:
        return vocabulary(host), host.embedding_dim

    def shapes(self, r: int) -> Shapes:
        return (r, self.width_in), (self.width_out, r)

    def start(self, a: Tensor) -> None:
        nn.init.normal_(a, std=3**-0.5)

    def down(self, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        return F.dropout(F.embedding(x, a.t(), self.padding_idx), dropout)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return F.linear(z, b)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).t()

    def rows(self, weight: Tensor) -> Tensor:
        return weight.t()


# --- tensor parallelism ---------------------------------------------------------------------------


class _Shared(torch.autograd.Function):
    """What every rank has whole and uses for its own slice: gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks of what each has computed from its own slice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        z = z.contiguous().clone()
        torch.distributed.all_reduce(z, group=group)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SplitLinear(Linear):
    """A linear that tensor parallelism splits; the factors are `DTensor`s, and whole in files.

    One that is split by columns has a slice of the output features on each rank, one split by rows
    a slice of the input features. The factor on that side is split alike and the other one is whole
    on every rank, so that ranks exchange no more than the low-rank activation (or, backward, its
    gradient). Activations are local tensors, as transformers hands them on: whole, or this rank's
    slice. Dropout draws on each rank's own random state.
    """

    by_rows = False  # rows with deltas of their own are not split

    def split(self, module: nn.Module, host: Any) -> None:
        """Split the parameters of a delta module, the same on all ranks, as the host's weight is.

        Those that lead to the input side are called ``lora_A``; all others lie along the output.
        """
        from torch.distributed.tensor import Replicate, distribute_tensor  # loaded by the host

        (placement,) = host.weight.placements
        by_input = _splits_inputs(host)
        for name, p in list(module._parameters.items()):
            assert p is not None
            where = placement if by_input == (name == "lora_A") else Replicate()
            mesh = host.weight.device_mesh
            shard = distribute_tensor(p.detach(), mesh, [where], src_data_rank=None)
            module._parameters[name] = nn.Parameter(shard, p.requires_grad)

    def add(
        self, output: Tensor, x: Tensor, a: Any, b: Any, scaling: float, dropout: float
    ) -> Tensor:
        """Add the term of `x` onto `output`, each of them whole or this rank's slice."""
        group = a.device_mesh.get_group()
        x = F.dropout(x.to(a.dtype), dropout)
        if is_dtensor(x):  # PyTorch's own plans, whose algebra moves what has to be moved
            return output + (F.linear(F.linear(x, a), b) * scaling).to(output.dtype)
        if x.shape[-1] == a.shape[1]:
            z = F.linear(x, a.full_tensor())
        else:
            z = _Summed.apply(F.linear(x, a.to_local()), group)
        if output.shape[-1] == b.shape[0]:
            term = F.linear(z, b.full_tensor())
        else:
            term = F.linear(_Shared.apply(z, group), b.to_local())
        return output + (term * scaling).to(output.dtype)

    def along_features(self, vector: Any, output: Tensor) -> Tensor:
        if is_dtensor(output):
            found: Tensor = vector
        elif output.shape[-1] == vector.shape[0]:
            found = vector.full_tensor()
        else:
            found = vector.to_local()
        return found

    def products(self, host: Any, a: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, a = host.weight.to_local(), a.to_local()
        cross, gram = F.linear(a.to(weight.dtype), weight), F.linear(a, a)
        self._sum_over_inputs(host, cross, gram)
        return cross, gram, None

    def row_squares(self, host: Any) -> Tensor:
        squares: Tensor = host.weight.to_local().float().square().sum(1)
        self._sum_over_inputs(host, squares)
        return squares

    def held(self, b: Any) -> Tensor:
        rows: Tensor = b.to_local()
        return rows

    @staticmethod
    def _sum_over_inputs(host: Any, *parts: Tensor) -> None:
        """Make what is summed over this rank's input features a sum over all."""
        if _splits_inputs(host):
            for part in parts:
                torch.distributed.all_reduce(part, group=host.weight.device_mesh.get_group())


def _splits_inputs(host: Any) -> bool:
    (placement,) = host.weight.placements
    return bool(getattr(placement, "dim", 0) % 2 == 1)


# --- which kind -----------------------------------------------------------------------------------


def host_kind(host: Any) -> HostKind | None:
    """The kind of a layer, None where it is none of them."""
    is_linear = hasattr(host, "in_features")
    if split_by(host) is not None:
        weight: Any = getattr(host, "weight", None)
        if not is_dtensor(weight) or weight.dim() != 2 or weight.device_mesh.ndim != 1:
            return None
        return SplitLinear(host.in_features, host.out_features) if is_linear else None
    if is_linear or hasattr(host, "nf"):
        widths = read_widths(host)
        return None if widths is None else Linear(*widths, transposed=not is_linear)
    if hasattr(host, "num_embeddings") and hasattr(host, "embedding_dim"):
        is_bag = hasattr(host, "include_last_offset")  # which sums up the rows of its ids
        return None if is_bag else Embedding(host)
    if hasattr(host, "in_channels") and not getattr(host, "transposed", True):
        return Convolution(host)
    return None


def layers_of(plan: Plan, key: str, method: str) -> dict[str, nn.Module]:
    """What the module called `key` stands for: itself, or all linears inside one that holds others.

    Raises:
        InsertionError: if it holds none.
    """
    target = plan.backbone.get_submodule(key)
    if not own_children(target) or hasattr(target, "weight"):
        return {key: target}
    parts = {
        name: part
        for name, part in plan.targeting.named_inside(key)
        if isinstance(host_kind(part), Linear)
        and name != key
        and not reads_without_calling(plan.backbone, name)
    }
    if not parts:
        raise InsertionError(
            f"{key!r} ({type(target).__name__}) holds no linear that {method} could be put on."
            + about_experts(target)
        )
    return {name: part for name, part in parts.items() if not plan.targeting.is_excluded(name)}


def require_kind(host: nn.Module, name: str, method: str) -> HostKind:
    """The kind of the layer called `name`.

    Raises:
        InsertionError: if it is none of them, or is split and no linear.
    """
    kind = host_kind(host)
    if kind is not None:
        return kind
    weight = split_by(host)
    if weight is not None:
        raise InsertionError(
            f"{name!r} ({type(host).__name__}) is split by tensor parallelism (placements "
            f"{tuple(weight.placements)} over {weight.device_mesh.size()} ranks): {method} follows "
            "the plan on linears over one dimension of a mesh alone. Leave it out with "
            "exclude_modules."
        )
    raise InsertionError(
        f"{name!r} is a {type(host).__name__}, which is no linear map: {method} goes on linears, "
        "convolutions (not transposed ones) and embeddings, or on a module that holds linears."
        + about_experts(host)
    )
