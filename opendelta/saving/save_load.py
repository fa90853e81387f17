"""The part of a delta that is saved and loaded (specification 1.23.1)."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opendelta.center.arguments import DeltaCenterArguments
from opendelta.center.center import DeltaCenter
from opendelta.center.publish import Publication
from opendelta.center.resolve import resolve, source_arguments
from opendelta.delta.config import HELPERS, ConfigFields
from opendelta.delta.delta import Delta
from opendelta.delta.plan import held_back
from opendelta.delta.record import record_of
from opendelta.exceptions import CheckpointError, ConfigError, UnmatchedPatternWarning
from opendelta.ground.blocks import within
from opendelta.saving import checkpoint, loading
from opendelta.saving.backbone_check import check_backbone

if TYPE_CHECKING:
    from typing import Self


class SaveLoadMixin(Delta):
    """Configs, files and centers: what a delta is made from, and what is left of it."""

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
    ) -> Self:
        """Put an untrained delta on a backbone as a config says.

        Args:
            config: the config, or a dict of its fields.
            backbone_model: modified in place.
            check_hash: whether a hash in the config is compared with the backbone's; ``"full"``
                reads the whole backbone for it.
            kwargs: fields that override the config's, `interactive_modify`, and what only helps to
                construct (`tokenizer`); `own_modules` may hold modules, as in the constructor.

        Raises:
            ConfigError: for the config of another method, or an unknown field.

        Warns:
            BackboneMismatchWarning: if the hash differs.
        """
        model_class = loading.class_for(cls, config)
        own = kwargs.pop("own_modules", None)
        helpers = {name: kwargs.pop(name) for name in HELPERS if name in kwargs}
        made = model_class.config_from(config, **kwargs)
        check_backbone(made, backbone_model, check_hash)
        taken = inspect.signature(model_class.__init__).parameters
        names = [name for name in made.field_names() if name in taken and hasattr(made, name)]
        fields = {name: getattr(made, name) for name in names}
        if made.from_file and "backend" not in kwargs:
            fields.pop("backend", None)  # what it was trained on; this backbone says where it is
        if own is not None:
            fields["own_modules"] = own
        if "interactive_modify" in kwargs:
            fields["interactive_modify"] = kwargs["interactive_modify"]
        fields |= helpers
        with held_back() as plans, within(warnings.catch_warnings()):
            if made.from_file:  # patterns that were checked when the delta was made
                warnings.simplefilter("ignore", UnmatchedPatternWarning)
            delta: Self = model_class(backbone_model, **fields)
        record_of(delta).from_file = made.from_file
        facts = ["backbone_hash", "backbone_hash_format", "backbone_hash_excludes"]
        facts += ["backbone_class", "backbone_checkpoint_name", "opendelta_version"]
        delta.config.put(**{name: getattr(made, name) for name in facts})
        for plan in plans:
            plan.carry_out()
        return delta

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
        So are the persistent buffers of the backbone (running statistics) that training moved.

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

    def export_peft(self, path: str | os.PathLike[str]) -> None:
        """Write this delta as an adapter of PEFT's, if PEFT has the method.

        Args:
            path: the folder.

        Raises:
            ConfigError: if PEFT does not have it.
        """
        raise ConfigError(
            f"{type(self).__name__} has no form in PEFT's files; save_finetuned writes our own."
        )

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
            finetuned_delta_path: the folder that `save_finetuned` wrote, a Trainer's checkpoint
                with the ``delta`` that `DeltaCallback` wrote into it, or ``user/name`` on a center;
                None if both `delta_config` and `state_dict` are given.
            backbone_model: the backbone, modified in place.
            delta_config: a config (or dict) to use instead of the folder's. With it, the folder
                may be one that a Trainer or ``save_pretrained`` wrote of a model with this delta.
            cache_dir, force_download, local_files_only: for deltas that are downloaded, see
                `DeltaCenter.pull`.
            state_dict: tensors to load instead of the folder's.
            check_hash: whether to compare the backbone's hash with the config's; ``"full"`` reads
                the whole backbone for it, whatever was read before.
            kwargs: ``own_modules``, name -> module, for modules of the delta's own that cannot be
                made from their tensors; fields of the config to override; ``center``, ``revision``
                and ``token`` of deltas that are downloaded, see `opendelta.center.resolve.resolve`.

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
