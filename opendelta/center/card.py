"""The model card of a published delta: a README with the Hub's metadata and a snippet that runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendelta.center.arguments import DeltaCenterArguments
from opendelta.center.contents import CARD_FILE
from opendelta.center.names import check_name
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import CenterError
from opendelta.ground.files import write_atomically

# A card with this line is written anew by the next push; without it, it is the user's own.
_MARK = "<!-- Written by OpenDelta. Without this line, the next push leaves the card alone. -->"


@dataclass(frozen=True)
class Card:
    """What the card of one delta says.

    Attributes:
        name: of the delta on the center.
        center_url: of the center; None for the default one.
        config: of the delta, as it is saved.
        arguments: what the user says about it.
        parameters, backbone_parameters, trainable: numbers of values.
        size: bytes of the weights file.
        test_result, usage: see `save_finetuned`.
    """

    name: str
    center_url: str | None
    config: BaseDeltaConfig
    arguments: DeltaCenterArguments
    parameters: int
    backbone_parameters: int
    trainable: int
    size: int
    test_result: Any = None
    usage: str = ""

    def write(self, folder: Path) -> None:
        """Write ``README.md`` into `folder`, unless the user wrote one there."""
        file = folder / CARD_FILE
        if not file.exists() or _MARK in file.read_text("utf-8", "replace"):
            write_atomically(file, self.text().encode())

    def text(self) -> str:
        """The card: metadata between lines of ``---``, then Markdown."""
        parts = [f"---\n{self._metadata()}\n---\n{_MARK}\n\n# {self.name}", self._facts()]
        if self.test_result is not None:
            parts.append(f"## Test result\n\n{_table(self.test_result)}")
        parts.append(f"## Usage\n\n```python\n{self._snippet()}```")
        if self.usage:
            parts.append(self.usage.strip())
        return "\n\n".join(parts) + "\n"

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        told = self.arguments
        named = [f"{key}:{value}" for key, value in (self.config.dict_tags or {}).items()]
        tags = ["opendelta", self.config.delta_type, *map(str, self.config.list_tags or ()), *named]
        data = ModelCardData(
            library_name="opendelta",
            base_model=self._published_backbone(),
            tags=list(dict.fromkeys([*tags, *told.train_tasks])),
            datasets=told.train_datasets or None,
            language=told.language or None,
            license=told.license or None,
        )
        return data.to_yaml()

    def _facts(self) -> str:
        told, config = self.arguments, self.config
        share = 100 * self.trainable / max(1, self.backbone_parameters + self.parameters)
        rows = {
            "method": config.delta_type,
            "backbone": self._published_backbone() or config.backbone_class,
            "hash of the backbone": f"`{config.backbone_hash}`",
            "tasks": ", ".join(told.train_tasks),
            "data sets": ", ".join(told.train_datasets),
            "tags": ", ".join(map(str, config.list_tags or ())),
            **{str(key): str(value) for key, value in (config.dict_tags or {}).items()},
            "parameters of the delta": f"{self.parameters:,}",
            "trainable": f"{self.trainable:,} ({share:.4g} %)",
            "size": f"{self.size:,} bytes",
            "license": told.license or "not stated",
        }
        return _table({key: value for key, value in rows.items() if value})

    def _snippet(self) -> str:
        source = self._published_backbone() or "path/of/the/backbone"
        backbone = self.config.backbone_class or "AutoModel"
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
        name = self.arguments.backbone_model or self.config.backbone_checkpoint_name or ""
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
