"""BitFit: training biases only (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.addressing.feed_forward import about_experts
from opendelta.backends.quantised import is_offloaded
from opendelta.backends.sharding import is_shard
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan, copied, reads_without_calling
from opendelta.delta.record import record_of
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs, map_hidden
from opendelta.ground.names import dotted, words
from opendelta.ground.widths import is_embedding, read_widths
from opendelta.mechanism.backbone_state import unmerged
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.ownership import inserted_names
from opendelta.mechanism.places import place_of
from opendelta.mechanism.slot import ParameterInsertion

if TYPE_CHECKING:
    from typing import Self

    from opendelta.mechanism.rows import Rows


class BiasInsertion(ParameterInsertion):
    """A bias in its place, or added row by row while a route is in force."""

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
        """The modules whose output is a sum with the bias: linears, convolutions and norms."""
        sites = [place for place in self.slot.places if bias_size(place) is not None]
        return sites if sites and all(map(is_called, sites)) else super().sites(is_called)

    @staticmethod
    def routed(
        insertions: list[BiasInsertion],
        rows: Rows,
        host: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
    ) -> Any:
        """Add to each row of the output what its delta's bias is more than the host's own."""
        own = host._parameters.get("bias")
        by_channel = any(hasattr(host, n) for n in ("out_channels", "num_channels", "num_features"))

        def add(hidden: Tensor) -> Tensor:
            biases = [insertion.parameter.to(hidden) for insertion in insertions]
            more = [bias if own is None else bias - own for bias in biases]
            by_row = rows.pick(more, rows.repeats(hidden, host))
            between = [1] * (hidden.dim() - 2)
            shape = (len(hidden), -1, *between) if by_channel else (len(hidden), *between, -1)
            return hidden + by_row.view(shape)

        return map_hidden(output, add)


def bias_size(module: nn.Module) -> int | None:
    """Width of the bias that is, or could be, added to a module's output; None for others."""
    own_children = set(module._modules) - set(inserted_names(module))
    if own_children or is_embedding(module):
        return None
    widths = read_widths(module)
    if widths is not None:
        return widths[1]
    weight = module._parameters.get("weight")  # a norm that only scales
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


class BitFitConfig(BaseDeltaConfig):
    """Config of `BitFitModel`; its fields are that constructor's arguments."""


@register
class BitFitModel(DeltaBase):
    """Trains the biases of modules, and adds one where there is none.

    All modules inside an addressed module take part. The delta's biases are copies that take the
    place of the backbone's own while the delta is attached; added ones start at zero, so that
    the output is the same at first. Keys stay ``<module>.bias``.

    Args:
        backbone_model: the model to modify, in place.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        InsertionError: if nothing inside an addressed module can have a bias.
    """

    delta_type: ClassVar[str] = "bitfit"
    config_class = BitFitConfig
    default_modified_modules: ClassVar[list[str]] = ["attn", "ff", "layer_norm", "lm_head.proj"]

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `float`, `half` and `to` do: modules read what is in another dtype as a cast copy.

        So a bias that trains in float32 acts on a backbone in 16 bits.

        Raises:
            InsertionError: if a shard would change its dtype.
        """
        self.look_at_places()
        insertions: list[Any] = [*self.insertions]
        for insertion in insertions:
            held = insertion.parameter
            if is_shard(held) and fn(torch.empty(0, dtype=held.dtype)).dtype != held.dtype:
                raise InsertionError(
                    f"The bias of {insertion.host_name!r} is sharded together with the backbone's "
                    "parameters, whose dtype it has to have: call float() or half() on the whole "
                    "backbone, before the engine shards it."
                )
        super()._apply(fn, recurse)
        changes = Changes()
        for insertion in insertions:
            if not insertion.ignored:  # else it is added to the output, in that one's dtype
                insertion.slot.settle_casts(changes, map(self._reader, insertion.places))
        changes.carry_out()
        return self

    def _reader(self, place: nn.Module) -> tuple[nn.Module, str]:
        """The module whose call reads the bias of `place`, and the name of `place` in it."""
        name = record_of(self).targeting.name_of(place)
        if not reads_without_calling(self.backbone_model, name):
            return place, ""
        parent, _, path = name.rpartition(".")
        return self.backbone_model.get_submodule(parent), path

    def folds(self, insertion: Insertion) -> dict[str, Tensor]:
        """The trained bias, which takes the place of the backbone's own."""
        return {insertion.name: insertion.content.detach().clone()}

    def combined_tensors(
        self, deltas: Sequence[DeltaBase], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Differences to the backbone's own biases are summed, so those count for what is left."""
        sums, originals = super().combined_tensors(deltas, weights), unmerged(self.backbone_model)
        for insertion in (i for i in self.insertions if i.of_method):
            insertion.look()
            original, name = insertion.slot.original, dotted(insertion.host_name, insertion.name)
            if original is not None:
                own = originals.get(id(original), original)
                sums[name] += (1 - sum(weights)) * own.to(sums[name])
        return sums

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        """As elsewhere, with the modules that share each bias looked up once."""
        self._places = plan.holders("bias")
        super().plan_targets(plan, patterns)
        del self._places

    def update_module(self, module: nn.Module, key: str) -> None:
        """Train the biases of the module called `key` and of all inside it."""
        targeting = self.plan.targeting
        parts = list(targeting.named_inside(key))
        for name, part in parts:
            if not (targeting.is_excluded(name) or (self.uses_defaults and _only_picks(name))):
                self.add_bias_to_modules_have_bias_or_known_type(part, name)
        if not self.uses_defaults and not any(self._takes_part(part) for _, part in parts):
            target = module.get_submodule(key)
            raise InsertionError(
                f"{key!r} ({type(target).__name__}) has no bias and takes none: BitFit trains the "
                "biases of linears, convolutions and norms, and of modules that hold such."
                + about_experts(target)
            )

    def _takes_part(self, module: nn.Module) -> bool:
        has_bias = module._parameters.get("bias") is not None
        return has_bias or bias_size(module) is not None

    def add_bias_to_modules_have_bias_or_known_type(
        self, c: nn.Module, name: str | None = None
    ) -> None:
        """Train the bias of a module; add one if it has none and is a linear, convolution or norm.

        Args:
            c: a module of the backbone.
            name: its name, if known.
        """
        with self.planning() as plan:
            name = plan.targeting.name_of(c) if name is None else name
            if any(insertion.name == "bias" for insertion in plan.on(c)):
                return
            bias = c._parameters.get("bias")
            if bias is not None:
                holders = self.__dict__.get("_places") or plan.holders("bias")
                places, start, ignored = holders[id(bias)], copied(bias), False
            elif (size := bias_size(c)) is not None:
                device, dtype = place_of(c) or (None, None)
                places, start = (
                    [(name, c)],
                    nn.Parameter(torch.zeros(size, dtype=dtype, device=device)),
                )
                ignored = "bias" not in c._parameters
            else:
                return
            if any(is_offloaded(module) for _, module in places):
                raise InsertionError(
                    f"{places[0][0]!r} is offloaded: Accelerate puts the backbone's own parameters "
                    "back at each forward, and knows no other bias. BitFit needs them in memory; a "
                    "method that brings modules of its own does not."
                )
            plan.put_parameter(places, "bias", start, ignored=ignored, kind=BiasInsertion)


def _only_picks(name: str) -> bool:
    """Whether a module sits in an indexer, which picks positions and so gets no gradient."""
    return any("indexer" in words(part) for part in name.split("."))
