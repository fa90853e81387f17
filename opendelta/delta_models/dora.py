"""DoRA: direction and length of a weight's rows learned apart (Liu et al. 2024).

https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.backends import dense
from opendelta.backends.sharding import is_dtensor, is_shard
from opendelta.basemodel import DeltaBase
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.host_kinds import Embedding, HostKind, SplitLinear
from opendelta.delta_models.low_rank import LoraLayer, LowRankModel
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.containers import Args, Kwargs, by_row, first_hidden, map_hidden
from opendelta.mechanism.dispatch import AfterDispatcher
from opendelta.saving.peft_files import Fields


def rescaled(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Let the delta change the output: ``delta(hidden output, hidden input, host)``."""
    source = first_hidden(args, kwargs)
    run = partial(delta, host=host)
    return map_hidden(output, lambda hidden: by_row(run, hidden, source))


class DoraLayer(LoraLayer):
    """``m / n (W x + s B A x) + bias``, where n holds the lengths of the rows of ``W + s B A``.

    W is never read: the host has computed ``W x + bias``, and

        n² = |W|² + 2 s sum_r B ∘ (A W^T)^T + s² sum_r B ∘ (B A A^T),

    where ``A W^T`` is the host, called past its hooks, on the r rows of A. ``|W|²`` is computed
    once and again only when the host's weight was changed. Gradients take n for a constant, as the
    paper proposes, and dropout acts on x of the low-rank term alone.

    Parameters: `lora_A` and `lora_B` as LoRA's, and `magnitude` m (out,), which starts as the
    lengths of the rows of W, so that the layer does not change the output at first.

    Args:
        kind: the kind of the host.
        host: the layer whose rows are rescaled.
        hyper: rank, alpha and dropout, see `LoraLayer`.
    """

    routed = None  # type: ignore[assignment]  # each delta on its rows alone
    reads_host = True  # the lengths of its rows

    def __init__(self, kind: HostKind, host: nn.Module, *hyper: Any) -> None:
        super().__init__(kind, *hyper)
        # Not buffers: they stay in float32 whatever the layer is cast to.
        self._squares: Tensor | None = None
        self._squares_of: tuple[Any, ...] | None = None
        lengths = self.lora_A.new_empty(self.lora_B.shape[0])
        if not lengths.is_meta:  # a layer that is looked at alone needs no values
            squares = dense.row_squares(host)
            lengths = squares.sqrt()
            if not (squares.is_meta or isinstance(kind, SplitLinear)):
                self._squares, self._squares_of = squares, _values_of(host)
        self.magnitude = nn.Parameter(lengths)

    def forward(self, output: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        """The output of `host` for the input `x`, rescaled; it keeps its shape and dtype."""
        assert host is not None
        added, kind = super().forward(output, x), self.kind
        norms: Any
        norms, constant = self.norms_and_bias(host)
        if is_dtensor(self.magnitude):
            norms = _split_like(norms, self.magnitude)
        gain = kind.along_features(self.magnitude, output) / kind.along_features(norms, output)
        bias = getattr(host, "bias", None)  # which may be trained, so not what a call said it is
        bias = constant if bias is None else bias
        rest = added.new_zeros(()) if bias is None else kind.along_features(bias, output)
        # As this much of the way back to the bias: in 16 bits a gain near 1 has few digits, what it
        # lacks of 1 has all, and a gain of 1 changes no bit.
        return torch.lerp(added, rest.to(added.dtype), (1 - gain).to(added.dtype))

    @torch.no_grad()
    def norms_and_bias(self, host: nn.Module) -> tuple[Tensor, Tensor | None]:
        """n, in float32 or wider, and the bias that `host` adds, whatever that is called.

        Of all rows, or of those that this rank has of a split host.
        """
        squares = self._row_squares(host).to(self.lora_A.device)
        with torch.autocast(squares.device.type, enabled=False):
            cross, gram, bias = self.kind.products(host, self.lora_A.to(squares.dtype))
            b = self.kind.held(self.lora_B).to(squares.dtype)
            change = 2 * cross.to(squares).t() + self.scaling * (b @ gram)
            squares = squares + self.scaling * (b * change).sum(1)
        # At least a number whose root divides zero: rows of zeros stay so.
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), bias

    def _row_squares(self, host: nn.Module) -> Tensor:
        """``|W|²`` of the weight that `host` has now."""
        weight: Any = host._parameters.get("weight")
        is_plain = type(weight) is nn.Parameter and not (weight.is_meta or is_shard(weight))
        if is_plain and (torch.compiler.is_compiling() or weight.requires_grad):
            return self.kind.row_squares(host)  # it may change without a word: fused optimizers
        if self._squares is None or not torch.compiler.is_compiling():
            now = _values_of(host)
            if now is None:
                return self.kind.row_squares(host)
            if self._squares is None or now != self._squares_of:
                self._squares, self._squares_of = self.kind.row_squares(host), now
        return self._squares


def _values_of(host: nn.Module) -> tuple[Any, ...] | None:
    """What tells that a host's weight was changed; None where that cannot be told now.

    It is the same at all times while an engine swaps tensors by itself. The mode is part of it, for
    8-bit layers round in evaluation what they do not in training.
    """
    held = (*host._parameters.items(), *host._buffers.items())
    tensors = [tensor for name, tensor in held if tensor is not None and name != "bias"]
    if not tensors or torch._C._are_functorch_transforms_active():
        return None  # a replica of DataParallel has no parameters
    managed = getattr(host, "_is_fsdp_managed_module", False)
    if managed or any(is_shard(tensor) or tensor.is_inference() for tensor in tensors):
        return ("an engine's",)
    plain = (Tensor, nn.Parameter)
    held_now = ((t.data_ptr() if type(t) in plain else id(t), t._version) for t in tensors)
    return (host.training, *held_now)


def _split_like(vector: Tensor, other: Any) -> Any:
    """This rank's slice of a vector as the `DTensor` that `other`, of the same length, is."""
    from torch.distributed.tensor import DTensor  # loaded: there is one

    mesh, placements = other.device_mesh, other.placements
    return DTensor.from_local(
        vector, mesh, placements, run_check=False, shape=other.shape, stride=other.stride()
    )


class DoraConfig(BaseDeltaConfig):
    """Config of `DoraModel`; its fields are that constructor's arguments."""


@register
class DoraModel(LowRankModel):
    """Rescaled rows of ``W + alpha / r B A``: LoRA whose lengths of rows are learned apart.

    Targets are linears (`nn.Linear`, transformers' `Conv1D`, quantised ones), `nn.Conv1d`,
    `nn.Conv2d` and `nn.Conv3d`; a module that holds others stands for all linears inside it. The
    bias of a host is left as it is. A step makes no tensor of the size of a weight. Dropout acts on
    the low-rank path alone (PEFT drops what the frozen weight gets as well).

    Its effect is no sum: deltas on one module act in the order in which they were constructed, and
    `combine` refuses it.

    Args:
        backbone_model: the model to modify, in place.
        lora_r: rank.
        lora_alpha: the low-rank term is scaled by ``lora_alpha / lora_r``.
        lora_dropout: dropout of the low-rank term's input.
        modified_modules: see `DeltaBase`, also for the arguments up to `backend`.
        rank_pattern: pattern -> rank of the modules that it addresses, instead of `lora_r`.
        alpha_pattern: pattern -> alpha of the modules that it addresses.

    Raises:
        InsertionError: if a target is no linear map and holds none, or is an embedding.
        ConfigError: for a rank below 1 or a dropout outside [0, 1).
    """

    title: ClassVar[str] = "DoRA"
    delta_type: ClassVar[str] = "dora"
    uses_dora: ClassVar[bool] = True
    peft_key: ClassVar[re.Pattern[str]] = re.compile(
        r"(.+)\.(lora_[AB]|lora_magnitude_vector)(?:\.weight)?"
    )
    peft_fields: ClassVar[Fields] = {**LowRankModel.peft_fields, "use_dora": (False, bool)}
    config_class = DoraConfig

    def __init__(
        self,
        backbone_model: nn.Module,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def put_on(self, host: nn.Module, name: str, kind: HostKind, *hyper: Any) -> None:
        if isinstance(kind, Embedding):
            raise InsertionError(
                f"{name!r} is an embedding ({type(host).__name__}): DoRA goes on linears and "
                "convolutions. Use LoraModel there, or leave it out with exclude_modules."
            )
        self.insert_action(host, DoraLayer(kind, host, *hyper), "dora", AfterDispatcher, rescaled)

    def folds(self, insertion: Any) -> dict[str, Tensor]:
        """``m / n (W + s B A)``, row by row; biases stay."""
        layer, weight = insertion.module, insertion.host.weight
        total = weight.detach() + layer.update(weight.dtype).to(weight.device)
        rows = layer.kind.rows(total)
        lengths = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
        rows.mul_((layer.magnitude.detach().to(rows) / lengths).unsqueeze(1))
        return {"weight": total}

    def combined_config(self, deltas: Sequence[DeltaBase]) -> BaseDeltaConfig:
        raise ConfigError(
            "combine: what DoraModel adds is divided by the lengths of the rows that it makes, so "
            "several do not add up. Attach one at a time, or route rows to them."
        )
