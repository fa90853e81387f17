"""The model card of a published delta: a README with the Hub's metadata and a snippet that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from opendelta.center.arguments import DeltaCenterArguments
from opendelta.center.contents import CARD_FILE
from opendelta.center.names import check_name
from opendelta.exceptions import CenterError
from opendelta.ground.files import write_atomically
from opendelta.inspection.statistics import (
    count,
    num_total_parameters,
    num_trainable_parameters,
    ratio,
)

# A card with this line is written anew by the next push; without it, it is the user's own.
_MARK = "<!-- Written by OpenDelta. Without this line, the next push leaves the card alone. -->"


class Config(Protocol):
    """What a card asks of a delta's config."""

    def to_dict(self) -> dict[str, Any]: ...


class SavedDelta(Protocol):
    """What a card asks of a delta that was saved."""

    @property
    def backbone_model(self) -> nn.Module: ...
    @property
    def delta_type(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def is_attached(self) -> bool: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Card:
    """What the card of one delta says.

    Attributes:
        delta: which it is of.
        name: of the delta on the center.
        center_url: of the center; None for the default one.
        arguments: what the user says about it.
        test_result, usage: see `save_finetuned`.
    """

    delta: SavedDelta
    name: str
    center_url: str | None
    arguments: DeltaCenterArguments
    test_result: Any = None
    usage: str = ""

    def write(self, folder: Path) -> None:
        """Write ``README.md`` into `folder`, unless the user wrote one there."""
        file = folder / CARD_FILE
        if not file.exists() or _MARK in file.read_text("utf-8", "replace"):
            write_atomically(file, self._text(folder).encode())

    def _text(self, folder: Path) -> str:
        """The card: metadata between lines of ``---``, then Markdown."""
        facts = self._facts(folder)
        parts = [f"---\n{self._metadata()}\n---\n{_MARK}\n\n# {self.name}", _table(facts)]
        if self.test_result is not None:
            parts.append(f"## Test result\n\n{_table(self.test_result)}")
        parts.append(f"## Usage\n\n```python\n{self._snippet()}```")
        if self.usage:
            parts.append(self.usage.strip())
        return "\n\n".join(parts) + "\n"

    @property
    def _config(self) -> dict[str, Any]:
        return self.delta.config.to_dict()

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        told, config = self.arguments, self._config
        named = [f"{key}:{value}" for key, value in config.get("dict_tags", {}).items()]
        tags = ["opendelta", self.delta.delta_type, *map(str, config.get("list_tags", ())), *named]
        data = ModelCardData(
            library_name="opendelta",
            base_model=self._published_backbone(),
            tags=list(dict.fromkeys([*tags, *told.train_tasks])),
            datasets=told.train_datasets or None,
            language=told.language or None,
            license=told.license or None,
        )
        return data.to_yaml()

    def _facts(self, folder: Path) -> dict[str, str]:
        told, config, backbone = self.arguments, self._config, self.delta.backbone_model
        parameters, trainable = count(self.delta.parameters()), num_trainable_parameters(backbone)
        total = num_total_parameters(backbone) + parameters * (not self.delta.is_attached)
        size = (folder / config["weights_file"]).stat().st_size
        rows = {
            "method": self.delta.delta_type,
            "backbone": self._published_backbone() or config["backbone_class"],
            "hash of the backbone": f"`{config['backbone_hash']}`",
            "tasks": ", ".join(told.train_tasks),
            "data sets": ", ".join(told.train_datasets),
            "tags": ", ".join(map(str, config.get("list_tags", ()))),
            **{str(key): str(value) for key, value in config.get("dict_tags", {}).items()},
            "parameters of the delta": f"{parameters:,}",
            "trainable": f"{trainable:,} ({100 * ratio(trainable, total):.4g} %)",
            "size": f"{size:,} bytes",
            "license": told.license or "not stated",
        }
        return {key: value for key, value in rows.items() if value}

    def _snippet(self) -> str:
        source = self._published_backbone() or "path/of/the/backbone"
        backbone = self._config["backbone_class"] or "AutoModel"
        where = f', center="{self.center_url}"' if self.center_url else ""
        import transformers

        if hasattr(transformers, backbone):
            made = (
                f"from transformers import {backbone}\n\n"
                f'model = {backbone}.from_pretrained("{source}")\n'
            )
        else:
            made = f"\nmodel = {backbone}()  # the backbone that the delta was trained on\n"
        return (
            f"from opendelta import AutoDeltaModel\n{made}"
            f'delta = AutoDeltaModel.from_finetuned("{self.name}", backbone_model=model{where})\n'
        )

    def _published_backbone(self) -> str | None:
        """The backbone's name, unless it is a path, which is nobody else's business."""
        name = self.arguments.backbone_model or self._config["backbone_checkpoint_name"] or ""
        try:
            return check_name(name)
        except CenterError:
            return None


def _table(content: Any) -> str:
    """A dict as a table of two columns; anything else as text."""
    if not isinstance(content, Mapping):
        return str(content)
    rows = [(_cell(key), _cell(value)) for key, value in content.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
