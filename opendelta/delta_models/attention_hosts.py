"""Which modules compute attention that a prefix can join, and where."""

from __future__ import annotations

from torch import nn

from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted, fold_numbers
from opendelta.ground.widths import read_widths
from opendelta.mechanism.ownership import own_modules
from opendelta.signature import names_in_code


def attention_in(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The attention module itself inside a unit that adds a norm around it (T5's ``layer.0``)."""
    own = dict(own_modules(module))
    linears = [part for part, inner in own.items() if part and read_widths(inner) is not None]
    linears = [part for part in linears if not hasattr(own[part], "normalized_shape")]
    tops = {part.partition(".")[0] for part in linears}
    if len(tops) != 1 or not any("." in part for part in linears):
        return name, module
    (top,) = tops
    return attention_in(dotted(name, top), own[top])


SIGNS_OF_ATTENTION = {"get_interface", "softmax", "Softmax", "scaled_dot_product_attention"}


def looks_attention_up(module: nn.Module) -> bool:
    """Whether `module`, or one inside, asks transformers' attention lookup."""
    return "get_interface" in names_of_code(module)


def names_of_code(module: nn.Module) -> set[str]:
    """What the methods of `module` and of those inside refer to by name."""
    classes = {cls for _, part in own_modules(module) for cls in type(part).__mro__}
    classes -= set(nn.Module.__mro__)
    methods = (f for cls in classes for f in vars(cls).values() if callable(f))
    return {name for method in methods for name in names_in_code(method)}


def no_attention(name: str, module: nn.Module) -> InsertionError:
    return InsertionError(
        f"{name!r} ({type(module).__name__}) is no attention module that a prefix can join: it "
        "neither uses transformers' attention lookup, nor has it key and value projections that "
        "could be recognised and a softmax."
    )


def relative_bias_for(backbone: nn.Module, name: str) -> list[nn.Module]:
    """The module that computes relative positions for the attention called `name`.

    It is the attention itself, or the one in the same place of another block (T5: the first).
    """
    (place,) = fold_numbers([name])
    owners = {
        other: module
        for other, module in own_modules(backbone)
        if hasattr(module, "compute_bias") and getattr(module, "has_relative_attention_bias", False)
    }
    if name in owners:
        return [owners[name]]
    return [m for other, m in owners.items() if fold_numbers([other]) == [place]][:1]
