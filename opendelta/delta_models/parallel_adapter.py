"""ParallelAdapter: a bottleneck beside one or two modules (He et al. 2022).

https://arxiv.org/abs/2110.04366: it reads the input of a first module and adds to the output of
a second one, which may be the same.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.adapter import Bottleneck
from opendelta.exceptions import AddressingError, ConfigError, InsertionError
from opendelta.ground.containers import Args, Kwargs, first_hidden, map_hidden
from opendelta.ground.widths import is_embedding
from opendelta.mechanism.dispatch import ADDITIVE, AfterDispatcher, BeforeDispatcher


class ParallelAdapterLayer(nn.Module):
    """``scaled * up(act(down(x)))`` for x of shape (..., in), a tensor of shape (..., out).

    Attributes:
        held: the first module's input until the second one's output is there, by thread.
    """

    def __init__(
        self, in_width: int, bottleneck_dim: int, out_width: int, non_linearity: str, scaled: float
    ) -> None:
        super().__init__()
        self.modulelist = Bottleneck(in_width, bottleneck_dim, out_width, non_linearity)
        self.scaled = scaled
        self.held: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.modulelist(x.to(self.modulelist.dtype))
        return (y if self.scaled == 1 else y * self.scaled).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}


def _thread() -> int:
    """The thread that runs; compiled code has one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _held(delta: ParallelAdapterLayer) -> Tensor:
    """The first module's input, taken out."""
    source = delta.held.pop(_thread(), None)
    if source is None:
        raise InsertionError(
            "The second module of a ParallelAdapter's pair ran, but the first did not run before "
            "it: choose two modules that run in this order."
        )
    return source


def hold(
    delta: ParallelAdapterLayer, host: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the first module: keep its input."""
    delta.held[_thread()] = first_hidden(args, kwargs)
    return args, kwargs


def release(
    delta: ParallelAdapterLayer, host: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    """After the second module: add what the adapter makes of the first one's input."""
    source = _held(delta)
    return map_hidden(output, lambda hidden: hidden + delta(source))


def release_channels(
    delta: ParallelAdapterLayer, host: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    """`release` after a convolution, whose features are dimension 1, and which may have a stride.

    The adapter then reads every n-th place, as a shortcut beside such a convolution does.
    """

    def at_its_places(source: Tensor, hidden: Tensor) -> Tensor:
        for dim in range(2, hidden.dim()):
            step = -(-source.shape[dim] // hidden.shape[dim])
            source = source[(slice(None),) * dim + (slice(None, None, step),)]
        return source.movedim(1, -1)

    held = _held(delta)
    return map_hidden(
        output, lambda hidden: hidden + delta(at_its_places(held, hidden)).movedim(-1, 1)
    )


ADDITIVE.add(release)


def _keeps_places(convolution: Any) -> bool:
    """Whether a convolution has an output place for each input place, or each n-th one."""
    padding = convolution.padding
    return not convolution.transposed and (
        padding == "same"
        or all(
            2 * pad == gap * (size - 1)
            for pad, gap, size in zip(
                padding, convolution.dilation, convolution.kernel_size, strict=True
            )
        )
    )


class DropHeld:
    """Hook of the root: after each forward, failed ones too, nothing stays held."""

    def __init__(self, layers: list[ParallelAdapterLayer]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: Args, output: Any) -> None:
        if not torch.compiler.is_compiling():
            for layer in self.layers:
                layer.held.pop(threading.get_ident(), None)


class ParallelAdapterConfig(BaseDeltaConfig):
    """Config of `ParallelAdapterModel`; its fields are that constructor's arguments."""


@register
class ParallelAdapterModel(DeltaBase):
    """Adapters beside modules.

    The patterns are taken in pairs: ``["attn", "attn", "ff.w1", "ff.w2"]`` puts one adapter
    beside each attention, and one from the input of each ``ff.w1`` to the output of the ``ff.w2``
    that follows it.

    Args:
        backbone_model: the model to modify, in place.
        bottleneck_dim: width of the bottleneck.
        non_linearity: name of the activation, see `activation`.
        scaled: factor of the adapter's output.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        AddressingError: if the patterns do not come in pairs that address equally many modules.
        ConfigError: for a `bottleneck_dim` below 1 or an unknown activation.
    """

    delta_type: ClassVar[str] = "parallel_adapter"
    config_class = ParallelAdapterConfig
    default_modified_modules: ClassVar[list[str]] = ["attn", "attn", "ff.w1", "ff.w2"]

    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        scaled: float = 1.0,
        modified_modules: list[str] | tuple[str, ...] | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def patterns_for(self, names: Sequence[str]) -> list[str]:
        """Each clicked module twice: an adapter beside it."""
        return [pattern for pattern in super().patterns_for(names) for _ in range(2)]

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """The defaults in pairs, block by block.

        Where a block has not one second module for each first, as with experts, the adapter goes
        beside the whole unit; where no module is that, beside its output or only projection.
        """
        found: list[list[str]] = [[] for _ in self.default_modified_modules]
        for roles in structure.blocks().values():
            for at in range(0, len(found), 2):
                first, second = self.default_modified_modules[at : at + 2]
                unit = first.partition(".")[0]
                firsts, seconds = roles.get(first, []), roles.get(second, [])
                if len(firsts) != len(seconds) or not firsts:
                    ends = (roles.get(f"{unit}.{end}", [])[-1:] for end in ("proj", "q"))
                    firsts = seconds = roles.get(unit) or next(filter(None, ends), [])
                for pair in zip(firsts, seconds, strict=True):
                    if self._misfit(*pair) is None:
                        found[at].append(pair[0])
                        found[at + 1].append(pair[1])
        return found

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        """Pair the targets of each two patterns in module order and put an adapter on each pair."""
        if len(patterns) % 2:
            raise AddressingError(
                f"modified_modules={patterns}: a ParallelAdapter takes its modules in pairs, the "
                "one whose input is read, then the one to whose output is added; name a module "
                "twice, as in ['attn', 'attn'], to put it beside that one."
            )
        found = self.find_targets(patterns)
        pairs: list[tuple[str, str]] = []
        for first, second, a, b in zip(
            found[::2], found[1::2], patterns[::2], patterns[1::2], strict=True
        ):
            if len(first) != len(second):
                raise AddressingError(
                    f"{a!r} addresses {len(first)} modules and {b!r} {len(second)}: a "
                    "ParallelAdapter needs as many first as second ones."
                )
            pairs += zip(first, second, strict=True)
        order = {name: i for i, name in enumerate(plan.targeting.first_names.values())}
        pairs.sort(key=lambda pair: order[pair[0]])
        plan.targets = [name for pair in pairs for name in pair]
        layers = [self.update_pair(first_name, second_name) for first_name, second_name in pairs]
        plan.at_end(plan.backbone, DropHeld(layers))

    def update_module(self, module: nn.Module, key: str) -> None:
        """Put an adapter beside the module called `key`."""
        with self.planning() as plan:
            plan.at_end(self.backbone_model, DropHeld([self.update_pair(key, key)]))

    def update_pair(self, first_name: str, second_name: str) -> ParallelAdapterLayer:
        """Put one adapter from the input of one module to the output of another."""
        first = self.backbone_model.get_submodule(first_name)
        second = self.backbone_model.get_submodule(second_name)
        misfit = self._misfit(first_name, second_name)
        if misfit is not None:
            raise ConfigError(misfit)
        (in_width, _), (_, out_width) = self.widths(first), self.widths(second)
        layer = ParallelAdapterLayer(
            in_width, self.bottleneck_dim, out_width, self.non_linearity, self.scaled
        )
        self.insert_action(first, layer, "parallel_adapter", BeforeDispatcher, hold)
        action = release_channels if hasattr(second, "out_channels") else release
        self.insert_action(second, layer, "parallel_adapter", AfterDispatcher, action)
        return layer

    def _misfit(self, *names: str) -> str | None:
        """Why a pair of modules cannot have an adapter beside it, if so."""
        modules = [self.backbone_model.get_submodule(name) for name in names]
        convolutions = [hasattr(module, "out_channels") for module in modules]
        for name, module, convolution in zip(names, modules, convolutions, strict=True):
            if is_embedding(module) or (convolution and not _keeps_places(module)):
                return (
                    f"{name!r} is a {type(module).__name__}: a ParallelAdapter goes beside modules "
                    "whose output has the places of their input, such as linears, attentions, and "
                    "convolutions that are padded to that end."
                )
        if any(convolutions) and not all(convolutions):
            return (
                f"{names[0]!r} and {names[1]!r}: one of them is a convolution and one is not, so "
                "their hidden states are laid out differently."
            )
        return None

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """0.3.2's files hold an adapter under both its modules: the second name is dropped."""
        own = {name for name, _ in self.own_tensors()}
        alias = re.compile(r"(^|\.)parallel_adapter(_\d+)?\.")
        return {n: t for n, t in tensors.items() if n in own or not alias.search(n)}
