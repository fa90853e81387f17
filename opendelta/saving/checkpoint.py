"""Saving a delta (specification 1.23.1)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opendelta.backends.sharding import agreeing, class_name, full, reshard, written_once
from opendelta.delta.config import require_json
from opendelta.delta.delta import Delta
from opendelta.delta.record import record_of
from opendelta.delta.switching import is_merged
from opendelta.exceptions import CheckpointError, DeltaWarning, InsertionError, warn
from opendelta.ground.files import (
    CONFIG_FILE,
    SAFETENSORS_FILE,
    TORCH_FILE,
    WEIGHT_FILES,
    delta_config,
    read_config,
    write_atomically,
    write_tensors,
)
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import deltas, own_parameters, unmerged
from opendelta.mechanism.bare import bare_tensors
from opendelta.mechanism.engines import require_whole
from opendelta.mechanism.hosts import require_hosts
from opendelta.saving.backbone_check import why_unhashed
from opendelta.saving.hash_cache import backbone_hash
from opendelta.saving.moved_buffers import moved_buffers
from opendelta.verbs.freezing import EVERY_DELTA, reached

if TYPE_CHECKING:
    from opendelta.center.publish import Publication

logger = logging.getLogger(__name__)

_WRITE_AS_IT_IS = (
    " To write what it has learned all the same: save_finetuned(folder, "
    "state_dict=dict(delta.own_tensors()))."
)


def save_finetuned(
    delta: Delta,
    folder: Path,
    *,
    save_config: bool,
    overwrite: bool,
    state_dict: dict[str, Tensor] | None,
    save_function: Callable[..., Any] | None,
    tags: dict[str, Any],
    publication: Publication | None,
    test_result: Any,
    usage: str,
) -> None:
    """Write a delta into a folder, see `DeltaBase.save_finetuned`."""
    backbone, config = delta.backbone_model, delta.config
    with agreeing(backbone, CheckpointError):
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; a delta is saved into a folder.")
        if not overwrite:
            _refuse_foreign(folder)
    if state_dict is None:
        _warn_of_what_is_left_out(delta)
    tensors = delta.checkpoint_tensors() if state_dict is None else state_dict
    name = SAFETENSORS_FILE if save_function is None else TORCH_FILE
    for field, value in tags.items():
        if value:
            require_json(field, value)
            setattr(config, field, value)
    if save_config:  # before anything is replaced, since it may fail
        describe_backbone(delta, tensors)
        config.to_json_string()
    with written_once(backbone) as writes:
        digest = write_tensors(folder / name, tensors, save_function) if writes else None
        if digest is None:
            return
        if save_config:
            config.weights_file, config.weights_sha256 = name, digest
            config.save_finetuned(folder)
        else:
            _note_weights(folder / name, digest)
        if publication is not None:
            publication.carry_out(folder, test_result, usage)


def save_checkpoint(
    delta: Delta,
    path: str | os.PathLike[str],
    save_func: Callable[..., Any] | None = None,
    backbone_model: nn.Module | None = None,
) -> None:
    """Write only the weights, see `DeltaBase.save_checkpoint`."""
    require_own(delta, backbone_model)
    file = Path(path)
    if file.is_dir() or not file.suffix:
        file = file / SAFETENSORS_FILE
    tensors = delta.checkpoint_tensors()
    with written_once(delta.backbone_model) as writes:
        digest = write_tensors(file, tensors, save_func) if writes else None
        if digest is not None and file.name in WEIGHT_FILES:
            _note_weights(file, digest)


def checkpoint_tensors(delta: Delta) -> dict[str, Tensor]:
    """What is saved: name -> tensor, this delta's first; of shards the whole, on every rank.

    Raises:
        CheckpointError: if there are no values at hand.
    """
    backbone = delta.backbone_model
    require_whole(backbone)
    reshard(backbone)
    if not (record_of(delta).removed or is_merged(delta)):
        require_hosts(backbone, delta.insertions, otherwise=_WRITE_AS_IT_IS)
    tensors: dict[str, Tensor] = dict(delta.own_tensors())
    wanted, originals = set(declared_backbone_parameters(delta)), unmerged(backbone)
    for name, p in own_parameters(backbone):
        if name in wanted:
            tensors.setdefault(name, originals.get(id(p), p))
    for name, buffer in moved_buffers(delta).items():
        tensors.setdefault(name, buffer)
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise CheckpointError(
            f"{away[0]!r} ({len(away)} in all) is on the meta device, or offloaded, so there "
            "are no values to save. A delta stays at hand if it is put on after offloading."
        )
    return {name: full(tensor) for name, tensor in tensors.items()}


def describe_backbone(delta: Delta, carried: Collection[str]) -> None:
    """Write into a delta's config on which backbone it stands.

    Args:
        delta: whose config.
        carried: names of the tensors that the file holds.
    """
    backbone, config = delta.backbone_model, delta.config
    bare = list(bare_tensors(backbone))
    config.backbone_class = class_name(backbone)
    source = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    config.backbone_checkpoint_name = source or config.backbone_checkpoint_name or ""
    config.backbone_hash_excludes = sorted({one.name for one in bare}.intersection(carried))
    config.backbone_hash = config.backbone_hash_format = None
    reason = why_unhashed(backbone, bare)
    if reason is not None:
        logger.info("No hash of the backbone is saved: %s.", reason)
        return
    config.backbone_hash = backbone_hash(backbone, config.backbone_hash_excludes, bare)
    config.backbone_hash_format = 2


def declared_backbone_parameters(delta: Delta) -> list[str]:
    """Names of the backbone's own parameters that are saved together with a delta."""
    record = record_of(delta)
    if record.left_trainable is not None:
        return record.left_trainable
    patterns = [p for p in delta.unfrozen_modules if p != EVERY_DELTA]
    return reached(record.backbone, patterns, record.targeting.names_of) if patterns else []


def require_own(delta: Delta, backbone: nn.Module | None) -> None:
    """Refuse another backbone than a delta's own.

    Raises:
        InsertionError: if `backbone` is one.
    """
    if backbone is not None and uncompiled(backbone) is not delta.backbone_model:
        raise InsertionError("backbone_model is not the backbone that this delta is on.")


def _warn_of_what_is_left_out(delta: Delta) -> None:
    backbone = delta.backbone_model
    if record_of(delta).left_trainable is not None or not any(
        p.requires_grad for _, p in own_parameters(backbone)
    ):
        return
    others = [other for other in deltas(backbone) if record_of(other).left_trainable]
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


def _note_weights(file: Path, digest: str) -> None:
    """Let the delta's config that lies beside new weights, if any, vouch for them."""
    values = delta_config(file.parent)
    if values:
        values |= {"weights_file": file.name, "weights_sha256": digest}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomically(file.parent / CONFIG_FILE, text.encode())


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
