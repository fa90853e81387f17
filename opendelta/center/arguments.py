"""What tells one delta on a center from another (specification 1.23.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opendelta.exceptions import ConfigError, UnknownArgumentError, nearest

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class DeltaCenterArguments:
    """What is said about a delta where it is published, and how that is done.

    Attributes:
        name: ``user/name``; empty for one that `create_default_name` makes.
        backbone_model: the published name of the backbone; empty for where it was loaded from.
        train_tasks: tasks that it was trained on, such as ``text-classification``.
        train_datasets: data sets that it was trained on, as the Hub calls them.
        language: of the data, as ``en``.
        license: as ``apache-2.0``.
        private: whether only its owners see it; None for the center's default.
        revision: the branch to push to; None for ``main``.
        create_pr: propose the change instead of making it.
        message: why, for the center's history.
    """

    name: str = ""
    backbone_model: str = ""
    train_tasks: list[str] = field(default_factory=list)
    train_datasets: list[str] = field(default_factory=list)
    language: str = ""
    license: str = ""
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None

    def __post_init__(self) -> None:
        for several in ("train_tasks", "train_datasets"):
            value = getattr(self, several)
            setattr(self, several, [value] if isinstance(value, str) else list(value or ()))


def create_delta_center_args(
    center_args: DeltaCenterArguments | Mapping[str, Any] | None = None,
    center_args_pool: Mapping[str, Any] | None = None,
) -> DeltaCenterArguments:
    """Arguments from two places.

    Args:
        center_args: what counts.
        center_args_pool: fills what `center_args` leaves open. It may be all the arguments of a
            training script: what is not about publishing is left alone.

    Raises:
        UnknownArgumentError: for a key of `center_args` that is no argument.

    Example:
        >>> create_delta_center_args({"name": "me/a"}, {"name": "me/b", "license": "mit"}).name
        'me/a'
    """
    known = vars(DeltaCenterArguments())
    if isinstance(center_args, DeltaCenterArguments):
        given = vars(center_args)
        center_args = {name: given[name] for name in known if given[name] != known[name]}
    for some in (center_args, center_args_pool):
        if not isinstance(some, (Mapping, type(None))):
            raise ConfigError(f"expected a dict of arguments, got a {type(some).__name__}.")
    first, pool = dict(center_args or {}), dict(center_args_pool or {})
    for key in first:
        if key not in known:
            raise UnknownArgumentError(
                f"center_args has no {key!r}.{nearest(key, known)} Known are {', '.join(known)}."
            )
    return DeltaCenterArguments(**{k: v for k, v in {**pool, **first}.items() if k in known})


def create_default_name(**kwargs: Any) -> str:
    """The given values, joined by underscores, as a name.

    Args:
        kwargs: text, or a list of it, in the order of the name; empty ones are left out.

    Example:
        >>> create_default_name(backbone="google-t5/t5-base", delta_type="lora", tasks=["mrpc"])
        't5-base_lora_mrpc'
    """
    words = []
    for value in kwargs.values():
        several = value if isinstance(value, (list, tuple)) else [value]
        word = "-".join(str(v).rstrip("/").rpartition("/")[2] for v in several if v)
        words.append(re.sub(r"([.-])[.-]+", r"\1", _NOT_IN_NAMES.sub("-", word)).strip(".-"))
    return "_".join(filter(None, words))[:96].strip(".-") or "delta"
