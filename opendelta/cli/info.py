"""``opendelta info``: what a delta is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from opendelta.auto_delta import AutoDeltaConfig
from opendelta.center.center import DeltaCenter
from opendelta.center.contents import FILES, DeltaInfo, expected_files
from opendelta.cli.shared import plain
from opendelta.delta.config import ConfigFields
from opendelta.exceptions import CenterError
from opendelta.ground.files import delta_folder, read_verified, weights_in
from opendelta.inspection.display import show


def run_info(asked: argparse.Namespace) -> None:
    """Tell what a delta is: one in a folder wholly, one on a center but for its weights."""
    local = os.path.exists(asked.delta)
    found = _local_info(asked.delta) if local else _center_info(asked)
    config = AutoDeltaConfig.from_dict(found.config)
    weights = _weights(delta_folder(asked.delta), config) if local else None
    if asked.json:
        print(json.dumps({**vars(found), "weights": weights}, indent=2, sort_keys=True))
        return
    table = Table.grid("", "", padding=(0, 2))
    for title, value in _facts(found, config, weights).items():
        if value:
            table.add_row(Text(title, "bold"), Text(plain(value), overflow="fold"))
    show(table)
    if found.card:
        print()
    for line in found.card.splitlines():
        print(plain(line.expandtabs()))


def read_weights(folder: Path, config: ConfigFields) -> tuple[str, dict[str, Tensor]]:
    """The weights file's name and the tensors of a saved delta.

    Raises:
        CenterError: if the config names weights that are not there, or something else.
        CheckpointError: if they are missing, damaged, or not those whose sha256 the config holds.
    """
    present = [name for name in FILES if (folder / name).is_file()]
    expected_files(config.to_dict(), present, str(folder))
    tensors = read_verified(folder, config.weights_file, config.weights_sha256)
    return weights_in(folder, config.weights_file).name, tensors


def _weights(folder: Path, config: ConfigFields) -> dict[str, Any]:
    """The weights file, checked: its name, and numbers of tensors, of values, of the backbone's."""
    file, tensors = read_weights(folder, config)
    carried = config.backbone_hash_excludes
    own = [] if carried is None else [t for name, t in tensors.items() if name in carried]
    return {
        "file": file,
        "tensors": len(tensors),
        "parameters": _values(tensors.values()),
        "of_the_backbone": None if carried is None else _values(own),
    }


def _values(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _local_info(path: str) -> DeltaInfo:
    folder = delta_folder(path)
    sizes = {n: (folder / n).stat().st_size for n in FILES if (folder / n).is_file()}
    return DeltaInfo.of(folder, sizes, path)


def _center_info(asked: argparse.Namespace) -> DeltaInfo:
    try:
        return DeltaCenter.from_url(asked.center).info(asked.delta, asked.revision)
    except CenterError as error:
        raise type(error)(f"There is no folder {asked.delta!r} here. {error}") from error


def _facts(info: DeltaInfo, config: ConfigFields, weights: dict[str, Any] | None) -> dict[str, str]:
    """The rows of the table; those without a value are left out."""
    settings = {name: getattr(config, name) for name in config.method_fields}
    tags = [*(config.list_tags or ()), *(f"{k}: {v}" for k, v in (config.dict_tags or {}).items())]
    source, version = config.backbone_checkpoint_name, info.config.get("opendelta_version")
    digest, counts = config.weights_sha256 or "", ""
    if digest:
        digest += ": checked" if weights else ": checked when it is pulled"
    if weights:
        counts = f"{weights['parameters']:,} in {weights['tensors']:,} tensors"
        if weights["of_the_backbone"]:
            counts += f", {weights['of_the_backbone']:,} of them the backbone's own"
    return {
        "delta": info.name,
        "center": info.url,
        "revision": info.revision,
        "method": config.delta_type,
        "settings": ", ".join(f"{k}={v}" for k, v in settings.items() if v is not None),
        "modified modules": _joined(config.modified_modules) or "the defaults of the method",
        "excluded modules": _joined(config.exclude_modules),
        "unfrozen modules": _joined(config.unfrozen_modules),
        "backbone": f"{config.backbone_class or ''}" + (f" from {source}" if source else ""),
        "backbone's hash": str(config.backbone_hash or ""),
        "parameters": counts,
        "files": ", ".join(f"{name} ({size:,} bytes)" for name, size in info.sizes.items()),
        "sha256": digest,
        "tags": ", ".join(map(str, tags)),
        "written by": f"opendelta {version}" if version else "",
    }


def _joined(patterns: Any) -> str:
    several = isinstance(patterns, (list, tuple))
    return ", ".join(map(str, patterns)) if several else str(patterns or "")
