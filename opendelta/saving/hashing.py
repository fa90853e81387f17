"""The hash of a backbone, in the two formats that configs hold.

Format 2, which is written today, is defined by its lines, one for each tensor (`tensor_lines`).
Format 1 is that of OpenDelta 0.3.2 and 1.0: md5 over ``str(model)`` and the parameters' bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from opendelta.backends.quantised import is_repacked, parts
from opendelta.backends.sharding import full
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.names import dotted
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.bare import Bare, bare_tensors
from opendelta.saving.printed import printed

_PIECE = 1 << 20  # bytes that are digested at once, by definition of format 2
_BLOCK = 16 * _PIECE  # bytes that are brought from a device at once


def gen_parameter_hash(generator: Iterable[Tensor], md5: Any = None) -> Any:
    """Feed the bytes of tensors to an md5.

    Args:
        generator: tensors of any dtype (bf16 and quantised ones included) on any device.
        md5: the hash object to continue; None for a new one.

    Returns:
        The hash object; ``.hexdigest()`` gives the text.
    """
    md5 = hashlib.md5(usedforsecurity=False) if md5 is None else md5
    for tensor in generator:
        whole = full(tensor)
        if hasattr(whole, "__tensor_flatten__"):  # made of others, as torchao's are
            inner, _ = whole.__tensor_flatten__()
            gen_parameter_hash((getattr(whole, part) for part in inner), md5)
            continue
        if whole.is_quantized:
            gen_parameter_hash(_scales(whole), md5)
            whole = whole.int_repr()
        for block in _blocks(whole):
            md5.update(block)
    return md5


def gen_model_hash(
    model: nn.Module,
    with_parameters: bool = True,
    excludes: Collection[str] = (),
    *,
    format: int = 1,
) -> str:
    """The hash of a backbone.

    Format 1 is the md5 of the printed model (``str(model)`` without whitespace) and of the bytes of
    its parameters, each once. It changes with the release of torch or transformers that prints.

    Format 2 is the md5 of a text with one line ``name dtype shape digest`` for each parameter and
    persistent buffer, sorted by name, tied ones under each of their names:
    ``encoder.weight bfloat16 768x768 5f2c...``. The digest is XXH3-128 over the joined XXH3-128
    digests of the tensor's 1 MiB pieces (row-major, little-endian). A quantised tensor has a line
    for each of its parts, ``name.part``.

    Deltas are left out of both, so the hash of a backbone is the same before and after one is put
    on it; the model may run meanwhile. The tensors of a sharded model are made whole one at a time,
    so that the hash is that of the whole model: call it on all ranks or on none.

    Args:
        model: the backbone.
        with_parameters: whether parameters count, or, in format 1, the structure alone.
        excludes: names of parameters, in format 2 also of buffers, that do not count; a tied tensor
            then counts under none of its names.
        format: 1, as OpenDelta 0.3.2 and 1.0 wrote it, or 2, which configs hold today.

    Returns:
        32 hex digits.

    Raises:
        CheckpointError: if its tensors are not at hand, or not as they were loaded.
        ConfigError: if there is no such format.
    """
    if format not in (1, 2):
        raise ConfigError(f"gen_model_hash: format={format!r}; expected 1 or 2.")
    if format == 2 and not with_parameters:
        raise ConfigError("with_parameters=False is for format 1: format 2 is over tensors alone.")
    model = uncompiled(model)
    if not with_parameters:
        return str(_md5_of(printed(model)).hexdigest())
    bare = list(bare_tensors(model))
    reason = unhashable(bare)
    if reason is not None:
        raise CheckpointError(f"This {type(model).__name__} has no hash now: {reason}.")
    if format == 2:
        return format_2(bare, excludes, tensor_lines)
    parameters: dict[int, Bare] = {}
    for one in bare:
        if not one.is_buffer:
            parameters.setdefault(id(one.tensor), one)
    counted = (one.tensor for one in parameters.values() if one.name not in excludes)
    return str(gen_parameter_hash(counted, _md5_of(printed(model))).hexdigest())


def unhashable(bare: Iterable[Bare]) -> str | None:
    """Why the tensors of a backbone have no hash now, None if they have."""
    for one in bare:
        if one.tensor.is_meta:
            return "some of its weights are offloaded or on the meta device"
        if is_repacked(one.tensor):
            return "bitsandbytes repacked its weights for evaluation (model.state_dict() unpacks)"
    return None


def format_2(
    bare: Sequence[Bare], excludes: Collection[str], lines_of: Callable[[Bare], dict[str, str]]
) -> str:
    """The hash of format 2, see `gen_model_hash`.

    Args:
        bare: all tensors of the backbone.
        excludes: names of those that do not count.
        lines_of: `tensor_lines`, or what remembers them.
    """
    left_out = {id(one.tensor) for one in bare if one.name in excludes}
    lines: dict[str, str] = {}
    for one in bare:
        if id(one.tensor) not in left_out:
            lines |= lines_of(one)
    return str(_md5_of("".join(f"{name} {lines[name]}\n" for name in sorted(lines))).hexdigest())


def tensor_lines(bare: Bare) -> dict[str, str]:
    """The lines of format 2 for a tensor: the name of each part -> ``dtype shape digest``."""
    lines = {}
    for part, tensor in parts(bare.tensor):
        pieces = (
            xxhash.xxh3_128_digest(block[start : start + _PIECE])
            for block in _blocks(tensor)
            for start in range(0, len(block), _PIECE)
        )
        digest = xxhash.xxh3_128_hexdigest(b"".join(pieces))
        dtype, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))
        lines[dotted(bare.name, part)] = f"{dtype} {shape} {digest}"
    return lines


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a plain tensor, row-major, in blocks that no whole model is copied for."""
    tensor = tensor.detach()
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    step = _BLOCK // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


def _md5_of(text: str) -> Any:
    return hashlib.md5(text.encode(), usedforsecurity=False)


def _scales(tensor: Tensor) -> list[Tensor]:
    """What a torch-quantised tensor multiplies its integers by."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
