"""Whether a backbone is the one that a delta was trained on: its hash against the config's."""

from __future__ import annotations

import logging

from torch import nn

from opendelta.backends.sharding import is_sharded
from opendelta.delta.config import ConfigFields
from opendelta.exceptions import BackboneMismatchWarning, ConfigError, warn
from opendelta.saving.hash_cache import backbone_hash
from opendelta.saving.hashing import gen_model_hash, unhashable

logger = logging.getLogger(__name__)


def check_backbone(
    config: ConfigFields, backbone: nn.Module, check_hash: bool | str = True
) -> None:
    """Warn if `backbone` is not the one whose hash `config` holds, see `from_finetuned`.

    Raises:
        ConfigError: if `check_hash` is neither a bool nor ``"full"``.
    """
    if isinstance(check_hash, str) and check_hash != "full":
        raise ConfigError(f"check_hash={check_hash!r}; expected True, False or 'full'.")
    if not check_hash or not config.backbone_hash:
        return
    reason = why_unhashed(backbone)
    if reason is not None and not (check_hash == "full" and is_sharded(backbone)):
        logger.info("The backbone's hash is not compared with the one in the config: %s.", reason)
        return
    hash_of = gen_model_hash if check_hash == "full" else backbone_hash
    actual = hash_of(backbone, excludes=config.backbone_hash_excludes or ())
    if actual != config.backbone_hash:
        warn(
            "This delta was trained on another backbone: the hash in its config is "
            f"{config.backbone_hash} ({config.backbone_class}), that of the given one is {actual} "
            f"({type(backbone).__name__}). Predictions will differ from the trained ones; "
            "check_hash=False silences this.",
            BackboneMismatchWarning,
        )


def why_unhashed(backbone: nn.Module) -> str | None:
    """Why the hash of a backbone is not taken now, None if it can be."""
    if is_sharded(backbone):
        return "it is sharded, and not gathered unasked (check_hash='full' does, on all ranks)"
    return unhashable(backbone)
