"""The command ``opendelta``: look at deltas, share them, convert them, and choose modules."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from opendelta.auto_delta import AutoDeltaConfig
from opendelta.center.center import DeltaCenter
from opendelta.center.contents import CARD_FILE, FILES, DeltaInfo
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import CenterError, OpenDeltaError
from opendelta.ground.files import CONFIG_FILE, copy_atomically, read_config, resolve_folder
from opendelta.inspection import Visualization
from opendelta.inspection.display import plain_text, show
from opendelta.saving.conversion import FORMATS, read_weights, require_new, write_converted
from opendelta.saving.model_folder import build_backbone
from opendelta.version import __version__
from opendelta.web import select_modules

FINE, FAILED, INTERRUPTED = 0, 1, 130  # 2, for a line that cannot be understood, is argparse's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the command line; None for the program's own.

    Returns:
        The exit code: 0, or 1 after an error, which is told in one line on standard error.

    Raises:
        SystemExit: with code 2 if the line cannot be understood, with 0 after ``--help``.
    """
    asked = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a card may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            asked.run(asked)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OpenDeltaError, OSError) as error:
        print("opendelta: error:", _one_line(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return FINE


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """In the place of `warnings.showwarning`: without a line of code that is not the user's."""
    print("opendelta: warning:", _one_line(message), file=sys.stderr)


def _plain(text: object) -> str:
    """Text from elsewhere, without what could move a terminal's cursor or turn letters around."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _one_line(text: object) -> str:
    return _plain(" ".join(str(text).split()))


def _show(table: Table) -> None:
    if sys.stdout.isatty():
        show(table)
    else:
        print(plain_text(table))


# --- info ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """What the weights file of a delta holds: numbers of tensors, of values, of the backbone's."""

    file: str
    tensors: int
    parameters: int
    of_the_backbone: int | None

    @classmethod
    def within(cls, folder: Path, config: BaseDeltaConfig) -> Weights:
        """Read and check them."""
        file, tensors = read_weights(folder, config)
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        carried = config.backbone_hash_excludes
        own = None if carried is None else sum(n for name, n in sizes.items() if name in carried)
        return cls(file, len(sizes), sum(sizes.values()), own)


def info(asked: argparse.Namespace) -> None:
    """Tell what a delta is: one in a folder wholly, one on a center but for its weights."""
    local = os.path.exists(asked.delta)
    found = _local_info(asked.delta) if local else _center_info(asked)
    config = AutoDeltaConfig.from_dict(found.config)
    weights = Weights.within(Path(asked.delta), config) if local else None
    if asked.json:
        inside = {"weights": None if weights is None else asdict(weights)}
        print(json.dumps({**asdict(found), **inside}, indent=2, sort_keys=True))
        return
    table = Table.grid("", "", padding=(0, 2))
    for title, value in _facts(found, config, weights).items():
        if value:
            table.add_row(Text(title, "bold"), Text(_plain(value), overflow="fold"))
    _show(table)
    if found.card:
        print()
    for line in found.card.splitlines():
        print(_plain(line.expandtabs()))


def _local_info(path: str) -> DeltaInfo:
    folder = resolve_folder(path)
    sizes = {n: (folder / n).stat().st_size for n in FILES if (folder / n).is_file()}
    card = (folder / CARD_FILE).read_text("utf-8", "replace") if CARD_FILE in sizes else ""
    return DeltaInfo(path, "", "", read_config(folder), sizes, card)


def _center_info(asked: argparse.Namespace) -> DeltaInfo:
    try:
        return DeltaCenter.from_url(asked.center).info(asked.delta, asked.revision)
    except CenterError as error:
        raise type(error)(f"There is no folder {asked.delta!r} here. {error}") from error


def _facts(info: DeltaInfo, config: BaseDeltaConfig, weights: Weights | None) -> dict[str, str]:
    """The rows of the table; those without a value are left out."""
    settings = {name: getattr(config, name) for name in config.method_fields}
    tags = [*(config.list_tags or ()), *(f"{k}: {v}" for k, v in (config.dict_tags or {}).items())]
    source, version = config.backbone_checkpoint_name, info.config.get("opendelta_version")
    digest, counts = config.weights_sha256 or "", ""
    if digest:
        digest += ": checked" if weights else ": checked when it is pulled"
    if weights:
        counts = f"{weights.parameters:,} in {weights.tensors:,} tensors"
        if weights.of_the_backbone:
            counts += f", {weights.of_the_backbone:,} of them the backbone's own"
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


# --- centers ------------------------------------------------------------------------------------


def push(asked: argparse.Namespace) -> None:
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


def pull(asked: argparse.Namespace) -> None:
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


def names(asked: argparse.Namespace) -> None:
    """List a center: names alone, which other programs can read, or a table."""
    center = DeltaCenter.from_url(asked.center)
    found = center.list(asked.search)
    if not asked.long:
        lines = [json.dumps(found, indent=2)] if asked.json else map(_plain, found)
        for line in lines:
            print(line)
        return
    rows = []
    for name in found:
        about = center.info(name)
        rows.append(
            {
                "name": name,
                "method": about.config.get("delta_type"),
                "backbone": about.config.get("backbone_class"),
                "bytes": sum(about.sizes.values()),
                "revision": about.revision,
            }
        )
    if asked.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "method", "backbone", Column("bytes", justify="right"), "revision")
    for row in rows:
        values = {**row, "bytes": f"{row['bytes']:,}", "revision": f"{row['revision']:.12}"}
        table.add_row(*(Text(_plain(value or "")) for value in values.values()))
    _show(table)


# --- conversion ---------------------------------------------------------------------------------


def convert(asked: argparse.Namespace) -> None:
    """Write a delta in another format; prints where."""
    require_new(Path(asked.target))
    write_converted(
        Path(asked.source), Path(asked.target), asked.to, asked.model, asked.model_class
    )
    print(asked.target)


# --- backbones ----------------------------------------------------------------------------------


def tree(asked: argparse.Namespace) -> None:
    """Draw a backbone that is known by its config alone."""
    Visualization(build_backbone(asked.model, asked.model_class)).structure_graph(
        common_structure=asked.common or asked.only_common,
        only_common=asked.only_common,
        expand_params=asked.params,
        keep_non_params=asked.all,
    )


def select(asked: argparse.Namespace) -> None:
    """Choose modules in a web page."""
    select_modules(build_backbone(asked.model, asked.model_class), asked.port)


# --- the command line ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opendelta",
        description="Look at deltas, share them, convert them, and choose modules to modify.",
        epilog="`opendelta COMMAND --help` tells more, with an example. Exit codes: 0 fine, "
        "1 an error, told in one line on standard error, 2 a line that is not understood.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opendelta {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], summary: str, more: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    added = command(
        "info",
        info,
        "tell what a delta is",
        "Method, backbone, sizes, hashes and card; the weights of one in a folder are checked and "
        "counted, those of one on a center are not downloaded.",
        "opendelta info my_delta",
    )
    added.add_argument("delta", metavar="PATH_OR_NAME", help="a saved delta's folder, or user/name")
    _add_center(added)
    _add_revision(added, "a branch, tag or hash, instead of main")
    _add_json(added)

    added = command(
        "push",
        push,
        "publish a saved delta",
        "Its weights, config.json and README.md are taken along, other files are not. Prints the "
        "revision. Tokens are those of `hf auth login` or HF_TOKEN.",
        "opendelta push my_delta me/sentiment --center file:///shared/deltas",
    )
    added.add_argument("folder", metavar="DIR", help="what save_finetuned wrote")
    added.add_argument("name", metavar="NAME", help="user/name")
    _add_center(added)
    _add_revision(added, "the branch to push to, instead of main")
    added.add_argument("--message", metavar="TEXT", help="why, for the center's history")
    added.add_argument("--private", action="store_true", help="for its owners only")
    added.add_argument("--create-pr", action="store_true", help="propose the change (on the Hub)")

    added = command(
        "pull",
        pull,
        "download a delta",
        "Into the cache, where from_finetuned finds it, and into DIR, if it is named. Prints the "
        "folder that holds it.",
        "opendelta pull me/sentiment my_copy",
    )
    added.add_argument("name", metavar="NAME", help="user/name")
    added.add_argument("folder", metavar="DIR", nargs="?", help="a folder that is new or empty")
    _add_center(added)
    _add_revision(added, "a branch, tag or hash, instead of main")
    added.add_argument("--force", action="store_true", help="download even what the cache holds")

    added = command(
        "list",
        names,
        "list the deltas on a center",
        "One name in each line.",
        "opendelta list sentiment --center file:///shared/deltas",
    )
    added.add_argument("search", metavar="TEXT", nargs="?", default="", help="part of the name")
    added.add_argument(
        "--long", action="store_true", help="a table: method, backbone, size, revision"
    )
    _add_center(added)
    _add_json(added)

    added = command(
        "convert",
        convert,
        "write a delta in another format",
        "A delta's folder, of OpenDelta 0.3.2 too, becomes one with safetensors (or, with --to, "
        "with a torch file, or PEFT's adapter); the folder of a PEFT adapter becomes a delta's. To "
        "and from PEFT, the backbone is needed, with its weights. A single file of tensors is "
        "converted by the suffix of TARGET.",
        "opendelta convert my_delta for_peft --to peft --model bert-base",
    )
    added.add_argument("source", metavar="SOURCE", help="a delta's folder, PEFT's, or a file")
    added.add_argument("target", metavar="TARGET", help="a folder that is new or empty, or a file")
    added.add_argument("--to", choices=FORMATS, help="for folders; by default safetensors")
    added.add_argument("--model", metavar="MODEL_DIR", help="the backbone, for PEFT")
    _add_class(added)

    added = command(
        "tree",
        tree,
        "draw the structure of a backbone",
        "It is built from config.json, without weights; no code that lies beside it is run.",
        "opendelta tree bert-base --common",
    )
    _add_model(added)
    naming = added.add_mutually_exclusive_group()  # dropout has no common name
    naming.add_argument("--common", action="store_true", help="use the common names (attn.q)")
    naming.add_argument("--only-common", action="store_true", help="leave out what has none")
    naming.add_argument("--all", action="store_true", help="show modules without parameters too")
    added.add_argument("--params", action="store_true", help="a line for each parameter")

    added = command(
        "select",
        select,
        "choose modules in a web page",
        "Prints a link to open, waits, and prints the modified_modules. The backbone is built from "
        "config.json, without weights; no code that lies beside it is run.",
        "opendelta select bert-base --port 8000",
    )
    _add_model(added)
    added.add_argument("--port", type=int, default=8888, help="by default 8888; 0: any free one")
    return parser


def _add_center(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--center",
        metavar="URL",
        help="file:///a/folder, https://..., s3://...; by default DELTACENTER_URL, else the Hub",
    )


def _add_revision(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--revision", metavar="REVISION", help=what)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="for programs")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL_DIR", help="where a backbone's config.json is")
    _add_class(command)


def _add_class(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--class",
        dest="model_class",
        metavar="CLASS",
        help="the backbone's class in transformers, by default the one in its config.json",
    )
