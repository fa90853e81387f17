"""Where the defaults put LoRA and adapters, on every architecture at full size (meta device).

An attention is told here by its class (its name says so, and it holds two linear layers or more),
not by the rules under test. `python tests/sweep/placement.py` prints the table.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import tiny  # found by the line above

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.exceptions import OpenDeltaError


@dataclass
class Placement:
    """What the common structure finds in one backbone.

    Attributes:
        by: what LoRA goes on by default: "attention", "mixer", "feed-forward", or "nothing".
        missed: attentions (numbers as ``$``) that lack a projection of q or of v.
        adapters: whether there is an output for an adapter after attention, and feed-forward.
    """

    by: str
    missed: list[str]
    adapters: tuple[bool, bool]


def attentions(model: nn.Module) -> Iterator[str]:
    """The innermost modules of `model` whose class is an attention with projections of its own."""
    named = dict(model.named_modules())
    linears = [n for n, m in named.items() if hasattr(m, "in_features") or hasattr(m, "nf")]
    found = [
        name
        for name, module in named.items()
        if re.search("Attention|Attn", type(module).__name__)
        and not re.search("Pool|MLP", type(module).__name__)
        and sum(linear.startswith(name + ".") for linear in linears) >= 2
    ]
    for name in found:
        if not any(other.startswith(name + ".") for other in found):
            yield name


def placement(model: nn.Module) -> Placement:
    """Measure one backbone, all towers in scope."""
    structure = CommonStructureMap(model, strict=False, scope="all")

    def having(*roles: str) -> set[str]:
        return {
            name
            for name in structure.matched_pairs
            if any(re.search(rf"(^|\.)({'|'.join(roles)})$", c) for c in structure.names(name))
        }

    queries, values = having("attn.q", "crossattn.q"), having("attn.v", "crossattn.v")
    units = list(attentions(model))
    missed = [
        name
        for name in units
        if not all(any(p.startswith(name + ".") for p in found) for found in (queries, values))
    ]
    default = CommonStructureMap(model, strict=False)
    roles = default.roles()
    by = "nothing"
    if "attn.q" in roles or "attn.v" in roles:
        by = "attention" if len(missed) < len(units) else "mixer"
    elif "ff.w1" in roles:
        by = "feed-forward"
    adapters = bool(default.outputs("attn")), bool(default.outputs("ff"))
    folded = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "$", name) for name in missed)
    return Placement(by, list(folded), adapters)


def measure(model_types: list[str]) -> dict[str, Placement | str]:
    """The placement on each type of model that builds at full size, or why it does not build."""
    found: dict[str, Placement | str] = {}
    for model_type in model_types:
        try:
            model = tiny.default_size(model_type)
        except OpenDeltaError:
            raise
        except Exception as error:  # a default config that its own model refuses, a missing package
            found[model_type] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            found[model_type] = placement(model)
    return found


def summary(found: dict[str, Placement | str]) -> dict[str, int]:
    """The figures of the table."""
    built = [p for p in found.values() if isinstance(p, Placement)]
    kinds = Counter(p.by for p in built)
    return {
        "built": len(built),
        "LoRA placed": len(built) - kinds["nothing"],
        "on attention": kinds["attention"],
        "on attention, q and v in every unit": sum(
            p.by == "attention" and not p.missed for p in built
        ),
        "on a mixer": kinds["mixer"],
        "on a feed-forward": kinds["feed-forward"],
        "adapter after attention or mixer": sum(p.adapters[0] for p in built),
        "adapter after feed-forward": sum(p.adapters[1] for p in built),
    }


def main() -> None:
    found = measure(sys.argv[1:] or tiny.model_types())
    for model_type, result in found.items():
        if not isinstance(result, Placement):
            print(f"{model_type:40} not built: {result[:100]}")
        elif result.missed or result.by != "attention" or not all(result.adapters):
            print(
                f"{model_type:40} {result.by}; adapters {result.adapters}; missed {result.missed}"
            )
    for what, count in summary(found).items():
        print(f"{count:5} {what}")


if __name__ == "__main__":
    main()
