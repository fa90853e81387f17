"""``opendelta push``, ``pull`` and ``list``: deltas on a center."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from opendelta.center.center import DeltaCenter
from opendelta.cli.shared import plain, require_new
from opendelta.ground.files import CONFIG_FILE, copy_atomically
from opendelta.inspection.display import show


def run_push(asked: argparse.Namespace) -> None:
    """Publish a folder; prints the revision."""
    revision = DeltaCenter.from_url(asked.center).push(
        asked.folder,
        asked.name,
        message=asked.message,
        private=asked.private or None,
        revision=asked.revision,
        create_pr=asked.create_pr,
    )
    print(revision)


def run_pull(asked: argparse.Namespace) -> None:
    """Download a delta, into the cache and a folder; prints where it is."""
    target = Path(asked.folder) if asked.folder else None
    if target is not None:
        require_new(target)
    folder = DeltaCenter.from_url(asked.center).pull(
        asked.name, asked.revision, force_download=asked.force
    )
    if target is None:
        print(folder)
        return
    files = [file for file in folder.iterdir() if file.name != CONFIG_FILE]
    for file in (*files, folder / CONFIG_FILE):  # which makes a delta of it, once all is there
        copy_atomically(file, target / file.name)
    print(target)


def run_list(asked: argparse.Namespace) -> None:
    """List a center: names alone, which other programs can read, or a table."""
    center = DeltaCenter.from_url(asked.center)
    found = center.list(asked.search)
    if not asked.long:
        lines = [json.dumps(found, indent=2)] if asked.json else map(plain, found)
        for line in lines:
            print(line)
        return
    rows = [
        {
            "name": about.name,
            "method": about.config.get("delta_type"),
            "backbone": about.config.get("backbone_class"),
            "bytes": sum(about.sizes.values()),
            "revision": about.revision,
        }
        for about in map(center.info, found)
    ]
    if asked.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "method", "backbone", Column("bytes", justify="right"), "revision")
    for row in rows:
        values = {**row, "bytes": f"{row['bytes']:,}", "revision": f"{row['revision']:.12}"}
        table.add_row(*(Text(plain(value or "")) for value in values.values()))
    show(table)
