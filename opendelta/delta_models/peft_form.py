"""Deltas in PEFT's form: what is the same for each method that PEFT has too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from opendelta.basemodel import DeltaBase
from opendelta.delta.config import ConfigFields
from opendelta.exceptions import ConfigError
from opendelta.ground.names import dotted, lineage
from opendelta.mechanism.backbone_state import bare, own_parameters
from opendelta.mechanism.child_slot import OwnModule
from opendelta.mechanism.insertion import ModuleInsertion
from opendelta.mechanism.ownership import own_modules
from opendelta.saving.peft_files import (
    PREFIX,
    Fields,
    PeftConfig,
    covered,
    own_of,
    patterns,
    require_modules,
    short_names,
    to_be_loaded,
    whole_modules,
    write_adapter,
)
from opendelta.verbs.freezing import EVERY_DELTA

Layers = dict[str, dict[str, Tensor]]  # host -> name in PEFT's file -> tensor


class PeftForm(DeltaBase):
    """Base of the methods that PEFT has too.

    Class attributes:
        title: what messages call the method.
        peft_types: what PEFT's configs call it; the first is written.
        peft_key: what a key of its tensors is like, after the prefix: (host, tensor).
        peft_fields: the fields of PEFT's config that are read: default, type.
        peft_immaterial: further fields that do not matter, whatever they say.
    """

    title: ClassVar[str]
    peft_types: ClassVar[tuple[str, ...]]
    peft_key: ClassVar[re.Pattern[str]]
    peft_fields: ClassVar[Fields] = {}
    peft_immaterial: ClassVar[frozenset[str]] = frozenset()

    # --- to be answered by a method -----------------------------------------------------------

    @classmethod
    def reads_peft(cls, values: dict[str, Any]) -> bool:
        """Whether an adapter with this config is of this method."""
        return values.get("peft_type") in cls.peft_types

    def peft_layers(
        self, layers: Mapping[str, ModuleInsertion], others: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This delta's tensors by PEFT's keys, after the prefix, and the fields of PEFT's config.

        Args:
            layers: host -> insertion.
            others: the names of all other modules.

        Raises:
            ConfigError: for a host on which PEFT computes something else.
        """
        raise NotImplementedError

    @classmethod
    def layers_from_peft(
        cls,
        config: PeftConfig,
        settings: dict[str, Any],
        layers: Layers,
        modules: dict[str, nn.Module],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our config's fields of the method, and tensors by our keys.

        Args:
            config: PEFT's, for messages; `settings`: its `peft_fields`.
            layers: what the file holds, by host.
            modules: the backbone's, by name.

        Raises:
            ConfigError: for a value that says nothing, or a host on which PEFT computes something
                else.
        """
        raise NotImplementedError

    # --- files ------------------------------------------------------------------------------

    def export_peft(self, path: str | os.PathLike[str]) -> None:
        """Write this delta as a PEFT adapter: ``PeftModel.from_pretrained(backbone, path)``.

        The folder gets ``adapter_config.json`` and ``adapter_model.safetensors``. They hold what
        `save_finetuned` would save: this delta with its own modules, which become PEFT's
        `modules_to_save`, and the backbone's parameters that were trained with it.

        Args:
            path: the folder; it is made if it does not exist.

        Raises:
            ConfigError: for a module on which PEFT computes something else: a convolution with
                groups, dilation or padding other than zeros, an embedding with `max_norm`.
            CheckpointError: if `path` is a file.
        """
        write_adapter(Path(path), *self.peft_form())

    def peft_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's config and tensors of this delta."""
        layers: dict[str, Any] = {i.host_name: i for i in self.insertions if i.of_method}
        own = {name for i in layers.values() for name, _ in i.named_tensors()}
        places = [i.place_name for i in self.insertions if isinstance(i, OwnModule)]
        trained = {n: tensor for n, tensor in self.checkpoint_tensors().items() if n not in own}
        with bare(self.backbone_model) as backbone:
            others = [name for name, _ in backbone.named_modules() if name and name not in layers]
            made, fields = self.peft_layers(layers, others)
            tensors = {PREFIX + name: tensor for name, tensor in made.items()}
            whole = whole_modules(backbone, trained, layers)
            own_shapes = {name: p.shape for name, p in backbone.named_parameters()}
            for lost in (name for name in places if name not in whole):
                inside = {n: t.shape for n, t in trained.items() if n.startswith(f"{lost}.")}
                if inside.items() <= own_shapes.items():
                    continue  # PEFT loads it into the backbone's own
                raise ConfigError(
                    f"{lost!r}, a module of this delta's own, cannot be one of PEFT's "
                    "modules_to_save: it is made of other parameters than the backbone's there."
                )
            for name in whole:  # for its buffers
                tensors |= backbone.get_submodule(name).state_dict(prefix=f"{PREFIX}{name}.")
        for name, tensor in trained.items():
            owner, _, leaf = name.rpartition(".")
            tensors[PREFIX + dotted(owner, "base_layer" if owner in layers else "", leaf)] = tensor
        config = getattr(backbone, "config", None)
        common = {
            "peft_type": self.peft_types[0],
            "task_type": None,  # with one, PEFT adds modules of its own choice to modules_to_save
            "base_model_name_or_path": getattr(config, "_name_or_path", None),
            "inference_mode": True,
            "target_modules": peft_targets(list(layers), others),
            "modules_to_save": whole or None,
            "fan_in_fan_out": any(hasattr(i.host, "nf") for i in layers.values()),
        }
        return common | fields, tensors

    @classmethod
    def from_peft_form(
        cls, config: PeftConfig, tensors: dict[str, Tensor], backbone: nn.Module
    ) -> tuple[ConfigFields, dict[str, Tensor]]:
        """Our config and tensors from PEFT's.

        Args:
            config: PEFT's.
            tensors: name in PEFT's file -> tensor.
            backbone: the backbone for which they are meant.

        Raises:
            CheckpointError: if a module is not there, or tied weights are not tied in the file.
            ConfigError: if the method on one of the modules is another function in PEFT.
        """
        settings = config.checked(cls.peft_fields, cls.peft_immaterial, cls.title)
        layers: Layers = {}
        trained: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX).replace(".base_layer", "")
            found = cls.peft_key.fullmatch(name)
            if found is None:
                trained[name] = tensor
            else:
                layers.setdefault(found[1], {})[found[2]] = tensor
        modules = dict(own_modules(backbone))
        require_modules(layers, modules, backbone, cls.title)
        fields, own_tensors = cls.layers_from_peft(config, settings, layers, modules)
        saved = tuple(settings["modules_to_save"])
        places = own_of(trained, saved, backbone, layers)
        heads = {n: t for n, t in trained.items() if any(a in places for a in lineage(n))}
        rest = {name: tensor for name, tensor in trained.items() if name not in heads}
        trained = to_be_loaded(rest, saved, backbone)
        every = list(own_modules(backbone, remove_duplicate=False))
        hosts = {id(modules[host]) for host in layers}
        own = dict(own_parameters(backbone))
        unfrozen = covered(backbone, own.keys() & trained)
        unfrozen += [
            n for n in trained if n in own and not any(outer in unfrozen for outer in lineage(n))
        ]
        others = [name for name in (*own.keys() - trained, *dict(every)) if name not in unfrozen]
        made = cls.config_class(
            **fields,
            modified_modules=patterns(list(layers), [n for n, m in every if id(m) not in hosts]),
            unfrozen_modules=[EVERY_DELTA, *patterns(unfrozen, others)],
            own_modules=places or None,
        )
        return made, {**own_tensors, **heads, **trained}


def peft_targets(names: list[str], others: list[str]) -> list[str] | str:
    """PEFT's `target_modules` for modules called `names`, and none of `others`."""
    return short_names(names, others) or "|".join(map(re.escape, names))


def require_alike(
    name: str, host: nn.Module, alike: Mapping[str, Iterable[Any]], method: str
) -> None:
    """Refuse a module for which PEFT's method is another function than ours.

    Args:
        alike: attribute of the module -> the values for which they are the same, the usual first.

    Raises:
        ConfigError: naming the attribute in which they differ.
    """
    for attribute, values in alike.items():
        usual, *_ = values
        value = getattr(host, attribute, usual)
        if value not in values:
            raise ConfigError(
                f"{name!r} is a {type(host).__name__} with {attribute}={value!r}, for which PEFT's "
                f"{method} computes something else; expected {attribute}={usual!r}. Leave it out "
                "with exclude_modules."
            )
