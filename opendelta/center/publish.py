"""What `save_finetuned(push_to_dc=True)` does besides saving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendelta.center.arguments import (
    DeltaCenterArguments,
    create_default_name,
    create_delta_center_args,
)
from opendelta.center.card import Card, SavedDelta
from opendelta.center.center import DeltaCenter
from opendelta.center.names import check_name
from opendelta.exceptions import CenterError


@dataclass(frozen=True)
class Publication:
    """A push that was asked for, with all that can be refused before anything is written."""

    delta: SavedDelta
    center: DeltaCenter
    center_url: str | None
    name: str
    arguments: DeltaCenterArguments
    push: bool

    @classmethod
    def planned(
        cls,
        delta: SavedDelta,
        center: str | DeltaCenter | None,
        center_args: DeltaCenterArguments | Mapping[str, Any] | None,
        center_args_pool: Mapping[str, Any] | None,
        push: bool,
    ) -> Publication:
        """What `save_finetuned` was asked to publish.

        Raises:
            CenterError: if the name or the center's URL is refused, or, for a name without
                ``user/`` on the Hub, the token is.
        """
        arguments = create_delta_center_args(center_args, center_args_pool)
        backbone = delta.backbone_model
        loaded_from = getattr(getattr(backbone, "config", None), "_name_or_path", "")
        name = check_name(
            arguments.name
            or create_default_name(
                backbone=arguments.backbone_model or loaded_from or type(backbone).__name__,
                delta_type=delta.delta_type,
                train_tasks=arguments.train_tasks,
                train_datasets=arguments.train_datasets,
            )
        )
        engine = DeltaCenter.from_url(center)
        if push:
            name = engine.full_name(name)
        url = None if engine.url == DeltaCenter.from_url("hf://").url else engine.url
        return cls(delta, engine, url, name, arguments, push)

    def carry_out(self, folder: Path, test_result: Any, usage: str) -> None:
        """Write the card of the delta that was saved into `folder`, and push it.

        Raises:
            CenterError: if the center refuses it or does not answer; the folder is whole then.
        """
        told = self.arguments
        Card(self.delta, self.name, self.center_url, told, test_result, usage).write(folder)
        if not self.push:
            return
        try:
            self.center.push(
                folder,
                self.name,
                message=told.message,
                private=told.private,
                revision=told.revision,
                create_pr=told.create_pr,
            )
        except CenterError as error:
            raise type(error)(
                f"{error} The delta is saved in {folder}; push it from there with "
                f"`DeltaCenter.from_url(...).push({str(folder)!r}, {self.name!r})`."
            ) from error
