"""Saving a delta and loading it (specification 1.23.1)."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import (
    agreeing,
    assign,
    class_name,
    full,
    full_shape,
    reshard,
    written_once,
)
from opendelta.center.arguments import DeltaCenterArguments
from opendelta.center.center import DeltaCenter
from opendelta.center.publish import Publication
from opendelta.center.resolve import resolve, source_arguments
from opendelta.construction import Construction
from opendelta.delta_configs import BaseDeltaConfig, require_json
from opendelta.exceptions import (
    CheckpointError,
    ConfigError,
    DeltaWarning,
    InsertionError,
    warn,
)
from opendelta.freezing import EVERY_DELTA, reached
from opendelta.ground.files import (
    CONFIG_FILE,
    SAFETENSORS_FILE,
    TORCH_FILE,
    WEIGHT_FILES,
    read_config,
    read_tensors,
    read_verified,
    require_tensors,
    weights_in,
    write_atomically,
    write_tensors,
)
from opendelta.ground.walk import named_tensors, uncompiled
from opendelta.mechanism.backbone_state import BackboneState, deltas, own_parameters, unmerged
from opendelta.mechanism.engines import require_whole
from opendelta.saving.backbone_check import check_backbone, why_unhashed
from opendelta.saving.hash_cache import backbone_hash
from opendelta.saving.hashing import bare_parameters, gen_parameter_hash
from opendelta.sizes import random_state_kept_on_error

if TYPE_CHECKING:
    from typing import Self

    from opendelta.basemodel import DeltaBase


logger = logging.getLogger(__name__)


class SaveLoadMixin(Construction):
    """The part of `DeltaBase` that deals with its tensors and files."""

    delta_type: ClassVar[str]
    left_trainable: list[str] | None
    unfrozen_modules: list[str]

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
                cast("DeltaBase", self), center, center_args, center_args_pool, not delay_push
            )
        folder = Path(finetuned_delta_path or "./delta_checkpoints/")
        with agreeing(self.backbone_model, CheckpointError):
            if folder.is_file():
                raise CheckpointError(f"{folder} is a file; a delta is saved into a folder.")
            if not overwrite:
                _refuse_foreign(folder)
        unsaid = self.left_trainable is None and state_dict is None
        if unsaid and any(p.requires_grad for _, p in own_parameters(self.backbone_model)):
            others = [d for d in deltas(self.backbone_model) if d.left_trainable]
            warn(
                "freeze_module was never called on this delta: only its own parameters and its "
                "unfrozen_modules are saved, "
                + (
                    f"and what the {type(others[0]).__name__} left trainable with that one alone."
                    if others
                    else "although the whole backbone may have been trained."
                ),
                DeltaWarning,
            )
        tensors = self.checkpoint_tensors() if state_dict is None else state_dict
        name = SAFETENSORS_FILE if save_function is None else TORCH_FILE
        for field, tags in (("list_tags", list_tags), ("dict_tags", dict_tags)):
            if tags:
                require_json(field, tags)
                setattr(self.config, field, tags)
        if writes_config:  # before anything is replaced, since it may fail
            self.describe_backbone(tensors)
            self.config.to_json_string()
        with written_once(self.backbone_model) as writes:
            digest = write_tensors(folder / name, tensors, save_function) if writes else None
            if digest is None:
                return
            if writes_config:
                self.config.weights_file, self.config.weights_sha256 = name, digest
                self.config.save_finetuned(folder)
            else:
                _note_weights(folder / name, digest)
            if publication is not None:
                publication.carry_out(folder, test_result, usage or "")

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What `save_finetuned` writes: name -> tensor, this delta's first.

        Of shards it is the whole tensors, on every rank.
        """
        require_whole(self.backbone_model)
        reshard(self.backbone_model)
        tensors: dict[str, Tensor] = dict(self.own_tensors())
        wanted, originals = set(self.declared_backbone_parameters()), unmerged(self.backbone_model)
        for name, p in own_parameters(self.backbone_model):
            if name in wanted:
                tensors.setdefault(name, originals.get(id(p), p))
        away = [name for name, tensor in tensors.items() if tensor.is_meta]
        if away:
            raise CheckpointError(
                f"{away[0]!r} ({len(away)} in all) is on the meta device, or offloaded, so there "
                "are no values to save. A delta stays at hand if it is put on after offloading."
            )
        return {name: full(tensor) for name, tensor in tensors.items()}

    def describe_backbone(self, carried: Collection[str]) -> None:
        """Write into the config on which backbone this delta stands.

        Args:
            carried: names of the tensors that the file holds.
        """
        backbone = self.backbone_model
        bare = list(bare_parameters(backbone))
        self.config.backbone_class = class_name(backbone)
        source = getattr(getattr(backbone, "config", None), "_name_or_path", None)
        self.config.backbone_checkpoint_name = source or self.config.backbone_checkpoint_name or ""
        self.config.backbone_hash_excludes = sorted(
            {name for name, _ in bare}.intersection(carried)
        )
        reason = why_unhashed(backbone)
        if reason is not None:
            logger.info("No hash of the backbone is saved: %s.", reason)
            self.config.backbone_hash = None
            return
        self.config.backbone_hash = backbone_hash(
            backbone, self.config.backbone_hash_excludes, bare
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
        self.require_own(backbone_model)
        file = Path(path)
        if file.is_dir() or not file.suffix:
            file = file / SAFETENSORS_FILE
        tensors = self.checkpoint_tensors()
        with written_once(self.backbone_model) as writes:
            digest = write_tensors(file, tensors, save_func) if writes else None
            if digest is not None and file.name in WEIGHT_FILES:
                _note_weights(file, digest)

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
        self.require_own(backbone_model)
        with agreeing(self.backbone_model, CheckpointError) as read:
            values = _delta_config(Path(path))
            tensors = read_tensors(weights_in(path, values.get("weights_file")), load_func)
            read.append(fingerprint(tensors))
        load_tensors(self, tensors, values.get("backbone_hash_excludes"))

    # --- its tensors ------------------------------------------------------------------------

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a saved file, tensor) of all this delta holds, shared ones once."""
        self.look_at_places()
        seen: set[int] = set()
        inserted = (pair for insertion in self.insertions for pair in insertion.named_tensors())
        for name, tensor in itertools.chain(inserted, named_tensors(self)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def constants(self) -> Iterator[Tensor]:
        """This delta's buffers, and its parameters that never train."""
        for insertion in self.insertions:
            yield from insertion.constants()

    def declared_backbone_parameters(self) -> list[str]:
        """Names of the backbone's own parameters that are saved together with this delta."""
        if self.left_trainable is not None:
            return self.left_trainable
        patterns = [p for p in self.unfrozen_modules if p != EVERY_DELTA]
        return reached(self.backbone_model, patterns, self.names_of) if patterns else []

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under today's names; methods whose 0.3.2 files differ redefine it."""
        return tensors

    def require_own(self, backbone: nn.Module | None) -> None:
        """Refuse another backbone than this delta's.

        Raises:
            InsertionError: if `backbone` is one.
        """
        if backbone is not None and uncompiled(backbone) is not self.backbone_model:
            raise InsertionError("backbone_model is not the backbone that this delta is on.")

    # --- loading ----------------------------------------------------------------------------

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | os.PathLike[str] | None,
        backbone_model: nn.Module,
        delta_config: BaseDeltaConfig | dict[str, Any] | None = None,
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
        backbone_model = uncompiled(backbone_model)
        if finetuned_delta_path is None and (delta_config is None or state_dict is None):
            raise CheckpointError(
                "from_finetuned(None, ...) needs both delta_config and state_dict; else name the "
                "folder that save_finetuned wrote."
            )
        with agreeing(backbone_model, CheckpointError) as read:
            source: Path | None = None
            if finetuned_delta_path is not None and (delta_config is None or state_dict is None):
                source = resolve(
                    finetuned_delta_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    **source_arguments(kwargs),
                )
            if delta_config is None:
                assert source is not None
                delta_config = cls._config_in(source, **kwargs)
                kwargs = {}
            model_class: type[DeltaBase] = cls._class_for(delta_config)
            config = model_class.config_from(delta_config, **kwargs)
            if state_dict is None:
                assert source is not None
                folder = source.parent if source.suffix == ".json" else source
                state_dict = read_verified(folder, config.weights_file, config.weights_sha256)
            read.append(fingerprint(state_dict))
        check_backbone(config, backbone_model, check_hash)
        if any(
            type(other) is model_class and other.is_attached for other in deltas(backbone_model)
        ):
            logger.warning(
                "The backbone already carries an attached %s; the loaded one comes on top of it. "
                "`opendelta.deltas(model)` lists them.",
                model_class.__name__,
            )
        with random_state_kept_on_error():
            delta = model_class.from_config(config, backbone_model, check_hash=False)
            try:
                delta.left_trainable = load_tensors(delta, state_dict)
            except BaseException:
                delta.remove()
                raise
        backbone_model.eval()
        return delta  # type: ignore[return-value]

    @classmethod
    def _config_in(cls, path: str | os.PathLike[str], **kwargs: Any) -> BaseDeltaConfig:
        values = read_config(path)
        config = cls._class_for(values).config_class.from_dict(values, **kwargs)
        config.from_file = True
        return config

    @classmethod
    def _class_for(cls, config: BaseDeltaConfig | dict[str, Any]) -> type[DeltaBase]:
        """The delta class that a config is for, which must be this class or one below it."""
        from opendelta.auto_delta import model_class_for

        if isinstance(config, dict) and "delta_type" not in config and cls.delta_type:
            return cast("type[DeltaBase]", cls)
        found = model_class_for(config)
        if not issubclass(found, cls):
            raise ConfigError(
                f"This config is for {found.__name__}, not for {cls.__name__}; AutoDeltaModel "
                "loads any."
            )
        return found


def fingerprint(tensors: dict[str, Tensor]) -> Iterator[str]:
    """A line for each tensor by which ranks compare what they are about to load."""
    for name, tensor in tensors.items():
        yield f"{name} {tuple(tensor.shape)} {gen_parameter_hash([tensor]).hexdigest()}"


def _note_weights(file: Path, digest: str) -> None:
    """Let the delta's config that lies beside new weights, if any, vouch for them."""
    values = _delta_config(file.parent)
    if values:
        values |= {"weights_file": file.name, "weights_sha256": digest}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomically(file.parent / CONFIG_FILE, text.encode())


def _delta_config(folder: Path) -> dict[str, Any]:
    """The fields of the delta's config in a folder; none where there is no such config."""
    try:
        return read_config(folder) if folder.is_dir() else {}
    except CheckpointError:
        return {}


def _refuse_foreign(folder: Path) -> None:
    """Keep a delta from overwriting another model's files, which have the same names."""
    if not (folder / CONFIG_FILE).exists():
        return
    try:
        read_config(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} already holds a {CONFIG_FILE} that is not a delta's, and saving would "
            f"replace it ({error}) Choose another folder, or pass overwrite=True."
        ) from error


def load_tensors(
    delta: SaveLoadMixin, tensors: dict[str, Tensor], carried: list[str] | None = None
) -> list[str]:
    """Copy a checkpoint into a delta and its backbone, all of it or nothing.

    Args:
        delta: where to; `tensors`: what.
        carried: the backbone's own parameters that the checkpoint must hold, and no others; None
            for those that the delta's config names, else for any.

    Returns:
        Names of the backbone's own parameters among what was loaded.

    Raises:
        CheckpointError: naming missing and unexpected keys and shapes that differ.
    """
    require_tensors(tensors, "state_dict")
    require_whole(delta.backbone_model)
    reshard(delta.backbone_model)
    tensors = delta.translate_keys(tensors)
    own = dict(delta.own_tensors())
    targets: dict[str, Tensor] = dict(own)
    carried = delta.config.backbone_hash_excludes if carried is None else carried
    if carried is None or carried:
        originals = unmerged(delta.backbone_model)
        for name, p in own_parameters(delta.backbone_model):
            if carried is None or name in carried:
                targets.setdefault(name, originals.get(id(p), p))
    if any(tensor.is_meta for tensor in targets.values()):
        raise CheckpointError(
            f"The {type(delta.backbone_model).__name__} is on the meta device, where there is "
            "nothing to load into: give it its weights first."
        )
    required = [*own, *(carried or ())]
    missing = [name for name in required if name not in tensors]
    unexpected = [name for name in tensors if name not in targets]
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(full_shape(targets[name]))} here"
        for name in tensors
        if name in targets and tensors[name].shape != full_shape(targets[name])
    ]
    shapes += [
        f"{name}: {tensor.dtype} in the file, {targets[name].dtype} here"
        for name, tensor in tensors.items()
        if name in targets and not torch.can_cast(tensor.dtype, targets[name].dtype)
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
            for title, names in (
                ("missing in the file", missing),
                ("unexpected in the file", unexpected),
                ("of another kind", shapes),
            )
            if names
        ]
        saved_on, here = delta.config.backbone_class, type(delta.backbone_model).__name__
        origin = f"It was saved on a {saved_on}. " if saved_on not in (None, "", here) else ""
        raise CheckpointError(
            f"The checkpoint does not fit this {type(delta).__name__} on {here}. {origin}"
            f"Keys {'; keys '.join(parts)}."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            assign(targets[name], tensor)
        for state in BackboneState.within(delta.backbone_model):
            for weight in state.merged.values():  # folded anew, from what was loaded
                weight.put(weight.folds, weight.computed(weight.folds))
    return [name for name in tensors if name not in own]
