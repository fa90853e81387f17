"""LoRA to and from PEFT's files, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT (https://github.com/huggingface/peft) is not needed for either direction. Its files differ
from ours in three ways: target modules, ranks and alphas are addressed by patterns of another
syntax, some layers are scaled differently, and parts of the backbone that were trained too are
saved as whole modules.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from opendelta.addressing.patterns import REGEX_MARK, matches
from opendelta.delta_models.host_kinds import Embedding
from opendelta.delta_models.lora import LoraConfig, LoraLayer, LoraModel
from opendelta.exceptions import CheckpointError, ConfigError, nearest
from opendelta.freezing import EVERY_DELTA
from opendelta.ground.files import read_tensors, write_atomically, write_tensors
from opendelta.ground.names import dotted, lineage
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import bare, own_parameters
from opendelta.mechanism.insertion import ModuleInsertion
from opendelta.mechanism.ownership import own_modules

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # PEFT wraps the backbone twice

# A factor of a LoRA: module, letter.
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# What a convolution or embedding must be like for PEFT's LoRA to compute what ours does.
_ALIKE: dict[str, tuple[Any, ...]] = {
    "groups": (1,),
    "dilation": ((1,), (1, 1), (1, 1, 1)),
    "padding_mode": ("zeros",),
    "max_norm": (None,),
}
# Fields of PEFT's config that are read here: default, type.
_FIELDS: dict[str, tuple[Any, type | tuple[type, ...]]] = {
    "lora_alpha": (8, (int, float)),
    "lora_dropout": (0.0, (int, float)),
    "use_rslora": (False, bool),
    "alpha_pattern": ({}, dict),
    "modules_to_save": ([], list),
}
# Fields that do not matter: the tensors' names and shapes say where LoRA is and of which rank;
# the others tell of initialisation and of other software.
_IMMATERIAL = frozenset(
    "peft_type task_type base_model_name_or_path revision auto_mapping inference_mode peft_version "
    "r rank_pattern target_modules exclude_modules layers_to_transform layers_pattern bias "
    "fan_in_fan_out init_lora_weights eva_config corda_config lora_ga_config loftq_config "
    "runtime_config megatron_core qalora_group_size ensure_weight_tying".split()
)
# Initialisations that leave the backbone's weights alone.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

Value = TypeVar("Value")


# --- writing --------------------------------------------------------------------------------


def export_peft(delta: LoraModel, path: str | os.PathLike[str]) -> None:
    """Write a LoRA delta into a folder that PEFT reads, see `LoraModel.export_peft`."""
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; a PEFT adapter is written into a folder.")
    config, tensors = to_peft(delta)
    write_tensors(folder / WEIGHT_FILES[0], tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def to_peft(delta: LoraModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors of a delta."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    hosts = [i for i in delta.insertions if isinstance(i, ModuleInsertion)]
    for insertion in hosts:
        name, layer = insertion.host_name, insertion.module
        assert isinstance(layer, LoraLayer)
        _require_alike(name, insertion.host)
        form = "lora_embedding_{}" if isinstance(layer.kind, Embedding) else "lora_{}.weight"
        tensors[f"{PREFIX}{name}.{form.format('A')}"] = layer.lora_A
        tensors[f"{PREFIX}{name}.{form.format('B')}"] = layer.lora_B
        ranks[name] = layer.r
        alphas[name] = _plain(layer.lora_alpha / _embedding_scale(insertion.host))
    own = {name for name, _ in delta.own_tensors()}
    trained = {n: tensor for n, tensor in delta.checkpoint_tensors().items() if n not in own}
    with bare(delta.backbone_model) as backbone:
        known = [name for name, _ in backbone.named_modules() if name and name not in ranks]
        whole = _whole_modules(backbone, trained, ranks)
        for name in whole:  # for its buffers
            tensors |= backbone.get_submodule(name).state_dict(prefix=f"{PREFIX}{name}.")
    for name, tensor in trained.items():
        owner, _, leaf = name.rpartition(".")
        tensors[PREFIX + dotted(owner, "base_layer" if owner in ranks else "", leaf)] = tensor
    config = {
        "peft_type": "LORA",
        "task_type": None,  # with one, PEFT adds modules of its own choice to modules_to_save
        "base_model_name_or_path": getattr(
            getattr(backbone, "config", None), "_name_or_path", None
        ),
        "inference_mode": True,
        "r": _commonest(ranks),
        "rank_pattern": _exceptions(ranks, _peft_keys),
        "lora_alpha": _commonest(alphas),
        "alpha_pattern": _exceptions(alphas, _peft_keys),
        "lora_dropout": delta.lora_dropout,
        "target_modules": _short_names(list(ranks), known) or "|".join(map(re.escape, ranks)),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(hasattr(i.host, "nf") for i in hosts),
        "bias": "none",
        "use_rslora": False,
    }
    return config, tensors


def _whole_modules(backbone: nn.Module, trained: Iterable[str], hosts: Iterable[str]) -> list[str]:
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
        for owner in _covered(backbone, trained)
        if not any(f"{name}.".startswith(f"{owner}.") for name in apart)
        and sum(place.endswith(owner) for place in places) == 1
    ]


# --- reading --------------------------------------------------------------------------------


def from_peft(path: str | os.PathLike[str], backbone_model: nn.Module) -> DeltaBase:
    """Put a LoRA of PEFT's on a backbone, see `AutoDeltaModel.from_peft`."""
    if not isinstance(backbone_model, nn.Module):
        raise ConfigError(
            f"from_peft: backbone_model is a {type(backbone_model).__name__}; expected first the "
            "folder, then the backbone, a torch nn.Module."
        )
    folder = Path(path)
    settings = read_peft_config(folder)
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    config, tensors = from_peft_tensors(settings, read_tensors(file), uncompiled(backbone_model))
    return LoraModel.from_finetuned(None, backbone_model, config, state_dict=tensors)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """What `_FIELDS` lists from the PEFT config in a folder.

    Raises:
        CheckpointError: if there is none, or it is not JSON.
        ConfigError: if it is not a LoRA's, or asks for something else than LoRA.
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
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise ConfigError(f"{file}: peft_type={kind!r}; expected 'LORA', the one that is read.")
    start = values.get("init_lora_weights")
    if start not in _INITIALISATIONS:
        raise ConfigError(
            f"{file}: init_lora_weights={start!r} changes the backbone's weights, so the adapter "
            "does not fit the original backbone. Let PEFT save it as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for field, value in values.items():
        if value and field not in _FIELDS and field not in _IMMATERIAL:
            raise ConfigError(
                f"{file}: {field}={value!r:.80} is more than LoRA, so it cannot be read."
            )
    read = {}
    for field, (default, kinds) in _FIELDS.items():
        value = values.get(field)
        read[field] = default if value is None else value
        if not isinstance(read[field], kinds):
            raise ConfigError(
                f"{file}: {field}={value!r:.80} is a {type(value).__name__}; expected a value "
                f"such as {default!r}."
            )
    if not all(isinstance(name, str) for name in read["modules_to_save"]):
        raise ConfigError(f"{file}: modules_to_save={read['modules_to_save']!r}; expected names.")
    for pattern, value in read["alpha_pattern"].items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{file}: alpha_pattern: {pattern!r}: {error}.") from error
        if not isinstance(value, (int, float)):
            raise ConfigError(f"{file}: alpha_pattern: {pattern!r}: {value!r} is no number.")
    return read


def from_peft_tensors(
    settings: dict[str, Any], tensors: dict[str, Tensor], backbone: nn.Module
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Our config and tensors from PEFT's.

    Args:
        settings: as `read_peft_config` returns them.
        tensors: name in PEFT's file -> tensor.
        backbone: the backbone for which they are meant.

    Raises:
        CheckpointError: if a module is not there, or tied weights are not tied in the file.
        ConfigError: if LoRA on one of the modules is another function in PEFT.
    """
    factors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            trained[name] = tensor
            continue
        host, letter = factor.groups()
        factors[f"{host}.lora.lora_{letter}"] = tensor
        ranks.setdefault(host, 1)
        if letter == "A" and tensor.dim() and tensor.numel():  # others are refused by their shape
            ranks[host] = tensor.shape[0]
    modules = dict(own_modules(backbone))
    _require_modules(ranks, modules, backbone)
    alphas = {host: _alpha(settings, host, rank, modules[host]) for host, rank in ranks.items()}
    trained = _kept(trained, tuple(settings["modules_to_save"]), backbone)
    every = list(own_modules(backbone, remove_duplicate=False))
    hosts = {id(modules[host]) for host in ranks}
    own = dict(own_parameters(backbone))
    unfrozen = _covered(backbone, own.keys() & trained)
    unfrozen += [n for n in trained if not any(outer in unfrozen for outer in lineage(n))]
    others = [name for name in (*own.keys() - trained, *dict(every)) if name not in unfrozen]
    config = LoraConfig(
        lora_r=_commonest(ranks),
        lora_alpha=_commonest(alphas),
        lora_dropout=settings["lora_dropout"],
        rank_pattern=_exceptions(ranks, _patterns) or None,
        alpha_pattern=_exceptions(alphas, _patterns) or None,
        modified_modules=_patterns(list(ranks), [n for n, m in every if id(m) not in hosts]),
        unfrozen_modules=[EVERY_DELTA, *_patterns(unfrozen, others)],
    )
    return config, {**factors, **trained}


def _require_modules(
    hosts: Iterable[str], modules: dict[str, nn.Module], backbone: nn.Module
) -> None:
    """Refuse an adapter that has LoRA on nothing, or on modules that are not there."""
    missing = [host for host in hosts if host not in modules]
    if missing:
        raise CheckpointError(
            f"The adapter has LoRA on {missing[0]!r}"
            + f" and {len(missing) - 1} more" * (len(missing) > 1)
            + f", which {type(backbone).__name__} does not have."
            + nearest(missing[0], modules)
        )
    if not list(hosts):
        raise CheckpointError("The adapter's file holds no LoRA: no key ends in lora_A.weight.")
    for host in hosts:
        _require_alike(host, modules[host])


def _alpha(settings: dict[str, Any], host: str, rank: int, module: nn.Module) -> float:
    """The alpha with which our ``alpha / rank`` is the factor by which PEFT scales the term."""
    patterns = settings["alpha_pattern"].items()
    found = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", host))
    alpha: float = next(found, settings["lora_alpha"]) * _embedding_scale(module)
    return alpha * math.sqrt(rank) if settings["use_rslora"] else alpha


def _kept(
    trained: dict[str, Tensor], modules_to_save: tuple[str, ...], backbone: nn.Module
) -> dict[str, Tensor]:
    """What of the backbone's own tensors in a PEFT file is to be loaded, one name per tie.

    PEFT also saves embeddings that were never trained, and buffers: those equal the backbone's.

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
    for name, module in own_modules(backbone):
        present |= {dotted(name, own): b for own, b in module._buffers.items() if b is not None}
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


# --- both -----------------------------------------------------------------------------------


def _require_alike(name: str, host: nn.Module) -> None:
    """Refuse a module for which PEFT's LoRA is another function than ours.

    Raises:
        ConfigError: naming the attribute in which they differ.
    """
    for attribute, alike in _ALIKE.items():
        value = getattr(host, attribute, alike[0])
        if value not in alike:
            raise ConfigError(
                f"{name!r} is a {type(host).__name__} with {attribute}={value!r}, for which PEFT's "
                f"LoRA computes something else; expected {attribute}={alike[0]!r}. Leave it out "
                "with exclude_modules."
            )


def _embedding_scale(host: nn.Module) -> float:
    """By what an embedding multiplies its rows; PEFT multiplies its LoRA by it too, we do not."""
    scale = getattr(host, "embed_scale", None) if isinstance(host, nn.Embedding) else None
    return 1.0 if scale is None else float(scale)


def _plain(value: float) -> float:
    """An integer where it is one: some readers of PEFT's files expect that of an alpha."""
    return int(value) if float(value).is_integer() else value


def _equal(one: Tensor, other: Tensor) -> bool:
    return not one.is_meta and one.shape == other.shape and torch.equal(one, other.to(one))


def _covered(backbone: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The outermost modules that hold some of `parameters` directly, and no other parameters."""
    wanted = set(parameters)
    covered: list[str] = []
    for owner in sorted({name.rpartition(".")[0] for name in wanted} - {""}):
        inside = (dotted(owner, n) for n, _ in backbone.get_submodule(owner).named_parameters())
        if not any(outer in covered for outer in lineage(owner)) and wanted.issuperset(inside):
            covered.append(owner)
    return covered


def _commonest(table: dict[str, Value]) -> Value:
    return Counter(table.values()).most_common(1)[0][0]


def _exceptions(
    table: dict[str, Value], spell: Callable[[Sequence[str], Sequence[str]], list[str]]
) -> dict[str, Value]:
    """Pattern -> value for the modules whose value is not the commonest.

    Args:
        table: module -> value.
        spell: patterns that address the first modules and none of the second.
    """
    default = _commonest(table)
    found: dict[str, Value] = {}
    for value in dict.fromkeys(table.values()):
        if value != default:
            names = [name for name in table if table[name] == value]
            others = [name for name in table if table[name] != value]
            found |= dict.fromkeys(spell(names, others), value)
    return found


def _patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Patterns of ours that address `names` and none of `others`."""
    short = _short_names(names, others)
    return [f"{REGEX_MARK}^{re.escape(n)}" for n in names] if short is None else short


def _peft_keys(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """PEFT's patterns that address `names` and none of `others`."""
    short = _short_names(names, others)
    return [f"^{re.escape(n)}" for n in names] if short is None else [*map(re.escape, short)]


def _short_names(names: Sequence[str], others: Sequence[str]) -> list[str] | None:
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
