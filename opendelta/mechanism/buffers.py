"""Persistent buffers of a backbone that training moves: running statistics and their like.

Nobody declares such a movement, and a batch norm does not even raise the version of what it writes.
So it is found by comparing values, wherever deltas come, go, freeze or are saved, and belongs to
the deltas that acted since the last time. What a delta moved stands in place while the delta acts;
the backbone's own values are kept aside, and stand there else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import assign, full, is_shard
from opendelta.exceptions import DeltaWarning, InsertionError, warn
from opendelta.ground.blocks import within
from opendelta.ground.names import dotted
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.ownership import own_modules, twin_of

LARGEST = 1 << 24  # bytes of which a copy is kept; of a larger buffer it is a digest

Place = tuple[nn.Module, str]
Moved = dict[str, Tensor]


class Buffers:
    """Whose values stand in the persistent buffers of one backbone.

    Values are never written in place here, so that one tensor may be noted under several heads;
    what stands in a buffer is always a copy.

    Attributes:
        places: where each buffer is, by its first name.
        own: the backbone's own values.
        digests: of buffers too large to be copied, with their dtype.
        stood: what stood in place when it was last looked at: of `own`, or of a delta's.
        layers: the deltas, in order of insertion, each with what it moved.
        acting: the deltas that act, attached or merged.
        routed: those that act for a route instead, None without one.
    """

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.own: dict[str, Tensor] = {}
        self.digests: dict[str, tuple[torch.dtype, str]] = {}
        self.stood: dict[str, Tensor] = {}
        self.layers: list[tuple[Any, Moved]] = []
        self.acting: list[Any] = []
        self.routed: list[Any] | None = None

    # --- switch points ----------------------------------------------------------------------

    def enlist(self, changes: Changes, delta: Any, moved: Moved, backbone: nn.Module) -> None:
        """Know a delta, which acts from now on, and the `moved` that it keeps itself."""
        layers = changes.get(self, "layers")
        if not any(other is delta for other, _ in layers):
            changes.set(self, layers=[*layers, (delta, moved)])
        self.note(changes, backbone)
        self.settle(changes, on=[delta])

    def note(self, changes: Changes, backbone: nn.Module) -> None:
        """Look which buffers the backbone has now; those of new modules are its own as they are."""
        known, found = changes.get(self, "places"), dict(persistent_buffers(backbone))
        changes.set(self, places=found)
        for name in [name for name in known if found.get(name) != known[name]]:
            for table in (self.own, self.digests, self.stood):
                changes.of(table).pop(name, None)

    def settle(
        self,
        changes: Changes,
        on: Collection[Any] = (),
        off: Collection[Any] = (),
        starts: bool = False,
    ) -> None:
        """Note who moved what, and prepare that the right values stand in place.

        Args:
            changes: what it comes in with.
            on: deltas that act from now on; `off`: that act no longer.
            starts: whether freezing begins now: what moved since construction, where no file had
                said otherwise, is the backbone's own.
        """
        acting = [delta for delta in changes.get(self, "acting") if delta not in off]
        changes.set(self, acting=acting + [delta for delta in on if delta not in acting])
        if changes.get(self, "places"):
            self._look(changes, starts)
            self._put(changes)

    def hold(self, changes: Changes, deltas: list[Any] | None) -> None:
        """Let these act alone, for a route, whatever is attached; None for those that are."""
        changes.set(self, routed=deltas)
        self.settle(changes)

    def keep(self, changes: Changes, delta: Any) -> None:
        """Let what a delta moved be the backbone's own, for good."""
        self.settle(changes)
        for other, moved in self.layers:
            if other is delta:
                changes.of(self.own).update(changes.of(moved))

    def load(self, changes: Changes, delta: Any, values: Moved) -> None:
        """Let `values`, and nothing else, be what a delta moved."""
        self.settle(changes)
        own, stood = changes.of(self.own), changes.of(self.stood)
        for name, buffer in self._present(changes):
            if name in values and name in changes.of(self.digests):  # now worth a copy
                del changes.of(self.digests)[name]
                own[name] = stood[name] = _copied(buffer)
        for other, moved in changes.get(self, "layers"):
            if other is delta:
                changes.of(moved).clear()
                changes.of(moved).update({name: _copied(value) for name, value in values.items()})
        self._put(changes)

    def forget(self, changes: Changes, delta: Any) -> None:
        """Know a delta no longer; what stood there without it stands there again."""
        self.settle(changes, off=[delta])
        layers = [layer for layer in changes.get(self, "layers") if layer[0] is not delta]
        changes.set(self, layers=layers)

    # --- what is asked ----------------------------------------------------------------------

    def own_now(self) -> dict[int, Tensor | None]:
        """Id of each buffer that stands otherwise than the backbone's own -> what that is.

        None where it was too large to be kept.
        """
        if not self.acting:
            return {}
        found: dict[int, Tensor | None] = {}
        for name, buffer in self._present(None):
            if name in self.digests:
                if self.digests[name] != _digest(buffer):
                    found[id(buffer)] = None
            elif name in self.own and not _same(buffer, self.own[name]):
                found[id(buffer)] = self.own[name]
            elif any(name in moved for delta, moved in self.layers if delta in self.acting):
                found[id(buffer)] = self.own.get(name)
        return found

    def share(self, changes: Changes, deltas: Collection[Any]) -> None:
        """Let a route begin whose rows are of these deltas, None for the bare backbone.

        Where all of them want the same values, these stand in place; else the backbone's own do.
        """
        self.settle(changes)
        first, *others = (self._wanted(changes, [delta]) for delta in deltas)
        differ = any(
            other[name] is not value and not _same(other[name], value)
            for other in others
            for name, value in first.items()
        )
        self.hold(changes, [] if differ else [delta for delta in deltas if delta is not None])

    def stand_ins(self, changes: Changes, delta: Any) -> dict[nn.Module, nn.Module]:
        """Modules -> twins that hold what a delta moved, where other values are to stand in place.

        A twin shares all with its module but those buffers.

        Args:
            changes: which values are about to stand in place.
            delta: whose; None for the bare backbone's own.

        Raises:
            InsertionError: for a module with others inside it.
        """
        wanted, stood = self._wanted(changes, [delta]), changes.of(self.stood)
        twins: dict[nn.Module, nn.Module] = {}
        for name, buffer in self._present(changes):
            if name not in wanted or wanted[name] is stood[name]:
                continue
            module, key = self.places[name]
            if module._modules:
                raise InsertionError(
                    f"{name!r} was moved in training, and {type(module).__name__}, which holds it, "
                    "has modules inside, so that it cannot run for each delta apart. Run the rows "
                    "apart."
                )
            twin = twins.get(module)
            if twin is None:
                twin = twins[module] = twin_of(module, _buffers=dict(module._buffers))
            twin._buffers[key] = _copied(wanted[name], buffer)
        return twins

    # --- inside -----------------------------------------------------------------------------

    def _present(self, changes: Changes | None) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer) of those that have values now."""
        places = self.places if changes is None else changes.get(self, "places")
        for name, (module, key) in places.items():
            buffer = module._buffers.get(key)
            if buffer is not None and not buffer.is_meta:
                yield name, buffer

    def _look(self, changes: Changes, starts: bool) -> None:
        """Give what moved since the last time to those who acted, else to the backbone."""
        own, stood = changes.of(self.own), changes.of(self.stood)
        digests = changes.of(self.digests)
        acting = self.acting if self.routed is None else self.routed
        layers = [layer for layer in self.layers if layer[0] in acting]
        movers: list[Moved] | None = None
        for name, buffer in self._present(changes):
            if name not in stood:
                is_large = buffer.nbytes > LARGEST
                digest = _digest(buffer) if is_large else None
                if digest is None:
                    own[name] = stood[name] = _copied(buffer)
                    continue
                before = digests.setdefault(name, digest)
                if before == digest:
                    continue
                digests[name] = digest
                if not layers or starts or before[0] != digest[0]:
                    continue
                warn(
                    f"{name!r} of the backbone ({buffer.nbytes >> 20} MiB) has changed in "
                    f"training. Of buffers above {LARGEST >> 20} MiB no copy is kept, so its own "
                    "values cannot come back when the delta is detached or removed; the delta's "
                    "file holds the new ones.",
                    DeltaWarning,
                )
                del digests[name]
                own[name] = _copied(buffer)
            elif _same(buffer, stood[name]):
                continue
            value = _copied(buffer)
            if not layers or (starts and stood[name] is own[name]):
                own[name] = value
            else:
                movers = _movers(layers) if movers is None else movers
                for moved in movers:
                    changes.of(moved)[name] = value
            stood[name] = value

    def _wanted(self, changes: Changes | None, deltas: Collection[Any]) -> Moved:
        """What is to stand in each buffer while these act: of the last inserted that moved it."""
        wanted = dict(self.own if changes is None else changes.of(self.own))
        layers = self.layers if changes is None else changes.get(self, "layers")
        for delta, moved in layers:
            if any(delta is other for other in deltas):
                now = moved if changes is None else changes.of(moved)
                wanted.update((name, value) for name, value in now.items() if name in wanted)
        return wanted

    def _put(self, changes: Changes) -> None:
        """Prepare that what is to stand in place does; the buffers stay the same objects."""
        routed = changes.get(self, "routed")
        wanted = self._wanted(changes, changes.get(self, "acting") if routed is None else routed)
        stood = changes.of(self.stood)
        for name, buffer in self._present(changes):
            value = wanted.get(name)
            if value is None or value is stood[name]:
                continue
            stood[name] = value
            if is_shard(buffer):
                changes.do_first(assign, buffer, value)
            else:
                changes.set_data(buffer, _copied(value, buffer))


def persistent_buffers(
    backbone: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, Place]]:
    """(name, where it is) of the buffers in a state dict that are the backbone's own.

    Args:
        backbone: the model.
        remove_duplicate: whether one with several names comes once, under the first.
    """
    seen: set[int] = set()
    for name, module in own_modules(backbone, remove_duplicate, originals=True):
        for key, buffer in module._buffers.items():
            if buffer is None or key in module._non_persistent_buffers_set:
                continue
            if not remove_duplicate or id(buffer) not in seen:
                seen.add(id(buffer))
                yield dotted(name, key), (module, key)


def _movers(layers: list[tuple[Any, Moved]]) -> list[Moved]:
    """Of deltas that acted those to which movement belongs: what trains, else the last one."""
    here = [layer for layer in layers if not layer[0].is_merged]
    trains = [
        moved
        for delta, moved in here
        if any(p.requires_grad for i in delta.insertions for _, p in i.named_parameters())
    ]
    beside = [moved for delta, moved in here if delta.left_trainable]
    return trains or beside or [layers[-1][1]]


def _copied(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A copy of the whole of a tensor, on the device and in the dtype of another."""
    if torch.is_inference_mode_enabled():  # in which the copy could not be trained with
        with within(torch.inference_mode(False)):
            return _copied(tensor, like)
    whole = full(tensor).detach()
    like = whole if like is None else like
    return whole.to(device=like.device, dtype=like.dtype, copy=True)


def _same(buffer: Tensor, noted: Tensor) -> bool:
    """Whether a buffer, wherever it is by now, has values that were noted, NaN included."""
    now, then = full(buffer), noted.to(buffer.device, buffer.dtype)
    if torch.equal(now, then):
        return True
    return (
        now.is_floating_point()
        and now.shape == then.shape
        and torch.allclose(now, then, rtol=0, atol=0, equal_nan=True)
    )


def _digest(buffer: Tensor) -> tuple[torch.dtype, str]:
    content = full(buffer).contiguous().reshape(-1).cpu().view(torch.uint8)
    return buffer.dtype, hashlib.blake2b(content.numpy().data).hexdigest()
