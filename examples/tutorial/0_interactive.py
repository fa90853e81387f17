"""Pick the modules in a web page: open the link that is printed, click, submit.

python examples/tutorial/0_interactive.py
"""

from __future__ import annotations

from sentences import backbone

from opendelta import LoraModel


def main() -> None:
    model = backbone()
    delta = LoraModel(model, interactive_modify=True)  # or a port, such as 8890
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.log()
    print(f"To do the same again: LoraModel(model, modified_modules={delta.modified_modules})")


if __name__ == "__main__":
    main()
