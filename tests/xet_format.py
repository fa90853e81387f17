"""The two formats of the Xet protocol: xorbs, which hold chunks of files, and shards, which say
which chunks make up a file (https://huggingface.co/docs/xet/xorb and .../shard).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file in a shard
ENTRY = 48  # bytes; a shard is made of entries of this size
END = b"\xff" * 32  # in the place of a hash, after the last file
PLAIN, LZ4, GROUPED_LZ4 = 0, 1, 2  # how a chunk is packed


class Malformed(Exception):
    """Bytes that are not of the format they should be."""


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb, and what it holds."""

    start: int
    end: int
    content: bytes


@dataclass(frozen=True)
class Term:
    """A part of a file: the chunks from `first` to before `last` of one xorb, of `size` bytes."""

    xorb: str
    first: int
    last: int
    size: int


def files_in(shard: bytes) -> Iterator[tuple[str, str, list[Term]]]:
    """Hash, sha256 and terms of each file in a shard."""
    at = ENTRY  # after the shard's own header
    while (found := shard[at : at + 32]) != END:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        terms = []
        for place in range(at + ENTRY, at + ENTRY * (1 + count), ENTRY):
            _, size, first, last = struct.unpack_from("<4I", shard, place + 32)
            terms.append(Term(hash_text(shard[place : place + 32]), first, last, size))
        at += ENTRY * (1 + count) + ENTRY * count * bool(flags & WITH_VERIFICATION)
        if not flags & WITH_SHA256:
            raise Malformed("a file without its sha256")
        yield hash_text(found), hash_text(shard[at : at + 32]), terms
        at += ENTRY


def hash_text(data: bytes) -> str:
    """A hash as the protocol writes it: four numbers, which are stored low byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


def chunks_in(xorb: bytes) -> list[Chunk]:
    """The chunks of a xorb, each after a header of 8 bytes."""
    found, at = [], 0
    while at < len(xorb):
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        scheme, size = xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        content = UNPACK[scheme](xorb[at + 8 : at + 8 + packed])
        if len(content) != size:
            raise Malformed(f"a chunk of {len(content)} bytes that is said to have {size}")
        found.append(Chunk(at, at + 8 + packed, content))
        at += 8 + packed
    return found


def ungrouped(data: bytes) -> bytes:
    """Bytes that were sorted by their place in words of four, back in order."""
    result, at = bytearray(len(data)), 0
    for place in range(4):
        count = len(result[place::4])
        result[place::4] = data[at : at + count]
        at += count
    return bytes(result)


def lz4_frame(data: bytes) -> bytes:
    """What an LZ4 frame holds. Its checksums are not looked at: the file has its sha256."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise Malformed("not an LZ4 frame")
    flags, result = data[4], bytearray()
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)  # size of the content, id of a dictionary
    while word := int.from_bytes(data[at : at + 4], "little"):
        length, stored = word & 0x7FFFFFFF, word >> 31
        block = data[at + 4 : at + 4 + length]
        if stored:
            result += block
        else:
            lz4_block(block, result)
        at += 4 + length + 4 * bool(flags & 16)  # checksum of the block
    return bytes(result)


def lz4_block(block: bytes, result: bytearray) -> None:
    """Append what a block stands for: literal bytes and a copy of earlier ones, in turn."""
    at = 0
    while at < len(block):
        token = block[at]
        count, at = lz4_count(token >> 4, block, at + 1)
        result += block[at : at + count]
        at += count
        if at == len(block):  # the last turn copies nothing
            return
        start = len(result) - int.from_bytes(block[at : at + 2], "little")
        count, at = lz4_count(token & 15, block, at + 2)
        for place in range(start, start + count + 4):  # which may reach into what it appends
            result.append(result[place])


def lz4_count(short: int, block: bytes, at: int) -> tuple[int, int]:
    """A number that begins in four bits, and where the bytes after it are."""
    total, more = short, short == 15
    while more:
        total, more, at = total + block[at], block[at] == 255, at + 1
    return total, at


UNPACK = {PLAIN: bytes, LZ4: lz4_frame, GROUPED_LZ4: lambda data: ungrouped(lz4_frame(data))}
