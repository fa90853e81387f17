"""What is told, refused and let in while a backbone with deltas runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.exceptions import DeltaWarning, InsertionError, warn
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_module
from opendelta.mechanism.dispatch import Dispatcher
from opendelta.mechanism.engines import require_reduced
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.places import place_of


def without_values(insertions: Iterable[Insertion]) -> list[Insertion]:
    """Those of new insertions that have none, as on a backbone that is on the meta device."""
    return [i for i in insertions if any(p.is_meta for _, p in i.named_parameters())]


def require_values(
    backbone: nn.Module, blank: Iterable[Insertion], given: Container[str]
) -> list[Insertion]:
    """Refuse deltas that came onto a backbone without values, and were given none since.

    Memory that nobody has written cannot be told by its contents, so that it counts what was done:
    values were loaded under the delta's names, written in place, or put there by transformers.

    Args:
        backbone: the model.
        blank: what came without values.
        given: names of parameters that a state dict gave values to.

    Returns:
        What still has none, and does not act.

    Raises:
        InsertionError: for one that acts.
    """
    left = []
    for insertion in blank:
        if not insertion.attached:
            left.append(insertion)
            continue
        device, _ = place_of(insertion.led_by) or place_of(backbone) or (None, None)
        tensors = [*insertion.named_parameters(), *_buffers(insertion)]
        if device is not None and device.type == "meta" and all(t.is_meta for _, t in tensors):
            left.append(insertion)  # the backbone has none either
            continue
        missing = [name for name, t in tensors if not (name in given or _is_written(t))]
        original = None if insertion.slot is None else insertion.slot.original
        if missing or (original is not None and original.is_meta):
            name = missing[0] if missing else tensors[0][0]
            raise InsertionError(
                f"{name!r} has no values: this delta was constructed while its backbone had none "
                "(on the meta device, as within from_pretrained), and what gave the backbone its "
                "weights gave the delta nothing. Give the backbone its weights first, by "
                "from_pretrained(), load_state_dict(assign=True) or to_empty() and loading; then "
                "construct the delta, or load one with from_finetuned()."
            )
    return left


def _buffers(insertion: Insertion) -> Iterator[tuple[str, Tensor]]:
    prefix = dotted(insertion.host_name, insertion.name)
    module = nn.Module() if insertion.module is None else insertion.module
    return ((dotted(prefix, name), buffer) for name, buffer in module.named_buffers())


def _is_written(tensor: Tensor) -> bool:
    """Whether a tensor that was made on meta has got values that somebody wrote."""
    if tensor.is_meta or tensor.is_inference():  # which counts no changes
        return not tensor.is_meta
    return tensor._version > 0 or getattr(tensor, "_is_hf_initialized", False)


PATIENCE = 8  # forwards in training may skip layers by chance (layerdrop), hardly so many times


def report_unreached(insertions: Iterable[Insertion], training: bool, left: int) -> int:
    """After a forward: tell which deltas no forward has reached so far.

    What a forward in training skips need not be out of reach: layerdrop leaves out whole layers.
    There a module is told of where its like was reached in no layer though some layer ran, and
    after `PATIENCE` forwards in any case.

    Args:
        insertions: all on the backbone.
        training: whether the forward was one in training.
        left: in how many forwards to look, this one included.

    Returns:
        In how many to look from now on; 1 for one in evaluation.
    """
    attached = [i for i in insertions if i.attached and i.reached is not None]
    missed = [i for i in attached if not i.reached]
    if not missed:
        return 0
    if training:
        ran = [_layers(i.host_name) for i in attached if i.reached]
        alike, stacks = {name for name, _ in ran}, {stack for _, stack in ran}
        sure = []
        for insertion in missed:
            name, stack = _layers(insertion.host_name)
            if name not in alike and (not stack or stack in stacks or left == 2):
                sure.append(insertion)
        if not sure:
            return max(left - 1, 1)
        missed = sure
    names = [dotted(i.host_name, i.name) for i in missed]
    shown = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
    warn(
        f"The first forward never called the modules that carry these deltas, so they have "
        f"no effect on it: {shown}. The model may read their weights instead of calling "
        "them, or this input takes another way; leave them out with exclude_modules.",
        DeltaWarning,
    )
    return 0


def _layers(name: str) -> tuple[str, str]:
    """A module's name with its numbers left open, and the part up to the last of them."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return ".".join(parts), ".".join(parts)[: ".".join(parts).rfind("*") + 1]


def report_unfrozen(backbone: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """In the first forward in training: tell if nobody has frozen any of these."""
    trains = {id(p): p.requires_grad for p in parameters if p.is_floating_point()}
    if trains and all(trains.values()):
        warn(
            f"The whole {type(backbone).__name__} trains, all {len(trains)} parameters of its own: "
            "freeze_module was never called, and save_finetuned writes the delta alone. Call "
            "delta.freeze_module(exclude=['deltas', 'classifier']), or whatever else shall train "
            "and be saved, before the optimizer is made.",
            DeltaWarning,
        )


def require_training(backbone: nn.Module, insertions: Iterable[Insertion]) -> bool:
    """In a forward with gradients: refuse deltas that would not train.

    Returns:
        Whether that is settled for the forwards to come.

    Raises:
        InsertionError: if DDP does not know a delta, or Accelerate offloaded it.
    """
    acting = [insertion for insertion in insertions if insertion.attached]
    away = next((insertion for insertion in acting if insertion.is_away), None)
    if away is not None:
        raise InsertionError(
            f"Accelerate offloaded the delta on {away.host_name!r} together with the "
            "backbone, so that it gets no gradients. Offload the backbone first, then "
            "construct or load the delta, which stays where it computes."
        )
    return require_reduced(backbone, (p for i in acting for _, p in i.named_parameters()))


def add_to_loss(backbone: nn.Module, kwargs: Kwargs, output: Any, term: Tensor) -> Any:
    """A transformers output with `term` added to its loss; any other output as it is.

    Where several calls make one step of the optimizer and the Trainer adds up their losses, having
    said how many labels there are in all, each call adds as much of the term as it has of those.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is not None and isinstance(labels, Tensor):
        if getattr(backbone, "loss_type", None) == "ForCausalLM":
            labels = kwargs.get("shift_labels", labels[..., 1:])
        term = term * (labels.ne(-100).sum() / total)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and hasattr(output, "_replace"):  # a namedtuple
        output = output._replace(loss=loss + term)
    elif isinstance(loss, Tensor):
        output.loss = loss + term
    elif type(output) is tuple and isinstance(output[0], Tensor) and output[0].dim() == 0:
        output = (output[0] + term, *output[1:])  # transformers' return_dict=False
    elif isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        output = type(output)({**output, "loss": output["loss"] + term})
    return output


# --- gradient checkpointing -----------------------------------------------------------------------


def checkpointed_blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """The modules that may run under transformers' gradient checkpointing."""
    for module in every_module(backbone):
        if "gradient_checkpointing" in module.__dict__ or hasattr(
            type(module), "gradient_checkpointing"
        ):
            yield module


def let_gradients_in(module: nn.Module, args: Args) -> Args | None:
    """Hook before a block: under reentrant checkpointing make an input require grad.

    Reentrant checkpointing drops all gradients of a block none of whose inputs requires grad;
    with a frozen backbone that is the first block of every stack.
    """
    if torch.compiler.is_compiling() or not (
        module.training and getattr(module, "gradient_checkpointing", False)
    ):
        return None
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(function, "keywords", {}).get("use_reentrant", False):
        return None
    if not torch.is_grad_enabled() or any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return None
    if not any(p.requires_grad for p in module.parameters()) and Dispatcher.router is None:
        return None  # in a route what trains need not be attached
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:position], value.detach().requires_grad_(), *args[position + 1 :])
    return None
