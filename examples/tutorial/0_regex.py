"""Which modules does a pattern name? Suffixes, regular expressions, common names, exceptions.

python examples/tutorial/0_regex.py
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from sentences import backbone

from opendelta import LoraModel

REQUESTS: list[dict[str, Any]] = [
    {},  # the method's own places
    {"modified_modules": ["attention.self.query"]},  # whatever ends so, part by part
    {"modified_modules": ["0.attention.self.query", "5.attention.self.query"]},
    {"modified_modules": [r"[r][0-2]\.attention\.self\.(query|key)"]},
    {"modified_modules": [r"[r](\d)+\.output.dense"]},  # not attention.output.dense
    {"modified_modules": ["attention.output.dense"]},
    {"modified_modules": ["ff.w1"], "common_structure": True},  # on any architecture
    {"modified_modules": ["query"], "exclude_modules": ["layer.0", r"[r]layer\.[4-5]"]},
]


def main() -> None:
    model = backbone()
    table = Table("LoraModel(model, ...)", "is on", "below bert.encoder.layer", show_lines=True)
    for request in REQUESTS:
        delta = LoraModel(model, **request)
        hosts = [name for name, module in model.named_modules() if hasattr(module, "lora")]
        delta.remove()
        shown = "\n".join(f"{key}={value}" for key, value in request.items())
        first, last = (host.removeprefix("bert.encoder.layer.") for host in (hosts[0], hosts[-1]))
        table.add_row(shown or "(nothing)", f"{len(hosts)} modules", f"{first}\n... {last}")
    Console(width=120, markup=False).print(table)

    try:
        LoraModel(model, modified_modules=["attention.self.qery"])
    except ValueError as error:
        print(f"A misprint is told:\n{error}")


if __name__ == "__main__":
    main()
