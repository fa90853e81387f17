"""`backbone_hash`: the hash of a backbone that reads again only what may have changed.

The line of each tensor is kept with a mark of the tensor, and stands as long as the mark does: its
storage, version, shape, layout, dtype and ``requires_grad``, and 512 of its elements, evenly
spread: fused optimizers, ``.data``, numpy and ``vector_to_parameters`` write without raising the
version.

What this can miss is a write that goes around the version *and* touches only elements between those
that are looked at. So parameters that were left to train are always read in full, and
``check_hash="full"`` reads everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import ever_trained
from opendelta.mechanism.bare import Bare, bare_tensors
from opendelta.saving.hashing import format_2, tensor_lines

SAMPLES = 512

Place = tuple[Any, ...]


class Mark(NamedTuple):
    """What tells that a tensor is the one that was read.

    Its storage is held weakly, so that the address of that is not given to another.
    """

    storage: StorageWeakRef
    place: Place  # where in which storage
    content: tuple[Any, ...]  # what changes when it is written to


_known: WeakKeyDictionary[nn.Module, dict[Place, tuple[Mark, str]]] = WeakKeyDictionary()


def backbone_hash(
    backbone: nn.Module, excludes: Collection[str] = (), bare: Sequence[Bare] | None = None
) -> str:
    """What ``gen_model_hash(backbone, format=2)`` returns.

    Args:
        backbone: the model, with or without deltas.
        excludes: names of parameters and buffers that do not count.
        bare: its `bare_tensors`, where the caller has them.

    Returns:
        32 hex digits.
    """
    backbone = uncompiled(backbone)
    bare = list(bare_tensors(backbone)) if bare is None else bare
    marks = _marks(backbone, bare)
    before = _known.get(backbone, {})
    known = {m.place: before[m.place] for m in marks.values() if m.place in before}
    _known[backbone] = known

    def lines_of(one: Bare) -> dict[str, str]:
        mark = marks.get(id(one.tensor))
        if mark is None:
            return tensor_lines(one)
        old, line = known.get(mark.place, (None, ""))
        if old is None or old.content != mark.content:
            (line,) = tensor_lines(one).values()
            known[mark.place] = mark, line
        return {one.name: line}

    return format_2(bare, excludes, lines_of)


def _marks(backbone: nn.Module, bare: Sequence[Bare]) -> dict[int, Mark]:
    """Marks by the id of the tensor, of those that can be told to be unchanged."""
    trained = ever_trained(backbone)
    read = {id(one.tensor) for one in bare if one.name in trained}
    tensors = {
        id(one.tensor): one.tensor
        for one in bare
        if id(one.tensor) not in read and _is_plain(one.tensor)
    }
    samples: dict[torch.device, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        samples.setdefault(tensor.device, {})[key] = _sample(tensor.detach())
    marks = {}
    for sampled in samples.values():  # one transfer from each device
        content, end = torch.cat([*sampled.values()]).cpu().numpy().tobytes(), 0
        for key, sample in sampled.items():
            tensor, start = tensors[key], end
            end += len(sample)
            storage = StorageWeakRef(tensor.untyped_storage())
            where = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            written = tensor._version, tensor.requires_grad, content[start:end]
            marks[key] = Mark(storage, (storage.cdata, *where), written)
    return marks


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a storage and a version of its own: no subclass, no inference tensor."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_inference()
        and not tensor.is_quantized
        and tensor.layout == torch.strided
    )


def _sample(tensor: Tensor) -> Tensor:
    """The bytes of about `SAMPLES` elements, evenly spread, the last one among them."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    count = flat.numel()
    if count > SAMPLES:
        flat = flat[(count - 1) % (count // SAMPLES) :: count // SAMPLES].contiguous()
    return flat.view(torch.uint8)
