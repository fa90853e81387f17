"""The Xet protocol, by which the Hub's client moves large files, for the server on loopback.

A file is cut into chunks, and chunks are sent packed together, as xorbs. A shard then says which
chunks of which xorbs make up a file. Who downloads it asks for that recipe and fetches what it
names. The formats: https://huggingface.co/docs/xet.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A part of a file: the chunks from `first` to before `last` of one xorb."""

    xorb: str
    first: int
    last: int
    size: int


class XetStore:
    """Xorbs on disk, and of which of their chunks each file is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.recipes: dict[str, list[Term]] = {}
        self.of_sha256: dict[str, str] = {}

    def add_xorb(self, name: str, data: bytes) -> None:
        list(chunks(data))  # refuses what cannot be read
        (self.folder / name).write_bytes(data)

    def xorb(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def add_shard(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Take the recipes of a shard; sha256 and content of each file."""
        for name, sha256, terms in files_in(data):
            content = b"".join(self._taken(term) for term in terms)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise Malformed(f"the chunks of {name} do not make up the file of that sha256")
            self.recipes[name], self.of_sha256[sha256] = terms, name
            yield sha256, content

    def reconstruction(self, name: str, first: int, last: int, url: str) -> dict[str, Any] | None:
        """What to fetch for some bytes of a file; None if it has no byte `first`."""
        terms, fetch, begin, skip = [], {}, 0, 0
        for term in self.recipes[name]:
            if begin + term.size > first and begin <= last:
                skip = skip if terms else first - begin
                part = {"start": term.first, "end": term.last}
                terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": part})
                found = list(chunks(self.xorb(term.xorb)))[term.first : term.last]
                there = {"start": found[0].start, "end": found[-1].end - 1}
                told = {"range": part, "url": f"{url}/{term.xorb}", "url_range": there}
                fetch.setdefault(term.xorb, []).append(told)
            begin += term.size
        if not terms:
            return None
        return {"offset_into_first_range": skip, "terms": terms, "fetch_info": fetch}

    def _taken(self, term: Term) -> bytes:
        found = list(chunks(self.xorb(term.xorb)))[term.first : term.last]
        content = b"".join(chunk.content for chunk in found)
        if len(content) != term.size:
            raise Malformed(f"chunks of {len(content)} bytes are said to have {term.size}")
        return content


def hash_text(data: bytes) -> str:
    """A hash as the protocol writes it: four numbers, each with its low byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


def files_in(shard: bytes) -> Iterator[tuple[str, str, list[Term]]]:
    """Hash, sha256 and recipe of each file in a shard."""
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


def chunks(xorb: bytes) -> Iterator[Chunk]:
    """The chunks of a xorb, each after a header of 8 bytes."""
    at = 0
    while at < len(xorb):
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        scheme, size = xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        content = UNPACK[scheme](xorb[at + 8 : at + 8 + packed])
        if len(content) != size:
            raise Malformed(f"a chunk of {len(content)} bytes that is said to have {size}")
        yield Chunk(at, at + 8 + packed, content)
        at += 8 + packed


def ungrouped(data: bytes) -> bytes:
    """Bytes that were sorted by their place in words of four, back in order."""
    result, at = bytearray(len(data)), 0
    for place in range(4):
        count = len(result[place::4])
        result[place::4] = data[at : at + count]
        at += count
    return bytes(result)


def lz4_frame(data: bytes) -> bytes:
    """What an LZ4 frame holds; its checksums are left to the sha256 of the file."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise Malformed("not an LZ4 frame")
    flags, at, result = data[4], 7, bytearray()
    at += 8 * bool(flags & 8) + 4 * bool(flags & 1)  # size of the content, a dictionary's name
    while size := int.from_bytes(data[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = data[at + 4 : at + 4 + length]
        if size >> 31:  # stored as it is
            result += block
        else:
            lz4_block(block, result)
        at += 4 + length + 4 * bool(flags & 16)  # a checksum of the block
    return bytes(result)


def lz4_block(block: bytes, result: bytearray) -> None:
    """Append what one block stands for: literal bytes, then a copy of earlier ones, in turn."""
    at = 0

    def length(short: int) -> int:
        nonlocal at
        total = short
        while short == 15 or total > 15 and block[at - 1] == 255:
            total += block[at]
            at, short = at + 1, 0
        return total

    while at < len(block):
        token, at = block[at], at + 1
        literal = length(token >> 4)
        result += block[at : at + literal]
        at += literal
        if at == len(block):  # the last one copies nothing
            return
        distance, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        copied, start = length(token & 15) + 4, len(result) - distance
        for place in range(start, start + copied):  # which may overlap with what it makes
            result.append(result[place])


UNPACK = {PLAIN: bytes, LZ4: lz4_frame, GROUPED_LZ4: lambda data: ungrouped(lz4_frame(data))}
