"""`backbone_hash`: the md5 of a backbone that reads again only what may have changed.

The md5 runs over all tensors in order, so its state after each of them is kept. The next hash of
the same backbone begins at the first tensor that may have changed. A tensor counts as unchanged if
its storage, version, shape, layout, dtype and ``requires_grad`` are, and 512 of its elements,
evenly spread: fused optimizers, ``.data``, numpy and ``vector_to_parameters`` write without raising
the version.

What this can miss is a write that goes around the version *and* touches only elements between those
that are looked at. So parameters that were left to train are always read in full, and
``check_hash="full"`` reads everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import ever_trained
from opendelta.saving.hashing import bare_parameters, gen_parameter_hash, structure_hash

SAMPLES = 512

# A tensor as it was: its storage (held weakly, so that its address is not given to another), the
# rest of what identifies it, and the sampled bytes.
Mark = tuple[StorageWeakRef, tuple[Any, ...], bytes]
Chain = list[tuple[Mark | None, Any]]  # for each tensor: its mark, and the md5 after it

_chains: WeakKeyDictionary[nn.Module, dict[tuple[str, frozenset[str]], Chain]] = WeakKeyDictionary()


def backbone_hash(
    backbone: nn.Module,
    excludes: Collection[str] = (),
    bare: Sequence[tuple[str, Tensor]] | None = None,
) -> str:
    """What `gen_model_hash` returns for a backbone.

    Args:
        backbone: the model, with or without deltas.
        excludes: names of parameters that do not count.
        bare: its `bare_parameters`, where the caller has them.

    Returns:
        32 hex digits.
    """
    backbone = uncompiled(backbone)
    md5 = structure_hash(backbone)
    bare = list(bare_parameters(backbone)) if bare is None else bare
    named = [(name, p) for name, p in bare if name not in excludes]
    marks = _marks([p for _, p in named])
    trained = ever_trained(backbone)
    key = (md5.hexdigest(), frozenset(excludes))
    chain = _chains.setdefault(backbone, {}).setdefault(key, [])
    known = 0
    for (name, _), mark, (old, state) in zip(named, marks, chain, strict=False):
        if mark is None or old is None or name in trained or not _same(mark, old):
            break
        known, md5 = known + 1, state
    del chain[known:]
    for (_, p), mark in list(zip(named, marks, strict=True))[known:]:
        md5 = gen_parameter_hash([p], md5.copy())
        chain.append((mark, md5))
    return str(md5.hexdigest())


def _same(new: Mark, old: Mark) -> bool:
    return new[0].cdata == old[0].cdata and new[1:] == old[1:]


def _marks(tensors: Sequence[Tensor]) -> list[Mark | None]:
    """A mark for each tensor; None for one that cannot be told to be unchanged."""
    plain = [_is_plain(t) for t in tensors]
    sampled = [_sample(t.detach()) for t, ok in zip(tensors, plain, strict=True) if ok]
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for sample in sampled:
        together.setdefault((sample.device, sample.dtype), []).append(sample)
    read = {  # one transfer for all tensors of a kind
        kind: torch.cat(samples).cpu().view(torch.uint8).numpy().tobytes()
        for kind, samples in together.items()
    }
    starts = dict.fromkeys(together, 0)
    marks: list[Mark | None] = []
    samples = iter(sampled)
    for tensor, ok in zip(tensors, plain, strict=True):
        if not ok:
            marks.append(None)
            continue
        sample = next(samples)
        kind, size = (sample.device, sample.dtype), sample.nbytes
        content = read[kind][starts[kind] : starts[kind] + size]
        starts[kind] += size
        identity = (
            tensor._version,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.requires_grad,
        )
        marks.append((StorageWeakRef(tensor.untyped_storage()), identity, content))
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
    """About `SAMPLES` elements, evenly spread, the last one among them."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    count = flat.numel()
    return flat if count <= SAMPLES else flat[(count - 1) % (count // SAMPLES) :: count // SAMPLES]
