"""The roles that modules of a block may have, and the words in their names that say so."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from opendelta.ground.names import below, inside, leaf_of, parent_of, path_words, words


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Projections fused in one module, and the roles that it plays.
FUSED = {
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    "qk": ("q", "k"),
    "qv": ("q", "v"),
    "w13": ("w1", "w3"),
}

LETTERS = {
    **dict.fromkeys(("q", "query", "queries", "wq", "receptance"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv"), "v"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qkv", "wqkv", "qkvz"), "qkv"),
    "qk": "qk",
}
# Words that say that "q", "key" ... mean something other than a projection of the hidden state.
NOT_PROJECTION = word_set(
    "pos position positional rel relative gate norm conv sconv global layout router"
)
# What holds such layers without being an attention, or sits inside one for another purpose.
NOT_ATTENTION = word_set("indexer compressor router ffn ff mlp feed")
PLAIN = word_set("linear proj projection dense layer fc c weight conv convolution")
OUT = word_set("o out output wo post final")
FEED_FORWARD = word_set(
    "mlp mlps ffn ffns ff ffw feed forward moe experts expert intermediate inter fc"
)
DOWN = word_set("down out output wo reduce")
UP = word_set("up gate in input intermediate inter wi expand")
SIDE_BRANCH = word_set("shortcut downsample se squeeze excite excitation")
NOT_MIXER = SIDE_BRANCH | FEED_FORWARD
# Small networks in a block that compute something other than the next hidden state.
NOT_FEED_FORWARD = word_set("pos position positional rel relative router") | SIDE_BRANCH


@dataclass
class Site:
    """The role that a module has in its block, and why."""

    role: str
    why: str


@dataclass
class Block:
    """One layer of a stack.

    Attributes:
        place: the element of the list (of the first of the lists, where several are joined).
        parts: the modules that it consists of, where `place` is not it: joined elements, or an
            element that is itself the attention.
        why: why it is taken for a block.
        sites: roles by module name.
    """

    place: str
    parts: tuple[str, ...]
    why: str
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        return self.parts or (self.place,)

    def words_of(self, name: str) -> list[str]:
        """The words of the path to a module inside; where lists are joined, of their names too."""
        start = next((member for member in self.members if inside(name, member)), self.place)
        if not leaf_of(start).isdigit():
            start = parent_of(start)
        elif self.parts:
            start = parent_of(parent_of(start))
        return path_words(below(name, start))


def says(name: str, meant: Container[str]) -> bool:
    """Whether the last part of `name` has one of the words that are `meant`."""
    return any(word in meant for word in words(leaf_of(name)))


def letters_of(part: str) -> str:
    """Which of q, k and v the name `part` says that a layer computes: ``""``, ``"q"``, ``"kv"``."""
    found = words(part)
    said = "".join(LETTERS.get(word, "") for word in found)
    if not said or not NOT_PROJECTION.isdisjoint(found):
        return ""
    return "".join(letter for letter in "qkv" if letter in said)


def own_words(linear: str) -> tuple[str, ...]:
    """The words of a layer's name, and of its wrapper's where its own says nothing."""
    own = words(leaf_of(linear))
    if all(word in PLAIN or word.isdigit() for word in own):
        return own + words(leaf_of(parent_of(linear)))
    return own
