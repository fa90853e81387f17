"""The command line: its commands with their arguments and help, and no work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from opendelta.version import __version__

FORMATS = ("safetensors", "bin", "peft")
Argument = tuple[str, dict[str, Any]]  # what `add_argument` takes


def _argument(name: str, metavar: str | None = None, help: str = "", **options: Any) -> Argument:
    return name, {"help": help, **options, **({"metavar": metavar} if metavar else {})}


def _flag(name: str, help: str) -> Argument:
    return name, {"help": help, "action": "store_true"}


_NAME = _argument("name", "NAME", "user/name")
_CENTER = _argument(
    "--center",
    "URL",
    "file:///a/folder, https://..., s3://...; by default DELTACENTER_URL, else the Hub",
)
_VERSION = _argument("--revision", "REVISION", "a branch, tag or hash, instead of main")
_JSON = _flag("--json", "for programs")
_MODEL = _argument("model", "MODEL_DIR", "where a backbone's config.json is")
_CLASS = _argument(
    "--class",
    "CLASS",
    "the backbone's class in transformers, by default the one in its config.json",
    dest="model_class",
)


def parser() -> argparse.ArgumentParser:
    """What understands a command line; its answer's ``run`` carries the command out."""
    whole = argparse.ArgumentParser(
        prog="opendelta",
        description="Look at deltas, share them, convert them, and choose modules to modify.",
        epilog="`opendelta COMMAND --help` tells more, with an example. Exit codes: 0 fine, "
        "1 an error, told in one line on standard error, 2 a line that is not understood.",
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"opendelta {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, module: str, summary: str, more: str, example: str, *arguments: Argument
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        added.set_defaults(run=_deferred(name, module))
        for argument, options in arguments:
            added.add_argument(argument, **options)
        return added

    command(
        "info",
        "info",
        "tell what a delta is",
        "Method, backbone, sizes, hashes and card; the weights of one in a folder are checked and "
        "counted, those of one on a center are not downloaded.",
        "opendelta info my_delta",
        _argument("delta", "PATH_OR_NAME", "a saved delta's folder, or user/name"),
        _CENTER,
        _VERSION,
        _JSON,
    )
    command(
        "push",
        "centers",
        "publish a saved delta",
        "Its weights, config.json and README.md are taken along, other files are not. Prints the "
        "revision. Tokens are those of `hf auth login` or HF_TOKEN.",
        "opendelta push my_delta me/sentiment --center file:///shared/deltas",
        _argument("folder", "DIR", "what save_finetuned wrote"),
        _NAME,
        _CENTER,
        _argument("--revision", "REVISION", "the branch to push to, instead of main"),
        _argument("--message", "TEXT", "why, for the center's history"),
        _flag("--private", "for its owners only"),
        _flag("--create-pr", "propose the change (on the Hub)"),
    )
    command(
        "pull",
        "centers",
        "download a delta",
        "Into the cache, where from_finetuned finds it, and into DIR, if it is named. Prints the "
        "folder that holds it.",
        "opendelta pull me/sentiment my_copy",
        _NAME,
        _argument("folder", "DIR", "a folder that is new or empty", nargs="?"),
        _CENTER,
        _VERSION,
        _flag("--force", "download even what the cache holds"),
    )
    command(
        "list",
        "centers",
        "list the deltas on a center",
        "One name in each line.",
        "opendelta list sentiment --center file:///shared/deltas",
        _argument("search", "TEXT", "part of the name", nargs="?", default=""),
        _flag("--long", "a table: method, backbone, size, revision"),
        _CENTER,
        _JSON,
    )
    command(
        "convert",
        "convert",
        "write a delta in another format",
        "A delta's folder, of OpenDelta 0.3.2 too, becomes one with safetensors (or, with --to, "
        "with a torch file, or PEFT's adapter); the folder of a PEFT adapter becomes a delta's. To "
        "and from PEFT, the backbone is needed, with its weights. A single file of tensors is "
        "converted by the suffix of TARGET.",
        "opendelta convert my_delta for_peft --to peft --model bert-base",
        _argument("source", "SOURCE", "a delta's folder, PEFT's, or a file"),
        _argument("target", "TARGET", "a folder that is new or empty, or a file"),
        _argument("--to", help="for folders; by default safetensors", choices=FORMATS),
        _argument("--model", "MODEL_DIR", "the backbone, for PEFT"),
        _CLASS,
    )
    tree = command(
        "tree",
        "backbone",
        "draw the structure of a backbone",
        "It is built from config.json, without weights; no code that lies beside it is run.",
        "opendelta tree bert-base --common",
        _MODEL,
        _CLASS,
    )
    naming = tree.add_mutually_exclusive_group()  # dropout has no common name
    naming.add_argument("--common", action="store_true", help="use the common names (attn.q)")
    naming.add_argument("--only-common", action="store_true", help="leave out what has none")
    naming.add_argument("--all", action="store_true", help="show modules without parameters too")
    tree.add_argument("--params", action="store_true", help="a line for each parameter")
    command(
        "select",
        "backbone",
        "choose modules in a web page",
        "Prints a link to open, waits, and prints the modified_modules. The backbone is built from "
        "config.json, without weights; no code that lies beside it is run.",
        "opendelta select bert-base --port 8000",
        _MODEL,
        _CLASS,
        _argument("--port", help="by default 8888; 0: any free one", type=int, default=8888),
        _argument("--method", help="count what this method would add, such as lora"),
    )
    return whole


def _deferred(name: str, module: str) -> Callable[[argparse.Namespace], None]:
    """The command that `module` defines as ``run_name``; the help loads none of their imports."""

    def run(asked: argparse.Namespace) -> None:
        getattr(import_module(f"opendelta.cli.{module}"), f"run_{name}")(asked)

    return run
