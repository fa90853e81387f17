"""The files of PEFT's adapters, ``adapter_config.json`` and ``adapter_model.safetensors``.

What is the same for every method stands here, and nothing of any: the folder, the patterns, and the
parts of the backbone that were trained too, which PEFT saves as whole modules. PEFT
(https://github.com/huggingface/peft) is not needed.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opendelta.addressing.patterns import REGEX_MARK, matches
from opendelta.exceptions import CheckpointError, ConfigError, nearest
from opendelta.ground.files import read_tensors, write_atomically, write_tensors
from opendelta.ground.names import dotted, lineage
from opendelta.mechanism.backbone_state import own_parameters, unmoved
from opendelta.mechanism.ownership import own_modules

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # PEFT wraps the backbone twice

# Fields that do not matter for any method: the tensors' names and shapes say where it is, the
# others tell of initialisation and of other software.
_IMMATERIAL = frozenset(
    "peft_type task_type base_model_name_or_path revision auto_mapping inference_mode peft_version "
    "target_modules exclude_modules fan_in_fan_out".split()
)

Value = TypeVar("Value")
Fields = Mapping[str, tuple[Any, type | tuple[type, ...]]]  # field -> default, type


# --- the folder -----------------------------------------------------------------------------


@dataclass
class PeftConfig:
    """A config of PEFT's and where it was read."""

    file: Path
    values: dict[str, Any]

    def checked(self, fields: Fields, immaterial: Collection[str], method: str) -> dict[str, Any]:
        """The values of `fields`, their defaults where the config does not give them.

        Raises:
            ConfigError: for a value of another type, or another field that is set and is not
                immaterial, so that the adapter is more than `method`.
        """
        fields = {**fields, "modules_to_save": ([], list)}
        for field, value in self.values.items():
            if value and field not in fields and field not in _IMMATERIAL.union(immaterial):
                raise ConfigError(
                    f"{self.file}: {field}={value!r:.80} is more than {method}, so it cannot be "
                    "read."
                )
        read: dict[str, Any] = {}
        for field, (default, kinds) in fields.items():
            value = self.values.get(field)
            read[field] = default if value is None else value
            if not isinstance(read[field], kinds):
                raise ConfigError(
                    f"{self.file}: {field}={value!r:.80} is a {type(value).__name__}; expected a "
                    f"value such as {default!r}."
                )
        if not all(isinstance(name, str) for name in read["modules_to_save"]):
            names = read["modules_to_save"]
            raise ConfigError(f"{self.file}: modules_to_save={names!r}; expected names.")
        return read

    def expression(self, field: str, pattern: str) -> re.Pattern[str]:
        """A regular expression of the config.

        Raises:
            ConfigError: if it is none.
        """
        try:
            return re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{self.file}: {field}: {pattern!r}: {error}.") from error


def read_config(folder: Path) -> PeftConfig:
    """The PEFT config in a folder.

    Raises:
        CheckpointError: if there is none, or it is no JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is no folder with an {CONFIG_FILE}, as PEFT's save_pretrained writes. An "
            "adapter on a hub is downloaded first; a delta is loaded by from_finetuned."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}; expected a JSON object.")
    return PeftConfig(file, values)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in a folder.

    Raises:
        CheckpointError: if there are none, or their file is damaged or could run code.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    return read_tensors(file)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter into a folder, which is made if it does not exist.

    Raises:
        CheckpointError: if `folder` is a file.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; a PEFT adapter is written into a folder.")
    write_tensors(folder / WEIGHT_FILES[0], tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


# --- what was trained of the backbone -------------------------------------------------------


def whole_modules(backbone: nn.Module, trained: Iterable[str], hosts: Iterable[str]) -> list[str]:
    """Those of the modules that were wholly trained that PEFT is told to save.

    PEFT copies such a module, and finds it by the end of its name. So it must hold no LoRA, no
    parameter that is tied to another, and no other name may end like its own. What remains is
    written like a bias that PEFT trains: it is loaded into the backbone's own parameter.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, p in backbone.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    apart = [*hosts, *(name for aliases in names.values() if len(aliases) > 1 for name in aliases)]
    places = ["model", *(f"model.{n}" for n, _ in backbone.named_modules(remove_duplicate=False))]
    return [
        owner
        for owner in covered(backbone, trained)
        if not any(f"{name}.".startswith(f"{owner}.") for name in apart)
        and sum(place.endswith(owner) for place in places) == 1
    ]


def own_of(
    trained: Iterable[str],
    modules_to_save: tuple[str, ...],
    backbone: nn.Module,
    hosts: Collection[str],
) -> list[str]:
    """Names of the modules that PEFT saved whole and that can be a delta's own, the outermost.

    Those that hold tied parameters, or are around or inside a host, stay the backbone's.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, p in own_parameters(backbone):
        holders[id(p)].append(name)
    tied = [name for names in holders.values() if len(names) > 1 for name in names]
    found: list[str] = []
    for name, _ in own_modules(backbone, originals=True):
        saved = name and f"model.{name}".endswith(modules_to_save)
        if not saved or any(outer in found for outer in lineage(name)):
            continue
        inside = [n for n in (*tied, *hosts) if f"{n}.".startswith(f"{name}.")]
        around = [host for host in hosts if f"{name}.".startswith(f"{host}.")]
        if not inside and not around and any(n.startswith(f"{name}.") for n in trained):
            found.append(name)
    return found


def to_be_loaded(
    trained: dict[str, Tensor], modules_to_save: tuple[str, ...], backbone: nn.Module
) -> dict[str, Tensor]:
    """What of the backbone's own tensors in a PEFT file is to be loaded, one name per tie.

    PEFT also saves embeddings that were never trained, and all buffers of a module: what equals the
    backbone's is left out.

    Raises:
        CheckpointError: if a parameter that is tied here was trained apart from the other.
    """
    names: dict[int, list[str]] = defaultdict(list)
    present: dict[str, Tensor] = {}
    for name, p in own_parameters(backbone):
        names[id(p)].append(name)
        present[name] = p
    copied = {  # PEFT finds them by the end of their names
        name
        for name in present
        if any(f"model.{module}".endswith(modules_to_save) for module in lineage(name)[1:])
    }
    own = unmoved(backbone)
    for name, module in own_modules(backbone, remove_duplicate=False):
        there = ((key, b) for key, b in module._buffers.items() if b is not None)
        present |= {dotted(name, key): own.get(id(b), b) for key, b in there}
    kept = {
        name: tensor
        for name, tensor in trained.items()
        if name in copied or name not in present or not _equal(present[name], tensor)
    }
    for aliases in names.values():
        here = [name for name in aliases if name in kept]
        apart = any(not _equal(kept[here[0]], kept[name]) for name in here[1:])
        if apart or (len(here) < len(aliases) and not copied.isdisjoint(here)):
            other = next(name for name in aliases if name != here[0])
            raise CheckpointError(
                f"PEFT trained {here[0]!r} apart from {other!r}, to which it is tied in this "
                f"{type(backbone).__name__}: untie them first (tie_word_embeddings=False when the "
                "backbone is loaded)."
            )
        for name in here[1:]:
            del kept[name]
    return kept


def require_modules(
    hosts: Iterable[str], modules: Mapping[str, nn.Module], backbone: nn.Module, method: str
) -> None:
    """Refuse an adapter that sits on nothing, or on modules that are not there.

    Raises:
        CheckpointError: naming one of them.
    """
    missing = [host for host in hosts if host not in modules]
    if missing:
        raise CheckpointError(
            f"The adapter has {method} on {missing[0]!r}"
            + f" and {len(missing) - 1} more" * (len(missing) > 1)
            + f", which {type(backbone).__name__} does not have."
            + nearest(missing[0], modules)
        )
    if not list(hosts):
        raise CheckpointError(f"The adapter's file holds no {method}: none of its keys is one's.")


def _equal(one: Tensor, other: Tensor) -> bool:
    return not one.is_meta and one.shape == other.shape and torch.equal(one, other.to(one))


def covered(backbone: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The outermost modules that hold some of `parameters` directly, and no other parameters."""
    wanted = set(parameters)
    covered: list[str] = []
    for owner in sorted({name.rpartition(".")[0] for name in wanted} - {""}):
        inside = (dotted(owner, n) for n, _ in backbone.get_submodule(owner).named_parameters())
        if not any(outer in covered for outer in lineage(owner)) and wanted.issuperset(inside):
            covered.append(owner)
    return covered


# --- names ----------------------------------------------------------------------------------


def commonest(table: dict[str, Value]) -> Value:
    return Counter(table.values()).most_common(1)[0][0]


def exceptions(
    table: dict[str, Value], spell: Callable[[Sequence[str], Sequence[str]], list[str]]
) -> dict[str, Value]:
    """Pattern -> value for the modules whose value is not the commonest.

    Args:
        table: module -> value.
        spell: patterns that address the first modules and none of the second.
    """
    default = commonest(table)
    found: dict[str, Value] = {}
    for value in dict.fromkeys(table.values()):
        if value != default:
            names = [name for name in table if table[name] == value]
            others = [name for name in table if table[name] != value]
            found |= dict.fromkeys(spell(names, others), value)
    return found


def patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Patterns of ours that address `names` and none of `others`."""
    short = short_names(names, others)
    return [f"{REGEX_MARK}^{re.escape(n)}" for n in names] if short is None else short


def peft_keys(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """PEFT's patterns that address `names` and none of `others`."""
    short = short_names(names, others)
    return [f"^{re.escape(n)}" for n in names] if short is None else [*map(re.escape, short)]


def short_names(names: Sequence[str], others: Sequence[str]) -> list[str] | None:
    """Ends of `names`, as short as can be and all of one length, that address none of `others`.

    Returns:
        None if even a whole name is the end of another.
    """
    parts = [name.split(".") for name in names]
    for length in range(1, max(map(len, parts), default=0) + 1):
        ends = list(dict.fromkeys(".".join(part[-length:]) for part in parts))
        if not any(matches(other, end) for other in others for end in ends):
            return ends
    return None
