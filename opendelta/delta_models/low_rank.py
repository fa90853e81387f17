"""What the methods of a low-rank pair share: the layer, where it goes, ranks by pattern."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.addressing.patterns import as_patterns, matches_any
from opendelta.backends.sharding import is_shard
from opendelta.delta.plan import Plan, reads_without_calling
from opendelta.delta_models.host_kinds import (
    Embedding,
    HostKind,
    SplitLinear,
    host_kind,
    layers_of,
    require_kind,
)
from opendelta.delta_models.peft_lora import PeftLora
from opendelta.exceptions import AddressingError, ConfigError, nearest
from opendelta.ground.containers import Args, Kwargs, first_hidden, map_hidden
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.hosts import of_other_size

if TYPE_CHECKING:
    from opendelta.mechanism.rows import Rows


class LoraLayer(nn.Module):
    """The low-rank term ``scaling * B A x`` of a layer of any kind, with ``scaling = alpha / r``.

    Parameters: `lora_A` and `lora_B`, of the kind's shapes; for a linear (r, in) and (out, r). B
    starts at zero, so that the term does.

    Args:
        kind: of the layer that it is for.
        r: the rank.
        lora_alpha: r times the scaling.
        lora_dropout: share of the term's input that is dropped in training.

    Raises:
        ConfigError: for a rank below 1, an alpha that is not finite, or a dropout outside [0, 1).
    """

    def __init__(self, kind: HostKind, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__()
        if r < 1:
            raise ConfigError(f"lora_r={r}; expected a rank of 1 or more.")
        if not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha={lora_alpha}; expected a finite number.")
        if not 0 <= lora_dropout < 1:
            raise ConfigError(f"lora_dropout={lora_dropout}; expected a share in [0, 1).")
        self.kind, self.r, self.lora_alpha, self.scaling = kind, r, lora_alpha, lora_alpha / r
        self.lora_dropout = lora_dropout
        a, b = kind.shapes(r)
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(a)), nn.Parameter(torch.zeros(b))
        kind.start(self.lora_A)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the term of the input `x` onto `output`; returns its shape and dtype."""
        dropout = self.lora_dropout if self.training else 0.0
        return self.kind.add(output, x, self.lora_A, self.lora_B, self.scaling, dropout)

    def misfit(self, host: nn.Module) -> str | None:
        """Which widths the host has, and which this is made for, where they differ."""
        now, made_for = self.kind.widths(host), (self.kind.width_in, self.kind.width_out)
        if now is None or now == made_for:
            return None
        made = "it is made for {} -> {}".format(*made_for)
        return made + ", and {} -> {} is there now".format(*now)

    def require_fit(self, host: nn.Module) -> None:
        """Refuse an embedding whose vocabulary has changed.

        Raises:
            InsertionError: saying what to do.
        """
        if isinstance(self.kind, Embedding) and not torch.compiler.is_compiling():
            misfit = self.misfit(host)
            if misfit is not None:
                raise of_other_size(f"The {self._get_name()} beside {type(host).__name__}", misfit)

    @torch.no_grad()
    def grow(self, host: nn.Module, changes: Changes) -> bool:
        """Have a column of A for each row that an embedding got, starting as A does.

        Returns:
            Whether that is what is wanting.
        """
        kind, own, a = host_kind(host), self.kind, self.lora_A
        more = isinstance(kind, Embedding) and kind.width_in > own.width_in
        if kind is None or not more or kind.width_out != own.width_out or is_shard(a):
            return False
        grown = a.new_empty(kind.shapes(self.r)[0])
        kind.start(grown)
        grown[:, : own.width_in] = a
        changes.do(setattr, a, "grad", None)
        changes.set_data(a, grown)
        changes.set(self, kind=kind)
        return True

    def update(self, dtype: torch.dtype) -> Tensor:
        """What the term comes to as a change of its host's weight, in that one's layout."""
        return self.kind.update(self.lora_A.to(dtype), self.scaling * self.lora_B.to(dtype))

    def split_like(self, host: nn.Module) -> None:
        """Split the parameters, which are the same on all ranks, as the host's weight is."""
        assert isinstance(self.kind, SplitLinear)
        self.kind.split(self, host)

    @staticmethod
    def routed(
        layers: list[LoraLayer],
        rows: Rows,
        host: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
    ) -> Any:
        """Add to each row of a batch the term of its delta, on linears all in one product.

        Lower ranks are filled up with zeros, and so are the weights for rows without any term.
        """
        x = first_hidden(args, kwargs)
        repeats = rows.repeats(x, host)  # raises where these are not the rows
        if not layers[0].kind.by_rows:
            for layer in layers:
                layer.require_fit(host)
            members, back = rows.members(x.device, repeats)

            def add(hidden: Tensor) -> Tensor:
                acting = zip(layers, members, strict=False)
                parts = [layer(hidden[m], x[m]) for layer, m in acting]
                return torch.cat([*parts, hidden[members[-1]]])[back]

            return map_hidden(output, add)
        r = max(layer.r for layer in layers)
        a = rows.pick([F.pad(layer.lora_A, (0, 0, 0, r - layer.r)) for layer in layers])
        b = rows.pick([F.pad(layer.lora_B * layer.scaling, (0, r - layer.r)) for layer in layers])
        entries = x.reshape(len(rows), -1, x.shape[-1]).to(a.dtype)
        dropouts = [layer.lora_dropout if layer.training else 0.0 for layer in layers]
        if any(dropouts):
            lost = rows.pick([a.new_tensor(dropout) for dropout in dropouts])
            kept = (1 - lost).view(-1, 1, 1)
            entries = entries * torch.bernoulli(kept.expand_as(entries)) / kept
        term = entries @ a.mT @ b.mT
        return map_hidden(output, lambda hidden: hidden + term.to(hidden.dtype).view_as(hidden))


class LowRankModel(PeftLora):
    """Base of the methods that put a low-rank pair on layers, whose ranks go by patterns.

    A module that holds others stands for all linears inside it. A subclass defines `put_on`, and
    its constructor has the arguments of LoRA's.
    """

    default_modified_modules: ClassVar[list[str]] = ["attn.q", "attn.v"]

    def put_on(self, host: nn.Module, name: str, kind: HostKind, *hyper: Any) -> None:
        """Put the method's layer on a layer of the backbone.

        Args:
            host: that layer.
            name: its name.
            kind: its kind.
            hyper: rank, alpha and dropout there.
        """
        raise NotImplementedError

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """The projections of q and v; where none of those is called, those of the feed-forward."""
        backbone, own = self.plan.backbone, self.plan.targeting.own
        transposed = {name for name, m in own if getattr(m, "transposed", False)}

        def linear(roles: list[str]) -> list[list[str]]:
            return [[n for n in structure.addressed(r) if n not in transposed] for r in roles]

        found = linear(self.default_modified_modules)
        if all(reads_without_calling(backbone, name) for hits in found for name in hits):
            found += linear(["ff.w1", "ff.w2"])
        return found

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        super().plan_targets(plan, patterns)
        modified = {i.host_name for i in plan.insertions}
        for argument in ("rank_pattern", "alpha_pattern"):
            for pattern in as_patterns(list(getattr(self, argument) or ()), argument):
                if not any(
                    matches_any(plan.targeting.names_of(name), pattern) for name in modified
                ):
                    raise AddressingError(
                        f"{argument}: {pattern!r} addresses none of the modified modules."
                        + nearest(pattern, modified)
                    )

    def update_module(self, module: nn.Module, key: str) -> None:
        """Put the pair on the module called `key`, or on all linears inside it."""
        for name, part in layers_of(self.plan, key, self.title).items():
            if not self.plan.on(part):
                r = self._by_pattern(self.rank_pattern, name, self.lora_r)
                alpha = self._by_pattern(self.alpha_pattern, name, self.lora_alpha)
                kind = require_kind(part, name, self.title)
                self.put_on(part, name, kind, r, alpha, self.lora_dropout)

    def _by_pattern(self, table: dict[str, Any] | None, name: str, default: Any) -> Any:
        names = tuple(self.plan.targeting.names_of(name)) if table else ()
        return next((v for p, v in (table or {}).items() if matches_any(names, p)), default)
