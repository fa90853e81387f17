"""A model as `str(model)` prints it, without its deltas: what hashes of format 1 begin with."""

from __future__ import annotations

import re
from itertools import groupby

import torch
from torch import nn

from opendelta.backends.sharding import class_name, full_shape
from opendelta.mechanism.bare import Slots, bare_parameters, slots_of
from opendelta.mechanism.ownership import own_children

# What torch 2.13 prints for the modules in `prints_as_2_13`.
_BY_2_13 = (
    "Sequential((0):Linear(in_features=2,out_features=2,bias=True)"
    "(1):Embedding(2,2,padding_idx=0)"
    "(2):LayerNorm((2,),eps=1e-05,elementwise_affine=True,bias=True)"
    "(3):BatchNorm1d(2,eps=1e-05,momentum=0.1,affine=True,bias=True,track_running_stats=True)"
    "(4):Conv1d(2,2,kernel_size=(1,),stride=(1,))"
    "(5):Dropout(p=0.5,inplace=False)"
    "(6):ModuleList((0-1):2xGELU(approximate='none')))"
)


def printed(model: nn.Module) -> str:
    """`str(model)` without deltas and without whitespace."""
    return re.sub(r"[ \t\n]", "", _structure(model, slots_of(model)))


def prints_as_2_13() -> bool:
    """Whether this torch prints common modules as 2.13 does, so that format 1 is the same on both.

    They are looked at rather than the version, since most releases print as the one before. 2.13
    began to print the ``bias`` of norms.
    """
    with torch.device("meta"):  # draws no random numbers
        specimens = nn.Sequential(
            nn.Linear(2, 2),
            nn.Embedding(2, 2, padding_idx=0),
            nn.LayerNorm(2),
            nn.BatchNorm1d(2),
            nn.Conv1d(2, 2, 1),
            nn.Dropout(),
            nn.ModuleList([nn.GELU(), nn.GELU()]),
        )
    return printed(specimens) == _BY_2_13


def _structure(module: nn.Module, slots: Slots) -> str:
    """`str(module)` without deltas, up to whitespace."""
    cls = type(module)
    name = module._get_name()
    if name == cls.__name__:
        name = class_name(module)  # as it was before FSDP2
    children = [(key, _structure(child, slots)) for key, child in own_children(module, True)]
    if cls.__repr__ is nn.ModuleList.__repr__:
        return f"{name}({_folded(children)})"
    if cls.__repr__ is not nn.Module.__repr__ and cls.__repr__ is not nn.ModuleDict.__repr__:
        return repr(module)  # a module that prints itself in its own way
    parameters = [p for p in module._parameters.values() if p is not None]
    changed = id(module) in slots or any(full_shape(p) != p.shape for p in parameters)
    extra = _described(module, slots) if changed else module.extra_repr()
    return f"{name}({extra}{''.join(f'({key}):{text}' for key, text in children)})"


def _described(module: nn.Module, slots: Slots) -> str:
    """`extra_repr` of a module with its own parameters (``bias=True``), each in its whole shape."""
    twin = object.__new__(type(module))
    shapes = {
        name: None if p is None else torch.empty(full_shape(p), dtype=p.dtype, device="meta")
        for name, p in bare_parameters(module, slots).items()
    }
    twin.__dict__.update(module.__dict__, _parameters=shapes)
    return twin.extra_repr()


def _folded(children: list[tuple[str, str]]) -> str:
    """The children of a `ModuleList` as it prints them, equal neighbours once."""
    text = ""
    for content, group in groupby(children, key=lambda child: child[1]):
        keys = [key for key, _ in group]
        many = f"({keys[0]}-{keys[-1]}):{len(keys)}x" if len(keys) > 1 else f"({keys[0]}):"
        text += many + content
    return text
