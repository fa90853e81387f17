"""`DeltaBase`: the life of a delta, from patterns to a saved file (specification 1.20.2)."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.center.arguments import DeltaCenterArguments
from opendelta.center.center import DeltaCenter
from opendelta.center.publish import Publication
from opendelta.center.resolve import resolve, source_arguments
from opendelta.delta import switching
from opendelta.delta.config import ConfigFields
from opendelta.delta.delta import Delta
from opendelta.delta.plan import Plan, held_back
from opendelta.delta.record import record_of
from opendelta.delta.switching import Switch
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import (
    CheckpointError,
    ConfigError,
    InsertionError,
    UnmatchedPatternWarning,
)
from opendelta.inspection import Summary, num_total_parameters, print_log, summary
from opendelta.mechanism.changes import undone
from opendelta.saving import checkpoint, loading
from opendelta.saving.backbone_check import check_backbone
from opendelta.verbs import arithmetic, freezing, merging

if TYPE_CHECKING:
    from typing import Self


class DeltaBase(Delta):
    """Base class of all deltas: small trainable modules on a backbone that is otherwise frozen.

    A delta is an `nn.Module` whose parameters are those it added (or took over), under the names
    of the modules that they sit on; the backbone is not part of it. Constructing a method's class
    modifies the backbone in place, wholly or, after an error, not at all.

    Class attributes:
        delta_type: the method's name in configs.
        config_class: the method's config.
        default_modified_modules: common names that are modified if the user names none.
        added_positions: how many positions each text gets longer by (soft prompts).

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

    Raises:
        AddressingError: if a pattern addresses nothing.
        InsertionError: if an addressed module cannot take this delta.
        ConfigError: for an argument of the wrong type or value.
        ValueError: if `interactive_modify` is given together with `modified_modules`.
    """

    config_class: ClassVar[type[ConfigFields]] = BaseDeltaConfig

    # --- from configs -----------------------------------------------------------------------

    @classmethod
    def config_from(cls, config: ConfigFields | dict[str, Any], **kwargs: Any) -> Any:
        """A config of this class from an object or dict, with fields overridden by `kwargs`.

        Raises:
            ConfigError: if it is the config of another method.
        """
        values = config.to_dict() if isinstance(config, ConfigFields) else config
        made = cls.config_class.from_dict(values, **kwargs)
        made.from_file = getattr(config, "from_file", False)
        return made

    @classmethod
    def from_config(
        cls,
        config: ConfigFields | dict[str, Any],
        backbone_model: nn.Module,
        check_hash: bool | str = True,
        **kwargs: Any,
    ) -> DeltaBase:
        """Put an untrained delta on a backbone as a config says.

        Args:
            config: the config, or a dict of its fields.
            backbone_model: modified in place.
            check_hash: whether a hash in the config is compared with the backbone's; ``"full"``
                reads the whole backbone for it.
            kwargs: fields that override the config's, and `interactive_modify`.

        Raises:
            ConfigError: for the config of another method, or an unknown field.

        Warns:
            BackboneMismatchWarning: if the hash differs.
        """
        model_class = loading.class_for(cls, config)
        made = model_class.config_from(config, **kwargs)
        check_backbone(made, backbone_model, check_hash)
        taken = inspect.signature(model_class.__init__).parameters
        names = [name for name in made.field_names() if name in taken and hasattr(made, name)]
        fields = {name: getattr(made, name) for name in names}
        if made.from_file and "backend" not in kwargs:
            fields.pop("backend", None)  # what it was trained on; this backbone says where it is
        if "interactive_modify" in kwargs:
            fields["interactive_modify"] = kwargs["interactive_modify"]
        with held_back() as plans, warnings.catch_warnings():
            if made.from_file:  # patterns that were checked when the delta was made
                warnings.simplefilter("ignore", UnmatchedPatternWarning)
            delta: DeltaBase = model_class(backbone_model, **fields)
        record_of(delta).from_file = made.from_file
        facts = ["backbone_hash", "backbone_hash_excludes", "backbone_checkpoint_name"]
        delta.config.put(**{name: getattr(made, name) for name in [*facts, "backbone_class"]})
        for plan in plans:
            plan.carry_out()
        return delta

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
        stack = ExitStack()
        with undone(stack.close):
            plans = stack.enter_context(held_back())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.device("meta"))
            delta = cls(backbone, *args, **kwargs)
        if not plans:
            raise InsertionError(
                f"{cls.__name__} inserts nothing by add_all_delta_to_backbone or insert_...(), so "
                "there is no plan of it to look at."
            )
        first, *others = plans
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
        had before the first freeze.

        Args:
            module: the part of the backbone to freeze; None for all of it.
            exclude: patterns of what stays trainable, with all inside it; ``"deltas"`` is every
                delta on the backbone, a delta object that delta alone, and a pattern may also
                name what is inside a delta (``"lora_A"``). None for this delta's
                `unfrozen_modules`, else ``["deltas"]``.
            set_state_dict: whether ``state_dict()`` is reduced to what trains.
            prefix: the name of `module`, if that is not to be looked up.

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
        """Reduce ``module.state_dict()`` to what trains (and constants of deltas).

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
            InsertionError: if the delta is merged or was removed.
        """
        switching.attach(self, module, reset_state_dict)

    def detach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Let the backbone compute without the delta, which is kept for `attach`.

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
        kept beside the merged ones. Meanwhile `attach` and `detach` raise, and other deltas act
        and are merged as if this one were attached. Dropout of the delta no longer acts. What is
        trained or loaded meanwhile into the merged weights themselves is lost at `unmerge`.

        Args:
            safe: refuse if a merged weight were not finite.
            untie: merge into a tied weight too, giving each module that shares it a copy of its
                own and setting ``tie_word_embeddings=False`` in the backbone's config.

        Raises:
            InsertionError: if the method cannot be merged, or the delta is merged already, not
                (wholly) attached or removed; if a weight is tied, quantised, sharded or on the
                meta device; if another delta on the same module would act otherwise beside this
                one in the weights; if `safe` and a result is not finite. Nothing is changed then.
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

    # --- files ------------------------------------------------------------------------------

    def save_finetuned(
        self,
        finetuned_delta_path: str | os.PathLike[str] | None = "./delta_checkpoints/",
        save_config: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_dc: bool = False,
        # These defaults are the documented ones, and never changed.
        center_args: DeltaCenterArguments | dict[str, Any] | None = {},  # noqa: B006
        center_args_pool: dict[str, Any] | None = {},  # noqa: B006
        list_tags: list[Any] | None = [],  # noqa: B006
        dict_tags: dict[str, Any] | None = {},  # noqa: B006
        delay_push: bool = False,
        test_result: Any = None,
        usage: str | None = "",
        *,
        state_dict_only: bool = False,
        overwrite: bool = False,
        center: str | DeltaCenter | None = None,
    ) -> None:
        """Write this delta into a folder: ``model.safetensors`` and ``config.json``.

        The file holds this delta's parameters, trainable or not, under the names that they have
        when the delta is alone on its backbone, and the backbone's parameters that its last
        `freeze_module` (else its `unfrozen_modules`) left trainable, one name per tied parameter.

        Args:
            finetuned_delta_path: the folder; it is made if it does not exist.
            save_config: whether to write ``config.json`` too.
            state_dict: tensors to save instead of the current ones.
            save_function: called with (tensors, path) to write ``pytorch_model.bin``, as 0.3.2
                did with `torch.save`; None writes ``model.safetensors``.
            push_to_dc: publish it on a center, with a model card (``README.md``).
            center_args: fields of `DeltaCenterArguments`, above all ``name``.
            center_args_pool: more of them, for what `center_args` leaves open.
            list_tags, dict_tags: tags for the config and the card.
            delay_push: prepare all of it in the folder, but do not push.
            test_result: for the card; a dict becomes a table.
            usage: Markdown for the card, below the snippet that loads the delta.
            state_dict_only: write no ``config.json`` (as ``save_config=False``).
            overwrite: replace a ``config.json`` that is not a delta's.
            center: where to push, see `DeltaCenter.from_url`.

        Raises:
            CheckpointError: if the folder holds another kind of config, or cannot be written.
            CenterError: if the delta cannot be pushed.
        """
        writes_config = save_config and not state_dict_only
        if push_to_dc and not writes_config:
            raise ConfigError("push_to_dc=True publishes config.json too; leave save_config=True.")
        publication = None
        if push_to_dc:  # what can be refused, before anything is written
            publication = Publication.planned(
                self, center, center_args, center_args_pool, not delay_push
            )
        checkpoint.save_finetuned(
            self,
            Path(finetuned_delta_path or "./delta_checkpoints/"),
            save_config=writes_config,
            overwrite=overwrite,
            state_dict=state_dict,
            save_function=save_function,
            tags={"list_tags": list_tags, "dict_tags": dict_tags},
            publication=publication,
            test_result=test_result,
            usage=usage or "",
        )

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What `save_finetuned` writes: name -> tensor, this delta's first.

        Of shards it is the whole tensors, on every rank.
        """
        return checkpoint.checkpoint_tensors(self)

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        save_func: Callable[..., Any] | None = None,
        backbone_model: nn.Module | None = None,
    ) -> None:
        """Write only the weights.

        Args:
            path: a file, whose suffix decides the format (``.safetensors``, else torch's), or a
                folder, which gets ``model.safetensors``.
            save_func: called with (tensors, path) instead.
            backbone_model: the backbone; None for this delta's own.
        """
        checkpoint.save_checkpoint(self, path, save_func, backbone_model)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        load_func: Callable[..., Any] | None = None,
        backbone_model: nn.Module | None = None,
    ) -> None:
        """Load only the weights, into this delta and its backbone.

        Args:
            path: a weights file or a folder that holds one.
            load_func: called with the path instead of the built-in safe readers.
            backbone_model: the backbone; None for this delta's own.

        Raises:
            CheckpointError: if the file is damaged or does not fit; nothing is loaded then.
        """
        loading.load_checkpoint(self, path, load_func, backbone_model)

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | os.PathLike[str] | None,
        backbone_model: nn.Module,
        delta_config: ConfigFields | dict[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        *model_args: Any,
        force_download: bool = False,
        check_hash: bool | str = True,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Put a saved delta on a backbone, which is set to eval mode.

        Nothing is frozen: to train on, call `freeze_module`.

        Args:
            finetuned_delta_path: the folder that `save_finetuned` wrote, or ``user/name`` on a
                center; None if both `delta_config` and `state_dict` are given.
            backbone_model: the backbone, modified in place.
            delta_config: a config (or dict) to use instead of the folder's.
            cache_dir, force_download, local_files_only: for deltas that are downloaded, see
                `DeltaCenter.pull`.
            state_dict: tensors to load instead of the folder's.
            check_hash: whether to compare the backbone's hash with the config's; ``"full"`` reads
                the whole backbone for it, whatever was read before.
            kwargs: fields of the config to override, and ``center``, ``revision`` and ``token``
                of deltas that are downloaded, see `opendelta.center.resolve.resolve`.

        Raises:
            CheckpointError: if a file is missing or damaged, or keys do not fit (a `CenterError`
                where it cannot be downloaded). The backbone is left as it was.

        Warns:
            BackboneMismatchWarning: if the backbone is not the one the delta was trained on.
        """
        if not isinstance(backbone_model, nn.Module):
            raise ConfigError(
                f"from_finetuned: backbone_model is a {type(backbone_model).__name__}; expected "
                "first the folder, then the backbone, a torch nn.Module."
            )
        if isinstance(finetuned_delta_path, nn.Module):
            raise ConfigError("from_finetuned takes first the folder, then the backbone.")
        if finetuned_delta_path is None and (delta_config is None or state_dict is None):
            raise CheckpointError(
                "from_finetuned(None, ...) needs both delta_config and state_dict; else name the "
                "folder that save_finetuned wrote."
            )

        def source() -> Path:
            assert finetuned_delta_path is not None
            return resolve(
                finetuned_delta_path,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                **source_arguments(kwargs),
            )

        return loading.from_finetuned(  # type: ignore[return-value]
            cls, backbone_model, source, delta_config, state_dict, check_hash, kwargs
        )

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
            (i.host_name, i.name, i.content) for i in self.insertions if i.content is not None
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
