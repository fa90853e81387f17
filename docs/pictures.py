"""Draws the pictures of these pages with the library itself: ``python docs/pictures.py``.

The picture of the web page needs Chromium and the ``browser`` extra; else it stays as it is.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from rich.console import Console, RenderableType

import opendelta

PICTURES = Path(__file__).parent / "pictures"


def backbone(kind: str) -> torch.nn.Module:
    """A base-sized model without memory for its weights."""
    with torch.device("meta"):
        return {
            "bert": lambda: transformers.BertModel(transformers.BertConfig()),
            "llama": lambda: transformers.LlamaModel(
                transformers.LlamaConfig(num_hidden_layers=12)
            ),
        }[kind]()


def picture(name: str, title: str, content: RenderableType) -> None:
    """Write what a terminal would show as ``pictures/<name>.svg``."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(content)
    svg = console.export_svg(title=title, unique_id=name)
    (PICTURES / f"{name}.svg").write_text(svg)


def trees() -> None:
    """The trees, bare, with a delta, and by common names; and the table of a delta."""
    model = backbone("bert")
    show = opendelta.Visualization(model).structure_graph
    picture("bare", "Visualization(model).structure_graph()", show(printTree=False))
    delta = opendelta.LoraModel(model)
    delta.freeze_module()
    picture("lora", "LoraModel(model) and freeze_module()", show(printTree=False))
    picture("summary", "delta.summary()", delta.summary())
    llama = backbone("llama")
    opendelta.AdapterModel(llama, modified_modules=["[r]layers\\.[0-5]\\.mlp"])
    common = opendelta.Visualization(llama).structure_graph(common_structure=True, printTree=False)
    picture("common", "structure_graph(common_structure=True)", common)


def page(browser_path: str) -> None:
    """The web page on which modules are selected."""
    from playwright.sync_api import sync_playwright

    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        ThreadPoolExecutor() as pool,
        sync_playwright() as playwright,
    ):
        delta = pool.submit(opendelta.LoraModel, backbone("bert"), interactive_modify=8899)
        while "token=" not in printed.getvalue():
            time.sleep(0.05)
        link = next(line for line in printed.getvalue().splitlines() if "token=" in line)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        screen = browser.new_page(viewport={"width": 960, "height": 640})
        screen.goto(link)
        screen.get_by_text("query", exact=True).click()
        screen.get_by_text("12 modules").wait_for()
        screen.screenshot(path=PICTURES / "page.png")
        screen.get_by_role("button", name="Submit").click()
        delta.result()
        browser.close()


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    trees()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        logging.warning("No Chromium or no playwright: pictures/page.png stays as it is.")
    else:
        page(chromium)


if __name__ == "__main__":
    main()
