"""Where the server on loopback keeps large files that come by the Xet protocol.

The client cuts a file into chunks and sends those packed together, as xorbs; a shard then says
which chunks of which xorbs make up the file. Who downloads it asks for these terms and fetches
them. See https://huggingface.co/docs/xet/api.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xet_format import Malformed, Term, chunks_in, files_in


class XetStore:
    """Xorbs on disk, and the terms of each file by its hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.terms: dict[str, list[Term]] = {}
        self.hash_of: dict[str, str] = {}  # by sha256
        self.may_write: dict[str, bool] = {}  # by token

    def add_xorb(self, name: str, data: bytes) -> None:
        """Keep a xorb that can be read."""
        chunks_in(data)
        (self.folder / name).write_bytes(data)

    def add_shard(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Keep the terms of the files in a shard; sha256 and content of each."""
        for name, sha256, terms in files_in(data):
            content = b"".join(self.content(term) for term in terms)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise Malformed(f"the terms of {name} do not make up what has that sha256")
            self.terms[name], self.hash_of[sha256] = terms, name
            yield sha256, content

    def content(self, term: Term) -> bytes:
        found = chunks_in((self.folder / term.xorb).read_bytes())[term.first : term.last]
        content = b"".join(chunk.content for chunk in found)
        if len(content) != term.size:
            raise Malformed(f"a term of {len(content)} bytes that is said to have {term.size}")
        return content

    def reconstruction(self, name: str, first: int, last: int, url: str) -> dict[str, Any]:
        """What to fetch for the bytes from `first` to `last` of a file: one piece of each xorb."""
        needed, begin, skipped = [], 0, 0
        for term in self.terms[name]:
            if begin <= last and first < begin + term.size:
                skipped = skipped if needed else first - begin
                needed.append(term)
            begin += term.size
        pieces = {}
        for xorb in {term.xorb for term in needed}:
            start = min(term.first for term in needed if term.xorb == xorb)
            end = max(term.last for term in needed if term.xorb == xorb)
            found = chunks_in((self.folder / xorb).read_bytes())[start:end]
            place = {"start": found[0].start, "end": found[-1].end - 1}
            part = {"start": start, "end": end}
            pieces[xorb] = [{"range": part, "url": f"{url}/{xorb}", "url_range": place}]
        terms = [
            {
                "hash": term.xorb,
                "unpacked_length": term.size,
                "range": {"start": term.first, "end": term.last},
            }
            for term in needed
        ]
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": pieces}
