"""Loading a delta: all of a file, or nothing (specification 1.23.1)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import agreeing, assign, full, full_shape, is_shard, reshard
from opendelta.delta.config import ConfigFields
from opendelta.delta.delta import Delta
from opendelta.delta.plan import Plan, held_back
from opendelta.delta.pseudo_input import random_state_kept_on_error
from opendelta.delta.record import record_of
from opendelta.delta.registry import model_class_for
from opendelta.delta.switching import is_attached, is_merged
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.files import (
    CONFIG_FILE,
    delta_config,
    read_config,
    read_tensors,
    read_verified,
    require_tensors,
    weights_in,
)
from opendelta.ground.seams import names_in_model
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import BackboneState, deltas
from opendelta.mechanism.bare import bare_tensors
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.engines import require_whole
from opendelta.mechanism.insertion import switch
from opendelta.mechanism.slot import CarriedParameter
from opendelta.saving.backbone_check import check_backbone
from opendelta.saving.checkpoint import require_own
from opendelta.saving.hashing import gen_parameter_hash
from opendelta.saving.made_modules import made_modules
from opendelta.saving.moved_buffers import buffer_targets, load_buffers

logger = logging.getLogger(__name__)


def class_for(cls: type[Delta], config: ConfigFields | dict[str, Any]) -> Any:
    """The delta class that a config is for, which must be `cls` or one below it.

    Raises:
        ConfigError: if it is another.
    """
    own = cls.delta_type
    is_dict = isinstance(config, dict)
    named = config.get("delta_type", own) if is_dict else getattr(config, "delta_type", None)
    if own and named == own:
        return cls  # also where it is registered nowhere
    found = model_class_for(config)
    if not issubclass(found, cls):
        raise ConfigError(
            f"This config is for {found.__name__}, not for {cls.__name__}; AutoDeltaModel "
            "loads any."
        )
    return found


def from_finetuned(
    cls: type[Delta],
    backbone: nn.Module,
    source: Callable[[], Path],
    config: ConfigFields | dict[str, Any] | None,
    tensors: dict[str, Tensor] | None,
    check_hash: bool | str,
    overriding: dict[str, Any],
) -> Delta:
    """Put a saved delta on a backbone, see `DeltaBase.from_finetuned`.

    Args:
        cls: the class that loads.
        backbone: modified in place.
        source: finds the folder, or its config; called where something is read from it.
        config: used instead of the folder's; `tensors`: likewise.
        check_hash: see there.
        overriding: fields of the config.
    """
    backbone, given = uncompiled(backbone), overriding.pop("own_modules", None)
    with agreeing(backbone, CheckpointError) as read:
        path = source() if config is None or tensors is None else Path()
        from_file = config is None
        if config is None:
            values = read_config(path, to_load=True)
            config = class_for(cls, values).config_class.from_dict(values, **overriding)
            overriding = {}
        model_class = class_for(cls, config)
        made = model_class.config_from(config, **overriding)
        made.from_file = made.from_file or from_file
        if tensors is None:
            folder = path.parent if path.suffix == ".json" else path
            vouches = from_file or bool(delta_config(folder))  # not that of another folder
            told = (made.weights_file, made.weights_sha256) if vouches else (None, None)
            tensors = _named_as_here(read_verified(folder, *told), folder, backbone)
        read.append(_fingerprint(tensors))
    check_backbone(made, backbone, check_hash)
    if any(type(other) is model_class and is_attached(other) for other in deltas(backbone)):
        logger.warning(
            "The backbone already carries an attached %s; the loaded one comes on top of it. "
            "`opendelta.deltas(model)` lists them.",
            model_class.__name__,
        )
    with one_at_a_time(), random_state_kept_on_error():
        own = made_modules(backbone, made.own_modules or [], tensors, given or {})
        with held_back() as plans:
            delta: Delta = model_class.from_config(
                made, backbone, check_hash=False, **({"own_modules": own} if own else {})
            )
        changes = Changes()
        for plan in plans:
            plan.prepare()
        for plan in plans:
            plan.enter(changes)
        _set_to_eval(backbone, delta, changes)
        _load(delta, tensors, changes, is_new=True)
    return delta


def _named_as_here(
    tensors: dict[str, Tensor], folder: Path, backbone: nn.Module
) -> dict[str, Tensor]:
    """Tensors under the names that they have in the model, also where ``save_pretrained`` wrote."""
    if not (folder / CONFIG_FILE).is_file() or delta_config(folder):
        return tensors
    names = names_in_model(backbone, tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _set_to_eval(backbone: nn.Module, delta: Delta, changes: Changes) -> None:
    """As ``backbone.eval()`` with the delta on it; a model that does more then does it first."""
    brought = (module for insertion in delta.insertions for module in insertion.brought)
    inside = (part for module in (backbone, *brought) for part in module.modules())
    modules = [module for module in inside if module.training]
    plain = nn.Module.train, nn.Module.eval
    if any((type(m).train, type(m).eval) != plain for m in modules):
        changes.do_first(backbone.eval)
    for module in modules:
        changes.set(module, training=False)


def load_checkpoint(
    delta: Delta,
    path: str | os.PathLike[str],
    load_func: Callable[..., Any] | None = None,
    backbone_model: nn.Module | None = None,
) -> None:
    """Load only the weights, see `DeltaBase.load_checkpoint`."""
    require_own(delta, backbone_model)
    with agreeing(delta.backbone_model, CheckpointError) as read:
        values = delta_config(Path(path))
        tensors = read_tensors(weights_in(path, values.get("weights_file")), load_func)
        tensors = _named_as_here(tensors, Path(path), delta.backbone_model)
        read.append(_fingerprint(tensors))
    _load(delta, tensors, Changes(), values.get("backbone_hash_excludes"))


def _load(
    delta: Delta,
    tensors: dict[str, Tensor],
    changes: Changes,
    carried: list[str] | None = None,
    is_new: bool = False,
) -> None:
    """Copy a file into a delta and its backbone, together with other changes, or nothing.

    Args:
        delta: where to; `tensors`: what.
        changes: what comes in together with it.
        carried: the backbone's own parameters that the file must hold, and no others; None for
            those that the delta's config names, else for any.
        is_new: whether the delta has just been made.

    Raises:
        CheckpointError: naming missing and unexpected keys and shapes that differ.
    """
    backbone = delta.backbone_model
    require_tensors(tensors, "state_dict")
    require_whole(backbone)
    reshard(backbone)
    own, tensors = delta.loading_targets(tensors, changes)
    targets: dict[str, Tensor] = dict(own)
    carried = delta.config.backbone_hash_excludes if carried is None else carried
    if carried is None or carried:
        first: dict[int, str] = {}  # the name in files, where a parameter has several
        for name, p, is_buffer in bare_tensors(backbone):
            is_first = first.setdefault(id(p), name) == name and not is_buffer
            if is_first and (carried is None or name in carried):
                targets.setdefault(name, p)
    buffers = {n: b for n, b in buffer_targets(delta).items() if n in tensors and n not in targets}
    targets.update(buffers)
    if any(tensor.is_meta for tensor in targets.values()):
        raise CheckpointError(
            f"The {type(backbone).__name__} is on the meta device, where there is "
            "nothing to load into: give it its weights first."
        )
    _require_fit(delta, tensors, targets, [*own, *(carried or ())])
    load_buffers(delta, {name: tensors[name] for name in buffers}, changes)
    tensors = {name: value for name, value in tensors.items() if name not in buffers}
    values = {own[name]: value for name, value in tensors.items() if name in own}
    values |= take_over(delta, {n: t for n, t in tensors.items() if n not in own}, changes, is_new)
    _carry_out(backbone, changes, values, [*own.values()] if is_new else [])


def take_over(
    delta: Delta, tensors: dict[str, Tensor], changes: Changes, is_new: bool
) -> dict[Tensor, Tensor]:
    """Let parameters of the backbone that a file carries be the delta's, in their places.

    What this delta was training there stays the same object, for its optimizer holds it.

    Args:
        delta: whose; `tensors`: name in the backbone -> value.
        changes: what it comes in with.
        is_new: whether the delta has just been made.

    Returns:
        Those that stay -> their values.
    """
    record = record_of(delta)
    trained = record.left_trainable or []
    if is_new or tensors:
        left = [name for name in trained if name not in tensors]
        changes.set(record, left_trainable=left)
    if not tensors:
        return {}
    if is_merged(delta):
        raise CheckpointError(
            f"The file carries {next(iter(tensors))!r} of the backbone, and this "
            f"{type(delta).__name__} is merged: unmerge() it first."
        )
    plan = Plan(delta)
    acts, stay = is_new or is_attached(delta), dict[Tensor, Tensor]()
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        inside = plan.backbone.get_submodule(owner)
        p: Any = inside._parameters[leaf]
        aside = None
        if acts and name in trained:
            aside = nn.Parameter(full(p).detach().clone(), requires_grad=False)
            stay[p] = value
        else:
            own = value.detach().to(p.device, p.dtype, copy=True)  # not the memory of a file
            p = nn.Parameter(own, p.is_floating_point())
        places = plan.holders(leaf)[id(inside._parameters[leaf])]
        plan.put_parameter(places, leaf, p, kind=partial(CarriedParameter, aside=aside))
    plan.prepare()
    plan.note(changes)
    plan.enter(changes)
    if not acts:
        switch(changes, plan.insertions, False)
    return stay


def _require_fit(
    delta: Delta, tensors: dict[str, Tensor], targets: dict[str, Tensor], required: list[str]
) -> None:
    missing = [name for name in required if name not in tensors]
    unexpected = [name for name in tensors if name not in targets]
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(full_shape(targets[name]))} here"
        for name in tensors
        if name in targets and tensors[name].shape != full_shape(targets[name])
    ]
    shapes += [
        f"{name}: {tensor.dtype} in the file, {targets[name].dtype} here"
        for name, tensor in tensors.items()
        if name in targets and not torch.can_cast(tensor.dtype, targets[name].dtype)
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
            for title, names in (
                ("missing in the file", missing),
                ("unexpected in the file", unexpected),
                ("of another kind", shapes),
            )
            if names
        ]
        saved_on, here = delta.config.backbone_class, type(delta.backbone_model).__name__
        origin = f"It was saved on a {saved_on}. " if saved_on not in (None, "", here) else ""
        raise CheckpointError(
            f"The checkpoint does not fit this {type(delta).__name__} on {here}. {origin}"
            f"Keys {'; keys '.join(parts)}."
        )


@torch.no_grad()
def _carry_out(
    backbone: nn.Module, changes: Changes, values: dict[Tensor, Tensor], new: list[Tensor]
) -> None:
    """Let tensors have these values, and all else be as prepared.

    Those of a `new` delta have them at once: nobody knows it yet, and on shards what it puts in the
    place of a parameter comes in by its values.
    """
    for tensor in new:
        assign(tensor, values.pop(tensor))
    ready: dict[Tensor, Tensor] = {}
    for target, value in values.items():
        is_plain = type(target) in (Tensor, nn.Parameter) and not is_shard(target)
        if is_plain and not hasattr(target, "_hp_mapping"):
            ready[target] = value.to(target.device, target.dtype)
        else:
            changes.do_first(assign, target, value)  # a shard, or what an engine has a copy of
    into, these = [t.detach() for t in ready], [*ready.values()]
    # One call of C code, which Ctrl-C does not break; torch takes no empty list.
    copy: Any = torch._foreach_copy_ if into else (lambda into, values: None)
    folded = [host for state in BackboneState.within(backbone) for host in state.merged.values()]
    if not folded:
        changes.do_first(copy, into, these)
        changes.carry_out()
        return
    before = [tensor.clone() for tensor in into]
    try:
        copy(into, these)
        for host in folded:  # anew, from what was loaded
            host.put(changes, *host.computed(host.folds, host.weights))
        changes.carry_out()
    except BaseException:
        copy(into, before)
        raise


def _fingerprint(tensors: dict[str, Tensor]) -> Iterator[str]:
    """A line for each tensor by which ranks compare what they are about to load."""
    for name, tensor in tensors.items():
        yield f"{name} {tuple(tensor.shape)} {gen_parameter_hash([tensor]).hexdigest()}"
