"""`DeltaBase`: the life of a delta, from patterns to a saved file (specification 1.20.2)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.delta import switching
from opendelta.delta.config import ConfigFields
from opendelta.delta.delta import Delta
from opendelta.delta.plan import Plan, held_back
from opendelta.delta.record import record_of
from opendelta.delta.switching import Switch
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import (
    ConfigError,
    InsertionError,
)
from opendelta.ground.blocks import within
from opendelta.inspection import Summary, num_total_parameters, print_log, summary
from opendelta.saving.save_load import SaveLoadMixin
from opendelta.verbs import arithmetic, freezing, merging


class DeltaBase(SaveLoadMixin):
    """Base class of all deltas: small trainable modules on a backbone that is otherwise frozen.

    A delta is an `nn.Module` whose parameters are those it added (or took over), under the names
    of the modules that they sit on; the backbone is not part of it. Constructing a method's class
    modifies the backbone in place, wholly or, after an error, not at all.

    Class attributes:
        delta_type: the method's name in configs.
        config_class: the method's config.
        default_modified_modules: common names that are modified if the user names none.
        added_positions: how many positions each text gets longer by (soft prompts).
        merges_into: in the style of 1.0, the parameter that `merged` gives.

    Args:
        backbone_model: the model to modify.
        modified_modules: patterns of modules to modify; None for `default_modified_modules`
            by common names. Each pattern must address some module.
        exclude_modules: patterns of modules to leave alone, with all inside them.
        unfrozen_modules: what `freeze_module` leaves trainable; None for ``["deltas"]``.
        interactive_modify: choose modules on a web page; an int is the page's port.
        common_structure: whether the patterns are common names (``attn.q``) rather than the
            backbone's own.
        backend: the engine: ``"hf"`` for transformers and any other torch module, or ``"bmt"`` for
            BMTrain and ModelCenter, which must be initialised. A delta on a backbone whose
            parameters are BMTrain's joins it in either case.
        own_modules: patterns of modules, such as a head, of which the delta gets a trainable copy;
            or pattern -> the module to stand there. It stands in its place while the delta is
            attached, and is saved, loaded, copied and routed with it.

    Raises:
        AddressingError: if a pattern addresses nothing.
        InsertionError: if an addressed module cannot take this delta.
        ConfigError: for an argument of the wrong type or value.
        ValueError: if `interactive_modify` is given together with `modified_modules`.
    """

    config_class: ClassVar[type[ConfigFields]] = BaseDeltaConfig

    @classmethod
    def preview(cls, backbone_model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
        """What constructing this delta would do, without touching the backbone.

        The plan says which `modules` would be modified, in order, `num_parameters` that would be
        added (or taken over), their `share` of the backbone's, and prints as a table of what is
        added where. Layers are made on the meta device; random state, buffers, modes and hooks
        are left as found.

        Args:
            backbone_model: the model.
            args, kwargs: as for the constructor.

        Raises:
            OpenDeltaError: what the constructor would raise; a `ConfigError` for
                `interactive_modify`, and an `InsertionError` for a class of your own that inserts
                nothing by a plan.

        Example:
            >>> opendelta.LoraModel.preview(model, lora_r=4).num_parameters
            512
        """
        try:
            given = inspect.signature(cls).bind_partial(backbone_model, *args, **kwargs).arguments
        except TypeError:  # about which the constructor says more
            given = {}
        if given.get("interactive_modify") and not given.get("modified_modules"):
            raise ConfigError(
                "interactive_modify has the modules chosen on a page, which counts by a preview() "
                "itself: name them with modified_modules=[...]."
            )
        backbone = backbone_model
        if not cls.__module__.startswith("opendelta.") and isinstance(backbone, nn.Module):
            backbone = _on_meta(backbone)  # whatever it does besides planning, it does there
        aside = within(torch.random.fork_rng(devices=[]), torch.device("meta"))
        with held_back() as plans, aside:
            delta = cls(backbone, *args, **kwargs)
        if not plans:
            raise InsertionError(
                f"{cls.__name__} inserts nothing by add_all_delta_to_backbone or insert_...(), so "
                "there is no plan of it to look at."
            )
        first, *others = plans
        first.is_preview = True
        for plan in others:  # of a class that inserts by itself
            first.insertions += plan.insertions
        assert first.delta is delta
        return first

    # --- what trains ------------------------------------------------------------------------

    def freeze_module(
        self,
        module: nn.Module | None = None,
        exclude: Sequence[str | Delta] | str | Delta | None = None,
        set_state_dict: bool | None = True,
        prefix: str = "",
    ) -> None:
        """Freeze the backbone's parameters but those that `exclude` names.

        May be called again, with another `exclude`: what it names gets back the state that it
        had before the first freeze. The first call notes the persistent buffers of the backbone:
        what training moves of them (running statistics) is from then on its deltas' own.

        Args:
            module: the part of the backbone to freeze; None for all of it.
            exclude: patterns of what stays trainable, with all inside it; ``"deltas"`` is every
                delta on the backbone, a delta object that delta alone, and a pattern may also
                name what is inside a delta (``"lora_A"``). None for this delta's
                `unfrozen_modules`, else ``["deltas"]``.
            set_state_dict: whether ``state_dict()`` is reduced to what trains.
            prefix: the name of `module`, if that is not to be looked up.

        Raises:
            InsertionError: if a module that carries a delta was replaced, or has another size; LoRA
                on an embedding that got more rows grows with it.

        Warns:
            UnmatchedPatternWarning: for a pattern that names nothing.
            DeltaWarning: if nothing is left to train.
        """
        freezing.freeze(self, module, exclude, set_state_dict, prefix)

    @property
    def left_trainable(self) -> list[str] | None:
        """Names of the backbone's parameters that the last `freeze_module` left trainable.

        They are saved with the delta. None before any freeze.
        """
        return record_of(self).left_trainable

    def set_active_state_dict(self, module: nn.Module) -> None:
        """Reduce ``module.state_dict()`` to what trains, moved buffers and constants of deltas.

        It is full again while all deltas are detached. ``load_state_dict`` takes both kinds.

        Args:
            module: the backbone or a part of it.
        """
        freezing.trim_state_dict(self, module)

    # --- on and off -------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether any part of this delta is attached; a merged delta is not, though it acts."""
        return switching.is_attached(self)

    @property
    def attached(self) -> Switch:
        """Whether any part of this delta is attached; also a ``with`` block in which all of it is.

        Example:
            >>> delta_zh.detach()
            >>> if not delta_zh.attached:
            ...     with delta_zh.attached():
            ...         _ = model(**batch_of_four)
        """
        return Switch(self, True)

    @property
    def detached(self) -> Switch:
        """Whether this delta does not act; also a ``with`` block in which nothing of it does."""
        return Switch(self, False)

    def attach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Let the delta act again after `detach`, in its old place among other deltas.

        Args:
            module: only the part of the delta that sits inside this module.
            reset_state_dict: whether ``state_dict()`` follows (reduced after `freeze_module`).

        Raises:
            InsertionError: if the delta is merged or was removed, or a module that carries it was
                replaced or has another size (see `freeze_module`).
        """
        switching.attach(self, module, reset_state_dict)

    def detach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Let the backbone compute without the delta, which is kept for `attach`.

        Persistent buffers (running statistics) that its training moved go with it: the backbone's
        own come back.

        Args:
            module: only the part of the delta that sits inside this module.
            reset_state_dict: whether ``state_dict()`` follows (full, once no delta is attached).

        Raises:
            InsertionError: if the delta is merged or was removed.
        """
        switching.detach(self, module, reset_state_dict)

    def remove(self) -> None:
        """Take the delta off for good; with the last one the backbone is as before construction.

        A merged delta is unmerged first; `merge_and_remove` leaves its effect in the weights.
        """
        merging.remove(self)

    # --- merging ----------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Whether this delta is folded into the backbone's weights, see `merge`."""
        return switching.is_merged(self)

    def merge(self, safe: bool = False, untie: bool = False) -> None:
        """Fold this delta into the backbone's weights, so that it costs nothing at inference.

        Its hooks and its entries in the backbone's ``state_dict()`` are gone until `unmerge`. The
        delta keeps its parameters, can be saved as before, and the exact original weights are
        kept beside the merged ones. Buffers that training moved stay in place. Meanwhile `attach`
        and `detach` raise, and other deltas act and are merged as if this one were attached.
        Dropout of the delta no longer acts. What is trained or loaded meanwhile into the merged
        weights themselves is lost at `unmerge`.

        Args:
            safe: refuse if a merged weight were not finite.
            untie: merge into a tied weight too, giving each module that shares it a copy of its
                own and setting ``tie_word_embeddings=False`` in the backbone's config.

        Raises:
            InsertionError: if the method cannot be merged, or the delta is merged already, not
                (wholly) attached or removed; if a weight is tied, quantised, sharded or on the
                meta device; if another delta on the same module would act otherwise beside this
                one in the weights; if forwards called other modules of the delta and never this
                one; if `safe` and a result is not finite. Nothing is changed then.
        """
        merging.merge(self, safe, untie)

    def unmerge(self) -> None:
        """Take this delta out of the backbone's weights and let it act as before `merge`.

        The weights get back their exact original bytes, or, where other deltas are still merged,
        what those alone make of the original. What `merge` untied is tied again once no delta is
        merged into any of it. Deltas may be unmerged in any order; one that acts otherwise beside
        a merged one (below a scale) comes after that.

        Raises:
            InsertionError: if this delta is not merged, or would act otherwise than before.
        """
        merging.unmerge(self)

    def merge_and_remove(self, safe: bool = False, untie: bool = False) -> nn.Module:
        """Leave this delta's effect in the backbone's weights for good, and take the delta off.

        With the last delta gone the backbone is a plain model, whose ``save_pretrained`` writes
        what loads without this library. The original weights are let go.

        Args:
            safe, untie: see `merge`, which is called unless the delta is merged already.

        Returns:
            The backbone.

        Raises:
            InsertionError: see `merge`. Nothing is changed then.
        """
        backbone: nn.Module = merging.merge_and_remove(self, safe, untie)
        return backbone

    # --- arithmetic -------------------------------------------------------------------------

    def combined_config(self, deltas: Sequence[DeltaBase]) -> ConfigFields:
        """The config of a sum of deltas of this method, of which this is the first, see `combine`.

        Raises:
            ConfigError: if they do not fit together.
        """
        arithmetic.require_equal_hyperparameters(deltas)
        config: ConfigFields = self.config
        return config

    def combined_tensors(
        self, deltas: Sequence[DeltaBase], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """What a weighted sum of deltas of this method holds, as by `own_tensors`.

        Raises:
            ConfigError: if they do not fit together.
        """
        return arithmetic.weighted_sums(deltas, weights)

    # --- looking ----------------------------------------------------------------------------

    def summary(self) -> Summary:
        """A table of what this delta added, which prints itself in terminals and notebooks."""
        entries = [
            (i.place_name, i.name, i.content) for i in self.insertions if i.content is not None
        ]
        return summary(entries, num_total_parameters(self.backbone_model))

    def log(
        self,
        module: nn.Module | None = None,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> None:
        """Print the backbone's tree and how much of it the delta is.

        Args:
            module: the part to show; None for the whole backbone.
            delta_ratio: the share of delta parameters.
            trainable_ratio: the share of trainable parameters.
            visualization: the tree.
            cuda_memory: memory in use.
        """
        print_log(
            self.backbone_model if module is None else module,
            delta_ratio=delta_ratio,
            trainable_ratio=trainable_ratio,
            visualization=visualization,
            cuda_memory=cuda_memory,
        )


def _on_meta(backbone: nn.Module) -> nn.Module:
    """A copy of a backbone without values."""
    memo: dict[int, Any] = {}
    for p in backbone.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    try:
        return copy.deepcopy(backbone, memo)
    except Exception as error:  # of any kind: whatever the model holds that cannot be copied
        raise InsertionError(
            f"This {type(backbone).__name__} cannot be copied to the meta device, on which a class "
            f"of your own is tried: {error}"
        ) from error
