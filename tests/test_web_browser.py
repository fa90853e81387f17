"""The interactive selection as a user sees it: headless Chromium, mouse and keyboard.

Screenshots go to the folder that ``OPENDELTA_SCREENSHOTS`` names, by default to pytest's own
temporary folder, which keeps those of the last three runs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from web_selection import Backbone, Selection, selecting

from opendelta.exceptions import AddressingError, InsertionError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

pytestmark = pytest.mark.browser

LAYERS = 12
LAYER = "bert.encoder.layer"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("The browser tests need the playwright package: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.fail(
            f"The browser tests need one of {', '.join(names)} on the PATH. On Debian: "
            "apt-get update && apt-get install -y chromium. Without it: pytest -m 'not browser'"
        )
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        yield running
        running.close()


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Selection]]:
    with selecting(capsys) as function:
        yield function


class Screen:
    """One window on one selection, with what went wrong in it."""

    def __init__(self, page: Page, selection: Selection, pictures: Path) -> None:
        self.page, self.selection, self.pictures = page, selection, pictures
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(selection.link)

    def row(self, path: str) -> Locator:
        return self.page.get_by_role("treeitem").and_(self.page.get_by_title(path, exact=True))

    def click(self, path: str) -> None:
        self.row(path).locator(".text").click()

    def unfold(self, path: str) -> None:
        self.row(path).locator(".star").dblclick()

    def toggle(self, path: str) -> None:
        self.row(path).locator(".toggle").click()

    def paths(self) -> list[str]:
        rows = self.page.get_by_role("treeitem").all()
        return [row.get_attribute("title") or "" for row in rows]

    def state(self, path: str) -> str | None:
        return self.row(path).get_attribute("aria-checked")

    def count(self, text: str) -> None:
        self.page.locator("#count").get_by_text(text, exact=True).wait_for(timeout=5000)

    def chosen(self) -> list[str]:
        return [item.inner_text() for item in self.page.locator("#chosen li span").all()]

    def over(self, text: str) -> None:
        self.page.get_by_role("alertdialog").get_by_text(text, exact=True).wait_for(timeout=5000)

    def submit(self) -> list[str]:
        self.page.get_by_role("button", name="Submit").click()
        return self.selection.result()

    def picture(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("OPENDELTA_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def show(
    browser: Browser, start: Callable[..., Selection], pictures: Path
) -> Iterator[Callable[..., Screen]]:
    screens: list[Screen] = []

    def function(backbone: nn.Module | Selection, **kwargs: Any) -> Screen:
        selection = backbone if isinstance(backbone, Selection) else start(backbone, **kwargs)
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        screens.append(Screen(page, selection, pictures))
        return screens[-1]

    yield function
    for screen in screens:
        screen.page.close()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8,
    )  # fmt: skip
    return BertForMaskedLM(config)


def colour(locator: Locator, name: str = "color") -> tuple[int, int, int]:
    value = locator.evaluate(f"element => getComputedStyle(element)['{name}']")
    red, green, blue = map(int, re.findall(r"\d+", value)[:3])
    return red, green, blue


# --- the specification's two recipes --------------------------------------------------------------


def test_unfold_first_then_select_a_few(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    screen.unfold(f"{LAYER}.0-11")
    screen.click(f"{LAYER}.3.attention.self.value")
    screen.click(f"{LAYER}.0.attention.self.value")
    total = sum(parameter.numel() for parameter in bert.parameters())
    screen.count(f"2 modules, {2 * 272} parameters, {100 * 2 * 272 / total:.2f} %")
    screen.picture("unfolded-then-selected")
    expected = [f"{LAYER}.0.attention.self.value", f"{LAYER}.3.attention.self.value"]
    assert screen.submit() == expected
    screen.over("2 modules submitted")
    screen.picture("submitted")
    assert screen.selection.printed.endswith(f"modified_modules:\n[{', '.join(expected)}]\n")
    assert screen.complaints == []


def test_select_folded_then_unfold_and_remove_a_few(
    show: Callable[..., Screen], bert: nn.Module
) -> None:
    screen = show(bert)
    screen.click(f"{LAYER}.0-11.output.dense")
    assert screen.state(f"{LAYER}.0-11.output.dense") == "true"
    screen.page.get_by_text(f"{LAYER}.0-11.output.dense").wait_for()
    screen.unfold(f"{LAYER}.0-11")
    assert [screen.state(f"{LAYER}.{i}.output.dense") for i in range(LAYERS)] == ["true"] * LAYERS
    for removed in (2, 7):
        screen.click(f"{LAYER}.{removed}.output.dense")
    screen.page.get_by_text(f"{LAYER}.0-1,3-6,8-11.output.dense").wait_for()
    screen.picture("selected-then-unfolded")
    assert screen.submit() == [
        f"{LAYER}.{i}.output.dense" for i in range(LAYERS) if i not in (2, 7)
    ]
    assert screen.complaints == []


# --- the tree -------------------------------------------------------------------------------------


def test_folding_again_keeps_the_selection(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    folded = f"{LAYER}.0-11"
    shown = screen.paths()
    screen.unfold(folded)
    screen.click(f"{LAYER}.4.attention")
    screen.unfold(f"{LAYER}.4")  # the same double click, on a block that was unfolded
    assert screen.paths() == shown
    assert screen.state(f"{folded}.attention") == "mixed"
    assert "1 of 12 selected" in screen.row(f"{folded}.attention").inner_text()
    screen.picture("partly-selected")
    screen.click(f"{folded}.attention")
    assert screen.state(f"{folded}.attention") == "true"
    screen.click(f"{folded}.attention")
    assert screen.state(f"{folded}.attention") == "false"
    screen.unfold(folded)
    assert screen.state(f"{LAYER}.4.attention") == "false"


def test_one_click_on_the_star_does_nothing(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    shown = screen.paths()
    screen.row(f"{LAYER}.0-11").locator(".star").click()
    assert screen.paths() == shown
    assert screen.state(f"{LAYER}.0-11") == "false"


def test_expand_and_collapse(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    everything = screen.paths()
    assert everything[0] == "bert" and f"{LAYER}.0-11.attention.self.key" in everything
    screen.click(f"{LAYER}.0-11.attention.self.key")
    encoder = screen.row("bert.encoder")
    assert encoder.locator(".toggle").inner_text() == "[-]"
    screen.toggle("bert.encoder")
    assert encoder.locator(".toggle").inner_text() == "[+]"
    assert encoder.get_attribute("aria-expanded") == "false"
    hidden = [path for path in everything if path.startswith("bert.encoder.")]
    assert screen.paths() == [path for path in everything if path not in hidden]
    assert "12 selected inside" in encoder.inner_text()
    screen.picture("collapsed")
    screen.toggle("bert.encoder")
    assert screen.paths() == everything


def test_colours_of_the_specification(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    red, green, blue = colour(screen.row(f"{LAYER}.0-11").locator(".name"))
    assert red > 200 and green < 130 and blue < 130, "repeated blocks are red"
    red, green, blue = colour(screen.row(f"{LAYER}.0-11").locator(".star"))
    assert red > 200 and green < 160 and blue > 180, "the star is pink"
    key = screen.row(f"{LAYER}.0-11.attention.self.key").locator(".text")
    key.click()
    assert key.evaluate("element => getComputedStyle(element).borderStyle") == "dashed"
    red, green, blue = colour(key, "borderTopColor")
    assert red > 200 and green > 180 and blue < 120, "the box is yellow"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def test_repeats_within_repeats(show: Callable[..., Screen]) -> None:
    screen = show(nn.Sequential(Experts(), Experts()))
    assert screen.paths() == ["0-1", "0-1.experts", "0-1.experts.0-2"]
    screen.click("0-1.experts.0-2")
    screen.page.get_by_text("0-1.experts.0-2", exact=True).wait_for()
    screen.unfold("0-1.experts.0-2")
    screen.click("0-1.experts.1")
    screen.unfold("0-1")
    assert [screen.state(f"{layer}.experts.{i}") for layer in "01" for i in range(3)] == [
        "true", "false", "true", "true", "false", "true",
    ]  # fmt: skip
    screen.click("1.experts.1")
    screen.unfold("1.experts.1")
    assert screen.state("1.experts.0-2") == "true"
    assert screen.submit() == ["0.experts.0", "0.experts.2"] + [f"1.experts.{i}" for i in range(3)]


# --- search, count, keyboard ----------------------------------------------------------------------


def test_search(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    everything = screen.paths()
    search = screen.page.get_by_role("searchbox")
    search.fill("output.dense")
    block = f"{LAYER}.0-11"
    hits = [f"{block}.attention.output.dense", f"{block}.output.dense"]
    assert [path for path in screen.paths() if path.endswith("dense")] == hits
    assert screen.paths()[:4] == ["bert", "bert.encoder", LAYER, block]
    button = screen.page.get_by_role("button", name="Select all 24")
    button.click()
    assert [screen.state(path) for path in hits] == ["true", "true"]
    screen.page.get_by_role("button", name="Deselect all 24").wait_for()
    screen.picture("search")
    search.fill("layer.5.attention")  # one block of the folded ones: its attention, nothing below
    assert screen.paths()[-1] == f"{block}.attention"
    screen.page.get_by_role("button", name="Select all 1").click()
    assert screen.state(f"{block}.attention") == "mixed"
    search.fill("self LINEAR")
    assert [path.rpartition(".")[2] for path in screen.paths()[-3:]] == ["query", "key", "value"]
    screen.toggle(f"{block}.attention")
    assert screen.paths()[-1] == f"{block}.attention"
    search.fill("no such thing")
    assert screen.paths() == []
    screen.page.get_by_text("No module's name or type fits").wait_for()
    screen.page.keyboard.press("Escape")
    assert screen.paths() == everything
    expected = {f"{LAYER}.{i}.{name}.dense" for i in range(LAYERS) for name in
                ("attention.output", "output")} | {f"{LAYER}.5.attention"}  # fmt: skip
    assert set(screen.submit()) == expected
    assert screen.complaints == []


def test_live_count_and_list_follow_the_selection(
    show: Callable[..., Screen], bert: nn.Module
) -> None:
    def count(names: list[str]) -> tuple[int, float]:
        if any(name.endswith("word_embeddings") for name in names):
            raise InsertionError("LoRA needs a linear module, and <b>this</b> is an Embedding.")
        return 12288 * len(names), 12288 * len(names) / 109_482_240

    screen = show(bert, method="lora", count=count)
    screen.count("Nothing selected")
    for name in ("query", "value"):
        screen.click(f"{LAYER}.0-11.attention.self.{name}")
    screen.count("24 modules, 294,912 parameters, 0.27 %")
    patterns = [f"{LAYER}.0-11.attention.self.{name}" for name in ("query", "value")]
    assert screen.chosen() == patterns
    screen.picture("count")
    screen.click("bert.embeddings.word_embeddings")
    screen.count("LoRA needs a linear module, and <b>this</b> is an Embedding.")
    screen.picture("count-problem")
    screen.page.get_by_role("button", name="Deselect bert.embeddings.word_embeddings").click()
    screen.count("24 modules, 294,912 parameters, 0.27 %")
    screen.page.get_by_role("button", name=f"Deselect {patterns[0]}").click()
    screen.count("12 modules, 147,456 parameters, 0.13 %")
    assert screen.chosen() == patterns[1:]
    assert screen.complaints == []


def test_a_newer_selection_gives_up_the_count_of_an_older_one(show: Callable[..., Screen]) -> None:
    screen = show(Backbone(), count=lambda names: (len(names), 0.5))
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    screen.page.route("**/count*", hold_the_first)
    with screen.page.expect_request("**/count*"):
        screen.click("head")
    with screen.page.expect_event("requestfailed"):  # the page gives up the first
        screen.click("embedding")
    screen.count("2 modules, 2 parameters, 50.00 %")
    assert len(held) == 1
    assert screen.page.locator("#count").inner_text() == "2 modules, 2 parameters, 50.00 %"
    assert screen.chosen() == ["embedding", "head"]


def test_everything_by_keyboard(show: Callable[..., Screen]) -> None:
    screen = show(Backbone())
    press = screen.page.keyboard.press

    def active() -> str | None:
        return screen.page.locator(".row.active").get_attribute("title")

    def walk(*keys: str) -> str | None:
        for key in keys:
            press(key)
        return active()

    assert active() == "embedding"
    assert walk("ArrowDown", "ArrowDown", "ArrowDown") == "layer.0-3.attention"
    assert walk("ArrowLeft") == "layer.0-3.attention"  # collapsed
    assert "layer.0-3.attention.q" not in screen.paths()
    assert walk("ArrowLeft") == "layer.0-3"
    assert walk("ArrowDown", "ArrowRight", "ArrowRight") == "layer.0-3.attention.q"
    press("Space")
    assert screen.state("layer.0-3.attention.q") == "true"
    assert walk("ArrowLeft", "ArrowLeft", "ArrowLeft", "*") == "layer.0"
    assert walk("ArrowDown", "-", "+", "ArrowDown") == "layer.0.attention.q"
    press("Enter")
    assert screen.state("layer.0.attention.q") == "false"
    assert walk("End") == "head"
    assert walk("ArrowDown", "Home", "ArrowUp") == "embedding"
    press("/")
    screen.page.keyboard.type("ff")
    assert walk("Enter") == "layer.0.ff"
    press("Space")
    press("Escape")
    assert screen.page.get_by_role("searchbox").input_value() == ""
    assert screen.paths()[-1] == "head"
    press("Control+Enter")
    expected = ["layer.0.ff", *[f"layer.{i}.attention.q" for i in (1, 2, 3)]]
    assert screen.selection.result() == expected
    screen.over("4 modules submitted")
    assert screen.complaints == []


# --- bad input ------------------------------------------------------------------------------------


def test_submitting_nothing_then_something(show: Callable[..., Screen]) -> None:
    screen = show(Backbone())
    screen.page.get_by_role("button", name="Submit").click()
    alert = screen.page.get_by_role("alert")
    alert.get_by_text("Nothing is selected.").wait_for()
    screen.picture("nothing-selected")
    screen.click("head")
    alert.wait_for(state="hidden")
    assert screen.submit() == ["head"]


def test_cancel(show: Callable[..., Screen]) -> None:
    screen = show(Backbone())
    screen.click("head")
    screen.page.get_by_role("button", name="Cancel").click()
    screen.over("Cancelled: nothing is modified")
    screen.picture("cancelled")
    with pytest.raises(AddressingError, match="cancelled"):
        screen.selection.result()


def test_the_second_of_two_browsers_is_told(show: Callable[..., Screen]) -> None:
    first = show(Backbone())
    second = show(first.selection)
    second.click("head")
    second.count(f"1 module, 90 parameters, {100 * 90 / 1242:.2f} %")
    first.click("embedding")
    assert first.submit() == ["embedding"]
    second.page.get_by_role("button", name="Submit").click()
    second.page.get_by_role("alert").get_by_text("The selection is over").wait_for()
    second.picture("second-browser")


def test_nothing_is_shown_without_the_token(show: Callable[..., Screen]) -> None:
    screen = show(Backbone())
    for address in (screen.selection.link.split("?")[0], screen.selection.link[:-1]):
        answer = screen.page.goto(address)
        assert answer is not None and answer.status == 403
        assert "embedding" not in screen.page.content()


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1); '",
    "<svg onload=alert(1)>",
    "{{ 7*7 }}",
]


def test_hostile_names_are_only_text(show: Callable[..., Screen]) -> None:
    hostile_class = type("<img src=x onerror=alert(1)>", (nn.Linear,), {})
    parts = nn.ModuleDict({name: hostile_class(2, 2) for name in HOSTILE})
    screen = show(nn.ModuleDict({"<i>0</i>": parts}), method="<script>alert(1)</script>")
    paths = [f"<i>0</i>.{name}" for name in HOSTILE]
    assert screen.paths() == ["<i>0</i>", *paths]
    for path, name in zip(paths, HOSTILE, strict=True):
        assert screen.row(path).locator(".name").inner_text() == name
        screen.click(path)
    screen.page.get_by_role("button", name="Deselect <i>0</i>.{{ 7*7 }}").wait_for()
    assert screen.chosen() == paths
    screen.page.get_by_role("searchbox").fill("<svg")
    assert screen.paths() == ["<i>0</i>", paths[3]]
    screen.picture("hostile-names")
    assert screen.page.locator("img, svg, iframe, #tree script, #tree i").count() == 0
    assert screen.submit() == paths
    assert screen.complaints == []


# --- speed and independence -----------------------------------------------------------------------


def test_deep_model_paints_within_a_second(show: Callable[..., Screen]) -> None:
    with torch.device("meta"):
        xl = GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    screen = show(xl)
    assert "transformer.h.0-47.attn.c_attn" in screen.paths()
    paint = screen.page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    assert paint < 1000, f"first paint after {paint:.0f} ms"
    screen.click("transformer.h.0-47.attn.c_attn")
    blocks = [f"transformer.h.{i}" for i in range(48)]
    elapsed = screen.page.evaluate(
        """() => {
            const begun = performance.now();
            const star = document.querySelector('#tree .star');
            star.dispatchEvent(new MouseEvent('dblclick', { bubbles: true }));
            document.body.getBoundingClientRect();
            return performance.now() - begun;
        }"""
    )
    assert elapsed < 1000, f"unfolding took {elapsed:.0f} ms"
    assert [path for path in screen.paths() if path in blocks] == blocks
    screen.picture("gpt2-xl-unfolded")
    assert screen.submit() == [f"{block}.attn.c_attn" for block in blocks]


def test_only_this_server_is_asked(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    screen.click("bert.encoder")
    screen.page.get_by_text("1 module,").wait_for()
    own = f"http://127.0.0.1:{screen.selection.port}/"
    asked = [address for address in screen.requests if not address.startswith("data:")]
    assert len(asked) >= 2 and all(address.startswith(own) for address in asked)
    assert screen.complaints == []


def test_small_window(show: Callable[..., Screen], bert: nn.Module) -> None:
    screen = show(bert)
    screen.page.set_viewport_size({"width": 620, "height": 720})
    screen.click(f"{LAYER}.0-11.attention.self.query")
    screen.page.get_by_text("12 modules,").wait_for()
    screen.picture("small-window")
    assert screen.page.get_by_role("button", name="Submit").is_visible()
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 620
