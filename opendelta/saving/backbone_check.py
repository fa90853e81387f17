"""Whether a backbone is the one that a delta was trained on: its hash against the config's."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from opendelta.backends.sharding import is_sharded
from opendelta.delta.config import ConfigFields, is_of_0_3
from opendelta.exceptions import BackboneMismatchWarning, ConfigError, DeltaWarning, warn
from opendelta.mechanism.bare import Bare, bare_tensors
from opendelta.saving.hash_cache import backbone_hash
from opendelta.saving.hashing import gen_model_hash, unhashable
from opendelta.saving.printed import prints_as_2_13
from opendelta.version import __version__

logger = logging.getLogger(__name__)


def check_backbone(
    config: ConfigFields, backbone: nn.Module, check_hash: bool | str = True
) -> None:
    """Warn if `backbone` is not the one whose hash `config` holds, see `from_finetuned`.

    A hash that cannot be compared here is told as a `DeltaWarning`.

    Raises:
        ConfigError: if `check_hash` is neither a bool nor ``"full"``.
    """
    if isinstance(check_hash, str) and check_hash != "full":
        raise ConfigError(f"check_hash={check_hash!r}; expected True, False or 'full'.")
    if not check_hash or not config.backbone_hash:
        return
    reason = _why_incomparable(config)
    if reason is not None:
        warn(
            "Whether this backbone is the one that the delta was trained on is not checked: "
            f"{reason}. Saving the delta again writes a hash that any release can compare; "
            "check_hash=False silences this.",
            DeltaWarning,
        )
        return
    bare = list(bare_tensors(backbone))
    reason = why_unhashed(backbone, bare)
    if reason is not None and not (check_hash == "full" and is_sharded(backbone)):
        logger.info("The backbone's hash is not compared with the one in the config: %s.", reason)
        return
    excludes = config.backbone_hash_excludes or ()
    if config.backbone_hash_format == 2 and check_hash != "full":
        actual = backbone_hash(backbone, excludes, bare)
    else:
        actual = gen_model_hash(
            backbone, excludes=excludes, format=config.backbone_hash_format or 1
        )
    if actual != config.backbone_hash:
        warn(
            "This delta was trained on another backbone: the hash in its config is "
            f"{config.backbone_hash} ({config.backbone_class}), that of the given one is {actual} "
            f"({type(backbone).__name__}). Predictions will differ from the trained ones; "
            "check_hash=False silences this.",
            BackboneMismatchWarning,
        )


def _why_incomparable(config: ConfigFields) -> str | None:
    """Why the hash in a config says nothing here, whatever the backbone is; None if it does."""
    if config.backbone_hash_format == 2:
        return None
    if config.backbone_hash_format not in (None, 1):
        return (
            f"its hash is of format {config.backbone_hash_format}, which this release of "
            f"OpenDelta, {__version__}, does not know"
        )
    if is_of_0_3(config.opendelta_version):
        return (
            "OpenDelta 0.3.2 hashed the printed model, deltas included, as other releases of torch "
            "and transformers printed it"
        )
    if not prints_as_2_13():
        return (
            "OpenDelta 1.0 hashed the model as torch 2.13 prints it, and this one, "
            f"{torch.__version__}, prints it in another way"
        )
    return None


def why_unhashed(backbone: nn.Module, bare: Iterable[Bare]) -> str | None:
    """Why the hash of a backbone with these tensors is not taken now, None if it can be."""
    if is_sharded(backbone):
        return "it is sharded, and not gathered unasked (check_hash='full' does, on all ranks)"
    return unhashable(bare)
